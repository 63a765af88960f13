"""parallel.py: however a run is spread over processes, it learns what one process learns.

Groups of 2, 3 and 4 processes on the CPU (gloo), each started once, go through the variants below; what they
found is compared with one process in float64 (`exact`): the same modules on whole batches, cross-entropy on
whole logits.

The bound is not chosen, it is measured. Spreading a run changes nothing but the order in which numbers are
summed (rows, tokens, hidden values, shards), so in FP32 it may move a result by what the order of a sum is
worth, and no further. `noise` measures that in one process: the distance from float64 of the run that sums
all rows at once and of the one that sums them one by one, the larger of the two. A variant is another draw
from the same distribution, so it may be NOISES times as far from float64. In BF16 likewise.
"""

import dataclasses
import functools
import multiprocessing
import os
import time
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor

import consistency
import incidents
import optim
import parallel
import sharding
import train
from config import Config, ConfigError, Eval, Model, Optim, Parallel, Train
from model import Transformer

EOT, ROWS, STEPS, LR = 5, 12, 3, 1e-2

# Widths are pairwise different: D 36, queries 8 x 10 = 80, keys 4 x 10 = 40, F 56, V 89, T 32. Heads, F and
# T divide by 4 (tp), D by 2 (tp beside fsdp); F, V and queries not by 3: three processes hold uneven shards.
LLAMA = dict(vocab_size=89, seq_len=32, d_model=36, n_layers=2, n_heads=8, n_kv_heads=4, d_head=10, d_ff=56)
MODELS = {
    "llama": {},
    "pythia": dict(
        n_kv_heads=8, norm="layernorm", bias=True, parallel_residual=True, rope_fraction=0.4, ffn="gelu",
    ),
    "olmo": dict(norm="nonparametric_layernorm", tie_embeddings=True, clip_qkv=0.7),
    "olmo2": dict(norm_place="after", qk_norm=True),
    "crystal": dict(
        norm="layernorm", bias=True, tie_embeddings=True, rope_pairs="neighbours", rope_fraction=0.4,
        embedding_multiplier=1.7, logits_multiplier=2.3, init="mup", mup_base_width=9,
    ),
    "documents": dict(document_mask=True),
    "learned": dict(positions="learned", ffn="geglu", window=7),
    "alibi": dict(positions="alibi", ffn="relu2"),
}  # fmt: skip
# eps is no smaller than gradients are: else AdamW would turn the sign of a gradient that is nothing but
# rounding (a key's bias moves all scores of a query alike) into a whole step. The clip limits every step.
OPTIM = dict(lr=LR, eps=1e-2, weight_decay=0.3, grad_clip=0.4)


def make(model: str, settings: dict) -> Config:
    """A config from a name in MODELS and settings as on a command line: {"parallel.tp": 2}."""
    sections = {"model": LLAMA | MODELS[model], "optim": OPTIM, "train": dict(batch_size=ROWS, device="cpu")}
    for name, value in {"train.micro_batch_size": ROWS, **settings}.items():
        section, _, setting = name.partition(".")
        sections[section] = {**sections.get(section, {}), setting: value}
    kinds = {"model": Model, "optim": Optim, "train": Train, "parallel": Parallel}
    made = {section: kinds[section](**values) for section, values in sections.items()}
    return Config(name="spread", eval=Eval(prompt_tokens=8, continuation_tokens=8), **made).resolved()


def first_weights(cfg: Config) -> list[Tensor]:
    """Larger than the usual ones: attention is not flat, no bias is 0 and no norm's weight 1."""
    generator, out = torch.Generator().manual_seed(2), []
    with torch.device("meta"):
        model = Transformer(cfg.model, EOT)
    for name, p in model.named_parameters():
        value = torch.randn(p.shape, generator=generator)
        plain = 0.0 if name.endswith("bias") else 1.0
        out.append(plain + 0.3 * value if p.ndim == 1 else 0.9 * value / p.shape[1] ** 0.5)
    return out


def batches() -> list[Tensor]:
    """A batch a step, of documents of 6 tokens or so: (ROWS, T + 1)."""
    generator, shape = torch.Generator().manual_seed(3), (ROWS, LLAMA["seq_len"] + 1)
    rows = [torch.randint(LLAMA["vocab_size"], shape, generator=generator) for _ in range(STEPS)]
    ends = [torch.randint(6, shape, generator=generator) == 0 for _ in range(STEPS)]
    return [batch.masked_fill(end, EOT) for batch, end in zip(rows, ends)]


N_TOKENS = ROWS * LLAMA["seq_len"]  # of a batch


def loss_and_small_ids(model, rows: Tensor) -> dict[str, Tensor]:
    """The loss, and a count beside it."""
    return {**train.next_token_loss(model, rows), "small": (rows[:, 1:] < 20).sum()}


def learn(cfg: Config, world: parallel.World) -> dict[str, Tensor]:
    """STEPS updates as train.py makes them -> what came of it, the same on every process, by name.

    "loss" (STEPS), "norm" (STEPS), "norm of <layer>" (STEPS) and, of each parameter, how far it has moved.
    """
    model, optimizers = train.build(cfg, world, EOT)
    bare, start = sharding.bare(model), first_weights(cfg)
    world.fill(model, start)
    seen = {}
    for batch in batches():
        rows = batch[world.share(ROWS)]
        sums = train.forward_backward(model, rows, N_TOKENS, loss_and_small_ids, world, cfg)
        # tp - 1 neighbours have other tokens of the same rows: their losses add up as those of other rows do
        loss, small, norm = world.sum(sums["loss"], sums["small"], optim.grad_norm(model))
        assert small == pytest.approx((batch[:, 1:] < 20).sum().item())  # each target once
        norm /= world.size
        seen.setdefault("loss", []).append(loss / N_TOKENS)
        seen.setdefault("norm", []).append(norm)
        for layer, value in incidents.grad_norms_by_layer(bare).items():
            seen.setdefault(f"norm of {layer}", []).append(value)
        optim.update(model, optimizers, LR, norm, cfg.optim.grad_clip)
    out = {name: torch.tensor(values, dtype=torch.float64) for name, values in seen.items()}
    for (name, p), before in zip(bare.named_parameters(), start):
        out[name] = sharding.whole(p).detach().clone() - before
    return out


# ---- one process ------------------------------------------------------------------------------------------


@functools.cache
def exact(model: str, *optim_settings) -> dict[str, Tensor]:
    """`learn` in float64 and without train.py, loss.py or parallel.py."""
    cfg = make(model, dict(optim_settings))
    student, start = Transformer(cfg.model, EOT).double(), first_weights(cfg)
    with torch.no_grad():
        for p, value in zip(student.parameters(), start):
            p.copy_(value)
    incidents.shrink_embedding_gradient(student, cfg.optim.embedding_gradient)
    optimizers = optim.optimizers(student, cfg.optim, cfg.model.mup_scale)
    seen, single = {}, Tensor.float
    Tensor.float = Tensor.double  # what model.py keeps in FP32 whatever the precision
    student.stream_dtype = torch.float64
    try:
        for batch in batches():
            logits = student(batch[:, :-1]).flatten(0, 1)
            loss = F.cross_entropy(logits, batch[:, 1:].flatten())
            (loss + cfg.optim.z_loss * torch.logsumexp(logits, 1).square().mean()).backward()
            layers = {}
            for name, p in student.named_parameters():
                parts = name.split(".")
                layer = ".".join(parts[:2]) if parts[0] == "layers" else parts[0]
                layers[layer] = layers.get(layer, 0.0) + p.grad.square().sum().item()
            norm = sum(layers.values()) ** 0.5
            seen.setdefault("loss", []).append(loss.item())
            seen.setdefault("norm", []).append(norm)
            for layer, square in layers.items():
                seen.setdefault(f"norm of {layer}", []).append(square**0.5)
            for p in student.parameters():
                p.grad *= min(1.0, cfg.optim.grad_clip / (norm + 1e-6))
            for optimizer in optimizers:
                optim.set_lr(optimizer, LR)
                optimizer.step()
                optimizer.zero_grad()
    finally:
        Tensor.float = single
    out = {name: torch.tensor(values, dtype=torch.float64) for name, values in seen.items()}
    return out | {n: p.detach() - before for (n, p), before in zip(student.named_parameters(), start)}


@functools.cache
def noise(model: str, precision: str, *optim_settings) -> dict[str, float]:
    """How far from `exact` one process ends, of each result: all rows in one sum, or one by one."""
    out = {}
    for rows in (ROWS, 1):
        settings = {"train.micro_batch_size": rows, "train.precision": precision, **dict(optim_settings)}
        cfg = make(model, settings)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        found = learn(cfg, dataclasses.replace(parallel.alone(), dtype=dtype))
        apart = distances(found, exact(model, *optim_settings))
        out = {name: max(value, out.get(name, 0.0)) for name, value in apart.items()}
    return out


def distances(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The distance of each result, relative to its size: of a parameter, to how far it has moved."""
    assert list(found) == list(expected)
    return {
        name: ((found[name].double() - expected[name]).norm() / expected[name].norm()).item()
        for name in expected
    }


# ---- groups of processes ----------------------------------------------------------------------------------

DDP, FSDP, KEEP = {}, {"parallel.strategy": "fsdp"}, {"parallel.strategy": "fsdp", "parallel.reshard": False}
HSDP = {"parallel.strategy": "fsdp", "parallel.shard": 2}  # of four: two copies of two shards
TP2, TP4 = {"parallel.tp": 2}, {"parallel.tp": 4}
TP2_FSDP = TP2 | FSDP  # of four: two shards, of whose matrices each has half
BF16, MUON, COMPILE = {"train.precision": "bf16"}, {"optim.optimizer": "muon"}, {"train.compile": "on"}
SELECTIVE = {"train.activation_checkpointing": "selective"}
EVERY, FIRST = {"train.activation_checkpointing": 1}, {"train.activation_checkpointing": 2}  # of two blocks
SHAPED = {"optim.z_loss": 1e-2, "optim.embedding_gradient": 0.1}


def rows(n: int) -> dict:
    """Rows of a micro-batch."""
    return {"train.micro_batch_size": n}


# (processes, model, settings). A share is 12 / processes rows (tp neighbours have the same), in one or more
# micro-batches.
VARIANTS = {
    "ddp": (2, "llama", DDP),
    "ddp, muon": (2, "llama", DDP | MUON | rows(3)),
    "ddp, tied, z-loss": (2, "olmo", DDP | SHAPED | EVERY),
    "ddp, bf16": (2, "llama", DDP | BF16 | rows(3)),
    "fsdp": (2, "llama", FSDP),
    "fsdp, accumulating": (2, "crystal", FSDP | rows(2) | EVERY),
    "fsdp, bf16": (2, "llama", FSDP | BF16 | rows(3)),
    "fsdp, documents": (2, "documents", FSDP | SHAPED),
    "fsdp, compiled": (2, "llama", FSDP | COMPILE | FIRST),
    "ddp, selective": (2, "pythia", DDP | SELECTIVE | rows(3)),
    "fsdp, selective, compiled": (2, "olmo2", FSDP | COMPILE | SELECTIVE),
    "tp, selective": (2, "documents", TP2 | SELECTIVE),
    "tp": (2, "llama", TP2),
    "tp, documents": (2, "documents", TP2 | FIRST),
    "tp, bf16": (2, "pythia", TP2 | BF16),
    "ddp of 3": (3, "alibi", DDP | rows(1)),
    "fsdp of 3": (3, "llama", FSDP | rows(2)),
    "fsdp of 3, alibi": (3, "alibi", FSDP | EVERY),
    "ddp of 4": (4, "crystal", DDP | rows(1)),
    "fsdp of 4": (4, "olmo2", FSDP),
    "hsdp": (4, "llama", HSDP | rows(1)),
    "tp of 4": (4, "llama", TP4 | rows(6)),
    "tp in 2 copies": (4, "olmo", TP2 | SHAPED | rows(3)),
    "tp x fsdp": (4, "llama", TP2_FSDP | rows(3)),
    "tp x fsdp, tied": (4, "crystal", TP2_FSDP | KEEP | SHAPED | FIRST),
    "tp x fsdp, documents": (4, "documents", TP2_FSDP | EVERY),
}
# More of the same; and three through g++, half a minute of it. In the others torch.compile stops short of
# that: what is captured, in which order hooks run and what is recomputed is the same.
SLOW = {
    "ddp, accumulating": (2, "pythia", DDP | rows(2)),
    "tp, accumulating": (2, "pythia", TP2 | rows(6)),
    "tp, learned positions": (2, "learned", TP2 | SHAPED),
    "tp, mup": (2, "crystal", TP2 | rows(6) | FIRST),
    "fsdp of 3, tied": (3, "olmo", KEEP | FIRST | SHAPED),
    "hsdp, tied": (4, "olmo", HSDP | KEEP | SHAPED | EVERY | rows(1)),
    "tp x fsdp, learned": (4, "learned", TP2_FSDP),
    "tp x fsdp, bf16": (4, "pythia", TP2_FSDP | BF16),
    "tp, tied, z-loss": (2, "olmo", TP2 | SHAPED | EVERY),
    "fsdp, resharding not": (2, "olmo2", KEEP | rows(3) | FIRST),
    "fsdp, g++": (2, "llama", FSDP | COMPILE | FIRST),
    "ddp, g++": (2, "pythia", DDP | COMPILE),
    "tp, g++": (2, "llama", TP2 | COMPILE),
}


def member(rank: int, n: int, jobs: dict[str, tuple], folder: Path) -> None:
    """One process of a group of n: goes through its jobs, each with processes that meet anew."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(n),
        "MASTER_ADDR": "localhost",
    }
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # as torchrun does: who started us runs the store
    torch.set_num_threads(1)
    for name, (port, model, settings) in jobs.items():
        os.environ["MASTER_PORT"] = str(port)
        cfg = make(model, settings | {"parallel.timeout_seconds": 100})
        world, backend = None, "inductor" if "g++" in name else "aot_eager"
        try:
            world = parallel.start(cfg.train, cfg.parallel)
            with mock.patch("torch.compile", functools.partial(torch.compile, backend=backend)):
                found = CALLS[name][1](world) if name in CALLS else learn(cfg, world)
            save_file(found, folder / f"{name} {rank}.safetensors")
        except Exception:  # left by one process, the others of this job end too
            (folder / f"{name} {rank}.txt").write_text(traceback.format_exc())
        if world is not None:
            world.leave()


@functools.cache
def group(n: int, folder: Path, slow: bool) -> None:
    """Starts n processes and waits until they are through all that is for n processes."""
    jobs = {name: job for name, job in (SLOW if slow else VARIANTS).items() if job[0] == n}
    if not slow:
        jobs |= {name: (n, "llama", FSDP) for name, (processes, _) in CALLS.items() if processes == n}
    stores = [dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) for _ in jobs]
    jobs = {name: (store.port, *job[1:]) for store, (name, job) in zip(stores, jobs.items())}
    # a server that imports torch once, which takes seconds, and of which all processes are forks
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "safetensors.torch"])
    processes = [
        context.Process(target=member, args=(rank, n, jobs, folder), daemon=True) for rank in range(n)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + 400
    for process in processes:
        process.join(timeout=max(0.0, end - time.monotonic()))
        process.kill()


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """ask(n, name) -> what each of n processes has found there, by rank."""
    top = tmp_path_factory.mktemp("groups")

    def found(n: int, name: str) -> list[dict[str, Tensor]]:
        folder = top / f"{n}{' slow' * (name in SLOW)}"
        folder.mkdir(exist_ok=True)
        group(n, folder, name in SLOW)
        problems = [path.read_text() for path in folder.glob(f"{name} ?.txt")]
        assert not problems, "\n".join(problems)
        return [load_file(folder / f"{name} {rank}.safetensors") for rank in range(n)]

    return found


# ---- the same, however it is spread -----------------------------------------------------------------------

# A variant's distance is a draw of which `noise` is the larger of two: four times it is far beyond chance (of
# 33 variants x 30 results the furthest is 1.9 times), and a gradient wrong by 1 in 10,000 is further still.
NOISES = 4
# A result is summed in FP32 at some point; none can be told from another closer than that rounds.
ROUNDING = 2.0**-24


def compare(found: list[dict[str, Tensor]], model: str, settings: dict) -> dict[str, float]:
    """Asserts that all processes have found the same, and that it is `exact`'s; returns the distances."""
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in found[0])
    bound = noise(model, settings.get("train.precision", "fp32"), *asked(settings))
    expected = exact(model, *asked(settings))
    apart = distances({name: found[0][name] for name in expected}, expected)
    too_far = {n: (d, bound[n]) for n, d in apart.items() if not d <= NOISES * max(bound[n], ROUNDING)}
    assert not too_far, "\n".join(f"{n}: {d:.1e} apart, noise {b:.1e}" for n, (d, b) in too_far.items())
    assert len(apart) == len(found[0])
    return apart


@pytest.mark.parametrize("name", VARIANTS)
def test_however_a_run_is_spread_it_learns_what_one_process_learns(ask, name):
    n, model, settings = VARIANTS[name]
    apart = compare(ask(n, name), model, settings)
    if "train.precision" in settings:  # and it was BF16, not FP32 under its name
        assert apart["norm"] > 2.0**-8 / 64  # FP32's is 2^-18 or less


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_compiled_run_learns_the_same(ask, name):
    n, model, settings = SLOW[name]
    compare(ask(n, name), model, settings)


def asked(settings: dict) -> tuple:
    """Those that say what is learned, not how."""
    return tuple((name, value) for name, value in settings.items() if name.startswith("optim."))


@pytest.mark.parametrize(
    ("model", "settings"), sorted({(model, asked(settings)) for _, model, settings in VARIANTS.values()})
)
def test_one_process_learns_what_float64_says_and_every_step_is_clipped(model, settings):
    """Noise is a few roundings, so that no mistake passes for it."""
    fp32, expected = noise(model, "fp32", *settings), exact(model, *settings)
    assert expected["norm"].min() > OPTIM["grad_clip"]
    assert max(value for name, value in fp32.items() if name.startswith("norm of ")) < 16 * ROUNDING
    assert fp32["loss"] < 8 * ROUNDING
    # of a movement, which is a hundredth of the weight that FP32 rounds in each of three steps
    assert max(fp32.values()) < 3 * 100 * 4 * ROUNDING


def test_noise_in_bf16_is_what_bf16_explains():
    for model in ("llama", "pythia"):
        bf16 = noise(model, "bf16")
        # a product rounds its factors and its result, to 8 bits each; errors of many terms cancel in part
        assert 2.0**-8 / 16 < bf16["norm"] < 3 * 2.0**-8
        assert max(bf16.values()) < 8 * 3 * 2.0**-8


# ---- what all do together ---------------------------------------------------------------------------------


def calls(world: parallel.World) -> dict[str, Tensor]:
    """sum, collect, once, put and whole, as every process of a group calls them."""
    rank, n = world.rank, world.size
    assert world.collect({"i am": rank}) == [{"i am": r} for r in range(n)]
    # 2^40 + 1 has no place in FP32
    assert world.sum(2.0**40 + rank, torch.tensor(rank == 1), 0.5) == [
        n * 2.0**40 + n * (n - 1) / 2,
        1,
        n / 2,
    ]

    done = []
    world.once(done.append, rank)
    assert done == ([0] if rank == 0 else [])

    def refuse():
        raise OSError("the disk is full")

    with pytest.raises(
        OSError if rank == 0 else ConfigError, match="disk is full" if rank == 0 else "refuse"
    ):
        world.once(refuse)

    mesh = world.mesh["shard"]
    for shape in (
        (n + 2, 5),
        (2 * n + 1, 3),
        (n - 1, 4),
        (7,),
    ):  # uneven all, and the third leaves one with none
        value = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
        for dim in range(len(shape)):
            split = distribute_tensor(torch.zeros(shape), mesh, [Shard(dim)])
            sharding.put(split, value)
            chunks = value.chunk(n, dim)
            mine = chunks[rank] if rank < len(chunks) else value.narrow(dim, 0, 0)
            assert torch.equal(split.to_local(), mine.float())
            assert torch.equal(sharding.whole(split), value.float())
    plain = torch.zeros(3)
    sharding.put(plain, torch.ones(3))
    assert sharding.whole(plain) is plain and plain.sum() == 3
    return {"passed": torch.ones(1)}


def odd_width(world: parallel.World) -> dict[str, Tensor]:
    """FSDP shards the columns of a matrix whose rows tensor parallel has split: the columns must divide."""
    cfg = make("llama", TP2_FSDP)
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, d_model=35))
    with pytest.raises(ConfigError, match=r"35 wide.*does not divide by 2 shards"):
        train.build(cfg, dataclasses.replace(world, **split_in_two(world)), EOT)
    return {"passed": torch.ones(1)}


def split_in_two(world: parallel.World) -> dict:
    shape = consistency.mesh_shape(Parallel(strategy="fsdp", tp=2), world.size)
    return {
        "shape": shape,
        "mesh": parallel.init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard", "tp")),
    }


CALLS = {
    "calls of 2": (2, calls),
    "calls of 3": (3, calls),
    "calls of 4": (4, calls),
    "odd width": (4, odd_width),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_all_processes_call_together(ask, name):
    """Assertions are made in the processes; a failed one is raised here."""
    ask(CALLS[name][0], name)


def test_alone_the_same_calls_need_nobody():
    world = parallel.alone()
    assert world.sum(2, torch.tensor(0.5)) == [2.0, 0.5]
    assert world.collect("me") == ["me"]
    assert world.share(6) == slice(0, 6)
    with pytest.raises(OSError, match="full"):
        world.once(mock.Mock(side_effect=OSError("the disk is full")))
    world.leave()


# ---- the numbers of the processes -------------------------------------------------------------------------


def test_the_mesh_has_a_place_for_every_process():
    fsdp = functools.partial(Parallel, strategy="fsdp")
    for settings, processes, shape in (
        (Parallel(), 1, (1, 1, 1)),
        (Parallel(), 6, (6, 1, 1)),
        (Parallel(tp=2), 6, (3, 1, 2)),
        (fsdp(), 6, (1, 6, 1)),
        (fsdp(shard=2), 6, (3, 2, 1)),
        (fsdp(shard=6), 6, (1, 6, 1)),
        (fsdp(tp=2), 6, (1, 3, 2)),
        (fsdp(shard=3, tp=2), 12, (2, 3, 2)),
        (fsdp(tp=4), 4, (1, 1, 4)),
    ):
        assert consistency.mesh_shape(settings, processes) == shape


@pytest.mark.parametrize(
    ("settings", "processes", "message"),
    [
        (Parallel(tp=2), 3, r"3 process\(es\) do not divide by parallel.tp=2"),
        (Parallel(tp=4), 2, r"2 process\(es\) do not divide by parallel.tp=4"),
        (Parallel(shard=2), 4, r"parallel.shard=2 needs parallel.strategy='fsdp'"),
        (Parallel(strategy="fsdp", shard=4), 6, r"parallel.shard=4 does not divide 6 process\(es\)$"),
        (Parallel(strategy="fsdp", shard=8), 4, r"parallel.shard=8 does not divide 4 process\(es\)$"),
        (
            Parallel(strategy="fsdp", shard=2, tp=2),
            6,
            r"does not divide 3 process\(es\) \(6 / parallel.tp=2\)",
        ),
    ],
)
def test_processes_that_cannot_stand_so_are_refused(settings, processes, message):
    with pytest.raises(ConfigError, match=message):
        consistency.mesh_shape(settings, processes)


def test_neighbours_in_tensor_parallel_have_the_same_rows_and_all_rows_are_had():
    for shape in ((1, 1, 1), (3, 1, 1), (1, 2, 1), (2, 3, 1), (2, 1, 2), (1, 3, 2), (2, 2, 4)):
        n = shape[0] * shape[1] * shape[2]
        places = [parallel.World(r, n, torch.device("cpu"), torch.float32, shape) for r in range(n)]
        assert places[0].dp_size == shape[0] * shape[1]
        for tp in range(shape[2]):
            of_all = [i for place in places[tp :: shape[2]] for i in range(36)[place.share(36)]]
            assert of_all == list(range(36))


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("llama", {"parallel.tp": 3}, "model.n_heads=8 does not divide by parallel.tp=3"),
        ("llama", {"parallel.tp": 8}, "model.n_kv_heads=4 does not divide by parallel.tp=8"),
        ("llama", {"parallel.tp": 4, "model.d_ff": 54}, "model.d_ff=54 does not divide by parallel.tp=4"),
        (
            "llama",
            {"parallel.tp": 4, "model.seq_len": 30},
            "model.seq_len=30 does not divide by parallel.tp=4",
        ),
        ("llama", FSDP | MUON, "optim.optimizer='muon' needs whole matrices"),
        ("llama", TP2 | MUON, "optim.optimizer='muon' needs whole matrices"),
        ("olmo2", TP2, "model.qk_norm with parallel.tp is not offered"),
        ("alibi", TP2, "model.positions='alibi' with parallel.tp is not offered"),
    ],
)
def test_what_cannot_be_split_is_refused_before_anything_starts(model, settings, message):
    with pytest.raises(ConfigError, match=message):
        make(model, settings)
