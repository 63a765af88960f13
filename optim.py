"""How a gradient becomes an update: schedules, parameter groups, AdamW or Muon, clipping, as published.

    lr = learning_rate(step, n_steps, cfg)
    update(model, optimizers, lr, grad_norm(model).item(), clip_limit(step, cfg))    # once each step

Schedules and groups are pure functions; `update` changes gradients and weights in place. No function here
knows how many processes there are: each process may hold a shard of every gradient.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from config import Optim, choose, unknown
from muon import Muon

# ---- schedules --------------------------------------------------------------------------------------------


def learning_rate(at: int, length: int, cfg: Optim) -> float:
    """The learning rate of the update after the first `at` of a schedule's `length`.

    Both count steps; or tokens, where cfg.schedule_tokens is set (steps.schedule_position). The learning rate
    rises linearly from warmup_start_fraction x lr at 0 to lr at the end of warm-up; from then on SCHEDULES
    says what it is. Amber starts from 0 (its first update changes only the moments), OLMo-1 from a tenth.
    """
    schedule = choose("optim.schedule", cfg.schedule, SCHEDULES)
    if at < cfg.warmup:
        start = cfg.warmup_start_fraction
        return cfg.lr * (start + (1 - start) * at / cfg.warmup)
    return cfg.lr * schedule(at, length, cfg)


def cosine(at: int, length: int, cfg: Optim) -> float:
    left = 0.5 * (1 + math.cos(math.pi * progress(at, cfg.warmup, length)))
    return cfg.final_lr_fraction + (1 - cfg.final_lr_fraction) * left


def linear(at: int, length: int, cfg: Optim) -> float:
    return cfg.final_lr_fraction + (1 - cfg.final_lr_fraction) * (1 - progress(at, cfg.warmup, length))


def constant(at: int, length: int, cfg: Optim) -> float:
    """The peak until the last decay_fraction of the schedule, then linear (Hu et al. 2024)."""
    begin = max(cfg.warmup, length - round(cfg.decay_fraction * length))
    return cfg.final_lr_fraction + (1 - cfg.final_lr_fraction) * (1 - progress(at, begin, length))


def progress(at: int, begin: int, length: int) -> float:
    """How much of a decay from `begin` to `length` is done: 0 to 1. At `length` it is complete, and the last
    update is one step short of it. A decay that never begins stays at 0, also beyond `length`.
    """
    return min(1.0, max(0, at - begin) / (length - begin)) if begin < length else 0.0


# The learning rate after warm-up, as a fraction of the peak. A new schedule is a function, a row here, and a
# choice of Optim.schedule; what it needs of other settings is checked in consistency.py.
SCHEDULES = {"cosine": cosine, "linear": linear, "constant": constant}


def annealed_lr(begin_lr: float, done: int, cfg: Optim) -> float:
    """The learning rate `done` steps after a run left its schedule at begin_lr; 0 after cfg.anneal_steps."""
    return begin_lr * max(0.0, 1 - done / cfg.anneal_steps)


def clip_limit(step: int, cfg: Optim) -> float:
    """The limit of the gradient norm, looser in the first steps if asked (OLMo-7B: 10 x for 1,000 steps)."""
    return cfg.grad_clip * (cfg.grad_clip_start_factor if step < cfg.grad_clip_start_steps else 1.0)


# ---- optimizers -------------------------------------------------------------------------------------------


def parameter_groups(model: nn.Module, cfg: Optim, mup_scale: float = 1.0) -> list[dict]:
    """Parameters by weight decay and by `lr_scale`, the factor of their learning rate.

    decay="all": every parameter, norms and embeddings included (Amber's released code has one group).
    decay="linear": only weights of linear layers (OLMo-1); a tied head is the embedding, so it does not.
    decay="matrices": those and embeddings; no norm, no bias (Pythia, CrystalCoder).
    decay="not_embeddings": all but the embedding (OLMo 2).

    Under muP the matrices inside the layers learn at mup_scale = mup_base_width / d_model of the learning
    rate; embeddings, norms, biases and the head at all of it (Yang et al. 2022, table 8; CrystalCoder's
    parameters). Decay is multiplied by a group's own learning rate. `for_muon`: matrices that Muon moves.
    """
    linear_weights = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}

    # Parameters with the same weight decay and learning rate, and for the same optimizer, are one group.
    groups = {}
    for name, p in model.named_parameters():
        table = {
            "all": True,
            "linear": id(p) in linear_weights,
            "matrices": p.ndim > 1,
            "not_embeddings": id(p) not in embeddings,
        }
        decays = choose("optim.decay", cfg.decay, table)
        inner = name.startswith("layers.") and p.ndim > 1
        for_muon = inner and cfg.optimizer == "muon"
        groups.setdefault((decays, mup_scale if inner else 1.0, for_muon), []).append(p)
    # A model whose layers have another name would silently get no muP and no Muon.
    if mup_scale != 1 or cfg.optimizer == "muon":
        assert any(scale != 1 or for_muon for _, scale, for_muon in groups), "no matrix is named layers.*"

    return [
        {"params": p, "weight_decay": cfg.weight_decay * decays, "lr_scale": scale, "for_muon": for_muon}
        for (decays, scale, for_muon), p in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]


def adamw(model: nn.Module, cfg: Optim, mup_scale: float = 1.0) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) in PyTorch's fused form: one pass over memory each step."""
    groups = parameter_groups(model, cfg, mup_scale)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)


def optimizers(model: nn.Module, cfg: Optim, mup_scale: float = 1.0) -> list[torch.optim.Optimizer]:
    """The optimizers of a config: AdamW; or Muon for the matrices inside the layers and AdamW for the rest.

    Muon makes each update of a matrix orthogonal. Its updates are scaled to AdamW's usual size, so that
    AdamW's learning rate and decay fit.
    """
    if cfg.optimizer == "adamw":
        return [adamw(model, cfg, mup_scale)]
    if cfg.optimizer != "muon":
        raise unknown("optim.optimizer", cfg.optimizer)
    groups = parameter_groups(model, cfg, mup_scale)
    inner = [group for group in groups if group["for_muon"]]
    rest = [group for group in groups if not group["for_muon"]]
    return [
        Muon(inner, cfg.lr, cfg.muon_momentum),
        torch.optim.AdamW(rest, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True),
    ]


# ---- from the gradient to the update ----------------------------------------------------------------------


def l2_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The L2 norm of all tensors as one vector; of the whole tensors, where each process holds a shard."""
    total = torch.nn.utils.get_total_norm(tensors)
    return total.full_tensor() if hasattr(total, "full_tensor") else total  # a DTensor, where sharded


def grad_norm(model: nn.Module) -> Tensor:
    """The global L2 norm of the gradient, a scalar that is still on the device."""
    return l2_norm([p.grad for p in model.parameters() if p.grad is not None])


def clip_gradients(model: nn.Module, grad_norm: float, limit: float) -> None:
    """Scales all gradients so that their norm, which is `grad_norm` now, is at most `limit`; 0: no limit.

    A norm that is not finite scales nothing: train.py does not update then (incidents.judge).
    """
    if limit and math.isfinite(grad_norm) and grad_norm + 1e-6 > limit:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        local = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
        torch._foreach_mul_(local, limit / (grad_norm + 1e-6))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Gives every parameter group its share of this step's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def update(model: nn.Module, optimizers: list, lr: float, grad_norm: float, limit: float) -> None:
    """Updates the weights by the gradient, clipped to `limit`, and drops the gradient."""
    clip_gradients(model, grad_norm, limit)
    for optimizer in optimizers:
        set_lr(optimizer, lr)
        optimizer.step()
        optimizer.zero_grad()
