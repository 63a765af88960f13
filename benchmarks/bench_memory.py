"""Measures the peak memory of real training steps beside plan.py's figure, for models of different shapes.

    python benchmarks/bench_memory.py                 # CUDA where there is one, else the CPU
    python benchmarks/bench_memory.py --device cpu --shapes FSDP "tensor parallel"

Each model is trained for several steps, as train.py does it, in a process of its own, or in two. On CUDA the
peak is PyTorch's count of allocated bytes. On a CPU it is the peak of the process's resident memory, less its
memory after a step of a tiny model (Python, PyTorch and the libraries that a first step loads). A CPU is
measured twice: with a mapping of its own for each large tensor, which is unmapped when the tensor is freed,
so that tensors are measured; and as train.py runs, where malloc keeps what is freed
(hardware.keep_freed_memory) and leaves gaps. Two processes that share a model are measured by PyTorch's
profiler, which records each allocation of a tensor and its end.
"""

import argparse
import ctypes
import json
import multiprocessing
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import configurator
import consistency
import cost
import memory
from config import Config, Model, Parallel, Train

LLAMA = Model(vocab_size=4096, seq_len=256, d_model=384, n_layers=6, n_heads=6, n_kv_heads=2, d_ff=1024)
DEEP = Model(vocab_size=1000, seq_len=64, d_model=256, n_layers=6, n_heads=4, d_ff=1024)
# Name -> model, rows of a micro-batch, micro-batches of a step, activation checkpointing of every n-th block,
# how two processes share it (None: one process). In some shapes most bytes are activations; in others the
# vocabulary, or the weights.
SHAPES = {
    "LLaMA, many tokens": (LLAMA, 12, 1, 0, None),
    "the same, every block recomputed": (LLAMA, 12, 1, 1, None),
    "the same, every 2nd recomputed": (LLAMA, 12, 1, 2, None),
    "tied, large vocabulary": (
        Model(vocab_size=50257, seq_len=256, d_model=256, n_layers=3, n_heads=4, d_ff=700,
              tie_embeddings=True),
        4, 2, 0, None,
    ),
    "Pythia, wide": (
        Model(vocab_size=8000, seq_len=128, d_model=768, n_layers=6, n_heads=12, d_ff=3072, ffn="gelu",
              norm="layernorm", bias=True, parallel_residual=True, rope_fraction=0.25),
        3, 1, 0, None,
    ),
    "OLMo 2, long rows": (
        Model(vocab_size=2048, seq_len=1024, d_model=320, n_layers=4, n_heads=5, d_ff=864, qk_norm=True,
              norm_place="after"),
        2, 2, 0, None,
    ),
    "FSDP": (DEEP, 2, 2, 0, Parallel(strategy="fsdp")),
    "FSDP, not resharded": (DEEP, 2, 1, 0, Parallel(strategy="fsdp", reshard=False)),
    "FSDP, every 2nd recomputed": (DEEP, 16, 1, 2, Parallel(strategy="fsdp")),
    "tensor parallel": (DEEP, 8, 2, 0, Parallel(tp=2)),
}  # fmt: skip


def settings(name: str, device: str) -> Config:
    """The config of a shape."""
    model, micro, accumulation, every, spread = SHAPES[name]
    replicate, shard, _ = consistency.mesh_shape(spread, 2) if spread else (1, 1, 1)
    train = Train(
        batch_size=micro * accumulation * replicate * shard,
        micro_batch_size=micro,
        activation_checkpointing=every,
        device=device,
    )
    return Config(model=model, train=train, parallel=spread or Parallel()).resolved()


def processes(name: str) -> int:
    return 2 if SHAPES[name][-1] else 1


def free_at_once() -> None:
    """Undoes hardware.keep_freed_memory: a tensor of 64 KiB or more is a mapping, unmapped when freed."""
    M_MMAP_THRESHOLD, M_MMAP_MAX = -3, -4
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    mallopt(M_MMAP_MAX, 2**20)
    mallopt(M_MMAP_THRESHOLD, 2**16)


def begin(cfg: Config, world):
    """(model, optimizers, step): a model with weights, and a function that trains it for one step."""
    import torch

    import optim
    import sharding
    import train
    from initial import initial_weights

    model, optimizers = train.build(cfg, world, eot=0)
    world.fill(model, initial_weights(sharding.bare(model), 0))
    T, n_rows = cfg.model.seq_len, cfg.train.batch_size

    def step() -> None:
        rows = torch.randint(cfg.model.vocab_size, (n_rows // world.dp_size, T + 1), device=world.device)
        train.forward_backward(model, rows, n_rows * T, train.next_token_loss, world, cfg)
        optim.update(model, optimizers, cfg.optim.lr, optim.grad_norm(model).item(), limit=1.0)

    return model, optimizers, step


def take_steps(cfg: Config, world, n_steps: int) -> None:
    """The first steps of a training; its model is freed afterwards."""
    _, _, step = begin(cfg, world)
    for _ in range(n_steps):
        step()


def tensors_at_the_peak(cfg: Config, world, steps: int = 3) -> int:
    """Bytes of this process's tensors at the peak of a step, by PyTorch's profiler.

    The smallest of several steps: the profiler does not see what gloo's own threads free, so a step can only
    seem larger than it is.
    """
    import torch

    # Weights and moments exist all the time: the profiler sees only what is allocated during a step.
    model, optimizers, step = begin(cfg, world)
    step()
    moments = [value for o in optimizers for values in o.state.values() for value in values.values()]
    always = [getattr(t, "_local_tensor", t) for t in (*model.parameters(), *moments)]

    peaks = []
    for _ in range(steps):
        # One step, and the events in which a tensor was allocated or freed, in order of time.
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
            step()
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            profile.export_chrome_trace(file.name)
            events = json.loads(Path(file.name).read_text())["traceEvents"]
        events = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])

        # The sum of the tensors that exist at a time is largest at the peak.
        live, now, most = {}, 0, 0
        for event in (e["args"] for e in events):
            now -= live.pop(event["Addr"], 0)
            if event["Bytes"] > 0:
                live[event["Addr"]] = event["Bytes"]
                now += event["Bytes"]
            most = max(most, now)
        peaks.append(most)
    return sum(t.nbytes for t in always) + min(peaks)


def one_of_two(name: str, device: str, path: str) -> None:
    """Torchrun starts this in each of two processes. Writes the larger of their peaks."""
    import torch

    import parallel

    torch.set_num_threads(1)
    cfg = settings(name, device)
    with parallel.start(cfg.train, cfg.parallel) as world:
        most = max(world.collect(tensors_at_the_peak(cfg, world)))
        world.once(Path(path).write_text, str(most))


def measure(name: str, device: str, threads: int, steps: int, keep: bool, pipe) -> None:
    """Sends the peak of `steps` training steps through the pipe, in bytes."""
    import torch

    import parallel

    # parallel.start makes malloc keep freed memory; `keep` leaves it so.
    torch.set_num_threads(threads)
    cfg = settings(name, device)
    world = parallel.start(cfg.train, cfg.parallel)
    cuda = world.device.type == "cuda"
    if not (keep or cuda):
        free_at_once()

    # Python, PyTorch and the libraries that a first step loads are not counted.
    tiny = Model(vocab_size=8, seq_len=4, d_model=8, n_layers=1, n_heads=1, d_ff=8)
    take_steps(Config(model=tiny.resolved(), train=Train(batch_size=1, micro_batch_size=1)), world, 1)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    # The steps, and the peak.
    take_steps(cfg, world, steps)
    if cuda:
        pipe.send(torch.cuda.max_memory_allocated())
    else:
        # Not getrusage's maximum: a new process inherits that from the one that started it.
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        pipe.send(int(status["VmHWM"].split()[0]) * 2**10 - before)  # in KiB


def peak(name: str, device: str, threads: int = 1, steps: int = 3, keep: bool = False) -> int:
    """Measured bytes of a shape of SHAPES. keep: malloc keeps freed memory, as in train.py."""
    # Two processes: torchrun starts this file twice, and the first process writes the result.
    if processes(name) > 1:
        with tempfile.NamedTemporaryFile("r") as file:
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
            command = [*torchrun, __file__, "--one-of-two", name, device, file.name]
            subprocess.run(command, check=True, capture_output=True, timeout=300)
            return int(file.read())

    # One process: a new one, whose memory holds nothing of this one.
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=measure, args=(name, device, threads, steps, keep, there), daemon=True)
    process.start()
    there.close()  # if the process dies, recv raises EOFError instead of waiting for ever
    try:
        return here.recv()
    finally:
        process.join()


def planned(name: str, device: str) -> dict[str, float]:
    """Bytes by kind that plan.py expects of a shape, and the moment of the peak (memory.peak)."""
    return memory.peak(settings(name, device), processes(name), device == "cuda")


def compare(shape: str, args: argparse.Namespace) -> None:
    """Prints a line of the table: what plan.py expects of a shape, and what it takes."""
    says = planned(shape, args.device)
    moment, total = says.pop("at"), sum(says.values())
    measured = peak(shape, args.device, args.threads, args.steps)
    kept = ""  # the whole process, as train.py runs
    if args.device == "cpu" and processes(shape) == 1:
        kept = f"{peak(shape, args.device, args.threads, args.steps, keep=True) / 2**20:,.0f}"
    count = sum(cost.parameters(SHAPES[shape][0]).values())
    line = f"{shape:<34}{count:>12,}{total / 2**20:>9,.0f}{measured / 2**20:>10,.0f}{total / measured:>7.2f}"
    print(f"{line}{kept:>13}  when {moment}", flush=True)


def main() -> None:
    parser = configurator.parser(__doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="NAME")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one-of-two", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_of_two:
        return one_of_two(*args.one_of_two)

    if args.device == "auto":
        import torch

        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    version = platform.python_version()
    print(f"{platform.platform()}, Python {version}, {args.device}, {args.threads} threads")
    kept = "as train.py" if args.device == "cpu" else ""
    print(f"{'MiB':<34}{'parameters':>12}{'planned':>9}{'measured':>10}{'ratio':>7}{kept:>13}  planned peak")
    for shape in args.shapes:
        if processes(shape) == 1 or args.device == "cpu":  # two processes are profiled on a CPU only
            compare(shape, args)


if __name__ == "__main__":
    main()
