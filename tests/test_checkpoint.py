"""checkpoint.py: folders that others open, saves that survive a kill, loads that restore every bit."""

import dataclasses
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import checkpoint
import families
import files
import optim
from config import ConfigError, Model, Optim
from model import Transformer

ROOT = Path(__file__).parents[1]
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
    folder = checkpoint.save(tmp_path, net, adamw, state(steps), {})
    for _ in range(2):
        update(net, adamw)

    other = Transformer(cfg)
    other_adamw = optim.adamw(other, Optim(lr=1e-2))
    with torch.no_grad():
        checkpoint.load_weights(folder, other)
    checkpoint.load_optimizer(folder, other, other_adamw)
    for _ in range(2):  # the random tokens too go on where they were
        update(other, other_adamw)
    for (name, a), b in zip(net.named_parameters(), other.parameters()):
        assert torch.equal(a, b), name
        assert torch.equal(adamw.state[a]["exp_avg_sq"], other_adamw.state[b]["exp_avg_sq"]), name


@FAMILIES
def test_transformers_opens_a_checkpoint_as_it_stands(tmp_path, cfg):
    transformers = pytest.importorskip("transformers")
    net, adamw = trained(cfg)
    folder = checkpoint.save(tmp_path, net, adamw, state(3), {})
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
    folder = checkpoint.save(tmp_path, net, adamw, state(3), {})
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
    folder = checkpoint.save(tmp_path, net, adamw, state(3), {"tokenizer.json": b"{}"})
    (found,) = checkpoint.checkpoints(tmp_path)
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
        checkpoint.save(tmp_path, net, adamw, state(step), {})
    (tmp_path / "checkpoints" / "step-00000007").mkdir()
    (tmp_path / "checkpoints" / "step-notes").mkdir()
    (tmp_path / "checkpoints" / "step-00000005" / "state.json").write_text("{")
    assert [c.step for c in checkpoint.checkpoints(tmp_path)] == [999_999, 1_000_000, 100_000_000]
    assert checkpoint.checkpoints(tmp_path / "nowhere") == []


def test_a_step_that_is_saved_again_replaces_the_folder(tmp_path):
    net, adamw = trained(LLAMA)
    first = files.sha256(checkpoint.save(tmp_path, net, adamw, state(3), {}) / "model.safetensors")
    update(net, adamw)
    second = files.sha256(checkpoint.save(tmp_path, net, adamw, state(3), {}) / "model.safetensors")
    assert first != second and len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_a_kill_during_a_save_leaves_whole_checkpoints_only(tmp_path):
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "from test_checkpoint import *\n"
        "net, adamw = trained(LLAMA)\n"
        "for step in range(1, 10**6):\n"
        "    checkpoint.save(sys.argv[3], net, adamw, state(step), {})\n"
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
        found = checkpoint.checkpoints(tmp_path / str(attempt))
        assert [c.step for c in found][:last] == list(range(1, last + 1))
        for each in found:
            checkpoint.load_model(each.path)
            assert files.sha256(each.path / "model.safetensors") == each.state["files"]["model.safetensors"]
        reached += len(found)
    assert reached >= 8


def test_a_save_that_fails_leaves_nothing_behind_and_says_why(tmp_path, monkeypatch):
    net, adamw = trained(LLAMA)
    good = checkpoint.save(tmp_path, net, adamw, state(3), {})

    def full(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, net, adamw, state(4), {})
    assert list((tmp_path / "checkpoints").iterdir()) == [good]
    assert [c.step for c in checkpoint.checkpoints(tmp_path)] == [3]


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
    folder = checkpoint.save(tmp_path, net, adamw, state(3), {})
    for path in folder.iterdir():
        assert path.suffix in (".json", ".safetensors")
    source = (ROOT / "checkpoint.py").read_text()
    assert "torch.load" not in source and "torch.save" not in source and "pickle." not in source


# ---- while training goes on -------------------------------------------------------------------------------


@pytest.fixture
def slow_disk(monkeypatch):
    """Files are written when the test says so."""
    write, gate = checkpoint.save_file, threading.Event()

    def later(*arguments, **named):
        assert gate.wait(30)
        write(*arguments, **named)

    monkeypatch.setattr(checkpoint, "save_file", later)
    return gate


def test_what_is_saved_is_the_moment_when_saving_began(tmp_path, slow_disk):
    net, adamw = trained(LLAMA)
    saving = checkpoint.Saving(tmp_path, net, adamw)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    moment = adamw.state[net.norm.weight]["exp_avg"].clone()
    saving.begin(state(3), {"tokenizer.json": b"{}"})
    assert saving.busy()
    for _ in range(3):
        update(net, adamw)  # while the disk is still at work
    assert checkpoint.checkpoints(tmp_path) == []
    slow_disk.set()
    folder = saving.finish()
    assert not saving.busy() and [c.step for c in checkpoint.checkpoints(tmp_path)] == [3]
    saved = checkpoint.load_model(folder)
    for name, p in saved.named_parameters():
        assert torch.equal(p, before[name]), name
    assert any(not torch.equal(p, before[name]) for name, p in net.named_parameters())
    with checkpoint.open_tensors(folder / "optimizer.safetensors") as tensors:
        assert torch.equal(tensors.get_tensor("exp_avg.norm.weight"), moment)
    assert saving.finish() is None  # nothing under way


def test_the_memory_of_one_save_serves_the_next(tmp_path):
    net, adamw = trained(LLAMA)
    saving, rooms = checkpoint.Saving(tmp_path, net, adamw), []
    for step in (3, 4, 5):
        saving.begin(state(step), {})  # waits for the one before
        rooms.append({name: tensor.data_ptr() for name, tensor in saving.room.items()})
        update(net, adamw)
    saving.finish()
    assert rooms[0] == rooms[1] == rooms[2]
    hashes = [c.state["files"]["model.safetensors"] for c in checkpoint.checkpoints(tmp_path)]
    assert len(hashes) == len(set(hashes)) == 3


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")]
)
def test_a_disk_that_fails_in_the_background_is_told_and_leaves_the_last_checkpoint(
    tmp_path, monkeypatch, error
):
    net, adamw = trained(LLAMA)
    checkpoint.save(tmp_path, net, adamw, state(3), {})
    write = checkpoint.save_file

    def fails(tensors, path, **named):
        if path.name.startswith("optimizer"):
            raise error
        write(tensors, path, **named)

    monkeypatch.setattr(checkpoint, "save_file", fails)
    saving = checkpoint.Saving(tmp_path, net, adamw)
    saving.begin(state(4), {})
    with pytest.raises(OSError, match=rf"step 4 is not saved: process 0: .*{error.strerror}"):
        saving.finish()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    monkeypatch.undo()
    saving.begin(state(4), {})  # there is room again
    saving.finish()
    assert [c.step for c in checkpoint.checkpoints(tmp_path)] == [3, 4]


@FAMILIES
def test_a_large_model_is_stored_in_shards_that_others_open_too(tmp_path, monkeypatch, cfg):
    transformers = pytest.importorskip("transformers")
    net, adamw = trained(cfg)
    whole = checkpoint.save(tmp_path / "whole", net, adamw, state(3), {})
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 9000)  # the largest tensor has 4 x 71 x 24 = 6816
    folder = checkpoint.save(tmp_path / "shards", net, adamw, state(3), {})
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
    checkpoint.load_optimizer(folder, other, other_adamw)
    for a, b in zip(net.parameters(), other.parameters()):
        assert all(torch.equal(adamw.state[a][key], other_adamw.state[b][key]) for key in adamw.state[a])
    states = [checkpoint.read(f).state for f in (whole, folder)]
    assert len({checkpoint.weights_hash(s) for s in states}) == 2  # of other files


def test_a_layout_fills_files_in_order_and_a_large_tensor_has_one_of_its_own(monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 10)
    assert checkpoint.layout("model", {"a": 4, "b": 6}) == {"model.safetensors": ["a", "b"]}
    assert checkpoint.layout("model", {"a": 4, "b": 7, "c": 25, "d": 1}) == {
        "model-00001-of-00004.safetensors": ["a"],
        "model-00002-of-00004.safetensors": ["b"],
        "model-00003-of-00004.safetensors": ["c"],
        "model-00004-of-00004.safetensors": ["d"],
    }


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
    folder = checkpoint.save(tmp_path, net, parts, state(1), {})
    both(net, parts)
    other = checkpoint.load_model(folder).requires_grad_(True)
    other_parts = optim.optimizers(other, cfg)
    checkpoint.load_optimizer(folder, other, other_parts)
    both(other, other_parts)
    for (name, a), b in zip(net.named_parameters(), other.parameters()):
        assert torch.equal(a, b), name
    with pytest.raises(ConfigError, match=r"lacks AdamW's state of layers\.0"):
        checkpoint.load_optimizer(folder, other, optim.adamw(other, Optim()))


def test_the_newest_others_are_kept_and_all_that_end_a_chunk(tmp_path):
    net, adamw = trained(LLAMA, 0)
    for step in range(9):
        checkpoint.save(tmp_path, net, adamw, state(step), {})
    assert checkpoint.delete_others(tmp_path, kept={0, 4}, newest=2) == [1, 2, 3, 5, 6]
    assert [c.step for c in checkpoint.checkpoints(tmp_path)] == [0, 4, 7, 8]
    assert checkpoint.delete_others(tmp_path, kept={0, 4}, newest=2) == []
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4
