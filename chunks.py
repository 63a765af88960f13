"""Encoded documents -> the stream of each stage -> rows in training order -> chunks. A part of data.py.

    documents/<stage>.npy       the stream of a stage, only described: which documents it has, and where
    chunks/000.bin ...          its rows, fetched from work/<source>.tokens where the shuffle puts them
    validation/<source>.bin     rows of validation documents

A stage asks each source for a number of tokens. It gets whole passes over the source's documents, and then a
last pass that takes documents in an order of its own until the number is reached. The last document is cut.

Shapes: T is model.seq_len; a row is T + 1 token ids. Memory is bounded by BLOCK_BYTES and BLOCK_DOCUMENTS,
and a byte for each document.
"""

import hashlib
import os
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from config import Config, ConfigError, Stage
from dataset import BLOCK_DOCUMENTS, hash64, line_of, locate, scramble

# Size of the rows that are fetched at once: 32 MiB. More would mean fewer sweeps over the tokens on disk.
BLOCK_BYTES = 1 << 25


# ---- stages: which documents, how often -------------------------------------------------------------------


def stage_tokens(stage: Stage, sources: dict[str, dict]) -> dict[str, int]:
    """Tokens that a stage asks of each source, in the order of the sources: {"web": 750, "code": 250}."""
    asked = {}
    if stage.weights:
        # Round at the borders between sources, so that the sum is stage.tokens.
        names = [name for name in sources if name in stage.weights]
        shares = np.cumsum([stage.weights[name] for name in names]) / sum(stage.weights.values())
        begin = 0
        for name, share in zip(names, shares):
            end = round(stage.tokens * float(share))
            asked[name] = end - begin
            begin = end
    else:
        epochs = stage.epochs or dict.fromkeys(sources, 1.0)
        for name in sources:
            if name in epochs:
                asked[name] = round(epochs[name] * sources[name]["tokens"])
    for name, tokens in asked.items():
        if tokens < 2:  # one would be an end-of-text token without text
            raise ConfigError(
                f"stage {stage.name!r} would get {tokens} tokens of source {name!r}; raise its weight or "
                "epochs, or the stage's tokens, or leave the source out of the stage"
            )
    return asked


def stage_documents(
    asked: dict[str, int], sources: dict[str, dict], entries: dict[str, np.ndarray], key: np.uint64
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """The stream of a stage in blocks: (name of the source, numbers of documents, tokens of each).

    2.3 times a source's tokens are two passes over all its documents, and a last pass over those that come
    first in an order keyed by `key`, until 0.3 of the tokens are reached. The last of these is cut.
    """
    for name, wanted in asked.items():
        # `whole` passes over all documents, and one more for the rest.
        whole, rest = divmod(wanted, sources[name]["tokens"])
        limit, left = last_pass(entries[name], key, rest)
        for epoch in range(whole + (rest > 0)):
            for first in range(0, len(entries[name]), BLOCK_DOCUMENTS):
                block = entries[name][first : first + BLOCK_DOCUMENTS]
                # Count the tokens taken of each document: none of a validation document.
                tokens = np.where(block["offset"] >= 0, block["tokens"], 0)
                if epoch == whole:
                    # In the last pass, documents below the limit are whole; those at it share the rest.
                    rank = scramble(block["hash"] ^ key)
                    tokens[rank > limit] = 0
                    for i in np.flatnonzero((rank == limit) & (tokens > 0)):
                        # 1 token would be an end-of-text token without text.
                        tokens[i] = min(tokens[i], left) if left > 1 else 0
                        left -= tokens[i]
                taken = np.flatnonzero(tokens)
                yield name, first + taken, tokens[taken]


def last_pass(entries: np.ndarray, key: np.uint64, wanted: int) -> tuple[np.uint64, int]:
    """Finds documents that make up `wanted` tokens: those whose rank is below a limit, and then those at it.

    The rank of a document is its hash, scrambled with the key. Returns the limit, and the tokens that are
    left for the documents at it. The limit is found by bisection, in 64 sweeps over the hashes: a sort would
    hold all of them in memory.
    """

    def tokens_below(limit: int) -> int:
        total = 0
        for first in range(0, len(entries), BLOCK_DOCUMENTS):
            block = entries[first : first + BLOCK_DOCUMENTS]
            taken = (block["offset"] >= 0) & (scramble(block["hash"] ^ key) < np.uint64(limit))
            total += int(block["tokens"][taken].sum())
        return total

    # Bisection keeps tokens_below(low) <= wanted < tokens_below(high).
    low, high = 0, 1 << 64
    left = wanted
    while wanted and high - low > 1:
        middle = (low + high) // 2
        tokens = tokens_below(middle)
        if tokens <= wanted:
            low, left = middle, wanted - tokens
        else:
            high = middle
    return np.uint64(low), left


def write_stage(
    path: Path, config: Config, stage: Stage, sources: dict[str, dict], entries: dict[str, np.ndarray]
) -> dict:
    """Writes the table of a stage's stream (see data.py); returns what the manifest says of the stage.

    Raises ConfigError where the stage has no row, or no row of one of its sources.
    """
    asked = stage_tokens(stage, sources)
    key = hash64(f"{config.data.seed}/{stage.name}")

    # Count first: the size of the table is needed before it is written.
    mixture = {}
    for name, wanted in asked.items():
        epochs = stage.epochs.get(name, wanted / sources[name]["tokens"])
        mixture[name] = {"epochs": epochs, "asked_tokens": wanted, "documents": 0, "tokens": 0, "cut": None}
    for name, numbers, tokens in stage_documents(asked, sources, entries, key):
        mixture[name]["documents"] += len(numbers)
        mixture[name]["tokens"] += int(tokens.sum())
    n_documents = sum(part["documents"] for part in mixture.values())

    # Then write it, and note documents that are cut.
    table = np.lib.format.open_memmap(path, "w+", "<i8", (3, n_documents + 1))
    source_names = list(sources)
    n = total = 0  # documents and tokens so far
    for name, numbers, tokens in stage_documents(asked, sources, entries, key):
        block = slice(n, n + len(numbers))
        table[0, block] = total + np.cumsum(tokens) - tokens
        table[1, block] = source_names.index(name)
        table[2, block] = numbers
        of_tokens = entries[name]["tokens"][numbers]
        for i in np.flatnonzero(tokens < of_tokens):
            mixture[name]["cut"] = {
                "id": id_of(path.parent, name, int(numbers[i])),
                "tokens": int(tokens[i]),  # in the stream; the last one is an end-of-text token, see `fetch`
                "of_tokens": int(of_tokens[i]),
                "first_token": int(table[0, n + i]),
            }
        n += len(numbers)
        total += int(tokens.sum())
    table[:, n] = total, -1, -1
    table.flush()

    # Divide the stream into rows. The tokens at its end that fill no row are dropped.
    T = config.model.seq_len
    rows = max(0, total - 1) // T
    dropped = total - rows * T - 1
    if not rows:
        raise ConfigError(
            f"stage {stage.name!r} has {total:,} tokens, not one row of model.seq_len={T} + 1; add "
            "text, epochs or tokens"
        )
    last = list(mixture)[-1]
    if mixture[last]["tokens"] <= dropped:
        raise ConfigError(
            f"stage {stage.name!r}: the {mixture[last]['tokens']} tokens of source {last!r} would all be "
            f"dropped with the stage's last {dropped} tokens, which fill no row of model.seq_len={T}; raise "
            "its weight or epochs, or leave it out of the stage"
        )
    stated = {"name": stage.name, "repeats": stage.repeats, "tokens": total, "rows": rows}
    return {**stated, "dropped_tokens": dropped, "mixture": mixture}


def id_of(folder: Path, source: str, n: int) -> str:
    """The id of the n-th document of a source; folder: that of the tables."""
    offsets = np.load(folder / f"{source}.offsets.npy", mmap_mode="r")
    return line_of(folder / f"{source}.jsonl", offsets, n)["id"]


# ---- rows -------------------------------------------------------------------------------------------------


class Stream(NamedTuple):
    """A stage's stream of tokens, as its table describes it. The last column of the table is the end."""

    starts: np.ndarray  # first token of each document, in the stream
    sources: np.ndarray  # number of its source
    numbers: np.ndarray  # its number in the source
    cut_ends: list[int]  # the last token of each document that is cut: an end-of-text token belongs there


class Corpus(NamedTuple):
    """The streams, tables and files that rows are fetched from."""

    streams: list[Stream]  # one for each stage
    entries: list[np.ndarray]  # for each source: encode.ENTRY of every document
    files: list  # for each source: work/<source>.tokens, open
    dtype: np.dtype
    eot: int
    T: int


class Parts(NamedTuple):
    """The parts of documents that some rows hold: one entry for every document of every row."""

    sources: np.ndarray  # number of the source
    numbers: np.ndarray  # number in the source
    targets: np.ndarray  # tokens that are targets in the row


def fetch(corpus: Corpus, stream: Stream, rows: np.ndarray, out: np.ndarray, to: np.ndarray) -> Parts:
    """Reads rows of a stream, given in ascending order: row rows[i] becomes out[to[i]], shape (T+1)."""
    # Find every (row, document) pair: the arrays below have one entry for each.
    T = corpus.T
    begin = rows * T
    end = begin + T + 1
    first = np.searchsorted(stream.starts, begin, side="right") - 1
    count = np.searchsorted(stream.starts, end) - first  # documents in each row
    row = np.repeat(np.arange(len(rows)), count)
    pairs_before = np.cumsum(count) - count
    entry = np.arange(len(row)) - pairs_before[row] + first[row]
    source = stream.sources[entry]
    number = stream.numbers[entry]

    # Find the tokens of a pair: left .. right-1 of the stream. They begin at `offset` in the source's file.
    left = np.maximum(stream.starts[entry], begin[row])
    right = np.minimum(stream.starts[entry + 1], end[row])
    offset = left - stream.starts[entry]
    for s in np.unique(source):
        offset[source == s] += corpus.entries[s]["offset"][number[source == s]]

    # Documents side by side in a source's file are read at once: most rows are one read.
    apart = (row[1:] != row[:-1]) | (source[1:] != source[:-1]) | (np.diff(offset) != np.diff(left))
    heads = np.flatnonzero(np.append(True, apart))  # the first pair of each read
    tails = np.append(heads[1:], len(row)) - 1  # the last pair of each read
    places = to[row[heads]] * (T + 1) + left[heads] - begin[row[heads]]  # in `out`
    sizes = right[tails] - left[heads]
    reads = np.stack([places, sizes, offset[heads]]) * out.itemsize  # in bytes
    memory = memoryview(out).cast("B")
    for s, place, size, at in zip(source[heads].tolist(), *reads.tolist()):
        file = corpus.files[s]
        if os.preadv(file.fileno(), [memory[place : place + size]], at) != size:
            raise OSError(5, "is shorter than its table", file.name)

    # Documents that are cut end with an end-of-text token. It can be in two rows.
    for at in stream.cut_ends:
        for r in (at // T, (at - 1) // T):
            i = np.searchsorted(rows, r)
            if i < len(rows) and rows[i] == r:
                out[to[i], at - r * T] = corpus.eot

    # The first token of a row is not a target.
    return Parts(source, number, right - np.maximum(left, begin[row] + 1))


def rows_at(
    corpus: Corpus, stages: list[dict], seed: int, positions: np.ndarray
) -> tuple[np.ndarray, list[Parts]]:
    """The rows at positions of the training order, (positions, T+1), and the parts of documents in them."""
    stage, _, row = locate(positions, stages, seed)
    out = np.empty((len(positions), corpus.T + 1), corpus.dtype)
    parts = []
    for i in np.unique(stage):
        # Rows are fetched in the order of the disk, and put where they belong.
        to = np.flatnonzero(stage == i)
        to = to[np.argsort(row[to])]
        parts.append(fetch(corpus, corpus.streams[i], row[to], out, to))
    return out, parts


def open_streams(folder: Path, stages: list[dict]) -> list[Stream]:
    """The streams of all stages, from their tables; stages: as in the manifest."""
    streams = []
    for stage in stages:
        table = np.load(folder / "documents" / f"{stage['name']}.npy", mmap_mode="r").view(np.ndarray)
        cuts = [part["cut"] for part in stage["mixture"].values() if part["cut"]]
        streams.append(Stream(*table, [cut["first_token"] + cut["tokens"] - 1 for cut in cuts]))
    return streams


# ---- files of rows ----------------------------------------------------------------------------------------


def write_chunks(
    config: Config,
    folder: Path,
    stages: list[dict],
    entries: dict[str, np.ndarray],
    dtype: np.dtype,
    eot: int,
) -> tuple[list[dict], dict[str, str]]:
    """Writes chunks/000.bin ...; returns what the manifest says of each chunk, and the SHA-256 of each file.

    A chunk ends where a step ends: its boundaries are multiples of the batch size. The last chunk also takes
    the rows that fill no step.
    """
    # Find the positions at which chunks begin, and the end of the last one.
    T, B, n_chunks = config.model.seq_len, config.train.batch_size, config.data.n_chunks
    n_rows = sum(stage["rows"] * stage["repeats"] for stage in stages)
    bounds = [k * (n_rows // B) // n_chunks * B for k in range(n_chunks)] + [n_rows]

    block_rows = max(1, BLOCK_BYTES // ((T + 1) * dtype.itemsize))
    files = [open(folder / "work" / f"{name}.tokens", "rb", buffering=0) for name in entries]
    corpus = Corpus(open_streams(folder, stages), list(entries.values()), files, dtype, eot, T)
    chunks, hashes = [], {}
    bar = tqdm(desc="write chunks", total=n_rows, unit=" rows", unit_scale=True,
               disable=not sys.stderr.isatty())  # fmt: skip
    with bar as progress:
        for first, end in pairwise(bounds):
            name = f"chunks/{len(chunks):03d}.bin"
            sha256 = hashlib.sha256()
            targets = np.zeros(len(entries))  # by source; sums of whole numbers are exact below 2^53
            met = [np.zeros(len(table), bool) for table in corpus.entries]  # documents that the chunk holds
            # Write the chunk's rows, a block at a time, and count what they hold.
            with open(folder / name, "wb") as file:
                for begin in range(first, end, block_rows):
                    positions = np.arange(begin, min(begin + block_rows, end))
                    rows, parts_of_stages = rows_at(corpus, stages, config.data.seed, positions)
                    sha256.update(rows)
                    file.write(rows)
                    for parts in parts_of_stages:
                        targets += np.bincount(parts.sources, parts.targets, len(entries))
                        for s in np.unique(parts.sources):
                            met[s][parts.numbers[parts.sources == s]] = True
                    progress.update(len(positions))
            # Describe the chunk for the manifest.
            hashes[name] = sha256.hexdigest()
            shares = {}
            for source, n_targets, seen in zip(entries, targets, met):
                shares[source] = {"tokens": int(n_targets), "documents": int(seen.sum())}
            n = end - first
            chunks.append({"file": name, "first": first, "rows": n, "tokens": n * T, "sources": shares})
    for file in files:
        file.close()
    return chunks, hashes


def write_validation(config: Config, folder: Path, name: str, total: int, dtype: np.dtype) -> dict[str, int]:
    """Writes validation/<source>.bin: rows of the stream of its validation documents, in reading order.

    total: the tokens of that stream. Returns what the manifest says of it.
    """
    T = config.model.seq_len
    rows = max(0, total - 1) // T
    block_rows = max(1, BLOCK_BYTES // (T * dtype.itemsize))
    stream = open(folder / "work" / f"{name}.validation", "rb")
    with stream, open(folder / "validation" / f"{name}.bin", "wb") as file:
        for first in range(0, rows, block_rows):
            stream.seek(first * T * dtype.itemsize)
            tokens = np.frombuffer(stream.read((block_rows * T + 1) * dtype.itemsize), dtype)
            # Row r is tokens r*T .. r*T + T.
            block = np.lib.stride_tricks.sliding_window_view(tokens, T + 1)[::T]
            file.write(block[: rows - first].tobytes())
    return {"validation_rows": rows, "validation_dropped_tokens": total - rows * T - 1 if rows else total}
