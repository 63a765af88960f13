"""The plan of a run and where the run is in it: pure functions of a config and of state.json.

    plan = Steps(ranges=((0, 9000),), batch_size=16)
    plan.batch(3)                  # [(48, 64)]: step 3 trains on positions 48 .. 63 of the dataset's order
    plan.steps_of(50)              # [3]: and this is the step that trains on position 50

A run consumes rows in the dataset's order, except for what an incident changed (incidents.py). `ranges` are
the (first, end) pairs of positions in the order in which they are consumed. They are in the state.json of
every checkpoint, so batch(step) stays a pure function of what is on disk, on any number of processes.

Steps count from 0 here: batch(s) is what the update after s finished steps sees. No torch is imported.
"""

import dataclasses
from dataclasses import dataclass, field

from config import Config

Ranges = tuple[tuple[int, int], ...]  # (first, end) pairs of positions, end exclusive


# ---- which rows each step trains on -----------------------------------------------------------------------


@dataclass(frozen=True)
class Steps:
    """The rows of every step: `ranges` are consumed from their start, size(step) rows at a time."""

    ranges: Ranges
    batch_size: int  # rows in the first batch
    double_rows: int = 0  # the batch doubles each time this many rows have been consumed; 0: never
    largest: int = 0  # rows of the largest batch
    stop: int = 0  # train.steps or annealing end the run after this many steps; 0: the data end it

    @property
    def n_rows(self) -> int:
        return sum(end - first for first, end in self.ranges)

    @property
    def n_steps(self) -> int:
        """Number of whole batches. A rest at the end that is smaller than a batch is not consumed."""
        first_step, row, size = self.phase_of_row(self.n_rows)
        return first_step + (self.n_rows - row) // size

    @property
    def last_step(self) -> int:
        return min(self.n_steps, self.stop or self.n_steps)

    @property
    def phases(self) -> list[tuple[int, int, int]]:
        """(first step, rows consumed before it, rows in a batch) of each batch size."""
        out = [(0, 0, self.batch_size)]
        while self.double_rows and out[-1][2] < self.largest:
            step, row, size = out[-1]
            steps_left = ceil_div(len(out) * self.double_rows - row, size)  # until the next doubling
            out.append((step + steps_left, row + steps_left * size, 2 * size))
        return out

    def phase_of_row(self, row: int) -> tuple[int, int, int]:
        return [phase for phase in self.phases if phase[1] <= row][-1]

    def phase(self, step: int) -> tuple[int, int, int]:
        return [phase for phase in self.phases if phase[0] <= step][-1]

    def size(self, step: int) -> int:
        """Rows in the batch of this step."""
        return self.phase(step)[2]

    def consumed(self, step: int) -> int:
        """Rows consumed by `step` finished steps."""
        first_step, row, size = self.phase(step)
        return row + (step - first_step) * size

    def step_after(self, row: int) -> int:
        """The number of finished steps when the first `row` rows of the ranges have been consumed."""
        first_step, before, size = self.phase_of_row(row)
        return first_step + ceil_div(row - before, size)

    def batch(self, step: int, share: slice = slice(None)) -> list[tuple[int, int]]:
        """The ranges of positions that step `step` trains on, or those of a share of the batch's rows."""
        begin, size = self.consumed(step), self.size(step)
        first, end, _ = share.indices(size)
        return list(cut(self.ranges, begin + first, begin + end)[1])

    def steps_of(self, position: int, skipped: Ranges = ()) -> list[int]:
        """The step that trains on a position, as `batch` counts them; [] if none does.

        No step does if the position was left out, comes after the last step, or is in `skipped`: the batches
        whose update was skipped, which are in state.json.
        """
        # Find the range that holds the position, and the step that consumes that row of the plan.
        before = 0  # rows consumed before the range at hand
        for first, end in self.ranges:
            if first <= position < end:
                step = self.step_after(before + position - first + 1) - 1
                is_skipped = any(a <= position < b for a, b in skipped)
                return [step] if step < self.last_step and not is_skipped else []
            before += end - first
        return []

    # ---- chunks: a checkpoint is taken when the last row of one has been consumed -------------------------

    def chunk_ends(self, chunks: list[tuple[int, int]]) -> dict[int, int]:
        """For each chunk, given as (first, end) positions: the rows consumed when its last one is.

        A chunk of which no row is left in the ranges is not in it. One in several ranges ends with its last.
        """
        ends, consumed = {}, 0
        for first, end in self.ranges:
            for i, (chunk_first, chunk_end) in enumerate(chunks):
                if first < chunk_end and chunk_first < end:
                    ends[i] = consumed + min(end, chunk_end) - first
            consumed += end - first
        return ends

    def chunk_steps(self, chunks: list[tuple[int, int]]) -> list[int]:
        """For each chunk that is in the ranges: the steps finished when its last row is consumed.

        A step beyond last_step is that of a rest at the end, which is smaller than a batch.
        """
        return [self.step_after(row) for row in sorted(self.chunk_ends(chunks).values())]

    def newest_chunk(self, chunks: list[tuple[int, int]], step: int) -> int:
        """The chunk whose last row was consumed latest, after `step` finished steps; -1 if there is none.

        At the end of the data all chunks count as consumed, although a rest smaller than a batch never is.
        """
        rows = self.n_rows if step >= self.n_steps else self.consumed(step)
        ends = {end: chunk for chunk, end in self.chunk_ends(chunks).items() if end <= rows}
        return ends[max(ends)] if ends else -1


def plan_of(cfg: Config, n_rows: int, ranges: object = None, begin: int = 0) -> Steps:
    """The plan of a config over a dataset of n_rows; with the ranges of a state.json, or the whole dataset.

    begin: the step at which annealing began.
    """
    ranges = tuple((first, end) for first, end in ranges) if ranges else ((0, n_rows),)
    double_rows = ceil_div(cfg.train.batch_double_tokens, cfg.model.seq_len)
    stop = cfg.train.steps
    if cfg.optim.anneal_steps:
        end = begin + cfg.optim.anneal_steps
        stop = min(stop or end, end)
    return Steps(ranges, cfg.train.batch_size, double_rows, cfg.train.batch_size_max, stop)


def cut(ranges: Ranges, first: int, end: int) -> tuple[Ranges, Ranges, Ranges]:
    """Ranges in three parts: before row number `first` of them, from there to before `end`, and after it.

    cut(((20, 30), (0, 5)), 8, 12) -> ((20, 28),), ((28, 30), (0, 2)), ((2, 5),)
    """
    before, inside, after = [], [], []
    done = 0  # rows in the ranges before the one at hand
    for a, b in ranges:
        low = min(max(a + first - done, a), b)  # where this range is cut, or one of its ends
        high = min(max(a + end - done, a), b)
        before += [(a, low)] if a < low else []
        inside += [(low, high)] if low < high else []
        after += [(high, b)] if high < b else []
        done += b - a
    return tuple(before), tuple(inside), tuple(after)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


# ---- where a run is ---------------------------------------------------------------------------------------


@dataclass
class State:
    """Where a run is: the fields of state.json. Saving writes it, resuming reads it."""

    format: int = 1  # the file's format; run_folder.py refuses any other
    step: int = 0  # finished updates
    begin: int = 0  # the step at which this run began: 0, or that of the checkpoint it anneals from
    rows: int = 0  # rows of the plan that have been consumed
    skipped: list = field(default_factory=list)  # ranges of consumed rows whose update was skipped
    tokens: int = 0  # target tokens of the consumed rows
    chunk: int = -1  # the chunk completed last; -1: none yet
    eot: int | None = None  # id of the end-of-text token
    dataset_sha256: str = ""
    tokenizer_sha256: str = ""
    world_size: int = 1  # processes that wrote the checkpoint
    order: list = field(default_factory=list)  # the plan's `ranges`, under their name on disk
    incidents: int = 0  # incidents so far
    recent: list = field(default_factory=list)  # (loss, grad_norm) of the last steps, if spikes are judged
    time: float = 0.0  # when it was written, Unix seconds
    files: dict = field(default_factory=dict)  # SHA-256 of every other file of the checkpoint

    @classmethod
    def read(cls, state: dict) -> "State":
        """The state in a state.json whose fields run_folder.py has checked."""
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in state.items() if name in known})

    def advance(self, plan: Steps, cfg: Config, chunks: list[tuple[int, int]]) -> None:
        """Counts one finished step."""
        self.step += 1
        self.rows = plan.consumed(self.step)
        self.tokens = self.rows * cfg.model.seq_len
        self.chunk = plan.newest_chunk(chunks, self.step)

    def remember(self, loss: float, grad_norm: float, cfg: Config) -> None:
        """Keeps the loss and gradient norm by which the next steps are judged, if spikes are judged."""
        if cfg.train.spike_z:
            self.recent = [*self.recent, (loss, grad_norm)][-cfg.train.spike_window :]


# ---- schedules and checkpoints ----------------------------------------------------------------------------


def schedule_length(cfg: Config, n_steps: int) -> int:
    """Length of the learning-rate schedule, in steps or in tokens. n_steps: those that all the data have."""
    return cfg.optim.schedule_tokens or cfg.optim.schedule_steps or n_steps


def schedule_position(cfg: Config, plan: Steps, step: int) -> int:
    """The position of the learning rate in its schedule after `step` finished steps, in steps or tokens."""
    return plan.consumed(step) * cfg.model.seq_len if cfg.optim.schedule_tokens else step


def checkpoint_steps(cfg: Config, plan: Steps, chunks: list[tuple[int, int]]) -> list[int]:
    """Steps after which a checkpoint is saved: those that are kept, and every train.checkpoint_every."""
    every = cfg.train.checkpoint_every
    others = set(range(0, plan.last_step, every)) if every else set()
    return sorted(others | kept_steps(cfg, plan, chunks, 0))


def kept_steps(cfg: Config, plan: Steps, chunks: list[tuple[int, int]], begin: int) -> set[int]:
    """Steps whose checkpoints train.keep_others never deletes: first, last, chunks' ends, powers of two."""
    kept = {0, begin, plan.last_step}
    if cfg.train.checkpoint_chunks:
        kept |= set(plan.chunk_steps(chunks))
    if cfg.train.checkpoint_powers_of_two:
        kept |= {2**i for i in range(plan.last_step.bit_length())}
    return {step for step in kept if step <= plan.last_step}
