"""checkpoint.py: folders that others open, saves that survive a kill, loads that restore every bit."""

import dataclasses
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import conftest
import pytest
import torch
from conftest import ROOT
from test_incidents import Faults

import audit
import checkpoint
import convert
import eval as evaluation
import files
import incidents
import integrity
import memorize
import optim
import results
import run_folder
import sample
import train
from config import Config, ConfigError, Model, Optim, Train, load_run
from dataset import Dataset
from formats import families, shards
from model import Transformer
from steps import State

LLAMA = Model(vocab_size=67, seq_len=16, d_model=24, n_layers=2, n_heads=6, n_kv_heads=3, d_ff=28)
OLMO = Model(vocab_size=71, seq_len=16, d_model=24, n_layers=2, n_heads=4, d_ff=28, tie_embeddings=True,
             norm="nonparametric_layernorm")  # fmt: skip
FAMILIES = pytest.mark.parametrize("cfg", [LLAMA, OLMO], ids=["llama", "olmo"])


def trained(cfg: Model, steps: int = 3, seed: int = 1):
    """A model and its optimizer after a few updates on random tokens."""
    torch.manual_seed(seed)
    net = Transformer(cfg)
    net.init_weights(seed)
    adamw = optim.adamw(net, Optim(lr=1e-2))
    for _ in range(steps):
        update(net, adamw)
    return net, adamw


def update(net, adamw):
    tokens = torch.randint(net.cfg.vocab_size, (2, 9))
    (net(tokens[:, :-1], tokens[:, 1:]) / 16).backward()
    adamw.step()
    adamw.zero_grad()


def state(step: int) -> dict:
    return {"step": step, "rows": 2 * step, "tokens": 32 * step, "chunk": -1, "eot": 0}


@FAMILIES
@pytest.mark.parametrize("steps", [0, 3])
def test_a_resumed_run_continues_bit_for_bit(tmp_path, cfg, steps):
    net, adamw = trained(cfg, steps)
    folder = conftest.save(tmp_path, net, [adamw], state(steps), {})
    for _ in range(2):
        update(net, adamw)

    other = Transformer(cfg)
    other_adamw = optim.adamw(other, Optim(lr=1e-2))
    with torch.no_grad():
        checkpoint.load_weights(folder, other)
    checkpoint.load_optimizer(folder, other, [other_adamw])
    for _ in range(2):  # the random tokens too continue where they were
        update(other, other_adamw)
    for (name, a), b in zip(net.named_parameters(), other.parameters()):
        assert torch.equal(a, b), name
        assert torch.equal(adamw.state[a]["exp_avg_sq"], other_adamw.state[b]["exp_avg_sq"]), name


@FAMILIES
def test_transformers_opens_a_checkpoint_as_it_stands(tmp_path, cfg):
    transformers = pytest.importorskip("transformers")
    net, adamw = trained(cfg)
    folder = conftest.save(tmp_path, net, [adamw], state(3), {})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.randint(cfg.vocab_size, (3, 11))
    assert theirs.dtype == torch.float32
    torch.testing.assert_close(theirs(tokens).logits, net(tokens), atol=1e-5, rtol=1e-5)


@FAMILIES
def test_a_folder_written_by_transformers_loads_as_our_model(tmp_path, cfg):
    transformers = pytest.importorskip("transformers")
    values = families.hf_config(cfg)
    theirs = getattr(transformers, values.pop("architectures")[0])
    theirs = theirs(theirs.config_class(**values))
    theirs.save_pretrained(tmp_path)
    ours = checkpoint.load_model(tmp_path)
    assert ours.cfg.n_kv_heads == cfg.resolved().n_kv_heads and ours.cfg.rope_theta == cfg.rope_theta
    tokens = torch.randint(cfg.vocab_size, (2, 7))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)


@FAMILIES
def test_settings_survive_the_hugging_face_config(tmp_path, cfg):
    (tmp_path / "config.json").write_text(json.dumps(families.hf_config(cfg)))
    assert families.model_config(tmp_path) == dataclasses.replace(cfg.resolved(), init="normal")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "mamba"}, "reads llama, mistral, olmo"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5}}, "not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "damaged"),
        ({"attention_bias": True}, "not supported"),
        ({"hidden_act": "relu"}, "not supported"),
        ({"hidden_size": "wide"}, "must be int"),
        ({"model_type": None}, "reads llama, mistral, olmo"),
    ],
)
def test_a_model_that_we_do_not_compute_is_refused(tmp_path, change, expected):
    (tmp_path / "config.json").write_text(json.dumps({**families.hf_config(LLAMA), **change}))
    with pytest.raises(ConfigError, match=expected):
        checkpoint.load_model(tmp_path)


def test_weights_of_another_model_and_damaged_files_are_refused(tmp_path):
    net, adamw = trained(LLAMA)
    folder = conftest.save(tmp_path, net, [adamw], state(3), {})
    with pytest.raises(ConfigError, match="another model"):
        checkpoint.load_weights(folder, Transformer(OLMO))
    with pytest.raises(ConfigError, match="the model wants"):
        checkpoint.load_weights(folder, Transformer(dataclasses.replace(LLAMA, d_ff=30)))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="cannot be read"):
        checkpoint.load_model(folder)
    weights.unlink()
    with pytest.raises(ConfigError, match="missing"):
        checkpoint.load_model(folder)


def test_hashes_in_the_state_are_those_of_the_files(tmp_path):
    net, adamw = trained(LLAMA)
    folder = conftest.save(tmp_path, net, [adamw], state(3), {"tokenizer.json": b"{}"})
    (found,) = run_folder.checkpoints(tmp_path)
    assert found.step == 3 and found.path == folder
    names = {path.name for path in folder.iterdir()} - {"state.json"}
    assert set(found.state["files"]) == names == {
        "config.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json"
    }  # fmt: skip
    for name, digest in found.state["files"].items():
        assert files.sha256(folder / name) == digest


def test_steps_are_numbers_and_incomplete_folders_are_ignored(tmp_path):
    net, adamw = trained(LLAMA)
    for step in (999_999, 100_000_000, 1_000_000, 5):
        conftest.save(tmp_path, net, [adamw], state(step), {})
    (tmp_path / "checkpoints" / "step-00000007").mkdir()
    (tmp_path / "checkpoints" / "step-notes").mkdir()
    (tmp_path / "checkpoints" / "step-00000005" / "state.json").write_text("{")
    assert [c.step for c in run_folder.checkpoints(tmp_path)] == [999_999, 1_000_000, 100_000_000]
    assert run_folder.checkpoints(tmp_path / "nowhere") == []


def test_a_step_that_is_saved_again_replaces_the_folder(tmp_path):
    net, adamw = trained(LLAMA)
    first = files.sha256(conftest.save(tmp_path, net, [adamw], state(3), {}) / "model.safetensors")
    update(net, adamw)
    second = files.sha256(conftest.save(tmp_path, net, [adamw], state(3), {}) / "model.safetensors")
    assert first != second and len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_a_kill_during_a_save_leaves_whole_checkpoints_only(tmp_path):
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "from test_checkpoint import *\n"
        "net, adamw = trained(LLAMA)\n"
        "for step in range(1, 10**6):\n"
        "    conftest.save(sys.argv[3], net, [adamw], state(step), {})\n"
        "    print(step, flush=True)\n"
    )
    reached = 0
    for attempt in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(ROOT), str(ROOT / "tests"), str(tmp_path / str(attempt))],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        for _ in range(2):
            process.stdout.readline()
        time.sleep(0.011 * attempt)  # somewhere inside the next save
        process.send_signal(signal.SIGKILL)
        last = int(([2] + [int(line) for line in process.stdout.read().split()])[-1])
        found = run_folder.checkpoints(tmp_path / str(attempt))
        assert [c.step for c in found][:last] == list(range(1, last + 1))
        for each in found:
            checkpoint.load_model(each.path)
            assert files.sha256(each.path / "model.safetensors") == each.state["files"]["model.safetensors"]
        reached += len(found)
    assert reached >= 8


def test_a_save_that_fails_leaves_nothing_behind_and_says_why(tmp_path, monkeypatch):
    net, adamw = trained(LLAMA)
    good = conftest.save(tmp_path, net, [adamw], state(3), {})

    def full(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        conftest.save(tmp_path, net, [adamw], state(4), {})
    assert list((tmp_path / "checkpoints").iterdir()) == [good]
    assert [c.step for c in run_folder.checkpoints(tmp_path)] == [3]


def test_a_log_survives_half_a_line(tmp_path):
    log = tmp_path / "evals.jsonl"
    files.append(log, {"a": 1})
    with open(log, "a") as file:
        file.write('{"a": 2')
    assert files.read_lines(log) == [{"a": 1}]
    files.append(log, {"a": 3})
    assert files.read_lines(log) == [{"a": 1}, {"a": 3}]
    assert files.read_lines(tmp_path / "none.jsonl") == []


def test_nothing_in_a_checkpoint_is_pickled(tmp_path):
    net, adamw = trained(LLAMA)
    folder = conftest.save(tmp_path, net, [adamw], state(3), {})
    for path in folder.iterdir():
        assert path.suffix in (".json", ".safetensors")
    source = (ROOT / "checkpoint.py").read_text()
    assert "torch.load" not in source and "torch.save" not in source and "pickle." not in source


# ---- while training continues -----------------------------------------------------------------------------


def test_a_file_of_weights_has_the_permissions_of_any_new_file(tmp_path):
    shards.save({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    (tmp_path / "b").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.fixture
def slow_disk(monkeypatch):
    """Files are written when the test says so."""
    write, gate = shards.save, threading.Event()

    def later(*arguments):
        assert gate.wait(30)
        write(*arguments)

    monkeypatch.setattr(shards, "save", later)
    return gate


def test_what_is_saved_is_the_moment_when_saving_began(tmp_path, slow_disk):
    net, adamw = trained(LLAMA)
    saving = checkpoint.Saving(tmp_path, net, [adamw])
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    moment = adamw.state[net.norm.weight]["exp_avg"].clone()
    saving.begin(State(**state(3)))
    assert saving.busy()
    for _ in range(3):
        update(net, adamw)  # while the disk is still at work
    assert run_folder.checkpoints(tmp_path) == []
    slow_disk.set()
    folder = saving.finish()
    assert not saving.busy() and [c.step for c in run_folder.checkpoints(tmp_path)] == [3]
    saved = checkpoint.load_model(folder)
    for name, p in saved.named_parameters():
        assert torch.equal(p, before[name]), name
    assert any(not torch.equal(p, before[name]) for name, p in net.named_parameters())
    with shards.open_tensors(folder / "optimizer.safetensors") as tensors:
        assert torch.equal(tensors.get_tensor("exp_avg.norm.weight"), moment)
    assert saving.finish() is None  # nothing under way


def test_the_memory_of_one_save_serves_the_next(tmp_path):
    net, adamw = trained(LLAMA)
    saving, rooms = checkpoint.Saving(tmp_path, net, [adamw]), []
    for step in (3, 4, 5):
        saving.begin(State(**state(step)))  # waits for the one before
        rooms.append({name: tensor.data_ptr() for name, tensor in saving.copies.items()})
        update(net, adamw)
    saving.finish()
    assert rooms[0] == rooms[1] == rooms[2]
    hashes = [c.state["files"]["model.safetensors"] for c in run_folder.checkpoints(tmp_path)]
    assert len(hashes) == len(set(hashes)) == 3


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")]
)
def test_a_disk_that_fails_in_the_background_is_told_and_leaves_the_last_checkpoint(
    tmp_path, monkeypatch, error
):
    net, adamw = trained(LLAMA)
    conftest.save(tmp_path, net, [adamw], state(3), {})
    write = shards.save

    def fails(tensors, path):
        if path.name.startswith("optimizer"):
            raise error
        write(tensors, path)

    monkeypatch.setattr(shards, "save", fails)
    saving = checkpoint.Saving(tmp_path, net, [adamw])
    saving.begin(State(**state(4)))
    with pytest.raises(OSError, match=rf"step 4 is not saved: process 0: .*{error.strerror}"):
        saving.finish()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    monkeypatch.undo()
    saving.begin(State(**state(4)))  # there is room again
    saving.finish()
    assert [c.step for c in run_folder.checkpoints(tmp_path)] == [3, 4]


@FAMILIES
def test_a_large_model_is_stored_in_shards_that_others_open_too(tmp_path, monkeypatch, cfg):
    transformers = pytest.importorskip("transformers")
    net, adamw = trained(cfg)
    whole = conftest.save(tmp_path / "whole", net, [adamw], state(3), {})
    monkeypatch.setattr(shards, "SHARD_BYTES", 9000)  # the largest tensor has 4 x 71 x 24 = 6816
    folder = conftest.save(tmp_path / "shards", net, [adamw], state(3), {})
    names = sorted(p.name for p in folder.glob("*.safetensors"))
    assert names[0].startswith("model-00001-of-0000") and len(names) > 6
    assert all((folder / name).stat().st_size < 9000 + 2000 for name in names)  # with the header
    one, many = checkpoint.load_model(whole), checkpoint.load_model(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for (name, a), b in zip(one.named_parameters(), many.parameters()):
        assert torch.equal(a, b), name
    tokens = torch.randint(cfg.vocab_size, (2, 9))
    with torch.no_grad():
        assert torch.allclose(theirs(tokens).logits, many(tokens), atol=1e-5)
    other = Transformer(cfg)
    other_adamw = optim.adamw(other, Optim(lr=1e-2))
    checkpoint.load_optimizer(folder, other, [other_adamw])
    for a, b in zip(net.parameters(), other.parameters()):
        assert all(torch.equal(adamw.state[a][key], other_adamw.state[b][key]) for key in adamw.state[a])
    states = [run_folder.read(f).state for f in (whole, folder)]
    assert len({run_folder.weights_hash(s) for s in states}) == 2  # of other files


def test_a_layout_fills_files_in_order_and_a_large_tensor_has_one_of_its_own(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 10)

    assert shards.layout("model", {"a": 4, "b": 6}) == ({"model.safetensors": ["a", "b"]}, {})
    files_of, index = shards.layout("model", {"a": 4, "b": 7, "c": 25, "d": 1})
    assert files_of == {
        "model-00001-of-00004.safetensors": ["a"],
        "model-00002-of-00004.safetensors": ["b"],
        "model-00003-of-00004.safetensors": ["c"],
        "model-00004-of-00004.safetensors": ["d"],
    }
    places = json.loads(index["model.safetensors.index.json"])["weight_map"]
    assert places == {names[0]: file for file, names in files_of.items()}


def test_muon_is_saved_and_resumed_with_its_adamw(tmp_path):
    cfg = Optim(lr=1e-2, optimizer="muon")
    net = Transformer(LLAMA)
    net.init_weights(2)
    parts = optim.optimizers(net, cfg)

    def both(net, parts):
        tokens = torch.randint(67, (2, 9))
        (net(tokens[:, :-1], tokens[:, 1:]) / 16).backward()
        for part in parts:
            part.step()
            part.zero_grad()

    both(net, parts)
    folder = conftest.save(tmp_path, net, parts, state(1), {})
    both(net, parts)
    other = checkpoint.load_model(folder).requires_grad_(True)
    other_parts = optim.optimizers(other, cfg)
    checkpoint.load_optimizer(folder, other, other_parts)
    both(other, other_parts)
    for (name, a), b in zip(net.named_parameters(), other.parameters()):
        assert torch.equal(a, b), name
    with pytest.raises(ConfigError, match=r"lacks AdamW's state of layers\.0"):
        checkpoint.load_optimizer(folder, other, [optim.adamw(other, Optim())])


def test_the_newest_others_are_kept_and_all_that_end_a_chunk(tmp_path):
    net, adamw = trained(LLAMA, 0)
    for step in range(9):
        conftest.save(tmp_path, net, [adamw], state(step), {})
    saved = [c.step for c in run_folder.checkpoints(tmp_path)]
    run_folder.delete(tmp_path, run_folder.deleted_steps(Config(train=Train(keep_others=2)), saved, {0, 4}))
    assert [c.step for c in run_folder.checkpoints(tmp_path)] == [0, 4, 7, 8]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4


# ---- is it what was saved? --------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """Turns the lowest bit of the byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def cut(whole, tmp_path) -> Path:
    """A copy of the whole run without its last two checkpoints, so that there is something to resume."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for c in run_folder.checkpoints(run)[-2:]:
        shutil.rmtree(c.path)
    return run


def run_main(monkeypatch, capsys, module, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a script's command line."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    try:
        module.main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    return code, *capsys.readouterr()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_flipped_bit_is_one_clear_line_for_all_who_read_a_checkpoint(
    recipe, cut, tmp_path, monkeypatch, capsys, name
):
    newest = run_folder.checkpoints(cut)[-1]
    flip(newest.path / name)
    now, before = files.sha256(newest.path / name)[:12], newest.state["files"][name][:12]
    said = f"{name} is damaged: SHA-256 {now}, and {before} when it was saved; get it again, or take"
    data = conftest.load(recipe, cut).dataset
    for module, *arguments in (
        (sample, cut, "--tokens", 3),
        (sample, newest.path, "--tokens", 3),
        (convert, cut, tmp_path / "out"),
        (evaluation, cut, "--checkpoint", newest.step, "--no-memorization"),
        (evaluation, newest.path, "--dataset", data),
        (memorize, cut, "--checkpoint", newest.step),
        (incidents, cut, "--replay", newest.step),
    ):
        code, _, errors = run_main(monkeypatch, capsys, module, *arguments)
        assert code == 2 and said in errors and errors.count("\n") == 1, (module, errors)
    assert not (tmp_path / "out").exists() and not (cut / "evals.jsonl").exists()
    assert not list(cut.glob("memorization/*"))
    for asked in ((cut,), (tmp_path / "new", f"--init_from={newest.path}")):
        with pytest.raises(ConfigError, match=said):
            train.train(conftest.load(recipe, *asked))


def test_a_flipped_bit_in_the_moments_stops_whoever_needs_them(recipe, cut, tmp_path, monkeypatch, capsys):
    newest = run_folder.checkpoints(cut)[-1].path
    flip(newest / "optimizer.safetensors")
    anneal = (f"--init_from={newest}", "--optim.anneal_steps=3")
    for asked in ((cut,), (tmp_path / "annealed", *anneal)):
        with pytest.raises(ConfigError, match=r"optimizer\.safetensors is damaged: SHA-256"):
            train.train(conftest.load(recipe, *asked))
    code, _, errors = run_main(monkeypatch, capsys, sample, cut, "--tokens", 3)  # which reads only weights
    assert not code and not errors
    shutil.rmtree(newest)  # as the message says
    train.train(conftest.load(recipe, cut))
    assert run_folder.checkpoints(cut)[-1].step == 39


def test_who_does_not_want_hashes_is_told_so_and_files_nothing_under_the_healthy_one(
    recipe, cut, tmp_path, monkeypatch, capsys
):
    newest = run_folder.checkpoints(cut)[-1]
    weights = newest.path / "model.safetensors"
    healthy = weights.read_bytes()
    flip(weights)
    for module, *arguments in (
        (sample, cut, "--tokens", 3),
        (convert, cut, tmp_path / "out"),
        (evaluation, cut, "--checkpoint", newest.step),
        (memorize, cut, "--checkpoint", newest.step),
        (incidents, cut, "--replay", newest.step),
    ):
        code, _, errors = run_main(monkeypatch, capsys, module, *arguments, "--no-verify")
        assert not code and "--no-verify: no hash is compared" in errors and errors.count("\n") == 1, module
    code, _, errors = run_main(monkeypatch, capsys, evaluation, cut, "--check", "--no-verify")
    assert code == 2 and "leave --no-verify out" in errors
    of = ("--checkpoint", newest.step)
    code, _, errors = run_main(monkeypatch, capsys, evaluation, cut, *of)  # not found in evals.jsonl either
    assert code == 2 and "model.safetensors is damaged" in errors
    weights.write_bytes(healthy)
    assert run_main(monkeypatch, capsys, evaluation, cut, *of)[0] == 0
    for log in (cut / "evals.jsonl", cut / "memorization" / f"{newest.path.name}.jsonl"):
        verified = [line["inputs"].get("verified", True) for line in files.read_lines(log)]
        assert set(verified) == {True, False} and verified == sorted(verified)
    flip(weights)
    train.train(conftest.load(recipe, cut, "--train.verify=false"))
    assert "train.verify=false: no hash is compared" in capsys.readouterr().out
    assert run_folder.checkpoints(cut)[-1].step == 39


def test_files_that_state_json_does_not_know_are_not_read(cut, monkeypatch, capsys):
    newest = run_folder.checkpoints(cut)[-1]
    (newest.path / "notes.txt").write_text("mine")
    checkpoint.load_model(newest.path)
    stray = newest.path / "tokenizer.model"
    stray.write_bytes(b"another")
    code, _, errors = run_main(monkeypatch, capsys, sample, cut)
    assert code == 2 and "tokenizer.model is not listed in state.json; get it again" in errors
    stray.unlink()
    del newest.state["files"]["model.safetensors"]
    files.write_json(newest.path / "state.json", newest.state)
    (cut / "ledger.jsonl").unlink()  # which would notice first that state.json is another
    with pytest.raises(ConfigError, match=r"model\.safetensors is not listed in state\.json"):
        checkpoint.load_weights(newest.path, Transformer(LLAMA))


def test_a_process_hashes_a_file_once_and_again_when_it_has_changed(cut, monkeypatch):
    newest, hashed, plain = run_folder.checkpoints(cut)[-1].path, [], files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: (hashed.append(Path(path).name), plain(path))[1])
    for _ in range(2):
        checkpoint.load_model(newest)
    names = ["config.json", "model.safetensors", "state.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(hashed) == names
    flip(newest / "model.safetensors")
    with pytest.raises(ConfigError, match="damaged"):
        checkpoint.load_model(newest)
    assert hashed[5:] == ["model.safetensors"]


def test_the_page_says_which_results_are_of_files_that_nobody_compared(cut, monkeypatch, capsys):
    for _ in range(2):  # then with hashes compared, which measures again
        code, _, errors = run_main(monkeypatch, capsys, evaluation, cut, "--no-verify")
        assert not code, errors
    notes = " ".join(text for text, _ in results.load(cut).notes)
    assert "validation loss of step 0" in notes and "memorization of step 0" in notes
    assert "--no-verify" in notes
    code, _, errors = run_main(monkeypatch, capsys, evaluation, cut)
    assert not code, errors
    assert "--no-verify" not in " ".join(text for text, _ in results.load(cut).notes)


def test_a_state_json_that_the_ledger_does_not_know_is_refused_even_if_it_makes_sense(
    recipe, cut, monkeypatch, capsys
):
    """An order without its first rows is one that a rollback could have left."""
    newest = run_folder.checkpoints(cut)[-1]
    n_rows = json.loads((cut / "dataset.json").read_text())["rows"]
    for change in ({"begin": 1}, {"incidents": 9}, {"skipped": [[0, 6]]}, {"order": [[6, n_rows]]}):
        files.write_json(newest.path / "state.json", {**newest.state, **change})
        for script in (evaluation, sample):
            code, _, errors = run_main(monkeypatch, capsys, script, cut)
            assert code == 2 and "state.json is damaged" in errors and "in the ledger" in errors, change
    process = conftest.start(recipe, cut)
    _, errors = process.communicate()
    assert process.returncode == 2 and "state.json is damaged" in errors and errors.count("\n") == 1
    assert not audit.audit(cut)


def test_what_a_resumed_run_makes_again_is_not_compared_with_what_the_ledger_said_before(cut):
    known = run_folder.recorded(cut)
    last = max(known)
    assert len(known) >= 2 and integrity.state_damage(run_folder.checkpoints(cut)[-1]) == []
    files.append(cut / "ledger.jsonl", {"event": "resume", "step": run_folder.step_number(last) - 1})
    assert run_folder.recorded(cut) == {name: digest for name, digest in known.items() if name != last}
    first = min(known)
    files.append(cut / "ledger.jsonl", {"event": "spike", "back_to": first})
    assert run_folder.recorded(cut) == {first: known[first]}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rows": "many"}, 'rows is "many", and must be a count'),
        ({"order": [[0, 6, 9]]}, "order is .*must be pairs"),
        ({"files": {"../../secret": "0"}}, "files is .*must be the hash of each file"),
        ({"recent": [1]}, "recent is"),
        ({"rows": 7}, r"rows is 7, and after step \d+ it must be"),
        ({"tokens": 7}, "tokens is 7, and after"),
        ({"chunk": 0}, "chunk is 0, and after"),
        ({"order": [[0, 10**6]]}, "order has .*beyond the dataset's"),
        ({"order": [[0, 90], [80, 235]]}, "order has .*twice"),
        ({"order": [[0, 30]]}, r"step \d+ is not within 0 \.\. 5"),
        ({"skipped": [[228, 234]]}, "skipped has .*which it had not come to"),
        ({"dataset_sha256": "0" * 64}, "trained with another dataset"),
        ({"tokenizer_sha256": "0" * 64}, "trained with another tokenizer"),
        ({"tokens": None}, "tokens is null"),
        ({"begin": 47}, "is not within 47"),
    ],
)
def test_a_wrong_state_is_a_message_and_no_run_resumes_from_it(
    recipe, cut, monkeypatch, capsys, change, expected
):
    newest = run_folder.checkpoints(cut)[-1]
    files.write_json(newest.path / "state.json", {**newest.state, **change})
    with pytest.raises(ConfigError, match=expected):
        train.train(conftest.load(recipe, cut))
    code, out, _ = run_main(monkeypatch, capsys, audit, cut)
    damaged = [line for line in out.splitlines() if "DAMAGED" in line]
    assert code == 1 and damaged and all(newest.path.name in line for line in damaged)
    assert re.search(expected, out)


def test_verify_passes_every_kind_of_run(recipe, whole, tmp_path, monkeypatch, capsys):
    data = Dataset(conftest.load(recipe, whole).dataset)
    bad = {data.chunk_range(1)[0] + 3: math.nan}
    double = ("--train.batch_double_tokens=1200", "--train.batch_size_max=24")
    rollback = ("--train.on_incident=rollback", "--train.rollback_steps=2", "--train.rollback_skip=4")
    for name, times, asked in (
        ("double", 0, double),
        ("defer", 1, (*double, "--train.on_incident=defer")),
        ("skip", 9, ("--train.on_incident=skip", "--train.checkpoint_every=7")),
        ("rollback", 9, (*rollback, "--train.checkpoint_every=3")),
    ):
        with monkeypatch.context() as patched:
            Faults(patched, data, bad, times)
            train.train(conftest.load(recipe, tmp_path / name, *asked))
    capsys.readouterr()
    for name in (whole, *(tmp_path / name for name in ("double", "defer", "skip", "rollback"))):
        code, out, _ = run_main(monkeypatch, capsys, audit, name)
        found = run_folder.checkpoints(name)
        assert code == 0, out
        assert out.splitlines()[-1] == f"the newest whole checkpoint is {found[-1].path.name}"
        assert len(out.splitlines()) == len(list((name / "checkpoints").glob("*step-*"))) + 1
    assert list(tmp_path.glob("rollback/checkpoints/incident-*"))


def test_verify_names_each_damage_and_the_newest_checkpoint_that_has_none(cut, tmp_path, monkeypatch, capsys):
    paths = [c.path for c in run_folder.checkpoints(cut)]
    flip(paths[0] / "optimizer.safetensors")
    (paths[1] / "tokenizer.json").unlink()
    (paths[1] / "more.txt").write_text("more")
    state = run_folder.read(paths[-1]).state
    hf = json.loads((paths[-1] / "config.json").read_text())
    files.write_json(paths[-1] / "config.json", {**hf, "intermediate_size": 44, "eos_token_id": 7})
    other, adamw = trained(LLAMA)
    with torch.no_grad():
        saved = conftest.save(tmp_path / "other", other, [adamw], {"step": 3, "eot": 0}, {})
    for name in ("model.safetensors", "optimizer.safetensors"):
        shutil.copy(saved / name, paths[-1] / name)
    for name in ("config.json", "model.safetensors", "optimizer.safetensors"):  # whose hashes are right
        state["files"][name] = files.sha256(paths[-1] / name)
    files.write_json(paths[-1] / "state.json", state)
    shutil.copytree(paths[-1], cut / "checkpoints" / "step-00000047")
    (cut / "checkpoints" / "step-00000046").mkdir()
    code, out, _ = run_main(monkeypatch, capsys, audit, cut)
    assert code == 1
    for said in (
        f"{paths[0].name}  DAMAGED: optimizer.safetensors is damaged: SHA-256",
        f"{paths[1].name}  DAMAGED: more.txt is not listed in state.json",
        f"{paths[1].name}  DAMAGED: tokenizer.json is missing",
        f"{paths[-1].name}  DAMAGED: config.json is of another model than the run's",
        f"{paths[-1].name}  DAMAGED: config.json has another end-of-text token",
        "is (67, 24), the model wants (300, 24)",
        "step-00000046  DAMAGED: ",
        f"step-00000047/state.json says format 1 and step {state['step']}",
    ):
        assert said in out, out
    assert out.splitlines()[-1] == f"the newest whole checkpoint is {paths[-2].name}"
    net = Transformer(load_run(cut).model)
    assert "has no parameter like it" in audit.strange_moments(paths[-1], net)[0]
    (cut / "dataset.json").unlink()
    code, out, _ = run_main(monkeypatch, capsys, audit, cut)
    assert code == 1 and "dataset.json cannot be read" in out
    for arguments in ((tmp_path / "nowhere",), ("look", cut), ()):
        assert run_main(monkeypatch, capsys, audit, *arguments)[0] == 2


@pytest.mark.parametrize("damaged", [False, True])
def test_the_newest_checkpoint_is_called_whole_only_after_a_look(recipe, tmp_path, monkeypatch, damaged):
    cfg = conftest.load(recipe, tmp_path / "run", "--train.checkpoint_every=4")
    Faults(monkeypatch, Dataset(cfg.dataset), {6 * 6 + 2: math.nan})
    plain, newest = incidents.documents, tmp_path / "run" / "checkpoints" / "step-00000004"

    def documents(*arguments):  # of the incident, named after the newest checkpoint has been saved
        if damaged:
            flip(newest / "optimizer.safetensors")
        return plain(*arguments)

    monkeypatch.setattr(incidents, "documents", documents)
    said = "step-00000004, is whole"
    if damaged:
        said = r"the newest checkpoint is not good: .*step-00000004/optimizer\.safetensors is damaged"
    with pytest.raises(incidents.Stopped, match=said):
        train.train(cfg)


def test_two_processes_refuse_a_damaged_checkpoint_together(recipe, cut):
    newest = run_folder.checkpoints(cut)[-1]
    flip(newest.path / "model.safetensors")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    command += [ROOT / "train.py", recipe, f"--run={cut}", "--train.micro_batch_size=3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (
        done.returncode and done.stderr.count("error: ") >= 1 and "another process is gone" not in done.stderr
    )
    assert f"{newest.path}/model.safetensors is damaged" in done.stderr
    said = [json.loads(path.read_text())["error"] for path in (cut / ".processes").glob("*.json")]
    assert said and all("model.safetensors is damaged" in error for error in said)


ONE_SEES_DAMAGE = """
import sys
sys.path.insert(0, {root!r})
import integrity, parallel
from config import ConfigError, Parallel, Train
world = parallel.start(Train(device="cpu"), Parallel(timeout_seconds=30))
if world.rank == 1:
    integrity.compare = lambda c, names: ["config.json is damaged: only this process sees it"]
try:
    with integrity.compared({folder!r}, "model", world=world):
        pass
except ConfigError as error:
    print(f"rank {{world.rank}}: {{error}}", flush=True)
world.leave()
"""


def test_a_small_file_that_one_process_finds_damaged_is_refused_by_all(whole, tmp_path):
    """Else the others would wait for this process until the patience of a collective ends."""
    (tmp_path / "one.py").write_text(
        ONE_SEES_DAMAGE.format(root=str(ROOT), folder=str(run_folder.checkpoints(whole)[-1].path))
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, tmp_path / "one.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"rank (\d): \S+config\.json is damaged: only this", done.stdout)) == ["0", "1"]


def test_a_flipped_byte_in_a_chunk_ends_training_with_a_message(recipe, tmp_path, monkeypatch, capsys):
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(conftest.load(recipe, run).dataset, data)
    flip(data / "chunks" / "001.bin")
    process = conftest.start(recipe, run, f"--dataset={data}")
    _, errors = process.communicate()
    assert process.returncode == 2 and errors.count("\n") == 1
    assert f"{data}/chunks/001.bin is damaged: its content differs" in errors
    first = Dataset(data).chunk_range(1)[0]
    assert [r["step"] for r in conftest.metrics(run)] == [*range(1, first // 6 + 1)]
    flip(data / "validation" / "prose.bin")
    code, _, errors = run_main(monkeypatch, capsys, evaluation, run)
    assert code == 2 and "prose.bin is damaged: its content differs" in errors
    assert not (run / "evals.jsonl").exists()
