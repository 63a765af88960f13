"""Shared by several test files: the way to the scripts, the names of the configs, a tiny config to train."""

import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import config
import data
import files
import run_folder

ROOT = Path(__file__).parents[1]

CONFIG = """
from config import *
config = Config(
    model=Model(vocab_size=300, seq_len=24, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=40),
    tokenizer=Tokenizer(path={tokenizer!r}, vocab_size=300),
    data=Data(sources=(Source("prose", paths=({text!r},)),), n_chunks=5, validation_fraction=0.2, workers=1),
    optim=Optim(lr=1e-2, warmup_steps=4),
    train=Train(batch_size=6, micro_batch_size=3, log_every=5, {device}),
    eval=Eval(prompt_tokens=8, continuation_tokens=8),
    dataset={dataset!r},
)
"""


LONGEST = ("test_train_together", "test_train", "test_parallel", "test_incidents", "test_plan")


def pytest_addoption(parser):
    help = "where the tests train that share the tiny config below"
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help=help)


def pytest_collection_modifyitems(items):
    """The longest files first, so that two workers, each with whole files, end at about the same time."""
    for item in items:
        if item.get_closest_marker("gpu"):
            import torch

            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def config_names() -> list[str]:
    """7b, demo, ..., pythia-160m, ...: every file of configs/, and every entry of those that are tables."""
    names = []
    git = ["git", "ls-files", "--", "configs/*.py"]  # one of the user's own there is not tested
    tracked = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    for path in sorted((ROOT / "configs").glob("*.py")):
        if tracked and f"configs/{path.name}" not in tracked:
            continue
        table = runpy.run_path(str(path)).get("configs")
        names += [f"{path.stem}-{entry}" for entry in table] if table else [path.stem]
    return names


@pytest.fixture(scope="session")
def recipe(tmp_path_factory, pytestconfig) -> Path:
    """A config file with its tokenizer and dataset built: some 290 rows, 48 steps of 6 rows, 5 chunks."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "text").mkdir()
    for n in range(40):
        lines = (f"{n * 7919 % (w + 2)} sheep and {w * n % 97} goats went up the hill" for w in range(14))
        (folder / "text" / f"{n}.txt").write_text(" ".join(lines))
    path = folder / "tiny.py"
    names = {name: str(folder / name) for name in ("tokenizer", "text", "dataset")}
    device = pytestconfig.getoption("--device")
    device = f"device={device!r}" + ", deterministic=True" * (device == "cuda")
    path.write_text(CONFIG.format(**names, device=device))
    subprocess.run([sys.executable, ROOT / "tokenizer.py", "train", path], check=True, capture_output=True)
    data.build(config.load(str(path)))
    return path


def load(recipe: Path, run: Path, *overrides: str) -> config.Config:
    return config.load(str(recipe), [f"--run={run}", *overrides])


def metrics(run: Path) -> list[dict]:
    """One record a step: the last one, where a resumed run came to a step again."""
    return list({record["step"]: record for record in files.read_lines(run / "metrics.jsonl")}.values())


def weights(run: Path) -> dict[str, str]:
    """Hash of the weights and of the optimizer of every checkpoint."""
    return {
        c.path.name: (c.state["files"]["model.safetensors"], c.state["files"]["optimizer.safetensors"])
        for c in run_folder.checkpoints(run)
    }


@pytest.fixture(scope="session")
def whole(recipe, tmp_path_factory) -> Path:
    """The run that nothing interrupts."""
    run = tmp_path_factory.mktemp("whole") / "run"
    command = [sys.executable, ROOT / "train.py", recipe, f"--run={run}"]
    subprocess.run(command, check=True, capture_output=True)
    return run


def save(run: Path, model, optimizers: list, state: dict, tokenizer_files: dict | None = None) -> Path:
    """Writes a checkpoint and returns its folder."""
    import checkpoint
    from steps import State

    saving = checkpoint.Saving(run, model, optimizers, tokenizer_files=tokenizer_files)
    saving.begin(State(**state))
    return saving.finish()


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A copy of the run that is the file's own `made`: nothing computed in it yet; the dataset is shared."""
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def start(recipe: Path, run: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, ROOT / "train.py", recipe, f"--run={run}", *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    for _ in range(6000):
        if (run / "metrics.jsonl").exists() and len(files.read_lines(run / "metrics.jsonl")) >= step:
            return
        if process.poll() is not None:
            raise AssertionError(f"training ended before step {step}: {process.stderr.read()}")
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached")


@pytest.fixture(scope="module")
def one_thread():
    """Models as small as those of some files only wait for a second thread."""
    import torch

    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(autouse=True)
def signals_as_they_were():
    """train() takes over Ctrl-C; pytest wants it back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
