"""A finished dataset: the training order as a function, and every row and document in it. No torch.

    from dataset import Dataset
    d = Dataset("datasets/demo")
    d.rows(first=16_000, count=16)            # token ids of 16 rows of the order, int64 (16, seq_len + 1)
    d.documents(position=16_000)              # the documents in the first of these rows
    d.positions("code", "email/parser.py")    # every position at which that file is trained on

The order. All documents of a stage, each followed by the end-of-text token, are one stream of tokens. With
T = seq_len, row r is stream[r*T : r*T + T + 1]: neighbouring rows share one token, so every token but the
first is a target exactly once. Rows are trained on in shuffled order: row r is at position shuffle(r), a
bijection that is computed, not stored. The positions of all stages, and of their repeats, follow one another.
So "what did step 1000 see?" and "when was this document seen?" are arithmetic and a binary search, and the
answer cannot depend on workers, GPUs or restarts.

Reads the folder that data.py writes (its docstring lists the files), and writes nothing.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from config import ConfigError
from manifest import damage, inside, read_manifest

BLOCK_DOCUMENTS = 1 << 20  # entries of a table of documents that are in memory at once


# ---- the order --------------------------------------------------------------------------------------------


def shuffle(rows: object, n: int, key: str) -> np.ndarray:
    """Positions of `rows` in the order that `key` names: a bijection of 0 .. n-1, the same on every machine.

    shuffle([0, 1, 2, 3, 4], 5, "1234/main/0") -> [1, 3, 2, 0, 4]

    It is a Feistel network. A row number is written as two halves of h bits, and each round replaces (left,
    right) by (right, left XOR f(right)). A round can be undone whatever f is, because `right` is still there.
    So the network is a bijection of 0 .. 4^h - 1, and f only has to scramble well. Results of n or more go
    through the network again until they are below n ("cycle walking", Black and Rogaway 2002): fewer than
    four times on average. There is no table: n = 2^40 costs the same memory as n = 2. Raises IndexError for
    rows outside 0 .. n-1.
    """
    return feistel(rows, n, key, backwards=False)


def unshuffle(positions: object, n: int, key: str) -> np.ndarray:
    """The rows at `positions`: unshuffle(shuffle(r, n, key), n, key) == r."""
    return feistel(positions, n, key, backwards=True)


def feistel(values: object, n: int, key: str, backwards: bool) -> np.ndarray:
    """The network that `shuffle` describes; backwards, its inverse."""
    values = np.asarray(values, dtype=np.int64)
    if values.size and (values.min() < 0 or values.max() >= n):
        raise IndexError(f"rows {values.min()} .. {values.max()} are not within 0 .. {n - 1}")

    # The width of a half: 4^h is at least n and less than 4n (4 where n is 1).
    h = max(1, ((n - 1).bit_length() + 1) // 2)
    bits, half = np.uint64(h), np.uint64((1 << h) - 1)
    # Four rounds are enough for large halves (Luby and Rackoff 1988). Ours can be a few bits: twice as many.
    keys = [hash64(f"{key}/{round}") for round in range(8)]

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> bits, x & half
        for k in reversed(keys) if backwards else keys:
            if backwards:
                left, right = right ^ (scramble(left ^ k) & half), left
            else:
                left, right = right, left ^ (scramble(right ^ k) & half)
        return left << bits | right

    out = network(values.astype(np.uint64).ravel())
    outside = np.flatnonzero(out >= n)  # cycle walking
    while outside.size:
        out[outside] = network(out[outside])
        outside = outside[out[outside] >= n]
    return out.astype(np.int64).reshape(values.shape)


def hash64(text: str) -> np.uint64:
    """A text as 64 bits: the first eight bytes of its SHA-256, little-endian."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))


def scramble(x: np.ndarray) -> np.ndarray:
    """Every bit of x changes half of the result's bits: the final mixer of MurmurHash3 (Appleby), 64 bits."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


def locate(positions: object, stages: list[dict], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions -> (stage number, epoch within the stage, row of the stage's stream) of each.

    `stages` and `seed` are those of the manifest. Raises IndexError outside the order.
    """
    positions = np.atleast_1d(np.asarray(positions, dtype=np.int64))
    n_rows = sum(stage["rows"] * stage["repeats"] for stage in stages)
    if positions.size and (positions.min() < 0 or positions.max() >= n_rows):
        raise IndexError(f"positions {positions.min()} .. {positions.max()} are not within 0 .. {n_rows - 1}")

    stage = np.searchsorted([s["first_position"] for s in stages], positions, side="right") - 1
    epoch, row = np.zeros_like(positions), np.zeros_like(positions)
    for i, s in enumerate(stages):
        # A stage's positions are its epochs, one after another.
        mine = np.flatnonzero(stage == i)
        epoch[mine], within = np.divmod(positions[mine] - s["first_position"], s["rows"])
        # Each epoch is shuffled with its own key.
        for e in np.unique(epoch[mine]):
            here = epoch[mine] == e
            row[mine[here]] = unshuffle(within[here], s["rows"], f"{seed}/{s['name']}/{e}")
    return stage, epoch, row


# ---- reading a dataset ------------------------------------------------------------------------------------


class Dataset:
    """A finished dataset folder. Raises ConfigError where the folder is not one.

    With `verify`, a file's size and SHA-256 are compared with the manifest when the file is first used.
    """

    def __init__(self, folder: str | Path, verify: bool = True):
        self.folder, self.verify = Path(folder), verify
        self.manifest, self.sha256 = read_manifest(self.folder)
        m = self.manifest
        self.seq_len, self.row_length, self.vocab_size = m["seq_len"], m["row_length"], m["vocab_size"]
        self.n_rows, self.n_chunks, self.sources = m["rows"], len(m["chunks"]), list(m["sources"])
        self.dtype = np.dtype(m["dtype"]).newbyteorder("<")
        self.firsts = np.array([chunk["first"] for chunk in m["chunks"]] + [self.n_rows])
        self.arrays: dict[str, np.ndarray] = {}  # memory-mapped when first used
        self.compared: set[str] = set()  # files that were found to be as the manifest says
        self.check = f"python data.py verify {self.folder}"  # the command that compares all of them
        # Other scripts open the tokenizer's files without `path`, so these are compared now.
        for name in ("tokenizer.json", "tokenizer.model"):
            if name in m["files"]:
                self.path(name)

    # Files

    def path(self, name: str) -> Path:
        """The path of a file of the dataset. Raises ConfigError where the file is damaged or not listed."""
        if name not in self.manifest["files"]:
            raise ConfigError(f"{self.folder} holds no {name}; its manifest does not list it")
        path = inside(self.folder, name)
        if self.verify and name not in self.compared:
            if problem := damage(self.folder, self.manifest, name):
                raise ConfigError(
                    f"{path} is damaged: {problem}; get it again, or build the dataset again; all of its "
                    f"files: {self.check}"
                )
            self.compared.add(name)
        return path

    def array(self, name: str, n_rows: int = 0) -> np.ndarray:
        """A file of rows as (n_rows, T+1), or an .npy table. Memory-mapped: only what is used is read."""
        if name not in self.arrays:
            path = self.path(name)
            try:
                if name.endswith(".npy"):
                    self.arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
                else:
                    data = np.empty(0, self.dtype)
                    if path.stat().st_size:  # an empty file cannot be memory-mapped
                        data = np.memmap(path, self.dtype, "r")
                    self.arrays[name] = data.reshape(n_rows, self.row_length)
            except (OSError, ValueError):
                raise ConfigError(f"{path} is missing or damaged; try: {self.check}") from None
        return self.arrays[name]

    def check_source(self, source: str) -> None:
        if source not in self.sources:
            raise ConfigError(f"{self.folder} has no source {source!r}; it has {', '.join(self.sources)}")

    # Rows

    def rows(self, first: int, count: int) -> np.ndarray:
        """The rows at positions first .. first+count-1: int64 (count, T+1). IndexError outside the order."""
        if first < 0 or count < 0 or first + count > self.n_rows:
            raise IndexError(f"rows {first} .. {first + count - 1} are not within 0 .. {self.n_rows - 1}")
        out = np.empty((count, self.row_length), dtype=np.int64)
        done = 0
        while done < count:
            # The part of these rows that is in the chunk of the next one.
            chunk = self.manifest["chunks"][self.chunk_of(first + done)]
            begin = first + done - chunk["first"]
            part = self.array(chunk["file"], chunk["rows"])[begin : begin + count - done]
            out[done : done + len(part)] = part
            done += len(part)
        return out

    def chunk_of(self, position: int) -> int:
        """The number of the chunk that holds the row at a position."""
        if not 0 <= position < self.n_rows:
            raise IndexError(f"position {position} is not within 0 .. {self.n_rows - 1}")
        return int(np.searchsorted(self.firsts, position, side="right")) - 1

    def chunk_range(self, chunk: int) -> tuple[int, int]:
        """The positions of a chunk's rows: (first, end), end exclusive."""
        if not 0 <= chunk < self.n_chunks:
            raise IndexError(f"chunk {chunk} is not within 0 .. {self.n_chunks - 1}")
        return int(self.firsts[chunk]), int(self.firsts[chunk + 1])

    def locate(self, positions: object) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions -> (stage number, epoch within the stage, row of the stage's stream) of each."""
        return locate(positions, self.manifest["stages"], self.manifest["seed"])

    def position_of(self, stage: int, epoch: int, row: object) -> np.ndarray:
        """The inverse of `locate` for one stage and epoch: rows of the stage's stream -> positions."""
        s = self.manifest["stages"][stage]
        if not 0 <= epoch < s["repeats"]:
            raise IndexError(f"epoch {epoch} is not within 0 .. {s['repeats'] - 1}")
        within = shuffle(row, s["rows"], f"{self.manifest['seed']}/{s['name']}/{epoch}")
        return s["first_position"] + epoch * s["rows"] + within

    def validation(self, source: str) -> np.ndarray:
        """Validation rows of a source, (rows, T+1). No chunk holds their text."""
        self.check_source(source)
        return self.array(f"validation/{source}.bin", self.manifest["sources"][source]["validation_rows"])

    # Documents

    def documents(self, position: int) -> list[tuple[str, str, int, int]]:
        """The documents in a row: (source, id, first, end); tokens first .. end-1 of the row are its text."""
        # The stage's table, (3, documents + 1): first token in the stream, number of the source, and of the
        # document there; the last column is the end of the stream.
        stage, _, row = (int(x[0]) for x in self.locate(position))
        starts, sources, numbers = self.array(f"documents/{self.manifest['stages'][stage]['name']}.npy")
        begin, end = row * self.seq_len, row * self.seq_len + self.row_length  # in the stage's stream
        out = []
        for i in range(np.searchsorted(starts, begin, "right") - 1, np.searchsorted(starts, end)):
            source = self.sources[sources[i]]
            id = self.document(source, int(numbers[i]))["id"]
            first, last = max(int(starts[i]), begin), min(int(starts[i + 1]), end)
            out.append((source, id, first - begin, last - begin))
        return out

    def document(self, source: str, n: int) -> dict:
        """The n-th document of a source in reading order: {"id", "tokens", "bytes", "validation"}."""
        offsets = self.array(f"documents/{source}.offsets.npy")
        return line_of(self.path(f"documents/{source}.jsonl"), offsets, n)

    def positions(self, source: str, id: str) -> np.ndarray:
        """All positions, sorted, whose row holds a token of the document; none for a validation document.

        An id can have two lines in the table of documents: the parts of a document that is split. Reads that
        table from its start. Raises ConfigError where the id is unknown.
        """
        self.check_source(source)
        # The document's numbers. A search in a line's bytes spares parsing most of the lines.
        spelled = json.dumps(id).encode()
        numbers = []
        with open(self.path(f"documents/{source}.jsonl"), "rb") as file:
            for n, line in enumerate(file):
                if spelled in line and json.loads(line)["id"] == id:
                    numbers.append(n)
        if not numbers:
            raise ConfigError(f"{self.folder}: source {source!r} has no document {id!r}")

        # Each time that a stage's stream has one of these documents: its rows, and their positions.
        found = [np.empty(0, np.int64)]
        for i, stage in enumerate(self.manifest["stages"]):
            starts, sources, documents = self.array(f"documents/{stage['name']}.npy")
            for begin in range(0, len(starts), BLOCK_DOCUMENTS):
                block = slice(begin, begin + BLOCK_DOCUMENTS)
                mine = (sources[block] == self.sources.index(source)) & np.isin(documents[block], numbers)
                for k in begin + np.flatnonzero(mine):
                    # Row r holds tokens r*T .. r*T + T of the stream: token r*T is in row r - 1 too.
                    first = max(0, (int(starts[k]) - 1) // self.seq_len)
                    end = min(stage["rows"], (int(starts[k + 1]) - 1) // self.seq_len + 1)
                    rows = np.arange(first, end)
                    found += [self.position_of(i, epoch, rows) for epoch in range(stage["repeats"])]
        return np.unique(np.concatenate(found))


def line_of(table: Path, offsets: np.ndarray, n: int) -> dict:
    """The n-th line of a source's table of documents; offsets: the first byte of each line, and the end."""
    with open(table, "rb") as file:
        file.seek(int(offsets[n]))
        return json.loads(file.read(int(offsets[n + 1] - offsets[n])))
