"""OLMo 1B, 7B, 65B and 1.7-7B: LayerNorm without weight and bias, and an initialisation of their own.

    python data.py olmo-1b
    torchrun --nproc_per_node=8 train.py olmo-1b

Figures: the released configs, where the paper differs. The paper says that all sizes have a linear schedule
with 5,000 warm-up steps; the configs of 1B and 65B say cosine, the 1B with 2,000. Its Table 1 prints a width
of 4,086 for the 7B's 4,096, and its Table 2 a batch of 2,160, which the released run's steps and tokens agree
with; the config says 2,048. The linear layer that the config calls 22,016 wide is SwiGLU's gate and value in
one.

1.7's cosine is laid out over 3 T tokens; the card says that it was left at 2 T, for 50 B more down to 0. Its
config said a batch of 512 at first, and was corrected to 1,024 (OLMo@809d2f1e). The way to 0, 11,921 steps of
1024 x 4096 tokens, is a run of its own:

    torchrun --nproc_per_node=8 train.py olmo-1.7-7b --run=runs/olmo-1.7-7b-to-0 --train.steps=0 \\
        --optim.anneal_steps=11921 --init_from=runs/olmo-1.7-7b/checkpoints/step-00476837

The released 7B has 1,000 steps to 0 after the end of its data; here they need data that is left.

65B's batch doubles every 100 B tokens from 1,024 to 8,192 sequences, which was done by hand. Its cosine and
warm-up count tokens: over steps, which become longer, the learning rate would be too low by up to 42 %.
"""

from config import Config, Data, Model, Optim, Parallel, Source, Tokenizer, Train

# fmt: off
SIZES = [
    # d_model, layers, heads, d_ff, context, LR, schedule, warm-up, batch, micro-batch, decay, tokens
    # warm-up in steps: 1.7's 10.486 B tokens are 2500 x 1024 x 4096; 65b has WARMUP_TOKENS
    ("1b",     2048, 16, 16,  8192, 2048, 4e-4,   "cosine", 2000, 2048, 8, "linear", 739_328 * 2048 * 2048),
    ("7b",     4096, 32, 32, 11008, 2048, 3e-4,   "linear", 5000, 2048, 2, "linear", 2_460_000_000_000),
    ("65b",    8192, 80, 64, 22016, 2048, 1.5e-4, "cosine",    0, 1024, 1, "all",    2_000_000_000_000),
    ("1.7-7b", 4096, 32, 32, 11008, 4096, 3e-4,   "cosine", 2500, 1024, 2, "all",    3_000_000_000_000),
]
# fmt: on
WARMUP_TOKENS = {"65b": 5000 * 1024 * 2048}  # 10.486 B
# The limit of the gradient norm is this many times looser in the first steps. 65b and 1.7 count them as
# 2,097,152,000 tokens: 1000 steps of 1024 x 2048, or 500 of 1024 x 4096.
LOOSER = {"7b": (10, 1000), "65b": (5, 1000), "1.7-7b": (5, 500)}  # factor, steps

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
            lr=lr,
            schedule=kind,
            warmup_steps=warm,
            schedule_tokens=tokens if name in WARMUP_TOKENS else 0,  # 65b: t_max 2e12
            warmup_tokens=WARMUP_TOKENS.get(name, 0),
            warmup_start_fraction=0.1,
            eps=1e-5,
            decay=decay,
            grad_clip_start_factor=LOOSER.get(name, (1, 1000))[0],
            grad_clip_start_steps=LOOSER.get(name, (1, 1000))[1],
        ),
        train=Train(
            batch_size=batch,
            micro_batch_size=micro,
            batch_double_tokens=100_000_000_000 if name == "65b" else 0,
            batch_size_max=8192 if name == "65b" else 0,
            activation_checkpointing=int(name == "65b"),  # published: whole layers
            seed=6198,
            steps=2_000_000_000_000 // (batch * seq_len) if name == "1.7-7b" else 0,
        ),
        parallel=Parallel(strategy="ddp" if name == "1b" else "fsdp"),
    )
    for name, d_model, n_layers, n_heads, d_ff, seq_len, lr, kind, warm, batch, micro, decay, tokens in SIZES
}
