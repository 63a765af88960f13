"""The memorization score: how much of its training text a checkpoint can recite.

    python memorize.py runs/demo                                # every checkpoint x every chunk
    python memorize.py runs/demo --checkpoint 605 --chunks 0 3  # some of them

The protocol is that of Analysis360 (LLM360 section 4.3; Biderman et al. 2023). A row's first k tokens are the
prompt. Greedy decoding continues it by exactly l tokens; an end-of-text token in between does not stop it.

    score = (positions i of the l at which the i-th new token is the i-th true one) / l

There is no re-synchronisation after an error. A row with score 1 is "k-extractible" (Carlini et al. 2022).
Prompts start wherever the row starts, usually in the middle of a document. From each chunk n rows are drawn,
the same ones for every checkpoint: the first n rows of a shuffle of the chunk keyed by (seed, chunk), or all
where it has fewer. k, l, n and the seed are the run's eval settings.

A row is `seen` when the run has trained on the text of any of its target tokens before this checkpoint:

    - on the same row of the stage, in any repeat of the stage;
    - on the same part of the same document, in another pass over its source, in this stage or another one;
      the document is cut into other rows there, so it is enough that the two rows share a target token;
    - on the same document through another source that reads the same files, on whatever part of it, because
      two readings of a file (code, and its docstrings) cannot be aligned.

Otherwise it is unseen, and the tokens of it that the checkpoint gets right are prediction. Two neighbouring
rows of one pass share a border token, which is a target of only one of them: they are not the same text. Two
documents with the same words are not the same text either: such duplicates are not searched for. Validation
rows are never seen: compare with them, above all when a checkpoint has seen all training rows.

Reads RUN/config.json, its checkpoints and its dataset. Appends to RUN/memorization/step-00000640.jsonl one
line per chunk: the matches of every single row, and the documents of those recited in full. Results are kept
and continued as measure.py says, and torchrun spreads the work over all GPUs:

    torchrun --nproc_per_node=8 -- memorize.py runs/demo

Speed comes from the key/value cache and large batches. A step of greedy decoding reads each matrix once for
all rows, so the rows of small chunks are decoded together. We rejected this alternative: read a row's true
text in one forward, and decode only from its first wrong token on. The counts are the same, but it costs
l - 1 more positions per row to save the few steps before that token, so it is slower unless most rows are
recited.
Rounding differs between batch sizes and machines, so counts can differ where two logits are almost equal.
"""

if __name__ == "__main__":  # before torch, which takes seconds to import
    import configurator

    configurator.quiet_imports()

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import config
import configurator
import measure
import parallel
from config import ConfigError
from dataset import Dataset, unshuffle
from model import Transformer
from run_folder import Checkpoint
from sample import generate
from seen import SameText, same_text, trained_ranges

# This names the rules for scoring, for drawing rows and for what is seen; a change of any of them needs a new
# name. In "first-k+l-greedy-1" only positions were seen: a row whose text was in an earlier pass was unseen.
PROTOCOL = "first-k+l-greedy-2"
BEST = 10  # rows of a chunk whose documents are written down although they are not recited in full
GROUP_ROWS = 1000  # rows decoded between two writes, from small chunks together: the size of Amber's samples


class Part(NamedTuple):
    """Rows of one chunk, or of one source's validation rows, that are scored."""

    chunk: int | str  # 3, or "validation:code"
    rows: np.ndarray  # sorted: positions in training order, or numbers of validation rows

    @property
    def source(self) -> str | None:
        """The source of validation rows; None for training rows."""
        return self.chunk.removeprefix("validation:") if isinstance(self.chunk, str) else None


# ---- which rows -------------------------------------------------------------------------------------------


def draw(n_rows: int, n: int, key: str) -> np.ndarray:
    """n of n_rows row numbers, sorted: those that a shuffle with this key puts first; all if n_rows < n."""
    if not n_rows:
        return np.empty(0, np.int64)
    return np.sort(unshuffle(np.arange(min(n, n_rows)), n_rows, key))


def parts(dataset: Dataset, cfg: config.Eval, chunks: list[int] | None = None) -> list[Part]:
    """The rows that every checkpoint is scored on: of every chunk, or of `chunks`; and of every source."""
    all_chunks = range(dataset.n_chunks)
    for chunk in chunks or []:
        if chunk not in all_chunks:
            raise ConfigError(f"{dataset.folder} has no chunk {chunk}; it has 0 to {dataset.n_chunks - 1}")

    found = []
    for chunk in sorted(set(all_chunks if chunks is None else chunks)):
        first, end = dataset.chunk_range(chunk)
        drawn = draw(end - first, cfg.rows_per_chunk, f"{cfg.seed}/memorization/{chunk}")
        found.append(Part(chunk, first + drawn))
    for source in dataset.sources:
        name, n_rows = f"validation:{source}", len(dataset.validation(source))
        found.append(Part(name, draw(n_rows, cfg.rows_per_chunk, f"{cfg.seed}/memorization/{name}")))
    return [part for part in found if len(part.rows)]


def texts(dataset: Dataset, part: Part, length: int) -> np.ndarray:
    """The first `length` tokens of a part's rows: int64 (rows, length)."""
    if part.source is not None:
        return dataset.validation(part.source)[part.rows, :length].astype(np.int64)
    return np.stack([dataset.rows(int(position), 1)[0, :length] for position in part.rows])


def same_texts(dataset: Dataset, asked: list[Part]) -> SameText:
    """Where the text of all training rows among the parts is trained on; the same for every checkpoint."""
    rows = [part.rows for part in asked if part.source is None]
    return same_text(dataset, np.concatenate([np.empty(0, np.int64), *rows]))


def seen_by(state: dict, asked: list[Part], same: SameText) -> dict[int | str, np.ndarray]:
    """By chunk, which rows of each part a checkpoint has seen, by its state.json; `same`: see same_texts."""
    seen, out = same.by(state), {}
    for part in asked:
        n = len(part.rows)
        if part.source is None:
            out[part.chunk], seen = seen[:n], seen[n:]
        else:
            out[part.chunk] = np.zeros(n, bool)  # validation rows are never seen
    return out


# ---- the score --------------------------------------------------------------------------------------------


def count_matches(
    model: Transformer,
    rows: np.ndarray,
    k: int,
    batch_size: int,
    precision: torch.dtype = torch.float32,
    done: Callable[[int], object] = lambda n: None,
) -> np.ndarray:
    """Rows (N, k + l) -> (N): how many of a row's last l tokens greedy decoding of its first k gives.

    On a CPU each core decodes rows of its own, batch_size at once. One step is a hundred matmuls that are too
    small to be split; cores that share them wait for one another. Calls done(n) when n more rows are decoded.
    """
    device = model.embed_tokens.weight.device
    threads = torch.get_num_threads() if device.type == "cpu" else 1

    def count(part: np.ndarray) -> np.ndarray:
        truth = torch.from_numpy(part).to(device)  # (B, k + l)
        with parallel.autocast(device, precision):  # a thread does not inherit it
            made = generate(model, truth[:, :k], truth.shape[1] - k)
        return (made[:, k:] == truth[:, k:]).sum(1).cpu().numpy()

    # All cores get the same number of parts, and all parts have the same number of rows.
    n_parts = threads * -(-len(rows) // (threads * batch_size))
    parts = np.array_split(rows, min(n_parts, len(rows)))
    counts = []
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for part in pool.map(count, parts):
            counts.append(part)
            done(len(part))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for parts that have not begun
        torch.set_num_threads(threads)
    return np.concatenate(counts)


def metric(run: measure.Run, chunks: list[int] | None = None) -> measure.Metric:
    """The memorization score as measure.py computes it, on every chunk or on `chunks`."""
    cfg, dataset = run.cfg.eval, run.dataset
    k, l = cfg.prompt_tokens, cfg.continuation_tokens
    asked = {part.chunk: part for part in parts(dataset, cfg, chunks)}

    @functools.cache  # takes a while; not needed if all results are known
    def same() -> SameText:
        return same_texts(dataset, list(asked.values()))

    def score(model: Transformer, c: Checkpoint, chunks: list, done: Callable) -> Iterator[dict]:
        """Decodes the rows of some chunks together; gives the results of each."""
        seen = seen_by(c.state, list(asked.values()), same())
        group = [asked[chunk] for chunk in chunks]
        rows = np.concatenate([texts(dataset, part, k + l) for part in group])
        counts = count_matches(model, rows, k, cfg.generate_batch_size, run.precision, done)
        ends = np.cumsum([len(part.rows) for part in group])
        for part, matches in zip(group, np.split(counts, ends[:-1])):
            yield {
                "prompt_tokens": k,
                "continuation_tokens": l,
                "rows": part.rows.tolist(),
                "matches": matches.tolist(),
                "documents": documents_of(dataset, part, matches, l, k + l),
                "seen": seen[part.chunk].tolist(),
                "full": int((matches == l).sum()),
                "total": len(matches),
                "score": float(matches.mean() / l),
            }

    def inputs(c: Checkpoint) -> dict:
        return {
            "trained": [list(pair) for pair in trained_ranges(c.state)],  # decides which rows are seen
            "prompt_tokens": k,
            "continuation_tokens": l,
            "rows_per_chunk": cfg.rows_per_chunk,
            "seed": cfg.seed,
        }

    n_rows = {chunk: len(part.rows) for chunk, part in asked.items()}
    how = {"key": "chunk", "log": log_of, "group_rows": GROUP_ROWS}
    return measure.Metric("memorization", PROTOCOL, n_rows, score, inputs, **how)


def log_of(c: Checkpoint) -> Path:
    """RUN/memorization/step-....jsonl of a checkpoint of RUN."""
    return c.path.parents[1] / "memorization" / f"{c.path.name}.jsonl"


def documents_of(dataset: Dataset, part: Part, matches: np.ndarray, full: int, length: int) -> list[list]:
    """The documents that a part's rows begin with: [[source, id], ...] of each row's first `length` tokens.

    Given only for the rows that are recited in full and for the BEST with the most matches, so that a log
    stays small. [] for the others, and for validation rows, which have no table of documents.
    """
    names = [[] for _ in matches]
    if part.source is None:
        best = np.argsort(-matches, kind="stable")[:BEST]
        for i in np.union1d(best, np.flatnonzero(matches == full)):
            spans = dataset.documents(int(part.rows[i]))
            names[i] = [(source, id) for source, id, first, _ in spans if first < length]
    return names


# ---- the command line -------------------------------------------------------------------------------------


def show(table: list[tuple[Checkpoint, dict]]) -> str:
    """Mean scores, one line per checkpoint: seen rows, those of its newest chunk, unseen, validation."""
    out = [f"{'checkpoint':<14} {'seen':>8} {'newest':>8} {'unseen':>8} {'validation':>10}   recited in full"]
    all_seen = False
    for c, by_chunk in table:
        # Collect all rows in four arrays: matches, seen or not, validation or not, newest or not.
        matches, seen, validation, newest, length = [], [], [], [], 1
        for chunk, line in by_chunk.items():
            matches += line["matches"]
            seen += line["seen"]
            validation += [isinstance(chunk, str)] * line["total"]
            newest += [chunk == c.state["chunk"]] * line["total"]
            length = line["continuation_tokens"]
        matches = np.array(matches)
        seen, validation, newest = (np.array(flags, bool) for flags in (seen, validation, newest))

        # Compute the means of four columns; "-" where there is no row.
        unseen = ~seen & ~validation
        cells = []
        for width, rows in ((8, seen), (8, newest & seen), (8, unseen), (10, validation)):
            cells.append(f"{matches[rows].mean() / length:{width}.4f}" if rows.any() else f"{'-':>{width}}")
        full = int((matches[seen] == length).sum())
        out.append(f"{c.path.name:<14} {' '.join(cells)}   {full:,} / {int(seen.sum()):,}")
        all_seen |= bool(seen.any() and not unseen.any())
    if all_seen:
        out.append("A - under unseen: all text has been trained on; compare seen with validation.")
    return "\n".join(out)


@configurator.script
def main() -> None:
    parser = measure.arguments(__doc__)
    only = "score only these chunks, and validation rows; default: all"
    parser.add_argument("--chunks", type=int, nargs="+", metavar="N", help=only)
    args = parser.parse_args()
    run = measure.open_run(args.run, args.checkpoint, args.verify)
    measure.say(show(measure.every(run, metric(run, args.chunks))))


if __name__ == "__main__":
    main()
