"""The matmuls of linear layers: x W^T + b, and its gradients; on a CPU by oneDNN.

PyTorch gives the FP32 matmuls of an x86 CPU to Intel's MKL, which uses AVX-512 on Intel's own CPUs only.
oneDNN, the other library in PyTorch, uses what the CPU has. On an AMD EPYC (Zen 5) it multiplies 2.3 times as
fast as MKL, and 1.1 times as fast where it is held to AVX2 (ONEDNN_MAX_CPU_ISA=AVX2). This file can go when
PyTorch gives such matmuls to oneDNN itself.
"""

import platform

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sharding import is_sharded

AVAILABLE = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
LEAST_ROWS = 32  # below, MKL is as fast: oneDNN's start of a matmul takes about 10 microseconds


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), weight (N, K), bias (N) -> (..., N): F.linear, up to the order of additions."""
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    large = x.shape.numel() >= LEAST_ROWS * x.shape[-1]
    special = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling() or is_sharded(weight)
    if not AVAILABLE or not plain or not large or special:
        return F.linear(x, weight, bias)
    return OneDNN.apply(x, weight, bias) if torch.is_grad_enabled() else product(x, weight, bias)


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (..., K), b (N, K) -> (..., N), by the operator that torch.compile uses on a CPU."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


class OneDNN(torch.autograd.Function):
    """y = x W^T + b by oneDNN, and the gradients of its inputs."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y: Tensor):
        x, weight = ctx.saved_tensors
        rows, d_rows = x.flatten(0, -2), d_y.flatten(0, -2)  # (M, K), (M, N)
        d_x = product(d_y, weight.T) if ctx.needs_input_grad[0] else None
        d_weight = product(d_rows.T, rows.T) if ctx.needs_input_grad[1] else None
        d_bias = d_rows.sum(0) if ctx.needs_input_grad[2] else None
        return d_x, d_weight, d_bias
