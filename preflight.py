"""Before a run: finds every mistake that can be known before a GPU is used, and prints what is about to run.

    start = preflight.check(cfg)       # raises ConfigError with the way out, or returns a Start

It checks: does the dataset fit the model? Is it the one that the config asks for? May this run folder be
continued with these settings? Can the weights of --init_from be used? Does the schedule fit? Reads the
dataset's manifest, the run folder and the folder of --init_from.
"""

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

import config
import cost
import files
import hardware
import integrity
import memory
import optim
import parallel
import rendezvous
import run_folder
import steps
import tokenizer as tokenizers
from config import Config, ConfigError
from configurator import say
from dataset import Dataset
from formats.families import model_config
from manifest import differences, size_damage
from run_folder import Checkpoint
from sharding import bare

if TYPE_CHECKING:
    from train import Run


class Start(NamedTuple):
    """The things that a run starts with."""

    dataset: Dataset
    origin: Path | None  # the model folder of --init_from, if the run is new
    annealed: Checkpoint | None  # the same as a checkpoint, if the run anneals from it
    changed: list[str]  # settings that differ from those the run was begun with, harmless ones
    accumulation: int  # micro-batches of each process in a step
    tokenizer_files: dict[str, bytes]


def check(cfg: Config) -> Start:
    """Returns what a run starts with. Raises ConfigError for every mistake that can be known by now."""
    accumulation = cost.accumulation(cfg, rendezvous.world_size())
    if Path(cfg.run).exists() and not Path(cfg.run).is_dir():
        raise ConfigError(f"--run={cfg.run} is a file; name a folder")
    dataset = open_dataset(cfg)
    origin = None
    if not run_folder.checkpoints(cfg.run):  # these were checked when the run began, not when it resumes
        origin = open_origin(cfg, dataset)
        if not cfg.optim.anneal_steps:
            cost.check_warmup(cfg, steps.plan_of(cfg, dataset.n_rows))
    annealed = run_folder.read(origin) if origin and cfg.optim.anneal_steps else None
    changed = check_same_run(cfg, dataset)
    return Start(dataset, origin, annealed, changed, accumulation, tokenizer_files(dataset))


def room(device: torch.device) -> float:
    """Bytes for the tensors of this process on its device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory * hardware.USABLE
    return hardware.usable("cpu", rendezvous.processes_here())


def choose(cfg: Config) -> Config:
    """The same config with the micro-batch and recompute that the plan chooses for this machine, if asked."""
    device = hardware.device(cfg.train.device)
    return memory.chosen(cfg, rendezvous.world_size(), device.type, room(device))


def check_memory(cfg: Config, anyway: bool) -> Config:
    """Asks the plan whether this machine has the memory for a run, before any is used.

    Returns the config with what the plan chose, where it was to choose, and prints that. Raises ConfigError
    with the smallest change that would fit; with `anyway` only prints it.
    """
    asked, cfg = cfg, choose(cfg)
    processes, device = rendezvous.world_size(), hardware.device(cfg.train.device)
    have = room(device)
    cost.accumulation(cfg, processes)  # they must divide
    try:
        memory.check(cfg, processes, device.type, have)
    except ConfigError as error:
        said = re.sub(r"(with|) --gpus=(\d+)", lambda m: f"{m[1] or ' on'} {m[2]} GPUs", str(error))
        if not anyway:
            raise ConfigError(f"{said}. --anyway tries all the same") from None
        if rendezvous.rank() == 0:
            say(f"note     --anyway: {said}")
    if cfg != asked and rendezvous.rank() == 0:
        say(f"chosen   {memory.about_choice(cfg, processes, device.type, have)}")
    return cfg


def check_agreement(cfg: Config, world: "parallel.World") -> None:
    """ConfigError where processes on different machines chose differently. All processes call it."""
    train = cfg.train
    found = set(world.collect((train.micro_batch_size, str(train.activation_checkpointing))))
    if len(found) > 1:
        pairs = " and ".join(f"{micro} with {recompute}" for micro, recompute in sorted(found))
        raise ConfigError(
            f"the processes have different memory, and the plan chose different micro-batches: {pairs}; set "
            "train.micro_batch_size and train.activation_checkpointing"
        )


# ---- the dataset, the origin, the run folder --------------------------------------------------------------


def open_dataset(cfg: Config) -> Dataset:
    """The dataset of a config. ConfigError where it does not fit the model, or is not the one asked for."""
    if not Path(cfg.dataset, "manifest.json").exists():
        raise ConfigError(f"there is no dataset in {cfg.dataset}; build it: {cfg.again('data.py')}")
    # All processes of a node read the same files, so one of them hashes.
    dataset = Dataset(cfg.dataset, verify=cfg.train.verify and rendezvous.first_on_node())

    # Compare it with the model.
    if dataset.seq_len != cfg.model.seq_len:
        raise ConfigError(
            f"{cfg.dataset} has rows of {dataset.seq_len} tokens and model.seq_len={cfg.model.seq_len}; "
            f"remove that folder and build it again: {cfg.again('data.py')}"
        )
    if dataset.vocab_size > cfg.model.vocab_size:
        raise ConfigError(
            f"{cfg.dataset} has ids up to {dataset.vocab_size - 1} and model.vocab_size="
            f"{cfg.model.vocab_size}; set model.vocab_size to at least {dataset.vocab_size}"
        )

    # Compare it with the settings. Rows need not come in multiples of this batch, and the same files may have
    # other paths on another machine.
    names = [source.name for source in cfg.data.sources]
    differs = [d for d in differences(dataset.manifest, cfg) if not d.startswith(("train.", "data.sources="))]
    if differs or names != dataset.sources:
        raise ConfigError(
            f"{cfg.dataset} is not what the config asks for: {'; '.join(differs) or 'other sources'}; "
            f"remove that folder and build it again: {cfg.again('data.py')}; or name another: "
            "--dataset=FOLDER"
        )

    # Compare the tokenizers, if the config's is here. Another machine may have only the dataset's own copy.
    path = Path(cfg.tokenizer.path)
    if path.exists():
        theirs, ours = tokenizers.load(path, cfg.tokenizer.eot), dataset.manifest["tokenizer"]["sha256"]
        own = tokenizers.load(dataset.folder, cfg.tokenizer.eot)
        if theirs.sha256 != ours and not tokenizers.equal(theirs, own):
            raise ConfigError(
                f"{cfg.dataset} was built with another tokenizer ({ours[:12]}) than tokenizer.path={path} "
                f"({theirs.sha256[:12]}); use the dataset's own, --tokenizer.path={cfg.dataset}, or build "
                f"another dataset with yours: {cfg.again('data.py')} --dataset=FOLDER"
            )
    cost.check_rows(cfg, dataset.n_rows)

    # The chunks, by their size: training opens the last of them only at its end.
    for chunk in dataset.manifest["chunks"]:
        if size_damage(dataset.folder, dataset.manifest, chunk["file"]):
            path = dataset.folder / chunk["file"]
            raise ConfigError(f"{path} is missing, or has not the manifest's size; try: {dataset.check}")
    return dataset


def tokenizer_files(dataset: Dataset) -> dict[str, bytes]:
    """The tokenizer's files, which go into every checkpoint so that it opens by itself."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    paths = [Path(dataset.folder) / name for name in names]
    return {path.name: path.read_bytes() for path in paths if path.exists()}


def open_origin(cfg: Config, dataset: Dataset) -> Path | None:
    """The model folder that init_from names. ConfigError where that is another model or tokenizer.

    Only weights are taken from it, and the optimizer, the schedule and the data begin anew; but with
    optim.anneal_steps it is a checkpoint to continue.
    """
    if not cfg.init_from:
        return None
    folder = integrity.model_folder(cfg.init_from, verify=cfg.train.verify)

    # The settings that decide what the weights mean must be the same.
    theirs, ours = dataclasses.asdict(model_config(folder)), dataclasses.asdict(cfg.model)
    names = [name.removeprefix("model.") for name in config.settings_for(config.MODEL)]
    if cfg.model.positions == "learned":  # there is a vector for each of them
        names.append("seq_len")
    differs = [name for name in names if ours[name] != theirs[name]]
    if differs:
        settings = " ".join(f"--model.{name}={theirs[name]}" for name in differs)
        if "mup_base_width" in differs:  # the kind of initialisation goes with it
            settings += f" --model.init={'mup' if theirs['mup_base_width'] else 'normal'}"
        raise ConfigError(f"--init_from={cfg.init_from} is a model with other settings; add {settings}")
    tokenizers.check_same(folder, dataset.folder)
    if cfg.optim.anneal_steps:
        check_annealing(cfg, dataset, run_folder.read(folder))
    return folder


def check_annealing(cfg: Config, dataset: Dataset, c: Checkpoint) -> None:
    """ConfigError where a checkpoint, by its state.json, cannot be annealed from on this dataset."""
    # The dataset and the batches up to here must be the same.
    state, step = c.state, c.step
    origin = f"--init_from={cfg.init_from}"
    if state.get("dataset_sha256") != dataset.sha256:
        raise ConfigError(
            f"{origin} was trained on another dataset than {cfg.dataset}; annealing "
            "continues on the same one. Without optim.anneal_steps its weights begin anew on any data"
        )
    plan = steps.plan_of(cfg, dataset.n_rows, state.get("order"))
    n_steps = steps.plan_of(cfg, dataset.n_rows).n_steps
    if plan.consumed(step) != (rows := state.get("rows")):
        raise ConfigError(
            f"{origin} consumed {rows} rows in {step} steps, and "
            f"this config's batches would be {plan.consumed(step)}: anneal with the same ones"
        )

    # There must be steps, a learning rate and data left for annealing.
    if cfg.train.steps and cfg.train.steps <= step:
        raise ConfigError(f"train.steps={cfg.train.steps} ends before annealing begins, after step {step}")
    at, length = steps.schedule_position(cfg, plan, step), steps.schedule_length(cfg, n_steps)
    if not optim.learning_rate(at, length, cfg.optim):
        raise ConfigError(
            f"the learning rate after step {step} is 0: there is nothing to anneal; use a later one"
        )
    # The learning rate should continue where the origin's run had it.
    run = c.path.resolve().parents[1]
    theirs = config.load_run(run) if (run / "checkpoints").is_dir() else None
    if theirs and not theirs.optim.anneal_steps:
        had = steps.schedule_position(theirs, plan, step), steps.schedule_length(theirs, n_steps)
        before, now = optim.learning_rate(*had, theirs.optim), optim.learning_rate(at, length, cfg.optim)
        if abs(now - before) > 0.01 * before and rendezvous.rank() == 0:
            say(f"note     annealing begins at a learning rate of {now:.3g}; {run} had {before:.3g} there")
    left = min(plan.n_steps, n_steps) - step
    if left < cfg.optim.anneal_steps:
        raise ConfigError(
            f"optim.anneal_steps={cfg.optim.anneal_steps}: after the origin's step {step} "
            f"{cfg.dataset} has data for {left}; anneal in fewer steps, or from an earlier checkpoint"
        )


def check_same_run(cfg: Config, dataset: Dataset) -> list[str]:
    """The settings that differ from those that the run folder was made with, harmless ones only.

    Raises ConfigError where the difference would make it another run, neither the old one nor the new.
    """
    # A folder without config.json: a run that was killed as it began, or not a run.
    if not (Path(cfg.run) / "config.json").exists():
        ours = ("checkpoints", "ledger.jsonl", "metrics.jsonl", "dataset.json")
        strange = sorted(p.name for p in Path(cfg.run).glob("*") if p.name not in ours and p.name[0] != ".")
        if strange:
            raise ConfigError(f"--run={cfg.run} is no run folder, and has {strange[0]} in it; name a new one")
        return []

    # Settings that decide what a run learns may not change, except those that have no effect. The dataset's
    # hash, which is compared below, covers the tokenizer.
    before, now = flat(config.load_run(cfg.run)), flat(cfg)
    changed = {name: f"{name}: {before.get(name)} -> {v}" for name, v in now.items() if before.get(name) != v}
    fixed = set(config.settings_for(config.LEARNED)) - set(cfg.without_effect())
    fatal = [said for name, said in changed.items() if name in fixed]
    if fatal:
        raise ConfigError(
            f"{cfg.run} was begun with other settings ({'; '.join(fatal)}); "
            "continue with those, or start another run with --run=FOLDER"
        )
    manifest = Path(cfg.run) / "dataset.json"
    if manifest.exists() and files.sha256(manifest) != dataset.sha256:
        raise ConfigError(
            f"{cfg.run} was begun with another dataset than the one now in {cfg.dataset} (their manifests "
            "differ); start another run with --run=FOLDER, or restore the dataset"
        )
    return list(changed.values())


def flat(cfg: Config) -> dict:
    """Every setting under its full name: {"init_from": ..., "model.vocab_size": ..., ...}."""
    values = config.to_dict(cfg)
    out = {"init_from": values["init_from"]}
    for section in config.SECTIONS:
        out |= {f"{section}.{name}": value for name, value in values[section].items()}
    return out


# ---- what is about to run ---------------------------------------------------------------------------------


def write_down(start: Start, run: "Run", state: steps.State, plan: steps.Steps, resumed: bool) -> None:
    """Writes config.json, dataset.json and a line in the ledger, and prints `greet`. `run` is train.Run."""
    cfg, world, dataset = run.cfg, run.world, run.dataset
    check_agreement(cfg, world)
    about, parameters = hardware.about_run(world), sum(p.numel() for p in bare(run.model).parameters())
    world.once(run_folder.write_run, cfg, dataset.folder, {**about, "parameters": parameters})
    record = {
        "step": state.step,
        "steps": plan.last_step,
        "world_size": world.size,
        "accumulation": start.accumulation,
        "micro_batch_size": cfg.train.micro_batch_size,
        "activation_checkpointing": cfg.train.activation_checkpointing,
        "init_from": str(start.origin) if start.origin else None,
        "rows_after_last_step": plan.n_rows - plan.consumed(plan.n_steps),
        "changed": start.changed,
        **about,
    }
    world.once(run_folder.log, cfg.run, "resume" if resumed else "start", record)
    world.once(greet, start, run, parameters, state.step, plan)


def greet(start: Start, run: "Run", parameters: int, step: int, plan: steps.Steps) -> None:
    """Prints in a few lines what is about to run."""
    cfg, world, dataset = run.cfg, run.world, run.dataset
    T, size = cfg.model.seq_len, plan.size(step)
    if not cfg.train.verify:
        say("note     train.verify=false: no hash is compared, damage goes unnoticed")
    if missing := run_folder.incomplete(cfg.run, step):
        say(f"note     {', '.join(missing)}: incomplete or damaged, and passed over")

    # The model, the data and a step.
    say(f"model    {parameters:,} parameters, {cfg.model.n_layers} layers x {cfg.model.d_model} wide")
    rows = f"{dataset.n_rows:,} rows of {T} tokens in {dataset.n_chunks} chunks"
    say(f"data     {rows} from {cfg.dataset}")
    n_micro = start.accumulation * size // cfg.train.batch_size
    micro = f"{n_micro} micro-batch(es) of {cfg.train.micro_batch_size}"
    again = cfg.train.activation_checkpointing
    micro += f", {memory.about_recompute(again)}" * bool(again)
    say(f"step     {size} rows = {size * T:,} tokens: {world.dp_size} share(s) x {micro}")

    # The device, and how the model is spread.
    replicate, shard, tp = world.shape
    spread = []
    if world.sharded and shard > 1:
        spread.append(f"{replicate} x " * (replicate > 1) + f"FSDP over {shard}")
    if tp > 1:
        spread.append(f"tensor parallel over {tp}")
    how = f", {' x '.join(spread) or 'DDP'}" if world.size > 1 else ""
    say(f"device   {world.device}, {str(world.dtype).removeprefix('torch.')}{how}")
    on_cpu = world.device.type == "cpu"
    if on_cpu and world.dtype == torch.bfloat16 and not hardware.has_bf16():
        say("note     this processor has no BF16 instructions: the same results, some thirty times slower")
    if cfg.train.deterministic and not on_cpu:
        say("note     deterministic: every sum in a fixed order; benchmarks/gpu.py measures what it costs")

    # The length of the run.
    if left := plan.n_rows - plan.consumed(plan.n_steps):
        say(
            f"note     the last {left} rows of the order are less than a batch and are left out; "
            "another pass may train on their text"
        )
    if inside := cost.about_warmup(cfg, plan, plan.last_step):
        say(f"note     {inside}")
    about = cost.about_schedule(cfg, plan, run.n_steps, plan.last_step)
    say(f"steps    {step:,} to {plan.last_step:,}{about}")
