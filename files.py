"""Writes files whole or not at all (written aside, synced, renamed), and logs that survive a kill.

write_json("runs/demo/config.json", {...})
append("runs/demo/ledger.jsonl", {"event": "start", ...})
read_lines("runs/demo/ledger.jsonl") -> [{...}, ...]
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path


def encoded(value: object, **how) -> bytes:
    """JSON as UTF-8. Half of a surrogate pair, which UTF-8 cannot hold, becomes JSON's own escape \\udcff."""
    return json.dumps(value, ensure_ascii=False, **how).encode("utf-8", "backslashreplace")


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(path: Path | str, content: bytes) -> None:
    """Writes aside, syncs, renames: a reader sees the old file or the new one, never half of one."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_bytes(content)
        sync(aside)
        os.replace(aside, path)
        sync(path.parent)
    except OSError as error:
        error.filename = str(path)  # not the name aside, which nobody knows
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def write_json(path: Path | str, value: object) -> None:
    """A JSON file, written whole or not at all."""
    write(path, encoded(value, indent=1) + b"\n")


def append(path: Path | str, record: dict, durable: bool = True) -> None:
    """Adds one line of JSON to a log; if durable, the line is on the disk itself when this returns.

    Half a line left by a kill becomes a line of its own.
    """
    line = encoded(record) + b"\n"
    try:
        with open(path, "ab+") as log:
            if log.seek(0, os.SEEK_END):
                log.seek(-1, os.SEEK_END)
                if log.read(1) != b"\n":
                    log.write(b"\n")
            log.write(line)
            log.flush()
            if durable:
                os.fsync(log.fileno())
    except OSError as error:
        error.filename = str(path)  # the error of a full disk does not say which file was being written
        raise


def read_lines(path: Path | str) -> list[dict]:
    """The records of a log; [] where there is none. Lines cut off by a kill are left out."""
    records = []
    try:
        with open(path, "rb") as log:
            for line in log:
                try:
                    records.append(json.loads(line))
                except ValueError:
                    continue
    except FileNotFoundError:
        pass
    return [record for record in records if isinstance(record, dict)]


def latest(records: list[dict]) -> list[dict]:
    """The records that count. After a resume or rollback, step numbers repeat: each record replaces earlier
    ones with the same or a higher step.
    """
    kept = []
    for record in records:
        while kept and kept[-1]["step"] >= record["step"]:
            kept.pop()
        kept.append(record)
    return kept


def numbers(record: dict, prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a record and in objects inside it, but not its step: {"a": {"b": 1}} -> ("a/b", 1)."""
    for key, value in record.items():
        # The depth is limited: a stranger's record can be nested a thousand times.
        if isinstance(value, dict) and prefix.count("/") < 4:
            yield from numbers(value, f"{prefix}{key}/")
        elif type(value) in (int, float) and prefix + key != "step":
            yield prefix + key, value


def sha256(path: Path | str) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
        return digest.hexdigest()
