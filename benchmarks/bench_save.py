"""How much training slows down while a checkpoint is written.

    python benchmarks/bench_save.py                      # 34 M parameters on a CPU, 162 M on CUDA
    python benchmarks/bench_save.py --sync               # train.save_async=false: training waits for the disk
    python benchmarks/bench_save.py --folder /mnt/disk   # the disk that matters

A round has two parts, so that noise of the machine reaches both: `--steps` steps without a checkpoint; then
one is begun (checkpoint.Saving, as train.py does), and as many steps follow, or more if it is not written by
then. The cost of a checkpoint is the time that training waits for it (begin, finish), plus the time by which
each step during the writing is slower than the median step without. The share of 60 seconds is the cost of
one checkpoint a minute. Steps are those of train.py.
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

# layers, width, heads, hidden width, vocabulary, tokens a row, rows. 34,087,424 parameters: 8 x (4 x 512^2 +
# 3 x 512 x 1408 + 2 x 512) + 2 x 8192 x 512 + 512. On CUDA that of configs/124m.py with a head of its own:
# 123,587,328 + 50304 x 768.
SIZES = {"cpu": (8, 512, 8, 1408, 8192, 256, 2), "cuda": (12, 768, 12, 2048, 50304, 1024, 16)}


def measure(args, folder: str) -> dict:
    """Prints a table and returns its figures."""
    import torch
    from learner import Learner

    import checkpoint
    import optim
    import parallel
    import run_folder
    from config import Config, Model, Train

    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu"
    layers, width, heads, ff, vocab_size, length, rows = args.size or SIZES[device]
    m = Model(vocab_size=vocab_size, seq_len=length, d_model=width, n_layers=layers, n_heads=heads, d_ff=ff)
    cfg = Config(model=m, train=Train(batch_size=rows, micro_batch_size=rows, device=device)).resolved()
    world = parallel.start(cfg.train, cfg.parallel)
    learner = Learner(cfg, world, None)
    learner.fill(learner.model.initial_weights(0))
    saving = checkpoint.Saving(folder, learner.model, learner.optimizers, world)
    tokens = torch.randint(vocab_size, (rows, length + 1)).to(world.device)
    n_tokens, made = rows * length, 0

    def step() -> float:
        nonlocal made
        start = time.perf_counter()
        nats = learner.gradients(tokens, n_tokens)
        _, norm = world.sum(nats, learner.norm())
        learner.update(1e-4, norm, optim.clip_limit(made, cfg.optim))
        if device == "cuda":
            torch.cuda.synchronize()
        made += 1
        return time.perf_counter() - start

    def seconds(action, *arguments) -> float:
        start = time.perf_counter()
        action(*arguments)
        return time.perf_counter() - start

    for _ in range(3):  # compilation and allocation; the first save allocates the copies
        step()
    saving.begin({"step": made, "eot": None}, {})
    saving.finish()
    without, beside, begins, ends, writes = [], [], [], [], []
    rounds = []  # of each: its steps without a checkpoint, then the same number with one, in seconds
    for _ in range(args.rounds):
        plain = [step() for _ in range(args.steps)]
        start = time.perf_counter()
        begins.append(seconds(saving.begin, {"step": made, "eot": None}, {}))
        times = []
        if args.sync:
            ends.append(seconds(saving.finish))
            writes.append(begins[-1] + ends[-1])
        while not args.sync and saving.busy():
            times.append(step())
        if not args.sync:
            writes.append(time.perf_counter() - start)
            ends.append(seconds(saving.finish))
        beside += times
        while len(times) < args.steps:
            times.append(step())
        without += plain
        pace = statistics.mean(plain)
        rounds.append((pace * len(times), begins[-1] + ends[-1] + sum(times)))
        run_folder.delete_others(folder, set(), 1)
    median = statistics.median(without)
    slower = (sum(beside) - median * len(beside)) / args.rounds
    stall, wait = statistics.median(begins), statistics.median(ends)
    cost = stall + wait + max(0.0, slower)
    direct = statistics.median(b - a for a, b in rounds)
    size = sum(f.stat().st_size for f in Path(folder).glob("checkpoints/step-*/*"))
    figures = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "sync": args.sync,
        "parameters": sum(p.numel() for p in learner.model.parameters()), "checkpoint_bytes": size,
        "step_seconds": median, "step_seconds_beside": statistics.median(beside) if beside else None,
        "steps_beside": len(beside), "begin_seconds": stall, "finish_seconds": wait,
        "write_seconds": statistics.median(writes), "slower_seconds": slower, "cost_seconds": cost,
        "cost_share": cost / 60, "direct_share": direct / 60, "rounds": args.rounds,
    }  # fmt: skip
    how = "waiting for the disk" if args.sync else "during training"
    print(f"{figures['parameters']:,} parameters, {size / 1e6:,.0f} MB a checkpoint, saved {how}; {device}, "
          f"{args.threads} threads, {args.rounds} rounds of {args.steps} steps, medians")  # fmt: skip
    print(f"  a step without          {median:8.4f} s   ({min(without):.4f} to {max(without):.4f})")
    if beside:
        slow = statistics.median(beside)
        print(f"  a step during a save    {slow:8.4f} s   {slow / median - 1:+.1%}, {len(beside)} of them")
    print(f"  stall of begin          {stall:8.4f} s")
    print(f"  stall of finish         {wait:8.4f} s")
    print(f"  until it is written     {figures['write_seconds']:8.4f} s")
    print(f"  a checkpoint costs      {cost:8.4f} s   {cost / 60:.2%} at one a minute")
    print(f"  rounds with - without   {direct:8.4f} s   {direct / 60:+.2%}, noise of whole rounds included")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--sync", action="store_true", help="as with train.save_async=false")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="with and without, in each round")
    parser.add_argument("--threads", type=int, default=multiprocessing.cpu_count())
    names = "LAYERS WIDTH HEADS FF VOCABULARY LENGTH ROWS"
    parser.add_argument("--size", type=int, nargs=7, metavar=tuple(names.split()), help="of another model")
    parser.add_argument("--folder", help="on the disk to write to; the system's own for temporary files")
    parser.add_argument("--json", help="a file to write the figures to")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        figures = measure(args, folder)
    if args.json:
        Path(args.json).write_text(json.dumps({"format": 1, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
