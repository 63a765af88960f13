"""Files of any kind -> documents. A document is a text that keeps the name of its source and its id for ever.

    for document in documents.read(config.Source("web", paths=("corpus/*.jsonl.gz",))): ...

Reads, and writes nothing:

    .jsonl .ndjson     one document a line: `text`, optionally `id`; other fields are ignored (Dolma's format)
    .parquet           one document a row: `text`, optionally `id` (needs pyarrow)
    anything else      one document a file
    .json              JSON lines too; or one array of objects, or one object, which is read whole
    .gz .zst           around any of these but parquet; .json.gz and .json.zst, Dolma's names, are JSON lines

Suffixes may be in capitals. Which files: a file that is named outright is read, whatever its suffix. So is
every file that a glob matches (`**` is any number of folders). A folder gives, at any depth, the files whose
suffix stands above or in TEXT_SUFFIXES, but no plain .json, since most of those are settings; `tell_left_out`
says what it does not give. Folders and globs leave out names that begin with a dot, and what the source
excludes.

Ids: the document's own `id`; else `folder/file.txt` below the source's folder or below the fixed part of its
glob; else `folder/file.jsonl:7`, the seventh line, row or object. A file that several sources read has the id
that the first of them gives it (data.py sees to that). Of an id that is no Unicode, such as a file's name in
Latin-1, the bytes or surrogates that UTF-8 cannot spell become \\udce9 and the like, six plain characters.

A byte order mark is dropped, line ends are kept as they are. A document that cannot be used (broken JSON, no
text, not UTF-8, nothing in it, a file of 0 bytes) is counted, named by file and line, and skipped. A damaged
file, such as a `.gz` that was cut off, is an error: nobody knows how many documents it has lost.
"""

import ast
import codecs
import gzip
import json
import os
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from config import ConfigError, Source, unknown

LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".ndjson.gz", ".ndjson.zst", ".json.gz", ".json.zst")
# fmt: off
TEXT_SUFFIXES = {
    ".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".html", ".htm", ".xml", ".srt", ".csv",
    ".tsv", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java",
    ".kt", ".scala", ".js", ".mjs", ".jsx", ".ts", ".tsx", ".css", ".rb", ".pl", ".pm", ".php", ".lua", ".r",
    ".jl", ".m", ".swift", ".hs", ".ml", ".clj", ".ex", ".erl", ".lisp", ".el", ".scm", ".f", ".f90", ".s",
    ".asm", ".v", ".vhd", ".sql", ".sh", ".bash", ".ps1", ".cs", ".fs", ".vb", ".dart", ".zig", ".nim", ".d",
    ".cmake", ".mk",
}
# fmt: on
PIECE_BYTES = 1 << 20  # read at once; a few times the buffers of gzip and zstandard


@dataclass
class Document:
    source: str  # config.Source.name
    id: str
    text: str  # not empty, always encodable as UTF-8
    shared: str = ""  # source and name of its file, where several sources read it, as the first has it


@dataclass
class BadDocuments:
    """What `read` skipped, {"not JSON": 1} and ["a.jsonl:7: not JSON"], and how much it did not."""

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
    """In place of the text of a document that cannot be used: why. Never leaves this file."""

    reason: str


# ---- which files ------------------------------------------------------------------------------------------


def files(source: Source) -> list[Path]:
    """The files of a source: its paths in the order given, each expanded and sorted; no file twice.

    Raises ConfigError where a path or glob gives no file, naming it.
    """
    return [path for path, _ in listed(source)]


def listed(source: Source) -> list[tuple[Path, str]]:
    """Files, each with its name below the folder, or below the fixed part of the glob, that led to it."""
    found: dict[str, tuple[Path, str]] = {}
    for given in source.paths:
        root, pattern = split_glob(os.path.expanduser(given))
        if pattern or root.is_dir():
            names = sorted(walk(root, pattern, source))
        elif root.is_file():
            root, names = root.parent, [root.name]
        else:
            raise ConfigError(f"source {source.name!r}: there is no file or folder {given}")
        if not names:
            what = (
                "matches no file"
                if pattern
                else "holds no file that can be read (documents.py lists suffixes)"
            )
            if not pattern and (other := sorted(walk(root, (), source, unread=True))):
                what += f"; name {root / other[0]} and the like outright or with a glob to read them"
            but = f" that {list(source.exclude)} leaves over" if source.exclude else ""
            raise ConfigError(f"source {source.name!r}: {given} {what}{but}")
        for name in names:
            path = root / name
            found.setdefault(os.path.abspath(path), (path, name))
    return list(found.values())


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
    if source.read == "docstrings":  # only Python files are meant
        return
    roots = {Path(os.path.expanduser(given)) for given in source.paths}
    found = {root / name for root in roots if root.is_dir() for name in walk(root, (), source, unread=True)}
    found = {os.path.abspath(path) for path in found} - {os.path.abspath(path) for path in files(source)}
    counts = Counter(os.path.splitext(path)[1].lower() or "without suffix" for path in found)
    if not counts:
        return
    most = ", ".join(f"{printable(suffix)} {n:,}" for suffix, n in counts.most_common(6))
    what = f"{len(found):,} file{'s were' if len(found) > 1 else ' was'} not read ({most}"
    more = f", and {len(counts) - 6} more suffixes" * (len(counts) > 6)
    print(f"note: source {source.name!r}: {what}{more}); name them outright or with a glob to read them")


def walk(root: Path, pattern: tuple[str, ...], source: Source, unread: bool = False) -> Iterator[str]:
    """Names below root of the files that a glob matches; without a glob, of those whose suffix is known.

    With `unread`, of those whose suffix is not.
    """

    def refuse(error: OSError):
        raise ConfigError(f"source {source.name!r}: {error.filename} cannot be read: {error.strerror}")

    def excluded(name: str, globs: tuple[str, ...]) -> bool:
        return any(fnmatchcase(name, glob) for glob in globs)

    # "x/*" matches "x/" and so everything below it: such a folder, perhaps a large one, is not entered
    whole_folders = tuple(glob for glob in source.exclude if glob.endswith("*"))
    seen = set()  # folders, so that a link to a folder above ends
    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        below = "" if Path(folder) == root else Path(folder).relative_to(root).as_posix() + "/"
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
            wanted = matches((below + name).split("/"), pattern) if pattern else known(name, source) != unread
            wanted = wanted and not name.startswith(".") and not excluded(below + name, source.exclude)
            if wanted and os.path.isfile(os.path.join(folder, name)):  # no sockets, no dangling links
                yield below + name


def matches(parts: list[str], pattern: tuple[str, ...]) -> bool:
    """matches(["a", "b", "c.py"], ("**", "*.py")) -> True"""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(matches(parts[i:], pattern[1:] or ("*",)) for i in range(len(parts)))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])


def known(name: str, source: Source) -> bool:
    """Whether a folder gives this file: by its suffix alone, so that a listing opens no file."""
    name = name.lower()
    if source.read == "docstrings":
        return name.endswith(".py")
    bare = name.removesuffix(".gz").removesuffix(".zst")
    return name.endswith(LINES) or name.endswith(".parquet") or os.path.splitext(bare)[1] in TEXT_SUFFIXES


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
        known = names.get(os.path.realpath(path)) if names else None
        for document in read_file(path, known[1] if known else name, source, bad):
            document.shared = "/".join(known) if known else ""
            yield document


def read_file(path: Path, name: str, source: Source, bad: BadDocuments) -> Iterator[Document]:
    """The documents of one file. `name` is its name below the source's root, of which ids are made."""
    suffixes = path.name.lower() if source.read == "auto" else ""
    if source.read == "docstrings":
        items = read_docstrings(path, name)
    elif suffixes.endswith(LINES):
        items = read_lines(path, name)
    elif suffixes.endswith(".json"):
        items = read_json(path, name)
    elif suffixes.endswith(".parquet"):
        items = read_parquet(path, name)
    elif source.read in ("auto", "text"):
        items = read_text(path, name)
    else:
        raise unknown(f"data source {source.name!r}: read", source.read)
    place = str(path)
    try:
        if not path.stat().st_size and source.read != "docstrings":  # a module without any gives nothing
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


# Each reader yields (place for messages, id, text or Bad).


def read_text(path: Path, name: str) -> Iterator[tuple[str, str, object]]:
    yield str(path), name, decoded(b"".join(pieces(path)))


def read_lines(path: Path, name: str) -> Iterator[tuple[str, str, object]]:
    for number, line in enumerate(lines(path), 1):
        id, text = f"{name}:{number}", decoded(line)
        if text and not isinstance(text, Bad):
            id, text = document_of(parsed(text), id)
        yield f"{path}:{number}", id, text


def read_json(path: Path, name: str) -> Iterator[tuple[str, str, object]]:
    """JSON lines, where the first line is an object or the whole is no JSON; else an array or one object."""
    first, whole = parsed(decoded(next((line for line in lines(path) if line.strip()), b""))), None
    if not isinstance(first, dict):
        whole = parsed(decoded(b"".join(pieces(path))))
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


def read_parquet(path: Path, name: str) -> Iterator[tuple[str, str, object]]:
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
                    id = id.as_py() if id is not None else None
                    try:
                        text = text.as_py()
                        text = text if isinstance(text, str) else Bad("`text` is not a string")
                    except UnicodeDecodeError:
                        text = Bad("not UTF-8")
                    yield f"{path}:{number}", f"{name}:{number}" if id is None else str(id), text
    except pyarrow.ArrowException as error:
        raise EOFError(str(error).splitlines()[0]) from None


def read_docstrings(path: Path, name: str) -> Iterator[tuple[str, str, object]]:
    """The English of a Python file: its docstrings joined by blank lines, found with `ast`; nothing is run.

    A module that is one table of texts, `topics = {"name": "text", ...}`, gives a document an entry, with the
    id `file.py#name`. A module without docstrings gives nothing.
    """
    text = decoded(b"".join(pieces(path)))
    if isinstance(text, Bad):
        yield str(path), name, text
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in other people's strings is not this reader's concern
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        yield str(path), name, Bad("not Python to this Python")
        return
    table = table_of_texts(tree)
    if table:
        for key, value in table.items():
            yield f"{path}#{key}", f"{name}#{key}", value
        return
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
    pairs = [(key, value) for key, value in zip(body[0].value.keys, body[0].value.values)]
    strings = all(
        isinstance(item, ast.Constant) and isinstance(item.value, str) for pair in pairs for item in pair
    )
    return {key.value: value.value for key, value in pairs} if strings else {}


# ---- bytes ------------------------------------------------------------------------------------------------


def decoded(data: bytes) -> str | Bad:
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError:
        return Bad("not UTF-8")


def printable(name: str) -> str:
    """What UTF-8 can spell of an id or of a file's name: printable("caf\\udce9") -> "caf\\\\udce9"."""
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
    held: list[bytes] = []  # of the line that no piece has ended yet
    for piece in pieces(path):
        first, *rest = piece.split(b"\n")
        held.append(first)
        if rest:
            yield b"".join(held)
            yield from rest[:-1]
            held = [rest[-1]]
    if any(held):
        yield b"".join(held)


def pieces(path: Path) -> Iterator[bytes]:
    """A file's bytes, decompressed. Raises EOFError, zlib.error or OSError where it is cut off or damaged."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        yield from pieces_of_zst(path)
        return
    with gzip.open(path) if suffix == ".gz" else open(path, "rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece


def pieces_of_zst(path: Path) -> Iterator[bytes]:
    """Frame by frame: the package's own stream reader takes a file that was cut off for a whole one."""
    try:
        import zstandard
    except ImportError:
        raise ConfigError(
            f"{path} is compressed with zstandard; `pip install zstandard` to read it"
        ) from None
    frame, data = None, b""
    with open(path, "rb") as file:
        try:
            while data or (data := file.read(PIECE_BYTES)):
                # files written with `zstd --long=31` look back 2^31 bytes
                frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                if piece := frame.decompress(data):
                    yield piece
                data = b""
                if frame.eof:
                    data, frame = frame.unused_data, None
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from None
    if frame is not None:
        raise EOFError("the last zstandard frame is not complete")
