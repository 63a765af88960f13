"""train.py and parallel.py: numbers by hand, interruptions that leave no trace, processes that agree."""

import gc
import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, load, metrics, start, wait_for_step, weights

import checkpoint
import config
import cost
import files
import hardware
import loss
import memory
import optim
import parallel
import run_folder
import train
from config import Config, ConfigError, Model, Optim, Train
from dataset import Dataset
from initial import initial_weights
from manifest import differences
from model import Transformer

# ---- what is printed is right -----------------------------------------------------------------------------


def test_one_checkpoint_a_chunk_and_one_at_step_0_and_the_ledger_tells_it(recipe, whole):
    dataset = Dataset(config.load(str(recipe)).dataset)
    found = run_folder.checkpoints(whole)
    n_steps = dataset.n_rows // 6
    ends = [min(n_steps, math.ceil(dataset.chunk_range(c)[1] / 6)) for c in range(5)]
    assert [c.step for c in found] == [0, *ends] and ends[-1] == n_steps
    assert [c.state["chunk"] for c in found] == [-1, 0, 1, 2, 3, 4]
    assert [c.state["rows"] for c in found] == [6 * s for s in [0, *ends]]
    assert [c.state["tokens"] for c in found] == [144 * s for s in [0, *ends]]
    assert {c.state["dataset_sha256"] for c in found} == {dataset.sha256}
    events = [record["event"] for record in files.read_lines(whole / "ledger.jsonl")]
    assert events == ["start", *["checkpoint"] * 6, "finish"]
    first = files.read_lines(whole / "ledger.jsonl")[0]
    assert first["rows_after_last_step"] == dataset.n_rows - 6 * n_steps
    assert config.load_run(whole) == load(recipe, whole)
    assert files.sha256(whole / "dataset.json") == dataset.sha256


def test_loss_gradient_norm_rate_and_speed_are_those_worked_out_by_hand(recipe, whole):
    cfg = load(recipe, whole)
    batch = torch.from_numpy(Dataset(cfg.dataset).rows(0, 6))
    net = checkpoint.load_model(whole / "checkpoints" / "step-00000000").requires_grad_(True)
    loss = F.cross_entropy(net(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())  # one mean over 6 x 24
    loss.backward()
    norm = math.sqrt(sum((p.grad.double() ** 2).sum().item() for p in net.parameters()))
    first = metrics(whole)[0]
    assert first["loss"] == pytest.approx(loss.item(), abs=2e-6)
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-5)
    for record in metrics(whole):
        assert record["tokens"] == 144 * record["step"]
        assert record["tokens_per_second"] == pytest.approx(144 / record["seconds"])
        assert record["data_seconds"] < record["seconds"]
    n_steps = len(metrics(whole))
    rates = [optim.learning_rate(step, n_steps, cfg.optim) for step in range(n_steps)]
    assert [record["lr"] for record in metrics(whole)] == rates


def test_it_learns(whole):
    losses = [record["loss"] for record in metrics(whole)]
    assert losses[0] == pytest.approx(math.log(300), abs=0.1) and losses[-1] < 0.7 * losses[0]


def test_reading_a_batch_is_a_small_part_of_a_step(whole):
    seconds = [record["data_seconds"] / record["seconds"] for record in metrics(whole)]
    assert sorted(seconds)[len(seconds) // 2] < 0.2  # a step takes only a few milliseconds here


def test_accumulation_one_by_four_equals_four_by_one(recipe, tmp_path):
    for micro in (1, 2, 6):
        settings = (f"--train.micro_batch_size={micro}", "--train.steps=8")
        train.train(load(recipe, tmp_path / str(micro), *settings))
    runs = [metrics(tmp_path / str(micro)) for micro in (1, 2, 6)]
    for records in zip(*runs):
        losses, norms = [r["loss"] for r in records], [r["grad_norm"] for r in records]
        assert max(losses) - min(losses) < 5e-6 and max(norms) / min(norms) < 1 + 1e-4


def test_a_run_records_what_the_plan_chose_and_resumes_with_another_choice(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "RECOMPUTES", (0, 1))
    for steps, micro, again, rows, recompute in (
        (4, 0, "auto", 6, 0),
        (8, 0, 0, 2, 0),
        (12, 1, "auto", 1, 1),
    ):
        asked = (f"--train.micro_batch_size={micro}", f"--train.activation_checkpointing={again}")
        cfg = load(recipe, tmp_path / "run", *asked, f"--train.steps={steps}")
        # a machine that has room for exactly these rows with this recompute
        need = memory.total(memory.peak(memory.with_choice(cfg, rows, recompute), 1, cuda=False))
        monkeypatch.setattr(hardware, "machine_memory", lambda need=need: need / hardware.USABLE_ON_CPU)
        train.train(cfg)
        saved = config.load_run(tmp_path / "run").train
        assert (saved.micro_batch_size, saved.activation_checkpointing) == (rows, recompute)
    ledger = list(files.read_lines(tmp_path / "run" / "ledger.jsonl"))
    began = [line for line in ledger if line["event"] in ("start", "resume")]
    assert [line["micro_batch_size"] for line in began] == [6, 2, 1]
    assert [line["activation_checkpointing"] for line in began] == [0, 0, 1]
    assert "train.micro_batch_size: 6 -> 2" in began[1]["changed"]
    train.train(load(recipe, tmp_path / "plain", "--train.steps=12"))
    losses = [[record["loss"] for record in metrics(tmp_path / run)] for run in ("run", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_stopping_early_does_not_change_the_schedule(recipe, whole, tmp_path):
    train.train(load(recipe, tmp_path / "run", "--train.steps=12"))
    for short, full in zip(metrics(tmp_path / "run"), metrics(whole)):
        assert (short["lr"], short["loss"]) == (full["lr"], full["loss"])
    assert run_folder.checkpoints(tmp_path / "run")[-1].step == 12


def test_checkpoints_come_at_powers_of_two_and_every_n_steps_if_asked(recipe, tmp_path):
    asked = ("--train.checkpoint_chunks=false", "--train.checkpoint_powers_of_two=true", "--train.steps=13")
    train.train(load(recipe, tmp_path / "run", *asked, "--train.checkpoint_every=6"))
    assert [c.step for c in run_folder.checkpoints(tmp_path / "run")] == [0, 1, 2, 4, 6, 8, 12, 13]


# ---- interruptions ----------------------------------------------------------------------------------------


def test_a_run_killed_at_any_moment_ends_with_the_same_weights(recipe, whole, tmp_path):
    run = tmp_path / "run"
    for step in (7, 16, 27):  # steps done so far in metrics.jsonl, counted with repetitions
        process = start(recipe, run)
        wait_for_step(run, step, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = start(recipe, run)
    assert process.wait() == 0, process.stderr.read()
    assert weights(run) == weights(whole)
    assert [r["loss"] for r in metrics(run)] == [r["loss"] for r in metrics(whole)]
    assert "resume" in {record["event"] for record in files.read_lines(run / "ledger.jsonl")}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_leaves_and_the_same_command_goes_on(recipe, whole, tmp_path, number):
    run = tmp_path / "run"
    process = start(recipe, run)
    wait_for_step(run, 3, process)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == 128 + number and "interrupted and saved at step" in out and err == ""
    last = files.read_lines(run / "ledger.jsonl")[-1]
    assert last["event"] == "interrupted" and last["step"] == run_folder.checkpoints(run)[-1].step
    for _ in range(2):  # the second finds nothing to do
        train.train(load(recipe, run))
    assert {name: w for name, w in weights(run).items() if name in weights(whole)} == weights(whole)


def test_a_loss_that_is_not_finite_stops_with_step_chunk_and_documents(recipe, tmp_path):
    run = tmp_path / "run"
    process = start(recipe, run, "--optim.lr=1e30", "--optim.warmup_steps=0")
    err = process.communicate()[1]
    assert process.returncode == 1 and "Traceback" not in err
    record = files.read_lines(run / "ledger.jsonl")[-1]
    assert record["event"] == "nonfinite" and f"after step {record['step']}: chunk {record['chunk']}" in err
    dataset, first = Dataset(config.load(str(recipe)).dataset), 6 * record["step"]
    expected = {f"{d[0]}:{d[1]}" for p in range(first, first + 6) for d in dataset.documents(p)}
    assert set(record["documents"]) == expected and record["rows"] == [[first, first + 5]]
    assert [c.step for c in run_folder.checkpoints(run)] == [0]


def test_another_config_does_not_continue_a_run(recipe, whole, tmp_path):
    with pytest.raises(ConfigError, match=r"optim.lr: 0.01 -> 0.5"):
        train.train(load(recipe, whole, "--optim.lr=0.5"))
    train.train(load(recipe, whole, "--train.log_every=1"))  # harmless


def test_a_dataset_that_does_not_fit_is_refused_before_anything_is_written(recipe, tmp_path):
    for override, message in (
        ("--model.seq_len=16", "rows of 24 tokens"),
        ("--model.vocab_size=299", "at least 300"),
        ("--dataset=/nowhere", "python data.py"),
        ("--train.batch_size=600", "not one step"),
        ("--train.micro_batch_size=4", "does not divide"),
        ("--data.seed=7", "data.seed=1234 .now 7."),
    ):
        with pytest.raises(ConfigError, match=message):
            train.train(load(recipe, tmp_path / "run", override))
    assert not (tmp_path / "run").exists()


def test_two_trainings_do_not_share_a_run_folder(recipe, tmp_path):
    run = tmp_path / "run"
    process = start(recipe, run)
    wait_for_step(run, 1, process)
    process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(ConfigError, match="another training is at work"):
            train.train(load(recipe, run))
    finally:
        process.kill()
        process.communicate()


def test_a_disk_that_fills_up_is_a_message_and_earlier_checkpoints_stay(recipe, tmp_path):
    import resource

    def small_files():  # what the kernel then answers is EFBIG, where a full disk answers ENOSPC
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))

    run = tmp_path / "run"  # weights stay below the limit, the moments of AdamW, twice that, do not
    command = [sys.executable, ROOT / "train.py", recipe, f"--run={run}", "--model.d_ff=120"]
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_files)
    assert result.returncode == 1 and "earlier checkpoints are whole" in result.stderr
    assert "Traceback" not in result.stderr
    assert [c.step for c in run_folder.checkpoints(run)] == [0]
    assert len(list((run / "checkpoints").iterdir())) == 1


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_shares_of_a_batch_are_the_batch_in_order(processes):
    world = [parallel.World(r, processes, torch.device("cpu"), torch.float32) for r in range(processes)]
    assert [i for e in world for i in range(12)[e.share(12)]] == list(range(12))


def test_cuda_that_is_not_there_is_an_error_before_any_process_group():
    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    with pytest.raises(ConfigError, match="no CUDA device"):
        hardware.device("cuda")
    assert hardware.device("auto") == torch.device("cpu")
    assert parallel.precision("auto", torch.device("cpu")) == torch.float32


# ---- golden -----------------------------------------------------------------------------------------------

GOLDEN = [7.65753, 7.63561, 7.56108, 7.50136, 7.27669, 7.11691, 7.00868, 6.93969, 6.88784, 6.87609]


def test_ten_steps_of_a_small_model_have_their_golden_losses():
    """A change that should not change the mathematics must not change these: float noise stays below 1e-4."""
    model = Model(vocab_size=2048, seq_len=256, d_model=128, n_layers=4, n_heads=4, n_kv_heads=2, d_ff=344)
    net = Transformer(model)
    net.init_weights(1234)
    recipe = Optim(lr=3e-3, warmup_steps=3)
    adamw = optim.adamw(net, recipe)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(10):
        # Text with something to learn: each id follows from the one before it by a rule, with noise.
        noise = torch.randint(7, (4, model.seq_len + 1), generator=generator)
        tokens = (torch.arange(model.seq_len + 1) * 31 + noise) % model.vocab_size
        for group in adamw.param_groups:
            group["lr"] = optim.learning_rate(step, 10, recipe)
        loss = net(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
        loss.backward()
        optim.clip_gradients(net, optim.grad_norm(net).item(), recipe.grad_clip)
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    rounded = [round(loss, 5) for loss in losses]
    assert losses == pytest.approx(GOLDEN, abs=1e-4), f"{rounded}"


# ---- beginning with a model of someone else's, and other architectures ------------------------------------


def test_init_from_begins_with_those_weights_and_says_so(recipe, whole, tmp_path):
    run = tmp_path / "adapted"
    train.train(load(recipe, run, f"--init-from={whole}", "--train.steps=3", "--optim.lr=1e-3"))
    last = run_folder.checkpoints(whole)[-1]
    first, *_ = run_folder.checkpoints(run)
    assert first.step == 0
    assert first.state["files"]["model.safetensors"] == last.state["files"]["model.safetensors"]
    start, *_ = files.read_lines(run / "ledger.jsonl")
    assert start["init_from"] == str(last.path)
    assert metrics(run)[0]["loss"] < 0.8 * metrics(whole)[0]["loss"]  # it knows these sheep already


def test_init_from_goes_on_from_its_own_checkpoints_when_the_origin_is_gone(recipe, whole, tmp_path):
    origin, run = tmp_path / "origin", tmp_path / "run"
    shutil.copytree(run_folder.checkpoints(whole)[2].path, origin)
    train.train(load(recipe, run, f"--init-from={origin}", "--train.steps=4"))
    shutil.rmtree(origin)
    train.train(load(recipe, run, f"--init-from={origin}", "--train.steps=6"))
    assert [c.step for c in run_folder.checkpoints(run)] == [0, 4, 6]
    with pytest.raises(ConfigError, match="init_from"):
        train.train(load(recipe, run, "--train.steps=8"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--model.d_ff=44", "add --model.d_ff=40"),
        ("--model.rope_theta=300", "add --model.rope_theta=10000.0"),
        ("--model.init=mup --model.mup_base_width=6", "add --model.mup_base_width=0 --model.init=normal"),
        ("--init-from=/nowhere", "not a folder"),
    ],
)
def test_init_from_of_another_model_is_refused_before_anything_is_written(
    recipe, whole, tmp_path, override, expected
):
    with pytest.raises(ConfigError, match=expected):
        train.train(load(recipe, tmp_path / "run", f"--init-from={whole}", *override.split()))
    assert not (tmp_path / "run").exists()


def test_init_from_a_model_with_another_tokenizer_is_refused(recipe, whole, tmp_path):
    origin = tmp_path / "origin"
    shutil.copytree(run_folder.checkpoints(whole)[0].path, origin)
    (origin / "state.json").unlink()  # whose hashes are of the files as they were
    one_merge_less(origin / "tokenizer.json")
    with pytest.raises(ConfigError, match=f"another tokenizer.*--tokenizer.path={origin}"):
        train.train(load(recipe, tmp_path / "run", f"--init-from={origin}"))


def one_merge_less(path: Path) -> None:
    """Makes another tokenizer of it, with as many entries."""
    about = json.loads(path.read_text())
    merge = about["model"]["merges"].pop()
    left, right = merge if isinstance(merge, list) else merge.split(" ")
    about["model"]["vocab"]["~#~"] = about["model"]["vocab"].pop(left + right)
    path.write_text(json.dumps(about))


def test_a_tokenizer_that_another_program_has_written_anew_is_the_same(recipe, whole, tmp_path):
    transformers = pytest.importorskip("transformers")
    origin = tmp_path / "origin"
    shutil.copytree(run_folder.checkpoints(whole)[0].path, origin)
    before = (origin / "tokenizer.json").read_bytes()
    transformers.AutoTokenizer.from_pretrained(origin).save_pretrained(origin)
    assert (origin / "tokenizer.json").read_bytes() != before
    with pytest.raises(
        ConfigError, match=r"tokenizer.* is damaged: .*changed yourself .* state\.json is deleted"
    ):
        train.train(load(recipe, tmp_path / "run", f"--init-from={origin}", "--train.steps=1"))
    (origin / "state.json").unlink()
    train.train(load(recipe, tmp_path / "run", f"--init-from={origin}", "--train.steps=1"))


ARCHITECTURES = {
    "documents apart": ["--model.document_mask=true"],
    "pythia": ["--model.norm=layernorm", "--model.ffn=gelu", "--model.bias=true", "--model.n_kv_heads=4",
               "--model.parallel_residual=true", "--model.init=small_wang", "--optim.decay=matrices"],
    "olmo 2": ["--model.norm_place=after", "--model.qk_norm=true", "--optim.decay=not_embeddings"],
    "mup": ["--model.init=mup", "--model.mup_base_width=8", "--model.rope_pairs=neighbours",
            "--model.embedding_multiplier=3", "--model.tie_embeddings=true", "--optim.decay=matrices"],
    "alibi": ["--model.positions=alibi", "--model.window=9"],
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_learns_resumes_bit_for_bit_and_is_evaluated(recipe, tmp_path, name):
    overrides = ARCHITECTURES[name]
    straight, interrupted = tmp_path / "straight", tmp_path / "interrupted"
    train.train(load(recipe, straight, "--train.steps=20", *overrides))
    train.train(load(recipe, interrupted, "--train.steps=11", *overrides))
    train.train(load(recipe, interrupted, "--train.steps=20", *overrides))
    assert weights(straight)["step-00000020"] == weights(interrupted)["step-00000020"]
    losses = [record["loss"] for record in metrics(straight)]
    assert losses[-1] < losses[0] - 0.5
    result = subprocess.run([sys.executable, ROOT / "eval.py", straight], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    scored = {line["checkpoint"]: line["loss"] for line in files.read_lines(straight / "evals.jsonl")}
    assert scored["step-00000020"] < scored["step-00000000"] - 0.5


def test_a_document_mask_in_training_is_that_of_the_tokenizers_end_of_text(recipe, tmp_path):
    cfg = load(recipe, tmp_path / "run", "--train.steps=1", "--model.document_mask=true")
    train.train(cfg)
    dataset = Dataset(cfg.dataset)
    net = checkpoint.load_model(tmp_path / "run" / "checkpoints" / "step-00000000")
    assert net.eot == dataset.manifest["eot"]
    nats = 0.0
    for row in torch.from_numpy(dataset.rows(0, 6)):  # each document of each row alone
        inputs, targets = row[:-1], row[1:]
        ends = [0, *(i + 1 for i, token in enumerate(inputs.tolist()) if token == net.eot), 24]
        for first, end in itertools.pairwise(ends):
            if end > first:
                nats += net(inputs[None, first:end], targets[None, first:end]).item()
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(nats / 144, abs=2e-6)


def test_eval_reads_a_bare_model_folder_on_held_out_text(recipe, whole, tmp_path):
    folder = tmp_path / "model"
    last = run_folder.checkpoints(whole)[-1].path
    shutil.copytree(last, folder)
    (folder / "state.json").unlink()
    command = [sys.executable, ROOT / "eval.py", folder, "--dataset", config.load(str(recipe)).dataset]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    row = shown.stdout.splitlines()[1].split()
    rows = torch.from_numpy(Dataset(config.load(str(recipe)).dataset).validation("prose").astype("int64"))
    expected = checkpoint.load_model(last)(rows[:, :-1], rows[:, 1:]).item() / rows[:, 1:].numel()
    assert row[:2] == ["model", "prose"] and float(row[2]) == pytest.approx(expected, abs=1e-4)
    assert not (folder / "evals.jsonl").exists()
    one_merge_less(folder / "tokenizer.json")
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2 and "another tokenizer" in refused.stderr


# ---- recipes of the loop ----------------------------------------------------------------------------------


def test_annealing_goes_on_from_a_checkpoint_with_its_optimizer_and_falls_to_zero(recipe, whole, tmp_path):
    run, origin = tmp_path / "run", run_folder.checkpoints(whole)[2].path
    begin, n_steps = run_folder.read(origin).step, len(metrics(whole))
    asked = (f"--init_from={origin}", "--optim.anneal_steps=7")
    train.train(load(recipe, run, *asked, f"--train.steps={begin + 4}"))  # cut off on the way
    train.train(load(recipe, run, *asked))
    cfg, peak = load(recipe, run), optim.learning_rate(begin, n_steps, load(recipe, run).optim)
    records = metrics(run)
    assert [r["step"] for r in records] == [*range(begin + 1, begin + 8)]
    assert [r["lr"] for r in records] == pytest.approx([peak * (1 - i / 7) for i in range(7)])
    # the first update is the same as the original run's: same weights, moments, rows and rate
    assert records[0]["loss"] == metrics(whole)[begin]["loss"]
    assert records[1]["loss"] == metrics(whole)[begin + 1]["loss"]
    assert records[3]["loss"] != metrics(whole)[begin + 3]["loss"]
    assert run_folder.checkpoints(run)[0].step == begin
    assert run_folder.checkpoints(run)[-1].step == begin + 7
    for override, message in (
        ("--optim.anneal_steps=700", "anneal in fewer steps"),
        ("--train.batch_size=12", "anneal with the same ones"),
    ):
        with pytest.raises(ConfigError, match=message):
            train.train(load(recipe, tmp_path / "other", *asked, override))
    with pytest.raises(ConfigError, match="needs --init_from"):
        load(recipe, run, "--optim.anneal_steps=7")
    with pytest.raises(ConfigError, match=r"is no checkpoint of train\.py"):
        bare = tmp_path / "bare"
        shutil.copytree(origin, bare)
        (bare / "state.json").unlink()
        train.train(load(recipe, tmp_path / "other", f"--init_from={bare}", "--optim.anneal_steps=7"))
    assert cfg.optim.anneal_steps == 0


def test_a_schedule_of_tokens_is_that_of_the_tokens_in_the_metrics(recipe, tmp_path, capsys):
    run, end = tmp_path / "run", tmp_path / "end"
    # 6 rows a step, and 12 after 50 rows; the data have some 290 rows of 24 tokens
    asked = ("--train.batch_double_tokens=1200", "--train.batch_size_max=12", "--optim.warmup_steps=0")
    asked += ("--optim.schedule_tokens=6000", "--optim.warmup_tokens=1000")
    train.train(load(recipe, run, *asked, "--train.steps=24"))
    sizes = [6] * 9 + [12] * 15
    seen = [24 * n for n in itertools.accumulate([0, *sizes])]

    def rate(tokens: int) -> float:
        cosine = (1 + math.cos(math.pi * min(1, (tokens - 1000) / 5000))) / 2
        return 1e-2 * (tokens / 1000 if tokens < 1000 else 0.1 + 0.9 * cosine)

    records = metrics(run)
    assert [r["lr"] for r in records] == pytest.approx([rate(tokens) for tokens in seen[:-1]])
    said = f"steps    0 to 24, {seen[24]:,} tokens of a schedule of 6,000 tokens (train.steps ends it early;"
    assert said in capsys.readouterr().out
    # annealing leaves it where it is after 12 steps, and falls in steps
    origin = [c for c in run_folder.checkpoints(run) if c.step < 24][-1]
    anneal = (f"--init_from={origin.path}", "--optim.anneal_steps=4")
    train.train(load(recipe, end, *asked, *anneal))
    expected = [rate(seen[origin.step]) * (1 - i / 4) for i in range(4)]
    assert [r["lr"] for r in metrics(end)] == pytest.approx(expected)
    assert f"steps    {origin.step} to {origin.step + 4}, annealing: the" in capsys.readouterr().out


def test_a_shorter_run_may_have_a_schedule_that_fits_and_the_console_says_which(
    recipe, whole, tmp_path, capsys
):
    n_steps = len(metrics(whole))

    def lrs(name: str, *asked: str) -> tuple[list[float], str]:
        train.train(load(recipe, tmp_path / name, *asked))
        out = capsys.readouterr().out
        said = next(line for line in out.splitlines() if line.startswith("steps "))
        return [record["lr"] for record in metrics(tmp_path / name)], said + out.partition("note     it")[2]

    def over(length: int) -> list[float]:
        cosine = [(1 + math.cos(math.pi * min(1, max(0, s - 4) / (length - 4)))) / 2 for s in range(n_steps)]
        return [1e-2 * (s / 4 if s < 4 else 0.1 + 0.9 * c) for s, c in enumerate(cosine)]

    early, said = lrs("early", "--train.steps=12")
    assert early == pytest.approx(over(n_steps)[:12])
    assert f"0 to 12 of a schedule of {n_steps} steps (train.steps ends it early; " in said
    assert "--optim.schedule_steps=12 would fit the schedule to it)" in said
    fits, said = lrs("fits", "--train.steps=12", "--optim.schedule_steps=12")
    assert fits == pytest.approx(over(12)[:12]) and fits != early and "0 to 12, the whole schedule" in said
    longer, said = lrs("longer", "--train.steps=12", "--optim.schedule_steps=9")
    assert longer == pytest.approx(over(9)[:12]) and longer[9:] == pytest.approx([1e-3] * 3)
    assert "0 to 12; the schedule ends after 9 steps, and the learning rate stays at its last value" in said
    inside, said = lrs("inside", "--train.steps=3")
    assert inside == pytest.approx([0, 0.0025, 0.005])
    assert "ends inside the warm-up of 4 steps, at 50.0% of the peak learning rate" in said
    with pytest.raises(ConfigError, match=r"optim\.schedule_steps: 12 -> 9"):  # neither one run nor the other
        train.train(load(recipe, tmp_path / "fits", "--optim.schedule_steps=9"))


def test_a_warm_up_as_long_as_the_run_is_refused_when_it_begins_and_not_when_it_resumes(
    recipe, whole, tmp_path, monkeypatch
):
    run, n_steps = tmp_path / "run", len(metrics(whole))
    with pytest.raises(ConfigError, match=f"the data have {n_steps} steps.*warmup_steps={n_steps // 10},"):
        train.train(load(recipe, run, "--optim.warmup_steps=2000"))
    assert not run.exists()
    # a run that an older nano360 has begun
    with monkeypatch.context() as older:
        older.setattr(cost, "check_warmup", lambda cfg, plan: None)
        train.train(load(recipe, run, "--optim.warmup_steps=2000", "--train.steps=3"))
    train.train(load(recipe, run, "--optim.warmup_steps=2000", "--train.steps=5"))
    assert len(metrics(run)) == 5


def test_a_tokenizer_that_is_not_the_datasets_is_refused_and_its_place_does_not_matter(recipe, tmp_path):
    run, dataset = tmp_path / "run", Dataset(config.load(str(recipe)).dataset)
    for override, message in (
        ("--tokenizer.vocab_size=299", "tokenizer.vocab_size=300 .now 299."),
        ("--tokenizer.kind=sentencepiece", "tokenizer.kind=bpe .now sentencepiece."),
        ("--tokenizer.split=gpt2", "tokenizer.split=gpt4 .now gpt2."),
        ("--tokenizer.special_tokens=<a>", "tokenizer.special_tokens"),
    ):
        with pytest.raises(ConfigError, match=message):
            train.train(load(recipe, run, override))
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(dataset.folder / "tokenizer.json", other)
    asked = (f"--tokenizer.path={other}", "--train.steps=1")
    train.train(load(recipe, tmp_path / "same", *asked))
    one_merge_less(other / "tokenizer.json")
    with pytest.raises(
        ConfigError, match=f"another tokenizer .* than tokenizer.path={other}.*{dataset.folder}"
    ):
        train.train(load(recipe, run, *asked))
    assert not run.exists()
    train.train(load(recipe, tmp_path / "elsewhere", "--tokenizer.path=/nowhere", "--train.steps=1"))
    # what an older dataset does not say is not compared
    settings = {k: v for k, v in dataset.manifest["settings"].items() if k != "tokenizer.split"}
    assert differences({"settings": settings}, load(recipe, run, "--tokenizer.split=gpt2")) == []


def test_a_run_that_stands_on_a_contradicting_tokenizer_or_an_unread_setting_still_resumes(recipe, tmp_path):
    run = tmp_path / "run"
    train.train(load(recipe, run, "--train.steps=2"))
    about = json.loads((run / "config.json").read_text())
    about["config"]["tokenizer"]["vocab_size"] = 77  # as older ones wrote without asking
    about["config"]["optim"]["muon_momentum"] = 0.5
    (run / "config.json").write_text(json.dumps(about))
    train.train(load(recipe, run, "--train.steps=4"))
    assert len(metrics(run)) == 4
    assert config.load_run(run).tokenizer.vocab_size == 300


def test_a_batch_that_doubles_sees_every_row_once_in_order(recipe, whole, tmp_path, monkeypatch):
    run, seen = tmp_path / "run", []
    plain = train.forward_backward
    monkeypatch.setattr(
        train,
        "forward_backward",
        lambda model, rows, *rest: (seen.append(rows), plain(model, rows, *rest))[1],
    )
    # after 50 rows of 24 tokens: 9 steps of 6, then 12, and after 100 rows 24
    asked = ("--train.batch_double_tokens=1200", "--train.batch_size_max=24")
    train.train(load(recipe, run, *asked))
    sizes = [len(batch) for batch in seen]
    assert sizes[:9] == [6] * 9 and sizes[9:13] == [12] * 4 and set(sizes[13:]) == {24}
    dataset = Dataset(load(recipe, run).dataset)
    assert torch.equal(torch.cat(seen), torch.from_numpy(dataset.rows(0, sum(sizes))))
    assert [r["tokens"] for r in metrics(run)] == [24 * n for n in itertools.accumulate(sizes)]
    assert metrics(run)[0]["loss"] == metrics(whole)[0]["loss"]
    chunks = [c.state["chunk"] for c in run_folder.checkpoints(run)]
    assert chunks[0] == -1 and chunks[-1] == 4 and chunks == sorted(chunks)


def test_only_the_newest_of_other_checkpoints_are_kept(recipe, tmp_path):
    run = tmp_path / "run"
    train.train(load(recipe, run, "--train.checkpoint_every=2", "--train.keep_others=2"))
    found = run_folder.checkpoints(run)
    cfg = load(recipe, run)
    dataset = Dataset(cfg.dataset)
    ends = {math.ceil(dataset.chunk_range(c)[1] / 6) for c in range(5)} | {0, dataset.n_rows // 6}
    n_steps = dataset.n_rows // 6
    others = [c.step for c in found if c.step not in ends and c.step != n_steps]
    assert {c.step for c in found if c.step in ends} == {e for e in ends if e <= n_steps} | {0}
    assert len(others) == 2 and others == [s for s in range(0, n_steps, 2) if s not in ends][-2:]


def test_saving_in_step_gives_the_same_checkpoints_as_saving_beside_it(recipe, whole, tmp_path):
    train.train(load(recipe, tmp_path / "run", "--train.save_async=false"))
    assert weights(tmp_path / "run") == weights(whole)


# ---- another loss, other rows -----------------------------------------------------------------------------


class MaskedBatches(train.Batches):
    """Rows as (b, 2, T): tokens, and targets, of which the first of each row are masked, as in a prompt."""

    def masked(self, position: int) -> int:
        """Targets of a row that are masked: 0 to 22 of 24, so that micro-batches differ in targets."""
        return position * 7 % 23

    def read(self, plan, step):
        ranges = plan.batch(step, self.world.share(plan.size(step)))
        rows = super().read(plan, step)
        tokens, targets = rows[:, :-1], rows[:, 1:].clone()
        for row, position in enumerate(p for first, end in ranges for p in range(first, end)):
            targets[row, : self.masked(position)] = loss.IGNORE
        return torch.stack((tokens, targets), dim=1)

    def n_targets(self, plan, step):
        positions = [p for first, end in plan.batch(step) for p in range(first, end)]
        return sum(self.dataset.seq_len - self.masked(p) for p in positions)


def masked_loss(model, rows):
    return {"loss": model(rows[:, 0], rows[:, 1])}


def test_masked_targets_are_trained_on_by_the_same_loop_whatever_the_micro_batch(recipe, tmp_path):
    runs = {}
    for micro in (6, 2, 1):
        cfg = load(recipe, tmp_path / str(micro), "--train.steps=3", f"--train.micro_batch_size={micro}")
        train.train(cfg, masked_loss, MaskedBatches)
        runs[micro] = metrics(tmp_path / str(micro))
    # The first step by hand: the mean over the targets that are left, on the initial weights, in float64.
    model = checkpoint.load_model(tmp_path / "6" / "checkpoints" / "step-00000000").requires_grad_(True)
    rows = torch.from_numpy(Dataset(cfg.dataset).rows(0, 6))
    logits = model(rows[:, :-1]).double()
    left = torch.tensor([[t >= p * 7 % 23 for t in range(24)] for p in range(6)])
    nats = F.cross_entropy(logits[left], rows[:, 1:][left])
    nats.backward()
    grad_norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    assert runs[6][0]["loss"] == pytest.approx(nats.item(), rel=1e-6)
    assert runs[6][0]["grad_norm"] == pytest.approx(grad_norm, rel=1e-5)
    for micro in (2, 1):
        assert [r["loss"] for r in runs[micro]] == pytest.approx([r["loss"] for r in runs[6]], rel=1e-5)


def test_a_loss_of_ones_own_and_a_count_beside_it_reach_the_console_and_metrics(recipe, tmp_path, capsys):
    def loss_and_accuracy(model, rows):
        logits, targets = model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()
        correct = (logits.argmax(1) == targets).sum()
        return {"loss": F.cross_entropy(logits, targets, reduction="sum"), "accuracy": correct}

    asked = ("--train.steps=4", "--train.micro_batch_size=2")
    train.train(load(recipe, tmp_path / "ours", *asked), loss_and_accuracy)
    printed = capsys.readouterr().out
    train.train(load(recipe, tmp_path / "plain", *asked))
    ours, plain = metrics(tmp_path / "ours"), metrics(tmp_path / "plain")
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in plain], rel=1e-5)
    model = checkpoint.load_model(tmp_path / "ours" / "checkpoints" / "step-00000000")
    rows = torch.from_numpy(Dataset(load(recipe, tmp_path / "ours").dataset).rows(0, 6))
    share = (model(rows[:, :-1]).argmax(-1) == rows[:, 1:]).float().mean().item()
    assert ours[0]["accuracy"] == pytest.approx(share) and "accuracy" not in plain[0]
    assert f"accuracy {share:.4g}" in printed


# ---- known before it begins -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["gone", "empty"])
def test_a_chunk_that_is_missing_is_noticed_before_training_begins(recipe, tmp_path, how):
    data = tmp_path / "data"
    shutil.copytree(load(recipe, tmp_path).dataset, data)
    last = data / "chunks" / "004.bin"
    last.unlink() if how == "gone" else last.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"004\.bin is missing, or has not the manifest's size"):
        train.train(load(recipe, tmp_path / "run", f"--dataset={data}"))
    assert not (tmp_path / "run").exists()


def test_annealing_says_so_where_the_learning_rate_jumps(recipe, whole, tmp_path, capsys):
    origin = run_folder.checkpoints(whole)[2]
    asked = (f"--init_from={origin.path}", "--optim.anneal_steps=2")
    train.train(load(recipe, tmp_path / "same", *asked))
    assert "annealing begins at a learning rate" not in capsys.readouterr().out
    train.train(load(recipe, tmp_path / "other", *asked, "--optim.schedule_steps=20"))
    assert f"{whole.resolve()} had" in capsys.readouterr().out


# ---- on a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [{}, {"document_mask": True}, {"norm_place": "after", "qk_norm": True}])
@pytest.mark.parametrize("recompute", [0, 1, 2, "selective"])
def test_on_a_gpu_compiled_gradients_in_bf16_are_those_of_the_cpu_in_fp32(recompute, kind):
    torch._dynamo.reset()
    model = dict(vocab_size=300, seq_len=192, d_model=128, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=320)
    rows = torch.randint(300, (4, 193), generator=torch.Generator().manual_seed(0))
    rows[:, ::40] = 7  # ends of documents
    found = {}
    for device in ("cpu", "cuda"):
        settings = dict(batch_size=4, micro_batch_size=2, device=device)
        settings |= {"activation_checkpointing": recompute} if device == "cuda" else {}
        cfg = Config(model=Model(**model, **kind), train=Train(**settings)).resolved()
        world = parallel.start(cfg.train, cfg.parallel)
        net, _ = train.build(cfg, world, eot=7)
        world.fill(net, initial_weights(net, 3))
        sums = train.forward_backward(net, rows.to(world.device), 4 * 192, train.next_token_loss, world, cfg)
        found[device] = sums["loss"].item(), [p.grad.cpu() for p in net.parameters()]
    assert found["cuda"][0] == pytest.approx(found["cpu"][0], rel=1e-3)
    for ours, exact in zip(found["cuda"][1], found["cpu"][1], strict=True):
        assert ((ours - exact).norm() / exact.norm()).item() < 0.05


def test_a_step_makes_no_garbage_that_only_a_collection_finds():
    model = Model(vocab_size=61, seq_len=64, d_model=24, n_layers=2, n_heads=3, d_ff=34)
    cfg = Config(model=model, train=Train(batch_size=4, micro_batch_size=2, device="cpu")).resolved()
    world = parallel.alone()
    net, optimizers = train.build(cfg, world, eot=None)
    world.fill(net, initial_weights(net, 1))

    def step():
        rows = torch.randint(61, (4, 65))
        sums = train.forward_backward(net, rows, 4 * 64, train.next_token_loss, world, cfg)
        grad_norm, _ = world.sum(optim.grad_norm(net), sums["loss"])
        optim.update(net, optimizers, 1e-3, grad_norm, 1.0)

    step()
    with hardware.garbage_waits():
        assert not gc.isenabled()
        for _ in range(5):
            step()
        assert gc.collect() == 0
    assert gc.isenabled() and gc.get_freeze_count() == 0
