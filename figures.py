"""Draws what a run recorded as SVG figures, in the colours of the page and of paper. report.py captions them.

    figure = figures.draw_loss(results.load("runs/demo"))
    file, inline = figures.svg(figure, "loss", "Training loss")      # for figures/loss.svg; for the page

Figures are made within matplotlib.rc_context(figures.STYLE). The memorization figures are figures 7, 8 and 9
of the LLM360 paper (section 4.3).
"""

import html
import io
import re
from itertools import pairwise

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from results import NONE, Run, fits

# ---- colours and axes -------------------------------------------------------------------------------------

# Figures are drawn in the light colours; in the page each becomes a CSS variable with a dark value beside it.
# Lines: Okabe and Ito's colour-blind-safe set, darkened for paper. Checkpoints: viridis, newest strongest.
SHADES = 13  # checkpoints told apart in one figure: the demo's 12 chunks and step 0
COLOURS = {"paper": ("#fffefb", "#15181b"), "ink": ("#1c2024", "#e8e6e1")}  # name: (light, dark)
COLOURS |= {"muted": ("#59636d", "#a3abb3"), "rule": ("#b9c0c7", "#4a525a"), "grid": ("#e8eaec", "#282e34")}
COLOURS |= {"c0": ("#0068a8", "#62b8f0"), "c1": ("#c44e00", "#f79350"), "c2": ("#00805c", "#3fcf9f")}
COLOURS |= {"c3": ("#9c3f82", "#e79bcb"), "c4": ("#806000", "#e5bf3c"), "c5": ("#4b4fb5", "#a9adff")}
for _i, _t in enumerate(np.linspace(0, 1, SHADES)):
    _light, _dark = matplotlib.colormaps["viridis"]([0.66 * (1 - _t), 0.32 + 0.68 * _t])
    COLOURS[f"s{_i}"] = matplotlib.colors.to_hex(_light), matplotlib.colors.to_hex(_dark)
PAPER, INK, MUTED, RULE, GRID = (COLOURS[name][0] for name in ("paper", "ink", "muted", "rule", "grid"))
LINES = [COLOURS[f"c{i}"][0] for i in range(6)]
BLUE, FULL = LINES[:2]  # FULL: full matches, and nothing else in a memorization figure
# For matplotlib.rc_context. Text stays text, and the same run gives the same bytes.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "nano360", "text.parse_math": False, "font.size": 8}
STYLE |= {"text.color": INK, "figure.facecolor": PAPER, "axes.facecolor": "none", "axes.edgecolor": RULE}
STYLE |= {"axes.labelcolor": MUTED, "axes.labelpad": 2, "axes.titlesize": 8, "axes.titlelocation": "left"}
STYLE |= {"axes.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.3}
STYLE |= {"axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": GRID}
STYLE |= {"xtick.color": RULE, "ytick.color": RULE, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED}
STYLE |= {"grid.linewidth": 0.6, "xtick.major.size": 3, "ytick.major.size": 0}
DASHED, SOLID = (2.2, 1.5), (1, 0)
COLUMNS = 1000  # columns of pixels in a figure, about: more than two points in each cannot be seen
LONGEST = 40  # characters of a name in a figure

# Titles and units of known columns of metrics.jsonl and fields of evals.jsonl. All others keep their names.
TITLES = {
    "lr": ("learning rate", ""),
    "grad_norm": ("gradient norm", ""),
    "tokens_per_second": ("tokens per second", ""),
    "memory_bytes": ("most memory in use so far", "bytes"),
    "data_seconds": ("waiting for data", "seconds a step"),
    "forward_backward_seconds": ("forward and backward", "seconds a step"),
    "optimizer_seconds": ("optimizer", "seconds a step"),
    "mfu": ("MFU, attention included", "share of peak"),
    "mfu_6n": ("MFU, 6N", "share of peak"),
    "gpu_watts": ("power of one GPU", "watts"),
    "gpu_use": ("GPU in use", "share of the time"),
    "kwh": ("energy so far", "kWh"),
    "bits_per_byte": ("bits per byte", ""),
}


def canvas(width: float, height: float, left=0.55, right=1.3, bottom=0.42, top=0.18) -> tuple:
    """A figure and its axes, all in inches, so that axes line up down the page."""
    figure = Figure((width, height))
    box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
    return figure, figure.add_axes(box)


def one_line(text: str) -> str:
    """A name from a run as a figure or a heading can hold it: one line, not longer than LONGEST."""
    text = " ".join(clean(text).split())
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "\N{HORIZONTAL ELLIPSIS}"


def title_of(name: str) -> str:
    """title_of("gpu_watts") -> "power of one GPU, watts"; an unknown name is its own title."""
    title, unit = TITLES.get(name, (name, ""))
    return one_line(f"{title}, {unit}" if unit else title)


def svg(figure: Figure, name: str, title: str) -> tuple[str, str]:
    """The figure as an SVG file, and as an SVG element with the page's font, colours and names."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": title})
    file = clean(buffer.getvalue())

    # For the page: no header, no style of its own, ids that are unique among all figures, colours by name.
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', file).groups()
    body = file[file.index(">", file.index("<svg")) + 1 :].replace("xlink:href", "href")
    body = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", body, flags=re.S)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", body)  # ids are the whole page's
    body = re.sub(r'font: ([\d.]+)px [^;"]*', r"font-size: \1px", body)
    body = body.replace(f"fill: {PAPER}", "fill: none", 1)  # no sheet of paper: the page is one
    for variable, (light, _) in COLOURS.items():
        body = body.replace(light, f"var(--{variable})")
    wide = ' class="wide"' * (float(width) > 300)
    head = f'<svg{wide} viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">'
    return file, head + body


def spread(heights: list[float], gap: float) -> np.ndarray:
    """The heights nearest to the given ones, in their order, at least `gap` apart (isotonic regression)."""
    # A label that touches the block below joins it; a block moves as one, to its mean.
    order = np.argsort(heights, kind="stable")
    blocks: list[list[float]] = []  # blocks of touching labels: sum, count
    for rank, index in enumerate(order):
        blocks.append([heights[index] - rank * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + count]
    out = np.empty(len(heights))
    out[order] = np.repeat([b[0] / b[1] for b in blocks], [b[1] for b in blocks]) + gap * np.arange(len(out))
    return out


def label_ends(axes, ends: list[tuple]) -> None:
    """Names lines at their right ends, (x, y, text, colour) each; moves names apart that would touch."""
    low, high = axes.get_ylim()
    inches = axes.figure.get_figheight() * axes.get_position().height
    heights = spread([end[1] for end in ends], gap=(high - low) * 0.13 / inches)
    for (x, y, text, colour), height in zip(ends, heights):
        link = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
        place = {"textcoords": axes.get_yaxis_transform(), "va": "center", "annotation_clip": False}
        axes.annotate(text, (x, y), (1.02, height), color=colour, fontsize=7.5, arrowprops=link, **place)


def label_limit(axes, y: float, text: str, colour: str) -> None:
    """A dashed line across, with its meaning above its right end."""
    axes.axhline(y, color=colour, linewidth=0.7, dashes=(4, 3))
    place = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "ha": "right"}
    place["bbox"] = {"facecolor": PAPER, "alpha": 0.8, "linewidth": 0, "pad": 0.5}
    axes.annotate(text, (1, y), (0, 2), color=colour, fontsize=7, **place)


def step_axis(run: Run, axes, last: float, tokens: bool = True) -> None:
    """Steps below and, where they are known, tokens above."""
    axes.set(xlabel="step", xlim=(0, 1.02 * last or 1))
    axes.xaxis.set_major_locator(MaxNLocator(6 if tokens else 4, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    known = (run.metrics["tokens"] > 0) & (run.metrics["step"] > 0)
    if tokens and known.any():  # one batch size all along
        each = np.median(run.metrics["tokens"][known] / run.metrics["step"][known])
        top = axes.secondary_xaxis("top", functions=(lambda x: x * each, lambda x: x / each))
        top.xaxis.set_major_locator(MaxNLocator(5))
        top.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x) + " tokens" * bool(x)))
        top.spines["top"].set_visible(False)
        top.tick_params(length=0, pad=1)


def chunk_axis(axes, first: float, last: float) -> None:
    axes.set(xlabel="data chunk, in training order", xlim=(first, last))
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))


def envelope(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points to draw: all of them, or the lowest and the highest of each of 1,000 columns."""
    if len(x) <= 2 * COLUMNS:
        return x, y
    parts = np.array_split(np.arange(len(x)), COLUMNS)
    keep = np.unique([part[pick(y[part])] for part in parts for pick in (np.argmin, np.argmax)])
    return x[keep], y[keep]


def source_colour(run: Run, source: str) -> str:
    names = sorted({*run.manifest.get("sources", {}), *run.losses, source})
    return LINES[names.index(source) % len(LINES)]


def short(value: float, _: object = None) -> str:
    """A number in three digits: short(9830400) -> "9.83 M"."""
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def count_full(values: np.ndarray, l: int) -> str:
    """Full matches as a count out of a total: "16 of 1,000"."""
    return f"{(values == l).sum():,} of {len(values):,}" if len(values) else NONE


def clean(text: str) -> str:
    """Controls, lone surrogates and direction overrides become U+FFFD."""
    return re.sub("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "\ufffd", text)


# ---- figures ----------------------------------------------------------------------------------------------


def smoothing(run: Run) -> int:
    """The number of steps in the running median of the training loss, an odd number; 0 for a short run."""
    window = min(101, int(np.isfinite(run.metrics["loss"]).sum()) // 20) | 1
    return window if window > 4 else 0


def draw_loss(run: Run) -> Figure:
    """Training loss, raw, and its running median; resumes and checkpoints."""
    known = np.isfinite(run.metrics["loss"])
    steps, loss = run.metrics["step"][known], run.metrics["loss"][known]
    figure, axes = canvas(7.2, 3.1, top=0.3)

    # The curves, and the loss of guessing.
    axes.plot(*envelope(steps, loss), color=BLUE, linewidth=0.5, alpha=0.6)
    ends = [(steps[-1], loss[-1], f"{loss[-1]:.3f} last step", BLUE)]
    window = smoothing(run)
    if window:
        middle = steps[window // 2 : -(window // 2)]
        median = np.median(np.lib.stride_tricks.sliding_window_view(loss, window), axis=1)
        axes.plot(*envelope(middle, median), color=INK, linewidth=1.1)
        ends.append((middle[-1], median[-1], f"{median[-1]:.3f} median", INK))
    size = run.about["config"].get("model", {}).get("vocab_size")
    if fits(size, int) and size > 1:
        text = f"every token equally likely: ln {size:,} = {np.log(size):.2f}"
        label_limit(axes, np.log(size), text, MUTED)

    # Events: vertical lines for resumes and incidents, ticks for checkpoints.
    for event in run.ledger:
        if event["event"] in ("resume", "nonfinite", "spike", "fault") and fits(event.get("step"), int):
            axes.axvline(event["step"], color=FULL, linewidth=0.7, dashes=DASHED)
            place = {"transform": axes.get_xaxis_transform(), "va": "top", "fontsize": 7}
            axes.text(event["step"], 0.88, f" {event['event']}", color=FULL, **place)
    marks = [state["step"] for state in run.checkpoints]
    axes.plot(marks, [0.0] * len(marks), "|", color=INK, markersize=6, transform=axes.get_xaxis_transform())
    axes.set_ylabel("training loss, nats per token")
    axes.margins(y=0.1)
    step_axis(run, axes, steps[-1])
    label_ends(axes, ends)
    return figure


def draw_column(run: Run, column: str, limit: float = 0, from_zero: bool = True) -> Figure | None:
    """A small panel of one column of metrics.jsonl; None where nothing is recorded."""
    known = np.isfinite(run.metrics[column])
    if not known.any():
        return None
    steps, values = run.metrics["step"][known], run.metrics[column][known]
    figure, axes = canvas(3.5, 1.9, right=0.15, top=0.28)
    axes.plot(*envelope(steps, values), color=BLUE, linewidth=0.7)

    # The axis begins at 0, except where the values would then look like a flat line, and their differences
    # are still large enough for labels of three digits.
    low, high = values.min(), values.max()
    if from_zero or not 0.02 * abs(high) < high - low < 0.5 * abs(high):
        axes.set_ylim(1.05 * min(0, low), 1.05 * max(0, high, limit) or float(low == 0))
    if limit:
        text = f"clipped at {limit:g}: {(values > limit).sum():,} of {len(values):,} steps"
        label_limit(axes, limit, text, FULL)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(short))
    axes.set_title(title_of(column))
    step_axis(run, axes, steps[-1], tokens=False)
    return figure


def draw_lines(run: Run, lines: list[tuple], label: str) -> Figure:
    """Measurements at checkpoints; lines are (name, {step: value} by ascending step, colour, dashes)."""
    # Each line is named at its right end, with its newest value.
    ends = []
    for name, values, colour, _ in lines:
        step, value = [*values.items()][-1]
        text = f"{value:.3f}" if abs(value) < 1000 else short(value)
        ends.append((step, value, f"{one_line(name)}  {text}", colour))
    longest = max(len(end[2]) for end in ends)
    figure, axes = canvas(7.2, 2.9, right=max(1.3, 0.2 + 0.055 * longest), top=0.3)

    # The lines, on an axis that includes 0.
    for _, values, colour, dashes in lines:
        marker = "o" * (len(values) <= 40)
        axes.plot([*values], [*values.values()], color=colour, dashes=dashes, marker=marker, markersize=3)
    low = min(min(line[1].values()) for line in lines)
    high = max(max(line[1].values()) for line in lines)
    axes.set(ylabel=label, ylim=(1.06 * min(0, low), 1.06 * max(0, high) or float(low == 0)))
    if max(-low, high) >= 1000:
        axes.yaxis.set_major_formatter(FuncFormatter(short))
    step_axis(run, axes, max(end[0] for end in ends))
    label_ends(axes, ends)
    return figure


def draw_ridge(run: Run, steps: list[int]) -> Figure:
    """Figure 7: a histogram of l + 1 bins for each checkpoint, over the training rows it has seen."""
    l, n = run.l, len(steps)
    width, left, right = 7.2, 0.95, 2.1  # inches
    figure, axes = canvas(width, 0.42 * n + 0.95, left, right, top=0.45)
    inch, edges = 1 / (width - left - right), np.arange(l + 2) - 0.5
    beside = axes.get_yaxis_transform()
    validation = run.validation_kinds()

    # Heights are square roots of the shares of rows, with one scale for all checkpoints.
    rows = [(run.matches(step, "seen"), run.matches(step, *validation)) for step in steps]
    roots = [[np.sqrt(np.bincount(x, minlength=l + 1) / max(len(x), 1)) for x in pair] for pair in rows]
    scale = 0.92 / max(max(x.max() for pair in roots for x in pair), 0.1)

    def write(x: float, y: float, text: str, colour: str, size: float = 8) -> None:
        axes.text(x, y, text, transform=beside, ha="right", color=colour, fontsize=size)

    # One histogram a checkpoint, the oldest on top: filled for seen rows, outlined for validation rows.
    for y, step, pair, (kept, unseen) in zip(range(n - 1, -1, -1), steps, rows, roots):
        bar = {"baseline": y, "fill": True, "linewidth": 0}
        axes.axhline(y, color=RULE, linewidth=0.5)
        axes.stairs(y + scale * kept[:-1], edges[:-1], color=BLUE, alpha=0.45, **bar)
        axes.stairs(y + scale * kept[-1:], edges[-2:], color=FULL, **bar)
        if unseen.any():
            axes.stairs(y + scale * unseen, edges, baseline=None, color=INK, linewidth=0.7)
        write(-0.1 * inch, y + 0.06, f"step {step:,}", INK)
        write(1 + 1.2 * inch, y + 0.06, count_full(pair[0], l), FULL)
        write(1 + 2.05 * inch, y + 0.06, count_full(pair[1], l) * bool(validation), INK)
    write(1 + 1.2 * inch, n + 0.1, "full matches,\nseen rows", FULL, 7)
    write(1 + 2.05 * inch, n + 0.1, "full matches,\nvalidation rows" * bool(validation), INK, 7)

    # The scale of heights, at the lower right, and the axes.
    for share in (0.01, 0.1, 0.5):
        y = scale * share**0.5
        axes.plot([1, 1 + 0.05 * inch], [y, y], color=MUTED, linewidth=0.6, clip_on=False, transform=beside)
        axes.text(1 + 0.07 * inch, y, f"{share:.0%}", fontsize=6, color=MUTED, va="center", transform=beside)
    axes.set(xlim=(-0.5, l + 0.5), ylim=(0, n), yticks=[])
    axes.set_xlabel(f"matching tokens of {l}; score = matches / {l}")
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return figure


def draw_chunks(run: Run, steps: list[int], pool: int) -> tuple[Figure, float]:
    """Figure 8: mean score by data chunk, one curve for each checkpoint; and a point's median standard error.

    A point pools `pool` neighbouring chunks, but never across the newest chunk of a checkpoint that is drawn.
    Seen and unseen rows are not pooled: a checkpoint has a solid curve for seen rows and a dashed one for
    unseen rows. A kind of row with fewer than a quarter of a point's rows is left out there.
    """
    # Points pool the chunks between two neighbouring cuts.
    lines = {step: run.training_lines(step) for step in steps}
    chunks = sorted({chunk for step in steps for chunk in lines[step]})
    newest = {state["step"]: state["chunk"] for state in run.checkpoints}
    cuts = {*chunks[::pool], *(newest.get(step, -1) + 1 for step in steps)}
    cuts = [*sorted(cut for cut in cuts if chunks[0] <= cut <= chunks[-1]), chunks[-1] + 1]
    figure, axes = canvas(7.2, 3.9)
    ends, errors = [], []
    shades = np.linspace(0, SHADES - 1, len(steps)).round().astype(int) if len(steps) > 1 else [SHADES - 1]
    for step, shade in zip(steps, shades):
        colour = COLOURS[f"s{shade}"][0]

        # The points of this checkpoint: middle of the chunks, mean of the seen rows, mean of the unseen rows.
        points = []
        for first, end in pairwise(cuts):
            found = [lines[step][chunk] for chunk in range(first, end) if chunk in lines[step]]
            if not found:
                continue
            score = np.concatenate([line["matches"] for line in found]) / run.l
            kind = np.concatenate([line["kind"] for line in found])
            rows = [score[kind == name] for name in ("seen", "unseen")]
            errors += [some.std() / len(some) ** 0.5 for some in rows if len(some)]
            # The mean of a few rows is noise.
            means = [some.mean() if 4 * len(some) >= len(score) else np.nan for some in rows]
            points.append(((first + end - 1) / 2, *means))
        if not points:
            continue

        # Its curves. Where there is no unseen mean, the solid line hides the dashed one.
        x, seen, unseen = np.array(points).T
        dashed = np.where(np.isnan(unseen), seen, unseen)
        axes.plot(x, dashed, color=colour, linewidth=0.8, dashes=DASHED)
        axes.plot(x, seen, color=colour, linewidth=1.4)  # a gap where no row is seen
        dot = np.flatnonzero(~np.isnan(seen) & (x <= newest.get(step, -1)))[-1:]
        axes.plot(x[dot], seen[dot], "o", markersize=5.5, color=colour, markeredgecolor=PAPER)
        ends.append((x[-1], dashed[-1] if np.isnan(seen[-1]) else seen[-1], f"step {step:,}", colour))
    chunk_axis(axes, chunks[0] - 0.5, chunks[-1] + 0.5)
    axes.set_ylabel("mean score of the sampled rows")
    axes.set_ylim(0, axes.get_ylim()[1] or 1)
    axes.yaxis.set_major_formatter(FuncFormatter(short))
    label_ends(axes, ends)
    return figure, float(np.median(errors))


def draw_correlation(values: np.ndarray, steps: list[int], title: str) -> Figure | None:
    """Figure 9: Pearson's r between checkpoints over the same rows; None where no two vary."""
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.corrcoef(values) if values.shape[1] > 1 and len(steps) > 1 else np.full((2, 2), np.nan)
    if not np.isfinite(r[np.tril_indices(len(r), -1)]).any():
        return None

    # The lower triangle of the matrix, the diagonal included.
    figure, axes = canvas(3.5, 3.55, left=0.6, right=0.05, bottom=0.55, top=0.3)
    for i, j in zip(*np.tril_indices(len(steps))):
        if np.isfinite(r[i, j]):
            box = {"facecolor": BLUE if r[i, j] >= 0 else FULL, "alpha": 0.6 * abs(r[i, j])}
            ink, text = INK, f"{r[i, j]:.2f}"
            text = {"1.00": "1", "0.00": "0", "-0.00": "0"}.get(text, text.replace("0.", "."))
        else:
            box, ink, text = {"facecolor": GRID}, MUTED, NONE
        axes.add_patch(Rectangle((j, i), 0.94, 0.94, linewidth=0, **box))
        axes.text(j + 0.47, i + 0.49, text, color=ink, ha="center", va="center", fontsize=6)

    # The axes, named by the steps of the checkpoints.
    names = [f"{step:,}" for step in steps]
    at = np.arange(len(steps)) + 0.47
    axes.set_xticks(at, names, rotation=90 if len(steps) > 6 else 0, fontsize=6.5)
    axes.set_yticks(at, names, fontsize=6.5)
    axes.set(xlim=(0, len(steps)), ylim=(len(steps), 0), title=title)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return figure


def draw_mixture(run: Run) -> Figure:
    """Share of every source in the target tokens of every chunk, stacked."""
    # Shares add up from source to source: `tops` is (chunks, sources).
    chunks, sources = run.manifest["chunks"], list(run.manifest["sources"])
    counts = [[chunk["sources"].get(s, {}).get("tokens", 0) for s in sources] for chunk in chunks]
    tokens = np.array(counts, float)  # (chunks, sources)
    tops = np.cumsum(tokens / np.maximum(tokens.sum(1, keepdims=True), 1), axis=1)
    figure, axes = canvas(7.2, 2.2)
    edges, base, ends = np.arange(len(chunks) + 1) - 0.5, np.zeros(len(chunks)), []
    for source, top, count in zip(sources, tops.T, tokens.sum(0)):
        colour = source_colour(run, source)
        axes.stairs(top, edges, baseline=base, fill=True, color=colour, alpha=0.75, linewidth=0)
        ends.append((edges[-1], (base[-1] + top[-1]) / 2, f"{source}  {count / tokens.sum():.1%}", colour))
        base = top
    axes.set(ylim=(0, 1), ylabel="share of target tokens")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}"))
    chunk_axis(axes, edges[0], edges[-1])
    label_ends(axes, ends)
    return figure
