"""Every checkpoint of a run x something: computed once, continued after a kill, on all GPUs of a torchrun.

eval.py and memorize.py use this file, and a metric of your own can: it is one function and ten lines. This
one is the loss of every checkpoint on each line of a JSON-lines file:

    import json, torch, files, measure, tokenizer

    run = measure.open_run("runs/demo")
    texts = {f"my.jsonl:{n}": json.loads(line)["text"] for n, line in enumerate(open("my.jsonl"), 1)}
    encode = tokenizer.load(run.dataset.folder).encode

    def losses(model, checkpoint, items, done):
        for item in items:  # yields one dict of numbers for each item, in order
            ids = torch.tensor([encode(texts[item])], device=run.device)[:, : run.cfg.model.seq_len + 1]
            yield {"loss": model(ids[:, :-1], ids[:, 1:]).item() / max(1, ids.numel() - 1)}

    metric = measure.Metric("lines", "loss-of-lines-1", dict.fromkeys(texts, 1), losses,
                            inputs=lambda checkpoint: {"file_sha256": files.sha256("my.jsonl")})
    for checkpoint, lines in measure.every(run, metric):
        measure.say(checkpoint.step, {item: line["loss"] for item, line in lines.items()})

Its results are on the page by themselves: numbers only, named by their item, which is a text.

Each result is a line of RUN/evals.jsonl, with everything that determines it under "inputs": the name of the
protocol, the hash of the weights, the hash of the dataset (and so of its tokenizer), the precision, and what
the metric adds. A result with the same inputs is read from the log. A line is written as soon as its
result is known, so a killed script continues where it was. Change the protocol's name when you change what
the numbers mean.

    torchrun --nproc_per_node=8 -- eval.py runs/demo      # the same results, computed by eight processes

Under torchrun every process works on its own GPU, or on its share of the CPU cores, and only the first one
prints. The processes exchange nothing but the result lines. Before a process computes an item, it locks it
(see Claims). When nothing is left to compute, it waits until the log has the lines that others still compute.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import checkpoint
import config
import configurator
import files
import hardware
import parallel
import rendezvous
import run_folder
from config import Config, ConfigError
from dataset import Dataset
from model import Transformer
from run_folder import Checkpoint

WAIT_SECONDS = 0.2  # between two looks at whether another process has finished


class Run(NamedTuple):
    """A run, the dataset that it was trained on, and the device and precision to compute results with."""

    folder: Path
    cfg: Config
    dataset: Dataset
    checkpoints: list[Checkpoint]
    device: torch.device
    precision: torch.dtype
    verify: bool = True  # compare the hashes of all files that are read


class Metric(NamedTuple):
    """Something to measure on every checkpoint.

    compute(model, checkpoint, items, done) yields one dict for each of the items, in their order. It can call
    done(n) for the progress bar when n more rows are finished. It runs without gradients, in the precision
    of the run. `items` maps the name of each item (a source, a chunk, a task) to its number of rows.
    """

    kind: str
    protocol: str
    items: dict[str | int, int]
    compute: Callable[[Transformer, Checkpoint, list, Callable[[int], object]], Iterable[dict]]
    inputs: Callable[[Checkpoint], dict] = lambda c: {}  # whatever else determines a result
    key: str = "item"  # the field of a line that has the name of its item
    log: Callable[[Checkpoint], Path] | None = None  # the metric's own log; default: RUN/evals.jsonl
    group_rows: int = 1  # compute gets several items at once, until they have this many rows together


# ---- opening a run ----------------------------------------------------------------------------------------


def open_run(folder: Path | str, steps: Iterable[int] = (), verify: bool = True) -> Run:
    """A run with its checkpoints, all or those of `steps`. Raises ConfigError if a part of it is missing."""
    checkpoints = run_folder.chosen(folder, steps)
    cfg = config.load_run(folder)
    dataset = dataset_of(folder, cfg, checkpoints, verify)
    device = device_of(cfg)
    precision = parallel.precision(cfg.train.precision, device)
    return Run(Path(folder), cfg, dataset, checkpoints, device, precision, verify)


def dataset_of(run: Path | str, cfg: Config, checkpoints: list[Checkpoint], verify: bool = True) -> Dataset:
    """The dataset that a run was trained on. Raises ConfigError if it is gone, or is another one now."""
    # A relative path is looked up where train.py would find it now, then beside this file.
    folders = [Path(cfg.dataset), Path(__file__).parent / cfg.dataset]
    found = [folder for folder in folders if (folder / "manifest.json").exists()]
    if not found:
        raise ConfigError(
            f"{run} was trained on the dataset {cfg.dataset}, which is not here; build it with data.py"
        )
    dataset = Dataset(found[0], verify)

    # Every checkpoint names the dataset and the tokenizer that it was trained with.
    now = {"dataset": dataset.sha256, "tokenizer": dataset.manifest["tokenizer"]["sha256"]}
    for c in checkpoints:
        missing = [name for name in run_folder.NEEDED if name not in c.state]
        run_folder.refuse(c.path, [f"state.json lacks {name}" for name in missing])
        for name, sha256 in now.items():
            trained_with = c.state[f"{name}_sha256"]
            if trained_with != sha256:
                raise ConfigError(
                    f"{c.path} was trained with another {name} than the one in {found[0]} "
                    f"({trained_with[:12]}, not {sha256[:12]}); restore the one it was trained with"
                )
    return dataset


def device_of(cfg: Config) -> torch.device:
    """The device of this process: a run made on a CPU stays there; any other takes a GPU if there is one."""
    table = {"auto": "auto", "cpu": "cpu", "cuda": "auto"}
    device = hardware.device(config.choose("train.device", cfg.train.device, table))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        return device
    hardware.keep_freed_memory()
    # torchrun gives each process one thread, unless OMP_NUM_THREADS says otherwise; let them share the cores.
    if rendezvous.world_size() > 1 and torch.get_num_threads() == 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // rendezvous.processes_here()))
    return device


def arguments(doc: str, metavar: str = "RUN") -> argparse.ArgumentParser:
    """The command line that every script over checkpoints has: the run, --checkpoint, --no-verify."""
    parser = configurator.parser(doc)
    step = run_folder.step_number
    parser.add_argument("run", metavar=metavar)
    parser.add_argument("--checkpoint", type=step, nargs="+", default=[], metavar="STEP", help="default: all")
    configurator.add_no_verify(parser)
    return parser


# ---- results that are known -------------------------------------------------------------------------------


def inputs_of(run: Run, metric: Metric, c: Checkpoint) -> dict:
    """Everything, except the item, that determines a line: the same inputs give the same result."""
    return {
        "protocol": metric.protocol,
        "weights_sha256": run_folder.weights_hash(c.state),
        "dataset_sha256": run.dataset.sha256,  # its manifest has the hashes of the rows and of the tokenizer
        **metric.inputs(c),
        "precision": str(run.precision).removeprefix("torch."),
        **({} if run.verify else {"verified": False}),  # then the files need not have these hashes
    }


def log_of(run: Run, metric: Metric, c: Checkpoint) -> Path:
    return metric.log(c) if metric.log else run.folder / "evals.jsonl"


def known(run: Run, metric: Metric, checkpoints: list[Checkpoint]) -> dict[int, dict[str | int, dict]]:
    """The lines that the run folder has for these inputs: {step: {item: line}}."""
    found, records, log = {}, [], None
    for c in checkpoints:
        # A log that all checkpoints share is read once.
        if log_of(run, metric, c) != log:
            log = log_of(run, metric, c)
            records = files.read_lines(log)
            if metric.log is None:
                records = [line for line in records if line.get("kind") == metric.kind]
        inputs = inputs_of(run, metric, c)
        found[c.step] = {line[metric.key]: line for line in records if line.get("inputs") == inputs}
    return found


# ---- computing what is missing ----------------------------------------------------------------------------


def every(run: Run, metric: Metric) -> list[tuple[Checkpoint, dict[str | int, dict]]]:
    """Computes what is missing; returns [(checkpoint, {item: line})] with a line for every item."""
    lines = known(run, metric, run.checkpoints)
    total = len(run.checkpoints) * sum(metric.items.values())

    def missing(c: Checkpoint) -> list:
        return [item for item in metric.items if item not in lines[c.step]]

    # Each process begins at another checkpoint, so that few models are loaded by more than one process.
    begin = rendezvous.rank() * len(run.checkpoints) // rendezvous.world_size()
    in_order = run.checkpoints[begin:] + run.checkpoints[:begin]
    with bar(metric.kind, total) as progress, Claims(run.folder / f".{metric.kind}.lock") as claims:
        while True:
            computed = False
            for c in in_order:
                # The bar counts the rows whose lines are known, also those that other processes wrote.
                if claims.file and not progress.disable:
                    lines |= known(run, metric, [c for c in in_order if missing(c)])
                to_do = sum(metric.items[item] for c in in_order for item in missing(c))
                progress.update(total - to_do - progress.n)
                if missing(c):
                    computed |= compute(run, metric, c, lines[c.step], claims, progress.update)
            if not any(missing(c) for c in in_order):
                break
            if not computed:  # other processes are computing all that is missing
                time.sleep(WAIT_SECONDS)
        progress.update(total - progress.n)
    return [(c, {item: lines[c.step][item] for item in metric.items}) for c in run.checkpoints]


def compute(
    run: Run, metric: Metric, c: Checkpoint, lines: dict, claims: "Claims", done: Callable[[int], object]
) -> bool:
    """Computes the results of one checkpoint that `lines` lacks and that no other process computes.

    Adds them to `lines` and to the log. Returns whether there were any.
    """
    log, model = log_of(run, metric, c), None
    for group in groups(metric, [item for item in metric.items if item not in lines]):
        with claims.take(c, group) as taken:
            # Another process may have finished an item since this one last read the log.
            if claims.file and taken:
                lines |= known(run, metric, [c])[c.step]
            to_do = [item for item in taken if item not in lines]
            if not to_do:
                continue

            if model is None:
                log.parent.mkdir(exist_ok=True)
                model = checkpoint.load_model(c.path, run.device, run.verify)
            with torch.inference_mode(), parallel.autocast(run.device, run.precision):
                results = metric.compute(model, c, to_do, done)
                for item, result in zip(to_do, results, strict=True):
                    line = {"format": 1}
                    if metric.log is None:  # the log is shared with other metrics
                        line["kind"] = metric.kind
                    line |= {"checkpoint": c.path.name, "step": c.step, metric.key: item, **result}
                    line["inputs"] = inputs_of(run, metric, c)
                    claims.append(log, line)
                    lines[item] = json.loads(files.encoded(line))  # a later call reads exactly this
    return model is not None


def groups(metric: Metric, items: list) -> list[list]:
    """Consecutive items that are computed together: as many as reach metric.group_rows rows.

    Several processes make smaller groups, so that each of them gets some.
    """
    enough = metric.group_rows // rendezvous.world_size()
    out, n_rows = [], enough
    for item in items:
        if n_rows >= enough:
            out.append([])
            n_rows = 0
        out[-1].append(item)
        n_rows += metric.items[item]
    return out


# ---- several processes ------------------------------------------------------------------------------------


def say(*what: object) -> None:
    """Prints in the first process only."""
    if rendezvous.rank() == 0:
        print(*what, flush=True)


def bar(what: str, n_rows: int) -> tqdm:
    """A progress bar, in the first process only, and only where a person watches."""
    watched = rendezvous.rank() == 0 and sys.stderr.isatty()
    return tqdm(total=n_rows, desc=what, unit=" rows", mininterval=1, disable=not watched)


class Claims:
    """The items that a process is computing, so that no other process of the torchrun computes them too.

    A claim is a lock on one byte of a file. The kernel releases the locks of a process that dies: another
    process can then take the item over, and no claim is left behind by a kill. One process alone needs no
    such file.
    """

    APPENDING, FAILED = 0, 1  # the bytes that are not items: see `append` and `__exit__`

    def __init__(self, path: Path):
        self.path, self.file = path, None

    def __enter__(self) -> "Claims":
        if rendezvous.world_size() > 1:
            # A descriptor, because Python closes its own files before the process has ended.
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        # One process reports the error for all. The others wait until torchrun ends them.
        if self.file and isinstance(error, ConfigError | OSError):
            if not self.lock(self.FAILED, fcntl.LOCK_EX | fcntl.LOCK_NB):
                time.sleep(60)
            return  # the lock is held until this process ends
        if self.file:
            os.close(self.file)  # releases every lock
        if rendezvous.rank() == 0 and error is None:  # all lines are known, so nobody needs a claim any more
            self.path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def take(self, c: Checkpoint, items: list) -> Iterator[list]:
        """Claims items of a checkpoint inside `with`; gives those that no other process has claimed."""
        taken = [i for i in items if self.lock(byte_of(c.step, i), fcntl.LOCK_EX | fcntl.LOCK_NB)]
        try:
            yield taken
        finally:
            for item in taken:
                self.lock(byte_of(c.step, item), fcntl.LOCK_UN)

    def append(self, log: Path, line: dict) -> None:
        """Adds a line to a log; processes do so one after another, so that no line is torn."""
        self.lock(self.APPENDING, fcntl.LOCK_EX)
        try:
            files.append(log, line)
        finally:
            self.lock(self.APPENDING, fcntl.LOCK_UN)

    def lock(self, byte: int, how: int) -> bool:
        """Locks or unlocks a byte; False if it was not to wait (LOCK_NB) and another process has the lock."""
        try:
            if self.file:
                fcntl.lockf(self.file, how, 1, byte)
        except (BlockingIOError, PermissionError):  # EAGAIN or, on some systems, EACCES
            return False
        return True


def byte_of(step: int, item: str | int) -> int:
    """The byte of an item of a checkpoint. If two items share one, that only costs some waiting."""
    digest = hashlib.sha256(repr((step, item)).encode()).digest()
    return 2 + int.from_bytes(digest[:7], "big")  # a file's offset has 63 bits
