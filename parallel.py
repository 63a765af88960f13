"""One process or many: rank, device, precision; and the actions that all processes take together.

Ranks are known here, and in checkpoint.py, which deals files out to processes. Most other files say
`world.sum(...)` or `world.once(...)` and are the same program on a laptop and on many nodes. torchrun starts
the processes and sets RANK, LOCAL_RANK and WORLD_SIZE:

    python train.py configs/demo.py                                                # one process
    torchrun --nproc_per_node=2 -- train.py configs/demo.py                        # two processes: DDP
    torchrun --nproc_per_node=8 -- train.py configs/7b.py                          # its config says FSDP
    torchrun --nproc_per_node=8 -- train.py configs/7b.py --parallel.tp=2          # tensor parallel over two
    torchrun --nnodes=4 --nproc_per_node=8 ... -- train.py 7b --parallel.shard=8   # HSDP: sharded in a node

The `--` matters with --run=...: without it torchrun takes that for an option of its own.

The processes form a mesh of three dimensions, (replicate, shard, tp), in row-major order: neighbours share a
model's matrices (tp), groups of them shard one set of weights, and the groups are replicas. replicate x shard
is dp_size, the number of processes that see different rows. All of it is applied to the model from outside,
by PyTorch's own DDP, FSDP2 and tensor parallel; model.py knows nothing of it.
"""

import contextlib
import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import hardware
import recompute
import rendezvous
import sharding
from config import Config, ConfigError, Parallel, Train, choose
from consistency import mesh_shape
from sharding import put

# ---- who and where ----------------------------------------------------------------------------------------


def precision(choice: str, device: torch.device) -> torch.dtype:
    """Where BF16 is decided: auto, fp32 or bf16 -> the dtype of matmuls. ConfigError without BF16 hardware.

    auto is BF16 on CUDA with hardware for it, else FP32: on a CPU without BF16 instructions a BF16 matmul is
    some thirty times slower than one in FP32.
    """
    cuda = device.type == "cuda"
    has_bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if choice == "bf16" and cuda and not has_bf16:
        raise ConfigError(
            f"train.precision=bf16, and {torch.cuda.get_device_name(device)} has no BF16 arithmetic (it came "
            "with compute capability 8.0, A100); use --train.precision=fp32"
        )
    wanted = choose("train.precision", choice, {"auto": has_bf16, "fp32": False, "bf16": True})
    return torch.bfloat16 if wanted else torch.float32


def autocast(device: torch.device, dtype: torch.dtype):
    """Where BF16 is applied: matmuls in `dtype` over FP32 weights. A context manager around a forward."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


# ---- all processes, seen from one of them -----------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """All processes of a run. `with parallel.start(...) as world:` parts from the others at its end."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype  # of matmuls
    shape: tuple[int, int, int] = (1, 1, 1)  # (replicate, shard, tp)
    sharded: bool = False  # by FSDP2, which also averages over replicas and serves tensor parallel
    mesh: DeviceMesh | None = None

    @property
    def tp_size(self) -> int:
        """Processes that share matrices and see the same rows."""
        return self.shape[2]

    @property
    def dp_size(self) -> int:
        """Processes that see different rows: replicas x shards."""
        return self.size // self.tp_size

    @property
    def dp_rank(self) -> int:
        """This process's number among them."""
        return self.rank // self.tp_size

    def share(self, n: int) -> slice:
        """This process's contiguous share of n items; n is a multiple of dp_size."""
        each = n // self.dp_size
        return slice(self.dp_rank * each, (self.dp_rank + 1) * each)

    # ---- what is done to a model --------------------------------------------------------------------------

    def spread(self, model: nn.Module, cfg: Config) -> nn.Module:
        """A model on the meta device -> the same model on this device, empty, ready for forward and backward.

        It is split, compiled, recomputed, sharded and replicated as the config asks. Gradients are averaged
        over the dp_size processes after the last micro-batch of a step (see accumulate). Fill it with `fill`.
        """
        # Tensor parallel first: FSDP then shards what is left of each matrix.
        if self.tp_size > 1:
            sharding.split_matrices(model, self.mesh["tp"])

        # Each block's forward is wrapped, not the module: hooks stay outside, names in a state dict stay as
        # they are, and all blocks, being the same code, share one compilation. recompute.py says which
        # recompute is compiled.
        table = {"auto": self.device.type == "cuda", "on": True, "off": False}
        compiles = choose("train.compile", cfg.train.compile, table)
        again = cfg.train.activation_checkpointing
        assert again != "auto", "preflight.choose comes before spread"
        for i, block in enumerate(model.layers):
            if again == "selective":
                block.forward = recompute.recomputed(block.forward, selective=True)
            if compiles:
                block.forward = torch.compile(block.forward)
            if isinstance(again, int) and again and i % again == 0:
                block.forward = recompute.recomputed(block.forward, selective=False)
        if compiles:
            model.loss.differentiate = torch.compile(model.loss.differentiate)

        # FSDP, one process, or DDP.
        if self.sharded:
            sharding.shard_weights(model, self.mesh, self.dtype, cfg.parallel.reshard)
        model.to_empty(device=self.device)
        if self.sharded or self.size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        # Gradients are views into the buffers that are reduced, which saves a copy of all gradients. `fill`
        # or a checkpoint gives all processes the same weights, so DDP need not.
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, init_sync=False)

    def fill(self, model: nn.Module, values) -> None:
        """Gives every parameter its value: whole ones on the CPU, in the order of the model's parameters."""
        for parameter, value in zip(model.parameters(), values, strict=True):
            put(parameter, value)
        if self.size > 1 and not self.sharded:  # the same to the last bit, whatever each process computed
            for parameter in model.parameters():
                dist.broadcast(parameter.data, src=0)

    @contextlib.contextmanager
    def accumulate(self, model: nn.Module, last: bool):
        """Around forward and backward: delays gradient communication to the last micro-batch, where possible.

        DDP then all-reduces once a step. FSDP reduce-scatters after every micro-batch, as whole gradients
        would fill the memory that sharding saves; only the all-reduce between its replicas waits.
        """
        if self.sharded:
            if self.shape[0] > 1:
                model.set_requires_all_reduce(last)
            yield
        elif last or self.size == 1:
            yield
        else:
            with model.no_sync():
                yield

    # ---- what all do together -----------------------------------------------------------------------------

    def sum(self, *values) -> list[float]:
        """Each value (a number or a tensor of one element) summed over all processes, in float64."""
        numbers = [torch.as_tensor(v, dtype=torch.float64, device=self.device).detach() for v in values]
        total = torch.stack(numbers)
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def collect(self, value: object) -> list:
        """Every process's value, by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def once(self, action: Callable, *arguments) -> None:
        """Runs action(*arguments) in the first process, while all others wait. Where it raises, all raise:
        otherwise the others would wait for the first one for ever.
        """
        problem = None
        if self.rank == 0:
            try:
                action(*arguments)
            except Exception as error:
                problem = error
        if self.size > 1:
            failed = torch.tensor(float(problem is not None), device=self.device)
            dist.broadcast(failed, src=0)
            if failed.item() and problem is None:
                raise ConfigError(f"the first process failed in {action.__name__}; its message says why")
        if problem is not None:
            raise problem

    def first(self, function: Callable, *arguments) -> object:
        """function(*arguments) in the first process, sent to all: their own results might differ."""
        told = [None]

        def ask():
            told[0] = function(*arguments)

        ask.__name__ = function.__name__  # for the message of `once`

        self.once(ask)
        if self.size > 1:
            dist.broadcast_object_list(told, src=0)
        return told[0]

    def only_first(self, action: Callable, *arguments) -> None:
        """Runs action(*arguments) in the first process; nobody waits for it."""
        if self.rank == 0:
            action(*arguments)

    def leave(self) -> None:
        """Leaves the process group when all processes are done. A process with an error must not wait."""
        if self.size > 1:
            rendezvous.part()

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            self.leave()


def alone() -> World:
    """One process on the CPU, for what needs no config."""
    return World(0, 1, torch.device("cpu"), torch.float32)


def start(train: Train, settings: Parallel) -> World:
    """Joins the process group. Raises ConfigError first if the device does not exist."""
    here, n = hardware.device(train.device), rendezvous.world_size()
    dtype, shape = precision(train.precision, here), mesh_shape(settings, n)
    hardware.use_attention(train.attention, here)

    # Set up this process: device and arithmetic.
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # it finds bugs, for a pass over memory
    if here.type == "cuda":
        torch.cuda.set_device(here)
        # In BF16 the few matmuls outside autocast may be TF32; fp32 means FP32.
        torch.set_float32_matmul_precision("high" if dtype == torch.bfloat16 else "highest")
    else:
        hardware.keep_freed_memory()

    # Set up all processes: the process group, and a mesh where something is sharded.
    sharded = n > 1 and (settings.strategy == "fsdp" or settings.tp > 1)
    mesh = None
    if n > 1:
        timeout = datetime.timedelta(seconds=settings.timeout_seconds)
        rendezvous.meet("nccl" if here.type == "cuda" else "gloo", timeout)
        if sharded:
            mesh = init_device_mesh(here.type, shape, mesh_dim_names=("replicate", "shard", "tp"))
            for group in mesh.get_all_groups():  # PyTorch 2.13: they do not inherit it; can go when they do
                dist.distributed_c10d._set_pg_timeout(timeout, group)
    return World(rendezvous.rank(), n, here, dtype, shape, sharded, mesh)
