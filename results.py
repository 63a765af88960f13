"""A run folder -> its records, as plain dicts and arrays. Every value that is read is checked.

    run = results.load("runs/demo")
    run.metrics["loss"], run.losses["code"][640], run.scores[640][3]["matches"], run.notes

It reads config.json, dataset.json, ledger.jsonl, metrics.jsonl, evals.jsonl, memorization/, samples.jsonl and
the state.json of every checkpoint, and writes nothing. Only config.json has to be there. A run may come from
a stranger, so damaged records are left out, counted, and named in `notes`.

New numbers need no change here. Every column of numbers in metrics.jsonl becomes an array of `metrics`, and
every kind of line in evals.jsonl gets a place in `evaluations`:

    {"kind": "task", "task": "copy", "checkpoint": "step-00000640", "step": 640, "accuracy": 0.5}
    run.evaluations["task"]["copy"][640]  ->  {"accuracy": 0.5}
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import config
import files
import run_folder

# The columns of metrics.jsonl that the page names: they are in `metrics` even where a run lacks them.
NAMED_COLUMNS = ("step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "seconds")
MOST_COLUMNS = 60  # most other columns that are read; if each becomes a figure, 60 make a page of about 3 MB
# Fields that name what a line of evals.jsonl is about: a task, a source of text, a domain.
NAMING_FIELDS = ("name", "task", "source", "domain", "suite", "split")
BY_POSITION = "first-k+l-greedy-1"  # memorize.py's first protocol: "seen" followed a row's position only


@dataclass
class Run:
    """The records of a run folder, as far as they can be read."""

    folder: Path
    about: dict  # config.json
    manifest: dict  # dataset.json
    ledger: list = field(default_factory=list)
    metrics: dict = field(default_factory=dict)  # column -> float array by ascending step, each step once
    checkpoints: list = field(default_factory=list)  # state.json and "name" of each, by ascending step
    losses: dict = field(default_factory=dict)  # validation loss: source -> {step: line of evals.jsonl}
    evaluations: dict = field(default_factory=dict)  # other kinds -> {name: {step: {field: number}}}
    scores: dict = field(default_factory=dict)  # step -> {chunk: line of memorization/}, all with one k and l
    k: int = 0
    l: int = 0
    samples: list = field(default_factory=list)
    notes: list = field(default_factory=list)  # (what is missing or odd, the command that makes it or "")
    figures: dict = field(default_factory=dict)  # name -> SVG file, filled while the page is made

    def note(self, text: str, command: str = "") -> None:
        self.notes.append((text, command))

    def training_lines(self, step: int) -> dict[int, dict]:
        """A checkpoint's lines of memorization/ by ascending chunk, without the validation rows."""
        lines = self.scores[step]
        return {chunk: lines[chunk] for chunk in sorted(chunk for chunk in lines if isinstance(chunk, int))}

    def validation_kinds(self) -> list[str]:
        """The kinds of validation rows that are also scored: ["validation:code", ...]."""
        return sorted({chunk for lines in self.scores.values() for chunk in lines if isinstance(chunk, str)})

    def without_validation(self) -> list[str]:
        """The sources that have no validation row in the dataset, and so no validation loss."""
        sources = self.manifest.get("sources")
        found = sources.items() if isinstance(sources, dict) else []
        return [name for name, s in found if isinstance(s, dict) and s.get("validation_rows") == 0]

    def matches(self, step: int, *kinds: str) -> np.ndarray:
        """Matching tokens of each row of some kinds: "seen", "unseen", "validation:code"."""
        found = [line["matches"][np.isin(line["kind"], kinds)] for line in self.scores[step].values()]
        return np.concatenate(found)

    def common_rows(self, steps: list[int]) -> np.ndarray:
        """Matches of the training rows that all of these checkpoints were scored on: (checkpoints, rows)."""
        found = []  # for each checkpoint: position in training order -> matches
        for step in steps:
            by_position = {}
            for line in self.training_lines(step).values():
                by_position.update(zip(line["rows"].tolist(), line["matches"].tolist()))
            found.append(by_position)
        shared = sorted(set.intersection(*map(set, found)))
        return np.array([[by_position[position] for position in shared] for by_position in found])


# ---- values that may be anything --------------------------------------------------------------------------


def fits(value: object, kind: type | list) -> bool:
    """Whether a JSON value is of a kind: float any number, int a count, str, bool; [int] a list of counts."""
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(item, kind[0]) for item in value)
    if kind is float:
        return type(value) in (int, float) and abs(value) < 1e30  # neither nan nor what a figure cannot scale
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
    # Keep good lines as objects, and the numbers of bad ones.
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

    # A last line without a newline is left by a kill. It is no damage.
    if bad and bad[-1] == len(lines):
        run.note(f"{name}: the last line is cut off, as a kill leaves it; it is ignored.")
        bad.pop()
    if bad:
        where = ", ".join(map(str, bad[:5])) + ", ..." * (len(bad) > 5)
        run.note(f"{name}: {plural(len(bad), 'unreadable line')} left out (line {where}).")
    return good


# ---- the files of a run -----------------------------------------------------------------------------------


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

    # Read what training recorded: events, metrics, checkpoints.
    run.ledger = read_lines(run, "ledger.jsonl", {"event": str})
    events = ["none", *(event["event"] for event in run.ledger if event["event"] != "checkpoint")]
    if events[-1] != "finish":
        run.note(f"The run is not finished; its last event: {events[-1]}.", "train")
    load_metrics(run)
    load_checkpoints(run)

    # Read what was measured afterwards.
    load_evaluations(run)
    load_scores(run)
    lines = read_lines(run, "samples.jsonl", {"checkpoint": str, "prompt": str, "text": str})
    run.samples = list({show(line): line for line in lines}.values())  # drawn again with the same seed: once
    note_unmeasured(run, "validation loss", {step for lines in run.losses.values() for step in lines}, "loss")
    note_unmeasured(run, "memorization", set(run.scores), "memorization")
    return run


def load_metrics(run: Run) -> None:
    """Fills run.metrics with every column of numbers; nan where a step does not hold a number."""
    lines = read_lines(run, "metrics.jsonl", {"step": int})
    by_step = {line["step"]: line for line in files.latest(lines)}
    if len(by_step) < len(lines):
        again = plural(len(lines) - len(by_step), "step")
        run.note(f"metrics.jsonl: {again} recorded twice, as after a resume; the later line counts.")

    # Collect the columns as they first appear; a stranger's run may have any number of them.
    steps = sorted(by_step)
    run.metrics = {name: np.full(len(steps), np.nan) for name in NAMED_COLUMNS}
    run.metrics["step"][:] = steps
    left_out = set()
    for i, step in enumerate(steps):
        for name, value in files.numbers(by_step[step]):
            if not fits(value, float):
                continue
            if name not in run.metrics:
                if len(run.metrics) == len(NAMED_COLUMNS) + MOST_COLUMNS:
                    left_out.add(name)
                    continue
                run.metrics[name] = np.full(len(steps), np.nan)
            run.metrics[name][i] = value
    if left_out:
        columns = plural(len(left_out), "column")
        run.note(
            f"metrics.jsonl: {columns} left out; beside the usual ones, the first {MOST_COLUMNS} are read."
        )


def load_checkpoints(run: Run) -> None:
    """Fills run.checkpoints with the state.json of each, and its folder's `name`."""
    found, problems = run_folder.listed(run.folder)
    for problem in problems:
        run.note(problem)
    by_weights: dict[str, list[int]] = {}
    for c in found:
        run.checkpoints.append({**c.state, "name": c.path.name})
        by_weights.setdefault(run_folder.weights_hash(c.state), []).append(c.step)
    for steps in by_weights.values():
        if len(steps) > 1:
            run.note(f"The checkpoints of steps {', '.join(map(str, steps))} have the same weights.")


def load_evaluations(run: Run) -> None:
    """Fills run.losses and run.evaluations. Where something was measured again, the last line counts."""
    # Sort the validation loss by source, everything else by kind and name.
    empty = 0
    for line in read_lines(run, "evals.jsonl", {"kind": str, "step": int}):
        if line["kind"] == "loss":
            good = fits(line.get("source"), str) and fits(line.get("bits_per_byte"), float)
            if good:
                run.losses.setdefault(line["source"], {})[line["step"]] = line
        else:
            good = measured(line)
            if good:
                by_name = run.evaluations.setdefault(line["kind"], {})
                by_name.setdefault(named(line), {})[line["step"]] = good
        empty += not good
    if empty:
        run.note(f"evals.jsonl: {plural(empty, 'line')} without a result left out.")

    # Check that the validation losses compare from checkpoint to checkpoint.
    run.losses = dict(sorted(run.losses.items()))
    lines = [line for by_step in run.losses.values() for line in by_step.values()]
    note_unverified(run, "validation loss", lines, "loss")
    for source, by_step in run.losses.items():
        sizes = sorted({show(line.get("tokens")) for line in by_step.values()})
        if len(sizes) > 1:
            what = f"{source} is measured over {' and '.join(sizes)} tokens: its checkpoints do not compare."
            run.note(what, "loss")
        inputs = [line["inputs"] for line in by_step.values() if isinstance(line.get("inputs"), dict)]
        protocols = sorted({show(i.get("protocol")) for i in inputs})
        if len(protocols) > 1:
            what = f"{source} is measured by {' and '.join(protocols)}: its checkpoints do not compare."
            run.note(what, "loss")


def measured(line: dict) -> dict[str, float]:
    """The numbers in a line of evals.jsonl, without those that say how it was made."""
    about = {key: line[key] for key in line if key not in ("format", "seconds", "time", "inputs")}
    return {name: value for name, value in files.numbers(about) if fits(value, float)}


def named(line: dict) -> str:
    """The name of a line of evals.jsonl: the fields that name it, or its first text, or its kind."""
    known = [line[key] for key in NAMING_FIELDS if fits(line.get(key), str)]
    others = [line[key] for key in line if key not in ("kind", "checkpoint") and fits(line[key], str)]
    return ", ".join(known or others[:1] or [line["kind"]])


def load_scores(run: Run) -> None:
    """Fills run.scores: the last line of every (checkpoint, chunk), for the k and l that most lines have.

    In a line, rows, matches and kind ("seen", "unseen", or "validation:code") become arrays, one item a row.
    """
    fields = {"step": int, "prompt_tokens": int, "continuation_tokens": int}
    fields |= {"rows": [int], "matches": [int], "seen": [bool]}

    # Sort every line by its k and l, then by checkpoint and chunk: a later line replaces an earlier one.
    found: dict[tuple[int, int], dict] = {}
    for path in sorted(run.folder.glob("memorization/*.jsonl")):
        for line in read_lines(run, f"memorization/{path.name}", fields):
            k, l, n = line["prompt_tokens"], line["continuation_tokens"], len(line["rows"])
            if not adds_up(line):
                run.note(f"memorization/{path.name}: a line contradicts itself and is left out.")
                continue
            chunk = line["chunk"]
            line["rows"], line["matches"] = np.array(line["rows"]), np.array(line["matches"])
            if isinstance(chunk, str):
                line["kind"] = np.array([chunk] * n)
            else:
                line["kind"] = np.where(line["seen"], "seen", "unseen")
            found.setdefault((k, l), {}).setdefault(line["step"], {})[chunk] = line

    # Show one k and l: that of most lines.
    if found:
        run.k, run.l = max(found, key=lambda pair: sum(map(len, found[pair].values())))
        run.scores = dict(sorted(found[run.k, run.l].items()))
    lines = [line for by_chunk in run.scores.values() for line in by_chunk.values()]
    note_unverified(run, "memorization", lines, "memorization")
    n_old = 0
    for line in lines:
        inputs = line.get("inputs")
        n_old += isinstance(inputs, dict) and inputs.get("protocol") == BY_POSITION
    if n_old:
        run.note(
            f'Memorization: in {n_old:,} of {plural(len(lines), "line")} "unseen" goes by position only, '
            "as an earlier version of memorize.py wrote it. A row whose text was trained on in an earlier "
            "pass, or by another source, can be called unseen. To measure again:",
            "memorization",
        )
    if len(found) > 1:
        run.note(f"memorization/ holds {len(found)} pairs of k and l; shown is k = {run.k}, l = {run.l}.")


def adds_up(line: dict) -> bool:
    """Whether a line of memorization/ has a value for every row, and only possible values."""
    n, l, chunk = len(line["rows"]), line["continuation_tokens"], line.get("chunk")
    is_validation = isinstance(chunk, str) and chunk.startswith("validation:")
    if not (is_validation or fits(chunk, int)) or not 0 < l < 2**16:
        return False
    if not 0 < n == len(line["matches"]) == len(line["seen"]) or max(line["matches"]) > l:
        return False
    documents = line.setdefault("documents", [[]] * n)  # for each row: [[source, id], ...]
    if not fits(documents, [[[str]]]) or len(documents) != n:
        return False
    return all(len(pair) == 2 for pairs in documents for pair in pairs)


def note_unverified(run: Run, what: str, lines: list[dict], command: str) -> None:
    """A note where results were made with --no-verify: they may be of other weights than those saved."""
    steps = set()
    for line in lines:
        if isinstance(line.get("inputs"), dict) and line["inputs"].get("verified") is False:
            steps.add(show(line.get("step")))
    if steps:
        text = f"The {what} of step {', '.join(sorted(steps)[:5])} is of files whose hashes were not compared"
        run.note(f"{text} (--no-verify).", command)


def note_unmeasured(run: Run, what: str, steps: set[int], command: str) -> None:
    """A note where some checkpoints are measured and others are not."""
    lacking = sum(state["step"] not in steps for state in run.checkpoints)
    if lacking and steps:
        of = f"{lacking} of {plural(len(run.checkpoints), 'checkpoint')}"
        run.note(f"The {what} of {of} is not measured.", command)


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
