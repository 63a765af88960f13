"""Measures how much training slows down while a checkpoint is written.

    python benchmarks/bench_save.py                      # 34 M parameters on a CPU, 162 M on CUDA
    python benchmarks/bench_save.py --sync               # train.save_async=false: training waits for the disk
    python benchmarks/bench_save.py --folder /mnt/disk   # the disk that matters

A round has two parts, so that noise of the machine reaches both: `--steps` steps without a checkpoint; then
one begins (checkpoint.Saving, as in train.py), and as many steps follow, or more if it is not written by
then. The cost of a checkpoint is the time that training waits for it (begin, finish), plus the time by which
each step during the writing is slower than the median step without. The share of 60 seconds is the cost of
one checkpoint a minute. The steps are those of train.py.

Writes checkpoints into a folder that is deleted afterwards, and the file that --json names.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import configurator
from config import Config, Model, Train

# Layers, width, heads, hidden width, vocabulary, tokens a row, rows. On a CPU 34,087,424 parameters: 8 x
# (4 x 512^2 + 3 x 512 x 1408 + 2 x 512) + 2 x 8192 x 512 + 512. On CUDA the model of configs/124m.py with a
# head of its own: 123,587,328 + 50304 x 768 parameters.
SIZES = {"cpu": (8, 512, 8, 1408, 8192, 256, 2), "cuda": (12, 768, 12, 2048, 50304, 1024, 16)}


def settings(args: argparse.Namespace, device: str) -> Config:
    """The config of a size: one micro-batch a step."""
    layers, width, heads, ff, vocab_size, length, n_rows = args.size or SIZES[device]
    shape = {"d_model": width, "n_layers": layers, "n_heads": heads, "d_ff": ff}
    model = Model(vocab_size=vocab_size, seq_len=length, **shape)
    return Config(
        model=model, train=Train(batch_size=n_rows, micro_batch_size=n_rows, device=device)
    ).resolved()


def measure(args: argparse.Namespace, folder: str) -> dict:
    """Prints a table and returns its figures."""
    import torch

    import checkpoint
    import optim
    import parallel
    import run_folder
    import sharding
    import steps
    import train
    from initial import initial_weights

    # Make a model with weights, and the object that saves its checkpoints.
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu"
    cfg = settings(args, device)
    world = parallel.start(cfg.train, cfg.parallel)
    model, optimizers = train.build(cfg, world, eot=None)
    world.fill(model, initial_weights(sharding.bare(model), 0))
    saving = checkpoint.Saving(folder, model, optimizers, world)
    T, n_rows = cfg.model.seq_len, cfg.train.batch_size
    rows = torch.randint(cfg.model.vocab_size, (n_rows, T + 1)).to(world.device)
    n_done = 0

    def step() -> float:
        """A step as train.py makes it; returns its seconds."""
        nonlocal n_done
        start = time.perf_counter()
        sums = train.forward_backward(model, rows, n_rows * T, train.next_token_loss, world, cfg)
        grad_norm, _ = world.sum(optim.grad_norm(model), sums["loss"])
        optim.update(model, optimizers, 1e-4, grad_norm, optim.clip_limit(n_done, cfg.optim))
        if device == "cuda":
            torch.cuda.synchronize()
        n_done += 1
        return time.perf_counter() - start

    def seconds(action, *arguments) -> float:
        start = time.perf_counter()
        action(*arguments)
        return time.perf_counter() - start

    for _ in range(3):  # compilation and allocation; the first save allocates the copies
        step()
    saving.begin(steps.State(step=n_done))
    saving.finish()

    without, beside, begins, ends, writes = [], [], [], [], []
    rounds = []  # for each: seconds of its steps without a checkpoint, and of the same number with one
    for _ in range(args.rounds):
        # Steps without a checkpoint.
        plain = [step() for _ in range(args.steps)]

        # A checkpoint, and the steps that are made while it is written.
        start = time.perf_counter()
        begins.append(seconds(saving.begin, steps.State(step=n_done)))
        times = []
        while not args.sync and saving.busy():
            times.append(step())
        written = time.perf_counter() - start
        ends.append(seconds(saving.finish))
        writes.append(begins[-1] + ends[-1] if args.sync else written)
        beside += times

        # As many steps as without, at least; then only the newest checkpoint stays.
        while len(times) < args.steps:
            times.append(step())
        without += plain
        rounds.append((statistics.mean(plain) * len(times), begins[-1] + ends[-1] + sum(times)))
        run_folder.delete(folder, [c.step for c in run_folder.checkpoints(folder)[:-1]])

    # The figures.
    median = statistics.median(without)
    slower = (sum(beside) - median * len(beside)) / args.rounds
    begin, finish = statistics.median(begins), statistics.median(ends)
    cost = begin + finish + max(0.0, slower)
    figures = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "sync": args.sync,
        "parameters": sum(p.numel() for p in model.parameters()),
        "checkpoint_bytes": sum(f.stat().st_size for f in Path(folder).glob("checkpoints/step-*/*")),
        "step_seconds": median,
        "step_seconds_beside": statistics.median(beside) if beside else None,
        "steps_beside": len(beside),
        "begin_seconds": begin,
        "finish_seconds": finish,
        "write_seconds": statistics.median(writes),
        "slower_seconds": slower,
        "cost_seconds": cost,
        "cost_share": cost / 60,
        "direct_share": statistics.median(b - a for a, b in rounds) / 60,
        "rounds": args.rounds,
    }
    show(figures, without, args)
    return figures


def show(figures: dict, without: list[float], args: argparse.Namespace) -> None:
    """Prints the table. without: seconds of each step without a checkpoint."""
    how = "while training waits" if args.sync else "while training continues"
    what = f"{figures['parameters']:,} parameters, {figures['checkpoint_bytes'] / 1e6:,.0f} MB a checkpoint"
    machine = f"{figures['device']}, {args.threads} threads"
    print(f"{what}, saved {how}; {machine}; medians of {args.rounds} rounds of {args.steps} steps")

    median, slow, direct = figures["step_seconds"], figures["step_seconds_beside"], figures["direct_share"]
    print(f"  a step without          {median:8.4f} s   ({min(without):.4f} to {max(without):.4f})")
    if slow:
        n_steps = figures["steps_beside"]
        print(f"  a step during a save    {slow:8.4f} s   {slow / median - 1:+.1%}, {n_steps} steps")
    print(f"  waiting in begin        {figures['begin_seconds']:8.4f} s")
    print(f"  waiting in finish       {figures['finish_seconds']:8.4f} s")
    print(f"  until it is written     {figures['write_seconds']:8.4f} s")
    cost, share = figures["cost_seconds"], figures["cost_share"]
    print(f"  a checkpoint costs      {cost:8.4f} s   {share:.2%} at one a minute")
    print(f"  rounds with - without   {60 * direct:8.4f} s   {direct:+.2%}, noise of whole rounds included")


def main() -> None:
    parser = configurator.parser(__doc__)
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--sync", action="store_true", help="as with train.save_async=false")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="with a checkpoint and without, in each round")
    parser.add_argument("--threads", type=int, default=multiprocessing.cpu_count())
    names = "LAYERS WIDTH HEADS FF VOCABULARY LENGTH ROWS"
    parser.add_argument("--size", type=int, nargs=7, metavar=tuple(names.split()), help="another model")
    parser.add_argument("--folder", help="a folder on the disk to write to; default: the temporary one")
    parser.add_argument("--json", help="a file to write the figures to")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        figures = measure(args, folder)
    if args.json:
        Path(args.json).write_text(json.dumps({"format": 1, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
