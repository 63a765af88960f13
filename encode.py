"""The documents of a source -> one file of tokens, and a table of the documents. A part of data.py.

Worker processes encode batches of documents; the result does not depend on how many there are. For a source
`s`, `encode_source` writes into the folder of the dataset

    documents/s.jsonl, .offsets.npy     see data.py
    work/s.tokens, s.validation         the tokens to train on, and those of the validation documents
    work/s.entries                      ENTRY of every document, in reading order

Validation documents are chosen by a hash of their ids. In a source of few documents, the chosen ones can be
less than a row, less than a quarter of the fraction that is asked for, or more than a fifth of all. Then long
documents are split inside: their ends are for validation, after a gap of one row that is in neither part.

Memory is bounded by BATCH_CHARACTERS, the number of workers and the largest document; and some 30 bytes for
each document are needed to find ids that repeat.
"""

import json
import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import tokenizer
from bpe import end_with_parent, submit
from config import Config, ConfigError, Source
from dataset import hash64
from formats import documents

BATCH_CHARACTERS = 1 << 21  # text sent to a worker at once: 0.2 s of encoding for 5 ms of sending
SPLIT_ROWS = 8  # about how many validation rows splitting gives at least, if documents are long enough

# A build keeps one entry for each document of a source. offset: its first token in work/<source>.tokens, or
# VALIDATION for a validation document.
VALIDATION = -1
ENTRY = np.dtype([("tokens", "<i8"), ("offset", "<i8"), ("hash", "<u8")])


# ---- in a worker process: texts -> tokens -----------------------------------------------------------------


class Worker(NamedTuple):
    """The settings that a worker process needs for every batch."""

    tok: "tokenizer.Tokenizer"
    dtype: np.dtype
    seq_len: int
    seed: int  # data.validation_seed
    fraction: float  # data.validation_fraction


class Encoded(NamedTuple):
    """A batch of documents, encoded."""

    train: np.ndarray  # tokens to train on
    validation: np.ndarray  # tokens of validation documents
    entries: np.ndarray  # ENTRY of each document; offset is 0 or VALIDATION
    lines: list[dict]  # their lines in the table of documents
    refused: list[tuple[str, str]]  # (id, reason) of documents that the tokenizer cannot encode


worker: Worker  # the settings of this process; `start_worker` sets them


def start_worker(path: str, eot: str, dtype: str, seq_len: int, seed: int, fraction: float) -> None:
    """Runs first in every worker process."""
    global worker
    worker = Worker(tokenizer.load(path, eot), np.dtype(dtype), seq_len, seed, fraction)
    end_with_parent()


def encode_batch(batch: list[tuple[str, str, str]], split_share: float) -> Encoded:
    """Encodes documents, given as (id, text, shared). Leaves out and reports those the tokenizer refuses."""
    try:
        return encode_documents(batch, split_share)
    except ConfigError as error:
        # Find out which documents it refuses.
        taken, refused = [], []
        for id, text, shared in batch:
            try:
                worker.tok.encode_array(text)
                taken.append((id, text, shared))
            except ConfigError as reason:
                refused.append((id, str(reason)))
        if not refused:
            raise error from None
        return encode_documents(taken, split_share)._replace(refused=refused)


def encode_documents(batch: list[tuple[str, str, str]], split_share: float) -> Encoded:
    """Encodes documents, given as (id, text, shared). One that is split has two entries and two lines.

    Whether a document is for validation follows from its id alone, whatever its source: a file that is read
    as code and as English is a validation document in both sources or in neither.
    """
    # A document is one part, or two if it is split. Each part has a text, a hash and a line of the table.
    tok = worker.tok
    texts, hashes, lines = [], [], []
    for id, text, shared in batch:
        hash = hash64(f"{worker.seed}/{id}")
        parts = parts_of(text, hash, split_share)
        for first, end, validation in parts:
            part = text[first:end]
            line = {"id": id, "tokens": 0, "bytes": len(part.encode()), "validation": validation}
            if shared:
                line["shared"] = shared
            if len(parts) == 2:
                line["characters"] = [first, end]
            texts.append(part)
            hashes.append(hash)
            lines.append(line)
        if len(parts) == 2:
            (_, gap_first, _), (gap_end, _, _) = parts
            lines[-1]["gap_bytes"] = len(text[gap_first:gap_end].encode())

    # Every part ends with the end-of-text token.
    eot = np.array([tok.eot], np.uint32)
    ids = [np.concatenate([part_ids, eot]) for part_ids in tok.encode_batch(texts)]
    for line, part_ids in zip(lines, ids):
        line["tokens"] = len(part_ids)

    # Parts to train on and parts for validation are two streams.
    entries = np.zeros(len(ids), ENTRY)
    entries["tokens"] = [len(part_ids) for part_ids in ids]
    entries["offset"] = [VALIDATION if line["validation"] else 0 for line in lines]
    entries["hash"] = hashes
    train = joined([part_ids for part_ids, line in zip(ids, lines) if not line["validation"]])
    validation = joined([part_ids for part_ids, line in zip(ids, lines) if line["validation"]])
    return Encoded(train, validation, entries, lines, [])


def joined(ids: list[np.ndarray]) -> np.ndarray:
    """One array of token ids, in the type that is written."""
    stream = np.concatenate(ids) if ids else np.empty(0, worker.dtype)
    if stream.size and stream.max() >= worker.tok.vocab_size:
        raise ConfigError(f"the tokenizer gave id {stream.max()}, beyond its {worker.tok.vocab_size} entries")
    return stream.astype(worker.dtype)


def below(hash: np.uint64, share: float) -> bool:
    """Whether a hash is in the lowest `share` of all 64-bit numbers; share < 1."""
    return bool(hash < np.uint64(share * 2.0**64))


def parts_of(text: str, hash: np.uint64, split_share: float) -> list[tuple[int, int, bool]]:
    """The parts of a document: (first character, end, whether it is for validation). Two where it is split.

    With split_share = 0, the hash decides about whole documents. With more, documents are not for validation
    as a whole; this share of them, if long enough, is split inside.
    """
    if split_share == 0:
        return [(0, len(text), below(hash, worker.fraction))]
    if split_share == 1 or below(hash, split_share):
        end, begin = split_inside(text)
        if begin < len(text):
            return [(0, end, False), (begin, len(text), True)]
    return [(0, len(text), False)]


def split_inside(text: str) -> tuple[int, int]:
    """A document -> (end, begin): text[:end] is trained on, text[begin:] is for validation, between is a gap.

    The validation text has the worker's `fraction` of the tokens, and at least a row. The gap has about a
    row. Both begin at a word. A document of fewer than 4 rows is not split: (len(text), len(text)).
    """
    seq_len = worker.seq_len
    n_tokens = len(worker.tok.encode_array(text))
    row_characters = seq_len * len(text) / max(1, n_tokens)  # on average
    wanted = row_characters * max(1.0, worker.fraction * n_tokens / seq_len)
    while n_tokens >= 4 * seq_len and wanted + 2 * row_characters <= len(text):
        begin = word_start(text, len(text) - int(wanted))
        if len(worker.tok.encode_array(text[begin:])) >= seq_len:
            return word_start(text, begin - int(row_characters)), begin
        # The tokens at the end are longer than the average, so this was not a row: take more text.
        wanted *= 1.2
    return len(text), len(text)


def word_start(text: str, at: int) -> int:
    """The first character of the word that text[at] is in; `at` itself where the word is very long."""
    for i in range(at, max(0, at - 100), -1):
        if text[i - 1].isspace():
            return i
    return at


# ---- a source ---------------------------------------------------------------------------------------------


def encode_source(
    config: Config,
    source: Source,
    inputs: list,
    shared_names: dict[str, tuple[str, str]],
    folder: Path,
    pool: ProcessPoolExecutor,
) -> dict:
    """Writes the files of a source (see above), and returns its counts for the manifest.

    inputs: [path, bytes, ...] of its files. shared_names: what documents.read calls files that several
    sources read. A source with such files is never split inside, because the end of a module's code holds
    other text than the end of its docstrings. Raises ConfigError where nothing is left to train on.
    """

    def encode(split_share: float) -> dict:
        return encode_all(config, source, inputs, shared_names, folder, pool, split_share)

    seq_len, fraction = config.model.seq_len, config.data.validation_fraction
    count = encode(split_share=0.0)

    # Is the choice of whole documents fair?
    n_tokens = count["tokens"] + count["validation_tokens"]
    share = count["validation_tokens"] / max(1, n_tokens)
    some = count["validation_tokens"] > seq_len  # at least a row
    fair = some and count["documents"] and fraction / 4 <= share <= max(0.2, 2 * fraction)

    # If not, split documents inside, as many as are needed: each gives at least a row.
    if fraction and not fair and not count["shared_documents"]:
        n_documents = count["documents"] + count["validation_documents"]
        rows = max(SPLIT_ROWS, fraction * n_tokens / seq_len)
        usable = some and count["documents"]
        count = encode(split_share=min(1.0, rows / max(1, n_documents)))
        # If all documents are too short to be split, an unfair choice is better than none.
        if count["validation_tokens"] <= seq_len and usable:
            count = encode(split_share=0.0)

    if not count["documents"]:
        read = count["validation_documents"] + sum(count["bad"].values())
        raise ConfigError(f"source {source.name!r} has no document to train on; {read:,} were read")
    return {"files": len(inputs), **count, **unique_ids(folder, source.name)}


def encode_all(
    config: Config,
    source: Source,
    inputs: list,
    shared_names: dict[str, tuple[str, str]],
    folder: Path,
    pool: ProcessPoolExecutor,
    split_share: float,
) -> dict:
    """Encodes all documents of a source, and writes its files; returns the counts. See `encode_source`."""
    # Counts by kind of document, in the order that the manifest has them.
    bad = documents.BadDocuments()
    count = dict.fromkeys(("documents", "tokens", "bytes"), 0)
    count |= dict.fromkeys(("validation_documents", "validation_tokens", "validation_bytes"), 0)
    count |= {"gap_bytes": 0, "shared_documents": 0}
    work, table = folder / "work" / source.name, folder / "documents" / source.name
    with ExitStack() as stack:

        def create(path: str):
            return stack.enter_context(open(path, "wb"))

        train = create(f"{work}.tokens")
        validation = create(f"{work}.validation")
        entries = create(f"{work}.entries")
        offsets = create(f"{work}.offsets")
        lines = create(f"{table}.jsonl")
        # Show a progress bar where a person watches.
        bar = tqdm(desc=f"encode {source.name}", total=text_bytes(source, inputs), unit="B", unit_scale=True,
                   disable=not sys.stderr.isatty())  # fmt: skip
        progress = stack.enter_context(bar)

        # Count and write, batch by batch.
        offsets.write(bytes(8))  # the first line begins at 0
        table_bytes = 0  # of the lines that were written
        read = documents.read(source, bad, shared_names)
        for batch in encoded(read, split_share, pool, config.data.workers):
            bad.good -= len(batch.refused)
            for id, reason in batch.refused:
                bad.add(f"{source.name}, {id}: {reason}", "refused by the tokenizer")

            # Offsets become those in the file of training tokens, which has count["tokens"] tokens by now.
            kept = batch.entries["offset"] != VALIDATION
            sizes = batch.entries["tokens"][kept]
            batch.entries["offset"][kept] = count["tokens"] + np.cumsum(sizes) - sizes
            add_counts(count, batch.lines)

            # The table of documents gets a line for each, and `offsets` the end of each line.
            encoded_lines = [json.dumps(line).encode() + b"\n" for line in batch.lines]
            ends = table_bytes + np.cumsum([len(line) for line in encoded_lines], dtype="<i8")
            table_bytes += sum(len(line) for line in encoded_lines)

            train.write(batch.train)
            validation.write(batch.validation)
            entries.write(batch.entries)
            offsets.write(ends)
            lines.write(b"".join(encoded_lines))
            progress.update(count["bytes"] + count["validation_bytes"] - progress.n)
    np.save(f"{table}.offsets.npy", np.memmap(f"{work}.offsets", "<i8", "r"))

    # Too many bad documents are a mistake: the wrong files, or the wrong way to read them.
    total = bad.good + bad.count
    if bad.count > config.data.max_bad_fraction * total:
        raise ConfigError(
            f"source {source.name!r}: {bad.count:,} of {total:,} documents cannot be used, more than "
            f"data.max_bad_fraction={config.data.max_bad_fraction}:\n  " + "\n  ".join(bad.examples)
        )
    return {**count, "bad": bad.reasons, "bad_examples": bad.examples, "split_inside": split_share > 0}


def encoded(
    read: Iterator[documents.Document], split_share: float, pool: ProcessPoolExecutor, n_workers: int
) -> Iterator[Encoded]:
    """Encodes documents in batches, and yields the batches in their order.

    Two batches for each worker are under way: no worker waits, and the memory is bounded.
    """
    pending: deque = deque()
    batch, characters = [], 0
    for document in read:
        batch.append((document.id, document.text, document.shared))
        characters += len(document.text) + 100  # so that a million tiny documents are not one batch
        if characters >= BATCH_CHARACTERS:
            pending.append(submit(pool, encode_batch, batch, split_share))
            batch, characters = [], 0
            if len(pending) > 2 * n_workers:
                yield pending.popleft().result()
    if batch:
        pending.append(submit(pool, encode_batch, batch, split_share))
    while pending:
        yield pending.popleft().result()


def add_counts(count: dict[str, int], lines: list[dict]) -> None:
    """Adds lines of a table of documents to the counts of their source."""
    for line in lines:
        kind = "validation_" if line["validation"] else ""
        count[f"{kind}documents"] += 1
        count[f"{kind}tokens"] += line["tokens"]
        count[f"{kind}bytes"] += line["bytes"]
        count["gap_bytes"] += line.get("gap_bytes", 0)
        count["shared_documents"] += "shared" in line


def text_bytes(source: Source, inputs: list) -> int | None:
    """About how much text a source has, for a progress bar; None where file sizes do not tell."""
    packed = any(os.path.splitext(path)[1] in (".gz", ".zst", ".parquet") for path, *_ in inputs)
    if source.read == "docstrings" or packed:
        return None
    return sum(size for _, size, *_ in inputs)


# ---- ids --------------------------------------------------------------------------------------------------


def unique_ids(folder: Path, name: str) -> dict:
    """Renames documents whose id an earlier document of the source has: "x" again is "x#2", then "x#3".

    So an id means one document. Whether it is for validation still follows from the id that it came with, and
    its line keeps that as "came_as". Rewrites the table of documents. Returns {"duplicate_ids": how many were
    renamed, "duplicate_examples": the first ones}.
    """
    # Equal ids have equal hashes. Different ids of equal hashes are suspects too, and are not renamed.
    hashes = np.memmap(folder / "work" / f"{name}.entries", ENTRY, "r")["hash"]
    order = np.argsort(hashes, kind="stable")
    again = order[1:][hashes[order[1:]] == hashes[order[:-1]]]
    if not len(again):
        return {"duplicate_ids": 0, "duplicate_examples": []}
    suspects = set(hashes[again].tolist())

    # Collect the names that are taken: ids of suspects, and those that a new name could be ("x#2" for "x").
    table = folder / "documents" / f"{name}.jsonl"
    with open(table, "rb") as file:
        taken = {json.loads(line)["id"] for line, hash in zip(file, hashes) if int(hash) in suspects}
    with open(table, "rb") as file:
        ids = (json.loads(line)["id"] for line in file if b"#" in line)
        taken |= {id for id in ids if id.rpartition("#")[0] in taken}

    # Write the table again, and where its lines begin.
    path = folder / "documents" / f"{name}.offsets.npy"
    offsets = np.lib.format.open_memmap(path, "w+", "<i8", (len(hashes) + 1,))
    rewritten = folder / "work" / f"{name}.jsonl"
    counts: dict[str, int] = {}  # id -> the highest number that a document of this id has
    renamed = []
    current = ""  # the name of the present document
    end = 0  # bytes of the table so far
    with open(table, "rb") as file, open(rewritten, "wb") as out:
        for n, (line, hash) in enumerate(zip(file, hashes), 1):
            if int(hash) in suspects:
                about = json.loads(line)
                id = about["id"]
                second_part = about.get("characters", [0])[0] > 0  # it keeps the name of the first part
                if not second_part and id in counts:
                    current, counts[id] = next_name(id, counts[id] + 1, taken)
                    renamed.append(current)
                elif not second_part:
                    current = id
                    counts[id] = 1
                if current != id:
                    line = json.dumps({**about, "id": current, "came_as": id}).encode() + b"\n"
            end += out.write(line)
            offsets[n] = end
    offsets.flush()
    os.replace(rewritten, table)
    return {"duplicate_ids": len(renamed), "duplicate_examples": renamed[:5]}


def next_name(id: str, n: int, taken: set[str]) -> tuple[str, int]:
    """next_name("x", 2, {"x", "x#2"}) -> "x#3", 3"""
    while f"{id}#{n}" in taken:
        n += 1
    return f"{id}#{n}", n
