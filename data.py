"""Documents -> tokens -> shuffled rows -> chunks: builds the dataset folder that dataset.py reads.

    python data.py CONFIG [--section.name=value ...]     # builds datasets/<name>, or finds that it is built
    python data.py verify DATASET                        # hashes every file again

Reads the config's sources and its tokenizer. Writes

    manifest.json                settings; counts by source, stage and chunk; SHA-256 of every file
    tokenizer files              so that the folder is complete
    chunks/000.bin ...           rows of seq_len + 1 token ids in training order; see dataset.py for the order
    validation/<source>.bin      validation rows: no chunk holds their text
    documents/<source>.jsonl     {"id", "tokens", "bytes", "validation"} of every document, in reading order;
                                 where they apply, "shared": source and name of a file that several sources
                                 read, as the first of them has it; "came_as": the document's own id, if an
                                 earlier one has it; "characters": the range of this part, if it is split
    documents/<source>.offsets.npy    first byte of each line of that file, and the end of the file
    documents/<stage>.npy        the stream of a stage, int64 (3, documents + 1): first token there, number of
                                 the source, number of the document; the last column is the stream's end
    inputs.json                  paths, sizes and times of the files that were read

The work is in two other files: encode.py turns the documents of a source into a file of tokens, and chooses
validation documents; chunks.py mixes sources into stages, and writes the rows where the shuffle puts them.

A build works in `<dataset>.partial`. The folder is renamed when all of it is on disk, so a folder with the
final name is finished. Memory is bounded by constants in the two files and by the largest document, apart
from some bytes for each document and the names of the input files.
"""

if __name__ == "__main__":  # before packages that take a second to import
    import configurator

    configurator.quiet_imports()

import fcntl
import json
import multiprocessing
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

import chunks
import configurator
import encode
import tokenizer
from config import Config, ConfigError, from_command_line
from files import sha256, sync
from formats import documents
from manifest import FORMAT, differences, read_manifest, settings, verify


def build(config: Config) -> Path:
    """Builds a config's dataset, or finds that it is built. Raises ConfigError that says what to do."""
    folder = Path(config.dataset)
    partial = folder.with_name(folder.name + ".partial")
    try:
        tok = load_tokenizer(config)
        shared, inputs = list_inputs(config)

        # A dataset that is there is used if it is the one that the config asks for.
        if folder.exists():
            check_same(config, folder, tok, inputs)
            print(f"{folder} is already built")
            return folder

        # Otherwise it is built in another folder, which is removed if anything goes wrong.
        lock = claim(partial)
        try:
            manifest = write(config, partial, tok, shared, inputs)
            os.rename(partial, folder)
            sync(folder.parent)
            os.unlink(folder / "lock")
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            lock.close()
    except OSError as error:
        what = f"{error.filename or partial}: {error.strerror or error}"
        raise ConfigError(f"{what}; no half-built dataset was left") from None
    except BrokenProcessPool:
        raise ConfigError(
            "a worker process ended early; if there is no message above, memory ran out: lower data.workers"
        ) from None
    print(summary(folder, manifest))
    return folder


# ---- before the work: tokenizer, input files, a dataset that is there already ------------------------------


def load_tokenizer(config: Config) -> "tokenizer.Tokenizer":
    """The config's tokenizer. Raises ConfigError where there is none, or it has more ids than the model."""
    path = Path(config.tokenizer.path)
    if not path.exists():
        what = f"make it: {config.again('tokenizer.py train')}"
        if path.suffix in (".json", ".model"):  # a published tokenizer is not trained here
            what = "put the published file there, or say where it is: --tokenizer.path=FILE"
        raise ConfigError(f"there is no tokenizer {path}; {what}")
    tok = tokenizer.load(path, config.tokenizer.eot)
    if tok.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"the tokenizer {path} has {tok.vocab_size} entries, more than model.vocab_size="
            f"{config.model.vocab_size}; set model.vocab_size={tok.vocab_size} or above"
        )
    return tok


def list_inputs(config: Config) -> tuple[dict[str, tuple[str, str]], dict[str, list]]:
    """Lists the files of every source; prints what is left out. Raises ConfigError if nothing is to be read.

    Returns `shared_names` of the files, and for each source its files: [path, bytes, nanosecond of change].
    """
    if not config.data.sources or not config.data.stages:
        raise ConfigError("data.sources and data.stages need at least one entry each; see configs/demo.py")
    listed, inputs = {}, {}
    for source in config.data.sources:
        # A stage without epochs and weights uses every source.
        used = [stage.epochs or stage.weights or [source.name] for stage in config.data.stages]
        if not any(source.name in names for names in used):
            print(f"warning: source {source.name!r} is in no stage; only its validation rows are of use")
        # List its files here, once, and hand them on.
        documents.tell_left_out(source)
        listed[source.name] = documents.listed(source)
        files = []
        for path, _ in listed[source.name]:
            stat = path.stat()
            files.append([str(path), stat.st_size, stat.st_mtime_ns])
        if not any(size for _, size, _ in files):
            raise ConfigError(f"source {source.name!r}: each of its {len(files)} files is empty")
        inputs[source.name] = files
    return shared_names(listed), inputs


def shared_names(listed: dict[str, list[tuple[Path, str]]]) -> dict[str, tuple[str, str]]:
    """Real path -> (source, name) of every file that several sources read, as the first of them has it.

    A document is one document in all of its sources, for validation in all or in none, only if its id is the
    same. `listed`: what documents.listed gives for each source.
    """
    if len(listed) < 2:
        return {}
    first, shared = {}, {}
    for source, files in listed.items():
        for path, name in files:
            real = os.path.realpath(path)
            known = first.setdefault(real, (source, name))
            if known[0] != source:
                shared[real] = known
    return shared


def check_same(config: Config, folder: Path, tok: "tokenizer.Tokenizer", inputs: dict[str, list]) -> None:
    """Raises ConfigError that names what differs, unless the folder is the dataset of this config."""
    manifest, _ = read_manifest(folder)
    differs = differences(manifest, config)
    if manifest["format"] == 1:
        tell_approximate(folder, manifest)
    if manifest["tokenizer"]["sha256"] != tok.sha256:
        differs.append(f"tokenizer {manifest['tokenizer']['sha256'][:12]} (now {tok.sha256[:12]})")

    # Compare the input files. There is no record of them when the folder came from another machine.
    record = folder / "inputs.json"
    if not differs and record.exists():
        for name, had in json.loads(record.read_text(encoding="utf-8"))["sources"].items():
            now = inputs[name]
            changed = sorted({path for path, *_ in set(map(tuple, had)) ^ set(map(tuple, now))})
            if not changed:
                continue
            what = f"other files in source {name!r}: {changed[0]}"
            if len(changed) > 1:
                what += f" and {len(changed) - 1:,} more"
            if {(path, size) for path, size, _ in had} == {(path, size) for path, size, _ in now}:
                what += f" (of the same size, but written since; if the text is the same: rm {record})"
            differs.append(what)
    if differs:
        raise ConfigError(
            f"{folder} was built with {'; '.join(differs)}.\nRemove the folder to build it anew, "
            "or build another: --dataset=datasets/another-name"
        )


def tell_approximate(folder: Path, manifest: dict) -> None:
    """Prints which stages of a dataset of format 1 have a mixture that is not exactly the one asked for."""
    for stage in manifest["stages"]:
        mixture = stage["mixture"]
        if any(part["epochs"] % 1 for part in mixture.values()):
            total = sum(part["tokens"] for part in mixture.values())
            got = ", ".join(f"{name} {100 * part['tokens'] / total:.1f} %" for name, part in mixture.items())
            print(
                f"note: {folder} was built by an earlier version, whose mixtures were only about those asked "
                f"for: stage {stage['name']!r} has {got}. Remove the folder to build it anew"
            )


# ---- the work ---------------------------------------------------------------------------------------------


def claim(partial: Path) -> object:
    """Empties the folder to build in. Returns its lock, which the system lifts however this process ends."""
    partial.mkdir(parents=True, exist_ok=True)
    lock = open(partial / "lock", "a")
    # The folder is ours if the lock is, and if the lock is still in the folder of this name.
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = os.path.samestat(os.fstat(lock.fileno()), os.stat(partial / "lock"))
    except (BlockingIOError, FileNotFoundError):  # locked, or just renamed by its builder
        mine = False
    if not mine:
        raise ConfigError(f"{partial} is being built by another process; wait for it, or end it")
    # Remove what a killed build left.
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()
    return lock


def write(
    config: Config,
    folder: Path,
    tok: "tokenizer.Tokenizer",
    shared: dict[str, tuple[str, str]],
    inputs: dict[str, list],
) -> dict:
    """Writes a whole dataset folder, the manifest last, and returns the manifest. See `list_inputs`."""
    for name in ("work", "documents", "validation", "chunks"):
        (folder / name).mkdir()
    tok.save(folder)
    dtype = np.dtype("<u2" if tok.vocab_size <= 1 << 16 else "<u4")

    # Documents -> tokens and tables of documents.
    sources = encode_sources(config, folder, shared, inputs, dtype)
    for name, count in sources.items():
        count |= chunks.write_validation(config, folder, name, count["validation_tokens"], dtype)

    # Tables of documents -> stages.
    entries = {}
    for name in sources:
        entries[name] = np.memmap(folder / "work" / f"{name}.entries", encode.ENTRY, "r").view(np.ndarray)
    stages, n_rows = [], 0
    for stage in config.data.stages:
        table = folder / "documents" / f"{stage.name}.npy"
        stated = chunks.write_stage(table, config, stage, sources, entries)
        stages.append(stated | {"first_position": n_rows})
        n_rows += stated["rows"] * stage.repeats
    T, B, n_chunks = config.model.seq_len, config.train.batch_size, config.data.n_chunks
    if n_rows // B < n_chunks:
        raise ConfigError(
            f"{n_rows:,} rows of model.seq_len={T} are {n_rows // B:,} steps of train.batch_size={B}, fewer "
            f"than data.n_chunks={n_chunks}; lower data.n_chunks, batch or row, or give more text"
        )

    # Stages -> chunks.
    chunk_list, hashes = chunks.write_chunks(config, folder, stages, entries, dtype, tok.eot)
    shutil.rmtree(folder / "work")

    # Make the manifest, now that everything that it lists is there.
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    del files["lock"]
    manifest = {
        "format": FORMAT,
        "name": config.name,
        "seq_len": T,
        "row_length": T + 1,
        "dtype": dtype.name,
        "vocab_size": tok.vocab_size,
        "eot": tok.eot,
        "tokenizer": {"file": tok.file, "sha256": tok.sha256},
        "seed": config.data.seed,
        "order": "feistel-1",
        "row_multiple": B,
        "settings": settings(config),
        "sources": sources,
        "stages": stages,
        "rows": n_rows,
        "steps": n_rows // B,
        "rows_after_last_step": n_rows % B,
        "chunks": chunk_list,
        "files": {name: hashes.get(name) or sha256(files[name]) for name in sorted(files)},
        "file_bytes": {name: files[name].stat().st_size for name in sorted(files)},
    }

    # Everything must be on the disk itself before the folder gets its final name.
    (folder / "inputs.json").write_text(json.dumps({"format": 1, "sources": inputs}))
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    for path in [*folder.rglob("*"), folder]:
        sync(path)
    return manifest


def encode_sources(
    config: Config,
    folder: Path,
    shared: dict[str, tuple[str, str]],
    inputs: dict[str, list],
    dtype: np.dtype,
) -> dict[str, dict]:
    """Encodes every source in data.workers processes; returns what the manifest says of each."""
    data = config.data
    start = (config.tokenizer.path, config.tokenizer.eot, dtype.str, config.model.seq_len)
    start += (data.validation_seed, data.validation_fraction)
    # Processes are spawned, because a fork of a process that has threads can deadlock.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(data.workers, spawn, encode.start_worker, start)
    try:
        return {
            source.name: encode.encode_source(config, source, inputs[source.name], shared, folder, pool)
            for source in data.sources
        }
    finally:
        pool.shutdown(cancel_futures=True)


# ---- the command line -------------------------------------------------------------------------------------


def summary(folder: Path, manifest: dict) -> str:
    """Describes what was built: a table of the sources and one of the stages, notes, a line of totals."""
    sources, stages = manifest["sources"], manifest["stages"]

    # One line per source.
    table = [("source", "files", "documents", "tokens", "bytes", "bytes/token", "validation rows", "bad")]
    for name, s in sources.items():
        n_text_tokens = s["tokens"] - s["documents"]  # without the end-of-text tokens, which have no bytes
        per_token = f"{s['bytes'] / max(1, n_text_tokens):.3f}"
        counts = (s["files"], s["documents"], s["tokens"], s["bytes"])
        table.append((name, *counts, per_token, s["validation_rows"], sum(s["bad"].values())))
    lines = [*aligned(table), ""]

    # One line per source of each stage: its mixture, as asked for and as it became.
    table = [("stage", "source", "epochs", "documents", "asked tokens", "tokens", "asked %", "%", "cut")]
    for s in stages:
        asked_tokens = sum(part["asked_tokens"] for part in s["mixture"].values())
        for name, part in s["mixture"].items():
            counts = (part["documents"], part["asked_tokens"], part["tokens"])
            asked = f"{100 * part['asked_tokens'] / asked_tokens:.2f}"
            got = f"{100 * part['tokens'] / s['tokens']:.2f}"
            cut = f"{part['cut']['tokens']:,} of {part['cut']['of_tokens']:,}" if part["cut"] else "-"
            table.append((s["name"], name, f"{part['epochs']:.4g}", *counts, asked, got, cut))
    lines += aligned(table)

    # Add the notes that the tables need.
    for s in stages:
        line = f"stage {s['name']}: {s['rows']:,} rows"
        if s["repeats"] > 1:
            line += f", trained {s['repeats']} times"
        lines.append(f"{line}; {s['dropped_tokens']:,} tokens at its end fill no row and are dropped")
    for s in sources.values():
        lines += [f"bad: {example}" for example in s["bad_examples"][:3]]
    for name, s in sources.items():
        lines += notes(name, s, manifest["settings"]["data.validation_fraction"])
    lines.append(
        f"\n{folder}: {manifest['rows']:,} rows of {manifest['seq_len']:,} tokens in "
        f"{len(manifest['chunks'])} chunks, {manifest['steps']:,} steps of {manifest['row_multiple']} rows, "
        f"{manifest['rows_after_last_step']:,} rows after the last step"
    )
    return "\n".join(lines)


def aligned(table: list[tuple]) -> list[str]:
    """The lines of a table: first column to the left, others to the right, as wide as their longest cell."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in table]
    widths = [max(len(cell) for cell in column) for column in zip(*cells)]
    lines = []
    for first, *others in cells:
        right = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *right]))
    return lines


def notes(name: str, s: dict, fraction: float) -> list[str]:
    """Notes about a source for the user: how its validation rows were chosen, and which ids came twice."""
    out = []
    # The validation rows: there are none, or documents were split to get them.
    if not s["validation_rows"]:
        note = (
            f"note: source {name!r} has no validation rows, so its validation loss cannot be measured: "
            f"data.validation_fraction={fraction} of its documents is less than a row"
        )
        if s["split_inside"]:
            note += ", and they are too short to be split inside (that takes 4 rows)"
        if s["shared_documents"]:
            note += ", and other sources read their files, so they are not split inside"
        out.append(note)
    elif s["split_inside"]:
        n = s["validation_documents"]
        ends = "the end of 1 of them is" if n == 1 else f"the ends of {n:,} of them are"
        out.append(
            f"note: source {name!r} has few documents: {ends} for validation, "
            f"{s['validation_bytes']:,} bytes, after a gap of {s['gap_bytes']:,} bytes that is used neither "
            "for training nor for validation"
        )
    # Ids that came twice.
    if s["duplicate_ids"]:
        more = ", ..." if s["duplicate_ids"] > len(s["duplicate_examples"]) else ""
        out.append(
            f"warning: source {name!r}: {s['duplicate_ids']:,} documents have an id that an earlier document "
            f"has; they are called {', '.join(s['duplicate_examples'])}{more}"
        )
    return out


def verify_command(arguments: list[str]) -> None:
    """python data.py verify DATASET: prints a line for each problem; exit code 1 if there is one."""
    if len(arguments) != 1:
        raise ConfigError("give one folder: python data.py verify datasets/demo")
    folder = Path(arguments[0])
    problems = verify(folder)
    for problem in problems:
        print(f"{folder}: {problem}")
    if problems:
        sys.exit(1)
    manifest, _ = read_manifest(folder)
    print(f"{folder}: all {len(manifest['files']):,} files are as they were built")


@configurator.script
def main() -> None:
    if sys.argv[1:2] == ["verify"]:
        verify_command(sys.argv[2:])
        return
    config = from_command_line(__doc__)
    try:
        build(config)
    except KeyboardInterrupt:
        print("interrupted; no half-built dataset was left", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
