"""How a gradient becomes an update: schedules, parameter groups, AdamW or Muon, clipping, as published.

Pure functions of the config but for PyTorch's own optimizers; learner.py calls them once a step.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from config import ConfigError, Optim, choose, unknown

# ---- schedules --------------------------------------------------------------------------------------------


def learning_rate(at: int, length: int, cfg: Optim) -> float:
    """The rate of the update after the first `at` of a schedule's `length`.

    Both are counted in steps; or, where cfg.schedule_tokens is set, in tokens (steps.schedule_position).

    Linear from warmup_start_fraction x lr at 0 to lr at the end of warm-up, then cosine or linear down to
    final_lr_fraction x lr at `length`, where it stays: the last update is one step short of it. Amber starts
    from 0 (its first update changes nothing but the moments), OLMo-1 from a tenth of the peak. A constant
    rate stays at the peak and falls linearly in the last decay_fraction of the schedule (Hu et al. 2024).
    """
    begin = cfg.warmup
    if cfg.schedule == "constant":
        begin = max(begin, length - round(cfg.decay_fraction * length))
    # A constant schedule without decay has no end to come to: it stays at the peak beyond `length` too.
    progress = min(1.0, max(0, at - begin) / (length - begin)) if begin < length else 0.0
    if cfg.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * progress))
    elif cfg.schedule in ("linear", "constant"):
        left = 1 - progress
    else:
        raise unknown("optim.schedule", cfg.schedule)
    if at < cfg.warmup:
        start = cfg.warmup_start_fraction
        return cfg.lr * (start + (1 - start) * at / cfg.warmup)
    return cfg.lr * (cfg.final_lr_fraction + (1 - cfg.final_lr_fraction) * left)


def annealed_rate(begin_rate: float, done: int, cfg: Optim) -> float:
    """The rate after `done` steps of a run that left a schedule at begin_rate; 0 after cfg.anneal_steps."""
    return begin_rate * max(0.0, 1 - done / cfg.anneal_steps)


def clip_limit(step: int, cfg: Optim) -> float:
    """The limit of the gradient's norm, looser in the first steps where asked (OLMo-7B: 10 x for 1,000)."""
    return cfg.grad_clip * (cfg.grad_clip_start_factor if step < cfg.grad_clip_start_steps else 1.0)


# ---- optimizers -------------------------------------------------------------------------------------------


def parameter_groups(model: nn.Module, cfg: Optim, mup_scale: float = 1.0) -> list[dict]:
    """Parameters by their weight decay, and by `lr_scale`, what their learning rate is multiplied by.

    decay="all": every parameter, norms and embeddings included (Amber's released code has one group).
    decay="linear": only weights of linear layers (OLMo-1), so not a tied head: it is the embedding's matrix.
    decay="matrices": those and embeddings; no norm, no bias (Pythia, CrystalCoder).
    decay="not_embeddings": all but the embedding (OLMo 2).

    Under muP the matrices inside the layers learn at mup_scale = mup_base_width / d_model of the rate, and
    embeddings, norms, biases and the head at the whole of it (Yang et al. 2022, table 8; CrystalCoder's
    parameters). Decay is times a group's own rate, as everywhere here. `inner`: matrices inside the layers.
    """
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups = {}
    for name, p in model.named_parameters():
        table = {
            "all": True,
            "linear": id(p) in linear,
            "matrices": p.ndim > 1,
            "not_embeddings": id(p) not in embeddings,
        }
        decays = choose("optim.decay", cfg.decay, table)
        inner = name.startswith("layers.") and p.ndim > 1
        groups.setdefault((decays, mup_scale if inner else 1.0, inner), []).append(p)
    special = mup_scale != 1 or cfg.optimizer == "muon"
    assert not special or any(inner for *_, inner in groups), (
        "muP and Muon know matrices by the name layers.*"
    )
    if cfg.optimizer == "adamw":  # to which they differ only in their rate
        merged = {}
        for (decays, scale, _), parameters in groups.items():
            merged.setdefault((decays, scale, False), []).extend(parameters)
        groups = merged
    return [
        {"params": p, "weight_decay": cfg.weight_decay * decays, "lr_scale": scale, "inner": inner}
        for (decays, scale, inner), p in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def adamw(model: nn.Module, cfg: Optim, mup_scale: float = 1.0) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) in PyTorch's fused form, one pass over memory a step."""
    groups = parameter_groups(model, cfg, mup_scale)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)


def optimizers(model: nn.Module, cfg: Optim, mup_scale: float = 1.0) -> list[torch.optim.Optimizer]:
    """What a config asks for: AdamW; or Muon for the matrices inside the layers and AdamW for all else.

    Muon (Jordan 2024) makes each update of a matrix orthogonal. Scaled to AdamW's usual size (Liu et al.
    2025, section 2.2: 0.2 sqrt(max(rows, columns))) it has use for AdamW's rate and decay.
    """
    if cfg.optimizer == "adamw":
        return [adamw(model, cfg, mup_scale)]
    if cfg.optimizer != "muon":
        raise unknown("optim.optimizer", cfg.optimizer)
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(f"optim.optimizer='muon' needs torch 2.9 or newer; this is {torch.__version__}")
    groups = parameter_groups(model, cfg, mup_scale)
    inner, rest = ([g for g in groups if g["inner"] == wanted] for wanted in (True, False))
    muon = torch.optim.Muon(inner, lr=cfg.lr, momentum=cfg.muon_momentum, adjust_lr_fn="match_rms_adamw")
    return [
        muon,
        torch.optim.AdamW(rest, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True),
    ]


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every group its share of the rate of this step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def shrink_embedding_gradient(model: nn.Module, share: float) -> None:
    """From now on the embedding's gradient is `share` of itself (GLM-130B, section 2.2: 0.1 against spikes).

    Of the embedding's own: a head that is tied to it gives its part whole.
    """

    def shrink(module, arguments, out):
        if out.requires_grad:
            out.register_hook(lambda gradient: gradient * share)

    if share != 1:
        model.embed_tokens.register_forward_hook(shrink)


# ---- gradients --------------------------------------------------------------------------------------------


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """The L2 norm of all of them as one vector: of the whole, where each process holds a part."""
    total = torch.nn.utils.get_total_norm(tensors)
    return total.full_tensor() if hasattr(total, "full_tensor") else total  # a DTensor, where sharded


def norms_by_layer(model: nn.Module) -> dict[str, float]:
    """The gradient's norm in each layer, and outside them: {"embed_tokens": 0.3, "layers.0": 0.1, ...}."""
    groups = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            parts = name.split(".")
            groups.setdefault(".".join(parts[: 2 if parts[0] == "layers" else 1]), []).append(p.grad)
    return {name: norm(tensors).item() for name, tensors in groups.items()}


def scale_gradients(model: nn.Module, total: float, limit: float) -> None:
    """Scales all gradients, whose norm is `total`, so that it is at most `limit`; 0: no limit."""
    if limit and math.isfinite(total) and total + 1e-6 > limit:
        local = [g.to_local() if hasattr(g, "to_local") else g for g in gradients(model)]
        torch._foreach_mul_(local, limit / (total + 1e-6))


def clip(model: nn.Module, limit: float) -> Tensor:
    """Both: returns the norm, and scales to at most `limit`. A norm that is not finite scales nothing."""
    total = norm(gradients(model))
    scale_gradients(model, total.item(), limit)
    return total
