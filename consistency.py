"""Finds settings that contradict each other, have no effect beside others, or do not fit the processes.

config.py calls this when a section is made and when a config is resolved; plan.py and cost.py ask it what a
number of GPUs allows. No torch.
"""

import math
from typing import TYPE_CHECKING

from configurator import ConfigError, check_name, choose, did_you_mean, unknown

if TYPE_CHECKING:
    from config import Config, Data, Model, Optim, Parallel, Source, Stage, Train

# ---- within a section -------------------------------------------------------------------------------------


def check_width(m: "Model") -> None:
    """Checks a Model before d_head is derived. Raises ConfigError where its width has no whole heads."""
    if not m.d_head and m.d_model % m.n_heads:
        raise ConfigError(
            f"model.d_model={m.d_model} does not divide by model.n_heads={m.n_heads}; "
            f"use a multiple of {m.n_heads}, or set model.d_head"
        )


def check_model(m: "Model") -> None:
    """Checks a resolved Model. Raises ConfigError where settings contradict each other."""
    if m.n_heads % m.n_kv_heads:
        divisors = [k for k in range(1, m.n_heads + 1) if m.n_heads % k == 0]
        raise ConfigError(
            f"model.n_kv_heads={m.n_kv_heads} does not divide model.n_heads={m.n_heads}; "
            f"use one of {divisors}"
        )

    # Positions.
    n_rotary = m.d_head * m.rope_fraction
    if m.positions == "rope" and (n_rotary % 2 or m.rope_fraction > 1):
        raise ConfigError(
            f"model.d_head={m.d_head} x model.rope_fraction={m.rope_fraction} = {n_rotary} rotary "
            f"dimensions, and they form pairs: use an even number of at most {m.d_head}"
        )
    if m.rope_scaling_high <= m.rope_scaling_low:
        raise ConfigError(
            f"model.rope_scaling_high={m.rope_scaling_high} must be above "
            f"model.rope_scaling_low={m.rope_scaling_low}"
        )

    # The block, and its initial weights.
    if m.parallel_residual and m.norm_place == "after":
        raise ConfigError(
            "model.parallel_residual=True and model.norm_place='after' contradict each other: in a "
            "parallel block both sub-layers read the stream through a norm; use norm_place='before'"
        )
    if (m.init == "mup") != bool(m.mup_base_width):
        raise ConfigError(
            f"model.init={m.init!r} and model.mup_base_width={m.mup_base_width}: muP needs both; "
            "use init='mup' with the base width, or another init with mup_base_width=0"
        )
    if m.init == "mitchell" and m.init_trunc not in (0, 3):
        raise ConfigError(
            f"model.init_trunc={m.init_trunc}: init='mitchell' always truncates at 3; leave it out"
        )


def check_source(source: "Source") -> None:
    check_name("data source", source.name)
    if not source.paths:
        raise ConfigError(f"data source {source.name!r} has no paths; give at least one file, folder or glob")


def check_stage(stage: "Stage") -> None:
    what = f"stage {stage.name!r}"
    check_name("stage", stage.name)
    if stage.repeats < 1:
        raise ConfigError(f"{what}: repeats={stage.repeats} must be at least 1")
    if stage.epochs and stage.weights:
        raise ConfigError(f"{what} sets both epochs and weights; keep one")
    if bool(stage.weights) != bool(stage.tokens):
        raise ConfigError(f"{what}: weights and tokens go together; set both or neither")
    for name, value in {**stage.epochs, **stage.weights}.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{what}: {name}={value} must be above 0; leave a source out by name")


def check_data(data: "Data") -> None:
    """Names of sources and stages are used once, and stages name sources that exist."""
    for kind, items in (("sources", data.sources), ("stages", data.stages)):
        names = [item.name for item in items]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"data.{kind}: the name {name!r} is used {names.count(name)} times")
    known = [source.name for source in data.sources]
    for stage in data.stages:
        if stage.name.removesuffix(".offsets") in known and stage.name.endswith(".offsets"):
            raise ConfigError(f"stage {stage.name!r}: this name is a file of a source; use another")
        for name in {**stage.epochs, **stage.weights}:
            if name not in known:
                raise ConfigError(f"stage {stage.name!r} names source {name!r}{did_you_mean(name, known)}")


def check_optim(o: "Optim") -> None:
    """A schedule counts either steps or tokens, and so does its warm-up."""
    if o.schedule_tokens and o.schedule_steps:
        raise ConfigError(
            f"optim.schedule_steps={o.schedule_steps} and optim.schedule_tokens={o.schedule_tokens} "
            "contradict each other: a schedule counts steps or tokens; keep one"
        )
    if o.warmup_tokens and not o.schedule_tokens:
        raise ConfigError(
            f"optim.warmup_tokens={o.warmup_tokens} needs a schedule that counts tokens; set "
            "optim.schedule_tokens, too, or optim.warmup_steps instead"
        )
    # A config that counts warm-up in tokens need not set the default of warmup_steps to 0.
    unset = (0, type(o).warmup_steps) if o.warmup_tokens else (0,)
    if o.schedule_tokens and o.warmup_steps not in unset:
        raise ConfigError(
            f"optim.schedule_tokens={o.schedule_tokens} counts tokens and optim.warmup_steps="
            f"{o.warmup_steps} counts steps; use --optim.warmup_steps=0 with --optim.warmup_tokens=N, "
            "or alone for no warm-up"
        )


def check_train(t: "Train") -> None:
    """A batch that doubles says when, and up to which size."""
    largest = t.batch_size_max or t.batch_size
    doublings = largest / t.batch_size
    if bool(t.batch_double_tokens) != bool(t.batch_size_max):
        raise ConfigError(
            "train.batch_double_tokens and train.batch_size_max go together; set both or neither"
        )
    if doublings < 1 or largest != t.batch_size << int(math.log2(doublings)):
        raise ConfigError(
            f"train.batch_size_max={largest} must be train.batch_size={t.batch_size} times 2, 4 ..."
        )


# ---- across sections --------------------------------------------------------------------------------------


def check_config(c: "Config") -> None:
    """Checks a Config whose model is resolved. Raises ConfigError where sections contradict each other."""
    m, e = c.model, c.eval
    if e.prompt_tokens + e.continuation_tokens > m.seq_len:
        raise ConfigError(
            f"eval.prompt_tokens={e.prompt_tokens} and eval.continuation_tokens={e.continuation_tokens} "
            f"do not fit into model.seq_len={m.seq_len}; make them shorter"
        )
    check_parallel(m, c.parallel, c.optim)
    if m.init in ("normal", "gpt2", "mup") and not m.init_std:
        raise ConfigError(
            f"model.init_std=0 with model.init={m.init!r}: every weight would begin at 0, and such a "
            "model learns nothing; 0.02 is usual"
        )
    if c.optim.anneal_steps and not c.init_from:
        raise ConfigError(
            f"optim.anneal_steps={c.optim.anneal_steps} needs --init_from=CHECKPOINT to begin at"
        )


def check_parallel(m: "Model", p: "Parallel", optim: "Optim") -> None:
    """Raises ConfigError where a model cannot be split over p.tp GPUs, or an optimizer needs it whole."""
    needs_whole = choose("optim.optimizer", optim.optimizer, {"adamw": False, "muon": True})
    if needs_whole and (p.tp > 1 or p.strategy == "fsdp"):
        raise ConfigError(
            f"optim.optimizer={optim.optimizer!r} needs whole matrices, and parallel.strategy='fsdp' and "
            "parallel.tp split them; use --parallel.strategy=ddp --parallel.tp=1, or adamw"
        )
    if p.tp == 1:
        return
    for name in ("n_heads", "n_kv_heads", "d_ff", "seq_len"):
        if getattr(m, name) % p.tp:
            raise ConfigError(f"model.{name}={getattr(m, name)} does not divide by parallel.tp={p.tp}")
    if m.qk_norm:  # it needs a whole row of queries, and no GPU has one
        raise ConfigError("model.qk_norm with parallel.tp is not offered; use parallel.strategy='fsdp'")
    by_head = {"rope": False, "alibi": True, "learned": False, "none": False}
    if choose("model.positions", m.positions, by_head):  # each head has its own slope
        raise ConfigError(
            f"model.positions={m.positions!r} with parallel.tp is not offered; use parallel.strategy='fsdp'"
        )


def without_effect(c: "Config") -> dict[str, str]:
    """Settings that have no effect beside the others of this config, and what would make them count.

    {"optim.muon_momentum": "optim.optimizer=muon", ...}
    """
    o, t, m = c.optim, c.train, c.model
    back = [f"train.rollback_{name}" for name in ("steps", "skip")]
    rope = [f"model.rope_{name}" for name in ("theta", "fraction", "pairs", "scaling")]
    slow = [f"model.rope_scaling_{name}" for name in ("low", "high", "seq_len")]
    lr_falls = o.schedule != "constant" or o.decay_fraction
    sharded = c.parallel.strategy != "ddp" or c.parallel.tp > 1
    has_std = m.init not in ("mitchell", "small_wang")
    # Each row: what is needed, whether this config has it, and the settings that nothing reads without it.
    rows = (
        ("optim.schedule=constant", o.schedule == "constant", "optim.decay_fraction"),
        ("optim.decay_fraction above 0", lr_falls, "optim.final_lr_fraction"),
        ("optim.optimizer=muon", o.optimizer == "muon", "optim.muon_momentum"),
        ("a warm-up", o.warmup, "optim.warmup_start_fraction"),
        ("optim.grad_clip_start_factor", o.grad_clip_start_factor != 1, "optim.grad_clip_start_steps"),
        ("optim.grad_clip above 0", o.grad_clip, "optim.grad_clip_start_factor"),
        ("train.on_incident=rollback", t.on_incident == "rollback", *back),
        ("train.on_incident=skip, defer or rollback", t.on_incident != "stop", "train.max_incidents"),
        ("train.spike_z above 0", t.spike_z, "train.spike_window"),
        ("parallel.strategy=fsdp", sharded, "parallel.reshard"),
        ("model.rope_scaling above 1", m.rope_scaling != 1, *slow),
        ("model.positions=rope", m.positions == "rope", *rope, *slow),
        ("model.init=normal, gpt2 or mup", has_std, "model.init_std"),
    )
    out = {}
    for needed, is_there, *names in rows:
        if not is_there:
            out |= dict.fromkeys(names, needed)
    return out


# ---- processes --------------------------------------------------------------------------------------------


def accumulation_steps(batch_size: int, micro_batch_size: int, n_processes: int) -> int:
    """Micro-batches that each GPU runs in one step: accumulation_steps(2240, 10, 224) -> 1.

    Raises ConfigError where the batch does not divide, and names the nearest sizes that do.
    """
    unit = micro_batch_size * n_processes
    if batch_size % unit == 0:
        return batch_size // unit

    # The nearest batches, and the two nearest micro-batches.
    below = batch_size // unit * unit
    sizes = " or ".join(str(size) for size in (below, below + unit) if size)
    micro = [m for m in range(1, batch_size + 1) if batch_size % (m * n_processes) == 0]
    micro = sorted(sorted(micro, key=lambda m: abs(m - micro_batch_size))[:2])
    other = f", or train.micro_batch_size={' or '.join(map(str, micro))}" if micro else ""
    raise ConfigError(
        f"train.batch_size={batch_size} does not divide by train.micro_batch_size={micro_batch_size} x "
        f"{n_processes} process{'es' if n_processes > 1 else ''}; use train.batch_size={sizes}{other}"
    )


def mesh_shape(parallel: "Parallel", n_processes: int) -> tuple[int, int, int]:
    """(replicate, shard, tp). Raises ConfigError where the processes do not divide into these."""
    dp_size = n_processes // parallel.tp  # processes that see different rows
    if n_processes % parallel.tp:
        raise ConfigError(f"{n_processes} process(es) do not divide by parallel.tp={parallel.tp}")
    if parallel.strategy == "ddp":
        if parallel.shard > 1:
            raise ConfigError(f"parallel.shard={parallel.shard} needs parallel.strategy='fsdp'")
        return dp_size, 1, parallel.tp
    if parallel.strategy != "fsdp":
        raise unknown("parallel.strategy", parallel.strategy)
    shard = parallel.shard or dp_size
    if dp_size % shard:
        split = f" ({n_processes} / parallel.tp={parallel.tp})" if parallel.tp > 1 else ""
        raise ConfigError(f"parallel.shard={shard} does not divide {dp_size} process(es){split}")
    return dp_size // shard, shard, parallel.tp
