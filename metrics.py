"""The numbers of a step: timed, written to metrics.jsonl, printed. No torch.

    log = Log(run, profile=False)
    clock = Clock()                       # at the start of a step
    rows = ...
    clock.done("data")                    # at the end of each of its parts
    values = {"loss": 2.3, "grad_norm": 0.7, "lr": 1e-3}
    log.write(state, plan, values, clock, joules, skipped=False)

A number that train.py has among the values of a step reaches metrics.jsonl, the console and the page by
itself.
"""

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import files
import hardware
from configurator import say

if TYPE_CHECKING:
    from steps import State, Steps
    from train import Run


class Clock:
    """Measures how long each part of a step takes, in seconds. A part begins where the last one ended."""

    def __init__(self):
        self.seconds: dict[str, float] = {}  # {"data_seconds": 0.001, ...}
        self.began = self.last = time.perf_counter()

    def done(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[f"{part}_seconds"] = now - self.last
        self.last = now

    @property
    def total(self) -> float:
        return self.last - self.began


class Log:
    """Writes a line about each step of a run. `run` is train.Run."""

    def __init__(self, run: "Run", profile: bool):
        self.run, self.cfg, self.world = run, run.cfg, run.world
        self.meter = hardware.Meter(run.cfg, run.world)
        self.profiler = hardware.Profiler(run.cfg.run if profile else None, run.world)
        self.began, self.n_done = time.perf_counter(), 0  # steps of this process

    def joules(self) -> float:
        """Energy that this process's GPU drew since the last call; to be summed over all processes."""
        return self.meter.joules()

    def write(
        self, state: "State", plan: "Steps", values: dict, clock: Clock, joules: float, skipped: bool
    ) -> None:
        """A line of metrics.jsonl; and one on the console at step 1, every train.log_every and at the end."""
        # The record, for metrics.jsonl.
        self.n_done += 1
        line = record(self.run, state, plan, values, clock)
        line |= self.meter.columns(line["tokens_per_second"], joules)
        if skipped:
            line["skipped"] = True
        durable = False  # a line that a crash loses is trained again
        self.world.only_first(files.append, Path(self.cfg.run) / "metrics.jsonl", line, durable)

        # The line on the console.
        if state.step % self.cfg.train.log_every == 0 or state.step in (1, plan.last_step):
            seconds = time.perf_counter() - self.began
            seconds_left = (plan.last_step - state.step) * seconds / self.n_done
            self.world.only_first(say, printed(line, values, plan.last_step, seconds_left))
        self.profiler.step(self.n_done, state.step == plan.last_step)

    def totals(self) -> dict:
        """Seconds and energy of this process's steps."""
        return {"seconds": time.perf_counter() - self.began, **self.meter.totals()}


def record(run: "Run", state: "State", plan: "Steps", values: dict[str, float], clock: Clock) -> dict:
    """The step just finished, as raw values, never smoothed; null where one is not finite."""
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


# How values are printed; any other one is printed as its name and four digits.
FORMATS = {"loss": "loss {:7.4f}", "grad_norm": "grad {:7.3f}", "lr": "lr {:.2e}"}


def printed(line: dict, values: dict[str, float], last_step: int, seconds_left: float) -> str:
    """One aligned line: step, the values of the step, tokens a second, chunk, estimated time left."""
    minutes, seconds = divmod(int(seconds_left), 60)
    shown = [FORMATS.get(name, name + " {:.4g}").format(value) for name, value in values.items()]
    return (
        f"step {line['step']:>{len(str(last_step))}}/{last_step}  {'  '.join(shown)}  "
        f"{line['tokens_per_second']:>9,.0f} tok/s  chunk {line['chunk']:>3}  "
        f"left {minutes // 60}:{minutes % 60:02}:{seconds:02}"
    )
