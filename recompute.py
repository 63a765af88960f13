"""What a block keeps between forward and backward, and what backward computes again instead.

    block.forward = recomputed(block.forward, selective=True)

train.activation_checkpointing says which blocks (Chen et al. 2016). A block that is recomputed keeps only its
input, and backward begins with another forward: a third more FLOPs. Selective recompute (Korthikanti et al.
2023, section 5) also keeps the outputs of matmuls and attention, which take nearly all of the time; norms,
rotary positions, activations, products and sums are computed again.

A block that is compiled and not recomputed keeps 1.4 times as much as a selective one: also what matmuls
read, in the type of matmuls. memory.kept_by_layer counts the bytes of each.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import linear

ATTENTION = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
KEPT = ("mm", "addmm", "bmm", *(f"_scaled_dot_product_{kernel}" for kernel in ATTENTION))


def recomputed(forward: Callable, selective: bool) -> Callable:
    """A block's forward that keeps its input only, or also the outputs of KEPT and of flex attention.

    A selective one is compiled together with what it wraps, because the compiler has to see what to keep; the
    other wraps what is compiled.
    """
    if not selective:
        return functools.partial(checkpoint, forward, use_reentrant=False)
    # PyTorch 2.13 logs advice about in-place operations, of which a block has none.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    kept = [getattr(torch.ops.aten, name).default for name in KEPT] + [torch.ops.higher_order.flex_attention]
    if linear.AVAILABLE:
        kept.append(torch.ops.mkldnn._linear_pointwise.default)
    contexts = functools.partial(create_selective_checkpoint_contexts, kept)
    return functools.partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)
