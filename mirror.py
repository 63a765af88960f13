"""Sends a run's metrics to TensorBoard or Weights & Biases, for those who want them there.

    python mirror.py runs/demo --to tensorboard         # then: tensorboard --logdir runs
    python mirror.py runs/demo --to wandb --follow      # while it trains, on any machine that sees the folder

It reads metrics.jsonl from outside: training knows nothing of it, and no network fault can slow or stop it.
Every number of a step is sent at that step. After a resume or a rollback, step numbers repeat and the later
lines count: everything is then sent again. With --follow it waits for new lines until the ledger says finish,
or until Ctrl-C.

Reads config.json, ledger.jsonl and metrics.jsonl; writes RUN/tensorboard/, or the project nano360 on wandb
(with WANDB_MODE=offline: RUN/wandb/). Needs `pip install tensorboard` or `pip install wandb`.
"""

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
    """Event files in RUN/tensorboard/. Each start sends all steps; readers forget those sent before."""

    def __init__(self, run: Path, first: dict, returns: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.Event, self.Summary = Event, Summary
        self.writer = EventFileWriter(str(run / "tensorboard"))
        start = SessionLog(status=SessionLog.START)  # readers forget this step and later ones
        self.writer.add_event(Event(wall_time=time.time(), step=0, session_log=start))

    def send(self, record: dict) -> None:
        values = [self.Summary.Value(tag=k, simple_value=v) for k, v in files.numbers(record) if k != "time"]
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

    wandb cannot take back a step. So after a resume that repeats steps, all steps are sent to another run of
    the same name.
    """

    def __init__(self, run: Path, first: dict, returns: int):
        import wandb

        # One id for a run, wherever its folder is: made from its name, from its first record (which has a
        # time), and from how often its steps went back.
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
        self.next = self.run.step  # wandb has all earlier steps already

    def send(self, record: dict) -> None:
        if record["step"] >= self.next:
            self.run.log(dict(files.numbers(record)), step=record["step"])

    def flush(self) -> None:
        pass  # wandb sends by itself, in a process of its own

    def close(self) -> None:
        self.run.finish()


def read(path: Path, offset: int) -> tuple[list[dict], int]:
    """The records of a log from byte `offset`, and the offset behind them; a half-written line is left."""
    # Read whole lines only.
    if not path.exists():
        return [], 0
    with open(path, "rb") as log:
        log.seek(offset)
        block = log.read()
    block = block[: block.rfind(b"\n") + 1]

    # Keep the records of steps.
    records = []
    for line in block.splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # a line truncated by a kill
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
    return records, offset + len(block)


def finished(run: Path) -> bool:
    events = [record.get("event") for record in files.read_lines(run / "ledger.jsonl")]
    return [event for event in events if event != "checkpoint"][-1:] == ["finish"]


def mirror(run: Path, kind: type, follow: bool) -> int:
    """Sends a run's steps to a TensorBoard or Wandb; returns the last step. ConfigError if there is none."""
    target, offset, sent = None, 0, -1
    try:
        while True:
            # The ledger is read first: if it says finish, the metrics that are read next are all there are.
            done = finished(run)
            records, offset = read(run / "metrics.jsonl", offset)
            returns = sum(b <= a for a, b in itertools.pairwise([sent, *(r["step"] for r in records)]))

            # Where steps repeat while it follows, begin again from the first line.
            if target and returns:
                target.close()
                target, offset, sent = None, 0, -1
                continue

            # Send what is new.
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
        print("stopped; the training continues")
    finally:
        if target:
            target.close()
    if sent < 0:
        raise ConfigError(f"{run} has no step in its metrics.jsonl yet; --follow waits for them")
    return sent


@configurator.script
def main() -> None:
    parser = configurator.parser(__doc__)
    parser.add_argument("run", help="a run folder: runs/demo")
    parser.add_argument("--to", required=True, choices=("tensorboard", "wandb"))
    parser.add_argument("--follow", action="store_true", help="wait for new steps until the run is finished")
    args = parser.parse_args()
    run = Path(args.run).resolve()
    config.load_run(run)
    if importlib.util.find_spec(args.to) is None:
        raise ConfigError(f"{args.to} is not installed: pip install {args.to}")
    step = mirror(run, {"tensorboard": TensorBoard, "wandb": Wandb}[args.to], args.follow)
    print(f"{args.run} is in {args.to} up to step {step}")


if __name__ == "__main__":
    main()
