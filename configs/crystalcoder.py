"""CrystalCoder 7B, from English to code in three runs, each begun from the weights of the one before.

    torchrun --nproc_per_node=8 train.py crystalcoder-phase1     # then phase2, then phase3

Figures: the released pre-training parameters. The paper says "the architecture of LLaMA-7B"; it has
LayerNorm, biases, a tied head, a feed-forward of 10,922, rotary positions on a quarter of each head, and muP.
Moments of AdamW start anew in each phase, as they did: hence the short warm-ups.

Mixtures are met in whole documents, to within a few steps: if a phase of yours ends at another step than
named below, name its checkpoint with --init_from=FOLDER.

muP: what was tuned at a width of 256 holds at 4,096 when matrices learn at m = 256 / 4096 = 1/16 of the
learning rate, 0.012 -> 7.5e-4, and start at 0.073 x sqrt(m) = 0.01825, those that end a sub-layer at 0.01825
/ sqrt(2 x 32); logits are multiplied by 2.22 m = 0.13875, and attention divides by d_head, not by its root.

Not offered: fill-in-the-middle of the code (0.9 of its documents in phase 2, 0.3 in phase 3), and Cerebras'
own scaling of the gate's initialisation, whose factor is not public.
"""

from config import Config, Data, Model, Optim, Parallel, Source, Stage, Tokenizer, Train

EVEN, ODD, ALL = (f"/data/slimpajama/{half}" for half in ("even", "odd", "*"))  # halves, by number of file
CODE = "/data/starcoder"

# Shares of a phase's tokens. The folders are where this config looks for the text; put yours there.
ENGLISH = ("commoncrawl", "c4", "github", "arxiv", "books", "wikipedia", "stackexchange")
SHARES = {
    "phase1": dict(zip(ENGLISH, (0.5335, 0.2665, 0.0496, 0.0433, 0.0413, 0.0342, 0.0317))),
    "phase2": dict(zip(ENGLISH, (0.1984, 0.0991, 0.0185, 0.0161, 0.0154, 0.0127, 0.0118)), starcoder=0.6281),
    "phase3": dict(python=0.3427, html=0.1854, javascript=0.1837, css=0.0879, starcoder=0.0334)
    | dict(commoncrawl=0.0583, wikipedia=0.0584, c4=0.0169, arxiv=0.0167, stackexchange=0.0084, books=0.0083),
}

# Phase 1 is on a line to 1.2408e-4 that takes 294,337 steps after warm-up, and leaves it at step 79,721;
# phase 2 continues from there.
LEFT_AT = 0.012 - (0.012 - 1.2408e-4) * (79_721 - 86) / 294_337  # 0.008787

PHASES = [
    # steps, English, warm-up, peak LR, final LR, checkpoint every, begins from
    ("phase1", 79_721, EVEN, 86, 0.012, LEFT_AT, 1500, ""),
    ("phase2", 214_387, ODD, 86, 0.0087825, 1.3679e-4, 1500, "phase1/checkpoints/step-00079721"),
    ("phase3", 27_728, ALL, 276, 0.002, 0.0002, 1000, "phase2/checkpoints/step-00214387"),
]

# 6,575,278,720 parameters: 32 x (4 x 4096 x 4097 + 2 x 4097 x 10922 + 10923 x 4096 + 4 x 4096) + 32032 x 4096
# + 2 x 4096. (A comment in the released file says 6,583,754,752.)
MODEL = Model(
    vocab_size=32032,  # LLaMA's 32,000, 22 special tokens, 10 that nothing uses
    seq_len=2048,
    d_model=4096,
    n_layers=32,
    n_heads=32,
    d_ff=10922,
    norm="layernorm",
    bias=True,
    rope_fraction=0.25,
    rope_pairs="neighbours",
    tie_embeddings=True,
    embedding_multiplier=14.6,
    logits_multiplier=2.22,
    mup_base_width=256,
    init="mup",
    init_std=0.073,
    init_trunc=2,
)


def phase(name, steps, english, warmup_steps, lr, final_lr, every, before) -> Config:
    tokens, shares = steps * 2112 * 2048, SHARES[name]
    folders = {source: f"{english if source in ENGLISH else CODE}/{source}" for source in shares}
    folders |= {"starcoder": CODE} if "starcoder" in shares else {}  # all languages
    return Config(
        model=MODEL,
        tokenizer=Tokenizer(path="/data/llama/tokenizer.model", kind="sentencepiece", eot="</s>"),
        data=Data(
            sources=tuple(Source(s, paths=(f"{folder}/**/*.jsonl.zst",)) for s, folder in folders.items()),
            stages=(Stage(name, weights=shares, tokens=tokens),),
            validation_fraction=0.0001,
            expected_tokens=tokens,
        ),
        optim=Optim(
            lr=lr,
            final_lr_fraction=final_lr / lr,
            schedule="linear",
            warmup_steps=warmup_steps,
            eps=1e-9,
            decay="matrices",
        ),
        # 2112 x 2048 = 4,325,376 tokens a step; published: 66 sequences x 16 CS-2 x 2, here 11 x 192
        train=Train(
            batch_size=2112,
            micro_batch_size=11,
            seed=1,
            checkpoint_every=every,
            checkpoint_chunks=False,
            activation_checkpointing=1,  # without it, 11 sequences do not fit into 80 GB
        ),
        parallel=Parallel(strategy="fsdp"),  # on GPUs; a CS-2 has no need of it
        init_from=f"runs/crystalcoder-{before}" if before else "",
    )


configs = {row[0]: phase(*row) for row in PHASES}
