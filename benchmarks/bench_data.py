"""Measures how fast a whole `python data.py` is, as a share of bare tiktoken's speed on the same text.

    python benchmarks/bench_data.py --tokenizer tokenizers/demo [FILES ...] [--workers 2] [--runs 5]

Without FILES the text is Python's standard library, tests included. Bare tiktoken is
`encode_ordinary_batch` with as many threads as the build has workers, on strings that are already in memory.
The build reads, encodes, shuffles, writes and hashes; its time includes starting its processes and waiting
for the disk (fsync). The two take turns, so that other programs on the machine slow down both. Prints
medians and their ratio; the goal is a ratio of 0.85.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiktoken

import configurator
import data
import tokenizer
from config import Config, ConfigError, Data, Model, Source, Tokenizer, Train
from dataset import Dataset
from formats import documents, hf_tokenizer


def main() -> None:
    parser = configurator.parser(__doc__)
    parser.add_argument("files", nargs="*", help="files, folders and globs [the standard library]")
    parser.add_argument(
        "--tokenizer", default="tokenizers/demo", help="folder or tokenizer.json, byte-level BPE"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    try:
        compare(arguments)
    except ConfigError as error:
        configurator.fail(error)


def compare(arguments: argparse.Namespace) -> None:
    """Times both, in turn, and prints a table. ConfigError where they do not give the same tokens."""
    # Read the text into memory.
    tok = tokenizer.load(arguments.tokenizer)
    paths = tuple(arguments.files) or (f"{sysconfig.get_paths()['stdlib']}/**/*.py",)
    source = Source("text", paths=paths, exclude=("site-packages/*", "dist-packages/*"))
    texts = [document.text for document in documents.read(source)]
    n_bytes = sum(len(text.encode()) for text in texts)

    # Bare tiktoken with the same vocabulary. Ranks are ids: right if ids are in the order of merges, as in
    # GPT-2's tokenizer and in ours.
    special = set(tok.special_tokens.values())
    ranks = {token: id for id, token in enumerate(tok.token_bytes) if token and id not in special}
    pattern = hf_tokenizer.split_of(json.loads(tok.content)["pre_tokenizer"], arguments.tokenizer)
    bare = tiktoken.Encoding("bare", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    times: dict[str, list[float]] = {"bare tiktoken": [], "data.py": []}
    for _ in range(arguments.runs):
        # Bare tiktoken.
        start = time.perf_counter()
        ids = bare.encode_ordinary_batch(texts, num_threads=arguments.workers)
        times["bare tiktoken"].append(time.perf_counter() - start)
        n_tokens = sum(map(len, ids)) + len(ids)  # data.py adds an end of text to each document
        del ids

        # A whole build.
        with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
            config = Config(
                name="bench",
                model=Model(vocab_size=tok.vocab_size, seq_len=1024),
                tokenizer=Tokenizer(path=arguments.tokenizer, eot=""),
                data=Data(
                    sources=(source,),
                    n_chunks=10,
                    workers=arguments.workers,
                    validation_fraction=0.0,
                    max_bad_fraction=0.9,  # tests of the standard library hold files in other encodings
                ),
                train=Train(batch_size=8),
                dataset=f"{folder}/dataset",
            ).resolved()
            start = time.perf_counter()
            with contextlib.redirect_stdout(nowhere):
                data.build(config)
            times["data.py"].append(time.perf_counter() - start)
            built = Dataset(config.dataset).manifest["sources"]["text"]["tokens"]
        if built != n_tokens:
            raise ConfigError(
                f"data.py wrote {built:,} tokens, bare tiktoken gives {n_tokens:,}: compare with a tokenizer "
                "that has no added tokens and no normalizer, such as one trained by tokenizer.py"
            )

    # The table.
    text = f"{len(texts):,} documents, {n_bytes / 1e6:.1f} MB, {n_tokens:,} tokens"
    print(f"{text}, {arguments.workers} workers")
    for name, seconds in times.items():
        runs = " ".join(f"{s:.2f}" for s in seconds)
        print(f"{name:<14} {n_bytes / 1e6 / statistics.median(seconds):6.2f} MB/s   seconds: {runs}")
    medians = [statistics.median(seconds) for seconds in times.values()]
    print(f"ratio          {medians[0] / medians[1]:6.2f}")


if __name__ == "__main__":
    main()
