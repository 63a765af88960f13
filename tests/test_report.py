"""The page of a run: complete runs, partial ones, damaged ones and hostile ones.

A page takes a second to draw, so one is shared wherever reading the run (`results.load`) does not answer.
"""

import html.parser
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest

import config
import figures
import report
import results

SHA = "0123456789abcdef" * 4


def fake_run(folder, n_chunks=12, steps_per_chunk=45, n_rows=40, checkpoints=None, sources=("code", "docs")):
    """Writes a run folder in the formats of the pipeline, with numbers that behave like a small model's."""
    rng = np.random.default_rng(3)
    B, T, l = 16, 256, 32
    total, rows = n_chunks * steps_per_chunk, steps_per_chunk * B
    shares = dict(zip(sources, (0.8, 0.2)))

    def put(name, value):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(value) if isinstance(value, dict) else "".join(json.dumps(v) + "\n" for v in value)
        path.write_text(text)

    shape = dict(vocab_size=2048, seq_len=T, d_model=192, n_layers=4, n_heads=6, n_kv_heads=2, d_ff=512)
    places = tuple(config.Source(name, ("/usr/lib/python3/**/*.py",)) for name in sources)
    cfg = config.Config(
        model=config.Model(**shape),
        data=config.Data(sources=places, n_chunks=n_chunks),
        optim=config.Optim(lr=2e-3, warmup_steps=50),
        train=config.Train(batch_size=B, micro_batch_size=B, device="cpu"),
        eval=config.Eval(rows_per_chunk=n_rows),
        name="demo",
    ).resolved()
    about = {"format": 1, "config": config.to_dict(cfg), "git": "8b1f0c2 (clean)", "parameters": 1960000}
    about |= {"versions": {"python": "3.11.2", "torch": "2.13.0"}, "device": "cpu, 2 cores, Intel Xeon"}
    put("config.json", about)

    chunks = []
    for i in range(n_chunks):
        tokens = {s: int(rows * T * share * rng.uniform(0.94, 1.06)) for s, share in shares.items()}
        parts = {s: {"tokens": n, "documents": n // 900} for s, n in tokens.items()}
        chunk = {"file": f"chunks/{i:03d}.bin", "first": i * rows, "rows": rows, "tokens": rows * T}
        chunks.append(chunk | {"sources": parts})
    sizes = {s: sum(c["sources"][s]["tokens"] for c in chunks) for s in sources}
    validation = {"validation_documents": 21, "validation_tokens": 51234, "validation_bytes": 170212}
    validation |= {"validation_rows": 200, "validation_dropped_tokens": 33}
    bad = {"bad": {"not UTF-8": 1}, "bad_examples": ["lib2/x.py:1: not UTF-8"]}
    stage = {"name": "main", "repeats": 1, "tokens": sum(sizes.values()), "rows": total * B}
    stage |= {"dropped_tokens": 77, "first_position": 0}
    stage["mixture"] = {s: {"epochs": 1.0, "documents": 590, "tokens": n} for s, n in sizes.items()}
    manifest = {"format": 1, "name": "demo", "seq_len": T, "row_length": T + 1, "dtype": "uint16"}
    manifest |= {"vocab_size": 2048, "eot": 2047, "tokenizer": {"file": "tokenizer.json", "sha256": SHA}}
    manifest |= {"seed": 1234, "order": "feistel-1", "row_multiple": B, "settings": {}}
    manifest["sources"] = {
        s: {"files": 611, "documents": 590, "tokens": n, "bytes": int(n * 3.42)} | validation | bad
        for s, n in sizes.items()
    }
    manifest |= {"stages": [stage], "rows": total * B, "chunks": chunks}
    put("dataset.json", manifest | {"files": {c["file"]: SHA for c in chunks} | {"tokenizer.json": SHA}})

    metrics = []
    for step in range(1, total + 1):
        lr = 2e-3 * (step / 50 if step < 50 else 0.55 + 0.45 * math.cos(math.pi * (step - 50) / (total - 50)))
        loss = 2.2 + 5.4 * math.exp(-step / 25) + 0.9 * math.exp(-step / 200) + rng.normal(0, 0.09)
        line = {"step": step, "loss": loss, "lr": lr, "tokens": step * B * T, "seconds": B * T / 20000}
        line["grad_norm"] = 0.5 + 2 * math.exp(-step / 30) + abs(rng.normal(0, 0.15))
        line |= {"tokens_per_second": 21000 * rng.uniform(0.85, 1.05), "data_seconds": 0.0004}
        metrics.append(line | {"chunk": (step - 1) // steps_per_chunk, "time": 1.76e9 + step * 0.2})
    put("metrics.jsonl", metrics)

    ledger, evals = [{"event": "start", "time": 1.76e9, "step": 0, "world_size": 1}], []
    parts = [*range(n_chunks), *(f"validation:{s}" for s in sources)]
    sampled = {c: list(range(n_rows)) for c in parts}
    for c in range(n_chunks):
        sampled[c] = (np.sort(rng.choice(rows, n_rows, replace=False)) + c * rows).tolist()
    ease = {c: rng.beta(0.25, 3.0, (n_rows, 1)) for c in parts}
    luck = {c: (rng.random((n_rows, l)), rng.random(n_rows)) for c in parts}  # the same at every checkpoint
    for newest in range(-1, n_chunks) if checkpoints is None else checkpoints:
        step = (newest + 1) * steps_per_chunk
        name, time, progress = f"step-{step:08d}", 1.76e9 + step * 0.2, 1 - math.exp(-3 * step / total)
        state = {"format": 1, "step": step, "rows": step * B, "tokens": step * B * T, "chunk": newest}
        state |= {"dataset_sha256": SHA, "tokenizer_sha256": SHA, "time": time}
        weights = {"model.safetensors": f"{step:08x}" * 8, "optimizer.safetensors": SHA, "config.json": SHA}
        put(f"checkpoints/{name}/state.json", state | {"files": weights})
        ledger.append({"event": "checkpoint", "time": time, "step": step, "folder": name})
        about = {"format": 1, "checkpoint": name, "step": step}
        for i, source in enumerate(sources):
            bits = 3.1 - 1.9 * progress + 0.25 * i
            line = about | {"kind": "loss", "source": source, "loss": bits * 2.4, "bits_per_byte": bits}
            line |= {"perplexity": math.exp(bits * 2.4), "tokens": 25600, "bytes": 87000, "rows": 100}
            evals.append(line | {"seconds": 1.2, "inputs": {"weights_sha256": SHA}})
        lines = []
        for c in parts:
            seen = not isinstance(c, str) and c <= newest
            p = ease[c] * progress * (1.2 + 0.4 * math.exp(c - newest) if seen else 1)
            found = (luck[c][0] < np.clip(p, 0.002, 0.97)).sum(1)
            found[luck[c][1] < progress * (0.03 if seen else 0.006)] = l
            line = about | {"chunk": c, "prompt_tokens": 32, "continuation_tokens": l, "rows": sampled[c]}
            line |= {"matches": found.tolist(), "seen": [seen] * n_rows, "full": int((found == l).sum())}
            lines.append(line | {"total": n_rows, "score": float(found.mean() / l), "inputs": {}})
        put(f"memorization/{name}.jsonl", lines)
    put("evals.jsonl", evals)
    put("ledger.jsonl", [*ledger, {"event": "finish", "time": 1.76e9 + total * 0.2, "step": total}])
    text = "def read(path):\n    with open(path) as file:\n        return file.read()\n\n\n"
    text += "class <script>alert(1)</script>:"
    sample = {"checkpoint": f"step-{total:08d}", "prompt": "def read(", "text": text, "seed": 1}
    put("samples.jsonl", [sample | {"temperature": t, "top_k": 0, "top_p": 0.95} for t in (0.0, 0.8, 1.0)])
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A finished run of 12 chunks, 13 checkpoints and 2 sources, and its page."""
    folder = fake_run(tmp_path_factory.mktemp("runs") / "demo")
    return folder, report.write(folder).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return fake_run(tmp_path_factory.mktemp("runs") / "small", n_chunks=3, steps_per_chunk=8, n_rows=7)


@pytest.fixture
def small(original, tmp_path):
    """A run of 3 chunks to damage."""
    return shutil.copytree(original, tmp_path / "small")


def notes_of(folder):
    return "\n".join(text for text, _ in results.load(folder).notes)


def page_of(folder):
    text = report.write(folder).read_text(encoding="utf-8")
    assert "could not be shown" not in text, re.findall("could not be shown[^<]*", text)
    return text


def words_of(page):
    """The text of a page as a reader sees it, without markup."""
    return re.sub(r"\s+", " ", re.sub(r"<style.*?</style>|<[^>]+>", " ", page, flags=re.S))


class Tags(html.parser.HTMLParser):
    """Every tag and attribute of a page, and whether its elements close in order."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.open, self.ids = set(), [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag


def test_page_of_a_complete_run_shows_every_part_and_nothing_is_missing(demo):
    folder, page = demo
    assert (
        "could not be shown" not in page
        and "Nothing is recorded" not in page
        and "Before you read" not in page
    )
    for title, *_ in report.PARTS.values():
        assert f"<h2>{title}</h2>" in page
    assert page.count("<figcaption>") == 8
    names = [
        "loss",
        "learning_rate",
        "gradient_norm",
        "speed",
        "bits_per_byte",
        "score",
        "ridge",
        "score_by_chunk",
    ]
    names += ["correlation_score", "correlation_full", "mixture"]
    assert sorted(path.stem for path in (folder / "figures").iterdir()) == sorted(names)


def test_page_asks_for_nothing_runs_nothing_and_is_well_formed(demo):
    _, page = demo
    found = Tags(page)
    assert not found.open
    assert not found.tags & {"script", "img", "iframe", "object", "embed", "base", "form", "video", "audio"}
    for name, value in found.attributes:
        assert not name.startswith("on")
        if name in ("href", "src", "xlink:href", "action", "data"):
            assert value.startswith("#") or value == "data:,"
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    assert len(found.ids) == len(set(found.ids))
    assert "default-src 'none'" in page


def test_counts_on_the_page_are_those_in_the_files(demo):
    folder, page = demo
    seen = full = 0
    for line in (folder / "memorization/step-00000540.jsonl").read_text().splitlines():
        line = json.loads(line)
        if not isinstance(line["chunk"], str):
            seen += sum(line["seen"])
            full += sum(m == 32 for m, known in zip(line["matches"], line["seen"]) if known)
    assert seen == 480 and full > 0
    assert f"<b>{full} of 480</b>" in page
    loss = {
        m["step"]: m["loss"] for m in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    }
    for step in (45, 90, 540):
        assert f'<td class="n">{step}</td>' in page and f'<td class="n">{loss[step]:.3f}</td>' in page
    assert "1,960,000" in page and "1.96 M parameters" in page
    assert "of 540: 2.21 M tokens" in page  # 540 steps x 16 rows x 256 tokens = 2,211,840


def test_figures_use_variables_in_the_page_and_plain_colours_in_files(demo):
    folder, page = demo
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.S))
    assert drawn.count("<svg") == 11 and "var(--c0)" in drawn and "var(--paper)" in drawn
    assert not re.findall(r"#[0-9a-f]{6}\b", drawn)  # else a colour would have no dark value
    for path in (folder / "figures").iterdir():
        assert "var(" not in path.read_text() and path.read_text().startswith("<?xml")


def test_text_has_contrast_in_light_and_dark():
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for name, pair in figures.COLOURS.items():
        for colour, paper in zip(pair, figures.COLOURS["paper"]):
            dark, light = sorted((luminance(colour), luminance(paper)))
            ratio = (light + 0.05) / (dark + 0.05)  # WCAG 2: 4.5 for text, 3 for what is drawn
            assert ratio >= {"paper": 1, "grid": 1, "rule": 1.5}.get(
                name, 4.5 if name[0] in "cim" else 2.2
            ), (name, ratio)


COMMANDS = {"dataset.json": "train.py", "ledger.jsonl": "train.py", "metrics.jsonl": "train.py"}
COMMANDS |= {"checkpoints": "train.py", "evals.jsonl": "eval.py", "memorization": "memorize.py"}
COMMANDS |= {"samples.jsonl": "sample.py"}


@pytest.mark.parametrize(
    "missing",
    [["dataset.json", "evals.jsonl", "memorization", "samples.jsonl"], ["metrics.jsonl", "checkpoints"]],
    ids=["training only", "measured only"],
)
def test_a_partial_run_says_what_is_missing_and_how_to_make_it(small, missing):
    for name in missing:
        shutil.rmtree(small / name) if (small / name).is_dir() else (small / name).unlink()
    page = page_of(small)
    for name in missing:
        assert f"<code>python {COMMANDS[name]}" in page
    Tags(page)


def test_a_run_of_which_only_the_config_is_left_makes_a_page(original, tmp_path):
    shutil.copy(original / "config.json", tmp_path)
    page = page_of(tmp_path)
    for command in COMMANDS.values():
        assert f"<code>python {command}" in page
    assert page.count("Nothing is recorded yet.") == 7 and "<svg" not in page
    Tags(page)


def test_a_run_of_one_source_that_holds_nothing_out_says_so_and_draws_no_validation_rows(tmp_path):
    folder = fake_run(tmp_path, n_chunks=1, steps_per_chunk=3, n_rows=2, sources=("story",))
    manifest = json.loads((folder / "dataset.json").read_text())
    manifest["sources"]["story"]["validation_rows"] = 0
    (folder / "dataset.json").write_text(json.dumps(manifest))
    (folder / "evals.jsonl").unlink()
    for path in (folder / "memorization").iterdir():
        path.write_text(path.read_text().splitlines()[0] + "\n")  # of chunk 0, without the validation rows
    page, words = page_of(folder), words_of(page_of(folder))
    assert "No text is held out, so there is no loss on validation text." in words
    assert "No text is held out, so there are no validation rows" in words and "outlined" not in words
    assert "python eval.py" not in words  # it would measure nothing
    assert "validation" not in "".join(re.findall("<svg.*?</svg>", page, re.S))


def test_a_source_that_holds_nothing_out_is_named_beside_those_that_do(small):
    manifest = json.loads((small / "dataset.json").read_text())
    manifest["sources"]["docs"]["validation_rows"] = 0
    (small / "dataset.json").write_text(json.dumps(manifest))
    lines = (small / "evals.jsonl").read_text().splitlines(keepends=True)
    (small / "evals.jsonl").write_text("".join(line for line in lines if '"docs"' not in line))
    assert "Nothing is held out of docs." in words_of(page_of(small))


def test_bytes_of_parts_of_documents_are_shown_whole(small):
    text = (small / "evals.jsonl").read_text()
    (small / "evals.jsonl").write_text(text.replace('"bytes": 87000', '"bytes": 87000.667'))
    assert "code: 100 rows, 87,001 bytes" in words_of(page_of(small))


def test_losses_by_two_protocols_are_named(small):
    lines = [json.loads(line) for line in (small / "evals.jsonl").read_text().splitlines()]
    for line in lines:
        line["inputs"]["protocol"] = f"nats-over-bytes-{1 + (line['step'] == 24)}"
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (small / "evals.jsonl").write_text(text)
    assert notes_of(small).count("by nats-over-bytes-1 and nats-over-bytes-2: its checkpoints do not") == 2
    # the run is measured again: of each source and step the last line counts
    (small / "evals.jsonl").write_text(text + text.replace("nats-over-bytes-1", "nats-over-bytes-2"))
    assert not notes_of(small)


def test_a_single_checkpoint_makes_a_page(tmp_path):
    page = page_of(fake_run(tmp_path, n_chunks=2, steps_per_chunk=5, n_rows=4, checkpoints=[-1]))
    assert "step 0" in words_of(page)


def test_many_checkpoints_are_thinned_and_the_page_says_so(tmp_path):
    run = fake_run(tmp_path, n_chunks=41, steps_per_chunk=2, n_rows=3, checkpoints=range(-1, 41, 3))
    with matplotlib.rc_context(figures.STYLE):
        words = words_of(report.part_memorization(results.load(run)))
    assert words.count("Drawn: 10 of 14 checkpoints, evenly spaced.") == 3
    assert "pools the rows of up to 2 neighbouring chunks" in words


def test_the_later_line_of_a_step_counts(small):
    with open(small / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 24, "loss": 1.2345, "tokens": 24 * 4096}) + "\n")
    run = results.load(small)
    assert "1 step recorded twice" in run.notes[0][0]
    assert run.metrics["loss"][-1] == 1.2345 and len(run.metrics["loss"]) == 24


def test_a_line_cut_off_by_a_kill_is_ignored_and_named(small):
    for name in (
        "metrics.jsonl",
        "evals.jsonl",
        "ledger.jsonl",
        "samples.jsonl",
        "memorization/step-00000024.jsonl",
    ):
        with open(small / name, "a") as file:
            file.write('{"step": 25, "lo')
    assert notes_of(small).count("the last line is cut off") == 5
    assert len(results.load(small).metrics["step"]) == 24


def test_a_checkpoint_without_state_is_ignored_and_steps_are_numbers(small):
    (small / "checkpoints/step-00000099").mkdir()
    state = json.loads((small / "checkpoints/step-00000024/state.json").read_text())
    state["step"] = 100000000
    (small / "checkpoints/step-100000000").mkdir()
    (small / "checkpoints/step-100000000/state.json").write_text(json.dumps(state))
    assert "checkpoints/step-00000099 has no usable state.json" in notes_of(small)
    assert [c["step"] for c in results.load(small).checkpoints] == [0, 8, 16, 24, 100000000]


def test_checkpoints_with_the_same_weights_are_named(small):
    state = json.loads((small / "checkpoints/step-00000024/state.json").read_text())
    state["files"]["model.safetensors"] = f"{16:08x}" * 8
    (small / "checkpoints/step-00000024/state.json").write_text(json.dumps(state))
    assert "steps 16, 24 have the same weights" in notes_of(small)


def test_an_unfinished_run_is_called_unfinished(small):
    lines = (small / "ledger.jsonl").read_text().splitlines()[:-1]
    (small / "ledger.jsonl").write_text(
        "\n".join([*lines, json.dumps({"event": "resume", "step": 20, "time": 1.76e9}), ""])
    )
    assert "The run is not finished; its last event: resume." in notes_of(small)


def test_losses_that_are_not_finite_are_counted_not_drawn(small):
    lines = [json.loads(line) for line in (small / "metrics.jsonl").read_text().splitlines()]
    lines[3]["loss"], lines[9]["loss"], lines[9]["grad_norm"] = math.nan, None, math.inf
    (small / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "2 steps without a finite loss" in words_of(report.part_training(results.load(small)))


def add_lines(path, lines):
    with open(path, "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def test_a_new_metric_and_a_new_kind_of_evaluation_reach_the_page_by_themselves(small):
    lines = [json.loads(line) for line in (small / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {"weight_norm": 100 + line["step"], "norms": {"layers.0": line["step"] / 7}, "constant": 5}
    lines[3] |= {"skipped": True}  # says that a step moved nothing: no metric
    (small / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tasks = []
    for step in (0, 8, 16, 24):
        for task in ("copy", "add"):
            line = {"kind": "task", "task": task, "checkpoint": f"step-{step:08d}", "step": step, "items": 50}
            tasks.append(
                line | {"accuracy": (step + len(task)) / 99, "seconds": step, "inputs": {"shots": 5}}
            )
    again = {"kind": "task", "task": "copy", "step": 24, "accuracy": 0.875}
    once = {"kind": "toxicity", "step": 24, "rate": 0.0625}
    add_lines(small / "evals.jsonl", [*tasks, again, once])

    run = results.load(small)
    assert run.metrics["weight_norm"].tolist() == list(range(101, 125)) and "skipped" not in run.metrics
    assert run.evaluations["task"]["copy"][24] == {"accuracy": 0.875} and not run.notes
    assert run.evaluations["toxicity"] == {"toxicity": {24: {"rate": 0.0625}}}

    page = page_of(small)
    names = {path.stem for path in (small / "figures").iterdir()}
    assert {"metric_weight_norm", "metric_norms_layers_0", "eval_task_accuracy"} <= names
    # Columns that never vary, the clock, counters, and fields that are measured once have no figure.
    assert len(names) == 11 + 3
    for title in ("weight_norm", "norms/layers.0", "accuracy", "copy  0.875", "add  0.273"):
        assert f">{title}</text>" in page or f">{title.replace('  ', ' ')}</text>" in page, title
    words = words_of(page)
    assert "because they never vary" in words and "constant (5)" in words
    assert "Table: every result of task" in words and "toxicity 24 0.0625" in words
    Tags(page)


def test_absurd_names_and_thousands_of_columns_and_kinds_do_not_break_the_page(small):
    lines = [json.loads(line) for line in (small / "metrics.jsonl").read_text().splitlines()]
    nested = deep = {}
    for _ in range(300):
        deep["deep"] = deep = {"x": 1}
    odd = ["", EVIL, "\ud800", "x" * 10000, "a\nb", "../../etc/passwd", "A", "a", "a!", "$\\frac{1", "loss/"]
    for line in lines:
        n = line["step"]
        line |= {name: n + i for i, name in enumerate(odd)} | {"nested": nested}
        line |= {"huge": 1e29 * (n % 2), "beyond": 1e300, "below": -n, "digits": 10**400}
        line |= {f"column {i}": n * i for i in range(3000)}
    (small / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evals = []
    for step in (8, 24):
        fields = {f"{odd[j % len(odd)]}{j}": -step * j for j in range(30)} | {"huge": 1e29, "nan": math.nan}
        for i, name in enumerate(odd * 20):
            evals.append({"kind": "tasks" + EVIL, "task": f"{name}{i}", "step": step} | fields)
        evals += [{"kind": f"kind {i}", "step": step, "value": step, "note": EVIL} for i in range(3000)]
    add_lines(small / "evals.jsonl", [*evals, {"kind": "nothing", "step": 1}, {"kind": "loss", "step": 1}])

    page = page_of(small)
    found = Tags(page)
    assert not found.tags & {"script", "img"} and not [n for n, _ in found.attributes if n.startswith("on")]
    assert len(found.ids) == len(set(found.ids)) and len(page) < 10e6
    for path in (small / "figures").iterdir():
        assert re.fullmatch("[a-z0-9_]+.svg", path.name) and len(path.name) < 120
    words = words_of(page)
    # Three columns of fake_run, the odd names, three levels of x, huge and below, and the many.
    n_columns = 3 + len(odd) + 3 + 2 + 3000
    assert f"{n_columns - 60:,} columns left out; beside the usual ones, the first 60" in words
    assert "2,993 of 3,001 kinds are left out." in words and "23 of 31 fields are left out." in words
    assert "208 of 220 curves are left out." in words and "evals.jsonl: 2 lines without a result" in words


EVIL = '</td><script>alert(1)</script><img src=x onerror="alert(2)">&$x_1$\u202e\x07'


def spoil(value):
    """Every text in a JSON value, keys included, made hostile."""
    if isinstance(value, dict):
        keep = ("event", "chunk", "checkpoint")
        return {
            key if isinstance(item, (int, float, list)) or key in PLAIN else key + EVIL: item
            if key in keep
            else spoil(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [spoil(item) for item in value]
    return value + EVIL if isinstance(value, str) else value


PLAIN = ["config", "train", "model", "optim", "data", "eval", "tokenizer", "name", "sources", "mixture"]
PLAIN += ["event", "source", "prompt", "text", "checkpoint", "files", "file", "sha256", "versions"]
PLAIN += ["git", "device"]


def test_text_from_a_stranger_stays_text(small):
    for path in [*small.glob("*.json"), *small.glob("checkpoints/*/state.json")]:
        path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
    for path in [small / "evals.jsonl", small / "ledger.jsonl", small / "samples.jsonl"]:
        lines = [spoil(json.loads(line)) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with open(small / "samples.jsonl", "a") as file:
        file.write(
            json.dumps(
                {"checkpoint": EVIL, "prompt": EVIL, "text": "\ud800" + EVIL, "seed": EVIL, "top_k": [EVIL]}
            )
            + "\n"
        )
        file.write(json.dumps({"checkpoint": "step-1\u0661", "prompt": "", "text": ""}) + "\n")
    page = report.write(small).read_text(encoding="utf-8")
    found = Tags(page)
    assert "alert(1)" in page and "\u202e" not in page and "\x07" not in page
    assert not found.tags & {"script", "img"} and not [
        name for name, _ in found.attributes if name.startswith("on")
    ]


FILES = ["dataset.json", "metrics.jsonl", "evals.jsonl", "ledger.jsonl", "samples.jsonl"]
FILES += ["memorization/step-00000024.jsonl", "checkpoints/step-00000024/state.json"]
DAMAGE = [b"", b"\xff\xfe\x00", b"[1, 2]\n", b'{"step": "x", "chunks": 3, "event": []}\n', b"[" * 99999]
DAMAGE += [b"1" * 9999 + b"\n", b'{"step": 1e999, "sources": {"a": null}, "files": {}, "chunk": 10e9}\n']


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A run with one file of each kind."""
    folder = tmp_path_factory.mktemp("runs") / "bare"
    return fake_run(folder, n_chunks=3, steps_per_chunk=8, n_rows=7, checkpoints=[2])


@pytest.mark.parametrize("content", DAMAGE, ids=range(len(DAMAGE)))
def test_damaged_files_never_stop_the_page(bare, tmp_path, content):
    folder = shutil.copytree(bare, tmp_path / "bare")
    for name in FILES:
        (folder / name).write_bytes(content)
    run = results.load(folder)
    assert not run.losses and not run.scores and not run.samples and not run.ledger
    Tags(report.write(folder).read_text(encoding="utf-8"))


def test_one_damaged_part_leaves_the_others_standing(small):
    (small / "dataset.json").write_text('{"stages": [], "sources": {"a": null}, "files": {}, "chunks": 3}')
    page = report.write(small).read_text(encoding="utf-8")
    Tags(page)
    assert page.count("could not be shown") == 2 and page.count("<svg") == 10  # the headline and the data


def test_memorization_lines_that_contradict_themselves_are_left_out(small):
    line = {
        "step": 24,
        "chunk": 0,
        "prompt_tokens": 32,
        "continuation_tokens": 32,
        "rows": [1, 2],
        "matches": [3, 33],
        "seen": [True, True],
    }
    with open(small / "memorization/step-00000024.jsonl", "a") as file:
        for change in (
            {},
            {"matches": [3]},
            {"continuation_tokens": 0},
            {"continuation_tokens": 10**12},
            {"chunk": "else"},
            {"chunk": None},
            {"documents": [[]]},
            {"documents": [[], [["code"]]]},
            {"rows": []},
        ):
            file.write(json.dumps({**line, **change}) + "\n")
    assert notes_of(small).count("a line contradicts itself") == 9


def test_another_l_is_not_mixed_in(small):
    line = {
        "step": 24,
        "chunk": 0,
        "prompt_tokens": 8,
        "continuation_tokens": 4,
        "rows": [1],
        "matches": [4],
        "seen": [True],
    }
    with open(small / "memorization/step-00000024.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    assert "2 pairs of k and l; shown is k = 32, l = 32" in notes_of(small)


def test_rows_continued_best_are_listed_with_their_documents(small):
    path = small / "memorization/step-00000024.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["matches"] = [0] * 7
    lines[0] |= {"matches": [0, 5, 31, 0, 32, 32, 32]}
    lines[0]["documents"] = [[], [], [], [], [["code", "a<b>.py"]], [["code", "c.py"], ["docs", "d.py"]], []]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    part = report.best_rows(results.load(small))
    assert "reproduced in full: seen 3 of 21, unseen \u2013. The table has the 5 rows" in words_of(part)
    cells = re.findall("<td[^>]*>(.*?)</td>", part)
    where = [f"{row:,}" for row in lines[0]["rows"]]
    assert cells[:6] == ["32 of 32", "0", where[4], "seen", "code", "a&lt;b&gt;.py"]
    assert cells[6:12] == ["32 of 32", "0", where[5], "seen", "code + docs", "c.py + d.py"]
    assert cells[12:18] == ["32 of 32", "0", where[6], "seen", "\u2013", "\u2013"] and "not recorded" in part
    assert cells[18] == "31 of 32" and cells[24] == "5 of 32"

    for line in lines:
        line["matches"] = [32] * 7
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report.best_rows(results.load(small)).count("<tr>") == 1 + 20


def test_common_rows_equal_a_worked_example(small):
    def line(rows, matches):
        return {"rows": np.array(rows), "matches": np.array(matches)}

    run = results.load(small)
    run.scores = {
        8: {0: line([5, 3, 9], [10, 20, 30]), "validation:code": line([3], [7])},
        16: {0: line([9, 3], [6, 4]), 1: line([40], [1])},
    }
    assert run.common_rows([8, 16]).tolist() == [[20, 30], [4, 6]]  # rows 3 and 9
    assert run.common_rows([8]).tolist() == [[20, 10, 30]]


def test_rows_are_counted_by_whether_they_were_seen(small):
    lines = map(json.loads, (small / "memorization/step-00000016.jsonl").read_text().splitlines())
    lines, run = {line["chunk"]: line["matches"] for line in lines}, results.load(small)
    assert run.validation_kinds() == ["validation:code", "validation:docs"]
    assert run.matches(16, "seen").tolist() == lines[0] + lines[1]
    assert run.matches(16, "unseen").tolist() == lines[2]
    assert run.matches(16, "validation:docs").tolist() == lines["validation:docs"]


def test_labels_keep_their_order_and_distance_and_move_least():
    assert figures.spread([1.0, 5.0], 2).tolist() == [1, 5]
    assert figures.spread([5.0, 1.0, 1.0], 2).tolist() == [5, 0, 2]  # the two at 1 share the move
    placed = np.sort(figures.spread(list(np.random.default_rng(0).random(13)), 0.1))
    assert np.diff(placed).min() >= 0.1 - 1e-12


def test_envelope_keeps_every_extreme():
    y = np.random.default_rng(0).normal(size=12345)
    y[7777], y[4321] = 50, -50
    x, kept = figures.envelope(np.arange(12345), y)
    assert len(x) <= 2000 and kept.max() == 50 and kept.min() == -50 and (np.diff(x) > 0).all()
    assert figures.envelope(np.arange(10), y[:10])[1].tolist() == y[:10].tolist()


def test_numbers_are_written_for_readers():
    assert (
        figures.short(9830400) == "9.83 M"
        and figures.short(1.26e12) == "1.26 T"
        and figures.short(0.002) == "0.002"
    )
    assert (
        results.duration(3725) == "1 h 2 min"
        and results.duration(125) == "2 min 5 s"
        and results.duration(0.2) == "0 s"
    )
    assert (
        results.show(9830400) == "9,830,400"
        and results.show(True) == "true"
        and results.show(float("nan")) == results.NONE
    )
    assert figures.count_full(np.array([32, 31, 32, 0]), 32) == "2 of 4"
    assert results.moment(0) == "1970-01-01 00:00:00" and results.moment("x") == results.NONE


def test_a_folder_that_is_no_run_is_a_user_error_without_traceback(tmp_path, monkeypatch, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "llama"}')
    for folder in (tmp_path, tmp_path / "model", tmp_path / "nowhere"):
        monkeypatch.setattr(sys, "argv", ["report.py", str(folder)])
        with pytest.raises(SystemExit) as stop:
            report.main()
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.startswith("error: ") and "is not a run folder" in said


def test_the_command_from_anywhere_writes_the_same_figures_where_asked_without_torch(demo, tmp_path):
    folder, _ = demo
    root = Path(report.__file__).parent
    code = f"import sys; sys.path[:0] = [{str(root)!r}]; import report; report.main(); "
    code += "assert 'torch' not in sys.modules"
    arguments = [sys.executable, "-c", code, folder, "--out", "out/x.html"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["figures", "x.html"]  # none aside
    assert len(list((tmp_path / "out/figures").iterdir())) == 11
    for path in (tmp_path / "out/figures").iterdir():
        assert path.read_bytes() == (folder / "figures" / path.name).read_bytes()


def test_help_works_from_anywhere(tmp_path):
    arguments = [sys.executable, report.__file__, "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "python report.py runs/demo" in done.stdout
