"""Splits weights over GPUs: FSDP2, and tensor and sequence parallel, with PyTorch's own engines.

parallel.py applies these to an unmodified model.

FSDP2 (parallel.strategy=fsdp): each GPU stores 1 / shard of every parameter. A block's weights are gathered
(all-gather) before the block runs and freed after it. Its gradients are summed and scattered
(reduce-scatter).

Tensor parallel (parallel.tp above 1; Shoeybi et al. 2019 for the matrices, Korthikanti et al. 2022 for the
tokens). Each of tp processes has

    between blocks    T / tp of the tokens of every row: embedding, norms, residual stream, loss
    inside a block    all tokens (an all-gather), H / tp heads, F / tp hidden values of the feed-forward

and a block's output is summed and scattered back over tokens (a reduce-scatter). Embedding and head are whole
on each process, so tied embeddings need nothing special.
"""

import functools
import logging

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from config import ConfigError


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor. Importing that class takes a second, so only those who use it import it."""
    return hasattr(tensor, "placements")


def shard_weights(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype, reshard: bool) -> None:
    """FSDP2 over a mesh (replicate, shard, tp). Weights are gathered in `dtype`, that of matmuls.

    The stored weights, which the optimizer updates, are FP32. Gradients are reduced in FP32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    replicate, shard, tp = mesh.shape
    # Inputs keep their type: the residual stream is FP32, and autocast casts what matmuls read.
    gathered = None if dtype == torch.float32 else dtype
    policy = MixedPrecisionPolicy(gathered, torch.float32, cast_forward_inputs=False)

    # A matrix is sharded along the dimension that tensor parallel has not split.
    def along(parameter):
        split = is_sharded(parameter) and parameter.placements == (Shard(0),) and parameter.ndim > 1
        return Shard(1) if split else Shard(0)

    for name, parameter in model.named_parameters():
        if along(parameter) == Shard(1) and parameter.shape[1] % shard:
            raise ConfigError(f"{name} is {parameter.shape[1]} wide, which does not divide by {shard} shards")

    # Shard one block at a time. Embedding and head are in use from end to end, so they stay gathered.
    over = mesh["replicate", "shard"] if replicate > 1 else mesh["shard"]
    how = {"mesh": over, "mp_policy": policy, "shard_placement_fn": along if tp > 1 else None}
    for block in model.layers:
        fully_shard(block, reshard_after_forward=reshard, **how)
    fully_shard(model, reshard_after_forward=False, **how)


def split_matrices(model: nn.Module, mesh: DeviceMesh) -> None:
    """Splits a model over a mesh of one dimension, in place; the model runs as before."""
    # PyTorch 2.13 logs a warning: norms over two mesh dimensions may differ in the last bit. The mean that
    # train.py takes is the same everywhere. This can go with the warning.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)

    # Imported here because it takes more than a second, and only tensor parallel needs it.
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    my_part = functools.partial(torch.chunk, chunks=mesh.size(), dim=-1)

    # The embedding: every process looks up its own tokens only.
    def own_tokens(module, arguments, mesh):  # (..., T) -> (..., T / tp)
        tokens = arguments[0]
        part = my_part(tokens)[mesh.get_local_rank()].contiguous()
        return (DTensor.from_local(part, mesh, [Shard(tokens.ndim - 1)]), *arguments[1:])

    def local(module, out, mesh):
        return out.to_local()

    for name in ("embed_tokens", "embed_positions"):
        if getattr(model, name) is not None:
            distribute_module(getattr(model, name), mesh, input_fn=own_tokens, output_fn=local)

    # The blocks: tokens are gathered before the matrices and scattered after them.
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

    # The head and the loss: every process predicts its own tokens, so its gradient of the head is a part.
    if model.lm_head is not None:
        distribute_module(model.lm_head, mesh)

    def own_loss(module, arguments):
        h, head, targets = arguments  # h holds this process's tokens already
        if is_sharded(head):
            head = head.to_local(grad_placements=[Partial()])
        return h, head, my_part(targets)[mesh.get_local_rank()]

    model.loss.register_forward_pre_hook(own_loss)


def has_parameters(module: nn.Module, name: str) -> bool:
    """False where a model lacks the part, or it has nothing to split (a norm without a weight)."""
    for part in name.split("."):
        module = getattr(module, part)
        if module is None:
            return False
    return any(True for _ in module.parameters())


# ---- whole tensors ----------------------------------------------------------------------------------------


@torch.no_grad()
def put(tensor: Tensor, whole: Tensor) -> None:
    """Copies a whole tensor, which every process has, into one of which each may hold only a part."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        whole = whole.to(tensor.device, tensor.dtype)
        whole = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(whole)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on every process. All processes call this together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def bare(model: nn.Module) -> nn.Module:
    """The model itself, out of DDP's wrapper."""
    return getattr(model, "module", model)
