"""Measures how fast `data.py` makes chunks of JSON lines, beside bare tiktoken and nanoGPT's way.

    python benchmarks/bench_data.py                                # 100 MB of the Python files installed here
    python benchmarks/bench_data.py --files corpus/*.jsonl.gz --tokenizer tokenizers/mine --workers 2

The sides:
    data.py          a whole build: reads, encodes, shuffles, writes, hashes, and waits for the disk (fsync);
                     its time includes starting its worker processes
    bare tiktoken    `encode_ordinary_batch` with as many threads as the build has workers, on strings that
                     are in memory already
    in processes     `encode_ordinary` in as many processes, which do not wait for one another as the threads
                     do; each on strings that it has in memory, and the time is that of the slowest
    datasets         as nanoGPT prepares its data: `load_dataset`, `map` in as many processes, and one file of
                     all tokens, neither shuffled nor hashed. Left out unless `pip install datasets` was done

Each run is a process of its own, and is timed after its imports. The sides take turns, so that other programs
on the machine slow down all of them; the first round is a warm-up and does not count. Prints a line per run,
then medians, and data.py's speed as a multiple of each other side's: the median over the rounds.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import tiktoken

import config
import configurator
import tokenizer
from config import ConfigError, Source
from formats import documents, hf_tokenizer


def write_corpus(path: Path, files: list[str], megabytes: float) -> None:
    """Writes documents as JSON lines, until their text has this many MB of UTF-8."""
    left = megabytes * 1e6
    with open(path, "w", encoding="utf-8") as file:
        for document in documents.read(Source("text", paths=tuple(files))):
            file.write(json.dumps({"id": document.id, "text": document.text}) + "\n")
            left -= len(document.text.encode())
            if left <= 0:
                break


def bare_tiktoken(folder: str) -> tiktoken.Encoding:
    """tiktoken with the vocabulary and the split pattern of a tokenizer of ours.

    Ranks are ids: right if ids are in the order of merges, as in GPT-2's tokenizer and in ours.
    """
    tok = tokenizer.load(folder)
    special = set(tok.special_tokens.values())
    ranks = {token: id for id, token in enumerate(tok.token_bytes) if token and id not in special}
    pattern = hf_tokenizer.split_of(json.loads(tok.content)["pre_tokenizer"], folder)
    return tiktoken.Encoding("bare", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


# ---- the sides: each returns its seconds and the number of tokens -----------------------------------------


def run_build(arguments: argparse.Namespace, corpus: Path, folder: str) -> tuple[float, int]:
    import data

    tok = tokenizer.load(arguments.tokenizer)
    settings = config.Config(
        name="bench",
        model=config.Model(vocab_size=tok.vocab_size, seq_len=1024),
        tokenizer=config.Tokenizer(path=arguments.tokenizer, eot=""),
        data=config.Data(
            sources=(Source("text", paths=(str(corpus),)),),
            n_chunks=10,
            workers=arguments.workers,
            validation_fraction=0.0,
        ),
        train=config.Train(batch_size=8),
        dataset=f"{folder}/dataset",
    ).resolved()
    start = time.perf_counter()
    with contextlib.redirect_stdout(None):
        data.build(settings)
    seconds = time.perf_counter() - start
    return seconds, json.loads(Path(folder, "dataset/manifest.json").read_bytes())["sources"]["text"][
        "tokens"
    ]


def run_tiktoken(arguments: argparse.Namespace, corpus: Path, folder: str) -> tuple[float, int]:
    encoding = bare_tiktoken(arguments.tokenizer)
    with open(corpus, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    start = time.perf_counter()
    ids = encoding.encode_ordinary_batch(texts, num_threads=arguments.workers)
    seconds = time.perf_counter() - start
    return seconds, sum(map(len, ids)) + len(ids)  # the others add an end of text to each document


def run_processes(arguments: argparse.Namespace, corpus: Path, folder: str) -> tuple[float, int]:
    spawn, n = multiprocessing.get_context("spawn"), arguments.workers
    ready, results = spawn.Barrier(n), spawn.Queue()
    for share in range(n):
        spawn.Process(
            target=encode_share, args=(arguments.tokenizer, corpus, share, n, ready, results)
        ).start()
    seconds, tokens = zip(*(results.get() for _ in range(n)))
    return max(seconds), sum(tokens)


def encode_share(folder: str, corpus: Path, share: int, n: int, ready, results) -> None:
    """The work of one of n processes of `run_processes`: every n-th document."""
    encoding = bare_tiktoken(folder)
    with open(corpus, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in itertools.islice(file, share, None, n)]
    ready.wait()
    start = time.perf_counter()
    n_tokens = sum(len(encoding.encode_ordinary(text)) + 1 for text in texts)
    results.put((time.perf_counter() - start, n_tokens))


def run_datasets(arguments: argparse.Namespace, corpus: Path, folder: str) -> tuple[float, int]:
    import datasets

    datasets.disable_progress_bars()
    encoding, eot = bare_tiktoken(arguments.tokenizer), tokenizer.load(arguments.tokenizer).eot

    def encode(document: dict) -> dict:
        ids = [*encoding.encode_ordinary(document["text"]), eot]
        return {"ids": ids, "n_tokens": len(ids)}

    start = time.perf_counter()
    texts = datasets.load_dataset("json", data_files=str(corpus), split="train", cache_dir=folder)
    encoded = texts.map(encode, remove_columns=texts.column_names, num_proc=arguments.workers)
    n_tokens = int(np.sum(encoded["n_tokens"]))
    out = np.memmap(f"{folder}/train.bin", np.uint16, "w+", shape=(n_tokens,))
    at, n_parts = 0, min(1024, len(encoded))  # nanoGPT's number
    for part in range(n_parts):
        block = encoded.shard(n_parts, part, contiguous=True).with_format("numpy")
        ids = np.concatenate(block["ids"][:])
        out[at : at + len(ids)] = ids
        at += len(ids)
    out.flush()
    return time.perf_counter() - start, n_tokens


SIDES: dict[str, Callable] = {
    "data.py": run_build,
    "bare tiktoken": run_tiktoken,
    "in processes": run_processes,
    "datasets": run_datasets,
}


# ---- the comparison ---------------------------------------------------------------------------------------


def one_run(arguments: argparse.Namespace) -> None:
    """The work of one process: a side, once. Prints the result as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        seconds, n_tokens = SIDES[arguments.run](arguments, Path(arguments.files[0]), folder)
    print(json.dumps({"seconds": seconds, "tokens": n_tokens}))


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    """Runs all sides in turn and prints a table. ConfigError where they do not give the same tokens."""
    # Write the text, and train a tokenizer if none is given.
    corpus = folder / "text.jsonl"
    write_corpus(corpus, arguments.files, arguments.megabytes)
    if not arguments.tokenizer:
        arguments.tokenizer = str(folder / "tokenizer")
        tokenizer.train([str(corpus)], arguments.tokenizer, {"vocab_size": 32000}, [])
    sizes = [len(json.loads(line)["text"].encode()) for line in open(corpus, encoding="utf-8")]
    megabytes = sum(sizes) / 1e6

    names = list(SIDES)
    if not importlib.util.find_spec("datasets"):
        names.remove("datasets")
        print("datasets is left out: it is not installed")

    # Each run is this file again, with --run.
    seconds, tokens = {name: [] for name in names}, {}
    for turn in range(arguments.rounds + 1):
        for name in names:
            command = [sys.executable, __file__, "--files", str(corpus), "--tokenizer", arguments.tokenizer]
            command += ["--workers", str(arguments.workers), "--run", name]
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise ConfigError(f"{name} failed; see above")
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            result = json.loads(done.stdout.splitlines()[-1])
            tokens[name] = result["tokens"]
            if turn:
                seconds[name].append(result["seconds"])
            what = f"{result['seconds']:6.2f} s, {megabytes / result['seconds']:5.1f} MB/s"
            print(
                f"{name:14} {what}, whole process {cpu:6.2f} s of CPU{'' if turn else ' (warm-up)'}",
                flush=True,
            )
    if len(set(tokens.values())) > 1:
        raise ConfigError(
            f"the sides give different numbers of tokens: {tokens}; use a tokenizer without added tokens and "
            "normalizer, such as one trained by tokenizer.py"
        )

    # The table.
    print(
        f"\n{megabytes:.1f} MB in {len(sizes):,} documents, {tokens['data.py']:,} tokens, "
        f"{arguments.workers} processes or threads, medians of {arguments.rounds}:"
    )
    for name in names:
        ratio = statistics.median(other / ours for other, ours in zip(seconds[name], seconds["data.py"]))
        speed = megabytes / statistics.median(seconds[name])
        print(f"{name:14} {speed:5.1f} MB/s" + f"   data.py: {ratio:5.2f} of it" * (name != "data.py"))


def main() -> None:
    parser = configurator.parser(__doc__)
    paths = sysconfig.get_paths()
    parser.add_argument(
        "--files",
        nargs="+",
        default=[f"{paths['stdlib']}/**/*.py", f"{paths['purelib']}/**/*.py"],
        help="default: every Python file installed here",
    )
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument(
        "--tokenizer", default="", help="byte-level BPE [32,000 entries, trained on the text]"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, or threads")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--run", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        if arguments.run:
            one_run(arguments)
            return
        with tempfile.TemporaryDirectory() as folder:
            compare(arguments, Path(folder))
    except ConfigError as error:
        configurator.fail(error)


if __name__ == "__main__":
    main()
