"""muP: the coordinate check with it, without it, and without each part; and what it is at its base width."""

import dataclasses
import json
import statistics
import sys
from pathlib import Path

import pytest
import torch

import config
from model import Transformer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import mup_coordinate_check as check
import mup_lr_sweep as sweep

BENCHMARKS = Path(sweep.__file__).parent

WIDTHS = [64, 256, 1024]
STEPS = 3
# In the limit of wide models a change is width^0 with muP. Without it every entry of a matrix moves by the
# learning rate, and its output moves in proportion to the width, width^1, until the loss saturates. A growth
# above 1/2 is nearer to 1. muP is held to half of that: finite widths and two seeds leave 0.18 (measured).
FLAT, GROWS = 1 / 4, 1 / 2


def llama(width: int, mup: bool) -> config.Model:
    """The benchmark's model, in one layer and on short rows, so that it takes seconds."""
    return dataclasses.replace(check.settings(width, mup), n_layers=1, seq_len=16, d_ff=width)


def crystalcoder(width: int, mup: bool) -> config.Model:
    """CrystalCoder's block, tied head and multipliers, from a base width of 64 in place of 256."""
    sizes = dict(vocab_size=256, seq_len=16, d_model=width, n_layers=1, d_ff=width)
    sizes |= dict(n_heads=width // 32, n_kv_heads=0, d_head=0)
    named = dict(mup_base_width=64) if mup else dict(mup_base_width=0, init="gpt2")
    return dataclasses.replace(config.load("crystalcoder-phase1").model, **sizes, **named)


def growth(models, lr: float, seeds=(0,), mup_scale: float = 0) -> dict[str, list[float]]:
    """The exponent of each activation's change over the models' widths, after each step."""
    widths, found = [cfg.d_model for cfg in models], {name: [] for name in check.ACTIVATIONS}
    runs = [[check.changes(cfg, lr, STEPS, seed, mup_scale) for cfg in models] for seed in seeds]
    for name in found:
        for step in range(STEPS):
            powers = [check.growth(widths, [one[name][step] for one in by_width]) for by_width in runs]
            found[name].append(statistics.mean(powers))
    return found


FAMILIES = [(llama, check.LR), (crystalcoder, 0.012)]


@pytest.mark.parametrize("build, lr", FAMILIES)
def test_with_mup_a_step_moves_activations_equally_far_at_every_width(build, lr):
    found = growth([build(width, mup=True) for width in WIDTHS], lr, seeds=(0, 1))
    for name, powers in found.items():
        assert all(abs(power) < FLAT for power in powers), (name, powers)


@pytest.mark.parametrize("build, lr", FAMILIES)
def test_without_mup_a_step_moves_a_wide_model_further(build, lr):
    found = growth([build(width, mup=False) for width in WIDTHS[:2]], lr)
    for name in ("attention", "residual stream"):
        assert all(power > GROWS for power in found[name]), (name, found[name])
    assert found["logits"][0] > GROWS  # then they have learnt the commonest bytes, and stay
    assert all(abs(power) < FLAT for power in found["embedding"])  # is looked up, not multiplied


def test_without_the_smaller_learning_rate_of_matrices_the_residual_stream_grows():
    models = [llama(width, mup=True) for width in (64, 256)]
    found = growth(models, check.LR, mup_scale=1.0)
    assert min(found["attention"]) > GROWS and min(found["residual stream"]) > GROWS


def test_without_the_smaller_multiplier_the_logits_grow():
    models = [llama(width, mup=True) for width in (64, 256)]
    models = [dataclasses.replace(cfg, logits_multiplier=cfg.d_model / 64) for cfg in models]  # undoes m
    found = growth(models, check.LR)
    assert found["logits"][0] > GROWS


def test_at_its_base_width_mup_is_the_standard_model_but_for_the_scale_of_attention():
    mup, standard = (Transformer(llama(64, mup=mup)) for mup in (True, False))
    for net in (mup, standard):
        net.init_weights(5)
    assert mup.cfg.mup_scale == 1
    for (name, a), b in zip(mup.named_parameters(), standard.parameters()):
        assert torch.equal(a, b), name
    tokens = torch.arange(33).view(3, 11) % 19
    assert not torch.equal(mup(tokens), standard(tokens))
    for layer in standard.layers:  # q.k / d_head is (q / sqrt(d_head)).k / sqrt(d_head); d_head is 32
        layer.self_attn.q_proj.weight.data /= 32**0.5
    torch.testing.assert_close(mup(tokens), standard(tokens), rtol=1e-5, atol=1e-6)


def test_growth_is_the_exponent_of_a_power_law():
    assert check.growth([64, 128, 512], [3.0, 6.0, 24.0]) == pytest.approx(1)
    assert check.growth([64, 256, 1024], [5.0, 2.5, 1.25]) == pytest.approx(-0.5)
    assert check.growth([64, 256, 1024], [1.0, 4.0, 1.0]) == pytest.approx(0)


# ---- what the benchmarks recorded -------------------------------------------------------------------------


def test_the_best_learning_rate_is_where_a_parabola_through_three_points_is_lowest():
    x = [-8, -7, -6, -5]
    found = sweep.best(x, [(e + 6.25) ** 2 + 2 for e in x])
    assert found == {"log2_rate": -6, "loss": 2.0625, "log2_rate_between": -6.25}
    assert sweep.best(x, [1.0, 2.0, 3.0, 4.0])["log2_rate_between"] is None  # at the edge
    blown_up = [9.0, 2.0, float("inf"), 4.0]
    assert sweep.best(x, blown_up)["log2_rate_between"] is None


def test_a_curve_is_the_mean_over_seeds_by_learning_rate():
    runs = [
        dict(parametrisation="muP", width=w, log2_rate=rate, loss=loss)
        for w, rate, loss in ((32, -5, 3.0), (32, -6, 2.0), (32, -5, 4.0), (64, -6, 9.0), (32, -4, None))
    ]
    assert sweep.curve(runs, "muP", 32) == ([-6, -5, -4], [2.0, 3.5, float("inf")])


def test_the_recorded_sweep_has_one_best_learning_rate_with_mup_and_one_for_each_width_without():
    runs = json.loads((BENCHMARKS / "mup_lr_sweep.json").read_text())["runs"]
    widths = sorted({run["width"] for run in runs})
    spread = {}
    for name in sweep.PARAMETRISATIONS:
        rates = [sweep.best(*sweep.curve(runs, name, width))["log2_rate_between"] for width in widths]
        spread[name] = max(rates) - min(rates)
    assert widths[-1] / widths[0] == 8
    assert spread["muP"] < 0.5 and spread["standard"] > 2  # a factor below sqrt(2), and above 4


def test_the_recorded_coordinate_check_is_flat_with_mup_and_grows_without():
    powers = json.loads((BENCHMARKS / "mup_coordinates.json").read_text())["growth"]
    assert all(abs(by_step[-1]) < 0.1 for by_step in powers["muP"].values())
    assert powers["standard"]["residual stream"][-1] > 1 and powers["standard"]["logits"][0] > GROWS
