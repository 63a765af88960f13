"""OLMo 1B, 7B, 65B and 1.7-7B: LayerNorm without weight and bias, and an initialisation of their own.

    python data.py olmo-1b
    torchrun --nproc_per_node=8 train.py olmo-1b

Figures: the released configs, where the paper differs. The paper says that all sizes have a linear schedule
with 5,000 warm-up steps; the configs of 1B and 65B say cosine, the 1B with 2,000. Its Table 1 prints a width
of 4,086 for the 7B's 4,096, and its Table 2 a batch of 2,160, which the released run's steps and tokens agree
with; the config says 2,048. The linear layer that the config calls 22,016 wide is SwiGLU's gate and value in
one.

1.7's cosine is laid out over 3 T tokens; the card says that it was left at 2 T, for 50 B more down to 0,
which are not offered. Its config says a batch of 512, the names of its checkpoints (step1000-tokens4B) 1,024.

Not offered: the looser clip of the first steps (7B and 65B), 65B's batch that doubles every 100 B tokens from
1,024 to 8,192 sequences (it has the last one here), and the 1,000 steps to 0 after the end of the released
7B.
"""

from config import Config, Data, Model, Optim, Source, Tokenizer, Train

# fmt: off
SIZES = [
    # d_model, layers, heads, d_ff, context, LR, schedule, warm-up, batch, micro-batch, decay, tokens
    ("1b",     2048, 16, 16,  8192, 2048, 4e-4,   "cosine", 2000, 2048, 8, "linear", 739_328 * 2048 * 2048),
    ("7b",     4096, 32, 32, 11008, 2048, 3e-4,   "linear", 5000, 2048, 2, "linear", 2_460_000_000_000),
    # warm-up over 10.486 B tokens = 625 x 8192 x 2048, and for 1.7 over 10.486 B = 2500 x 1024 x 4096
    ("65b",    8192, 80, 64, 22016, 2048, 1.5e-4, "cosine",  625, 8192, 1, "all",    2_000_000_000_000),
    ("1.7-7b", 4096, 32, 32, 11008, 4096, 3e-4,   "cosine", 2500, 1024, 2, "all",    3_000_000_000_000),
]
# fmt: on

configs = {
    name: Config(
        # 1b: 1,176,764,416 parameters: 16 x (4 x 2048^2 + 3 x 2048 x 8192) + 50304 x 2048, head and embedding
        model=Model(
            vocab_size=50304,
            seq_len=seq_len,
            d_model=d_model,
            n_layers=n_layers,
            n_heads=n_heads,
            d_ff=d_ff,
            norm="nonparametric_layernorm",
            clip_qkv=8 if name == "1.7-7b" else 0,
            tie_embeddings=name == "1b",
            init="mitchell",
        ),
        # 50,280 entries, padded in the model to 50,304 = 393 x 128
        tokenizer=Tokenizer(path="/data/olmo/tokenizer.json", vocab_size=50280),
        data=Data(
            sources=(Source("dolma", paths=("/data/dolma/*.json.gz",)),),
            validation_fraction=0.0001,
            expected_tokens=tokens,
        ),
        optim=Optim(
            lr=lr, schedule=kind, warmup_steps=warm, warmup_start_fraction=0.1, eps=1e-5, decay=decay
        ),
        train=Train(
            batch_size=batch,
            micro_batch_size=micro,
            seed=6198,
            steps=2_000_000_000_000 // (batch * seq_len) if name == "1.7-7b" else 0,
        ),
    )
    for name, d_model, n_layers, n_heads, d_ff, seq_len, lr, kind, warm, batch, micro, decay, tokens in SIZES
}
