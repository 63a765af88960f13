"""LLaMA 1, 2, 3, 3.1 and 3.2, the family that the others are variations of: a table of sizes.

    python plan.py llama-2-70b
    torchrun --nproc_per_node=8 train.py llama-3.2-1b

Figures: the papers and the released configs. Not published, and so ours: initialisation (Hugging Face's
0.02), which parameters decay, AdamW's epsilon but for LLaMA 2, warm-up of 3 but for the 405B, batch of 3-8b
and 3-70b. 3.2 was pruned from 3.1-8b and distilled; as a run from nothing, it has the 8B's
learning rate here. 405B's batch grew from rows of 4,096 (4 M tokens a step) to 8 M and 16 M tokens in unequal
spans, where train.batch_double_tokens has equal ones: it has 16 M from the start.

seq_len is the length of the rows trained on: 8,192 from LLaMA 3 on. 3.1 and 3.2 reach 131,072 positions by
slowing the slow frequencies down (rope_scaling) and a last stage on long rows.
"""

from config import Config, Data, Model, Optim, Parallel, Source, Stage, Tokenizer, Train

# 128,256 rows: 128,000 entries and 256 special tokens.
LLAMA3 = dict(vocab_size=128256, seq_len=8192, rope_theta=500_000, document_mask=True)
GENERATIONS = {
    "1": dict(vocab_size=32000, seq_len=2048, norm_eps=1e-6),  # conversions of the 65B say 1e-5
    "2": dict(vocab_size=32000, seq_len=4096),
    "3": LLAMA3,
    "3.1": LLAMA3 | dict(rope_scaling=8),
    "3.2": LLAMA3 | dict(rope_scaling=32, tie_embeddings=True),
}
# fmt: off
SIZES = [
    # d_model, layers, heads, kv heads, d_ff, peak LR, tokens, million tokens a step (4: 4,194,304)
    ("1-7b",      4096,  32,  32, 32, 11008, 3e-4,   1.0e12,  4),
    ("1-13b",     5120,  40,  40, 40, 13824, 3e-4,   1.0e12,  4),
    ("1-33b",     6656,  60,  52, 52, 17920, 1.5e-4, 1.4e12,  4),
    ("1-65b",     8192,  80,  64, 64, 22016, 1.5e-4, 1.4e12,  4),
    ("2-7b",      4096,  32,  32, 32, 11008, 3e-4,   2.0e12,  4),
    ("2-13b",     5120,  40,  40, 40, 13824, 3e-4,   2.0e12,  4),
    ("2-70b",     8192,  80,  64,  8, 28672, 1.5e-4, 2.0e12,  4),
    ("3-8b",      4096,  32,  32,  8, 14336, 3e-4,   15.6e12, 4),
    ("3-70b",     8192,  80,  64,  8, 28672, 1.5e-4, 15.6e12, 4),
    ("3.1-8b",    4096,  32,  32,  8, 14336, 3e-4,   15.6e12, 4),
    ("3.1-405b", 16384, 126, 128,  8, 53248, 8e-5,   15.6e12, 16),
    ("3.2-1b",    2048,  16,  32,  8,  8192, 3e-4,   9.0e12,  4),  # the card: "up to 9 T tokens"
    ("3.2-3b",    3072,  28,  24,  8,  8192, 3e-4,   9.0e12,  4),
]
# fmt: on

# LLaMA 1, in per cent of the tokens; LLaMA 3's mixture was published by kind of text only.
MIXTURE = dict(commoncrawl=67, c4=15, github=4.5, wikipedia=4.5, books=4.5, arxiv=2.5, stackexchange=2)


def data(generation: str, tokens: int) -> Data:
    """LLaMA 1 by its mixture; for the others, all text that lies in one folder, once."""
    names = MIXTURE if generation == "1" else ("text",)
    sources = tuple(Source(name, paths=(f"/data/{name}/**/*.jsonl.zst",)) for name in names)
    stage = Stage(weights=MIXTURE, tokens=tokens) if generation == "1" else Stage()
    return Data(sources=sources, stages=(stage,), validation_fraction=0.0001, expected_tokens=tokens)


def llama(name, d_model, n_layers, n_heads, n_kv_heads, d_ff, lr, tokens, millions) -> Config:
    generation = name.partition("-")[0]
    model = Model(
        d_model=d_model, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, d_ff=d_ff,
        **GENERATIONS[generation],
    )  # fmt: skip
    sentencepiece = Tokenizer(path="/data/llama/tokenizer.model", kind="sentencepiece", eot="</s>")
    bpe = Tokenizer(path="/data/llama3/tokenizer.json", vocab_size=128256, eot="<|end_of_text|>")
    return Config(
        model=model,
        tokenizer=sentencepiece if generation in "12" else bpe,
        data=data(generation, int(tokens)),
        optim=Optim(
            lr=lr,
            final_lr_fraction=0.01 if name == "3.1-405b" else 0.1,  # 8e-7: the paper, section 3.4.1
            warmup_steps=8000 if name == "3.1-405b" else 2000,
            eps=1e-5 if generation == "2" else 1e-8,
        ),
        train=Train(
            batch_size=millions * 2**20 // model.seq_len,
            micro_batch_size=1,
            activation_checkpointing=int(d_model >= 6656),
        ),
        # from 3B on, 16 bytes a parameter and the rest are more than 80 GB; plan.py knows how many it takes
        parallel=Parallel(strategy="fsdp" if d_model >= 3072 else "ddp"),
    )


configs = {row[0]: llama(*row) for row in SIZES}
