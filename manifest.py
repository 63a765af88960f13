"""The manifest of a dataset: reading it, and comparing it with the files and with a config. No torch.

    manifest, sha256 = read_manifest(Path("datasets/demo"))
    verify("datasets/demo")            # hashes every file again: ["chunks/001.bin: its content differs"]
    differences(manifest, config)      # ["data.seed=1 (now 7)"]

A dataset is finished when its folder has a manifest.json. data.py writes it; dataset.py reads what it lists.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

from tqdm import tqdm

from config import DATASET, Config, ConfigError, settings_for, to_dict
from files import sha256

# In format 1, the last pass over a source, if partial, had only about as many tokens as were asked for.
FORMAT = 2
KEYS = ("format", "seq_len", "row_length", "dtype", "vocab_size", "eot", "tokenizer", "seed", "row_multiple")
KEYS += ("settings", "sources", "stages", "rows", "chunks", "files", "file_bytes")
UNHASHED = ("manifest.json", "inputs.json", "lock")  # the last two describe the machine that built it


def read_manifest(folder: Path) -> tuple[dict, str]:
    """The manifest and the SHA-256 of its file. Raises ConfigError where there is no finished dataset."""
    path = folder / "manifest.json"
    try:
        data = path.read_bytes()
        manifest = json.loads(data)
        lacks = [key for key in KEYS if key not in manifest]
        if lacks:
            raise ValueError(f"it lacks {', '.join(lacks)}")
        if manifest["format"] not in (1, FORMAT) or manifest["dtype"] not in ("uint16", "uint32"):
            raise ValueError("its format or dtype is unknown")
        for name in [*manifest["files"], *(chunk["file"] for chunk in manifest["chunks"])]:
            inside(folder, name)
    except OSError as error:
        why = f"manifest.json: {error.strerror}"
        raise ConfigError(f"{folder} is not a finished dataset ({why}); build it with data.py") from None
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged or no manifest: {error}") from None
    return manifest, hashlib.sha256(data).hexdigest()


def inside(folder: Path, name: str) -> Path:
    """Returns folder/name. A stranger's manifest may name "../../.ssh/id": a file outside is refused."""
    path = folder / name
    if os.path.isabs(name) or not path.resolve().is_relative_to(folder.resolve()):
        message = f"{folder}/manifest.json names {name!r}, which lies outside the folder; it is not read"
        raise ConfigError(message)
    return path


def damage(folder: Path, manifest: dict, name: str) -> str:
    """How a file differs from the one that the manifest lists; "" where it does not."""
    if problem := size_damage(folder, manifest, name):
        return problem
    return "" if sha256(folder / name) == manifest["files"][name] else "its content differs"


def size_damage(folder: Path, manifest: dict, name: str) -> str:
    """As `damage`, by the file's size alone: nothing is read."""
    path, size = folder / name, manifest["file_bytes"].get(name)
    if not path.is_file():
        return "missing"
    return "" if path.stat().st_size == size else f"has {path.stat().st_size} bytes, should have {size}"


def verify(folder: str | Path) -> list[str]:
    """Hashes every file again: a line for each problem, [] when all is well. ConfigError as read_manifest."""
    folder = Path(folder)
    manifest, _ = read_manifest(folder)
    problems = []
    for name in tqdm(manifest["files"], unit=" files", disable=not sys.stderr.isatty()):
        if problem := damage(folder, manifest, name):
            problems.append(f"{name}: {problem}")
    # Find files that are not listed.
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    extra = present - {*manifest["files"], *UNHASHED}
    return problems + [f"{name}: is not in the manifest" for name in sorted(extra)]


def settings(cfg: Config) -> dict:
    """Every setting that decides what a dataset is, under the name that a user writes."""
    values = to_dict(cfg)
    # Those of other sections come first, as in every manifest: the bytes of a manifest identify a dataset.
    names = sorted(settings_for(DATASET), key=lambda name: name.startswith(("tokenizer.", "data.")))
    out = {}
    for name in names:
        section, key = name.split(".")
        out[name] = values[section][key]
    return out


def differences(manifest: dict, config: Config) -> list[str]:
    """How a dataset differs from the one that a config asks for: ["data.seed=1 (now 7)"]; [] if it does not.

    The tokenizer's path is not compared: its content is, elsewhere. Settings that are newer than the dataset
    are not compared either.
    """
    had = manifest["settings"]
    out = []
    for name, value in settings(config).items():
        if name in had and had[name] != value and name != "tokenizer.path":
            out.append(f"{name}={had[name]} (now {value})")
    return out
