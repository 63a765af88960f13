"""Amber, LLM360's 7B: the LLaMA-7B architecture through 360 chunks of 1.26 trillion tokens.

    python tokenizer.py compare /data/llama/tokenizer.model --files SOME_TEXT   # the tokenizer is LLaMA's own
    python data.py 7b                                                           # once, on one machine
    torchrun --nproc_per_node=8 train.py configs/7b.py                          # on every node

Figures: the LLM360 paper's Tables 2 and 3, and, where they differ, the released training code. The source
paths are where this config looks for the text; put yours there, or change them.

Micro-batches and recompute are as published. --train.micro_batch_size=0 --train.activation_checkpointing=auto
lets the plan choose what fits your GPUs: five rows and nothing recomputed on eight of 80 GB. Measured on one
NVIDIA H200 (2026-11-26, torch 2.11, an earlier loss; MFU by 6N + attention). More than one was not measured.

    python benchmark.py 7b --steps N --train.batch_size=10   # every block recomputed: 10,460 tokens/s, 46.2 %
    python benchmark.py 7b --steps N --train.batch_size=8 --train.micro_batch_size=2 \\
        --train.activation_checkpointing=0
                                        # nothing recomputed: 12,340 tokens/s, 54.5 %
"""

from config import Config, Data, Eval, Model, Optim, Parallel, Source, Tokenizer, Train

# Tokens in billions, as published: arXiv 30.00, Books 28.86, C4 197.67, RefinedWeb 665.01, StarCoder 291.92,
# StackExchange 21.75, Wikipedia 23.90. Each is read once.
SOURCES = ("arxiv", "books", "c4", "refinedweb", "starcoder", "stackexchange", "wikipedia")

config = Config(
    # 6,738,415,616 parameters: 32 x (4 x 4096^2 + 3 x 4096 x 11008 + 2 x 4096) + 2 x 32000 x 4096 + 4096
    model=Model(
        vocab_size=32000, seq_len=2048, d_model=4096, n_layers=32, n_heads=32, d_ff=11008, norm_eps=1e-6
    ),
    tokenizer=Tokenizer(path="/data/llama/tokenizer.model", kind="sentencepiece", eot="</s>"),
    data=Data(
        sources=tuple(Source(name, paths=(f"/data/amber/{name}/*.jsonl.zst",)) for name in SOURCES),
        n_chunks=360,
        validation_fraction=0.0001,  # about 126 M tokens
        # 360 chunks of 1,706,976 rows: 1.2585e12 tokens, 274,335 steps. Amber dropped 96 rows at the end of
        # each chunk, which fill no step, and made 360 x 762 = 274,320. Its 1,259.13 B count 2,049 ids a row.
        expected_tokens=360 * 1_706_976 * 2048,
    ),
    optim=Optim(lr=3e-4, final_lr_fraction=0.1, schedule="cosine", warmup_steps=2000, decay="all"),
    # 224 GPUs x 10 sequences x 2048 tokens = 4.59 M tokens a step. Every block is recomputed in the backward
    # pass, as published: ten sequences would leave 85 GiB of activations. Eight GPUs of 80 GB are enough.
    # The seed is that of Amber's first process, 11111 + 0; here it keys the weights, not the order.
    train=Train(batch_size=2240, micro_batch_size=10, activation_checkpointing=1, seed=11111),
    parallel=Parallel(strategy="fsdp"),
    eval=Eval(rows_per_chunk=1000),  # as Analysis360
)
