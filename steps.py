"""Which rows each step trains on, and after which steps a checkpoint is saved: pure functions.

    steps = Steps(order=((0, 9000),), batch_size=16)
    steps.pieces(3)                  # [(48, 64)]: step 3 trains on the rows 48 .. 63 of the dataset's order
    steps.deferred(3, (0, 750))      # the same run, if the rest of the chunk (0, 750) is left for the end

A run consumes rows in the dataset's order, but for what an incident changed (incidents.py): `order` is the
list of ranges of positions as they are consumed, (first, end) each. It is in every checkpoint's state.json,
so that batch(step) stays a pure function of what is on disk. No torch.
"""

import dataclasses
from dataclasses import dataclass

from config import Config

Order = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Steps:
    """The rows of every step, from 0: `order` is consumed from its start, size(step) rows at a time."""

    order: Order
    batch_size: int  # of the first step
    double_rows: int = 0  # the batch doubles after every so many rows; 0: never
    largest: int = 0  # and does not grow beyond this

    @property
    def n_rows(self) -> int:
        return sum(end - first for first, end in self.order)

    @property
    def n_steps(self) -> int:
        """Of whole batches; what is left at the end of the order is not consumed."""
        first_step, row, size = self.phase_of_row(self.n_rows)
        return first_step + (self.n_rows - row) // size

    @property
    def phases(self) -> list[tuple[int, int, int]]:
        """(first step, rows consumed before it, rows in a batch) of each batch size."""
        out = [(0, 0, self.batch_size)]
        while self.double_rows and out[-1][2] < self.largest:
            step, row, size = out[-1]
            more = -(-(len(out) * self.double_rows - row) // size)  # steps until so many rows have been seen
            out.append((step + more, row + more * size, 2 * size))
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
        """The number of finished steps when the first `row` rows of the order have been consumed."""
        first_step, before, size = self.phase_of_row(row)
        return first_step - (before - row) // size

    def pieces(self, step: int, share: slice = slice(None)) -> list[tuple[int, int]]:
        """Ranges of positions (first, end) that make up the batch of a step, or a share of its rows."""
        begin, size = self.consumed(step), self.size(step)
        first, end, _ = share.indices(size)
        return list(cut(self.order, begin + first, begin + end)[1])

    def chunk_ends(self, chunks: list[tuple[int, int]]) -> dict[int, int]:
        """By chunk, given as (first, end) positions: the rows consumed when its last one is.

        A chunk of which no row is left in the order is not in it.
        """
        ends, at = {}, 0
        for first, end in self.order:
            for i, (chunk_first, chunk_end) in enumerate(chunks):
                if first < chunk_end and chunk_first < end:
                    ends[i] = at + min(end, chunk_end) - first
            at += end - first
        return ends

    def chunk_steps(self, chunks: list[tuple[int, int]]) -> list[int]:
        """For each chunk that is in the order, the step that consumes its last row, ascending."""
        return [self.step_after(row) for row in sorted(self.chunk_ends(chunks).values())]

    def newest_chunk(self, chunks: list[tuple[int, int]], step: int) -> int:
        """The chunk whose last row was consumed latest, after `step` finished steps; -1 for none.

        The tail of the order, shorter than a batch, is not consumed (the ledger names it), so the last
        step uses up the last chunk.
        """
        rows = self.n_rows if step >= self.n_steps else self.consumed(step)
        ends = {end: chunk for chunk, end in self.chunk_ends(chunks).items() if end <= rows}
        return ends[max(ends)] if ends else -1

    def deferred(self, step: int, chunk: tuple[int, int]) -> "Steps | None":
        """The same, with the rows of `chunk` that `step` and later ones would train on at the end.

        None where a row of this step has been deferred already, or nothing else is left to train on.
        """
        reached = cut(self.order, 0, self.consumed(step) + self.size(step))[1]
        if list(reached) != sorted(reached):
            return None
        before, after, _ = cut(self.order, self.consumed(step), self.n_rows)
        rest, moved = [], []
        for first, end in after:
            inside = max(first, chunk[0]), min(end, chunk[1])
            if inside[0] >= inside[1]:
                rest.append((first, end))
                continue
            moved.append(inside)
            rest += [(a, b) for a, b in ((first, inside[0]), (inside[1], end)) if a < b]
        order = joined((*before, *rest, *moved))
        return None if order == joined(self.order) else dataclasses.replace(self, order=order)

    def without(self, first_step: int, end_step: int) -> "Steps":
        """The same without the positions of the steps first_step .. end_step - 1, which no step consumes."""
        first, end = self.consumed(first_step), self.consumed(end_step)
        before, _, after = cut(self.order, first, min(end, self.n_rows))
        return dataclasses.replace(self, order=joined((*before, *after)))


def trained_ranges(state: dict) -> Order:
    """The positions that a checkpoint has been trained on, by its state.json, as ascending ranges."""
    ranges = cut(state.get("order") or [(0, state["rows"])], 0, state["rows"])[1]
    for first, end in state.get("skipped", []):  # batches that were consumed and moved nothing
        sides = [side for a, b in ranges for side in ((a, min(b, first)), (max(a, end), b))]
        ranges = [(a, b) for a, b in sides if a < b]
    return joined(sorted(ranges))


def trained(state: dict, positions):
    """Which positions (an array) of the order a checkpoint has been trained on.

    This is about positions: the text of a position that is not among them can still have been trained on,
    at another one. seen.py asks for the text.
    """
    out = positions < 0
    for first, end in trained_ranges(state):
        out = out | (first <= positions) & (positions < end)
    return out


def cut(order: Order, first: int, end: int) -> tuple[Order, Order, Order]:
    """The order in three parts: before its row number `first`, from there to before `end`, and after."""
    parts, at = ([], [], []), 0
    for a, b in order:
        marks = [a, *(min(max(a + mark - at, a), b) for mark in (first, end)), b]
        for part, low, high in zip(parts, marks, marks[1:]):
            if low < high:
                part.append((low, high))
        at += b - a
    return tuple(tuple(part) for part in parts)


def joined(ranges: Order) -> Order:
    """Ranges that follow one another as one."""
    out = []
    for first, end in ranges:
        if out and out[-1][1] == first:
            first = out.pop()[0]
        out.append((first, end))
    return tuple(out)


def of(cfg: Config, n_rows: int, order: Order | None = None) -> Steps:
    """The steps of a config over a dataset of n_rows, in a checkpoint's order, or the dataset's own."""
    order = tuple(map(tuple, order)) if order else ((0, n_rows),)
    t = cfg.train
    return Steps(order, t.batch_size, -(-t.batch_double_tokens // cfg.model.seq_len), t.batch_size_max)


def schedule_length(cfg: Config, n_steps: int) -> int:
    """Length of the learning-rate schedule, in steps or in tokens; n_steps: those that the data has."""
    return cfg.optim.schedule_tokens or cfg.optim.schedule_steps or n_steps


def schedule_position(cfg: Config, steps: Steps, step: int) -> int:
    """How far in its schedule the learning rate is after `step` finished steps, in steps or in tokens."""
    return steps.consumed(step) * cfg.model.seq_len if cfg.optim.schedule_tokens else step


def checkpoint_steps(cfg: Config, steps: Steps, chunks: list[tuple[int, int]], last_step: int) -> list[int]:
    """Steps after which train.py saves a checkpoint: 0, the last, those that end a chunk, those asked for."""
    every = set(range(0, last_step, cfg.train.checkpoint_every)) if cfg.train.checkpoint_every else set()
    return sorted(every | kept_steps(cfg, steps, chunks, last_step))


def kept_steps(cfg: Config, steps: Steps, chunks: list[tuple[int, int]], last_step: int) -> set[int]:
    """Those of them that train.keep_others never deletes."""
    kept = {0, last_step}
    if cfg.train.checkpoint_chunks:
        kept |= set(steps.chunk_steps(chunks))
    if cfg.train.checkpoint_powers_of_two:
        kept |= {2**i for i in range(last_step.bit_length())}
    return {step for step in kept if step <= last_step}


def kept_after(
    saved: list[int], kept: set[int], keep_others: int, rollback_steps: int | None = None
) -> list[int]:
    """Which of the checkpoints on disk, ascending steps, train.keep_others leaves after the newest is saved.

    Those in `kept` always stay. Of the others the newest `keep_others` stay; 0: all. With rollback_steps, the
    newest checkpoint that is at least so many steps older than the last one stays too: a rollback needs it.
    """
    if not keep_others:
        return saved
    stay = set(kept)
    if rollback_steps is not None:
        stay.update([step for step in saved if step <= saved[-1] - rollback_steps][-1:])
    others = [step for step in saved if step not in stay]
    stay.update(others[-keep_others:])
    return [step for step in saved if step in stay]
