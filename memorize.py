"""The memorization score: how much of its training text a checkpoint can recite.

    python memorize.py runs/demo                                # every checkpoint x every chunk
    python memorize.py runs/demo --checkpoint 640 --chunks 0 3  # some of them

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

Otherwise it is unseen, and what the checkpoint gets right of it is prediction. Two neighbouring rows of one
pass share a border token, which is a target of only one of them: they are not the same text. Nor are two
documents with the same words: copies are not looked for. Rows of held-out documents are the control: they
are never seen. Where a checkpoint has seen all training rows, they are what is left to compare with.

Reads RUN/config.json, its checkpoints and its dataset. Appends to RUN/memorization/step-00000640.jsonl one
line a chunk, as soon as it is known: the matches of every single row, and the documents of those recited in
full. Killed, it goes on where it was: what stands there for the same inputs is not computed again.

Speed: the cache and large batches, nothing else. A step of greedy decoding reads each matrix once for all
rows, so rows of small chunks are decoded together. Reading a row's true text in one forward, and decoding
only from the first wrong token on, gives the same counts; but it costs l - 1 more positions a row to save the
few steps before that error, and is slower unless most rows are recited. Rounding differs between batch sizes
and machines, so counts may differ where two logits are equal but for rounding.
"""

if __name__ == "__main__":  # before torch, which takes seconds to import
    import configurator

    configurator.quiet_imports()

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import config
import configurator
import files
import hardware
import parallel
import run_folder
from config import Config, ConfigError
from dataset import Dataset, unshuffle
from model import Transformer
from run_folder import chosen, step_number
from sample import generate
from seen import SameText, same_text
from steps import trained_ranges

# Of scoring, of drawing rows, and of what is seen; a change of any of them gives it a new name. In
# "first-k+l-greedy-1" seen went by position: a row that an earlier pass had trained on could be unseen.
PROTOCOL = "first-k+l-greedy-2"
BEST = 10  # rows of a chunk whose documents are written down although they are not recited in full
GROUP_ROWS = 1000  # decoded between two writes, from as many small chunks as it takes: one of Amber's chunks


class Part(NamedTuple):
    """Rows of one chunk, or of one source's held-out rows, that are scored."""

    chunk: int | str  # 3, or "validation:code"
    rows: np.ndarray  # sorted: positions in training order, or numbers of validation rows


# ---- which rows -------------------------------------------------------------------------------------------


def draw(n_rows: int, n: int, key: str) -> np.ndarray:
    """n of n_rows row numbers, sorted: those which a shuffle with this key puts first; all if n_rows < n."""
    return np.sort(unshuffle(np.arange(min(n, n_rows)), n_rows, key)) if n_rows else np.empty(0, np.int64)


def parts(dataset: Dataset, cfg: config.Eval, chunks: list[int] | None = None) -> list[Part]:
    """What every checkpoint is asked: rows of every chunk, or of `chunks`, and held-out rows by source."""
    known = range(dataset.n_chunks)
    for chunk in chunks or []:
        if chunk not in known:
            raise ConfigError(f"{dataset.folder} has no chunk {chunk}; it has 0 to {dataset.n_chunks - 1}")
    found = []
    for chunk in sorted(set(known if chunks is None else chunks)):
        first, end = dataset.chunk_range(chunk)
        found.append(
            Part(chunk, first + draw(end - first, cfg.rows_per_chunk, f"{cfg.seed}/memorization/{chunk}"))
        )
    for source in dataset.sources:
        name, n_rows = f"validation:{source}", len(dataset.validation(source))
        found.append(Part(name, draw(n_rows, cfg.rows_per_chunk, f"{cfg.seed}/memorization/{name}")))
    return [part for part in found if len(part.rows)]


def texts(dataset: Dataset, part: Part, length: int) -> np.ndarray:
    """The first `length` tokens of a part's rows: int64 (rows, length)."""
    if isinstance(part.chunk, str):
        rows = dataset.validation(part.chunk.removeprefix("validation:"))
        return rows[part.rows, :length].astype(np.int64)
    return np.stack([dataset.rows(int(position), 1)[0, :length] for position in part.rows])


def same_texts(dataset: Dataset, asked: list[Part]) -> SameText:
    """Where the text of all training rows among the parts is trained on; the same for every checkpoint."""
    rows = [part.rows for part in asked if not isinstance(part.chunk, str)]
    return same_text(dataset, np.concatenate([np.empty(0, np.int64), *rows]))


def seen_by(state: dict, asked: list[Part], same: SameText) -> dict[int | str, np.ndarray]:
    """Which rows of each part a checkpoint has seen, by its state.json; `same` is what same_texts gave."""
    seen, out = same.by(state), {}
    for part in asked:
        n = len(part.rows)
        if isinstance(part.chunk, str):
            out[part.chunk] = np.zeros(n, bool)  # held out
        else:
            out[part.chunk], seen = seen[:n], seen[n:]
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
    """Rows (N, k + l) -> of each, how many of its last l tokens greedy decoding of its first k gives: (N).

    On a processor each core decodes rows of its own, batch_size at once: a step is a hundred products too
    small to be shared out, and cores that share them wait for one another, and for any other program that
    has one of them. Calls done(n) when n more rows are decoded.
    """
    device = model.embed_tokens.weight.device
    threads = torch.get_num_threads() if device.type == "cpu" else 1

    def count(part: np.ndarray) -> np.ndarray:
        truth = torch.from_numpy(part).to(device)  # (B, k + l)
        with parallel.autocast(device, precision):  # here, for a thread does not inherit it
            made = generate(model, truth[:, :k], truth.shape[1] - k)
        return (made[:, k:] == truth[:, k:]).sum(1).cpu().numpy()

    # All cores have the same number of parts, and all parts the same number of rows.
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


def inputs_of(
    cfg: Config, dataset: Dataset, c: run_folder.Checkpoint, precision: torch.dtype, verify: bool = True
) -> dict:
    """Everything that determines the lines of a checkpoint: the same inputs give the same result."""
    return {
        "protocol": PROTOCOL,
        "weights_sha256": run_folder.weights_hash(c.state),
        "dataset_sha256": dataset.sha256,
        "trained": [list(pair) for pair in trained_ranges(c.state)],  # which rows are seen follows from it
        "prompt_tokens": cfg.eval.prompt_tokens,
        "continuation_tokens": cfg.eval.continuation_tokens,
        "rows_per_chunk": cfg.eval.rows_per_chunk,
        "seed": cfg.eval.seed,
        "precision": str(precision).removeprefix("torch."),
        **({} if verify else {"verified": False}),  # then these hashes need not be those of what was read
    }


def log_of(c: run_folder.Checkpoint) -> Path:
    """RUN/memorization/step-....jsonl of a checkpoint of RUN."""
    return c.path.parents[1] / "memorization" / f"{c.path.name}.jsonl"


def results(c: run_folder.Checkpoint, inputs: dict) -> dict[int | str, dict]:
    """The lines that stand in the run folder for these inputs, by chunk."""
    return {line["chunk"]: line for line in files.read_lines(log_of(c)) if line.get("inputs") == inputs}


def memorize(
    cfg: Config,
    dataset: Dataset,
    of: list[run_folder.Checkpoint],
    chunks: list[int] | None = None,
    verify: bool = True,
) -> list:
    """Computes what is missing; returns [(checkpoint, {chunk: line})] with all lines that were asked for."""
    device = here(cfg)
    precision = parallel.precision(cfg.train.precision, device)
    asked = parts(dataset, cfg.eval, chunks)
    table, same = [], None
    with bar("memorization", " rows", len(of) * sum(len(part.rows) for part in asked)) as progress:
        for c in of:
            inputs = inputs_of(cfg, dataset, c, precision, verify)
            lines = results(c, inputs)
            progress.update(sum(len(part.rows) for part in asked if part.chunk in lines))
            if pending := [part for part in asked if part.chunk not in lines]:
                log_of(c).parent.mkdir(exist_ok=True)
                model = checkpoint.load_model(c.path, device, verify)
                same = same or same_texts(dataset, asked)
                seen = seen_by(c.state, asked, same)
                for group in groups(pending):
                    score(cfg.eval, dataset, c, model, group, seen, inputs, precision, progress.update)
                lines = results(c, inputs)
            table.append((c, {part.chunk: lines[part.chunk] for part in asked}))
    return table


def groups(pending: list[Part]) -> list[list[Part]]:
    """Consecutive parts that are decoded together: as many as reach GROUP_ROWS rows."""
    out, n = [], GROUP_ROWS
    for part in pending:
        if n >= GROUP_ROWS:
            out.append([])
            n = 0
        out[-1].append(part)
        n += len(part.rows)
    return out


def score(
    cfg: config.Eval,
    dataset: Dataset,
    c: run_folder.Checkpoint,
    model: Transformer,
    group: list[Part],
    seen: dict[int | str, np.ndarray],
    inputs: dict,
    precision: torch.dtype,
    done: Callable[[int], object],
) -> None:
    """Decodes the rows of a group together and appends a line for each of its parts."""
    k, l = cfg.prompt_tokens, cfg.continuation_tokens
    rows = np.concatenate([texts(dataset, part, k + l) for part in group])
    counts = count_matches(model, rows, k, cfg.generate_batch_size, precision, done)
    for part, matches in zip(group, np.split(counts, np.cumsum([len(part.rows) for part in group])[:-1])):
        record = {
            "format": 1,
            "checkpoint": c.path.name,
            "step": c.step,
            "chunk": part.chunk,
            "prompt_tokens": k,
            "continuation_tokens": l,
            "rows": part.rows.tolist(),
            "matches": matches.tolist(),
            "documents": whose(dataset, part, matches, l, k + l),
            "seen": seen[part.chunk].tolist(),
            "full": int((matches == l).sum()),
            "total": len(matches),
            "score": float(matches.mean() / l),
            "inputs": inputs,
        }
        files.append(log_of(c), record)


def whose(dataset: Dataset, part: Part, matches: np.ndarray, full: int, length: int) -> list[list]:
    """Whose text a part's rows begin with: [(source, id), ...] of each row's first `length` tokens.

    Only of the rows that are recited in full, and of the BEST with the most matches, so that a log stays
    small; [] for the others, and for held-out rows, which have no table.
    """
    if isinstance(part.chunk, str):
        return [[] for _ in matches]
    named = {*np.argsort(-matches, kind="stable")[:BEST].tolist(), *np.flatnonzero(matches == full).tolist()}
    names = [[] for _ in matches]
    for i in named:
        spans = dataset.documents(int(part.rows[i]))
        names[i] = [(source, id) for source, id, first, _ in spans if first < length]
    return names


# ---- the command line -------------------------------------------------------------------------------------


def here(cfg: Config) -> torch.device:
    """Where results are computed: a run made on a CPU stays there; any other takes a GPU if there is one."""
    table = {"auto": "auto", "cpu": "cpu", "cuda": "auto"}
    device = parallel.device(config.choose("train.device", cfg.train.device, table))
    if device.type == "cpu":
        hardware.keep_freed_memory()
    return device


def bar(what: str, unit: str, total: int) -> tqdm:
    return tqdm(total=total, desc=what, unit=unit, mininterval=1, disable=not sys.stderr.isatty())


def dataset_of(run: Path | str, cfg: Config, of: list[run_folder.Checkpoint], verify: bool = True) -> Dataset:
    """The dataset that a run was trained on. Raises ConfigError where it is gone, or is another one now."""
    # as train.py saw it, else beside this file
    places = [Path(cfg.dataset), Path(__file__).parent / cfg.dataset]
    found = [place for place in places if (place / "manifest.json").exists()]
    if not found:
        raise ConfigError(
            f"{run} was trained on the dataset {cfg.dataset}, which is not here; build it with data.py"
        )
    dataset = Dataset(found[0], verify)
    for c in of:
        lacks = [name for name in run_folder.NEEDED if name not in c.state]
        run_folder.refuse(c.path, [f"state.json lacks {name}" for name in lacks])
        for name, now in (
            ("dataset", dataset.sha256),
            ("tokenizer", dataset.manifest["tokenizer"]["sha256"]),
        ):
            if c.state[f"{name}_sha256"] != now:
                raise ConfigError(
                    f"{c.path} was trained with another {name} than the one in {found[0]} "
                    f"({c.state[f'{name}_sha256'][:12]}, not {now[:12]}); restore the one it was trained with"
                )
    return dataset


def show(table: list[tuple[run_folder.Checkpoint, dict]]) -> str:
    """Mean scores, one line a checkpoint: seen rows, those of the newest chunk, unseen and held-out rows."""
    lines = [f"{'checkpoint':<14} {'seen':>8} {'newest':>8} {'unseen':>8} {'held out':>8}   recited in full"]
    all_seen = False
    for c, by_chunk in table:
        matches, seen, kind, length = [], [], [], 1
        for chunk, line in by_chunk.items():
            matches += line["matches"]
            seen += line["seen"]
            kind += ["held out" if isinstance(chunk, str) else chunk] * line["total"]
            length = line["continuation_tokens"]
        matches, seen, kind = np.array(matches), np.array(seen, bool), np.array(kind, object)
        newest = kind == c.state["chunk"]
        means = [
            matches[rows] for rows in (seen, newest & seen, ~seen & (kind != "held out"), kind == "held out")
        ]
        cells = [f"{rows.mean() / length:8.4f}" if rows.size else f"{'-':>8}" for rows in means]
        full = int((matches[seen] == length).sum())
        lines.append(f"{c.path.name:<14} {' '.join(cells)}   {full:,} / {int(seen.sum()):,}")
        all_seen |= bool(seen.any()) and not means[2].size
    if all_seen:
        lines.append(
            "A - under unseen: the text of all rows has been trained on; compare seen with held out."
        )
    return "\n".join(lines)


@configurator.script
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN")
    parser.add_argument(
        "--checkpoint", type=step_number, nargs="+", default=[], metavar="STEP", help="default: all"
    )
    parser.add_argument(
        "--chunks", type=int, nargs="+", metavar="N", help="only these, and held-out rows; default: all"
    )
    configurator.add_no_verify(parser)
    args = parser.parse_args()
    of = chosen(args.run, args.checkpoint)
    cfg = config.load_run(args.run)
    dataset = dataset_of(args.run, cfg, of, args.verify)
    print(show(memorize(cfg, dataset, of, args.chunks, args.verify)))


if __name__ == "__main__":
    main()
