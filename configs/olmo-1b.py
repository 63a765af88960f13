"""OLMo-1B: LayerNorm without weight and bias, tied embeddings, no biases, OLMo's initialisation.

    python data.py olmo-1b
    torchrun --nproc_per_node=8 train.py configs/olmo-1b.py

Figures: the released config (OLMo-1B.yaml), where the paper differs from it: the paper says that all sizes
have a linear schedule with 5,000 warm-up steps, the config has a cosine with 2,000. The source path is where
this config looks for the text; put yours there, or change it.
"""

from config import Config, Data, Model, Optim, Source, Tokenizer, Train

config = Config(
    # 1,176,764,416 parameters: 16 x (4 x 2048^2 + 3 x 2048 x 8192) + 50304 x 2048, head and embedding in one
    model=Model(
        vocab_size=50304,
        seq_len=2048,
        d_model=2048,
        n_layers=16,
        n_heads=16,
        d_ff=8192,
        norm="nonparametric_layernorm",
        tie_embeddings=True,
        init="mitchell",
    ),
    # 50,280 entries, padded in the model to 50,304 = 393 x 128
    tokenizer=Tokenizer(path="/data/olmo/tokenizer.json", vocab_size=50280),
    data=Data(sources=(Source("dolma", paths=("/data/dolma/*.json.gz",)),), validation_fraction=0.0001),
    optim=Optim(
        lr=4e-4,
        final_lr_fraction=0.1,
        schedule="cosine",
        warmup_steps=2000,
        warmup_start_fraction=0.1,
        eps=1e-5,
        decay="linear",
    ),
    train=Train(batch_size=2048, micro_batch_size=8),  # 2048 x 2048 = 4.19 M tokens a step
)
