"""TinyLlama 1.1B: a small LLaMA with grouped queries, trained three times through 950 B tokens.

    torchrun --nproc_per_node=8 train.py tinyllama      # on each of two nodes, as published

Figures: the README and pretrain/tinyllama.py. Its own initialisation is small_wang's sqrt(2 / (5 d)) but for
two matrices: the attention's output, which it does not shrink, and the feed-forward's, of 1 / (L sqrt(d_ff)).
It counted max_step = 1,430,512 in a unit that its issue 27 disputes; as steps of 2,097,152 tokens, it is the
3 T tokens that the README states.
"""

from config import Config, Data, Model, Optim, Source, Stage, Tokenizer, Train

TOKENS = 1_430_512 * 1024 * 2048  # 3.0 T

config = Config(
    # 1,100,048,384 parameters: 22 x (2 x 2048^2 + 2 x 2048 x 256 + 3 x 2048 x 5632 + 2 x 2048) + 2 x 32000 x
    # 2048 + 2048
    model=Model(
        vocab_size=32000,
        seq_len=2048,
        d_model=2048,
        n_layers=22,
        n_heads=32,
        n_kv_heads=4,
        d_ff=5632,
        init="small_wang",
    ),
    tokenizer=Tokenizer(path="/data/llama/tokenizer.model", kind="sentencepiece", eot="</s>"),
    data=Data(
        sources=(
            Source("slimpajama", paths=("/data/slimpajama/*.jsonl.zst",)),
            Source("starcoder", paths=("/data/starcoder/*.parquet",)),
        ),
        stages=(Stage(weights={"slimpajama": 0.693584, "starcoder": 0.306416}, tokens=TOKENS),),
        validation_fraction=0.0001,
        expected_tokens=TOKENS,
    ),
    optim=Optim(lr=4e-4, warmup_steps=2000, decay="all"),  # its AdamW has one group
    # 2 nodes x 512 sequences x 2048 tokens = 2.1 M tokens a step
    train=Train(batch_size=1024, micro_batch_size=8, seed=3407),
)
