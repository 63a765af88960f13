"""Is the best learning rate of a narrow model the best of a wide one? With muP and without.

    python benchmarks/mup_lr_sweep.py                 # took 19 minutes on a shared core
    python benchmarks/mup_lr_sweep.py --widths 32 64 --steps 50 --out /tmp

Models have 2 layers and heads of 16, and are trained on the bytes of some modules of Python's standard
library. Every machine has these, though they differ a little between versions of Python. The standard
parametrisation gives matrices the same initial deviation at every width, as GPT-2 does, and has one learning
rate. The base width of muP is the narrowest one: there both are the same model, except for attention's scale.
All runs of a seed see the same rows. The loss is that of 256 validation rows after the last step. The best
learning rate is also estimated between those tried: where the parabola through the best point and its two
neighbours is lowest.

Writes mup_lr_sweep.json after every run, and mup_lr_sweep.svg at the end, beside this file or into --out.
Runs that the JSON already has are not repeated.
"""

import argparse
import json
import math
import platform
import sys
import sysconfig
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib
import torch
from matplotlib.figure import Figure

import configurator
import figures
import files
import hardware
import optim
from config import ConfigError, Model, Optim
from model import Transformer

PARAMETRISATIONS = ("standard", "muP")
MODULES = ("argparse.py", "ast.py", "doctest.py", "inspect.py", "tarfile.py", "turtle.py", "typing.py")
VALIDATION = 64 * 1024  # bytes at the end of the text, which no model trains on
ROWS, LENGTH = 8, 64  # rows of a batch, tokens of a row
# Standard deviation of the initial weights. 1 / sqrt(width), which is 0.18 for 32 and 0.06 for 256, would
# keep activations at their size. At these widths both parametrisations reached a lower loss with 0.1 than
# with 0.02 (muP, width 32: 2.22 and 2.43; standard, width 128: 2.06 and 2.13; with less text than here).
INIT_STD = 0.1

RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")  # exponents


def text() -> torch.Tensor:
    """The bytes of some modules of the standard library, one after another."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return torch.tensor(list(b"".join((folder / name).read_bytes() for name in MODULES)))


def settings(width: int, mup: bool, base: int) -> Model:
    """The model of a width, in muP with the base width `base`, or in the standard parametrisation."""
    sizes = dict(
        vocab_size=256, seq_len=LENGTH, d_model=width, n_layers=2, n_heads=width // 16, d_ff=2 * width
    )
    named = dict(init="mup", mup_base_width=base) if mup else dict(init="gpt2")
    return Model(**sizes, init_std=INIT_STD, **named)


def train(cfg: Model, peak: float, steps: int, seed: int, data: torch.Tensor) -> float:
    """The validation loss, in nats per byte, after `steps` steps with the peak learning rate `peak`.

    The seed chooses the weights and the rows.
    """
    # CrystalCoder's optimizer, with a short warm-up and a linear decay to 0.
    recipe = Optim(lr=peak, warmup_steps=steps // 10, schedule="linear", final_lr_fraction=0, eps=1e-9,
                   decay="matrices")  # fmt: skip
    net = Transformer(cfg)
    net.init_weights(seed)
    optimizer = optim.adamw(net, recipe, cfg.mup_scale)

    # Training on random rows of all text but the end.
    text_of_training, validation = data[:-VALIDATION], data[-VALIDATION:]
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        starts = torch.randint(len(text_of_training) - LENGTH, (ROWS, 1), generator=generator)
        rows = text_of_training[starts + torch.arange(LENGTH + 1)]  # (ROWS, LENGTH + 1)
        (net(rows[:, :-1], rows[:, 1:]) / (ROWS * LENGTH)).backward()
        lr = optim.learning_rate(step, steps, recipe)
        optim.update(net, [optimizer], lr, optim.grad_norm(net).item(), recipe.grad_clip)

    # The loss of the validation rows.
    rows = validation[: 256 * (LENGTH + 1)].view(256, LENGTH + 1)
    with torch.no_grad():
        nats = sum(net(part[:, :-1], part[:, 1:]).item() for part in rows.split(32))
    return nats / (256 * LENGTH)


def curve(runs: list[dict], name: str, width: int) -> tuple[list[float], list[float]]:
    """log2 of the learning rates, and their losses, means over the seeds; inf where one is not finite."""
    losses = {}
    for run in runs:
        if (run["parametrisation"], run["width"]) == (name, width):
            loss = math.inf if run["loss"] is None else run["loss"]
            losses.setdefault(run["log2_rate"], []).append(loss)
    return sorted(losses), [sum(losses[x]) / len(losses[x]) for x in sorted(losses)]


def best(x: list[float], y: list[float]) -> dict:
    """The best learning rate tried, and the best between those tried; None if it has no two neighbours."""
    i = y.index(min(y))
    found = {"log2_rate": x[i], "loss": y[i], "log2_rate_between": None}
    if 0 < i < len(y) - 1 and math.isfinite(y[i - 1] + y[i + 1]):
        # The vertex of the parabola through three points, which are equally far apart in log2.
        bend = y[i - 1] - 2 * y[i] + y[i + 1]
        found["log2_rate_between"] = round(x[i] + (x[i + 1] - x[i]) * (y[i - 1] - y[i + 1]) / (2 * bend), 2)
    return found


def draw(runs: list[dict], widths: list[int]) -> Figure:
    """Loss against learning rate: one line per width, one panel per parametrisation, a ring at the best."""
    # Two panels that share both axes.
    figure = Figure((7.2, 3.2))
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    figure.subplots_adjust(0.075, 0.125, 0.985, 0.86, wspace=0.08)
    lowest = min(min(curve(runs, name, width)[1]) for name in PARAMETRISATIONS for width in widths)
    titles = ("standard: one learning rate for all matrices", f"muP, base width {widths[0]}")
    for panel, name, title in zip(panels, PARAMETRISATIONS, titles):
        # A line for each width, with a ring at its lowest point.
        panel.set_title(title, color=figures.INK)
        for i, width in enumerate(widths):
            x, y = curve(runs, name, width)
            colour = figures.COLOURS[f"s{12 * (i + 1) // len(widths)}"][0]
            panel.plot(x, y, color=colour, marker="o", markersize=2.5, label=f"width {width}")
            at = y.index(min(y))
            panel.plot(x[at], y[at], "o", markersize=8, color="none", markeredgecolor=colour)

        # Axes. Losses above the limit belong to learning rates that nobody would choose.
        powers = ["2" + str(exponent).translate(RAISED) for exponent in x]
        panel.set(xlabel="peak learning rate", xticks=x, xticklabels=powers)
        panel.set_ylim(lowest - 0.06, lowest + 0.8)
        panel.grid(axis="x")
    panels[0].set_ylabel("validation loss, nats per byte")
    lines, labels = panels[0].get_legend_handles_labels()
    place = {"loc": "upper center", "bbox_to_anchor": (0.53, 1.01)}
    figure.legend(lines, labels, ncol=len(widths), frameon=False, **place)
    return figure


def main() -> None:
    parser = configurator.parser(__doc__)
    widths = [32, 64, 128, 256]
    parser.add_argument("--widths", type=int, nargs="+", default=widths, help="the first: muP's base width")
    powers = list(range(-10, -3))
    parser.add_argument("--log2_lrs", type=int, nargs="+", default=powers, help="learning rates, as log2")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write into")
    args = parser.parse_args()
    try:
        sweep(args)
    except ConfigError as error:
        configurator.fail(error)


def sweep(args: argparse.Namespace) -> None:
    """Trains what the JSON lacks, prints the best learning rates, writes the JSON and the figure."""
    # What all runs have in common.
    torch.set_num_threads(1)
    hardware.keep_freed_memory()
    path, data = args.out / "mup_lr_sweep.json", text()
    about = {
        "format": 1,
        "script": "benchmarks/mup_lr_sweep.py",
        "device": f"{hardware.processor()}, 1 thread",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "text_bytes": len(data),
        "steps": args.steps,
        "rows": ROWS,
        "length": LENGTH,
        "init_std": INIT_STD,
        "base_width": args.widths[0],
    }

    # Runs of before, if they were made with the same settings.
    runs, date = [], ""
    if path.exists():
        before = json.loads(path.read_text())
        differs = [k for k, v in about.items() if before[k] != v]
        if differs:
            raise ConfigError(
                f"{path} was made with other settings ({', '.join(differs)}); delete it, or give --out"
            )
        runs, date = before["runs"], before["date"]

    # The other runs.
    done = {(r["parametrisation"], r["width"], r["log2_rate"], r["seed"]) for r in runs}
    keys = [
        (name, width, log2_lr, seed)
        for seed in range(args.seeds)
        for width in args.widths
        for name in PARAMETRISATIONS
        for log2_lr in sorted(args.log2_lrs)
    ]
    for name, width, log2_lr, seed in keys:
        if (name, width, log2_lr, seed) in done:
            continue
        start = time.perf_counter()
        cfg = settings(width, name == "muP", args.widths[0])
        loss = train(cfg, 2.0**log2_lr, args.steps, seed, data)
        runs.append({
            "parametrisation": name,
            "width": width,
            "log2_rate": log2_lr,
            "seed": seed,
            "loss": round(loss, 4) if math.isfinite(loss) else None,
            "seconds": round(time.perf_counter() - start, 1),
        })  # fmt: skip
        date = time.strftime("%Y-%m-%d")
        files.write_json(path, {**about, "date": date, "runs": runs})
        what = f"{name:<9}width {width:>5}  learning rate 2^{log2_lr:<4}"
        print(f"{what} seed {seed}  loss {loss:.4f}", flush=True)

    # The best learning rate of each width, and the figure.
    found = {
        name: {str(width): best(*curve(runs, name, width)) for width in args.widths}
        for name in PARAMETRISATIONS
    }
    for name, by_width in found.items():
        for width, b in by_width.items():
            between = b["log2_rate_between"]
            estimate = "no estimate" if between is None else f"estimate 2^{between}"
            best_lr = f"best learning rate 2^{b['log2_rate']}, {estimate}"
            print(f"{name:<9}width {width:>5}  {best_lr}, loss {b['loss']:.3f}")
    files.write_json(path, {**about, "date": date, "best": found, "runs": runs})
    with matplotlib.rc_context(figures.STYLE):
        drawn, _ = figures.svg(draw(runs, args.widths), "mup-lr-sweep", "Loss over learning rates and widths")
    files.write(path.with_suffix(".svg"), drawn.encode())


if __name__ == "__main__":
    main()
