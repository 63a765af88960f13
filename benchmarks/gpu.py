"""Runs what only a GPU can show, in one command, and writes one file.

    python benchmarks/gpu.py                                   # a quarter of an hour, one GPU
    python benchmarks/gpu.py --only steps-1b attention          # some parts; the file keeps the others
    OMP_NUM_THREADS=1 python benchmarks/gpu.py --cpu-smoke     # each part in miniature on a CPU

others-124m ...  bench_train.py: a step beside transformers, litgpt and a plain loop, at four shapes
steps-124m ...   benchmark.py: 124m, 7b and 1b as the plan sizes them, and where their time goes
tests            pytest -m gpu, and the tests that train, with --device cuda
backends         PyTorch's attention kernels at the shapes of three configs
attention        gradients with compiled flex attention, against those of a dense mask on the CPU
deterministic    a training with train.deterministic in each of two processes: are the weights the same bits?
save             bench_save.py, without and with --sync
precision        loss curves of a small model in BF16, in FP32, and in FP32 from another seed

Each part is a process of its own. One that fails is recorded as failed, and the others continue. Writes
benchmarks/gpu-<device>-<date>.json after every part. Exit code 1 where a part failed, 2 without a GPU.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn

import configurator
import optim
import parallel
import sharding
import train
from config import Config, Model, Train
from initial import initial_weights

ROOT, SPAWN = Path(__file__).parents[1], multiprocessing.get_context("spawn")
SMOKE = {  # sizes that a CPU finishes in seconds
    "steps": "--model.d_model=32 --model.n_layers=2 --model.n_heads=2 --model.d_ff=48 "
    "--model.n_kv_heads=1 --model.seq_len=64 --train.micro_batch_size=1 --train.batch_size=2",
    "others": "--layers 1 --width 32 --heads 2 --length 32 --rows 2 --vocab_size 300 --steps 2 --threads 1",
    "save": "--size 2 32 2 48 300 64 2 --steps 2 --rounds 2 --threads 1",
}


def script(*command: object) -> dict:
    """Runs a script that has --json FILE and returns that file. What it prints is on the console."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "figures.json")
        line = [sys.executable, *map(str, command), "--json", str(path)]
        done = subprocess.run(line, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(line[1:-2])}: {done.stderr.strip()[-1000:]}")
        return json.loads(path.read_text())


def alone(action, *arguments):
    """Calls action(*arguments) in a process of its own, whose memory and settings are gone afterwards."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        return pool.submit(action, *arguments).result()


# Batches: of 7B as many rows as two or four micro-batches hold.
BATCHES = {"124m": 512, "7b": 16, "1b": 64}


def steps(smoke: bool, name: str) -> dict:
    """Real steps of a config, beside the plan, and where their time goes.

    Micro-batch and recompute are the plan's choice for this GPU.
    """
    settings = [f"--train.batch_size={BATCHES[name]}"]
    settings += ["--train.micro_batch_size=0", "--train.activation_checkpointing=auto"]
    if not smoke and name == "7b" and torch.cuda.get_device_properties(0).total_memory < 120 * 2**30:
        # FP32 weights, gradients and two moments of 6.74e9 parameters are 100 GiB; with half the layers, 52.
        settings.append("--model.n_layers=16")
    settings += SMOKE["steps"].split() * smoke
    return script("benchmark.py", name, "--profile", "--steps", 1 if smoke else 6, *settings)


# Three sizes and nanoGPT's own model; of 7B four layers, because the sides' weights are there together.
SHAPES = {
    "124m": [],
    "gpt2": ["--model", "gpt2"],
    "1b": ["--model", "1b", "--rows", 4],
    "7b": ["--model", "7b", "--layers", 4, "--rows", 2],
}


def others(smoke: bool, name: str) -> dict:
    """A compiled step of ours beside compiled steps of others."""
    if smoke:  # compiling them takes minutes on a CPU
        return script("benchmarks/bench_train.py", *SMOKE["others"].split())
    return script("benchmarks/bench_train.py", "--compile", "--steps", 12, *SHAPES[name])


def tests(smoke: bool) -> dict:
    """The tests that need a GPU, and those of other files that train, on it."""
    marked = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    on_it = [sys.executable, "-m", "pytest", "-q", "-n", "6", "--device", "cpu" if smoke else "cuda"]
    files = [f"tests/test_{name}.py" for name in ("incidents", "train", "checkpoint")]
    found = {"marked": marked, "on the device": on_it + (files[:1] if smoke else files)}
    for name, command in found.items():
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        found[name] = {
            "command": " ".join(command[1:]),
            "output": done.stdout[-3000:],
            "code": done.returncode,
        }
        print(done.stdout[-1500:], flush=True)
    return judged(found, {name: run["code"] in ((0, 5) if smoke else (0,)) for name, run in found.items()})


def backends(smoke: bool) -> dict:
    """Forward and backward of PyTorch's attention kernels, at the shapes of three configs."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kinds = {"auto": None, "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    kinds["efficient"] = SDPBackend.EFFICIENT_ATTENTION
    shapes = {"124m": (32, 12, 12, 1024, 64), "1b": (4, 32, 8, 2048, 64), "7b": (2, 32, 32, 2048, 128)}
    device, dtype = ("cpu", torch.float32) if smoke else ("cuda", torch.bfloat16)
    report = {}
    for name, (B, H, K, T, Dh) in shapes.items():
        B, T = (1, 32) if smoke else (B, T)
        for kind, backend in kinds.items():
            q, k, v = (
                torch.randn(B, T, n, Dh, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
                for n in (H, K, K)
            )

            seconds = []
            try:
                with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
                    for _ in range(13):
                        start = time.perf_counter()
                        y = nn.functional.scaled_dot_product_attention(
                            q, k, v, is_causal=True, enable_gqa=K < H
                        )
                        y.backward(y)
                        if not smoke:
                            torch.cuda.synchronize()
                        seconds.append(time.perf_counter() - start)
            except RuntimeError:  # this kernel does not compute this shape
                continue
            report[f"{name}, {kind}"] = milliseconds = 1000 * statistics.median(seconds[3:])
            print(f"  {name}, {kind}: {milliseconds:.2f} ms")
    return report


def save(smoke: bool) -> dict:
    """The cost of saving a checkpoint."""
    command = ["benchmarks/bench_save.py", *(SMOKE["save"] if smoke else "--steps 30").split()]
    return {"async": script(*command), "sync": script(*command, "--sync")}


# ---- numbers ----------------------------------------------------------------------------------------------


class Built(NamedTuple):
    """A model that can be trained, as train.py has it."""

    cfg: Config
    world: parallel.World
    model: nn.Module
    optimizers: list


def build(smoke: bool, model: dict, settings: dict, seed: int = 0) -> Built:
    """A model with its first weights, on the GPU, or on the CPU for a smoke test."""
    settings = {"device": "cpu" if smoke else "cuda", "compile": "off" if smoke else "on", **settings}
    settings = Train(batch_size=32, micro_batch_size=32, **settings)
    cfg = Config(model=Model(**model), train=settings).resolved()
    world = parallel.start(cfg.train, cfg.parallel)
    net, optimizers = train.build(cfg, world, eot=0)
    world.fill(net, initial_weights(sharding.bare(net), seed))
    return Built(cfg, world, net, optimizers)


def gradient(built: Built, rows: Tensor) -> Tensor:
    """Takes the gradient of the mean loss over rows (b, T+1), and returns the mean loss, on the device."""
    n_targets = rows[:, 1:].numel()
    rows = rows.to(built.world.device)
    loss_fn = train.next_token_loss
    sums = train.forward_backward(built.model, rows, n_targets, loss_fn, built.world, built.cfg)
    return sums["loss"] / n_targets


def train_step(built: Built, rows: Tensor, step: int, n_steps: int) -> float:
    """One step as train.py makes it; returns the loss."""
    loss, grad_norm = built.world.sum(gradient(built, rows), optim.grad_norm(built.model))
    recipe = dataclasses.replace(built.cfg.optim, lr=1e-3, warmup_steps=n_steps // 10)
    lr, limit = optim.learning_rate(step, n_steps, recipe), optim.clip_limit(step, recipe)
    optim.update(built.model, built.optimizers, lr, grad_norm, limit)
    return loss


def precision(smoke: bool) -> dict:
    """How far BF16's loss is from FP32's, in nats per byte, beside how far that of another seed is."""
    n_steps, width = (6, 5) if smoke else (400, 20)
    # 6 x (4 x 384^2 + 3 x 384 x 1024 + 2 x 384) + 2 x 256 x 384 + 384 = 10,819,968 parameters
    shape = {"vocab_size": 256, "d_model": 384, "n_layers": 6, "n_heads": 6, "d_ff": 1024, "seq_len": 256}
    if smoke:
        shape |= {"d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 48, "seq_len": 64}
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = torch.tensor(list(b"".join(path.read_bytes() for path in library)[: 2**22]), dtype=torch.uint8)

    # Three trainings on the same rows.
    curves = {}
    for name, dtype, seed in (("fp32", "fp32", 0), ("bf16", "bf16", 0), ("other seed", "fp32", 1)):
        built = build(smoke, shape, {"precision": dtype}, seed)
        generator = torch.Generator().manual_seed(0)
        curve = []
        for step in range(n_steps):
            starts = torch.randint(len(text) - shape["seq_len"], (32, 1), generator=generator)
            rows = text[starts + torch.arange(shape["seq_len"] + 1)].long()  # (32, T+1)
            curve.append(train_step(built, rows, step, n_steps))
        curves[name] = torch.tensor(curve)
        torch._dynamo.reset()

    # The first losses fall steeply, and differ with every small delay: they are left out.
    smooth = {name: curve.unfold(0, width, 1).mean(1) for name, curve in curves.items()}
    report = {"steps": n_steps, "smoothed_over": width, "final": {k: c[-1].item() for k, c in smooth.items()}}
    for name in ("bf16", "other seed"):
        apart = (smooth[name] - smooth["fp32"])[n_steps // 8 :]
        values = {"max": apart.abs().max(), "mean_absolute": apart.abs().mean(), "mean": apart.mean()}
        report[f"{name} - fp32"] = {key: value.item() for key, value in values.items()}
    print(json.dumps(report))
    return {**report, "curves": {name: curve.tolist() for name, curve in curves.items()}}


KINDS = {"document mask": {"document_mask": True}, "window": {"window": 100}, "ALiBi": {"positions": "alibi"}}
KINDS["all three"] = {key: value for kind in KINDS.values() for key, value in kind.items()}


def attention(smoke: bool) -> dict:
    """Loss and gradients of a model on CUDA, blocks compiled, flex attention, against a dense mask."""
    report, T = {}, 64 if smoke else 677  # 677: five of flex attention's blocks of 128, and a part of one
    shape = {"vocab_size": 300, "seq_len": T, "d_model": 256, "n_heads": 4, "n_kv_heads": 2, "d_ff": 512}
    rows = torch.randint(300, (3, T + 1), generator=torch.Generator().manual_seed(0))
    rows[:, 50 :: 1 + T // 3] = 0  # ends of documents

    # Tolerances are relative to the norm of a gradient: 1e-4 in FP32, as in the tests, and in BF16 about ten
    # roundings of 2^-8.
    for dtype, tolerance in (("fp32", 1e-4), ("bf16", 0.05)):
        for name, kind in KINDS.items():
            model = {**shape, "n_layers": 2, **kind}
            ours = build(smoke, model, {"precision": dtype})
            our_loss = gradient(ours, rows).item()
            dense = build(smoke, model, {"device": "cpu", "compile": "off", "precision": "fp32"})
            dense_loss = gradient(dense, rows).item()

            apart = {"loss": abs(our_loss / dense_loss - 1)}
            for (key, p), expected in zip(ours.model.named_parameters(), dense.model.parameters()):
                apart[key] = ((p.grad.cpu() - expected.grad).norm() / expected.grad.norm()).item()
            worst = max(apart, key=apart.get)
            report[f"{name}, {dtype}"] = {"worst": worst, "apart": apart[worst], "tolerance": tolerance}
            print(f"  {name}, {dtype}: {apart[worst]:.1e} apart at worst, in {worst}; tolerance {tolerance}")
            torch._dynamo.reset()
    return judged(report, {name: found["apart"] <= found["tolerance"] for name, found in report.items()})


def judged(report: dict, good: dict) -> dict:
    """The report of a part, with an "error" that names those of its entries that are not good."""
    failed = ", ".join(name for name in report if not good[name])
    return {**report, "error": f"not as it should be: {failed}"} if failed else report


def deterministic(smoke: bool) -> dict:
    """Whether two processes that train the same model have the same weights afterwards, bit for bit."""
    report = {}
    for name, kind in {"causal": {}, "all three": KINDS["all three"]}.items():
        hashes = [alone(trained_hash, smoke, kind) for _ in range(2)]
        report[name] = {"same": hashes[0] == hashes[1], "sha256": hashes}
        print(f"  {name}: {'the same bits' if report[name]['same'] else 'DIFFERENT'}")
    return judged(report, {name: found["same"] for name, found in report.items()})


def trained_hash(smoke: bool, kind: dict) -> str:
    """The hash of all weights after a short training."""
    n_steps, T = (3, 64) if smoke else (20, 512)
    shape = {"vocab_size": 1000, "seq_len": T, "d_model": 256, "n_layers": 2, "n_heads": 4, "d_ff": 512}
    built = build(smoke, {**shape, **kind}, {"deterministic": True})
    generator = torch.Generator().manual_seed(0)
    for step in range(n_steps):
        rows = torch.randint(1000, (8, T + 1), generator=generator)
        train_step(built, rows, step, n_steps)
    weights = b"".join(p.detach().cpu().numpy().tobytes() for p in built.model.parameters())
    return hashlib.sha256(weights).hexdigest()


# ---- all of it --------------------------------------------------------------------------------------------

PARTS = {  # the important first
    **{f"others-{name}": functools.partial(others, name=name) for name in SHAPES},
    **{f"steps-{name}": functools.partial(steps, name=name) for name in BATCHES},
}
PARTS |= {part.__name__: part for part in (tests, backends, attention, deterministic, save, precision)}


def about(smoke: bool) -> dict:
    """Date, device and versions."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    there = [name for name in ("triton", "transformers", "litgpt") if importlib.util.find_spec(name)]
    versions |= {name: importlib.metadata.version(name) for name in there}
    gpu = None if smoke else torch.cuda.get_device_properties(0)
    found = {"format": 1, "date": datetime.date.today().isoformat(), "device": gpu.name if gpu else "cpu"}
    found |= {"memory_bytes": gpu and gpu.total_memory, "platform": platform.platform()}
    return {**found, "versions": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--cpu-smoke", action="store_true", help="in miniature; its numbers mean nothing")
    args = parser.parse_args()
    if not (args.cpu_smoke or torch.cuda.is_available()):
        configurator.fail("PyTorch sees no CUDA device here; --cpu-smoke runs the script without one")

    # The file, if there is one of today, keeps the parts that are not run now.
    report = about(args.cpu_smoke)
    folder = Path(tempfile.gettempdir()) if args.cpu_smoke else Path(__file__).parent
    path = folder / f"gpu-{report['device'].lower().replace(' ', '-')}-{report['date']}.json"
    parts = report["parts"] = json.loads(path.read_text())["parts"] if path.exists() else {}

    for part in args.only:
        print(f"\n== {part}", flush=True)
        start = time.perf_counter()
        try:
            found = alone(PARTS[part], args.cpu_smoke)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        if "error" in found:
            print(f"FAILED: {found['error'][:2000]}", flush=True)
        parts[part] = {"part_seconds": time.perf_counter() - start, **found}
        path.write_text(json.dumps(report, indent=1) + "\n")

    failed = [part for part in args.only if "error" in parts[part]]
    print(f"\n{path}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
