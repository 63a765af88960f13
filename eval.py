"""What every checkpoint has learned: loss, perplexity and bits per byte of held-out text; and memorization.

    python eval.py runs/demo            # every checkpoint; also computes memorize.py's score
    python eval.py runs/demo --checkpoint 640 --source code --max_rows 50 --no-memorization
    python eval.py runs/demo --check    # and exit 1 unless the run is whole and good enough
    python eval.py models/mine --dataset datasets/mine    # loss of any model folder, printed only

    loss           nats of all target tokens / number of target tokens
    perplexity     e^loss
    bits per byte  nats of all target tokens / ln 2 / UTF-8 bytes of the text that they stand for

Each is measured by source. Both sums of a ratio run over the whole source before they are divided, as in
Paloma: a mean of ratios would depend on the batch size. Every token of a row but the first is a target. An
end-of-text token is one like any other: its nats count, and it stands for 0 bytes of text. So bits per byte
compares models with different tokenizers, loss does not.

The bytes are those of the text as it was before it was encoded. A document's bytes are spread over its tokens
in proportion to the bytes that these decode to, not counting the space that SentencePiece puts before a text.
Where tokens decode to exactly the text, that is exact for every token. Where they do not (Unicode
normalization, characters that a vocabulary lacks), it is exact for every document, as in Paloma. A token's
bytes belong to the row in which it is a target. So the first token of a source's held-out text, which is no
target, is not counted, and neither is what the dataset dropped at its end.

Reads RUN/config.json, its checkpoints and the validation rows of its dataset. Appends to RUN/evals.jsonl one
line for each checkpoint and source. Killed, it goes on where it was: what stands there for the same inputs
is not computed again.
"""

if __name__ == "__main__":  # before torch, which takes seconds to import
    import configurator

    configurator.quiet_imports()

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

import checkpoint
import config
import configurator
import files
import memorize
import parallel
import run_folder
import steps
import tokenizer as tokenizers
from config import Config, ConfigError
from dataset import Dataset
from model import Transformer
from run_folder import chosen, step_number

PROTOCOL = "nats-over-bytes-2"  # of the numbers in a line; a change of their meaning gives it a new name
LEARNED = 0.6  # of step 0's bits per byte, which --check asks the last checkpoint to be below


# ---- loss -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def nats_of(model: Transformer, rows: np.ndarray, batch_size: int, done=lambda n: None) -> float:
    """Rows (N, T+1) of ids -> the loss of all N x T targets together, in nats; calls done(n) as it goes."""
    device, total = model.embed_tokens.weight.device, 0.0
    for start in range(0, len(rows), batch_size):
        batch = torch.from_numpy(rows[start : start + batch_size].astype(np.int64)).to(device)  # (B, T+1)
        total += model(batch[:, :-1], batch[:, 1:]).item()  # summed over batches in FP64
        done(len(batch))
    return total


def target_bytes(dataset: Dataset, source: str, n_rows: int, tokenizer: tokenizers.Tokenizer) -> np.ndarray:
    """Of a source's first n_rows held-out rows, the bytes of text that every target stands for: (n_rows, T).

    "Hi you", 6 bytes, as the tokens " Hi", " you" and end of text of a SentencePiece model -> 2, 4, 0.
    """
    # The documents that begin in these rows, and their tokens, as far as the dataset has them.
    rows, T = dataset.validation(source), dataset.seq_len
    tokens, text_bytes = dataset.validation_documents(source)
    ends = np.cumsum(tokens)
    n = int(np.searchsorted(ends - tokens, n_rows * T + 1))
    tokens, text_bytes, ends = tokens[:n], text_bytes[:n], ends[:n]
    if not n or ends[-1] <= n_rows * T or tokens.min() < 1:
        raise ConfigError(
            f"{dataset.folder}: the held-out documents of {source} are not those of its held-out rows; "
            f"try: python data.py verify {dataset.folder}"
        )
    starts = ends - tokens
    stream = np.append(rows[0, 0], rows[: -(-(ends[-1] - 1) // T), 1:])[: ends[-1]]
    known = np.minimum(ends, len(stream)) - starts  # tokens of each document that are in the stream

    # What each token decodes to, without the space before a document, and without the end of text.
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

    # Bytes of text to a decoded byte. The end of the last document may have been dropped, so that what it
    # decodes to is not known: it takes the ratio of the others together.
    ratio = text_bytes / np.maximum(sums, 1)
    if not whole[-1]:
        ratio[-1] = min(ratio[-1], text_bytes[:-1].sum() / sums[:-1].sum() if n > 1 else 1)
    decoded *= np.repeat(ratio, known)
    return decoded[1 : n_rows * T + 1].reshape(n_rows, T)


def measures(nats: float, n_targets: int, n_bytes: float) -> dict:
    """Summed nats of targets, and the bytes that they stand for together -> the numbers that are reported.

    Of 3 targets with 2, 3 and 0 bytes and 5 ln 2 nats together: loss 5 ln 2 / 3, bits per byte 5 / 5 = 1.
    """
    loss, rounded = nats / n_targets, round(float(n_bytes), 3)  # a row may end within a document
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),  # e^710 is more than a float holds
        "bits_per_byte": nats / math.log(2) / float(n_bytes) if n_bytes else None,  # end-of-text tokens only
        "tokens": n_targets,
        "bytes": int(rounded) if rounded.is_integer() else rounded,
    }


def inputs_of(
    cfg: Config,
    dataset: Dataset,
    c: run_folder.Checkpoint,
    max_rows: int,
    precision: torch.dtype,
    verify: bool = True,
) -> dict:
    """Everything, but for the source, that determines a line: the same inputs give the same result."""
    return {
        "protocol": PROTOCOL,
        "weights_sha256": run_folder.weights_hash(c.state),
        "dataset_sha256": dataset.sha256,  # its manifest holds the hashes of the rows and of the tokenizer
        "max_rows": max_rows,
        "precision": str(precision).removeprefix("torch."),
        **({} if verify else {"verified": False}),  # then these hashes need not be those of what was read
    }


def results(run: Path | str, inputs: dict) -> dict[str, dict]:
    """The lines that stand in evals.jsonl for these inputs, by source."""
    lines = files.read_lines(Path(run) / "evals.jsonl")
    return {
        line["source"]: line for line in lines if line.get("kind") == "loss" and line.get("inputs") == inputs
    }


def held_out(dataset: Dataset, asked: list[str]) -> list[str]:
    """The sources to evaluate: those asked for, by default all that have held-out rows; names the others."""
    n_rows = {source: len(dataset.validation(source)) for source in asked or dataset.sources}
    empty = [source for source in n_rows if not n_rows[source]]
    if empty and asked:
        raise ConfigError(
            f"{dataset.folder} holds out no row of {', '.join(empty)}, so there is no loss to measure; raise "
            "data.validation_fraction and build another dataset, or leave it out of --source"
        )
    if len(empty) == len(n_rows):
        print(f"{dataset.folder} holds out no row of any source: there is no loss to measure", flush=True)
    elif empty:
        print(f"{dataset.folder} holds out no row of {', '.join(empty)}: not evaluated", flush=True)
    return [source for source in dataset.sources if n_rows.get(source)]


def evaluate(
    run: Path | str,
    cfg: Config,
    dataset: Dataset,
    of: list,
    sources: list[str],
    max_rows: int,
    verify: bool = True,
) -> list:
    """Computes what is missing; returns [(checkpoint, {source: line})] with all lines that were asked for.

    sources: [] for all that have held-out rows.
    """
    sources = held_out(dataset, sources)
    rows = {source: dataset.validation(source)[: max_rows or None] for source in sources}
    tokenizer, n_bytes = tokenizers.load(dataset.folder), {}
    device = memorize.here(cfg)
    precision = parallel.precision(cfg.train.precision, device)
    table = []
    with memorize.bar("loss", " rows", len(of) * sum(map(len, rows.values()))) as progress:
        for c in of:
            inputs = inputs_of(cfg, dataset, c, max_rows, precision, verify)
            lines, model = results(run, inputs), None
            for source in sources:
                if source in lines:
                    progress.update(len(rows[source]))
                    continue
                if source not in n_bytes:
                    n_bytes[source] = target_bytes(dataset, source, len(rows[source]), tokenizer).sum()
                model = model or checkpoint.load_model(c.path, device, verify)
                start = time.perf_counter()
                with parallel.autocast(device, precision):
                    nats = nats_of(model, rows[source], cfg.eval.batch_size, progress.update)
                seconds = time.perf_counter() - start
                lines[source] = {
                    "format": 1,
                    "kind": "loss",
                    "checkpoint": c.path.name,
                    "step": c.step,
                    "source": source,
                    **measures(nats, rows[source][:, 1:].size, n_bytes[source]),
                    "rows": len(rows[source]),
                    "seconds": round(seconds, 3),
                    "inputs": inputs,
                }
                files.append(Path(run) / "evals.jsonl", lines[source])
            table.append((c, {source: lines[source] for source in sources}))
    return table


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


def check(run: Path | str, cfg: Config, dataset: Dataset, max_rows: int) -> list[str]:
    """Problems of a finished run, [] when there is none: what a demo asks of its own result.

    Held-out text of every source is compressed better than the config expects, and far better than by step 0
    (but for sources that hold nothing out); every chunk has its checkpoint; every checkpoint is scored on
    every chunk, and the counts add up.
    """
    of = chosen(run)
    precision = parallel.precision(cfg.train.precision, memorize.here(cfg))
    problems = []

    first, last = (results(run, inputs_of(cfg, dataset, c, max_rows, precision)) for c in (of[0], of[-1]))
    expected = cfg.eval.expect_bits_per_byte
    problems += [
        f"eval.expect_bits_per_byte names {s!r}, no source" for s in expected if s not in dataset.sources
    ]
    held = [s for s in dataset.sources if len(dataset.validation(s))]
    problems += [
        f"eval.expect_bits_per_byte names {s!r}, which has no held-out row"
        for s in dataset.sources
        if s in expected and s not in held
    ]
    unbound = [s for s in held if s not in expected] if expected else []
    problems += [f"eval.expect_bits_per_byte names no bound for {s!r}" for s in unbound]
    if of[0].step != 0:
        problems.append("there is no checkpoint of step 0")
    for source in held:
        if source not in first or source not in last:
            problems.append(
                f"{source}: the first or the last checkpoint is not evaluated; run without --source"
            )
            continue
        before, after = (line[source]["bits_per_byte"] for line in (first, last))
        if before is None or after is None:
            problems.append(f"{source}: its held-out rows stand for no text")
            continue
        if not after < expected.get(source, math.inf):
            problems.append(f"{source}: {after:.4f} bits per byte, expected below {expected[source]}")
        if not after < LEARNED * before:
            problems.append(
                f"{source}: {after:.4f} bits per byte, not below {LEARNED:.0%} of step 0's {before:.4f}"
            )

    # A step ends every chunk whose last row is in its batch. The rows at the end that fill no batch are never
    # trained on, so the last step ends their chunk.
    chunks, ended = [dataset.chunk_range(chunk) for chunk in range(dataset.n_chunks)], set()
    for c in of:
        plan = steps.of(cfg, dataset.n_rows, c.state.get("order"))
        at = {
            chunk: min(plan.step_after(row), plan.n_steps) for chunk, row in plan.chunk_ends(chunks).items()
        }
        step = min(plan.step_after(c.state["rows"]), plan.n_steps)
        ended |= {chunk for chunk in at if at[chunk] == step}
    problems += [
        f"chunk {chunk} has no checkpoint" for chunk in range(dataset.n_chunks) if chunk not in ended
    ]
    asked = memorize.parts(dataset, cfg.eval)
    same = memorize.same_texts(dataset, asked)
    for c in of:
        lines = memorize.results(c, memorize.inputs_of(cfg, dataset, c, precision))
        seen = memorize.seen_by(c.state, asked, same)
        for part in asked:
            line, name = lines.get(part.chunk), f"{c.path.name}, memorization of {part.chunk}"
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
    folder = checkpoint.model_folder(args.run, verify=args.verify)
    dataset = Dataset(args.dataset, args.verify)
    if args.checkpoint or args.check:
        raise ConfigError(
            "--dataset is for a model folder; --checkpoint and --check are for a run, without it"
        )
    tokenizer = tokenizers.load(dataset.folder)
    tokenizers.check_same(folder, dataset.folder)
    sources = held_out(dataset, args.source)
    cfg = Config()
    device = memorize.here(cfg)
    model = checkpoint.load_model(folder, device, args.verify)
    if dataset.seq_len > model.cfg.seq_len or dataset.vocab_size > model.cfg.vocab_size:
        raise ConfigError(
            f"{args.dataset} has rows of {dataset.seq_len} tokens and {dataset.vocab_size} ids; {folder} was "
            f"trained on {model.cfg.seq_len}, and knows {model.cfg.vocab_size}"
        )
    lines = {}
    for source in sources:
        rows = dataset.validation(source)[: args.max_rows or None]
        n_bytes = target_bytes(dataset, source, len(rows), tokenizer).sum()
        with memorize.bar(source, " rows", len(rows)) as progress:
            with parallel.autocast(device, parallel.precision("auto", device)):
                nats = nats_of(model, rows, cfg.eval.batch_size, progress.update)
        lines[source] = measures(nats, rows[:, 1:].size, n_bytes)
    if lines:
        print(show([(run_folder.Checkpoint(folder, 0, {}), lines)]))


def run_eval(args: argparse.Namespace) -> list[str]:
    """All that was asked for; returns the problems that --check finds."""
    if args.max_rows is not None and args.max_rows < 0:
        raise ConfigError(f"--max_rows {args.max_rows}: use 0 for all rows, or a number of rows")
    if args.check and not args.verify:
        raise ConfigError(
            "--check says whether a run is whole, which needs its hashes: leave --no-verify out"
        )
    if args.dataset:
        eval_folder(args)
        return []
    of = chosen(args.run, args.checkpoint)
    cfg = config.load_run(args.run)
    dataset = memorize.dataset_of(args.run, cfg, of, args.verify)
    max_rows = cfg.eval.max_rows if args.max_rows is None else args.max_rows
    table = evaluate(args.run, cfg, dataset, of, args.source, max_rows, args.verify)
    if any(lines for _, lines in table):
        print(show(table), flush=True)
    if args.memorization:
        print("\n" + memorize.show(memorize.memorize(cfg, dataset, of, verify=args.verify)), flush=True)
    return check(args.run, cfg, dataset, max_rows) if args.check else []


@configurator.script
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN|FOLDER")
    parser.add_argument("--dataset", help="for a model folder that is in no run: whose held-out rows to read")
    parser.add_argument(
        "--checkpoint", type=step_number, nargs="+", default=[], metavar="STEP", help="default: all"
    )
    parser.add_argument("--source", nargs="+", default=[], help="default: all")
    parser.add_argument(
        "--max_rows", type=int, help="of each source, its first ones; 0: all; default: eval.max_rows"
    )
    parser.add_argument("--no-memorization", dest="memorization", action="store_false", help="loss only")
    parser.add_argument(
        "--check", action="store_true", help="exit 1, saying why, unless the run is whole and good enough"
    )
    configurator.add_no_verify(parser)
    args = parser.parse_args()
    problems = run_eval(args)  # after Ctrl-C, every result that was finished stands in the run folder
    for problem in problems:
        print(f"check failed: {problem}", file=sys.stderr)
    if args.check and not problems:
        print(
            "\ncheck passed: bits per byte as expected where text is held out, "
            "every chunk has its checkpoint and its scores"
        )
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
