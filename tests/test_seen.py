"""seen.py against plain Python sets of (source, document, token), in real datasets and one made by hand."""

import contextlib
import dataclasses
import io
import json
import math
import random
import re

import conftest
import numpy as np
import pytest
from test_data import byte_tokenizer

import config
import data
import figures
import files
import incidents
import measure
import memorize
import optim
import report
import results
import run_folder
import seen
import steps
from config import Config, Data, Eval, Model, Source, Stage, Tokenizer, Train
from dataset import Dataset
from model import Transformer

T = 11  # tokens of a row


def build(folder, sources, stages, n_documents=23, n_chunks=3, held_out=0.2):
    """A dataset of small Python files, with docstrings, whose tokens are their bytes."""
    dice = random.Random(7)
    (folder / "text").mkdir(parents=True, exist_ok=True)
    for i in range(n_documents):
        words = [
            dice.choice(["goat", "sheep", "owl", "é"]) + str(dice.randrange(99)) for _ in range(2 + i % 5)
        ]
        text = f'"""{" ".join(words)}"""\n' * (i % 7 > 0) + f"x = {i**3}\n" * (1 + i % 4)
        (folder / "text" / f"{i}.py").write_text(text, encoding="utf-8")
    cfg = Config(
        model=Model(vocab_size=257, seq_len=T, d_model=16, n_layers=1, n_heads=2, d_ff=24),
        tokenizer=Tokenizer(path=str(byte_tokenizer(folder / "tokenizer")), eot="<|endoftext|>"),
        data=Data(
            sources=tuple(
                dataclasses.replace(s, paths=tuple(str(folder / p) for p in s.paths)) for s in sources
            ),
            stages=stages, n_chunks=n_chunks, validation_fraction=held_out, workers=1,
        ),
        train=Train(batch_size=3, micro_batch_size=3, device="cpu"),
        eval=Eval(prompt_tokens=4, continuation_tokens=5, rows_per_chunk=17, generate_batch_size=32),
        run=str(folder / "run"),
        dataset=str(folder / "dataset"),
    ).resolved()  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        data.build(cfg)
    return cfg, Dataset(cfg.dataset)


class ByHand:
    """The tokens that every position trains on, from the tables and the lists of documents alone."""

    def __init__(self, d: Dataset):
        self.d, self.rows = d, {}
        m = d.manifest
        for i, stage in enumerate(m["stages"]):
            table = np.load(d.folder / "documents" / f"{stage['name']}.npy").tolist()
            stream = []
            for start, end, source, number in zip(table[0], table[0][1:], table[1], table[2]):
                stream += [(d.sources[source], number, token) for token in range(end - start)]
            assert len(stream) == stage["tokens"]
            for row in range(stage["rows"]):
                for epoch in range(stage["repeats"]):
                    position = int(d.position_of(i, epoch, [row])[0])
                    self.rows[position] = frozenset(stream[row * T + 1 : row * T + T + 1])
        assert sorted(self.rows) == list(range(d.n_rows))
        self.ids = {}
        for source in d.sources:
            lines = (d.folder / "documents" / f"{source}.jsonl").read_text().splitlines()
            self.ids |= {(source, n): json.loads(line)["id"] for n, line in enumerate(lines)}

    def seen(self, consumed, same_files=()):
        """The positions that a run has seen after it trained on the positions `consumed`, in their order."""
        tokens = frozenset().union(*(self.rows[p] for p in consumed))
        read = {(source, self.ids[source, number]) for source, number, _ in tokens}
        return [
            any(
                target in tokens
                or any((other, self.ids[target[:2]]) in read for other in same_files if other != target[0])
                for target in self.rows[p]
            )
            for p in range(self.d.n_rows)
        ]


def some_states(dice, n_rows, chunks):
    """(state, positions that moved the weights) as train.py leaves them: deferred, rolled back, skipped."""
    for step in sorted(dice.sample(range(1, 14), 6)) + [n_rows // 9]:
        plan = steps.Steps(((0, n_rows),), batch_size=max(1, n_rows // 41))
        kind = dice.choice(["plain", "deferred", "rolled back", "skipped"])
        if kind == "deferred":
            plan = incidents.deferred(plan, step // 2, chunks[dice.randrange(len(chunks))]) or plan
        elif kind == "rolled back":
            plan = incidents.without(plan, step // 2, step // 2 + 2)
        skipped = [pair for s in (0, step - 1) for pair in plan.batch(s)] if kind == "skipped" else []
        consumed = [p for a, b in plan.ranges for p in range(a, b)][: plan.consumed(step)]
        moved = [p for p in consumed if not any(a <= p < b for a, b in skipped)]
        state = {"rows": plan.consumed(step), "order": [list(pair) for pair in plan.ranges]}
        yield {**state, "skipped": [list(pair) for pair in skipped]}, moved


PLAIN = Source("plain", paths=("text",))
AGAIN = Source("again", paths=("text/*.py",))
ENGLISH = Source("english", paths=("text",), read="docstrings")
TWO_STAGES = (Stage("first", epochs={"plain": 2.4}, repeats=3), Stage("second", epochs={"plain": 1.3}))


@pytest.mark.parametrize(
    ("sources", "stages", "same_files"),
    [
        ((PLAIN,), (Stage(repeats=3),), ()),
        ((PLAIN,), (Stage(epochs={"plain": 2.4}),), ()),
        ((PLAIN,), TWO_STAGES, ()),
        ((PLAIN, ENGLISH), (Stage(epochs={"english": 2, "plain": 0.6}),), ("plain", "english")),
        (
            (ENGLISH, PLAIN, AGAIN),
            (Stage("1", epochs={"plain": 0.5}, repeats=2), Stage("2", epochs={"english": 1, "again": 1.7})),
            ("plain", "english", "again"),
        ),
    ],
    ids=["repeats", "epochs", "two stages", "code and its docstrings", "three readings in two stages"],
)  # fmt: skip
def test_a_row_is_seen_when_any_of_its_text_was_trained_on(tmp_path, sources, stages, same_files):
    _, d = build(tmp_path, sources, stages)
    by_hand, dice = ByHand(d), random.Random(3)
    chunks = [d.chunk_range(chunk) for chunk in range(d.n_chunks)]
    same = seen.same_text(d, np.arange(d.n_rows))
    some = sorted(dice.sample(range(d.n_rows), 9))
    shares = []
    for state, moved in some_states(dice, d.n_rows, chunks):
        assert np.flatnonzero(seen.trained(state, np.arange(d.n_rows))).tolist() == sorted(moved)
        expected = by_hand.seen(moved, same_files)
        assert same.by(state).tolist() == expected
        assert seen.same_text(d, some).by(state).tolist() == [expected[p] for p in some]
        shares.append(np.mean(expected) - len(moved) / d.n_rows)
    assert max(shares) > 0.1  # of which a position alone knows nothing
    assert not same.by({"rows": 0}).any() and same.by({"rows": d.n_rows}).all()
    assert seen.same_text(d, []).by({"rows": d.n_rows}).tolist() == []


def test_rows_of_one_pass_do_not_see_one_another(tmp_path):
    """One pass over one source: seen is trained, although neighbouring rows share their border token."""
    _, d = build(tmp_path, (PLAIN,), (Stage(),))
    same = seen.same_text(d, np.arange(d.n_rows))
    for rows in range(0, d.n_rows, 7):
        assert same.by({"rows": rows}).tolist() == [p < rows for p in range(d.n_rows)]
    assert set(zip(same.rows[same.holds].tolist(), same.positions.tolist())) == {
        (p, p) for p in range(d.n_rows)
    }


def test_equal_ids_are_the_same_document_only_where_two_sources_read_the_file(tmp_path):
    for name in ("code/0.txt", "docs/0.txt", "docs/part/0.txt"):
        (tmp_path / "text" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "text" / name).write_text(f"this is {name}")
    for name in ("code/own.jsonl", "docs/own.jsonl"):
        (tmp_path / "text" / name).write_text(json.dumps({"id": "7", "text": f"a line of {name}"}) + "\n")
    paths = {"code": "code", "again": "code/*", "docs": "docs", "own": "docs/own.jsonl"}
    paths |= {"part": "docs/part", "file": "docs/part/0.txt"}
    sources = tuple(Source(name, paths=(f"text/{path}",)) for name, path in paths.items())
    _, d = build(tmp_path, sources, (Stage(),), n_documents=0, n_chunks=1, held_out=0.0)
    lists = [(d.folder / "documents" / f"{name}.jsonl").read_text().splitlines() for name in paths]
    ids = [[json.loads(line)["id"] for line in lines] for lines in lists]
    asked = [(s, n) for s in range(len(ids)) for n in range(len(ids[s]))]
    found = set()
    for i, other, n in seen.read_elsewhere(d, *np.array(asked).T).T.tolist():
        s, number = asked[i]
        found.add(frozenset({(d.sources[s], ids[s][number]), (d.sources[other], ids[other][n])}))
    same = [("code", "0.txt", "again", "0.txt"), ("code", "7", "again", "7"), ("docs", "7", "own", "7")]
    # a file has the id that the first source which reads it gives it
    same += [("docs", "part/0.txt", name, "part/0.txt") for name in ("part", "file")]
    same += [("part", "part/0.txt", "file", "part/0.txt")]
    assert found == {frozenset({(a, x), (b, y)}) for a, x, b, y in same}  # and not "code" with "docs"


def test_a_document_that_was_renamed_is_the_same_in_another_source(tmp_path):
    """repo/README.md and repo/pkg/README.md are both README.md, and so are lines with one id in two files."""
    for name in ("repo/README.md", "repo/pkg/README.md"):
        (tmp_path / "text" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "text" / name).write_text(f"this is {name}, some words")
    for n in (1, 2):
        line = json.dumps({"id": "x", "text": f"the only line of the file {n}"})
        (tmp_path / "text" / f"{n}.jsonl").write_text(line + "\n")
    paths = {
        "pkg": ("repo/pkg",),
        "repo": ("repo",),
        "A": ("1.jsonl", "2.jsonl"),
        "B": ("2.jsonl", "1.jsonl"),
    }
    sources = tuple(Source(name, paths=tuple(f"text/{p}" for p in some)) for name, some in paths.items())
    _, d = build(tmp_path, sources, (Stage(),), n_documents=0, n_chunks=1, held_out=0.0)
    found = set()
    for s, name in enumerate(d.sources):
        for n in range(d.manifest["sources"][name]["documents"]):
            for _, other, m in seen.read_elsewhere(d, np.array([s]), np.array([n])).T.tolist():
                found.add(
                    (name, d.document(name, n)["id"], d.sources[other], d.document(d.sources[other], m)["id"])
                )
    one_way = {("pkg", "README.md", "repo", "README.md#2"), ("A", "x", "B", "x#2"), ("A", "x#2", "B", "x")}
    assert found == one_way | {(c, e, a, b) for a, b, c, e in one_way}


def test_a_pass_that_ends_inside_a_document_holds_only_its_beginning(tmp_path):
    """Documents 4 and 6 of 30 and 27 tokens, a second pass that ends after 15 tokens, and another source."""
    table = [[0, 30, 57, 72, 112], [0, 0, 0, 1, -1], [4, 6, 4, 0, -1]]
    (tmp_path / "documents").mkdir()
    np.save(tmp_path / "documents" / "main.npy", np.array(table))
    stage = {"name": "main", "repeats": 1, "rows": 10, "first_position": 0}
    stage["mixture"] = {"a": {"epochs": 72 / 57, "documents": 3}, "b": {"epochs": 1, "documents": 1}}
    manifest = dict.fromkeys(
        ("row_length", "vocab_size", "eot", "tokenizer", "row_multiple", "file_bytes"), 0
    )
    manifest |= {"format": 2, "seq_len": T, "dtype": "uint16", "seed": 5, "rows": 10, "chunks": []}
    manifest["settings"] = {}
    manifest |= {"sources": {"a": {"documents": 2}, "b": {"documents": 1}}, "stages": [stage]}
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "files": {"documents/main.npy": ""}}))
    d = Dataset(tmp_path, verify=False)
    assert seen.passes(d.manifest, stage) == [(0, 0, 2), (0, 2, 3), (1, 3, 4)]
    # Row r has the stream's tokens 11 r + 1 .. 11 r + 11. Document 4 again: its tokens 0 .. 9 are in row 5
    # (57 .. 66), 10 .. 14 in row 6. Row 2 has its tokens from 23 on, which the second pass has not.
    expected = {0: {0, 5, 6}, 1: {1, 6}, 5: {0, 5}, 6: {0, 1, 6}}
    for row in range(10):
        found = seen.same_text(d, d.position_of(0, 0, [row])).positions
        assert set(d.locate(found)[2].tolist()) == expected.get(row, {row})


# ---- what is recorded and said ----------------------------------------------------------------------------


def saved(cfg, d, step, **state):
    """A checkpoint of a model that learned nothing, after `step` steps of 3 rows."""
    model = Transformer(cfg.model)
    model.init_weights(step)
    hashes = {"dataset_sha256": d.sha256, "tokenizer_sha256": d.manifest["tokenizer"]["sha256"]}
    state = {"step": step, "rows": 3 * step, "tokens": 3 * step * T, "eot": 256, **hashes, **state}
    own = {"tokenizer.json": (d.folder / "tokenizer.json").read_bytes()}
    conftest.save(cfg.run, model, [optim.adamw(model, cfg.optim)], state, own)


def memorized(run, steps=()):
    opened = measure.open_run(run, steps)
    return measure.every(opened, memorize.metric(opened))


@pytest.fixture
def repeated(tmp_path):
    """A small text that is trained on 60 times, and checkpoints after no, one and all repeats."""
    cfg, d = build(tmp_path, (PLAIN,), (Stage(repeats=60),), n_documents=19, n_chunks=20)
    (tmp_path / "run").mkdir()
    files.write_json(tmp_path / "run" / "config.json", {"format": 1, "config": config.to_dict(cfg)})
    once = -(-d.manifest["stages"][0]["rows"] // 3)
    chunk = d.chunk_of(3 * once) - 1
    for step, newest in ((0, -1), (once, chunk), (d.n_rows // 3, 19)):
        saved(cfg, d, step, chunk=newest)
    return cfg, d


def test_after_one_of_sixty_repeats_no_row_is_unseen_and_the_page_says_so(repeated):
    cfg, _ = repeated
    table = memorized(cfg.run)
    for c, lines in table:
        for chunk, line in lines.items():
            assert line["seen"] == [c.step > 0 and isinstance(chunk, int)] * line["total"]
    said = memorize.show(table).splitlines()
    assert [line.split()[3] == "-" for line in said[1:4]] == [False, True, True]
    assert said[4].startswith("A - under unseen") and len(said) == 5

    page = report.write(cfg.run).read_text(encoding="utf-8")
    assert "could not be shown" not in page and "goes by position only" not in page
    words = re.sub(r"\s+", " ", page)
    step = table[1][0].step
    assert f"At 2 checkpoints, first at step {step}, no sampled training row is unseen" in words
    rows = {chunk: line["total"] for chunk, line in table[1][1].items() if isinstance(chunk, int)}
    after = sum(n for chunk, n in rows.items() if chunk > table[1][0].state["chunk"])
    ahead = after + sum(rows.values())  # at step 0 no row is seen, and all are right of the dot
    assert f"Right of the dots, {after:,} of {ahead:,} rows are seen too" in words


def test_lines_of_the_first_protocol_are_shown_with_a_note_until_they_are_measured_again(repeated):
    cfg, _ = repeated
    of = run_folder.chosen(cfg.run)
    memorized(cfg.run)
    for c in of:  # as the version before wrote them
        path = memorize.log_of(c)
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            inputs = {**line["inputs"], "protocol": "first-k+l-greedy-1", "trained_rows": c.state["rows"]}
            del inputs["trained"]
            known = [isinstance(line["chunk"], int) and row < c.state["rows"] for row in line["rows"]]
            line |= {"inputs": inputs, "seen": known}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = results.load(cfg.run)
    assert 'in 63 of 63 lines "unseen" goes by position only' in run.notes[-1][0]  # 3 x (20 + 1)
    assert len(run.matches(of[1].step, "unseen")) > 0
    memorized(cfg.run, [c.step for c in of[:2]])
    run = results.load(cfg.run)
    assert "in 21 of 63 lines" in run.notes[-1][0]
    assert len(run.matches(of[1].step, "unseen")) == 0
    memorized(cfg.run)
    assert not any("position only" in text for text, _ in results.load(cfg.run).notes)
    assert len(memorize.log_of(of[0]).read_text().splitlines()) == 2 * 21  # nothing is deleted


def test_a_result_is_kept_under_the_rows_that_moved_the_weights(repeated):
    cfg, d = repeated
    opened = measure.open_run(cfg.run)
    c = opened.checkpoints[1]
    n = c.state["rows"]

    def inputs(**state):
        changed = c._replace(state={**c.state, **state})
        return measure.inputs_of(opened, memorize.metric(opened), changed)

    deferred = [[0, 6], [9, d.n_rows], [6, 9]]
    different = [inputs(), inputs(order=deferred), inputs(skipped=[[3, 6]]), inputs(rows=n - 3)]
    assert len({json.dumps(each) for each in different}) == 4
    assert inputs()["trained"] == [[0, n]] and inputs(skipped=[[3, 6]])["trained"] == [[0, 3], [6, n]]
    assert inputs(order=deferred)["trained"] == [[0, 6], [9, n + 3]]
    # an order that changes only what comes later changes nothing yet
    assert inputs(order=[[0, n + 3], [n + 6, d.n_rows]]) == inputs(order=None) == inputs()


def test_chunks_with_seen_and_unseen_rows_are_drawn_as_two_means(repeated):
    cfg, _ = repeated
    memorized(cfg.run)
    run = results.load(cfg.run)
    step = [*run.scores][1]
    run.scores = {step: {chunk: run.scores[step][chunk] for chunk in (0, 1, 2, 3)}}
    run.checkpoints = [{**state, "chunk": 1} for state in run.checkpoints]
    for chunk, (matches, kinds) in enumerate(
        [([5, 3], "ss"), ([2, 4], "ss"), ([5, 1, 0], "suu"), ([1, 2], "uu")]
    ):
        kind = np.array([{"s": "seen", "u": "unseen"}[letter] for letter in kinds])
        run.scores[step][chunk] |= {"matches": np.array(matches), "kind": kind}
    figure, _ = figures.draw_chunks(run, [step], pool=1)
    dashed, solid, dot = (line.get_xydata() for line in figure.axes[0].lines[:3])
    assert dashed[:, 0].tolist() == solid[:, 0].tolist() == [0, 1, 2, 3]
    assert dashed[:, 1] == pytest.approx([0.8, 0.6, 0.1, 0.3])
    assert solid[:, 1] == pytest.approx([0.8, 0.6, 1.0, math.nan], nan_ok=True)
    assert dot.tolist() == [pytest.approx([1, 0.6])]
