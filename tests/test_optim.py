"""optim.py: schedules at their endpoints, groups as published, clip and Muon by hand."""

import itertools
import math

import numpy as np
import pytest
import torch

import config
import cost
import incidents
import optim
import steps
from config import Config, Model, Optim, Train
from model import Transformer

SMALL = dict(vocab_size=31, seq_len=8, d_model=12, n_layers=2, n_heads=2, d_ff=20)


def test_cosine_starts_at_zero_peaks_after_warm_up_and_ends_at_a_tenth():
    cfg = Optim(lr=3e-4, warmup_steps=2000, schedule="cosine", final_lr_fraction=0.1)  # Amber
    lrs = [optim.learning_rate(step, 274_320, cfg) for step in (0, 1, 1000, 2000, 138_160, 274_320, 300_000)]
    assert lrs[0] == 0
    assert lrs[1] == pytest.approx(3e-4 / 2000)
    assert lrs[2] == pytest.approx(1.5e-4)
    assert lrs[3] == pytest.approx(3e-4)
    assert lrs[4] == pytest.approx((3e-4 + 3e-5) / 2)  # half-way between warm-up and end
    assert lrs[5] == lrs[6] == pytest.approx(3e-5)


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


def test_a_constant_learning_rate_falls_linearly_in_the_last_part_of_the_steps():
    cfg = Optim(lr=2.0, warmup_steps=10, schedule="constant", decay_fraction=0.2, final_lr_fraction=0.1)
    lrs = {step: optim.learning_rate(step, 100, cfg) for step in (0, 5, 10, 50, 80, 85, 90, 99, 100, 120)}
    # 81 ... 100 are the last fifth: 2 x (0.1 + 0.9 x what is left of it)
    by_hand = {0: 0, 5: 1, 10: 2, 50: 2, 80: 2, 85: 1.55, 90: 1.1, 99: 0.29, 100: 0.2, 120: 0.2}
    assert lrs == {step: pytest.approx(value) for step, value in by_hand.items()}

    never = Optim(lr=2.0, warmup_steps=10, schedule="constant", decay_fraction=0.0)
    assert [optim.learning_rate(step, 100, never) for step in (5, 10, 99, 100)] == [1.0, 2.0, 2.0, 2.0]
    always = Optim(lr=2.0, warmup_steps=10, schedule="constant", decay_fraction=1.0, final_lr_fraction=0.0)
    assert optim.learning_rate(55, 100, always) == pytest.approx(1.0)  # half-way between warm-up and end
    late = Optim(lr=2.0, warmup_steps=90, schedule="constant", decay_fraction=0.5, final_lr_fraction=0.0)
    lrs = [optim.learning_rate(step, 100, late) for step in (45, 90, 95, 100)]
    assert lrs == [1.0, 2.0, 1.0, 0.0]  # warm-up comes first


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_an_annealed_run_leaves_the_schedule_where_it_stands_and_falls_to_zero(schedule):
    cfg = Optim(lr=3e-4, warmup_steps=10, schedule=schedule, anneal_steps=40)
    begin = optim.learning_rate(60, 100, cfg)
    lrs = [optim.annealed_lr(begin, step - 60, cfg) for step in (60, 61, 80, 99, 100, 105)]
    assert lrs == [pytest.approx(begin * left) for left in (1, 39 / 40, 1 / 2, 1 / 40, 0, 0)]


def test_a_schedule_that_counts_tokens_follows_batches_that_double():
    T, lr = 7, 0.5
    o = Optim(lr=lr, schedule_tokens=5000, warmup_tokens=1000, warmup_steps=0, final_lr_fraction=0.2)
    cfg = Config(
        model=Model(seq_len=T),
        optim=o,
        train=Train(batch_size=3, micro_batch_size=1, batch_double_tokens=1400, batch_size_max=12),
    )
    plan = steps.plan_of(cfg, n_rows=700)
    # by brute force: a batch is as large as the rows consumed before it say
    consumed, expected = 0, []
    while consumed + (size := 3 if consumed < 200 else 6 if consumed < 400 else 12) <= 700:
        tokens = consumed * T
        cosine = (1 + math.cos(math.pi * min(1, (tokens - 1000) / 4000))) / 2
        expected.append(lr * tokens / 1000 if tokens < 1000 else lr * (0.2 + 0.8 * cosine))
        consumed += size
    at = [steps.schedule_position(cfg, plan, step) for step in range(plan.n_steps)]
    lrs = [optim.learning_rate(tokens, steps.schedule_length(cfg, plan.n_steps), o) for tokens in at]
    assert lrs == pytest.approx(expected) and len({round(b - a) for a, b in itertools.pairwise(at)}) == 3
    assert optim.learning_rate(5001, 5000, o) == pytest.approx(lr * 0.2)


def test_the_length_of_a_schedule_is_what_is_asked_for_or_all_the_data():
    for settings, length, position in (
        ({}, 40, 4),
        ({"schedule_steps": 30}, 30, 4),
        ({"schedule_tokens": 999, "warmup_steps": 0}, 999, 4 * 2 * 5),
    ):
        cfg = Config(model=Model(seq_len=5), optim=Optim(**settings), train=Train(batch_size=2))
        assert steps.schedule_length(cfg, 40) == length
        assert steps.schedule_position(cfg, steps.plan_of(cfg, 80), 4) == position


@pytest.mark.parametrize("at", [0, 5, 50])
def test_a_schedule_that_is_not_in_the_table_raises_where_it_is_used(at):
    cfg = Optim(warmup_steps=10)
    object.__setattr__(cfg, "schedule", "inverse_sqrt")
    with pytest.raises(ValueError, match="inverse_sqrt"):
        optim.learning_rate(at, 100, cfg)


def test_a_warm_up_as_long_as_the_schedule_or_the_data_is_refused_with_a_number():
    def check(n_rows=466, **settings):
        cfg = Config(model=Model(seq_len=5), optim=Optim(**settings), train=Train(batch_size=2))
        cost.check_warmup(cfg, steps.plan_of(cfg, n_rows))

    with pytest.raises(config.ConfigError, match=r"the data have 233 steps.*--optim\.warmup_steps=23,"):
        check()  # 2,000 steps, the default
    with pytest.raises(config.ConfigError, match=r"the schedule has 50 steps.*--optim\.warmup_steps=5,"):
        check(warmup_steps=50, schedule_steps=50)
    with pytest.raises(config.ConfigError, match=r"the data have 233 steps"):
        check(warmup_steps=233, schedule_steps=900)
    tokens = dict(warmup_steps=0, schedule_tokens=9000)
    with pytest.raises(config.ConfigError, match=r"the data have 2330 tokens.*--optim\.warmup_tokens=233,"):
        check(warmup_tokens=2330, **tokens)
    check(warmup_tokens=2329, **tokens)
    for fine in (dict(warmup_steps=232), dict(warmup_steps=0), dict(warmup_steps=49, schedule_steps=50)):
        check(**fine)
    check(n_rows=2, warmup_steps=0)


def test_the_clip_is_looser_at_the_start_where_asked():
    assert {optim.clip_limit(step, Optim(grad_clip=0.7)) for step in (0, 5000)} == {0.7}
    cfg = Optim(grad_clip=1.5, grad_clip_start_factor=10.0, grad_clip_start_steps=3)
    assert [optim.clip_limit(step, cfg) for step in range(5)] == [15.0, 15.0, 15.0, 1.5, 1.5]
    assert (
        optim.clip_limit(0, Optim(grad_clip=0.0, grad_clip_start_factor=10.0)) == 0.0
    )  # no limit stays none


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
    optim.set_lr(adamw, 0.012)
    lrs = {
        id(p): (group["lr"], group["weight_decay"]) for group in adamw.param_groups for p in group["params"]
    }
    for name, p in net.named_parameters():
        inside = name.startswith("layers.") and p.ndim == 2
        expected = (0.012 / 4 if inside else 0.012, 0.1 if p.ndim == 2 else 0.0)
        assert lrs[id(p)] == pytest.approx(expected), name


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


def test_an_update_clips_by_the_global_norm_moves_the_weights_and_drops_the_gradients():
    net = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(1, 1, bias=False))
    sgd = torch.optim.SGD(net.parameters())
    sgd.param_groups[0]["lr_scale"] = 0.5

    def moved(limit: float, last: float = 6.0) -> tuple[float, list[float]]:
        """The norm that was found, and how far an update with learning rate 2 x 0.5 moves each weight."""
        net[0].weight.grad, net[1].weight.grad = torch.tensor([[2.0, 3.0]]), torch.tensor([[last]])
        for weights in net.parameters():
            weights.data.zero_()
        norm = optim.grad_norm(net).item()
        optim.update(net, [sgd], 2.0, norm, limit)
        assert all(weights.grad is None for weights in net.parameters())
        return norm, [-w for weights in net.parameters() for w in weights.flatten().tolist()]

    assert moved(0.0) == (7.0, [2.0, 3.0, 6.0])  # sqrt(4 + 9 + 36); no limit
    assert moved(10.0) == (7.0, [2.0, 3.0, 6.0])
    assert moved(3.5) == (7.0, [pytest.approx(x, rel=1e-6) for x in (1.0, 1.5, 3.0)])
    norm, far = moved(1.0, math.inf)  # scales nothing: a run judges it before it updates
    assert math.isinf(norm) and far == [2.0, 3.0, math.inf]


# ---- Muon -------------------------------------------------------------------------------------------------


def orthogonal(g: np.ndarray) -> np.ndarray:
    """Five steps of Newton-Schulz with Jordan's coefficients: singular values go to 1 or so."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = g.T if g.shape[0] > g.shape[1] else g
    x = wide / np.sqrt((wide**2).sum())
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def net_with_gradients(seed: int, **settings) -> Transformer:
    """A model with biases, norms and matrices that are tall, wide and square; every gradient is random."""
    torch.manual_seed(seed)
    net = Transformer(Model(**SMALL, **settings))
    net.init_weights(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape)
    return net


def test_muon_moves_the_matrices_inside_layers_as_its_paper_says():
    settings = dict(norm="layernorm", bias=True, n_kv_heads=1)
    net = net_with_gradients(1, **settings)
    cfg = Optim(optimizer="muon", lr=0.02, weight_decay=0.3, muon_momentum=0.9, decay="matrices")
    muon, adamw = optim.optimizers(net, cfg)
    inside = {n: p for n, p in net.named_parameters() if n.startswith("layers.") and p.ndim == 2}
    assert len(inside) == 2 * 7
    assert {id(p) for group in muon.param_groups for p in group["params"]} == set(map(id, inside.values()))

    expected = {n: p.detach().double().numpy().copy() for n, p in inside.items()}
    momentum = {n: np.zeros(p.shape) for n, p in inside.items()}
    first = {n: value.copy() for n, value in expected.items()}
    for lr in (0.02, 0.05):
        for n, p in inside.items():
            p.grad = torch.randn(p.shape)
            g = p.grad.double().numpy()
            momentum[n] = 0.9 * momentum[n] + 0.1 * g
            ahead = 0.1 * g + 0.9 * momentum[n]  # Nesterov
            scale = 0.2 * math.sqrt(max(p.shape))  # Liu et al. 2025, section 2.2
            expected[n] -= lr * (scale * orthogonal(ahead) + 0.3 * expected[n])
        for optimizer in (muon, adamw):
            optim.set_lr(optimizer, lr)
            optimizer.step()
    for n, p in inside.items():
        moved, by_hand = p.detach().double().numpy() - first[n], expected[n] - first[n]
        # On a CPU the iterations are FP32; five of them amplify its roundings some ten times.
        assert np.linalg.norm(moved - by_hand) < 1e-5 * np.linalg.norm(by_hand), n


def test_beside_muon_everything_else_is_moved_by_adamw_bit_for_bit():
    nets = [net_with_gradients(2, norm="layernorm", bias=True) for _ in range(2)]
    common = dict(lr=0.02, weight_decay=0.3, decay="linear", beta2=0.9, eps=1e-3)
    (adamw,) = optim.optimizers(nets[0], Optim(**common))
    muon, rest = optim.optimizers(nets[1], Optim(**common, optimizer="muon"))
    for optimizer in (adamw, muon, rest):
        optim.set_lr(optimizer, 0.01)
        optimizer.step()
    names = {id(p): name for name, p in nets[1].named_parameters()}
    by_adamw = {names[id(p)] for group in rest.param_groups for p in group["params"]}
    assert by_adamw == {
        n for n, p in nets[1].named_parameters() if not (n.startswith("layers.") and p.ndim == 2)
    }
    assert {"lm_head.weight", "embed_tokens.weight", "norm.weight", "layers.0.mlp.up_proj.bias"} <= by_adamw
    for (name, a), b in zip(nets[0].named_parameters(), nets[1].parameters()):
        assert torch.equal(a, b) == (name in by_adamw), name


def test_muon_takes_its_learning_rate_and_decay_from_the_group():
    """Under muP matrices inside layers learn at a fraction of the learning rate, their decay with them."""
    net = net_with_gradients(3, tie_embeddings=True, init="mup", mup_base_width=3)
    muon, adamw = optim.optimizers(net, Optim(optimizer="muon", weight_decay=0.1), net.cfg.mup_scale)
    optim.set_lr(muon, 0.08)
    optim.set_lr(adamw, 0.08)
    assert [(g["lr"], g["weight_decay"]) for g in muon.param_groups] == [(pytest.approx(0.08 / 4), 0.1)]
    assert {g["lr"] for g in adamw.param_groups} == {0.08}


# ---- gradients --------------------------------------------------------------------------------------------


def test_grad_norms_by_layer_are_of_what_is_in_each():
    net = net_with_gradients(4, norm="layernorm", bias=True, positions="learned")
    norms = incidents.grad_norms_by_layer(net)
    assert list(norms) == ["embed_tokens", "embed_positions", "layers.0", "layers.1", "norm", "lm_head"]
    for layer, value in norms.items():
        grads = [p.grad.double() for n, p in net.named_parameters() if n.startswith(f"{layer}.")]
        assert value == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in grads)), rel=1e-6)
    assert optim.grad_norm(net).item() == pytest.approx(math.hypot(*norms.values()), rel=1e-6)
    net.norm.weight.grad = net.norm.bias.grad = None
    assert "norm" not in incidents.grad_norms_by_layer(net)


@pytest.mark.parametrize(
    ("total", "limit", "factor"),
    [
        (5.0, 0.0, 1),
        (5.0, 5.1, 1),
        (5.0, 2.5, 0.5),
        (20.0, 2.5, 0.125),
        (math.inf, 1.0, 1),
        (math.nan, 1.0, 1),
    ],
)
def test_gradients_are_scaled_by_the_norm_that_is_given(total, limit, factor):
    """The norm is that of the whole gradient, also where a process holds a shard of it only."""
    net = torch.nn.Linear(2, 1)
    net.weight.grad = torch.tensor([[3.0, -4.0]])  # and no gradient of the bias
    optim.clip_gradients(net, total, limit)
    assert net.weight.grad.tolist() == [pytest.approx([3.0 * factor, -4.0 * factor], rel=1e-5)]


def gradients_of(share: float, tied: bool) -> dict[str, torch.Tensor]:
    """Gradients of a model whose head has the embedding's values, be it the same matrix or another."""
    net = Transformer(Model(**SMALL, tie_embeddings=tied))
    net.init_weights(5)
    if not tied:
        net.lm_head.weight.data.copy_(net.embed_tokens.weight.data)
    incidents.shrink_embedding_gradient(net, share)
    tokens = torch.randint(SMALL["vocab_size"], (3, 8), generator=torch.Generator().manual_seed(6))
    net(tokens[:, :-1], tokens[:, 1:]).backward()
    return {name: p.grad for name, p in net.named_parameters()}


def test_only_the_gradient_of_the_embedding_shrinks():
    whole, shrunk = gradients_of(1.0, tied=False), gradients_of(0.1, tied=False)
    assert whole["embed_tokens.weight"].abs().sum() > 0
    for name in whole:
        factor = 0.1 if name == "embed_tokens.weight" else 1.0
        torch.testing.assert_close(shrunk[name], factor * whole[name], rtol=1e-5, atol=1e-7)
    assert gradients_of(0.0, tied=False)["embed_tokens.weight"].abs().sum() == 0


def test_a_tied_head_gives_its_part_of_the_gradient_whole():
    apart, tied = gradients_of(1.0, tied=False), gradients_of(0.1, tied=True)
    expected = 0.1 * apart["embed_tokens.weight"] + apart["lm_head.weight"]
    torch.testing.assert_close(tied["embed_tokens.weight"], expected, rtol=1e-5, atol=1e-6)


def test_a_shrunk_gradient_changes_no_loss_and_asks_for_no_gradient_where_none_is_taken():
    net, plain = Transformer(Model(**SMALL)), Transformer(Model(**SMALL))
    net.init_weights(5)
    plain.init_weights(5)
    incidents.shrink_embedding_gradient(net, 0.1)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(net(tokens), plain(tokens))
    assert torch.equal(net(tokens, tokens), plain(tokens, tokens))


def test_a_constant_learning_rate_without_decay_stays_at_its_peak_beyond_the_schedule():
    cfg = Optim(lr=0.5, schedule="constant", decay_fraction=0.0, warmup_steps=4)
    assert [optim.learning_rate(at, 100, cfg) for at in (4, 50, 100, 101, 500)] == [0.5] * 5
