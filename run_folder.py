"""A run folder: its checkpoints, listed, chosen, deleted; and what state.json must be. No torch."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import files
from config import ConfigError, load_run

FORMAT = 1  # of state.json; a reader refuses what it does not know


class Checkpoint(NamedTuple):
    path: Path
    step: int  # finished updates
    state: dict  # state.json


def checkpoints(run: Path | str) -> list[Checkpoint]:
    """The complete checkpoints of a run, by ascending step, a number: 1,000,000 comes after 999,999."""
    found = []
    for path in (Path(run) / "checkpoints").glob("step-*"):
        if not (match := re.fullmatch(r"step-(\d+)", path.name)):
            continue
        try:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(state, dict):
            found.append(checked(path, state, int(match[1])))
    return sorted(found, key=lambda c: c.step)


def chosen(run: Path | str, steps: Iterable[int] = ()) -> list[Checkpoint]:
    """The complete checkpoints of a run, ascending: all, or those of `steps`. ConfigError if none."""
    found = {c.step: c for c in checkpoints(run)}
    if not found:
        load_run(run)  # which says so where this is no run at all
        raise ConfigError(f"{run} has no complete checkpoint yet; train.py writes the first one at step 0")
    for step in steps:
        if step not in found:
            raise ConfigError(
                f"{run} has no complete checkpoint of step {step}; it has {', '.join(map(str, found))}"
            )
    return [found[step] for step in sorted(set(steps) or found)]


def read(folder: Path | str, step: int | None = None) -> Checkpoint:
    """A checkpoint by its folder, of any name. ConfigError where it has no state.json, or not this step's."""
    try:
        state = json.loads((Path(folder) / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{folder} is no checkpoint of train.py: its state.json cannot be read ({error})"
        ) from None
    return checked(Path(folder), state if isinstance(state, dict) else {}, step)


def checked(path: Path, state: dict, step: int | None) -> Checkpoint:
    said = state.get("step")
    if state.get("format") != FORMAT or said is None or step not in (None, said):
        raise ConfigError(
            f"{path}/state.json says format {state.get('format')} and step {said}; "
            f"this version reads format {FORMAT}, and the step must be the folder's; {REMEDY}"
        )
    for name, (has_type, wanted) in FIELDS.items():
        if name in state and not has_type(state[name]):
            value = json.dumps(state[name])
            raise ConfigError(
                f"{path}/state.json is damaged: {name} is {value[:60]}, and must be {wanted}; {REMEDY}"
            )
    return Checkpoint(path, state["step"], state)


def incomplete(run: Path | str, after: int) -> list[str]:
    """Names of checkpoint folders beyond a step that do not count: their state.json is missing or damaged."""
    whole = {c.path for c in checkpoints(run)}
    folders = (path for path in (Path(run) / "checkpoints").glob("step-*") if path not in whole)
    return sorted(
        p.name for p in folders if re.fullmatch(r"step-\d+", p.name) and step_number(p.name) > after
    )


def step_number(name: str) -> int:
    """640 and step-00000640 both name a checkpoint on a command line."""
    return int(name.removeprefix("step-"))


def weights_hash(state: dict) -> str:
    """One hash of a checkpoint's weights, of one file or of many."""
    hashes = [
        state["files"][name] for name in sorted(state["files"]) if re.fullmatch(r"model.*\.safetensors", name)
    ]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


REMEDY = (
    "get it again, or take this folder away, and train.py resumes from the checkpoint before it (a copy that "
    "you changed yourself is a model like any other once its state.json is deleted)"
)


def is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def is_pairs(value: object, of: Callable[[object], bool] = is_count) -> bool:
    pairs = value if isinstance(value, list) else [None]
    return all(isinstance(pair, list) and len(pair) == 2 and all(map(of, pair)) for pair in pairs)


def is_hashes(value: object) -> bool:
    """{"model.safetensors": "9f86d0..."}; a stranger's "../../.ssh/id" is no name of a file beside it."""
    return isinstance(value, dict) and all(
        Path(name).name == name and isinstance(digest, str) for name, digest in value.items()
    )


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_number(value: object) -> bool:
    return type(value) in (int, float)


COUNT, PAIRS = (is_count, "a count"), "pairs [first, end] of positions"
FIELDS = {  # of state.json: what each must be, if it is there
    **dict.fromkeys(("step", "rows", "tokens", "begin", "incidents", "world_size"), COUNT),
    "chunk": (lambda value: value == -1 or is_count(value), "a chunk's number, or -1"),
    "eot": (lambda value: value is None or is_count(value), "a token's id"),
    "order": (lambda value: value is None or is_pairs(value), PAIRS),
    "skipped": (is_pairs, PAIRS),
    "recent": (lambda value: is_pairs(value, is_number), "pairs of loss and gradient norm"),
    "dataset_sha256": (is_text, "a hash"),
    "tokenizer_sha256": (is_text, "a hash"),
    "files": (is_hashes, "the hash of each file in the folder"),
}
NEEDED = ("step", "rows", "tokens", "chunk", "dataset_sha256", "tokenizer_sha256", "files")


def recorded(run: Path) -> dict[str, str]:
    """SHA-256 of the state.json of each checkpoint, as the ledger has it: {"step-00000640": "9f86..."}.

    A run that resumes or goes back makes later checkpoints again, so what was said of them does not count.
    """
    known: dict[str, str] = {}
    for record in files.read_lines(run / "ledger.jsonl"):
        if record.get("event") == "checkpoint" and is_text(record.get("state_sha256")):
            known[str(record.get("checkpoint"))] = record["state_sha256"]
        back = re.fullmatch(r"step-(\d+)", str(record.get("back_to")))
        at = int(back[1]) if back else record.get("step") if record.get("event") == "resume" else None
        if is_count(at):
            known = {name: digest for name, digest in known.items() if step_number(name) <= at}
    return known


def refuse(folder: Path, problems: list[str], more: str = "") -> None:
    """ConfigError with the first of the problems, if there is one."""
    if problems:
        others = f" ({len(problems) - 1} more like this)" if problems[1:] else ""
        raise ConfigError(f"{folder}/{problems[0]}{others}; {REMEDY}{more}")


def delete_others(run: Path | str, kept: set[int], newest: int) -> list[int]:
    """Deletes all but the `newest` of the checkpoints whose step is not in `kept`; returns those steps."""
    others = [c for c in checkpoints(run) if c.step not in kept]
    gone = others[: max(0, len(others) - newest)]
    for c in gone:  # out of sight at once: half a folder must not look like a checkpoint
        aside = c.path.with_name(f".{c.path.name}")
        os.replace(c.path, aside)
        shutil.rmtree(aside, ignore_errors=True)
    return [c.step for c in gone]


def set_aside(run: Path | str, after: int, incident: int) -> None:
    """Renames what a rollback leaves, checkpoints beyond step `after`: incident-3-step-... can be studied."""
    for c in checkpoints(run):
        if c.step > after:
            target = c.path.with_name(f"incident-{incident}-{c.path.name}")
            shutil.rmtree(target, ignore_errors=True)
            os.replace(c.path, target)


def listed(run: Path | str) -> tuple[list[Checkpoint], list[str]]:
    """The usable checkpoints of a run, ascending, and a sentence about each other one. Raises no error."""
    good, problems = [], []
    for path in sorted((Path(run) / "checkpoints").glob("step-*")):
        try:
            c = read(path, step_number(path.name))
            usable = "chunk" in c.state and "files" in c.state
        except (ValueError, RecursionError):  # a ConfigError, a name without a number, or too deep JSON
            usable = False
        if usable:
            good.append(c)
        else:
            problems.append(f"checkpoints/{path.name} has no usable state.json: incomplete, ignored.")
    return sorted(good, key=lambda c: c.step), problems
