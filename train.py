"""The training loop, the only one: rows in training order -> checkpoints, one at the end of every data chunk.

    python train.py configs/demo.py                              # one process
    python train.py demo --init_from=models/mine --run=runs/new  # from existing weights
    torchrun --nproc_per_node=8 -- train.py configs/7b.py        # eight GPUs, the same program
    torchrun --nproc_per_node=8 --max-restarts=9 -- train.py 7b  # restarts when a process dies
    python train.py demo --profile                               # three steps, in runs/demo/trace.json
    python train.py 7b --anyway                                  # even if plan.py says that it does not fit

Reads the dataset folder that data.py built. Writes the run folder (run_folder.py lists its files). Ctrl-C and
SIGTERM save a checkpoint and end the run. The same command again continues from the newest complete
checkpoint, also after kill -9, and ends with the same weights, bit for bit, as a run that was never
interrupted (on the same hardware and number of processes; on CUDA with --train.deterministic=true).

Read the function `train` first: its loop is one step in five paragraphs. A script of your own can call
train(cfg, loss_fn, make_batches) with another loss, or with rows of which some targets are masked. A subclass
of Batches then makes the rows in `read` and counts the targets of the whole batch in `n_targets`: see
tests/test_train.py.
"""

if __name__ == "__main__":  # before torch, which takes seconds to import: help and mistakes answer at once
    import config
    import configurator

    CONFIG, FLAGS = config.from_command_line(__doc__, flags={"--profile": "", "--anyway": ""})
    configurator.quiet_imports()

import gc
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
import configurator
import hardware
import incidents
import integrity
import metrics
import optim
import parallel
import preflight
import run_folder
import steps
from config import Config, choose
from configurator import say
from dataset import Dataset
from initial import initial_weights
from model import Transformer
from parallel import World
from sharding import bare
from steps import State, Steps

# ---- a step -----------------------------------------------------------------------------------------------


def next_token_loss(model: nn.Module, rows: Tensor) -> dict[str, Tensor]:
    """rows (b, T+1) of token ids -> sums over their b x T targets, by name.

    The gradient is that of "loss", in nats. Every other sum over the rows that a loss_fn returns is added up
    over all processes, divided by the number of targets and logged under its name: console, metrics.jsonl,
    page.
    """
    return {"loss": model(rows[:, :-1], rows[:, 1:])}


def forward_backward(
    model: nn.Module, rows: Tensor, n_targets: int, loss_fn: Callable, world: World, cfg: Config
) -> dict[str, Tensor]:
    """Takes the gradient of the mean loss over the global batch, and returns this process's sums.

    rows (b, ...): this process's share of the batch. n_targets: of the whole batch, on all processes. The
    sums stay on the device. Afterwards each process has the same gradient, or its shard of it.
    """
    sums: dict[str, Tensor] = {}
    micro_batches = rows.split(cfg.train.micro_batch_size)
    for i, micro_batch in enumerate(micro_batches):
        with world.accumulate(model, last=i == len(micro_batches) - 1):
            with parallel.autocast(world.device, world.dtype):
                parts = loss_fn(model, micro_batch)
            # The sum is divided by the targets of the whole batch: a mean of means would be wrong wherever
            # micro-batches differ in targets. dp_size undoes the average that DDP and FSDP make of gradients.
            (parts["loss"] * (world.dp_size / n_targets)).backward()
        for name, value in parts.items():
            # Under tensor parallel the loss is that of this process's tokens, other sums are of whole rows.
            part = value.detach() if name == "loss" else value.detach() / world.tp_size
            sums[name] = sums.get(name, 0) + part
    return sums


class Batches:
    """This process's rows of each batch. The next batch is read while the present one is computed."""

    def __init__(self, dataset: Dataset, world: World):
        self.dataset, self.world = dataset, world
        self.reader, self.ahead = ThreadPoolExecutor(1), (None, None)

    def get(self, plan: Steps, step: int) -> tuple[Tensor, int]:
        """(rows (b, T+1) on the device, the number of targets of the whole batch)."""
        asked, future = self.ahead
        if asked == (plan, step):
            rows = future.result()
        else:  # the first batch, or an incident has changed the plan
            rows = self.read(plan, step)
        if step + 1 < plan.last_step:
            self.ahead = (plan, step + 1), self.reader.submit(self.read, plan, step + 1)
        return rows.to(self.world.device, non_blocking=True), self.n_targets(plan, step)

    def read(self, plan: Steps, step: int) -> Tensor:
        """This process's share of the rows, in CPU memory."""
        ranges = plan.batch(step, self.world.share(plan.size(step)))
        rows = np.concatenate([self.dataset.rows(first, end - first) for first, end in ranges])
        rows = torch.from_numpy(rows)
        return rows.pin_memory() if self.world.device.type == "cuda" else rows

    def n_targets(self, plan: Steps, step: int) -> int:
        """Targets of the whole batch: every token of a row but the first."""
        return plan.size(step) * self.dataset.seq_len


def learning_rate(cfg: Config, plan: Steps, n_steps: int, begin: int, step: int) -> float:
    """The learning rate of the update after `step` finished steps. n_steps: those that all the data have."""

    def scheduled(step: int) -> float:
        at, length = steps.schedule_position(cfg, plan, step), steps.schedule_length(cfg, n_steps)
        return optim.learning_rate(at, length, cfg.optim)

    if cfg.optim.anneal_steps:
        return optim.annealed_lr(scheduled(begin), step - begin, cfg.optim)
    return scheduled(step)


# ---- the loop ---------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """The objects that a training uses from its first step to its last."""

    cfg: Config
    world: World
    dataset: Dataset
    model: nn.Module  # spread over the processes
    optimizers: list[torch.optim.Optimizer]
    saving: checkpoint.Saving
    chunks: list[tuple[int, int]]  # (first, end) position of each
    n_steps: int  # of all the data, before any incident: the length of the schedule


def train(
    cfg: Config,
    loss_fn: Callable[[nn.Module, Tensor], dict[str, Tensor]] = next_token_loss,
    make_batches: Callable[[Dataset, World], Batches] = Batches,
    profile: bool = False,
) -> int:
    """Trains cfg.run from where it is to the end of the data, or to train.steps.

    Returns 0, or the number of the signal that made it save and end early. Raises incidents.Stopped where an
    incident ends the run. Reference cycles that loss_fn leaves are collected only when a checkpoint is saved.
    """
    cfg = preflight.choose(cfg)  # the micro-batch and the recompute, where the plan is to choose them
    start = preflight.check(cfg)  # every mistake that can be known before a GPU or a file is touched
    with parallel.start(cfg.train, cfg.parallel) as world, run_folder.at_work(cfg.run, world):
        state, plan, source, resumed = where_to_start(cfg, start, world)
        if state.step >= plan.last_step:
            world.once(run_folder.close, cfg, source, start.changed)
            return 0
        run = build_run(cfg, start, world, state, source)
        preflight.write_down(start, run, state, plan, resumed)
        batches, signals = make_batches(start.dataset, world), incidents.Signals()
        log, interrupted = metrics.Log(run, profile), False
        save_at = steps.checkpoint_steps(cfg, plan, run.chunks)

        with run.saving as saving, hardware.garbage_waits():
            if not resumed:
                save(run, state, plan)
            while state.step < plan.last_step and not interrupted:
                clock = metrics.Clock()

                # 1. Data: a function of dataset, plan and step. Each process reads its share.
                rows, n_targets = batches.get(plan, state.step)
                clock.done("data")

                # 2. The gradient of the mean over all targets of the global batch.
                sums = forward_backward(run.model, rows, n_targets, loss_fn, world, cfg)

                # 3. Agreement: one all-reduce of a few numbers; here the CPU waits for the GPU. All processes
                #    then hold the same numbers, so they take the same decisions below.
                mine = (optim.grad_norm(run.model), signals.received > 0, saving.busy(), log.joules())
                grad_norm, stop, writing, joules, *totals = world.sum(*mine, *sums.values())
                grad_norm /= world.size  # all had the same one, up to the last bit under tensor parallel
                means = {name: total / n_targets for name, total in zip(sums, totals, strict=True)}
                clock.done("forward_backward")

                # 4. Update, unless something is wrong: no weight has been touched yet.
                lr = learning_rate(cfg, plan, run.n_steps, state.begin, state.step)
                problem = incidents.judge(means["loss"], grad_norm, state.recent, cfg.train)
                if problem is None:
                    limit = optim.clip_limit(state.step, cfg.optim)
                    optim.update(run.model, run.optimizers, lr, grad_norm, limit)
                    state.remember(means["loss"], grad_norm, cfg)
                else:
                    complete_save(run, plan)
                    # Drops the gradient and does what train.on_incident says; Stopped ends the run.
                    moved = incidents.respond(problem, run, state, plan, means["loss"], grad_norm)
                    if moved:  # to an earlier step, or to a plan with other rows
                        state, plan = moved
                        save_at = steps.checkpoint_steps(cfg, plan, run.chunks)
                        continue
                state.advance(plan, cfg, run.chunks)
                clock.done("optimizer")

                # 5. Write it down, and save in the background. A checkpoint counts once `complete_save` has
                #    given its folder its name, at the first step at which all processes have written theirs.
                values = {**means, "grad_norm": grad_norm, "lr": lr}  # for console, metrics.jsonl and page
                log.write(state, plan, values, clock, joules, skipped=problem is not None)
                if not writing:
                    complete_save(run, plan)
                interrupted = stop > 0
                if state.step in save_at or interrupted:
                    save(run, state, plan)

            complete_save(run, plan)
        if state.step < plan.last_step:
            world.once(run_folder.log, cfg.run, "interrupted", {"step": state.step})
            world.once(say, f"interrupted and saved at step {state.step}; the same command continues there")
            return signals.received or signal.SIGTERM  # where another process got the signal
        world.once(run_folder.log, cfg.run, "finish", {"step": state.step, **log.totals()})
        return 0


def save(run: Run, state: State, plan: Steps) -> None:
    """Begins to save the state of the step just finished; train.save_async=false waits for it."""
    complete_save(run, plan)  # of the previous checkpoint
    gc.collect()  # here, where the save delays training anyway: see hardware.garbage_waits
    run.saving.begin(state)
    if not run.cfg.train.save_async:
        complete_save(run, plan)


def complete_save(run: Run, plan: Steps) -> None:
    """Waits until the checkpoint being saved, if there is one, is on disk; then it counts.

    The ledger gets its hash, and train.keep_others deletes older ones.
    """
    path = run.saving.finish()
    if path is None:
        return
    state, cfg, world = run.saving.state, run.cfg, run.world
    about = {"step": state.step, "chunk": state.chunk, "checkpoint": path.name}
    about["state_sha256"] = run.saving.state_sha256
    world.once(run_folder.log, cfg.run, "checkpoint", about)
    if cfg.train.keep_others:
        saved = [c.step for c in world.first(run_folder.checkpoints, cfg.run)]
        kept = steps.kept_steps(cfg, plan, run.chunks, state.begin)
        world.once(run_folder.delete, cfg.run, run_folder.deleted_steps(cfg, saved, kept))


# ---- before the loop --------------------------------------------------------------------------------------


def where_to_start(
    cfg: Config, start: preflight.Start, world: World
) -> tuple[State, Steps, run_folder.Checkpoint | None, bool]:
    """(state, plan, source, resumed): where the run is, and its plan.

    source: the checkpoint with the weights and moments of this state: the run's own newest one, if it
    resumes, or the one to anneal from. None: the run begins anew.
    """
    # Resume the newest checkpoint, or anneal from another run's, or begin anew.
    found, dataset = world.first(run_folder.checkpoints, cfg.run), start.dataset
    source = found[-1] if found else start.annealed
    state = State()
    if source:
        integrity.check_state(source, cfg, dataset.manifest, dataset.sha256)
        state = State.read(source.state)
        state.begin = state.begin if found else state.step
    # What the state says of the data and the processes is what they are now.
    state.eot, state.world_size = dataset.manifest["eot"], world.size
    state.dataset_sha256, state.tokenizer_sha256 = dataset.sha256, dataset.manifest["tokenizer"]["sha256"]
    plan = steps.plan_of(cfg, dataset.n_rows, state.order, state.begin)
    state.order = list(plan.ranges)
    return state, plan, source, bool(found)


def build(cfg: Config, world: World, eot: int | None) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    """The model of a config, spread over the processes and still empty, and its optimizers."""
    with torch.device("meta"):
        model = Transformer(cfg.model, eot)
    model.loss.z_loss = cfg.optim.z_loss
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    model.stream_dtype = choose("train.residual", cfg.train.residual, dtypes)
    incidents.shrink_embedding_gradient(model, cfg.optim.embedding_gradient)
    spread = world.spread(model, cfg)  # before the optimizers: sharding replaces the parameters
    return spread, optim.optimizers(model, cfg.optim, cfg.model.mup_scale)


def build_run(
    cfg: Config, start: preflight.Start, world: World, state: State, source: run_folder.Checkpoint | None
) -> Run:
    """The model with its weights, and the other fields of Run."""
    dataset = start.dataset
    model, optimizers = build(cfg, world, state.eot)
    if source:  # also the state of the random generators
        checkpoint.load(source.path, model, optimizers, cfg.train.verify, world)
    else:
        torch.manual_seed(cfg.train.seed)
        if start.origin:
            checkpoint.load_weights(start.origin, model, cfg.train.verify, world)
        else:
            world.fill(model, initial_weights(bare(model), cfg.train.seed))
    saving = checkpoint.Saving(cfg.run, model, optimizers, world, start.tokenizer_files)
    chunks = [dataset.chunk_range(chunk) for chunk in range(dataset.n_chunks)]
    n_steps = steps.plan_of(cfg, dataset.n_rows).n_steps
    return Run(cfg, world, dataset, model, optimizers, saving, chunks, n_steps)


# ---- the command line -------------------------------------------------------------------------------------


@configurator.script
def main(cfg: Config, flags: dict[str, str]) -> None:
    with incidents.explained(cfg):
        cfg = preflight.check_memory(cfg, anyway="--anyway" in flags)
        number = train(cfg, profile="--profile" in flags)
    if number:
        sys.exit(128 + number)  # the shell's convention: 130 after Ctrl-C, 143 after SIGTERM


if __name__ == "__main__":
    main(CONFIG, FLAGS)
