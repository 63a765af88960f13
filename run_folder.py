"""The run folder: its files, its checkpoints, and the processes that are at work in it. No torch.

    runs/demo/
      config.json      every resolved setting, git commit, versions, device
      dataset.json     the manifest of the data, as it was
      ledger.jsonl     events: start, resume, checkpoint, interrupted, fault, nonfinite, spike, finish
      metrics.jsonl    one line a step; after a resume a step can be there twice, and the later line counts
      evals.jsonl, memorization/, samples.jsonl, report.html    what eval.py and others write
      checkpoints/step-00000640/              one checkpoint (checkpoint.py says what is in it)
      checkpoints/incident-3-step-00000640/   one that the rollback of the third incident left behind
      .lock            held by the training that is at work
      .processes/      one file for each process at work; one that is left over names a process that failed

This is the only file that lists checkpoints. A folder counts as one when it holds a state.json, which is
written last.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import config
import files
from config import Config, ConfigError, load_run
from configurator import say

if TYPE_CHECKING:
    from parallel import World

FORMAT = 1  # the format of state.json; a reader refuses any other


class Checkpoint(NamedTuple):
    path: Path
    step: int  # finished updates
    state: dict  # state.json: steps.State says what is in it


# ---- which checkpoints there are --------------------------------------------------------------------------


def checkpoints(run: Path | str) -> list[Checkpoint]:
    """The complete checkpoints of a run, by ascending step, a number: 1,000,000 comes after 999,999."""
    found = []
    for path in folders(run):
        try:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(state, dict):
            found.append(checked(path, state, step_number(path.name)))
    return sorted(found, key=lambda c: c.step)


def folders(run: Path | str) -> list[Path]:
    """Folders with the name of a checkpoint, complete or not."""
    return [p for p in (Path(run) / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", p.name)]


def incomplete(run: Path | str, after: int) -> list[str]:
    """Names of checkpoint folders beyond a step that do not count: their state.json is missing or damaged."""
    complete = {c.path for c in checkpoints(run)}
    return sorted(p.name for p in folders(run) if p not in complete and step_number(p.name) > after)


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


def chosen(run: Path | str, steps: Iterable[int] = ()) -> list[Checkpoint]:
    """The complete checkpoints of a run, ascending: all, or those of `steps`. ConfigError if none."""
    found = {c.step: c for c in checkpoints(run)}
    if not found:
        load_run(run)  # says so where this is no run at all
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


def step_number(name: str) -> int:
    """640 and step-00000640 both name a checkpoint on a command line."""
    return int(name.removeprefix("step-"))


def weights_hash(state: dict) -> str:
    """One hash of a checkpoint's weights, whether they are one file or many."""
    names = sorted(name for name in state["files"] if re.fullmatch(r"model.*\.safetensors", name))
    hashes = [state["files"][name] for name in names]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def delete(run: Path | str, steps: list[int]) -> None:
    """Deletes the checkpoints of these steps."""
    for c in checkpoints(run):
        if c.step in steps:
            aside = c.path.with_name(f".{c.path.name}")
            os.replace(c.path, aside)  # first: half a folder must not look like a checkpoint
            shutil.rmtree(aside, ignore_errors=True)


def deleted_steps(cfg: Config, saved: list[int], kept: set[int]) -> list[int]:
    """The steps whose checkpoints are deleted once the last one of `saved`, ascending, is on disk."""
    if not cfg.train.keep_others:
        return []
    kept = set(kept)
    if cfg.train.on_incident == "rollback":  # and the newest one that a rollback now would go back to
        old = [step for step in saved if step <= saved[-1] - cfg.train.rollback_steps]
        kept |= set(old[-1:])
    others = [step for step in saved if step not in kept]
    return others[: -cfg.train.keep_others]


def set_aside(run: Path | str, after: int, incident: int) -> None:
    """Renames the checkpoints beyond step `after`, which a rollback leaves: incident-3-step-00000640."""
    for c in checkpoints(run):
        if c.step > after:
            target = c.path.with_name(f"incident-{incident}-{c.path.name}")
            shutil.rmtree(target, ignore_errors=True)
            os.replace(c.path, target)


# ---- what a state.json must be: it may be a stranger's ----------------------------------------------------

REMEDY = (
    "get it again, or take this folder away, and train.py resumes from the checkpoint before it (a copy that "
    "you changed yourself is a model like any other once its state.json is deleted)"
)


def checked(path: Path, state: dict, step: int | None) -> Checkpoint:
    """A checkpoint, if its state.json has our format, its folder's step, and fields of the right types."""
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


def refuse(folder: Path, problems: list[str], more: str = "") -> None:
    """ConfigError with the first of the problems, if there is one."""
    if problems:
        others = f" ({len(problems) - 1} more like this)" if problems[1:] else ""
        raise ConfigError(f"{folder}/{problems[0]}{others}; {REMEDY}{more}")


def is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def is_number(value: object) -> bool:
    return type(value) in (int, float)


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_pairs(value: object, of: Callable[[object], bool] = is_count) -> bool:
    pairs = value if isinstance(value, list) else [None]
    return all(isinstance(pair, list) and len(pair) == 2 and all(map(of, pair)) for pair in pairs)


def is_hashes(value: object) -> bool:
    """{"model.safetensors": "9f86d0..."}; "../../.ssh/id" is not the name of a file in the folder."""
    return isinstance(value, dict) and all(
        Path(name).name == name and isinstance(digest, str) for name, digest in value.items()
    )


COUNT, HASH, RANGES = (is_count, "a count"), (is_text, "a hash"), "pairs [first, end] of positions"
FIELDS = {  # field -> (check of its type, the type in words); a field may be absent
    **dict.fromkeys(("step", "rows", "tokens", "begin", "incidents", "world_size"), COUNT),
    "chunk": (lambda value: value == -1 or is_count(value), "a chunk's number, or -1"),
    "eot": (lambda value: value is None or is_count(value), "a token's id"),
    "order": (lambda value: value is None or is_pairs(value), RANGES),
    "skipped": (is_pairs, RANGES),
    "recent": (lambda value: is_pairs(value, is_number), "pairs of loss and gradient norm"),
    "dataset_sha256": HASH,
    "tokenizer_sha256": HASH,
    "files": (is_hashes, "the hash of each file in the folder"),
}
NEEDED = ("step", "rows", "tokens", "chunk", "dataset_sha256", "tokenizer_sha256", "files")


# ---- the ledger -------------------------------------------------------------------------------------------


def log(run: Path | str, event: str, about: dict) -> None:
    """Adds an event to the ledger."""
    files.append(Path(run) / "ledger.jsonl", {"event": event, "time": time.time(), **about})


def ledger(run: Path | str, *events: str) -> list[dict]:
    """The ledger's events of these kinds."""
    return [r for r in files.read_lines(Path(run) / "ledger.jsonl") if r.get("event") in events]


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


def write_run(cfg: Config, dataset_folder: Path, about: dict) -> None:
    """config.json, with what is known `about` code and machine, and dataset.json, a copy of the manifest."""
    run = Path(cfg.run)
    files.write_json(run / "config.json", {"format": FORMAT, "config": config.to_dict(cfg), **about})
    files.write(run / "dataset.json", (dataset_folder / "manifest.json").read_bytes())


def close(cfg: Config, last: Checkpoint, changed: list[str]) -> None:
    """For a run that is trained: writes what a kill left unwritten, and new settings."""
    run = Path(cfg.run)
    say(f"{run} is trained: {last.path.name} is its last checkpoint; nothing to do")
    if changed:  # settings of the evaluation, which eval.py reads here
        about = json.loads((run / "config.json").read_text(encoding="utf-8"))
        files.write_json(run / "config.json", {**about, "config": config.to_dict(cfg)})
    if changed or not ledger(run, "finish"):
        log(run, "finish", {"step": last.step, "changed": changed})


# ---- who is at work ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def at_work(run: Path | str, world: "World"):
    """Around a training: keeps a second one out of the folder, and leaves a trace if a process fails.

    Each process has a file in .processes/ while it works. A process that raises adds its error to its file;
    one that is killed cannot. The next training finds these files, and the ledger gets a `fault`.
    """
    # One process locks the folder for all.
    run, locks = Path(run), []

    def lock_it():
        locks.append(lock(run))

    world.once(lock_it)

    # Each process has its file, until it ends without an error.
    path = run / ".processes" / f"{world.rank}.json"
    try:
        world.once(note_faults, run)
        about = {"rank": world.rank, "host": platform.node(), "pid": os.getpid()}
        files.write_json(path, about)
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(OSError):  # a full disk: what went wrong first is about to be said
                files.write_json(path, {**about, "error": f"{type(error).__name__}: {error}"[:2000]})
            raise
        path.unlink(missing_ok=True)
    finally:
        for file in locks:
            file.close()


def lock(run: Path):
    """The open lock file of a run. The kernel frees the lock when the file is closed or the process ends."""
    run.mkdir(parents=True, exist_ok=True)
    file = open(run / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(f"another training is at work in {run}; wait for it, or use --run=FOLDER") from None
    return file


def note_faults(run: Path) -> None:
    """Processes whose files are still there failed: the ledger gets their errors, where they are known."""
    folder = run / ".processes"
    folder.mkdir(exist_ok=True)
    failed = []
    names = (path for path in folder.glob("*.json") if path.stem.isdecimal())
    for path in sorted(names, key=lambda path: int(path.stem)):
        try:
            failed.append(json.loads(path.read_text(encoding="utf-8")))
        except ValueError:
            failed.append({"rank": int(path.stem)})
        path.unlink()
    if failed:
        silent = [who["rank"] for who in failed if "error" not in who]  # killed, or the machine went down
        restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        log(run, "fault", {"restart": restart, "died_without_a_word": silent, "processes": failed})
