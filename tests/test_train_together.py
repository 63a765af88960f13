"""train.py and run_folder.py with several processes: they agree, are killed, hang, and come back."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, load, metrics, wait_for_step, weights

import files
import run_folder
import train

# ---- several processes ------------------------------------------------------------------------------------


def torchrun(processes: int, recipe: Path, run: Path, *asked: str, restarts: int = 0) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [f"--max-restarts={restarts}", "--", ROOT / "train.py", recipe, f"--run={run}", *asked]
    return [*map(str, command)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def ended_well(command: list[str]) -> str:
    """Runs a command to its end, which must be a good one; what it printed."""
    result = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def same_as_alone(together: list[dict], alone: list[dict], n_steps: int) -> None:
    """Losses and gradient norms of a run's first steps are those of one process."""
    assert len(together) == n_steps
    for ours, theirs in zip(together, alone):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_have_the_same_losses_as_one(recipe, whole, tmp_path, processes):
    run = tmp_path / "run"
    out = ended_well(torchrun(processes, recipe, run, "--train.micro_batch_size=1", "--train.steps=15"))
    same_as_alone(metrics(run), metrics(whole), 15)
    assert out.count("parameters") == 1  # one process speaks
    assert "interrupted" not in out


def test_a_run_goes_on_with_any_number_of_processes_and_any_way_of_spreading(recipe, whole, tmp_path):
    """One process, then four (tensor parallel x FSDP), then three (DDP): the losses are those of one."""
    run = tmp_path / "run"
    train.train(load(recipe, run, "--train.steps=5"))
    for processes, steps, *how in (
        (4, 11, "--parallel.strategy=fsdp", "--parallel.tp=2"),
        (3, 17, "--parallel.strategy=ddp"),
    ):
        asked = (f"--train.steps={steps}", "--train.micro_batch_size=1", *how)
        ended_well(torchrun(processes, recipe, run, *asked))
    same_as_alone(metrics(run), metrics(whole), 17)
    for ours, alone in zip(metrics(run), metrics(whole)):
        assert (ours["lr"], ours["tokens"], ours["chunk"]) == (alone["lr"], alone["tokens"], alone["chunk"])
    sizes = [
        r["world_size"] for r in files.read_lines(run / "ledger.jsonl") if r["event"] in ("start", "resume")
    ]
    assert sizes == [1, 4, 3]
    train.train(load(recipe, run, "--train.steps=18"))  # and one again
    assert metrics(run)[-1]["loss"] == pytest.approx(metrics(whole)[17]["loss"], abs=1e-5)


def kill_a_rank(run: Path, rank: int, process: subprocess.Popen, gone: set[int]) -> bool:
    """Kills a process of a run by the name that it left there; False where the run is over before that."""
    while process.poll() is None:
        try:
            pid = json.loads((run / ".processes" / f"{rank}.json").read_text())["pid"]
            if pid not in gone:
                os.kill(pid, signal.SIGKILL)
                gone.add(pid)
                return True
        except (OSError, ValueError):
            pass
        time.sleep(0.01)
    return False


@pytest.fixture(scope="session")
def pair(recipe, tmp_path_factory) -> Path:
    """The run of two processes, sharded, that nothing interrupts."""
    run = tmp_path_factory.mktemp("pair") / "run"
    ended_well(torchrun(2, recipe, run, *PAIR))
    return run


PAIR = ("--parallel.strategy=fsdp", "--train.checkpoint_every=3")


def test_torchrun_brings_a_run_back_when_a_rank_is_killed(recipe, pair, tmp_path):
    run = tmp_path / "run"
    command = torchrun(2, recipe, run, *PAIR, restarts=3)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    wait_for_step(run, 8, process)
    assert kill_a_rank(run, 1, process, set())
    err = process.communicate(timeout=180)[1]
    assert process.returncode == 0, err[-3000:]
    assert weights(run) == weights(pair)
    events = [record["event"] for record in files.read_lines(run / "ledger.jsonl")]
    assert events.index("fault") < events.index("resume") and events[-1] == "finish"
    (fault,) = [r for r in files.read_lines(run / "ledger.jsonl") if r["event"] == "fault"]
    assert fault["died_without_a_word"] == [1] and fault["restart"] == 1
    (other,) = [who for who in fault["processes"] if who["rank"] == 0]
    assert "error" in other  # what the first process saw of it
    assert list((run / ".processes").iterdir()) == []


@pytest.mark.slow
def test_two_dozen_kills_at_random_moments_leave_no_trace(recipe, pair, tmp_path):
    generator, gone, theirs = random.Random(360), set(), weights(pair)
    asked = (*PAIR, "--train.checkpoint_every=1")  # almost always in the middle of a save
    while len(gone) < 24:
        run = tmp_path / str(len(gone))
        command = torchrun(2, recipe, run, *asked, restarts=1)
        for _ in range(3):
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
            )
            for _ in range(2):  # the second one ends the whole
                kill_a_rank(run, generator.randrange(2), process, gone)
                time.sleep(generator.uniform(0, 0.5))
            process.wait(timeout=180)
            for c in run_folder.checkpoints(run):
                for name, digest in c.state["files"].items():
                    assert files.sha256(c.path / name) == digest
        ended_well(torchrun(2, recipe, run, *asked))
        ours = weights(run)
        assert {name: ours[name] for name in theirs} == theirs


def test_a_process_that_hangs_ends_the_run_with_a_message(recipe, tmp_path):
    run, processes = tmp_path / "run", []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for rank in "01":
        together = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        command = [
            sys.executable,
            ROOT / "train.py",
            recipe,
            f"--run={run}",
            *PAIR,
            "--parallel.timeout_seconds=8",
        ]
        processes.append(
            subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env={**environment(), **together},
            )
        )
    try:
        while not any(c.step >= 3 for c in run_folder.checkpoints(run)):
            assert processes[0].poll() is None, processes[0].stderr.read()
            time.sleep(0.01)
        processes[1].send_signal(signal.SIGSTOP)
        err = processes[0].communicate(timeout=60)[1]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[0].returncode == 1 and "did not answer within parallel.timeout_seconds=8" in err
    assert "continues from the newest checkpoint" in err and "Traceback" not in err
    assert run_folder.checkpoints(run)[-1].step >= 3


def test_sigterm_before_preemption_saves_in_every_process(recipe, pair, tmp_path):
    run = tmp_path / "run"
    command = torchrun(2, recipe, run, *PAIR, "--train.checkpoint_every=0", restarts=3)  # and none happens
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    wait_for_step(run, 3, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    last = files.read_lines(run / "ledger.jsonl")[-1]
    assert last["event"] == "interrupted" and run_folder.checkpoints(run)[-1].step == last["step"] >= 3
    assert process.returncode != 0
    assert list((run / ".processes").iterdir()) == []
