"""AdamW as Amber and OLMo set it up: which parameters decay, the learning rate of every step, the clip.

Pure functions of the config but for PyTorch's own optimizer; train.py calls them once a step.
"""

import math

import torch
from torch import Tensor, nn

from config import Optim


def learning_rate(step: int, n_steps: int, cfg: Optim) -> float:
    """The rate of the update that follows `step` finished ones, in a schedule of n_steps.

    Linear from warmup_start_fraction x lr at step 0 to lr at step warmup_steps, then cosine or linear down to
    final_lr_fraction x lr at step n_steps, when training ends: the last update is one step short of it. Amber
    starts from 0 (its first update changes nothing but the moments), OLMo-1 from a tenth of the peak.
    """
    if step < cfg.warmup_steps:
        start = cfg.warmup_start_fraction
        return cfg.lr * (start + (1 - start) * step / cfg.warmup_steps)
    progress = min(1.0, (step - cfg.warmup_steps) / max(1, n_steps - cfg.warmup_steps))
    left = 1 - progress if cfg.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.lr * (cfg.final_lr_fraction + (1 - cfg.final_lr_fraction) * left)


def parameter_groups(model: nn.Module, cfg: Optim) -> list[dict]:
    """Parameters with their weight decay.

    decay="all": every parameter, norms and embeddings included (Amber's released code has one group).
    decay="linear": only weights of linear layers (OLMo-1), so not a tied head: it is the embedding's matrix.
    """
    if cfg.decay == "all":
        return [{"params": list(model.parameters()), "weight_decay": cfg.weight_decay}]
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    decayed = [p for p in model.parameters() if id(p) in linear]
    kept = [p for p in model.parameters() if id(p) not in linear]
    groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(model: nn.Module, cfg: Optim) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) in PyTorch's fused form, one pass over memory a step."""
    return torch.optim.AdamW(
        parameter_groups(model, cfg), lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True
    )


def clip(model: nn.Module, limit: float) -> Tensor:
    """Scales all gradients so that their global L2 norm is at most `limit`; 0 leaves them as they are.

    Returns the norm before. One that is not finite scales nothing: the caller decides what to do about it.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if limit:
        # min(1, limit / norm), without looking at the norm on the host; NaN and inf are left as they are.
        scale = torch.where(norm.isfinite(), (limit / (norm + 1e-6)).clamp(max=1.0), 1.0)
        torch._foreach_mul_(gradients, scale)
    return norm
