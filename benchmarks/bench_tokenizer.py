"""Times our BPE trainer against `tokenizers` and `rustbpe` on the same documents and split pattern.

    python benchmarks/bench_tokenizer.py                          # 100 MB of the Python files installed here
    python benchmarks/bench_tokenizer.py --files corpus/*.jsonl.gz --vocab_size 32000 --rounds 3
    python benchmarks/bench_tokenizer.py --encode --megabytes 20  # encoding, against bare tiktoken

Each run is a process of its own. It reads the documents first; that is not timed. The trainers take turns.
Prints a line per run, with the CPU seconds of all its processes and threads; then the medians, our share of
the others' time, the highest memory of a run (with its worker processes), whether the merges are those of
`tokenizers`, and how many tokens rustbpe has in common with us (it breaks ties in another way). Then our
time by part. Exit code 1 where the merges are not the same. Needs `pip install tokenizers`, and shows rustbpe
where it is installed.
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import bpe
import config
import configurator
import tokenizer
from bpe import SPLITS
from formats import documents, hf_tokenizer


def corpus(files: list[str], megabytes: float) -> list[str]:
    """Documents up to this many MB of UTF-8; the last one is truncated."""
    left, texts = int(megabytes * 1e6), []
    for document in documents.read(config.Source("bench", tuple(files))):
        text = document.text.encode()[:left].decode(errors="ignore")
        texts.append(text)
        left -= len(text.encode())
        if left <= 3:  # no character is longer than that
            break
    return texts


def train_ours(texts: list[str], arguments: argparse.Namespace) -> list[str]:
    """The merges of our trainer."""
    settings = config.Tokenizer(vocab_size=arguments.vocab_size, split=arguments.split)
    trained = tokenizer.train_byte_pair(iter(texts), settings, arguments.workers)
    return json.loads(trained.content)["model"]["merges"]


def train_library(texts: list[str], arguments: argparse.Namespace) -> list[str]:
    """The merges of the library's trainer, with the same split pattern and the same special token."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    # The same pattern, then bytes, as ours has them.
    model = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLITS[arguments.split]), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])

    # The training. Merges are lists in newer versions, and strings in older ones.
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(iter(texts), trainer)
    merges = json.loads(model.to_str())["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def train_rustbpe(texts: list[str], arguments: argparse.Namespace) -> list[str]:
    """The merged tokens of rustbpe, spelled as in a tokenizer.json. It does not tell its merges."""
    import rustbpe

    trained = rustbpe.Tokenizer()
    # It has no special token: one entry less is as many merges.
    trained.train_from_iterator(iter(texts), arguments.vocab_size - 1, pattern=SPLITS[arguments.split])
    spelled = hf_tokenizer.SPELLED
    return ["".join(spelled[byte] for byte in token) for token, _ in trained.get_mergeable_ranks()[256:]]


TRAINERS = {"ours": train_ours, "tokenizers": train_library, "rustbpe": train_rustbpe}


def one_run(arguments: argparse.Namespace) -> None:
    """The work of one process: trains once and prints the result as JSON."""
    texts = corpus(arguments.files, arguments.megabytes)
    started, cpu = time.perf_counter(), cpu_seconds()
    merges = TRAINERS[arguments.run](texts, arguments)
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu

    # Memory in KiB, on Linux: the process, and for ours its workers, all as large as the largest.
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if arguments.run == "ours":
        memory += arguments.workers * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(json.dumps({
        "seconds": seconds, "cpu": cpu, "memory": memory * 1024, "merges": merges,
        "documents": len(texts), "bytes": sum(len(text.encode()) for text in texts),
    }))  # fmt: skip


def cpu_seconds() -> float:
    """CPU time of this process with its threads, and of its worker processes that have ended."""
    return sum(os.times()[:4])


def compare_trainers(arguments: argparse.Namespace) -> int:
    """Runs the trainers in turn and prints the result. Returns the exit code."""
    # Each run is this file again, with --run.
    runs = {name: [] for name in TRAINERS}
    if not importlib.util.find_spec("rustbpe"):
        del runs["rustbpe"]
        print("rustbpe is not installed, and is left out: pip install rustbpe")
    for _ in range(arguments.rounds):
        for name, results in runs.items():
            environment = {**os.environ, "RAYON_NUM_THREADS": str(arguments.workers)}
            command = [sys.executable, __file__, *sys.argv[1:], "--run", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
            if done.returncode:
                return done.returncode
            results.append(json.loads(done.stdout.splitlines()[-1]))
            one = results[-1]
            figures = f"{one['seconds']:7.2f} s  {one['cpu']:7.2f} CPU s  {one['memory'] / 1e9:5.2f} GB"
            print(f"{name:10} {figures}  {len(one['merges']):,} merges", flush=True)

    # Medians of the seconds, and the most memory.
    one = runs["ours"][0]
    median = {name: statistics.median(one["seconds"] for one in results) for name, results in runs.items()}
    print(
        f"\n{one['bytes'] / 1e6:.1f} MB in {one['documents']:,} documents, {arguments.vocab_size:,} entries, "
        f"{arguments.split}, {arguments.workers} processes (ours) or threads (others); "
        f"medians of {arguments.rounds}; memory with the documents:"
    )
    for name, results in runs.items():
        memory = max(one["memory"] for one in results) / 1e9
        share = f"ours takes {median['ours'] / median[name]:.2f} of it" if name != "ours" else ""
        print(f"{name:10} {median[name]:7.2f} s  {memory:5.2f} GB  {share}")

    # Whether all runs learned the same.
    same = all(run["merges"] == one["merges"] for run in runs["ours"] + runs["tokenizers"])
    print(f"merges of ours and tokenizers are {'the same' if same else 'NOT THE SAME'}")
    if "rustbpe" in runs:
        tokens = {merge.replace(" ", "") for merge in one["merges"]}
        common = len(tokens & set(runs["rustbpe"][0]["merges"]))
        print(f"rustbpe has {common:,} of our {len(tokens):,} merged tokens")
    print_parts(arguments)
    return not same


def print_parts(arguments: argparse.Namespace) -> None:
    """Prints our time by part.

    Splitting is timed alone in this process, and divided by the number of workers. Counting is the rest of
    count_pieces: counting in the workers, starting them, handing over the texts, adding up their counts.
    """
    pattern, n_merges = SPLITS[arguments.split], arguments.vocab_size - 257
    seconds = {}

    def timed(part: str, function, *inputs):
        started = time.perf_counter()
        result = function(*inputs)
        seconds[part] = time.perf_counter() - started
        return result

    def split_all(texts: list[str]) -> None:
        for text in texts:
            for _ in bpe.split(text, pattern):
                pass

    texts = timed("reading (not in the figures above)", corpus, arguments.files, arguments.megabytes)
    timed("splitting", split_all, texts)
    seconds["splitting"] /= arguments.workers
    counts = timed("counting", bpe.count_pieces, texts, pattern, arguments.workers)
    seconds["counting"] -= seconds["splitting"]
    timed("merging", bpe.learn_merges, counts, n_merges, 1)
    print("ours by part, once: " + ", ".join(f"{part} {value:.2f} s" for part, value in seconds.items()))


def compare_encoders(arguments: argparse.Namespace) -> int:
    """Times encode_batch and tiktoken's encode_ordinary_batch with the same vocabulary, threads and texts."""
    import tiktoken

    # One vocabulary for both: ours, trained on the texts.
    texts = corpus(arguments.files, arguments.megabytes)
    trained = tokenizer.train_byte_pair(texts, config.Tokenizer(vocab_size=8192, split=arguments.split))
    vocab = json.loads(trained.content)["model"]["vocab"]
    ranks = {hf_tokenizer.unspelled(text): id for text, id in vocab.items() if id != trained.eot}
    pattern, size = SPLITS[arguments.split], sum(len(text.encode()) for text in texts) / 1e6
    bare = tiktoken.Encoding("bare", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    # Time them in turn.
    ours, theirs, same = [], [], True
    for _ in range(arguments.rounds):
        started = time.perf_counter()
        expected = bare.encode_ordinary_batch(texts, num_threads=arguments.workers)
        theirs.append(time.perf_counter() - started)
        started = time.perf_counter()
        found = trained.encode_batch(texts, arguments.workers)
        ours.append(time.perf_counter() - started)
        same &= all(ids.tolist() == other for ids, other in zip(found, expected))
        print(f"ours {size / ours[-1]:6.1f} MB/s   tiktoken {size / theirs[-1]:6.1f} MB/s", flush=True)
    ratio = statistics.median(theirs) / statistics.median(ours)
    print(f"median: {ratio:.2f} of tiktoken's speed; ids are {'the same' if same else 'NOT THE SAME'}")
    return not same


def main() -> None:
    parser = configurator.parser(__doc__)
    everything = f"{sysconfig.get_paths()['stdlib']}/**/*.py", f"{sysconfig.get_paths()['purelib']}/**/*.py"
    parser.add_argument(
        "--files", nargs="+", default=everything, help="default: every Python file installed here"
    )
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--vocab_size", type=int, default=32000)
    parser.add_argument("--split", choices=SPLITS, default="gpt4")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, or threads")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--encode", action="store_true", help="time encoding, not training")
    parser.add_argument("--run", choices=TRAINERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        if arguments.run:
            one_run(arguments)
        else:
            sys.exit(compare_encoders(arguments) if arguments.encode else compare_trainers(arguments))
    except config.ConfigError as error:
        configurator.fail(error)


if __name__ == "__main__":
    main()
