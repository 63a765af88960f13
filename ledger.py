"""What a run writes about itself while it trains: its settings, the machine, the ledger, the console's lines.

train.py calls these; none of them changes what is learned. Files (checkpoint.py lists the run folder):

    config.json    settings, commit, versions, device     dataset.json   the manifest, as it was
    ledger.jsonl   what happened                           metrics.jsonl  one line a step
    .lock          held by the process that trains        .processes/     one file a process at work
"""

import fcntl
import importlib.util
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import safetensors
import torch

import config
import cost
import files
import parallel
import run_folder
from config import Config, ConfigError
from dataset import Dataset
from model import Transformer

# ---- the run folder ---------------------------------------------------------------------------------------


def check_same_run(cfg: Config, dataset: Dataset) -> list[str]:
    """What differs from the config that the run folder was made with, harmless things only.

    Raises ConfigError where the difference would make it another run, neither the old one nor the new.
    """
    if not (Path(cfg.run) / "config.json").exists():
        ours = ("checkpoints", "ledger.jsonl", "metrics.jsonl", "dataset.json")  # of a run killed as it began
        strange = sorted(p.name for p in Path(cfg.run).glob("*") if p.name not in ours and p.name[0] != ".")
        if strange:
            raise ConfigError(f"--run={cfg.run} is no run folder, and has {strange[0]} in it; name a new one")
        return []
    before, now = config.to_dict(config.load_run(cfg.run)), config.to_dict(cfg)
    before, now = (
        {"init_from": c["init_from"], **{f"{s}.{k}": v for s in config.SECTIONS for k, v in c[s].items()}}
        for c in (before, now)
    )
    changed = [f"{k}: {before.get(k)} -> {v}" for k, v in now.items() if before.get(k) != v]
    free = ("eval.", "train.log_every", "train.steps", "train.checkpoint_", "train.device", "train.micro_",
            "train.compile", "train.activation_", "train.deterministic", "train.keep_", "train.save_async",
            "train.verify", "train.spike_", "train.on_incident", "train.rollback_", "train.max_incidents",
            "parallel.", "data.workers", "data.max_bad_fraction", "data.expected_tokens",
            "tokenizer.")  # fmt: skip  # the dataset's hash, which is compared below, says which tokenizer
    # a setting that nothing reads can have any value: old runs have some that are refused now
    free += tuple(f"{name}: " for name in config.without_effect(cfg))
    fatal = [change for change in changed if not change.startswith(free)]
    if fatal:
        raise ConfigError(
            f"{cfg.run} was begun with other settings ({'; '.join(fatal)}); "
            "go on with those, or start another run with --run=FOLDER"
        )
    manifest = Path(cfg.run) / "dataset.json"
    if manifest.exists() and files.sha256(manifest) != dataset.sha256:
        raise ConfigError(
            f"{cfg.run} was begun with another dataset than the one now in {cfg.dataset} (their manifests "
            "differ); start another run with --run=FOLDER, or restore the dataset"
        )
    return changed


LOCKS = []  # open files: a lock lasts as long as its file is open, that is, as long as the process lives


def lock(run: Path) -> None:
    """Keeps a second training out of the run folder. The kernel frees it however this process ends."""
    run.mkdir(parents=True, exist_ok=True)
    file = open(run / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"another training is at work in {run}; wait for it, or use --run=FOLDER") from None
    LOCKS.append(file)


def sign_in(run: Path | str, world: parallel.World) -> None:
    """Leaves this process's name in the run folder; the ledger gets those who never signed out before."""
    world.once(note_faults, Path(run))
    who = {"rank": world.rank, "host": platform.node(), "pid": os.getpid()}
    files.write_json(Path(run) / ".processes" / f"{world.rank}.json", who)


def sign_out(run: Path | str, world: parallel.World, error: BaseException | None = None) -> None:
    """Takes the name away; or, where the process fails, adds its error for whoever comes next."""
    path = Path(run) / ".processes" / f"{world.rank}.json"
    try:
        if error is None:
            path.unlink()
        else:
            text = f"{type(error).__name__}: {error}"[:2000]
            files.write_json(path, {**json.loads(path.read_text()), "error": text})
    except (OSError, ValueError):
        return  # a full disk: what went wrong first is about to be said


def note_faults(run: Path) -> None:
    """Processes whose names are still there failed: the ledger gets their errors, if they could say any."""
    folder = run / ".processes"
    folder.mkdir(exist_ok=True)
    failed = []
    names = (path for path in folder.glob("*.json") if path.stem.isdecimal())
    for path in sorted(names, key=lambda path: int(path.stem)):
        try:
            failed.append(json.loads(path.read_text()))
        except ValueError:
            failed.append({"rank": int(path.stem)})
        path.unlink()
    if failed:
        silent = [who["rank"] for who in failed if "error" not in who]
        files.append(
            run / "ledger.jsonl",
            {
                "event": "fault",
                "time": time.time(),
                "restart": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
                "died_without_a_word": silent,  # killed, out of memory, or the machine went down
                "processes": failed,
            },
        )


def close(cfg: Config, step: int, changed: list[str]) -> None:
    """Writes what a kill after the last checkpoint, or new settings for the evaluation, left unwritten."""
    run = Path(cfg.run)
    if changed:  # of eval's and the like; eval.py reads them here
        about = json.loads((run / "config.json").read_text())
        files.write_json(run / "config.json", {**about, "config": config.to_dict(cfg)})
    if changed or not any(r.get("event") == "finish" for r in files.read_lines(run / "ledger.jsonl")):
        files.append(
            run / "ledger.jsonl", {"event": "finish", "time": time.time(), "step": step, "changed": changed}
        )


def about_machine(world: parallel.World) -> dict:
    """Code, versions and hardware: what may differ between the parts of a run that was resumed."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    cuda = world.device.type == "cuda"
    packages = {"torch": torch, "numpy": np, "safetensors": safetensors}
    return {
        "git": git.stdout.strip() or None,
        "versions": {"python": platform.python_version(), **{n: p.__version__ for n, p in packages.items()}},
        "device": torch.cuda.get_device_name(world.device) if cuda else processor(),
        "platform": platform.platform(),
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "precision": str(world.dtype).removeprefix("torch."),
    }


def write_run(cfg: Config, dataset: Dataset, machine: dict, model: Transformer) -> None:
    """config.json and dataset.json of the run folder."""
    run, parameters = Path(cfg.run), sum(p.numel() for p in model.parameters())
    settings = {"format": run_folder.FORMAT, "config": config.to_dict(cfg)}
    files.write_json(run / "config.json", {**settings, **machine, "parameters": parameters})
    copy = run / ".dataset.json"
    shutil.copyfile(dataset.folder / "manifest.json", copy)
    os.replace(copy, run / "dataset.json")


def processor() -> str:
    """The processor's name and its cores."""
    try:
        names = [
            line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")
        ]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def tokenizer_files(dataset: Dataset) -> dict[str, bytes]:
    """The tokenizer's files, which go into every checkpoint so that it opens by itself."""
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    paths = [Path(dataset.folder) / name for name in names]
    return {path.name: path.read_bytes() for path in paths if path.exists()}


# ---- the console ------------------------------------------------------------------------------------------


def say(text: str) -> None:
    print(text, flush=True)  # also into a file: whoever follows it sees the line when it is written


def log_step(run: Path, record: dict) -> None:
    files.append(run / "metrics.jsonl", record, durable=False)  # a line that is lost is trained again


def greet(cfg, dataset, world, model, step, last_step, steps, n_steps, accumulation) -> None:
    """What is about to run, in a few lines; n_steps: those that all the data have."""
    parameters, size = sum(p.numel() for p in model.parameters()), steps.size(step)
    left = steps.n_rows - steps.consumed(steps.n_steps)
    print(f"model    {parameters:,} parameters, {cfg.model.n_layers} layers x {cfg.model.d_model} wide")
    rows = f"{dataset.n_rows:,} rows of {cfg.model.seq_len} tokens in {dataset.n_chunks} chunks"
    print(f"data     {rows} from {cfg.dataset}")
    micro = f"{accumulation * size // cfg.train.batch_size} micro-batch(es) of {cfg.train.micro_batch_size}"
    tokens = f"{size} rows = {size * cfg.model.seq_len:,} tokens"
    print(f"step     {tokens}: {world.dp_size} share(s) x {micro}")
    replicate, shard, tp = world.shape
    how = f"{replicate} x " * (replicate > 1) + f"FSDP over {shard}" if world.sharded and shard > 1 else ""
    how = " x ".join(filter(None, [how, f"tensor parallel over {tp}" * (tp > 1)])) or "DDP"
    spread = f", {how}" if world.size > 1 else ""
    print(f"device   {world.device}, {str(world.dtype).removeprefix('torch.')}{spread}")
    if world.device.type == "cpu" and world.dtype == torch.bfloat16 and not has_bf16():
        print(
            "note     this processor has no BF16 instructions: it computes the same, some thirty times slower"
        )
    if cfg.train.deterministic and world.device.type == "cuda":
        print("note     deterministic: every sum in a fixed order; benchmarks/gpu.py measures what it costs")
    if left:
        print(
            f"note     the last {left} rows of the order are less than a batch and are left out; "
            "another pass may train on their text"
        )
    if inside := cost.about_warmup(cfg, steps, last_step):
        print(f"note     {inside}")
    about = cost.about_schedule(cfg, steps, n_steps, last_step)
    print(f"steps    {step:,} to {last_step:,}{about}", flush=True)


def has_bf16() -> bool:
    """Whether this processor multiplies BF16 matrices by itself; True where it does not tell."""
    try:
        return "bf16" in open("/proc/cpuinfo").read()
    except OSError:
        return True


def step_line(record: dict, last_step: int, left: float) -> str:
    """One aligned line: nats a token, global gradient norm, rate, speed, chunk, estimated seconds left."""
    minutes, seconds = divmod(int(left), 60)
    speed, clock = record["tokens_per_second"], f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
    loss, norm = (math.nan if record[name] is None else record[name] for name in ("loss", "grad_norm"))
    return (
        f"step {record['step']:>{len(str(last_step))}}/{last_step}  loss {loss:7.4f}  "
        f"grad {norm:7.3f}  lr {record['lr']:.2e}  "
        f"{speed:>9,.0f} tok/s  chunk {record['chunk']:>3}  left {clock}"
    )


# ---- what the hardware does -------------------------------------------------------------------------------


class Meter:
    """Memory, share of the peak, power and energy of the hardware, for metrics.jsonl.

    Power and use are read from NVML, at most once a second, where nvidia-ml-py is installed. Energy is power
    times time, summed over the GPUs of all processes.
    """

    def __init__(self, cfg: Config, world: parallel.World):
        self.cfg, self.world, self.cuda = cfg, world, world.device.type == "cuda"
        self.peak = cost.peak_flops(torch.cuda.get_device_name(world.device)) if self.cuda else None
        self.nvml = self.cuda and importlib.util.find_spec("pynvml") is not None
        self.read_at, self.watts, self.use, self.kwh = time.perf_counter(), 0.0, 0, 0.0
        self.last = self.read_at

    def joules(self) -> float:
        """Spent by this process's GPU since this was last asked."""
        if not self.nvml:
            return 0.0
        now = time.perf_counter()
        if now - self.read_at >= 1 or not self.watts:
            self.watts, self.use = torch.cuda.power_draw() / 1000, torch.cuda.utilization()
            self.read_at = now
        spent, self.last = self.watts * (now - self.last), now
        return spent

    def about(self, tokens_per_second: float, joules: float) -> dict:
        """What is known of the step just made, of `joules` on all GPUs together."""
        record = {"memory_bytes": self.memory()}
        if self.peak:  # cost.mfu: 6N, and 6N + 12 L H Dh T, over the board's dense BF16 peak
            shares = cost.mfu(self.cfg.model, tokens_per_second / self.world.size, self.peak)
            record |= {"mfu_6n": shares[0], "mfu": shares[1], "peak_flops": self.peak}
        if self.nvml:
            self.kwh += joules / 3.6e6
            record |= {"gpu_watts": self.watts, "gpu_use": self.use / 100, "kwh": self.kwh}
        return record

    def memory(self) -> int:
        """The most that was in use so far: CUDA's tensors, or on a CPU the whole process."""
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def totals(self) -> dict:
        """Energy since the process began, and its CO2 by OLMo's formula with LLaMA's figures (cost.py)."""
        if not self.nvml:
            return {}
        return {
            "kwh": self.kwh,
            "kg_co2": 1000 * cost.tonnes_co2(self.kwh / 1000, cost.PUE, cost.KG_CO2_PER_KWH),
        }


def profiler(run: Path | str, world: parallel.World):
    """To be called with the number of finished steps: writes trace.json of steps 4 to 6; True when done."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (world.device.type == "cuda")
    tracer = profile(activities=kinds, record_shapes=True) if world.rank == 0 else None

    def step(n: int) -> bool:
        if tracer and n == 3:
            tracer.start()
        if tracer and n == 6:
            tracer.stop()
            aside = Path(run) / ".trace.json"
            tracer.export_chrome_trace(str(aside))
            os.replace(aside, Path(run) / "trace.json")
            say(f"steps 4 to 6 are in {run}/trace.json; open it at ui.perfetto.dev")
        return n >= 6

    return step
