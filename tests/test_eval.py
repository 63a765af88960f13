import dataclasses
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_memorize import make_run

import checkpoint
import config
import eval as evaluation
import files
import memorize
import tokenizer
from config import ConfigError, Model
from dataset import Dataset
from model import Transformer


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small only wait for a second thread."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("eval"))


@pytest.fixture
def run(made, tmp_path):
    """A copy of the run, nothing computed in it yet; the dataset is shared."""
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def model_of(**changes):
    cfg = Model(vocab_size=53, seq_len=17, d_model=16, n_layers=2, n_heads=4, d_ff=24)
    model = Transformer(dataclasses.replace(cfg, **changes)).eval().requires_grad_(False)
    model.init_weights(1)
    return model


def rows_of(n, seed=0):
    return np.random.default_rng(seed).integers(0, 53, (n, 18), dtype=np.uint16)


# ---- the numbers ------------------------------------------------------------------------------------------


def test_the_loss_of_a_uniform_model_is_the_logarithm_of_the_vocabulary():
    model = model_of(init_std=0.0)
    rows = rows_of(5)
    measured = evaluation.measures(evaluation.nats_of(model, rows, 2), rows[:, 1:], np.ones(53, np.int64))
    assert measured["loss"] == pytest.approx(math.log(53), rel=1e-6)
    assert measured["perplexity"] == pytest.approx(53, rel=1e-5)
    assert measured["bits_per_byte"] == pytest.approx(math.log2(53), rel=1e-6)  # with a byte to every token
    assert (measured["tokens"], measured["bytes"]) == (5 * 17, 5 * 17)


def test_measures_equal_values_worked_out_by_hand():
    # 6 targets of 2, 3, 2, 0 (end of text), 1 and 4 bytes: 12 bytes; 18 ln 2 nats are 18 bits
    n_bytes = np.array([0, 1, 2, 3, 4])
    targets = np.array([[2, 3, 2], [0, 1, 4]], np.uint16)
    measured = evaluation.measures(18 * math.log(2), targets, n_bytes)
    assert measured == {
        "loss": pytest.approx(3 * math.log(2)),
        "perplexity": pytest.approx(8),
        "bits_per_byte": pytest.approx(1.5),
        "tokens": 6,
        "bytes": 12,
    }
    assert evaluation.measures(1.0, np.zeros((1, 3), np.uint16), n_bytes)["bits_per_byte"] is None


def test_nats_are_those_of_pytorch_over_every_token_but_the_first():
    model, rows = model_of(init_std=0.4), rows_of(7)
    tokens = torch.from_numpy(rows.astype(np.int64))
    expected = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    assert evaluation.nats_of(model, rows, 3) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 7, 100])
def test_nats_do_not_depend_on_the_batch_size(batch_size):
    model, rows, done = model_of(init_std=0.4), rows_of(7), []
    one_by_one = sum(evaluation.nats_of(model, rows[i : i + 1], 1) for i in range(7))
    assert evaluation.nats_of(model, rows, batch_size, done.append) == pytest.approx(one_by_one, rel=1e-6)
    assert sum(done) == 7


# ---- of a run ---------------------------------------------------------------------------------------------


def evaluate(run, sources=("code", "docs"), max_rows=0):
    of, cfg = checkpoint.chosen(run), config.load_run(run)
    return evaluation.evaluate(run, cfg, memorize.dataset_of(run, cfg, of), of, list(sources), max_rows)


def lines_of(run):
    return [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]


def test_bytes_are_those_of_the_decoded_text_and_end_of_text_has_none(run):
    cfg = config.load_run(run)
    dataset = Dataset(cfg.dataset)
    tok = tokenizer.load(dataset.folder)
    for _, lines in evaluate(run):
        for source, line in lines.items():
            rows = dataset.validation(source)
            targets = rows[:, 1:].flatten()
            assert (targets == tok.eot).any()
            assert line["bytes"] == len(tok.decode_bytes([id for id in targets if id != tok.eot]))
            assert (line["tokens"], line["rows"]) == (targets.size, len(rows))
            bits = line["loss"] * line["tokens"] / math.log(2)
            assert line["bits_per_byte"] == pytest.approx(bits / line["bytes"])


def test_nothing_is_computed_twice_and_a_killed_run_goes_on(run, monkeypatch):
    evaluate(run)
    before = lines_of(run)
    assert [(line["step"], line["source"]) for line in before] == [
        (step, source) for step in (0, 9) for source in ("code", "docs")
    ]
    text = (run / "evals.jsonl").read_text()
    (run / "evals.jsonl").write_text(text[: text.rindex("{", 0, -90) + 30])  # half of the last line
    counted = []
    nats_of = evaluation.nats_of
    monkeypatch.setattr(evaluation, "nats_of", lambda *a: counted.append(len(a[1])) or nats_of(*a))
    table = evaluate(run)
    assert len(counted) == 1
    got = [{**line, "seconds": 0} for _, lines in table for line in lines.values()]
    assert got == [{**line, "seconds": 0} for line in before]
    evaluate(run)
    assert len(counted) == 1
    evaluate(run, ["docs"], max_rows=2)
    assert counted[1:] == [2, 2]


def test_results_are_kept_under_everything_that_determines_them(run):
    c, cfg = checkpoint.chosen(run)[-1], config.load_run(run)
    dataset = Dataset(cfg.dataset)
    fp32 = torch.float32
    weights = {**c.state, "files": {**c.state["files"], "model.safetensors": "0" * 64}}
    seen = [
        evaluation.inputs_of(cfg, dataset, c, 0, fp32),
        evaluation.inputs_of(cfg, dataset, c, 1, fp32),
        evaluation.inputs_of(cfg, dataset, c, 0, torch.bfloat16),
        evaluation.inputs_of(cfg, dataset, c._replace(state=weights), 0, fp32),
    ]
    dataset.sha256 = "0" * 64
    seen.append(evaluation.inputs_of(cfg, dataset, c, 0, fp32))
    assert len({json.dumps(inputs) for inputs in seen}) == 5


# ---- the command ------------------------------------------------------------------------------------------


def main(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as leaving:
        evaluation.main()
    return leaving.value.code, *capsys.readouterr()


def test_one_command_computes_everything_and_says_what_it_found(run, monkeypatch, capsys):
    code, out, _ = main(monkeypatch, capsys, run)
    assert not code
    tables = out.strip().split("\n\n")
    assert [len(table.splitlines()) for table in tables] == [1 + 2 * 2, 1 + 2]
    assert len({len(line) for line in tables[0].splitlines()}) == 1  # aligned
    assert {path.name for path in (run / "memorization").iterdir()} == {
        "step-00000000.jsonl",
        "step-00000009.jsonl",
    }


def test_the_check_names_what_is_missing_or_not_good_enough(run, monkeypatch, capsys):
    code, _, errors = main(monkeypatch, capsys, run, "--no-memorization", "--check")
    assert code == 1
    for problem in (
        "bits per byte, not below 60% of step 0's",  # nothing was trained
        "chunk 2 has no checkpoint",
        "step-00000009, memorization of validation:docs: missing",
    ):
        assert problem in errors, errors


def whole(run):
    """Makes a run that passes: a checkpoint for every chunk, and lines that say it has learned."""
    cfg = config.load_run(run)
    cfg = dataclasses.replace(
        cfg, eval=dataclasses.replace(cfg.eval, expect_bits_per_byte={"code": 2.0, "docs": 2.0})
    )
    files.write_json(run / "config.json", {"format": 1, "config": config.to_dict(cfg)})
    dataset = Dataset(cfg.dataset)
    shutil.rmtree(run / "checkpoints" / "step-00000009")
    for chunk in range(3):
        rows = dataset.chunk_range(chunk)[1]
        folder = run / "checkpoints" / f"step-{rows:08d}"
        shutil.copytree(run / "checkpoints" / "step-00000000", folder)
        state = json.loads((folder / "state.json").read_text())
        weights = folder / "model.safetensors"  # the same numbers in another file: another hash
        save_file(load_file(weights), weights, metadata={"format": "pt", "rows": str(rows)})
        state["files"]["model.safetensors"] = files.sha256(weights)
        files.write_json(folder / "state.json", {**state, "step": rows, "rows": rows, "chunk": chunk})
    of = checkpoint.chosen(run)
    evaluate(run)
    memorize.memorize(cfg, dataset, of)
    lines = lines_of(run)
    for line in lines:
        line["bits_per_byte"] = 8.0 if line["step"] == 0 else 1.9
    (run / "evals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return cfg, dataset


def test_the_check_passes_a_whole_run_and_sees_every_single_damage(run, monkeypatch, capsys):
    cfg, dataset = whole(run)
    assert evaluation.check(run, cfg, dataset, 0) == []
    code, out, errors = main(monkeypatch, capsys, run, "--check")
    assert not code and "check passed" in out, errors

    stricter = {"code": 1.8, "docs": 2.0, "web": 1.0}
    other = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, expect_bits_per_byte=stricter))
    assert evaluation.check(run, other, dataset, 0) == [
        "eval.expect_bits_per_byte names 'web', no source",
        "code: 1.9000 bits per byte, expected below 1.8",
    ]
    for bounds, problems in (
        ({"code": 2.0}, ["eval.expect_bits_per_byte names no bound for 'docs'"]),
        ({}, []),
    ):
        other = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, expect_bits_per_byte=bounds))
        assert evaluation.check(run, other, dataset, 0) == problems
    path = sorted((run / "memorization").iterdir())[1]
    good = path.read_text()
    for field, change in (
        ("matches", lambda v: v[:-1]),
        ("matches", lambda v: [11, *v[1:]]),
        ("rows", lambda v: [v[0] + 1, *v[1:]]),
        ("seen", lambda v: [not v[0], *v[1:]]),
        ("full", lambda v: v + 1),
        ("total", lambda v: v + 1),
        ("score", lambda v: v + 0.01),
    ):
        line = json.loads(good.splitlines()[0])
        line[field] = change(line[field])
        path.write_text("\n".join([json.dumps(line), *good.splitlines()[1:]]) + "\n")
        (problem,) = evaluation.check(run, cfg, dataset, 0)
        assert problem.startswith(f"{path.stem}, memorization of 0: its counts contradict"), field
    path.write_text("".join(good.splitlines(keepends=True)[:-1]))
    assert evaluation.check(run, cfg, dataset, 0) == [
        f"{path.stem}, memorization of validation:docs: missing"
    ]
    path.write_text(good)
    shutil.rmtree(run / "checkpoints" / "step-00000000")
    problems = evaluation.check(run, cfg, dataset, 0)
    assert problems[0] == "there is no checkpoint of step 0"


def test_mistakes_are_one_line_and_exit_code_2(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "fresh").mkdir()
    shutil.copy(run / "config.json", tmp_path / "fresh")
    shutil.copytree(run, tmp_path / "moved")
    about = json.loads((run / "config.json").read_text())
    about["config"]["dataset"] = "datasets/none"
    files.write_json(tmp_path / "moved" / "config.json", about)
    for arguments, message in [
        ((tmp_path,), "is not a run folder"),
        ((tmp_path / "fresh",), "no complete checkpoint yet"),
        ((tmp_path / "moved",), "datasets/none, which is not here"),
        ((run, "--checkpoint", 3), "no complete checkpoint of step 3; it has 0, 9"),
        ((run, "--source", "web"), "no source 'web'"),
        ((run, "--max_rows", "-1"), "--max_rows -1"),
    ]:
        code, _, errors = main(monkeypatch, capsys, *arguments)
        assert code == 2
        assert message in errors and errors.count("\n") == 1, errors


def test_a_source_without_held_out_rows_is_an_error_that_says_what_to_raise(run):
    of, cfg = checkpoint.chosen(run), config.load_run(run)
    dataset = memorize.dataset_of(run, cfg, of)
    dataset.validation = lambda source: np.empty((0, 42), np.uint16)
    with pytest.raises(ConfigError, match=r"raise data\.validation_fraction"):
        evaluation.evaluate(run, cfg, dataset, of, ["code"], 0)
