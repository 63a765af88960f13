"""Evaluates every checkpoint: loss, perplexity and bits per byte of validation rows; and memorization.

    python eval.py runs/demo            # every checkpoint; also computes memorize.py's score
    python eval.py runs/demo --checkpoint 605 --source code --max_rows 50 --no-memorization
    python eval.py runs/demo --check    # also exits with 1 unless the run is whole and good enough
    torchrun --nproc_per_node=8 -- eval.py runs/demo      # the same on eight GPUs
    python eval.py models/mine --dataset datasets/mine    # loss of any model folder, printed only

    loss           nats of all target tokens / number of target tokens
    perplexity     e^loss
    bits per byte  nats of all target tokens / ln 2 / UTF-8 bytes of the text that they encode

Each is measured by source. Both sums of a ratio run over the whole source before they are divided, as in
Paloma: a mean of ratios would depend on the batch size. Every token of a row but the first is a target. An
end-of-text token is a target like any other: its nats count, and it has 0 bytes of text. Bits per byte can be
compared between models with different tokenizers; the loss cannot.

The bytes are those of the text as it was before it was encoded. A document's bytes are spread over its tokens
in proportion to the bytes that these decode to, without the space that SentencePiece puts before a text. If
the tokens decode to exactly the text, this is exact for every token. If they do not (Unicode normalization,
characters that a vocabulary lacks), it is exact for every document, as in Paloma. A token's bytes belong to
the row in which it is a target. So the first token of a source's validation text, which is no target, is not
counted. The tokens that the dataset dropped at its end are not counted either.

Reads RUN/config.json, its checkpoints and the validation rows of its dataset. Appends to RUN/evals.jsonl one
line for each checkpoint and source. Results are kept and continued as measure.py says.
"""

if __name__ == "__main__":  # before torch, which takes seconds to import
    import configurator

    configurator.quiet_imports()

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

import checkpoint
import configurator
import integrity
import measure
import memorize
import parallel
import rendezvous
import steps
import tokenizer as tokenizers
from config import Config, ConfigError
from dataset import Dataset
from model import Transformer
from run_folder import Checkpoint, chosen

PROTOCOL = "nats-over-bytes-2"  # the meaning of the numbers in a line; a change of it needs a new name
LEARNED = 0.6  # --check: the last checkpoint's bits per byte must be below this share of step 0's


# ---- loss -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def nats_of(model: Transformer, rows: np.ndarray, batch_size: int, done=lambda n: None) -> float:
    """Rows (N, T+1) of ids -> the loss of all N x T targets together, in nats; calls done(n) after n rows."""
    device, total = model.embed_tokens.weight.device, 0.0
    for start in range(0, len(rows), batch_size):
        batch = torch.from_numpy(rows[start : start + batch_size].astype(np.int64)).to(device)  # (B, T+1)
        total += model(batch[:, :-1], batch[:, 1:]).item()  # summed over batches in FP64
        done(len(batch))
    return total


def validation_documents(dataset: Dataset, source: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and UTF-8 bytes of each validation document of a source, in the order of its rows.

    Tokens include the end-of-text token. Reads the source's table of documents from its start.
    """
    path = dataset.path(f"documents/{source}.jsonl")
    sizes = []
    try:
        with open(path, "rb") as file:
            for line in file:
                if b'"validation": true' in line:
                    about = json.loads(line)
                    sizes.append((about["tokens"], about["bytes"]))
        return tuple(np.array(sizes, np.int64).reshape(-1, 2).T)
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is missing or damaged; try: {dataset.check}") from None


def target_bytes(dataset: Dataset, source: str, n_rows: int, tokenizer: tokenizers.Tokenizer) -> np.ndarray:
    """The bytes of text of every target in a source's first n_rows validation rows: (n_rows, T).

    "Hi you", 6 bytes, as the tokens " Hi", " you" and end of text of a SentencePiece model -> 2, 4, 0.
    """
    # Find the documents that begin in these rows, and their tokens, as far as the dataset has them.
    rows, T = dataset.validation(source), dataset.seq_len
    tokens, text_bytes = validation_documents(dataset, source)
    ends = np.cumsum(tokens)
    n = int(np.searchsorted(ends - tokens, n_rows * T + 1))
    tokens, text_bytes, ends = tokens[:n], text_bytes[:n], ends[:n]
    if not n or ends[-1] <= n_rows * T or tokens.min() < 1:
        raise ConfigError(
            f"{dataset.folder}: the validation documents of {source} are not those of its validation rows; "
            f"try: python data.py verify {dataset.folder}"
        )
    starts = ends - tokens
    n_used = -(-(ends[-1] - 1) // T)  # rows that hold the documents' tokens, rounded up
    stream = np.append(rows[0, 0], rows[:n_used, 1:])[: ends[-1]]
    known = np.minimum(ends, len(stream)) - starts  # tokens of each document that are in the stream

    # Count the bytes that each token decodes to, without the space before a document and the end of text.
    decoded = tokenizer.n_bytes[stream].astype(float)
    if tokenizer.adds_space:
        decoded[starts] -= [tokenizer.token_bytes[id].startswith(b" ") for id in stream[starts]]
    last = ends[known == tokens] - 1
    decoded[last[stream[last] == dataset.manifest["eot"]]] = 0
    sums = np.add.reduceat(decoded, starts)
    whole = known >= tokens - 1  # an end of text that was dropped takes nothing with it
    for i in np.flatnonzero(whole & (sums == 0)):  # all tokens but the end of text, where there are others
        sums[i] = max(1, tokens[i] - 1)
        decoded[starts[i] : starts[i] + int(sums[i])] = 1

    # Divide the bytes of text by the decoded ones, by document. The end of the last document may have been
    # dropped: then it is unknown how many bytes all of it decodes to, and it takes the ratio of the others.
    ratio = text_bytes / np.maximum(sums, 1)
    if not whole[-1]:
        ratio[-1] = min(ratio[-1], text_bytes[:-1].sum() / sums[:-1].sum() if n > 1 else 1)
    decoded *= np.repeat(ratio, known)
    return decoded[1 : n_rows * T + 1].reshape(n_rows, T)


def measures(nats: float, n_targets: int, n_bytes: float) -> dict:
    """The nats of all targets together, and their bytes together -> the numbers that are reported.

    3 targets with 2, 3 and 0 bytes and 5 ln 2 nats together: loss 5 ln 2 / 3, bits per byte 5 / 5 = 1.
    """
    loss = nats / n_targets
    rounded = round(float(n_bytes), 3)  # a row may end within a document
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),  # e^710 is more than a float holds
        "bits_per_byte": nats / math.log(2) / float(n_bytes) if n_bytes else None,  # end-of-text tokens only
        "tokens": n_targets,
        "bytes": int(rounded) if rounded.is_integer() else rounded,
    }


def with_validation_rows(dataset: Dataset, asked: list[str]) -> list[str]:
    """The sources to evaluate: those asked for, or else all that have validation rows; names the others."""
    n_rows = {source: len(dataset.validation(source)) for source in asked or dataset.sources}
    empty = [source for source in n_rows if not n_rows[source]]
    if empty and asked:
        raise ConfigError(
            f"{dataset.folder} has no validation row of {', '.join(empty)}, so there is no loss to measure; "
            "raise data.validation_fraction and build another dataset, or leave it out of --source"
        )
    if len(empty) == len(n_rows):
        measure.say(f"{dataset.folder} has no validation row of any source: there is no loss to measure")
    elif empty:
        measure.say(f"{dataset.folder} has no validation row of {', '.join(empty)}: not evaluated")
    return [source for source in dataset.sources if n_rows.get(source)]


def metric(run: measure.Run, sources: list[str], max_rows: int) -> measure.Metric:
    """The loss as measure.py computes it, on each source's first max_rows rows; 0: on all."""
    rows = {source: run.dataset.validation(source)[: max_rows or None] for source in sources}

    @functools.cache  # not needed if all results are known
    def n_bytes(source: str) -> float:
        tokenizer = tokenizers.load(run.dataset.folder)
        return target_bytes(run.dataset, source, len(rows[source]), tokenizer).sum()

    def loss(model: Transformer, c: Checkpoint, sources: list, done: Callable) -> Iterator[dict]:
        for source in sources:
            n_bytes(source)  # before the clock starts
            start = time.perf_counter()
            nats = nats_of(model, rows[source], run.cfg.eval.batch_size, done)
            seconds = time.perf_counter() - start
            yield {
                **measures(nats, rows[source][:, 1:].size, n_bytes(source)),
                "rows": len(rows[source]),
                "seconds": round(seconds, 3),
            }

    n_rows = {source: len(rows[source]) for source in sources}
    return measure.Metric("loss", PROTOCOL, n_rows, loss, lambda c: {"max_rows": max_rows}, key="source")


def show(table: list) -> str:
    """One line for each checkpoint and source."""
    width = max(len(source) for _, lines in table for source in ["source", *lines])
    out = [
        f"{'checkpoint':<14} {'source':<{width}} {'loss':>9} {'perplexity':>11} {'bits/byte':>10} "
        f"{'tokens':>12}"
    ]
    for c, lines in table:
        for source, line in lines.items():
            bits = f"{line['bits_per_byte']:10.4f}" if line["bits_per_byte"] is not None else f"{'-':>10}"
            numbers = f"{line['loss']:9.4f} {line['perplexity']:11.2f} {bits} {line['tokens']:12,}"
            out.append(f"{c.path.name:<14} {source:<{width}} {numbers}")
    return "\n".join(out)


# ---- is the run whole, and good enough? -------------------------------------------------------------------


def check(run: measure.Run, max_rows: int) -> list[str]:
    """Problems of a finished run, [] if there is none. The demo checks its own result with this."""
    run = run._replace(checkpoints=chosen(run.folder))
    return [*check_loss(run, max_rows), *check_chunks(run), *check_memorization(run)]


def check_loss(run: measure.Run, max_rows: int) -> list[str]:
    """The last checkpoint compresses every source better than the config asks, and far better than step 0."""
    first, last = run.checkpoints[0], run.checkpoints[-1]
    expected, sources = run.cfg.eval.expect_bits_per_byte, run.dataset.sources
    measured = [source for source in sources if len(run.dataset.validation(source))]
    problems = []

    # The bounds name the sources that have validation rows, all of them or none.
    name = "eval.expect_bits_per_byte names"
    problems += [f"{name} {s!r}, no source" for s in expected if s not in sources]
    without_rows = [s for s in sources if s in expected and s not in measured]
    problems += [f"{name} {s!r}, which has no validation row" for s in without_rows]
    if expected:
        problems += [f"{name} no bound for {s!r}" for s in measured if s not in expected]
    if first.step != 0:
        problems.append("there is no checkpoint of step 0")

    # The bits per byte of the last checkpoint are below the bounds.
    known = measure.known(run, metric(run, measured, max_rows), [first, last])
    for source in measured:
        if source not in known[first.step] or source not in known[last.step]:
            problems.append(
                f"{source}: the first or the last checkpoint is not evaluated; run without --source"
            )
            continue
        before, after = (known[c.step][source]["bits_per_byte"] for c in (first, last))
        if before is None or after is None:
            problems.append(f"{source}: its validation rows stand for no text")
            continue
        if not after < expected.get(source, math.inf):
            problems.append(f"{source}: {after:.4f} bits per byte, expected below {expected[source]}")
        if not after < LEARNED * before:
            problems.append(
                f"{source}: {after:.4f} bits per byte, not below {LEARNED:.0%} of step 0's {before:.4f}"
            )
    return problems


def check_chunks(run: measure.Run) -> list[str]:
    """Every chunk has its checkpoint: that of the step that ends it.

    A step ends every chunk whose last row is in its batch. The rows at the end that fill no batch are never
    trained on, so the last step ends their chunk.
    """
    dataset, ended = run.dataset, set()
    chunks = [dataset.chunk_range(chunk) for chunk in range(dataset.n_chunks)]
    for c in run.checkpoints:
        plan = steps.plan_of(run.cfg, dataset.n_rows, c.state.get("order"))
        step = min(plan.step_after(c.state["rows"]), plan.n_steps)
        for chunk, row in plan.chunk_ends(chunks).items():
            if min(plan.step_after(row), plan.n_steps) == step:
                ended.add(chunk)
    return [f"chunk {chunk} has no checkpoint" for chunk in range(dataset.n_chunks) if chunk not in ended]


def check_memorization(run: measure.Run) -> list[str]:
    """Every checkpoint is scored on every chunk, and the counts add up."""
    asked = memorize.parts(run.dataset, run.cfg.eval)
    same = memorize.same_texts(run.dataset, asked)
    known = measure.known(run, memorize.metric(run), run.checkpoints)
    problems = []
    for c in run.checkpoints:
        seen = memorize.seen_by(c.state, asked, same)
        for part in asked:
            line, name = known[c.step].get(part.chunk), f"{c.path.name}, memorization of {part.chunk}"
            if line is None:
                problems.append(f"{name}: missing")
            elif not adds_up(line, part, seen[part.chunk]):
                problems.append(f"{name}: its counts contradict one another, or the rows that were drawn")
    return problems


def adds_up(line: dict, part: memorize.Part, seen: np.ndarray) -> bool:
    """Whether a memorization line is about these rows, all of them, and its sums are those of its rows."""
    matches, l = np.array(line["matches"]), line["continuation_tokens"]
    return (
        line["rows"] == part.rows.tolist()
        and len(matches) == line["total"] == len(part.rows)
        and 0 <= matches.min() <= matches.max() <= l
        and line["seen"] == seen.tolist()
        and line["full"] == (matches == l).sum()
        and math.isclose(line["score"], matches.mean() / l)
    )


# ---- the command line -------------------------------------------------------------------------------------


def eval_folder(args: argparse.Namespace) -> None:
    """The loss of a model folder that is in no run, on the validation rows of a dataset; writes nothing."""
    # Open the dataset and the model, which must fit each other.
    folder = integrity.model_folder(args.run, verify=args.verify)
    dataset = Dataset(args.dataset, args.verify)
    if args.checkpoint or args.check:
        raise ConfigError(
            "--dataset is for a model folder; --checkpoint and --check are for a run, without it"
        )
    tokenizers.check_same(folder, dataset.folder)
    sources = with_validation_rows(dataset, args.source)
    cfg = Config()
    device = measure.device_of(cfg)
    model = checkpoint.load_model(folder, device, args.verify)
    if dataset.seq_len > model.cfg.seq_len or dataset.vocab_size > model.cfg.vocab_size:
        raise ConfigError(
            f"{args.dataset} has rows of {dataset.seq_len} tokens and {dataset.vocab_size} ids; {folder} was "
            f"trained on {model.cfg.seq_len}, and knows {model.cfg.vocab_size}"
        )

    # Compute the metric of a run, but keep no result: there is no run folder to write to.
    c = Checkpoint(folder, 0, {})
    precision = parallel.precision("auto", device)
    run = measure.Run(folder, cfg, dataset, [c], device, precision, args.verify)
    loss = metric(run, sources, args.max_rows or 0)
    with measure.bar("loss", sum(loss.items.values())) as progress, parallel.autocast(device, precision):
        lines = dict(zip(sources, loss.compute(model, c, sources, progress.update)))
    if lines:
        measure.say(show([(c, lines)]))


def eval_run(args: argparse.Namespace) -> list[str]:
    """Measures all that was asked for; returns the problems that --check finds."""
    run = measure.open_run(args.run, args.checkpoint, args.verify)
    max_rows = run.cfg.eval.max_rows if args.max_rows is None else args.max_rows
    sources = with_validation_rows(run.dataset, args.source)
    table = measure.every(run, metric(run, sources, max_rows))
    if sources:
        measure.say(show(table))
    if args.memorization:
        measure.say("\n" + memorize.show(measure.every(run, memorize.metric(run))))
    # Only the first process checks: torchrun ends all others as soon as one of them fails.
    return check(run, max_rows) if args.check and rendezvous.rank() == 0 else []


@configurator.script
def main() -> None:
    parser = measure.arguments(__doc__, "RUN|FOLDER")
    more = parser.add_argument
    more("--dataset", help="for a model folder that is in no run: the dataset whose validation rows to read")
    more("--source", nargs="+", default=[], help="default: all")
    more("--max_rows", type=int, help="read the first N rows of each source; 0: all; default: eval.max_rows")
    more("--no-memorization", dest="memorization", action="store_false", help="loss only")
    more("--check", action="store_true", help="exit 1, saying why, unless the run is whole and good enough")
    args = parser.parse_args()
    if args.max_rows is not None and args.max_rows < 0:
        raise ConfigError(f"--max_rows {args.max_rows}: use 0 for all rows, or a number of rows")
    if args.check and not args.verify:
        raise ConfigError(
            "--check says whether a run is whole, which needs its hashes: leave --no-verify out"
        )

    problems = []
    if not args.dataset:
        problems = eval_run(args)
    elif rendezvous.rank() == 0:  # one model folder is not enough work to share
        eval_folder(args)

    # Say what --check found, and end with its exit code.
    for problem in problems:
        print(f"check failed: {problem}", file=sys.stderr)
    if args.check and not problems:
        measure.say(
            "\ncheck passed: bits per byte as expected where there are validation rows, "
            "every chunk has its checkpoint and its scores"
        )
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
