"""The run folder and the checkpoints in it: saved atomically, opened by anyone, resumed exactly.

    runs/demo/
      config.json    every resolved value, git commit, versions, device
      dataset.json   the manifest of the data, as it was
      ledger.jsonl   what happened: start, resume, checkpoint, interrupted, nonfinite, finish
      metrics.jsonl  one line a step; after a resume a step can stand twice, and the later line counts
      checkpoints/step-00000640/
        config.json model.safetensors tokenizer.json ...   a Hugging Face model folder, weights in FP32
        optimizer.safetensors                              AdamW's moments and the random state
        state.json                                         step, position in the data, hashes: written last

A checkpoint is written into a hidden folder beside the others and renamed when every byte of it is on disk.
A folder without state.json is incomplete and ignored. Nothing is pickled: it is safe to open a stranger's.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

import files
from config import ConfigError, load_run
from families import NOT_WEIGHTS, end_of_text, hf_config, model_config, place, read_config, to_family, unpack
from model import Transformer

FORMAT = 1  # of state.json; a reader refuses what it does not know


class Checkpoint(NamedTuple):
    path: Path
    step: int  # finished updates
    state: dict  # state.json


def bare(model: nn.Module) -> Transformer:
    """The model itself, out of whatever wraps it."""
    return getattr(model, "module", model)


# ---- saving -----------------------------------------------------------------------------------------------


def save(
    run: Path | str, model: nn.Module, optimizer, state: dict, tokenizer_files: dict[str, bytes]
) -> Path:
    """Writes checkpoints/step-... and returns its path.

    `state` has step, rows, tokens, chunk and the hashes of the data. Killed at any moment, or stopped by a
    full disk, it leaves the checkpoints that were there as they were.
    """
    folder = Path(run) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{state['step']:08d}"
    for left in folder.glob(".step-*"):  # of a save that was killed
        shutil.rmtree(left, ignore_errors=True)
    aside = folder / f".{final.name}.{os.getpid()}"
    aside.mkdir()
    try:
        model = bare(model)
        weights = to_family(model.state_dict(), model.cfg)
        save_file(weights, aside / "model.safetensors", metadata={"format": "pt"})
        save_file(
            optimizer_tensors(model, optimizer), aside / "optimizer.safetensors", metadata={"format": "pt"}
        )
        (aside / "config.json").write_text(
            json.dumps(hf_config(model.cfg, state.get("eot")), indent=1) + "\n"
        )
        for name, content in tokenizer_files.items():
            (aside / name).write_bytes(content)
        for path in aside.glob("*.safetensors"):  # which are written readable by their owner alone
            shutil.copymode(aside / "config.json", path)
        written = sorted(aside.iterdir())
        for path in written:
            files.sync(path)
        hashes = {path.name: files.sha256(path) for path in written}
        state = {"format": FORMAT, **state, "time": time.time(), "files": hashes}
        files.write_json(aside / "state.json", state)
        if final.exists():  # without its state.json: someone's, not ours
            shutil.rmtree(final)
        os.replace(aside, final)
        files.sync(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return final


def optimizer_tensors(model: Transformer, optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state under the parameters' names, and the state of the random generators."""
    tensors = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value.contiguous()
    return tensors


# ---- loading ----------------------------------------------------------------------------------------------


def checkpoints(run: Path | str) -> list[Checkpoint]:
    """The complete checkpoints of a run, by ascending step, a number: 1,000,000 comes after 999,999."""
    found = []
    for path in (Path(run) / "checkpoints").glob("step-*"):
        if not (match := re.fullmatch(r"step-(\d+)", path.name)):
            continue
        try:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if not isinstance(state, dict):
            continue
        if state.get("format") != FORMAT or state.get("step") != int(match[1]):
            raise ConfigError(
                f"{path}/state.json says format {state.get('format')} and step {state.get('step')}; "
                f"this version reads format {FORMAT}, and the step must be the folder's"
            )
        found.append(Checkpoint(path, state["step"], state))
    return sorted(found, key=lambda c: c.step)


def load_weights(folder: Path | str, model: nn.Module) -> None:
    """The weights of a model folder into a model, in place. ConfigError unless names and shapes agree."""
    model, family = bare(model), read_config(folder)["model_type"]
    ours = {name: (value, *place(name, family)) for name, value in model.state_dict().items()}
    theirs = {stored for _, stored, _ in ours.values()}
    tensors = open_weights(folder)
    names = {name for name in tensors if not name.endswith(NOT_WEIGHTS)}
    head, shared = (place(f"{name}.weight", family)[0] for name in ("lm_head", "embed_tokens"))
    if model.cfg.tie_embeddings and names - theirs == {head}:  # some writers store the shared matrix twice
        if not torch.equal(tensors[head].get_tensor(head), tensors[shared].get_tensor(shared)):
            raise ConfigError(
                f"{folder}: config.json ties the head to the embedding, and {head} is not {shared}; if the "
                'model has a head of its own, set "tie_word_embeddings": false there'
            )
        names -= {head}
    if names != theirs:
        strange, missing = sorted(names - theirs)[:3], sorted(theirs - names)[:3]
        raise ConfigError(
            f"the weights in {folder} are of another model: they have {strange} that this one lacks, and not "
            f"{missing}"
        )
    for value, name, part in ours.values():
        stored, packed = tensors[name].get_tensor(name), 1 if part is None else 3
        wanted = (packed * value.shape[0], *value.shape[1:])
        if not stored.dtype.is_floating_point:
            raise ConfigError(f"{folder}: {name} is {stored.dtype}, not numbers but codes; quantised weights "
                              "are not read")  # fmt: skip
        if stored.shape != wanted:
            raise ConfigError(f"{folder}: {name} is {tuple(stored.shape)}, the model wants {wanted}")
        value.copy_(unpack(stored, part, model.cfg, family))


def open_weights(folder: Path | str) -> dict:
    """Tensor name -> the open safetensors file that holds it, of a folder with one file or many shards."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        path = folder / "model.safetensors"
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


def load_optimizer(folder: Path | str, model: nn.Module, optimizer) -> None:
    """The optimizer as it was saved, and the random generators, in place."""
    path = Path(folder) / "optimizer.safetensors"
    with open_tensors(path) as tensors:
        names = set(tensors.keys())
        for name, parameter in bare(model).named_parameters():
            if names == {"random.cpu"} or names == {"random.cpu", "random.cuda"}:
                break  # step 0: nothing has moved yet
            moments = {key: f"{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq")}
            if not names.issuperset(moments.values()):
                raise ConfigError(
                    f"{path} lacks AdamW's state of {name}; it is of another model or optimizer"
                )
            optimizer.state[parameter] = {
                key: tensors.get_tensor(stored).to(parameter.device) for key, stored in moments.items()
            }
        torch.set_rng_state(tensors.get_tensor("random.cpu"))
        if "random.cuda" in names and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors.get_tensor("random.cuda"))


def open_tensors(path: Path):
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}; if it is damaged, get it again, or take its folder away"
        ) from None


def step_number(name: str) -> int:
    """640 and step-00000640 both name a checkpoint on a command line."""
    return int(name.removeprefix("step-"))


def chosen(run: Path | str, steps: Iterable[int] = ()) -> list[Checkpoint]:
    """The complete checkpoints of a run, ascending: all, or those of `steps`. ConfigError if none."""
    found = {c.step: c for c in checkpoints(run)}
    if not found:
        load_run(run)  # which says so where this is no run at all
        raise ConfigError(f"{run} has no complete checkpoint yet; train.py writes the first one at step 0")
    for step in steps:
        if step not in found:
            raise ConfigError(
                f"{run} has no complete checkpoint of step {step}; it has {', '.join(map(str, found))}"
            )
    return [found[step] for step in sorted(set(steps) or found)]


def model_folder(path: Path | str, step: int | None = None) -> Path:
    """A run -> the folder of its newest complete checkpoint, or of `step`'s; any model folder -> itself."""
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder; give a run (runs/demo), a checkpoint or a model folder")
    if (path / "checkpoints").is_dir() or not (path / "config.json").exists():
        return chosen(path, [] if step is None else [step])[-1].path
    if step is not None:
        raise ConfigError(f"{path} is itself a checkpoint; leave --checkpoint {step} out, or give the run")
    read_config(path)
    return path


def load_model(folder: Path | str, device: torch.device | str = "cpu") -> Transformer:
    """The model of a checkpoint folder, or of any folder of families.py: FP32, in eval mode."""
    cfg = model_config(folder)
    with torch.device("meta"):
        model = Transformer(cfg, end_of_text(read_config(folder)))
    model = model.to_empty(device=device)
    with torch.no_grad():
        load_weights(folder, model)
    return model.eval().requires_grad_(False)
