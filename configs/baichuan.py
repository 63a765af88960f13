"""baichuan-7B, LLaMA-7B with a Chinese and English vocabulary of 64,000, and its 13B sibling with ALiBi.

    torchrun --nproc_per_node=8 train.py baichuan-7b

Figures: the released model configs and cards. How they were trained was never published: the demo's AdamW is
here, but its learning rate of 1e-8 is a placeholder. Learning rate, warm-up and batch are LLaMA 2's for the
same sizes and context. The mixture was not published either: one source path holds all text.
"""

from config import Config, Data, Model, Optim, Parallel, Source, Tokenizer, Train

SIZES = [
    # d_model, layers, heads, d_ff, positions, tokens
    ("7b", 4096, 32, 32, 11008, "rope", 1_200_000_000_000),  # 7,000,559,616 parameters
    ("13b", 5120, 40, 40, 13696, "alibi", 1_400_000_000_000),  # 13,264,901,120
]

configs = {
    name: Config(
        model=Model(
            vocab_size=64000,
            seq_len=4096,
            d_model=d_model,
            n_layers=n_layers,
            n_heads=n_heads,
            d_ff=d_ff,
            norm_eps=1e-6,
            positions=positions,
        ),
        tokenizer=Tokenizer(
            path="/data/baichuan/tokenizer.model", kind="sentencepiece", vocab_size=64000, eot="</s>"
        ),
        data=Data(
            sources=(Source("text", paths=("/data/text/**/*.jsonl.zst",)),),
            validation_fraction=0.0001,
            expected_tokens=tokens,
        ),
        optim=Optim(lr=3e-4, warmup_steps=2000),
        train=Train(batch_size=1024, micro_batch_size=1),  # 1024 x 4096 = 4.19 M tokens a step
        parallel=Parallel(strategy="fsdp"),  # as published: ZeRO, DeepSpeed's name for the idea
    )
    for name, d_model, n_layers, n_heads, d_ff, positions, tokens in SIZES
}
