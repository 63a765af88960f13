"""A run's metrics in TensorBoard or Weights & Biases, for those who want them there.

    python mirror.py runs/demo --to tensorboard         # then: tensorboard --logdir runs
    python mirror.py runs/demo --to wandb --follow      # while it trains, on any machine that sees the folder

It reads metrics.jsonl from outside: training knows nothing of it, and no network fault can slow or stop it.
Every number of a step is sent at that step. Where steps go back (a resume, a rollback) the later lines count:
all is then sent anew. With --follow it waits for lines until the ledger says finish, or Ctrl-C.

Reads config.json, ledger.jsonl and metrics.jsonl; writes RUN/tensorboard/, or the project nano360 on wandb
(with WANDB_MODE=offline: RUN/wandb/). Needs `pip install tensorboard` or `pip install wandb`.
"""

import argparse
import hashlib
import importlib.util
import itertools
import json
import time
from pathlib import Path

import config
import configurator
import files
from config import ConfigError

POLL_SECONDS = 2


class TensorBoard:
    """Event files in RUN/tensorboard/. Each start tells the whole story; readers forget the one before."""

    def __init__(self, run: Path, first: dict, returns: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.Event, self.Summary = Event, Summary
        self.writer = EventFileWriter(str(run / "tensorboard"))
        start = SessionLog(status=SessionLog.START)  # takes back this step and all later ones
        self.writer.add_event(Event(wall_time=time.time(), step=0, session_log=start))

    def send(self, record: dict) -> None:
        values = [self.Summary.Value(tag=k, simple_value=v) for k, v in numbers(record) if k != "time"]
        when = record.get("time", time.time())
        self.writer.add_event(
            self.Event(wall_time=when, step=record["step"], summary=self.Summary(value=values))
        )

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of the project nano360. A new start finds it again by its id, and sends only what it lacks.

    wandb cannot take back a step. After steps went back, another run of the same name tells the whole story.
    """

    def __init__(self, run: Path, first: dict, returns: int):
        import wandb

        # one id a run, wherever its folder lies: its name, and its first step with the second it was made in
        story = f"{run.name} {json.dumps(first, sort_keys=True)} {returns}"
        settings = config.to_dict(config.load_run(run))
        try:
            self.run = wandb.init(
                project="nano360", name=run.name, id=hashlib.sha256(story.encode()).hexdigest()[:16],
                resume="allow", config=settings, dir=run,
            )  # fmt: skip
        except wandb.Error as error:
            why = str(error).rstrip(".")
            raise ConfigError(
                f"wandb: {why}; log in with `wandb login`, or set WANDB_MODE=offline and `wandb sync` later"
            ) from None
        self.next = self.run.step  # what is before it is there already

    def send(self, record: dict) -> None:
        if record["step"] >= self.next:
            self.run.log(dict(numbers(record)), step=record["step"])

    def flush(self) -> None:
        pass  # it sends by itself, in a process of its own

    def close(self) -> None:
        self.run.finish()


def numbers(record: dict, prefix: str = ""):
    """The numeric fields of a record but its step, of those in it too: {"a": {"b": 1.5}} -> ("a/b", 1.5)."""
    for key, value in record.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{key}/")
        elif type(value) in (int, float) and prefix + key != "step":
            yield prefix + key, value


def read(path: Path, offset: int) -> tuple[list[dict], int]:
    """The records from a place in a log on, and the place after them, where a half-written line waits."""
    if not path.exists():
        return [], 0
    with open(path, "rb") as log:
        log.seek(offset)
        block = log.read()
    block = block[: block.rfind(b"\n") + 1]
    records = []
    for line in block.splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # cut off by a kill
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
    return records, offset + len(block)


def finished(run: Path) -> bool:
    events = [record.get("event") for record in files.read_lines(run / "ledger.jsonl")]
    return [event for event in events if event != "checkpoint"][-1:] == ["finish"]


def mirror(run: Path, kind: type, follow: bool) -> int:
    """Sends a run's steps to a TensorBoard or Wandb; returns the last. ConfigError where there is none."""
    target, offset, sent = None, 0, -1
    try:
        while True:
            done = finished(run)  # asked first: all that was written before it is then read below
            records, offset = read(run / "metrics.jsonl", offset)
            returns = sum(b <= a for a, b in itertools.pairwise([sent, *(r["step"] for r in records)]))
            if target and returns:
                target.close()
                target, offset, sent = None, 0, -1
                continue
            if records and not target:
                target = kind(run, records[0], returns)
            for record in files.latest(records):
                target.send(record)
                sent = record["step"]
            if target:
                target.flush()
            if done or not follow:
                break
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        print("stopped; the training goes on")
    finally:
        if target:
            target.close()
    if sent < 0:
        raise ConfigError(f"{run} has no step in its metrics.jsonl yet; --follow waits for them")
    return sent


@configurator.script
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a run folder: runs/demo")
    parser.add_argument("--to", required=True, choices=("tensorboard", "wandb"))
    parser.add_argument("--follow", action="store_true", help="until the run is finished")
    args = parser.parse_args()
    run = Path(args.run).resolve()
    config.load_run(run)
    if importlib.util.find_spec(args.to) is None:
        raise ConfigError(f"{args.to} is not installed: pip install {args.to}")
    step = mirror(run, {"tensorboard": TensorBoard, "wandb": Wandb}[args.to], args.follow)
    print(f"{args.run} is in {args.to} up to step {step}")


if __name__ == "__main__":
    main()
