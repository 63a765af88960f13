"""The mirror of a run's metrics: what is sent, once each, from files that grow, break off and go back."""

import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
import time

import pytest
from conftest import ROOT

import config
import files
import mirror


class Heard:
    """In place of TensorBoard or wandb: remembers what it was sent."""

    starts = None  # of each start: [returns, [(step, loss), ...]]

    def __init__(self, run, first, returns):
        self.starts.append([returns, []])

    def send(self, record):
        self.starts[-1][1].append((record["step"], record["loss"]))

    def flush(self):
        pass

    def close(self):
        pass


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "hill"
    folder.mkdir()
    settings = config.to_dict(config.Config(name="hill").resolved())
    files.write_json(folder / "config.json", {"format": 1, "config": settings})
    return folder


def put(run, *pairs, end=""):
    """Lines of metrics.jsonl: (step, loss) each, and half a line."""
    for step, loss in pairs:
        record = {
            "step": step,
            "loss": loss,
            "lr": 1e-3,
            "chunk": 2,
            "time": 1e9 + step,
            "note": "text",
            "up": True,
        }
        files.append(run / "metrics.jsonl", {**record, "norms": {"layers.0": loss / 2}}, durable=False)
    with open(run / "metrics.jsonl", "a") as log:
        log.write(end)


def tell(run, event):
    files.append(run / "ledger.jsonl", {"event": event})


def hear(run, follow=False):
    Heard.starts = []
    return mirror.mirror(run, Heard, follow), Heard.starts


def command(run, *arguments, **environment):
    return [sys.executable, ROOT / "mirror.py", run, *arguments], {**os.environ, **environment}


def test_every_number_of_a_record_is_sent_and_nothing_else():
    record = {
        "step": 3,
        "loss": 2.5,
        "chunk": 7,
        "note": "text",
        "up": True,
        "none": None,
        "norms": {"a": {"b": 1}},
    }
    assert dict(files.numbers(record)) == {"loss": 2.5, "chunk": 7, "norms/a/b": 1}


def test_a_step_that_stands_twice_counts_once_and_the_later_line_is_it(run):
    put(run, (1, 5.0), (2, 4.0), (3, 3.0), (2, 4.5), (3, 3.5), (4, 2.0))
    assert hear(run) == (4, [[1, [(1, 5.0), (2, 4.5), (3, 3.5), (4, 2.0)]]])


def test_steps_that_a_rollback_took_back_and_nobody_made_again_are_not_sent(run):
    put(run, (1, 5.0), (2, 4.0), (3, 9.0), (2, 3.0))
    assert hear(run) == (2, [[1, [(1, 5.0), (2, 3.0)]]])


def test_a_line_cut_off_by_a_kill_is_left_out_in_the_middle_and_waited_for_at_the_end(run):
    put(run, (1, 5.0), end='{"step": 2, "lo')
    put(run, (2, 4.0), end='{"step": 3, "loss": 3.0, "ti')
    assert hear(run) == (2, [[0, [(1, 5.0), (2, 4.0)]]])
    _, offset = mirror.read(run / "metrics.jsonl", 0)
    assert mirror.read(run / "metrics.jsonl", offset) == ([], offset)
    put(run, end='me": 7}\n')
    assert mirror.read(run / "metrics.jsonl", offset)[0] == [{"step": 3, "loss": 3.0, "time": 7}]


def test_following_sends_new_lines_until_the_ledger_says_finish_and_all_anew_after_a_return(run, monkeypatch):
    """Every wait of the mirror is the next act of a training that is killed, resumed and finished."""
    acts = [
        lambda: (tell(run, "start"), put(run, (1, 5.0))),
        lambda: put(run, (2, 4.0), (3, 3.0), end='{"step": 4'),
        lambda: (tell(run, "finish"), tell(run, "resume")),  # to more steps: the first end is none any more
        lambda: put(run, (3, 3.5)),
        lambda: (put(run, (4, 2.0)), tell(run, "checkpoint"), tell(run, "finish"), tell(run, "checkpoint")),
    ]
    monkeypatch.setattr(time, "sleep", lambda seconds: acts.pop(0)())
    step, starts = hear(run, follow=True)
    assert (step, acts) == (4, [])
    assert starts == [[0, [(1, 5.0), (2, 4.0), (3, 3.0)]], [1, [(1, 5.0), (2, 4.0), (3, 3.5), (4, 2.0)]]]


def test_ctrl_c_ends_following_and_what_was_sent_stays(run, monkeypatch, capsys):
    def interrupt(seconds):
        raise KeyboardInterrupt

    put(run, (1, 5.0))
    monkeypatch.setattr(time, "sleep", interrupt)
    assert hear(run, follow=True) == (1, [[0, [(1, 5.0)]]])
    assert "training continues" in capsys.readouterr().out


def test_help_answers_at_once_and_without_torch_or_either_package():
    program = "import sys, mirror; print({'torch', 'tensorboard', 'wandb'} & set(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "set()"


def test_mistakes_are_told_in_a_line_with_exit_code_2(run, tmp_path):
    without = (sys.executable, "-S")  # no installed package is found
    for start, folder, expected in (
        ((sys.executable,), tmp_path / "none", "is not a run folder"),
        (without, run, "pip install tensorboard"),
    ):
        told = subprocess.run(
            [*start, ROOT / "mirror.py", folder, "--to", "tensorboard"], capture_output=True, text=True
        )
        assert told.returncode == 2 and expected in told.stderr and "Traceback" not in told.stderr
    with pytest.raises(config.ConfigError, match="no step"):
        hear(run)


# ---- the real ones ----------------------------------------------------------------------------------------

needs_tensorboard = pytest.mark.skipif(
    not importlib.util.find_spec("tensorboard"), reason="no tensorboard here"
)
needs_wandb = pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="no wandb here")


def scalars(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {
        tag: [(e.step, e.value, e.wall_time) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


@needs_tensorboard
def test_tensorboard_reads_back_what_the_run_recorded(run):
    put(run, (1, 5.0), (2, 4.0), (2, 4.5), (3, float("nan")))
    line, environment = command(run, "--to", "tensorboard")
    for _ in range(2):  # again: nothing stands twice
        subprocess.run(line, env=environment, check=True, capture_output=True)
    found = scalars(run)
    assert set(found) == {"loss", "lr", "chunk", "norms/layers.0"}
    assert (
        found["loss"][:2] == [(1, 5.0, 1e9 + 1), (2, 4.5, 1e9 + 2)]
        and found["loss"][2][1] != found["loss"][2][1]
    )
    assert found["norms/layers.0"][1][:2] == (2, 2.25)


@needs_tensorboard
def test_an_open_tensorboard_forgets_the_steps_that_a_resume_made_again(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    losses = lambda: [(e.step, e.value) for e in events.Reload().Scalars("loss")]  # noqa: E731
    put(run, (1, 5.0), (2, 4.0), (3, 3.0))
    line, environment = command(run, "--to", "tensorboard", "--follow")
    following = subprocess.Popen(line, env=environment)
    try:
        wait_for(lambda: list(run.glob("tensorboard/*")) and "loss" in events.Reload().Tags()["scalars"])
        wait_for(lambda: losses() == [(1, 5.0), (2, 4.0), (3, 3.0)])
        put(run, (3, 3.5), (4, 2.0))
        wait_for(lambda: losses() == [(1, 5.0), (2, 4.0), (3, 3.5), (4, 2.0)])
        following.send_signal(signal.SIGINT)
        assert following.wait(20) == 0
    finally:
        following.kill()
        following.wait()


def wait_for(true, seconds=30):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def wandb_records(path):
    """The records of wandb's own file, which is a log in LevelDB's form: 32 KiB blocks of pieces."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, whole = path.read_bytes(), 7, b""  # after the file's own header
    while at < len(content):
        if 2**15 - at % 2**15 < 7:  # no room for another piece in this block
            at += 2**15 - at % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


@needs_wandb
def test_wandb_offline_holds_every_step_once_with_the_runs_name_and_config(run, tmp_path):
    put(run, (1, 5.0), (2, 4.0), (2, 4.5), (3, 3.0))
    line, environment = command(
        run, "--to", "wandb", WANDB_MODE="offline", HOME=str(tmp_path), WANDB_SILENT="true"
    )
    subprocess.run(line, env=environment, check=True, capture_output=True)
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    history, about, settings = [], None, {}
    for record in wandb_records(path):
        if record.HasField("run"):
            about = record.run
            settings |= {i.key or i.nested_key[0]: json.loads(i.value_json) for i in about.config.update}
        if record.HasField("history"):
            values = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            history.append(
                (record.history.step.num, *(values[k] for k in ("loss", "norms/layers.0", "chunk")))
            )
    assert (about.project, about.display_name) == ("nano360", "hill")
    assert history == [(1, 5.0, 2.5, 2), (2, 4.5, 2.25, 2), (3, 3.0, 1.5, 2)]
    assert settings["optim"]["lr"] == config.Optim().lr and settings["name"] == "hill"
