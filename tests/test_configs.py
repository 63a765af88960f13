"""configs/: every shipped config loads, builds, and has the figures that were published."""

import dataclasses
import math

import pytest
import torch
from conftest import config_names

import config
import configurator
import consistency
import cost
import memory
import optim
import steps as steps_module
from manifest import settings
from model import Transformer

NAMES = config_names()

# Parameters. Printed by the authors, in paper, card or code ...
PUBLISHED = {
    "baichuan-7b": 7_000_559_616,
    "baichuan-13b": 13_264_901_120,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
}
# ... and counted, in tensors of the published shapes.
COUNTED = {
    "124m": 12 * (4 * 768**2 + 3 * 768 * 2048 + 2 * 768) + 50304 * 768 + 768,
    "1b": 16 * (2 * 2048**2 + 2 * 2048 * 512 + 3 * 2048 * 8192 + 2 * 2048) + 50304 * 2048 + 2048,
    "7b": 6_738_415_616,
    "crystalcoder-phase1": 6_575_278_720,
    "crystalcoder-phase2": 6_575_278_720,
    "crystalcoder-phase3": 6_575_278_720,
    "llama-1-7b": 6_738_415_616,
    "llama-1-13b": 13_015_864_320,
    "llama-1-33b": 32_528_943_616,
    "llama-1-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "olmo-1b": 1_176_764_416,
    "olmo-7b": 6_888_095_744,
    "olmo-1.7-7b": 6_888_095_744,
    "olmo-65b": 80 * (4 * 8192**2 + 3 * 8192 * 22016) + 2 * 50304 * 8192,
    "olmo2-1b": 1_484_916_736,
    "olmo2-7b": 7_298_617_344,
    "olmo2-13b": 13_716_198_400,
    "openllama-3b": 26 * (4 * 3200**2 + 3 * 3200 * 8640 + 2 * 3200) + 2 * 32000 * 3200 + 3200,
    "openllama-7b": 6_738_415_616,
    "openllama-13b": 13_015_864_320,
    "pythia-14m": 14_067_712,
    "pythia-31m": 30_494_720,
    "tinyllama": 1_100_048_384,
}
PARAMETERS = PUBLISHED | COUNTED


@pytest.mark.parametrize("name", NAMES)
def test_a_config_loads_under_its_name_and_survives_json(name):
    cfg = config.load(name)
    assert cfg.name == name and cfg.run == f"runs/{name}"
    assert cfg.dataset == ("datasets/pythia" if name.startswith("pythia") else f"datasets/{name}")
    assert configurator.from_dict(config.Config, config.to_dict(cfg)) == cfg == cfg.resolved()
    micro = memory.chosen(cfg, 1, "h200").train.micro_batch_size
    assert consistency.accumulation_steps(cfg.train.batch_size, micro, 1) >= 1
    assert cfg.model.vocab_size >= cfg.tokenizer.vocab_size


@pytest.mark.parametrize("name", NAMES)
def test_print_config_is_one_setting_a_line(name):
    lines = configurator.readable(config.load(name)).splitlines()
    assert f"name = {name!r}" in lines and all(" = " in line for line in lines if line)
    assert len(lines) < 150


@pytest.mark.parametrize("name", NAMES)
def test_a_config_builds_with_the_published_number_of_parameters(name):
    with torch.device("meta"):  # shapes without memory: 405 B parameters weigh nothing
        model = Transformer(config.load(name).model, eot=0)
    count = sum(p.numel() for p in model.parameters())
    assert name == "demo" or count == PARAMETERS[name]


def test_every_model_has_a_published_or_counted_size():
    assert set(PARAMETERS) == set(NAMES) - {"demo"}


def steps(cfg: config.Config) -> int:
    return cost.schedule(cfg, cfg.data.expected_tokens).steps.n_steps


@pytest.mark.parametrize(
    ("name", "tokens_a_step", "n_steps"),
    [
        ("124m", 524_288, 18_865),
        (
            "7b",
            2240 * 2048,
            274_335,
        ),  # Amber made 360 x 762: 96 of the 1,706,976 rows of a chunk fill no step
        ("crystalcoder-phase1", 4_325_376, 79_721),
        ("crystalcoder-phase2", 4_325_376, 214_387),
        ("crystalcoder-phase3", 4_325_376, 27_728),
        ("olmo-1b", 4_194_304, 739_328),
        *((name, 2_097_152, 143_000) for name in NAMES if name.startswith("pythia")),
    ],
)
def test_steps_follow_from_tokens_as_published(name, tokens_a_step, n_steps):
    cfg = config.load(name)
    assert cfg.train.batch_size * cfg.model.seq_len == tokens_a_step
    assert steps(cfg) == n_steps


def test_the_rows_of_amber_are_counted_as_the_paper_counts_them():
    rows = config.load("7b").data.expected_tokens // 2048
    assert divmod(rows // 360, 2240) == (762, 96)
    assert round(rows * 2049 / 1e9, 2) == 1259.13  # the paper's total: every row with its last label


def test_a_stage_with_weights_is_as_long_as_the_run():
    staged = [cfg for cfg in map(config.load, NAMES) if cfg.data.stages[0].weights]
    assert {cfg.name.partition("-")[0] for cfg in staged} == {"crystalcoder", "llama", "olmo2", "tinyllama"}
    for cfg in staged:
        (stage,) = cfg.data.stages
        assert stage.tokens == cfg.data.expected_tokens
        # to the rounding of what was published
        assert sum(stage.weights.values()) == pytest.approx(100 if cfg.name[:5] == "llama" else 1, abs=2e-4)


def rate(cfg: config.Config, step: int) -> float:
    """The learning rate of the update that follows `step` finished ones."""
    return optim.learning_rate(step, steps(cfg), cfg.optim)


def test_the_phases_of_crystalcoder_are_one_line_with_a_break_before_the_third():
    one, two, three = (config.load(f"crystalcoder-phase{i}") for i in (1, 2, 3))
    assert rate(one, steps(one)) == pytest.approx(0.008787, abs=5e-7)
    assert rate(one, steps(one)) == pytest.approx(two.optim.lr, rel=1e-3)
    # the published line: to 1.2408e-4, 294,337 steps after warm-up
    line = dataclasses.replace(one.optim, final_lr_fraction=1.2408e-4 / 0.012)
    for step in (86, 5000, 79_721):
        assert rate(one, step) == pytest.approx(optim.learning_rate(step, 86 + 294_337, line), rel=1e-12)
    # of matrices, 1/16 of it by muP
    m = one.model.mup_scale
    matrices = [rate(one, 86) * m, rate(two, 86) * m, rate(two, steps(two)) * m]
    assert matrices == pytest.approx([7.5e-4, 5.49e-4, 8.55e-6], rel=5e-4)
    assert [rate(three, 276) * m, rate(three, steps(three)) * m] == pytest.approx([1.25e-4, 1.25e-5])
    for cfg, before in ((two, one), (three, two)):
        assert cfg.init_from == f"{before.run}/checkpoints/step-{steps(before):08d}"


def test_mup_gives_crystalcoder_the_multipliers_and_deviations_that_were_published():
    cfg = config.load("crystalcoder-phase1").model
    assert cfg.mup_scale == 0.0625 and cfg.logits_multiplier * cfg.mup_scale == pytest.approx(0.13875)
    hidden = cfg.init_std * cfg.mup_scale**0.5
    assert (hidden, hidden / (2 * cfg.n_layers) ** 0.5) == pytest.approx((0.01825, 0.00228125))
    assert cfg.init_trunc * cfg.init_std == pytest.approx(0.146)
    assert cfg.d_head * cfg.rope_fraction == 32


def test_warm_ups_stated_in_tokens_are_that_long():
    for name, tokens in {
        "olmo-65b": 10_485_760_000,
        "olmo-1.7-7b": 10_485_760_000,
        "olmo2-1b": 8_388_608_000,
        "olmo2-7b": 8_388_608_000,
        "olmo2-13b": 8_388_608_000,
    }.items():
        cfg = config.load(name)
        steps_of_first_batch = cfg.optim.warmup_steps * cfg.train.batch_size * cfg.model.seq_len
        assert (cfg.optim.warmup_tokens or steps_of_first_batch) == tokens


def test_olmo_65b_doubles_its_batch_and_begins_with_a_looser_clip():
    cfg = config.load("olmo-65b")
    phases = cost.schedule(cfg).steps.phases
    # 100 B tokens are 48,828,125 rows: 47,683.7 steps of 1,024, and of 2,048 23,842 more, ...
    assert phases == [
        (0, 0, 1024),
        (47_684, 48_828_416, 2048),
        (47_684 + 23_842, 48_828_416 + 23_842 * 2048, 4096),
        (47_684 + 23_842 + 11_921, 48_828_416 + 23_842 * 2048 + 11_921 * 4096, 8192),
    ]
    assert [round(rows * 2048 / 1e9, 2) for _, rows, _ in phases] == [0, 100, 200, 300]
    loose = 1000 * 1024 * 2048  # 2.097 B tokens
    assert cfg.optim.grad_clip_start_steps * cfg.train.batch_size * cfg.model.seq_len == loose
    assert [optim.clip_limit(step, cfg.optim) for step in (0, 999, 1000)] == [5, 5, 1]
    assert [optim.clip_limit(s, config.load("olmo-7b").optim) for s in (0, 999, 1000)] == [10, 10, 1]
    assert all(config.load(f"olmo2-{size}").optim.z_loss == 1e-5 for size in ("1b", "7b", "13b"))


def test_olmo_65b_lays_its_cosine_and_warm_up_out_over_tokens():
    cfg = config.load("olmo-65b")
    plan = cost.schedule(cfg).steps

    def published(tokens: float) -> float:  # t_warmup 10.486e9, t_max 2e12; warm-up begins at a tenth
        if tokens < 10.48576e9:
            return 1.5e-4 * (0.1 + 0.9 * tokens / 10.48576e9)
        done = (tokens - 10.48576e9) / (2e12 - 10.48576e9)
        return 1.5e-5 + (1.5e-4 - 1.5e-5) * (1 + math.cos(math.pi * done)) / 2

    tokens, size, at = 0, 1024, {}
    for step in range(184_774):  # by brute force: a batch doubles when another 100 B tokens have been seen
        at[step] = tokens
        tokens += size * 2048
        size = min(8192, 1024 << int(tokens // 100e9))
    for step in (0, 1, 2500, 4999, 5000, 47_684, 83_447, 123_050, 184_773):
        position, length = steps_module.schedule_position(cfg, plan, step), 2_000_000_000_000
        assert position == at[step] and length == steps_module.schedule_length(cfg, plan.n_steps)
        assert optim.learning_rate(position, length, cfg.optim) == pytest.approx(published(at[step]))
    # the same cosine over steps, as it was here, is 42 % lower two thirds of the way
    over_steps = dataclasses.replace(cfg.optim, schedule_tokens=0, warmup_tokens=0, warmup_steps=5000)
    wrong = optim.learning_rate(123_050, plan.n_steps, over_steps)
    assert 1 - wrong / published(at[123_050]) == pytest.approx(0.417, abs=0.001)


def test_olmo_1_7_has_its_looser_clip_and_the_authors_their_seeds():
    cfg = config.load("olmo-1.7-7b")
    assert [optim.clip_limit(step, cfg.optim) for step in (0, 499, 500)] == [5, 5, 1]
    assert 500 * cfg.train.batch_size * cfg.model.seq_len == 2_097_152_000
    seeds = {name: config.load(name).train.seed for name in NAMES}
    assert {seed for name, seed in seeds.items() if name.startswith("olmo")} == {6198}
    assert (seeds["7b"], seeds["tinyllama"], seeds["pythia-1b"]) == (11111, 3407, 1234)


def test_a_config_is_sharded_where_a_gpu_of_80_gb_has_no_room_for_the_whole():
    whole = {name for name in NAMES if config.load(name).parallel.strategy == "ddp"} - {"demo"}
    assert {"124m", "1b"} < whole
    for name in set(NAMES) - {"demo"}:
        cfg = memory.chosen(config.load(name), 8, "a100-80gb")
        ddp = memory.variant(cfg, "ddp", cfg.train.activation_checkpointing)
        assert memory.fits(ddp, 8, "a100-80gb") == (name in whole), name
    for gpus in (8, 224):  # a node, and Amber's own number
        assert memory.fits(config.load("7b"), gpus, "a100-80gb")


def test_olmo2_leaves_its_cosine_where_the_next_stage_begins():
    seven, thirteen = config.load("olmo2-7b"), config.load("olmo2-13b")
    assert rate(seven, seven.train.steps) == pytest.approx(6.1499e-5, rel=0.01)  # its stage 2 begins there
    assert rate(thirteen, steps(thirteen)) == pytest.approx(9e-5, rel=1e-3)
    assert thirteen.train.steps == steps(thirteen)  # nothing is cut
    one = config.load("olmo2-1b")
    assert one.train.steps * one.train.batch_size * one.model.seq_len == pytest.approx(4e12, rel=1e-6)


def test_pythia_begins_and_learns_as_its_errata_say():
    sizes = {name: config.load(name) for name in NAMES if name.startswith("pythia")}
    assert len(sizes) == 10 and sizes["pythia-1b"].optim.lr == 2.5e-4
    assert {n for n, cfg in sizes.items() if cfg.model.init == "gpt2"} == {"pythia-6.9b", "pythia-12b"}
    assert [cfg.model.d_head for cfg in sizes.values()] == [32, 32, 64, 64, 64, 256, 128, 80, 128, 128]
    # all sizes read the same rows in the same order
    assert len({repr((cfg.dataset, settings(cfg))) for cfg in sizes.values()}) == 1


@pytest.mark.parametrize("name", [name for name in NAMES if name != "demo"])
def test_a_config_promises_no_more_than_what_is_to_be_had(name):
    cfg = config.load(name)
    assert cfg.data.expected_tokens > 0 and steps(cfg) >= cfg.data.n_chunks
    assert cfg.optim.warmup_steps < steps(cfg)
    assert (cfg.optim.beta1, cfg.optim.beta2, cfg.optim.weight_decay, cfg.optim.grad_clip) == (
        0.9,
        0.95,
        0.1,
        1,
    )
