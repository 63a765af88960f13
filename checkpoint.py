"""A checkpoint: the state of a run after a step. Saved atomically, opened by anyone, resumed exactly.

    checkpoints/step-00000640/
      config.json model.safetensors tokenizer.json ...   a Hugging Face model folder, weights in FP32
      optimizer.safetensors                              the optimizers' moments and the random generators
      state.json                                         where the run is (steps.State), hashes: written last

Beyond 5 GB the tensors are in shards with an index, model-00001-of-00006.safetensors ..., as others write
them. A checkpoint is written into a hidden folder beside the others and renamed when every byte of it is on
disk. A folder without state.json is incomplete and ignored. Nothing is pickled: it is safe to open a
stranger's.

All readers in this file compare a checkpoint's files with the hashes in state.json (integrity.py).
run_folder.py lists the checkpoints of a run.
"""

import dataclasses
import json
import os
import shutil
import threading
import time
from pathlib import Path

import torch
from torch import nn

import files
from config import ConfigError
from formats import families, shards
from formats.families import end_of_text, model_config, read_config, reader
from integrity import compared
from model import Transformer
from parallel import World, alone
from sharding import bare, put, whole
from steps import State

MOMENTS = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "Muon": ("momentum_buffer",)}  # of each parameter


# ---- saving -----------------------------------------------------------------------------------------------


class Saving:
    """Saves checkpoints while training continues: `begin` copies, a thread writes, `finish` makes it count.

    `begin` gathers each tensor, and the process that owns its file copies it into CPU memory. Training waits
    for that alone, and for the save before this one if it is not done yet. Tensors are whole and each file is
    written by one process, so a checkpoint is the same folder from any number of processes, and opens on any.
    """

    def __init__(
        self,
        run: Path | str,
        model: nn.Module,
        optimizers: list,
        world: World | None = None,
        tokenizer_files: dict[str, bytes] | None = None,
    ):
        self.folder, self.model, self.optimizers = Path(run) / "checkpoints", bare(model), optimizers
        self.world = world or alone()
        self.tokenizer_files = tokenizer_files or {}  # in every checkpoint, so that it opens by itself
        self.copies: dict[str, torch.Tensor] = {}  # CPU memory that every save uses again
        self.thread: threading.Thread | None = None
        self.state_sha256 = ""  # in the first process: hash of the state.json written last

    def begin(self, state: State) -> None:
        """Copies everything that belongs to the state; a thread then writes it."""
        self.finish()
        self.state = dataclasses.replace(state)  # a copy; its lists are replaced, never changed in place
        self.aside = self.folder / f".step-{state.step:08d}"
        self.world.once(self.make_folder)

        # Choose the file of each tensor.
        cfg, weights = self.model.cfg, dict(self.model.state_dict())
        moments = optimizer_tensors(self.model, self.optimizers)
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in moments.items()}
        files_of_model, index = families.layout(weights, cfg)
        files_of_moments, index_of_moments = shards.layout("optimizer", sizes)
        contents = [(file, names, weights) for file, names in files_of_model.items()]
        contents += [(file, names, moments) for file, names in files_of_moments.items()]

        # Every process gathers every tensor; the owner of its file keeps a copy.
        self.mine: dict[str, dict] = {}
        for i, (file, names, tensors) in enumerate(contents):
            owner = i * self.world.size // len(contents)  # with fewer files than processes, some own none
            for name in names:
                tensor = whole(tensors[name])
                if owner == self.world.rank:
                    self.mine.setdefault(file, {})[name] = self.copy(name, tensor)
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()

        # The first process writes the small files.
        self.small: dict[str, bytes] = {}
        if self.world.rank == 0:
            hf_config = json.dumps(families.hf_config(cfg, state.eot), indent=1) + "\n"
            self.small = {
                "config.json": hf_config.encode(),
                **self.tokenizer_files,
                **index,
                **index_of_moments,
            }
        self.hashes, self.error = {}, None
        self.thread = threading.Thread(target=self.write, daemon=True)
        self.thread.start()

    def make_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".step-*"):  # left by a killed save
            shutil.rmtree(left, ignore_errors=True)
        self.aside.mkdir()

    def copy(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in self.copies:
            pin = tensor.device.type == "cuda"
            self.copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pin)
        return self.copies[name].copy_(tensor, non_blocking=True)

    def write(self) -> None:
        """This process's files, in a thread. An error is kept for `finish`."""
        try:
            for name, content in self.small.items():
                (self.aside / name).write_bytes(content)
            for name, tensors in self.mine.items():
                if name.startswith("model"):
                    tensors = families.to_family(tensors, self.model.cfg)
                shards.save(tensors, self.aside / name)
            # Every byte is on the disk before the folder gets its name.
            for name in (*self.small, *self.mine):
                files.sync(self.aside / name)
                self.hashes[name] = files.sha256(self.aside / name)
        except Exception as error:
            self.error = f"process {self.world.rank}: {type(error).__name__}: {error}"

    def busy(self) -> bool:
        """Whether this process still writes."""
        return self.thread is not None and self.thread.is_alive()

    def finish(self) -> Path | None:
        """Waits until all processes have written, and renames the folder; None if nothing was being saved.

        Raises OSError in all processes where one could not write; earlier checkpoints are as they were.
        """
        if self.thread is None:
            return None
        # Wait for the threads of all processes.
        while self.world.sum(self.busy())[0]:  # a slow disk may take longer than a collective may wait
            time.sleep(0.01)
        self.thread.join()
        self.thread = None
        # Where one failed, nothing is saved; else the hashes go into the state, and the folder gets its name.
        told = self.world.collect((self.error, self.hashes))
        errors = [error for error, _ in told if error]
        if errors:
            self.world.once(shutil.rmtree, self.aside, True)
            raise OSError(f"checkpoint of step {self.state.step} is not saved: {'; '.join(errors)}")
        self.state.files = {name: digest for _, part in told for name, digest in sorted(part.items())}
        final = self.folder / self.aside.name.removeprefix(".")
        self.world.once(self.commit, final)
        return final

    def commit(self, final: Path) -> None:
        """Writes state.json, which makes the folder a checkpoint, and gives the folder its name."""
        self.state.time = time.time()
        files.write_json(self.aside / "state.json", dataclasses.asdict(self.state))
        if final.exists():  # a leftover without state.json: with one, this step would have been resumed
            shutil.rmtree(final)
        os.replace(self.aside, final)
        files.sync(self.folder)
        self.state_sha256 = files.sha256(final / "state.json")

    def __enter__(self) -> "Saving":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Before a process ends with an error: waits for its thread, or after Ctrl-C ends the process here.

        Python would abort in the middle of safetensors' code. What is written has no state.json, so it never
        counts.
        """
        if isinstance(error, KeyboardInterrupt) and self.busy():
            os._exit(130)
        if self.thread is not None:
            self.thread.join()


def optimizer_tensors(model: Transformer, optimizers: list) -> dict[str, torch.Tensor]:
    """The optimizers' state under the parameters' names, and the random generators' of the file's owner."""
    tensors = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in model.named_parameters():
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = value.contiguous()
    return tensors


# ---- loading ----------------------------------------------------------------------------------------------


def load(folder: Path | str, model: nn.Module, optimizers: list, verify: bool, world: World) -> None:
    """Loads weights, moments and random generators in place: with the State, resumption is exact."""
    load_weights(folder, model, verify, world)
    load_optimizer(folder, model, optimizers, verify, world)


def load_weights(
    folder: Path | str, model: nn.Module, verify: bool = True, world: World | None = None
) -> None:
    """Loads the weights of a model folder into a model. ConfigError unless names and shapes agree.

    With `verify` the hashes too must be those of state.json, here and in all functions below.
    """
    with compared(folder, "model", verify, world):
        read = reader(folder, model)
        for name, value in bare(model).state_dict().items():
            put(value, read(name))


def load_optimizer(
    folder: Path | str, model: nn.Module, optimizers: list, verify: bool = True, world: World | None = None
) -> None:
    """Restores the optimizers and the random generators, in place."""
    with compared(folder, "optimizer", verify, world):
        tensors = shards.open_weights(folder, "optimizer")
        names = {parameter: name for name, parameter in bare(model).named_parameters()}
        for optimizer in optimizers:
            if set(tensors) <= {"random.cpu", "random.cuda"}:
                optimizer.state.clear()  # step 0: no moments yet, or none after a rollback to it
                continue
            kind = type(optimizer).__name__
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    optimizer.state[parameter] = moments_of(tensors, kind, names[parameter], parameter)
        # The random generators.
        torch.set_rng_state(tensors["random.cpu"].get_tensor("random.cpu"))
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"].get_tensor("random.cuda"))


def moments_of(tensors: dict, kind: str, name: str, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """The saved state of an optimizer for one parameter."""
    out = {}
    for key in MOMENTS[kind]:
        stored = f"{key}.{name}"
        if stored not in tensors:
            raise ConfigError(
                f"optimizer.safetensors lacks {kind}'s state of {name}; it is of another model or optimizer"
            )
        value = tensors[stored].get_tensor(stored)
        if value.shape == parameter.shape:
            out[key] = torch.empty_like(parameter)  # sharded as the parameter is
            put(out[key], value)
        else:
            out[key] = value.to(parameter.device)
    return out


def load_model(folder: Path | str, device: torch.device | str = "cpu", verify: bool = True) -> Transformer:
    """The model of a checkpoint, or of any folder of formats/families.py: FP32, eval mode, no gradients."""
    with compared(folder, "model", verify):
        cfg = model_config(folder)
        with torch.device("meta"):
            model = Transformer(cfg, end_of_text(read_config(folder)))
        model = model.to_empty(device=device)
        with torch.no_grad():
            load_weights(folder, model, verify=False)
    return model.eval().requires_grad_(False)


if __name__ == "__main__":  # its command went to another file
    raise SystemExit("error: this file is not run; python audit.py RUN compares all checkpoints of a run")
