"""README, imports and style of the house: what the front door says is so."""

import ast
import functools
import gzip
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def shipped(pattern: str) -> list[Path]:
    """The files that git tracks: one of the user's own beside them is no concern of these tests."""
    listed = subprocess.run(
        ["git", "ls-files", "--", pattern], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return [ROOT / name for name in listed.stdout.split("\n") if name and (ROOT / name).exists()]


# Without git: what the README's table names.
NAMED = [ROOT / f"{name}.py" for name in re.findall(r"^\| `(\w+)\.py` \|", README, re.M)]
SCRIPTS = {path.stem: path for path in shipped("*.py") or NAMED if path.parent == ROOT}

# Who may import whom (the design's table): a file may import only those before it in one of these orders.
MAY_IMPORT = {
    "config": [],
    "files": [],
    "loss": [],
    "model": ["config", "loss"],
    "documents": ["config"],
    "bpe": ["config"],
    "tokenizer": ["config", "files", "documents", "bpe"],
    "dataset": ["config", "files"],
    "data": ["config", "files", "documents", "bpe", "tokenizer", "dataset"],
    "families": ["config"],
    "steps": ["config"],
    "seen": ["config", "dataset", "steps"],
    "cost": ["config", "steps"],
    "optim": ["config"],
    "parallel": ["config"],
    "checkpoint": ["config", "files", "steps", "model", "families", "parallel"],
    "learner": ["config", "model", "optim", "parallel"],
    "ledger": ["config", "files", "model", "dataset", "cost", "parallel", "checkpoint"],
    "incidents": ["config", "files", "dataset", "steps", "optim", "checkpoint"],
    "benchmark": ["config", "files", "cost", "optim", "parallel", "learner", "ledger"],
    "mirror": ["config", "files"],
    "train": [
        "config",
        "files",
        "model",
        "dataset",
        "steps",
        "cost",
        "optim",
        "parallel",
        "families",
        "checkpoint",
        "learner",
        "ledger",
        "incidents",
        "benchmark",
        "tokenizer",
    ],
    "sample": ["config", "files", "model", "parallel", "checkpoint", "tokenizer"],
    "memorize": ["config", "files", "model", "dataset", "steps", "seen", "parallel", "checkpoint", "sample"],
    "eval": [
        "steps",
        "config",
        "files",
        "model",
        "dataset",
        "parallel",
        "checkpoint",
        "sample",
        "tokenizer",
        "memorize",
    ],
    "convert": ["config", "files", "model", "families", "checkpoint", "tokenizer"],
    "plan": ["config", "cost"],
    "run_folder": ["config", "files"],
    "figures": ["run_folder"],
    "report": ["config", "files", "run_folder", "figures"],
}
NO_TORCH = {
    "steps",
    "seen",
    "mirror",
    "config",
    "files",
    "documents",
    "bpe",
    "tokenizer",
    "dataset",
    "data",
    "cost",
    "plan",
    "run_folder",
    "figures",
    "report",
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_imports_go_one_way(name):
    assert imported(SCRIPTS[name]) & set(SCRIPTS) <= set(MAY_IMPORT[name])
    if name in NO_TORCH:
        assert "torch" not in imported(SCRIPTS[name])


def test_the_permitted_imports_have_no_circle():
    done: list[str] = []
    while len(done) < len(MAY_IMPORT):
        ready = [n for n, needs in MAY_IMPORT.items() if n not in done and set(needs) <= set(done)]
        assert ready, f"a circle among {set(MAY_IMPORT) - set(done)}"
        done += ready


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_every_file_says_what_it_is_and_stands_in_the_table(name):
    assert ast.get_docstring(ast.parse(SCRIPTS[name].read_text(encoding="utf-8")))
    assert f"| `{name}.py` |" in README


def test_the_table_names_only_files_that_exist():
    table = README.partition("## The files")[2].partition("##")[0]
    for name in re.findall(r"^\| `([^`]+)` \|", table, re.M):
        assert (ROOT / name).exists(), name


def commands() -> list[list[str]]:
    """Every `python script.py ...` and `torchrun ... script.py ...` of the README."""
    found = re.findall(r"(?:python|torchrun) [^`\n#]*", README)
    return sorted({command.strip() for command in found if ".py" in command or "-m pytest" in command})


@functools.cache
def help_of(script: str, *words: str) -> str:
    command = [sys.executable, ROOT / script, *words, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("command", commands())
def test_every_command_in_the_readme_exists_with_the_flags_it_uses(command):
    words = command.split()
    scripts = [word for word in words if word.endswith(".py") and "/" not in word]
    for script in scripts:
        assert (ROOT / script).is_file(), command
    benchmarks = [word for word in words if word.startswith("benchmarks/")]
    for script in (*scripts, *benchmarks):
        known = help_of(script)
        after = words[words.index(script) + 1 :]
        if script == "tokenizer.py":
            known += help_of(script, after[0])  # its two commands have flags of their own
        for flag in (word.partition("=")[0] for word in after if word.startswith("--") and word != "--"):
            assert flag in known or flag == "--help", f"{script} knows no {flag}"


def test_the_project_has_no_pickle_and_runs_no_code_from_files():
    for name, path in SCRIPTS.items():
        source = path.read_text(encoding="utf-8")
        for word in ("torch.load(", "allow_pickle=True", "trust_remote_code=True", "shell=True"):
            assert not re.search(rf"^[^#\"]*\b{re.escape(word)}", source, re.M), (name, word)
        assert "pickle" not in imported(path)


def test_no_line_is_longer_than_the_style_allows():
    for path in (*SCRIPTS.values(), *shipped("tests/*.py"), *shipped("configs/*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 110, f"{path.name}:{number}"


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


def test_every_python_block_of_the_readme_is_a_config_that_loads(tmp_path):
    for number, block in enumerate(python_blocks()):
        path = tmp_path / f"block{number}.py"
        path.write_text(block)
        cfg = config.load(str(path))
        assert cfg.data.sources and cfg.tokenizer.path, block
    assert cfg.init_from == cfg.tokenizer.path == "models/mine" and cfg.run == "runs/adapted"


def test_the_example_of_help_stands_in_the_readme_and_is_built_from_own_text(tmp_path):
    assert config.EXAMPLE in python_blocks() and len(config.EXAMPLE.splitlines()) < 15
    assert textwrap.indent(config.EXAMPLE, "    ") in help_of("train.py") and "paths=" in help_of("data.py")
    (tmp_path / "my.py").write_text(config.EXAMPLE)
    texts = [f"{n} sheep and {n * 7919 % 101} goats went up hill {n}. " * (n % 7 + 3) for n in range(200)]
    for name in ("notes", "web"):
        (tmp_path / name).mkdir()
    for n in range(100):
        (tmp_path / "notes" / f"{n}.txt").write_text(texts[n])
    (tmp_path / "book.txt").write_text(" ".join(texts))
    with gzip.open(tmp_path / "web" / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts[100:])
    small = ("--model.seq_len=64", "--tokenizer.vocab_size=280", "--data.validation_fraction=0.2")
    for command in (("tokenizer.py", "train"), ("data.py",)):
        done = subprocess.run(
            [sys.executable, ROOT / command[0], *command[1:], "my.py", *small, "--data.workers=1"],
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    first, second = json.loads((tmp_path / "datasets/my/manifest.json").read_text())["stages"]
    assert list(first["mixture"]) == ["web"] and set(second["mixture"]) == {"notes", "web"}
    assert second["tokens"] == pytest.approx(2e6, rel=0.1)


def test_a_file_of_the_users_own_does_not_concern_these_tests(tmp_path):
    mine = ROOT / "a_file_of_mine.py"  # no docstring, not in the table, imports what it likes
    mine.write_text("import torch, data, report\n")
    try:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "tests/test_readme.py",
            "-q",
            "-k",
            "imports or table or line",
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    finally:
        mine.unlink()
