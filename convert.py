"""Models in and out: any folder of formats/families.py, baichuan's packed one, and llama2.c's .bin file.

    python convert.py runs/demo models/demo                      # the newest checkpoint, a folder for others
    python convert.py path/to/pythia models/pythia --dtype bf16  # any published folder
    python convert.py runs/mine models/packed --to baichuan      # query, key and value in one tensor
    python convert.py runs/mine mine.bin --to llama2.c
    python convert.py stories260K.bin models/stories --tokenizer tok512.bin

Reads a run, a checkpoint, a model folder (one safetensors file or many), or a .bin and its tokenizer. Writes
a folder that `transformers` opens: config.json, model.safetensors (or shards and their index), and the
tokenizer's files unchanged; or a .bin. TARGET appears whole or not at all. Memory holds one file of weights
at a time (--shard_gb).

Documents of llama2.c's models begin with <s>, which therefore also ends the document before. So in a folder
<s> is the end-of-text token, and also the BOS that sample.py puts before a prompt.
"""

if __name__ == "__main__":  # before torch, which takes seconds to import
    import configurator

    configurator.quiet_imports()

import argparse
import contextlib
import glob
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

import configurator
import files
import integrity
import tokenizer as tokenizers
from config import ConfigError, Model
from formats import families, llama2c, sentencepiece, shards
from formats.llama2c import BOS
from formats.sentencepiece import CONTROL
from model import Transformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# The files of a tokenizer, as `transformers` names them. Code is not copied.
TOKENIZER = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
)


class Source(NamedTuple):
    """An open model, read tensor by tensor."""

    cfg: Model
    ids: dict  # the ids in config.json of the tokens that begin and end a document
    read: Callable[[str], Tensor]  # a tensor, by our name for it
    save_tokenizer: Callable[[Path, str], None]  # into a folder of a family


def empty(cfg: Model) -> Transformer:
    """The model on PyTorch's meta device: names and shapes without memory."""
    with torch.device("meta"):
        return Transformer(cfg, eot=0)


# ---- folders ----------------------------------------------------------------------------------------------


def open_folder(folder: Path, verify: bool) -> Source:
    """Any folder that checkpoint.load_model loads. ConfigError unless its tensors are what it says."""
    cfg, hf = families.model_config(folder), families.read_config(folder)
    with integrity.compared(folder, "model", verify):
        read, family = families.reader(folder, empty(cfg)), hf["model_type"]

    def save_tokenizer(target: Path, to: str) -> None:
        for name in TOKENIZER:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)
        if family == "baichuan" != to and (folder / "tokenizer.model").is_file():
            # The published settings name baichuan's own code, which is not copied.
            tokenizers.load(folder).save(target, keep_bos=True)

    return Source(cfg, {key: hf[key] for key in IDS if key in hf}, read, save_tokenizer)


def write_folder(source: Source, folder: Path, hf: dict, dtype: torch.dtype, shard_bytes: float) -> None:
    """Writes config.json (`hf`), the tokenizer, and the weights in one file or in shards."""
    family, shapes = hf["model_type"], empty(source.cfg).state_dict()
    files.write_json(folder / "config.json", hf)
    source.save_tokenizer(folder, family)

    # Write the weights, with one file at a time in memory.
    layout, index = families.layout(shapes, source.cfg, family, dtype.itemsize, shard_bytes)
    for file, names in layout.items():
        tensors = families.to_family({name: source.read(name) for name in names}, source.cfg, family)
        shards.save(tensors, folder / file)
    for name, content in index.items():
        files.write(folder / name, content)


# ---- llama2.c ---------------------------------------------------------------------------------------------


def open_bin(path: Path, tokenizer: str) -> Source:
    """A .bin as a LLaMA. ConfigError where it is damaged, or the tokenizer is not its own."""
    cfg, read, off = llama2c.read_model(path)
    if off:
        print(f"note: the rotary table in {path}, which is not kept, is {off:.1g} off that of base 10000")
    loaded = load_tokenizer(tokenizer, cfg) if tokenizer else None

    def save_tokenizer(target: Path, to: str) -> None:
        loaded.save(target, keep_bos=True)

    return Source(cfg, dict.fromkeys(IDS[:2], BOS), read, save_tokenizer)


def load_tokenizer(path: str, cfg: Model) -> tokenizers.Tokenizer:
    """llama2.c's tok512.bin, or a tokenizer.model. ConfigError where it is not this model's."""
    name = CONTROL[BOS]
    if Path(path).suffix == ".bin":
        content = sentencepiece.write(llama2c.read_pieces(path))
        loaded = tokenizers.sentencepiece_tokenizer(content, name, path)
    else:
        loaded = tokenizers.load(path, name)
    if (loaded.vocab_size, loaded.eot) != (cfg.vocab_size, BOS):
        raise ConfigError(
            f"{path} has {loaded.vocab_size} entries and {name} as id {loaded.eot}, the model wants "
            f"{cfg.vocab_size} and id {BOS}; give its own tokenizer"
        )
    # run.c puts <s> before every text, whatever the settings beside a tokenizer.model say.
    loaded.bos, loaded.adds_bos = BOS, True
    return loaded


# ---- the command line -------------------------------------------------------------------------------------


def in_dtype(source: Source, dtype: torch.dtype, lossy: list[str]) -> Source:
    """The source, read in another dtype. Tensors that lose digits are named in `lossy`."""

    def read(name: str) -> Tensor:
        value = source.read(name)
        narrow = value.to(dtype)
        if value.dtype == dtype or value.dtype.itemsize < dtype.itemsize:  # a wider dtype loses nothing
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
    """Yields a name beside the target to write to; renames it to the target when every byte is on the disk.

    After an error nothing is left, and after a kill the next conversion to this target removes the rest.
    """
    # Prepare the name, and remove what a killed conversion left.
    aside = target.with_name(f".{target.name}.converting.{os.getpid()}")

    def remove(path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{glob.escape(target.name)}.converting.*"):
        if not Path("/proc", left.name.rpartition(".")[2]).exists():  # that conversion was killed
            remove(left)

    # Write, then rename.
    try:
        yield aside
        for path in (*aside.rglob("*"), aside):
            files.sync(path)
        if target.is_file():
            raise FileExistsError(f"{target} has appeared meanwhile")
        os.replace(aside, target)  # refuses a folder that has something in it
        files.sync(target.parent)
    except BaseException:
        remove(aside)
        raise


def convert(args: argparse.Namespace) -> None:
    """Checks everything, then writes. Prints a line, and a note where something is not as it was."""
    given, target = Path(args.source), Path(args.target).resolve()
    from_bin = given.suffix == ".bin" and not given.is_dir()
    to_bin = args.to == "llama2.c"
    check_arguments(args, given, target, from_bin)
    if from_bin:
        source = open_bin(given, args.tokenizer)
    else:
        source = open_folder(integrity.model_folder(given, verify=args.verify), args.verify)
    eot, dtype, lossy = families.end_of_text(source.ids), DTYPES[args.dtype], []

    # Make the target's description of the model. Not every model fits into every target.
    if to_bin:
        fixed = {**llama2c.FIXED, "d_head": source.cfg.d_model // source.cfg.n_heads}
        families.check_fixed(source.cfg, fixed, "llama2.c")
        if eot != BOS:
            what = f"documents of this model end with id {eot}"
            print(f"note: {what}; llama2.c begins and ends them with {BOS}")
    else:
        family = "baichuan" if args.to == "baichuan" else families.family_of(source.cfg)
        hf = {**families.hf_config(source.cfg, eot, family), **source.ids}
        hf["dtype"] = hf["torch_dtype"] = str(dtype).removeprefix("torch.")  # for transformers 5, and 4

    source = in_dtype(source, dtype, lossy)
    with whole(target) as aside:
        if to_bin:
            llama2c.write_model(source.cfg, source.read, aside)
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
    """The checks that need no open source."""
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
    parser = configurator.parser(__doc__, allow_abbrev=False)
    parser.add_argument("source", metavar="SOURCE", help="a run, a checkpoint, a model folder, or a .bin")
    parser.add_argument("target", metavar="TARGET", help="a new folder; with --to llama2.c a new .bin")
    parser.add_argument(
        "--to", choices=("hf", "baichuan", "llama2.c"), default="hf", help="hf: the family that fits"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="dtype of the weights; default: fp32")
    parser.add_argument("--tokenizer", default="", help="for a .bin: its tok512.bin, or a tokenizer.model")
    parser.add_argument(
        "--shard_gb", type=float, default=5.0, help="largest size of a file of weights, in 1e9 bytes (5)"
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
