"""Times the comparison of hashes: a model folder and a chunk, opened with and without verification.

    python benchmarks/bench_verify.py                 # about 1 GB of weights, and a chunk of 1 GB
    python benchmarks/bench_verify.py --gb 13         # about 13 GB of weights: needs as much memory and disk
    python benchmarks/bench_verify.py --folder /mnt/disk --cold

The two ways alternate, and medians are printed. With verification, each round reads every file and also
hashes it. Files are in the page cache; --cold drops them from it before every round (if the kernel follows
posix_fadvise), so that the disk is measured too. Weights are random numbers, written once into a folder that
is deleted afterwards, in files of 5 GB as train.py writes them. Writes the file that --json names.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

# A model of about 1 GB has 16 layers x (4 x 1024^2 + 3 x 1024 x 2816) + 2 x 8192 x 1024 = 222 M parameters of
# 4 bytes.
WIDTH, HEADS, FF, VOCABULARY, LENGTH = 1024, 16, 2816, 8192, 1024
LAYER_BYTES = 4 * (4 * WIDTH**2 + 3 * WIDTH * FF)


def write_model(folder: Path, gb: float) -> int:
    """A model folder with its state.json, a file at a time. Returns its bytes."""
    import torch
    from safetensors.torch import save_file

    import files
    import run_folder
    from config import Model
    from formats import families, shards
    from model import Transformer

    # The names and shapes of its tensors, and their files.
    sizes = {"vocab_size": VOCABULARY, "seq_len": LENGTH, "d_model": WIDTH, "n_heads": HEADS, "d_ff": FF}
    cfg = Model(n_layers=round(gb * 1e9 / LAYER_BYTES), **sizes).resolved()
    files.write_json(folder / "config.json", families.hf_config(cfg, 0))
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in Transformer(cfg).state_dict().items()}
    layout, _ = shards.layout("model", {name: 4 * shape.numel() for name, shape in shapes.items()})

    # Write the files: random numbers.
    file_of = {}
    for file, names in layout.items():
        tensors = families.to_family({name: torch.randn(shapes[name]) for name in names}, cfg)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        file_of |= dict.fromkeys(tensors, file)
    if len(layout) > 1:
        files.write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": file_of})

    # Write the hashes that integrity.py compares them with.
    hashes = {path.name: files.sha256(path) for path in folder.iterdir()}
    files.write_json(folder / "state.json", {"format": run_folder.FORMAT, "step": 0, "files": hashes})
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def write_dataset(folder: Path, gb: float) -> int:
    """The part of a dataset folder that opening one chunk needs. Returns the chunk's bytes."""
    import numpy as np

    import files
    import manifest

    # The chunk: random token ids.
    rows = round(gb * 1e9 / (2 * (LENGTH + 1)))
    (folder / "chunks").mkdir(parents=True)
    path = folder / "chunks" / "000.bin"
    with open(path, "wb") as file:
        for first in range(0, rows, 4096):
            size = (min(4096, rows - first), LENGTH + 1)
            file.write(np.random.default_rng(first).integers(0, 50_000, size, np.uint16).tobytes())

    # Write its manifest; keys that nobody reads here are 0.
    about = {"format": 1, "seq_len": LENGTH, "row_length": LENGTH + 1, "dtype": "uint16", "rows": rows}
    about |= {"files": {"chunks/000.bin": files.sha256(path)}, "sources": {}, "stages": []}
    about |= {"file_bytes": {"chunks/000.bin": path.stat().st_size}}
    about |= {"chunks": [{"file": "chunks/000.bin", "first": 0, "rows": rows}]}
    files.write_json(folder / "manifest.json", {**dict.fromkeys(manifest.KEYS, 0), **about})
    return path.stat().st_size


def drop(folder: Path) -> None:
    """Asks the kernel to forget a folder's files, so that the next reader waits for the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def compare(what: str, action, folder: Path, size: int, args: argparse.Namespace) -> dict:
    """Times action(verify), with verification and without in turn; prints the medians, returns the times."""
    import integrity

    action(False)  # imports and first allocations are not measured
    seconds = {True: [], False: []}
    for i in range(2 * args.rounds):
        verify = i % 2 == 0
        if args.cold:
            drop(folder)
        integrity.cached_hash.cache_clear()  # as in a new process
        start = time.perf_counter()
        action(verify)
        seconds[verify].append(time.perf_counter() - start)
    with_, without = (statistics.median(seconds[verify]) for verify in (True, False))
    print(
        f"{what}, {size / 1e9:.2f} GB: {with_:.2f} s with, {without:.2f} s without "
        f"({with_ - without:+.2f} s, {(with_ - without) / (size / 1e9):.2f} s a GB)",
        flush=True,
    )
    return {"what": what, "bytes": size, "with_seconds": seconds[True], "without_seconds": seconds[False]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=1.0, help="size of the weights, about")
    parser.add_argument("--chunk_gb", type=float, default=1.0, help="size of the chunk")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache each time")
    parser.add_argument("--folder", help="a folder on the disk to read from; default: the temporary one")
    parser.add_argument("--json", help="a file to write the figures to")
    args = parser.parse_args()

    import checkpoint
    import hardware
    from dataset import Dataset

    hardware.keep_freed_memory()  # as scripts do on a CPU
    print(
        f"medians of {args.rounds} rounds, {os.cpu_count()} cores, page cache {'cold' * args.cold or 'warm'}"
    )
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        model, data = Path(folder, "model"), Path(folder, "data")
        model.mkdir()
        size, chunk = write_model(model, args.gb), write_dataset(data, args.chunk_gb)
        figures = [
            compare("load_model", lambda v: checkpoint.load_model(model, verify=v), model, size, args),
            compare("first row of a chunk", lambda v: Dataset(data, v).rows(0, 1), data, chunk, args),
        ]
    if args.json:
        written = {"format": 1, "cold": args.cold, "rounds": args.rounds, "figures": figures}
        Path(args.json).write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
