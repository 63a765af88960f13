"""The loss over a large vocabulary, computed a slice of tokens at a time: logits are never in memory whole.

    loss = vocabulary_loss(h, head, targets)     # model.py calls it with the hidden states of its last layer

Targets equal to IGNORE are masked: no loss, no gradient. Padding and prompts of fine-tuning are masked so.

Shapes: N tokens, D d_model, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

IGNORE = -100  # a target with this value is not predicted (PyTorch's own convention)

# Maximum size of the FP32 logits held at one time: 32 MiB on a CPU, about its cache. On a GPU every slice
# reads and writes the whole gradient of the head once, so slices should be few: 512 MiB.
LOGITS_BYTES = 2**25
LOGITS_BYTES_CUDA = 2**29


class Loss(nn.Module):
    """`vocabulary_loss` as a module, so that parallel.py can say which process has which tokens."""

    def __init__(self):
        super().__init__()
        self.z_loss = 0.0  # training sets it from optim.z_loss

    def forward(self, h: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        """h (B, T, D), head (V, D), targets (B, T) -> the sum of the targets' losses, a scalar."""
        return vocabulary_loss(h.flatten(0, 1), head, targets.flatten(), self.z_loss)


def vocabulary_loss(h: Tensor, head: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
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
    # Autocast does not reach into an autograd.Function, so its cast is made here.
    if torch.is_autocast_enabled(h.device.type):
        dtype = torch.get_autocast_dtype(h.device.type)
        h, head = h.to(dtype), head.to(dtype)
    return VocabularyLoss.apply(h, head, targets, z_loss)


class VocabularyLoss(torch.autograd.Function):
    """The loss of a slice of tokens at a time, with the gradients computed while the slice's logits exist.

    For a token with logits z: loss = logsumexp(z) - z_target, and d loss / d z = softmax(z) - onehot(target).
    The gradient needs only z. So forward turns each slice of logits into its gradient in place, multiplies
    that into d h and d head, and reuses the memory. Whole logits of 3,072 tokens x 50,257 entries would be
    618 MB, and their gradient as much again. The three matmuls are those of the loss without slices; backward
    only scales the result of forward.
    """

    @staticmethod
    def forward(ctx, h: Tensor, head: Tensor, targets: Tensor, z_loss: float) -> Tensor:
        # Memory for the results, and for the logits of one slice.
        with_gradient = any(ctx.needs_input_grad)
        logits_bytes = LOGITS_BYTES_CUDA if h.device.type == "cuda" else LOGITS_BYTES
        rows = max(1, logits_bytes // (4 * head.shape[0]))  # tokens of a slice
        total = torch.zeros((), device=h.device, dtype=torch.float32)
        d_h = torch.empty_like(h) if with_gradient else None
        d_head = torch.zeros_like(head, dtype=torch.float32) if with_gradient else None
        room = torch.empty(min(rows, len(h)), head.shape[0], device=h.device, dtype=h.dtype)

        for start in range(0, len(h), rows):
            # The loss. The largest logit is subtracted first, so that exp cannot overflow.
            x, target = h[start : start + rows], targets[start : start + rows, None]  # (n, D), (n, 1)
            keep = target != IGNORE
            target = target.masked_fill(~keep, 0)  # a valid index for gather and scatter
            z = torch.mm(x, head.T, out=room[: len(x)]).float()  # (n, V) logits
            peak = z.amax(1, keepdim=True)
            chosen = z.gather(1, target) - peak
            z.sub_(peak).exp_()  # from here on z holds exp(logit - peak)
            partition = z.sum(1, keepdim=True)
            log = partition.log()
            total += ((log - chosen) * keep).sum()

            # The gradient of the logits, softmax - onehot, replaces them; a masked target's is zero.
            if with_gradient:
                # d/dz of z_loss x log^2 is 2 z_loss log x softmax, where log is the whole denominator's.
                factor = keep * (1 + 2 * z_loss * (log + peak)) if z_loss else keep
                z.mul_(factor / partition)
                z.scatter_add_(1, target, -keep.float())  # now z is the gradient
                gradient = z.to(h.dtype)
                torch.mm(gradient, head, out=d_h[start : start + rows])
                if head.dtype == torch.float32:
                    d_head.addmm_(gradient.T, x)
                else:
                    d_head += gradient.T @ x  # BF16 matmul, FP32 sum over slices

        if with_gradient:
            ctx.save_for_backward(d_h, d_head)
            ctx.head_dtype = head.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor):
        d_h, d_head = ctx.saved_tensors
        return d_h * scale.to(d_h.dtype), (d_head * scale).to(ctx.head_dtype), None, None
