"""benchmark.py, and what hardware.py measures in a run: figures that agree, and a trace that opens.

The command is `python benchmark.py CONFIG --steps N [--json FILE] [--anyway]`. The scripts of benchmarks/ run
in miniature.
"""

import json
import os
import subprocess
import sys
import time
import types

import pytest
import torch
from conftest import ROOT

import benchmark
import config
import cost
import hardware
import memory
import parallel
import preflight
import train


def run(*arguments: object, processes: int = 1, script: str = "benchmark.py") -> subprocess.CompletedProcess:
    """A script in a process of its own, or in several by torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--"]
    command = [sys.executable, *(launcher if processes > 1 else []), ROOT / script, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_benchmark_needs_no_dataset_and_its_figures_agree(recipe, tmp_path, processes):
    file = tmp_path / "figures.json"
    asked = ("--train.batch_size=12", "--dataset=/nowhere", f"--run={tmp_path / 'run'}", "--steps", "4")
    result = run(recipe, *asked, f"--json={file}", processes=processes)
    assert result.returncode == 0, result.stderr[-2000:]
    about = json.loads(file.read_text())
    assert about["tokens_per_second"] == pytest.approx(12 * 24 / about["seconds"])
    parts = [about[f"{part}_seconds"] for part in ("data", "forward_backward", "optimizer")]
    assert 0 < max(parts) < about["seconds"] < 3 * sum(parts)
    assert about["processes"] == processes and about["memory_bytes"] > 50e6
    assert about["config"]["train"]["batch_size"] == 12
    cfg = config.load(str(recipe), [*asked[:3]])
    planned = memory.total(memory.peak(cfg, processes, False)) / hardware.GIB
    assert f"{planned:.2f}" in result.stdout and f"{about['tokens_per_second']:,.0f}" in result.stdout
    assert result.stdout.count("tokens a second") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "say how many steps: --steps 30"),
        (["--steps"], "--steps needs a value"),
        (["--steps", "0"], "at least 1"),
        (["--steps=many"], "whole number"),
        (["--anyway=3"], "takes no value"),
        (["--steps", "2", "--train.batch_size=7"], "does not divide"),
        (["--steps", "2", "--parallel.tp=2"], "do not divide by parallel.tp=2"),
        (["--steps", "2", "--json=/nowhere/at/all.json"], "there is no folder /nowhere/at"),
    ],
)
def test_wrong_flags_are_one_message(recipe, flags, message):
    result = run(recipe, *flags)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr


def test_what_does_not_fit_is_refused_in_a_moment_before_any_memory_is_touched(tmp_path):
    began = time.perf_counter()
    result = run("7b", "--train.device=cpu", "--steps", "1", f"--run={tmp_path / 'run'}")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "this does not fit" in result.stderr and "--anyway tries all the same" in result.stderr
    # It takes two seconds on an idle machine.
    assert time.perf_counter() - began < 15 and not (tmp_path / "run").exists()


def test_every_start_asks_the_plan_and_anyway_tries_all_the_same(recipe, tmp_path, monkeypatch, capsys):
    cfg = config.load(str(recipe), [f"--run={tmp_path / 'run'}", "--train.steps=2"])
    wide = [f"--run={tmp_path / 'wide'}", "--train.batch_size=60", "--train.micro_batch_size=60"]
    wide = config.load(str(recipe), wide)
    need = memory.total(memory.peak(cfg, 1, False))
    monkeypatch.setattr(hardware, "machine_memory", lambda: need / hardware.USABLE_ON_CPU)
    benchmark.main(cfg, {"--steps": "1"})  # it fits to the byte
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # and where two processes share the machine it does not
    for main, flags in ((train.main, {}), (benchmark.main, {"--steps": "1"})):
        with pytest.raises(SystemExit) as ended:
            main(cfg, flags)
        assert ended.value.code == 2 and "this does not fit: 0.0 GiB" in capsys.readouterr().err
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    with pytest.raises(SystemExit):
        train.main(wide, {})
    (change,) = memory.smallest_change(wide, 1, "cpu")
    assert f"it would with {change}. --anyway" in capsys.readouterr().err
    assert not (tmp_path / "wide").exists()
    benchmark.main(wide, {"--anyway": "", "--steps": "1"})
    assert "note     --anyway: this does not fit" in capsys.readouterr().out


def test_on_a_gpu_the_memory_of_the_device_at_hand_counts(monkeypatch, capsys):
    monkeypatch.setattr(hardware, "device", lambda choice: torch.device("cuda", 0))
    about = types.SimpleNamespace(total_memory=hardware.GPUS["rtx-4090"].memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    preflight.check_memory(config.load("demo"), anyway=False)
    with pytest.raises(config.ConfigError) as refused:
        preflight.check_memory(config.load("7b"), anyway=False)
    with pytest.raises(config.ConfigError) as planned:
        memory.check(config.load("7b"), 1, "rtx-4090")
    assert "--train.micro_batch_size=5 --gpus=8" in str(planned.value)
    said = str(planned.value).replace(" --gpus=8", " on 8 GPUs") + ". --anyway tries all the same"
    assert str(refused.value) == said
    preflight.check_memory(config.load("7b"), anyway=True)
    assert capsys.readouterr().out.startswith("note     --anyway: this does not fit")


def test_a_run_chooses_what_the_plan_chooses(monkeypatch, capsys):
    asked = ["--train.micro_batch_size=0", "--train.activation_checkpointing=auto"]
    monkeypatch.setattr(hardware, "device", lambda choice: torch.device("cuda", 0))
    about = types.SimpleNamespace(total_memory=hardware.GPUS["h200"].memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    for name in ("124m", "7b"):
        preflight.check_memory(config.load(name, asked), anyway=False)
        made = memory.chosen(config.load(name, asked), 1, "h200")
        assert capsys.readouterr().out == f"chosen   {memory.about_choice(made, 1, 'h200')}\n"
        assert preflight.choose(config.load(name, asked)) == made
    preflight.check_memory(config.load("demo"), anyway=False)  # nothing is to be chosen
    assert capsys.readouterr().out == ""


def test_processes_that_chose_differently_are_refused():
    cfg = config.load("124m", ["--train.micro_batch_size=64", "--train.activation_checkpointing=0"])
    same, other = (64, "0"), (8, "selective")
    world = types.SimpleNamespace(collect=lambda mine: [mine, same])
    preflight.check_agreement(cfg, world)
    world.collect = lambda mine: [mine, other]
    with pytest.raises(config.ConfigError, match="8 with selective and 64 with 0; set train"):
        preflight.check_agreement(cfg, world)


def test_a_benchmark_of_a_chosen_micro_batch(recipe, tmp_path):
    file = tmp_path / "figures.json"
    auto = ("--train.micro_batch_size=0", "--train.activation_checkpointing=auto")
    result = run(recipe, *auto, "--steps", "1", f"--json={file}")
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.startswith("chosen   micro-batches of 6 rows, nothing recomputed: ")
    assert "micro-batches of 6, nothing recomputed" in result.stdout
    train = json.loads(file.read_text())["config"]["train"]
    assert (train["micro_batch_size"], train["activation_checkpointing"]) == (6, 0)


def test_a_profile_is_a_trace_of_steps_with_the_matmuls_in_it(recipe, tmp_path):
    cfg = config.load(str(recipe), [f"--run={tmp_path / 'run'}", "--train.steps=8"])
    train.train(cfg, profile=True)
    trace = json.loads((tmp_path / "run" / "trace.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"aten::mm", "mkldnn::_linear_pointwise"} & names and any("AdamW" in str(name) for name in names)


def test_the_meter_reads_memory_and_says_nothing_of_what_it_cannot_know(recipe):
    cfg = config.load(str(recipe))
    meter = hardware.Meter(cfg, parallel.alone())
    before, room = meter.memory(), bytearray(200_000_000)
    assert meter.memory() >= before > 0 and len(room)
    assert meter.joules() == 0 and meter.totals() == {}
    assert set(meter.columns(100.0, 0.0)) == {"memory_bytes"}


def test_energy_is_power_times_time_and_mfu_is_costs(recipe, monkeypatch):
    cfg = config.load("7b")
    meter = hardware.Meter(cfg, parallel.alone())
    meter.peak, meter.has_power, meter.watts, meter.use = 312e12, True, 350.0, 97
    record = meter.columns(2600.0, 7.2e6)
    plain, palm = cost.mfu(cfg.model, 2600.0, 312e12)
    assert (record["mfu_6n"], record["mfu"], record["peak_flops"]) == (plain, palm, 312e12)
    assert palm == pytest.approx(0.364, abs=0.001)  # Amber's figure
    assert record["kwh"] == pytest.approx(2.0) and record["gpu_watts"] == 350 and record["gpu_use"] == 0.97
    # 2 kWh x PUE 1.1 x 0.385 kg/kWh
    assert meter.totals() == {"kwh": pytest.approx(2.0), "kg_co2": pytest.approx(0.847)}


@pytest.mark.parametrize(
    ("hip", "reading", "use", "watts", "share"),
    [
        (None, 691_000, 99, 691.0, 99),  # NVIDIA: milliwatts
        (None, 8_000, 0, 8.0, 0),  # a small one, idle
        ("6.4", 460, 97, 460.0, 97),  # ROCm with torch 2.13: watts
        ("6.4", 460_000, 97, 460.0, 97),  # the same, once it is mended
        ("6.4", 0, "N/A", 0.0, 0),  # the second die of a MI250X
    ],
)
def test_power_is_in_watts_whatever_pytorch_gives(recipe, monkeypatch, hip, reading, use, watts, share):
    meter = hardware.Meter(config.load(str(recipe)), parallel.alone())
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda: reading)
    monkeypatch.setattr(torch.cuda, "utilization", lambda: use)
    assert meter.read() and (meter.watts, meter.use) == (watts, share)


def test_a_run_goes_on_where_power_cannot_be_read(recipe, monkeypatch):
    def missing():
        raise ModuleNotFoundError("amdsmi does not seem to be installed or it can't be imported.")

    meter = hardware.Meter(config.load(str(recipe)), parallel.alone())
    monkeypatch.setattr(torch.cuda, "power_draw", missing)
    assert not meter.read() and set(meter.columns(100.0, meter.joules())) == {"memory_bytes"}
    # where it fails for once, the last values count
    meter.has_power, meter.watts, meter.last, meter.read_at = True, 300.0, time.perf_counter() - 2, 0.0
    assert meter.joules() == pytest.approx(600, rel=0.1) and meter.watts == 300


# ---- benchmarks/ ------------------------------------------------------------------------------------------

MODEL = "--layers 1 --width 32 --heads 2 --ff 48 --length 32 --rows 2 --vocab_size 300 --threads 1"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("bench_train", f"{MODEL} --steps 2 --sides plain"),
        ("bench_save", "--size 2 32 2 48 300 64 2 --steps 2 --rounds 2 --threads 1"),
        ("bench_save", "--size 2 32 2 48 300 64 2 --steps 2 --rounds 2 --threads 1 --sync"),
        ("bench_verify", "--gb 0.05 --chunk_gb 0.01 --rounds 1"),
    ],
)
def test_a_script_of_benchmarks_runs_in_miniature_and_writes_its_figures(script, flags, tmp_path):
    file = tmp_path / "figures.json"
    result = run(*flags.split(), f"--json={file}", script=f"benchmarks/{script}.py")
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(file.read_text())["format"] == 1


@pytest.mark.slow
def test_the_parts_of_the_gpu_script_run_in_miniature_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # its file is there
    parts = ("precision", "attention", "deterministic")  # the others call scripts that are tested above
    result = run("--cpu-smoke", "--only", *parts, script="benchmarks/gpu.py")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


def test_the_earlier_commands_say_what_to_run_now(recipe):
    result = run(recipe, "--benchmark", "30", script="train.py")
    assert result.returncode == 2 and "python benchmark.py CONFIG --steps N" in result.stderr
    result = run("verify", "runs/demo", script="checkpoint.py")
    assert result.returncode == 1 and "python audit.py RUN" in result.stderr
