"""Starts and ends a run's process group, and notices a lost process. Works around faults of PyTorch.

torchrun sets RANK, LOCAL_RANK, WORLD_SIZE and the address of a store. The first four functions say what is
known before any process has met another; parallel.py and train.py call the others.
"""

import datetime
import os
import time

import torch.distributed as dist

from config import ConfigError


def world_size() -> int:
    """Processes in this run, known before any of them has met another."""
    return int(os.environ.get("WORLD_SIZE", 1))


def processes_here() -> int:
    """Those of them on this machine: they share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def rank() -> int:
    """The number of this process, known before any of them has met another. The first one speaks for all."""
    return int(os.environ.get("RANK", 0))


def first_on_node() -> bool:
    """Whether this process does the work of its node, such as hashing files that all processes read."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def meet(backend: str, timeout: datetime.timedelta) -> None:
    """Joins the process group, also after a restart by torchrun.

    torchrun 2.13 keeps one store through all its restarts, without a prefix. A restarted process may then
    find the addresses that dead ones left there, and wait for them for ever. On one node, the number of the
    restart is a prefix on which all agree. On several nodes it is not: each node counts its own. The prefix
    can be removed when torchrun adds one itself.
    """
    store, rank, n = next(dist.rendezvous("env://", timeout=timeout))
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared and os.environ.get("LOCAL_WORLD_SIZE") == str(n):
        store = dist.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    elif shared and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        raise ConfigError(
            "torchrun --max-restarts on several nodes needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its "
            "environment, on every node; without it restarted processes can wait for dead ones for ever"
        )
    dist.init_process_group(backend, store=store, rank=rank, world_size=n, timeout=timeout)


def is_lost(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone or hangs."""
    signs = ("gloo", "nccl", "connection closed", "timed out", "connection reset")
    return isinstance(error, dist.DistError) or any(sign in str(error).lower() for sign in signs)


def part() -> None:
    """Leaves the process group when all processes are done.

    In PyTorch 2.13, gloo's threads need the interpreter's lock to free their tensors, but
    destroy_process_group holds the lock while it waits for them: a deadlock. A barrier holds no tensor, and
    releases the lock while it waits. The barriers can be removed when PyTorch no longer deadlocks.
    """
    for _ in range(2):
        dist.barrier()
    time.sleep(0.05)
    dist.destroy_process_group()
