"""A finished dataset: the order as a function, and every row, batch and document in it.

    from dataset import Dataset
    d = Dataset("datasets/demo")
    d.batch(step=1000, batch_size=16)              # the token ids of step 1000, int64 (16, seq_len + 1)
    d.documents(position=16_000)                   # whose text the first row of that batch is
    d.positions("code", "email/parser.py")         # and every position at which that file is trained on

The order. All documents of a stage, each followed by the end-of-text token, are one stream of tokens. With
T = seq_len, row r is stream[r*T : r*T + T + 1], so that every token but the first is a target exactly once.
Rows are trained on in shuffled order: row r stands at position shuffle(r), a bijection that is computed,
not stored. So "what did step 1000 see?" and "when was this document seen?" are arithmetic and a binary
search, and nothing about workers, GPUs or restarts can change the answer. Positions of all stages and of
their repeats follow one another; a batch is the next batch_size positions.

Reads the folder that data.py writes (its docstring lists the files), and writes nothing.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import DATASET, Config, ConfigError, settings_for, to_dict
from files import sha256

FORMAT = 2  # of manifest.json. In 1 a part of a pass was whole documents, by hash: about as many tokens
KEYS = ("format", "seq_len", "row_length", "dtype", "vocab_size", "eot", "tokenizer", "seed", "row_multiple")
KEYS += ("settings", "sources", "stages", "rows", "chunks", "files", "file_bytes")
UNHASHED = ("manifest.json", "inputs.json", "lock")  # the last two are about the machine that built it
BLOCK_DOCUMENTS = 1 << 20  # of a document table worked on at once


# ---- the order --------------------------------------------------------------------------------------------


def shuffle(rows: object, n: int, key: str) -> np.ndarray:
    """Positions of `rows` in the order that `key` names: a bijection of 0 .. n-1, the same on every machine.

    shuffle([0, 1, 2, 3, 4], 5, "1234/main/0") -> [1, 3, 2, 0, 4]

    How: a Feistel network. Write a row number as two halves of h bits, and in each round replace (left,
    right) by (right, left XOR f(right)). Whatever f is, a round can be undone, because right is still
    there: so the network is a bijection of 0 .. 4^h - 1, and f only has to scramble well. Results of n or
    more are sent through again until they fall below n ("cycle walking"; Black and Rogaway 2002), on
    average fewer than four times. There is no table: n = 2^40 costs the same memory as n = 2. Raises
    IndexError for rows outside 0 .. n-1.
    """
    return feistel(rows, n, key, backwards=False)


def unshuffle(positions: object, n: int, key: str) -> np.ndarray:
    """The rows at `positions`: unshuffle(shuffle(r, n, key), n, key) == r."""
    return feistel(positions, n, key, backwards=True)


def feistel(values: object, n: int, key: str, backwards: bool) -> np.ndarray:
    values = np.asarray(values, dtype=np.int64)
    if values.size and (values.min() < 0 or values.max() >= n):
        raise IndexError(f"rows {values.min()} .. {values.max()} are not within 0 .. {n - 1}")
    h = max(1, ((n - 1).bit_length() + 1) // 2)  # n <= 4^h < 4n
    bits, half = np.uint64(h), np.uint64((1 << h) - 1)
    # four rounds do where halves are large (Luby and Rackoff 1988); ours can be a few bits, so twice that
    keys = [number(f"{key}/{round}") for round in range(8)]

    def turn(x: np.ndarray) -> np.ndarray:
        left, right = x >> bits, x & half
        for k in reversed(keys) if backwards else keys:
            if backwards:
                left, right = right ^ (scramble(left ^ k) & half), left
            else:
                left, right = right, left ^ (scramble(right ^ k) & half)
        return left << bits | right

    out = turn(values.astype(np.uint64).ravel())
    outside = np.flatnonzero(out >= n)
    while outside.size:
        out[outside] = turn(out[outside])
        outside = outside[out[outside] >= n]
    return out.astype(np.int64).reshape(values.shape)


def number(text: str) -> np.uint64:
    """A key as 64 bits: the first eight bytes of its SHA-256."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))


def scramble(x: np.ndarray) -> np.ndarray:
    """Every bit of x changes half of the result's bits: the end of MurmurHash3 (Appleby) for 64 bits."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


def below(hashes: np.ndarray, share: float) -> np.ndarray:
    """Which hashes, spread evenly over 64 bits, fall into the lower `share` of them."""
    return hashes < np.uint64(share * 2.0**64)  # share < 1


def locate(positions: object, stages: list[dict], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions in training order -> (stage number, epoch, row) of each. IndexError outside the order."""
    positions = np.atleast_1d(np.asarray(positions, dtype=np.int64))
    n_rows = sum(stage["rows"] * stage["repeats"] for stage in stages)
    if positions.size and (positions.min() < 0 or positions.max() >= n_rows):
        raise IndexError(f"positions {positions.min()} .. {positions.max()} are not within 0 .. {n_rows - 1}")
    stage = np.searchsorted([s["first_position"] for s in stages], positions, side="right") - 1
    epoch, row = np.zeros_like(positions), np.zeros_like(positions)
    for i, s in enumerate(stages):
        mine = np.flatnonzero(stage == i)
        epoch[mine], within = np.divmod(positions[mine] - s["first_position"], s["rows"])
        for e in np.unique(epoch[mine]):
            here = epoch[mine] == e
            row[mine[here]] = unshuffle(within[here], s["rows"], f"{seed}/{s['name']}/{e}")
    return stage, epoch, row


# ---- reading a dataset ------------------------------------------------------------------------------------


class Dataset:
    """A finished dataset folder. Raises ConfigError where it is not one.

    With `verify`, a file's size and SHA-256 are compared with the manifest when it is first asked for.
    """

    def __init__(self, folder: str | Path, verify: bool = True):
        self.folder, self.verify = Path(folder), verify
        self.manifest, self.sha256 = read_manifest(self.folder)
        m = self.manifest
        self.seq_len, self.row_length, self.vocab_size = m["seq_len"], m["row_length"], m["vocab_size"]
        self.n_rows, self.n_chunks, self.sources = m["rows"], len(m["chunks"]), list(m["sources"])
        self.dtype = np.dtype(m["dtype"]).newbyteorder("<")
        self.firsts = np.array([chunk["first"] for chunk in m["chunks"]] + [self.n_rows])
        self.arrays: dict[str, np.ndarray] = {}  # memory-mapped when first asked for
        self.compared: set[str] = set()  # files whose hashes were right
        for name in ("tokenizer.json", "tokenizer.model"):  # others open them without asking here
            if name in m["files"]:
                self.path(name)

    def path(self, name: str) -> Path:
        """A file of the dataset. It is compared with the manifest the first time: ConfigError if damaged."""
        if name not in self.manifest["files"]:
            raise ConfigError(f"{self.folder} holds no {name}; its manifest does not list it")
        path = inside(self.folder, name)
        if self.verify and name not in self.compared:
            if problem := damage(self.folder, self.manifest, name):
                raise ConfigError(
                    f"{path} is damaged: {problem}; get it again, or build the dataset again; all of its "
                    f"files: python data.py verify {self.folder}"
                )
            self.compared.add(name)
        return path

    def array(self, name: str, n_rows: int = 0) -> np.ndarray:
        """A file of rows, as (n_rows, T+1), or an .npy table; only what is touched is read."""
        if name not in self.arrays:
            path = self.path(name)
            try:
                if name.endswith(".npy"):
                    self.arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
                else:
                    empty = np.empty(0, self.dtype)
                    data = np.memmap(path, self.dtype, "r") if path.stat().st_size else empty
                    self.arrays[name] = data.reshape(n_rows, self.row_length)
            except (OSError, ValueError):
                raise ConfigError(
                    f"{path} is missing or damaged; try: python data.py verify {self.folder}"
                ) from None
        return self.arrays[name]

    def rows(self, first: int, count: int) -> np.ndarray:
        """Rows at positions first .. first+count-1 of the training order: int64 (count, T+1)."""
        if first < 0 or count < 0 or first + count > self.n_rows:
            raise IndexError(f"rows {first} .. {first + count - 1} are not within 0 .. {self.n_rows - 1}")
        out = np.empty((count, self.row_length), dtype=np.int64)
        done = 0
        while done < count:
            k = self.chunk_of(first + done)
            chunk = self.manifest["chunks"][k]
            begin = first + done - chunk["first"]
            part = self.array(chunk["file"], chunk["rows"])[begin : begin + count - done]
            out[done : done + len(part)] = part
            done += len(part)
        return out

    def batch(self, step: int, batch_size: int) -> np.ndarray:
        """What optimizer step `step`, from 0, sees: int64 (batch_size, T+1). IndexError past the end."""
        return self.rows(step * batch_size, batch_size)

    def chunk_of(self, position: int) -> int:
        """The chunk that holds a position of the training order."""
        if not 0 <= position < self.n_rows:
            raise IndexError(f"position {position} is not within 0 .. {self.n_rows - 1}")
        return int(np.searchsorted(self.firsts, position, side="right")) - 1

    def chunk_range(self, chunk: int) -> tuple[int, int]:
        """Positions of a chunk's rows: (first, end), end exclusive."""
        if not 0 <= chunk < self.n_chunks:
            raise IndexError(f"chunk {chunk} is not within 0 .. {self.n_chunks - 1}")
        return int(self.firsts[chunk]), int(self.firsts[chunk + 1])

    def validation(self, source: str) -> np.ndarray:
        """Held-out rows of a source, (rows, T+1), of documents that no chunk holds."""
        if source not in self.sources:
            raise ConfigError(f"{self.folder} has no source {source!r}; it has {', '.join(self.sources)}")
        return self.array(f"validation/{source}.bin", self.manifest["sources"][source]["validation_rows"])

    def validation_documents(self, source: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, and bytes of text, of each held-out document of a source, in the order of its rows.

        The end-of-text token is one of a document's tokens. The bytes are those of its text in UTF-8, before
        it was encoded. Reads the source's list of documents from its start.
        """
        path = self.path(f"documents/{source}.jsonl")
        try:
            with open(path, "rb") as file:
                lines = (json.loads(line) for line in file if b'"validation": true' in line)
                sizes = [(line["tokens"], line["bytes"]) for line in lines]
            return tuple(np.array(sizes, np.int64).reshape(-1, 2).T)
        except (OSError, ValueError, KeyError, TypeError):
            message = f"{path} is missing or damaged; try: python data.py verify {self.folder}"
            raise ConfigError(message) from None

    def locate(self, positions: object) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions -> (stage number, epoch within the stage, row of the stage's stream) of each."""
        return locate(positions, self.manifest["stages"], self.manifest["seed"])

    def position_of(self, stage: int, epoch: int, row: object) -> np.ndarray:
        """The inverse of `locate` for one stage and epoch: rows of the stage's stream -> positions."""
        s = self.manifest["stages"][stage]
        if not 0 <= epoch < s["repeats"]:
            raise IndexError(f"epoch {epoch} is not within 0 .. {s['repeats'] - 1}")
        place = shuffle(row, s["rows"], f"{self.manifest['seed']}/{s['name']}/{epoch}")
        return s["first_position"] + epoch * s["rows"] + place

    def documents(self, position: int) -> list[tuple[str, str, int, int]]:
        """Whose text a row holds: (source, id, first, end), first .. end-1 being its tokens in the row."""
        stage, _, row = (int(x[0]) for x in self.locate(position))
        starts, sources, numbers = self.array(f"documents/{self.manifest['stages'][stage]['name']}.npy")
        begin, end = row * self.seq_len, row * self.seq_len + self.row_length
        out = []
        for i in range(np.searchsorted(starts, begin, "right") - 1, np.searchsorted(starts, end)):
            first, last = max(int(starts[i]), begin), min(int(starts[i + 1]), end)
            source = self.sources[sources[i]]
            out.append((source, self.document(source, int(numbers[i]))["id"], first - begin, last - begin))
        return out

    def document(self, source: str, n: int) -> dict:
        """The n-th document of a source in reading order: {"id", "tokens", "bytes", "validation"}."""
        offsets = self.array(f"documents/{source}.offsets.npy")
        return line_of(self.path(f"documents/{source}.jsonl"), offsets, n)

    def positions(self, source: str, id: str) -> np.ndarray:
        """Every position, sorted, whose row holds a token of the document; none where it is held out.

        An id that a source uses more than once stands for all of these documents. Reads the source's list of
        documents from its start. Raises ConfigError where the id is unknown.
        """
        if source not in self.sources:
            raise ConfigError(f"{self.folder} has no source {source!r}; it has {', '.join(self.sources)}")
        spelled = json.dumps(id).encode()
        with open(self.path(f"documents/{source}.jsonl"), "rb") as file:
            numbers = [n for n, line in enumerate(file) if spelled in line and json.loads(line)["id"] == id]
        if not numbers:
            raise ConfigError(f"{self.folder}: source {source!r} has no document {id!r}")
        found = [np.empty(0, np.int64)]
        for i, stage in enumerate(self.manifest["stages"]):
            starts, sources, documents = self.array(f"documents/{stage['name']}.npy")
            for at in range(0, len(starts), BLOCK_DOCUMENTS):
                block = slice(at, at + BLOCK_DOCUMENTS)
                mine = (sources[block] == self.sources.index(source)) & np.isin(documents[block], numbers)
                for k in at + np.flatnonzero(mine):
                    # row r holds tokens r*T .. r*T + T; its last one is also the first of row r + 1
                    first = max(0, -(-int(starts[k]) // self.seq_len) - 1)
                    last = min(stage["rows"] - 1, (int(starts[k + 1]) - 1) // self.seq_len)
                    rows = np.arange(first, last + 1)
                    found += [self.position_of(i, epoch, rows) for epoch in range(stage["repeats"])]
        return np.unique(np.concatenate(found))


def line_of(table: Path, offsets: np.ndarray, n: int) -> dict:
    """The n-th line of a source's table of documents; offsets: the first byte of each line, and the end."""
    with open(table, "rb") as file:
        file.seek(int(offsets[n]))
        return json.loads(file.read(int(offsets[n + 1] - offsets[n])))


def read_manifest(folder: Path) -> tuple[dict, str]:
    """The manifest and the SHA-256 of its file. Raises ConfigError where there is no finished dataset."""
    try:
        data = (folder / "manifest.json").read_bytes()
        manifest = json.loads(data)
        lacks = [key for key in KEYS if key not in manifest]
        if lacks or manifest["format"] not in (1, FORMAT) or manifest["dtype"] not in ("uint16", "uint32"):
            raise ValueError(
                f"lacks {', '.join(lacks)}" if lacks else "has a format or dtype that is not known"
            )
        for name in [*manifest["files"], *(chunk["file"] for chunk in manifest["chunks"])]:
            inside(folder, name)
    except OSError as error:
        message = (
            f"{folder} is not a finished dataset (manifest.json: {error.strerror}); build it with data.py"
        )
        raise ConfigError(message) from None
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder}/manifest.json is damaged or no manifest: {error}") from None
    return manifest, hashlib.sha256(data).hexdigest()


def settings(config: Config) -> dict:
    """Every setting that says what a dataset is, under the name that a user writes."""
    values = to_dict(config)
    # Those of other sections come first, as in every manifest: the bytes of a manifest identify a dataset.
    names = sorted(settings_for(DATASET), key=lambda name: name.startswith(("tokenizer.", "data.")))
    return {name: values[section][key] for name in names for section, key in [name.split(".")]}


def differences(manifest: dict, config: Config) -> list[str]:
    """In what a dataset is not the one that a config asks for: ["data.seed=1 (now 7)"], [] where it is.

    Where the tokenizer lies does not matter if it is the same tokenizer; settings that are newer than the
    dataset are not compared.
    """
    had = manifest["settings"]
    return [
        f"{name}={had[name]} (now {value})"
        for name, value in settings(config).items()
        if name in had and had[name] != value and name != "tokenizer.path"
    ]


def inside(folder: Path, name: str) -> Path:
    """folder/name, if that is in the folder. A manifest may be a stranger's: "../../.ssh/id" is refused."""
    path = folder / name
    if os.path.isabs(name) or not path.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"{folder}/manifest.json names {name!r}, which lies outside the folder; it is not read"
        )
    return path


def damage(folder: Path, manifest: dict, name: str) -> str:
    """In what a file is not the one that the manifest lists; "" where it is."""
    path, size = folder / name, manifest["file_bytes"].get(name)
    if not path.is_file():
        return "missing"
    if path.stat().st_size != size:
        return f"has {path.stat().st_size} bytes, should have {size}"
    return "" if sha256(path) == manifest["files"][name] else "its content differs"


def verify(folder: str | Path) -> list[str]:
    """Hashes every file again: a line for every problem, none when all is well. ConfigError as Dataset."""
    folder = Path(folder)
    manifest, _ = read_manifest(folder)
    problems = []
    for name in tqdm(manifest["files"], unit=" files", disable=not sys.stderr.isatty()):
        if problem := damage(folder, manifest, name):
            problems.append(f"{name}: {problem}")
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    extra = present - {*manifest["files"], *UNHASHED}
    return problems + [f"{name}: is not in the manifest" for name in sorted(extra)]
