"""AdamW as published runs set it up: which parameters decay, each one's learning rate at each step, the clip.

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


def parameter_groups(model: nn.Module, cfg: Optim, mup_scale: float = 1.0) -> list[dict]:
    """Parameters by their weight decay, and by `lr_scale`, what their learning rate is multiplied by.

    decay="all": every parameter, norms and embeddings included (Amber's released code has one group).
    decay="linear": only weights of linear layers (OLMo-1), so not a tied head: it is the embedding's matrix.
    decay="matrices": those and embeddings; no norm, no bias (Pythia, CrystalCoder).
    decay="not_embeddings": all but the embedding (OLMo 2).

    Under muP the matrices inside the layers learn at mup_scale = mup_base_width / d_model of the rate, and
    embeddings, norms, biases and the head at the whole of it (Yang et al. 2022, table 8; CrystalCoder's
    parameters). Decay is times a group's own rate, as everywhere here.
    """
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups = {}
    for name, p in model.named_parameters():
        decays = {
            "all": True,
            "linear": id(p) in linear,
            "matrices": p.ndim > 1,
            "not_embeddings": id(p) not in embeddings,
        }[cfg.decay]
        scale = mup_scale if name.startswith("layers.") and p.ndim > 1 else 1.0
        groups.setdefault((decays, scale), []).append(p)
    assert mup_scale == 1 or any(scale != 1 for _, scale in groups), "muP knows matrices by the name layers.*"
    return [
        {"params": parameters, "weight_decay": cfg.weight_decay * decays, "lr_scale": scale}
        for (decays, scale), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every group its share of the rate of this step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def adamw(model: nn.Module, cfg: Optim, mup_scale: float = 1.0) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) in PyTorch's fused form, one pass over memory a step."""
    groups = parameter_groups(model, cfg, mup_scale)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)


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
