"""A 1B for one node of eight GPUs: LLaMA's blocks, and at every choice what the published 1Bs agree on.

    python tokenizer.py train 1b
    python data.py 1b
    torchrun --nproc_per_node=8 train.py 1b

100 B tokens, 93 per parameter. Measured on one NVIDIA H200 (2026-11-26, torch 2.11; `python benchmark.py 1b
--steps N --train.batch_size=16 --train.micro_batch_size=4`): 74,300 tokens a second, 54.6 % MFU by 6N +
attention. More than one GPU was not measured: if eight are eight times as fast, they take 100e9 / 594e3 s =
1.9 days. TinyLlama, a model of the same size, made 24 k tokens a second on an A100 (its authors' figure):
eight would take 6 days.

The source path is where this config looks for the text; put yours there, or change it.
"""

from config import Config, Data, Model, Optim, Source, Tokenizer, Train

config = Config(
    # 1,076,168,704 parameters: 16 x (2 x 2048^2 + 2 x 2048 x 512 + 3 x 2048 x 8192 + 2 x 2048) + 50304 x 2048
    # + 2048
    model=Model(
        vocab_size=50304,  # OLMo's; LLaMA 3's 128,256 rows are a fifth of its 1B
        seq_len=2048,  # TinyLlama, OLMo-1B, Pythia
        d_model=2048,  # 16 layers of 2048: OLMo-1B, OLMo-2-1B, Llama-3.2-1B and Pythia-1B; TinyLlama has 22
        n_layers=16,
        n_heads=32,  # 32 heads of 64, four to a key/value head: Llama-3.2-1B
        n_kv_heads=8,
        d_ff=8192,  # OLMo-1B, OLMo-2-1B, Llama-3.2-1B
        tie_embeddings=True,  # OLMo-1B, Llama-3.2-1B: 103 M parameters once
    ),
    tokenizer=Tokenizer(vocab_size=50304),
    data=Data(
        sources=(Source("text", paths=("/data/text/**/*.jsonl.zst",)),),
        n_chunks=50,  # 2 B tokens each; as many checkpoints of 13 GB
        validation_fraction=0.001,
        expected_tokens=100_000_000_000,
    ),
    # 4e-4: TinyLlama, OLMo-1B and OLMo-2-1B; 2,000 steps of warm-up: TinyLlama and OLMo-1B
    optim=Optim(lr=4e-4, warmup_steps=2000, decay="matrices"),
    # 1024 x 2048 = 2.1 M tokens a step, as TinyLlama; micro-batches as large as the GPU at hand holds
    train=Train(batch_size=1024, micro_batch_size=0, activation_checkpointing="auto"),
)
