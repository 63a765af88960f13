"""The laptop demo: Python's own standard library in, a page about every checkpoint out, in under ten minutes.

    bash run.sh

The corpus is on every machine that has Python: the modules (source "code"), and the English in them (source
"docs": docstrings and the language reference in pydoc_data/topics.py).
"""

import sysconfig

from config import Config, Data, Eval, Model, Optim, Source, Tokenizer, Train

STDLIB = sysconfig.get_paths()["stdlib"]
# Not the library's own text: installed packages, its test suites, tables of codes, and one file read as docs
# below.
EXCLUDE = ("site-packages/*", "dist-packages/*", "test/*", "*/test/*", "*/tests/*", "idlelib/idle_test/*",
           "lib2to3/*", "encodings/*", "pydoc_data/*", "config-*/*", "*__pycache__/*")  # fmt: skip

config = Config(
    # 4 x (2 x 192 x 192 + 2 x 192 x 64 + 3 x 192 x 512) + 2 x 2048 x 192 = 2.0 M parameters and 1.7 k of
    # norms
    model=Model(vocab_size=2048, seq_len=256, d_model=192, n_layers=4, n_heads=6, n_kv_heads=2, d_ff=512),
    tokenizer=Tokenizer(vocab_size=2048),
    data=Data(
        sources=(
            Source("code", paths=(f"{STDLIB}/**/*.py",), exclude=EXCLUDE),
            Source(
                "docs", paths=(f"{STDLIB}/**/*.py",), exclude=EXCLUDE[:8] + EXCLUDE[9:], read="docstrings"
            ),
        ),
        n_chunks=12,
        validation_fraction=0.03,
    ),
    optim=Optim(lr=2e-3, warmup_steps=50),
    train=Train(batch_size=16, micro_batch_size=16, device="cpu"),
    eval=Eval(rows_per_chunk=40, max_rows=100),
)
