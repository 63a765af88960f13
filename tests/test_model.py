"""model.py: equal to independent implementations, causal, and the same with and without a cache."""

import math

import pytest
import torch
import torch.nn.functional as F

import config
import families
import model
from config import Model
from model import Cache, Transformer

# Pairwise different sizes, so that a wrong transpose cannot pass.
LLAMA = Model(vocab_size=97, seq_len=40, d_model=60, n_layers=3, n_heads=6, n_kv_heads=2, d_head=14, d_ff=44)
OLMO = Model(
    vocab_size=101, seq_len=36, d_model=48, n_layers=2, n_heads=4, d_ff=70, norm="nonparametric_layernorm",
    init="mitchell", tie_embeddings=True, rope_theta=500.0,
)  # fmt: skip
FAMILIES = pytest.mark.parametrize("cfg", [LLAMA, OLMO], ids=["llama", "olmo"])


def make(cfg: Model, seed: int = 1) -> Transformer:
    net = Transformer(cfg)
    net.init_weights(seed)
    return net.eval()


def tokens_for(cfg: Model, batch: int = 3, length: int = 23, seed: int = 5) -> torch.Tensor:
    return torch.randint(cfg.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@FAMILIES
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv", [1, 2, 0])
def test_logits_loss_and_every_gradient_equal_transformers(cfg, tied, kv):
    transformers = pytest.importorskip("transformers")
    import dataclasses

    cfg = dataclasses.replace(cfg, tie_embeddings=tied, n_kv_heads=kv, rope_theta=300.0)
    ours = make(cfg)
    with torch.no_grad():  # norms' weights that differ from 1 would hide nothing
        for p in ours.parameters():
            p.add_(0.1 * torch.randn_like(p))
    values = families.hf_config(cfg)
    kind = getattr(transformers, values.pop("architectures")[0])
    theirs = kind(kind.config_class(**values)).eval()
    state = families.to_family(ours.state_dict(), cfg)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if tied else set())
    theirs.tie_weights()

    tokens = tokens_for(cfg)
    assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    loss = ours(inputs, targets) / targets.numel()
    logits = theirs(inputs).logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert abs(loss - expected) < 1e-5
    loss.backward()
    expected.backward()
    gradients = families.to_family({name: p.grad for name, p in ours.named_parameters()}, cfg)
    for name, parameter in theirs.named_parameters():
        assert (gradients.pop(name) - parameter.grad).abs().max() < 1e-4, name
    assert not gradients


@FAMILIES
def test_a_token_never_sees_a_later_one(cfg):
    net, tokens = make(cfg), tokens_for(cfg)
    before = net(tokens)
    changed = tokens.clone()
    changed[:, 15] = (changed[:, 15] + 1) % cfg.vocab_size
    after = net(changed)
    assert torch.equal(before[:, :15], after[:, :15])
    assert (before[:, 15:] != after[:, 15:]).any(-1).all()  # and every later one sees it


@FAMILIES
@pytest.mark.parametrize("pieces", [[23], [22, 1], [1] * 23, [5, 1, 7, 1, 1, 8]])
def test_with_a_cache_is_the_same_as_without(cfg, pieces):
    net, tokens = make(cfg), tokens_for(cfg)
    cache = Cache(cfg, batch_size=3, max_length=23)
    logits = torch.cat([net(piece, cache=cache) for piece in tokens.split(pieces, dim=1)], dim=1)
    assert cache.length == 23
    torch.testing.assert_close(logits, net(tokens), atol=2e-6, rtol=1e-5)


def test_a_full_cache_says_so():
    net, cache = make(LLAMA), Cache(LLAMA, batch_size=3, max_length=22)
    with pytest.raises(ValueError, match="holds 22 tokens and 23"):
        net(tokens_for(LLAMA), cache=cache)


def test_a_uniform_model_has_loss_ln_v():
    net = make(LLAMA)
    torch.nn.init.zeros_(net.lm_head.weight)
    tokens = tokens_for(LLAMA)
    loss = net(tokens[:, :-1], tokens[:, 1:]) / (3 * 22)
    assert abs(loss.item() - math.log(97)) < 1e-6


def test_under_bf16_autocast_logits_and_loss_are_fp32_and_close():
    net, tokens = make(LLAMA), tokens_for(LLAMA)
    exact, exact_loss = net(tokens), net(tokens[:, :-1], tokens[:, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = net(tokens), net(tokens[:, :-1], tokens[:, 1:])
    assert logits.dtype == loss.dtype == torch.float32
    # BF16 keeps 8 bits of each factor
    assert 0 < (logits - exact).abs().max() < 2**-8 * 8 * exact.abs().max()
    assert abs(loss - exact_loss) < 0.01 * exact_loss
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
def test_rotary_keeps_lengths_and_depends_on_distance_only(pairs):
    cfg = Model(d_model=8, n_heads=1, rope_pairs=pairs).resolved()
    angles, neighbours = model.rotary_angles(torch.arange(50), cfg), pairs == "neighbours"
    q, k = torch.randn(8), torch.randn(8)
    turned_q = model.rotate(q.expand(1, 50, 1, 8), *angles, neighbours)[0, :, 0]
    turned_k = model.rotate(k.expand(1, 50, 1, 8), *angles, neighbours)[0, :, 0]
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(50))
    products = turned_q @ turned_k.T
    torch.testing.assert_close(products.diagonal(3), products[3 - 3, 3].expand(47), atol=1e-5, rtol=1e-4)
    # position 2, first pair, frequency 1: (a cos 2 - b sin 2, b cos 2 + a sin 2)
    other = 1 if neighbours else 4  # b stands beside a, or half a head away
    a, b = q[0].item(), q[other].item()
    assert turned_q[2, 0].item() == pytest.approx(a * math.cos(2) - b * math.sin(2), abs=1e-5)
    assert turned_q[2, other].item() == pytest.approx(b * math.cos(2) + a * math.sin(2), abs=1e-5)


def test_normal_initialisation_has_the_standard_deviation_it_says():
    cfg = Model(vocab_size=500, d_model=128, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=300, init_std=0.03)
    for name, p in make(cfg).named_parameters():
        if p.ndim == 1:
            assert torch.equal(p, torch.ones_like(p))
        else:  # the sample deviation of n normal numbers has a relative error of 1/sqrt(2n); five of those
            assert abs(p.std() / 0.03 - 1) < 5 / math.sqrt(2 * p.numel()), name


def test_mitchell_initialisation_shrinks_with_fan_in_and_depth():
    cfg = Model(vocab_size=500, d_model=128, n_layers=3, n_heads=4, d_ff=300, init="mitchell",
                norm="nonparametric_layernorm")  # fmt: skip
    # A normal cut at 3 sigma has 0.98658 of its deviation: sqrt(1 - 2 x 3 phi(3) / (2 Phi(3) - 1)).
    cut = math.sqrt(1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / math.erf(3 / math.sqrt(2)))
    for name, p in make(cfg).named_parameters():
        expected = 128**-0.5
        if "layers." in name:
            depth = int(name.split(".")[1]) + 1
            if "o_proj" in name:
                expected = (2 * 128 * depth) ** -0.5
            if "down_proj" in name:
                expected = (2 * 300 * depth) ** -0.5
        assert abs(p.std() / (cut * expected) - 1) < 5 / math.sqrt(2 * p.numel()), name
        assert p.abs().max() <= 3 * expected


def test_the_seed_alone_decides_the_weights():
    a, b, c = make(LLAMA, 1), make(LLAMA, 1), make(LLAMA, 2)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)


@pytest.mark.parametrize(
    ("name", "parameters"),
    # OLMo-1B: 16 x (4 x 2048^2 + 3 x 2048 x 8192) + 50304 x 2048
    [("7b", 6_738_415_616), ("olmo-1b", 1_176_764_416)],
)
def test_parameters_are_counted_as_published(name, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(config.load(name).model).parameters()) == parameters
