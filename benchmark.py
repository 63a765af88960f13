"""How fast a config runs here, and in how much memory: real steps, made-up tokens, beside plan.py's figures.

    python train.py 124m --benchmark 30
    python train.py 7b --benchmark 10 --train.batch_size=8 --train.micro_batch_size=4 --json 7b.json
    torchrun --nproc_per_node=8 -- train.py 7b --benchmark 30

Needs no dataset and writes nothing but the JSON file that is asked for. The steps are learner.py's, so those
of training; only the tokens are random, and the weights, which are quicker to make so.
"""

import statistics
import time
from pathlib import Path

import torch

import config
import cost
import files
import hardware
import ledger
import memory
import optim
import parallel
from config import Config, ConfigError
from learner import Learner

WARM_UP = 3  # steps that are not counted: compilation, allocation, first touches


def run(cfg: Config, n_steps: int, file: str = "") -> dict:
    """Makes n_steps steps, prints one table and returns its figures. Medians over steps."""
    cost.accumulation(cfg, parallel.world_size())  # they must divide
    if file and not Path(file).absolute().parent.is_dir():
        raise ConfigError(f"--json={file}: there is no folder {Path(file).parent}")
    world = parallel.start(cfg.train, cfg.parallel)
    learner = Learner(cfg, world, eot=0)
    with torch.no_grad():
        for parameter in learner.model.parameters():
            parameter.normal_(std=0.02)
    meter, T = hardware.Meter(cfg, world), cfg.model.seq_len
    n_tokens, n_rows = cfg.train.batch_size * T, cfg.train.batch_size // world.dp_size
    generator = torch.Generator().manual_seed(cfg.train.seed + world.share(world.dp_size).start)
    times = {"data_seconds": [], "forward_backward_seconds": [], "optimizer_seconds": [], "seconds": []}
    joules = []
    for step in range(WARM_UP + n_steps):
        t0 = time.perf_counter()
        batch = torch.randint(cfg.model.vocab_size, (n_rows, T + 1), generator=generator).to(world.device)
        t1 = time.perf_counter()
        nats = learner.gradients(batch, n_tokens)
        _, norm, spent = world.sum(nats, learner.norm(), meter.joules())
        t2 = time.perf_counter()
        learner.update(cfg.optim.lr, norm / world.size, optim.clip_limit(step, cfg.optim))
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        t3 = time.perf_counter()
        if step >= WARM_UP:
            for name, seconds in zip(times, (t1 - t0, t2 - t1, t3 - t2, t3 - t0)):
                times[name].append(seconds)
            joules.append(spent)
    figures = {name: statistics.median(values) for name, values in times.items()}
    speed = n_tokens / figures["seconds"]
    figures |= {
        "tokens_per_second": speed,
        **meter.columns(speed, sum(joules)),
        "processes": world.size,
    }
    machine = hardware.about_run(world)
    world.once(show, cfg, figures, machine, n_steps, world.device.type == "cuda")
    if file:
        world.once(files.write_json, Path(file), {**figures, **machine, "config": config.to_dict(cfg)})
    world.leave()
    return figures


def show(cfg: Config, figures: dict, machine: dict, n_steps: int, cuda: bool) -> None:
    """The table: measured, and what cost.py expects of the same config."""
    processes = figures["processes"]
    plan = memory.peak(cfg, processes, cuda)
    flops, gib = cost.flops_per_token(cfg.model), hardware.GIB
    rows = [
        ("tokens a second", f"{figures['tokens_per_second']:,.0f}", ""),
        ("seconds a step", f"{figures['seconds']:.4f}", ""),
        ("  making the batch", f"{figures['data_seconds']:.4f}", ""),
        ("  forward and backward", f"{figures['forward_backward_seconds']:.4f}", ""),
        ("  optimizer", f"{figures['optimizer_seconds']:.4f}", ""),
        ("peak memory, GiB", f"{figures['memory_bytes'] / gib:.2f}", f"{memory.total(plan) / gib:.2f}"),
    ]
    if "mfu" in figures:
        peak = figures["peak_flops"]
        planned = 0.4 * peak * processes / sum(flops.values())
        rows[0] = (*rows[0][:2], f"{planned:,.0f}")
        rows.append(("MFU, 6N + attention", f"{figures['mfu']:.1%}", "40.0%, assumed"))
        rows.append(("MFU, 6N", f"{figures['mfu_6n']:.1%}", ""))
        rows.append(("  of a peak of", f"{peak / 1e12:,.0f} TFLOP/s", "dense BF16, each GPU"))
    if "kwh" in figures:
        rows.append(("watts, first GPU", f"{figures['gpu_watts']:.0f}", ""))
        rows.append(
            (
                "kWh a billion tokens",
                f"{figures['kwh'] / (n_steps * cfg.train.batch_size * cfg.model.seq_len) * 1e9:.3f}",
                "",
            )
        )
    where = f"{processes} x {machine['device']}, {machine['precision']}, torch {torch.__version__}"
    what = f"{n_steps} steps of {cfg.train.batch_size} x {cfg.model.seq_len} tokens, medians"
    lines = [f"{cfg.name} on {where}; {what}"]
    lines.append(f"  {'':<28}{'measured':>16}{'plan.py':>20}")
    lines += [f"  {name:<28}{measured:>16}{planned:>20}".rstrip() for name, measured, planned in rows]
    if not cuda:
        lines.append("  Memory: of the whole process; planned: of its tensors (benchmarks/bench_memory.py)")
    ledger.say("\n".join(lines))
