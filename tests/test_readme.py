"""README, imports and style of the house: what the front door says is so.

python tests/test_readme.py    # writes the lines of every file, as they are now, into the README's map
"""

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
from conftest import ROOT

import config
from configurator import EXAMPLE

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "DIFFERENCES.md", "benchmarks/README.md", "configs/README.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}

RING_1 = ["config", "model", "loss", "optim", "dataset", "steps", "parallel", "checkpoint", "train"]
MOST_LINES, MOST_LINES_OF_A_FILE = 2400, 400

# Verbs are run. These few are also imported; train.py by one file alone.
IMPORTED_VERBS = {"tokenizer", "sample", "memorize", "train"}


def shipped(pattern: str) -> list[Path]:
    """The files that git tracks: one of the user's own beside them is no concern of these tests."""
    listed = subprocess.run(
        ["git", "ls-files", "--", pattern], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return [ROOT / name for name in listed.stdout.split("\n") if name and (ROOT / name).exists()]


# ---- the map ----------------------------------------------------------------------------------------------


def ring(number: int) -> dict[str, list[str]]:
    """The README's table of a ring: {"loss.py": ["the loss over ...", "115", "`test_loss.py`"], ...}."""
    table = README.partition(f"**Ring {number} ")[2].partition("\n\n|")[2].partition("\n\n")[0]
    rows = {}
    for line in table.split("\n"):
        files, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        for file in re.findall(r"`([^`]+)`", files):
            rows[file] = cells
    return rows


RINGS = [ring(1), ring(2), ring(3)]
NAMED = [ROOT / name for table in RINGS for name in table if name.endswith(".py")]  # where there is no git
ROOT_FILES = [path for path in shipped("*.py") or NAMED if path.parent == ROOT]
FORMATS = shipped("formats/*.py") or sorted((ROOT / "formats").glob("*.py"))
# {"train": Path("/.../train.py"), ..., "formats.shards": Path("/.../formats/shards.py"), ...}
MODULES = {path.stem: path for path in ROOT_FILES} | {f"formats.{path.stem}": path for path in FORMATS}


def n_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def lines_of(name: str) -> int:
    """Lines of a row of the map: of a file, or of all files of a folder."""
    return (
        sum(map(n_lines, sorted((ROOT / name).glob("*.py")))) if name.endswith("/") else n_lines(ROOT / name)
    )


def with_lines_counted(readme: str) -> str:
    """The README with the numbers of its three tables as they are now."""
    for name in [name for table in RINGS for name in table if name.endswith((".py", "/"))]:
        readme = re.sub(
            rf"^(\| `{name}` \|[^|]*\|)[^|]*\|", rf"\1 {lines_of(name):,} |", readme, count=1, flags=re.M
        )
    total = sum(lines_of(f"{name}.py") for name in RING_1)
    return re.sub(r"^\| total \|.*$", f"| total | | {total:,} | |", readme, flags=re.M)


def test_ring_1_is_read_in_one_sitting():
    counts = {name: n_lines(ROOT / f"{name}.py") for name in RING_1}
    assert [f"{name}.py" for name in RING_1] == list(RINGS[0]), "the reading order"
    assert max(counts.values()) <= MOST_LINES_OF_A_FILE, counts
    assert sum(counts.values()) <= MOST_LINES, counts


def test_the_map_shows_the_lines_of_every_file():
    """A small change need not touch the README; `python tests/test_readme.py` writes the numbers into it."""
    for table in RINGS:
        for name, (_, shown, _) in table.items():
            if name.endswith((".py", "/")) and name in README and f"| `{name}` |" in README:
                assert abs(int(shown.replace(",", "")) - lines_of(name)) <= 20, (
                    f"{name} has {lines_of(name)} lines"
                )


def test_every_file_of_the_root_is_in_one_ring():
    named = [name for table in RINGS for name in table]
    assert len(named) == len(set(named))
    assert {path.name for path in ROOT_FILES} == {name for name in named if name.endswith(".py")}
    assert all(f"`{path.name}`" in RINGS[2]["formats/"][0] for path in FORMATS)


@pytest.mark.parametrize("name", [name for table in RINGS for name in table])
def test_the_map_of_a_ring_names_the_tests_of_every_file(name):
    *_, tests = next(table[name] for table in RINGS if name in table)
    named = re.findall(r"`(\w+\.py)`", tests)
    assert named and all((ROOT / "tests" / test).is_file() for test in named), tests


@pytest.mark.parametrize("name", MODULES)
def test_every_module_in_a_ring_says_what_it_is(name):
    assert ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8")))


# ---- imports ----------------------------------------------------------------------------------------------


def for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imported(path: Path) -> set[str]:
    """Names of all modules that a file imports, also inside functions: {"config", "formats.shards", ...}.

    Not those below `if TYPE_CHECKING:`, which no Python that runs imports.
    """
    tree, names = ast.parse(path.read_text(encoding="utf-8")), set()
    tree.body = [node for node in tree.body if not for_types_only(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            folder = node.module == "formats"  # from formats import shards
            names |= {f"formats.{alias.name}" for alias in node.names} if folder else {node.module}
    return names


IMPORTS = {name: imported(path) & set(MODULES) for name, path in MODULES.items()}


def test_imports_go_one_way():
    left = dict(IMPORTS)
    while ready := [name for name, needs in left.items() if not needs & set(left)]:
        left = {name: needs for name, needs in left.items() if name not in ready}
    assert not left, f"these files import one another in a circle: {', '.join(left)}"


def test_ring_1_stands_on_ring_3_and_on_no_verb():
    verbs = {name.removesuffix(".py") for name in RINGS[1]}
    assert not {name: IMPORTS[name] & verbs for name in RING_1 if IMPORTS[name] & verbs}


def test_imports_are_of_nouns_and_verbs_are_run():
    verbs = {name.removesuffix(".py") for name in RINGS[1]} | {"train"}
    for verb in sorted(verbs - IMPORTED_VERBS):
        importers = {name for name, names in IMPORTS.items() if verb in names}
        assert not importers, f"{verb} is run, not imported: {importers}"
    assert {name for name, names in IMPORTS.items() if "train" in names} == {"benchmark"}


def test_files_that_promise_no_torch_do_not_import_it():
    promised = ["formats.documents", "formats.hf_tokenizer", "formats.sentencepiece"]
    for name, (concept, *_) in (RINGS[0] | RINGS[1] | RINGS[2]).items():
        if "No torch" in concept:
            promised.append(name.removesuffix(".py"))
    assert len(promised) > 20
    # One process imports all of them, in this order, and stops at the first that brings torch.
    code = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    if "torch" in sys.modules:
        sys.exit(f"{name} imports torch")
"""
    done = subprocess.run([sys.executable, "-c", code, *promised], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- what the documents say -------------------------------------------------------------------------------


def commands() -> list[list[str]]:
    """Every `python script.py ...`, `python -m pytest ...` and `torchrun ... script.py ...` of DOCUMENTS."""
    found = re.findall(r"(?:python|torchrun) [^`\n#]*", "\n".join(TEXTS.values()))
    return sorted({command.strip() for command in found if ".py" in command or "-m pytest" in command})


@functools.cache
def help_of(script: str, *words: str) -> str:
    command = [sys.executable, ROOT / script, *words, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("command", commands())
def test_every_command_in_the_documents_exists_with_the_flags_it_uses(command):
    words = command.split()
    scripts = [word for word in words if word.endswith(".py") and word != "my.py"]
    for script in scripts:
        assert (ROOT / script).is_file(), command
        if script.startswith("tests/"):
            continue
        known = help_of(script)
        after = words[words.index(script) + 1 :]
        if script == "tokenizer.py":
            known += help_of(script, after[0])  # its two commands have flags of their own
        for flag in (word.partition("=")[0] for word in after if word.startswith("--") and word != "--"):
            assert flag in known or flag == "--help", f"{script} knows no {flag}"


def test_the_project_has_no_pickle_and_runs_no_code_from_files():
    for name, path in MODULES.items():
        source = path.read_text(encoding="utf-8")
        for word in ("torch.load(", "allow_pickle=True", "trust_remote_code=True", "shell=True"):
            assert not re.search(rf"^[^#\"]*\b{re.escape(word)}", source, re.M), (name, word)
        assert "pickle" not in imported(path), name


def test_no_line_is_longer_than_the_style_allows():
    others = [path for folder in ("tests", "configs", "benchmarks") for path in shipped(f"{folder}/*.py")]
    for path in (*MODULES.values(), *others):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 110, f"{path.name}:{number}"


def python_blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", TEXTS[name], re.M | re.S)


def test_every_python_block_of_a_readme_is_a_config_that_loads(tmp_path):
    loaded = []
    for number, block in enumerate(python_blocks("README.md") + python_blocks("configs/README.md")):
        path = tmp_path / f"block{number}.py"
        path.write_text(block)
        loaded.append(config.load(str(path)))
        assert loaded[-1].data.sources and loaded[-1].tokenizer.path, block
    assert len(loaded) == 2
    cfg = loaded[-1]
    assert cfg.init_from == cfg.tokenizer.path == "models/mine" and cfg.run == "runs/adapted"


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "DIFFERENCES.md", "benchmarks/README.md"])
def test_every_other_python_block_compiles(name):
    for block in python_blocks(name):
        compile(block, name, "exec")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_file_names_of_the_documents_exist(name):
    text, folder = TEXTS[name], (ROOT / name).parent
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (folder / link).exists(), link
    for file in re.findall(r"`((?:tests|benchmarks|configs|formats)/[\w.]+)`", text):
        assert (ROOT / file).exists(), file


def test_the_example_of_help_stands_in_the_readme_and_is_built_from_own_text(tmp_path):
    assert EXAMPLE in python_blocks("README.md") and len(EXAMPLE.splitlines()) < 15
    assert textwrap.indent(EXAMPLE, "    ") in help_of("train.py") and "paths=" in help_of("data.py")
    (tmp_path / "my.py").write_text(EXAMPLE)
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
            "imports or ring or line",
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    finally:
        mine.unlink()


if __name__ == "__main__":
    (ROOT / "README.md").write_text(with_lines_counted(README), encoding="utf-8")
