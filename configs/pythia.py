"""Pythia, ten sizes from 14M to 12B that read the same text in the same order: one table.

    python data.py pythia-14m                             # one dataset for all sizes
    torchrun --nproc_per_node=8 train.py pythia-160m

Figures: the released configs. They differ from the README at 1b, where its table says 3.0e-4, and in how 6.9b
and 12b began: their configs leave out the initialisation of the others, so that they have GPT-NeoX's default
(the README's erratum). That norms and biases do not decay is GPT-NeoX's default too.

Checkpoints, as published: steps 0, 1, 2, 4, ..., 512 and every 1,000 to 143,000: 154. Ours continue with
1,024, 2,048, ..., 131,072: 8 more. A chunk of data is 1,000 steps. Here training is in BF16; all but 1b were
trained in FP16.
"""

from config import Config, Data, Model, Optim, Parallel, Source, Tokenizer, Train

# fmt: off
SIZES = [
    # d_model, layers, heads, LR, micro-batch, rows of the embedding: 50,277 entries, padded to 128 a GPU
    ("14m",   128,  6,  4, 1e-3,   32, 50304),
    ("31m",   256,  6,  8, 1e-3,   32, 50304),
    ("70m",   512,  6,  8, 1e-3,   32, 50304),
    ("160m",  768, 12, 12, 6e-4,   32, 50304),
    ("410m", 1024, 24, 16, 3e-4,   32, 50304),
    ("1b",   2048, 16,  8, 2.5e-4, 16, 50304),
    ("1.4b", 2048, 24, 16, 2e-4,   16, 50304),
    ("2.8b", 2560, 32, 32, 1.6e-4, 16, 50304),
    ("6.9b", 4096, 32, 32, 1.2e-4,  8, 50432),
    ("12b",  5120, 36, 40, 1.2e-4,  8, 50688),
]
# fmt: on
FSDP = ("6.9b", "12b")  # no GPU of 80 GB holds these whole: 16 bytes a parameter

configs = {
    name: Config(
        # 160m: 162,322,944 parameters: 12 x (12 x 768^2 + 13 x 768) + 2 x 50304 x 768 + 2 x 768. A layer has
        # 4 + 2 x 4 matrices of d x d; biases of 3 + 1 + 4 + 1 and norms of 2 x 2 times d.
        model=Model(
            vocab_size=vocab_size,
            seq_len=2048,
            d_model=d_model,
            n_layers=n_layers,
            n_heads=n_heads,
            d_ff=4 * d_model,
            ffn="gelu",
            norm="layernorm",
            bias=True,
            parallel_residual=True,
            rope_fraction=0.25,
            init="gpt2" if name in ("6.9b", "12b") else "small_wang",
        ),
        tokenizer=Tokenizer(path="/data/pythia/tokenizer.json", vocab_size=50277),
        data=Data(
            sources=(Source("pile", paths=("/data/pile/*.jsonl.zst",)),),
            n_chunks=143,
            validation_fraction=0.0001,
            expected_tokens=143_000 * 1024 * 2048,  # 299.9 B
        ),
        optim=Optim(lr=lr, warmup_steps=1430, decay="matrices"),  # 1 % of 143,000
        train=Train(
            batch_size=1024,  # x 2048 = 2,097,152 tokens a step
            micro_batch_size=micro_batch_size,
            checkpoint_every=1000,
            checkpoint_powers_of_two=True,
            checkpoint_chunks=False,
            activation_checkpointing=int(name == "2.8b" or name in FSDP),
        ),
        parallel=Parallel(strategy="fsdp" if name in FSDP else "ddp"),
        dataset="datasets/pythia",  # one for all sizes
    )
    for name, d_model, n_layers, n_heads, lr, micro_batch_size, vocab_size in SIZES
}
