"""safetensors files: one, or shards with an index as Hugging Face writes them. No pickle is ever opened."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from config import ConfigError


def open_weights(folder: Path | str, stem: str = "model") -> dict:
    """Tensor name -> the open safetensors file that holds it, of a folder with one file or many shards."""
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
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = dict.fromkeys(places.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index} is damaged: {type(error).__name__}: {error}") from None
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ConfigError(f"{index} names {shard!r}, which is no file of its own folder")
        shards[shard] = open_tensors(folder / shard)
    held = {shard: set(file.keys()) for shard, file in shards.items()}
    for name, shard in places.items():
        if name not in held[shard]:
            raise ConfigError(f"{index} says that {name} is in {shard}, and it is not")
    return {name: shards[shard] for name, shard in places.items()}


def open_tensors(path: Path):
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}; if it is damaged, get it again, or take its folder away"
        ) from None


SHARD_BYTES = 5_000_000_000  # of tensors in one file; processes write files side by side


def size(tensor) -> int:
    """Bytes of a tensor."""
    return tensor.numel() * tensor.element_size()


def layout(stem: str, sizes: dict[str, int]) -> dict[str, list[str]]:
    """File -> names of its tensors, in order: one file, or as many as SHARD_BYTES demands. sizes: in bytes."""
    shards, room = [[]], SHARD_BYTES
    for name, n_bytes in sizes.items():
        if n_bytes > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= n_bytes
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}
