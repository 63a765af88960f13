"""One process or many: who am I, on which device, in which precision; and the few things that need all of us.

The only file that knows ranks. Everything else says `world.sum(...)` or `world.once(...)` and is the
same program on a laptop and on a hundred nodes. torchrun starts the processes and sets RANK, LOCAL_RANK,
WORLD_SIZE:

    python train.py configs/demo.py                                                     # one process
    torchrun --nproc_per_node=2 -- train.py configs/demo.py                             # two: DDP
    torchrun --nproc_per_node=8 -- train.py configs/7b.py                               # its strategy is FSDP
    torchrun --nproc_per_node=8 -- train.py configs/7b.py --parallel.tp=2               # matrices in two
    torchrun --nnodes=4 --nproc_per_node=8 ... -- train.py 7b --parallel.shard=8        # hybrid sharding

The `--` matters with --run=...: without it torchrun takes that for an option of its own.

Processes stand in a mesh of three dimensions, (replicate, shard, tp), and process r holds rank r of it in
row-major order: neighbours share a model's matrices (tp), groups of them shard one copy of the weights, and
copies are replicated. All of it is applied to the model from outside, by PyTorch's own engines; model.py
knows nothing of it.
"""

import contextlib
import datetime
import functools
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import hardware
from config import Config, ConfigError, Parallel, Train, choose, mesh_shape, unknown

# ---- who and where ----------------------------------------------------------------------------------------


def world_size() -> int:
    """Processes in this run, known before any of them has met another."""
    return int(os.environ.get("WORLD_SIZE", 1))


def first_on_node() -> bool:
    """Whether this process does what one of each node has to do, such as hashing files that all read."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def processes_here() -> int:
    """Those of them on this machine, which share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this process speaks for all, known before any of them has met another."""
    return int(os.environ.get("RANK", 0)) == 0


def device(choice: str) -> torch.device:
    """auto, cpu or cuda -> this process's device. Raises ConfigError where CUDA is asked for and absent."""
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


def precision(choice: str, device: torch.device) -> torch.dtype:
    """auto, fp32 or bf16 -> the dtype of matrix products. ConfigError where a GPU has no BF16.

    auto is BF16 on CUDA with hardware for it, else FP32: on a processor without BF16 instructions the same
    products are some thirty times slower than in FP32.
    """
    cuda = device.type == "cuda"
    has_bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if choice == "bf16" and cuda and not has_bf16:
        raise ConfigError(
            f"train.precision=bf16, and {torch.cuda.get_device_name(device)} has no BF16 arithmetic (which "
            "came with compute capability 8.0, A100); use --train.precision=fp32"
        )
    wanted = choose("train.precision", choice, {"auto": has_bf16, "fp32": False, "bf16": True})
    return torch.bfloat16 if wanted else torch.float32


def autocast(device: torch.device, dtype: torch.dtype):
    """Matrix products in dtype over FP32 weights: a context manager around a forward."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


@dataclass(frozen=True)
class World:
    """All processes of a run, seen from one of them."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, int, int] = (1, 1, 1)  # (replicate, shard, tp)
    sharded: bool = False  # by FSDP2, which also does the replicating beside tensor parallel
    mesh: DeviceMesh | None = None

    @property
    def dp_size(self) -> int:
        """Replicas x shards: processes that see different rows, each with tp - 1 others that see the same."""
        return self.size // self.shape[2]

    def share(self, n: int) -> slice:
        """This process's contiguous share of n items that divide by the number of copies."""
        each, mine = n // self.dp_size, self.rank // self.shape[2]
        return slice(mine * each, (mine + 1) * each)

    # ---- what is done to a model --------------------------------------------------------------------------

    def spread(self, model: nn.Module, cfg: Config) -> nn.Module:
        """A model on the meta device -> the same on this one, empty, as a module to run forward and backward.

        Split, compiled, recomputed, sharded and replicated as the config asks. Its gradients are averaged
        over the copies after the last micro-batch of a step (see accumulate). Fill it with `put`.
        """
        if self.shape[2] > 1:
            split_matrices(model, self.mesh["tp"])
            # PyTorch: norms over two dimensions of a mesh may differ in a last bit; train.py takes their mean
            warnings.filterwarnings("ignore", message=".*_NormPartial")
        table = {"auto": self.device.type == "cuda", "on": True, "off": False}
        compiles = choose("train.compile", cfg.train.compile, table)
        every = cfg.train.activation_checkpointing
        for i, block in enumerate(model.layers):
            # the forward, not the module: hooks stay outside, names in state_dict as they are, and all
            # blocks, being the same code, share one compilation
            if compiles:
                block.forward = torch.compile(block.forward)
            if every and i % every == 0:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if self.sharded:
            self.shard_weights(model, cfg.parallel.reshard)
        model.to_empty(device=self.device)
        if self.sharded or self.size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        # A gradient is then a view into the buffer that is reduced: one copy less of all gradients. There is
        # nothing to broadcast yet: see `alike`.
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, init_sync=False)

    def shard_weights(self, model: nn.Module, reshard: bool) -> None:
        """FSDP2: every block is gathered when it is its turn, in BF16 where that is the precision.

        What is sharded, and what the optimizer sees, stays FP32; gradients are reduced in FP32.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # see `is_sharded`
        from torch.distributed.tensor import Shard

        replicate, shard, tp = self.shape
        param_dtype = None if self.dtype == torch.float32 else self.dtype
        # inputs stay as they are: the residual stream is FP32, and autocast casts what products read
        policy = MixedPrecisionPolicy(param_dtype, torch.float32, cast_forward_inputs=False)

        def along(parameter):  # the dimension that tensor parallel has not split
            split = is_sharded(parameter) and parameter.placements == (Shard(0),) and parameter.ndim > 1
            return Shard(1) if split else Shard(0)

        for name, parameter in model.named_parameters():
            if along(parameter) == Shard(1) and parameter.shape[1] % shard:
                raise ConfigError(
                    f"{name} is {parameter.shape[1]} wide, which does not divide by {shard} shards"
                )
        mesh = self.mesh["replicate", "shard"] if replicate > 1 else self.mesh["shard"]
        how = {"mesh": mesh, "mp_policy": policy, "shard_placement_fn": along if tp > 1 else None}
        for block in model.layers:
            fully_shard(block, reshard_after_forward=reshard, **how)
        fully_shard(model, reshard_after_forward=False, **how)  # embedding and head, in use from end to end

    @contextlib.contextmanager
    def accumulate(self, model: nn.Module, last: bool):
        """Around forward and backward: what can wait for the last micro-batch before it travels, waits.

        Sharded gradients cannot: whole ones would fill the memory that sharding saves. Between replicas they
        can.
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
        """Each value (number or one-element tensor) summed over all processes, in float64."""
        total = torch.stack(
            [torch.as_tensor(v, dtype=torch.float64, device=self.device).detach() for v in values]
        )
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def collect(self, value: object) -> list:
        """What each process has to say, by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def once(self, action: Callable, *arguments) -> None:
        """Runs action(*arguments) in the first process, while all others wait. Where it raises, all raise."""
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
        """function(*arguments) by the first process, told to all: what each reads for itself might differ."""
        told = [None]

        def ask():
            told[0] = function(*arguments)

        self.once(ask)
        if self.size > 1:
            dist.broadcast_object_list(told, src=0)
        return told[0]

    def aside(self, action: Callable, *arguments) -> None:
        """Runs action(*arguments) in the first process, and nobody waits for it."""
        if self.rank == 0:
            action(*arguments)

    def alike(self, model: nn.Module) -> None:
        """Gives all copies of a model that is not sharded the first one's parameters, to the last bit."""
        if self.size > 1 and not self.sharded:
            for parameter in model.parameters():
                dist.broadcast(parameter.data, src=0)

    def leave(self) -> None:
        """Parts from the others, when all are done."""
        if self.size > 1:
            # gloo's threads need the interpreter's lock to let go of the tensors they were given, and whoever
            # destroys the group waits for them with the lock in hand, for ever. Barriers hold no tensor, and
            # free the lock while they wait.
            for _ in range(2):
                dist.barrier()
            time.sleep(0.05)
            dist.destroy_process_group()


def alone() -> World:
    """One process on the CPU, for what has no need of a config."""
    return World(0, 1, torch.device("cpu"), torch.float32)


def start(train: Train, settings: Parallel) -> World:
    """Meets the other processes. Raises ConfigError before any of that where the device is not to be had."""
    here, n = device(train.device), world_size()
    dtype, shape = precision(train.precision, here), mesh_shape(settings, n)
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = (
            False  # a check for bugs that costs a pass over memory
        )
    if here.type == "cuda":
        torch.cuda.set_device(here)
        if dtype == torch.bfloat16:  # the few products outside autocast may then be TF32; fp32 means FP32
            torch.set_float32_matmul_precision("high")
    else:
        hardware.keep_freed_memory()
    sharded = n > 1 and (settings.strategy == "fsdp" or settings.tp > 1)
    mesh = None
    if n > 1:
        patience = datetime.timedelta(seconds=settings.timeout_seconds)
        meet("nccl" if here.type == "cuda" else "gloo", patience)
        if sharded:
            mesh = init_device_mesh(here.type, shape, mesh_dim_names=("replicate", "shard", "tp"))
            for group in mesh.get_all_groups():  # which would wait as long as PyTorch thinks right
                dist.distributed_c10d._set_pg_timeout(patience, group)
    return World(int(os.environ.get("RANK", 0)), n, here, dtype, shape, sharded, mesh)


def meet(backend: str, patience: datetime.timedelta) -> None:
    """Joins the process group, on a restart by torchrun too.

    torchrun 2.13 keeps one store through all its restarts, without a prefix, so that a restarted process may
    find the addresses that dead ones left there, and wait for them for ever. On one node the number of the
    restart is a prefix on which all agree. On several it is not: each node counts its own.
    """
    store, rank, n = next(dist.rendezvous("env://", timeout=patience))
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared and os.environ.get("LOCAL_WORLD_SIZE") == str(n):
        store = dist.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    elif shared and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        raise ConfigError(
            "torchrun --max-restarts on several nodes needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its "
            "environment, on every node; without it restarted processes can wait for dead ones for ever"
        )
    dist.init_process_group(backend, store=store, rank=rank, world_size=n, timeout=patience)


def is_lost(error: RuntimeError) -> bool:
    """Whether this is how the collectives tell that another process is gone or hangs."""
    signs = ("gloo", "nccl", "connection closed", "timed out", "connection reset")
    return isinstance(error, dist.DistError) or any(sign in str(error).lower() for sign in signs)


# ---- tensor parallel --------------------------------------------------------------------------------------


def split_matrices(model: nn.Module, mesh: DeviceMesh) -> None:
    """Tensor parallel (Shoeybi et al. 2019), sequence parallel (Korthikanti et al. 2022): PyTorch's styles.

    Between blocks each process has its own T / tp tokens of every row: embedding, norms, the residual
    stream and the loss are computed for those alone. Attention and feed-forward gather all tokens, work
    with H / tp heads and F / tp hidden values, and their sums are scattered back over tokens. Embedding
    and head are whole on each.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    mine = functools.partial(torch.chunk, chunks=mesh.size(), dim=-1)

    def own_tokens(module, arguments, mesh):  # (..., T) -> (..., T / tp)
        tokens = arguments[0]
        part = mine(tokens)[mesh.get_local_rank()].contiguous()
        return (DTensor.from_local(part, mesh, [Shard(tokens.ndim - 1)]), *arguments[1:])

    def local(module, out, mesh):
        return out.to_local()

    for name in ("embed_tokens", "embed_positions"):
        if getattr(model, name) is not None:
            distribute_module(getattr(model, name), mesh, input_fn=own_tokens, output_fn=local)
    tokens, everything = Shard(1), Replicate()
    gather = {"desired_input_layouts": (everything, None, None, None), "use_local_output": True}
    plan = {
        "self_attn": PrepareModuleInput(input_layouts=(tokens, None, None, None), **gather),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(output_layouts=tokens),
        "mlp": PrepareModuleInput(
            input_layouts=tokens, desired_input_layouts=everything, use_local_output=True
        ),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=tokens),
    }
    norms = ("input_layernorm", "post_attention_layernorm", "post_feedforward_layernorm")
    plan |= {name: SequenceParallel(use_local_output=True) for name in norms}
    for block in model.layers:
        here = {name: style for name, style in plan.items() if has_parameters(block, name)}
        parallelize_module(block, mesh, here)
    if has_parameters(model, "norm"):
        parallelize_module(model, mesh, {"norm": SequenceParallel(use_local_output=True)})
    if model.lm_head is not None:
        distribute_module(model.lm_head, mesh)

    def own_loss(module, arguments):
        h, head, targets = arguments  # h is this process's tokens already
        if is_sharded(head):
            head = head.to_local(grad_placements=[Partial()])  # each one's gradient is of its own tokens
        return h, head, mine(targets)[mesh.get_local_rank()]

    model.loss.register_forward_pre_hook(own_loss)


def has_parameters(module: nn.Module, name: str) -> bool:
    """Whether there is something to split: not where a model has no such part, or a norm without a weight."""
    for part in name.split("."):
        module = getattr(module, part)
        if module is None:
            return False
    return any(True for _ in module.parameters())


# ---- whole tensors ----------------------------------------------------------------------------------------


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor. Importing those takes more than a second, so only who uses them does."""
    return hasattr(tensor, "placements")


@torch.no_grad()
def put(tensor: Tensor, whole: Tensor) -> None:
    """Copies a whole tensor, which every process has, into one of which each may hold only a part."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        whole = whole.to(tensor.device, tensor.dtype)
        whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(whole)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor. All processes call this together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor
