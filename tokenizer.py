"""Text <-> token ids: trains, loads, runs and compares byte-level BPE and SentencePiece tokenizers.

    python tokenizer.py train demo                                  # what configs/demo.py says
    python tokenizer.py train corpus/*.jsonl --vocab_size 32000 --out tokenizers/mine
    python tokenizer.py train corpus/ --kind sentencepiece --out tokenizers/like-llama
    python tokenizer.py compare tokenizers/mine tokenizers/like-llama --files corpus/en.jsonl corpus/zh.jsonl

Reads documents (formats/documents.py says which files). Writes a folder that `AutoTokenizer.from_pretrained`
opens: `tokenizer.json` (byte-level BPE) or `tokenizer.model` (SentencePiece), and `tokenizer_config.json`.

Training: bpe.py finds the merges. Ids: the special tokens, the end of text first (id 0); the bytes in the
order of bpe.BYTES; the merges. The trainer of the `tokenizers` library has the same rules and gives the same
ids. formats/hf_tokenizer.py and formats/sentencepiece.py read and write the files.
"""

if __name__ == "__main__":  # before packages that take a second to import
    import configurator

    configurator.quiet_imports()

import ast
import dataclasses
import hashlib
import json
import re
import symtable
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unicodedata import normalize

import numpy as np
import regex
from tqdm import tqdm

import config
import configurator
import files
from bpe import SPLITS, WORDS, count_pieces, encoder, learn_merges
from config import ConfigError
from formats import documents, hf_tokenizer, sentencepiece

ENDS_OF_TEXT = ("</s>", "<|endoftext|>", "<|end_of_text|>")
FILES = ("tokenizer.model", "tokenizer.json")
RECORD = "training.json"  # beside them: the settings and sources of the training
NOT_UTF8 = (0xC0, 0xC1, *range(0xF5, 0x100))  # bytes that no text contains; GPT-NeoX lacks them


# ---- the interface ----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Tokenizer:
    """Encodes and decodes. Ids are 0 .. vocab_size - 1, special tokens included.

    Text that is not Unicode is a ConfigError, and so is text that needs a byte which the vocabulary lacks.
    Any other text round-trips, with two exceptions: the file asks for normalization (GPT-NeoX and OLMo: NFC),
    or it is a SentencePiece model without bytes to fall back on.

    Models such as LLaMA's put a space before the text. Here every stretch of text between special tokens gets
    one, and decoding removes it.

    n_bytes, by id, is the number of bytes that a token decodes to within a text, 0 for a special token. Its
    sum over a document may not be the size of the text: it counts the space put before the text, and what
    normalization changed.
    """

    file: str  # tokenizer.json or tokenizer.model
    content: bytes  # the bytes of that file
    eot: int  # id of the token after every document
    special_tokens: dict[str, int]
    token_bytes: list[bytes]  # by id; for a special token, its name
    encode_plain: Callable[[str], np.ndarray]  # text -> uint32 ids; looks for no special or added token
    hf_file: Callable[[], bytes]  # makes the tokenizer.json that `transformers` opens; b"": impossible
    added: dict[str, int] = dataclasses.field(default_factory=dict)  # tokens searched for in every text
    late: frozenset[str] = frozenset()  # special or added tokens that are searched for after normalization
    nfc: bool = False
    adds_space: bool = False
    byte_ids: tuple[int, ...] = ()  # SentencePiece's tokens for single bytes
    lacks: bytes = b""  # bytes without a token; a text that needs one is refused
    bos: int | None = None  # id of the token that begins a text, where the tokenizer's files name one
    adds_bos: bool = False  # whether its own library puts that before every text; encode does not

    def __post_init__(self):
        self.vocab_size = len(self.token_bytes)
        self.sha256 = hashlib.sha256(self.content).hexdigest()
        self.n_bytes = np.array([len(token) for token in self.token_bytes], np.int64)
        self.n_bytes[list(self.special_tokens.values())] = 0

        # named: the tokens that are found by name; matchers: how, without and with the special ones
        self.named = {**self.added, **self.special_tokens}
        self.matchers = {}
        for special, names in ((False, self.added.keys()), (True, self.named.keys())):
            self.matchers[special] = matcher(names - self.late), matcher(names & self.late)

    def encode_array(self, text: str, special: bool = False) -> np.ndarray:
        """Text -> uint32 ids."""
        early, late = self.matchers[special]
        try:
            if not (early or late or self.nfc):
                return self.encode_plain(text)

            # Cut the text around tokens found by name: first the early ones, then, normalized, the late ones.
            found = []
            for name, plain in stretches(early, text):
                plain = normalize("NFC", plain) if self.nfc else plain
                found += [(name, "")] if name else stretches(late, plain)
            ids = [[self.named[name]] if name else self.encode_plain(plain) for name, plain in found]
            return np.concatenate([np.zeros(0, np.uint32), *ids], dtype=np.uint32, casting="unsafe")
        except UnicodeEncodeError as error:
            raise refused(text, error) from None

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Text -> ids. A special token's name in the text is text, unless `special` asks for its id."""
        return self.encode_array(text, special).tolist()

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[np.ndarray]:
        """Texts -> uint32 ids of each."""
        if threads == 1:
            return [self.encode_array(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:  # both libraries release Python's lock while they work
            return list(pool.map(self.encode_array, texts))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Ids -> bytes, special tokens by name. Raises ConfigError where an id is not in the vocabulary."""
        tokens, special, starts = [], set(self.special_tokens.values()), self.adds_space
        for id in ids:
            if not 0 <= id < self.vocab_size:
                raise ConfigError(f"id {id} is not in the vocabulary of {self.vocab_size} entries")
            token = self.token_bytes[id]
            tokens.append(token[1:] if starts and token.startswith(b" ") else token)
            starts = self.adds_space and id in special
        return b"".join(tokens)

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def save(self, folder: str | Path, keep_bos: bool = False) -> None:
        """Writes the file, byte for byte as it was loaded, and what `transformers` needs to open it.

        keep_bos: for a model whose training texts began with its BOS. Those of nano360 only end in a token.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = {"eos_token": self.token_bytes[self.eot].decode(), "clean_up_tokenization_spaces": False}
        names["add_bos_token"] = keep_bos and self.adds_bos
        if keep_bos and self.bos is not None:
            names["bos_token"] = self.token_bytes[self.bos].decode()
        settings = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}, indent=2).encode()

        # A tokenizer file of the other kind, from before, must not stay: it would be opened instead.
        named = {"tokenizer_config.json": settings, "tokenizer.json": self.hf_file(), self.file: self.content}
        written = {name: content for name, content in named.items() if content}
        for name in set(FILES) - written.keys():
            (folder / name).unlink(missing_ok=True)
        for name, content in written.items():
            files.write(folder / name, content)


def matcher(texts: Iterable[str]) -> re.Pattern | None:
    """Finds any of the texts; of several that begin at the same character the longest."""
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def stretches(pattern: re.Pattern | None, text: str) -> Iterator[tuple[str, str]]:
    """Cuts a text around the names that a pattern finds: "a<x>b" -> ("", "a"), ("<x>", ""), ("", "b")."""
    start = 0
    for match in pattern.finditer(text) if pattern else ():
        if match.start() > start:
            yield "", text[start : match.start()]
        yield match[0], ""
        start = match.end()
    if start < len(text):
        yield "", text[start:]


def refused(text: str, error: UnicodeEncodeError) -> ConfigError:
    """The error for a text with a character that cannot be encoded; it shows the text around it."""
    character = error.object[error.start]
    around = error.object[max(0, error.start - 20) :][:40]
    at = text.find(character) if character in text else error.start  # NFC may have composed it
    why = f"holds {character!r}, character {at} of the text, which needs {error.reason}; take it out"
    if error.encoding == "utf-8":
        why = "holds half of a surrogate pair, which is no text; drop it"
    return ConfigError(f"{around!r} {why}")


# Runs of blanks, digits, capitals, contractions, accents (composed and not), other scripts, signs.
PROBE = (
    "It's 1234567 o'clock,\tI'LL  go\n\n\n  home:\r\n x=f(a[0])!=b;   12 "
    "na\u00efve nai\u0308ve \u4f60\u597d \u041f\u0440 \U0001f642 "
)


def equal(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether two tokenizers give the same ids, though their files may have been written differently."""

    def ids(t: Tokenizer) -> tuple:
        probe = "".join(c for c in PROBE if not set(c.encode()) & set(t.lacks))
        return t.token_bytes, t.special_tokens, t.eot, t.encode(probe)

    return a.sha256 == b.sha256 or ids(a) == ids(b)


def check_same(model_folder: Path, dataset_folder: Path) -> None:
    """ConfigError where a model folder has a tokenizer, and it is not that of the dataset."""
    known = [model_folder / name for name in FILES if (model_folder / name).is_file()]
    if known and not equal(load(model_folder), load(dataset_folder)):
        raise ConfigError(
            f"{dataset_folder} was made with another tokenizer than {known[0]}; build one with that: "
            f"python data.py CONFIG --tokenizer.path={model_folder} --dataset=ANOTHER_FOLDER"
        )


# ---- loading ----------------------------------------------------------------------------------------------


def load(path: str | Path, eot: str = "") -> Tokenizer:
    """A tokenizer from a file or a folder: tokenizer.model if there is one, else tokenizer.json.

    eot: the token after every document; by default the eos_token of tokenizer_config.json beside the file,
    else the first of ENDS_OF_TEXT that the vocabulary has. Raises ConfigError where the file cannot be used.
    """
    # In a folder a SentencePiece model comes first: a tokenizer.json beside it is a translation.
    path, said, bos = Path(path), {}, ""
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            what = f"{path} has no {' or '.join(FILES)}"
            raise ConfigError(f"{what}; train one: python tokenizer.py train CONFIG")
        path = found[0]

    # Read the file, and tokenizer_config.json beside it.
    beside = path.parent / "tokenizer_config.json"
    try:
        content = path.read_bytes()
        if beside.is_file():
            said = json.loads(beside.read_bytes())
            eot = eot or name_in(said, "eos_token")
            bos = name_in(said, "bos_token")
    except FileNotFoundError:
        what = f"there is no tokenizer {path}; train one: python tokenizer.py train CONFIG"
        raise ConfigError(what) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{beside} is damaged: {type(error).__name__}: {error}") from None

    if path.suffix == ".model":
        loaded = sentencepiece_tokenizer(content, eot, str(path))
        # LLaMA's class in `transformers` puts <s> before every text, unless the settings say otherwise.
        loaded.adds_bos = "llama" in str(said.get("tokenizer_class")).lower()
        bos = bos or "<s>" * loaded.adds_bos
    else:
        loaded = byte_pair_tokenizer(content, eot, str(path))

    # Where tokenizer_config.json exists, its BOS counts, not that of tokenizer.json. It names none where
    # nano360 wrote it for a model of its own.
    if said:
        loaded.bos = loaded.named.get(bos)
        adds = said.get("add_bos_token")
        loaded.adds_bos = loaded.bos is not None and bool(loaded.adds_bos if adds is None else adds)
    return loaded


def name_in(settings: dict, key: str) -> str:
    """The name of a token in tokenizer_config.json, which spells it as text or as a table; else ""."""
    token = settings.get(key)
    return token["content"] if isinstance(token, dict) else token or ""


def find_eot(eot: str, known: dict[str, int], name: str) -> int:
    """Id of the token after every document: of `eot`, or where it is "", of the first of ENDS_OF_TEXT."""
    for text in (eot,) if eot else ENDS_OF_TEXT:
        if text in known:
            return known[text]
    what = repr(eot) if eot else " or ".join(ENDS_OF_TEXT)
    raise ConfigError(f"{name} has no token {what}; set tokenizer.eot to the one that ends a document in it")


def sentencepiece_tokenizer(content: bytes, eot: str = "", name: str = FILES[0]) -> Tokenizer:
    """A SentencePiece model (LLaMA, baichuan)."""
    pieces = sentencepiece.read(content, name)
    return Tokenizer(
        file=FILES[0],
        content=content,
        eot=find_eot(eot, pieces.ids if eot else pieces.special, name),
        special_tokens=pieces.special,
        token_bytes=pieces.token_bytes,
        encode_plain=pieces.encode,
        hf_file=lambda: hf_tokenizer.write_sentencepiece(pieces),
        adds_space=pieces.adds_space,
        byte_ids=tuple(pieces.byte_ids.values()),
    )


def byte_pair_tokenizer(content: bytes, eot: str = "", name: str = FILES[1]) -> Tokenizer:
    """Byte-level BPE from a Hugging Face tokenizer.json (GPT-2, GPT-NeoX, OLMo, Llama-3), run by tiktoken.

    Ids are those of the `tokenizers` library before post-processing: nothing is put before or after the text.
    Added tokens that are not special (GPT-NeoX: runs of spaces) are looked for in every text, as there. A
    vocabulary may lack bytes (SmolLM2: rare control characters). The library drops them without a word, and
    merges what was on both sides; here the text is refused.
    """
    tables = hf_tokenizer.read(content, name)

    # The end of text counts as special, even where the file does not say so.
    end = find_eot(eot, tables.added, name)
    special, added = {}, {}
    for text, id in sorted(tables.added.items(), key=lambda item: item[1]):
        if text in tables.special or id == end:
            special[text] = id
        else:
            added[text] = id
    lacks = bytes(b for b in range(256) if bytes([b]) not in tables.ids and b not in NOT_UTF8)
    return Tokenizer(
        file=FILES[1],
        content=content,
        eot=end,
        special_tokens=special,
        token_bytes=tables.token_bytes,
        encode_plain=encoder(tables.pattern, tables.ids, lacks, name),
        hf_file=lambda: content,
        added=added,
        late=tables.late,
        nfc=tables.nfc,
        lacks=lacks,
        bos=tables.bos,
        adds_bos=tables.bos is not None,
    )


# ---- training ---------------------------------------------------------------------------------------------


def train_byte_pair(texts: Iterable[str], settings: config.Tokenizer, workers: int = 0) -> Tokenizer:
    """Learns byte-level BPE of exactly settings.vocab_size entries.

    Raises ConfigError where the text has fewer merges to give. The model expects settings.vocab_size entries,
    and would notice a smaller vocabulary only later.
    """
    # Find mistakes in the settings before any text is read.
    special, size = (settings.eot, *settings.special_tokens), settings.vocab_size
    pattern = SPLITS.get(settings.split, settings.split)
    try:
        regex.compile(pattern)
    except regex.error as error:
        known = f"use {', '.join(SPLITS)} or a regular expression"
        raise ConfigError(f"tokenizer.split={settings.split!r}: {error}; {known}") from None
    n_merges = size - len(special) - 256
    if n_merges < 0 or len(set(special)) < len(special):
        needed = f"256 bytes and {len(special)} special tokens, all different: {', '.join(special)}"
        raise ConfigError(f"tokenizer.vocab_size={size} must have room for {needed}")

    counts = count_some(texts, pattern, workers)
    merges = learn_merges(counts, n_merges, len(special))
    if len(merges) < n_merges:
        raise ConfigError(
            f"tokenizer.vocab_size={size} takes {n_merges} merges, but this text has {len(merges)} to give; "
            f"use tokenizer.vocab_size={size - n_merges + len(merges)} or less, or more text"
        )
    return byte_pair_tokenizer(hf_tokenizer.write_byte_level(special, merges, pattern), special[0])


def train_sentencepiece(texts: Iterable[str], settings: config.Tokenizer, workers: int = 0) -> Tokenizer:
    """Learns a SentencePiece model as LLaMA and baichuan-7B have it; formats/sentencepiece.py says how."""
    counts = count_some(texts, WORDS, workers)
    learned = sentencepiece.learn(counts, settings.vocab_size, settings.eot, settings.special_tokens)
    return sentencepiece_tokenizer(learned, settings.eot)


def count_some(texts: Iterable[str], pattern: str, workers: int) -> dict[str, int]:
    """Pieces that are not empty and their counts. Raises ConfigError where there are none."""
    counts = count_pieces(texts, pattern, workers)
    del counts[""]
    if not counts:
        raise ConfigError("there is no text to train a tokenizer on: no document, or only empty ones")
    return counts


# ---- the command line -------------------------------------------------------------------------------------


def train(inputs: list[str], out: str, flags: dict, overrides: list[str]) -> None:
    """Trains on a config's sources, or on files, and writes the tokenizer's folder."""
    # Find the settings and the sources.
    name = "mine"
    if len(inputs) == 1 and is_config(inputs[0]):
        cfg = config.load(inputs[0], overrides)
        settings, sources, workers, name = cfg.tokenizer, cfg.data.sources, cfg.data.workers, cfg.name
    elif overrides:
        raise ConfigError(f"{overrides[0]} is not known; only with a config can its settings be overridden")
    else:
        eot = {"eot": "</s>"} if flags.get("kind") == "sentencepiece" else {}
        settings, sources, workers = config.Tokenizer(**eot), [config.Source("files", tuple(inputs))], 0
    settings = dataclasses.replace(settings, **flags)

    # Find the folder to write. A config may name a published file instead.
    folder = Path(out or settings.path or f"tokenizers/{settings.kind}-{settings.vocab_size}")
    if folder.is_file() and not out and settings.path:
        print(f"{folder} is a published tokenizer; used as it is")
        return
    if folder == Path(settings.path) and folder.suffix in (".json", ".model"):
        raise ConfigError(
            f"tokenizer.path={folder} names the file of a published tokenizer, and it is not there: put its "
            "file there, or say where it is: --tokenizer.path=FILE. To train one instead, name a folder: "
            f"--tokenizer.path={Path('tokenizers') / name}"
        )
    if folder.is_file() or folder.suffix in (".json", ".model"):
        raise ConfigError(f"{folder} is a file's name; --out or tokenizer.path name the folder to write")
    if trained(folder, settings, sources):
        return

    # Learn it, counting what is read on the way.
    started, n_documents, n_bytes = time.perf_counter(), 0, 0
    for source in sources:
        documents.tell_left_out(source)

    def texts() -> Iterator[str]:
        nonlocal n_documents, n_bytes
        for source in sources:
            bar = tqdm(documents.read(source), f"reading {source.name}", unit=" documents", disable=None)
            for document in bar:
                n_documents += 1
                n_bytes += len(document.text.encode())
                yield document.text

    kinds = {"bpe": train_byte_pair, "sentencepiece": train_sentencepiece}
    learn = config.choose("tokenizer.kind", settings.kind, kinds)
    tokenizer = learn(texts(), settings, workers)

    tokenizer.save(folder)
    record = {"format": 1, "sha256": tokenizer.sha256, **record_of(settings, sources)}
    files.write_json(folder / RECORD, record)
    print(
        f"{folder / tokenizer.file}: {tokenizer.vocab_size:,} entries from {n_documents:,} documents, "
        f"{n_bytes / 1e6:,.1f} MB, in {time.perf_counter() - started:.1f} s; sha256 {tokenizer.sha256}"
    )


def record_of(settings: config.Tokenizer, sources: Iterable[config.Source]) -> dict:
    """The settings and sources of a training, in the form that RECORD has on disk."""
    values = {name: value for name, value in vars(settings).items() if name != "path"}
    return json.loads(json.dumps({"settings": values, "sources": [vars(source) for source in sources]}))


def trained(folder: Path, settings: config.Tokenizer, sources: Iterable[config.Source]) -> bool:
    """Whether the folder holds this tokenizer already. Raises ConfigError where it holds another one."""
    if not any((folder / name).exists() for name in FILES):
        return False

    # Compare the settings and sources with those that are recorded beside it.
    now = record_of(settings, sources)
    try:
        had = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        print(f"{folder} holds a tokenizer that was not trained here; it stays as it is")
        return True
    differs = []
    for name, value in now["settings"].items():
        if had["settings"].get(name) != value:
            differs.append(f"{name}={had['settings'].get(name)} (now {value})")
    if had["sources"] != now["sources"]:
        differs.append("other sources")
    if differs:
        raise ConfigError(
            f"{folder} was trained with {'; '.join(differs)}; remove it, or train into another folder: --out "
            "or tokenizer.path"
        )
    print(f"{folder} is already trained")
    return True


def is_config(name: str) -> bool:
    """Whether `train NAME` means a config: a Python file that sets `config` or `configs`, or no file at all.

    A folder holds texts, unless it has the name of a config; then `NAME/` means the folder.
    """
    path = Path(name)
    if path.is_file():
        return path.suffix == ".py" and sets_config(path.read_text("utf-8", "replace"))
    if path.exists():
        places = (Path(), configurator.CONFIGS)
        return name == path.name and any((at / f"{name}.py").is_file() for at in places)
    return path.suffix in ("", ".py") and not set(name) & set("*?[")


def sets_config(text: str) -> bool:
    """Whether a Python file gives the name `config` or `configs` a value, however that is written."""
    names = {"config", "configs"}
    try:
        symbols = symtable.symtable(text, "", "exec")
    except (SyntaxError, ValueError):  # a config with a mistake in it: config.load says what is wrong
        return bool(re.search(r"^[ \t]*configs?\s*[:=]", text, re.MULTILINE))
    if any(symbols.lookup(name).is_assigned() for name in names & {*symbols.get_identifiers()}):
        return True
    imports = (node for node in ast.parse(text).body if isinstance(node, ast.ImportFrom))
    return any((alias.asname or alias.name) in names for node in imports for alias in node.names)


def compare(names: list[str], paths: list[str]) -> None:
    """Prints bytes of text per token, and the share of tokens that are a part of a character, by file.

    A part of a character: a SentencePiece token for a byte (also a line end), or bytes that are not UTF-8.
    """
    # parts: by tokenizer and id, whether a token is a part of a character
    tokenizers, parts = [load(name) for name in names], []
    for tokenizer in tokenizers:
        broken = ["\ufffd" in token.decode(errors="replace") for token in tokenizer.token_bytes]
        parts.append(np.array(broken) | np.isin(np.arange(len(broken)), tokenizer.byte_ids))

    def count(path: str) -> np.ndarray:
        """Rows: (documents, bytes); then (tokens, parts of characters) of every tokenizer."""
        sums = np.zeros((len(names) + 1, 2), np.int64)
        for document in documents.read(config.Source("files", (path,))):
            sums[0] += 1, len(document.text.encode())
            for row, tokenizer, part in zip(sums[1:], tokenizers, parts):
                ids = tokenizer.encode_array(document.text)
                row += len(ids), part[ids].sum()
        return sums

    def show(name: str, sums: np.ndarray) -> None:
        n_documents, n_bytes = sums[0]
        cells = "".join(f"  {n_bytes / max(n, 1):12.3f}  {k / max(n, 1):12.2%}" for n, k in sums[1:])
        print(f"{name:{width}}  {n_documents:9,}  {n_bytes / 1e6:8.2f}{cells}", flush=True)

    # Print a table with one line per file. A long name is shortened to its folder or its end.
    width = max(len(name) for name in (*paths, "source"))
    short = [Path(name).parent.name if Path(name).name in FILES else Path(name).name for name in names]
    titles = [f"  {f'{name} ({t.vocab_size:,})'[-26:]:>26}" for name, t in zip(short, tokenizers)]
    print(" " * (width + 21) + "".join(titles))
    print(f"{'source':{width}}  documents        MB" + "   bytes/token   byte tokens" * len(names))
    total = 0
    for path in paths:
        sums = count(path)
        show(path, sums)
        total = total + sums
    show("all", total)


@configurator.script
def main() -> None:
    parser = configurator.parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("train", help="learn a tokenizer", allow_abbrev=False).add_argument
    add("inputs", nargs="+", metavar="CONFIG|FILES", help="a config, or files, folders and globs")
    add("--vocab_size", type=int, help="entries, special tokens included (default: 32000)")
    add("--out", default="", help="folder to write (default: tokenizer.path, or tokenizers/KIND-VOCAB_SIZE)")
    add("--kind", choices=("bpe", "sentencepiece"), help="byte-level BPE (default), or SentencePiece's")
    add("--split", help="gpt4 (default), gpt2, or a regular expression; for byte-level BPE")
    add = commands.add_parser("compare", help="bytes per token, by file", allow_abbrev=False).add_argument
    add("names", nargs="+", metavar="TOKENIZER", help="folders, or files")
    add("--files", nargs="+", required=True, help="documents, as formats/documents.py reads them")
    arguments, rest = parser.parse_known_args()
    if arguments.command == "train":
        flags = {flag: getattr(arguments, flag) for flag in ("vocab_size", "kind", "split")}
        given = {flag: value for flag, value in flags.items() if value is not None}
        # argparse takes an override such as "--run=with a space" for an input.
        inputs = [word for word in arguments.inputs if not word.startswith("--")]
        overrides = [word for word in arguments.inputs if word.startswith("--")] + rest
        train(inputs, arguments.out, given, overrides)
    elif rest:
        raise ConfigError(f"{rest[0]} is not known; python tokenizer.py compare --help")
    else:
        compare(arguments.names, arguments.files)


if __name__ == "__main__":
    main()
