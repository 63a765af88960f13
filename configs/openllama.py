"""OpenLLaMA 3B, 7B and 13B: LLaMA 1 again, from a corpus that anyone can download.

    torchrun --nproc_per_node=8 train.py openllama-3b

Figures: the released configs, and the README, which says that all hyperparameters are LLaMA's but the corpus,
RedPajama (the first versions of the models). LLaMA has no 3B: its learning rate here is that of the 7B. All
saw 1 T tokens.
"""

from config import Config, Data, Model, Optim, Parallel, Source, Tokenizer, Train

SIZES = [
    # d_model, layers, heads, d_ff
    ("3b", 3200, 26, 32, 8640),  # heads of 100: 3,426,473,600 parameters
    ("7b", 4096, 32, 32, 11008),
    ("13b", 5120, 40, 40, 13824),
]

configs = {
    name: Config(
        model=Model(
            vocab_size=32000,
            seq_len=2048,
            d_model=d_model,
            n_layers=n_layers,
            n_heads=n_heads,
            d_ff=d_ff,
            norm_eps=1e-6,
        ),
        tokenizer=Tokenizer(path="/data/openllama/tokenizer.model", kind="sentencepiece", eot="</s>"),
        data=Data(
            sources=(Source("redpajama", paths=("/data/redpajama/**/*.jsonl",)),),
            validation_fraction=0.0001,
            expected_tokens=1_000_000_000_000,
        ),
        optim=Optim(lr=3e-4, warmup_steps=2000),
        # 2048 x 2048 = 4.19 M tokens a step
        train=Train(batch_size=2048, micro_batch_size=4, activation_checkpointing=int(name == "13b")),
        parallel=Parallel(strategy="fsdp"),
    )
    for name, d_model, n_layers, n_heads, d_ff in SIZES
}
