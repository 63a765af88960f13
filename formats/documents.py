"""Files of any kind -> documents. A document is a text that keeps the name of its source and its id for ever.

    for document in documents.read(config.Source("web", paths=("corpus/*.jsonl.gz",))): ...

Reads, and writes nothing:

    .jsonl .ndjson     one document a line: `text`, optionally `id`; other fields are ignored (Dolma's format)
    .parquet           one document a row: `text`, optionally `id` (needs pyarrow)
    anything else      one document a file
    .json              JSON lines too; or one array of objects, or one object, which is read whole
    .gz .zst           around any of these but parquet; .json.gz and .json.zst, Dolma's names, are JSON lines

A new kind of document is one function and its row in READERS. The function yields (place for messages, id,
text) for each document of a file. A kind that a config asks for by `read=KIND` is also a choice of
Source.read in config.py.

Suffixes may be in capitals. A file that is named outright is read, whatever its suffix, and so is every file
that a glob matches (`**` is any number of folders). A folder gives, at any depth, the files with a suffix
from READERS, but no plain .json, since most of those are settings; `tell_left_out` prints the files that it
does not give. Folders and globs leave out names that begin with a dot, and names that the source excludes.

Ids: the document's own `id`; else `folder/file.txt` below the source's folder or below the fixed part of its
glob; else `folder/file.jsonl:7`, the seventh line, row or object. A file that several sources read has the id
that the first of them gives it (data.py sees to that). An id may not be Unicode, such as a file's name in
Latin-1: the bytes or surrogates that UTF-8 cannot spell become \\udce9 and the like, six plain characters.

A byte order mark is dropped, line ends are kept as they are. A document that cannot be used (broken JSON, no
text, not UTF-8, nothing in it, a file of 0 bytes) is counted, named by file and line, and skipped. A damaged
file, such as a truncated `.gz`, is an error: nobody knows how many documents it has lost.
"""

import ast
import codecs
import gzip
import json
import os
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from config import ConfigError, Source, choose

# fmt: off
TEXT_SUFFIXES = (
    ".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".html", ".htm", ".xml", ".srt", ".csv",
    ".tsv", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java",
    ".kt", ".scala", ".js", ".mjs", ".jsx", ".ts", ".tsx", ".css", ".rb", ".pl", ".pm", ".php", ".lua", ".r",
    ".jl", ".m", ".swift", ".hs", ".ml", ".clj", ".ex", ".erl", ".lisp", ".el", ".scm", ".f", ".f90", ".s",
    ".asm", ".v", ".vhd", ".sql", ".sh", ".bash", ".ps1", ".cs", ".fs", ".vb", ".dart", ".zig", ".nim", ".d",
    ".cmake", ".mk",
)
# fmt: on
BLOCK_BYTES = 1 << 20  # read at once; a few times the buffers of gzip and zstandard


@dataclass
class Document:
    source: str  # config.Source.name
    id: str
    text: str  # not empty, always encodable as UTF-8
    shared: str = ""  # if several sources read its file: the first one's name and the file's name there


@dataclass
class BadDocuments:
    """The documents that `read` skipped: {"not JSON": 1}, ["a.jsonl:7: not JSON"]; and how many it gave."""

    reasons: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)  # the first 20
    good: int = 0

    def add(self, place: str, reason: str) -> None:
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        if len(self.examples) < 20:
            self.examples.append(f"{printable(place)}: {reason}")

    @property
    def count(self) -> int:
        return sum(self.reasons.values())


@dataclass
class Bad:
    """The reason why a document cannot be used, instead of its text. It never leaves this file."""

    reason: str


Items = Iterator[tuple[str, str, str | Bad]]  # what a reader yields: place for messages, id, text


class Reader(NamedTuple):
    """A row of READERS."""

    read: Callable[[Path, str], Items]  # file, its name below the source's root (ids begin with it) -> items
    suffixes: tuple[str, ...]  # the files that it is for
    auto: bool = True  # False: only for sources with `read=KIND`
    in_folders: bool = True  # False: a folder does not give these files, a name or a glob does


# ---- which files ------------------------------------------------------------------------------------------


def listed(source: Source) -> list[tuple[Path, str]]:
    """The files of a source: its paths in the order given, each expanded and sorted; no file twice.

    Each with its name below the folder, or below the fixed part of the glob, that led to it. Raises
    ConfigError where a path or glob gives no file, naming it.
    """
    return list(listed_and_left(source)[0].values())


def listed_and_left(source: Source) -> tuple[dict[str, tuple[Path, str]], list[Path]]:
    """Absolute path -> (file, name) of what is read; and the files in the source's folders that are not."""
    found, left_out = {}, []
    for given in source.paths:
        # Find the names of a folder, a glob or a file.
        root, pattern = split_glob(os.path.expanduser(given))
        names, others = [], []
        if pattern or root.is_dir():
            for name, wanted in walk(root, pattern, source):
                (names if wanted else others).append(name)
            names.sort()
        elif root.is_file():
            root, names = root.parent, [root.name]
        else:
            raise ConfigError(f"source {source.name!r}: there is no file or folder {given}")

        # A path that gives nothing is a mistake.
        if not names:
            what = "matches no file"
            if not pattern:
                what = "holds no file that can be read (formats/documents.py lists suffixes)"
            if others:
                what += f"; name {root / min(others)} and the like outright or with a glob to read them"
            but = f" that {list(source.exclude)} leaves over" if source.exclude else ""
            raise ConfigError(f"source {source.name!r}: {given} {what}{but}")
        for name in names:
            path = root / name
            found.setdefault(os.path.abspath(path), (path, name))
        left_out += [root / name for name in others]
    return found, left_out


def split_glob(path: str) -> tuple[Path, tuple[str, ...]]:
    """split_glob("/a/b/*/c*.py") -> Path("/a/b"), ("*", "c*.py"); a path without * ? [ has the pattern ()."""
    parts = Path(path).parts
    fixed = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
    if fixed == len(parts) or os.path.exists(path):  # a file may be called "[draft].txt"
        return Path(path), ()
    return Path(*parts[:fixed]), parts[fixed:]


def tell_left_out(source: Source) -> None:
    """Prints a line about the files in the source's folders that are not read, by suffix, if there are any.

    note: source 'x': 3 files were not read (.json 2, .pdf 1); name them outright or with a glob to read them
    """
    if source.read in READERS and not READERS[source.read].auto:  # the config means only files of this kind
        return
    found, left_out = listed_and_left(source)
    left = {os.path.abspath(path) for path in left_out} - found.keys()
    counts = Counter(os.path.splitext(path)[1].lower() or "without suffix" for path in left)
    if not counts:
        return
    most = ", ".join(f"{printable(suffix)} {n:,}" for suffix, n in counts.most_common(6))
    what = f"{len(left):,} file{'s were' if len(left) > 1 else ' was'} not read ({most}"
    more = f", and {len(counts) - 6} more suffixes" * (len(counts) > 6)
    print(f"note: source {source.name!r}: {what}{more}); name them outright or with a glob to read them")


def walk(root: Path, pattern: tuple[str, ...], source: Source) -> Iterator[tuple[str, bool]]:
    """Names below root of the files that a glob matches, with True; without a glob, of all files.

    Without a glob the second value says whether the folder gives the file: whether its suffix is known.
    """

    def refuse(error: OSError):
        raise ConfigError(f"source {source.name!r}: {error.filename} cannot be read: {error.strerror}")

    def excluded(name: str, globs: tuple[str, ...]) -> bool:
        return any(fnmatchcase(name, glob) for glob in globs)

    suffixes = folder_suffixes(source)
    # "x/*" matches "x/" and so everything below it: such a folder, perhaps a large one, is not entered.
    whole_folders = tuple(glob for glob in source.exclude if glob.endswith("*"))
    seen = set()  # folders; a link to a folder above it would never end
    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        below = "" if Path(folder) == root else Path(folder).relative_to(root).as_posix() + "/"

        # Choose the folders that os.walk enters next.
        status = os.stat(folder)
        too_deep = pattern and "**" not in pattern and below.count("/") + 1 >= len(pattern)
        folders[:] = sorted(
            name
            for name in folders
            if not too_deep and not name.startswith(".") and not excluded(f"{below}{name}/", whole_folders)
        )
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))

        for name in names:
            if name.startswith(".") or excluded(below + name, source.exclude):
                continue
            if pattern and not matches((below + name).split("/"), pattern):
                continue
            if os.path.isfile(os.path.join(folder, name)):  # no sockets, no dangling links
                yield below + name, bool(pattern) or name.lower().endswith(suffixes)


def folder_suffixes(source: Source) -> tuple[str, ...]:
    """The suffixes of the files that a folder gives. By suffix alone, so that a listing opens no file."""
    if source.read in READERS and not READERS[source.read].auto:
        return READERS[source.read].suffixes
    given = [reader.suffixes for reader in READERS.values() if reader.auto and reader.in_folders]
    return sum(given, ())


def matches(parts: list[str], pattern: tuple[str, ...]) -> bool:
    """matches(["a", "b", "c.py"], ("**", "*.py")) -> True"""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(matches(parts[i:], pattern[1:] or ("*",)) for i in range(len(parts)))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])


# ---- documents --------------------------------------------------------------------------------------------


def read(
    source: Source, bad: BadDocuments | None = None, names: dict[str, tuple[str, str]] | None = None
) -> Iterator[Document]:
    """Streams the documents of a source in the order of its files; memory is that of the largest document.

    `names`: real path -> (the first source that reads it, its name there), of files that several read.
    Fills `bad` on the way. Raises ConfigError where a file is missing or damaged, or needs a missing package.
    """
    bad = BadDocuments() if bad is None else bad
    for path, name in listed(source):
        first = names.get(os.path.realpath(path)) if names else None
        for document in read_file(path, first[1] if first else name, source, bad):
            document.shared = "/".join(first) if first else ""
            yield document


def read_file(path: Path, name: str, source: Source, bad: BadDocuments) -> Iterator[Document]:
    """The documents of one file. `name`: its name below the source's root, with which ids begin."""
    reader, place = reader_of(path.name, source), str(path)
    try:
        items = reader.read(path, name)
        # A module of 0 bytes is no bad document: it has no docstrings, like many others.
        if not path.stat().st_size and reader.read is not read_docstrings:
            items = [(str(path), name, Bad("an empty file"))]
        for place, id, text in items:
            if isinstance(text, Bad):
                bad.add(place, text.reason)
            elif not text:
                bad.add(place, "empty")
            elif not encodable(text):
                bad.add(place, "not Unicode: half of a surrogate pair")
            else:
                bad.good += 1
                yield Document(source.name, printable(id), text)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        where = "at its start" if place == str(path) else f"after {place}"
        message = f"{path} is cut off or damaged {where} ({error}); fetch it again, or exclude it"
        raise ConfigError(message) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None


def reader_of(name: str, source: Source) -> Reader:
    """The row of READERS for a file of this name."""
    if source.read != "auto":
        return choose(f"data source {source.name!r}: read", source.read, READERS)
    for reader in READERS.values():
        if reader.auto and name.lower().endswith(reader.suffixes):
            return reader
    return READERS["text"]


# ---- readers ----------------------------------------------------------------------------------------------


def read_text(path: Path, name: str) -> Items:
    yield str(path), name, whole_text(path)


def read_lines(path: Path, name: str) -> Items:
    for number, line in enumerate(lines(path), 1):
        id, text = f"{name}:{number}", decoded(line)
        if text and not isinstance(text, Bad):
            id, text = document_of(parsed(text), id)
        yield f"{path}:{number}", id, text


def read_json(path: Path, name: str) -> Items:
    """JSON lines, where the first line is an object or the whole is no JSON; else an array or one object."""
    first_line = next((line for line in lines(path) if line.strip()), b"")
    whole = None
    if not isinstance(parsed(decoded(first_line)), dict):
        whole = parsed(whole_text(path))
    if isinstance(whole, dict):
        yield str(path), *document_of(whole, name)
    elif isinstance(whole, list):
        for number, fields in enumerate(whole, 1):
            yield f"{path}:{number}", *document_of(fields, f"{name}:{number}")
    else:
        yield from read_lines(path, name)


def parsed(text: str | Bad) -> object:
    """The JSON value, or Bad."""
    try:
        return text if isinstance(text, Bad) else json.loads(text)
    except (ValueError, RecursionError):  # also a number of 5,000 digits
        return Bad("not JSON")


def document_of(fields: object, id: str) -> tuple[str, str | Bad]:
    """(id, text or Bad) of a JSON value; `id` where it has none of its own."""
    if isinstance(fields, Bad):
        return id, fields
    if not isinstance(fields, dict):
        return id, Bad("not a JSON object")
    if not isinstance(fields.get("text"), str):
        return id, Bad("`text` is not a string" if "text" in fields else "no `text`")
    return str(fields["id"]) if isinstance(fields.get("id"), str | int) else id, fields["text"]


def read_parquet(path: Path, name: str) -> Items:
    """Row groups are streamed: a column of one group is in memory at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"{path} is parquet; `pip install pyarrow` to read it") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [column for column in ("text", "id") if column in file.schema_arrow.names]
            if "text" not in columns:
                raise ConfigError(f"{path} has no column `text`; its columns are {file.schema_arrow.names}")
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                ids = batch.column("id") if "id" in columns else [None] * batch.num_rows
                for text, id in zip(batch.column("text"), ids):
                    number += 1
                    id = id.as_py() if id is not None else None  # a row may lack what others have
                    try:
                        text = text.as_py()
                        text = text if isinstance(text, str) else Bad("`text` is not a string")
                    except UnicodeDecodeError:
                        text = Bad("not UTF-8")
                    yield f"{path}:{number}", f"{name}:{number}" if id is None else str(id), text
    except pyarrow.ArrowException as error:
        raise EOFError(str(error).splitlines()[0]) from None


def read_docstrings(path: Path, name: str) -> Items:
    """The English of a Python file: its docstrings joined by blank lines, found with `ast`; nothing is run.

    A module that is one table of texts, `topics = {"name": "text", ...}`, gives a document an entry, with the
    id `file.py#name`. A module without docstrings gives nothing.
    """
    text = whole_text(path)
    if isinstance(text, Bad):
        yield str(path), name, text
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as those about "\d" in other people's strings
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        yield str(path), name, Bad("not Python to this Python")
        return

    table = table_of_texts(tree)
    if table:
        for key, value in table.items():
            yield f"{path}#{key}", f"{name}#{key}", value
        return

    # All docstrings, in the order of the file.
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    owners = [node for node in ast.walk(tree) if isinstance(node, kinds) and ast.get_docstring(node)]
    owners.sort(key=lambda node: node.body[0].lineno)  # ast.walk goes level by level, a reader line by line
    if owners:
        yield str(path), name, "\n\n".join(ast.get_docstring(node) for node in owners) + "\n"


def table_of_texts(tree: ast.Module) -> dict[str, str]:
    """{"name": "text"} where the module's body is that dict literal and at most a docstring, else {}."""
    body = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
    if len(body) != 1 or not isinstance(body[0], ast.Assign) or not isinstance(body[0].value, ast.Dict):
        return {}
    keys, values = body[0].value.keys, body[0].value.values
    if not all(isinstance(item, ast.Constant) and isinstance(item.value, str) for item in (*keys, *values)):
        return {}
    return {key.value: value.value for key, value in zip(keys, values)}


LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".ndjson.gz", ".ndjson.zst", ".json.gz", ".json.zst")
TEXTS = tuple(suffix + packed for suffix in TEXT_SUFFIXES for packed in ("", ".gz", ".zst"))

# Kind -> reader. With `read="auto"` the first row that has a file's suffix reads it, so a new row goes above
# "text"; "text" also reads the files that a name or a glob gives and whose suffix no row has.
READERS = {
    "lines": Reader(read_lines, LINES),
    "json": Reader(read_json, (".json",), in_folders=False),
    "parquet": Reader(read_parquet, (".parquet",)),
    "docstrings": Reader(read_docstrings, (".py",), auto=False),
    "text": Reader(read_text, TEXTS),
}


# ---- bytes ------------------------------------------------------------------------------------------------


def decoded(data: bytes) -> str | Bad:
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError:
        return Bad("not UTF-8")


def whole_text(path: Path) -> str | Bad:
    return decoded(b"".join(blocks(path)))


def printable(name: str) -> str:
    """An id or a file's name as UTF-8 can spell it: printable("caf\\udce9") -> "caf\\\\udce9"."""
    return name.encode("utf-8", "backslashreplace").decode()


def encodable(text: str) -> bool:
    """False for half of a surrogate pair: JSON can spell one, UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, split at line feeds only: JSON strings may hold every other line separator."""
    held: list[bytes] = []  # the parts of a line whose end no block has had yet
    for block in blocks(path):
        first, *rest = block.split(b"\n")
        held.append(first)
        if rest:
            yield b"".join(held)
            yield from rest[:-1]
            held = [rest[-1]]
    if any(held):
        yield b"".join(held)


def blocks(path: Path) -> Iterator[bytes]:
    """A file's bytes, decompressed. Raises EOFError, zlib.error or OSError where it is cut off or damaged."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        yield from zst_blocks(path)
        return
    with gzip.open(path) if suffix == ".gz" else open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def zst_blocks(path: Path) -> Iterator[bytes]:
    """Reads frame by frame: the package's own stream reader does not notice a truncated file."""
    try:
        import zstandard
    except ImportError:
        what = f"{path} is compressed with zstandard"
        raise ConfigError(f"{what}; `pip install zstandard` to read it") from None
    frame, data = None, b""
    with open(path, "rb") as file:
        try:
            while data or (data := file.read(BLOCK_BYTES)):
                # Files written with `zstd --long=31` look back 2^31 bytes.
                frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                if block := frame.decompress(data):
                    yield block
                data = b""
                if frame.eof:
                    data, frame = frame.unused_data, None
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from None
    if frame is not None:
        raise EOFError("the last zstandard frame is not complete")
