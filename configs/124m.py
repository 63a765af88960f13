"""124M parameters on one GPU: GPT-2 small's size, LLaMA's shape, llm.c's recipe for 10 billion tokens.

    python tokenizer.py train 124m      # a GPT-2-like byte-level BPE of your own text
    python data.py 124m
    python train.py 124m                # or torchrun --nproc_per_node=8 train.py 124m

Measured with these settings on one NVIDIA H200 (2026-11-26, torch 2.11; `python benchmark.py 124m --steps
6`): 545,500 tokens a second, 47.2 % MFU by 6N + attention. At that speed 9.89 B tokens would take 5.0 hours.
llm.c's own CUDA takes 94 minutes on eight A100s, 0.30 s a step (its author's figure).

The source path is where this config looks for the text (llm.c: a 10 B sample of FineWeb); put yours there, or
change it.
"""

from config import Config, Data, Model, Optim, Source, Tokenizer, Train

config = Config(
    # 123,587,328 parameters: 12 x (4 x 768^2 + 3 x 768 x 2048 + 2 x 768) + 50304 x 768 + 768. GPT-2's two
    # matrices of 768 x 3072 have as many weights as SwiGLU's three of 768 x 2048.
    model=Model(
        vocab_size=50304, seq_len=1024, d_model=768, n_layers=12, n_heads=12, d_ff=2048, tie_embeddings=True
    ),
    # GPT-2's number of entries; the model has 50,304 = 393 x 128 rows, which GPUs multiply faster
    tokenizer=Tokenizer(vocab_size=50257, split="gpt2"),
    data=Data(
        sources=(Source("fineweb", paths=("/data/fineweb/*.parquet",)),),
        n_chunks=20,  # as many checkpoints of 3 x 4 bytes a parameter: 1.5 GB each
        expected_tokens=18_865 * 512 * 1024,  # 18,865 steps, 9.89 B
    ),
    optim=Optim(lr=6e-4, final_lr_fraction=0.0, warmup_steps=700, decay="matrices"),
    # 512 x 1024 = 524,288 tokens a step; micro-batches as large as the GPU at hand holds
    train=Train(batch_size=512, micro_batch_size=0, activation_checkpointing="auto"),
)
