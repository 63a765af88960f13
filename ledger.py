"""What a run writes about itself while it trains: its settings, the machine, the ledger, the console's lines.

train.py calls these; none of them changes what is learned. Files (checkpoint.py lists the run folder):

    config.json    settings, commit, versions, device     dataset.json   the manifest, as it was
    ledger.jsonl   what happened                           metrics.jsonl  one line a step
    .lock          held by the process that trains
"""

import fcntl
import json
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import safetensors
import torch

import checkpoint
import config
import files
import parallel
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
            "data.workers", "data.max_bad_fraction", "data.expected_tokens", "tokenizer.path")  # fmt: skip
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


def about_machine(everyone: parallel.Everyone) -> dict:
    """Code, versions and hardware: what may differ between the parts of a run that was resumed."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    cuda = everyone.device.type == "cuda"
    packages = {"torch": torch, "numpy": np, "safetensors": safetensors}
    return {
        "git": git.stdout.strip() or None,
        "versions": {"python": platform.python_version(), **{n: p.__version__ for n, p in packages.items()}},
        "device": torch.cuda.get_device_name(everyone.device) if cuda else processor(),
        "platform": platform.platform(),
        "processes": everyone.world_size,
        "threads": torch.get_num_threads(),
        "precision": str(everyone.dtype).removeprefix("torch."),
    }


def write_run(cfg: Config, dataset: Dataset, machine: dict, model: Transformer) -> None:
    """config.json and dataset.json of the run folder."""
    run, parameters = Path(cfg.run), sum(p.numel() for p in model.parameters())
    settings = {"format": checkpoint.FORMAT, "config": config.to_dict(cfg)}
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


def greet(cfg, dataset, everyone, model, step, last_step, n_steps, accumulation) -> None:
    """What is about to run, in a few lines."""
    parameters = sum(p.numel() for p in model.parameters())
    tokens = cfg.train.batch_size * cfg.model.seq_len
    left = dataset.n_rows - n_steps * cfg.train.batch_size
    print(f"model    {parameters:,} parameters, {cfg.model.n_layers} layers x {cfg.model.d_model} wide")
    rows = f"{dataset.n_rows:,} rows of {cfg.model.seq_len} tokens in {dataset.n_chunks} chunks"
    print(f"data     {rows} from {cfg.dataset}")
    print(f"step     {cfg.train.batch_size} rows = {tokens:,} tokens: {everyone.world_size} process(es) x "
          f"{accumulation} micro-batch(es) of {cfg.train.micro_batch_size}")  # fmt: skip
    print(f"device   {everyone.device}, {str(everyone.dtype).removeprefix('torch.')}")
    if left:
        print(f"note     the last {left} rows of the order are less than a batch and are not trained on")
    print(
        f"steps    {step:,} to {last_step:,}"
        + (f" of a schedule of {n_steps:,}" if last_step < n_steps else ""),
        flush=True,
    )


def step_line(record: dict, last_step: int, left: float) -> str:
    """One aligned line: nats a token, global gradient norm, rate, speed, chunk, estimated seconds left."""
    minutes, seconds = divmod(int(left), 60)
    speed, clock = record["tokens_per_second"], f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
    return (
        f"step {record['step']:>{len(str(last_step))}}/{last_step}  loss {record['loss']:7.4f}  "
        f"grad {record['grad_norm']:7.3f}  lr {record['lr']:.2e}  "
        f"{speed:>9,.0f} tok/s  chunk {record['chunk']:>3}  left {clock}"
    )
