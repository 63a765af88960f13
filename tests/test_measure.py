"""measure.py: a metric of one's own, as its docstring shows; and the work of several processes."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from test_memorize import make_run

import checkpoint
import eval as evaluation
import files
import measure
import memorize
import results
import run_folder
import tokenizer
from config import ConfigError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("measure"))


# ---- a metric of one's own --------------------------------------------------------------------------------


def example(run):
    """The code in the docstring, about this run."""
    block = re.search(r"(    import json, .*?\n)\nIts results", measure.__doc__, re.S)[1]
    code = textwrap.dedent(block)
    assert len([line for line in code.splitlines() if line]) <= 14  # two of them import and print
    return code.replace("runs/demo", str(run))


def test_the_metric_of_the_docstring_is_computed_once_for_every_checkpoint(
    run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    texts = ["cafe bead", "é and dice", "a bag of figs"]

    def write(texts):
        Path("my.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def load(*a):
        loaded.append(a[0].name)
        return load_model(*a)

    loaded, load_model = [], checkpoint.load_model
    monkeypatch.setattr(checkpoint, "load_model", load)
    write(texts)
    exec(compile(example(run), "example", "exec"), {})
    said = capsys.readouterr().out
    assert loaded == ["step-00000000", "step-00000009"]

    # the numbers are those of PyTorch's loss, line by line
    lines = files.read_lines(run / "evals.jsonl")
    names = [f"my.jsonl:{n}" for n in (1, 2, 3)]
    assert [(line["step"], line["kind"], line["item"]) for line in lines] == [
        (step, "lines", name) for step in (0, 9) for name in names
    ]
    for c in run_folder.chosen(run):
        model, encode = load_model(c.path), tokenizer.load(c.path).encode
        ours = [line for line in lines if line["step"] == c.step]
        for text, line in zip(texts, ours, strict=True):
            ids = torch.tensor([encode(text)])
            expected = F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:])
            assert line["loss"] == pytest.approx(expected.item(), rel=1e-5)
            assert line["inputs"]["file_sha256"] == files.sha256("my.jsonl")
            assert line["inputs"]["weights_sha256"] == run_folder.weights_hash(c.state)
        assert f"{c.step} { ({line['item']: line['loss'] for line in ours}) }" in said

    # a second time nothing is computed, and the same is said
    exec(compile(example(run), "example", "exec"), {})
    assert len(loaded) == 2 and capsys.readouterr().out == said
    assert files.read_lines(run / "evals.jsonl") == lines

    # the page has them, without code that names them
    assert results.load(run).evaluations["lines"]["my.jsonl:2"][9] == {"loss": lines[4]["loss"]}

    # another file is another input; and the old lines stay
    write(texts[:2])
    exec(compile(example(run), "example", "exec"), {})
    assert len(loaded) == 4
    after = files.read_lines(run / "evals.jsonl")
    assert after[:6] == lines and len(after) == 10


def metric(compute, items=("a", "b", "c"), **more):
    return measure.Metric("thing", "thing-1", dict.fromkeys(items, 3), compute, **more)


def test_what_is_returned_is_what_a_later_call_reads(run):
    opened = measure.open_run(run)
    made = metric(lambda model, c, items, done: ({"pair": (c.step, item), "x": 0.1} for item in items))
    first = measure.every(opened, made)
    assert first[1][1]["b"]["pair"] == [9, "b"]
    assert measure.every(opened, made) == first
    assert measure.known(opened, made, opened.checkpoints) == {c.step: lines for c, lines in first}


def test_a_metric_that_stops_early_keeps_what_it_yielded(run):
    opened = measure.open_run(run, [9])

    def compute(model, c, items, done):
        for item in items:
            if item == "c":
                raise ConfigError("no c here")
            yield {"x": 1}

    for group_rows in (1, 100):
        with pytest.raises(ConfigError, match="no c here"):
            measure.every(opened, metric(compute, group_rows=group_rows))
        assert list(measure.known(opened, metric(compute), opened.checkpoints)[9]) == ["a", "b"]
    with pytest.raises(ValueError):  # one dict for each item
        measure.every(opened, metric(lambda *a: []))


def test_metrics_share_a_log_and_do_not_take_one_anothers_lines(run):
    opened = measure.open_run(run, [9])

    def compute(x):
        return lambda model, c, items, done: ({"x": x} for _ in items)

    measure.every(opened, metric(compute(1)))
    other = metric(compute(2))._replace(kind="other")
    ((_, lines),) = measure.every(opened, other)
    assert [line["x"] for line in lines.values()] == [2, 2, 2]
    assert Counter(line["kind"] for line in files.read_lines(run / "evals.jsonl")) == {"thing": 3, "other": 3}


# ---- several processes ------------------------------------------------------------------------------------


def together(script, *arguments, **environment):
    """Starts a script with two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    return subprocess.Popen(
        [*command, str(script), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def results_of(run):
    """All result lines, without times, in no order."""
    lines = files.read_lines(run / "evals.jsonl")
    for path in (run / "memorization").glob("*.jsonl"):
        lines += files.read_lines(path)
    return sorted(json.dumps({**line, "seconds": 0}, sort_keys=True) for line in lines)


def test_two_processes_compute_what_one_computes_and_one_of_them_speaks(run, made, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(made, alone)
    opened = measure.open_run(alone)
    loss = measure.every(opened, evaluation.metric(opened, ["code", "docs"], 0))
    memorization = measure.every(opened, memorize.metric(opened))
    said = evaluation.show(loss) + "\n\n" + memorize.show(memorization) + "\n"

    process = together(ROOT / "eval.py", run)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and out == said, errors
    assert len(results_of(run)) == 2 * 2 + 2 * 5
    assert results_of(run) == results_of(alone)

    process = together(ROOT / "memorize.py", run, "--no-verify")  # other inputs, so other lines
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and out == memorize.show(memorization) + "\n"
    assert errors.count("no hash is compared") == 1
    assert len(results_of(run)) == 2 * 2 + 2 * 5 + 2 * 5
    assert not list(run.glob(".*.lock"))


SLOW = """
import os, signal, sys, time
import files, measure, configurator
from config import ConfigError

ITEMS = {f"item {i}": 1 for i in range(12)}
folder, rank = sys.argv[1], os.environ["RANK"]

def compute(model, checkpoint, items, done):
    for item in items:
        with open(f"{folder}/computed.txt", "a") as file:
            file.write(f"{checkpoint.step} {item} {rank}\\n")
        if rank in os.environ.get("FAIL", "") and os.path.exists(f"{folder}/evals.jsonl"):
            if os.environ["HOW"] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ConfigError(f"{item} is a mistake")
        time.sleep(0.1)
        yield {"x": len(item), "long": "y" * 20_000}

@configurator.script
def main():
    run = measure.open_run(folder)
    table = measure.every(run, measure.Metric("slow", "slow-1", ITEMS, compute))
    measure.say(len(table), sum(line["x"] for _, lines in table for line in lines.values()))

main()
"""
ALL = {(step, f"item {i}") for step in (0, 9) for i in range(12)}
SAID = f"2 {sum(len(item) for _, item in ALL)}\n"


@pytest.fixture
def slow(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    return tmp_path / "slow.py"


def computed(run):
    """How often each (step, item, rank) was computed."""
    lines = (run / "computed.txt").read_text().splitlines()
    return Counter((int(step), f"item {i}", int(rank)) for step, _, i, rank in map(str.split, lines))


def finished(run):
    return [(line["step"], line["item"]) for line in files.read_lines(run / "evals.jsonl")]


def test_every_item_is_computed_once_and_killed_processes_are_continued(run, slow):
    process = together(slow, run)
    while len(finished(run)) < 7:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)  # torchrun itself
    for pid in children(run):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    before = finished(run)
    assert 7 <= len(before) < len(ALL)

    process = together(slow, run)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and out == SAID, errors
    assert finished(run)[: len(before)] == before and sorted(finished(run)) == sorted(ALL)
    assert not (run / ".slow.lock").exists()
    count = computed(run)
    assert {rank for _, _, rank in count} == {0, 1}
    assert len(ALL) <= count.total() <= len(ALL) + 2  # again: only what was under way when they were killed


def children(run):
    """The processes that have this run on their command line: torchrun gives each a session of its own."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(run) in path.read_text():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize(("how", "ranks"), [("killed", "1"), ("mistake", "01")])
def test_a_process_that_fails_ends_all_and_a_mistake_is_said_once(run, slow, how, ranks):
    process = together(slow, run, FAIL=ranks, HOW=how)
    out, errors = process.communicate(timeout=60)  # and nobody waits for ever
    assert process.returncode != 0 and out == ""
    assert errors.count("is a mistake") == (how == "mistake"), errors
    assert len(set(finished(run))) == len(finished(run))


def test_a_claim_is_given_back_by_a_process_that_dies(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    c, path = run_folder.chosen(run)[0], run / ".lock"
    code = f"""
import sys, run_folder, measure
c = run_folder.chosen({str(run)!r})[0]
with measure.Claims({str(path)!r}) as claims, claims.take(c, ["a", 3]) as taken:
    print(taken, flush=True)
    sys.stdin.read()
"""
    other = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert other.stdout.readline() == "['a', 3]\n"
    with measure.Claims(path) as claims:
        with claims.take(c, ["a", "b", 3]) as taken:
            assert taken == ["b"]
        other.kill()
        other.communicate()
        with claims.take(c, ["a", "b", 3]) as taken:
            assert taken == ["a", "b", 3]


def test_each_process_begins_elsewhere_and_small_groups_are_shared(run, monkeypatch):
    opened = measure.open_run(run)
    order = []

    def compute(model, c, items, done):
        order.append((c.step, items))
        yield from ({"x": math.pi} for _ in items)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(checkpoint, "load_model", lambda *a: None)
    table = measure.every(opened, metric(compute, group_rows=8))  # items of 3 rows; half of 8 is 4
    assert order == [(9, ["a", "b"]), (9, ["c"]), (0, ["a", "b"]), (0, ["c"])]
    assert [c.step for c, _ in table] == [0, 9]
