"""incidents.py and what train.py does about them: faults are injected into real runs."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, load, metrics

import checkpoint
import files
import incidents
import optim
import run_folder
import train
from config import ConfigError, Train
from dataset import Dataset
from run_folder import ledger
from seen import trained as trained_positions

B = 6  # rows a step, of the recipe


def weights(folder: Path) -> dict[str, np.ndarray]:
    model = checkpoint.load_model(folder)
    return {name: p.numpy() for name, p in model.named_parameters()}


class Faults:
    """Makes the batches that hold a row bad, and remembers the rows of every batch that was learned from."""

    def __init__(self, monkeypatch, dataset: Dataset, bad: dict[int, float], times: int = 10**9):
        everything = dataset.rows(0, dataset.n_rows)
        self.position = {row.tobytes(): i for i, row in enumerate(everything)}
        assert len(self.position) == dataset.n_rows  # no two rows alike
        self.seen, self.times, plain, update = [], times, train.forward_backward, optim.update

        def forward_backward(model, rows, *arguments):
            sums = plain(model, rows, *arguments)
            self.batch = [self.position[row.cpu().numpy().tobytes()] for row in rows]
            factor = max((bad[p] for p in self.batch if p in bad), default=1.0, key=abs)
            if factor != 1.0 and self.times > 0:
                self.times -= 1
                for p in model.parameters():
                    p.grad.mul_(factor)
                sums["loss"] = sums["loss"] * factor
            return sums

        def updated(*arguments):
            self.seen.append(self.batch)
            update(*arguments)

        monkeypatch.setattr(train, "forward_backward", forward_backward)
        monkeypatch.setattr(optim, "update", updated)


# ---- what is an incident ----------------------------------------------------------------------------------


def test_a_robust_z_counts_median_absolute_deviations():
    # median 3, deviations 2 1 0 1 97: their median is 1
    assert incidents.robust_z(10.0, [1.0, 2.0, 3.0, 4.0, 100.0]) == pytest.approx(7 / 1.4826)
    assert incidents.robust_z(2.02, [2.0] * 9) == pytest.approx(0.02 / 0.002)  # nothing varied
    normal = np.random.default_rng(0).normal(5.0, 0.25, 100_001)
    assert incidents.robust_z(6.0, normal.tolist()) == pytest.approx(4.0, rel=0.02)


def test_a_spike_is_above_a_full_window_and_a_fall_is_none():
    judge, asked = incidents.judge, Train(spike_z=6.0, spike_window=5)
    recent = [(3.0, 1.0), (3.1, 1.1), (2.9, 0.9), (3.0, 1.2), (3.2, 1.0)]
    assert judge(3.1, 1.1, recent, asked) is None
    assert judge(0.1, 0.0, recent, asked) is None
    assert judge(9.0, 1.0, recent[1:], asked) is None  # too few to say
    assert judge(9.0, 1.0, recent, Train()) is None  # not asked for
    spike = judge(3.1, 5.0, recent, asked)
    assert spike["event"] == "spike" and spike["z"]["grad_norm"] > 6 > spike["z"]["loss"]
    for loss, norm in ((math.nan, 1.0), (3.0, math.inf)):
        assert judge(loss, norm, [], Train()) == {"event": "nonfinite"}


# ---- what is done about it --------------------------------------------------------------------------------


def test_stop_says_where_and_leaves_the_last_checkpoint(recipe, tmp_path, monkeypatch):
    cfg = load(recipe, tmp_path / "run", "--train.checkpoint_every=4")
    dataset = Dataset(cfg.dataset)
    Faults(monkeypatch, dataset, {10 * B + 2: math.nan})
    with pytest.raises(
        incidents.Stopped, match=r"loss nan .* after step 10: chunk \d, rows 60 to 65, .*--replay 10"
    ):
        train.train(cfg)
    (record,) = ledger(tmp_path / "run", "nonfinite")
    assert record["step"] == 10 and record["action"] == "stop" and record["rows"] == [[60, 65]]
    assert record["checkpoint"] == "step-00000008" and record["loss"] == "nan"
    assert set(record["norms"]) == {"embed_tokens", "layers.0", "layers.1", "norm", "lm_head"}
    expected = {f"{d[0]}:{d[1]}" for p in range(60, 66) for d in dataset.documents(p)}
    assert set(record["documents"]) == expected
    assert [c.step for c in run_folder.checkpoints(tmp_path / "run")][-1] == 8


def test_skip_leaves_the_weights_as_they_were_and_goes_on(recipe, tmp_path, monkeypatch):
    run = tmp_path / "run"
    cfg = load(recipe, run, "--train.on_incident=skip", "--train.checkpoint_every=1", "--train.steps=9")
    faults = Faults(monkeypatch, Dataset(cfg.dataset), {5 * B + 1: math.inf})
    train.train(cfg)
    before, after, last = (weights(run / "checkpoints" / f"step-{s:08d}") for s in (5, 6, 9))
    assert all((before[name] == after[name]).all() for name in before)
    assert any((after[name] != last[name]).any() for name in after)
    assert [r["step"] for r in metrics(run) if r.get("skipped")] == [6]
    assert [s[0] for s in faults.seen] == [B * s for s in range(9) if s != 5]
    (record,) = ledger(run, "nonfinite")
    assert record["action"] == "skip" and ledger(run, "finish")
    end = run_folder.checkpoints(run)[
        -1
    ].state  # the batch that moved nothing is not one that was learned from
    assert end["skipped"] == [[5 * B, 6 * B]] and end["rows"] == 9 * B
    seen = trained_positions(end, np.arange(11 * B))
    assert seen.tolist() == [p // B < 9 and p // B != 5 for p in range(11 * B)]
    assert next(r for r in metrics(run) if r["step"] == 6)["loss"] is None


def test_a_rollback_to_the_very_start_forgets_the_moments_too(recipe, tmp_path, monkeypatch):
    cfg = load(recipe, tmp_path / "back", "--train.on_incident=rollback", "--train.rollback_skip=40")
    fresh = load(recipe, tmp_path / "fresh", "--train.steps=1")
    dataset = Dataset(cfg.dataset)
    Faults(monkeypatch, dataset, {3 * B: math.nan})
    with pytest.raises(incidents.Stopped):  # nothing is left to train on without those 40 batches
        train.train(
            load(recipe, tmp_path / "none", "--train.on_incident=rollback", "--train.rollback_skip=60")
        )
    train.train(load(recipe, tmp_path / "back", "--train.on_incident=rollback", "--train.rollback_skip=2"))
    (record,) = ledger(tmp_path / "back", "nonfinite")
    assert record["back_to"] == "step-00000000" and record["order"][0] == [0, 2 * B]
    train.train(fresh)
    # After the rollback it learns what a run learns that never saw those batches.
    again = [r for r in files.read_lines(tmp_path / "back" / "metrics.jsonl") if r["step"] == 1][1]
    assert again["loss"] == metrics(tmp_path / "fresh")[0]["loss"]
    moved = [r for r in files.read_lines(tmp_path / "back" / "metrics.jsonl") if r["step"] == 2]
    assert moved[0]["loss"] == moved[1]["loss"] and moved[0]["grad_norm"] == moved[1]["grad_norm"]


@pytest.mark.parametrize("times", [1, 10**9])
def test_defer_trains_the_rest_of_the_chunk_at_the_end(recipe, tmp_path, monkeypatch, times):
    run = tmp_path / "run"
    cfg = load(recipe, run, "--train.on_incident=defer")
    dataset = Dataset(cfg.dataset)
    first, end = dataset.chunk_range(1)
    bad = first + B + 3  # in the second batch of chunk 1
    faults = Faults(monkeypatch, dataset, {bad: math.nan}, times)
    rest = list(range(first + B, end))
    n = dataset.n_rows // B * B
    if times == 1:
        train.train(cfg)
        seen = [p for batch in faults.seen for p in batch]
        expected = [*range(first + B), *range(end, dataset.n_rows), *rest]
        assert seen == expected[:n]
        last = run_folder.checkpoints(run)[-1]
        assert last.state["order"] == [[0, first + B], [end, dataset.n_rows], [first + B, end]]
        assert last.state["chunk"] == 1  # the chunk that was completed last
        trained = trained_positions(last.state, np.arange(dataset.n_rows))
        assert trained.sum() == n and trained[: first + B].all()
        middle = next(c for c in run_folder.checkpoints(run) if c.state["chunk"] == 2)
        assert not trained_positions(middle.state, np.array(rest)).any()
        assert not (run / ".processes").glob("*.json") or not list((run / ".processes").glob("*.json"))
    else:  # it is bad there too, and nothing is left to be trained on before it
        with pytest.raises(incidents.Stopped, match="nan"):
            train.train(cfg)
        actions = [record["action"] for record in ledger(run, "nonfinite")]
        assert actions == ["defer", "stop"]


def test_a_run_that_deferred_and_was_cut_off_goes_on_in_its_order(recipe, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    asked = ("--train.on_incident=defer", "--train.checkpoint_every=5")
    cfg = load(recipe, whole, *asked)
    dataset = Dataset(cfg.dataset)
    bad = {dataset.chunk_range(1)[0] + 3: math.nan}
    Faults(monkeypatch, dataset, bad, 1)
    train.train(cfg)
    monkeypatch.undo()
    faults = Faults(monkeypatch, dataset, bad, 1)
    n = run_folder.checkpoints(whole)[-1].step
    train.train(load(recipe, cut, *asked, f"--train.steps={n - 4}"))
    train.train(load(recipe, cut, *asked))
    ours, theirs = (run_folder.checkpoints(run)[-1] for run in (cut, whole))
    assert ours.state["order"] == theirs.state["order"] and ours.step == theirs.step
    assert ours.state["files"]["model.safetensors"] == theirs.state["files"]["model.safetensors"]
    assert len(faults.seen) == n


def test_rollback_goes_back_and_leaves_batches_out(recipe, tmp_path, monkeypatch):
    run = tmp_path / "run"
    asked = ("--train.on_incident=rollback", "--train.rollback_steps=5", "--train.rollback_skip=4")
    cfg = load(recipe, run, *asked, "--train.checkpoint_every=4", "--train.checkpoint_chunks=false")
    dataset = Dataset(cfg.dataset)
    faults = Faults(monkeypatch, dataset, {14 * B: math.nan})
    train.train(cfg)
    (record,) = ledger(run, "nonfinite")
    # 9 is five steps before 14: the newest checkpoint up to there is 8; batches 12 .. 15 are left out
    assert record["step"] == 14 and record["back_to"] == "step-00000008" and record["action"] == "rollback"
    assert record["order"] == [[0, 12 * B], [16 * B, dataset.n_rows]]
    seen = [batch[0] // B for batch in faults.seen]
    n_steps = dataset.n_rows // B
    assert seen == [*range(14), *range(8, 12), *range(16, n_steps)]
    last = run_folder.checkpoints(run)[-1]
    assert last.step == n_steps - 4 and ledger(run, "finish")[0]["step"] == last.step
    assert [p.name for p in (run / "checkpoints").glob("incident-*")] == ["incident-1-step-00000012"]
    monkeypatch.undo()
    assert incidents.replay(run, 14)[2] == 12  # the weights before the incident, which were moved aside
    assert not trained_positions(last.state, np.arange(12 * B, 16 * B)).any()


def test_a_spike_is_found_by_its_gradient_norm_and_skipped(recipe, tmp_path, monkeypatch):
    run = tmp_path / "run"
    asked = ("--train.on_incident=skip", "--train.spike_z=30", "--train.spike_window=6", "--train.steps=16")
    cfg = load(recipe, run, *asked)
    Faults(monkeypatch, Dataset(cfg.dataset), {12 * B + 4: 50.0})
    train.train(cfg)
    (record,) = ledger(run, "spike")
    assert record["step"] == 12 and record["z"]["grad_norm"] > 30 and record["action"] == "skip"
    assert run_folder.checkpoints(run)[-1].state["recent"][-1] == [
        metrics(run)[-1]["loss"],
        metrics(run)[-1]["grad_norm"],
    ]


def test_too_many_incidents_stop_the_run(recipe, tmp_path, monkeypatch):
    cfg = load(recipe, tmp_path / "run", "--train.on_incident=skip", "--train.max_incidents=2")
    Faults(monkeypatch, Dataset(cfg.dataset), {B * s: math.nan for s in (3, 4, 6)})
    with pytest.raises(incidents.Stopped, match="after step 6"):
        train.train(cfg)
    actions = [record["action"] for record in ledger(tmp_path / "run", "nonfinite")]
    assert actions == ["skip", "skip", "stop"]


WORKER = """
import math, sys
sys.path.insert(0, {root!r})
import config, train
plain = train.forward_backward
count = [0]
def forward_backward(model, rows, n_targets, loss_fn, world, cfg):
    sums, count[0] = plain(model, rows, n_targets, loss_fn, world, cfg), count[0] + 1
    return {{"loss": sums["loss"] * (math.nan if world.rank == 1 and count[0] == 4 else 1)}}
train.forward_backward = forward_backward
train.main(config.load(sys.argv[1], sys.argv[2:]), {{}})
"""


def test_processes_decide_alike_when_only_one_of_them_sees_the_fault(recipe, tmp_path):
    worker, run = tmp_path / "worker.py", tmp_path / "run"
    worker.write_text(WORKER.format(root=str(ROOT)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    asked = [f"--run={run}", "--train.micro_batch_size=3", "--train.steps=7", "--train.on_incident=skip"]
    command += [worker, recipe, *asked, "--parallel.strategy=fsdp"]
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr[-3000:]
    (record,) = ledger(run, "nonfinite")
    assert (
        record["step"] == 3
        and record["action"] == "skip"
        and all(math.isfinite(n) for n in record["norms"].values())
    )
    assert [r["step"] for r in metrics(run)] == [1, 2, 3, 4, 5, 6, 7]


# ---- looking at it ----------------------------------------------------------------------------------------


def test_a_batch_replays_alone_with_the_losses_of_its_rows(recipe, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    cfg = load(recipe, run, "--train.on_incident=skip", "--train.steps=9", "--train.checkpoint_every=4")
    dataset = Dataset(cfg.dataset)
    Faults(monkeypatch, dataset, {5 * B + 1: math.nan})
    train.train(cfg)
    rows, norms, at = incidents.replay(run, 5)
    assert at == 4 and [row[0] for row in rows] == [*range(30, 36)]
    model = checkpoint.load_model(run / "checkpoints" / "step-00000004").requires_grad_(True)
    batch = torch.from_numpy(dataset.rows(30, 6))
    logits = model(batch[:, :-1]).flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="none").view(6, -1)
    assert [row[1] for row in rows] == pytest.approx(losses.mean(1).tolist(), abs=1e-5)
    losses.mean().backward()
    assert norms["embed_tokens"] == pytest.approx(model.embed_tokens.weight.grad.norm().item(), rel=1e-4)
    assert incidents.replay(run, 8)[2] == 8 and incidents.replay(run, 8, at=0)[2] == 0
    with pytest.raises(ConfigError, match="no batch after step"):
        incidents.replay(run, 10**6)
    for arguments, expected in (
        ([], "nonfinite, skip: loss nan"),
        (["--replay", "5"], "on the weights of step 4"),
    ):
        monkeypatch.setattr(sys, "argv", ["incidents.py", str(run), *arguments])
        try:
            incidents.main()
        except SystemExit as end:
            assert end.code == 0
        assert expected in capsys.readouterr().out
