"""Measures speed and memory of a config here: real steps on random tokens, beside plan.py's figures.

    python benchmark.py 124m --steps 30
    python benchmark.py 124m --steps 30 --profile                # on a GPU: also where the time goes
    python benchmark.py 7b --steps 10 --train.batch_size=8 --train.micro_batch_size=4 --json 7b.json
    torchrun --nproc_per_node=8 -- benchmark.py 7b --steps 30

Needs no dataset and writes nothing but the JSON file that is asked for. The steps are those of train.py, but
tokens and weights are random, and each ends with the GPU at rest. Times are medians over steps.
"""

if __name__ == "__main__":  # before torch, which takes seconds to import
    import config
    import configurator

    known = {"--steps": "N", "--json": "FILE", "--profile": "", "--anyway": ""}
    CONFIG, FLAGS = config.from_command_line(__doc__, flags=known)
    configurator.quiet_imports()

import statistics
from collections.abc import Callable
from pathlib import Path

import torch

import config
import configurator
import cost
import files
import hardware
import memory
import metrics
import optim
import parallel
import preflight
from config import Config, ConfigError
from train import build, forward_backward, next_token_loss

WARM_UP = 3  # steps that are not counted: compilation, allocation, first touches


# What a kernel of a GPU is: the first row with a word that its name has (NVIDIA's and AMD's matmuls). The
# names of compiled kernels hold those of operators that they serve, so they come first.
KERNELS = {
    "loss, element by element": ("softmax",),
    "norms, activations, sums, rotary positions": ("triton_poi", "triton_red", "triton_per"),
    "attention": ("flash", "sdpa", "fmha", "flex", "cudnn"),
    "matmuls": ("nvjet", "gemm", "cutlass", "splitK", "Cijk"),
    "optimizer and gradient norm": ("multi_tensor",),
    "copies and the rest": ("",),
}


def benchmark(cfg: Config, n_steps: int, file: str, profile: bool = False) -> dict:
    """Makes n_steps steps, prints one table and returns its figures."""
    if file and not Path(file).absolute().parent.is_dir():
        raise ConfigError(f"--json={file}: there is no folder {Path(file).parent}")
    if file and Path(file).is_dir():
        raise ConfigError(f"--json={file} is a folder; name a file")
    cfg = preflight.choose(cfg)
    with parallel.start(cfg.train, cfg.parallel) as world:
        preflight.check_agreement(cfg, world)
        # Build a model with random weights; every process draws its own tokens.
        model, optimizers = build(cfg, world, eot=0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.02)
        generator = torch.Generator().manual_seed(cfg.train.seed + world.dp_rank)
        T, n_rows = cfg.model.seq_len, cfg.train.batch_size // world.dp_size
        n_tokens, meter = cfg.train.batch_size * T, hardware.Meter(cfg, world)

        # Make the steps as train.py does.
        clocks, joules = [], 0.0

        def one_step() -> None:
            nonlocal joules
            clock = metrics.Clock()
            rows = torch.randint(cfg.model.vocab_size, (n_rows, T + 1), generator=generator).to(world.device)
            clock.done("data")
            sums = forward_backward(model, rows, n_tokens, next_token_loss, world, cfg)
            grad_norm, _, spent = world.sum(optim.grad_norm(model), sums["loss"], meter.joules())
            clock.done("forward_backward")
            limit = optim.clip_limit(len(clocks), cfg.optim)
            optim.update(model, optimizers, cfg.optim.lr, grad_norm / world.size, limit)
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            clock.done("optimizer")
            clocks.append(clock)
            joules += spent * (len(clocks) > WARM_UP)

        with hardware.garbage_waits():
            for _ in range(WARM_UP + n_steps):
                one_step()
        clocks = clocks[WARM_UP:]

        # Compute the figures, and show and write them.
        seconds = statistics.median(clock.total for clock in clocks)
        figures = {part: statistics.median(c.seconds[part] for c in clocks) for part in clocks[0].seconds}
        figures |= {"seconds": seconds, "tokens_per_second": n_tokens / seconds, "processes": world.size}
        figures |= meter.columns(n_tokens / seconds, joules)
        if profile and world.device.type == "cuda":
            figures["kernels"] = kernels(one_step)
        elif profile:
            world.once(configurator.say, "note     --profile: only a GPU's kernels are counted")
        about = hardware.about_run(world)
        world.once(show, cfg, figures, about, n_steps, world.device.type == "cuda")
        if file:
            world.once(files.write_json, Path(file), {**figures, **about, "config": config.to_dict(cfg)})
    return figures


def kernels(one_step: Callable) -> dict[str, dict[str, float]]:
    """Milliseconds of a step by kind of kernel, and by the kernels that take the most; from two steps."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(2):
            one_step()
    found = {event.key: event.self_device_time_total / 1000 / 2 for event in trace.key_averages()}
    kinds = dict.fromkeys(KERNELS, 0.0)
    for name, ms in found.items():
        kinds[next(kind for kind, words in KERNELS.items() if any(word in name for word in words))] += ms
    longest = sorted(found, key=found.get, reverse=True)[:20]
    return {"kinds": kinds, "longest": {name: found[name] for name in longest}}


def show(cfg: Config, figures: dict, about: dict, n_steps: int, cuda: bool) -> None:
    """Prints the table: the measured figures beside those that the plan expects of the same config."""
    # The rows; some exist only where the peak or the energy of the GPU is known.
    processes, gib = figures["processes"], hardware.GIB
    planned = memory.total(memory.peak(cfg, processes, cuda)) / gib
    rows = [
        ("tokens a second", f"{figures['tokens_per_second']:,.0f}", ""),
        ("seconds a step", f"{figures['seconds']:.4f}", ""),
        ("  making the batch", f"{figures['data_seconds']:.4f}", ""),
        ("  forward and backward", f"{figures['forward_backward_seconds']:.4f}", ""),
        ("  optimizer", f"{figures['optimizer_seconds']:.4f}", ""),
        ("peak memory, GiB", f"{figures['memory_bytes'] / gib:.2f}", f"{planned:.2f}"),
    ]
    if "mfu" in figures:
        peak = figures["peak_flops"]
        mfu, measured = cost.planned_mfu(cfg, about["device"])
        expected = mfu * peak * processes / sum(cost.flops_per_token(cfg.model).values())
        rows[0] = (*rows[0][:2], f"{expected:,.0f}")
        rows.append(("MFU, 6N + attention", f"{figures['mfu']:.1%}", f"{mfu:.1%}"))
        rows.append(("MFU, 6N", f"{figures['mfu_6n']:.1%}", ""))
        rows.append(("  of a peak of", f"{peak / 1e12:,.0f} TFLOP/s", "dense BF16, each GPU"))
    if "kwh" in figures:
        tokens = n_steps * cfg.train.batch_size * cfg.model.seq_len
        rows.append(("watts, first GPU", f"{figures['gpu_watts']:.0f}", ""))
        rows.append(("kWh a billion tokens", f"{figures['kwh'] / tokens * 1e9:.3f}", ""))

    if "kernels" in figures:
        whole = sum(figures["kernels"]["kinds"].values())
        rows.append(("kernels, ms", f"{whole:.1f}", ""))
        for kind, ms in figures["kernels"]["kinds"].items():
            rows.append((f"  {kind}", f"{ms:.1f}", f"{ms / whole:.0%} of the kernels"))

    # The title, and the rows in columns.
    where = f"{processes} x {about['device']}, {about['precision']}, torch {torch.__version__}"
    what = f"{n_steps} steps of {cfg.train.batch_size} x {cfg.model.seq_len} tokens, medians"
    lines = [f"{cfg.name} on {where}; {what}"]
    again = memory.about_recompute(cfg.train.activation_checkpointing)
    lines.append(f"  micro-batches of {cfg.train.micro_batch_size}, {again}")
    lines.append(f"  {'':<46}{'measured':>14}{'plan.py':>22}")
    lines += [f"  {name:<46}{measured:>14}{plan:>22}".rstrip() for name, measured, plan in rows]
    if "mfu" in figures:
        lines.append(f"  {cost.about_measured(measured)}")
    if not cuda:
        lines.append("  Memory: of the whole process; planned: of its tensors (benchmarks/bench_memory.py)")
    configurator.say("\n".join(lines))


@configurator.script
def main(cfg: Config, flags: dict[str, str]) -> None:
    if "--steps" not in flags:
        raise ConfigError("say how many steps: --steps 30")
    cfg = preflight.check_memory(cfg, anyway="--anyway" in flags)
    benchmark(cfg, int(flags["--steps"]), flags.get("--json", ""), profile="--profile" in flags)


if __name__ == "__main__":
    main(CONFIG, FLAGS)
