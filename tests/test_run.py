"""run.sh, and how every script ends: Ctrl-C, a reader that has gone, a full disk, a read-only folder."""

import ctypes
import hashlib
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, wait_for_step

import files
import run_folder

MINE = """
from config import *
config: Config = Config(
    model=Model(vocab_size=300, seq_len=24, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=40),
    tokenizer=Tokenizer(vocab_size=300),
    data=Data(sources=(Source("prose", paths=("text",)),), n_chunks=5, validation_fraction=0.2, workers=1),
    optim=Optim(lr=1e-2, warmup_steps=4),
    train=Train(batch_size=6, micro_batch_size=3, log_every=1, device="cpu"),
    eval=Eval(prompt_tokens=8, continuation_tokens=8, rows_per_chunk=5),
)
"""


def run(*command, **how) -> subprocess.CompletedProcess:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, **how)


# ---- run.sh -----------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(recipe, tmp_path) -> tuple[list[str], Path]:
    """(the command `bash "a copy of nano360/run.sh"`, another folder, with my.py and its text)."""
    copy, here = tmp_path / "nano 360", tmp_path / "here"
    (copy / ".venv" / "bin").mkdir(parents=True)
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*.css"), ROOT / "configs"):
        (copy / path.name).symlink_to(path)
    for name in ("run.sh", "requirements.txt"):
        shutil.copy(ROOT / name, copy)
    python = copy / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    stamp = run("sh", "-c", "cat requirements.txt | cksum | tr ' ' '-'", cwd=copy).stdout.strip()
    (copy / ".venv" / f"installed-{stamp}").touch()
    here.mkdir()
    shutil.copytree(recipe.parent / "text", here / "text")
    (here / "my.py").write_text(MINE)
    return ["bash", str(copy / "run.sh")], here


def test_the_pipeline_takes_the_callers_config_and_paths_and_leaves_its_results_there(elsewhere):
    command, here = elsewhere
    done = run(*command, "my.py", "--run=out/it's mine", "--data.n_chunks=3", cwd=here)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrote out/it's mine/report.html" in done.stdout
    assert sorted(p.name for p in here.iterdir()) == ["datasets", "my.py", "out", "text", "tokenizers"]
    assert len(run_folder.checkpoints(here / "out/it's mine")) == 4
    missing = run(*command, "mine.py", cwd=here)
    assert missing.returncode == 2 and missing.stderr.startswith("error: no config 'mine.py'")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("to", ["run.sh alone", "run.sh as timeout does", "train.py alone"])
def test_a_signal_while_training_ends_the_pipeline_after_a_save(elsewhere, number, to):
    command, here = elsewhere
    process = subprocess.Popen(
        [*command, "my.py"], cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for_step(here / "runs/my", 3, process)
    if to != "train.py alone":
        process.send_signal(number)
        if to == "run.sh as timeout does":
            process.send_signal(signal.SIGCONT)
    else:
        os.kill(json.loads((here / "runs/my/.processes/0.json").read_text())["pid"], number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, out + err
    assert "interrupted and saved at step" in out and "== eval" not in out and "Traceback" not in err


def test_a_stage_that_fails_ends_the_pipeline_with_its_code(elsewhere):
    command, here = elsewhere
    done = run(*command, "my.py", "--model.vocab_size=299", cwd=here)
    assert done.returncode == 2 and "== data" in done.stdout and "== train" not in done.stdout


# ---- how scripts end --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script", ["tokenizer", "eval", "sample", "report", "plan", "data", "train", "incidents"]
)
def test_help_into_a_pipe_that_nobody_reads_is_no_traceback(script):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, ROOT / f"{script}.py", "--help"], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert done.stderr == "" and done.returncode in (0, 141)


@pytest.mark.parametrize(
    "command", ["sample.py {run} --tokens 15", "eval.py {run}", "incidents.py {run}", "plan.py demo --gpus 1"]
)
def test_a_pipe_that_nobody_reads_ends_a_script_quietly(whole, tmp_path, command):
    shutil.copytree(whole, tmp_path / "run")
    script, *arguments = command.format(run=tmp_path / "run").split()
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, ROOT / script, *arguments], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert done.returncode == 141 and "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_ctrl_c_ends_a_tokenizers_training_without_a_traceback_and_leaves_nothing(tmp_path):
    text = tmp_path / "text.txt"
    words = (hashlib.sha256(bytes([n % 256, n >> 8])).hexdigest() for n in range(1 << 16))
    text.write_text("\n".join(words) * 4)  # some ten seconds of work
    command = [sys.executable, ROOT / "tokenizer.py", "train", text, "--out", tmp_path / "tok"]
    command += ["--split", r"\S+|\s+", "--vocab_size", "200000"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)  # counting in workers, or learning
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: every process of it
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and out == ""
    assert not (tmp_path / "tok").exists()


@pytest.mark.parametrize(
    "script, first", [("tokenizer", "symtable"), ("eval", "argparse"), ("report", "html")]
)
def test_ctrl_c_while_packages_are_imported_is_no_traceback(script, first):
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", ROOT / f"{script}.py", "x", "y"],
        stderr=subprocess.PIPE,
        text=True,
    )
    said = ""
    while f" {first}\n" not in said:  # it is imported first, and the packages that take time after it
        said += process.stderr.readline()
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait() == -signal.SIGINT and "Traceback" not in said


def nothing_fits():  # no file can become longer than 9 bytes: EFBIG, where a full disk answers ENOSPC
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9))


WRITERS = {
    "eval.py {run}": "evals.jsonl",
    "memorize.py {run}": "memorization/step-00000000.jsonl",
    "sample.py {run} --tokens 9 --save": "samples.jsonl",
    "report.py {run}": "report.html",
}


@pytest.mark.parametrize("command", WRITERS)
def test_a_full_disk_is_one_line_that_names_the_file(whole, tmp_path, command):
    shutil.copytree(whole, tmp_path / "run")
    before = sorted((tmp_path / "run").rglob("*"))
    script, *arguments = command.format(run=tmp_path / "run").split()
    done = run(sys.executable, ROOT / script, *arguments, preexec_fn=nothing_fits)
    name = "figures/" if script == "report.py" else WRITERS[command]
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and said.startswith("error: ") and said.endswith("File too large")
    assert str(tmp_path / "run" / name) in said and "Traceback" not in done.stderr
    left = {path for path in (tmp_path / "run").rglob("*") if path.is_file()} - set(before)
    # nothing aside is left, and of a log at most a cut line, which no reader takes
    assert all(path.suffix == ".jsonl" and files.read_lines(path) == [] for path in left)


def no_power_over_permissions():  # root is asked for permissions, too, without CAP_DAC_OVERRIDE
    if os.getuid() == 0:
        PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize("command", WRITERS)
def test_a_read_only_run_folder_is_one_line_that_names_the_file(whole, tmp_path, command):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    script, *arguments = command.format(run=folder).split()
    done = run(sys.executable, ROOT / script, *arguments, preexec_fn=no_power_over_permissions)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    said = done.stderr.splitlines()[-1]
    name = "figures" if script == "report.py" else WRITERS[command].partition("/")[0]
    assert done.returncode == 1 and said.startswith("error: ") and said.endswith("Permission denied")
    assert str(folder / name) in said and "Traceback" not in done.stderr


def test_standard_output_on_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, ROOT / "plan.py", "demo"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1 and done.stderr == "error: standard output: No space left on device\n"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks at processes through /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_a_tokenizer_training_that_is_killed(tmp_path, number):
    line = json.dumps({"text": "words and more words, " * 50}) + "\n"
    (tmp_path / "text.jsonl").write_text(line * 60_000)  # 66 MB: the workers are at work for a second
    command = [
        sys.executable,
        ROOT / "tokenizer.py",
        "train",
        tmp_path / "text.jsonl",
        "--out",
        tmp_path / "out",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    workers, end = [], time.monotonic() + 60
    while len(workers) < 2 and process.poll() is None and time.monotonic() < end:
        tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
        workers = [int(pid) for task in tasks for pid in task.read_text().split()]
    process.send_signal(number)
    assert process.wait() == -number and workers and not (tmp_path / "out").exists()
    while any(Path(f"/proc/{pid}/task").exists() for pid in workers):
        assert time.monotonic() < end, "a worker is still there"
        time.sleep(0.05)
