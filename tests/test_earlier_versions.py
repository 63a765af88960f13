"""Folders that an earlier version made: they open, resume, evaluate and report as before.

Each archive in data/ holds a config, its text, tokenizer and dataset (with repeats and a pass that is not
whole), a run that was stopped at step 40 and evaluated, and the losses of the same run when that version
trained it to its end.

made_by_890c4d3.tar.gz    manifest format 1, whose mixtures are approximate; other protocols of evaluation
made_by_217e2f0.tar.gz    as now, before files and settings got other names: train.on_spike, model.init_cut
"""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import files
import results
import run_folder
from dataset import Dataset
from manifest import verify


def extracted(name: str, folder: Path) -> Path:
    with tarfile.open(ROOT / "tests" / "data" / f"made_by_{name}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def old(tmp_path) -> Path:
    return extracted("890c4d3", tmp_path)


@pytest.fixture
def before(tmp_path) -> Path:
    return extracted("217e2f0", tmp_path)


def run(folder: Path, script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / script, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_dataset_of_an_earlier_version_opens_and_says_that_its_mixture_is_approximate(old):
    d = Dataset(old / "dataset")
    assert d.manifest["format"] == 1 and verify(old / "dataset") == []
    for position in range(0, d.n_rows, 29):
        for source, id, *_ in d.documents(position):
            assert position in d.positions(source, id)
    said = run(old, "data.py", "tiny.py")
    assert "dataset is already built" in said and "built by an earlier version" in said and "'second'" in said


def test_a_run_of_an_earlier_version_resumes_as_if_it_had_not_been_interrupted(old):
    run(old, "train.py", "tiny.py", "--train.steps=0")
    expected = json.loads((old / "expected.json").read_text())
    losses = [record["loss"] for record in files.read_lines(old / "run" / "metrics.jsonl")]
    # the same to the last bit on the processor that made it; others may round sums in another order
    assert losses == pytest.approx(expected["losses"], rel=2e-4) and len(losses) == 153
    assert [c.step for c in run_folder.checkpoints(old / "run")] == [0, 40, 51, 102, 153]


def test_a_run_of_an_earlier_version_is_evaluated_anew_and_reported(old):
    before = results.load(old / "run")
    run(old, "report.py", "run")
    assert (old / "run" / "report.html").stat().st_size > 50_000
    said = run(old, "eval.py", "run")
    assert said.count("step-00000040") >= 3
    after = results.load(old / "run")
    for source in ("prose", "songs"):
        # ids are bytes of the text or merges of them, so that bits per byte are what they were
        was, now = (r.losses[source][40]["bits_per_byte"] for r in (before, after))
        assert now == pytest.approx(was, rel=1e-5)
    matches = [np.concatenate([line["matches"] for line in r.scores[40].values()]) for r in (before, after)]
    assert (matches[0] == matches[1]).all()
    run(old, "report.py", "run")
    assert "first" in (old / "run" / "report.html").read_text()


def test_a_run_with_settings_under_their_old_names_resumes_evaluates_and_reports(before):
    expected = json.loads((before / "expected.json").read_text())
    evaluated, memorized = (
        before / "run" / "evals.jsonl",
        before / "run" / "memorization" / "step-00000040.jsonl",
    )
    lines = evaluated.read_text(), memorized.read_text()
    assert verify(before / "dataset") == []
    assert "step-00000040" in run(before, "eval.py", "run")
    assert (evaluated.read_text(), memorized.read_text()) == lines  # found again, not recomputed

    run(before, "train.py", "tiny.py", "--train.steps=0")
    losses = [record["loss"] for record in files.read_lines(before / "run" / "metrics.jsonl")]
    assert losses == pytest.approx(expected["losses"], rel=2e-4) and len(losses) == 146
    assert [c.step for c in run_folder.checkpoints(before / "run")] == [0, 40, 48, 97, 146]
    assert "the newest whole checkpoint is step-00000146" in run(before, "audit.py", "run")
    assert run(before, "eval.py", "run").count("step-00000146") == 3
    run(before, "report.py", "run")
    assert "step-00000146" in (before / "run" / "report.html").read_text()
