"""The laptop demo: Python's own standard library in, a page about every checkpoint out, in under six minutes.

    bash run.sh

The corpus is on every machine that has Python: the modules (source "code"), and the English in them (source
"docs": docstrings and the language reference in pydoc_data/topics.py).
"""

import sysconfig

from config import Config, Data, Eval, Model, Optim, Source, Tokenizer, Train

STDLIB = sysconfig.get_paths()["stdlib"]
# Left out are files that are not the library's text (installed packages, test suites, tables of codes), and
# packages that some versions or systems do not have, so that the demo is much the same everywhere.
EXCLUDE = ("site-packages/*", "dist-packages/*", "test/*", "*/test/*", "*/tests/*", "encodings/*",
           "config-*/*", "*__pycache__/*", "idlelib/*", "tkinter/*", "turtledemo/*", "distutils/*",
           "lib2to3/*")  # fmt: skip

config = Config(
    # 2 x (2 x 128 x 128 + 2 x 128 x 64 + 3 x 128 x 344 + 2 x 128) + 2 x 2048 x 128 + 128 = 0.89 M parameters
    model=Model(vocab_size=2048, seq_len=256, d_model=128, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=344),
    tokenizer=Tokenizer(vocab_size=2048),
    data=Data(
        sources=(
            Source("code", paths=(f"{STDLIB}/**/*.py",), exclude=(*EXCLUDE, "pydoc_data/*")),
            Source("docs", paths=(f"{STDLIB}/**/*.py",), exclude=EXCLUDE, read="docstrings"),
        ),
        n_chunks=12,
        validation_fraction=0.03,
        max_bad_fraction=0.02,  # a few modules are empty files
    ),
    # A run of 727 steps is short. Muon learns more in each than AdamW: it ends 0.1 bits per byte lower.
    optim=Optim(optimizer="muon", lr=6e-3, warmup_steps=40),
    train=Train(batch_size=16, micro_batch_size=8, device="cpu"),  # 16 x 256 = 4,096 tokens a step
    eval=Eval(rows_per_chunk=60, max_rows=100, expect_bits_per_byte={"code": 1.3, "docs": 1.9}),
)
