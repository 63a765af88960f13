"""llama2.c's files (github.com/karpathy/llama2.c): the .bin of a model in its version 0, and tok512.bin.

    cfg, read, off = llama2c.read_model(Path("stories260K.bin"))
    llama2c.write_model(cfg, read, Path("mine.bin"))
    pieces = llama2c.read_pieces("tok512.bin")     # for formats.sentencepiece.write

A .bin is little-endian: seven int32 (HEADER), then FP32 tensors in the order of `parts`. llama2.c rotates
pairs of neighbouring dimensions of a head; Hugging Face's LLaMA pairs dimension i with i + Dh/2. So the rows
of queries and keys change their order on the way, and no value changes.

Its documents begin with <s> (id 1), which therefore also ends the document before.
"""

import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from config import ConfigError, Model
from formats.families import LLAMA
from formats.sentencepiece import BYTES, CONTROL, SPACE

# The seven numbers of the header, in our words; vocab_size is negative where the head is not the embedding.
HEADER = ("d_model", "d_ff", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")
HEADER_BYTES = 4 * len(HEADER)
# The settings that its code computes, without a choice.
FIXED = {**LLAMA, "norm_eps": 1e-5, "rope_theta": 10000.0, "document_mask": False}
BOS = 1  # <s>: run.c begins with this id and stops at it


# ---- the model --------------------------------------------------------------------------------------------


def parts(cfg: Model) -> list[tuple[str, tuple[int, ...]]]:
    """Tensors in the order of the file, with their shapes; {} is the number of each layer in turn."""
    D, F, V = cfg.d_model, cfg.d_ff, cfg.vocab_size
    q, kv = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
    tensors = [
        ("embed_tokens", (V, D)),
        ("layers.{}.input_layernorm", (D,)),
        ("layers.{}.self_attn.q_proj", (q, D)),
        ("layers.{}.self_attn.k_proj", (kv, D)),
        ("layers.{}.self_attn.v_proj", (kv, D)),
        ("layers.{}.self_attn.o_proj", (D, q)),
        ("layers.{}.post_attention_layernorm", (D,)),
        ("layers.{}.mlp.gate_proj", (F, D)),
        ("layers.{}.mlp.down_proj", (D, F)),
        ("layers.{}.mlp.up_proj", (F, D)),
        ("norm", (D,)),
        ("rope", (2, cfg.seq_len, cfg.d_head // 2)),  # cosines, then sines; run.c skips them
    ]
    return tensors if cfg.tie_embeddings else [*tensors, ("lm_head", (V, D))]


def tensors_of(cfg: Model) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, in the order of the file."""
    for part, shape in parts(cfg):
        for layer in range(cfg.n_layers if "{}" in part else 1):
            yield part.format(layer) + ".weight", shape


def reordered(name: str, value: Tensor, pairs: tuple[int, int]) -> Tensor:
    """Reorders the rows of each head of queries and keys.

    pairs: (Dh/2, 2) turns neighbours into halves, (2, Dh/2) turns halves into neighbours.
    """
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return value
    return value.unflatten(0, (-1, *pairs)).transpose(1, 2).flatten(0, 2)


def rotary_table(cfg: Model) -> Tensor:
    """(2, T, Dh/2), by llama2.c's own arithmetic (model.py's differs from it in the last bits)."""
    frequency = 1 / cfg.rope_theta ** (torch.arange(0, cfg.d_head, 2).float() / cfg.d_head)
    angle = torch.arange(cfg.seq_len)[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin()))


def read_model(path: Path) -> tuple[Model, Callable[[str], Tensor], float]:
    """A .bin -> (settings, a function from our name of a tensor to it, the error of its rotary table).

    Raises ConfigError where the size of the file is not the one that its header demands.
    """
    wrong, size = f"{path} is no .bin of llama2.c's version 0, or it is damaged", path.stat().st_size
    if size < HEADER_BYTES:
        raise ConfigError(f"{wrong}: it has {size} bytes, and its header alone takes {HEADER_BYTES}")

    # The header gives the settings.
    with open(path, "rb") as file:
        header = dict(zip(HEADER, struct.unpack("<7i", file.read(HEADER_BYTES))))
    settings = {**header, "vocab_size": abs(header["vocab_size"]), "tie_embeddings": header["vocab_size"] > 0}
    try:
        cfg = Model(**settings, norm_eps=FIXED["norm_eps"], rope_theta=FIXED["rope_theta"]).resolved()
    except ConfigError as error:
        raise ConfigError(f"{wrong}: {error}") from None

    # The settings give the size. It is counted by part: a damaged header may say a billion layers.
    n = sum(math.prod(shape) * (cfg.n_layers if "{}" in part else 1) for part, shape in parts(cfg))
    wanted = HEADER_BYTES + 4 * n
    if size != wanted:
        said = ", ".join(f"{name}={value}" for name, value in header.items())
        raise ConfigError(f"{wrong}: it has {size:,} bytes, not the {wanted:,} of {said}")

    # The tensors are views of the file.
    mapped = torch.from_file(str(path), size=size // 4, dtype=torch.float32)  # read only where it is used
    names, shapes = zip(*tensors_of(cfg))
    flat = mapped[len(HEADER) :].split([math.prod(shape) for shape in shapes])
    tensors = {name: values.view(shape) for name, values, shape in zip(names, flat, shapes)}

    def read(name: str) -> Tensor:
        return reordered(name, tensors[name], (cfg.d_head // 2, 2))

    return cfg, read, (tensors["rope.weight"] - rotary_table(cfg)).abs().max().item()


def write_model(cfg: Model, read: Callable[[str], Tensor], path: Path) -> None:
    """A .bin of a model that has the settings FIXED; `read` gives a tensor by our name for it, in FP32."""
    header = [getattr(cfg, name) for name in HEADER]
    if not cfg.tie_embeddings:
        header[HEADER.index("vocab_size")] *= -1
    with open(path, "wb") as file:
        file.write(struct.pack("<7i", *header))
        for name, _ in tensors_of(cfg):
            value = rotary_table(cfg) if name == "rope.weight" else read(name)
            file.write(reordered(name, value, (2, cfg.d_head // 2)).contiguous().numpy().data)


# ---- the tokenizer ----------------------------------------------------------------------------------------


def read_pieces(path: str) -> list[tuple[str, float]]:
    """tok512.bin -> (piece, score) by id, as SentencePiece has them.

    The file has the int32 length of the longest piece; then for each piece a float32 score, an int32 length
    and the text in UTF-8. Spaces are spaces there, and <s> and </s> have a line end before and after them.
    """
    pieces, at = [], 4
    try:
        content = Path(path).read_bytes()
        while at < len(content):
            score, length = struct.unpack_from("<fi", content, at)
            at += 8 + length
            if length < 1 or at > len(content):
                raise ValueError(f"entry {len(pieces)} has {length} bytes, up to {at} of {len(content)}")
            pieces.append((content[at - length : at].decode().replace(" ", SPACE), score))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (struct.error, ValueError) as error:
        raise ConfigError(f"{path} is no tokenizer of llama2.c, or it is damaged: {error}") from None

    # The first 259 pieces are always the same; take them without their line ends.
    first = (*CONTROL, *BYTES)
    if tuple(text.strip() for text, _ in pieces[: len(first)]) != first:
        raise ConfigError(f"{path} is no tokenizer of llama2.c: {', '.join(first[:4])} ... are not its first")
    return [*zip(first, (score for _, score in pieces)), *pieces[len(first) :]]
