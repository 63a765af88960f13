"""hardware.py: GPUs by name, the memory of this machine, what a run says about it; imported without torch."""

import os
import subprocess
import sys

import numpy
import pytest
import safetensors
import torch
from conftest import ROOT

import hardware
import parallel
from config import ConfigError


def test_importing_it_imports_neither_torch_nor_numpy():
    code = "import sys, hardware; assert not {'torch', 'numpy'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ---- GPUs by name -----------------------------------------------------------------------------------------


def test_a_gpus_peak_is_known_by_the_name_pytorch_gives_it():
    assert hardware.peak_flops("NVIDIA A100-SXM4-80GB") == hardware.GPUS["a100-80gb"].flops
    assert hardware.peak_flops("NVIDIA H100 80GB HBM3") == hardware.GPUS["h100-80gb"].flops
    assert hardware.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert hardware.peak_flops("NVIDIA H200") == hardware.GPUS["h200"].flops
    assert hardware.peak_flops("NVIDIA GeForce RTX 4090") == hardware.GPUS["rtx-4090"].flops
    assert hardware.peak_flops("a toaster") is None


def test_a_die_of_a_mi250x_is_a_gpu_of_half_a_board():
    # AMD's data sheets: a board of 383 TFLOP/s and 560 W; 1,307.4 TFLOP/s and 750 W
    die, whole = hardware.GPUS["mi250x-gcd"], hardware.GPUS["mi300x"]
    assert (die.flops, die.watts) == (191.5e12, 280) and (whole.flops, whole.watts) == (1307.4e12, 750)
    # PyTorch reports 65,520 MiB of one and 196,592 MiB of the other
    mib = [round(gpu.memory / 2**20) for gpu in (die, whole)]
    assert mib == pytest.approx([65_520, 196_592], abs=8)
    assert hardware.by_name("8xMI250X") == (8, "mi250x-gcd") and hardware.by_name("MI300X")[1] == "mi300x"
    assert hardware.peak_flops("AMD Instinct MI250X") == 191.5e12
    assert hardware.peak_flops("AMD Instinct MI300X") == hardware.peak_flops("AMD Instinct MI300X VF")
    assert hardware.peak_flops("AMD Instinct MI300X") == 1307.4e12


@pytest.mark.parametrize(
    "device",
    ["NVIDIA RTX A1000", "NVIDIA A100X", "NVIDIA GH200 480GB", "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
     "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA RTX 4000",
     "AMD Instinct MI250X / MI250", "AMD Instinct MI250X/MI250", "AMD Instinct MI210", "AMD Radeon Graphics",
     ""],
)  # fmt: skip
def test_a_peak_is_not_guessed_from_a_part_of_a_name(device):
    assert hardware.peak_flops(device) is None


def test_a_number_of_gpus_can_stand_before_their_name():
    assert hardware.by_name("8xH100") == (8, "h100-80gb")
    assert hardware.by_name("RTX 4090") == (None, "rtx-4090")
    assert hardware.by_name("cpu") == (None, "cpu")
    with pytest.raises(ConfigError, match="--gpu=8xh2000, which is not known; did you mean 'h200'"):
        hardware.by_name("8xh2000")


def test_a_gpu_of_amd_has_bf16_and_no_compute_capability(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for choice in ("auto", "bf16"):
        assert parallel.precision(choice, torch.device("cuda", 0)) == torch.bfloat16


# ---- memory -----------------------------------------------------------------------------------------------


def test_a_gpu_is_one_process_s_own_and_a_cpu_is_shared(monkeypatch):
    monkeypatch.setattr(hardware, "machine_memory", lambda: 1000)
    assert [hardware.usable("cpu", n) for n in (1, 4)] == [600, 150]
    assert hardware.usable("h200", 1) == hardware.usable("h200", 8) == 0.95 * 139.7 * 2**30


def test_the_memory_of_a_machine_is_that_of_its_control_group_if_it_has_fewer(tmp_path):
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert hardware.machine_memory(tmp_path) == physical  # not Linux
    (tmp_path / "proc/self").mkdir(parents=True)
    group, top = tmp_path / "proc/self/cgroup", tmp_path / "sys/fs/cgroup"
    (top / "job/step").mkdir(parents=True)
    group.write_text("0::/job/step\n")
    (top / "job/step/memory.max").write_text("max\n")
    assert hardware.machine_memory(tmp_path) == physical
    (top / "job/memory.max").write_text("3000000\n")  # a limit above it in the tree holds as well
    assert hardware.machine_memory(tmp_path) == 3_000_000
    group.write_text("12:cpu,cpuacct:/\n9:memory:/docker/3f\n")  # version 1, seen from inside a container
    (top / "memory").mkdir()
    (top / "memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert hardware.machine_memory(tmp_path) == physical
    (top / "memory/memory.limit_in_bytes").write_text("2000000\n")
    assert hardware.machine_memory(tmp_path) == 2_000_000


# ---- what this machine is ---------------------------------------------------------------------------------


def test_a_run_says_code_versions_machine_and_processes_in_this_order():
    about = hardware.about_run(parallel.alone())
    assert list(about) == ["git", "versions", "device", "platform", "processes", "threads", "precision"]
    assert about["versions"] == {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "safetensors": safetensors.__version__,
    }
    assert about["device"] == hardware.processor() and about["device"].endswith(f", {os.cpu_count()} cores")
    assert (about["processes"], about["precision"]) == (1, "float32")


def test_flash_attention_that_is_not_installed_is_an_error_that_says_so():
    for kind in ("FA3", "FA4"):
        with pytest.raises(ConfigError, match=f"train.attention={kind}: PyTorch cannot use it: .*auto needs"):
            hardware.use_attention(kind, torch.device("cuda"))
        with pytest.raises(ConfigError, match=f"train.attention={kind} needs a CUDA device"):
            hardware.use_attention(kind, torch.device("cpu"))
    hardware.use_attention("auto", torch.device("cpu"))
