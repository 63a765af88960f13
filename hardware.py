"""Facts about the machine: GPUs and their peaks, memory, power, the names of devices; and a meter for a run.

The plan (plan.py, memory.py) asks for a GPU that need not be here, by its name. train.py and benchmark.py ask
for the device that they use. Importing this file does not import torch: the functions that need it do so
themselves. Reads /proc and control groups; writes nothing.
"""

import contextlib
import ctypes
import gc
import importlib.metadata
import os
import platform
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cost
from config import Config, ConfigError, did_you_mean, unknown

if TYPE_CHECKING:
    import torch

    from parallel import World

GIB = 2**30

# ---- GPUs by name -----------------------------------------------------------------------------------------


class Gpu(NamedTuple):
    memory: float  # bytes that PyTorch finds on it, which are fewer than its name says
    flops: float | None  # peak of dense BF16 matmuls with FP32 sums, per second; None: not known
    watts: float | None  # limit of the board; a long run draws about that much


# Peaks and watts: NVIDIA's data sheets (of the SXM boards, and of the RTX 4090) and AMD's, without sparsity.
# A MI250X is two dies (GCDs) on one board of 383 TFLOP/s and 560 W. PyTorch sees each die as a GPU, and so
# does this table: a node of LUMI has four boards, which are eight GPUs of half a board each. The memory of
# AMD's is what PyTorch reports there, 65,520 and 196,592 MiB. Nothing was run on a GPU of AMD yet.
GPUS = {
    "a100-40gb": Gpu(39.4 * GIB, 312e12, 400),
    "a100-80gb": Gpu(79.1 * GIB, 312e12, 400),
    "h100-80gb": Gpu(79.1 * GIB, 989e12, 700),
    "h200": Gpu(139.7 * GIB, 989e12, 700),
    "rtx-4090": Gpu(23.6 * GIB, 165e12, 450),
    "mi250x-gcd": Gpu(63.98 * GIB, 383e12 / 2, 560 / 2),
    "mi300x": Gpu(191.98 * GIB, 1307.4e12, 750),
}
SHORT = {
    "a100": "a100-80gb",
    "h100": "h100-80gb",
    "4090": "rtx-4090",
    "rtx4090": "rtx-4090",
    "mi250x": "mi250x-gcd",
}

# Peaks by words of the name that PyTorch gives a device. The first entry whose words are all in it counts, so
# a board with a peak of its own comes before the family.
PEAKS = {
    "A100": GPUS["a100-80gb"].flops,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": GPUS["h100-80gb"].flops,
    "H200 NVL": 836e12,
    "H200": GPUS["h200"].flops,
    "RTX 4090": GPUS["rtx-4090"].flops,
    "MI250X MI250": None,  # "AMD Instinct MI250X / MI250": either of them, and their peaks differ
    "MI250X": GPUS["mi250x-gcd"].flops,
    "MI300X": GPUS["mi300x"].flops,
}


def by_name(name: str) -> tuple[int | None, str]:
    """The number of GPUs and the name in GPUS, or "cpu", from a usual name: "8xH100" -> (8, "h100-80gb").

    The number is None where the name has none. Raises ConfigError where no such GPU is known.
    """
    count, short = re.fullmatch(r"(?:(\d{1,9})x)?(.*)", name.lower().replace(" ", "-")).groups()
    gpu, known = SHORT.get(short, short), (*GPUS, "cpu")
    if gpu not in known:
        raise ConfigError(f"--gpu={name}{did_you_mean(gpu, known)}")
    if count and not int(count):
        raise ConfigError(f"--gpu={name}: at least one GPU")
    return int(count) if count else None, gpu


def peak_flops(device: str) -> float | None:
    """Peak of a device by PyTorch's name for it: peak_flops("NVIDIA H100 80GB HBM3") -> 989e12.

    None where the peak is not known: MFU is then not computed. Some versions of ROCm give every GPU of AMD an
    empty name, or "AMD Radeon Graphics".
    """
    words = re.findall("[A-Za-z0-9]+", device)  # whole words: an RTX A1000 is no A100
    if {*words} & {"MIG", "Laptop", "D", "64GB"}:  # a slice of a board, or another board of that name
        return None
    for name, flops in PEAKS.items():
        if f" {name} " in f" {' '.join(words)} ":
            return flops
    return None


# ---- memory -----------------------------------------------------------------------------------------------

# Share of a GPU's memory for tensors. The rest is for the context of CUDA or ROCm, buffers of its matmul and
# communication libraries, and gaps between tensors.
USABLE = 0.95
# A CPU process held 1.2 to 1.6 times the bytes of its tensors, as malloc leaves gaps
# (benchmarks/bench_memory.py).
USABLE_ON_CPU = 0.6


def machine(gpu: str) -> Gpu:
    """A GPU of the table by its name, or "cpu": this machine."""
    return Gpu(machine_memory(), None, None) if gpu == "cpu" else GPUS[gpu]


def usable(gpu: str, processes: int) -> float:
    """Bytes for the tensors of one process. Processes on a CPU share its memory; each GPU has its own."""
    if gpu == "cpu":
        return machine(gpu).memory * (USABLE_ON_CPU / processes)
    return machine(gpu).memory * USABLE


def machine_memory(root: Path = Path("/")) -> int:
    """Bytes of this machine, or of the control group of this process (a container, a job) if it has fewer."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return limits[0]  # not Linux

    for group in groups:
        # A line is "0::/user.slice"; or in version 1, where each resource has a tree of its own,
        # "9:memory:/docker/3f".
        _, kinds, name = group.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if kinds else "")
        limit = "memory.limit_in_bytes" if kinds else "memory.max"

        # The limit of a group also holds for the groups inside it, so all of them up to the top are read.
        folder = top / name.strip("/")
        for path in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError):  # no limit: no such file, or the word "max"
                limits.append(int((path / limit).read_text()))
            if path == top:
                break
    return min(limits)


def keep_freed_memory() -> None:
    """Asks glibc to keep what a CPU process frees, for its next tensors.

    Otherwise each large tensor of each step is new memory from the kernel, which first fills it with zeros,
    page by page: about 3 GB/s, a tenth of the speed of a copy. This can go when PyTorch caches what a CPU
    process frees, as it does on CUDA.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # not glibc (macOS, musl): the same results, only slower
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def use_attention(kind: str, device: "torch.device") -> None:
    """auto: PyTorch's choice among its kernels. FA3, FA4: FlashAttention 3 or 4, where it is installed."""
    if kind == "auto":
        return
    if kind not in ("FA3", "FA4"):
        raise unknown("train.attention", kind)
    if device.type != "cuda":
        raise ConfigError(f"train.attention={kind} needs a CUDA device; use auto")
    import torch
    from torch.nn import attention

    try:
        attention.activate_flash_attention_impl(kind)
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"train.attention={kind}: PyTorch cannot use it: {error}; auto needs nothing"
        ) from error
    torch.backends.cuda.enable_cudnn_sdp(False)  # PyTorch would prefer cuDNN's kernels


@contextlib.contextmanager
def garbage_waits():
    """Around a training loop: Python looks for reference cycles only where gc.collect() is called.

    A collection at a moment of Python's choice goes over all of its containers, of which torch has 290,000:
    0.3 s on an AMD EPYC. On many GPUs all processes wait for the one that does it. A step makes no cycles
    (tests/test_train.py).
    """
    gc.collect()
    gc.freeze()  # what exists now is not looked at again
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


# ---- what this machine is ---------------------------------------------------------------------------------


def device(choice: str) -> "torch.device":
    """auto, cpu or cuda -> this process's device. Raises ConfigError where CUDA is asked for and absent."""
    import torch

    if choice not in ("auto", "cpu", "cuda"):
        raise unknown("train.device", choice)
    if choice == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device=cuda, but PyTorch sees no CUDA device here; use cpu or auto")
    if choice == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local} of this node has no GPU: there are {torch.cuda.device_count()}; "
            "start at most one process a GPU (torchrun --nproc_per_node)"
        )
    return torch.device("cuda", local)


def processor() -> str:
    """The processor's name and its number of cores."""
    name = ""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name or platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def has_bf16() -> bool:
    """Whether this processor has instructions for BF16 matmuls; True where it does not say."""
    try:
        return "bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True


def about_machine(device: "torch.device") -> dict:
    """Software and hardware: {"versions": {"python": ..., ...}, "device": ..., "platform": ...}."""
    import torch

    # The others are read from the installed packages, so that nothing is imported for its version alone.
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {name: importlib.metadata.version(name) for name in ("numpy", "safetensors")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {"versions": versions, "device": name, "platform": platform.platform()}


def about_run(world: "World") -> dict:
    """The facts that may differ between the parts of a resumed run: code, machine, processes, precision."""
    import torch

    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "git": git.stdout.strip() or None,
        **about_machine(world.device),
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "precision": str(world.dtype).removeprefix("torch."),
    }


# ---- what the hardware does during a run ------------------------------------------------------------------


class Meter:
    """Memory, MFU, power and energy of a run, as columns of metrics.jsonl.

        meter = Meter(cfg, world)
        joules = meter.joules()                       # of this process's GPU; to be summed over all GPUs
        record |= meter.columns(tokens_per_second, joules)

    PyTorch reads power and utilization, at most once a second: from NVML where nvidia-ml-py is installed, on
    ROCm from AMD SMI where amdsmi is. Energy is power x time, summed over the GPUs of all processes. A column
    whose value is not known is absent.
    """

    def __init__(self, cfg: Config, world: "World"):
        self.cfg, self.world, self.cuda = cfg, world, world.device.type == "cuda"
        self.peak = None
        if self.cuda:
            import torch

            self.peak = peak_flops(torch.cuda.get_device_name(world.device))
        self.watts, self.use = 0.0, 0  # at the last reading; use: per cent of the time that the GPU was busy
        self.kwh = 0.0  # of all GPUs, since the process began
        self.last = self.read_at = time.perf_counter()
        self.has_power = self.cuda and self.read()

    def read(self) -> bool:
        """Reads power and utilization. False where this machine does not tell them."""
        import torch

        try:
            power, use = torch.cuda.power_draw(), torch.cuda.utilization()
        except Exception:  # no nvidia-ml-py or amdsmi, no driver, no permission: each has an error of its own
            return False
        # PyTorch promises milliwatts, but up to 2.13 it gives watts on ROCm (pytorch/pytorch pull 197553). An
        # Instinct draws more than 10 W and less than 10 kW, so the number says which. This can go with 2.13.
        in_watts = torch.version.hip is not None and power < 10_000
        self.watts = power if in_watts else power / 1000
        self.use = use if isinstance(use, int) else 0  # AMD SMI may say "N/A"
        return True

    def joules(self) -> float:
        """Energy that this process's GPU drew since the last call.

        A MI250X tells the power of both dies to its first one, and 0 to the second: their sum is right where
        both are used.
        """
        if not self.has_power:
            return 0.0
        now = time.perf_counter()
        if now - self.read_at >= 1:
            self.read()  # where it fails for once, the last values count
            self.read_at = now
        spent, self.last = self.watts * (now - self.last), now
        return spent

    def columns(self, tokens_per_second: float, joules: float) -> dict:
        """The columns of the step just finished. Its speed and its energy are those of all GPUs together."""
        record = {"memory_bytes": self.memory()}
        if self.peak:
            each = tokens_per_second / self.world.size
            mfu_6n, mfu = cost.mfu(self.cfg.model, each, self.peak)
            record |= {"mfu_6n": mfu_6n, "mfu": mfu, "peak_flops": self.peak}
        if self.has_power:
            self.kwh += joules / 3.6e6
            record |= {"gpu_watts": self.watts, "gpu_use": self.use / 100, "kwh": self.kwh}
        return record

    def memory(self) -> int:
        """The most bytes in use so far: on CUDA by tensors, on a CPU by the whole process."""
        if self.cuda:
            import torch

            return torch.cuda.max_memory_allocated()
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def totals(self) -> dict:
        """Energy since the process began, and its CO2 by OLMo's formula with LLaMA's figures (cost.py)."""
        if not self.has_power:
            return {}
        tonnes = cost.tonnes_co2(self.kwh / 1000, cost.PUE, cost.KG_CO2_PER_KWH)
        return {"kwh": self.kwh, "kg_co2": 1000 * tonnes}


class Profiler:
    """Traces steps 4 to 6 into trace.json of a run; without a run, does nothing."""

    def __init__(self, run: Path | str | None, world: "World"):
        self.run, self.tracer, self.done = run, None, run is None
        if run is not None and world.rank == 0:
            from torch.profiler import ProfilerActivity, profile

            kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (world.device.type == "cuda")
            self.tracer = profile(activities=kinds, record_shapes=True)

    def step(self, n_done: int, is_last: bool) -> None:
        """Starts and ends the trace. Call it after each step of this process."""
        if self.tracer is None or self.done:
            return
        if n_done == 3:
            self.tracer.start()
        if n_done == 6:
            self.tracer.stop()
            aside = Path(self.run) / ".trace.json"
            self.tracer.export_chrome_trace(str(aside))
            os.replace(aside, Path(self.run) / "trace.json")
            print(f"steps 4 to 6 are in {self.run}/trace.json; open it at ui.perfetto.dev", flush=True)
            self.done = True
        elif is_last:
            print("note     --profile traces steps 4 to 6, and this run made fewer", flush=True)
