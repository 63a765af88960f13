"""Incidents: a loss or gradient that is not finite, or far above what it was. Found, recorded, replayed.

    python incidents.py runs/demo                             # what happened in a run
    python incidents.py runs/demo --replay 137                # the batch of that incident, alone, row by row
    python incidents.py runs/demo --replay 137 --checkpoint 120

train.py asks `judge` after every backward, before the optimizer is touched, on all processes alike, and does
what train.on_spike says. Reads the run folder and its dataset; writes nothing.

A batch that is skipped, or left out after a rollback, moves no weight. The model can learn from its documents
all the same: other rows hold the rest of them, and other passes, repeats or sources can hold the same text.
Dataset.positions(source, id) lists every position of a document.
"""

if __name__ == "__main__":  # before torch, which takes seconds to import
    import configurator

    configurator.quiet_imports()

import argparse
import math
import statistics
import sys
from collections.abc import Collection, Iterable
from pathlib import Path

import config
import configurator
import files
import run_folder
import steps
from config import Config, ConfigError, Train
from dataset import Dataset

KINDS = ("nonfinite", "spike")  # events of the ledger


def judge(loss: float, norm: float, recent: Collection[tuple[float, float]], train: Train) -> dict | None:
    """What is wrong with a step: {"event": "nonfinite"} or {"event": "spike", "z": {...}}; None: nothing.

    `recent`: loss and gradient norm of the steps before it, incidents left out, at most train.spike_window. A
    spike is judged when there are so many.
    """
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return {"event": "nonfinite"}
    if not train.spike_z or len(recent) < train.spike_window:
        return None
    past = {"loss": [pair[0] for pair in recent], "grad_norm": [pair[1] for pair in recent]}
    scores = {name: robust_z(value, past[name]) for name, value in (("loss", loss), ("grad_norm", norm))}
    if max(scores.values()) <= train.spike_z:
        return None
    return {"event": "spike", "z": {name: round(z, 2) for name, z in scores.items()}}


def robust_z(value: float, past: list[float]) -> float:
    """(value - median) / (1.4826 x the median absolute deviation): deviations, where values are normal.

    Neither median is moved by a few spikes in the window, as mean and deviation are. Where nothing varied, a
    thousandth of the median stands for the deviation.
    """
    median = statistics.median(past)
    deviation = 1.4826 * statistics.median(abs(x - median) for x in past)
    return (value - median) / max(deviation, 1e-3 * abs(median), 1e-12)


def documents(dataset: Dataset, pieces: Iterable[tuple[int, int]]) -> list[str]:
    """The documents of rows, given as ranges of positions: ["docs:a.txt", ...]."""
    found = {(d[0], d[1]) for first, end in pieces for p in range(first, end) for d in dataset.documents(p)}
    return sorted(f"{source}:{name}" for source, name in found)


def told(record: dict) -> str:
    """An incident in a sentence or two, for people."""
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


def of_run(run: Path | str) -> list[dict]:
    return [r for r in files.read_lines(Path(run) / "ledger.jsonl") if r.get("event") in KINDS]


# ---- replaying --------------------------------------------------------------------------------------------


def replay(
    run: Path | str, step: int, at: int | None = None, verify: bool = True
) -> tuple[list[tuple], dict[str, float], int]:
    """The batch after step `step` on the weights of a checkpoint, by default the newest up to there.

    Returns (position, loss, documents) of each row, the gradient's norm by layer, and the checkpoint's step.
    The weights are those of the checkpoint, not of the moments before the incident: what is seen is whether
    the batch is bad by itself (PaLM, section 5.1: theirs were not).
    """
    import torch

    import checkpoint
    import optim

    cfg: Config = config.load_run(run)
    dataset = Dataset(cfg.dataset, verify)
    known = [
        c for c in run_folder.chosen(run, [] if at is None else [at]) if at is not None or c.step <= step
    ]
    if not known:
        raise ConfigError(f"{run} has no checkpoint up to step {step}")
    c = known[-1]
    incident = [r for r in of_run(run) if r["step"] == step]
    if incident and at is None:  # the weights before the last incident there; a rollback has moved them aside
        folder = Path(run) / "checkpoints"
        aside = folder / f"incident-{incident[-1]['number']}-{incident[-1]['checkpoint']}"
        c = run_folder.read(aside if aside.exists() else folder / incident[-1]["checkpoint"])
    if incident:
        pieces = [(first, last + 1) for first, last in incident[-1]["rows"]]
    else:
        plan = steps.of(cfg, dataset.n_rows, c.state.get("order"))
        if step >= plan.n_steps:
            raise ConfigError(f"{run} has {plan.n_steps} steps; there is no batch after step {step}")
        pieces = plan.pieces(step)
    positions = [p for first, end in pieces for p in range(first, end)]
    model = checkpoint.load_model(c.path, verify=verify).requires_grad_(True)
    rows = []
    for position in positions:
        row = torch.from_numpy(dataset.rows(position, 1))
        loss = model(row[:, :-1], row[:, 1:]) / dataset.seq_len
        (loss / len(positions)).backward()
        rows.append((position, loss.item(), documents(dataset, [(position, position + 1)])))
    return rows, optim.grad_norms_by_layer(model), c.step


@configurator.script
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--replay", type=int, metavar="STEP", help="the batch after this step, row by row")
    parser.add_argument(
        "--checkpoint", type=int, metavar="STEP", help="on these weights; default: the newest before"
    )
    configurator.add_no_verify(parser)
    args = parser.parse_args()
    config.load_run(args.run)
    if args.replay is None:
        found = of_run(args.run)
        for record in found:
            print(f"{record['event']}, {record.get('action', 'stop')}: {told(record)}")
            norms = {name: float(norm) for name, norm in record.get("norms", {}).items()}  # or "nan"
            largest = sorted(
                norms, key=lambda name: -norms[name] if math.isfinite(norms[name]) else -math.inf
            )
            if norms:
                shown = ", ".join(f"{name} {norms[name]:.3g}" for name in largest[:3])
                print(f"  largest gradients: {shown}")
        print(f"{len(found)} incident(s)" if found else "no incident")
        sys.exit(0)
    rows, norms, at = replay(args.run, args.replay, args.checkpoint, args.verify)
    print(f"the batch after step {args.replay}, on the weights of step {at}; largest losses first")
    for position, loss, names in sorted(
        rows, key=lambda row: -row[1] if math.isfinite(row[1]) else -math.inf
    ):
        print(f"  row {position:>8}  loss {loss:8.4f}  {', '.join(names[:3])}" + ", ..." * (len(names) > 3))
    for name, norm in norms.items():
        print(f"  gradient of {name:<16} {norm:.4g}")


if __name__ == "__main__":
    main()
