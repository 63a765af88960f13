"""The loss over a large vocabulary, a slice of tokens at a time: at most LOGITS_BYTES of logits in memory.

    loss = vocabulary_loss(h, head, targets)     # model.py calls it with the hidden states of its last layer

Targets equal to IGNORE are masked: no loss, no gradient. Padding and prompts of fine-tuning are masked so.

Shapes: N tokens, D d_model, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from linear import linear

IGNORE = -100  # a target with this value is not predicted (PyTorch's own convention)

# Maximum size of the logits held at one time, counted in FP32: 32 MiB on a CPU, about its cache. On a GPU
# every slice reads and writes the gradient of the whole head, so slices should be few: 2 GiB, 1 in BF16.
LOGITS_BYTES = 2**25
LOGITS_BYTES_CUDA = 2**31


class Loss(nn.Module):
    """`vocabulary_loss` as a module, so that sharding.py can say which process has which tokens."""

    def __init__(self):
        super().__init__()
        self.z_loss = 0.0  # training sets it from optim.z_loss
        self.differentiate = differentiate  # parallel.py compiles it

    def forward(self, h: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        """h (B, T, D), head (V, D), targets (B, T) -> the sum of the targets' losses, a scalar."""
        h, targets = h.flatten(0, 1), targets.flatten()
        return vocabulary_loss(h, head, targets, self.z_loss, self.differentiate)


def differentiate(z: Tensor, z_target: Tensor, keep: Tensor, z_loss: float, with_gradient: bool):
    """-> the sum of the losses, and the gradient at the targets (n, 1), which the caller writes into z.

    z (n, V): logits. z_target (n, 1): those of the targets. keep (n, 1): False where a target is masked. With
    gradient, z becomes its own gradient in place, but for the targets' entries: indexing would split what is
    one kernel when compiled for a GPU. As it stands, every operation is a kernel. FP32 inside.
    """
    # The loss. The largest logit is subtracted first, so that exp cannot overflow.
    x = z.float()  # z itself, if it is FP32
    largest = x.amax(1, keepdim=True)
    z_target = z_target.float() - largest
    x.sub_(largest).exp_()  # from here on x holds exp(logit - largest)
    partition = x.sum(1, keepdim=True)
    log_sum = partition.log()
    total = ((log_sum - z_target) * keep).sum()
    if not with_gradient:
        return total, None

    # The gradient of the logits, softmax - onehot, replaces them; a masked target's is zero. d/dz of
    # z_loss x log^2 is 2 z_loss log x softmax, where log is the whole logarithm, log_sum + largest.
    factor = keep * (1 + 2 * z_loss * (log_sum + largest)) if z_loss else keep
    factor = factor / partition
    x.mul_(factor)
    if x is not z:
        z.copy_(x)
    return total, z_target.exp() * factor - keep.float()


def vocabulary_loss(
    h: Tensor, head: Tensor, targets: Tensor, z_loss: float = 0.0, differentiate: Callable = differentiate
) -> Tensor:
    """Sum of -log softmax(h @ head.T)[target] over all tokens: h (N, D), head (V, D), targets (N) -> FP32.

    Equals F.cross_entropy(..., reduction="sum", ignore_index=IGNORE) on whole logits, in a fraction of the
    memory.

    z_loss: adds the gradient of z_loss x (log of the softmax's denominator)^2, which keeps logits from
    drifting (PaLM, section 5). The returned value is the cross-entropy alone, so that runs with and without
    z-loss can be compared.
    """
    # An autograd.Function ignores no_grad: without this it would compute gradients that nobody uses.
    if not torch.is_grad_enabled():
        h, head = h.detach(), head.detach()
    # Autocast does not reach into an autograd.Function, so it is told what to cast to.
    kind = h.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else h.dtype
    return VocabularyLoss.apply(h, head, targets, z_loss, dtype, differentiate)


class VocabularyLoss(torch.autograd.Function):
    """The loss of a slice of tokens at a time, with the gradients computed while the slice's logits exist.

    For a token with logits z: loss = logsumexp(z) - z_target, and d loss / d z = softmax(z) - onehot(target).
    The gradient needs only z. So forward turns each slice of logits into its gradient in place, multiplies
    that into d h and d head, and reuses the memory. Whole logits of 3,072 tokens x 50,257 entries would be
    618 MB, and their gradient as much again. Backward only scales the result of forward.
    """

    @staticmethod
    def forward(ctx, h, head, targets, z_loss: float, dtype: torch.dtype, differentiate: Callable) -> Tensor:
        # Slices of equal size, but for the last; and memory for the results.
        with_gradient, (N, V) = any(ctx.needs_input_grad), (len(h), len(head))
        ctx.dtypes = h.dtype, head.dtype
        h, head = h.to(dtype), head.to(dtype)
        limit = LOGITS_BYTES_CUDA if h.device.type == "cuda" else LOGITS_BYTES
        rows = max(1, limit // (4 * V))
        rows = -(-N // -(-N // rows)) if N else 1
        total = torch.zeros((), device=h.device, dtype=torch.float32)
        d_h = torch.empty_like(h) if with_gradient else None
        d_head = torch.zeros_like(head, dtype=torch.float32) if with_gradient else None

        for start in range(0, N, rows):
            x, target = h[start : start + rows], targets[start : start + rows, None]  # (n, D), (n, 1)
            z = linear(x, head)  # (n, V) logits
            keep = target != IGNORE
            target = target.masked_fill(~keep, 0)  # a valid index for gather and scatter
            loss, at_target = differentiate(z, z.gather(1, target), keep, z_loss, with_gradient)
            total += loss
            if with_gradient:
                z.scatter_(1, target, at_target.to(dtype))  # now z is the whole gradient
                d_h[start : start + rows] = linear(z, head.T)
                if (
                    h.device.type == "cuda"
                ):  # sums in FP32 in the matmul; a CPU rounds each slice's part first
                    torch.addmm(d_head, z.T, x, out_dtype=torch.float32, out=d_head)
                else:
                    d_head += linear(z.T, x.T)
            del z  # before the next one is made

        if with_gradient:
            ctx.save_for_backward(d_h, d_head)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor):
        (d_h, d_head), (h_dtype, head_dtype) = ctx.saved_tensors, ctx.dtypes
        # h is FP32. In BF16 the factor itself would be rounded, for all tokens alike.
        d_h, d_head = d_h.to(h_dtype, copy=True).mul_(scale), (d_head * scale).to(head_dtype)
        return d_h, d_head, None, None, None, None
