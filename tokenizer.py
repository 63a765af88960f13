"""Text <-> token ids: trains, loads, runs and compares byte-level BPE and SentencePiece tokenizers.

    python tokenizer.py train demo                                  # what configs/demo.py says
    python tokenizer.py train corpus/*.jsonl --vocab_size 32000 --out tokenizers/mine
    python tokenizer.py train corpus/ --kind sentencepiece --out tokenizers/like-llama
    python tokenizer.py compare tokenizers/mine tokenizers/like-llama --files corpus/en.jsonl corpus/zh.jsonl

Reads documents (documents.py says which files). Writes a folder that `AutoTokenizer.from_pretrained` opens:
`tokenizer.json` (byte-level BPE) or `tokenizer.model` (SentencePiece), and `tokenizer_config.json`.

Training: bpe.py finds the merges. Ids: the special tokens, end of text first (id 0); the bytes in the order
of BYTES; the merges. The trainer of the `tokenizers` library has the same rules, and gives the same ids.
"""

if __name__ == "__main__":  # before packages that take a second to import
    import configurator

    configurator.quiet_imports()

import argparse
import ast
import dataclasses
import hashlib
import io
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
import sentencepiece
import tiktoken
from tqdm import tqdm

import config
import configurator
import files
from bpe import ASCII_SPLITS, BYTES, SPLITS, WORDS, count_pieces, learn_merges, skips
from config import ConfigError
from formats import documents

# tokenizer.json spells a byte as a character that can be printed: itself, or the next one from U+0100 on.
SPELLED = {byte: chr(byte if i < 188 else 256 + i - 188) for i, byte in enumerate(BYTES)}
UNSPELLED = {ord(character): byte for byte, character in SPELLED.items()}
NOT_UTF8 = (0xC0, 0xC1, *range(0xF5, 0x100))  # bytes that no text contains; GPT-NeoX lacks them

ENDS_OF_TEXT = ("</s>", "<|endoftext|>", "<|end_of_text|>")
FILES = ("tokenizer.model", "tokenizer.json")
RECORD = "training.json"  # beside them: what a tokenizer was trained with
WINDOW = 1 << 16  # characters; see long_blank


# ---- running ----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Tokenizer:
    """Ids are 0 .. vocab_size - 1, special tokens included. Text that is not Unicode is a ConfigError.

    So is text that needs a byte which the vocabulary lacks. Any other round-trips, unless the file asks for
    normalization (GPT-NeoX and OLMo: NFC) or, a SentencePiece model, has no bytes to fall back on.

    Models such as LLaMA's put a space before the text: here before every stretch of text between special
    tokens. Decoding takes it off.

    n_bytes, by id, is what a token decodes to within a text, 0 for a special token. Over a document that is
    not always the bytes of its text: it counts the space put before it, and what normalization changed.
    """

    file: str  # tokenizer.json or tokenizer.model
    content: bytes  # of that file
    eot: int  # id of the token after every document
    special_tokens: dict[str, int]
    token_bytes: list[bytes]  # by id; of a special token its name
    encode_plain: Callable[[str], np.ndarray]  # text in which no token is looked for -> uint32 ids
    hf_file: Callable[[], bytes]  # makes the tokenizer.json that `transformers` opens; empty: cannot be made
    added: dict[str, int]  # other tokens, which are looked for in every text
    late: frozenset[str] = frozenset()  # those special or added that are looked for after normalization
    nfc: bool = False
    adds_space: bool = False
    byte_ids: tuple[int, ...] = ()  # SentencePiece's tokens for single bytes
    lacks: bytes = b""  # those without a token; a text that needs one is refused
    bos: int | None = None  # id of the token that begins a text, where the tokenizer's files name one
    adds_bos: bool = False  # whether its own library puts that before every text; encode does not

    def __post_init__(self):
        self.vocab_size, self.sha256 = len(self.token_bytes), hashlib.sha256(self.content).hexdigest()
        self.n_bytes = np.array([len(token) for token in self.token_bytes], np.int64)
        self.n_bytes[list(self.special_tokens.values())] = 0
        self.named = {**self.added, **self.special_tokens}
        self.matchers = {
            special: (matcher(wanted - self.late), matcher(wanted & self.late))
            for special, wanted in ((False, self.added.keys()), (True, self.named.keys()))
        }

    def encode_array(self, text: str, special: bool = False) -> np.ndarray:
        """Text -> uint32 ids."""
        early, late = self.matchers[special]
        try:
            if not (early or late or self.nfc):
                return self.encode_plain(text)
            found = []
            for name, plain in stretches(early, text):
                plain = normalize("NFC", plain) if self.nfc else plain
                found += [(name, "")] if name else stretches(late, plain)
            ids = [[self.named[name]] if name else self.encode_plain(plain) for name, plain in found]
            return np.concatenate([np.zeros(0, np.uint32), *ids], dtype=np.uint32, casting="unsafe")
        except UnicodeEncodeError as error:
            character, place = error.object[error.start], error.object[max(0, error.start - 20) :][:40]
            at = text.find(character) if character in text else error.start  # NFC may have composed it
            why = f"holds {character!r}, character {at} of the text, which needs {error.reason}; take it out"
            if error.encoding == "utf-8":
                why = "holds half of a surrogate pair, which is no text; drop it"
            raise ConfigError(f"{place!r} {why}") from None

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Text -> ids. A special token's name in the text is text, unless `special` asks for its id."""
        return self.encode_array(text, special).tolist()

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[np.ndarray]:
        """Texts -> uint32 ids of each."""
        if threads == 1:
            return [self.encode_array(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:  # both libraries work outside Python's lock
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
        """Writes the file, byte for byte as it was loaded, and what `transformers` opens it by.

        keep_bos: for a model whose training texts began with its BOS. Those of nano360 only end in a token.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = {"eos_token": self.token_bytes[self.eot].decode(), "clean_up_tokenization_spaces": False}
        names["add_bos_token"] = keep_bos and self.adds_bos
        if keep_bos and self.bos is not None:
            names["bos_token"] = self.token_bytes[self.bos].decode()
        settings = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}, indent=2).encode()
        named = {"tokenizer_config.json": settings, "tokenizer.json": self.hf_file(), self.file: self.content}
        written = {name: content for name, content in named.items() if content}
        for name in set(FILES) - written.keys():  # one from before would be opened in place of this
            (folder / name).unlink(missing_ok=True)
        for name, content in written.items():
            files.write(folder / name, content)


# Runs of blanks, digits, capitals, contractions, accents, composed and not, other scripts, signs.
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


# ---- loading ----------------------------------------------------------------------------------------------


def load(path: str | Path, eot: str = "") -> Tokenizer:
    """A tokenizer from a file or a folder: tokenizer.model if there is one, else tokenizer.json.

    eot: the token after every document; by default the eos_token of tokenizer_config.json beside the file,
    else the first of ENDS_OF_TEXT that the vocabulary has. Raises ConfigError where the file cannot be used.
    """
    path, said, bos = Path(path), {}, ""
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise ConfigError(
                f"{path} has no {' or '.join(FILES)}; train one: python tokenizer.py train CONFIG"
            )
        path = found[0]
    beside = path.parent / "tokenizer_config.json"
    try:
        content = path.read_bytes()
        if beside.is_file():
            said = json.loads(beside.read_bytes())
            eot = eot or name_in(said, "eos_token")
            bos = name_in(said, "bos_token")
    except FileNotFoundError:
        raise ConfigError(
            f"there is no tokenizer {path}; train one: python tokenizer.py train CONFIG"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{beside} is damaged: {type(error).__name__}: {error}") from None
    if path.suffix == ".model":
        loaded = sentencepiece_tokenizer(content, eot, str(path))
        # LLaMA's class in `transformers` puts <s> before every text, unless the settings say otherwise
        loaded.adds_bos = "llama" in str(said.get("tokenizer_class")).lower()
        bos = bos or "<s>" * loaded.adds_bos
    else:
        try:
            loaded = byte_pair_tokenizer(content, eot, str(path))
        except ConfigError:
            raise
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ConfigError(f"{path} is not a tokenizer.json, or it is damaged ({what})") from None
    if said:  # it names no BOS where nano360 wrote it for a model of its own, whatever tokenizer.json adds
        loaded.bos = loaded.named.get(bos)
        adds = said.get("add_bos_token")
        loaded.adds_bos = loaded.bos is not None and bool(loaded.adds_bos if adds is None else adds)
    return loaded


def name_in(settings: dict, key: str) -> str:
    """The name of a token in tokenizer_config.json, which spells it as text or as a table; else ""."""
    token = settings.get(key)
    return token["content"] if isinstance(token, dict) else token or ""


def find_eot(eot: str, known: dict[str, int], name: str) -> int:
    for text in (eot,) if eot else ENDS_OF_TEXT:
        if text in known:
            return known[text]
    what = repr(eot) if eot else " or ".join(ENDS_OF_TEXT)
    raise ConfigError(f"{name} has no token {what}; set tokenizer.eot to the one that ends a document in it")


def sentencepiece_tokenizer(content: bytes, eot: str = "", name: str = FILES[0]) -> Tokenizer:
    """A SentencePiece model (LLaMA, baichuan), run by sentencepiece.

    Ids are sentencepiece's, but for one character: it takes U+2581, its sign for a space, for a space. Here
    it is spelled in bytes, as any character that the vocabulary lacks, so that text round-trips.
    """
    model = sentencepiece.SentencePieceProcessor()
    try:
        pieces = {}
        if content and model.LoadFromSerializedProto(content):
            pieces = {model.id_to_piece(id): id for id in range(model.vocab_size())}
    except RuntimeError:
        pass
    if not pieces:
        raise ConfigError(f"{name} is not a SentencePiece model, or it is damaged")
    byte_ids = {int(text[3:5], 16): id for text, id in pieces.items() if model.is_byte(id)}
    token_bytes = [text.replace("\u2581", " ").encode() for text in pieces]
    for byte, id in byte_ids.items():
        token_bytes[id] = bytes([byte])

    def encode_plain(text: str) -> np.ndarray:
        text.encode()  # raises UnicodeEncodeError, sentencepiece only something unreadable
        if "\u2581" not in text or len(byte_ids) < 256:
            return np.array(model.encode(text), np.uint32)
        # it travels as a character that nobody uses and the model must spell in four bytes
        private = map(chr, range(0xF0000, 0x110000))
        stand_in = next(c for c in private if c not in text and model.piece_to_id(c) == model.unk_id())
        before, after = ([byte_ids[byte] for byte in c.encode()] for c in (stand_in, "\u2581"))
        ids = []
        for id in model.encode(text.replace("\u2581", stand_in)):
            ids.append(id)
            if ids[-4:] == before:
                ids[-4:] = after
        return np.array(ids, np.uint32)

    special = {text: id for text, id in pieces.items() if model.is_control(id) or model.is_unknown(id)}
    adds_space = "".join(model.encode("a", out_type=str)).startswith("\u2581")
    end = find_eot(eot, pieces if eot else special, name)

    def hf_file() -> bytes:
        return hf_file_of(model, pieces, special, adds_space)

    return Tokenizer(FILES[0], content, end, special, token_bytes, encode_plain, hf_file, {},
                     adds_space=adds_space, byte_ids=tuple(byte_ids.values()))  # fmt: skip


def hf_file_of(model, pieces: dict[str, int], special: dict[str, int], adds_space: bool) -> bytes:
    """A SentencePiece BPE model as tokenizer.json.

    `transformers` makes one itself, but needs protobuf for it, and its version 5 gives other ids to text that
    begins with a space. SentencePiece merges any two neighbours whose union is a piece, the highest score
    first. Nothing where the model is none of BPE, whose scores are ranks, or rewrites text.
    """
    scores = {text: model.get_score(id) for text, id in pieces.items() if text not in special}
    probe = "\ufb01 e\u0301  \u2460 "
    as_it_is = (" " * adds_space + probe).replace(" ", "\u2581")
    if any(score % 1 for score in scores.values()) or model.normalize(probe) != as_it_is:
        return b""
    merges = []
    for text in sorted(scores, key=lambda text: (-scores[text], pieces[text])):
        ways = [(text[:i], text[i:]) for i in range(1, len(text)) if not model.is_byte(pieces[text])]
        ways = [way for way in ways if way[0] in scores and way[1] in scores]
        merges += sorted(ways, key=lambda way: (pieces[way[0]], pieces[way[1]]))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    steps = [{"type": "Prepend", "prepend": "\u2581"}, replace] if adds_space else [replace]
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if adds_space else []
    bpe = {"unk_token": model.id_to_piece(model.unk_id()), "fuse_unk": True, "byte_fallback": True,
           "vocab": pieces, "merges": merges}  # fmt: skip
    return hf_json(special, bpe, normalizer={"type": "Sequence", "normalizers": steps},
                   decoder={"type": "Sequence", "decoders": decoders})  # fmt: skip


def hf_json(special: dict[str, int], bpe: dict, **parts: dict) -> bytes:
    """A Hugging Face tokenizer.json: a BPE model and what stands before and after it."""
    flags = {**dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False), "special": True}
    nothing = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    unset = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    no = dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    tokens = [{"id": id, "content": text, **flags} for text, id in special.items()]
    file = {"version": "1.0", "added_tokens": tokens, **dict.fromkeys(nothing), **parts}
    file["model"] = {"type": "BPE", **unset, **no, **bpe}
    return json.dumps(file, ensure_ascii=False, indent=1).encode()


def byte_pair_tokenizer(content: bytes, eot: str = "", name: str = FILES[1]) -> Tokenizer:
    """Byte-level BPE from a Hugging Face tokenizer.json (GPT-2, GPT-NeoX, OLMo, Llama-3), run by tiktoken.

    Ids are those of the `tokenizers` library before post-processing: nothing is put before or after the text.
    What would give other ids is a ConfigError. Added tokens that are not special (GPT-NeoX: runs of spaces)
    are looked for in every text, as there. A vocabulary may lack bytes (SmolLM2: rare control characters).
    The library drops them without a word, and merges what was on both sides; here the text is refused.
    """
    settings = json.loads(content)
    model, tokens = settings["model"], settings.get("added_tokens") or []
    nfc, pattern = check_supported(settings, name), split_of(settings["pre_tokenizer"], name)
    added = {token["content"]: token["id"] for token in tokens}
    vocab = {**model["vocab"], **added}
    if len(set(vocab.values())) < len(vocab) or min(vocab.values()) < 0:
        raise ConfigError(f"{name} is damaged: two of its tokens have the same id, or an id is negative")
    ranks, end = ranks_of(model, added.keys(), name), find_eot(eot, added, name)
    names = [token["content"] for token in tokens if token["special"] or token["id"] == end]
    special = {text: added.pop(text) for text in sorted(names, key=vocab.get)}
    token_bytes = [b""] * (max(vocab.values()) + 1)
    for text, id in vocab.items():
        token_bytes[id] = unspelled(text) if text in ranks else text.encode()

    # tiktoken's ids are priorities too; where the file's are not, ids are looked up by rank afterwards
    ids, made = [vocab[text] for text in ranks], [vocab[text] for text in ranks if len(text) > 1]
    table = None if made == sorted(made) else np.array(ids, np.uint32)
    mergeable = dict(zip(map(unspelled, ranks), ids if table is None else range(len(ids))))
    # without any special token tiktoken's search for them stops at every character, and takes a third longer
    unused = {"<nobody looks for this>": max(mergeable.values()) + 1}
    lacks = bytes(byte for byte in range(256) if SPELLED[byte] not in ranks and byte not in NOT_UTF8)
    n_bytes = np.array([len(token) for token in token_bytes])
    try:
        own = regex.compile(pattern)
        engine = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=mergeable, special_tokens=unused)
        core = engine._core_bpe  # its methods for lists take longer than those of the core
    except (ValueError, regex.error) as error:
        raise ConfigError(f"{name}: the split pattern {pattern!r} cannot be used: {error}") from None

    def encode_slowly(text: str) -> np.ndarray:
        """The same tokens, cut by `regex`: tiktoken's engine panics at a run of a million blanks."""
        pieces = [core.encode_single_piece(match[0].encode()) for match in own.finditer(text)]
        return np.array([token for piece in pieces for token in piece], np.uint32)

    def encode_plain(text: str) -> np.ndarray:
        if lacks and len(text.encode().translate(None, lacks)) < len(text.encode()):
            i, byte = next((i, byte) for i, c in enumerate(text) for byte in c.encode() if byte in lacks)
            reason = f"the byte 0x{byte:02X}, which the vocabulary of {name} lacks"
            raise UnicodeEncodeError("vocabulary", text, i, i + 1, reason)
        try:
            if long_blank(text):
                tokens = encode_slowly(text)
            else:
                tokens = np.frombuffer(core.encode_to_tiktoken_buffer(text, frozenset()), np.uint32)
        except BaseException as error:  # what the engine's panic becomes is no Exception
            if type(error).__name__ != "PanicException":
                raise
            tokens = encode_slowly(text)
        found = tokens if table is None else table[tokens]
        if pattern not in ASCII_SPLITS and n_bytes[found].sum() != len(text.encode()):
            raise ConfigError(skips(pattern, text))
        return found

    late = frozenset(token["content"] for token in tokens if token.get("normalized"))
    bos = first_added(settings.get("post_processor"))
    return Tokenizer(FILES[1], content, end, special, token_bytes, encode_plain, lambda: content, added, late,
                     nfc, lacks=lacks, bos=bos, adds_bos=bos is not None)  # fmt: skip


def first_added(processor: dict | None) -> int | None:
    """Id of the token that a post-processor puts before every text (Llama-3's BOS), if there is one."""
    for step in (processor or {}).get("processors", [processor]):
        if step and step["type"] == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
            return step["special_tokens"][step["single"][0]["SpecialToken"]["id"]]["ids"][0]
    return None


def long_blank(text: str) -> bool:
    """Whether there may be a run of 2 x WINDOW blanks or more; tiktoken bears one of 300,000."""
    return any(text[i : i + WINDOW].isspace() for i in range(0, len(text) - WINDOW, WINDOW))


def check_supported(settings: dict, name: str) -> bool:
    """Whether text is brought into NFC. Raises ConfigError where the file asks for what is not done here."""

    def refuse(what: str, value: object):
        raise ConfigError(f"{name} has {what} {json.dumps(value)[:200]}, which is not supported")

    model, normalizer = settings["model"], settings.get("normalizer")
    if model.get("byte_fallback"):
        raise ConfigError(f"{name} holds a SentencePiece model; load its tokenizer.model instead")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            refuse(f"a model with the {key}", model[key])
    if model.get("type", "BPE") != "BPE":
        refuse("a model of the type", model["type"])
    for token in settings.get("added_tokens") or []:
        if token.get("single_word") or token.get("lstrip") or token.get("rstrip"):
            refuse("an added token that depends on its neighbours,", token)
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    if any(step and step["type"] != "NFC" for step in steps):
        refuse("the normalizer", normalizer)
    return any(steps)


def split_of(pre_tokenizer: dict, name: str) -> str:
    """The pattern that cuts text into pieces: GPT-2's, implied by byte level, or that of a Split before.

    A Split may keep matches and what is between them (Isolated), or remove the latter (OLMo 2: Removed and
    invert). That is the same where the pattern matches every character; another text is refused later on.
    """
    if pre_tokenizer:
        steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
        *splits, last = steps
        own = last.get("use_regex", True)
        if last["type"] == "ByteLevel" and not last.get("add_prefix_space", True):
            if own and not splits:
                return SPLITS["gpt2"]
            kinds = [(split["type"], split.get("behavior"), split.get("invert")) for split in splits]
            if own and kinds == [("Digits", None, None)]:
                # Digits first cuts around every numeral (SmolLM2), or every run of them. So no space leads a
                # number, and the blanks before it, which end their piece, stay together as at the text's end.
                number = r"\p{N}" if splits[0]["individual_digits"] else r"\p{N}+"
                return SPLITS["gpt2"].replace(r" ?\p{N}+", number).replace(r"(?!\S)", r"(?![^\s\p{N}])")
            kept = ("Isolated", False), ("Isolated", True), ("Removed", True)
            if not own and kinds in [[("Split", *how)] for how in kept] and "Regex" in splits[0]["pattern"]:
                return splits[0]["pattern"]["Regex"]
    shown = json.dumps(pre_tokenizer)[:300]
    raise ConfigError(f"{name} has the pre-tokenizer {shown}, which is not supported")


def unspelled(text: str) -> bytes:
    """What a byte-level token stands for: unspelled("Ġa") -> b" a"."""
    return text.translate(UNSPELLED).encode("latin-1")


def ranks_of(model: dict, added: Iterable[str], name: str) -> dict[str, int]:
    """Byte-level tokens, spelled as in the file, to ranks: the bytes, then what merges make, in their order.

    tiktoken merges any neighbours whose union is a token, and takes a piece that is a token whole; the file
    lists pairs. That is the same where every token is what BPE makes of its bytes, or where the file lists
    every way to make a token and takes pieces whole, too (Llama-3). Raises ConfigError where it may differ.
    """
    vocab, whole = model["vocab"], model.get("ignore_merges", False)
    ranks = {SPELLED[byte]: rank for rank, byte in enumerate(BYTES) if SPELLED[byte] in vocab}
    pairs, last = {}, ""
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if left + right in pairs and left + right != last:
            raise ConfigError(f"{name}: the merge {merge!r} makes a token that another has made before")
        last = left + right
        ranks.setdefault(last, 256 + len(pairs))
        pairs.setdefault(last, []).append((left, right))
    needed = {part for ways in pairs.values() for way in ways for part in way}
    needed |= vocab.keys() - added if whole else set()
    for token in ranks.keys() - vocab.keys() | needed - ranks.keys():
        raise ConfigError(f"{name}: {token!r} is in its merges or in its vocabulary, but not in both")
    for token, ways in pairs.items():
        cuts = range(1, len(token)) if whole else ()
        if len(set(ways)) == sum(token[:i] in ranks and token[i:] in ranks for i in cuts):
            continue
        if max(ranks[part] for part in ways[0]) > ranks[token] or crossed(*ways[0], ranks, pairs):
            raise ConfigError(f"{name}: its merges do not make {token!r}, which tiktoken cannot run")
    return ranks


def crossed(left: str, right: str, ranks: dict[str, int], pairs: dict[str, list]) -> bool:
    """Whether BPE, run on the bytes of left + right, merges across the border before it has made these two.

    Undoes the merges beside the border, the latest first. The tokens that then meet there were neighbours
    until the merge that was undone: if theirs has a lower rank, it comes first. Of equal ranks the one
    further to the left comes first.
    """
    until = ranks[left + right]
    while True:
        if ranks.get(left + right, until) < until:
            return True
        if ranks[left] > ranks[right] and left in pairs:
            until, left = ranks[left], pairs[left][0][1]
        elif right in pairs:
            # a half more: of two merges of the same rank the one at the border is further left
            until, right = ranks[right] + 0.5, pairs[right][0][0]
        else:
            return False


# ---- training ---------------------------------------------------------------------------------------------


def train_byte_pair(texts: Iterable[str], settings: config.Tokenizer, workers: int = 0) -> Tokenizer:
    """Learns byte-level BPE of exactly settings.vocab_size entries.

    Raises ConfigError where the text has too few merges to give: a smaller vocabulary than the one that the
    model was told would only be found out later.
    """
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
    counts = count_pieces(texts, pattern, workers)
    if not counts:
        raise ConfigError("there is no text to train a tokenizer on: no document, or only empty ones")
    merges = learn_merges(counts, n_merges, len(special))
    if len(merges) < n_merges:
        raise ConfigError(
            f"tokenizer.vocab_size={size} takes {n_merges} merges, but this text has {len(merges)} to give; "
            f"use tokenizer.vocab_size={size - n_merges + len(merges)} or less, or more text"
        )
    spelled = [*special, *SPELLED.values()]
    for left, right in merges:
        spelled.append(spelled[left] + spelled[right])
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    bpe = {"vocab": {text: id for id, text in enumerate(spelled)},
           "merges": [f"{spelled[left]} {spelled[right]}" for left, right in merges]}  # fmt: skip
    steps = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    ids = {text: id for id, text in enumerate(special)}
    return byte_pair_tokenizer(hf_json(ids, bpe, pre_tokenizer=steps, decoder=byte_level), special[0])


def train_sentencepiece(texts: Iterable[str], settings: config.Tokenizer, workers: int = 0) -> Tokenizer:
    """Learns SentencePiece BPE as LLaMA and baichuan-7B: bytes to fall back on, single digits, no rewriting.

    Ids: <unk>, <s>, the end of text, more special tokens, 256 bytes, pieces. sentencepiece gets every word
    once, with its count: that is the same to it as all the lines, in less memory, and in no order.
    """
    counts = count_pieces(texts, WORDS, workers)
    del counts[""]
    if not counts:
        raise ConfigError("there is no text to train a tokenizer on: no document, or only empty ones")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(f"{word}\t{count}" for word, count in sorted(counts.items())),
            input_format="tsv", model_writer=model, model_type="bpe", vocab_size=settings.vocab_size,
            eos_piece=settings.eot, control_symbols=list(settings.special_tokens), byte_fallback=True,
            split_digits=True, allow_whitespace_only_pieces=True, normalization_rule_name="identity",
            remove_extra_whitespaces=False, num_threads=1, minloglevel=2,
            character_coverage=0.99995,  # LLaMA's; the rarest characters are left to the bytes
        )  # fmt: skip
    except (RuntimeError, OSError) as error:
        why = str(error).rpartition("] ")[2].strip() or error
        raise ConfigError(f"tokenizer.vocab_size={settings.vocab_size} cannot be learned: {why}") from None
    return sentencepiece_tokenizer(model.getvalue(), settings.eot)


# ---- the command line -------------------------------------------------------------------------------------


def train(inputs: list[str], out: str, flags: dict, overrides: list[str]) -> None:
    """Trains on a config's sources, or on files, and writes the tokenizer's folder."""
    if len(inputs) == 1 and is_config(inputs[0]):
        cfg = config.load(inputs[0], overrides)
        settings, sources, workers = cfg.tokenizer, cfg.data.sources, cfg.data.workers
    elif overrides:
        raise ConfigError(f"{overrides[0]} is not known; only with a config can its settings be overridden")
    else:
        eot = {"eot": "</s>"} if flags.get("kind") == "sentencepiece" else {}
        settings, sources, workers = config.Tokenizer(**eot), [config.Source("files", tuple(inputs))], 0
    settings = dataclasses.replace(settings, **flags)
    folder = Path(out or settings.path or f"tokenizers/{settings.kind}-{settings.vocab_size}")
    if folder.is_file() and not out and settings.path:
        print(f"{folder} is a published tokenizer; used as it is")
        return
    if folder == Path(settings.path) and folder.suffix in (".json", ".model"):
        raise ConfigError(
            f"tokenizer.path={folder} is the place of a published tokenizer, and it is not there: put its "
            "file there, or say where it is: --tokenizer.path=FILE. To train one instead, name a folder: "
            f"--tokenizer.path={Path('tokenizers') / cfg.name}"
        )
    if folder.is_file() or folder.suffix in (".json", ".model"):
        raise ConfigError(f"{folder} is a file's name; --out or tokenizer.path name the folder to write")
    if trained(folder, settings, sources):
        return
    started, n_documents, n_bytes = time.perf_counter(), 0, 0

    for source in sources:
        documents.tell_left_out(source)

    def texts() -> Iterator[str]:
        nonlocal n_documents, n_bytes
        for source in sources:
            bar = tqdm(documents.read(source), f"reading {source.name}", unit=" documents", disable=None)
            for document in bar:
                n_documents, n_bytes = n_documents + 1, n_bytes + len(document.text.encode())
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
    """What a tokenizer was trained with, as it stands in RECORD."""
    values = {name: value for name, value in vars(settings).items() if name != "path"}
    return json.loads(json.dumps({"settings": values, "sources": [vars(source) for source in sources]}))


def trained(folder: Path, settings: config.Tokenizer, sources: Iterable[config.Source]) -> bool:
    """Whether the folder holds this tokenizer already. Raises ConfigError where it holds another one."""
    if not any((folder / name).exists() for name in FILES):
        return False
    try:
        had, now = json.loads((folder / RECORD).read_text()), record_of(settings, sources)
    except (OSError, ValueError):
        print(f"{folder} holds a tokenizer that was not trained here; it stays as it is")
        return True
    differs = [f"{k}={had['settings'].get(k)} (now {v})" for k, v in now["settings"].items()
               if had["settings"].get(k) != v]  # fmt: skip
    differs += ["other sources"] if had["sources"] != now["sources"] else []
    if differs:
        raise ConfigError(
            f"{folder} was trained with {'; '.join(differs)}; remove it, or train into another folder: --out "
            "or tokenizer.path"
        )
    print(f"{folder} is already trained")
    return True


def is_config(name: str) -> bool:
    """Whether `train NAME` means a config: a Python file that sets `config` or `configs`, or what is no file.

    A folder is one of texts, unless it has the name of a config; then `NAME/` means the folder.
    """
    path = Path(name)
    if path.is_file():
        return path.suffix == ".py" and sets_config(path.read_text("utf-8", "replace"))
    if path.exists():
        return name == path.name and any((at / f"{name}.py").is_file() for at in (Path(), config.CONFIGS))
    return path.suffix in ("", ".py") and not set(name) & set("*?[")


def sets_config(text: str) -> bool:
    """Whether a Python file gives the name `config` or `configs` a value, however that is written."""
    names = {"config", "configs"}
    try:
        symbols = symtable.symtable(text, "", "exec")
    except (SyntaxError, ValueError):  # of a config with a mistake in it, config.load says what is wrong
        return bool(re.search(r"^[ \t]*configs?\s*[:=]", text, re.MULTILINE))
    if any(symbols.lookup(name).is_assigned() for name in names & {*symbols.get_identifiers()}):
        return True
    imports = (node for node in ast.parse(text).body if isinstance(node, ast.ImportFrom))
    return any((alias.asname or alias.name) in names for node in imports for alias in node.names)


def compare(names: list[str], paths: list[str]) -> None:
    """Prints bytes of text per token, and the share of tokens that are a part of a character, by file.

    Those are SentencePiece's tokens for a byte (of line ends, too), and byte-level tokens that are not UTF-8.
    """
    tokenizers = [load(name) for name in names]
    parts = []
    for tokenizer in tokenizers:
        broken = ["\ufffd" in token.decode(errors="replace") for token in tokenizer.token_bytes]
        parts.append(np.array(broken) | np.isin(np.arange(len(broken)), tokenizer.byte_ids))
    width = max(len(name) for name in (*paths, "source"))
    short = [Path(name).parent.name if Path(name).name in FILES else Path(name).name for name in names]
    titles = [f"  {f'{name} ({t.vocab_size:,})'[-26:]:>26}" for name, t in zip(short, tokenizers)]
    print(" " * (width + 21) + "".join(titles))
    print(f"{'source':{width}}  documents        MB" + "   bytes/token   byte tokens" * len(names))
    # documents and bytes; then every tokenizer's tokens and parts of characters
    total = np.zeros((len(names) + 1, 2), np.int64)
    for file in (*paths, "all"):
        sums = total if file == "all" else np.zeros_like(total)
        for document in documents.read(config.Source("files", (file,))) if sums is not total else ():
            sums[0] += 1, len(document.text.encode())
            for row, tokenizer, part in zip(sums[1:], tokenizers, parts):
                ids = tokenizer.encode_array(document.text)
                row += len(ids), part[ids].sum()
        cells = "".join(f"  {sums[0, 1] / max(n, 1):12.3f}  {k / max(n, 1):12.2%}" for n, k in sums[1:])
        print(f"{file:{width}}  {sums[0, 0]:9,}  {sums[0, 1] / 1e6:8.2f}{cells}", flush=True)
        total = total + sums


@configurator.script
def main() -> None:
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("train", help="learn a tokenizer", allow_abbrev=False).add_argument
    add("inputs", nargs="+", metavar="CONFIG|FILES", help="a config, or files, folders and globs")
    add("--vocab_size", type=int, help="entries, special tokens included (default: 32000)")
    add("--out", default="", help="folder to write (default: tokenizer.path, or tokenizers/KIND-VOCAB_SIZE)")
    add("--kind", choices=("bpe", "sentencepiece"), help="byte-level BPE (default), or SentencePiece's")
    add("--split", help="gpt4 (default), gpt2, or a regular expression; for byte-level BPE")
    add = commands.add_parser("compare", help="bytes per token, by file", allow_abbrev=False).add_argument
    add("names", nargs="+", metavar="TOKENIZER", help="folders, or files")
    add("--files", nargs="+", required=True, help="documents, as documents.py reads them")
    arguments, rest = parser.parse_known_args()
    if arguments.command == "train":
        flags = {flag: getattr(arguments, flag) for flag in ("vocab_size", "kind", "split")}
        given = {flag: value for flag, value in flags.items() if value is not None}
        # argparse takes "--run=with a space" for an input
        inputs = [word for word in arguments.inputs if not word.startswith("--")]
        overrides = [word for word in arguments.inputs if word.startswith("--")] + rest
        train(inputs, arguments.out, given, overrides)
    elif rest:
        raise ConfigError(f"{rest[0]} is not known; python tokenizer.py compare --help")
    else:
        compare(arguments.names, arguments.files)


if __name__ == "__main__":
    main()
