"""The training loop, the only one: rows in training order -> checkpoints, one at the end of every data chunk.

    python train.py configs/demo.py                              # one process
    python train.py demo --init_from=models/mine --run=runs/new  # from weights that are there
    torchrun --nproc_per_node=8 train.py configs/7b.py           # eight GPUs, the same program
    torchrun --nproc_per_node=8 --max-restarts=9 train.py 7b     # and again by itself when a process dies
    python train.py 124m --benchmark 30                          # speed and memory, on made-up tokens
    python train.py demo --profile                               # three steps, in runs/demo/trace.json
    python train.py 7b --anyway                                  # though plan.py says that it does not fit

Reads the dataset folder that data.py built. Writes the run folder (checkpoint.py). Ctrl-C and SIGTERM save a
checkpoint and leave. The same command again goes on from the newest complete checkpoint, after kill -9 too,
and ends with the same weights, bit for bit, as a run that was never interrupted (on the same hardware and
number of processes; on CUDA with --train.deterministic=true).
"""

if __name__ == "__main__":  # before torch, which takes seconds to import: help and mistakes answer at once
    import config
    import configurator

    CONFIG, FLAGS = config.from_command_line(
        __doc__, flags={"--benchmark": "N", "--json": "FILE", "--profile": "", "--anyway": ""}
    )
    configurator.quiet_imports()

import dataclasses
import math
import re
import signal
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import safetensors
import torch

import benchmark
import checkpoint
import config
import configurator
import cost
import files
import incidents
import ledger
import optim
import parallel
import run_folder
import steps
import tokenizer as tokenizers
from config import Config, ConfigError
from dataset import Dataset
from formats.families import model_config
from learner import Learner
from manifest import differences
from run_folder import Checkpoint
from steps import Steps


class Interrupted:
    """`came` is the number of the signal (Ctrl-C's, SIGTERM, or SIGHUP of a closed terminal), or 0.

    The loop then saves and leaves. A second signal ends at once; but not in the same second, because whoever
    stops a machine may signal every process and torchrun, which signals its processes again.
    """

    def __init__(self):
        self.came, self.at = 0, 0.0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self.note)

    def note(self, number, frame):
        if self.came and time.monotonic() - self.at > 1:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            signal.raise_signal(number)
        elif not self.came:
            self.came, self.at = number, time.monotonic()


class Stopped(RuntimeError):
    """An incident ended the run, as train.on_spike asks."""


def train(cfg: Config, profile: bool = False) -> int:
    """Trains cfg.run from where it stands to the end of the data, or to train.steps.

    Returns 0, or the number of the signal that made it save and leave before that.
    """
    # Settings are checked before the processes meet and before the first file is written.
    accumulation = cost.accumulation(cfg, parallel.world_size())
    if Path(cfg.run).exists() and not Path(cfg.run).is_dir():
        raise ConfigError(f"--run={cfg.run} is a file; name a folder")
    dataset = open_dataset(cfg)
    origin = None
    if not run_folder.checkpoints(cfg.run):  # what a run was begun with is not asked again when it resumes
        origin = open_origin(cfg, dataset)
        if not cfg.optim.anneal_steps:
            cost.check_warmup(cfg, steps.of(cfg, dataset.n_rows))
    changed = ledger.check_same_run(cfg, dataset)

    world = parallel.start(cfg.train, cfg.parallel)
    world.once(ledger.lock, Path(cfg.run))
    found = world.first(run_folder.checkpoints, cfg.run)
    run = Run(cfg, dataset, world, found, origin)
    if found and found[-1].step >= run.last_step:
        world.once(
            ledger.say, f"{cfg.run} is trained: {found[-1].path.name} is its last checkpoint; nothing to do"
        )
        world.once(ledger.close, cfg, found[-1].step, changed)
        ledger.LOCKS.clear()
        world.leave()
        return 0
    interrupted = Interrupted()
    ledger.sign_in(cfg.run, world)
    try:
        run.begin(accumulation, changed)
        stopped = run.loop(interrupted, ledger.profiler(cfg.run, world) if profile else None)
    except BaseException as error:
        ledger.sign_out(cfg.run, world, error)
        if run.saving:
            run.saving.abandon(at_once=isinstance(error, KeyboardInterrupt))
        raise
    ledger.sign_out(cfg.run, world)
    ledger.LOCKS.clear()
    world.leave()
    # a process that another one's signal stopped had none of its own
    return (interrupted.came or signal.SIGTERM) if stopped else 0


class Run:
    """A training under way: where it stands, and what happens around a step."""

    def __init__(
        self,
        cfg: Config,
        dataset: Dataset,
        world: parallel.World,
        found: list[Checkpoint],
        origin: Path | None,
    ):
        self.cfg, self.dataset, self.world, self.folder = cfg, dataset, world, Path(cfg.run)
        self.resumed, self.origin, self.saving = found[-1] if found else None, origin, None
        self.chunks = [dataset.chunk_range(chunk) for chunk in range(dataset.n_chunks)]
        self.n_steps = steps.of(cfg, dataset.n_rows).n_steps  # of all the data, whatever is left out later
        self.annealed = run_folder.read(origin) if origin and cfg.optim.anneal_steps else None
        self.begin_step = (
            self.resumed.state.get("begin", 0) if found else self.annealed.step if self.annealed else 0
        )
        self.stand(self.resumed or self.annealed)

    def stand(self, at: Checkpoint | None) -> None:
        """Takes the position in the data from a checkpoint, or the very start."""
        if at:
            checkpoint.check_state(at, self.cfg, self.dataset.manifest, self.dataset.sha256)
        state = at.state if at else {}
        self.step = at.step if at else 0
        self.skipped = state.get("skipped", [])
        self.recent = deque(map(tuple, state.get("recent", [])), self.cfg.train.spike_window)
        self.change_order(steps.of(self.cfg, self.dataset.n_rows, state.get("order")))

    def change_order(self, order: Steps) -> None:
        anneal = self.cfg.optim.anneal_steps
        self.steps = order
        ends = [self.n_steps, order.n_steps, self.cfg.train.steps or self.n_steps]
        self.last_step = min([*ends, self.begin_step + anneal] if anneal else ends)
        plan = (self.cfg, order, self.chunks, self.last_step)
        self.save_at, self.kept = steps.checkpoint_steps(*plan), steps.kept_steps(*plan) | {self.begin_step}

    def begin(self, accumulation: int, changed: list[str]) -> None:
        """Builds the model, fills in its weights and says what is about to run."""
        cfg, world, dataset = self.cfg, self.world, self.dataset
        self.learner = Learner(cfg, world, dataset.manifest["eot"])
        model, optimizers = self.learner.model, self.learner.optimizers
        whole = self.resumed or self.annealed  # a checkpoint that has the optimizer too
        if whole or self.origin:
            checkpoint.load_weights(whole.path if whole else self.origin, model, cfg.train.verify, world)
        else:
            self.learner.fill(model.initial_weights(cfg.train.seed))
        if whole:
            checkpoint.load_optimizer(whole.path, model, optimizers, cfg.train.verify, world)
        else:
            torch.manual_seed(cfg.train.seed)
        self.saving = checkpoint.Saving(self.folder, model, optimizers, world)
        self.batches = Batches(dataset, world)
        self.n_incidents = whole.state.get("incidents", 0) if whole else 0

        machine = ledger.about_machine(world)
        world.once(ledger.write_run, cfg, dataset, machine, model)
        self.log(
            "resume" if self.resumed else "start",
            step=self.step,
            steps=self.last_step,
            world_size=world.size,
            accumulation=accumulation,
            init_from=str(self.origin) if self.origin else None,
            rows_after_last_step=self.steps.n_rows - self.steps.consumed(self.steps.n_steps),
            changed=changed,
            **machine,
        )
        if not cfg.train.verify:
            world.once(ledger.say, "note     train.verify=false: no hash is compared, damage goes unnoticed")
        missing = world.first(run_folder.incomplete, self.folder, self.step)
        if missing:
            world.once(ledger.say, f"note     {', '.join(missing)}: incomplete or damaged, and passed over")
        world.once(
            ledger.greet, cfg, dataset, world, model, self.step, self.last_step, self.steps, self.n_steps,
            accumulation,
        )  # fmt: skip
        if not self.resumed:
            self.save()

    def log(self, event: str, **record) -> None:
        record = {"event": event, "time": time.time(), **record}
        self.world.once(files.append, self.folder / "ledger.jsonl", record)

    # ---- checkpoints --------------------------------------------------------------------------------------

    def save(self) -> None:
        """Begins to save the state after the step just finished; `saved` makes it count."""
        self.saved()  # of the one before
        rows = self.steps.consumed(self.step)
        state = {
            "step": self.step,
            "begin": self.begin_step,
            "rows": rows,  # position in the order: its first so many rows have been consumed
            "skipped": self.skipped,  # those of them that moved nothing: ranges of the dataset's order
            "tokens": rows * self.cfg.model.seq_len,
            "chunk": self.steps.newest_chunk(self.chunks, self.step),
            "eot": self.dataset.manifest["eot"],
            "dataset_sha256": self.dataset.sha256,
            "tokenizer_sha256": self.dataset.manifest["tokenizer"]["sha256"],
            "world_size": self.world.size,
            "order": self.steps.order,
            "incidents": self.n_incidents,
            "recent": list(self.recent) if self.cfg.train.spike_z else [],
        }
        self.saving.begin(state, ledger.tokenizer_files(self.dataset))
        if not self.cfg.train.save_async:
            self.saved()

    def saved(self) -> None:
        """Waits until the checkpoint being saved is on disk, tells the ledger, deletes old ones."""
        path = self.saving.finish()
        if path is None:
            return
        state = self.saving.state
        about = {"chunk": state["chunk"], "checkpoint": path.name, "state_sha256": self.saving.state_sha256}
        self.log("checkpoint", step=state["step"], **about)
        if self.cfg.train.keep_others:
            kept = set(self.kept)
            if self.cfg.train.on_spike == "rollback":  # and one to go back to
                old = [s for s in self.steps_saved() if s <= state["step"] - self.cfg.train.rollback_steps]
                kept |= set(old[-1:])
            self.world.once(run_folder.delete_others, self.folder, kept, self.cfg.train.keep_others)

    def steps_saved(self) -> list[int]:
        return [c.step for c in self.world.first(run_folder.checkpoints, self.folder)]

    # ---- the loop -----------------------------------------------------------------------------------------

    def loop(self, interrupted: Interrupted, profiler=None) -> bool:
        """Trains to the last step; True where a signal ended it before."""
        cfg, world, learner, T = self.cfg, self.world, self.learner, self.cfg.model.seq_len
        meter = ledger.Meter(cfg, world)
        began, done = time.perf_counter(), 0
        while self.step < self.last_step:
            t0 = time.perf_counter()
            batch = self.batches.get(self.steps, self.step)  # (this process's rows, T+1)
            t1 = time.perf_counter()
            n_tokens = self.steps.size(self.step) * T
            nats = learner.gradients(batch, n_tokens)
            # The one moment of a step at which the host waits for the device: before weights are touched.
            loss, norm, stop, writing, joules = world.sum(
                nats, learner.norm(), bool(interrupted.came), self.saving.busy(), meter.joules()
            )
            loss, norm = loss / n_tokens, norm / world.size  # every process has the same norm
            t2 = time.perf_counter()

            lr, limit = self.rate(), optim.clip_limit(self.step, cfg.optim)
            incident = incidents.judge(loss, norm, self.recent, cfg.train)
            if incident:
                if not self.incident(incident, loss, norm):
                    continue  # with another batch, or from an earlier step
            else:
                learner.update(lr, norm, limit)
                self.recent.append((loss, norm))
            self.step, done = self.step + 1, done + 1

            t3 = time.perf_counter()
            seconds = t3 - t0
            record = {
                "step": self.step,
                "loss": loss if math.isfinite(loss) else None,
                "grad_norm": norm if math.isfinite(norm) else None,
                "lr": lr,
                "tokens": self.steps.consumed(self.step) * T,
                "tokens_per_second": n_tokens / seconds,
                **meter.about(n_tokens / seconds, joules),
                "seconds": seconds,
                "data_seconds": t1 - t0,
                "forward_backward_seconds": t2 - t1,
                "optimizer_seconds": t3 - t2,
                "chunk": self.dataset.chunk_of(self.steps.pieces(self.step - 1)[-1][1] - 1),
                "time": time.time(),
                **({"skipped": True} if incident else {}),
            }
            world.aside(ledger.log_step, self.folder, record)
            if self.step % cfg.train.log_every == 0 or self.step in (1, self.last_step):
                left = (self.last_step - self.step) * (time.perf_counter() - began) / done
                world.aside(ledger.say, ledger.step_line(record, self.last_step, left))
            if not writing:  # every process has written its part of the checkpoint
                self.saved()
            if self.step in self.save_at or stop:
                self.save()
            if profiler and profiler(done):
                profiler = None
            elif profiler and self.step == self.last_step:
                world.aside(ledger.say, "note     --profile traces steps 4 to 6, and there were not so many")
            if stop and self.step < self.last_step:
                self.saved()
                self.log("interrupted", step=self.step)
                said = f"interrupted and saved at step {self.step}; the same command goes on from there"
                world.once(ledger.say, said)
                return True
        self.saved()
        self.log("finish", step=self.step, seconds=time.perf_counter() - began, **meter.totals())
        return False

    def rate(self) -> float:
        """The learning rate of the step under way."""
        if self.cfg.optim.anneal_steps:
            begin_rate = scheduled_rate(self.cfg, self.steps, self.n_steps, self.begin_step)
            return optim.annealed_rate(begin_rate, self.step - self.begin_step, self.cfg.optim)
        return scheduled_rate(self.cfg, self.steps, self.n_steps, self.step)

    # ---- incidents ----------------------------------------------------------------------------------------

    def incident(self, found: dict, loss: float, norm: float) -> bool:
        """Writes it down and does what train.on_spike says.

        True: the step counts, without an update. False: the step or the order is another now, and the loop
        goes on from there. All processes come here together, with the same numbers. Stopped: the run ends.
        """
        cfg, world, step = self.cfg, self.world, self.step
        norms = optim.norms_by_layer(self.learner.model)  # all processes together
        self.learner.forget()
        self.saved()  # so that the newest checkpoint is known, and whole
        self.n_incidents += 1
        pieces = self.steps.pieces(step)
        chunk = self.dataset.chunk_of(pieces[0][0])
        earlier = [c for c in world.first(run_folder.checkpoints, self.folder) if c.step <= step]
        action, order, back = cfg.train.on_spike, None, None
        if action == "defer":
            # a batch may begin in one chunk and end in the next
            last = self.dataset.chunk_of(pieces[-1][1] - 1)
            order = self.steps.deferred(step, (self.chunks[chunk][0], self.chunks[max(chunk, last)][1]))
        elif action == "rollback":
            back = [earlier[0], *(c for c in earlier if c.step <= step - cfg.train.rollback_steps)][-1]
            half = cfg.train.rollback_skip // 2
            first = max(back.step, step - half)
            order = self.steps.without(first, min(first + cfg.train.rollback_skip, self.steps.n_steps))
            order = order if order.n_steps > back.step else None
        elif action not in ("stop", "skip"):
            raise config.unknown("train.on_spike", action)
        if self.n_incidents > cfg.train.max_incidents or (action in ("defer", "rollback") and order is None):
            action = "stop"
        record = {
            **found,
            "step": step,
            "number": self.n_incidents,
            "action": action,
            "loss": loss if math.isfinite(loss) else str(loss),
            "grad_norm": norm if math.isfinite(norm) else str(norm),
            "norms": {name: n if math.isfinite(n) else str(n) for name, n in norms.items()},
            "chunk": chunk,
            "rows": [[first, end - 1] for first, end in pieces],
            "documents": incidents.documents(self.dataset, pieces) if world.rank == 0 else [],
            "checkpoint": earlier[-1].path.name if earlier else None,
            **({"back_to": back.path.name} if back and order else {}),
            **({"order": order.order} if order else {}),
        }
        self.log(record.pop("event"), **record)
        told = incidents.told({**found, **record})
        if action == "stop":
            most = f" It is incident {self.n_incidents} of train.max_incidents={cfg.train.max_incidents}."
            raise Stopped(
                f"{told} (all of them in {cfg.run}/ledger.jsonl).{most * (self.n_incidents > 1)} "
                f"The optimizer has not moved, and {self.newest(earlier)}. "
                f"Its batch: python incidents.py {cfg.run} --replay {step}. A lower "
                "optim.lr or a tighter optim.grad_clip, in a run of its own (--run=FOLDER), is the usual "
                "remedy; with train.on_spike=skip, defer or rollback a run goes on by itself"
            )
        where = f" to {back.path.name}, without the rows from {self.steps.consumed(first)} on" if back else ""
        world.once(ledger.say, f"{action}{where}: {told}")
        if action == "skip":
            self.skipped = [*self.skipped, *pieces]
            return True
        if action == "rollback":
            model, how = self.learner.model, (cfg.train.verify, world)
            checkpoint.load_weights(back.path, model, *how)
            checkpoint.load_optimizer(back.path, model, self.learner.optimizers, *how)
            self.stand(back)  # where it is damaged, this ended here, and the later ones are still there
            world.once(run_folder.set_aside, self.folder, back.step, self.n_incidents)
        self.change_order(order)
        return False

    def newest(self, found: list[Checkpoint]) -> str:
        """What is so of the newest checkpoint: said after looking at its files, by all processes together."""
        if not found:
            return "there is no checkpoint yet"
        path = found[-1].path
        try:
            for kind in ("model", "optimizer"):
                with checkpoint.compared(path, kind, world=self.world):
                    pass
        except ConfigError as error:
            return f"the newest checkpoint is not good: {error}"
        return f"the newest checkpoint, {path.name}, is whole"


def scheduled_rate(cfg: Config, plan: Steps, n_steps: int, step: int) -> float:
    """The learning rate after `step` finished steps; n_steps: those that the data have."""
    at, length = steps.schedule_position(cfg, plan, step), steps.schedule_length(cfg, n_steps)
    return optim.learning_rate(at, length, cfg.optim)


class Batches:
    """This process's rows of each batch; the next step's are read while this one is computed."""

    def __init__(self, dataset: Dataset, world: parallel.World):
        self.dataset, self.world = dataset, world
        self.pool, self.ahead = ThreadPoolExecutor(1), (None, None)

    def get(self, order: Steps, step: int) -> torch.Tensor:
        asked, read = self.ahead
        batch = read.result() if asked == (order, step) else self.read(order, step)
        if step + 1 < order.n_steps:
            self.ahead = (order, step + 1), self.pool.submit(self.read, order, step + 1)
        return batch.to(self.world.device, non_blocking=True)

    def read(self, order: Steps, step: int) -> torch.Tensor:
        pieces = order.pieces(step, self.world.share(order.size(step)))
        rows = [self.dataset.rows(first, end - first) for first, end in pieces]
        batch = torch.from_numpy(np.concatenate(rows))
        return batch.pin_memory() if self.world.device.type == "cuda" else batch


# ---- before the loop --------------------------------------------------------------------------------------


def check_room(cfg: Config, anyway: bool) -> None:
    """Asks the plan whether this machine has the memory for a run, before any is touched.

    Raises ConfigError with the smallest change that would fit; with `anyway` only says so.
    """
    processes, device = parallel.world_size(), parallel.device(cfg.train.device)
    cost.accumulation(cfg, processes)  # they must divide
    if device.type == "cuda":
        have = torch.cuda.get_device_properties(device).total_memory * cost.USABLE
    else:
        have = cost.usable("cpu", parallel.processes_here())
    try:
        cost.check_memory(cfg, processes, device.type, have)
    except ConfigError as error:
        said = re.sub(r"(with|) --gpus=(\d+)", lambda m: f"{m[1] or ' on'} {m[2]} GPUs", str(error))
        if not anyway:
            raise ConfigError(f"{said}. --anyway tries all the same") from None
        if parallel.is_first():
            ledger.say(f"note     --anyway: {said}")


def open_dataset(cfg: Config) -> Dataset:
    """The dataset of a config. ConfigError where it does not fit the model, or is not the one asked for."""
    if not Path(cfg.dataset, "manifest.json").exists():
        raise ConfigError(f"there is no dataset in {cfg.dataset}; build it: {cfg.again('data.py')}")
    # Of the processes of a node, which read the same files, one hashes them.
    dataset = Dataset(cfg.dataset, verify=cfg.train.verify and parallel.first_on_node())
    if dataset.seq_len != cfg.model.seq_len:
        raise ConfigError(
            f"{cfg.dataset} has rows of {dataset.seq_len} tokens and model.seq_len={cfg.model.seq_len}; "
            f"remove that folder and build it again: {cfg.again('data.py')}"
        )
    if dataset.vocab_size > cfg.model.vocab_size:
        raise ConfigError(
            f"{cfg.dataset} has ids up to {dataset.vocab_size - 1} and model.vocab_size="
            f"{cfg.model.vocab_size}; set model.vocab_size to at least {dataset.vocab_size}"
        )
    # Rows need not come in multiples of this batch; and the same files may lie elsewhere on another machine.
    names = [source.name for source in cfg.data.sources]
    differs = [d for d in differences(dataset.manifest, cfg) if not d.startswith(("train.", "data.sources="))]
    if differs or names != dataset.sources:
        raise ConfigError(
            f"{cfg.dataset} is not what the config asks for: {'; '.join(differs) or 'other sources'}; "
            f"remove that folder and build it again: {cfg.again('data.py')}; or name another: "
            "--dataset=FOLDER"
        )
    path = Path(cfg.tokenizer.path)
    if path.exists():  # elsewhere the dataset's own copy is all there is
        theirs, ours = tokenizers.load(path, cfg.tokenizer.eot), dataset.manifest["tokenizer"]["sha256"]
        own = tokenizers.load(dataset.folder, cfg.tokenizer.eot)
        if theirs.sha256 != ours and not tokenizers.equal(theirs, own):
            raise ConfigError(
                f"{cfg.dataset} was built with another tokenizer ({ours[:12]}) than tokenizer.path={path} "
                f"({theirs.sha256[:12]}); use the dataset's own, --tokenizer.path={cfg.dataset}, or build "
                f"another dataset with yours: {cfg.again('data.py')} --dataset=FOLDER"
            )
    if dataset.n_rows < cfg.train.batch_size:
        raise ConfigError(
            f"{cfg.dataset} has {dataset.n_rows} rows, train.batch_size={cfg.train.batch_size}: not one step"
        )
    return dataset


def open_origin(cfg: Config, dataset: Dataset) -> Path | None:
    """The model folder that init_from names. ConfigError where that is another model or tokenizer.

    Only weights are taken from it, and the optimizer, the schedule and the data begin anew; but with
    optim.anneal_steps it is a checkpoint to go on from.
    """
    if not cfg.init_from:
        return None
    folder = checkpoint.model_folder(cfg.init_from, verify=cfg.train.verify)
    theirs, ours = dataclasses.asdict(model_config(folder)), dataclasses.asdict(cfg.model)
    free = ("seq_len", "document_mask") if cfg.model.positions != "learned" else ("document_mask",)
    free += tuple(name for name in ours if name.startswith("init"))
    differs = [name for name in ours if name not in free and ours[name] != theirs[name]]
    if differs:
        settings = " ".join(f"--model.{name}={theirs[name]}" for name in differs)
        if "mup_base_width" in differs:  # which the kind of initialisation goes with
            settings += f" --model.init={'mup' if theirs['mup_base_width'] else 'normal'}"
        raise ConfigError(f"--init_from={cfg.init_from} is a model with other settings; add {settings}")
    tokenizers.check_same(folder, dataset.folder)
    if cfg.optim.anneal_steps:
        state = run_folder.read(folder).state
        if state.get("dataset_sha256") != dataset.sha256:
            raise ConfigError(
                f"--init_from={cfg.init_from} was trained on another dataset than {cfg.dataset}; annealing "
                "goes on in the same one. Without optim.anneal_steps its weights begin anew on any data"
            )
        order = steps.of(cfg, dataset.n_rows, state.get("order"))
        n_steps = steps.of(cfg, dataset.n_rows).n_steps
        left = min(order.n_steps, n_steps) - state["step"]
        if order.consumed(state["step"]) != (rows := state.get("rows")):
            raise ConfigError(
                f"--init_from={cfg.init_from} consumed {rows} rows in {state['step']} steps, and "
                f"this config's batches would be {order.consumed(state['step'])}: anneal with the same ones"
            )
        if cfg.train.steps and cfg.train.steps <= state["step"]:
            raise ConfigError(
                f"train.steps={cfg.train.steps} ends before annealing begins, after step {state['step']}"
            )
        if not scheduled_rate(cfg, order, n_steps, state["step"]):
            raise ConfigError(
                f"the rate after step {state['step']} is 0: there is nothing to anneal; use a later one"
            )
        if left < cfg.optim.anneal_steps:
            raise ConfigError(
                f"optim.anneal_steps={cfg.optim.anneal_steps}: after the origin's step {state['step']} "
                f"{cfg.dataset} has data for {left}; anneal in fewer steps, or from an earlier checkpoint"
            )
    return folder


# ---- the command line -------------------------------------------------------------------------------------


@configurator.script
def main(cfg: Config, flags: dict[str, str]) -> None:
    try:
        if "--json" in flags and "--benchmark" not in flags:
            raise ConfigError("--json is for --benchmark N")
        if "--profile" in flags and "--benchmark" in flags:
            raise ConfigError("--profile traces a training and --benchmark is none; give one of them")
        check_room(cfg, anyway="--anyway" in flags)
        if "--benchmark" in flags:
            benchmark.run(cfg, int(flags["--benchmark"]), flags.get("--json", ""))
        else:
            number = train(cfg, profile="--profile" in flags)
            if number:
                sys.exit(128 + number)  # as a shell has it: 130 after Ctrl-C, 143 after SIGTERM
    except Stopped as error:
        configurator.fail(error, code=1)
    except BrokenPipeError:
        raise
    except (OSError, safetensors.SafetensorError) as error:  # a full disk, a missing permission
        configurator.fail(f"{cfg.run}: {error}; earlier checkpoints are whole", code=1)
    except RuntimeError as error:
        if not parallel.is_lost(error):
            raise
        configurator.fail(
            f"{cfg.run}: another process is gone, or did not answer within parallel.timeout_seconds="
            f"{cfg.parallel.timeout_seconds}; the same command goes on from the newest checkpoint ({error})",
            code=1,
        )


if __name__ == "__main__":
    main(CONFIG, FLAGS)
