"""cost.py and plan.py: what they say is what the model, the loop and the published runs say."""

import dataclasses
import functools
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint

import checkpoint
import config
import cost
import data
import loss
import optim
import plan
import train
from config import Config, ConfigError, Model, Train
from dataset import Dataset
from model import Transformer

ROOT = Path(__file__).parents[1]
AMBER = Model()  # the defaults are LLaMA-7B
SMALL = dict(vocab_size=101, seq_len=48, d_model=64, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=200)
PYTHIA = dict(norm="layernorm", bias=True, ffn="gelu", parallel_residual=True, rope_fraction=0.25)
VARIANTS = {
    "llama": {},
    "pythia": PYTHIA,
    "olmo": dict(norm="nonparametric_layernorm", clip_qkv=8.0, tie_embeddings=True),
    "olmo2": dict(norm_place="after", qk_norm=True),
    "crystalcoder": dict(norm="layernorm", bias=True, tie_embeddings=True, rope_pairs="neighbours"),
    "layernorm on queries": dict(norm="layernorm", qk_norm=True, d_head=24),
    "geglu, learned positions": dict(ffn="geglu", positions="learned", bias=True),
    "squared relu, no positions": dict(ffn="relu2", positions="none", d_head=24),
    "window": dict(window=7),
    "documents": dict(document_mask=True),
    "alibi and documents": dict(positions="alibi", document_mask=True),
}


def names() -> list[str]:
    """Every config there is, tables taken apart: "7b", "pythia-160m", ..."""
    found = []
    for path in sorted((ROOT / "configs").glob("*.py")):
        table = runpy.run_path(str(path)).get("configs", {})
        found += [f"{path.stem}-{entry}" for entry in table] or [path.stem]
    return found


def built(model: Model) -> Transformer:
    with torch.device("meta"):
        return Transformer(model, eot=0)


# ---- parameters and FLOPs ---------------------------------------------------------------------------------


def by_part(model: Transformer) -> dict[str, int]:
    """Parameters of a built model, sorted into cost.parameters' parts by their names."""
    parts = dict.fromkeys(cost.parameters(model.cfg), 0)
    for name, parameter in model.named_parameters():
        part = (
            "learned positions" if name.startswith("embed_positions")
            else "embedding" if name.startswith("embed")
            else "head" if name.startswith("lm_head")
            else "norms" if "norm" in name
            else "biases" if name.endswith("bias")
            else "attention" if "self_attn" in name
            else "feed-forward"
        )  # fmt: skip
        parts[part] += parameter.numel()
    return parts


@pytest.mark.parametrize("name", VARIANTS)
def test_every_part_has_as_many_parameters_as_the_built_model(name):
    model = Model(**{**SMALL, **VARIANTS[name]})
    assert cost.parameters(model) == by_part(built(model))


@pytest.mark.parametrize("name", names())
def test_every_config_has_as_many_parameters_as_its_model(name):
    model = config.load(name).model
    assert cost.parameters(model) == by_part(built(model))


@pytest.mark.parametrize(
    "name, published",
    [("7b", 6_738_415_616), ("baichuan-7b", 7_000_559_616), ("olmo-1b", 1_176_764_416),
     ("crystalcoder-phase1", 6_575_278_720)],
)  # fmt: skip
def test_published_models_have_their_published_size(name, published):
    assert sum(cost.parameters(config.load(name).model).values()) == published


def test_a_padded_vocabulary_is_counted_without_its_padding():
    tied = Model(**{**SMALL, "vocab_size": 128, "tie_embeddings": True})
    size = sum(cost.parameters(tied).values())
    assert size - cost.without_padding(tied, 101) == 27 * 64
    assert (
        cost.without_padding(dataclasses.replace(tied, tie_embeddings=False), 101) == size + (202 - 128) * 64
    )


def test_flops_by_both_conventions_by_hand():
    flops = cost.flops_per_token(Model(**{**SMALL, "d_head": 24}))
    assert flops["6N"] == 6 * sum(p.numel() for p in built(Model(**{**SMALL, "d_head": 24})).parameters())
    assert flops["attention"] == 12 * 3 * (4 * 24) * 48
    assert cost.flops_per_token(Model(**{**SMALL, "window": 7}))["attention"] == 12 * 3 * 64 * 7


# Tokens a second on one GPU, its peak, and the MFU that they come to by each convention
@pytest.mark.parametrize(
    "model, speed, peak, plain, palm",
    [
        (AMBER, 2600, 312e12, 33.7, 36.4),
        (AMBER, 1e12 / 82_432 / 3600, 312e12, 43.7, 47.1),  # LLaMA-7B
        (dataclasses.replace(AMBER, seq_len=4096), 2e12 / 184_320 / 3600, 312e12, 39.1, 45.3),  # LLaMA-2 7B
        (Model(d_model=2048, n_layers=22, n_kv_heads=4, d_ff=5632), 24_000, 312e12, 50.8, 59.3),  # TinyLlama
    ],
)
def test_mfu_of_published_runs(model, speed, peak, plain, palm):
    assert [round(100 * share, 1) for share in cost.mfu(model, speed, peak)] == [plain, palm]


def test_a_gpus_peak_is_known_by_the_name_pytorch_gives_it():
    assert cost.peak_flops("NVIDIA A100-SXM4-80GB") == cost.GPUS["a100-80gb"].flops
    assert cost.peak_flops("NVIDIA H100 80GB HBM3") == cost.GPUS["h100-80gb"].flops
    assert cost.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert cost.peak_flops("NVIDIA H200") == cost.GPUS["h200"].flops
    assert cost.peak_flops("NVIDIA GeForce RTX 4090") == cost.GPUS["rtx-4090"].flops
    assert cost.peak_flops("a toaster") is None


# ---- memory -----------------------------------------------------------------------------------------------


def kept_by_autograd(model: Model, rows: int, bf16: bool) -> int:
    """Bytes of all that autograd saves under the head: no parameters, no casts of them, no indices."""
    net = Transformer(model, eot=0)
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    matrices = {tuple(p.shape) for p in net.parameters() if p.ndim == 2}
    kept = {}

    def save(t):
        cast = t.dtype == torch.bfloat16 and ({tuple(t.shape), tuple(t.shape)[::-1]} & matrices)
        if t.untyped_storage().data_ptr() not in own and t.is_floating_point() and not cast:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage()  # held, so that no address comes twice
        return t

    tokens = torch.randint(model.vocab_size, (rows, model.seq_len))
    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            net.hidden(tokens)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_activations_are_what_autograd_keeps_to_the_byte(name, bf16):
    model = Model(**{**SMALL, **VARIANTS[name]}).resolved()
    assert cost.activations(model, 5 * model.seq_len, bf16, cuda=False) == kept_by_autograd(model, 5, bf16)


def small_config(model: Model, micro: int, accumulation: int, precision: str) -> Config:
    return Config(
        model=model.resolved(),
        train=Train(batch_size=micro * accumulation, micro_batch_size=micro, precision=precision),
    )


def allocated_at_the_peak(cfg: Config, path: Path, checkpointing: str = "none") -> int:
    """Bytes of tensors at the peak of the second training step, by PyTorch's profiler."""
    net = Transformer(cfg.model)
    net.init_weights(0)
    for layer in net.layers if checkpointing == "all" else ():
        layer.forward = functools.partial(
            torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False
        )
    adamw, T, bf16 = optim.adamw(net, cfg.optim), cfg.model.seq_len, cfg.train.precision == "bf16"

    def step():
        tokens = torch.randint(cfg.model.vocab_size, (cfg.train.batch_size, T + 1))
        for micro in tokens.split(cfg.train.micro_batch_size):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                nats = net(micro[:, :-1], micro[:, 1:])
            (nats / (cfg.train.batch_size * T)).backward()
        optim.clip(net, 1.0)
        adamw.step()
        adamw.zero_grad()

    step()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    profile.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e["name"] == "[memory]"]
    events = [e["args"] for e in sorted(events, key=lambda e: e["ts"])]
    began = events[0]["Total Allocated"] - events[0]["Bytes"]
    standing = 12 * sum(p.numel() for p in net.parameters())  # weights and moments, there before
    return standing + max(e["Total Allocated"] for e in events) - began


@pytest.mark.parametrize(
    "model, micro, accumulation, precision, at",
    [
        (Model(vocab_size=512, seq_len=128, d_model=128, n_layers=4, n_heads=4, d_ff=352), 4, 1, "fp32",
         "the last block goes backward"),
        (Model(vocab_size=30_000, seq_len=64, d_model=96, n_layers=2, n_heads=3, d_ff=260,
               tie_embeddings=True), 2, 2, "fp32", "the loss is taken"),
        (Model(vocab_size=20_000, seq_len=30, d_model=208, n_layers=2, n_heads=2, d_ff=300), 2, 2, "fp32",
         "backward begins"),
        (Model(vocab_size=2000, seq_len=32, d_model=256, n_layers=4, n_heads=4, d_ff=1024, **PYTHIA), 2, 1,
         "fp32", "backward ends"),
        (Model(vocab_size=3000, seq_len=96, d_model=128, n_layers=3, n_heads=4, d_ff=352, qk_norm=True,
               norm_place="after"), 3, 2, "bf16", "the loss is taken"),
    ],
)  # fmt: skip
def test_the_peak_of_a_step_is_the_allocators(model, micro, accumulation, precision, at, tmp_path):
    cfg = small_config(model, micro, accumulation, precision)
    says = cost.memory(cfg, 1, "ddp", "none", cuda=False)
    assert says["at"] == at
    assert cost.total(says) == pytest.approx(allocated_at_the_peak(cfg, tmp_path / "trace.json"), rel=0.02)


def test_checkpointing_as_pytorch_does_it_has_the_peak_that_is_forecast(tmp_path):
    model = Model(vocab_size=512, seq_len=128, d_model=128, n_layers=6, n_heads=4, d_ff=352)
    cfg = small_config(model, 4, 2, "fp32")
    says = cost.memory(cfg, 1, "ddp", "all", cuda=False)
    measured = allocated_at_the_peak(cfg, tmp_path / "trace.json", "all")
    assert cost.total(says) == pytest.approx(measured, rel=0.05)


@pytest.mark.slow
def test_the_peak_of_a_process_is_within_15_per_cent():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import bench_memory

    for name in bench_memory.SHAPES:
        says = cost.total(bench_memory.planned(name, "cpu"))
        assert says == pytest.approx(bench_memory.peak(name, "cpu", steps=2), rel=0.15), name


def test_the_slices_of_logits_are_as_large_as_the_models():
    assert (cost.LOGITS_BYTES, cost.LOGITS_BYTES_CUDA) == (loss.LOGITS_BYTES, loss.LOGITS_BYTES_CUDA)


def test_fsdp_divides_what_stands_and_checkpointing_keeps_one_stream_a_block():
    cfg = Config(model=AMBER.resolved(), train=Train(batch_size=2240, micro_batch_size=10))
    P = 6_738_415_616
    whole, shard = (cost.memory(cfg, 8, s, "none", cuda=True) for s in ("ddp", "fsdp"))
    for kind, numbers in (("weights", 1), ("gradients", 1), ("optimizer", 2)):
        assert (whole[kind], shard[kind]) == (4 * P * numbers, 4 * P * numbers / 8)
    assert whole["activations"] == shard["activations"] > 100 * 2**30
    n, layer = 20_480, cost.kept_by_layer(AMBER, 20_480, True, True)
    # per token: h before each half 2 x 4 D; two cast inputs 2 x 2 D; q, k, v, output 4 x 2 D;
    # log-sum 4 H; gate, act, up, product 4 x 2 F; a root mean square of each norm 2 x 4
    assert layer == n * (20 * 4096 + 4 * 32 + 8 * 11008 + 8)
    kept = cost.activations(AMBER, n, True, True, "all")
    assert kept == 32 * n * 4 * 4096 + layer + n * (4 * 4096 + 4) + 4 * 2048 * 128


# ---- what fits --------------------------------------------------------------------------------------------


def run(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "plan.py", *argv], capture_output=True, text=True, cwd="/")


def test_what_does_not_fit_is_refused_with_a_change_that_fits():
    refused = run("7b", "--gpus", "8", "--gpu", "a100-80gb")
    assert refused.returncode == 2 and "does not fit" in refused.stdout and "Traceback" not in refused.stderr
    flags = refused.stderr.strip().partition("it would with ")[2].split()
    assert flags == ["--train.micro_batch_size=5", "--strategy=fsdp"]
    assert run("7b", "--gpus", "8", "--gpu", "a100-80gb", *flags).returncode == 0


def change(model: Model, batch: int, micro: int, gpus: int, gpu: str) -> list[str]:
    cfg = Config(model=model.resolved(), train=Train(batch_size=batch, micro_batch_size=micro))
    assert not cost.fits(cfg, gpus, "ddp", "none", gpu)
    return cost.smallest_change(cfg, gpus, "ddp", "none", gpu)


def test_the_smallest_change_is_tried_in_order():
    small = Model(d_model=768, n_layers=12, n_heads=12, d_ff=2048, seq_len=1024)
    assert change(small, 512, 256, 2, "rtx-4090") == ["--train.micro_batch_size=32"]
    long = Model(d_model=1024, n_layers=24, n_heads=16, d_ff=2736, seq_len=2**17)  # one row is too much
    assert change(long, 8, 1, 2, "a100-80gb") == ["--checkpointing=all"]
    wide = Model(d_model=3072, n_layers=24, n_heads=24, d_ff=8192, seq_len=256)
    assert change(wide, 8, 1, 8, "a100-40gb") == ["--strategy=fsdp"]
    assert change(AMBER, 2048, 1, 2, "a100-80gb") == ["--strategy=fsdp"]
    large = config.load("llama-1-65b").model
    assert change(large, 2048, 2, 8, "a100-80gb") == ["--checkpointing=all", "--strategy=fsdp", "--gpus=32"]
    assert change(config.load("llama-3.1-405b").model, 1, 1, 1, "rtx-4090") == []


# ---- steps, chunks, checkpoints ---------------------------------------------------------------------------

RECIPE = """
from config import *
config = Config(
    model=Model(vocab_size=300, seq_len=24, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=40),
    tokenizer=Tokenizer(path={tokenizer!r}, vocab_size=300),
    data=Data(sources=(Source("prose", paths=({text!r},)),), n_chunks=5, validation_fraction=0.2, workers=1),
    train=Train(batch_size=6, micro_batch_size=3, device="cpu"),
    eval=Eval(prompt_tokens=8, continuation_tokens=8),
    dataset={dataset!r},
)
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    """A config file with its tokenizer and dataset built: some 40 steps of 6 rows in 5 chunks."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "text").mkdir()
    for n in range(40):
        lines = (f"{n * 7919 % (w + 2)} sheep and {w * n % 97} goats went up the hill" for w in range(14))
        (folder / "text" / f"{n}.txt").write_text(" ".join(lines))
    path = folder / "tiny.py"
    path.write_text(RECIPE.format(**{n: str(folder / n) for n in ("tokenizer", "text", "dataset")}))
    subprocess.run([sys.executable, ROOT / "tokenizer.py", "train", path], check=True, capture_output=True)
    data.build(config.load(str(path)))
    return str(path)


@pytest.mark.parametrize(
    "overrides",
    [[], ["--train.steps=17"], ["--train.checkpoint_every=4", "--train.checkpoint_powers_of_two=true"],
     ["--train.batch_size=15", "--train.checkpoint_chunks=false", "--train.checkpoint_powers_of_two=true"]],
)  # fmt: skip
def test_steps_and_checkpoints_are_those_that_train_makes(recipe, overrides, tmp_path, monkeypatch):
    cfg = config.load(recipe, [f"--run={tmp_path / 'run'}", *overrides])
    when, dataset = cost.schedule(cfg), Dataset(cfg.dataset)
    assert when.rows == dataset.n_rows and when.steps == dataset.n_rows // cfg.train.batch_size
    assert when.last_step == min(cfg.train.steps or when.steps, when.steps)
    monkeypatch.setattr(train.signal, "signal", lambda number, handler: None)  # Ctrl-C stays pytest's
    train.train(cfg)
    assert when.checkpoints == [c.step for c in checkpoint.checkpoints(cfg.run)]


def test_chunks_end_where_data_would_end_them_also_before_there_is_a_dataset(recipe):
    cfg, dataset = config.load(recipe), Dataset(config.load(recipe).dataset)
    ends = [dataset.chunk_range(chunk)[1] for chunk in range(dataset.n_chunks)]
    assert cost.schedule(cfg, tokens=dataset.n_rows * 24).chunk_ends == cost.schedule(cfg).chunk_ends == ends
    elsewhere = dataclasses.replace(cfg, dataset="nowhere")
    assert cost.schedule(elsewhere) is None
    with_tokens = dataclasses.replace(cfg.data, expected_tokens=dataset.n_rows * 24 + 23)
    assert cost.schedule(dataclasses.replace(elsewhere, data=with_tokens)).chunk_ends == ends


def test_a_dataset_that_does_not_suit_is_refused(recipe):
    with pytest.raises(ConfigError, match=r"rows of 24 tokens and model\.seq_len=32"):
        cost.schedule(config.load(recipe, ["--model.seq_len=32"]))
    with pytest.raises(ConfigError, match=r"4 steps .* fewer than data\.n_chunks=5"):
        cost.schedule(config.load(recipe), tokens=24 * 6 * 4)


def test_amber_has_762_steps_a_chunk_and_a_remainder():
    when = cost.schedule(config.load("7b", ["--dataset=nowhere"]), tokens=360 * 1_706_976 * 2048)
    assert when.rows == 360 * 1_706_976
    assert divmod(when.steps, 360) == (762, 15) and len(when.checkpoints) == 361
    size = cost.disk(AMBER, 361)
    assert size["weights"] == 4 * 6_738_415_616 and size["optimizer"] == 8 * 6_738_415_616
    assert size["all"] == 361 * size["weights"] + 360 * size["optimizer"]


def test_a_checkpoint_on_disk_is_as_large_as_planned(tmp_path):
    model = Model(**{**SMALL, "n_kv_heads": 4, "tie_embeddings": True, "d_model": 128, "n_layers": 2})
    net = Transformer(model)
    net.init_weights(0)
    adamw = optim.adamw(net, config.Optim())
    net(torch.zeros(1, 9, dtype=torch.long), torch.zeros(1, 9, dtype=torch.long)).backward()
    adamw.step()
    folder = checkpoint.save(tmp_path, net, adamw, {"step": 1}, {})
    size = cost.disk(model, 1)
    for name, planned in (("model", size["weights"]), ("optimizer", size["optimizer"])):
        on_disk = (folder / f"{name}.safetensors").stat().st_size
        assert planned < on_disk < planned + 20_000  # names and shapes, and the random state


# ---- time, energy, money ----------------------------------------------------------------------------------


def test_hours_of_published_runs_from_their_published_speed():
    assert cost.hours(1.2585e12, 2600, 224) / 24 == pytest.approx(
        25.0, abs=0.05
    )  # Amber, LLM360 section 4.1.2
    assert cost.hours(1e12, 3370, 1) == pytest.approx(82_432, rel=1e-3)  # LLaMA-7B, GPU-hours
    assert cost.hours(2e12, 3014, 1) == pytest.approx(184_320, rel=1e-3)  # LLaMA-2 7B
    assert cost.hours(300e9, 24_000, 1) == pytest.approx(3456, rel=0.01)  # TinyLlama: "24 k"
    assert cost.hours(1.4e12, 380, 2048) / 24 == pytest.approx(21, abs=0.3)  # LLaMA-65B: "21 days"


# OLMo, table 8: MWh, PUE, kg CO2 a kWh and tonnes
@pytest.mark.parametrize(
    "mwh, pue, intensity, tonnes, places",
    [(104, 1.1, 0.610, 69.78, 1), (104, 1.1, 0.656, 75.05, 1), (33, 1.1, 0.385, 14, 0),
     (74, 1.1, 0.385, 31, 0), (433, 1.2, 0.057, 30, 0), (1066, 1.08, 0.330, 380, 0), (135, 1.1, 0.0, 0, 0)],
)  # fmt: skip
def test_carbon_of_published_runs(mwh, pue, intensity, tonnes, places):
    assert round(cost.tonnes_co2(mwh, pue, intensity), places) == round(tonnes, places)


def test_energy_of_llama_is_the_boards_limit_times_its_gpu_hours():
    assert round(cost.megawatt_hours(82_432, cost.GPUS["a100-80gb"].watts)) == 33
    assert round(cost.megawatt_hours(184_320, cost.GPUS["a100-80gb"].watts)) == 74


# ---- the command ------------------------------------------------------------------------------------------


def number(report: str, name: str) -> float:
    line = next(line for line in report.splitlines() if line.startswith(f"  {name}  "))
    return float(line[30:46].replace(",", "").rstrip("%"))


def test_the_report_of_amber_at_its_own_speed():
    shown = run(
        "7b", "--gpus", "224", "--strategy=fsdp", "--checkpointing=all", "--price=2", "--tokens=1.2585e12",
        "--tokens-per-second-per-gpu=2600",
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert number(shown.stdout, "total") == 6_738_415_616
    assert number(shown.stdout, "tokens a step") == 4_587_520
    assert number(shown.stdout, "gradient accumulation") == 1
    assert number(shown.stdout, "MFU, attention counted") == 36.4 and "33.7% by 6N" in shown.stdout
    assert number(shown.stdout, "hours") == pytest.approx(25.0 * 24, abs=1)
    assert number(shown.stdout, "GPU-hours") == pytest.approx(25.0 * 24 * 224, rel=1e-3)
    assert number(shown.stdout, "money") == pytest.approx(2 * number(shown.stdout, "GPU-hours"), abs=1)
    assert all(len(line) <= 110 for line in shown.stdout.splitlines())


def test_an_assumed_mfu_gives_the_speed_that_has_it_and_says_so():
    shown = run("124m", "--gpus=1", "--mfu=0.5", "--train.micro_batch_size=16", "--tokens=1e10")
    flops = sum(cost.flops_per_token(config.load("124m").model).values())
    assert number(shown.stdout, "tokens a second a GPU") == pytest.approx(0.5 * 312e12 / flops, abs=1)
    assert number(shown.stdout, "MFU, attention counted") == 50.0 and "   stated; " in shown.stdout
    assert "   assumed; " in run("124m", "--gpus=1", "--train.micro_batch_size=16").stdout


def test_a_cpu_has_no_peak_and_needs_a_speed(recipe):
    assert "No peak is known for a CPU" in run(recipe).stdout
    shown = run(recipe, "--tokens-per-second-per-gpu=1500", "--watts=30", "--gpus=2").stdout
    assert number(shown, "hours") == pytest.approx(number(shown, "tokens") / 3000 / 3600, abs=0.1)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["7b", "--gpuz=8"], "did you mean 'gpu'?"),
        (["7b", "--optim.lrr=1"], "did you mean 'optim.lr'?"),
        (["7b", "8"], "'8' is not an override"),
        (["7b", "--mfu=40"], "40 % is 0.4"),
        (["124m", "--tokens-per-second-per-gpu=1e7"], "more than 312 TFLOP/s allow"),
        (["7b", "--gpus=0"], "--gpus=0 must be a number above 0"),
        (["7b", "--tokens=nan"], "--tokens=nan must be a number above 0"),
        (["7b", "--mfu=0.4", "--tokens-per-second-per-gpu=9"], "keep one"),
        (["7b", "--gpus=9"], "does not divide"),
        (["7b", "--pue=0.9"], "at least 1"),
        (["demo", "--strategy=fsdp"], "on a CPU use ddp"),
        (["nothing"], "no config 'nothing'"),
    ],
)
def test_mistakes_are_named_in_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as ended:
        plan.main(argv)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_it_answers_at_once_and_without_torch():
    code = "import sys, plan; plan.main(['demo']); assert not {'torch', 'numpy'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
