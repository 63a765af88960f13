"""Handles what can go wrong in a run: a loss or gradient that is not finite, or a spike; a signal; a fault.

    python incidents.py runs/demo                             # lists the incidents of a run
    python incidents.py runs/demo --replay 137                # the batch of that incident, alone, row by row
    python incidents.py runs/demo --replay 137 --checkpoint 120

train.py asks `judge` after every backward, before any weight is touched, on all processes alike, and calls
`respond` where something is wrong. The command line reads the run folder and its dataset, and writes nothing.

A batch that is skipped, or left out after a rollback, changes no weight. The model can still learn from its
documents: other rows hold the rest of them, and other passes, repeats or sources can hold the same text.
Dataset.positions(source, id) lists every position of a document.
"""

if __name__ == "__main__":  # before torch, which takes seconds to import
    import configurator

    configurator.quiet_imports()

import contextlib
import dataclasses
import math
import signal
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import nn

import checkpoint
import config
import configurator
import integrity
import optim
import rendezvous
import run_folder
import steps
from config import Config, ConfigError, Train
from configurator import say
from dataset import Dataset
from parallel import World
from run_folder import Checkpoint
from seen import joined
from sharding import bare
from steps import State, Steps, cut

if TYPE_CHECKING:
    from train import Run

KINDS = ("nonfinite", "spike")  # events of the ledger


class Stopped(RuntimeError):
    """An incident ended the run, as train.on_incident asks."""


class Signals:
    """`received`: the number of the signal that asks the run to save and end (Ctrl-C, SIGTERM, SIGHUP), or 0.

    A second signal ends the process at once; but not within a second of the first, because whoever stops a
    machine may signal every process and torchrun, which signals its processes again.
    """

    def __init__(self):
        self.received, self.at = 0, 0.0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup
                signal.signal(number, self.note)

    def note(self, number, frame) -> None:
        if self.received and time.monotonic() - self.at > 1:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            signal.raise_signal(number)
        elif not self.received:
            self.received, self.at = number, time.monotonic()


@contextlib.contextmanager
def explained(cfg: Config):
    """Around a training: an incident or a fault ends it with one line and exit code 1, not a traceback."""
    try:
        yield
    except Stopped as error:
        configurator.fail(error, code=1)
    except BrokenPipeError:
        raise
    except (OSError, SafetensorError) as error:  # a full disk, a missing permission
        configurator.fail(f"{cfg.run}: {error}; earlier checkpoints are whole", code=1)
    except RuntimeError as error:
        if not rendezvous.is_lost(error):
            raise
        configurator.fail(
            f"{cfg.run}: another process is gone, or did not answer within parallel.timeout_seconds="
            f"{cfg.parallel.timeout_seconds}; the same command continues from the newest checkpoint "
            f"({error})",
            code=1,
        )


# ---- against spikes ----------------------------------------------------------------------------------------


def shrink_embedding_gradient(model: nn.Module, factor: float) -> None:
    """From now on multiplies the embedding's gradient by `factor` (GLM-130B, 2.2: 0.1 against spikes).

    Only the gradient through the embedding: a head that is tied to it still gives its whole part.
    """

    def shrink(module, arguments, out):
        if out.requires_grad:
            out.register_hook(lambda gradient: gradient * factor)

    if factor != 1:
        model.embed_tokens.register_forward_hook(shrink)


# ---- judging a step ---------------------------------------------------------------------------------------


def judge(loss: float, grad_norm: float, recent: Sequence, train: Train) -> dict | None:
    """The incident of a step: {"event": "nonfinite"} or {"event": "spike", "z": {...}}; None: no incident.

    recent: (loss, grad_norm) of the steps before it, without incidents. A spike is judged once there are
    train.spike_window of them, by the newest of these.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return {"event": "nonfinite"}
    if not train.spike_z or len(recent) < train.spike_window:
        return None
    recent = recent[-train.spike_window :]
    z = {
        "loss": robust_z(loss, [pair[0] for pair in recent]),
        "grad_norm": robust_z(grad_norm, [pair[1] for pair in recent]),
    }
    if max(z.values()) <= train.spike_z:
        return None
    return {"event": "spike", "z": {name: round(value, 2) for name, value in z.items()}}


def robust_z(value: float, past: list[float]) -> float:
    """(value - median) / (1.4826 x the median absolute deviation): standard deviations if values are normal.

    A few spikes among the past values move neither median, while they would move mean and deviation. Where
    nothing varied, a thousandth of the median replaces the deviation.
    """
    median = statistics.median(past)
    deviation = 1.4826 * statistics.median(abs(x - median) for x in past)
    return (value - median) / max(deviation, 1e-3 * abs(median), 1e-12)


# ---- responding to an incident ----------------------------------------------------------------------------


def respond(
    problem: dict, run: "Run", state: State, plan: Steps, loss: float, grad_norm: float
) -> tuple[State, Steps] | None:
    """Writes an incident down and does what train.on_incident says.

    Returns the state and plan to continue with, after a rollback or with rows deferred; or None where the
    step counts without an update (skip). Raises Stopped where the run ends. All processes call this together,
    with the same numbers; no weight has been touched, and no checkpoint is being saved.
    """
    cfg, world, step = run.cfg, run.world, state.step
    grad_norms = grad_norms_by_layer(bare(run.model))  # all processes together
    for optimizer in run.optimizers:
        optimizer.zero_grad()
    state.incidents += 1
    earlier = [c for c in world.first(run_folder.checkpoints, cfg.run) if c.step <= step]

    # Choose the action. If it is impossible, or there were too many incidents, the run stops.
    action = cfg.train.on_incident
    back, new_plan = remedy(action, run, step, plan, earlier)
    impossible = action in ("defer", "rollback") and new_plan is None
    if state.incidents > cfg.train.max_incidents or impossible:
        action = "stop"

    # Write the incident into the ledger.
    ranges = plan.batch(step)
    finite = {name: n if math.isfinite(n) else str(n) for name, n in grad_norms.items()}
    record = {
        **problem,
        "step": step,
        "number": state.incidents,
        "action": action,
        "loss": loss if math.isfinite(loss) else str(loss),
        "grad_norm": grad_norm if math.isfinite(grad_norm) else str(grad_norm),
        "norms": finite,
        "chunk": run.dataset.chunk_of(ranges[0][0]),
        "rows": [[first, end - 1] for first, end in ranges],
        "documents": documents(run.dataset, ranges) if world.rank == 0 else [],
        "checkpoint": earlier[-1].path.name if earlier else None,
        **({"back_to": back.path.name} if back and new_plan else {}),
        **({"order": new_plan.ranges} if new_plan else {}),
    }
    world.once(run_folder.log, cfg.run, record["event"], record)

    # Do it.
    if action == "stop":
        raise Stopped(why_stopped(record, cfg, newest(earlier, world)))
    where = ""
    if back:
        first = plan.consumed(first_skipped(back, step, cfg.train))
        where = f" to {back.path.name}, without the rows from {first} on"
    world.once(say, f"{action}{where}: {told(record)}")
    if action == "skip":
        state.skipped = [*state.skipped, *ranges]
        return None
    if action == "rollback":
        state = go_back(back, run, state)
    state.order = list(new_plan.ranges)
    return state, new_plan


def remedy(
    action: str, run: "Run", step: int, plan: Steps, earlier: list[Checkpoint]
) -> tuple[Checkpoint | None, Steps | None]:
    """(the checkpoint to go back to, the plan to continue with), each None where the action needs none."""
    train = run.cfg.train
    if action in ("stop", "skip"):
        return None, None
    if action == "defer":  # the rest of the chunk; a batch may begin in one chunk and end in the next
        ranges = plan.batch(step)
        chunk = run.dataset.chunk_of(ranges[0][0])
        last = max(chunk, run.dataset.chunk_of(ranges[-1][1] - 1))
        return None, deferred(plan, step, (run.chunks[chunk][0], run.chunks[last][1]))
    if action == "rollback":
        back = [earlier[0], *(c for c in earlier if c.step <= step - train.rollback_steps)][-1]
        first = first_skipped(back, step, train)
        rest = without(plan, first, min(first + train.rollback_skip, plan.n_steps))
        return back, rest if rest.n_steps > back.step else None
    raise config.unknown("train.on_incident", action)


def first_skipped(back: Checkpoint, step: int, train: Train) -> int:
    """The first of the train.rollback_skip steps whose rows a rollback leaves out: half are before `step`."""
    return max(back.step, step - train.rollback_skip // 2)


def go_back(back: Checkpoint, run: "Run", state: State) -> State:
    """Loads an earlier checkpoint, sets aside the later ones, and returns its state."""
    cfg, world, dataset = run.cfg, run.world, run.dataset
    checkpoint.load(back.path, run.model, run.optimizers, cfg.train.verify, world)
    integrity.check_state(back, cfg, dataset.manifest, dataset.sha256)
    # A damaged checkpoint has ended the run by now, and the later ones are still there.
    world.once(run_folder.set_aside, cfg.run, back.step, state.incidents)
    return dataclasses.replace(
        State.read(back.state), incidents=state.incidents, begin=state.begin, world_size=world.size
    )


def deferred(plan: Steps, step: int, chunk: tuple[int, int]) -> Steps | None:
    """The plan in which the rows of `chunk` that `step` and later steps would train on come last.

    None where a row of this step has been deferred already, or nothing else is left to train on.
    """
    reached = cut(plan.ranges, 0, plan.consumed(step) + plan.size(step))[1]
    if list(reached) != sorted(reached):
        return None

    # Among the rows that have not been consumed, those inside the chunk move to the end.
    before, after, _ = cut(plan.ranges, plan.consumed(step), plan.n_rows)
    rest, moved = [], []
    for first, end in after:
        inside = max(first, chunk[0]), min(end, chunk[1])
        if inside[0] >= inside[1]:
            rest.append((first, end))
            continue
        moved.append(inside)
        rest += [(a, b) for a, b in ((first, inside[0]), (inside[1], end)) if a < b]
    ranges = joined((*before, *rest, *moved))
    return None if ranges == joined(plan.ranges) else dataclasses.replace(plan, ranges=ranges)


def without(plan: Steps, first_step: int, end_step: int) -> Steps:
    """The plan without the rows of the steps first_step .. end_step - 1: no step trains on them."""
    first, end = plan.consumed(first_step), plan.consumed(end_step)
    before, _, after = cut(plan.ranges, first, min(end, plan.n_rows))
    return dataclasses.replace(plan, ranges=joined((*before, *after)))


# ---- telling people ---------------------------------------------------------------------------------------


def told(record: dict) -> str:
    """An incident in a sentence or two."""
    names, rows = record["documents"], ", ".join(f"{first} to {last}" for first, last in record["rows"])
    some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    why = ""
    if record["event"] == "spike":
        name = max(record["z"], key=record["z"].get)
        why = f" ({name} {record['z'][name]} deviations above the median)"
    return (
        f"loss {record['loss']} and gradient norm {record['grad_norm']}{why} in the step after step "
        f"{record['step']}: chunk {record['chunk']}, rows {rows}, {len(names)} documents: {some}"
    )


def why_stopped(record: dict, cfg: Config, newest: str) -> str:
    """The message of a run that an incident ended."""
    number, most = record["number"], cfg.train.max_incidents
    too_many = f" It is incident {number} of train.max_incidents={most}." if number > 1 else ""
    return (
        f"{told(record)} (all of them in {cfg.run}/ledger.jsonl).{too_many} "
        f"No weight was changed, and {newest}. "
        f"Its batch: python incidents.py {cfg.run} --replay {record['step']}. A lower "
        "optim.lr or a tighter optim.grad_clip, in a run of its own (--run=FOLDER), is the usual "
        "remedy; with train.on_incident=skip, defer or rollback a run continues by itself"
    )


def newest(found: list[Checkpoint], world: World) -> str:
    """Says whether the newest checkpoint is whole, by its files. All processes call this together."""
    if not found:
        return "there is no checkpoint yet"
    path = found[-1].path
    try:
        for kind in ("model", "optimizer"):
            with integrity.compared(path, kind, world=world):
                pass
    except ConfigError as error:
        return f"the newest checkpoint is not good: {error}"
    return f"the newest checkpoint, {path.name}, is whole"


def grad_norms_by_layer(model: nn.Module) -> dict[str, float]:
    """The gradient norm of each layer and of the other modules: {"embed_tokens": 0.3, "layers.0": 0.1}."""
    layers = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            parts = name.split(".")
            layer = ".".join(parts[:2]) if parts[0] == "layers" else parts[0]
            layers.setdefault(layer, []).append(p.grad)
    return {layer: optim.l2_norm(gradients).item() for layer, gradients in layers.items()}


def documents(dataset: Dataset, ranges: Iterable[tuple[int, int]]) -> list[str]:
    """The documents of the rows at ranges of positions: ["docs:a.txt", ...]."""
    found = set()
    for first, end in ranges:
        for position in range(first, end):
            found |= {(source, id) for source, id, *_ in dataset.documents(position)}
    return sorted(f"{source}:{id}" for source, id in found)


# ---- replaying a batch ------------------------------------------------------------------------------------


def replay(
    run: Path | str, step: int, at: int | None = None, verify: bool = True
) -> tuple[list[tuple], dict[str, float], int]:
    """The batch after step `step` on the weights of a checkpoint, by default the newest up to there.

    Returns (position, loss, documents) of each row, the gradient norm by layer, and the checkpoint's step.
    The weights are those of the checkpoint, not of the moment before the incident, so this shows whether the
    batch is bad by itself (PaLM, section 5.1: theirs were not).
    """
    cfg: Config = config.load_run(run)
    dataset = Dataset(cfg.dataset, verify)

    # Find the weights. Those before an incident may have been set aside by its rollback.
    if at is not None:
        c = run_folder.chosen(run, [at])[0]
    else:
        known = [c for c in run_folder.chosen(run) if c.step <= step]
        if not known:
            raise ConfigError(f"{run} has no checkpoint up to step {step}")
        c = known[-1]
    incident = [r for r in run_folder.ledger(run, *KINDS) if r["step"] == step]
    if incident and at is None:
        folder, name = Path(run) / "checkpoints", incident[-1]["checkpoint"]
        aside = folder / f"incident-{incident[-1]['number']}-{name}"
        c = run_folder.read(aside if aside.exists() else folder / name)

    # Find the rows: those of the incident, or of the plan.
    if incident:
        ranges = [(first, last + 1) for first, last in incident[-1]["rows"]]
    else:
        plan = steps.plan_of(cfg, dataset.n_rows, c.state.get("order"))
        if step >= plan.n_steps:
            raise ConfigError(f"{run} has {plan.n_steps} steps; there is no batch after step {step}")
        ranges = plan.batch(step)
    positions = [p for first, end in ranges for p in range(first, end)]

    # Compute one row at a time.
    model = checkpoint.load_model(c.path, verify=verify).requires_grad_(True)
    rows = []
    for position in positions:
        row = torch.from_numpy(dataset.rows(position, 1))
        loss = model(row[:, :-1], row[:, 1:]) / dataset.seq_len
        (loss / len(positions)).backward()
        rows.append((position, loss.item(), documents(dataset, [(position, position + 1)])))
    return rows, grad_norms_by_layer(model), c.step


def finite_or_least(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def show_incidents(run: Path | str) -> None:
    found = run_folder.ledger(run, *KINDS)
    for record in found:
        print(f"{record['event']}, {record.get('action', 'stop')}: {told(record)}")
        grad_norms = {name: float(n) for name, n in record.get("norms", {}).items()}  # or "nan"
        largest = sorted(grad_norms, key=lambda name: -finite_or_least(grad_norms[name]))[:3]
        if largest:
            print(f"  largest gradients: {', '.join(f'{name} {grad_norms[name]:.3g}' for name in largest)}")
    print(f"{len(found)} incident(s)" if found else "no incident")


def show_replay(run: Path | str, step: int, at: int | None, verify: bool) -> None:
    rows, grad_norms, at = replay(run, step, at, verify)
    print(f"the batch after step {step}, on the weights of step {at}; largest losses first")
    for position, loss, names in sorted(rows, key=lambda row: -finite_or_least(row[1])):
        some = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
        print(f"  row {position:>8}  loss {loss:8.4f}  {some}")
    for name, grad_norm in grad_norms.items():
        print(f"  gradient of {name:<16} {grad_norm:.4g}")


@configurator.script
def main() -> None:
    parser = configurator.parser(__doc__)
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--replay", type=int, metavar="STEP", help="show the batch after this step, by row")
    parser.add_argument(
        "--checkpoint", type=int, metavar="STEP", help="replay on these weights; default: the newest before"
    )
    configurator.add_no_verify(parser)
    args = parser.parse_args()
    config.load_run(args.run)
    if args.replay is None:
        show_incidents(args.run)
    else:
        show_replay(args.run, args.replay, args.checkpoint, args.verify)
    sys.exit(0)


if __name__ == "__main__":
    main()
