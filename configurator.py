"""The machinery behind config.py and behind every script's command line. No torch.

- `setting` and `section`: a dataclass of settings, whose types and ranges are checked when it is made;
- `load`: a config file and overrides become a checked config; `from_dict`, `to_dict`: the same as JSON;
- `from_command_line`: the arguments of a script that takes a config; help, flags and --print-config;
- `script`: mistakes, Ctrl-C and full disks end in one line and an exit code.

It is handed the dataclass `Config` and knows no setting, except the two folders `run` and `dataset`, and two
texts that config.py has no room for: OTHER_WORDS, what other programs call our settings, and EXAMPLE, the
config that --help shows.
"""

import ast
import contextlib
import dataclasses
import difflib
import errno
import functools
import json
import math
import os
import re
import runpy
import shlex
import signal
import sys
import textwrap
import time
import types
import typing
from pathlib import Path
from typing import Literal

if typing.TYPE_CHECKING:
    import argparse

CONFIGS = Path(__file__).parent / "configs"  # the configs that come with nano360
UNIONS = (typing.Union, types.UnionType)  # what get_origin says of Literal["auto"] | int, and of str | int


class ConfigError(ValueError):
    """A mistake of the user's, worded for the user: what, which value, what to do."""


def script(main: typing.Callable) -> typing.Callable:
    """Wraps a script's main: errors that a user can cause end in at most one line and an exit code.

    Exit code 2: a mistake in a config or on the command line. 1: a file that cannot be read or written, or a
    full disk. 130: Ctrl-C. 141: the reader of standard output has gone, as `head` does; nothing is printed.
    """

    @functools.wraps(main)
    def wrapped(*arguments) -> None:
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # see quiet_imports
            signal.signal(signal.SIGINT, signal.default_int_handler)
        # The name of a file or document may be no text in the terminal's encoding.
        sys.stdout.reconfigure(errors="backslashreplace")
        try:
            try:
                main(*arguments)
            finally:
                sys.stdout.flush()  # here, and not at Python's end, where an error would be a traceback
        except ConfigError as error:
            fail(error)
        except KeyboardInterrupt:
            sys.exit(130)
        except BrokenPipeError:
            close_stdout()
            sys.exit(141)
        except OSError as error:
            close_stdout()
            where = error.filename or ("standard output" if error.errno == errno.ENOSPC else "")
            fail(f"{where}: {error.strerror}" if where else error, code=1)

    return wrapped


def close_stdout() -> None:
    """Drops what standard output still holds and cannot write: Python would try again at its end."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def quiet_imports() -> None:
    """Until `script` begins, Ctrl-C ends the process without the traceback of a half-imported package."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def say(text: str) -> None:
    """Prints a line at once, also into a file that someone follows."""
    print(text, flush=True)


def show(text: str) -> None:
    """Prints, also into a pipe whose reader has seen enough."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        close_stdout()


def parser(doc: str, **more) -> "argparse.ArgumentParser":
    """argparse's parser, for a script that takes no config. Its --help begins with the script's docstring."""
    import argparse  # the other scripts need not wait for it

    as_it_is = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=as_it_is, **more)


def add_no_verify(parser: "argparse.ArgumentParser") -> None:
    """Gives a script's parser the flag --no-verify. Where it is used, a note is printed."""
    import argparse

    class Skip(argparse.Action):
        def __call__(self, parser, args, values, option=None):
            args.verify = False
            if int(os.environ.get("RANK", 0)) == 0:  # torchrun starts many processes; one prints the note
                print(f"note: {option}: no hash is compared, so damaged files go unnoticed", file=sys.stderr)

    what = "do not compare the files' hashes with those that were written down when they were saved"
    parser.add_argument("--no-verify", dest="verify", action=Skip, nargs=0, default=True, help=what)


def fail(error: object, code: int = 2) -> typing.NoReturn:
    """Prints what went wrong once, also where torchrun started many processes, and ends this one."""
    if int(os.environ.get("RANK", 0)):
        time.sleep(2)  # if the first process fails too, torchrun ends this one before it prints the same
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(code)


# ---- settings and sections --------------------------------------------------------------------------------


def setting(
    default: object,
    purpose: object,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> typing.Any:
    """A field of a section: its default (or a function that makes it), what it is for, and its range.

    lr: float = setting(3e-4, LEARNED, above=0)  # peak learning rate
    """
    limits = {"least": least, "above": above, "below": below, "most": most}
    kind = "default_factory" if callable(default) else "default"
    return dataclasses.field(**{kind: default}, metadata={"purpose": purpose, **limits})


def section(renamed: dict[str, str], cls: type) -> type:
    """Class decorator: a frozen dataclass that checks its types and ranges when it is made.

    If the class has a method `check`, it is called after that, for checks that need several settings.
    `renamed` maps old names of settings to new ones; the class takes both.
    """
    more = vars(cls).get("check")

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(self):
            check_setting(self, f, hints[f.name])
        if more:
            more(self)

    cls.__post_init__ = __post_init__
    cls = dataclasses.dataclass(frozen=True)(cls)

    # The prefix that users write before a setting's name, "optim."; the config itself, which holds sections,
    # has none.
    cls.prefix = "" if sections_of(cls) else f"{cls.__name__.lower()}."
    cls.renamed = {}
    for old, new in renamed.items():
        if old.rpartition(".")[0] == cls.prefix.removesuffix("."):
            cls.renamed[old.rpartition(".")[2]] = new.rpartition(".")[2]

    # Old names are translated before the dataclass's own __init__ sees them.
    init = cls.__init__

    @functools.wraps(init)
    def __init__(self, *values, **named) -> None:
        init(self, *values, **with_new_names(cls, named))

    cls.__init__ = __init__
    return cls


def with_new_names(cls: type, values: dict[str, object]) -> dict[str, object]:
    """The values of a section's settings, those under an old name under the new one, with a note."""
    out = {}
    for name, value in values.items():
        new = cls.renamed.get(name, name)
        if new in out or (new != name and new in values):
            raise ConfigError(f"{cls.prefix}{new} was called {cls.prefix}{name}: set it once")
        if new != name:
            note_new_name(cls.prefix + name, cls.prefix + new)
        out[new] = value
    return out


@functools.cache  # one note, however often the name is read
def note_new_name(old: str, new: str) -> None:
    if not int(os.environ.get("RANK", 0)):
        print(f"note: {old} is now called {new}", file=sys.stderr, flush=True)


def sections_of(kind: type) -> dict[str, type]:
    """{"model": Model, ...}: the fields of a config that are sections themselves."""
    hints = typing.get_type_hints(kind)
    return {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}


def fields_of(kind: type) -> dict[str, dataclasses.Field]:
    """Every setting under the name that a user writes: {"model.d_model": ..., ..., "run": ...}."""
    sections = sections_of(kind)
    out = {f"{name}.{f.name}": f for name, part in sections.items() for f in dataclasses.fields(part)}
    return out | {f.name: f for f in dataclasses.fields(kind) if f.name not in sections}


# ---- checks -----------------------------------------------------------------------------------------------


def check_setting(part: object, f: dataclasses.Field, kind: object) -> None:
    """ConfigError where a value does not have the type of its annotation, or is out of its range.

    An int is accepted for a float, and becomes one.
    """
    name, value = part.prefix + f.name, getattr(part, f.name)
    if kind in (int, float):
        check_bits(name, value)
    if kind is float and type(value) in (int, float):
        value += 0.0  # 1 and 1.0 are then the same config, also in JSON, and so are 0.0 and -0.0
        object.__setattr__(part, f.name, value)
    elif not has_type(value, kind):
        is_choice = isinstance(value, str) and "Literal[" in str(kind)
        problem = "is no choice" if is_choice else f"is a {type(value).__name__}"
        raise ConfigError(f"{name}={value!r} {problem}; it must be {described(kind)}")
    check_range(name, value, f.metadata)
    check_finite(name, value)


def check_range(name: str, value: object, limits: typing.Mapping) -> None:
    """ConfigError where a number is outside of the limits that its `setting` gives. NaN is outside of all."""
    if isinstance(value, str):  # a word in the place of a number
        return
    least, above, below, most = (limits.get(limit) for limit in ("least", "above", "below", "most"))
    if above is not None and not above < value < math.inf:
        raise ConfigError(f"{name}={value} must be a number above {above}")
    if least is not None and not value >= least:
        raise ConfigError(f"{name}={value} must be at least {least}")
    if below is not None and not value < below:
        raise ConfigError(f"{name}={value} must be below {below}")
    if most is not None and not value <= most:
        raise ConfigError(f"{name}={value} must be at most {most}")


def check_finite(name: str, value: object) -> None:
    """ConfigError where a number is inf or nan or too large, also inside of a dictionary."""
    if isinstance(value, dict):
        for key, item in value.items():
            check_finite(f"{name}[{key!r}]", item)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}={value} must be a finite number")
    check_bits(name, value)


def check_bits(name: str, value: object) -> None:
    if type(value) is int and not -(2**63) < value < 2**63:
        raise ConfigError(f"{name}={value} does not fit into 64 bits")


def check_name(what: str, name: str) -> None:
    """ConfigError where a name cannot be part of the name of a file."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(f"{what} name {name!r}: use letters, digits, '.', '_' and '-' only")


def check_folder(what: str, path: str) -> None:
    """ConfigError where a path cannot be that of a folder, or leads through a file."""
    if "\0" in path or any(len(os.fsencode(part)) > 255 for part in Path(path).parts):
        raise ConfigError(
            f"{what}={path[:60]!r}... cannot be the name of a folder; names have up to 255 bytes"
        )
    for parent in Path(path).parents:
        if parent.exists() and not parent.is_dir():
            raise ConfigError(f"{what}={path}: {parent} is a file, not a folder; use another path")


def check_effect(config: object, names: typing.Iterable[str]) -> None:
    """ConfigError where one of the settings named was changed, and nothing would read it.

    A file and a command line are each checked for their own settings: --optim.schedule=cosine may leave a
    file's settings for a constant schedule without effect, and that is no mistake.
    """
    missing, fields = config.without_effect(), fields_of(type(config))
    for name in names:
        if name not in missing:
            continue
        section, _, setting = name.rpartition(".")
        value = getattr(getattr(config, section), setting)
        if value != fields[name].default:
            raise ConfigError(
                f"{name}={value} would have no effect: it needs {missing[name]}; set that, too, or leave "
                f"{name} out"
            )


def has_type(value: object, kind: object) -> bool:
    """Whether a value is of an annotated type: has_type((1, 2), tuple[int, ...]) -> True."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in arguments
    if origin in UNIONS:
        return any(has_type(value, part) for part in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(has_type(item, arguments[0]) for item in value)
    if origin is dict:
        if not isinstance(value, dict):
            return False
        return all(has_type(k, arguments[0]) and has_type(v, arguments[1]) for k, v in value.items())
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind  # not isinstance: True is an int to Python, but 1 head too many to us


def described(kind: object) -> str:
    """A type in a message: described(Literal["auto"] | int) -> "'auto' or int"."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin in UNIONS:
        return " or ".join(map(described, arguments))
    return str(kind) if origin else kind.__name__


def choose(setting: str, choice: str, table: dict[str, object]) -> object:
    """The entry of a table for the choice of a setting: choose("optim.decay", "all", {"all": 1}) -> 1.

    Several parts of the code may use a choice. If a choice was added to the setting's Literal and one of them
    lacks it, this is an error: no code may take it for another choice.
    """
    if choice not in table:
        raise unknown(setting, choice)
    return table[choice]


def unknown(setting: str, choice: str) -> ValueError:
    """The error of code that lacks a choice. It is no ConfigError: its traceback says where to add it."""
    return ValueError(
        f"{setting}={choice!r} is a choice in config.py, and the code that raises this lacks it"
    )


# ---- did you mean -----------------------------------------------------------------------------------------

# What other programs call our settings.
OTHER_WORDS = {}
for _name, _words in {
    "optim.lr": "learning_rate max_lr peak_lr",
    "optim.weight_decay": "wd decay_rate",
    "optim.grad_clip": "clip max_grad_norm clip_grad gradient_clip",
    "optim.warmup_steps": "warmup warmup_iters",
    "model.d_model": "hidden_size n_embd dim width",
    "model.n_layers": "layers n_layer num_layers num_hidden_layers depth",
    "model.n_heads": "heads n_head num_heads num_attention_heads",
    "model.n_kv_heads": "kv_heads num_key_value_heads num_kv_heads",
    "model.d_ff": "intermediate_size ffn_dim hidden_dim",
    "model.seq_len": "block_size context context_length max_seq_len seq_length",
    "model.ffn": "activation hidden_act",
    "model.init_std": "initializer_range init_range",
    "model.rope_theta": "rope_base",
    "model.tie_embeddings": "tie_word_embeddings",
    "train.steps": "max_steps max_iters num_steps n_steps iterations",
    "train.micro_batch_size": "micro_batch device_batch_size per_device_batch_size",
    "train.precision": "dtype bf16 fp32",
    "train.activation_checkpointing": "gradient_checkpointing recompute",
    "data.workers": "num_workers n_workers",
    "data.stages": "epochs weights sources stages",
    "run": "out out_dir output_dir",
}.items():
    OTHER_WORDS |= dict.fromkeys(_words.split(), _name)


def did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    """did_you_mean("demmo", ["demo", "7b"]) -> ", which is not known; did you mean 'demo'?" """
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(known)}"
    return f", which is not known; {hint}"


def did_you_mean_setting(settings: typing.Iterable[str], key: str, flags: typing.Iterable[str] = ()) -> str:
    """did_you_mean_setting(SETTINGS, "learning_rate") -> ", which is not known; did you mean 'optim.lr'?"

    It looks for the name in another section, then in OTHER_WORDS, and then for names that are similar.
    """
    key = key.replace("-", "_")
    name = key.rpartition(".")[2]
    known = [*flags, *settings]
    last = {setting: setting.rpartition(".")[2] for setting in known}

    def meant_by(word: str) -> list[str]:
        same = [setting for setting in known if last[setting] == word]
        return same or ([OTHER_WORDS[word]] if word in OTHER_WORDS else [])

    # The same name, else the most similar one.
    found = meant_by(name) or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not found and (close := difflib.get_close_matches(name, [*last.values(), *OTHER_WORDS], n=1)):
        found = meant_by(close[0])
    if not found:
        return did_you_mean(key, known)
    return f", which is not known; did you mean {' or '.join(map(repr, found))}?"


# ---- loading ----------------------------------------------------------------------------------------------


def find(name: str) -> tuple[Path, str]:
    """The file that a name on the command line means, and the entry in it if it holds a table of configs.

    find("demo") -> configs/demo.py, ""; find("pythia-160m") -> configs/pythia.py, "160m".
    """
    stem = Path(name).stem if name.endswith(".py") else Path(name).name
    paths = [Path(name), Path(f"{name}.py")]
    # A name with another folder means a file in that folder only.
    if str(Path(name).parent) in (".", "config", "configs"):
        paths.append(CONFIGS / f"{stem}.py")
    for path in paths:
        if path.is_file() and path.suffix == ".json":
            raise ConfigError(f"{path} is no config; a config is a Python file")
        if path.is_file():
            return path, ""
    # There is no such file: the part before the dash may name a table.
    family, dash, size = Path(name).name.removesuffix(".py").partition("-")
    for folder in (Path(name).parent, CONFIGS):
        if dash and (folder / f"{family}.py").is_file():
            return folder / f"{family}.py", size
    known = sorted(path.stem for path in CONFIGS.glob("*.py"))
    raise ConfigError(f"no config {name!r}; {did_you_mean(stem, known).partition('; ')[2]}")


def load(kind: type, name: str, overrides: typing.Sequence[str] = ()) -> typing.Any:
    """Config file and overrides -> a checked config of type `kind`, every value resolved. Raises ConfigError.

    load(Config, "demo", ["--optim.lr=1e-3"]).optim.lr -> 0.001
    """
    # 1. Read the file, alone.
    path, entry = find(name)
    config = read_config(kind, path, entry, name)
    try:
        check_effect(config, fields_of(kind))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None

    # 2. Apply all overrides at once, so that two that fit only together do.
    changes: dict[str, dict] = {}
    for override in overrides:
        section, setting, value = parse_override(kind, override)
        changes.setdefault(section, {})[setting] = value
    top = changes.pop("", {})
    sections = {
        name: dataclasses.replace(getattr(config, name), **values) for name, values in changes.items()
    }
    config = dataclasses.replace(config, **sections, **top).resolved()

    # 3. Check what only the whole config can show.
    check_effect(config, [f"{section}.{name}" for section, values in changes.items() for name in values])
    for folder in ("run", "dataset"):
        check_folder(f"--{folder}", getattr(config, folder))
    object.__setattr__(config, "given", (name, *overrides))
    return config


def read_config(kind: type, path: Path, entry: str, asked: str) -> typing.Any:
    """Runs a config file and returns its `config`, or the entry of its table `configs`, with its name."""
    module = sys.modules[kind.__module__]
    sys.path.insert(0, str(Path(__file__).parent))  # so that the file can say `from config import Config`
    # Use one set of classes, also when config.py is the script and so is called __main__.
    sys.modules.setdefault(Path(module.__file__).stem, module)
    try:
        found = runpy.run_path(str(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except TypeError as error:
        raise ConfigError(f"{path}: {unknown_in_section(module, error)}") from None
    except (Exception, SystemExit) as error:  # whatever a user's file raises is about that file
        line = error.lineno if isinstance(error, SyntaxError) else last_line(error, path)
        raise ConfigError(f"{path}, line {line}: {type(error).__name__}: {error}") from None
    finally:
        sys.path.pop(0)

    config, table = found.get("config"), found.get("configs", {})
    if table and entry not in table:
        names = [f"{path.stem}-{known}" for known in table]
        problem = f"{path} has no {asked!r}" if entry else f"{path} has several configs"
        raise ConfigError(f"{problem}; use {' or '.join(names)}")
    config = table.get(entry, config)
    if not isinstance(config, kind):
        raise ConfigError(f"{path} must end in `config = {kind.__name__}(...)`")
    return dataclasses.replace(config, name=config.name or "-".join(filter(None, (path.stem, entry))))


def unknown_in_section(module: types.ModuleType, error: TypeError) -> str:
    """The message for "Optim.__init__() got an unexpected keyword argument 'lrr'"; else the error's own."""
    match = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    section = getattr(module, match[1], None) if match else None
    if not dataclasses.is_dataclass(section):
        return str(error)
    hint = did_you_mean(match[2], [f.name for f in dataclasses.fields(section)])
    if meant := OTHER_WORDS.get(match[2]):
        hint = f", which is not known; did you mean {meant.removeprefix(f'{match[1].lower()}.')!r}?"
    return f"{match[1]} has {match[2]!r}{hint}"


def last_line(error: BaseException, path: Path) -> object:
    """The line of the config file at which its own code failed."""
    lines = []
    step = error.__traceback__
    while step:
        if step.tb_frame.f_code.co_filename == str(path):
            lines.append(step.tb_lineno)
        step = step.tb_next
    return lines[-1] if lines else "?"


def parse_override(kind: type, override: str) -> tuple[str, str, object]:
    """parse_override(Config, "--optim.lr=1e-3") -> ("optim", "lr", 0.001). Raises ConfigError."""
    key, equals, text = override.removeprefix("--").partition("=")
    key = key.replace("-", "_")  # --init-from is --init_from
    if not override.startswith("--") or not equals:
        raise ConfigError(f"{override!r} is not an override; write --section.name=value")

    # Find the setting, perhaps by an old name.
    sections = sections_of(kind)
    section, _, setting = key.rpartition(".")
    if section in sections and setting in sections[section].renamed:
        (setting,) = with_new_names(sections[section], {setting: text})
        key = f"{section}.{setting}"
    known = settings_of(kind)
    if key not in known:
        raise ConfigError(f"--{key}{did_you_mean_setting(known, key)}")
    if key in ("run", "dataset") and not text.strip():
        raise ConfigError(f"--{key}= is empty; name a folder, or leave it out for {key}s/<name>")
    hints = typing.get_type_hints(sections[section] if section else kind)
    return section, setting, parse(key, text, hints[setting])


def settings_of(kind: type) -> list[str]:
    """Every spelling on a command line: "optim.lr", ..., "run". The config's name is not set there."""
    return [name for name in fields_of(kind) if name != "name"]


def parse(key: str, text: str, kind: object) -> object:
    """One value as written on a command line: parse("train.steps", "1e3", int) -> 1000."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if text not in arguments:
            raise ConfigError(f"--{key}={text}: use {described(kind)}")
        return text
    if origin in UNIONS:  # the first of them that it can be
        for part in arguments:
            with contextlib.suppress(ConfigError):
                return parse(key, text, part)
        raise ConfigError(f"--{key}={text}: use {described(kind)}")
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ConfigError(f"--{key}={text}: use true or false")
        return text.lower() in ("true", "1")
    if origin is tuple and arguments[0] is str:
        return tuple(part for part in text.split(",") if part)
    if kind in (int, float):
        # 1e3 is a whole number too.
        try:
            number = float(text)
            if kind is int and "." not in text and "e" not in text.lower():
                return int(text)  # not through a float, which has 53 bits
            if kind is int and number != int(number):
                raise ValueError
            return kind(number)
        except (ValueError, OverflowError):
            expected = "a whole number" if kind is int else "a number"
            raise ConfigError(f"--{key}={text}: use {expected}") from None
    raise ConfigError(f"--{key} cannot be set on the command line; set it in the config file")


def from_dict(kind: type, values: dict) -> typing.Any:
    """The config that `to_dict` wrote. Raises ConfigError where a name or a type is not known."""
    hints, values = typing.get_type_hints(kind), with_new_names(kind, values)
    unknown = [name for name in values if name not in hints]
    if unknown:
        raise ConfigError(f"{kind.__name__} has {unknown[0]!r}{did_you_mean(unknown[0], hints)}")
    return kind(**{name: from_json(value, hints[name]) for name, value in values.items()})


def from_json(value: object, kind: object) -> object:
    """Makes tuples and our classes out of JSON's lists and objects."""
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return from_dict(kind, value)
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        return tuple(from_json(item, typing.get_args(kind)[0]) for item in value)
    return value


def to_dict(config: object) -> dict:
    """Every value, as JSON can hold it. from_dict(Config, to_dict(config)) == config."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def load_run(kind: type, run: str | Path) -> typing.Any:
    """The config that a run folder was made with. Raises ConfigError where there is none."""
    path = Path(run) / "config.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(about, dict) and "model_type" in about:
            raise ConfigError("this is a model folder or a checkpoint, not a run folder")
        return from_dict(kind, about["config"])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{run} is not a run folder: it has no config.json; train one with train.py"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def command(config: typing.Any, script: str) -> str:
    """The command that runs another script with the same config and overrides, as they were given."""
    script, *words = script.split()
    started = Path(sys.argv[0])  # the other script lies beside this one
    if started.suffix == ".py" and started.resolve().parent == Path(__file__).resolve().parent:
        script = str(started.with_name(script))
    return shlex.join(["python", script, *words, *(config.given or [config.name or "CONFIG"])])


# ---- the command line -------------------------------------------------------------------------------------

# A user's own config. The README shows it too, and a test runs it.
EXAMPLE = """\
from config import Config, Data, Model, Optim, Source, Stage, Tokenizer, Train

notes = Source("notes", paths=("notes/", "book.txt"))  # a folder, and a file: a document a file
web = Source("web", paths=("web/*.jsonl.gz",))  # JSON lines: {"text": "..."}, a document a line
first = Stage("first", epochs={"web": 1})  # all of `web` once, then 2 M tokens of both, 70 % of them notes
second = Stage("second", weights={"web": 0.3, "notes": 0.7}, tokens=2_000_000)
config = Config(
    model=Model(vocab_size=4096, seq_len=256, d_model=256, n_layers=6, n_heads=4, d_ff=688),
    tokenizer=Tokenizer(vocab_size=4096),
    data=Data(sources=(notes, web), stages=(first, second), n_chunks=10),
    optim=Optim(lr=1e-3, warmup_steps=100),
    train=Train(batch_size=16, micro_batch_size=8),
)
"""


def settings_help(kind: type) -> str:
    """Every setting with its default and its comment, read from the source so that it cannot drift."""
    source = Path(sys.modules[kind.__module__].__file__).read_text(encoding="utf-8")
    lines, out = source.splitlines(), []
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    sections = [part.__name__ for part in sections_of(kind).values()] + [kind.__name__]
    in_files = [part.__name__ for part in parts_in_files(kind)]
    known = settings_of(kind)
    for section in sections + in_files:
        # A title, then one line per setting.
        out.append(f"\n{ast.get_docstring(classes[section]).splitlines()[0]}")
        for node in classes[section].body:
            if not isinstance(node, ast.AnnAssign):
                continue
            name = node.target.id
            if section not in in_files:
                name = name if section == kind.__name__ else f"{section.lower()}.{name}"
                if name not in known:
                    continue
                name = f"--{name}"
            text = f"{name}={default_in_source(node)}"
            out.append(f"  {'  ' if section in in_files else ''}{text:<44} {comment_in_source(node, lines)}")
    out.append(f"\nA config of your own, my.py, with text of your own:\n\n{textwrap.indent(EXAMPLE, '    ')}")
    return "\n".join(out)


def parts_in_files(kind: type) -> list[type]:
    """The classes that only a config file can hold, in a tuple, as Data.sources: [Source, Stage]."""
    out = []
    for section in sections_of(kind).values():
        for hint in typing.get_type_hints(section).values():
            out += [part for part in typing.get_args(hint) if dataclasses.is_dataclass(part)]
    return out


def default_in_source(node: ast.AnnAssign) -> str:
    """The default as on a command line, or "...": `lr: float = setting(3e-4, ...)` -> "0.0003"."""
    default = node.value
    if isinstance(default, ast.Call) and default.func.id == "setting":
        default = default.args[0]
    if default is None or any(isinstance(part, ast.Call | ast.Name) for part in ast.walk(default)):
        return "..."  # none, or one that is made by a function: it is set in a config file
    return ast.unparse(default).strip("'") or "..."


def comment_in_source(node: ast.AnnAssign, lines: list[str]) -> str:
    """The comment on a setting's line, or the comment lines above it, and the choices."""
    comment, line = lines[node.end_lineno - 1].partition("  # ")[2], node.lineno - 2
    if not comment:
        above = []
        while lines[line].strip().startswith("# "):
            above.insert(0, lines[line].strip()[2:])
            line -= 1
        comment = " ".join(above)
    annotation = ast.unparse(node.annotation)
    if annotation.startswith("Literal"):
        choices = re.findall("'([^']*)'", annotation) + ["N"] * annotation.endswith("| int")
        comment += f" [{' | '.join(choices)}]"
    return comment


def readable(config: object) -> str:
    """The text that `--print-config` shows: one setting a line, sections in order."""
    sections = sections_of(type(config))
    top = [f.name for f in dataclasses.fields(config) if f.name not in sections]
    out = [f"{name} = {getattr(config, name)!r}" for name in top]
    for name in sections:
        section = getattr(config, name)
        out.append("")
        for f in dataclasses.fields(section):
            value = getattr(section, f.name)
            if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
                out += [f"{name}.{f.name}[{item.name!r}] = {item}" for item in value]
            else:
                out.append(f"{name}.{f.name} = {value!r}")
    return "\n".join(out)


def from_command_line(kind: type, doc: str, flags: dict[str, str] | None = None):
    """`script.py CONFIG [--section.name=value ...]` -> config; with `flags`, (config, flags that were given).

    flags={"--steps": "N", "--profile": ""}: one that takes a value, and one that takes none.
    Prints the help or the config and exits, if that is asked.
    Every mistake ends here: one message, exit code 2, no traceback.
    """
    argv, known = sys.argv[1:], flags or {}
    if not argv or "--help" in argv or "-h" in argv:
        more = "".join(f" [{flag} {value}".rstrip() + "]" for flag, value in known.items())
        script = f"python {Path(sys.argv[0]).name}"
        usage = f"Usage: {script} CONFIG [--section.name=value ...] [--print-config]{more}"
        show(f"{doc.strip()}\n\n{usage}\n{settings_help(kind)}")
        sys.exit(0 if argv else 2)

    # Sort the arguments into flags, the config's name and overrides.
    try:
        given = take_flags(argv, known)
        names = [argument for argument in argv if not argument.startswith("--")]
        overrides = [a for a in argv if a.startswith("--") and a != "--print-config"]
        if len(names) != 1:
            said = f"not {len(names)}: {' '.join(names)}" if names else "there is none"
            raise ConfigError(f"give exactly one config, {said}; settings are written --section.name=value")
        config = load(kind, names[0], overrides)
    except ConfigError as error:
        fail(error)
    if "--print-config" in argv:
        show(readable(config))
        sys.exit(0)
    return config if flags is None else (config, given)


def take_flags(argv: list[str], known: dict[str, str]) -> dict[str, str]:
    """Removes known flags from argv: --steps 30, or --steps=30 -> {"--steps": "30"}."""
    given = {}
    for argument in list(argv):
        flag, equals, value = argument.partition("=")
        if flag == "--benchmark":  # of train.py, before it became a script
            raise ConfigError("--benchmark is a script of its own now: python benchmark.py CONFIG --steps N")
        if flag not in known:
            continue
        # The value comes after "=", or is the next argument.
        at = argv.index(argument)
        del argv[at]
        if known[flag] and not equals:
            if at == len(argv) or argv[at].startswith("--"):
                raise ConfigError(f"{flag} needs a value: {flag} {known[flag]}")
            value = argv.pop(at)
        if known[flag] == "N" and not (value.isdecimal() and int(value)):
            raise ConfigError(f"{flag} {value}: use a whole number of at least 1")
        if equals and not known[flag]:
            raise ConfigError(f"{flag} takes no value")
        given[flag] = value
    return given
