"""steps.py against a list of rows that is consumed one by one, and against published batch sizes by hand."""

import dataclasses
import itertools
import random

import pytest

import incidents
import run_folder
import steps
from config import Config, Eval, Model, Optim, Train
from steps import Steps


def rows(plan: Steps) -> list[int]:
    """Every row, in the order of training."""
    return [row for first, end in plan.ranges for row in range(first, end)]


def played(plan: Steps) -> list[list[int]]:
    """The rows of every step, by walking: a batch doubles as soon as that number of rows has been seen."""
    left, batches, seen, size, doublings = rows(plan), [], 0, plan.batch_size, 0
    while True:
        while plan.double_rows and size < plan.largest and seen >= (doublings + 1) * plan.double_rows:
            size, doublings = 2 * size, doublings + 1
        if len(left) < size:
            return batches
        batches.append(left[:size])
        left, seen = left[size:], seen + size


def check(plan: Steps) -> None:
    """Everything that Steps says of itself is what `played` does."""
    batches = played(plan)
    assert plan.n_steps == len(batches)
    assert plan.n_rows == len(rows(plan))
    assert all(first < end for first, end in plan.ranges)
    consumed, step_of = 0, []
    for step, batch in enumerate(batches):
        assert plan.consumed(step) == consumed
        assert plan.size(step) == len(batch)
        assert [row for first, end in plan.batch(step) for row in range(first, end)] == batch
        step_of += [step + 1] * len(batch)
        consumed += len(batch)
    assert plan.consumed(len(batches)) == consumed
    assert [plan.step_after(n) for n in range(consumed + 1)] == [0, *step_of]


def some_plan(dice: random.Random) -> Steps:
    """Ranges in any order, with holes between them, and batches that double or do not."""
    marks = sorted(dice.sample(range(200), 2 * dice.randint(1, 4)))
    ranges = list(zip(marks[::2], marks[1::2]))
    dice.shuffle(ranges)
    batch_size = dice.randint(1, 7)
    if dice.random() < 0.5:
        return Steps(tuple(ranges), batch_size)
    return Steps(tuple(ranges), batch_size, dice.randint(1, 40), batch_size * 2 ** dice.randint(1, 3))


def some_chunks(dice: random.Random) -> list[tuple[int, int]]:
    """All positions, cut into chunks."""
    marks = [0, *sorted(dice.sample(range(1, 200), 5)), 200]
    return list(itertools.pairwise(marks))


@pytest.mark.parametrize("seed", range(40))
def test_steps_are_rows_consumed_one_by_one(seed):
    check(some_plan(random.Random(seed)))


def test_a_batch_that_doubles_by_hand():
    plan = Steps(((0, 100),), batch_size=4, double_rows=10, largest=16)
    # 4, 4, 4: 12 rows, more than 10; 8: 20 rows; 16: 36, 52, 68, 84; the 16 rows left are one more
    assert [plan.size(step) for step in range(plan.n_steps)] == [4, 4, 4, 8, 16, 16, 16, 16, 16]
    assert plan.batch(3) == [(12, 20)]
    assert plan.consumed(plan.n_steps) == 100
    # a batch larger than the interval takes both doublings at once
    assert [Steps(((0, 100),), 10, 4, 40).size(step) for step in range(3)] == [10, 40, 40]


def test_the_batches_of_olmo_65b():
    """From 1,024 rows to 8,192, doubling every 100 B tokens, of 2,048 a row: 48,828,125 rows."""
    model = Model(seq_len=2048, n_heads=2, d_model=8)
    train = Train(batch_size=1024, batch_double_tokens=100_000_000_000, batch_size_max=8192)
    plan = steps.plan_of(Config(model=model, train=train), n_rows=1_000_000_000)
    assert plan == Steps(((0, 1_000_000_000),), 1024, 48_828_125, 8192)
    # 48,828,125 / 1,024 = 47,683.7; then 97,656,250 - 48,828,416 = 48,827,834 rows, / 2,048 = 23,841.7;
    # then 146,484,375 - 97,656,832 = 48,827,543 rows, / 4,096 = 11,920.8
    assert plan.phases == [
        (0, 0, 1024),
        (47_684, 47_684 * 1024, 2048),
        (47_684 + 23_842, 48_828_416 + 23_842 * 2048, 4096),
        (71_526 + 11_921, 97_656_832 + 11_921 * 4096, 8192),
    ]
    assert plan.n_steps == 83_447 + (1_000_000_000 - 146_485_248) // 8192
    assert plan.batch(47_683) == [(48_828_416 - 1024, 48_828_416)]
    assert plan.batch(47_684) == [(48_828_416, 48_828_416 + 2048)]
    # a run that ends before the first doubling has batches of one size
    assert steps.plan_of(Config(model=model, train=train), n_rows=10_240).n_steps == 10


def test_an_order_from_json_is_an_order():
    cfg = Config(model=Model(seq_len=16, n_heads=2, d_model=8), train=Train(batch_size=3))
    assert steps.plan_of(cfg, 20, [[5, 9], [0, 5]]) == Steps(((5, 9), (0, 5)), 3)
    assert steps.plan_of(cfg, 20) == steps.plan_of(cfg, 20, []) == Steps(((0, 20),), 3)


@pytest.mark.parametrize("seed", range(20))
def test_shares_of_a_batch_put_together_are_the_batch(seed):
    dice = random.Random(seed)
    plan = some_plan(dice)
    plan = dataclasses.replace(plan, batch_size=6 * plan.batch_size, largest=6 * plan.largest)
    for step in range(plan.n_steps):
        for processes in (1, 2, 3, 6):
            each, together = plan.size(step) // processes, []
            for rank in range(processes):
                pieces = plan.batch(step, slice(rank * each, (rank + 1) * each))
                assert sum(end - first for first, end in pieces) == each
                together += [row for first, end in pieces for row in range(first, end)]
            assert together == played(plan)[step]


@pytest.mark.parametrize("seed", range(40))
def test_a_chunk_ends_with_the_step_that_consumes_its_last_row(seed):
    dice = random.Random(seed)
    plan, chunks = some_plan(dice), some_chunks(dice)
    order, ends = rows(plan), {}
    for chunk, (first, end) in enumerate(chunks):
        seen = [n for n, row in enumerate(order, start=1) if first <= row < end]
        if seen:
            ends[chunk] = seen[-1]
    assert plan.chunk_ends(chunks) == ends
    # rows too few for a last batch are never consumed: the steps that would consume them are beyond the last
    batches, expected = played(plan), []
    for n in ends.values():
        expected += [step for step, batch in enumerate(batches, start=1) if order[n - 1] in batch]
    assert [step for step in plan.chunk_steps(chunks) if step <= plan.n_steps] == sorted(expected)
    for step in range(plan.n_steps):
        done = sum(map(len, batches[:step]))
        whole = [chunk for chunk in ends if ends[chunk] <= done]
        assert plan.newest_chunk(chunks, step) == max(whole, key=ends.get, default=-1)
    assert plan.newest_chunk(chunks, plan.n_steps) == max(ends, key=ends.get)


@pytest.mark.parametrize("seed", range(80))
def test_operations_one_after_another_do_to_ranges_what_they_do_to_rows(seed):
    dice = random.Random(seed)
    plan, chunks = some_plan(dice), some_chunks(dice)
    plan = dataclasses.replace(plan, ranges=tuple(sorted(plan.ranges)))  # of which no row has been deferred
    for _ in range(6):
        if not plan.n_steps:
            break
        step = dice.randint(0, plan.n_steps - 1)
        batches, order = played(plan), rows(plan)
        done = sum(map(len, batches[:step]))
        if dice.random() < 0.6:
            first, end = dice.choice(chunks)
            later = [row for row in order[done:] if not first <= row < end]
            moved = [row for row in order[done:] if first <= row < end]
            reached = order[: done + len(batches[step])]
            changed = incidents.deferred(plan, step, (first, end))
            if reached != sorted(reached) or order[done:] == later + moved:  # nothing would change
                assert changed is None
                continue
            assert rows(changed) == order[:done] + later + moved
        else:
            end_step = step + dice.randint(1, 3)
            # steps beyond the last would have taken all that is left
            stop = sum(map(len, batches[:end_step])) if end_step <= len(batches) else len(order)
            changed = incidents.without(plan, step, end_step)
            assert rows(changed) == order[:done] + order[stop:]
        # what has been trained on stays what it was
        assert played(changed)[:step] == batches[:step]
        assert (changed.batch_size, changed.double_rows) == (plan.batch_size, plan.double_rows)
        plan = changed
        check(plan)


def test_a_deferred_chunk_by_hand():
    plan = Steps(((0, 30),), batch_size=4)
    later = incidents.deferred(
        plan, 3, (8, 20)
    )  # at step 3, 12 rows are consumed; 12 ... 19 are left of the chunk
    assert later.ranges == ((0, 12), (20, 30), (12, 20))
    assert later.batch(5) == [(28, 30), (12, 14)]
    assert later.chunk_steps([(0, 8), (8, 20), (20, 30)]) == [2, 6, 8]  # after 8, 22 and 30 rows, of 4 a step
    assert later.newest_chunk([(0, 8), (8, 20), (20, 30)], 6) == 2
    assert later.newest_chunk([(0, 8), (8, 20), (20, 30)], 5) == 0
    assert later.newest_chunk([(0, 8), (8, 20), (20, 30)], 7) == 1  # the end of training uses up what is left
    assert (
        incidents.deferred(later, 5, (8, 20)) is None
    )  # the rows 12, 13 of this step have been deferred once
    assert incidents.deferred(plan, 3, (12, 30)) is None  # nothing else is left
    assert incidents.deferred(plan, 3, (0, 12)) is None  # nothing of it is left


def test_steps_left_out_by_hand():
    plan = incidents.without(Steps(((0, 30),), batch_size=4), 2, 4)
    assert plan.ranges == ((0, 8), (16, 30))
    assert plan.n_steps == 5  # 22 rows
    assert plan.batch(2) == [(16, 20)]
    assert incidents.without(plan, 4, 9).ranges == (
        (0, 8),
        (16, 24),
    )  # up to the end, where there are fewer steps than that
    # of the chunk (8, 16) nothing is left: it has no step
    assert plan.chunk_steps([(0, 8), (8, 16), (16, 30)]) == [2, 6]


def config_with(**train) -> Config:
    return Config(
        model=Model(seq_len=16, n_heads=2, d_model=8),
        train=Train(batch_size=4, **train),
        eval=Eval(prompt_tokens=8, continuation_tokens=8),
    )


def test_checkpoints_are_at_0_at_the_end_after_chunks_and_where_asked():
    chunks = [(0, 10), (10, 21), (21, 43)]

    def saved_and_kept(stop: int, begin: int = 0, **train) -> tuple[list[int], set[int]]:
        cfg = config_with(**train)
        plan = Steps(((0, 43),), batch_size=4, stop=stop)  # 10 steps, 3 rows left over
        return steps.checkpoint_steps(cfg, plan, chunks), steps.kept_steps(cfg, plan, chunks, begin)

    # rows 10 and 21 are the ends of chunks: consumed by steps 3 and 6; the last chunk's rest never is
    assert saved_and_kept(0) == ([0, 3, 6, 10], {0, 3, 6, 10})
    assert saved_and_kept(5)[0] == [0, 3, 5]  # train.steps=5
    assert saved_and_kept(99, begin=5)[1] == {0, 3, 5, 6, 10}
    asked = {"checkpoint_chunks": False, "checkpoint_every": 4}
    assert saved_and_kept(0, **asked) == ([0, 4, 8, 10], {0, 10})
    asked = {"checkpoint_powers_of_two": True, "checkpoint_every": 5}
    assert saved_and_kept(9, **asked) == ([0, 1, 2, 3, 4, 5, 6, 8, 9], {0, 1, 2, 3, 4, 6, 8, 9})
    assert saved_and_kept(8, **asked)[0][-2:] == [6, 8]

    # with its middle chunk deferred, chunk 2 ends after 10 + 22 rows, and chunk 1 with a rest never consumed
    later = incidents.deferred(Steps(((0, 43),), batch_size=4), 3, chunks[1])
    assert later.ranges == ((0, 12), (21, 43), (12, 21))
    assert steps.checkpoint_steps(config_with(), later, chunks) == [0, 3, 9, 10]


@pytest.mark.parametrize("seed", range(40))
def test_the_step_of_every_position_is_found_whatever_was_deferred_left_out_skipped_or_doubled(seed):
    dice = random.Random(seed)
    plan = some_plan(dice)
    if dice.random() < 0.5 and plan.n_steps > 1:
        plan = dataclasses.replace(plan, stop=dice.randint(1, plan.n_steps))
    first = dice.randint(0, 199)
    skipped = ((first, first + dice.randint(1, 20)),)
    expected: dict[int, list[int]] = {}
    for step, batch in enumerate(played(plan)[: plan.last_step]):
        for row in batch:
            if not skipped[0][0] <= row < skipped[0][1]:
                expected.setdefault(row, []).append(step)
    assert {p: plan.steps_of(p, skipped) for p in range(210)} == {p: expected.get(p, []) for p in range(210)}


def test_the_oldest_of_the_other_checkpoints_are_deleted_and_one_is_kept_to_go_back_to():
    cfg, kept = config_with(keep_others=2), {0, 6}
    assert run_folder.deleted_steps(cfg, [0, 2, 4, 6, 8, 10], kept) == [2, 4]
    assert run_folder.deleted_steps(cfg, [0, 6, 8, 10], kept) == []
    assert run_folder.deleted_steps(config_with(), [0, 2, 4], kept) == []
    back = config_with(keep_others=2, on_incident="rollback", rollback_steps=6)
    assert run_folder.deleted_steps(back, [0, 2, 4, 6, 8, 10], kept) == [
        2
    ]  # 4 is the newest six steps before 10
    at_once = config_with(keep_others=1, on_incident="rollback", rollback_steps=0)
    assert run_folder.deleted_steps(at_once, [0, 2, 4, 6, 8, 10], kept) == [2, 4]  # 10 itself is old enough
    assert run_folder.deleted_steps(at_once, [0], {0}) == []


def test_a_plan_ends_where_the_run_is_asked_to_and_annealing_where_it_ends():
    cfg = config_with(steps=7)
    assert steps.plan_of(cfg, 400).last_step == 7 and steps.plan_of(cfg, 400).n_steps == 100
    assert steps.plan_of(config_with(steps=700), 400).last_step == 100
    annealing = dataclasses.replace(config_with(), optim=Optim(anneal_steps=5))
    assert steps.plan_of(annealing, 400, None, begin=20).last_step == 25
    both = dataclasses.replace(config_with(steps=23), optim=Optim(anneal_steps=5))
    assert steps.plan_of(both, 400, None, begin=20).last_step == 23
