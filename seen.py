"""Finds the rows that a checkpoint has seen: those whose text it was trained on, at any position.

    same = seen.same_text(dataset, [16_000, 16_001])      # where the text of these two rows is trained on
    same.by(checkpoint.state)                             # array([True, False])

The same text can be trained on at many positions. A stage can be repeated. A source can be read in several
passes, in one stage or in several, and each pass cuts its documents into other rows. Two sources can read the
same files. So a position that a checkpoint has not reached can hold text that it knows.

Reads the document tables of a dataset. They do not depend on a run, so one call of `same_text` is enough for
all checkpoints.
"""

import json
from typing import NamedTuple

import numpy as np

from dataset import Dataset
from steps import Ranges, cut


class SameText(NamedTuple):
    """Where the text of some rows is trained on. A row holds parts of documents; rows can share a part.

    Two tables of pairs: (rows[i], parts[i]) says which row holds which part, and (holds[j], positions[j])
    says which part is trained on at which position.
    """

    n_rows: int
    rows: np.ndarray  # 0 .. n_rows-1
    parts: np.ndarray
    holds: np.ndarray  # part numbers again
    positions: np.ndarray  # in training order

    def by(self, state: dict) -> np.ndarray:
        """For each of the n_rows rows, whether a checkpoint has seen it, by its state.json: bool (n_rows)."""
        known = np.zeros(self.parts.max(initial=-1) + 1, bool)  # parts
        known[self.holds[trained(state, self.positions)]] = True
        seen = np.zeros(self.n_rows, bool)
        seen[self.rows[known[self.parts]]] = True
        return seen


def same_text(dataset: Dataset, positions: object) -> SameText:
    """Finds all positions, in all stages, repeats and passes, with the text of the rows at `positions`.

    The text of a row is its target tokens. The same tokens of the same document are looked up in every pass
    over its source. If another source reads the document too, every row with some of it as targets counts,
    because two readings of a file need not be the same tokens (code and its docstrings).
    """
    T, stages = dataset.seq_len, dataset.manifest["stages"]
    tables = [dataset.array(f"documents/{stage['name']}.npy") for stage in stages]

    # Find the parts of documents in the rows. A part is the tokens first .. end-1 of document `number` of a
    # source.
    stage, _, row = dataset.locate(positions)
    found = [np.empty((5, 0), np.int64)]
    for i in np.unique(stage):
        starts, sources, numbers = tables[i]
        mine = np.flatnonzero(stage == i)
        low, high = row[mine] * T + 1, row[mine] * T + T + 1  # a row's targets, in the stream of the stage
        begin = np.searchsorted(starts, low, "right") - 1
        which, entry = runs(begin, np.searchsorted(starts, high) - begin)
        first = np.maximum(low[which], starts[entry]) - starts[entry]
        end = np.minimum(high[which], starts[entry + 1]) - starts[entry]
        found.append(np.stack([mine[which], sources[entry], numbers[entry], first, end]))
    rows, source, number, first, end = np.concatenate(found, axis=1)
    parts = np.arange(len(rows))

    # A document that another source reads too becomes one more part for every row that holds some of it: the
    # whole document, as the other source reads it.
    named, document = np.unique(np.stack([source, number]), axis=1, return_inverse=True)
    which, others, numbers = read_elsewhere(dataset, *named)
    begin, stop = (np.searchsorted(which, document.ravel(), side) for side in ("left", "right"))
    holder, other = runs(begin, stop - begin)
    rows, parts = np.append(rows, rows[holder]), np.append(parts, len(parts) + other)
    source, number = np.append(source, others), np.append(number, numbers)
    first, end = np.append(first, np.zeros_like(others)), np.append(end, np.full_like(others, 1 << 48))

    # Find the positions of every part: the rows of each pass over its source in which its tokens are targets.
    found = [np.empty((2, 0), np.int64)]
    for i, stage in enumerate(stages):
        starts, _, numbers = tables[i]
        for s, begin, stop in passes(dataset.manifest, stage):
            mine = np.flatnonzero(source == s)
            entry = begin + np.searchsorted(numbers[begin:stop], number[mine])
            there = (entry < stop) & (numbers[entry] == number[mine])  # a partial pass lacks some documents
            mine, entry = mine[there], entry[there]

            # A part is the tokens low .. high-1 of the stream; a pass can end inside a document.
            low = starts[entry] + first[mine]
            high = np.minimum(starts[entry] + end[mine], starts[entry + 1])

            # Row r has the targets r*T + 1 .. r*T + T of the stream.
            first_row = np.maximum(0, (low - 1) // T)
            last_row = np.minimum(stage["rows"] - 1, (high - 2) // T)
            which, row = runs(first_row, np.maximum(0, last_row + 1 - first_row))
            for epoch in range(stage["repeats"]):
                found.append(np.stack([mine[which], dataset.position_of(i, epoch, row)]))
    return SameText(np.size(positions), rows, parts, *np.concatenate(found, axis=1))


def runs(firsts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs of counts[i] numbers from firsts[i] on, and the i of each number.

    [5, 9], [2, 3] -> [0 0 1 1 1], [5 6 9 10 11]
    """
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) + np.repeat(firsts - (np.cumsum(counts) - counts), counts)


def passes(manifest: dict, stage: dict) -> list[tuple[int, int, int]]:
    """The passes over sources in a stage's table: (source, first entry, end). Documents ascend in each pass.

    The whole passes over a source come first; its last pass can be partial and have fewer documents.
    """
    out, begin = [], 0
    for name, part in stage["mixture"].items():
        size, stop = manifest["sources"][name]["documents"], begin + part["documents"]
        s = [*manifest["sources"]].index(name)
        out += [(s, first, min(first + size, stop)) for first in range(begin, stop, max(1, size))]
        begin = stop
    return out


# ---- documents that several sources read ------------------------------------------------------------------


def read_elsewhere(dataset: Dataset, source: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Finds which of these documents other sources read too: int64 (3, found), sorted by its first row.

    Gives the index of the document in `source` and `number`, the other source, and the document's number
    there. Two documents are the same if they came from the same file with the same id; the table of documents
    says so. Other equal ids are chance: two corpora can each have a README.md. Manifests of format 1 do not
    say which files are shared; there equal ids alone decide.
    """
    # Find the sources that share files with others.
    manifest, wanted, found = dataset.manifest, {}, []
    marked = manifest["format"] > 1
    shared = [s for s, about in enumerate(manifest["sources"].values()) if about.get("shared_documents")]
    shared = shared if marked else range(len(dataset.sources))

    # Sort the documents asked for that came from a shared file by identity.
    for s in shared if len(shared) > 1 else ():
        for i in np.flatnonzero(source == s).tolist():
            about = dataset.document(dataset.sources[s], int(number[i]))
            if "shared" in about or not marked:
                wanted.setdefault(identity(about), []).append(i)

    # Search for them in the tables of all sources that are trained on.
    for other in shared if wanted else ():
        name = dataset.sources[other]
        if any(name in stage["mixture"] for stage in manifest["stages"]):
            with open(dataset.path(f"documents/{name}.jsonl"), "rb") as file:
                for n, line in enumerate(file):
                    if b'"shared"' in line or not marked:
                        ours = wanted.get(identity(json.loads(line)), ())
                        found += [(i, other, n) for i in ours if source[i] != other]
    return np.array(sorted(found), np.int64).reshape(-1, 3).T


def identity(about: dict) -> tuple:
    """The same for a document in all sources: the file that they share, and the id that it came with."""
    return about.get("shared"), about.get("came_as", about["id"])


# ---- which positions --------------------------------------------------------------------------------------


def trained_ranges(state: dict) -> Ranges:
    """The positions that a checkpoint was trained on, by its state.json, as ascending ranges."""
    ranges = cut(state.get("order") or [(0, state["rows"])], 0, state["rows"])[1]
    for first, end in state.get("skipped", []):  # consumed, without an update
        sides = [side for a, b in ranges for side in ((a, min(b, first)), (max(a, end), b))]
        ranges = [(a, b) for a, b in sides if a < b]
    return joined(sorted(ranges))


def trained(state: dict, positions):
    """For each of some positions (an array), whether a checkpoint was trained on it: an array of bool.

    `SameText.by` asks for the text instead, which can have been trained on at other positions too.
    """
    out = positions < 0
    for first, end in trained_ranges(state):
        out = out | (first <= positions) & (positions < end)
    return out


def joined(ranges: Ranges) -> Ranges:
    """Ranges, with those that follow one another made one: ((0, 3), (3, 5)) -> ((0, 5),)."""
    out = []
    for first, end in ranges:
        if out and out[-1][1] == first:
            first = out.pop()[0]
        out.append((first, end))
    return tuple(out)
