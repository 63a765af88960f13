"""One training step on this machine's CPU: ours beside `transformers`' LlamaForCausalLM of the same sizes.

    python benchmarks/bench_train.py                                # with two vocabularies
    python benchmarks/bench_train.py --vocab_size 4096 --steps 20

The model has 6 layers, 384 wide; a batch is 12 rows of 256 tokens. Each side is a process of its own, so that
its peak memory is its own; they step in turn, so that a noisy machine is noisy to both. Both start from the
same weights and see the same tokens with the same fused AdamW, and their losses are compared. Needs
transformers (requirements-dev.txt).
"""

import argparse
import multiprocessing
import platform
import resource
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

LAYERS, WIDTH, HEADS, FF, LENGTH, BATCH = 6, 384, 6, 1024, 256, 12


def side(name: str, vocab_size: int, threads: int, pipe) -> None:
    """One competitor: builds its model, then takes one step for every message and answers (seconds, loss)."""
    import torch

    import optim
    import parallel
    from config import Model, Optim
    from families import hf_config, to_family
    from model import Transformer

    torch.set_num_threads(threads)
    cfg = Model(vocab_size=vocab_size, seq_len=LENGTH, d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, d_ff=FF)
    net = Transformer(cfg)
    net.init_weights(0)
    if name == "nano360":
        parallel.keep_freed_memory()

        def loss_of(tokens):
            return net(tokens[:, :-1], tokens[:, 1:]) / (BATCH * LENGTH)
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        state = to_family(net.state_dict(), cfg)
        values = {**hf_config(cfg), "use_cache": False}
        net = LlamaForCausalLM(LlamaConfig(**values))
        net.load_state_dict(state)

        def loss_of(tokens):  # it shifts by itself: given T + 1 tokens it predicts T
            return net(input_ids=tokens, labels=tokens).loss

    adamw = optim.adamw(net, Optim(lr=1e-4))
    generator = torch.Generator().manual_seed(1)
    while pipe.recv():
        tokens = torch.randint(vocab_size, (BATCH, LENGTH + 1), generator=generator)
        start = time.perf_counter()
        loss = loss_of(tokens)
        loss.backward()
        optim.clip(net, 1.0)
        adamw.step()
        adamw.zero_grad()
        loss = loss.item()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # MiB: Linux counts in KiB
        pipe.send((time.perf_counter() - start, loss, peak))


def compare(vocab_size: int, steps: int, threads: int) -> None:
    names, pipes = ("nano360", "transformers"), {}
    spawn = multiprocessing.get_context("spawn")
    for name in names:
        pipes[name], there = spawn.Pipe()
        spawn.Process(target=side, args=(name, vocab_size, threads, there), daemon=True).start()
    results = {name: [] for name in names}
    for step in range(steps + 1):
        for name in names if step % 2 else reversed(names):
            pipes[name].send(True)
            results[name].append(pipes[name].recv())
    for pipe in pipes.values():
        pipe.send(False)
    seconds = {name: [r[0] for r in results[name][1:]] for name in names}  # the first step warms up
    apart = max(abs(a[1] - b[1]) for a, b in zip(*results.values()))
    print(f"\nvocabulary {vocab_size:,}; losses differ by at most {apart:.1e}")
    for name in names:
        median = statistics.median(seconds[name])
        print(f"  {name:<13} {BATCH * LENGTH / median:>7,.0f} tokens/s   {median:.3f} s a step "
              f"({min(seconds[name]):.3f} to {max(seconds[name]):.3f})   "
              f"peak {results[name][-1][2]:,.0f} MiB")  # fmt: skip
    ratios = [b / a for a, b in zip(seconds["nano360"], seconds["transformers"])]
    print(f"  speed, nano360 / transformers: {statistics.median(ratios):.2f} (median of {steps} pairs)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab_size", type=int, nargs="+", default=[4096, 50257])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=multiprocessing.cpu_count())
    arguments = parser.parse_args()
    print(f"{platform.platform()}, Python {platform.python_version()}, {arguments.threads} threads")
    for size in arguments.vocab_size:
        compare(size, arguments.steps, arguments.threads)
