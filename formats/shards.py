"""Weights in safetensors files, as Hugging Face lays them out: one file, or shards and an index.

    tensors = shards.open_weights("runs/demo/checkpoints/step-00000640")   # {"lm_head.weight": file, ...}
    tensors["lm_head.weight"].get_tensor("lm_head.weight")                 # only now bytes are read
    shards.layout("model", {"a.weight": 400, "b.weight": 300}, limit=500)  # which tensors in which file

Only this file reads and writes such files. No pickle is ever opened: opening one can run any code.
"""

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from config import ConfigError

UMASK = os.umask(0)  # permissions that new files are not given; it can only be read by setting it
os.umask(UMASK)


def open_weights(folder: Path | str, stem: str = "model") -> dict:
    """Tensor name -> the open safetensors file that holds it, of a folder with one file or many shards.

    Raises ConfigError where a file is missing or damaged, or does not hold what the index says.
    """
    folder = Path(folder)
    index = folder / f"{stem}.safetensors.index.json"
    if not index.exists():
        path = folder / f"{stem}.safetensors"
        pickled = [p.name for kind in ("*.bin", "*.pt", "*.pth") for p in sorted(folder.glob(kind))]
        if pickled and not path.exists():
            raise ConfigError(
                f"{folder} has its weights only as pickle ({pickled[0]}), and opening a pickle can run any "
                "code; where you trust it, load it with transformers and call save_pretrained, which writes "
                "safetensors"
            )
        file = open_tensors(path)
        return dict.fromkeys(file.keys(), file)

    # The index maps tensor names to files. It may name only files of its own folder.
    try:
        file_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        opened = dict.fromkeys(file_of.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index} is damaged: {type(error).__name__}: {error}") from None
    for shard in opened:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ConfigError(f"{index} names {shard!r}, which is no file of its own folder")
        opened[shard] = open_tensors(folder / shard)

    # Every tensor must be in the file that the index names.
    held = {shard: set(file.keys()) for shard, file in opened.items()}
    for name, shard in file_of.items():
        if name not in held[shard]:
            raise ConfigError(f"{index} says that {name} is in {shard}, and it is not")
    return {name: opened[shard] for name, shard in file_of.items()}


def open_tensors(path: Path):
    """An open safetensors file: keys(), get_slice(name), get_tensor(name)."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}; if it is damaged, get it again, or take its folder away"
        ) from None


def save(tensors: dict, path: Path) -> None:
    """Writes a safetensors file, with the permissions of any new file.

    safetensors 0.8 makes files for their owner alone. The chmod, and UMASK, can go when it no longer does.
    """
    from safetensors.torch import save_file  # imports torch, which those who only read sizes need not

    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o666 & ~UMASK)


SHARD_BYTES = 5_000_000_000  # maximum size of the tensors in one file of a checkpoint


def layout(
    stem: str, sizes: dict[str, int], limit: float = 0
) -> tuple[dict[str, list[str]], dict[str, bytes]]:
    """(file -> names of its tensors, in their order; the index by its file's name, or {} for a single file).

    One file, or as many as `limit` bytes a file demand (0: SHARD_BYTES). A tensor is never divided: one that
    is larger than the limit has a file of its own.
    """
    groups, filled = [[]], 0
    for name, n_bytes in sizes.items():
        if groups[-1] and filled + n_bytes > (limit or SHARD_BYTES):
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += n_bytes
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}, {}
    files = {f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}
    file_of = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(file_of.items()))}
    return files, {f"{stem}.safetensors.index.json": json.dumps(index, indent=1).encode() + b"\n"}
