"""What a config costs, as pure functions: parameters, FLOPs, steps, checkpoints, disk, hours, energy.

plan.py prints them as a report, with the memory on each GPU, which is worked out in memory.py. Other scripts
ask for single figures, for example the MFU. Reads the manifest of a dataset where one is built, and the
state.json of the checkpoint that annealing starts from; writes nothing; imports no torch.

Letters: T seq_len, D d_model, L n_layers, H query heads, K key/value heads, Dh d_head, F d_ff, V vocabulary.
"""

import dataclasses
import itertools
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import run_folder
import steps
from config import Config, ConfigError, Model, choose
from consistency import accumulation_steps, mesh_shape
from formats.shards import SHARD_BYTES
from steps import Steps

FP32, BF16 = 4, 2  # bytes of a number


# ---- parameters and FLOPs ---------------------------------------------------------------------------------


def parameters(model: Model) -> dict[str, int]:
    """Exact count by part: sum(parameters(Model()).values()) -> 6738415616. A tied head is the embedding."""
    m = model.resolved()
    D, q, kv = m.d_model, m.n_heads * m.d_head, m.n_kv_heads * m.d_head
    into = 2 if m.gated else 1  # matrices from D to F; one more leads back
    positions = {"rope": 0, "alibi": 0, "learned": m.seq_len * D, "none": 0}
    norm = m.norm_kind.n_parameters  # of a width
    in_a_block = norms_of_a_block(m) * norm(D) + m.qk_norm * (norm(q) + norm(kv))
    return {
        "embedding": m.vocab_size * D,
        "learned positions": choose("model.positions", m.positions, positions),
        "attention": m.n_layers * D * (2 * q + 2 * kv),
        "feed-forward": m.n_layers * D * m.d_ff * (into + 1),
        "norms": m.n_layers * in_a_block + norm(D),
        "biases": m.bias * m.n_layers * (q + 2 * kv + D + into * m.d_ff + D),
        "head": 0 if m.tie_embeddings else m.vocab_size * D,
    }


def norms_of_a_block(m: Model) -> int:
    """The number of norms in a block that are as wide as the residual stream."""
    return choose("model.norm_place", m.norm_place, {"before": 2, "after": 2})


def without_padding(model: Model, entries: int) -> int:
    """Number of parameters if the vocabulary had the tokenizer's `entries` only, and no rows of padding."""
    return sum(parameters(dataclasses.replace(model, vocab_size=entries)).values())


def optimizer_numbers(cfg: Config) -> int:
    """Moments: AdamW has two for each parameter; Muon has one for those of matrices inside the layers."""
    counts = parameters(cfg.model)
    adamw = 2 * sum(counts.values())
    muon = adamw - counts["attention"] - counts["feed-forward"]
    return choose("optim.optimizer", cfg.optim.optimizer, {"adamw": adamw, "muon": muon})


def flops_per_token(model: Model) -> dict[str, int]:
    """FLOPs of training on one token, forward and backward: {"6N": 6 N, "attention": 12 L (H Dh) T}.

    Two conventions are in use: the first term alone (Kaplan et al. 2020), and the sum (PaLM, appendix B).
    N is all parameters, embedding included, as in published figures. Nothing is subtracted for the scores
    that causal attention masks, and recompute does not count. A window shorter than T replaces T.
    """
    m = model.resolved()
    seen = min(m.seq_len, m.window or m.seq_len)
    return {
        "6N": 6 * sum(parameters(m).values()),
        "attention": 12 * m.n_layers * m.n_heads * m.d_head * seen,
    }


def mfu(model: Model, tokens_per_second_per_gpu: float, peak: float) -> tuple[float, float]:
    """Model FLOPs utilization, as shares of the peak: by 6N, and by 6N + attention (see flops_per_token)."""
    flops = flops_per_token(model)
    plain, palm = flops["6N"], sum(flops.values())
    return tokens_per_second_per_gpu * plain / peak, tokens_per_second_per_gpu * palm / peak


def precision(cfg: Config, cuda: bool) -> str:
    """The precision of matmuls, as parallel.precision derives it from train.precision."""
    table = {"auto": "bf16" if cuda else "fp32", "fp32": "fp32", "bf16": "bf16"}
    return choose("train.precision", cfg.train.precision, table)


def accumulation(cfg: Config, gpus: int) -> int:
    """Micro-batches of each GPU in a step, the first one where batches double.

    Raises ConfigError where the batch, or the model, does not divide over the GPUs.
    """
    replicate, shard, tp = mesh_shape(cfg.parallel, gpus)
    if tp > 1 and cfg.model.d_model % shard:  # FSDP shards the columns of a matrix whose rows tp splits
        raise ConfigError(
            f"model.d_model={cfg.model.d_model} does not divide by {shard} shards, as parallel.tp={tp} with "
            "parallel.strategy='fsdp' needs; use another parallel.shard or number of processes"
        )
    return accumulation_steps(cfg.train.batch_size, cfg.train.micro_batch_size, replicate * shard)


# ---- speed ------------------------------------------------------------------------------------------------

# The time of a micro-batch of n tokens is taken to be proportional to (n + SMALL) (1 + RECOMPUTE x share of
# blocks that are recomputed). With these numbers, 54.5 % at 7B (below) become 50.5 and 46.6 % where 50.8 and
# 46.2 were measured: micro-batches of 4 with every second block recomputed, and of 10 with every block.
#
# Each micro-batch reads FP32 weights to cast them (6 bytes a parameter), casts gradients (6) and adds them to
# the sum (12): 24 bytes, at 4.8 TB/s 5.0 ps a parameter. A token's 6 FLOPs take 0.011 ps, at 55 % of 989
# TFLOP/s. So a micro-batch takes as long as 450 tokens more would. What FSDP sends for each is not in this.
SMALL = 450
# Recompute is another forward pass, 0.33 of a step by FLOPs. Measured, with SMALL: 0.28 from every block of
# 7B, 0.26 from every second one.
RECOMPUTE = 0.27
# Selective recompute of all blocks. Measured on one H200 with three of 7B's layers, in micro-batches of 4,096
# tokens: 0.045, of which casting the weights once more is half, by its bytes; with more tokens it is less.
SELECTIVE = 0.04


class Measured(NamedTuple):
    """A step whose speed is known. The MFU counts 6N + attention (see flops_per_token)."""

    gpus: str  # their generation
    parameters: float
    tokens: int  # of a micro-batch, on each GPU
    recompute: int  # train.activation_checkpointing
    mfu: float
    source: str


OURS = "ours, one H200, 2026-11-26"  # benchmark.py; benchmarks/README.md has the commands
FOUNDRY = "llm-foundry"  # github.com/mosaicml/llm-foundry, scripts/train/benchmarking/README.md, BF16, FSDP
MEASURED = (
    Measured("hopper", 123.6e6, 256 * 1024, 0, 0.472, OURS),
    Measured("hopper", 1.076e9, 4 * 2048, 0, 0.546, OURS),
    Measured("hopper", 6.738e9, 2 * 2048, 0, 0.545, OURS),
    Measured("hopper", 12.86e9, 10 * 4096, 1, 0.416, f"{FOUNDRY}, 8 H100"),
    Measured("hopper", 29.98e9, 14 * 2048, 1, 0.439, f"{FOUNDRY}, 32 H100"),
    Measured("hopper", 64.86e9, 8 * 2048, 1, 0.426, f"{FOUNDRY}, 64 H100"),
    # An A100 has a third of an H100's peak, and 0.6 of its memory's speed: its MFU is higher.
    Measured("ampere", 124.5e6, 64 * 1024, 0, 0.432, f"{FOUNDRY}, 8 A100"),
    Measured("ampere", 1.316e9, 14 * 2048, 0, 0.599, f"{FOUNDRY}, 8 A100"),
    Measured("ampere", 6.659e9, 6 * 2048, 0, 0.642, f"{FOUNDRY}, 8 A100"),
    Measured("ampere", 12.85e9, 2 * 2048, 0, 0.596, f"{FOUNDRY}, 8 A100"),
    Measured("ampere", 64.86e9, 8 * 2048, 1, 0.533, f"{FOUNDRY}, 64 A100"),
    # databricks.com/blog/amd-mi250: 0.80 of the tokens a second of an A100-40GB, whose MFU was 50.9 %; and
    # /blog/training-llms-scale-amd-mi250-gpus: 1.13 times that. 0.80 x 1.13 x 50.9 % x 312 / 362.1 TFLOP/s
    Measured("cdna", 6.659e9, 12 * 2048, 1, 0.396, "MosaicML, MI250, from its ratio to A100"),
)
# Words of the names of GPUs, both of hardware.GPUS and PyTorch's. Assumed: a MI300X is as a MI250, and a RTX
# 4090, which has an A100's ratio of peak to memory speed, as an A100. All others are as Hopper.
GENERATIONS = {"a100": "ampere", "4090": "ampere", "instinct": "cdna", "mi250x": "cdna", "mi300x": "cdna"}


def slowdown(tokens: int, recompute: int | str, n_layers: int) -> float:
    """How much longer a step takes than without recompute and in endless micro-batches.

    slowdown(4096, 0, 32) -> 1.110; tokens: of a micro-batch; recompute: train.activation_checkpointing.
    """
    if isinstance(recompute, int):
        n_again = len(range(0, n_layers, recompute)) if recompute else 0  # as parallel.py counts them
        more = RECOMPUTE * n_again / n_layers
    else:
        more = choose("train.activation_checkpointing", recompute, {"selective": SELECTIVE})
    return (1 + SMALL / tokens) * (1 + more)


def planned_mfu(cfg: Config, gpu: str) -> tuple[float, list[Measured]]:
    """(MFU by 6N + attention, the measured steps that it is derived from) of a config on a GPU, by its name.

    The measured MFU of the next smaller and the next larger model is multiplied by `slowdown`, interpolated
    linearly in the logarithm of the parameters, and divided by the slowdown of this config. A model smaller
    or larger than all of these is planned as the nearest. Neither seq_len nor the number of GPUs counts.
    """
    m, train = cfg.model.resolved(), cfg.train
    generation = next((g for word, g in GENERATIONS.items() if word in gpu.lower()), "hopper")
    rows = sorted(row for row in MEASURED if row.gpus == generation)  # by parameters
    size = sum(parameters(m).values())
    size = min(max(size, rows[0].parameters), rows[-1].parameters)
    smaller = [row for row in rows if row.parameters <= size][-1]
    larger = next(row for row in rows if row.parameters >= size)

    # 1: in MEASURED recompute is none or all
    low, high = (row.mfu * slowdown(row.tokens, row.recompute, 1) for row in (smaller, larger))
    way = math.log(larger.parameters / smaller.parameters)
    mfu = low + (high - low) * (math.log(size / smaller.parameters) / way if way else 0)
    tokens = train.micro_batch_size * m.seq_len
    near = [smaller, larger] if way else [smaller]
    return mfu / slowdown(tokens, train.activation_checkpointing, m.n_layers), near


def about_measured(rows: list[Measured]) -> str:
    """The rows of planned_mfu in words: "MFU planned from 54.5% at 6.74 B (ours, one H200, ...) and ..."."""
    again = {0: "", 1: ", all recomputed"}
    said = [
        f"{row.mfu:.1%} at {row.parameters / 1e9:.3g} B{again[row.recompute]} ({row.source})" for row in rows
    ]
    return f"MFU planned from {' and '.join(said)}"


# ---- steps and checkpoints --------------------------------------------------------------------------------


class Schedule(NamedTuple):
    source: str  # the origin of the number of rows: a manifest or a setting
    steps: Steps  # the plan: rows, steps and batch sizes of all the data
    begin: int  # finished steps when training begins: 0, or the origin's with optim.anneal_steps
    last_step: int  # train.steps or optim.anneal_steps may end training before the data end
    chunks: list[tuple[int, int]]  # positions (first, end), in training order
    checkpoints: list[int]  # steps after which one is saved
    on_disk: list[int]  # those of them that train.keep_others leaves
    assumed: str = ""  # the assumption that is made where the origin cannot be read here


def schedule(cfg: Config, tokens: float = 0) -> Schedule | None:
    """How long training is: by `tokens` if given, else the dataset's manifest, else data.expected_tokens.

    None where nothing says it. Raises ConfigError where the dataset has rows of another length, or the text
    is too short: for one step, for one step in each chunk, or for annealing.
    """
    # Find the number of rows, and where chunks end.
    manifest = Path(cfg.dataset) / "manifest.json"
    if not tokens and manifest.exists():
        source = str(manifest)
        n_rows, chunks = rows_of_manifest(cfg, manifest)
    elif tokens or cfg.data.expected_tokens:
        source = "--tokens" if tokens else "data.expected_tokens"
        n_rows, chunks = rows_of_tokens(cfg, int(tokens or cfg.data.expected_tokens))
    else:
        return None
    check_rows(cfg, n_rows)

    # Annealing continues the plan of its origin, from the origin's step on.
    plan, begin, assumed = steps.plan_of(cfg, n_rows), 0, ""
    anneal = cfg.optim.anneal_steps
    if anneal:
        begin, order, assumed = origin(cfg, plan.n_steps)
        plan = steps.plan_of(cfg, n_rows, order, begin)
    if begin + anneal > plan.n_steps:
        raise ConfigError(
            f"optim.anneal_steps={anneal}: after the origin's step {begin} there are data for "
            f"{max(0, plan.n_steps - begin)}; anneal in fewer steps, or from an earlier checkpoint"
        )

    # The last step is that of whatever ends first.
    last = plan.last_step
    if last <= begin:
        raise ConfigError(f"train.steps={cfg.train.steps} ends before annealing begins, after step {begin}")

    saved = [begin, *(step for step in steps.checkpoint_steps(cfg, plan, chunks) if step > begin)]
    kept = steps.kept_steps(cfg, plan, chunks, begin)
    return Schedule(source, plan, begin, last, chunks, saved, left_on_disk(cfg, saved, kept), assumed)


def rows_of_manifest(cfg: Config, manifest: Path) -> tuple[int, list[tuple[int, int]]]:
    """Number of rows and the chunks (first, end) of a dataset that is built."""
    try:
        about = json.loads(manifest.read_text(encoding="utf-8"))
        n_rows, seq_len = about["rows"], about["seq_len"]
        chunks = [(chunk["first"], chunk["first"] + chunk["rows"]) for chunk in about["chunks"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{manifest} is damaged or no manifest: {error}") from None
    if seq_len != cfg.model.seq_len:
        raise ConfigError(
            f"{cfg.dataset} has rows of {seq_len} tokens and model.seq_len={cfg.model.seq_len}; remove that "
            f"folder and build it again: {cfg.again('data.py')}; or name another with --dataset=FOLDER, or "
            "state --tokens"
        )
    return n_rows, chunks


def rows_of_tokens(cfg: Config, tokens: int) -> tuple[int, list[tuple[int, int]]]:
    """The same for a dataset that is not built yet: data.py would make these chunks of `tokens` tokens."""
    T, batch, n_chunks = cfg.model.seq_len, cfg.train.batch_size, cfg.data.n_chunks
    n_rows = tokens // T
    n_steps = n_rows // batch
    if n_steps < n_chunks:
        raise ConfigError(
            f"{tokens:,} tokens are {n_steps:,} steps of {batch:,} rows of {T:,}, fewer than "
            f"data.n_chunks={n_chunks}; lower it or the batch, or train on more"
        )
    ends = [k * n_steps // n_chunks * batch for k in range(n_chunks)] + [n_rows]
    return n_rows, list(itertools.pairwise(ends))


def origin(cfg: Config, n_steps: int) -> tuple[int, list | None, str]:
    """(step, order, assumption) of the checkpoint that annealing continues, the newest one of a run.

    Where it is not here, its step is taken from the name of its folder, or is the last one possible.
    """
    folder = Path(cfg.init_from)
    try:
        found = run_folder.checkpoints(folder) or [run_folder.read(folder)]
        return found[-1].step, found[-1].state.get("order"), ""
    except ConfigError:
        name = re.fullmatch(r"step-(\d+)", folder.name)
    if name:
        return int(name[1]), None, f"the origin, {folder}, is not here: its step is taken from its name"
    latest = max(0, n_steps - cfg.optim.anneal_steps)
    return latest, None, f"the origin, {folder}, is not here: it is taken to be as late as the data allow"


def left_on_disk(cfg: Config, saved: list[int], kept: set[int]) -> list[int]:
    """The steps whose checkpoints are there at the end: after each save, train.py deletes others."""
    here: list[int] = []
    for step in saved:
        here.append(step)
        deleted = run_folder.deleted_steps(cfg, here, kept)
        here = [step for step in here if step not in deleted]
    return here


def check_rows(cfg: Config, n_rows: int) -> None:
    """Raises ConfigError where there are fewer rows than a batch has."""
    if n_rows < cfg.train.batch_size:
        raise ConfigError(
            f"{cfg.dataset} has {n_rows} rows, train.batch_size={cfg.train.batch_size}: not one step"
        )


def check_warmup(cfg: Config, plan: Steps) -> None:
    """Raises ConfigError where warm-up is as long as the schedule, or as the data: the peak never comes."""
    unit, warmup = "tokens" if cfg.optim.schedule_tokens else "steps", cfg.optim.warmup
    has = {
        "the data have": steps.schedule_position(cfg, plan, plan.n_steps),
        "the schedule has": steps.schedule_length(cfg, plan.n_steps),
    }
    shorter = min(has, key=has.get)
    if warmup and warmup >= has[shorter]:
        raise ConfigError(
            f"optim.warmup_{unit}={warmup} is too long, as {shorter} {has[shorter]} {unit}: the "
            f"learning rate never reaches its peak; use --optim.warmup_{unit}={has[shorter] // 10}, a tenth"
        )


def about_schedule(cfg: Config, plan: Steps, n_steps: int, last_step: int) -> str:
    """How much of the learning-rate schedule a run covers, and why. n_steps: those that the data have.

    ", the whole schedule" or " of a schedule of 1,203 steps (train.steps ends it early; ...)".
    """
    o, early = cfg.optim, "train.steps ends it early" if last_step == cfg.train.steps else ""
    if o.anneal_steps:
        falls = f", annealing: the learning rate falls to 0 in {o.anneal_steps:,} steps"
        return falls + f" ({early})" * bool(early)

    # The run ends beyond the schedule, or with it. A schedule in tokens need not divide by the batch, so an
    # incomplete last batch does not count as missing.
    unit = "tokens" if o.schedule_tokens else "steps"
    length, end = steps.schedule_length(cfg, n_steps), steps.schedule_position(cfg, plan, last_step)
    incomplete = plan.size(last_step) * cfg.model.seq_len - 1 if o.schedule_tokens else 0
    if end > length:
        return f"; the schedule ends after {length:,} {unit}, and the learning rate stays at its last value"
    if end + incomplete >= length:
        return ", the whole schedule"

    # It ends before the schedule does.
    fit = f"; --optim.schedule_{unit}={end} would fit the schedule to it" * (end > o.warmup)
    tokens = f", {end:,} tokens" * bool(o.schedule_tokens)
    return f"{tokens} of a schedule of {length:,} {unit} ({early or 'the data end before it'}{fit})"


def about_warmup(cfg: Config, plan: Steps, last_step: int) -> str:
    """A sentence where a run ends inside its warm-up; "" where it does not."""
    o, reached = cfg.optim, steps.schedule_position(cfg, plan, last_step - 1)
    if o.anneal_steps or reached >= o.warmup:
        return ""
    share = o.warmup_start_fraction + (1 - o.warmup_start_fraction) * reached / o.warmup
    unit = "tokens" if o.schedule_tokens else "steps"
    return f"it ends inside the warm-up of {o.warmup:,} {unit}, at {share:.1%} of the peak learning rate"


# ---- disk -------------------------------------------------------------------------------------------------


def disk(cfg: Config, n_checkpoints: int, begin: int = 0) -> dict[str, int]:
    """Bytes: of one checkpoint's weights and moments, both FP32, and of all checkpoints.

    The checkpoint of step 0 has no moments yet; the one of the step at which annealing begins has them.
    """
    weights = FP32 * sum(parameters(cfg.model).values())
    moments = FP32 * optimizer_numbers(cfg)
    return {
        "weights": weights,
        "optimizer": moments,
        "all": weights * n_checkpoints + moments * (n_checkpoints - (begin == 0)),
        "all without optimizer": weights * n_checkpoints,
    }


def saving(cfg: Config, gpus: int) -> tuple[float, int]:
    """(bytes, writers) of a save: the copies in host memory that checkpoint.Saving writes, and its processes.

    Weights and moments are FP32, 12 bytes a parameter for AdamW, in files of SHARD_BYTES; each file is
    written by one process. The memory stays allocated between saves.
    """
    one = disk(cfg, 1)
    n_files = sum(-(-one[kind] // SHARD_BYTES) for kind in ("weights", "optimizer"))
    return one["weights"] + one["optimizer"], min(gpus, n_files)


# ---- time, energy, money ----------------------------------------------------------------------------------

PUE = 1.1  # power of the data centre over that of its computers: OLMo's and LLaMA's
KG_CO2_PER_KWH = 0.385  # LLaMA's figure for the average US grid


def hours(tokens: float, tokens_per_second_per_gpu: float, gpus: int) -> float:
    """Training time without a pause: hours(1.2585e12, 2600, 224) / 24 -> 25.0 days, Amber's."""
    return tokens / (tokens_per_second_per_gpu * gpus) / 3600


def megawatt_hours(gpu_hours: float, watts: float) -> float:
    """Energy that the GPUs draw, without the data centre's share."""
    return gpu_hours * watts / 1e6


def tonnes_co2(mwh: float, pue: float, kg_per_kwh: float) -> float:
    """OLMo section 4.4: energy of the hardware x power usage effectiveness x carbon intensity of the grid."""
    return mwh * pue * kg_per_kwh  # MWh x kg/kWh = t
