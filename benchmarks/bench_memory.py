"""Peak memory of real training steps beside what plan.py says, for models of different shapes.

    python benchmarks/bench_memory.py                 # CUDA where there is one, else the CPU
    python benchmarks/bench_memory.py --device cpu

Every model is a process of its own and takes a few steps as train.py does: micro-batches under autocast,
gradients summed, clipped, AdamW. On CUDA the peak is PyTorch's own count of allocated bytes. On a CPU it is
the process's peak of resident memory, less what it held after a step of a tiny model (Python, PyTorch and the
libraries that a first step loads). It is taken twice: with every large tensor a mapping of its own, which is
gone when the tensor is, so that tensors are measured; and as train.py runs, where malloc keeps what is freed
(parallel.keep_freed_memory) and leaves gaps.
"""

import argparse
import ctypes
import multiprocessing
import platform
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import cost
from config import Config, Model, Train

# Name: model, rows a micro-batch, micro-batches a step. Most bytes are activations; the vocabulary; weights.
SHAPES = {
    "LLaMA, many tokens": (
        Model(vocab_size=4096, seq_len=256, d_model=384, n_layers=6, n_heads=6, n_kv_heads=2, d_ff=1024),
        12, 1,
    ),
    "tied, large vocabulary": (
        Model(vocab_size=50257, seq_len=256, d_model=256, n_layers=3, n_heads=4, d_ff=700,
              tie_embeddings=True),
        4, 2,
    ),
    "Pythia, wide": (
        Model(vocab_size=8000, seq_len=128, d_model=768, n_layers=6, n_heads=12, d_ff=3072, ffn="gelu",
              norm="layernorm", bias=True, parallel_residual=True, rope_fraction=0.25),
        3, 1,
    ),
    "OLMo 2, long rows": (
        Model(vocab_size=2048, seq_len=1024, d_model=320, n_layers=4, n_heads=5, d_ff=864, qk_norm=True,
              norm_place="after"),
        2, 2,
    ),
}  # fmt: skip


def settings(name: str, device: str) -> Config:
    model, micro, accumulation = SHAPES[name]
    return Config(
        model=model, train=Train(batch_size=micro * accumulation, micro_batch_size=micro, device=device)
    )


def free_at_once() -> None:
    """Undoes parallel.keep_freed_memory: what has 64 KiB or more is mapped alone, and unmapped when freed."""
    M_MMAP_THRESHOLD, M_MMAP_MAX = -3, -4
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    mallopt(M_MMAP_MAX, 2**20)
    mallopt(M_MMAP_THRESHOLD, 2**16)


def take_steps(cfg: Config, everyone, n_steps: int) -> None:
    """What train.py does in a step, n_steps times, on random tokens."""
    import torch

    import optim
    import parallel
    from model import Transformer

    net = Transformer(cfg.model)
    net.init_weights(0)
    net.to(everyone.device)
    adamw = optim.adamw(net, cfg.optim)
    T = cfg.model.seq_len
    for _ in range(n_steps):
        tokens = torch.randint(cfg.model.vocab_size, (cfg.train.batch_size, T + 1), device=everyone.device)
        for micro in tokens.split(cfg.train.micro_batch_size):
            with parallel.autocast(everyone.device, everyone.dtype):
                loss = net(micro[:, :-1], micro[:, 1:])
            (loss / (cfg.train.batch_size * T)).backward()
        optim.clip(net, 1.0)
        adamw.step()
        adamw.zero_grad()


def measure(name: str, device: str, threads: int, steps: int, keep: bool, pipe) -> None:
    """Sends the peak of `steps` training steps, in bytes."""
    import torch

    import parallel

    torch.set_num_threads(threads)
    cfg = settings(name, device)
    everyone = parallel.start(cfg.train)
    cuda = everyone.device.type == "cuda"
    if not (keep or cuda):
        free_at_once()
    tiny = Model(vocab_size=8, seq_len=4, d_model=8, n_layers=1, n_heads=1, d_ff=8)
    take_steps(Config(model=tiny, train=Train(batch_size=1, micro_batch_size=1)), everyone, 1)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    take_steps(cfg, everyone, steps)
    if cuda:
        pipe.send(torch.cuda.max_memory_allocated())
    else:
        # not getrusage's maximum, which a new process inherits from the one that started it
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        pipe.send(int(status["VmHWM"].split()[0]) * 2**10 - before)  # in KiB


def peak(name: str, device: str, threads: int = 1, steps: int = 3, keep: bool = False) -> int:
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=measure, args=(name, device, threads, steps, keep, there), daemon=True)
    process.start()
    there.close()  # so that a process that dies is an EOFError here, not a wait without end
    try:
        return here.recv()
    finally:
        process.join()


def planned(name: str, device: str) -> dict[str, float]:
    return cost.memory(settings(name, device), 1, "ddp", "none", device == "cuda")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    where = arguments.device
    if where == "auto":
        import torch

        where = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{platform.platform()}, Python {platform.python_version()}, {where}, {arguments.threads} threads")
    kept = "as train.py" if where == "cpu" else ""
    print(f"{'MiB':<24}{'parameters':>12}{'planned':>9}{'measured':>10}{'ratio':>7}{kept:>13}  planned peak")
    for shape in SHAPES:
        says = planned(shape, where)
        at, total = says.pop("at"), sum(says.values())
        measured = peak(shape, where, arguments.threads, arguments.steps)
        if where == "cpu":
            kept = f"{peak(shape, where, arguments.threads, arguments.steps, keep=True) / 2**20:,.0f}"
        count = sum(cost.parameters(SHAPES[shape][0]).values())
        print(f"{shape:<24}{count:>12,}{total / 2**20:>9,.0f}{measured / 2**20:>10,.0f}"
              f"{total / measured:>7.2f}{kept:>13}  when {at}", flush=True)  # fmt: skip
