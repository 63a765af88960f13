"""Which rows a checkpoint has seen: whether their text has been trained on, at whatever position.

    same = seen.same_text(dataset, [16_000, 16_001])      # where the text of these two rows is trained on
    same.by(checkpoint.state)                             # array([True, False])

The same text can be trained on at many positions. A stage can be repeated; a source can be read in several
passes, in one stage or in several, and its documents are cut into other rows in each; two sources can read
the same files. So a position that a checkpoint has not reached can hold text that it knows. Reads the tables
of a dataset; what they say does not depend on a run, so `same_text` is asked once for all checkpoints.
"""

import json
from typing import NamedTuple

import numpy as np

from dataset import Dataset
from steps import trained


class SameText(NamedTuple):
    """Where the text of some rows is trained on. A row holds parts of documents; rows can share a part."""

    n_rows: int
    rows: np.ndarray  # rows[i], 0 .. n_rows-1, holds the part parts[i]
    parts: np.ndarray
    holds: np.ndarray  # the row at positions[j] of the order holds text of the part holds[j]
    positions: np.ndarray

    def by(self, state: dict) -> np.ndarray:
        """Which of the n_rows rows a checkpoint has seen, by its state.json: bool (n_rows)."""
        known, out = np.zeros(self.parts.max(initial=-1) + 1, bool), np.zeros(self.n_rows, bool)
        known[self.holds[trained(state, self.positions)]] = True
        out[self.rows[known[self.parts]]] = True
        return out


def same_text(dataset: Dataset, positions: object) -> SameText:
    """At which positions, of all stages, repeats and passes, the text of the rows at `positions` stands.

    The text of a row is its target tokens. The same tokens of the same document are looked up in every pass
    over its source. Where another source reads the document too, every row that has some of it as targets
    there counts, because two readings of a file need not be the same tokens (code and its docstrings).
    """
    T, stages = dataset.seq_len, dataset.manifest["stages"]
    tables = [dataset.array(f"documents/{stage['name']}.npy") for stage in stages]

    # The parts of documents that the rows hold: of document `number` of a source, its tokens first .. end-1.
    stage, _, row = dataset.locate(positions)
    found = [np.empty((5, 0), np.int64)]
    for i in np.unique(stage):
        starts, sources, numbers = tables[i]
        mine = np.flatnonzero(stage == i)
        low, high = row[mine] * T + 1, row[mine] * T + T + 1  # its targets, as tokens of the stage's stream
        begin = np.searchsorted(starts, low, "right") - 1
        which, entry = runs(begin, np.searchsorted(starts, high) - begin)
        first = np.maximum(low[which], starts[entry]) - starts[entry]
        end = np.minimum(high[which], starts[entry + 1]) - starts[entry]
        found.append(np.stack([mine[which], sources[entry], numbers[entry], first, end]))
    rows, source, number, first, end = np.concatenate(found, axis=1)
    parts = np.arange(len(rows))

    # A document that another source reads too is one more part, whole, for all of the rows that hold it.
    named, document = np.unique(np.stack([source, number]), axis=1, return_inverse=True)
    which, others, numbers = read_elsewhere(dataset, *named)
    begin, stop = (np.searchsorted(which, document.ravel(), side) for side in ("left", "right"))
    holder, other = runs(begin, stop - begin)
    rows, parts = np.append(rows, rows[holder]), np.append(parts, len(parts) + other)
    source, number = np.append(source, others), np.append(number, numbers)
    first, end = np.append(first, np.zeros_like(others)), np.append(end, np.full_like(others, 1 << 48))

    # Where every part stands: in which rows of each pass over its source its tokens are targets.
    found = [np.empty((2, 0), np.int64)]
    for i, stage in enumerate(stages):
        starts, _, numbers = tables[i]
        for s, begin, stop in passes(dataset.manifest, stage):
            mine = np.flatnonzero(source == s)
            entry = begin + np.searchsorted(numbers[begin:stop], number[mine])
            there = (entry < stop) & (numbers[entry] == number[mine])  # a partial pass has not all of them
            mine, entry = mine[there], entry[there]
            low = starts[entry] + first[mine]
            high = np.minimum(
                starts[entry] + end[mine], starts[entry + 1]
            )  # a pass can end inside a document
            low = np.maximum(0, (low - 1) // T)  # row r has the targets r*T + 1 .. r*T + T
            high = np.minimum(stage["rows"] - 1, (high - 2) // T)
            which, row = runs(low, np.maximum(0, high + 1 - low))
            for epoch in range(stage["repeats"]):
                found.append(np.stack([mine[which], dataset.position_of(i, epoch, row)]))
    return SameText(np.size(positions), rows, parts, *np.concatenate(found, axis=1))


def runs(firsts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs of numbers one after another, and whose each is: [5, 9], [2, 3] -> [0 0 1 1 1], [5 6 9 10 11]."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) + np.repeat(firsts - (np.cumsum(counts) - counts), counts)


def passes(manifest: dict, stage: dict) -> list[tuple[int, int, int]]:
    """The passes over sources in a stage's table: (source, first entry, end). Documents ascend within each.

    Whole passes of a source come first; a partial one, which has fewer documents, is its last.
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
    """Which of these documents other sources read too: int64 (3, found), sorted by its first row.

    Gives the document's place among those asked for, the other source, and the document's number there. It
    is the same document where it came from the same file with the same id, which the table of documents says.
    Other equal ids are chance: two corpora can each have a README.md. Manifests of format 1 do not say which
    files are shared; there equal ids alone decide.
    """
    manifest, wanted, found = dataset.manifest, {}, []
    marked = manifest["format"] > 1
    shared = [s for s, about in enumerate(manifest["sources"].values()) if about.get("shared_documents")]
    shared = shared if marked else range(len(dataset.sources))
    for s in shared if len(shared) > 1 else ():
        for i in np.flatnonzero(source == s).tolist():
            about = dataset.document(dataset.sources[s], int(number[i]))
            if "shared" in about or not marked:
                wanted.setdefault(identity(about), []).append(i)
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
    """By what a document is the same in all sources: the file that they share, and the id it came with."""
    return about.get("shared"), about.get("came_as", about["id"])
