"""cost.py and plan.py: what they say is what the model, the loop and the published runs say."""

import dataclasses
import math
import subprocess
import sys
import time
from pathlib import Path

import conftest
import pytest
import safetensors
import torch
from conftest import ROOT, config_names

import config
import consistency
import cost
import hardware
import loss
import memory
import optim
import parallel
import plan
import recompute
import run_folder
import train
from config import Config, ConfigError, Model, Optim, Parallel, Train
from dataset import Dataset
from model import Transformer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_memory

AMBER = Model()  # the defaults are LLaMA-7B
SMALL = dict(vocab_size=101, seq_len=48, d_model=64, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=200)
PYTHIA = dict(norm="layernorm", bias=True, ffn="gelu", parallel_residual=True, rope_fraction=0.25)
VARIANTS = {
    "llama": {},
    "pythia": PYTHIA,
    "olmo": dict(norm="nonparametric_layernorm", clip_qkv=8.0, tie_embeddings=True),
    "olmo2": dict(norm_place="after", qk_norm=True),
    "crystalcoder": dict(norm="layernorm", bias=True, tie_embeddings=True, rope_pairs="neighbours"),
    "layernorm on queries": dict(norm="layernorm", qk_norm=True, d_head=24),
    "geglu, learned positions": dict(ffn="geglu", positions="learned", bias=True),
    "squared relu, no positions": dict(ffn="relu2", positions="none", d_head=24),
    "window": dict(window=7),
    "documents": dict(document_mask=True),
    "alibi and documents": dict(positions="alibi", document_mask=True),
}


def built(model: Model) -> Transformer:
    with torch.device("meta"):
        return Transformer(model, eot=0)


# ---- parameters and FLOPs ---------------------------------------------------------------------------------


def by_part(model: Transformer) -> dict[str, int]:
    """Parameters of a built model, sorted into cost.parameters' parts by their names."""
    parts = dict.fromkeys(cost.parameters(model.cfg), 0)
    for name, parameter in model.named_parameters():
        part = (
            "learned positions" if name.startswith("embed_positions")
            else "embedding" if name.startswith("embed")
            else "head" if name.startswith("lm_head")
            else "norms" if "norm" in name
            else "biases" if name.endswith("bias")
            else "attention" if "self_attn" in name
            else "feed-forward"
        )  # fmt: skip
        parts[part] += parameter.numel()
    return parts


@pytest.mark.parametrize("name", VARIANTS)
def test_every_part_has_as_many_parameters_as_the_built_model(name):
    model = Model(**{**SMALL, **VARIANTS[name]})
    assert cost.parameters(model) == by_part(built(model))


@pytest.mark.parametrize("name", config_names())
def test_every_config_has_as_many_parameters_as_its_model(name):
    model = config.load(name).model
    assert cost.parameters(model) == by_part(built(model))


@pytest.mark.parametrize(
    "name, published",
    [("7b", 6_738_415_616), ("baichuan-7b", 7_000_559_616), ("olmo-1b", 1_176_764_416),
     ("crystalcoder-phase1", 6_575_278_720)],
)  # fmt: skip
def test_published_models_have_their_published_size(name, published):
    assert sum(cost.parameters(config.load(name).model).values()) == published


def test_a_padded_vocabulary_is_counted_without_its_padding():
    tied = Model(**{**SMALL, "vocab_size": 128, "tie_embeddings": True})
    size = sum(cost.parameters(tied).values())
    assert size - cost.without_padding(tied, 101) == 27 * 64
    assert (
        cost.without_padding(dataclasses.replace(tied, tie_embeddings=False), 101) == size + (202 - 128) * 64
    )


def test_flops_by_both_conventions_by_hand():
    flops = cost.flops_per_token(Model(**{**SMALL, "d_head": 24}))
    assert flops["6N"] == 6 * sum(p.numel() for p in built(Model(**{**SMALL, "d_head": 24})).parameters())
    assert flops["attention"] == 12 * 3 * (4 * 24) * 48
    assert cost.flops_per_token(Model(**{**SMALL, "window": 7}))["attention"] == 12 * 3 * 64 * 7


# Tokens a second on one GPU, its peak, and the MFU that they come to by each convention
@pytest.mark.parametrize(
    "model, speed, peak, plain, palm",
    [
        (AMBER, 2600, 312e12, 33.7, 36.4),
        (AMBER, 1e12 / 82_432 / 3600, 312e12, 43.7, 47.1),  # LLaMA-7B
        (dataclasses.replace(AMBER, seq_len=4096), 2e12 / 184_320 / 3600, 312e12, 39.1, 45.3),  # LLaMA-2 7B
        (Model(d_model=2048, n_layers=22, n_kv_heads=4, d_ff=5632), 24_000, 312e12, 50.8, 59.3),  # TinyLlama
    ],
)
def test_mfu_of_published_runs(model, speed, peak, plain, palm):
    assert [round(100 * share, 1) for share in cost.mfu(model, speed, peak)] == [plain, palm]


# ---- memory -----------------------------------------------------------------------------------------------


def kept_by_autograd(model: Model, rows: int, bf16: bool, **settings) -> int:
    """Bytes of all that autograd saves under the head: no parameters, no casts of them, no indices."""
    net = Transformer(model, eot=0)
    for block in net.layers:
        if settings.get("selective"):
            block.forward = recompute.recomputed(block.forward, selective=True)
        if settings.get("compiled"):  # with the compiler's choice of what to keep, but no generated code
            block.forward = torch.compile(block.forward, backend="aot_eager_decomp_partition")
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    matrices = {tuple(p.shape) for p in net.parameters() if p.ndim == 2}
    kept = {}

    def save(t):
        cast = t.dtype == torch.bfloat16 and ({tuple(t.shape), tuple(t.shape)[::-1]} & matrices)
        index = not t.is_floating_point() and t.dtype != torch.bool
        if t.untyped_storage().data_ptr() not in own and not index and not cast:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage()  # held, so that no address comes twice
        return t

    tokens = torch.randint(model.vocab_size, (rows, model.seq_len))
    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            net.hidden(tokens)
    return sum(storage.nbytes() for storage in kept.values())


def planned_to_be_kept(
    model: Model, rows: int, bf16: bool, every: int | str = 0, cuda: bool = False, compile: str = "off"
) -> float:
    """Bytes that the plan has between forward and backward, without the loss."""
    cfg = small_config(model, rows, 1, "bf16" if bf16 else "fp32", every, compile)
    sizes = memory.sizes(cfg, 1, cuda)
    return sum(sizes.kept) + sizes.outer


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_activations_are_what_autograd_keeps_to_the_byte(name, bf16):
    model = Model(**{**SMALL, **VARIANTS[name]}).resolved()
    assert planned_to_be_kept(model, 5, bf16) == kept_by_autograd(model, 5, bf16)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_compiled_blocks_keep_what_the_plan_says(name, bf16):
    torch._dynamo.reset()
    model = Model(**{**SMALL, **VARIANTS[name]}).resolved()
    planned = planned_to_be_kept(model, 5, bf16, compile="on")
    assert planned == pytest.approx(kept_by_autograd(model, 5, bf16, compiled=True), rel=0.005)


@pytest.mark.parametrize("name", ["llama", "olmo2"])
def test_compiled_blocks_with_selective_recompute_keep_what_the_plan_says(name):
    torch._dynamo.reset()
    model = Model(**{**SMALL, **VARIANTS[name]}).resolved()
    planned = planned_to_be_kept(model, 5, True, "selective", compile="on")
    kept = kept_by_autograd(model, 5, True, compiled=True, selective=True)
    assert planned == pytest.approx(kept, rel=0.005)


def small_config(
    model: Model, micro: int, accumulation: int, precision: str, every: int | str = 0, compile: str = "off"
) -> Config:
    return Config(
        model=model.resolved(),
        train=Train(
            batch_size=micro * accumulation, micro_batch_size=micro, precision=precision, device="cpu",
            activation_checkpointing=every, compile=compile,
        ),
    )  # fmt: skip


def allocated_at_the_peak(cfg: Config) -> int:
    """Bytes of tensors at the peak of a training step in this process, by PyTorch's profiler."""
    dtype = torch.bfloat16 if cfg.train.precision == "bf16" else torch.float32
    alone = parallel.World(0, 1, torch.device("cpu"), dtype)
    return bench_memory.tensors_at_the_peak(cfg, alone, steps=1)


@pytest.mark.parametrize(
    "model, micro, accumulation, precision, at",
    [
        (Model(vocab_size=256, seq_len=128, d_model=128, n_layers=4, n_heads=4, d_ff=352), 4, 1, "fp32",
         "the last block goes backward"),
        (Model(vocab_size=30_000, seq_len=64, d_model=96, n_layers=2, n_heads=3, d_ff=260,
               tie_embeddings=True), 2, 2, "fp32", "the loss is computed"),
        (Model(vocab_size=20_000, seq_len=30, d_model=208, n_layers=2, n_heads=2, d_ff=300), 2, 2, "fp32",
         "the loss is computed"),
        (Model(vocab_size=2000, seq_len=32, d_model=256, n_layers=4, n_heads=4, d_ff=1024, **PYTHIA), 2, 1,
         "fp32", "backward ends"),
        (Model(vocab_size=3000, seq_len=96, d_model=128, n_layers=3, n_heads=4, d_ff=352, qk_norm=True,
               norm_place="after"), 3, 2, "bf16", "the loss is computed"),
    ],
)  # fmt: skip
def test_the_peak_of_a_step_is_the_allocators(model, micro, accumulation, precision, at):
    cfg = small_config(model, micro, accumulation, precision)
    says = memory.peak(cfg, 1, cuda=False)
    assert says["at"] == at
    assert memory.total(says) == pytest.approx(allocated_at_the_peak(cfg), rel=0.02)


@pytest.mark.parametrize("every, accumulation", [(1, 2), (2, 2), (4, 1)])
def test_the_peak_with_activation_checkpointing_is_the_allocators(every, accumulation):
    model = Model(vocab_size=512, seq_len=128, d_model=128, n_layers=6, n_heads=4, d_ff=352)
    cfg = small_config(model, 4, accumulation, "fp32", every)
    says = memory.total(memory.peak(cfg, 1, cuda=False))
    assert says == pytest.approx(allocated_at_the_peak(cfg), rel=0.05)


@pytest.mark.parametrize("rows, at", [(1, "the weights are updated"), (24, "the last block goes backward")])
def test_the_peak_with_muon_is_the_allocators(rows, at):
    model = Model(vocab_size=600, seq_len=32, d_model=192, n_layers=3, n_heads=4, d_ff=768)
    cfg = dataclasses.replace(small_config(model, rows, 1, "fp32"), optim=Optim(optimizer="muon"))
    says = memory.peak(cfg, 1, cuda=False)
    inner = 3 * (4 * 192**2 + 3 * 192 * 768)
    assert says["optimizer"] == 4 * (inner + 2 * (2 * 600 * 192 + 7 * 192)) and says["at"] == at
    assert memory.total(says) == pytest.approx(allocated_at_the_peak(cfg), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FSDP, every 2nd recomputed", "tensor parallel"])
def test_the_peak_of_two_processes_is_the_profilers(name):
    says = memory.total(bench_memory.planned(name, "cpu"))
    assert says == pytest.approx(bench_memory.peak(name, "cpu"), rel=0.05)


@pytest.mark.slow
def test_the_peak_of_a_process_is_within_15_per_cent():
    for name in bench_memory.SHAPES:
        says = memory.total(bench_memory.planned(name, "cpu"))
        assert says == pytest.approx(bench_memory.peak(name, "cpu", steps=2), rel=0.15), name


def test_constants_that_other_files_have_too_are_the_same():
    assert (memory.LOGITS_BYTES, memory.LOGITS_BYTES_CUDA) == (loss.LOGITS_BYTES, loss.LOGITS_BYTES_CUDA)


def test_processes_stand_in_a_mesh():
    """(replicate, shard, tp), worked out by hand."""
    for spread, processes, expected in (
        ({}, 6, (6, 1, 1)),
        ({"tp": 2}, 8, (4, 1, 2)),
        ({"strategy": "fsdp"}, 24, (1, 24, 1)),
        ({"strategy": "fsdp", "shard": 4}, 24, (6, 4, 1)),
        ({"strategy": "fsdp", "shard": 3, "tp": 2}, 24, (4, 3, 2)),
    ):
        assert consistency.mesh_shape(Parallel(**spread), processes) == expected
    for spread, processes, message in (
        ({"tp": 2}, 3, "3 process.es. do not divide by parallel.tp=2"),
        ({"shard": 2}, 8, "needs parallel.strategy='fsdp'"),
        ({"strategy": "fsdp", "shard": 3, "tp": 2}, 8, "does not divide 4 process.es. .8 / parallel.tp=2."),
    ):
        with pytest.raises(ConfigError, match=message):
            consistency.mesh_shape(Parallel(**spread), processes)


def amber(batch: int = 2240, every: int = 0, **spread) -> Config:
    train = Train(batch_size=batch, micro_batch_size=10, activation_checkpointing=every)
    return Config(model=AMBER.resolved(), train=train, parallel=Parallel(**spread))


ON_CUDA = memory.How(cuda=True, compiled=True, bf16=True)


def test_fsdp_divides_what_stands_and_checkpointing_keeps_one_stream_a_block():
    P = 6_738_415_616
    whole, shard = (memory.peak(amber(strategy=s), 8, cuda=True) for s in ("ddp", "fsdp"))
    for kind, numbers in (("weights", 1), ("gradients", 1), ("optimizer", 2)):
        assert (whole[kind], shard[kind]) == (4 * P * numbers, 4 * P * numbers / 8)
    assert whole["activations"] == shard["activations"] > 85 * 2**30
    n, layer = 20_480, memory.kept_by_layer(AMBER, 20_480, ON_CUDA)
    # per token: the block's input 4 D; o_proj's output 2 D; two cast inputs 2 x 2 D; q, k, v, output 4 x 2 D;
    # log-sum 4 H; gate, up, product 3 x 2 F; a root mean square of each norm 2 x 4
    assert layer == n * (18 * 4096 + 4 * 32 + 6 * 11008 + 8)
    rest = n * (4 * 4096 + 4) + 4 * 2048 * 128
    assert planned_to_be_kept(AMBER, 10, True, 0, cuda=True, compile="on") == 32 * layer + rest
    assert planned_to_be_kept(AMBER, 10, True, 1, cuda=True) == 32 * n * 4 * 4096 + rest
    # every third of 32 blocks from the first on is 11 of them
    assert (
        planned_to_be_kept(AMBER, 10, True, 3, cuda=True, compile="on")
        == 11 * n * 4 * 4096 + 21 * layer + rest
    )


def test_selective_recompute_keeps_what_matmuls_and_attention_made():
    # per token: the stream 4 D; q, k, v and attention's output 4 x 2 D, its log-sum 4 H; o_proj's output 2 D;
    # gate and up 2 x 2 F
    token = 14 * 4096 + 4 * 32 + 4 * 11008
    assert memory.kept_by_layer(AMBER, 20_480, ON_CUDA, selective=True) == 20_480 * token
    outer = planned_to_be_kept(AMBER, 10, True, 1, cuda=True) - 32 * 20_480 * 4 * 4096
    assert (
        planned_to_be_kept(AMBER, 10, True, "selective", cuda=True, compile="on")
        == 32 * 20_480 * token + outer
    )
    # two of grouped queries' heads are keys and values; tensor parallel splits tokens and heads
    grouped = dataclasses.replace(AMBER, n_kv_heads=8, ffn="gelu", norm_place="after")
    token = 4 * 4096 + 2 * 2 * 4096 + 2 * (2 * 4096 + 2 * 1024) + 4 * 32 + 2 * 11008
    assert memory.kept_by_layer(grouped, 4096, ON_CUDA, tp=2, selective=True) == 2048 * token


def test_hsdp_divides_by_the_gpus_of_one_copy():
    hsdp, P = memory.peak(amber(strategy="fsdp", shard=8, every=1), 32, cuda=True), 6_738_415_616
    assert (hsdp["weights"], hsdp["gradients"], hsdp["optimizer"]) == (P / 2, P / 2, P)
    one_node = memory.peak(amber(strategy="fsdp", every=1), 8, cuda=True)
    assert hsdp == one_node  # also by accumulation: 7 micro-batches of 10 rows, and 28
    assert cost.accumulation(amber(strategy="fsdp", shard=8), 32) == 7


def test_weights_that_stay_gathered_are_let_go_block_by_block_in_backward():
    kept = memory.peak(amber(80, 1, strategy="fsdp", reshard=False), 8, cuda=True)
    gone = memory.peak(amber(80, 1, strategy="fsdp"), 8, cuda=True)
    # BF16: 31 blocks, embedding, head and final norm, the head's gradient; FP32: the last block's gradients
    block = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert kept["at"] == "block 31 of 32 goes backward"
    assert kept["copies"] == 2 * (31 * block + 3 * 32000 * 4096 + 4096) + 4 * block
    assert gone["copies"] < 0.25 * kept["copies"]


def test_tensor_parallel_divides_matrices_and_tokens_but_not_embedding_head_and_norms():
    says = memory.peak(amber(tp=4, strategy="fsdp"), 8, cuda=True)
    matrices, whole = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 2 * 32000 * 4096 + 65 * 4096
    assert says["weights"] == 4 * (matrices / 4 + whole) / 2 and says["optimizer"] == 2 * says["weights"]
    n = 20_480
    # the two cast inputs of the matrices are of all tokens; the rest is a quarter
    layer = n * (4 * 4096 + (14 * 4096 + 4 * 32 + 6 * 11008 + 8) / 4)
    assert memory.kept_by_layer(AMBER, n, ON_CUDA, tp=4) == layer
    assert cost.accumulation(amber(tp=4), 8) == 112  # two copies of the data's share


# Peaks of real steps on one NVIDIA H200: bytes that PyTorch's allocator had at the most.
SHAPE_124M = {"seq_len": 1024, "d_model": 768, "n_layers": 12, "n_heads": 12, "d_ff": 2048}
ONE_BILLION = {"d_model": 2048, "n_layers": 16, "n_kv_heads": 8, "d_ff": 8192, "tie_embeddings": True}
SEVEN_BILLION = {"vocab_size": 32000, "n_layers": 3}  # three of its layers


@pytest.mark.parametrize(
    "shape, micro, accumulation, every, residual, measured",
    [
        (SHAPE_124M, 32, 1, 0, "fp32", 13.848e9),  # this and the next eight: 2026-11-26, torch 2.11
        (ONE_BILLION, 4, 1, 0, "fp32", 27.061e9),
        (ONE_BILLION, 4, 4, 0, "fp32", 31.368e9),
        (SEVEN_BILLION, 2, 1, 0, "fp32", 14.683e9),
        (SEVEN_BILLION, 2, 4, 0, "fp32", 18.161e9),
        (SEVEN_BILLION, 2, 1, "selective", "fp32", 14.117e9),
        (SEVEN_BILLION, 4, 2, "selective", "fp32", 18.186e9),
        (SEVEN_BILLION, 2, 1, 1, "fp32", 14.117e9),
        (SEVEN_BILLION, 2, 4, 0, "bf16", 18.060e9),
    ],
)
def test_planned_memory_is_within_one_per_cent_of_an_h200s(
    shape, micro, accumulation, every, residual, measured
):
    model = Model(**{"vocab_size": 50304, **shape})
    train = Train(
        batch_size=micro * accumulation, micro_batch_size=micro, activation_checkpointing=every,
        residual=residual,
    )  # fmt: skip
    planned = memory.total(memory.peak(Config(model=model.resolved(), train=train), 1, cuda=True))
    assert planned == pytest.approx(measured, rel=0.01)


# The same by configs and GiB, with an earlier loss (2026-11-26, commit 890c4d3)
@pytest.mark.parametrize(
    "name, batch, micro, every, measured",
    [
        ("124m", 128, 64, 0, 23.5),
        ("1b", 32, 8, 0, 39.9),
        ("7b", 10, 10, 1, 103.1),
        ("7b", 8, 2, 0, 131.8),
        ("7b", 8, 4, 2, 128.2),
    ],
)
def test_planned_memory_is_within_five_per_cent_of_an_h200s(name, batch, micro, every, measured):
    sizes = (f"--train.batch_size={batch}", f"--train.micro_batch_size={micro}")
    cfg = config.load(name, [*sizes, f"--train.activation_checkpointing={every}"])
    assert memory.total(memory.peak(cfg, 1, cuda=True)) / 2**30 == pytest.approx(measured, rel=0.05)


# ---- what fits --------------------------------------------------------------------------------------------


def run(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "plan.py", *argv], capture_output=True, text=True, cwd="/")


def test_what_does_not_fit_is_refused_with_a_change_that_fits():
    bare = ("--parallel.strategy=ddp", "--train.activation_checkpointing=0")
    refused = run("7b", "--gpus", "8", "--gpu", "a100-80gb", *bare)
    assert refused.returncode == 2 and "does not fit" in refused.stdout and "Traceback" not in refused.stderr
    flags = refused.stderr.strip().partition("it would with ")[2].split()
    assert flags == ["--train.micro_batch_size=5", "--parallel.strategy=fsdp"]
    assert run("7b", "--gpus", "8", "--gpu", "a100-80gb", *bare, *flags).returncode == 0


def change(model: Model, batch: int, micro: int, gpus: int, gpu: str) -> list[str]:
    cfg = Config(model=model.resolved(), train=Train(batch_size=batch, micro_batch_size=micro))
    assert not memory.fits(cfg, gpus, gpu)
    return memory.smallest_change(cfg, gpus, gpu)


def test_the_smallest_change_is_tried_in_order():
    small = Model(d_model=768, n_layers=12, n_heads=12, d_ff=2048, seq_len=1024)
    assert change(small, 512, 256, 2, "rtx-4090") == ["--train.micro_batch_size=32"]
    long = Model(d_model=1024, n_layers=24, n_heads=16, d_ff=2736, seq_len=2**17)  # one row is too much
    again, fsdp = "--train.activation_checkpointing=1", "--parallel.strategy=fsdp"
    assert change(long, 8, 1, 2, "a100-80gb") == [again]
    wide = Model(d_model=3072, n_layers=24, n_heads=24, d_ff=8192, seq_len=256)
    assert change(wide, 8, 1, 8, "a100-40gb") == [fsdp]
    assert change(AMBER, 2048, 1, 2, "a100-80gb") == [fsdp]
    large, grouped = (config.load(f"llama-{name}").model for name in ("1-65b", "2-70b"))
    fewer = "--train.micro_batch_size=1"
    assert change(large, 2048, 2, 8, "a100-80gb") == [fewer, again, fsdp, "--gpus=16"]
    assert change(grouped, 2048, 2, 8, "a100-80gb") == [again, fsdp, "--gpus=32"]
    assert change(config.load("llama-3.1-405b").model, 1, 1, 1, "rtx-4090") == []


def test_where_nothing_else_fits_tensor_parallel_is_tried_and_quickly():
    began = time.perf_counter()
    refused = run("llama-3.1-405b", "--gpus", "8", "--gpu", "h100-80gb")
    assert refused.returncode == 2 and time.perf_counter() - began < 5  # under one second, if nobody else
    flags = refused.stderr.strip().partition("it would with ")[2].split()
    assert [flag.partition("=")[0] for flag in flags] == ["--parallel.tp", "--gpus"]
    assert run("llama-3.1-405b", "--gpu", "h100-80gb", *flags).returncode == 0
    cfg, (tp, gpus) = config.load("llama-3.1-405b"), (int(flag.partition("=")[2]) for flag in flags)

    def with_tp(n: int) -> Config:
        return memory.variant(cfg, "fsdp", 1, tp=n)

    # fewer GPUs or a narrower split do not do, and no number of GPUs without one
    assert not any(memory.fits(with_tp(n), gpus // 2, "h100-80gb") for n in (1, 2, 4, 8))
    assert not memory.fits(with_tp(tp // 2), gpus, "h100-80gb")
    assert not any(memory.fits(cfg, 8 << more, "h100-80gb") for more in range(9))
    began = time.perf_counter()
    assert memory.smallest_change(cfg, 1, "rtx-4090") == [] and time.perf_counter() - began < 1


def test_a_split_that_is_not_offered_is_not_advised():
    for name, offered in (("olmo2-7b", False), ("baichuan-13b", False), ("llama-1-7b", True)):
        assert memory.can_split(config.load(name), 2) is offered
    assert memory.can_split(config.load("llama-1-33b"), 4) and not memory.can_split(
        config.load("llama-1-33b"), 8
    )
    cfg = config.load("llama-1-7b", ["--parallel.tp=2", "--train.micro_batch_size=1"])
    with pytest.raises(ConfigError, match=r"d_model=4096 does not divide by 12 shards"):
        cost.accumulation(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, batch_size=24)), 24)


def test_sharding_over_a_node_is_widened_where_that_fits():
    cfg = config.load("llama-1-65b", ["--parallel.shard=8", "--train.micro_batch_size=1"])
    assert memory.smallest_change(cfg, 32, "a100-80gb") == ["--parallel.shard=0"]


# ---- what is chosen ---------------------------------------------------------------------------------------


def auto(name: str = "7b", micro: int = 0, recompute: int | str = "auto", *more: str) -> Config:
    asked = [f"--train.micro_batch_size={micro}", f"--train.activation_checkpointing={recompute}"]
    return config.load(name, [*asked, *more])


def pair(cfg: Config) -> tuple:
    return cfg.train.micro_batch_size, cfg.train.activation_checkpointing


@pytest.fixture
def easy_peak(monkeypatch, easy_constants):
    """Each row of a micro-batch needs 10 bytes, fewer with recompute."""

    def peak(cfg: Config, gpus: int, cuda: bool) -> dict:
        row = {0: 10, "selective": 6, 4: 8, 3: 7, 2: 5, 1: 2}[cfg.train.activation_checkpointing]
        return {"activations": row * cfg.train.micro_batch_size, "at": "once"}

    monkeypatch.setattr(memory, "peak", peak)


@pytest.mark.parametrize(
    "seq_len, micro, recompute, have, expected",
    [
        (450, 0, 0, 39, (2, 0)),  # 8 rows: micro-batches of 1, 2, 4 or 8; of 4 would need 40
        (450, 0, 1, 39, (8, 1)),
        (450, 4, "auto", 40, (4, 0)),
        (450, 4, "auto", 39, (4, "selective")),
        (450, 4, "auto", 23, (4, 2)),
        (450, 4, "auto", 19, (4, 1)),
        # 2 rows are 900 tokens: 1.5 x; selective: 4 rows, 1.25 x 1.03; every block: 8 rows, 1.125 x 1.27
        (450, 0, "auto", 25, (4, "selective")),
        # 9,000 tokens: 1.05 x; selective: 1.025 x 1.03
        (4500, 0, "auto", 25, (2, 0)),
        (4500, 0, "auto", 1, (1, 1)),  # nothing fits: what needs the least
        (450, 8, "auto", 1, (8, 1)),
        (450, 3, 2, 1, (3, 2)),  # nothing is to be chosen
    ],
)
def test_the_fastest_step_that_fits_is_chosen(easy_peak, seq_len, micro, recompute, have, expected):
    train = Train(batch_size=32, micro_batch_size=micro, activation_checkpointing=recompute)
    cfg = Config(model=Model(seq_len=seq_len).resolved(), train=train)
    assert pair(memory.chosen(cfg, 4, "h200", have)) == expected


@pytest.mark.parametrize("gpu", ["a100-40gb", "h100-80gb", "h200", "mi250x-gcd"])
@pytest.mark.parametrize(
    "gpus, spread", [(8, ["fsdp"]), (16, ["fsdp", "--parallel.shard=8"]), (8, ["fsdp", "--parallel.tp=2"])]
)
def test_a_choice_fits_and_divides_the_batch_and_one_step_more_does_not(gpu, gpus, spread):
    strategy, *more = spread
    asked = auto("7b", 0, 0, f"--parallel.strategy={strategy}", *more)
    made = memory.chosen(asked, gpus, gpu)
    rows = cost.accumulation(made, gpus) * made.train.micro_batch_size
    assert rows == 2240 / (gpus / made.parallel.tp) and made.given == asked.given != ()
    assert memory.fits(made, gpus, gpu)
    larger = [n for n in range(made.train.micro_batch_size + 1, rows + 1) if rows % n == 0]
    assert not any(memory.fits(memory.with_choice(made, n, 0), gpus, gpu) for n in larger)


def test_what_fits_with_no_choice_is_refused_as_before():
    made = memory.chosen(auto(), 1, "h100-80gb")
    assert pair(made) == (1, 1)
    with pytest.raises(ConfigError, match=r"102.5 GiB where 75.1 are usable; it would with --gpus=2"):
        memory.check(made, 1, "h100-80gb")
    with pytest.raises(ConfigError, match=r"does not divide by train\.micro_batch_size=1 x 9 processes"):
        memory.chosen(auto(), 9, "h200")


def test_the_plan_says_what_it_chose(capsys):
    plan.main(
        [
            "7b",
            "--gpu=h200",
            "--gpus=1",
            "--train.micro_batch_size=0",
            "--train.activation_checkpointing=auto",
        ]
    )
    shown, made = capsys.readouterr().out, memory.chosen(auto(), 1, "h200")
    said = shown[shown.index("Chosen: ") :].replace("\n  ", " ")
    said = said[: said.index(".\n")].removeprefix("Chosen: ")
    assert said == memory.about_choice(made, 1, "h200")
    assert said.startswith(f"micro-batches of {made.train.micro_batch_size} rows, ")
    assert said.endswith(" GiB; usable are 132.71, which is 95% of the memory")
    assert "> " in shown and number(shown, "gradient accumulation") == 2240 / made.train.micro_batch_size
    assert all(len(line) <= 110 for line in shown.splitlines())
    plan.main(["7b", "--gpu=h200"])
    assert "Chosen" not in capsys.readouterr().out


def test_recompute_in_words():
    words = {0: "nothing recomputed", 1: "every block recomputed", 2: "every second block recomputed"}
    words |= {3: "every third block recomputed", 4: "every 4th block recomputed"}
    words["selective"] = "all but matmuls and attention recomputed"
    assert {kind: memory.about_recompute(kind) for kind in words} == words


# ---- steps, chunks, checkpoints ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [[], ["--train.steps=17"], ["--train.checkpoint_every=4", "--train.checkpoint_powers_of_two=true"],
     ["--train.batch_size=15", "--train.checkpoint_chunks=false", "--train.checkpoint_powers_of_two=true"],
     ["--train.batch_double_tokens=1000", "--train.batch_size_max=24"]],
)  # fmt: skip
def test_steps_and_checkpoints_are_those_that_train_makes(recipe, overrides, tmp_path, monkeypatch):
    cfg = config.load(str(recipe), [f"--run={tmp_path / 'run'}", *overrides])
    when, dataset = cost.schedule(cfg), Dataset(cfg.dataset)
    assert when.steps.n_rows == dataset.n_rows
    if not cfg.train.batch_double_tokens:
        assert when.steps.n_steps == dataset.n_rows // cfg.train.batch_size
    assert when.last_step == min(cfg.train.steps or when.steps.n_steps, when.steps.n_steps)
    monkeypatch.setattr(train.signal, "signal", lambda number, handler: None)  # Ctrl-C stays pytest's
    train.train(cfg)
    assert when.checkpoints == [c.step for c in run_folder.checkpoints(cfg.run)]


def test_chunks_end_where_data_would_end_them_also_before_there_is_a_dataset(recipe):
    cfg = config.load(str(recipe))
    dataset = Dataset(cfg.dataset)
    chunks = [tuple(dataset.chunk_range(chunk)) for chunk in range(dataset.n_chunks)]
    assert cost.schedule(cfg, tokens=dataset.n_rows * 24).chunks == cost.schedule(cfg).chunks == chunks
    elsewhere = dataclasses.replace(cfg, dataset="nowhere")
    assert cost.schedule(elsewhere) is None
    with_tokens = dataclasses.replace(cfg.data, expected_tokens=dataset.n_rows * 24 + 23)
    assert cost.schedule(dataclasses.replace(elsewhere, data=with_tokens)).chunks == chunks


def test_a_dataset_that_does_not_suit_is_refused(recipe):
    with pytest.raises(ConfigError, match=r"rows of 24 tokens and model\.seq_len=32"):
        cost.schedule(config.load(str(recipe), ["--model.seq_len=32"]))
    with pytest.raises(ConfigError, match=r"4 steps .* fewer than data\.n_chunks=5"):
        cost.schedule(config.load(str(recipe)), tokens=24 * 6 * 4)


@pytest.mark.parametrize("more", [[], ["--train.on_incident=rollback", "--train.rollback_steps=5"]])
def test_what_keep_others_leaves_is_planned_as_it_is_left(recipe, tmp_path, monkeypatch, more):
    monkeypatch.setattr(train.signal, "signal", lambda number, handler: None)  # Ctrl-C stays pytest's
    asked = ["--train.checkpoint_every=2", "--train.keep_others=3", "--train.steps=33", *more]
    cfg = config.load(str(recipe), [f"--run={tmp_path / 'run'}", *asked])
    when = cost.schedule(cfg)
    train.train(cfg)
    on_disk = [c.step for c in run_folder.checkpoints(cfg.run)]
    assert when.on_disk == on_disk and len(on_disk) < len(when.checkpoints)
    shown = run(str(recipe), *asked).stdout
    size, n = cost.disk(cfg, len(on_disk)), len(on_disk)
    assert f"all {n} checkpoints" in shown and plan.big(size["all"], "B") in shown
    assert f"Of {len(when.checkpoints)} that are saved, train.keep_others=3 deletes the rest" in shown


def test_annealing_is_planned_from_its_origin(recipe, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(train.signal, "signal", lambda number, handler: None)
    origin = run_folder.checkpoints(whole)[2]
    asked = ["--optim.anneal_steps=7", "--train.checkpoint_every=3", f"--init_from={origin.path}"]
    cfg = config.load(str(recipe), [f"--run={tmp_path / 'run'}", *asked])
    when = cost.schedule(cfg)
    assert (when.begin, when.last_step, when.assumed) == (origin.step, origin.step + 7, "")
    train.train(cfg)
    found = run_folder.checkpoints(cfg.run)
    assert when.checkpoints == when.on_disk == [c.step for c in found]
    speed = ["--tokens-per-second-per-gpu=0.1", "--watts=30"]
    shown = run(str(recipe), *asked, *speed).stdout
    assert number(shown, "steps") == 7 and number(shown, "tokens") == 7 * 6 * 24
    assert number(shown, "hours") == pytest.approx(7 * 6 * 24 / 0.1 / 3600, abs=0.1)
    assert f"Steps {origin.step} to {origin.step + 7}, annealing" in shown and "which has no" not in shown
    # all of them have moments, that of the origin's step, too
    size = cost.disk(cfg, len(found), when.begin)
    assert size["all"] == len(found) * (size["weights"] + size["optimizer"])
    assert size["all"] == sum(
        sum(math.prod(t.shape) * 4 for file in ("model", "optimizer") for name, t in tensors(c.path / file))
        for c in found
    )
    # of a run, the newest; of what is not here, by its name, or as late as the data allow
    n_steps = when.steps.n_steps
    for init_from, begin, assumed in (
        (whole, n_steps, ""),
        ("/nowhere/step-00000009", 9, "is taken from its name"),
        ("/nowhere/mine", n_steps - 7, "as late as the data allow"),
    ):
        other = dataclasses.replace(cfg, init_from=str(init_from))
        if begin + 7 > n_steps:
            with pytest.raises(ConfigError, match=f"after the origin's step {n_steps} there are data for 0"):
                cost.schedule(other)
            continue
        found = cost.schedule(other)
        assert found.begin == begin and found.last_step == begin + 7 and assumed in found.assumed


def tensors(stem: Path) -> list[tuple[str, torch.Tensor]]:
    """Names and tensors of weights or moments: of moments, those as large as their parameter."""
    with safetensors.safe_open(f"{stem}.safetensors", "pt") as file:
        found = [(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118, it is no dict
    return [(name, tensor) for name, tensor in found if tensor.ndim and tensor.dtype == torch.float32]


def test_the_plan_says_how_much_of_a_schedule_is_made_and_refuses_a_warm_up_that_never_ends(recipe):
    n_steps = cost.schedule(config.load(str(recipe))).steps.n_steps
    for asked, said in (
        ([], f"Steps 0 to {n_steps}, the whole schedule."),
        (["--train.steps=12"], f"Steps 0 to 12 of a schedule of {n_steps} steps (train.steps ends it early;"),
        (["--train.steps=12", "--optim.schedule_steps=12"], "Steps 0 to 12, the whole schedule."),
        (["--train.steps=3"], "It ends inside the warm-up of 4 steps, at 50.0% of the peak learning rate."),
        (["--optim.schedule_steps=99"], f"{n_steps} of a schedule of 99 steps (the data end before it;"),
    ):
        shown = run(str(recipe), *asked)
        assert shown.returncode == 0 and said in shown.stdout, shown
        assert all(len(line) <= 110 for line in shown.stdout.splitlines())
    refused = run(str(recipe), "--optim.warmup_steps=2000")
    assert refused.returncode == 2 and f"--optim.warmup_steps={n_steps // 10}, a tenth" in refused.stderr


def test_a_schedule_of_tokens_is_whole_where_less_than_a_batch_of_it_is_left():
    cfg = config.load("olmo-65b")
    when = cost.schedule(cfg)
    assert cost.about_schedule(cfg, when.steps, when.steps.n_steps, when.last_step) == ", the whole schedule"
    tokens = when.steps.consumed(when.last_step - 1) * 2048
    early = cost.about_schedule(cfg, when.steps, when.steps.n_steps, when.last_step - 1)
    assert early.startswith(f", {tokens:,} tokens of a schedule of 2,000,000,000,000 tokens (")


def test_a_batch_that_doubles_is_planned_with_its_own_steps():
    # 240 rows of 24 tokens: 6 a step until 60 rows have been seen, 12 until 120, 24 to the end
    cfg = Config(
        model=Model(**SMALL | dict(seq_len=24)).resolved(),
        train=Train(batch_size=6, micro_batch_size=2, batch_double_tokens=60 * 24, batch_size_max=24),
        data=config.Data(n_chunks=4, expected_tokens=240 * 24),
        dataset="nowhere",
    )
    when = cost.schedule(cfg)
    assert when.steps.phases == [(0, 0, 6), (10, 60, 12), (15, 120, 24)]
    assert when.steps.n_steps == when.last_step == 10 + 5 + 5
    assert when.chunks == [(0, 60), (60, 120), (120, 180), (180, 240)]
    # 60 rows beyond the 15th step are two and a half batches of 24
    assert when.checkpoints == [0, 10, 15, 18, 20] and when.steps.consumed(20) == 240
    short = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=12))
    assert cost.schedule(short).checkpoints == [0, 10, 12] and when.steps.consumed(12) == 60 + 2 * 12


def test_amber_has_762_steps_a_chunk_and_a_remainder():
    when = cost.schedule(config.load("7b", ["--dataset=nowhere"]), tokens=360 * 1_706_976 * 2048)
    assert when.steps.n_rows == 360 * 1_706_976
    assert divmod(when.steps.n_steps, 360) == (762, 15) and len(when.checkpoints) == 361
    size = cost.disk(amber(), 361)
    assert size["weights"] == 4 * 6_738_415_616 and size["optimizer"] == 8 * 6_738_415_616
    assert size["all"] == 361 * size["weights"] + 360 * size["optimizer"]


def test_a_checkpoint_on_disk_is_as_large_as_planned(tmp_path):
    model = Model(**{**SMALL, "n_kv_heads": 4, "tie_embeddings": True, "d_model": 128, "n_layers": 2})
    net = Transformer(model)
    net.init_weights(0)
    adamw = optim.adamw(net, config.Optim())
    net(torch.zeros(1, 9, dtype=torch.long), torch.zeros(1, 9, dtype=torch.long)).backward()
    adamw.step()
    folder = conftest.save(tmp_path, net, [adamw], {"step": 1}, {})
    size = cost.disk(Config(model=model), 1)
    for name, planned in (("model", size["weights"]), ("optimizer", size["optimizer"])):
        on_disk = (folder / f"{name}.safetensors").stat().st_size
        assert planned < on_disk < planned + 20_000  # names and shapes, and the random state


def test_a_save_copies_12_bytes_a_parameter_to_the_hosts():
    P = 6_738_415_616
    # 26.95 GB of weights in 6 files of 5 GB, and 53.91 GB of moments in 11
    assert cost.saving(amber(), 8) == (12 * P, 8) and cost.saving(amber(), 224) == (12 * P, 17)
    muon = dataclasses.replace(amber(), optim=Optim(optimizer="muon"))
    assert cost.saving(muon, 1) == (12 * P - 4 * 32 * (4 * 4096**2 + 3 * 4096 * 11008), 1)


# ---- planned speed ----------------------------------------------------------------------------------------


def speed_config(name: str, micro: int, recompute: int | str) -> Config:
    return config.load(
        name, [f"--train.micro_batch_size={micro}", f"--train.activation_checkpointing={recompute}"]
    )


@pytest.fixture
def easy_constants(monkeypatch):
    for name, value in (("SMALL", 450), ("RECOMPUTE", 0.27), ("SELECTIVE", 0.03)):
        monkeypatch.setattr(cost, name, value)


def test_small_micro_batches_and_recompute_slow_a_step_down_by_hand(easy_constants):
    assert cost.slowdown(4500, 0, 32) == pytest.approx(1.1)  # as long as 4,950 tokens
    assert cost.slowdown(4500, 1, 32) == pytest.approx(1.1 * 1.27)
    assert cost.slowdown(9000, 2, 32) == pytest.approx(1.05 * 1.135)
    assert cost.slowdown(10**9, 3, 32) == pytest.approx(1 + 0.27 * 11 / 32)  # blocks 0, 3 ... 30
    assert cost.slowdown(10**9, 40, 32) == pytest.approx(1 + 0.27 / 32)
    assert cost.slowdown(10**9, "selective", 32) == pytest.approx(1.03)
    with pytest.raises(ValueError, match=r"train\.activation_checkpointing='auto'"):
        cost.slowdown(4500, "auto", 32)


# Measured on one H200 (benchmarks/README.md); only the first three are in the table.
@pytest.mark.parametrize(
    "name, micro, recompute, mfu, within",
    [("124m", 256, 0, 47.2, 0.05), ("1b", 4, 0, 54.6, 0.05), ("7b", 2, 0, 54.5, 0.05), ("7b", 4, 2, 50.8, 1),
     ("7b", 10, 1, 46.2, 1)],
)  # fmt: skip
def test_the_planned_mfu_is_the_measured_one(name, micro, recompute, mfu, within):
    for gpu in ("h200", "NVIDIA H200", "h100-80gb"):
        planned, _ = cost.planned_mfu(speed_config(name, micro, recompute), gpu)
        assert 100 * planned == pytest.approx(mfu, abs=within)


def test_between_two_sizes_the_mfu_is_linear_in_the_logarithm(monkeypatch, easy_constants):
    cfg = speed_config("7b", 2, 0)
    rows = [
        cost.Measured("ampere", 6_738_415_616 / 10, 4500, 0, 0.4, "a tenth"),  # 0.44 in endless micro-batches
        cost.Measured("ampere", 6_738_415_616 * 100, 9000, 1, 0.3, "a hundred"),  # 0.3 x 1.05 x 1.27 = 0.40
        cost.Measured("hopper", 5e9, 4096, 0, 0.9, "another generation"),
    ]
    monkeypatch.setattr(cost, "MEASURED", rows)
    planned, near = cost.planned_mfu(cfg, "a100-80gb")
    expected = (0.44 * 2 + 0.40005) / 3 / (1 + 450 / 4096)
    assert planned == pytest.approx(expected) and [row.source for row in near] == ["a tenth", "a hundred"]
    # beyond the smallest and the largest it is theirs
    small, large = speed_config("124m", 64, 0), speed_config("llama-3.1-405b", 1, 0)
    assert cost.planned_mfu(small, "a100-80gb") == (pytest.approx(0.44 / (1 + 450 / 65_536)), rows[:1])
    rows[1] = rows[1]._replace(parameters=1e10)
    assert cost.planned_mfu(large, "a100-80gb") == (pytest.approx(0.40005 / (1 + 450 / 8192)), rows[1:2])


def test_every_gpu_is_planned_by_its_generation():
    generations = {
        "h100": "hopper",
        "h200": "hopper",
        "a100": "ampere",
        "rtx": "ampere",
        "mi2": "cdna",
        "mi3": "cdna",
    }
    for name in hardware.GPUS:
        _, near = cost.planned_mfu(config.load("7b"), name)
        assert near[0].gpus == generations[name[: 4 if name[0] in "ha" else 3]], name
    for device, generation in (
        ("NVIDIA H100 PCIe", "hopper"), ("NVIDIA A100-SXM4-80GB", "ampere"), ("AMD Instinct MI300X", "cdna"),
        ("NVIDIA GeForce RTX 4090", "ampere"), ("NVIDIA B200", "hopper"),
    ):  # fmt: skip
        assert cost.planned_mfu(config.load("7b"), device)[1][0].gpus == generation


# ---- time, energy, money ----------------------------------------------------------------------------------


def test_hours_of_published_runs_from_their_published_speed():
    assert cost.hours(1.2585e12, 2600, 224) / 24 == pytest.approx(
        25.0, abs=0.05
    )  # Amber, LLM360 section 4.1.2
    assert cost.hours(1e12, 3370, 1) == pytest.approx(82_432, rel=1e-3)  # LLaMA-7B, GPU-hours
    assert cost.hours(2e12, 3014, 1) == pytest.approx(184_320, rel=1e-3)  # LLaMA-2 7B
    assert cost.hours(300e9, 24_000, 1) == pytest.approx(3456, rel=0.01)  # TinyLlama: "24 k"
    assert cost.hours(1.4e12, 380, 2048) / 24 == pytest.approx(21, abs=0.3)  # LLaMA-65B: "21 days"


# OLMo, table 8: MWh, PUE, kg CO2 a kWh and tonnes
@pytest.mark.parametrize(
    "mwh, pue, intensity, tonnes, places",
    [(104, 1.1, 0.610, 69.78, 1), (104, 1.1, 0.656, 75.05, 1), (33, 1.1, 0.385, 14, 0),
     (74, 1.1, 0.385, 31, 0), (433, 1.2, 0.057, 30, 0), (1066, 1.08, 0.330, 380, 0), (135, 1.1, 0.0, 0, 0)],
)  # fmt: skip
def test_carbon_of_published_runs(mwh, pue, intensity, tonnes, places):
    assert round(cost.tonnes_co2(mwh, pue, intensity), places) == round(tonnes, places)


def test_energy_of_llama_is_the_boards_limit_times_its_gpu_hours():
    assert round(cost.megawatt_hours(82_432, hardware.GPUS["a100-80gb"].watts)) == 33
    assert round(cost.megawatt_hours(184_320, hardware.GPUS["a100-80gb"].watts)) == 74


# ---- the command ------------------------------------------------------------------------------------------


def number(report: str, name: str) -> float:
    line = next(line for line in report.splitlines() if line.startswith(f"  {name}  "))
    return float(line[30:46].replace(",", "").rstrip("%"))


def test_the_report_of_amber_at_its_own_speed():
    shown = run(
        "7b", "--gpus", "224", "--price=2", "--tokens=1.2585e12",
        "--tokens-per-second-per-gpu=2600",
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("7b on 224 x a100-80gb, FSDP, every block recomputed")
    assert number(shown.stdout, "total") == 6_738_415_616
    assert number(shown.stdout, "tokens a step") == 4_587_520
    assert number(shown.stdout, "gradient accumulation") == 1
    assert number(shown.stdout, "MFU, attention counted") == 36.4 and "33.7% by 6N" in shown.stdout
    assert number(shown.stdout, "hours") == pytest.approx(25.0 * 24, abs=1)
    assert number(shown.stdout, "GPU-hours") == pytest.approx(25.0 * 24 * 224, rel=1e-3)
    assert number(shown.stdout, "money") == pytest.approx(2 * number(shown.stdout, "GPU-hours"), abs=1)
    assert all(len(line) <= 110 for line in shown.stdout.splitlines())


def test_an_assumed_mfu_gives_the_speed_that_has_it_and_says_so():
    shown = run("124m", "--gpus=1", "--mfu=0.5", "--train.micro_batch_size=16", "--tokens=1e10")
    flops = sum(cost.flops_per_token(config.load("124m").model).values())
    assert number(shown.stdout, "tokens a second a GPU") == pytest.approx(0.5 * 312e12 / flops, abs=1)
    assert number(shown.stdout, "MFU, attention counted") == 50.0 and "   stated; " in shown.stdout
    assert "MFU planned from" not in shown.stdout
    shown = run("124m", "--gpus=1", "--gpu=h200", "--train.micro_batch_size=256", "--tokens=1e10").stdout
    assert number(shown, "MFU, attention counted") == 47.2 and "   planned; " in shown
    assert "MFU planned from 47.2% at 0.124 B (ours, one H200, 2026-11-26)." in shown
    assert number(shown, "tokens a second a GPU") == pytest.approx(0.472 * 989e12 / flops, rel=1e-3)


def test_a_cpu_has_no_peak_and_needs_a_speed(recipe):
    assert "No peak is known for a CPU" in run(str(recipe)).stdout
    shown = run(str(recipe), "--tokens-per-second-per-gpu=1500", "--watts=30", "--gpus=2").stdout
    assert number(shown, "hours") == pytest.approx(number(shown, "tokens") / 3000 / 3600, abs=0.1)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["7b", "--gpuz=8"], "did you mean 'gpu'?"),
        (["7b", "--optim.lrr=1"], "did you mean 'optim.lr'?"),
        (["7b", "8"], "'8' is not an override"),
        (["7b", "--mfu=40"], "40 % is 0.4"),
        (["124m", "--tokens-per-second-per-gpu=1e7"], "more than 312 TFLOP/s allow"),
        (["7b", "--gpus=0"], "--gpus=0 must be a number above 0"),
        (["7b", "--tokens=nan"], "--tokens=nan must be a number above 0"),
        (["7b", "--mfu=0.4", "--tokens-per-second-per-gpu=9"], "keep one"),
        (["7b", "--gpus=9"], "does not divide"),
        (["7b", "--pue=0.9"], "at least 1"),
        (["demo", "--mfu=0.4"], "no peak is known for a CPU"),
        (["demo", "--strategy=fsdp"], "did you mean 'parallel.strategy'?"),
        (["7b", "--parallel.tp=3"], "does not divide by parallel.tp=3"),
        (["1b", "--parallel.shard=4"], "parallel.shard=4 needs parallel.strategy='fsdp'"),
        (["nothing"], "no config 'nothing'"),
    ],
)
def test_mistakes_are_named_in_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as ended:
        plan.main(argv)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_it_answers_at_once_and_without_torch():
    code = "import sys, plan; plan.main(['demo']); assert not {'torch', 'numpy'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("given", "gpus", "gpu"),
    [("h100", 8, "h100-80gb"), ("8xh100", 8, "h100-80gb"), ("H100", 8, "h100-80gb"), ("a100", 8, "a100-80gb"),
     ("16xA100-40GB", 16, "a100-40gb"), ("4090", 8, "rtx-4090"), ("mi250x", 8, "mi250x-gcd")],
)  # fmt: skip
def test_a_gpu_is_known_by_its_usual_names(given, gpus, gpu):
    _, args = plan.command_line(["7b", f"--gpu={given}", "--train.batch_size=1280"])
    assert (args.gpus, args.gpu) == (gpus, gpu)


def test_a_gpu_that_is_not_known_or_two_counts_are_errors():
    with pytest.raises(ConfigError, match="not known; did you mean 'h200'"):
        plan.command_line(["7b", "--gpu=h2000"])
    with pytest.raises(ConfigError, match="contradict"):
        plan.command_line(["7b", "--gpu=8xh100", "--gpus=4"])


def test_a_plan_for_gpus_that_nobody_asked_for_says_so(capsys):
    with pytest.raises(SystemExit) as end:
        plan.main(["demo", "--train.device=auto"])  # a batch of 16 rows, in micro-batches of 8, on 8 GPUs
    said = capsys.readouterr().err
    assert end.value.code == 2 and "8 x a100-80gb, which no flag asked for: --gpus 1, or --gpu cpu" in said
