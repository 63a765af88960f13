"""One process or many: who am I, on which device, in which precision; and the few things that need all of us.

The only file that knows ranks. Everything else says `everyone.sum(...)` or `everyone.once(...)` and is the
same program on a laptop and on a node. torchrun starts the processes and sets RANK, LOCAL_RANK, WORLD_SIZE:

    python train.py configs/demo.py                              # one process
    torchrun --nproc_per_node=2 -- train.py configs/demo.py      # two, gradients averaged by DDP

The `--` matters with --run=...: without it torchrun takes that for an option of its own.
"""

import contextlib
import ctypes
import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from config import ConfigError, Train


def world_size() -> int:
    """Processes in this run, known before any of them has met another."""
    return int(os.environ.get("WORLD_SIZE", 1))


def device(choice: str) -> torch.device:
    """auto, cpu or cuda -> this process's device. Raises ConfigError where CUDA is asked for and absent."""
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


def precision(choice: str, device: torch.device) -> torch.dtype:
    """auto, fp32 or bf16 -> the dtype of matrix products.

    auto is BF16 on CUDA with hardware for it, else FP32: on a processor without BF16 instructions the same
    products are some thirty times slower than in FP32.
    """
    if choice == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[choice]


def autocast(device: torch.device, dtype: torch.dtype):
    """Matrix products in dtype over FP32 weights: a context manager around a forward."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


@dataclass(frozen=True)
class Everyone:
    """All processes of a run, seen from one of them."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype

    def share(self, n: int) -> slice:
        """This process's contiguous share of n items that divide by the number of processes."""
        each = n // self.world_size
        return slice(self.rank * each, (self.rank + 1) * each)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, its gradients averaged over all processes after the last micro-batch of a step."""
        if self.world_size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        # A gradient is then a view into the buffer that is reduced: one copy less of all gradients.
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    def accumulate(self, model: nn.Module, last: bool):
        """A context manager around forward and backward: gradients travel only with the last micro-batch."""
        return contextlib.nullcontext() if last or self.world_size == 1 else model.no_sync()

    def sum(self, *values) -> list[float]:
        """Each value (number or one-element tensor) summed over all processes, in float64."""
        total = torch.stack(
            [torch.as_tensor(v, dtype=torch.float64, device=self.device).detach() for v in values]
        )
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def once(self, action: Callable, *arguments) -> None:
        """Runs action(*arguments) in the first process, while all others wait. Where it raises, all raise."""
        problem = None
        if self.rank == 0:
            try:
                action(*arguments)
            except Exception as error:
                problem = error
        if self.world_size > 1:
            failed = torch.tensor(float(problem is not None), device=self.device)
            dist.broadcast(failed, src=0)
            if failed.item() and problem is None:
                raise ConfigError(f"the first process failed in {action.__name__}; its message says why")
        if problem is not None:
            raise problem

    def leave(self) -> None:
        if self.world_size > 1:
            dist.destroy_process_group()


def start(train: Train) -> Everyone:
    """Meets the other processes. Raises ConfigError before any of that where the device is not to be had."""
    here = device(train.device)
    dtype = precision(train.precision, here)
    everyone = Everyone(int(os.environ.get("RANK", 0)), world_size(), here, dtype)
    if here.type == "cuda":
        torch.cuda.set_device(here)
        if dtype == torch.bfloat16:  # the few products outside autocast may then be TF32; fp32 means FP32
            torch.set_float32_matmul_precision("high")
    else:
        keep_freed_memory()
    if everyone.world_size > 1:
        patience = datetime.timedelta(hours=1)  # others wait in a collective while the first one saves 80 GB
        dist.init_process_group("nccl" if here.type == "cuda" else "gloo", timeout=patience)
    return everyone


def keep_freed_memory() -> None:
    """Asks glibc to keep what a CPU process frees.

    Without this every large tensor of every step is fresh memory from the kernel, which first has to be
    zeroed page by page: about 3 GB/s, a tenth of the speed of a copy.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # not glibc (macOS, musl): correct all the same, only slower
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
