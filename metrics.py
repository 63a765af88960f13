"""The numbers of a step: timed, written to metrics.jsonl, printed. No torch.

    clock = Clock()
    rows = ...
    clock.done("data")
    ...
    clock.done("optimizer")
    clock.seconds     # {"data_seconds": 0.001, "optimizer_seconds": 0.2}
    clock.total       # 0.201

A number that train.py has among the `values` of a step reaches metrics.jsonl, the console and the page by
itself.
"""

import math
import time
from pathlib import Path

import files
from configurator import say


class Clock:
    """How long each part of a step takes, in seconds. A part begins where the one before it ends."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.began = self.last = time.perf_counter()

    def done(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[f"{part}_seconds"] = now - self.last
        self.last = now

    @property
    def total(self) -> float:
        return self.last - self.began


def record(run, state, plan, values: dict[str, float], clock: Clock) -> dict:
    """A line of metrics.jsonl: raw values, never smoothed; null where one is not finite.

    `values` are loss, grad_norm, lr and whatever else is to be logged; these are printed too.
    """
    n_tokens = plan.size(state.step - 1) * run.cfg.model.seq_len
    last_position = plan.batch(state.step - 1)[-1][1] - 1
    return {
        "step": state.step,
        **{name: value if math.isfinite(value) else None for name, value in values.items()},
        "tokens": state.tokens,
        "tokens_per_second": n_tokens / clock.total,
        "seconds": clock.total,
        **clock.seconds,
        "chunk": run.dataset.chunk_of(last_position),
        "time": time.time(),
    }


def write(run, record: dict, values: dict[str, float], last_step: int, seconds_left: float) -> None:
    """Appends the record to metrics.jsonl; prints it at the first, the last and every log_every-th step."""
    files.append(Path(run.cfg.run) / "metrics.jsonl", record, durable=False)  # a lost line is trained again
    if record["step"] % run.cfg.train.log_every == 0 or record["step"] in (1, last_step):
        say(line(record, values, last_step, seconds_left))


FORMATS = {
    "loss": "loss {:7.4f}",
    "grad_norm": "grad {:7.3f}",
    "lr": "lr {:.2e}",
}  # others: their name, 4 digits


def line(record: dict, values: dict[str, float], last_step: int, seconds_left: float) -> str:
    """One aligned line: step, the values of the step, tokens a second, chunk, estimated time left."""
    minutes, seconds = divmod(int(seconds_left), 60)
    shown = [FORMATS.get(name, name + " {:.4g}").format(value) for name, value in values.items()]
    return (
        f"step {record['step']:>{len(str(last_step))}}/{last_step}  {'  '.join(shown)}  "
        f"{record['tokens_per_second']:>9,.0f} tok/s  chunk {record['chunk']:>3}  "
        f"left {minutes // 60}:{minutes % 60:02}:{seconds:02}"
    )
