"""Reads Hugging Face's tokenizer.json into plain tables, and writes it from them.

    tables = hf_tokenizer.read(path.read_bytes(), str(path))           # a ByteLevelBPE, or a ConfigError
    content = hf_tokenizer.write_byte_level(special, merges, pattern)  # bytes of a tokenizer.json
    content = hf_tokenizer.write_sentencepiece(sentencepiece_tables)

It reads byte-level BPE (GPT-2, GPT-NeoX, OLMo, Llama-3, SmolLM2). Such a tokenizer cuts text into pieces with
a regular expression, writes each piece as bytes, and merges neighbours inside a piece.

tokenizer.json cannot store raw bytes. It spells each byte as a printable character: itself where it prints in
Latin-1, else the next free character from U+0100 on (GPT-2). So the token b" a" is spelled "Ġa" in the file.

The `tokenizers` library supports more than this file does. A tokenizer that would get other ids here than in
the library is a ConfigError, never a guess.
"""

import json
from collections.abc import Iterable
from typing import NamedTuple

from bpe import BYTES, SPLITS
from config import ConfigError
from formats.sentencepiece import SPACE, Pieces

SPELLED = {byte: chr(byte if i < 188 else 256 + i - 188) for i, byte in enumerate(BYTES)}
UNSPELLED = {ord(character): byte for byte, character in SPELLED.items()}


class ByteLevelBPE(NamedTuple):
    """The tables of a tokenizer.json. All ids are those of the file."""

    pattern: str  # the regular expression that cuts text into pieces
    nfc: bool  # whether text is first brought into Unicode's normal form C
    ids: dict[bytes, int]  # the bytes and the merged tokens, in the order of their ranks
    token_bytes: list[bytes]  # by id: the bytes that a token decodes to; for an added token, its name
    added: dict[str, int]  # tokens that are searched for in a text before it is cut into pieces
    special: frozenset[str]  # those added tokens that a plain text must not produce, such as the end of text
    late: frozenset[str]  # those added tokens that are searched for after normalization
    bos: int | None  # the token that the library puts before every text


def unspelled(text: str) -> bytes:
    """The bytes that a byte-level token spells: unspelled("Ġa") -> b" a"."""
    return text.translate(UNSPELLED).encode("latin-1")


# ---- reading ----------------------------------------------------------------------------------------------


def read(content: bytes, name: str) -> ByteLevelBPE:
    """The tables of a file; `name` is for messages. ConfigError where it is damaged or not supported."""
    try:
        return tables_of(json.loads(content), name)
    except ConfigError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{name} is not a tokenizer.json, or it is damaged ({what})") from None


def tables_of(settings: dict, name: str) -> ByteLevelBPE:
    model, tokens = settings["model"], settings.get("added_tokens") or []
    nfc, pattern = check_supported(settings, name), split_of(settings["pre_tokenizer"], name)

    # An added token replaces the entry of the same name in the model's vocabulary.
    added = {token["content"]: token["id"] for token in tokens}
    vocab = {**model["vocab"], **added}
    if len(set(vocab.values())) < len(vocab) or min(vocab.values()) < 0:
        raise ConfigError(f"{name} is damaged: two of its tokens have the same id, or an id is negative")

    # Only the bytes and the merged tokens are spelled; any other token decodes to its name.
    ranks = ranks_of(model, added.keys(), name)
    if not ranks:
        raise ConfigError(f"{name} is damaged: its vocabulary has no token for a byte")
    ids = {unspelled(text): vocab[text] for text in ranks}
    token_bytes = [b""] * (max(vocab.values()) + 1)
    for text, id in vocab.items():
        token_bytes[id] = text.encode()
    for token, id in ids.items():
        token_bytes[id] = token

    return ByteLevelBPE(
        pattern=pattern,
        nfc=nfc,
        ids=ids,
        token_bytes=token_bytes,
        added=added,
        special=frozenset(token["content"] for token in tokens if token["special"]),
        late=frozenset(token["content"] for token in tokens if token.get("normalized")),
        bos=first_added(settings.get("post_processor")),
    )


def check_supported(settings: dict, name: str) -> bool:
    """Whether the file asks for NFC. Raises ConfigError where it asks for anything that is not done here."""

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
    """The regular expression that cuts text into pieces. Raises ConfigError for an unsupported pre-tokenizer.

    Three forms are supported; each ends with a ByteLevel step:
    ByteLevel alone (GPT-2): it implies GPT-2's pattern.
    Digits, then ByteLevel (SmolLM2): a cut around numerals, then GPT-2's pattern.
    Split, then ByteLevel without a pattern of its own (Llama-3, OLMo 2): the Split names the pattern.
    """
    if pre_tokenizer:
        steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
        *first, last = steps
        uses_gpt2 = last.get("use_regex", True)
        if last["type"] == "ByteLevel" and not last.get("add_prefix_space", True):
            kinds = [(step["type"], step.get("behavior"), step.get("invert")) for step in first]
            if uses_gpt2 and not first:
                return SPLITS["gpt2"]

            # Digits cuts around every numeral, or around every run of them. After it no space leads a number,
            # and blanks before a number end their piece: they stay together, as at the end of a text.
            if uses_gpt2 and kinds == [("Digits", None, None)]:
                number = r"\p{N}" if first[0]["individual_digits"] else r"\p{N}+"
                return SPLITS["gpt2"].replace(r" ?\p{N}+", number).replace(r"(?!\S)", r"(?![^\s\p{N}])")

            # A Split keeps the matches and what lies between them (Isolated), or removes the latter (Removed
            # and invert). Both are the same where the pattern matches every character; the encoder refuses
            # any other text.
            kept = ("Isolated", False), ("Isolated", True), ("Removed", True)
            is_split = kinds in [[("Split", *how)] for how in kept]
            if not uses_gpt2 and is_split and "Regex" in first[0]["pattern"]:
                return first[0]["pattern"]["Regex"]
    shown = json.dumps(pre_tokenizer)[:300]
    raise ConfigError(f"{name} has the pre-tokenizer {shown}, which is not supported")


def first_added(processor: dict | None) -> int | None:
    """Id of the token that a post-processor puts before every text (Llama-3's BOS), if there is one."""
    for step in (processor or {}).get("processors", [processor]):
        if step and step["type"] == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
            return step["special_tokens"][step["single"][0]["SpecialToken"]["id"]]["ids"][0]
    return None


def ranks_of(model: dict, added: Iterable[str], name: str) -> dict[str, int]:
    """Token as spelled in the file -> rank: first the bytes, then the merged tokens, in the order of merges.

    tiktoken runs BPE from ranks alone: it merges any two neighbours whose union is a token, the lowest rank
    first, and takes a piece that is a token whole. The file lists pairs. Both give the same ids in two cases:
    where BPE makes each token from its bytes (GPT-2), or where the file lists every way to make a token and
    says that pieces are taken whole (`ignore_merges`, Llama-3). Raises ConfigError in any other case.
    """
    vocab, whole = model["vocab"], model.get("ignore_merges", False)
    ranks = {SPELLED[byte]: rank for rank, byte in enumerate(BYTES) if SPELLED[byte] in vocab}

    # pairs: token -> every listed way to make it. The ways of one token must follow one another.
    pairs, last = {}, ""
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if left + right in pairs and left + right != last:
            raise ConfigError(f"{name}: the merge {merge!r} makes a token that another has made before")
        last = left + right
        ranks.setdefault(last, 256 + len(pairs))
        pairs.setdefault(last, []).append((left, right))

    # Merges and vocabulary must name the same tokens.
    needed = {part for ways in pairs.values() for way in ways for part in way}
    if whole:
        needed |= vocab.keys() - added
    for token in ranks.keys() - vocab.keys() | needed - ranks.keys():
        raise ConfigError(f"{name}: {token!r} is in its merges or in its vocabulary, but not in both")

    # Check the two cases of the docstring, token by token.
    for token, ways in pairs.items():
        cuts = range(1, len(token))
        if whole and len(set(ways)) == sum(token[:i] in ranks and token[i:] in ranks for i in cuts):
            continue
        left, right = ways[0]
        late = ranks[token] < ranks[left] or ranks[token] < ranks[right]
        if late or crossed(left, right, ranks, pairs):
            raise ConfigError(f"{name}: its merges do not make {token!r}, which tiktoken cannot run")
    return ranks


def crossed(left: str, right: str, ranks: dict[str, int], pairs: dict[str, list]) -> bool:
    """Whether BPE, run on the bytes of left + right, merges across the border before it has made both.

    Undoes the merges next to the border, the latest first. Each time, two other tokens meet at the border.
    They were neighbours until the merge that was undone. If their own merge has a lower rank, BPE takes it
    first and crosses the border. Of two merges with the same rank the one further to the left comes first.
    """
    until = ranks[left + right]
    while True:
        if ranks.get(left + right, until) < until:
            return True
        if ranks[left] > ranks[right] and left in pairs:
            until, left = ranks[left], pairs[left][0][1]
        elif right in pairs:
            # Add a half: the merge at the border is further to the left, so it wins against an equal rank.
            until, right = ranks[right] + 0.5, pairs[right][0][0]
        else:
            return False


# ---- writing ----------------------------------------------------------------------------------------------


def write_byte_level(special: Iterable[str], merges: Iterable[tuple[int, int]], pattern: str) -> bytes:
    """A tokenizer.json of byte-level BPE.

    Ids: the special tokens, the bytes in the order of BYTES, the merges. `merges`: pairs of ids, as
    bpe.learn_merges gives them.
    """
    ids = {text: id for id, text in enumerate(special)}
    texts = [*ids, *SPELLED.values()]
    for left, right in merges:
        texts.append(texts[left] + texts[right])
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    bpe = {
        "vocab": {text: id for id, text in enumerate(texts)},
        "merges": [f"{texts[left]} {texts[right]}" for left, right in merges],
    }
    steps = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    return write(ids, bpe, pre_tokenizer=steps, decoder=byte_level)


def write_sentencepiece(model: Pieces) -> bytes:
    """A tokenizer.json with the ids of a SentencePiece BPE model; b"" for a model that it cannot express.

    It cannot express a model that is not BPE (the scores of BPE are ranks, so they are whole numbers) or that
    rewrites text. `transformers` can convert a model by itself, but needs protobuf for it, and its version 5
    gives other ids to text that begins with a space.
    """
    scores = {text: score for text, score in model.scores.items() if text not in model.special}
    if model.rewrites or any(score % 1 for score in scores.values()):
        return b""

    # SentencePiece merges any two neighbours whose union is a piece, the highest score first.
    bytes_of, merges = set(model.byte_ids.values()), []
    for text in sorted(scores, key=lambda text: (-scores[text], model.ids[text])):
        if model.ids[text] in bytes_of:
            continue
        ways = [(text[:i], text[i:]) for i in range(1, len(text))]
        ways = [way for way in ways if way[0] in scores and way[1] in scores]
        merges += sorted(ways, key=lambda way: (model.ids[way[0]], model.ids[way[1]]))

    # Spaces become SentencePiece's sign for them, and the decoder changes them back.
    steps = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if model.adds_space:
        steps.insert(0, {"type": "Prepend", "prepend": SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    bpe = {
        "unk_token": model.unknown,
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": model.ids,
        "merges": merges,
    }
    normalizer = {"type": "Sequence", "normalizers": steps}
    return write(
        model.special, bpe, normalizer=normalizer, decoder={"type": "Sequence", "decoders": decoders}
    )


def write(special: dict[str, int], bpe: dict, **parts: dict) -> bytes:
    """A tokenizer.json: special tokens, a BPE model, and the steps before and after it."""
    flags = {**dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False), "special": True}
    tokens = [{"id": id, "content": text, **flags} for text, id in special.items()]

    # The library expects every key, in this order.
    steps = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    unset = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    off = dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    file = {"version": "1.0", "added_tokens": tokens, **dict.fromkeys(steps), **parts}
    file["model"] = {"type": "BPE", **unset, **off, **bpe}
    return json.dumps(file, ensure_ascii=False, indent=1).encode()
