"""Models in and out: any folder of families.py, baichuan's packed one, and llama2.c's .bin file.

    python convert.py runs/demo models/demo                      # the newest checkpoint, a folder for others
    python convert.py path/to/pythia models/pythia --dtype bf16  # any published folder
    python convert.py runs/mine models/packed --to baichuan      # query, key and value in one tensor
    python convert.py runs/mine mine.bin --to llama2.c
    python convert.py stories260K.bin models/stories --tokenizer tok512.bin

Reads a run, a checkpoint, a model folder (one safetensors file or many), or a .bin and its tokenizer. Writes
a folder that `transformers` opens: config.json, model.safetensors (or shards, and their index), and the
tokenizer's files as they were; or a .bin. TARGET is there whole or not at all. What is in memory at a time is
one file of weights (--shard_gb).

llama2.c's .bin (github.com/karpathy/llama2.c, its version 0) is little-endian: seven int32, then FP32 tensors
in the order of `bin_parts`. Its code turns neighbouring dimensions of a head, Hugging Face's LLaMA halves:
the rows of queries and keys change places, and no digit changes. Its documents begin with <s>, which so ends
the one before: it is the end-of-text token of the folder, and the BOS that sample.py puts before a prompt.
"""

if __name__ == "__main__":  # before torch, which takes seconds to import
    import configurator

    configurator.quiet_imports()

import argparse
import contextlib
import glob
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import checkpoint
import configurator
import files
import tokenizer as tokenizers
from config import ConfigError, Model
from formats import families
from formats.families import place
from model import Transformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Of a tokenizer, as `transformers` names them. Code is not copied.
TOKENIZER = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
)
# llama2.c's header, in our words; vocab_size is negative where the head is not the embedding.
HEADER = ("d_model", "d_ff", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")
# What its code computes, and has no setting for.
LLAMA2C = {**families.LLAMA, "norm_eps": 1e-5, "rope_theta": 10000.0, "document_mask": False}
BOS = 1  # its <s>: run.c begins with this id and stops at it
CONTROL = ("<unk>", "<s>", "</s>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


class Source(NamedTuple):
    """A model that is there to be read, tensor by tensor."""

    cfg: Model
    ids: dict  # of config.json: which tokens begin and end a document
    read: Callable[[str], Tensor]  # a tensor, by our name for it
    save_tokenizer: Callable[[Path, str], None]  # into a folder of a family


def empty(cfg: Model) -> Transformer:
    """The model without memory: names and shapes."""
    with torch.device("meta"):
        return Transformer(cfg, eot=0)


# ---- folders ----------------------------------------------------------------------------------------------


def open_folder(folder: Path, verify: bool) -> Source:
    """Any folder that checkpoint.load_model loads. ConfigError unless its tensors are what it says."""
    cfg, hf = families.model_config(folder), families.read_config(folder)
    read, family = checkpoint.check_weights(folder, empty(cfg), verify), hf["model_type"]

    def save_tokenizer(target: Path, to: str) -> None:
        for name in TOKENIZER:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)
        if family == "baichuan" != to and (folder / "tokenizer.model").is_file():
            # as published, the settings name code of baichuan's own
            tokenizers.load(folder).save(target, keep_bos=True)

    return Source(cfg, {key: hf[key] for key in IDS if key in hf}, read, save_tokenizer)


def write_folder(source: Source, folder: Path, hf: dict, dtype: torch.dtype, shard_bytes: float) -> None:
    """config.json, which is `hf`; the tokenizer; the weights, in one file or in shards."""
    family, shapes, inside = hf["model_type"], empty(source.cfg).state_dict(), {}
    files.write_json(folder / "config.json", hf)
    source.save_tokenizer(folder, family)
    for name in shapes:  # inside: a stored tensor -> ours that are packed in it
        inside.setdefault(place(name, family)[0], []).append(name)
    sizes = {s: dtype.itemsize * sum(shapes[name].numel() for name in inside[s]) for s in inside}
    shards: list[list[str]] = [[]]
    for stored in sizes:
        if shards[-1] and sum(map(sizes.get, [*shards[-1], stored])) > shard_bytes:
            shards.append([])
        shards[-1].append(stored)
    places = {}
    for i, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for stored in shard:
            ours = {name: source.read(name) for name in inside[stored]}
            tensors |= families.to_family(ours, source.cfg, family)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # safetensors lets nobody else read its files
        places |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(places.items()))}
        files.write_json(folder / "model.safetensors.index.json", index)


# ---- llama2.c ---------------------------------------------------------------------------------------------


def bin_parts(cfg: Model) -> list[tuple[str, tuple[int, ...]]]:
    """Tensors in the order of a .bin; {} stands for each of the layers in turn."""
    D, F, V, q = cfg.d_model, cfg.d_ff, cfg.vocab_size, cfg.n_heads * cfg.d_head
    kv = cfg.n_kv_heads * cfg.d_head
    parts = [
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
    return parts if cfg.tie_embeddings else [*parts, ("lm_head", (V, D))]


def bin_layout(cfg: Model) -> Iterator[tuple[str, tuple[int, ...]]]:
    for part, shape in bin_parts(cfg):
        for layer in range(cfg.n_layers if "{}" in part else 1):
            yield part.format(layer) + ".weight", shape


def reordered(name: str, value: Tensor, pairs: tuple[int, int]) -> Tensor:
    """Rows of each head of queries and keys: (Dh/2, 2) makes halves of neighbours, (2, Dh/2) the reverse."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return value
    return value.unflatten(0, (-1, *pairs)).transpose(1, 2).flatten(0, 2)


def rotary_table(cfg: Model) -> Tensor:
    """(2, T, Dh/2), by llama2.c's own arithmetic (model.py's differs from it in last bits)."""
    frequency = 1 / cfg.rope_theta ** (torch.arange(0, cfg.d_head, 2).float() / cfg.d_head)
    angle = torch.arange(cfg.seq_len)[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin()))


def open_bin(path: Path, tokenizer: str) -> Source:
    """A .bin as a LLaMA. ConfigError where its size is not what its header asks for."""
    wrong, size = f"{path} is no .bin of llama2.c's version 0, or it is damaged", path.stat().st_size
    if size < 4 * len(HEADER):
        raise ConfigError(f"{wrong}: it has {size} bytes, and its header alone takes {4 * len(HEADER)}")
    with open(path, "rb") as file:
        header = dict(zip(HEADER, struct.unpack("<7i", file.read(28))))
    settings = {**header, "vocab_size": abs(header["vocab_size"]), "tie_embeddings": header["vocab_size"] > 0}
    try:
        cfg = Model(**settings, norm_eps=LLAMA2C["norm_eps"], rope_theta=LLAMA2C["rope_theta"]).resolved()
    except ConfigError as error:
        raise ConfigError(f"{wrong}: {error}") from None
    n = sum(math.prod(shape) * (cfg.n_layers if "{}" in part else 1) for part, shape in bin_parts(cfg))
    if size != 4 * (len(HEADER) + n):
        said = ", ".join(f"{name}={value}" for name, value in header.items())
        raise ConfigError(f"{wrong}: it has {size:,} bytes, not the {4 * (len(HEADER) + n):,} of {said}")
    mapped = torch.from_file(str(path), size=size // 4, dtype=torch.float32)  # read only where it is used
    names, shapes = zip(*bin_layout(cfg))
    flat = mapped[len(HEADER) :].split([math.prod(shape) for shape in shapes])
    tensors = {name: values.view(shape) for name, values, shape in zip(names, flat, shapes)}
    off = (tensors["rope.weight"] - rotary_table(cfg)).abs().max().item()
    if off:
        print(f"note: the rotary table in {path}, which is not kept, is {off:.1g} off that of base 10000")
    loaded = load_tokenizer(tokenizer, cfg) if tokenizer else None

    def read(name: str) -> Tensor:
        return reordered(name, tensors[name], (cfg.d_head // 2, 2))

    def save_tokenizer(target: Path, to: str) -> None:
        loaded.save(target, keep_bos=True)

    return Source(cfg, dict.fromkeys(IDS[:2], BOS), read, save_tokenizer)


def write_bin(source: Source, path: Path) -> None:
    """A .bin of a model that is what LLAMA2C says."""
    cfg = source.cfg
    header = [getattr(cfg, name) for name in HEADER]
    if not cfg.tie_embeddings:
        header[HEADER.index("vocab_size")] *= -1
    with open(path, "wb") as file:
        file.write(struct.pack("<7i", *header))
        for name, _ in bin_layout(cfg):
            value = rotary_table(cfg) if name == "rope.weight" else source.read(name)
            file.write(reordered(name, value, (2, cfg.d_head // 2)).contiguous().numpy().data)


def load_tokenizer(path: str, cfg: Model) -> tokenizers.Tokenizer:
    """llama2.c's tok512.bin, or a tokenizer.model. ConfigError where it is not this model's."""
    if Path(path).suffix == ".bin":
        content = sentencepiece_model(read_pieces(path))
        loaded = tokenizers.sentencepiece_tokenizer(content, CONTROL[BOS], path)
    else:
        loaded = tokenizers.load(path, CONTROL[BOS])
    if (loaded.vocab_size, loaded.eot) != (cfg.vocab_size, BOS):
        raise ConfigError(
            f"{path} has {loaded.vocab_size} entries and {CONTROL[BOS]} as id {loaded.eot}, the model wants "
            f"{cfg.vocab_size} and id {BOS}; give its own tokenizer"
        )
    loaded.bos, loaded.adds_bos = BOS, True  # as run.c does, whatever stands beside a tokenizer.model
    return loaded


def read_pieces(path: str) -> list[tuple[str, float]]:
    """tok512.bin -> (piece, score) by id, as SentencePiece has them.

    The file: int32 length of the longest piece; then of each float32 score, int32 length, UTF-8. Spaces are
    spaces there, and <s> and </s> have a line of their own.
    """
    pieces, at = [], 4
    try:
        content = Path(path).read_bytes()
        while at < len(content):
            score, length = struct.unpack_from("<fi", content, at)
            at += 8 + length
            if length < 1 or at > len(content):
                raise ValueError(f"entry {len(pieces)} has {length} bytes, up to {at} of {len(content)}")
            pieces.append((content[at - length : at].decode().replace(" ", "\u2581"), score))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (struct.error, ValueError) as error:
        raise ConfigError(f"{path} is no tokenizer of llama2.c, or it is damaged: {error}") from None
    first = (*CONTROL, *BYTES)
    if tuple(text.strip() for text, _ in pieces[: len(first)]) != first:
        raise ConfigError(f"{path} is no tokenizer of llama2.c: {', '.join(first[:4])} ... are not its first")
    return [*zip(first, (score for _, score in pieces)), *pieces[len(first) :]]


def sentencepiece_model(pieces: list[tuple[str, float]]) -> bytes:
    """(piece, score) by id -> a tokenizer.model: BPE, a space before the text, bytes to fall back on.

    It is a protocol buffer; the numbers are the fields and constants of sentencepiece_model.proto.
    """

    def number(value: int) -> bytes:  # seven bits a byte, the lowest first; the eighth: there are more
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


# ---- the command line -------------------------------------------------------------------------------------


def in_dtype(source: Source, dtype: torch.dtype, lossy: list[str]) -> Source:
    """The source, read in another dtype. Tensors that lose digits are named in `lossy`."""

    def read(name: str) -> Tensor:
        value = source.read(name)
        narrow = value.to(dtype)
        if value.dtype == dtype or value.dtype.itemsize < dtype.itemsize:  # a wider one holds all of it
            return narrow
        if (narrow.isinf() & value.isfinite()).any():
            largest = value.abs().max().item()
            raise ConfigError(
                f"{name} has values up to {largest:.6g}, which {dtype} cannot hold; use --dtype fp32"
            )
        if not torch.equal(narrow.to(value.dtype), value):
            lossy.append(name)
        return narrow

    return source._replace(read=read)


@contextlib.contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A name beside the target to write to, which becomes the target when every byte is on the disk."""
    aside = target.with_name(f".{target.name}.converting.{os.getpid()}")

    def remove(path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{glob.escape(target.name)}.converting.*"):
        if not Path("/proc", left.name.rpartition(".")[2]).exists():  # of a conversion that was killed
            remove(left)
    try:
        yield aside
        for path in (*aside.rglob("*"), aside):
            files.sync(path)
        if target.is_file():
            raise FileExistsError(f"{target} has appeared meanwhile")
        os.replace(aside, target)  # which refuses a folder that has something in it
        files.sync(target.parent)
    except BaseException:
        remove(aside)
        raise


def convert(args: argparse.Namespace) -> None:
    """Checks everything, then writes. Prints a line, and a note where something is not as it was."""
    given, target, to_bin = Path(args.source), Path(args.target).resolve(), args.to == "llama2.c"
    from_bin = given.suffix == ".bin" and not given.is_dir()
    check_arguments(args, given, target, from_bin)
    if from_bin:
        source = open_bin(given, args.tokenizer)
    else:
        source = open_folder(checkpoint.model_folder(given, verify=args.verify), args.verify)
    eot, dtype, lossy = families.end_of_text(source.ids), DTYPES[args.dtype], []
    if to_bin:
        fixed = {**LLAMA2C, "d_head": source.cfg.d_model // source.cfg.n_heads}
        families.check_fixed(source.cfg, fixed, "llama2.c")
        if eot != BOS:
            print(
                f"note: documents of this model end with id {eot}; llama2.c begins and ends them with {BOS}"
            )
    else:
        family = "baichuan" if args.to == "baichuan" else families.family_of(source.cfg)
        hf = {**families.hf_config(source.cfg, eot, family), **source.ids}
        hf["dtype"] = hf["torch_dtype"] = str(dtype).removeprefix("torch.")  # for transformers 5, and 4
    source = in_dtype(source, dtype, lossy)
    with whole(target) as aside:
        if to_bin:
            write_bin(source, aside)
        else:
            aside.mkdir()
            write_folder(source, aside, hf, dtype, args.shard_gb * 1e9)
    if lossy:
        print(f"note: {args.dtype} loses digits of {len(lossy)} tensors, {lossy[0]} the first")
    n = sum(parameter.numel() for parameter in empty(source.cfg).parameters())
    print(f"{args.target}: {args.to if to_bin else family}, {n:,} parameters in {args.dtype}")
    if not to_bin and family == "nano360":
        print("note: no class of transformers computes this model; the folder is for nano360 alone")


def check_arguments(args: argparse.Namespace, given: Path, target: Path, from_bin: bool) -> None:
    """What can be told before the source is opened."""
    to_bin = args.to == "llama2.c"
    if to_bin != (target.suffix == ".bin"):
        kind = "a file NAME.bin" if to_bin else "a folder, not a .bin"
        raise ConfigError(f"TARGET {args.target}: --to {args.to} writes {kind}")
    if to_bin and args.dtype != "fp32":
        raise ConfigError(f"--dtype {args.dtype}: a .bin is in fp32; leave it out")
    if not args.shard_gb > 0:
        raise ConfigError(f"--shard_gb {args.shard_gb} must be above 0")
    if target.exists() and (not target.is_dir() or to_bin or any(target.iterdir())):
        raise ConfigError(f"TARGET {args.target} is there already and would be lost; give a new name")
    if target.is_relative_to(given.resolve()):
        raise ConfigError(f"TARGET {args.target} is inside SOURCE {args.source}; give a place outside it")
    if from_bin and not given.is_file():
        raise ConfigError(f"there is no file {args.source}")
    if from_bin and not to_bin and not args.tokenizer:
        raise ConfigError(f"{args.source} holds no tokenizer; give its own: --tokenizer tok512.bin")
    if args.tokenizer and (to_bin or not from_bin):
        raise ConfigError(f"--tokenizer {args.tokenizer} is for a folder made of a .bin; leave it out")


@configurator.script
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", metavar="SOURCE", help="a run, a checkpoint, a model folder, or a .bin")
    parser.add_argument("target", metavar="TARGET", help="a new folder; with --to llama2.c a new .bin")
    parser.add_argument(
        "--to", choices=("hf", "baichuan", "llama2.c"), default="hf", help="hf: by its settings"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights; default: fp32")
    parser.add_argument("--tokenizer", default="", help="of a .bin: its tok512.bin, or a tokenizer.model")
    parser.add_argument(
        "--shard_gb", type=float, default=5.0, help="1e9 bytes, at most, in a file of weights (5)"
    )
    configurator.add_no_verify(parser)
    try:
        convert(parser.parse_args())
    except BrokenPipeError:
        raise
    except (OSError, SafetensorError) as error:
        configurator.fail(f"nothing was written: {error}")


if __name__ == "__main__":
    main()
