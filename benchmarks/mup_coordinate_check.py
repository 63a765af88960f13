"""The coordinate check of muP: how far a few training steps change activations, at widths from 64 to 1,024.

    python benchmarks/mup_coordinate_check.py         # a minute and a half on one core

With muP the answer should not depend on the width (Yang et al. 2022, section 8 and appendix D.1). Without it,
a step moves a wide model further than a narrow one, so a wide model needs another learning rate. The figure
has the *change* since initialisation: the mean of |x_t - x_0| over a fixed batch, where x is the embedding,
the last layer's attention, the residual stream after the last layer, or the logits. `growth` is the slope of
the change against the width, both as logarithms: 0 is flat, 1 is in proportion to the width.

The models have 2 layers, heads of 32, and 256 ids: the bytes of this repository's LICENSE, so that every
machine trains on the same rows. The initial deviation of weights is 0.02, as in LLaMA and GPT-2. AdamW has no
warm-up and no decay, and nothing is clipped. At width 64, muP's base width, the standard parametrisation and
muP are the same model except for attention's scale, 1 / sqrt(32) and 1 / 32. With muP, the logits' first
change falls with the width: the final norm's output moves, and the head's random initial weights turn that
into a change in proportion to 1 / sqrt(width). What the head learns is flat, and soon is most of the change.

Writes mup_coordinates.json and mup_coordinates.svg, beside this file or into --out.
"""

import platform
import statistics
import sys
import time
from math import log2
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
from config import Model, Optim
from model import Transformer

LICENSE = Path(__file__).parents[1] / "LICENSE"
PARAMETRISATIONS = ("standard", "muP")
ACTIVATIONS = ("embedding", "attention", "residual stream", "logits")
LR = 2**-8  # in the middle of the widths' best learning rates without muP (mup_lr_sweep.py)
ROWS = 4  # rows of a batch


def settings(width: int, mup: bool) -> Model:
    """The model of a width, in muP with the base width 64, or in the standard parametrisation."""
    # d_ff is near LLaMA's 8/3 of the width, without a remainder at any width.
    sizes = dict(vocab_size=256, seq_len=64, d_model=width, n_layers=2, n_heads=width // 32, d_ff=3 * width)
    return Model(**sizes, **(dict(init="mup", mup_base_width=64) if mup else dict(init="gpt2")))


def changes(cfg: Model, lr: float, steps: int, seed: int, mup_scale: float = 0) -> dict[str, list[float]]:
    """The change of each activation after each of `steps` updates: name -> mean |x_t - x_0| by step.

    `mup_scale` multiplies the learning rate of matrices inside the layers; 0: the model's own factor.
    """
    # Gradients shrink with the width; eps stays far below them, so that it has no effect.
    net = Transformer(cfg)
    net.init_weights(seed)
    optimizer = optim.adamw(net, Optim(lr=lr, weight_decay=0, eps=1e-12), mup_scale or cfg.mup_scale)
    optim.set_lr(optimizer, lr)

    # Hooks put the activations of a forward over the fixed batch `probe` into `now`.
    data, length = torch.tensor(list(LICENSE.read_bytes())), cfg.seq_len
    probe = data[: ROWS * length].view(ROWS, length)
    now: dict[str, torch.Tensor] = {}

    def keep(name):
        return lambda module, inputs, output: now.update({name: output.detach()})

    generator = torch.Generator().manual_seed(seed)
    first, found = {}, {name: [] for name in ACTIVATIONS}
    for step in range(steps + 1):
        # Measure how far the activations have changed.
        watched = (net.embed_tokens, net.layers[-1].self_attn, net.layers[-1])
        hooks = [module.register_forward_hook(keep(name)) for module, name in zip(watched, ACTIVATIONS)]
        with torch.no_grad():
            now["logits"] = net(probe)
        for hook in hooks:
            hook.remove()
        first = first or dict(now)
        if step:
            for name in ACTIVATIONS:
                found[name].append((now[name] - first[name]).abs().mean().item())

        # One update on random rows of the data.
        if step < steps:
            starts = torch.randint(len(data) - length, (ROWS, 1), generator=generator)
            rows = data[starts + torch.arange(length + 1)]  # (ROWS, length + 1)
            (net(rows[:, :-1], rows[:, 1:]) / (ROWS * length)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return found


def growth(widths: list[int], sizes: list[float]) -> float:
    """The exponent p of the best power law, size ~ width^p: least squares between the logarithms."""
    return statistics.linear_regression([log2(w) for w in widths], [log2(s) for s in sizes]).slope


def draw(widths: list[int], sizes: dict) -> Figure:
    """One row per activation, standard left, muP right, one line per step.

    sizes[parametrisation][activation][width][step]: the change of the activation.
    """
    # One panel for each activation and parametrisation, with a line for each step.
    steps = len(sizes["muP"]["logits"][0])
    figure = Figure((7.2, 7.4))
    panels = figure.subplots(len(ACTIVATIONS), 2, sharex=True, sharey="row")
    figure.subplots_adjust(0.105, 0.06, 0.985, 0.9, wspace=0.06, hspace=0.2)
    for row, activation in zip(panels, ACTIVATIONS):
        for panel, name in zip(row, PARAMETRISATIONS):
            by_width = sizes[name][activation]
            for step in range(steps):
                colour = figures.COLOURS[f"s{12 * (step + 1) // steps}"][0]
                y = [s[step] for s in by_width]
                label = "after step 1" if step == 0 else f"{step + 1}"
                panel.plot(widths, y, color=colour, marker="o", markersize=2.5, label=label)
            power = growth(widths, [s[-1] for s in by_width]) + 0.0
            text = f"last step: width to the power {power:.2f}".replace("-", "\N{MINUS SIGN}")
            box = {"facecolor": figures.PAPER, "linewidth": 0, "pad": 1}
            panel.text(0.03, 0.93, text, transform=panel.transAxes, va="top", fontsize=7.5, bbox=box)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(widths, [f"{w:,}" for w in widths])
            panel.minorticks_off()

        # Both panels of a row share their scale, with room for the text at the top.
        row[0].set_ylabel(activation)
        low, high = row[0].get_ylim()
        row[0].set_ylim(low, high * (high / low) ** 0.22)
        for panel in row:
            panel.set_yticks(*powers_of_ten(*row[0].get_ylim()))

    # Titles, labels and the legend of the steps.
    figure.align_ylabels(panels[:, 0])
    for panel, title in zip(panels[0], ("standard parametrisation", "muP")):
        panel.set_title(title, color=figures.INK)
    for panel in panels[-1]:
        panel.set_xlabel("width, d_model")
    lines, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="upper right", ncol=steps, frameon=False, bbox_to_anchor=(0.99, 0.995))
    head = "mean change of an activation\nsince initialisation"
    figure.text(0.105, 0.985, head, va="top", color=figures.INK)
    return figure


def powers_of_ten(low: float, high: float) -> tuple[list[float], list[str]]:
    """Ticks at 1, or at 1 and 3, of every decade between, and their labels."""
    digits = (1,) if high / low > 100 else (1, 3)
    ticks = [d * 10.0**e for e in range(-6, 7) for d in digits if low <= d * 10.0**e <= high]
    return ticks, [f"{tick:,g}" for tick in ticks]


def main() -> None:
    parser = configurator.parser(__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write into")
    args = parser.parse_args()

    # sizes[parametrisation][activation][width][step]: geometric means over the seeds
    torch.set_num_threads(1)
    hardware.keep_freed_memory()
    sizes = {name: {activation: [] for activation in ACTIVATIONS} for name in PARAMETRISATIONS}
    for width in args.widths:
        for name in PARAMETRISATIONS:
            cfg = settings(width, name == "muP")
            each = [changes(cfg, LR, args.steps, seed) for seed in range(args.seeds)]
            for activation in ACTIVATIONS:
                mean = [statistics.geometric_mean(at) for at in zip(*(found[activation] for found in each))]
                sizes[name][activation].append([float(f"{size:.4g}") for size in mean])
            last = "  ".join(f"{a} {sizes[name][a][-1][-1]:<8.3g}" for a in ACTIVATIONS)
            print(f"{name:<9}width {width:>6}  {last}", flush=True)

    # powers[parametrisation][activation][step]: the exponent by which the change grows with the width
    powers = {name: {} for name in PARAMETRISATIONS}
    for name in PARAMETRISATIONS:
        for activation, by_width in sizes[name].items():
            by_step = zip(*by_width)
            powers[name][activation] = [round(growth(args.widths, list(at)), 3) for at in by_step]
        print(f"{name:<9}growth after the last step:", {a: powers[name][a][-1] for a in ACTIVATIONS})

    about = {
        "format": 1,
        "script": "benchmarks/mup_coordinate_check.py",
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{hardware.processor()}, 1 thread",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rate": LR,
        "widths": args.widths,
        "seeds": args.seeds,
        "change": sizes,  # parametrisation -> activation -> [width][step - 1], geometric means over the seeds
        "growth": powers,  # parametrisation -> activation -> [step - 1]
    }
    files.write_json(args.out / "mup_coordinates.json", about)
    with matplotlib.rc_context(figures.STYLE):
        drawn, _ = figures.svg(draw(args.widths, sizes), "mup-coordinates", "Coordinate check of muP")
    files.write(args.out / "mup_coordinates.svg", drawn.encode())


if __name__ == "__main__":
    main()
