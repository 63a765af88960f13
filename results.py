"""A run folder -> what is recorded in it, as plain dicts and arrays. Nothing here believes a file.

    run = results.load("runs/demo")
    run.metrics["loss"], run.losses["code"][640], run.scores[640][3]["matches"], run.notes

It reads config.json, dataset.json, ledger.jsonl, metrics.jsonl, evals.jsonl, memorization/, samples.jsonl and
every checkpoint's state.json, and writes nothing. Only config.json has to be there. A run may come from a
stranger: what is not as it should be is left out, counted and named in `notes`.
"""

import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import config
import files

BY_POSITION = "first-k+l-greedy-1"  # memorize.py's first protocol, in which a position was seen, not a text


@dataclass
class Run:
    """What a run folder holds, as far as it can be read."""

    folder: Path
    about: dict  # config.json
    manifest: dict  # dataset.json
    ledger: list = field(default_factory=list)
    metrics: dict = field(default_factory=dict)  # column -> float array by ascending step, each step once
    checkpoints: list = field(default_factory=list)  # state.json of the complete ones, by ascending step
    losses: dict = field(default_factory=dict)  # source -> {step: line of evals.jsonl}
    scores: dict = field(default_factory=dict)  # step -> {chunk: line of memorization/}, all with one k and l
    k: int = 0
    l: int = 0
    samples: list = field(default_factory=list)
    notes: list = field(default_factory=list)  # (what is missing or odd, which command makes it or "")
    figures: dict = field(default_factory=dict)  # name -> SVG file, filled while the page is made

    def note(self, text: str, command: str = "") -> None:
        self.notes.append((text, command))

    def training_lines(self, step: int) -> dict[int, dict]:
        """A checkpoint's lines of memorization/ by ascending chunk, without the held-out rows."""
        lines = self.scores[step]
        return {chunk: lines[chunk] for chunk in sorted(chunk for chunk in lines if isinstance(chunk, int))}

    def controls(self) -> list[str]:
        """The kinds of held-out rows that checkpoints are also asked for: ["validation:code", ...]."""
        return sorted({chunk for lines in self.scores.values() for chunk in lines if isinstance(chunk, str)})

    def without_held_out(self) -> list[str]:
        """The sources of which the dataset holds no row out, so that there is no loss to measure."""
        sources = self.manifest.get("sources")
        found = sources.items() if isinstance(sources, dict) else []
        return [name for name, s in found if isinstance(s, dict) and s.get("validation_rows") == 0]

    def matches(self, step: int, *kinds: str) -> np.ndarray:
        """Matching tokens, row by row, of the rows of some kinds: "seen", "unseen", "validation:code"."""
        found = [line["matches"][np.isin(line["kind"], kinds)] for line in self.scores[step].values()]
        return np.concatenate(found)

    def common_rows(self, steps: list[int]) -> np.ndarray:
        """Matches of the training rows that all checkpoints were asked for: (checkpoints, rows)."""
        found = []  # of each checkpoint: position in training order -> matches
        for step in steps:
            lines = self.training_lines(step).values()
            found.append({row: n for x in lines for row, n in zip(x["rows"].tolist(), x["matches"].tolist())})
        shared = sorted(set.intersection(*map(set, found)))
        return np.array([[by_row[row] for row in shared] for by_row in found])


def fits(value: object, kind: type | list) -> bool:
    """Whether a JSON value is of a kind: float any number, int a count, str, bool; [int] a list of counts."""
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(item, kind[0]) for item in value)
    if kind is float:
        return type(value) in (int, float) and abs(value) < 2**53
    return type(value) is kind and (kind is not int or 0 <= value < 2**53)


def read_json(path: Path) -> dict:
    """The object in a JSON file; {} where there is no such file or it holds no object."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_lines(run: Run, name: str, fields: dict) -> list[dict]:
    """The objects in a .jsonl file whose `fields` are of their kinds; a note counts the lines left out."""
    path = run.folder / name
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    good, bad = [], []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line) if line else None
        except (ValueError, RecursionError):
            value = False
        if isinstance(value, dict) and all(fits(value.get(key), kind) for key, kind in fields.items()):
            good.append(value)
        elif line:
            bad.append(number)
    if bad and bad[-1] == len(lines):  # no newline behind it
        run.note(f"{name}: the last line is cut off, as a kill leaves it; it is ignored.")
        bad.pop()
    if bad:
        where = ", ".join(map(str, bad[:5])) + ", ..." * (len(bad) > 5)
        run.note(f"{name}: {plural(len(bad), 'unreadable line')} left out (line {where}).")
    return good


def load(folder: str | Path) -> Run:
    """Reads a run folder. Raises ConfigError where it is none."""
    folder = Path(folder)
    about = read_json(folder / "config.json")
    if not isinstance(about.get("config"), dict) or about.get("format") != 1:
        what = "is damaged, or a model's" if (folder / "config.json").exists() else "is not there"
        raise config.ConfigError(
            f"{folder} is not a run folder: its config.json {what}; give one that train.py wrote"
        )
    run = Run(folder, about, read_json(folder / "dataset.json"))
    if not run.manifest:
        run.note("dataset.json, the copy of the dataset's manifest, is missing or damaged.", "train")
    run.ledger = read_lines(run, "ledger.jsonl", {"event": str})
    events = ["none", *(event["event"] for event in run.ledger if event["event"] != "checkpoint")]
    if events[-1] != "finish":
        run.note(f"The run is not finished; its last event: {events[-1]}.", "train")
    load_metrics(run)
    load_checkpoints(run)
    load_losses(run)
    load_scores(run)
    lines = read_lines(run, "samples.jsonl", {"checkpoint": str, "prompt": str, "text": str})
    run.samples = list({show(line): line for line in lines}.values())  # drawn again with the same seed: once
    measured = {step for lines in run.losses.values() for step in lines}
    for what, command, steps in (
        ("held-out loss", "loss", measured),
        ("memorization", "memorization", set(run.scores)),
    ):
        lacking = sum(state["step"] not in steps for state in run.checkpoints)
        if lacking and steps:
            of = f"{lacking} of {plural(len(run.checkpoints), 'checkpoint')}"
            run.note(f"The {what} of {of} is not measured.", command)
    return run


def load_metrics(run: Run) -> None:
    """Fills run.metrics; nan where a step does not hold a number."""
    lines = read_lines(run, "metrics.jsonl", {"step": int})
    by_step = {line["step"]: line for line in files.latest(lines)}
    if len(by_step) < len(lines):
        again = plural(len(lines) - len(by_step), "step")
        run.note(f"metrics.jsonl: {again} recorded twice, as after a resume; the later line counts.")
    for column in ("step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "seconds"):
        values = [by_step[step].get(column) for step in sorted(by_step)]
        run.metrics[column] = np.array([v if fits(v, float) else np.nan for v in values], dtype=float)


def load_checkpoints(run: Run) -> None:
    """Fills run.checkpoints: each state.json, and its `name`, `step` and `weights`, their hashes."""
    for path in run.folder.glob("checkpoints/step-*"):
        state, digits = read_json(path / "state.json"), re.fullmatch(r"step-(\d{1,15})", path.name)
        if not (digits and type(state.get("chunk")) is int and isinstance(state.get("files"), dict)):
            run.note(f"checkpoints/{path.name} has no usable state.json: incomplete, ignored.")
            continue
        files = sorted(state["files"].items())
        weights = [str(value) for name, value in files if re.fullmatch(r"model.*\.safetensors", name)]
        run.checkpoints.append({**state, "name": path.name, "step": int(digits[1]), "weights": weights})
    run.checkpoints.sort(key=lambda state: state["step"])
    same: dict[tuple, list[int]] = {}
    for state in run.checkpoints:
        same.setdefault(tuple(state["weights"]), []).append(state["step"])
    for weights, steps in same.items():
        if weights and len(steps) > 1:
            run.note(f"The checkpoints of steps {', '.join(map(str, steps))} have the same weights.")


def load_losses(run: Run) -> None:
    """Fills run.losses: the last line of every (source, checkpoint)."""
    for line in read_lines(run, "evals.jsonl", {"kind": str, "step": int}):
        good = fits(line.get("source"), str) and fits(line.get("bits_per_byte"), float)
        if line["kind"] == "loss" and good:
            run.losses.setdefault(line["source"], {})[line["step"]] = line
    run.losses = dict(sorted(run.losses.items()))
    note_unverified(
        run, "held-out loss", [line for lines in run.losses.values() for line in lines.values()], "loss"
    )
    for source, lines in run.losses.items():
        sizes = sorted({show(line.get("tokens")) for line in lines.values()})
        if len(sizes) > 1:
            what = f"{source} is measured over {' and '.join(sizes)} tokens: its checkpoints do not compare."
            run.note(what, "loss")
        inputs = [line["inputs"] for line in lines.values() if isinstance(line.get("inputs"), dict)]
        if len(protocols := sorted({show(i.get("protocol")) for i in inputs})) > 1:
            what = f"{source} is measured by {' and '.join(protocols)}: its checkpoints do not compare."
            run.note(what, "loss")


def note_unverified(run: Run, what: str, lines: list[dict], command: str) -> None:
    """A note where results were made with --no-verify: they may be of other weights than those saved."""
    unverified = [
        x for x in lines if isinstance(x.get("inputs"), dict) and x["inputs"].get("verified") is False
    ]
    if unverified:
        steps = ", ".join(sorted({show(line.get("step")) for line in unverified})[:5])
        run.note(
            f"The {what} of step {steps} is of files whose hashes were not compared (--no-verify).", command
        )


def load_scores(run: Run) -> None:
    """Fills run.scores: the last line of every (checkpoint, chunk), for the k and l that most lines have.

    In a line, rows, matches and kind ("seen", "unseen", or "validation:code") become arrays, one item a row.
    """
    fields = {"step": int, "prompt_tokens": int, "continuation_tokens": int}
    fields |= {"rows": [int], "matches": [int], "seen": [bool]}
    found: dict[tuple[int, int], dict] = {}
    for path in sorted(run.folder.glob("memorization/*.jsonl")):
        for line in read_lines(run, f"memorization/{path.name}", fields):
            k, l, n = line["prompt_tokens"], line["continuation_tokens"], len(line["rows"])
            chunk, documents = line.get("chunk"), line.setdefault("documents", [[]] * n)
            held_out = isinstance(chunk, str) and chunk.startswith("validation:")
            same = 0 < n == len(line["matches"]) == len(line["seen"]) and 0 < l < 2**16
            same = same and max(line["matches"]) <= l and (held_out or fits(chunk, int))
            named = fits(documents, [[[str]]]) and len(documents) == n  # of each row: [[source, id], ...]
            named = named and all(len(pair) == 2 for pairs in documents for pair in pairs)
            if not (same and named):
                run.note(f"memorization/{path.name}: a line contradicts itself and is left out.")
                continue
            line["rows"], line["matches"] = np.array(line["rows"]), np.array(line["matches"])
            line["kind"] = np.array([chunk] * n if held_out else np.where(line["seen"], "seen", "unseen"))
            found.setdefault((k, l), {}).setdefault(line["step"], {})[chunk] = line
    if found:
        run.k, run.l = max(found, key=lambda pair: sum(map(len, found[pair].values())))
        run.scores = dict(sorted(found[run.k, run.l].items()))
        lines = [line for by_chunk in run.scores.values() for line in by_chunk.values()]
        note_unverified(run, "memorization", lines, "memorization")
    shown = [line.get("inputs") for lines in run.scores.values() for line in lines.values()]
    old = [inputs for inputs in shown if isinstance(inputs, dict) and inputs.get("protocol") == BY_POSITION]
    if old:
        run.note(
            f'Memorization: in {len(old):,} of {plural(len(shown), "line")} "unseen" goes by position only, '
            "as an earlier version of memorize.py wrote it. A row whose text was trained on in an earlier "
            "pass, or by another source, can be called unseen. To measure again:",
            "memorization",
        )
    if len(found) > 1:
        run.note(f"memorization/ holds {len(found)} pairs of k and l; shown is k = {run.k}, l = {run.l}.")


# ---- values as text ---------------------------------------------------------------------------------------

NONE = "\N{EN DASH}"  # where there is no value


def show(value: object) -> str:
    """A value as a reader wants it: show(9830400) -> "9,830,400"; show(0.0019999) -> "0.002"."""
    if value is None or value != value:
        return NONE
    if isinstance(value, (bool, dict, list)):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def plural(n: int, word: str) -> str:
    return f"{n:,} {word}{'s' * (n != 1)}"


def duration(seconds: float) -> str:
    """duration(3725) -> "1 h 2 min"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = (f"{hours:,} h" * bool(hours), f"{minutes} min" * bool(minutes), f"{seconds} s" * (not hours))
    return " ".join(part for part in parts if part)


def moment(value: object) -> str:
    """Unix seconds -> "2025-01-31 12:00:00", UTC."""
    good = fits(value, float) and 0 <= value < 2**35
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(value)) if good else NONE
