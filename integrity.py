"""Compares the files of a checkpoint with the hashes that were recorded when it was saved.

    with integrity.compared("runs/demo/checkpoints/step-00000640", "model"):
        ...                                   # read the weights; hashing runs beside it
    integrity.contradictions(checkpoint, cfg, manifest, sha256)   # is its state.json one of this run?

state.json has the SHA-256 of every other file of its checkpoint, and the ledger has that of state.json.
Every reader of a checkpoint compares them (checkpoint.py); audit.py does it for all checkpoints of a run.
"""

import contextlib
import functools
import re
import threading
from pathlib import Path

import files
import steps
from config import Config, ConfigError
from formats.families import read_config
from parallel import World, alone
from rendezvous import first_on_node
from run_folder import NEEDED, Checkpoint, chosen, read, recorded, refuse

N_THREADS = 4  # files hashed at a time: SHA-256 of one runs at 0.4 to 1.5 GB/s, slower than a good disk reads
# The files that are read when a checkpoint is opened. Other files in the folder are not checked.
READ = re.compile(r"config\.json|(model|optimizer|tokenizer).*\.(safetensors|json|model)")


# ---- files against their hashes ---------------------------------------------------------------------------


@contextlib.contextmanager
def compared(folder: Path | str, kind: str, verify: bool = True, world: World | None = None):
    """Around the reading of a folder: its files are hashed beside it, and must be those of its state.json.

    kind: "model" or "optimizer", the files to compare. Ends only when the hashes are known. Where a file
    differs, it raises ConfigError in all processes; this replaces an error that the damage caused in the
    reading. One process of each node hashes the large files. A folder without state.json is someone else's:
    there is nothing to compare it with.
    """
    folder, world = Path(folder), world or alone()
    if not verify or not (folder / "state.json").exists():
        yield
        return

    # Compare the small files first, before anything is read. All processes refuse together.
    large, c = [], None
    try:
        c = read(folder)
        found, large = first_look(c, kind)
    except ConfigError as raised:
        found = [str(raised)]
    found = [problem for part in world.collect(found) for problem in part]
    refuse(folder, list(dict.fromkeys(found)))

    # Hash the large files in a thread, while the caller reads them.
    problems, error = [], None
    mine = large if world.size == 1 or first_on_node() else []
    thread = threading.Thread(target=lambda: problems.extend(compare(c, mine)), daemon=True)
    thread.start()
    try:
        yield
    except Exception as raised:
        error = raised
    while world.sum(thread.is_alive())[0]:  # hashing may take longer than a collective may wait
        thread.join(0.01)

    # A damaged file explains an error in the reading, so it is named first.
    told = world.collect((problems, str(error) if error else None))
    failed = [text for _, text in told if text is not None]
    damaged = list(dict.fromkeys(problem for part, _ in told for problem in part))
    refuse(folder, damaged, f" (it was noticed as: {failed[0]})" if failed else "")
    if failed:
        raise error or ConfigError(failed[0])


def first_look(c: Checkpoint, kind: str) -> tuple[list[str], list[str]]:
    """(problems of state.json and of the small files, names of the large files, to be compared next)."""
    present = {path.name for path in c.path.iterdir() if READ.fullmatch(path.name)}
    names = sorted(present | set(c.state.get("files", {})))
    names = [name for name in names if name.startswith("optimizer") == (kind == "optimizer")]
    large = [name for name in names if name.endswith(".safetensors")]
    return state_damage(c) + compare(c, [name for name in names if name not in large]), large


def compare(c: Checkpoint, names: list[str]) -> list[str]:
    """A line for each of the files that is not as state.json has it. Several are hashed side by side."""
    queue, found = iter(names), {}

    # A thread takes one file after another.
    def work():
        for name in queue:  # the threads share the queue: each file is taken by one
            try:
                said, now = c.state.get("files", {}).get(name), hash_of(c.path / name)
                if said is None:
                    found[name] = f"{name} is not listed in state.json"
                elif now != said:
                    found[name] = f"{name} is damaged: SHA-256 {now[:12]}, and {said[:12]} when it was saved"
            except FileNotFoundError:
                found[name] = f"{name} is missing"
            except Exception as error:  # a file that cannot be checked counts as damaged
                found[name] = f"{name} cannot be read: {type(error).__name__}: {error}"

    threads = [threading.Thread(target=work, daemon=True) for _ in names[:N_THREADS]]
    for thread in threads:  # daemons: Ctrl-C does not wait until 5 GB are hashed
        thread.start()
    for thread in threads:
        thread.join()
    return [found[name] for name in names if name in found]


def state_damage(c: Checkpoint) -> list[str]:
    """A line where state.json, which has the other files' hashes, is not the one that the ledger knows."""
    folder = c.path.resolve()
    said = recorded(folder.parents[1]).get(folder.name) if folder.parent.name == "checkpoints" else None
    now = hash_of(c.path / "state.json")
    if said in (None, now):
        return []
    return [f"state.json is damaged: SHA-256 {now[:12]}, and {said[:12]} in the ledger"]


def hash_of(path: Path) -> str:
    """SHA-256 of a file, computed once in a process; a file that has changed since is another one."""
    about = path.stat()
    return cached_hash(path, about.st_ino, about.st_size, about.st_mtime_ns)


@functools.cache
def cached_hash(path: Path, inode: int, size: int, changed: int) -> str:
    return files.sha256(path)


def model_folder(path: Path | str, step: int | None = None, verify: bool = True) -> Path:
    """A run -> the folder of its newest complete checkpoint, or of `step`'s; any model folder -> itself.

    With `verify`, the hashes of its config.json and its tokenizer are compared: they are about to be read.
    """
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder; give a run (runs/demo), a checkpoint or a model folder")
    if (path / "checkpoints").is_dir() or not (path / "config.json").exists():
        path = chosen(path, [] if step is None else [step])[-1].path
    elif step is not None:
        raise ConfigError(f"{path} is itself a checkpoint; leave --checkpoint {step} out, or give the run")
    if verify and (path / "state.json").exists():
        refuse(path, first_look(read(path), "model")[0])
    read_config(path)
    return path


# ---- state.json against the run ---------------------------------------------------------------------------


def check_state(c: Checkpoint, cfg: Config, manifest: dict, sha256: str) -> None:
    """ConfigError where a run cannot be where a checkpoint's state.json says."""
    problems = contradictions(c, cfg, manifest, sha256)
    refuse(c.path, [f"state.json is damaged, or another run's: {problem}" for problem in problems])


def contradictions(c: Checkpoint, cfg: Config, manifest: dict, sha256: str) -> list[str]:
    """How a state.json contradicts this config and dataset (`sha256`: the manifest's hash); [] if not."""
    state, step, n_rows = c.state, c.step, manifest["rows"]
    if lacks := [name for name in NEEDED if name not in state]:
        return [f"lacks {', '.join(lacks)}"]
    for name, now in (("dataset", sha256), ("tokenizer", manifest["tokenizer"]["sha256"])):
        said = state[f"{name}_sha256"]
        if said != now:
            return [f"it was trained with another {name}: {said[:12]}, and the run's is {now[:12]}"]

    # Ranges of positions must lie within the dataset and hold each position once.
    order, skipped = state.get("order") or [[0, n_rows]], state.get("skipped", [])
    for name, ranges in (("order", order), ("skipped", skipped)):
        reached = 0
        for first, end in sorted(ranges):
            if not reached <= first < end <= n_rows:
                return [f"{name} has [{first}, {end}]: empty, twice, or beyond the dataset's {n_rows} rows"]
            reached = end

    # Some fields follow from the number of steps.
    plan = steps.plan_of(cfg, n_rows, order)
    if step > plan.n_steps or state.get("begin", 0) > step:
        return [f"step {step} is not within {state.get('begin', 0)} .. {plan.n_steps}, this run's steps"]
    chunks = [(chunk["first"], chunk["first"] + chunk["rows"]) for chunk in manifest["chunks"]]
    rows = plan.consumed(step)
    wanted = {"rows": rows, "tokens": rows * cfg.model.seq_len, "chunk": plan.newest_chunk(chunks, step)}
    out = []
    for name, value in wanted.items():
        if state[name] != value:
            out.append(f"{name} is {state[name]}, and after step {step} it must be {value}")

    # Only rows that were consumed can have been skipped.
    consumed = steps.cut(plan.ranges, 0, rows)[1]
    for first, end in skipped:
        if not any(a <= first and end <= b for a, b in consumed):
            out.append(f"skipped has [{first}, {end}], which it had not come to")
    return out
