"""optim.py: schedules at their endpoints, groups as published, the clip by hand."""

import math

import pytest
import torch

import optim
from config import Model, Optim
from model import Transformer

SMALL = dict(vocab_size=31, seq_len=8, d_model=12, n_layers=2, n_heads=2, d_ff=20)


def test_cosine_starts_at_zero_peaks_after_warm_up_and_ends_at_a_tenth():
    cfg = Optim(lr=3e-4, warmup_steps=2000, schedule="cosine", final_lr_fraction=0.1)  # Amber
    rate = [optim.learning_rate(step, 274_320, cfg) for step in (0, 1, 1000, 2000, 138_160, 274_320, 300_000)]
    assert rate[0] == 0
    assert rate[1] == pytest.approx(3e-4 / 2000)
    assert rate[2] == pytest.approx(1.5e-4)
    assert rate[3] == pytest.approx(3e-4)
    assert rate[4] == pytest.approx((3e-4 + 3e-5) / 2)  # half-way between warm-up and end
    assert rate[5] == rate[6] == pytest.approx(3e-5)


def test_linear_starts_at_a_tenth_of_the_peak_as_olmo_does():
    cfg = Optim(lr=3e-4, warmup_steps=5000, schedule="linear", warmup_start_fraction=0.1)
    assert optim.learning_rate(0, 477_000, cfg) == pytest.approx(3e-5)
    assert optim.learning_rate(2500, 477_000, cfg) == pytest.approx(3e-4 * 0.55)
    assert optim.learning_rate(5000, 477_000, cfg) == pytest.approx(3e-4)
    assert optim.learning_rate(241_000, 477_000, cfg) == pytest.approx((3e-4 + 3e-5) / 2)
    assert optim.learning_rate(477_000, 477_000, cfg) == pytest.approx(3e-5)


def test_no_warm_up_and_a_warm_up_longer_than_training_are_schedules_too():
    assert optim.learning_rate(0, 10, Optim(lr=1.0, warmup_steps=0)) == 1.0
    assert optim.learning_rate(9, 10, Optim(lr=1.0, warmup_steps=100)) == pytest.approx(0.09)
    assert optim.learning_rate(10, 10, Optim(lr=1.0, warmup_steps=10, final_lr_fraction=0.1)) == 1.0


def test_amber_decays_everything_and_olmo_only_linear_layers():
    net = Transformer(Model(**SMALL))
    (everything,) = optim.parameter_groups(net, Optim(decay="all", weight_decay=0.1))
    assert len(everything["params"]) == len(list(net.parameters())) and everything["weight_decay"] == 0.1

    decayed, kept = optim.parameter_groups(net, Optim(decay="linear", weight_decay=0.1))
    names = {id(p): name for name, p in net.named_parameters()}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert {names[id(p)] for p in kept["params"]} == {
        n for n in names.values() if "norm" in n or "embed" in n
    }
    assert "lm_head.weight" in {names[id(p)] for p in decayed["params"]}

    tied = Transformer(Model(**SMALL, tie_embeddings=True, norm="nonparametric_layernorm"))
    _, kept = optim.parameter_groups(tied, Optim(decay="linear"))
    assert [p is tied.embed_tokens.weight for p in kept["params"]] == [True]


def test_pythia_decays_matrices_and_olmo_2_all_but_embeddings():
    net = Transformer(Model(**SMALL, norm="layernorm", bias=True))
    names = {id(p): name for name, p in net.named_parameters()}
    for decay, is_kept in (
        ("matrices", lambda name: name.endswith("bias") or "norm" in name),
        ("not_embeddings", lambda name: name == "embed_tokens.weight"),
    ):
        decayed, kept = optim.parameter_groups(net, Optim(decay=decay, weight_decay=0.3))
        assert {names[id(p)] for p in kept["params"]} == {name for name in names.values() if is_kept(name)}
        assert len(decayed["params"]) + len(kept["params"]) == len(names)
        assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)


def test_under_mup_only_matrices_inside_layers_learn_at_the_scale():
    cfg = Model(
        **SMALL,
        norm="layernorm",
        bias=True,
        tie_embeddings=True,
        init="mup",
        mup_base_width=SMALL["d_model"] // 4,
    )
    net = Transformer(cfg)
    adamw = optim.adamw(net, Optim(decay="matrices", weight_decay=0.1), cfg.mup_scale)
    optim.set_rate(adamw, 0.012)
    rates = {
        id(p): (group["lr"], group["weight_decay"]) for group in adamw.param_groups for p in group["params"]
    }
    for name, p in net.named_parameters():
        inside = name.startswith("layers.") and p.ndim == 2
        expected = (0.012 / 4 if inside else 0.012, 0.1 if p.ndim == 2 else 0.0)
        assert rates[id(p)] == pytest.approx(expected), name


def test_one_update_of_adamw_equals_the_paper_by_hand():
    weight = torch.nn.Linear(1, 1, bias=False)
    weight.weight.data.fill_(2.0)
    cfg = Optim(lr=0.1, beta1=0.9, beta2=0.95, eps=1e-3, weight_decay=0.5)
    adamw = optim.adamw(weight, cfg)
    expected, m, v = 2.0, 0.0, 0.0
    for t, gradient in enumerate((3.0, -1.0), start=1):
        weight.weight.grad = torch.full((1, 1), gradient)
        adamw.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        expected -= 0.1 * 0.5 * expected
        expected -= 0.1 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.95**t)) + 1e-3)
        assert weight.weight.item() == pytest.approx(expected, rel=1e-5)


def test_the_clip_uses_the_global_norm_and_returns_it():
    net = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(1, 1, bias=False))
    net[0].weight.grad = torch.tensor([[2.0, 3.0]])
    net[1].weight.grad = torch.tensor([[6.0]])
    assert optim.clip(net, 0.0).item() == 7.0  # sqrt(4 + 9 + 36)
    assert net[1].weight.grad.item() == 6.0
    assert optim.clip(net, 10.0).item() == 7.0
    assert net[1].weight.grad.item() == 6.0
    assert optim.clip(net, 3.5).item() == 7.0
    assert net[1].weight.grad.item() == pytest.approx(3.0, rel=1e-6)
    net[1].weight.grad = torch.tensor([[math.inf]])
    assert math.isinf(optim.clip(net, 1.0).item())
    assert net[0].weight.grad.tolist() == [[pytest.approx(1.0), pytest.approx(1.5)]]
