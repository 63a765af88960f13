"""The memorization score of 1,000 rows on this machine's CPU: ours beside `transformers` at batch size 32.

    python benchmarks/bench_memorize.py                           # the 14 M model, then the demo's model
    python benchmarks/bench_memorize.py --model demo --repeats 5 --threads 1

Both decode the same rows with the same random weights. They take turns, one slice of the rows at a time, so
that other load on the machine slows both. Prints the median time for all rows over the repeats, the median of
the repeats' ratios, and the number of match counts that differ. The rows are text that the model itself
generated, with a different share of the tokens replaced in each row, so that the counts are not all 0. The
other side is `generate` of transformers (requirements-dev.txt).
"""

import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import configurator

K, L, THEIR_BATCH = 32, 32, 32
SLICE = 512  # rows that one side decodes in its turn: 16 of their batches


def rows_of(model, n: int, rng: np.random.Generator) -> np.ndarray:
    """Rows (n, K + L): random prompts, and continuations that are about half right."""
    from sample import generate

    prompts = rng.integers(0, model.cfg.vocab_size, (n, K))
    rows = generate(model, torch.from_numpy(prompts), L).numpy()
    # The share of tokens that are replaced is uniform in 0 .. 1 by row, so that all counts occur.
    wrong = rng.random((n, L)) < rng.random((n, 1))
    rows[:, K:][wrong] = rng.integers(0, model.cfg.vocab_size, int(wrong.sum()))
    return rows


def compare(name: str, cfg, n_rows: int, repeats: int, batch_size: int) -> None:
    """Times both on the same rows and prints a line."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from formats.families import hf_config, to_family
    from memorize import count_matches
    from model import Transformer

    # The same model twice, and the rows.
    ours = Transformer(cfg).eval().requires_grad_(False)
    ours.init_weights(0)
    theirs = LlamaForCausalLM(LlamaConfig(**hf_config(cfg))).eval()
    theirs.load_state_dict(to_family(ours.state_dict(), cfg))
    parameters = sum(p.numel() for p in ours.parameters())
    rows = rows_of(ours, n_rows, np.random.default_rng(0))

    def counts_of_ours(rows: np.ndarray) -> np.ndarray:
        return count_matches(ours, rows, K, batch_size)

    @torch.inference_mode()
    def counts_of_theirs(rows: np.ndarray) -> np.ndarray:
        counts = []
        for truth in torch.from_numpy(rows).split(THEIR_BATCH):
            prompt = truth[:, :K]
            row = theirs.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0,
                min_new_tokens=L, max_new_tokens=L,
            )  # fmt: skip
            counts.append((row[:, K:] == truth[:, K:]).sum(1).numpy())
        return np.concatenate(counts)

    def timed(count, rows: np.ndarray) -> tuple[float, np.ndarray]:
        start = time.perf_counter()
        counts = count(rows)
        return time.perf_counter() - start, counts

    # First calls allocate, and are not measured. Then slice by slice; who begins alternates.
    sides = (counts_of_ours, counts_of_theirs)
    for count in sides:
        count(rows[:64])
    seconds, n_different = [], 0
    for repeat in range(repeats):
        ours_total = theirs_total = 0.0
        for start in range(0, n_rows, SLICE):
            part = rows[start : start + SLICE]
            order = (0, 1) if (repeat + start // SLICE) % 2 == 0 else (1, 0)
            result = {side: timed(sides[side], part) for side in order}
            ours_total += result[0][0]
            theirs_total += result[1][0]
            n_different += int((result[0][1] != result[1][1]).sum())
        seconds.append((ours_total, theirs_total))

    # The medians over the repeats.
    our_seconds, their_seconds = (statistics.median(column) for column in zip(*seconds))
    ratio = statistics.median(b / a for a, b in seconds)
    what = f"{name:<5} {parameters / 1e6:5.1f} M parameters, {n_rows:,} rows"
    times = f"ours {our_seconds:7.2f} s  transformers {their_seconds:7.2f} s  ratio {ratio:.2f}"
    print(f"{what}:  {times}  counts that differ: {n_different} of {repeats * n_rows:,}", flush=True)


def main() -> None:
    parser = configurator.parser(__doc__)
    parser.add_argument("--model", choices=("14m", "demo", "both"), default="both")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch_size", type=int, default=256, help="ours, per core")
    args = parser.parse_args()

    import transformers

    import config
    import hardware

    torch.set_num_threads(args.threads)
    hardware.keep_freed_memory()
    batches = f"batch {args.batch_size} per core against {THEIR_BATCH}"
    print(f"{hardware.processor()}, {args.threads} threads, FP32; {batches}")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    models = {
        # 6 x (4 x 384 x 384 + 3 x 384 x 1024) + 2 x 4096 x 384 = 13.8 M
        "14m": config.Model(vocab_size=4096, seq_len=256, d_model=384, n_layers=6, n_heads=6, d_ff=1024),
        "demo": config.load("demo").model,
    }
    for name, cfg in models.items():
        if args.model in (name, "both"):
            compare(name, cfg.resolved(), args.rows, args.repeats, args.batch_size)


if __name__ == "__main__":
    main()
