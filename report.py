"""Makes one page of a run folder: what every checkpoint learned, and what it kept of its text.

    python report.py runs/demo                      # -> runs/demo/report.html and runs/demo/figures/*.svg
    python report.py runs/demo --out page/demo.html # -> page/demo.html and page/figures/*.svg

The page is one file: figures are inline SVG, report.css is copied into it, nothing is fetched, no script
runs. Where a part of the run is missing, the page says so, and names the command that makes it. All text is
escaped, because a run may come from a stranger. results.py says what a run folder holds.

A new metric reaches the page by itself. A column of metrics.jsonl that the page does not know becomes a small
figure with its name as title; an unknown kind of line in evals.jsonl becomes curves over checkpoints and a
table. A column needs no figure if it never varies, or if another figure shows it already (NO_FIGURE).
"""

if __name__ == "__main__":  # before packages that take a second to import
    import configurator

    configurator.quiet_imports()

import hashlib
import html
import json
import re
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

import config
import configurator
import figures
import files
import run_folder
from figures import DASHED, INK, MUTED, SOLID, count_full, one_line, short, title_of
from results import NONE, Run, duration, fits, load, moment, plural, show

MOST_ROWS = 20  # rows in the table of those continued best
# Columns of metrics.jsonl without a figure of their own: those of named figures, the axes, the clock, and the
# time of a step, which the figure of the speed shows.
NO_FIGURE = ("loss", "lr", "grad_norm", "tokens_per_second", "step", "tokens", "chunk", "time", "seconds")
# A run may come from a stranger: these limit the kinds of evaluation that the page does not know.
MOST_KINDS, MOST_FIELDS, MOST_CURVES, MOST_RESULTS = 8, 8, 12, 500


# ---- markup -----------------------------------------------------------------------------------------------


class Html(str):
    """Text that is markup already. Everything else is escaped on its way into the page."""


def escape(value: object) -> str:
    return value if isinstance(value, Html) else html.escape(figures.clean(show(value)))


def captioned(run: Run, panels: dict[str, Figure | None], caption: str) -> str:
    """One <figure>: file name -> what is drawn (None: left out). Fills run.figures."""
    title = html.unescape(re.search("<b>(.*?)</b>", caption, re.S)[1])
    panels = {name: figure for name, figure in panels.items() if figure}
    boxes = ""
    for name, figure in panels.items():
        run.figures[name], svg = figures.svg(figure, name, title)
        boxes += f'<div class="scroll">{svg}</div>'
    kind = "panels" if all(figure.get_figwidth() < 5 for figure in panels.values()) else "beside"
    return f'<figure class="{kind}">{boxes}<figcaption>{caption}</figcaption></figure>' if panels else ""


def file_name(taken: dict, *words: str) -> str:
    """A name for a figure that is not taken yet: file_name({}, "metric", "norms/a") -> "metric_norms_a"."""
    name = "_".join(re.sub("[^a-z0-9]+", "_", word.lower())[:40].strip("_") for word in words)
    others = (f"{name}_{n}" for n in range(2, len(taken) + 3))
    return next(free for free in (name, *others) if free not in taken)


def table(rows: list[dict], fold: str = "") -> str:
    """Rows of {column: value} in a box that scrolls; `fold`: folded away under this title."""
    # Columns in which every value is a number or a count are aligned to the right.
    count = re.compile(rf"[\d{NONE}][\d,.]*( of [\d,]+| %)?")
    head = list(rows[0]) if rows else []
    numbers = {column for column in head if all(count.fullmatch(show(row[column])) for row in rows)}

    def cell(tag: str, column: str, value: object) -> str:
        text = show(value)
        kind = "h" if re.fullmatch("[0-9a-f]{64}", text) else "long" * (len(text) > 30)
        kind = "n" if column in numbers else kind
        return f'<{tag} class="{kind}">{escape(value)}</{tag}>' if kind else f"<{tag}>{escape(value)}</{tag}>"

    top = "".join(cell("th", column, column) for column in head)
    body = "".join(f"<tr>{''.join(cell('td', *item) for item in row.items())}</tr>" for row in rows)
    box = f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(fold or "".join(head[:1]))}">'
    text = f"{box}<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    return folded(fold, text) if rows else ""


def folded(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>" if title and body else body


# ---- the parts of the page: "" where nothing is recorded --------------------------------------------------


def part_head(run: Run) -> str:
    """The run in one sentence, and the headline numbers."""
    m, manifest, size = run.metrics, run.manifest, run.about.get("parameters")
    lede = f"""A language model{f" of {short(size)} parameters" if fits(size, int) else ""}, trained on
{" and ".join(manifest.get("sources", {})) or "unknown text"} in
{plural(len(manifest.get("chunks", [])), "data chunk")}, with {plural(len(run.checkpoints), "checkpoint")}:
what each one learned, and what it kept of the text it has seen."""
    tiles = []

    # Training: loss, steps, speed.
    if len(m["step"]):
        train = run.about["config"].get("train", {})
        whole = manifest.get("rows", 0) // train.get("batch_size", 2**53)  # one pass over the data
        asked = train.get("steps") or whole
        planned = show(min(whole, asked) or None)
        if 0 < asked < whole:
            planned += f", where the data have {whole:,}"
        tail = m["loss"][-50:]
        what = f"nats per token, training loss: median of the last {len(tail)} steps; the last {tail[-1]:.3f}"
        tiles.append((f"{np.nanmedian(tail):.3f}", what))
        tiles.append((show(int(m["step"][-1])), f"steps of {planned}: {short(m['tokens'][-1])} tokens"))
        what = f"tokens per second in the median step; {duration(np.nansum(m['seconds']))} in all steps"
        tiles.append((short(np.nanmedian(m["tokens_per_second"])), what))

    # Validation loss, by source.
    for source, lines in run.losses.items():
        first, last = min(lines), max(lines)
        before, now = lines[first]["bits_per_byte"], lines[last]["bits_per_byte"]
        what = (
            f"bits per byte on validation text of {source} at step {last:,}; {before:.3f} at step {first:,}"
        )
        tiles.append((f"{now:.3f}", what))

    # Memorization: seen rows, and validation rows to compare them with.
    for kind in ("seen", *run.validation_kinds()) if run.scores else ():
        rows = run.matches(max(run.scores), kind)
        if len(rows):
            whose = "seen training" if kind == "seen" else f"{source_of(kind)} validation"
            what = f"{whose} rows reproduced in full at step {max(run.scores):,}"
            tiles.append((count_full(rows, run.l), f"{what}; mean score {rows.mean() / run.l:.3f}"))

    blocks = "".join(f"<div><b>{escape(value)}</b>{escape(text)}</div>" for value, text in tiles)
    return f'<p class="lede">{escape(lede)}</p><div class="tiles">{blocks}</div>'


def source_of(kind: str) -> str:
    """source_of("validation:code") -> "code"."""
    return kind.removeprefix("validation:")


def part_words(run: Run) -> str:
    k, l = run.k or "k", run.l or "l"
    return f"""<dl>
<div><dt>Step, chunk, checkpoint</dt><dd>A step is one update of the weights. A chunk is a file of training
rows; chunks are read in order and numbered from 0. A checkpoint is the model as it is after a step; step 0
is the untrained model.</dd></div>
<div><dt>Loss</dt><dd>The mean of &minus;ln p(correct token) over all target tokens of a batch, in nats per
token. Lower is better.</dd></div>
<div><dt>Bits per byte</dt><dd>The loss on validation text, in bits, per UTF-8 byte of the text instead of
per token, so that models with different tokenizers compare. Lower is better.</dd></div>
<div><dt>Score</dt><dd>The model is given the first {k} tokens of a row and continues greedily for {l}. The
score is the share of those {l} that equal the row's own tokens, each at its position: 0 is none, 1 is
all.</dd></div>
<div><dt>Full match</dt><dd>A row of score 1: all {l} tokens are reproduced; the row is {k}-extractible. Given
as a count out of the rows that were scored.</dd></div>
<div><dt>Seen, unseen</dt><dd>A checkpoint has seen a training row when it was trained on text of that row: on
the row itself, in any repeat of its stage, on the same tokens in another pass over their source, or on the
same document read by another source. All other training rows are unseen, and so are validation rows, whose
text was set apart before training. A match in an unseen row is prediction, not memory, unless another
document has the same words; such duplicates are not searched for.</dd></div></dl>"""


def part_training(run: Run) -> str:
    finite, n, window = np.isfinite(run.metrics["loss"]), len(run.metrics["step"]), figures.smoothing(run)
    if not finite.any():
        return ""
    raw, lost = "every step as recorded", int((~finite).sum())
    if n > 2 * figures.COLUMNS:
        raw = f"lowest and highest of each {n / figures.COLUMNS:.0f} of {n:,} steps"

    # The loss, large.
    median = f"Thick line: the running median of {window} steps, for the eye only." * bool(window)
    lost = f"{plural(lost, 'step')} without a finite loss cannot be drawn." * bool(lost)
    caption = f"""<b>Training loss.</b> Thin line: {raw}. {median} Ticks along the bottom are checkpoints. The
dashed line is the loss of a model for which all tokens are equally likely. {lost}"""
    out = captioned(run, {"loss": figures.draw_loss(run)}, caption)

    # The other columns, small.
    clip = run.about["config"].get("optim", {}).get("grad_clip") or 0
    panels = {
        "learning_rate": figures.draw_column(run, "lr"),
        "gradient_norm": figures.draw_column(run, "grad_norm", clip),
        "speed": figures.draw_column(run, "tokens_per_second"),
    }
    caption = f"""<b>Learning rate, gradient norm, speed:</b> {raw}. The gradient norm is the L2 norm over all
parameters, before clipping."""
    return out + captioned(run, panels, caption) + other_metrics(run, raw)


def other_metrics(run: Run, raw: str) -> str:
    """A small figure for each other column of metrics.jsonl that varies."""
    panels, constant = {}, []
    for column, values in run.metrics.items():
        known = values[np.isfinite(values)]
        if column in NO_FIGURE or not len(known):
            continue
        if known.min() == known.max():
            constant.append(f"{one_line(column)} ({short(known[0])})")
        else:
            panels[file_name(panels, "metric", column)] = figures.draw_column(run, column, from_zero=False)
    caption = f"""<b>Other metrics of training:</b> {raw}. A vertical axis begins at 0, except where
all values are close together."""
    if constant:
        caption += f" Without a figure, because they never vary: {escape(', '.join(constant))}."
    return captioned(run, panels, caption)


def part_evaluation(run: Run) -> str:
    """Loss on validation text, then whatever other kinds of results evals.jsonl holds."""
    loss, others = validation_loss(run), other_evaluations(run)
    if others and not loss:
        loss = '<p class="missing">The loss on validation text is not measured yet; eval.py measures it.</p>'
    return loss + others


def validation_loss(run: Run) -> str:
    none = run.without_validation()
    if not run.losses:
        nothing = none and len(none) == len(run.manifest["sources"])
        return "<p>No text is held out, so there is no loss on validation text.</p>" if nothing else ""
    lines, sizes = [], []
    for source, found in run.losses.items():
        values, last = {step: found[step]["bits_per_byte"] for step in sorted(found)}, found[max(found)]
        lines.append((source, values, figures.source_colour(run, source), SOLID))
        n_bytes = round(last["bytes"]) if fits(last.get("bytes"), float) else None
        sizes.append(f"{source}: {show(last.get('rows'))} rows, {show(n_bytes)} bytes")
    caption = f"""<b>Bits per byte on validation text</b>, by source, at every checkpoint; the number is the
newest one's. Training never sees this text ({escape("; ".join(sizes))}).
{escape(f"Nothing is held out of {', '.join(none)}." * bool(none))}"""
    return captioned(run, {"bits_per_byte": figures.draw_lines(run, lines, "bits per byte")}, caption)


def other_evaluations(run: Run) -> str:
    """Each kind of evaluation that the page does not know by name."""
    kinds = list(run.evaluations.items())
    out = "".join(evaluation(run, kind, by_name) for kind, by_name in kinds[:MOST_KINDS])
    return out + left_out(len(kinds), MOST_KINDS, "kind", "p")


def evaluation(run: Run, kind: str, by_name: dict[str, dict]) -> str:
    """A figure for each field of a kind of evaluation, with a curve for each name, and a table of all."""
    heading = escape(one_line(kind))
    fields = list(dict.fromkeys(f for by_step in by_name.values() for line in by_step.values() for f in line))
    out = f"<h3>{heading}</h3>"
    for field in fields[:MOST_FIELDS]:
        curves = []
        for name, by_step in by_name.items():
            values = {step: by_step[step][field] for step in sorted(by_step) if field in by_step[step]}
            if values:
                curves.append((name, values))
        # A field that never varies (a number of questions) or is measured at one checkpoint has no figure.
        if all(len(set(values.values())) == 1 for _, values in curves):
            continue
        lines = []
        for i, (name, values) in enumerate(curves[:MOST_CURVES]):
            dashes = DASHED if i >= len(figures.LINES) else SOLID  # the colours come twice
            lines.append((name, values, figures.LINES[i % len(figures.LINES)], dashes))
        title = title_of(field)
        caption = f"""<b>{heading}: {escape(title)}</b> at every measured checkpoint; the number is the newest
one's. {left_out(len(curves), MOST_CURVES, "curve")}"""
        panels = {file_name(run.figures, "eval", kind, field): figures.draw_lines(run, lines, title)}
        out += captioned(run, panels, caption)

    # The table of all results.
    rows = []
    for name, by_step in by_name.items():
        for step in sorted(by_step):
            row = {"name": one_line(name), "step": str(step)}
            rows.append(row | {title_of(field): by_step[step].get(field) for field in fields[:MOST_FIELDS]})
    out += table(rows[:MOST_RESULTS], fold=f"Table: every result of {one_line(kind)}")
    return (
        out + left_out(len(fields), MOST_FIELDS, "field", "p") + left_out(len(rows), MOST_RESULTS, "row", "p")
    )


def left_out(n: int, most: int, word: str, tag: str = "span") -> str:
    """left_out(5000, 12, "curve") -> "4,988 of 5,000 curves are left out."; "" where all are shown."""
    return f"<{tag}>{n - most:,} of {plural(n, word)} are left out.</{tag}>" if n > most else ""


def part_memorization(run: Run) -> str:
    if not run.scores:
        return ""
    l, steps, validation = run.l, list(run.scores), run.validation_kinds()
    some, which = steps, ""
    if len(steps) > figures.SHADES:
        some = [steps[i] for i in np.linspace(0, len(steps) - 1, 10).round().astype(int)]
        which = f"Drawn: {len(some)} of {len(steps):,} checkpoints, evenly spaced."

    # Mean scores of every kind of row over all checkpoints, as curves and as a table.
    kinds = {"seen": ("seen training", INK, SOLID), "unseen": ("unseen training", MUTED, DASHED)}
    for kind in validation:
        source = source_of(kind)
        kinds[kind] = (f"{source} validation", figures.source_colour(run, source), DASHED)
    lines, body = [], [{"step": str(step)} for step in steps]
    for kind, (name, *style) in kinds.items():
        rows = {step: run.matches(step, kind) for step in steps}
        means = {step: rows[step].mean() / l for step in steps if len(rows[step])}
        if means:
            lines.append((name, means, *style))
        for line, step in zip(body, steps):
            line[f"{name} rows: full matches"] = count_full(rows[step], l)
            line[f"{name} rows: mean score"] = means.get(step)
    without = "No text is held out, so there are no validation rows to compare with." * (not validation)
    caption = f"""<b>Memory or prediction?</b> Mean score of rows that a checkpoint has seen (solid) and of
rows that it has not (dashed). What both share is prediction; what the solid line has above the dashed ones,
beyond chance, is memory. {without}"""
    gone = []  # checkpoints for which no row is unseen any more
    for step in steps:
        if len(run.matches(step, "seen")) and not len(run.matches(step, "unseen")):
            gone.append(step)
    if gone:
        caption += f"""
At {plural(len(gone), "checkpoint")}, first at step {gone[0]:,}, no sampled training row is unseen: the text
of all of them has been trained on. {"Compare with validation rows there." * bool(validation)}"""
    out = captioned(run, {"score": figures.draw_lines(run, lines, "mean score")}, caption)
    out += table(body, fold="Table: full matches and mean score of every checkpoint")

    # The distribution behind each mean.
    outlined = "; outlined, to compare: validation rows" * bool(validation)
    caption = f"""<b>How much of a row is kept.</b> One histogram for each checkpoint, with {l + 1} bins for 0
to {l} matching tokens. Filled: training rows that it has seen{outlined}. A height is
the square root of the share of rows, so that rare bins show; the scale is at the lower right. The last bin,
in orange, holds the full matches. {which}"""
    out += captioned(run, {"ridge": figures.draw_ridge(run, some)}, caption)
    return out + by_chunk(run, some, which) + best_rows(run)


def by_chunk(run: Run, some: list[int], which: str) -> str:
    """Memorization by data chunk and by row, of the checkpoints that are drawn."""
    by_step = {step: run.training_lines(step) for step in some}
    chunks = sorted({chunk for lines in by_step.values() for chunk in lines})
    if not chunks:
        return ""
    pool = -(-len(chunks) // 40)
    figure, error = figures.draw_chunks(run, some, pool)
    sizes = sorted({len(line["rows"]) for lines in by_step.values() for line in lines.values()})

    # Rows beyond the newest finished chunk of a checkpoint (right of its dot) can be seen all the same.
    newest = {state["step"]: state["chunk"] for state in run.checkpoints}
    n_later = n_seen = 0
    for step, lines in by_step.items():
        for chunk, line in lines.items():
            if chunk > newest.get(step, chunk):
                n_later += len(line["kind"])
                n_seen += int((line["kind"] == "seen").sum())
    right = ""
    if n_seen:
        right = f"""Right of the dots, {n_seen:,} of {n_later:,} rows are seen too: their chunk was begun, or
their text was trained on in another pass or by another source."""
    caption = f"""<b>Score by data chunk.</b> One curve for each checkpoint; its dot is the newest chunk that
it has finished. Solid: rows that it has seen. Dashed: rows that it has not seen. Either is left out where it
is less than a quarter of the rows. {right}
{f"A point pools the rows of up to {pool} neighbouring chunks." * (pool > 1)}
Each chunk has {sizes[0]:,}{f" to {sizes[-1]:,}" * (len(sizes) > 1)} sampled rows.
The standard error of a point is about {error:.2g}, so differences of that size between chunks can be chance.
Every checkpoint is scored on the same rows, so curves compare more finely than chunks do. {which}"""
    out = captioned(run, {"score_by_chunk": figure}, caption)
    l, none, body = run.l, {"matches": np.empty(0)}, []
    for chunk in chunks:
        found = {step: by_step[step].get(chunk, none)["matches"] for step in some}
        counts = {f"step {step:,}": count_full(rows, l) for step, rows in found.items()}
        body.append({"chunk": str(chunk)} | counts)
    out += table(body, fold="Table: full matches by chunk")

    # How alike the checkpoints are, row by row.
    values = run.common_rows(some)
    panels = {
        "correlation_score": figures.draw_correlation(values, some, "score"),
        "correlation_full": figures.draw_correlation(values == l, some, "full match, 0 or 1"),
    }
    caption = f"""<b>Do checkpoints keep the same rows?</b> Pearson's correlation between checkpoints
(steps on both axes) over the same {values.shape[1]:,} training rows, seen or not: of their score, and of
whether they match in full. A dash: a checkpoint gives every row the same value, so that there is no
correlation. {which}"""
    return out + captioned(run, panels, caption)


def best_rows(run: Run) -> str:
    """The training rows that the newest checkpoint continues best, and the documents they are from."""
    # Collect every training row with a match, and sort by descending matches.
    step, rows = max(run.scores), []
    for chunk, line in run.training_lines(step).items():
        for i in np.flatnonzero(line["matches"] > 0):
            pairs = line["documents"][i]
            row = {"right": f"{line['matches'][i]} of {run.l}", "chunk": str(chunk)}
            row |= {"position": int(line["rows"][i]), "row": str(line["kind"][i])}
            row |= {"source": " + ".join(dict.fromkeys(source for source, _ in pairs)) or None}
            row |= {"document": " + ".join(name for _, name in pairs) or None}
            rows.append((-int(line["matches"][i]), row))
    rows = [row for _, row in sorted(rows, key=lambda pair: pair[0])[:MOST_ROWS]]
    seen, unseen = (count_full(run.matches(step, kind), run.l) for kind in ("seen", "unseen"))
    unnamed = "A dash: the documents are not recorded." * any(row["source"] is None for row in rows)
    return f"""<h3>Training rows continued best</h3><p>At step {step:,}, rows reproduced in full: seen {seen},
unseen {unseen}. The table has the {len(rows)} rows with the most right tokens, and the documents that their
first {run.k} + {run.l} tokens are from. Positions count rows in training order, from 0. {unnamed}</p>
{table(rows)}"""


def part_data(run: Run) -> str:
    m = run.manifest
    if not m:
        return ""

    # A row for each source.
    total, rows = sum(source["tokens"] for source in m["sources"].values()), []
    for name, source in m["sources"].items():
        row = {"source": name} | {what: source[what] for what in ("files", "documents", "tokens")}
        row |= {"share": f"{100 * source['tokens'] / max(total, 1):.1f} %", "bytes": source["bytes"]}
        row |= {"bytes per token": source["bytes"] / max(source["tokens"], 1)}
        for what in ("documents", "tokens", "rows"):
            row[f"validation {what}"] = source.get(f"validation_{what}")
        inside = {True: "ends of documents", False: "documents"}.get(source.get("split_inside"))
        row |= {"validation text is": inside, "ids that came twice": source.get("duplicate_ids")}
        rows.append(row | {"bad documents": sum(source["bad"].values())})
    out = table(rows)

    # A row for each source of each stage: its mixture, as asked for and as it became.
    rows = []
    for stage in m["stages"]:
        for name, part in stage["mixture"].items():
            asked = sum(part.get("asked_tokens", 0) for part in stage["mixture"].values())
            row = {"stage": stage["name"], "times trained": stage["repeats"], "source": name}
            row |= {what: part[what] for what in ("epochs", "documents")}
            row |= {"tokens asked for": part.get("asked_tokens"), "tokens": part["tokens"]}
            row |= {"share asked for": f"{100 * part['asked_tokens'] / asked:.2f} %" if asked else None}
            row |= {"share": f"{100 * part['tokens'] / max(stage['tokens'], 1):.2f} %"}
            cut = part.get("cut")
            cut = f"{cut['tokens']:,} of {cut['of_tokens']:,} tokens of {cut['id']}" if cut else None
            row |= {"last document, cut": cut}
            rows.append(row | {"rows in all": stage["rows"], "tokens dropped": stage["dropped_tokens"]})
    out += "<h3>Stages</h3>" + table(rows)
    caption = f"""<b>What each chunk is made of:</b> target tokens by source, of {escape(m["rows"])} rows of
{escape(m["seq_len"])} tokens in {plural(len(m["chunks"]), "chunk")}. The share on the right is that of all
chunks together."""
    out += captioned(run, {"mixture": figures.draw_mixture(run)}, caption)

    # A row for each chunk, and what could not be read.
    rows = []
    for i, chunk in enumerate(m["chunks"]):
        row = {"chunk": str(i), "first row": chunk["first"], "rows": chunk["rows"]}
        row |= {"target tokens": chunk["tokens"]}
        for source in m["sources"]:
            part = chunk["sources"].get(source, {})
            row |= {f"{source}: {what}": part.get(what, 0) for what in ("tokens", "documents")}
        rows.append(row)
    out += table(rows, fold="Table: every chunk")
    bad = []
    for name, source in m["sources"].items():
        bad += [{"source": name, "file, line and reason": text} for text in source.get("bad_examples", [])]
    return out + table(bad, fold=f"Table: unreadable documents, the first {len(bad)}")


def part_samples(run: Run) -> str:
    blocks: dict[str, str] = {}  # checkpoint -> its samples
    for sample in run.samples:
        name, prompt = sample["checkpoint"], sample["prompt"]
        settings = [key for key in ("temperature", "top_k", "top_p", "seed") if key in sample]
        how = ", ".join([name, *(f"{key} {json.dumps(sample[key])}" for key in settings)])
        blocks[name] = blocks.get(name, "") + (
            f'<p class="eyebrow">{escape(how)}</p>'
            f"<pre><b>{escape(prompt)}</b>{escape(sample['text'].removeprefix(prompt))}</pre>"
        )
    last = max(blocks, key=lambda name: int("0" + re.sub(r"\D", "", name)[:15]), default="")
    newest = blocks.pop(last, "")
    words = "<p>The prompt is bold; the rest is the model's, unedited.</p>" * bool(newest)
    return words + newest + folded("Samples of other checkpoints", "".join(blocks.values()))


def part_checkpoints(run: Run) -> str:
    training = dict(zip(run.metrics["step"].tolist(), run.metrics["loss"].tolist()))
    rows = []
    for state in run.checkpoints:
        step, newest = state["step"], str(state["chunk"]) if state["chunk"] >= 0 else None
        values = {"loss of this step": training.get(step)}
        for source, lines in run.losses.items():
            values[f"{source}: bits per byte"] = lines.get(step, {}).get("bits_per_byte")
        row = {"step": str(step), "newest chunk": newest, "tokens": state.get("tokens")}
        row |= {name: f"{value:.3f}" if fits(value, float) else None for name, value in values.items()}
        full = count_full(run.matches(step, "seen"), run.l) if step in run.scores else None
        row |= {"seen rows: full matches": full, "written, UTC": moment(state.get("time"))}
        brief = Html(f"<code>{escape(run_folder.weights_hash(state)[:12])}</code>")
        rows.append(row | {"weights, SHA\N{NON-BREAKING HYPHEN}256": brief})
    return table(rows)


def part_settings(run: Run) -> str:
    m, about = run.metrics, run.about

    # The machine, and how long it took.
    rows = []
    for name, value in about.items():
        if name not in ("config", "format"):
            pairs = value.items() if isinstance(value, dict) else [("", value)]
            rows += [(f"{name}: {key}" if key else name, inner) for key, inner in pairs]
    if np.isfinite(m["tokens_per_second"]).any():
        low, middle, high = np.nanpercentile(m["tokens_per_second"], (5, 50, 95))
        speed = f"{middle:,.0f} in the median step; {low:,.0f} to {high:,.0f} in nine of ten"
        rows.append(("tokens per second", speed))
        rows.append(("time in steps", f"{duration(np.nansum(m['seconds']))}, each step counted once"))
    times = [event["time"] for event in run.ledger if fits(event.get("time"), float)]
    if times:
        span = f"{moment(min(times))} to {moment(max(times))} UTC"
        rows.append(("first to last event", f"{duration(max(times) - min(times))}, pauses included: {span}"))
    out = "<h3>Hardware, versions, time</h3>" + table(
        [{"what": what, "value": value} for what, value in rows]
    )

    # Every setting with its value, bold where it is not the default, and its line of the help.
    meaning = dict(re.findall(r"^  --([\w.]+)=.*?  +(\S.*)$", config.settings_help(), re.M))
    default, rows = config.to_dict(config.Config()), []
    for section, values in about["config"].items():
        for name, value in values.items() if isinstance(values, dict) else [("", values)]:
            usual = default.get(section, {}).get(name) if name else default.get(section)
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            text = text if value == usual else Html(f"<b>{escape(text)}</b>")
            setting = f"{section}.{name}" if name else section
            rows.append({"setting": setting, "value": text, "meaning": meaning.get(setting, "")})
    return out + "<h3>Every setting</h3><p>Bold: not the default.</p>" + table(rows)


def part_ledger(run: Run) -> str:
    rows = []
    for event in run.ledger:
        rest = [f"{key} {show(event[key])}" for key in event if key not in ("event", "time", "step")]
        row = {"time, UTC": moment(event.get("time")), "event": event["event"], "step": event.get("step")}
        rows.append(row | {"details": ", ".join(rest)})
    fold = f"Table: all {plural(len(rows), 'event')}, checkpoints included"
    return table([row for row in rows if row["event"] != "checkpoint"]) + table(rows, fold)


def part_hashes(run: Run) -> str:
    def hashes(pairs: list[tuple], fold: str = "") -> str:
        return table([{"file": name, "SHA-256": value} for name, value in pairs], fold)

    # The run's settings, its dataset and its tokenizer.
    recorded = []
    for path in (run.folder / "config.json", run.folder / "dataset.json"):
        if path.is_file():
            recorded.append((f"{path.name}, computed now", hashlib.sha256(path.read_bytes()).hexdigest()))
    for name in ("dataset_sha256", "tokenizer_sha256"):
        values = sorted({str(state[name]) for state in run.checkpoints if name in state})
        recorded += [(f"{name}, recorded in checkpoints", value) for value in values]
    recorded.append(("tokenizer, recorded in dataset.json", run.manifest.get("tokenizer", {}).get("sha256")))

    # The files of the dataset and of the checkpoints.
    files = [*run.manifest.get("files", {}).items()]
    saved = [(f"{s['name']}/{name}", value) for s in run.checkpoints for name, value in s["files"].items()]
    out = "<p>As recorded when the files were written, unless it says computed.</p>" + hashes(recorded)
    out += hashes(files, f"Table: {plural(len(files), 'file')} of the dataset")
    return out + hashes(saved, f"Table: {plural(len(saved), 'file')} of checkpoints")


# ---- the page ---------------------------------------------------------------------------------------------

PARTS = {  # anchor: title, function, the command that makes what is missing
    "words": ("Words", part_words, ""),
    "training": ("Training", part_training, "train"),
    "evaluation": ("Evaluation", part_evaluation, "loss"),
    "memorization": ("Memorization", part_memorization, "memorization"),
    "data": ("Data", part_data, "train"),
    "samples": ("Samples", part_samples, "sample"),
    "checkpoints": ("Checkpoints", part_checkpoints, "train"),
    "settings": ("Settings", part_settings, ""),
    "ledger": ("Ledger", part_ledger, "train"),
    "hashes": ("Hashes", part_hashes, ""),
}


def page(run: Run) -> str:
    """The whole page. Fills run.figures."""
    folder = shlex.quote(str(run.folder))
    commands = {"": "", "train": "python train.py CONFIG", "loss": f"python eval.py {folder}"}
    commands |= {"memorization": f"python memorize.py {folder}"}
    commands |= {"sample": f'python sample.py {folder} --prompt "..." --save'}
    commands = {name: f"<code>{escape(command)}</code>" * bool(command) for name, command in commands.items()}

    # Make the parts one by one: whatever a file holds, a part that fails takes no other with it.
    def safely(part: Callable, command: str = "") -> str:
        try:
            text = part(run)
        except Exception as error:
            return f'<p class="missing">This could not be shown: {escape(repr(error))}</p>'
        missing = f'<p class="missing">Nothing is recorded yet. It comes from {commands[command]}</p>'
        return text or missing * bool(command)

    body = "".join(
        f'<section id="{anchor}"><h2>{title}</h2>{safely(part, command)}</section>'
        for anchor, (title, part, command) in PARTS.items()
    )
    nav = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, (title, *_) in PARTS.items())
    notes = "".join(f"<li>{escape(text)} {commands[command]}</li>" for text, command in run.notes)
    notes = f'<div class="notes"><b>Before you read</b><ul>{notes}</ul></div>' if notes else ""

    # The frame: name, colours for light and dark, style.
    name = escape(run.about["config"].get("name") or run.folder.resolve().name)
    light, dark = (
        " ".join(f"--{name}: {pair[i]};" for name, pair in figures.COLOURS.items()) for i in (0, 1)
    )
    css = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,"><title>{name}: training report</title><style>
:root {{ color-scheme: light; {light} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ color-scheme: dark; {dark} }} }}
{css}</style></head><body>
<header><p class="eyebrow">nano360 training report</p><h1>{name}</h1>{safely(part_head)}{notes}
<nav aria-label="Contents">{nav}</nav></header><main>{body}</main>
<footer>Made by report.py on {moment(time.time())} UTC from the run's own records.
Every figure is also a file in figures/.</footer>
</body></html>
"""


def write(folder: str | Path, out: str | Path = "") -> Path:
    """Writes the page and its figures, and returns the page's path. Raises ConfigError if there is no run."""
    run = load(folder)
    out = Path(out or run.folder / "report.html")
    with matplotlib.rc_context(figures.STYLE):
        text = page(run)
    (out.parent / "figures").mkdir(parents=True, exist_ok=True)
    for name, svg in run.figures.items():
        files.write(out.parent / "figures" / f"{name}.svg", svg.encode("utf-8", "backslashreplace"))
    # backslashreplace: an id in an old dataset may be no Unicode.
    files.write(out, text.encode("utf-8", "backslashreplace"))
    return out


@configurator.script
def main() -> None:
    parser = configurator.parser(__doc__)
    parser.add_argument("run", help="the run folder")
    parser.add_argument("--out", default="", help="the page; default: RUN/report.html")
    arguments = parser.parse_args()
    out = write(arguments.run, arguments.out)
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
