"""OLMo 2 1B, 7B and 13B, stage 1: norms on the outputs of sub-layers, and on queries and keys.

    torchrun --nproc_per_node=8 train.py olmo2-1b

Figures: the released configs. The 13B's says a peak of 3e-4, and all four of its stage-2 configs start at
9e-5: as the end of a cosine is a tenth of its peak, that was 9e-4, which the paper says too.

The cosine is laid out over 5 T tokens, and 1B and 7B leave it before: hence a stage of 5 T tokens and
train.steps. The 7B's next stage begins at 6.15e-5, where this schedule is after 3.89 T; it falls to 0 over
50 B tokens of another mixture. Not offered: leaving out rows in which a phrase repeats 32 times.
"""

from config import Config, Data, Model, Optim, Parallel, Source, Stage, Tokenizer, Train

SIZES = [
    # d_model, layers, heads, d_ff, LR, batch, tokens trained on; warm-up: 8.39 B tokens = 2000 x 1024 x 4096
    ("1b", 2048, 16, 16, 8192, 4e-4, 512, 4_000_000_000_000),
    ("7b", 4096, 32, 32, 11008, 3e-4, 1024, 3_900_000_000_000),
    ("13b", 5120, 40, 40, 13824, 9e-4, 2048, 5_000_000_000_000),
]
COSINE = 5_000_000_000_000  # tokens

configs = {
    name: Config(
        model=Model(
            vocab_size=100352,
            seq_len=4096,
            d_model=d_model,
            n_layers=n_layers,
            n_heads=n_heads,
            d_ff=d_ff,
            norm_eps=1e-6,
            norm_place="after",
            qk_norm=True,
            rope_theta=500_000,
            init="normal",
            init_std=0.02,
            init_trunc=3,
        ),
        # 100,278 entries, padded in the model to 100,352 = 784 x 128
        tokenizer=Tokenizer(path="/data/olmo2/tokenizer.json", vocab_size=100278),
        data=Data(
            sources=(Source("olmo-mix", paths=("/data/olmo-mix/**/*.json.gz",)),),
            stages=(Stage(weights={"olmo-mix": 1}, tokens=COSINE),),
            validation_fraction=0.0001,
            expected_tokens=COSINE,
        ),
        optim=Optim(lr=lr, warmup_steps=2000 * 1024 // batch, eps=1e-8, decay="not_embeddings", z_loss=1e-5),
        train=Train(
            batch_size=batch,
            micro_batch_size=2,
            steps=tokens // (batch * 4096),
            activation_checkpointing=int(name == "13b"),
            seed=6198,
        ),
        parallel=Parallel(strategy="ddp" if name == "1b" else "fsdp"),
    )
    for name, d_model, n_layers, n_heads, d_ff, lr, batch, tokens in SIZES
}
