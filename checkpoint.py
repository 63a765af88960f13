"""The run folder and the checkpoints in it: saved atomically, opened by anyone, resumed exactly.

    python checkpoint.py verify runs/demo    # hashes every file of every checkpoint; exit 1 if one differs

    runs/demo/
      config.json    every resolved value, git commit, versions, device
      dataset.json   the manifest of the data, as it was
      ledger.jsonl   what happened: start, resume, checkpoint, interrupted, fault, nonfinite, spike, finish
      metrics.jsonl  one line a step; after a resume a step can stand twice, and the later line counts
      checkpoints/step-00000640/
        config.json model.safetensors tokenizer.json ...   a Hugging Face model folder, weights in FP32
        optimizer.safetensors                              the optimizer's moments and the random state
        state.json                                         step, position in the data, hashes: written last
      checkpoints/incident-3-step-00000640/   one that the rollback of the third incident left behind

Beyond 5 GB the tensors are in shards, model-00001-of-00006.safetensors ..., with an index, as others write
them. A checkpoint is written into a hidden folder beside the others and renamed when every byte of it is on
disk. A folder without state.json is incomplete and ignored. Nothing is pickled: it is safe to open a
stranger's. Whoever reads a checkpoint through this file compares the hashes in state.json with the files.
"""

import argparse
import contextlib
import functools
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import configurator
import files
import steps
from config import Config, ConfigError, load_run
from formats.families import (
    NOT_WEIGHTS,
    end_of_text,
    family_of,
    hf_config,
    model_config,
    place,
    read_config,
    settings,
    to_family,
    unpack,
)
from formats.shards import open_weights
from model import Transformer
from parallel import World, alone, first_on_node, put, whole
from run_folder import (
    FORMAT,
    NEEDED,
    Checkpoint,
    chosen,
    read,
    recorded,
    refuse,
    step_number,
)

UMASK = os.umask(0)  # which permissions new files are not given; it can only be read by setting it
os.umask(UMASK)


def bare(model: nn.Module) -> Transformer:
    """The model itself, out of whatever wraps it."""
    return getattr(model, "module", model)


# ---- saving -----------------------------------------------------------------------------------------------

SHARD_BYTES = 5_000_000_000  # of tensors in one file; processes write files side by side


class Saving:
    """Saves checkpoints while training goes on: `begin` copies, a thread writes, `finish` makes it count.

    Tensors are stored whole, in files of SHARD_BYTES, as Hugging Face stores large models; each file is
    written by one process. So a checkpoint of any number of processes is the same folder, and opens on any
    other number. `begin` gathers each tensor and copies it into the memory of the process that writes it:
    that is all the time that training waits. It waits for the save before this one if that is not done yet.
    """

    def __init__(self, run: Path | str, model: nn.Module, optimizers, world: World | None = None):
        self.folder, self.model, self.world = Path(run) / "checkpoints", bare(model), world or alone()
        self.optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        self.room: dict[str, torch.Tensor] = {}  # copies' memory, used again by every save
        self.thread: threading.Thread | None = None
        self.state_sha256 = ""  # in the first process: of the state.json just written

    def begin(self, state: dict, tokenizer_files: dict[str, bytes]) -> None:
        """`state` has step, rows, tokens, chunk and the hashes of the data."""
        self.finish()
        self.state, self.aside = state, self.folder / f".step-{state['step']:08d}"
        self.world.once(self.make_room)
        cfg, family, rank = self.model.cfg, family_of(self.model.cfg), self.world.rank
        weights = dict(self.model.state_dict())
        stored = {}  # a family's name for a tensor -> our names for its parts
        for name in weights:
            stored.setdefault(place(name, family)[0], []).append(name)
        moments = optimizer_tensors(self.model, self.optimizers)
        files_of = layout(
            "model", {name: sum(map(size, map(weights.get, parts))) for name, parts in stored.items()}
        )
        moments_of = layout("optimizer", {name: size(tensor) for name, tensor in moments.items()})
        self.mine, n = {}, len(files_of) + len(moments_of)
        for i, (file, names) in enumerate([*files_of.items(), *moments_of.items()]):
            owner = i * self.world.size // n
            parts = [part for name in names for part in stored[name]] if file in files_of else names
            for part in parts:
                tensor = whole((weights if file in files_of else moments)[part])  # all processes together
                if owner == rank:
                    self.mine.setdefault(file, {})[part] = self.copy(part, tensor)
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        self.small = {}
        if rank == 0:
            config = json.dumps(hf_config(cfg, state.get("eot")), indent=1) + "\n"
            self.small = {"config.json": config.encode(), **tokenizer_files}
            for stem, layout_of in (("model", files_of), ("optimizer", moments_of)):
                if len(layout_of) > 1:
                    places = {name: file for file, names in layout_of.items() for name in names}
                    index = {"metadata": {}, "weight_map": places}
                    self.small[f"{stem}.safetensors.index.json"] = json.dumps(index, indent=1).encode()
        self.hashes, self.error = {}, None
        self.thread = threading.Thread(target=self.write, daemon=True)
        self.thread.start()

    def make_room(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".step-*"):  # of a save that was killed
            shutil.rmtree(left, ignore_errors=True)
        self.aside.mkdir()

    def copy(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in self.room:
            pin = tensor.device.type == "cuda"
            self.room[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pin)
        return self.room[name].copy_(tensor, non_blocking=True)

    def write(self) -> None:
        """This process's files, in a thread. What goes wrong is kept for `finish`."""
        try:
            for name, content in self.small.items():
                (self.aside / name).write_bytes(content)
            for name, tensors in self.mine.items():
                if name.startswith("model"):
                    tensors = to_family(tensors, self.model.cfg)
                save_file(tensors, self.aside / name, metadata={"format": "pt"})
                (self.aside / name).chmod(0o666 & ~UMASK)  # which are written readable by their owner alone
            for name in (*self.small, *self.mine):
                files.sync(self.aside / name)
                self.hashes[name] = files.sha256(self.aside / name)
        except Exception as error:
            self.error = f"process {self.world.rank}: {type(error).__name__}: {error}"

    def busy(self) -> bool:
        """Whether this process still writes."""
        return self.thread is not None and self.thread.is_alive()

    def abandon(self, at_once: bool) -> None:
        """Before a process ends with an error while it writes: waits for that, or ends the process here.

        Python would end with an abort in the middle of safetensors' code. What is written has no state.json
        yet, so it never counts.
        """
        if at_once and self.busy():
            os._exit(130)
        if self.thread is not None:
            self.thread.join()

    def finish(self) -> Path | None:
        """Waits for all processes to have written, and renames the folder; None if nothing was being saved.

        OSError where one could not write: then the checkpoints that were there are as they were.
        """
        if self.thread is None:
            return None
        while self.world.sum(self.busy())[0]:  # a slow disk may take longer than a collective may wait
            time.sleep(0.01)
        self.thread.join()
        self.thread = None
        told = self.world.collect((self.error, self.hashes))
        errors = [error for error, _ in told if error]
        if errors:
            self.world.once(shutil.rmtree, self.aside, True)
            raise OSError(f"checkpoint of step {self.state['step']} is not saved: {'; '.join(errors)}")
        hashes = {name: digest for _, part in told for name, digest in sorted(part.items())}
        final = self.folder / self.aside.name.removeprefix(".")
        self.world.once(self.commit, final, hashes)
        return final

    def commit(self, final: Path, hashes: dict[str, str]) -> None:
        files.write_json(
            self.aside / "state.json", {"format": FORMAT, **self.state, "time": time.time(), "files": hashes}
        )
        if final.exists():  # without its state.json: someone's, not ours
            shutil.rmtree(final)
        os.replace(self.aside, final)
        files.sync(self.folder)
        self.state_sha256 = files.sha256(final / "state.json")


def save(
    run: Path | str, model: nn.Module, optimizers, state: dict, tokenizer_files: dict[str, bytes]
) -> Path:
    """Writes checkpoints/step-... and returns its path when it is there."""
    saving = Saving(run, model, optimizers)
    saving.begin(state, tokenizer_files)
    return saving.finish()


def size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def layout(stem: str, sizes: dict[str, int]) -> dict[str, list[str]]:
    """Which tensors go into which file, in their order: one, or as many as SHARD_BYTES demands."""
    shards, room = [[]], SHARD_BYTES
    for name, n in sizes.items():
        if n > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= n
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


def optimizer_tensors(model: Transformer, optimizers: list) -> dict[str, torch.Tensor]:
    """The optimizers' state under the parameters' names, and the state of the random generators."""
    tensors = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in model.named_parameters():
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = value.contiguous()
    return tensors


# ---- is it what was saved? --------------------------------------------------------------------------------

HASHERS = 4  # files hashed at a time: SHA-256 of one is 0.4 to 1.5 GB/s, less than a good disk reads
# What is read of a checkpoint when it is opened. Other files that someone puts there are not looked at.
READ = re.compile(r"config\.json|(model|optimizer|tokenizer).*\.(safetensors|json|model)")


@functools.cache
def hash_of(path: Path, inode: int, size: int, changed: int) -> str:
    """SHA-256 of a file, computed once in a process; a file that has changed since is another one."""
    return files.sha256(path)


def files_of(c: Checkpoint, kind: str) -> tuple[list[str], list[str]]:
    """(small, large) files that should be compared: the optimizer's, or ("model") all others."""
    present = {path.name for path in c.path.iterdir() if READ.fullmatch(path.name)}
    names = sorted(present | set(c.state.get("files", {})))
    names = [name for name in names if name.startswith("optimizer") == (kind == "optimizer")]
    large = [name for name in names if name.endswith(".safetensors")]
    return [name for name in names if name not in large], large


def compare(c: Checkpoint, names: list[str]) -> list[str]:
    """A line for each of the files that is not as state.json has it. Some are hashed side by side."""
    queue, found = iter(names), {}

    def work():
        for name in queue:  # the threads share it: each file is taken by one
            try:
                said, about = c.state.get("files", {}).get(name), (c.path / name).stat()
                now = hash_of(c.path / name, about.st_ino, about.st_size, about.st_mtime_ns)
                if said is None:
                    found[name] = f"{name} is not listed in state.json"
                elif now != said:
                    found[name] = f"{name} is damaged: SHA-256 {now[:12]}, and {said[:12]} when it was saved"
            except FileNotFoundError:
                found[name] = f"{name} is missing"
            except Exception as error:  # what is not known to be right is wrong
                found[name] = f"{name} cannot be read: {type(error).__name__}: {error}"

    threads = [threading.Thread(target=work, daemon=True) for _ in names[:HASHERS]]
    for thread in threads:  # daemons: Ctrl-C does not wait for 5 GB to be hashed
        thread.start()
    for thread in threads:
        thread.join()
    return [found[name] for name in names if name in found]


def state_damage(c: Checkpoint) -> list[str]:
    """A line where state.json, which has the other files' hashes, is not the one that the ledger knows."""
    run = c.path.resolve().parents[1]
    said = recorded(run).get(c.path.name) if c.path.resolve().parent.name == "checkpoints" else None
    path = c.path / "state.json"
    now = hash_of(path, (about := path.stat()).st_ino, about.st_size, about.st_mtime_ns)
    if said in (None, now):
        return []
    return [f"state.json is damaged: SHA-256 {now[:12]}, and {said[:12]} in the ledger"]


def first_look(c: Checkpoint, kind: str) -> tuple[list[str], list[str]]:
    """(what is wrong with state.json and the small files, the large files, which come next)."""
    small, large = files_of(c, kind)
    return state_damage(c) + compare(c, small), large


@contextlib.contextmanager
def compared(folder: Path | str, kind: str, verify: bool = True, world: World | None = None):
    """Around the reading of a folder: its files are hashed beside it, and must be those of its state.json.

    Leaves only when the hashes are known. ConfigError in all processes where one differs, also in place of
    an error which that has caused in the reading. Large files are hashed by one process of each node. A
    folder without state.json is someone else's, and there is nothing to compare it with.
    """
    folder, world = Path(folder), world or alone()
    if not verify or not (folder / "state.json").exists():
        yield
        return
    problems, error = [], None
    try:
        c = read(folder)
        found, large = first_look(c, kind)
    except ConfigError as raised:
        found = [str(raised)]
    found = [problem for part in world.collect(found) for problem in part]
    refuse(folder, list(dict.fromkeys(found)))  # all processes together
    mine = large if world.size == 1 or first_on_node() else []
    thread = threading.Thread(target=lambda: problems.extend(compare(c, mine)), daemon=True)
    thread.start()
    try:
        yield
    except Exception as raised:
        error = raised
    while world.sum(thread.is_alive())[0]:  # hashing may take longer than a collective may wait
        thread.join(0.01)
    told = world.collect((problems, str(error) if error else None))
    failed = [text for _, text in told if text is not None]
    damaged = list(dict.fromkeys(problem for part, _ in told for problem in part))
    refuse(folder, damaged, f" (it was noticed as: {failed[0]})" if failed else "")
    if failed:
        raise error or ConfigError(failed[0])


def contradictions(c: Checkpoint, cfg: Config, manifest: dict, sha256: str) -> list[str]:
    """In what a state.json is not one of this config on this dataset (its manifest, and the hash of that)."""
    state, step, n_rows = c.state, c.step, manifest["rows"]
    if lacks := [name for name in NEEDED if name not in state]:
        return [f"lacks {', '.join(lacks)}"]
    for name, now in (("dataset", sha256), ("tokenizer", manifest["tokenizer"]["sha256"])):
        said = state[f"{name}_sha256"]
        if said != now:
            return [f"it was trained with another {name}: {said[:12]}, and the run's is {now[:12]}"]
    # Ranges of positions: within the dataset, and each position once.
    order, skipped = state.get("order") or [[0, n_rows]], state.get("skipped", [])
    for name, ranges in (("order", order), ("skipped", skipped)):
        reached = 0
        for first, end in sorted(ranges):
            if not reached <= first < end <= n_rows:
                return [f"{name} has [{first}, {end}]: empty, twice, or beyond the dataset's {n_rows} rows"]
            reached = end
    # What follows from the number of steps.
    plan = steps.of(cfg, n_rows, order)
    if step > plan.n_steps or state.get("begin", 0) > step:
        return [f"step {step} is not within {state.get('begin', 0)} .. {plan.n_steps}, this run's steps"]
    chunks = [(chunk["first"], chunk["first"] + chunk["rows"]) for chunk in manifest["chunks"]]
    rows = plan.consumed(step)
    wanted = {"rows": rows, "tokens": rows * cfg.model.seq_len, "chunk": plan.newest_chunk(chunks, step)}
    out = [
        f"{name} is {state[name]}, and after step {step} it must be {value}"
        for name, value in wanted.items()
        if state[name] != value
    ]
    consumed = steps.cut(plan.order, 0, rows)[1]
    for first, end in skipped:
        if not any(a <= first and end <= b for a, b in consumed):
            out.append(f"skipped has [{first}, {end}], which it had not come to")
    return out


def check_state(c: Checkpoint, cfg: Config, manifest: dict, sha256: str) -> None:
    """ConfigError where a run cannot stand where a checkpoint's state.json says."""
    problems = contradictions(c, cfg, manifest, sha256)
    refuse(c.path, [f"state.json is damaged, or another run's: {problem}" for problem in problems])


def problems_of(path: Path, cfg: Config, manifest: dict | None, sha256: str) -> list[str]:
    """All that is wrong with a checkpoint's folder, [] where nothing is; every file in it is hashed."""
    try:
        c = read(path, None if path.name.startswith("incident-") else step_number(path.name))
    except ConfigError as error:
        return [str(error)]
    present = {file.name for file in path.iterdir()} - {"state.json"}
    problems = state_damage(c) + compare(c, sorted(present | set(c.state.get("files", {}))))
    try:
        if manifest is not None:
            problems += [f"state.json: {said}" for said in contradictions(c, cfg, manifest, sha256)]
        with torch.device("meta"):
            model = Transformer(cfg.model, None)
        if model_config(path) != settings(hf_config(cfg.model)).resolved():
            problems.append("config.json is of another model than the run's")
        if end_of_text(read_config(path)) != c.state.get("eot"):
            problems.append("config.json has another end-of-text token than state.json")
        reader(path, model)
        problems += strange_moments(path, model)
    except (ConfigError, KeyError, TypeError) as error:
        problems.append(f"{'' if isinstance(error, ConfigError) else 'dataset.json is damaged: '}{error}")
    return problems


def strange_moments(folder: Path, model: Transformer) -> list[str]:
    """In what the optimizer's files are not of this model, by their headers."""
    tensors, shapes = open_weights(folder, "optimizer"), {n: p.shape for n, p in model.named_parameters()}
    kept: dict[str, set] = {name: set() for name in shapes}
    for stored in tensors.keys() - {"random.cpu", "random.cuda"}:
        key, _, name = stored.partition(".")
        shape = tuple(tensors[stored].get_slice(stored).get_shape())
        if name not in shapes or shape != (() if key == "step" else shapes[name]):
            return [f"the optimizer's {stored} is {shape}, and the model has no parameter like it"]
        kept[name].add(key)
    lacks = [name for name in shapes if kept[name] not in map(set, STATE.values())]
    if lacks and any(kept.values()):  # before the first update there are no moments at all
        return [f"the optimizer's state of {lacks[0]} is not whole"]
    return []


def verify(run: Path | str) -> bool:
    """Looks at every file of every checkpoint of a run and prints what it finds. True: all is well."""
    run, good, bad = Path(run), [], 0
    cfg, manifest, sha256 = load_run(run), None, ""
    try:
        manifest, sha256 = json.loads((run / "dataset.json").read_bytes()), files.sha256(run / "dataset.json")
    except (OSError, ValueError) as error:
        bad = 1
        configurator.show(f"dataset.json cannot be read ({error}), so no state.json is compared with it")
    folders = [p for p in run.glob("checkpoints/*") if re.fullmatch(r"(incident-\d+-)?step-\d+", p.name)]
    for path in sorted(folders, key=lambda p: (step_number(p.name[p.name.index("step-") :]), p.name)):
        problems = problems_of(path, cfg, manifest, sha256)
        sizes = [file.stat().st_size for file in path.iterdir()]
        if problems:
            bad += 1
        elif path.name.startswith("step-"):
            good.append(path.name)
        for said in problems or [f"whole, {len(sizes)} files, {sum(sizes) / 1e6:,.1f} MB"]:
            configurator.show(f"{path.name}  {'DAMAGED: ' * bool(problems)}{said}")
    configurator.show(f"the newest whole checkpoint is {good[-1]}" if good else "no checkpoint is whole")
    return bool(good) and not bad


# ---- loading ----------------------------------------------------------------------------------------------


def load_weights(
    folder: Path | str, model: nn.Module, verify: bool = True, world: World | None = None
) -> None:
    """The weights of a model folder into a model, in place. ConfigError unless names and shapes agree.

    With `verify` the hashes too must be those of state.json, here and in all functions below.
    """
    with compared(folder, "model", verify, world):
        read = reader(folder, model)
        for name, value in bare(model).state_dict().items():
            put(value, read(name))


def check_weights(folder: Path | str, model: nn.Module, verify: bool = True) -> Callable[[str], torch.Tensor]:
    """What reads a tensor of a model folder, by our name for it. ConfigError as load_weights, before that."""
    with compared(folder, "model", verify):
        return reader(folder, model)


def reader(folder: Path | str, model: nn.Module) -> Callable[[str], torch.Tensor]:
    """The same without a look at hashes: for those who compare them beside the reading, with `compared`.

    Names and shapes are told by the files' headers; no tensor is read for it, but a second copy of a tied
    head.
    """
    model, family = bare(model), read_config(folder)["model_type"]
    cfg, tensors = model.cfg, open_weights(folder)
    ours = {name: (value.shape, *place(name, family)) for name, value in model.state_dict().items()}
    theirs = {stored for _, stored, _ in ours.values()}
    names = {name for name in tensors if not name.endswith(NOT_WEIGHTS)}
    head, shared = (place(f"{name}.weight", family)[0] for name in ("lm_head", "embed_tokens"))
    twice = cfg.tie_embeddings and names - theirs == {head}  # some writers store the shared matrix so
    if twice:
        names -= {head}
    if names != theirs:
        strange, missing = sorted(names - theirs)[:3], sorted(theirs - names)[:3]
        raise ConfigError(
            f"the weights in {folder} are of another model: they have {strange} that this one lacks, and not "
            f"{missing}"
        )
    for shape, name, part in ours.values():
        header = tensors[name].get_slice(name)
        stored, wanted = tuple(header.get_shape()), ((1 if part is None else 3) * shape[0], *shape[1:])
        if not header.get_dtype().startswith(("F", "BF")):  # F32, BF16, F8_E4M3, ..., not I8 or U8
            dtype = tensors[name].get_tensor(name).dtype
            raise ConfigError(
                f"{folder}: {name} is {dtype}, not numbers but codes; quantised weights are not read"
            )
        if stored != wanted:
            raise ConfigError(f"{folder}: {name} is {stored}, the model wants {wanted}")
    if twice and not torch.equal(tensors[head].get_tensor(head), tensors[shared].get_tensor(shared)):
        raise ConfigError(
            f"{folder}: config.json ties the head to the embedding, and {head} is not {shared}; if the "
            'model has a head of its own, set "tie_word_embeddings": false there'
        )

    def read(name: str) -> torch.Tensor:
        _, stored, part = ours[name]
        return unpack(tensors[stored].get_tensor(stored), part, cfg, family)

    return read


# What each optimizer keeps of a parameter.
STATE = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "Muon": ("momentum_buffer",)}


def load_optimizer(
    folder: Path | str, model: nn.Module, optimizers, verify: bool = True, world: World | None = None
) -> None:
    """The optimizers as they were saved, and the random generators, in place."""
    with compared(folder, "optimizer", verify, world):
        read_optimizer(folder, model, optimizers)


def read_optimizer(folder: Path | str, model: nn.Module, optimizers) -> None:
    tensors, names = (
        open_weights(folder, "optimizer"),
        {p: name for name, p in bare(model).named_parameters()},
    )
    for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
        if set(tensors) <= {"random.cpu", "random.cuda"}:
            optimizer.state.clear()  # step 0: nothing has moved yet, or not any more
            continue
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            kind, moments = type(optimizer).__name__, {}
            for key in STATE[kind]:
                stored = f"{key}.{names[parameter]}"
                if stored not in tensors:
                    raise ConfigError(
                        f"{folder}/optimizer.safetensors lacks {kind}'s state of {names[parameter]}; "
                        "it is of another model or optimizer"
                    )
                value = tensors[stored].get_tensor(stored)
                if value.shape == parameter.shape:
                    moments[key] = torch.empty_like(parameter)  # sharded as the parameter is
                    put(moments[key], value)
                else:
                    moments[key] = value.to(parameter.device)
            optimizer.state[parameter] = moments
    torch.set_rng_state(tensors["random.cpu"].get_tensor("random.cpu"))
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"].get_tensor("random.cuda"))


def model_folder(path: Path | str, step: int | None = None, verify: bool = True) -> Path:
    """A run -> the folder of its newest complete checkpoint, or of `step`'s; any model folder -> itself.

    With `verify`, the hashes of its config.json and its tokenizer are compared: they are about to be read.
    """
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder; give a run (runs/demo), a checkpoint or a model folder")
    if (path / "checkpoints").is_dir() or not (path / "config.json").exists():
        path = chosen(path, [] if step is None else [step])[-1].path
    elif step is not None:
        raise ConfigError(f"{path} is itself a checkpoint; leave --checkpoint {step} out, or give the run")
    if verify and (path / "state.json").exists():
        refuse(path, first_look(read(path), "model")[0])
    read_config(path)
    return path


def load_model(folder: Path | str, device: torch.device | str = "cpu", verify: bool = True) -> Transformer:
    """The model of a checkpoint folder, or of any folder of families.py: FP32, in eval mode."""
    with compared(folder, "model", verify):
        cfg = model_config(folder)
        with torch.device("meta"):
            model = Transformer(cfg, end_of_text(read_config(folder)))
        model = model.to_empty(device=device)
        with torch.no_grad():
            load_weights(folder, model, verify=False)
    return model.eval().requires_grad_(False)


# ---- the command line -------------------------------------------------------------------------------------


@configurator.script
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "command", choices=("verify",), help="hash every file, and check what state.json says"
    )
    parser.add_argument("run", metavar="RUN", help="a run folder")
    args = parser.parse_args()
    sys.exit(0 if verify(args.run) else 1)


if __name__ == "__main__":
    main()
