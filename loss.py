"""The loss over a large vocabulary, a slice of tokens at a time: logits never stand in memory whole.

    loss = vocabulary_loss(h, head, targets)     # what model.py calls with what its last layer says

Shapes: N tokens, D d_model, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

IGNORE = -100  # a target with this value is not predicted: no loss, no gradient (PyTorch's own convention)

# Of FP32 logits that stand in memory at once: 32 MiB on a processor, about what stays in its cache. On a GPU
# every slice reads and writes the whole gradient of the head once, so that slices should be few: 512 MiB.
LOGITS_BYTES = 2**25
LOGITS_BYTES_CUDA = 2**29


def slice_bytes(cuda: bool) -> int:
    return LOGITS_BYTES_CUDA if cuda else LOGITS_BYTES


class Loss(nn.Module):
    """`vocabulary_loss` as a place in the model where parallel.py can say which tokens are whose."""

    def __init__(self):
        super().__init__()
        self.z_loss = 0.0  # learner.py sets it from optim.z_loss

    def forward(self, h: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        """h (B, T, D), head (V, D), targets (B, T) -> the sum of their losses."""
        return vocabulary_loss(h.flatten(0, 1), head, targets.flatten(), self.z_loss)


def vocabulary_loss(h: Tensor, head: Tensor, targets: Tensor, z_loss: float = 0.0) -> Tensor:
    """Sum of -log softmax(h @ head.T)[target] over all tokens: h (N, D), head (V, D), targets (N) -> FP32.

    Equals F.cross_entropy(..., reduction="sum") on whole logits, in a fraction of the memory.

    z_loss: gradients are also those of z_loss x (log of the softmax's denominator)^2, which keeps logits from
    drifting off (PaLM, section 5). What is returned stays the cross-entropy, so that runs with and without
    compare.
    """
    if not torch.is_grad_enabled():  # which a Function does not ask about: it would take gradients for nobody
        h, head = h.detach(), head.detach()
    if torch.is_autocast_enabled(h.device.type):  # a Function is opaque to autocast, so its cast is made here
        dtype = torch.get_autocast_dtype(h.device.type)
        h, head = h.to(dtype), head.to(dtype)
    return VocabularyLoss.apply(h, head, targets, z_loss)


class VocabularyLoss(torch.autograd.Function):
    """The loss a slice of tokens at a time, with the gradients taken while the slice's logits are at hand.

    For a token with logits z: loss = logsumexp(z) - z_target, and d loss / d z = softmax(z) - onehot(target).
    The second needs nothing but z, so forward turns each slice of logits into its gradient in place,
    multiplies it into d h and d head, and forgets it. Logits of 3,072 tokens x 50,257 entries would be 618
    MB, and as much for the gradient. The same three matrix products are made as without slices; backward only
    scales what forward left.
    """

    @staticmethod
    def forward(ctx, h: Tensor, head: Tensor, targets: Tensor, z_loss: float) -> Tensor:
        with_gradient = any(ctx.needs_input_grad)
        rows = max(1, slice_bytes(h.device.type == "cuda") // (4 * head.shape[0]))
        total = torch.zeros((), device=h.device, dtype=torch.float32)
        d_h = torch.empty_like(h) if with_gradient else None
        d_head = torch.zeros_like(head, dtype=torch.float32) if with_gradient else None
        room = torch.empty(min(rows, len(h)), head.shape[0], device=h.device, dtype=h.dtype)
        for start in range(0, len(h), rows):
            x, target = h[start : start + rows], targets[start : start + rows, None]  # (n, D), (n, 1)
            keep = target != IGNORE
            target = target.masked_fill(~keep, 0)  # a number that gather can read
            z = torch.mm(x, head.T, out=room[: len(x)]).float()  # (n, V)
            peak = z.amax(1, keepdim=True)  # so that exp cannot overflow
            chosen = z.gather(1, target) - peak
            z.sub_(peak).exp_()
            partition = z.sum(1, keepdim=True)
            log = partition.log()
            total += ((log - chosen) * keep).sum()
            if with_gradient:
                share = keep * (1 + 2 * z_loss * (log + peak)) if z_loss else keep
                z.mul_(share / partition)  # softmax; zero where the target is ignored
                z.scatter_add_(1, target, -keep.float())
                gradient = z.to(h.dtype)
                torch.mm(gradient, head, out=d_h[start : start + rows])
                if head.dtype == torch.float32:
                    d_head.addmm_(gradient.T, x)
                else:
                    d_head += gradient.T @ x  # BF16 product, FP32 sum over slices
        if with_gradient:
            ctx.save_for_backward(d_h, d_head)
            ctx.head_dtype = head.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor):
        d_h, d_head = ctx.saved_tensors
        return d_h * scale.to(d_h.dtype), (d_head * scale).to(ctx.head_dtype), None, None
