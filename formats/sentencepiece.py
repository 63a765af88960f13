"""Reads SentencePiece models (tokenizer.model; LLaMA, baichuan) into tables, learns them, and writes them.

    pieces = sentencepiece.read(path.read_bytes(), str(path))          # a Pieces, or a ConfigError
    content = sentencepiece.learn(counts, vocab_size, "</s>", ())      # bytes of a tokenizer.model
    content = sentencepiece.write([("<unk>", 0.0), ("<s>", 0.0), ...])

The package `sentencepiece` runs and trains the models. In this file `import sentencepiece` is that package:
this module's own name is formats.sentencepiece. `write` needs no trainer: it makes a model field by field.
"""

import io
import struct
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import sentencepiece

from config import ConfigError

SPACE = "\u2581"  # SentencePiece's sign for a space
CONTROL = ("<unk>", "<s>", "</s>")  # the first ids of LLaMA's models
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))  # the pieces for single bytes


class Pieces(NamedTuple):
    """The tables of a SentencePiece model."""

    ids: dict[str, int]  # piece, as spelled in the model -> id, in the order of ids
    scores: dict[str, float]  # a BPE model merges the highest score first
    special: dict[str, int]  # pieces that no text produces
    byte_ids: dict[int, int]  # byte -> id of its piece; empty: the model has no bytes to fall back on
    token_bytes: list[bytes]  # by id: the bytes that a piece decodes to
    adds_space: bool  # whether a space is put before every text
    rewrites: bool  # whether text is normalized
    unknown: str  # the piece for text that the vocabulary lacks
    encode: Callable[[str], np.ndarray]  # text -> uint32 ids


def read(content: bytes, name: str) -> Pieces:
    """The tables of a model; `name` is for messages. Raises ConfigError where it is damaged."""
    model = sentencepiece.SentencePieceProcessor()
    ids = {}
    try:
        if content and model.LoadFromSerializedProto(content):
            ids = {model.id_to_piece(id): id for id in range(model.vocab_size())}
    except RuntimeError:
        pass
    if not ids:
        raise ConfigError(f"{name} is not a SentencePiece model, or it is damaged")

    byte_ids = {int(text[3:5], 16): id for text, id in ids.items() if model.is_byte(id)}
    token_bytes = [text.replace(SPACE, " ").encode() for text in ids]
    for byte, id in byte_ids.items():
        token_bytes[id] = bytes([byte])

    # Detect normalization with a text that Unicode's normal forms and runs of spaces would change.
    adds_space = "".join(model.encode("a", out_type=str)).startswith(SPACE)
    probe = "\ufb01 e\u0301  \u2460 "
    unchanged = (" " * adds_space + probe).replace(" ", SPACE)

    return Pieces(
        ids=ids,
        scores={text: model.get_score(id) for text, id in ids.items()},
        special={text: id for text, id in ids.items() if model.is_control(id) or model.is_unknown(id)},
        byte_ids=byte_ids,
        token_bytes=token_bytes,
        adds_space=adds_space,
        rewrites=model.normalize(probe) != unchanged,
        unknown=model.id_to_piece(model.unk_id()),
        encode=encoder(model, byte_ids),
    )


def encoder(model: sentencepiece.SentencePieceProcessor, byte_ids: dict[int, int]) -> Callable:
    """Text -> ids as the package gives them, except for U+2581, which it takes for a space.

    Here U+2581 is spelled in bytes, like any character that the vocabulary lacks, so that text round-trips.
    """

    def encode(text: str) -> np.ndarray:
        text.encode()  # raises UnicodeEncodeError; the package's own error is hard to read
        if SPACE not in text or len(byte_ids) < 256:
            return np.array(model.encode(text), np.uint32)

        # Replace U+2581 by a private character that is not in the text and that the model spells in four
        # bytes; then replace these four ids by those of U+2581's three bytes.
        private = map(chr, range(0xF0000, 0x110000))
        stand_in = next(c for c in private if c not in text and model.piece_to_id(c) == model.unk_id())
        before = [byte_ids[byte] for byte in stand_in.encode()]
        after = [byte_ids[byte] for byte in SPACE.encode()]
        ids = []
        for id in model.encode(text.replace(SPACE, stand_in)):
            ids.append(id)
            if ids[-4:] == before:
                ids[-4:] = after
        return np.array(ids, np.uint32)

    return encode


def learn(counts: dict[str, int], vocab_size: int, eot: str, special: Iterable[str]) -> bytes:
    """Learns a BPE model in LLaMA's manner: bytes to fall back on, digits one by one, text is not rewritten.

    Ids: <unk>, <s>, `eot`, the special tokens, 256 bytes, pieces. `counts`: word -> how often it occurs. The
    trainer reads one line per word, with its count: it learns the same as from all the text, in less memory.
    Raises ConfigError where the trainer cannot make a vocabulary of this size.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(f"{word}\t{count}" for word, count in sorted(counts.items())),
            input_format="tsv",
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            eos_piece=eot,
            control_symbols=list(special),
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            num_threads=1,
            minloglevel=2,
            character_coverage=0.99995,  # LLaMA's; the rarest characters are left to the bytes
        )
    except (RuntimeError, OSError) as error:
        why = str(error).rpartition("] ")[2].strip() or error
        raise ConfigError(f"tokenizer.vocab_size={vocab_size} cannot be learned: {why}") from None
    return model.getvalue()


def write(pieces: list[tuple[str, float]]) -> bytes:
    """(piece, score) by id -> a tokenizer.model: BPE, a space before the text, bytes to fall back on.

    The file is a protocol buffer. The numbers are the fields and constants of sentencepiece_model.proto.
    """

    def number(value: int) -> bytes:
        # Seven bits a byte, the lowest first; the eighth bit says that more follow.
        return bytes([value]) if value < 128 else bytes([value % 128 + 128]) + number(value // 128)

    def field(n: int, value: int | float | bytes) -> bytes:
        if isinstance(value, int):
            return number(8 * n) + number(value)
        if isinstance(value, float):
            return number(8 * n + 5) + struct.pack("<f", value)
        return number(8 * n + 2) + number(len(value)) + value

    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3, **dict.fromkeys(BYTES, 6)}  # unknown, control, byte; else 1
    model = b""
    for text, score in pieces:
        model += field(1, field(1, text.encode()) + field(2, score) + field(3, kinds.get(text, 1)))
    trainer = field(3, 2) + field(4, len(pieces)) + field(35, 1)  # BPE; vocab_size; byte_fallback
    normalizer = field(1, b"identity") + field(3, 1) + field(4, 0)  # add_dummy_prefix; all spaces are kept
    return model + field(2, trainer) + field(3, normalizer)
