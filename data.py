"""Documents -> tokens -> shuffled rows -> chunks: builds the dataset folder that dataset.py reads.

    python data.py CONFIG [--section.name=value ...]     # builds datasets/<name>, or finds that it is built
    python data.py verify DATASET                        # hashes every file again

Reads the config's sources and its tokenizer. Writes

    manifest.json                settings; counts by source, stage and chunk; SHA-256 of every file
    tokenizer files              so that the folder is complete
    chunks/000.bin ...           rows of seq_len + 1 token ids in training order; see dataset.py for the order
    validation/<source>.bin      rows of text that no chunk holds
    documents/<source>.jsonl     {"id", "tokens", "bytes", "validation"} of every document, in reading order;
                                 where they apply, "shared": source and name of a file that several sources
                                 read, as the first of them has it; "came_as": the document's own id, if an
                                 earlier one has it; "characters": of a part of a document that is split
    documents/<source>.offsets.npy    first byte of each of its lines, and its end
    documents/<stage>.npy        the stream of a stage, int64 (3, documents + 1): first token there, number of
                                 the source, number of the document; the last column is the stream's end

How: worker processes encode batches of documents; the tokens of a source go to one file. The stream of a
stage is only described, by its table; a chunk is written by fetching the rows that the shuffle puts there.
A build works in `<dataset>.partial`, which is renamed when all of it is on disk: what has the final name is
finished. Memory is bounded by the sizes below and by the largest document, but for some bytes a document and
the names of the input files.

Which documents are held out follows from a hash of their ids. A source can have so few documents that this
holds out less than a row, less than a quarter of what is asked for, or more than a fifth of all. Then it is
the ends of long documents that are held out, each after a gap of one row that is in neither part.

Mixtures: a stage asks each source for a number of tokens. It gets whole passes over the documents, and then
a last pass that takes documents in a keyed order until the number is reached. The last document is cut.
"""

if __name__ == "__main__":  # before packages that take a second to import
    import configurator

    configurator.quiet_imports()

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

import tokenizer
from bpe import end_with_parent, submit
from config import Config, ConfigError, Source, Stage, from_command_line, script
from dataset import (
    BLOCK_DOCUMENTS,
    FORMAT,
    Dataset,
    below,
    differences,
    line_of,
    locate,
    number,
    read_manifest,
    scramble,
    settings,
    shuffle,
    unshuffle,
    verify,
)  # fmt: skip
from files import sha256, sync
from formats import documents

__all__ = ["Dataset", "build", "shuffle", "unshuffle", "verify"]

BATCH_CHARACTERS = 1 << 21  # of text to a worker at once: 0.2 s of encoding, against 5 ms of handing over
SPLIT_ROWS = 8  # held out, about, at the least, where documents are long enough to be split
BLOCK_BYTES = 1 << 25  # of rows fetched at once; the larger, the fewer sweeps over the tokens on disk

# What a build knows of each document of a source, in reading order. offset: its first token in the source's
# file of training tokens, or HELD_OUT.
HELD_OUT = -1
ENTRY = np.dtype([("tokens", "<i8"), ("offset", "<i8"), ("hash", "<u8")])


# ---- encoding: a source's documents -> one file of tokens -------------------------------------------------


def start_worker(path: str, eot: str, dtype: str, seq_len: int, seed: int, fraction: float) -> None:
    """Runs first in every worker process."""
    global worker
    worker = tokenizer.load(path, eot), np.dtype(dtype), seq_len, seed, fraction
    end_with_parent()


def encode(batch: list[tuple[str, str, str]], inside: float) -> tuple:
    """What `encode_documents` gives for a batch; and (id, reason) of those that the tokenizer refuses."""
    try:
        return *encode_documents(batch, inside), []
    except ConfigError as error:
        refused, taken = [], []
        for id, text, shared in batch:
            try:
                worker[0].encode_array(text)
                taken.append((id, text, shared))
            except ConfigError as reason:
                refused.append((id, str(reason)))
        if not refused:
            raise error from None
        return *encode_documents(taken, inside), refused


def encode_documents(
    batch: list[tuple[str, str, str]], inside: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict]]:
    """(id, text, shared) of documents -> tokens to train on, tokens held out, ENTRY and table line of each.

    Whether a document is held out follows from its id alone, whatever its source: a file that is read as
    code and as English is held out in both or in neither. With `inside` above 0, a share of the documents,
    no document is held out, but the ends of long ones of this share; the two parts of a document are then two
    entries and two lines, which say their characters.
    """
    tok, dtype, seq_len, seed, fraction = worker
    eot = np.array([tok.eot], np.uint32)
    parts, hashes, lines = [], [], []  # of texts
    for id, text, shared in batch:
        hash = number(f"{seed}/{id}")
        if inside == 0:
            pieces = [(0, len(text), bool(below(hash, fraction)))]  # characters; whether they are held out
        elif inside == 1 or below(hash, inside):  # `below` is for shares under 1
            end, begin = split_inside(tok, text, seq_len, fraction)
            pieces = [(0, end, False), (begin, len(text), True)][: 1 + (begin < len(text))]
        else:
            pieces = [(0, len(text), False)]
        for first, last, held_out in pieces:
            parts.append(text[first:last])
            hashes.append(hash)
            line = {"id": id, "tokens": 0, "bytes": len(parts[-1].encode()), "validation": held_out}
            line |= {"shared": shared} if shared else {}
            lines.append(line | ({"characters": [first, last]} if len(pieces) == 2 else {}))
        if len(pieces) == 2:
            lines[-1] |= {"gap_bytes": len(text[end:begin].encode())}
    ids = [np.concatenate([x, eot]) for x in tok.encode_batch(parts)]
    entries = np.zeros(len(ids), ENTRY)
    entries["tokens"], entries["hash"] = [len(x) for x in ids], hashes
    entries["offset"] = np.array([HELD_OUT if line["validation"] else 0 for line in lines], "<i8")
    lines = [line | {"tokens": len(x)} for line, x in zip(lines, ids)]
    streams = []
    for wanted in (0, HELD_OUT):
        stream = [x for x, offset in zip(ids, entries["offset"]) if offset == wanted]
        stream = np.concatenate(stream) if stream else np.empty(0, dtype)
        if stream.size and stream.max() >= tok.vocab_size:
            raise ConfigError(f"the tokenizer gave id {stream.max()}, beyond its {tok.vocab_size} entries")
        streams.append(stream.astype(dtype))
    return *streams, entries, lines


def split_inside(tok: "tokenizer.Tokenizer", text: str, seq_len: int, fraction: float) -> tuple[int, int]:
    """A document -> (end, begin): text[:end] is trained on, text[begin:] is held out, between them is a gap.

    The held-out part has `fraction` of the tokens, and at least a row; the gap has about a row. Both begin at
    a word. A document of fewer than 4 rows is trained on whole: (len(text), len(text)).
    """
    n_tokens = len(tok.encode_array(text))
    row = seq_len * len(text) / max(1, n_tokens)  # characters of a row, on average
    held = row * max(1.0, fraction * n_tokens / seq_len)
    while n_tokens >= 4 * seq_len and held + 2 * row <= len(text):
        begin = word_start(text, len(text) - int(held))
        if len(tok.encode_array(text[begin:])) >= seq_len:
            return word_start(text, begin - int(row)), begin
        held *= 1.2  # its tokens are longer than the average
    return len(text), len(text)


def word_start(text: str, at: int) -> int:
    """The first character of the word that text[at] is in; `at` itself where a word is very long."""
    starts = (i for i in range(at, max(0, at - 100), -1) if text[i - 1].isspace())
    return next(starts, at)


def encoded(read: Iterator[documents.Document], inside: float, pool: ProcessPoolExecutor, n: int) -> Iterator:
    """What `encode` gives for documents, in their order whatever n, the number of workers.

    Two batches a worker are under way: enough that none waits, and all the memory that this takes.
    """
    pending: deque = deque()
    batch, characters = [], 0
    for document in read:
        batch.append((document.id, document.text, document.shared))
        characters += len(document.text) + 100  # so that a million tiny documents are not one batch
        if characters >= BATCH_CHARACTERS:
            pending.append(submit(pool, encode, batch, inside))
            batch, characters = [], 0
            if len(pending) > 2 * n:
                yield pending.popleft().result()
    if batch:
        pending.append(submit(pool, encode, batch, inside))
    while pending:
        yield pending.popleft().result()


def encode_source(
    config: Config, source: Source, names: dict[str, tuple[str, str]], folder: Path, pool: ProcessPoolExecutor
) -> dict:
    """Writes a source's tokens and its table of documents, split inside them if need be; returns the counts.

    `names`: what documents.read calls files that several sources read. A source with such files is not split
    inside: the end of a module's code holds other text than the end of its docstrings.
    """
    T, fraction = config.model.seq_len, config.data.validation_fraction
    count = encode_all(config, source, names, folder, pool, inside=0.0)
    held_out = count["validation_tokens"] / max(1, count["validation_tokens"] + count["tokens"])
    too_few = count["validation_tokens"] <= T or held_out < fraction / 4
    too_few = too_few or not count["documents"] or held_out > max(0.2, 2 * fraction)
    if fraction and too_few and not count["shared_documents"]:
        n_documents = count["documents"] + count["validation_documents"]
        rows = max(SPLIT_ROWS, fraction * (count["tokens"] + count["validation_tokens"]) / T)
        inside = min(1.0, rows / max(1, n_documents))  # each document that is split gives at least a row
        worked = count["validation_tokens"] > T and count["documents"]
        count = encode_all(config, source, names, folder, pool, inside)
        if count["validation_tokens"] <= T and worked:  # its documents are too short to be split
            count = encode_all(config, source, names, folder, pool, inside=0.0)
    if not count["documents"]:
        read = count["validation_documents"] + sum(count["bad"].values())
        raise ConfigError(f"source {source.name!r} has no document to train on; {read:,} were read")
    return count | unique_ids(folder, source.name)


def encode_all(
    config: Config,
    source: Source,
    names: dict[str, tuple[str, str]],
    folder: Path,
    pool: ProcessPoolExecutor,
    inside: float,
) -> dict:
    """Writes work/<source>.{tokens,validation,entries} and documents/<source>.*; returns the counts."""
    bad = documents.BadDocuments()
    kinds = ("documents", "tokens", "bytes")
    count = dict.fromkeys(
        [*kinds, *(f"validation_{kind}" for kind in kinds), "gap_bytes", "shared_documents"], 0
    )
    work, table = folder / "work" / source.name, folder / "documents" / source.name
    paths = f"{work}.tokens", f"{work}.validation", f"{work}.entries", f"{work}.offsets", f"{table}.jsonl"
    files, end = [open(path, "wb") for path in paths], 0  # end: bytes of the table's lines so far
    files[paths.index(f"{work}.offsets")].write(bytes(8))  # the first line begins at 0
    read = documents.read(source, bad, names)
    with bar(f"encode {source.name}", "B", text_bytes(source)) as progress:
        for train, held, entries, lines, refused in encoded(read, inside, pool, config.data.workers):
            bad.good -= len(refused)
            for id, reason in refused:
                bad.add(f"{source.name}, {id}: {reason}", "refused by the tokenizer")
            kept = entries["offset"] == 0
            ends = count["tokens"] + np.cumsum(entries["tokens"][kept])
            entries["offset"][kept] = ends - entries["tokens"][kept]
            for line in lines:
                prefix = "validation_" if line["validation"] else ""
                for kind, value in zip(kinds, (1, line["tokens"], line["bytes"])):
                    count[prefix + kind] += value
                count["gap_bytes"] += line.get("gap_bytes", 0)
                count["shared_documents"] += "shared" in line
            lines = [json.dumps(line).encode() + b"\n" for line in lines]
            offsets = end + np.cumsum([len(line) for line in lines], dtype="<i8")
            end += sum(map(len, lines))
            for file, data in zip(files, (train, held, entries, offsets, b"".join(lines))):
                file.write(data)
            progress.update(count["bytes"] + count["validation_bytes"] - progress.n)
    for file in files:
        file.close()
    np.save(f"{table}.offsets.npy", np.memmap(f"{work}.offsets", "<i8", "r"))
    total = bad.good + bad.count
    if bad.count > config.data.max_bad_fraction * total:
        raise ConfigError(
            f"source {source.name!r}: {bad.count:,} of {total:,} documents cannot be used, more than "
            f"data.max_bad_fraction={config.data.max_bad_fraction}:\n  " + "\n  ".join(bad.examples)
        )
    stated = {"files": len(documents.files(source)), **count, "bad": bad.reasons}
    return {**stated, "bad_examples": bad.examples, "split_inside": inside > 0}


def unique_ids(folder: Path, name: str) -> dict:
    """Renames documents whose id an earlier document of the source has: "x" again is "x#2", then "x#3".

    So every id means one document. Whether it is held out still follows from the id that it came with, which
    its line keeps as "came_as". Returns {"duplicate_ids": how many were renamed, "duplicate_examples": the
    first ones}.
    """
    hashes = np.memmap(folder / "work" / f"{name}.entries", ENTRY, "r")["hash"]
    order = np.argsort(hashes, kind="stable")
    again = order[1:][hashes[order[1:]] == hashes[order[:-1]]]  # equal ids have equal hashes
    table, aside = folder / "documents" / f"{name}.jsonl", folder / "work" / f"{name}.jsonl"
    if not len(again):
        return {"duplicate_ids": 0, "duplicate_examples": []}
    suspects = set(hashes[again].tolist())
    with open(table, "rb") as file:
        known = {json.loads(line)["id"] for line, hash in zip(file, hashes) if int(hash) in suspects}
    with open(table, "rb") as file:  # ids that a new name could be: "x#2", where "x" is a suspect
        ids = (json.loads(line)["id"] for line in file if b"#" in line)
        known |= {id for id in ids if id.rpartition("#")[0] in known}
    counts, renamed, end = {}, [], 0
    current = ""  # the name of the document under way
    offsets = np.lib.format.open_memmap(
        folder / "documents" / f"{name}.offsets.npy", "w+", "<i8", (len(hashes) + 1,)
    )
    with open(table, "rb") as file, open(aside, "wb") as out:
        for n, (line, hash) in enumerate(zip(file, hashes), 1):
            if int(hash) in suspects:
                about = json.loads(line)
                id, second_part = about["id"], about.get("characters", [0])[0] > 0
                if not second_part:
                    current, counts[id] = next_name(id, counts[id] + 1, known) if id in counts else (id, 1)
                    renamed += [current] if current != id else []
                if current != id:
                    line = json.dumps({**about, "id": current, "came_as": id}).encode() + b"\n"
            end += out.write(line)
            offsets[n] = end
    offsets.flush()
    os.replace(aside, table)
    return {"duplicate_ids": len(renamed), "duplicate_examples": renamed[:5]}


def next_name(id: str, n: int, known: set[str]) -> tuple[str, int]:
    """next_name("x", 2, {"x", "x#2"}) -> "x#3", 3"""
    while f"{id}#{n}" in known:
        n += 1
    return f"{id}#{n}", n


def text_bytes(source: Source) -> int | None:
    """About how much text a source has, for a progress bar; None where file sizes do not tell."""
    files = documents.files(source)
    if source.read == "docstrings" or any(path.suffix in (".gz", ".zst", ".parquet") for path in files):
        return None
    return sum(path.stat().st_size for path in files)


def bar(what: str, unit: str, total: int | None) -> tqdm:
    return tqdm(desc=what, unit=unit, unit_scale=True, total=total, disable=not sys.stderr.isatty())


# ---- stages: which documents, how often -------------------------------------------------------------------


def stage_tokens(stage: Stage, sources: dict[str, dict]) -> dict[str, int]:
    """Tokens that a stage asks of each source, in the order of the sources: {"web": 750, "code": 250}."""
    if stage.weights:
        names = [name for name in sources if name in stage.weights]
        ends = np.cumsum([stage.weights[name] for name in names]) / sum(stage.weights.values())
        ends = [round(stage.tokens * float(end)) for end in ends]  # so that their sum is stage.tokens
        asked = {name: end - begin for name, begin, end in zip(names, [0, *ends], ends)}
    else:
        epochs = stage.epochs or dict.fromkeys(sources, 1.0)
        asked = {name: round(epochs[name] * sources[name]["tokens"]) for name in sources if name in epochs}
    for name, tokens in asked.items():
        if tokens < 2:  # an end-of-text token alone is no text
            raise ConfigError(
                f"stage {stage.name!r} would get {tokens} tokens of source {name!r}; raise its weight or "
                "epochs, or the stage's tokens, or leave the source out of the stage"
            )
    return asked


def stage_documents(asked: dict, sources: dict, entries: dict, key: np.uint64) -> Iterator:
    """The stream of a stage in blocks: (source's name, numbers of documents, tokens of each).

    2.3 times a source's tokens are two passes over all its documents, and one over those that an order named
    by `key` puts first, until 0.3 of the tokens are reached. The last of these is cut.
    """
    for name, wanted in asked.items():
        whole, rest = divmod(wanted, sources[name]["tokens"])
        limit, left = last_pass(entries[name], key, rest)
        for epoch in range(whole + (rest > 0)):
            for first in range(0, len(entries[name]), BLOCK_DOCUMENTS):
                block = entries[name][first : first + BLOCK_DOCUMENTS]
                tokens = np.where(block["offset"] >= 0, block["tokens"], 0)
                if epoch == whole:
                    keyed = scramble(block["hash"] ^ key)
                    for i in np.flatnonzero((keyed == limit) & (tokens > 0)):
                        tokens[i] = min(tokens[i], left) if left > 1 else 0  # 1 would be an end of text alone
                        left -= tokens[i]
                    tokens[keyed > limit] = 0
                taken = np.flatnonzero(tokens)
                yield name, first + taken, tokens[taken]


def last_pass(entries: np.ndarray, key: np.uint64, wanted: int) -> tuple[np.uint64, int]:
    """Which documents make up `wanted` tokens: those whose keyed hash is below a limit, and then those at it.

    Returns the limit, and the tokens left for the documents at it. The limit is found by bisection, in 64
    sweeps over the hashes: a sort would hold all of them in memory.
    """

    def tokens_below(limit: int) -> int:
        total = 0
        for first in range(0, len(entries), BLOCK_DOCUMENTS):
            block = entries[first : first + BLOCK_DOCUMENTS]
            taken = (block["offset"] >= 0) & (scramble(block["hash"] ^ key) < np.uint64(limit))
            total += int(block["tokens"][taken].sum())
        return total

    low, high, left = 0, 1 << 64, wanted  # tokens_below(low) <= wanted < tokens_below(high)
    while wanted and high - low > 1:
        middle = (low + high) // 2
        tokens = tokens_below(middle)
        if tokens <= wanted:
            low, left = middle, wanted - tokens
        else:
            high = middle
    return np.uint64(low), left


def write_stage(path: Path, config: Config, stage: Stage, sources: dict, entries: dict) -> dict:
    """Writes the table of a stage's stream; returns what the manifest says of the stage."""
    asked, key = stage_tokens(stage, sources), number(f"{config.data.seed}/{stage.name}")
    mixture = {}
    for name, wanted in asked.items():
        epochs = stage.epochs.get(name, wanted / sources[name]["tokens"])
        mixture[name] = {"epochs": epochs, "asked_tokens": wanted, "documents": 0, "tokens": 0, "cut": None}
    for name, numbers, tokens in stage_documents(asked, sources, entries, key):
        mixture[name]["documents"] += len(numbers)
        mixture[name]["tokens"] += int(tokens.sum())
    n_documents = sum(part["documents"] for part in mixture.values())
    table = np.lib.format.open_memmap(path, "w+", "<i8", (3, n_documents + 1))
    n = total = 0
    for name, numbers, tokens in stage_documents(asked, sources, entries, key):
        block = slice(n, n + len(numbers))
        table[0, block] = total + np.cumsum(tokens) - tokens
        table[1, block], table[2, block] = [*sources].index(name), numbers
        for i in np.flatnonzero(tokens < entries[name]["tokens"][numbers]):
            # its last token in the stream is an end-of-text token, which `fetch` puts there
            used, of = int(tokens[i]), int(entries[name]["tokens"][numbers[i]])
            offsets = np.load(path.with_name(f"{name}.offsets.npy"), mmap_mode="r")
            id = line_of(path.with_name(f"{name}.jsonl"), offsets, int(numbers[i]))["id"]
            cut = {"id": id, "tokens": used, "of_tokens": of, "first_token": int(table[0, n + i])}
            mixture[name]["cut"] = cut
        n, total = n + len(numbers), total + int(tokens.sum())
    table[:, n] = total, -1, -1
    table.flush()
    T = config.model.seq_len
    rows = max(0, total - 1) // T
    if not rows:
        raise ConfigError(
            f"stage {stage.name!r} has {total:,} tokens, not one row of model.seq_len={T} + 1; add "
            "text, epochs or tokens"
        )
    dropped = total - rows * T - 1  # the stream's end, too short for a row
    last = [*mixture][-1]
    if mixture[last]["tokens"] <= dropped:
        raise ConfigError(
            f"stage {stage.name!r}: the {mixture[last]['tokens']} tokens of source {last!r} would all be "
            f"dropped with the stage's last {dropped} tokens, which fill no row of model.seq_len={T}; raise "
            "its weight or epochs, or leave it out of the stage"
        )
    stated = {"name": stage.name, "repeats": stage.repeats, "tokens": total, "rows": rows}
    return {**stated, "dropped_tokens": dropped, "mixture": mixture}


# ---- rows: chunks and validation --------------------------------------------------------------------------


def fetch(
    table: np.ndarray,
    cuts: dict[int, int],
    rows: np.ndarray,
    T: int,
    entries: list,
    files: list,
    out: np.ndarray,
    to: np.ndarray,
):
    """Reads rows, ascending, of the stream that `table` describes into out[to[i]] (rows, T+1).

    `cuts`: place in the stream -> the end-of-text token that ends a document there which was cut. Returns
    source, document and target tokens of every (row, document) pair that was met.
    """
    starts, sources, numbers = table
    begin, end = rows * T, rows * T + T + 1
    first = np.searchsorted(starts, begin, side="right") - 1
    count = np.searchsorted(starts, end) - first  # documents in each row; below, everything is by pair
    row = np.repeat(np.arange(len(rows)), count)
    entry = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count) + first[row]
    source, document, start = sources[entry], numbers[entry], starts[entry]
    left, right = np.maximum(start, begin[row]), np.minimum(starts[entry + 1], end[row])
    offset = left - start
    for s in np.unique(source):
        offset[source == s] += entries[s]["offset"][document[source == s]]

    # Documents side by side in a source's file are read at once: most rows are one read
    apart = (row[1:] != row[:-1]) | (source[1:] != source[:-1]) | (np.diff(offset) != np.diff(left))
    heads = np.flatnonzero(np.append(True, apart))
    tails = np.append(heads[1:], len(row)) - 1
    places = to[row[heads]] * (T + 1) + left[heads] - begin[row[heads]]
    pieces = np.stack([places, right[tails] - left[heads], offset[heads]]) * out.itemsize
    memory = memoryview(out).cast("B")
    for s, place, size, at in zip(source[heads].tolist(), *pieces.tolist()):
        if os.preadv(files[s].fileno(), [memory[place : place + size]], at) != size:
            raise OSError(5, "is shorter than its table", files[s].name)
    for at, eot in cuts.items():
        for r in (at // T, (at - 1) // T):  # one row, or the two that share this token
            i = np.searchsorted(rows, r)
            if i < len(rows) and rows[i] == r:
                out[to[i], at - r * T] = eot
    return source, document, right - np.maximum(left, begin[row] + 1)  # the first token of a row is no target


def write_chunks(
    config: Config, folder: Path, stages: list[dict], entries: dict, dtype: np.dtype, eot: int
) -> tuple:
    """Writes chunks/000.bin ...; returns what the manifest says of each, and their hashes.

    A chunk ends where a step ends: boundaries are multiples of the batch size. The last chunk also takes
    the rows that fill no step.
    """
    T, B, n_chunks = config.model.seq_len, config.train.batch_size, config.data.n_chunks
    n_rows = sum(stage["rows"] * stage["repeats"] for stage in stages)
    bounds = [k * (n_rows // B) // n_chunks * B for k in range(n_chunks)] + [n_rows]
    paths = [folder / "documents" / f"{stage['name']}.npy" for stage in stages]
    tables = [np.load(path, mmap_mode="r").view(np.ndarray) for path in paths]
    cuts = [[part["cut"] for part in stage["mixture"].values() if part["cut"]] for stage in stages]
    cuts = [{cut["first_token"] + cut["tokens"] - 1: eot for cut in of_stage} for of_stage in cuts]
    files = [open(folder / "work" / f"{name}.tokens", "rb", buffering=0) for name in entries]
    block = max(1, BLOCK_BYTES // ((T + 1) * dtype.itemsize))
    chunks, hashes = [], {}
    with bar("write chunks", " rows", n_rows) as progress:
        for first, end in pairwise(bounds):
            name, sha256 = f"chunks/{len(chunks):03d}.bin", hashlib.sha256()
            targets = np.zeros(len(entries))
            met = [np.zeros(len(table), bool) for table in entries.values()]
            with open(folder / name, "wb") as file:
                for begin in range(first, end, block):
                    positions = np.arange(begin, min(begin + block, end))
                    stage, _, row = locate(positions, stages, config.data.seed)
                    out = np.empty((len(positions), T + 1), dtype)
                    for s in np.unique(stage):
                        to = np.flatnonzero(stage == s)
                        to = to[np.argsort(row[to])]  # in the order of the disk
                        source, document, tokens = fetch(
                            tables[s], cuts[s], row[to], T, [*entries.values()], files, out, to
                        )
                        targets += np.bincount(source, tokens, len(entries))  # exact below 2^53
                        for i in np.unique(source):
                            met[i][document[source == i]] = True
                    sha256.update(out)
                    file.write(out)
                    progress.update(len(positions))
            shares = {
                name: {"tokens": int(tokens), "documents": int(seen.sum())}
                for name, tokens, seen in zip(entries, targets, met)
            }
            rows = end - first
            chunks.append({"file": name, "first": first, "rows": rows, "tokens": rows * T, "sources": shares})
            hashes[name] = sha256.hexdigest()
    for file in files:
        file.close()
    return chunks, hashes


def write_validation(config: Config, folder: Path, name: str, count: dict, dtype: np.dtype) -> dict:
    """Writes validation/<source>.bin: rows cut like training rows, in the order of the held-out documents."""
    T, total = config.model.seq_len, count["validation_tokens"]
    rows = max(0, total - 1) // T
    block = max(1, BLOCK_BYTES // (T * dtype.itemsize))
    stream = open(folder / "work" / f"{name}.validation", "rb")
    with stream, open(folder / "validation" / f"{name}.bin", "wb") as file:
        for first in range(0, rows, block):
            stream.seek(first * T * dtype.itemsize)
            tokens = np.frombuffer(stream.read((block * T + 1) * dtype.itemsize), dtype)
            cut = np.lib.stride_tricks.sliding_window_view(tokens, T + 1)[::T]
            file.write(cut[: rows - first].tobytes())
    return {"validation_rows": rows, "validation_dropped_tokens": total - rows * T - 1 if rows else total}


# ---- the build --------------------------------------------------------------------------------------------


def build(config: Config) -> Path:
    """Builds a config's dataset, or finds that it is built. Raises ConfigError that says what to do."""
    folder = Path(config.dataset)
    partial = folder.with_name(folder.name + ".partial")
    try:
        tok, inputs = load_tokenizer(config), list_inputs(config)
        if folder.exists():
            check_same(config, folder, tok, inputs)
            print(f"{folder} is already built")
            return folder
        lock = claim(partial)
        try:
            manifest = write(config, partial, tok, inputs)
            os.rename(partial, folder)
            sync(folder.parent)
            os.unlink(folder / "lock")
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            lock.close()
    except OSError as error:
        raise ConfigError(
            f"{error.filename or partial}: {error.strerror or error}; no half-built dataset was left"
        ) from None
    except BrokenProcessPool:
        message = (
            "a worker process ended early; for want of memory, if it says nothing above: lower data.workers"
        )
        raise ConfigError(message) from None
    print(summary(folder, manifest))
    return folder


def load_tokenizer(config: Config) -> "tokenizer.Tokenizer":
    path = Path(config.tokenizer.path)
    if not path.exists():
        what = f"make it: {config.again('tokenizer.py train')}"
        if path.suffix in (".json", ".model"):  # somebody else's, which is not trained here
            what = "put the published file there, or say where it is: --tokenizer.path=FILE"
        raise ConfigError(f"there is no tokenizer {path}; {what}")
    tok = tokenizer.load(path, config.tokenizer.eot)
    if tok.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer {path} has {tok.vocab_size} entries, more than model.vocab_size="
            f"{config.model.vocab_size}; set model.vocab_size={tok.vocab_size} or above"
        )
    return tok


def list_inputs(config: Config) -> dict[str, list]:
    """The input files of every source as [path, bytes, nanosecond of change]; and checks before work."""
    if not config.data.sources or not config.data.stages:
        raise ConfigError("data.sources and data.stages need at least one entry each; see configs/demo.py")
    inputs = {}
    for source in config.data.sources:
        used = [stage.epochs or stage.weights or [source.name] for stage in config.data.stages]
        if not any(source.name in names for names in used):
            print(f"warning: source {source.name!r} is in no stage; only its validation rows are of use")
        documents.tell_left_out(source)
        stats = [(path, path.stat()) for path in documents.files(source)]
        inputs[source.name] = [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]
        if not any(stat.st_size for _, stat in stats):
            raise ConfigError(f"source {source.name!r}: each of its {len(stats)} files is empty")
    return inputs


def shared_names(sources: tuple[Source, ...]) -> dict[str, tuple[str, str]]:
    """Real path -> (source, name) of every file that several sources read, as the first of them has it.

    A document is one document in all of its sources, held out of all or of none, only if its id is the same.
    """
    if len(sources) < 2:
        return {}
    first, shared = {}, {}
    for source in sources:
        for path, name in documents.listed(source):
            known = first.setdefault(os.path.realpath(path), (source.name, name))
            if known[0] != source.name:
                shared[os.path.realpath(path)] = known
    return shared


def check_same(config: Config, folder: Path, tok: "tokenizer.Tokenizer", inputs: dict) -> None:
    """Raises ConfigError that names what differs, unless the folder is the dataset of this config."""
    manifest, _ = read_manifest(folder)
    differs = differences(manifest, config)
    for stage in manifest["stages"] if manifest["format"] == 1 else ():
        total = sum(part["tokens"] for part in stage["mixture"].values())
        if any(part["epochs"] % 1 for part in stage["mixture"].values()):
            got = ", ".join(
                f"{n} {100 * part['tokens'] / total:.1f} %" for n, part in stage["mixture"].items()
            )
            print(
                f"note: {folder} was built by an earlier version, whose mixtures were only about those asked "
                f"for: stage {stage['name']!r} has {got}. Remove the folder to build it anew"
            )
    if manifest["tokenizer"]["sha256"] != tok.sha256:
        differs.append(f"tokenizer {manifest['tokenizer']['sha256'][:12]} (now {tok.sha256[:12]})")
    record = folder / "inputs.json"  # is not there when the folder came from another machine
    if not differs and record.exists():
        for name, files in json.loads(record.read_text())["sources"].items():
            changed = sorted({path for path, *_ in set(map(tuple, files)) ^ set(map(tuple, inputs[name]))})
            if changed:
                more = f" and {len(changed) - 1:,} more" * (len(changed) > 1)
                differs.append(f"other files in source {name!r}: {changed[0]}{more}")
            if changed and {tuple(f[:2]) for f in files} == {tuple(f[:2]) for f in inputs[name]}:
                differs[-1] += f" (of the same size, but written since; if the text is the same: rm {record})"
    if differs:
        raise ConfigError(
            f"{folder} was built with {'; '.join(differs)}.\nRemove the folder to build it anew, "
            "or build another: --dataset=datasets/another-name"
        )


def claim(partial: Path) -> object:
    """Empties the folder to build in. Returns its lock, which the system lifts however this process ends."""
    partial.mkdir(parents=True, exist_ok=True)
    lock = open(partial / "lock", "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = os.path.samestat(os.fstat(lock.fileno()), os.stat(partial / "lock"))
    except (BlockingIOError, FileNotFoundError):  # locked, or just renamed by its builder
        mine = False
    if not mine:
        raise ConfigError(f"{partial} is being built by another process; wait for it, or end it")
    for path in partial.iterdir():  # what a killed build left
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()
    return lock


def write(config: Config, folder: Path, tok: "tokenizer.Tokenizer", inputs: dict) -> dict:
    """Writes a whole dataset folder, the manifest last, and returns the manifest."""
    data, T, B = config.data, config.model.seq_len, config.train.batch_size
    for name in ("work", "documents", "validation", "chunks"):
        (folder / name).mkdir()
    tok.save(folder)
    dtype = np.dtype("<u2" if tok.vocab_size <= 1 << 16 else "<u4")
    start = (config.tokenizer.path, config.tokenizer.eot, dtype.str, T)
    start += (data.validation_seed, data.validation_fraction)
    names = shared_names(data.sources)
    # spawned, because a fork of a process that has threads can deadlock
    pool = ProcessPoolExecutor(data.workers, multiprocessing.get_context("spawn"), start_worker, start)
    try:
        sources = {source.name: encode_source(config, source, names, folder, pool) for source in data.sources}
    finally:
        pool.shutdown(cancel_futures=True)
    for name, count in sources.items():
        count |= write_validation(config, folder, name, count, dtype)

    work = {name: folder / "work" / f"{name}.entries" for name in sources}
    entries = {name: np.memmap(path, ENTRY, "r").view(np.ndarray) for name, path in work.items()}
    stages, n_rows = [], 0
    for stage in data.stages:
        stated = write_stage(folder / "documents" / f"{stage.name}.npy", config, stage, sources, entries)
        stages.append(stated | {"first_position": n_rows})
        n_rows += stated["rows"] * stage.repeats
    if n_rows // B < data.n_chunks:
        raise ConfigError(
            f"{n_rows:,} rows of model.seq_len={T} are {n_rows // B:,} steps of train.batch_size={B}, fewer "
            f"than data.n_chunks={data.n_chunks}; lower data.n_chunks, batch or row, or give more text"
        )
    chunks, hashes = write_chunks(config, folder, stages, entries, dtype, tok.eot)
    shutil.rmtree(folder / "work")

    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    del files["lock"]
    manifest = {
        **{"format": FORMAT, "name": config.name, "seq_len": T, "row_length": T + 1, "dtype": dtype.name},
        **{"vocab_size": tok.vocab_size, "eot": tok.eot},
        "tokenizer": {"file": tok.file, "sha256": tok.sha256},
        **{"seed": data.seed, "order": "feistel-1", "row_multiple": B},
        **{"settings": settings(config), "sources": sources, "stages": stages},
        **{"rows": n_rows, "steps": n_rows // B, "rows_after_last_step": n_rows % B, "chunks": chunks},
        "files": {name: hashes.get(name) or sha256(files[name]) for name in sorted(files)},
        "file_bytes": {name: files[name].stat().st_size for name in sorted(files)},
    }
    (folder / "inputs.json").write_text(json.dumps({"format": 1, "sources": inputs}))
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    for path in [*folder.rglob("*"), folder]:
        sync(path)
    return manifest


# ---- the command line -------------------------------------------------------------------------------------


def summary(folder: Path, manifest: dict) -> str:
    """What was built, as aligned tables."""
    heads = ("source", "files", "documents", "tokens", "bytes", "bytes/token", "held-out rows", "bad")
    table = [heads]
    for name, s in manifest["sources"].items():
        # the end-of-text tokens stand for no bytes
        per_token = f"{s['bytes'] / max(1, s['tokens'] - s['documents']):.3f}"
        counts = s["files"], s["documents"], s["tokens"], s["bytes"], per_token, s["validation_rows"]
        table.append((name, *counts, sum(s["bad"].values())))
    table += [(), ("stage", "source", "epochs", "documents", "asked tokens", "tokens", "asked %", "%", "cut")]
    for s in manifest["stages"]:
        asked = sum(part["asked_tokens"] for part in s["mixture"].values())
        for name, part in s["mixture"].items():
            shares = part["asked_tokens"] / asked, part["tokens"] / s["tokens"]
            cut = f"{part['cut']['tokens']:,} of {part['cut']['of_tokens']:,}" if part["cut"] else "-"
            counts = part["documents"], part["asked_tokens"], part["tokens"]
            percent = (f"{100 * share:.2f}" for share in shares)
            table.append((s["name"], name, f"{part['epochs']:.4g}", *counts, *percent, cut))
    lines = []
    for line in table:
        cells = [f"{cell:,}" if isinstance(cell, int) else cell for cell in line]
        lines.append("".join(f"{cell:<16}" if i == 0 else f"  {cell:>14}" for i, cell in enumerate(cells)))
    lines += [
        f"stage {s['name']}: {s['rows']:,} rows" + f", trained {s['repeats']} times" * (s["repeats"] > 1)
        + f"; {s['dropped_tokens']:,} tokens at its end fill no row and are dropped"
        for s in manifest["stages"]
    ]  # fmt: skip
    lines += [f"bad: {example}" for s in manifest["sources"].values() for example in s["bad_examples"][:3]]
    fraction = manifest["settings"]["data.validation_fraction"]
    lines += [note for name, s in manifest["sources"].items() for note in notes(name, s, fraction)]
    return "\n".join(lines) + (
        f"\n\n{folder}: {manifest['rows']:,} rows of {manifest['seq_len']:,} tokens in "
        f"{len(manifest['chunks'])} chunks, {manifest['steps']:,} steps of {manifest['row_multiple']} rows, "
        f"{manifest['rows_after_last_step']:,} rows after the last step"
    )


def notes(name: str, s: dict, fraction: float) -> list[str]:
    """What a user should know of a source: how its held-out rows were chosen, ids that came twice."""
    out = []
    if s["split_inside"] and s["validation_rows"]:
        n = s["validation_documents"]
        out.append(
            f"note: source {name!r} has few documents: held out {'is the end' if n == 1 else 'are the ends'} "
            f"of {n:,} of them, {s['validation_bytes']:,} bytes, after a gap of {s['gap_bytes']:,} bytes "
            "that is neither trained on nor held out"
        )
    elif not s["validation_rows"]:
        out.append(
            f"note: source {name!r} holds nothing out, so its loss on unseen text cannot be measured: "
            f"data.validation_fraction={fraction} of its documents is less than a row"
            + ", and they are too short to be split inside (that takes 4 rows)" * s["split_inside"]
            + ", and other sources read their files, so they are not split inside"
            * (s["shared_documents"] > 0)
        )
    if s["duplicate_ids"]:
        out.append(
            f"warning: source {name!r}: {s['duplicate_ids']:,} documents have an id that an earlier document "
            f"has; they are called {', '.join(s['duplicate_examples'])}" + ", ..." * (s["duplicate_ids"] > 5)
        )
    return out


@script
def main() -> None:
    if sys.argv[1:2] != ["verify"]:
        config = from_command_line(__doc__)
    try:
        if sys.argv[1:2] != ["verify"]:
            build(config)
        elif len(sys.argv) != 3:
            raise ConfigError("give one folder: python data.py verify datasets/demo")
        else:
            folder = Path(sys.argv[2])
            problems = verify(folder)
            print("\n".join(f"{folder}: {problem}" for problem in problems), end="\n" if problems else "")
            if problems:
                sys.exit(1)
            print(f"{folder}: all {len(read_manifest(folder)[0]['files']):,} files are as they were built")
    except KeyboardInterrupt:
        if sys.argv[1:2] != ["verify"]:
            print("interrupted; no half-built dataset was left", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
