import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import chunks
import data
import encode
import eval as evaluation
from config import Config, ConfigError, Data, Model, Source, Stage, Tokenizer, Train
from dataset import Dataset, shuffle, unshuffle
from manifest import verify

T, B = 7, 3  # tokens of a row, rows of a batch


def byte_tokenizer(folder: Path, eot: int = 256) -> Path:
    """A tokenizer.json whose ids are the bytes of the text: every expectation can be written by hand."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))  # GPT-2's letters for bytes that do not print
    vocab = {chr(b if b in plain else next(rest)): b for b in range(256)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content = {
        "version": "1.0",
        "added_tokens": [{"id": eot, "content": "<|endoftext|>", "special": True, **flags}],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def texts(name: str, n: int) -> list[str]:
    """Documents of 1 to 59 bytes, all different."""
    return [f"{name}{i}é" * (1 + i * i % 9) for i in range(n)]


def make(folder: Path, **changes) -> Config:
    """A config over two small sources in two files each; `changes` are settings of data, and two others."""
    byte_tokenizer(folder / "tokenizer")
    for name, n in (("a", 97), ("b", 60)):
        for part in (0, 1):
            lines = [
                json.dumps({"id": f"{name}-{i}", "text": t})
                for i, t in enumerate(texts(name, n))
                if i % 2 == part
            ]
            (folder / f"{name}{part}.jsonl").write_text("\n".join(lines) + "\n")
    sources = tuple(Source(name, paths=(str(folder / f"{name}*.jsonl"),)) for name in "ab")
    train, model = (
        Train(batch_size=changes.pop("batch_size", B)),
        Model(vocab_size=changes.pop("vocab_size", 257), seq_len=T),
    )
    tokenizer = Tokenizer(path=str(folder / "tokenizer"), eot="<|endoftext|>")
    settings = {
        "sources": sources,
        "n_chunks": 5,
        "validation_fraction": 0.2,
        "workers": 1,
        "seed": 11,
        "validation_seed": 11,
    }
    config = Config(
        name="test", model=model, tokenizer=tokenizer, train=train, data=Data(**settings | changes)
    )
    return replace(config, dataset=str(folder / "dataset"))


STAGES = (Stage("first", epochs={"a": 2.5}, repeats=2), Stage("second", epochs={"b": 1, "a": 1}))


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> tuple[Config, Dataset]:
    config = make(tmp_path_factory.mktemp("built"), stages=STAGES)
    return config, Dataset(data.build(config))


def for_validation(id: str, fraction: float = 0.2, seed: int = 11) -> bool:
    return hashed(f"{seed}/{id}") < fraction * 2**64


def documents_of(name: str, validation: bool = False) -> list[tuple[str, str, list[int]]]:
    """(source, id, tokens) in reading order: first the even ones, then the odd ones."""
    found = list(enumerate(texts(name, 97 if name == "a" else 60)))
    found = [(f"{name}-{i}", [*text.encode(), 256]) for i, text in found[0::2] + found[1::2]]
    return [(name, id, tokens) for id, tokens in found if for_validation(id) == validation]


def hashed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def mixed(x: int) -> int:
    """The end of MurmurHash3 for 64 bits, in plain Python integers."""
    x = (x ^ x >> 33) * 0xFF51AFD7ED558CCD % 2**64
    x = (x ^ x >> 33) * 0xC4CEB9FE1A85EC53 % 2**64
    return x ^ x >> 33


def a_last_pass(whole: list, wanted: int, stage: str, seeds: str = "11/11") -> list:
    """Documents in keyed order until `wanted` tokens are reached, the last one cut; back in reading order."""
    validation_seed, seed = seeds.split("/")
    ranks = {id: mixed(hashed(f"{validation_seed}/{id}") ^ hashed(f"{seed}/{stage}")) for _, id, _ in whole}
    taken = {}
    for _, id, tokens in sorted(whole, key=lambda document: ranks[document[1]]):
        taken[id] = tokens if len(tokens) <= wanted else [*tokens[: wanted - 1], 256]
        wanted -= len(taken[id])
        if not wanted:
            break
    return [(source, id, taken[id]) for source, id, _ in whole if id in taken]


def stream_of(d: Dataset, stage: int) -> list[tuple[str, str, list[int]]]:
    if stage == 1:
        return documents_of("a") + documents_of("b")
    whole = documents_of("a")
    n_tokens = sum(len(tokens) for *_, tokens in whole)
    return whole + whole + a_last_pass(whole, round(2.5 * n_tokens) - 2 * n_tokens, "first")


# ---- the shuffle ------------------------------------------------------------------------------------------


def reference_shuffle(row: int, n: int, key: str) -> int:
    """The same order in plain Python integers, from the description alone."""
    h = next(h for h in range(1, 99) if 4**h >= n)

    def f(x: int, round: int) -> int:
        return mixed(x ^ hashed(f"{key}/{round}")) % 2**h

    while True:
        left, right = divmod(row, 2**h)
        for round in range(8):
            left, right = right, left ^ f(right, round)
        row = left * 2**h + right
        if row < n:
            return row


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 97, 1000, 4096, 4097])
def test_shuffle_is_a_bijection_and_unshuffle_its_inverse(n):
    for key in ("0/main/0", "0/main/1", "another"):
        order = shuffle(np.arange(n), n, key)
        assert sorted(order) == list(range(n))
        assert (unshuffle(order, n, key) == np.arange(n)).all()
        assert [reference_shuffle(row, n, key) for row in range(min(n, 50))] == order[:50].tolist()


def test_shuffle_is_pinned_because_published_orders_must_not_change():
    assert shuffle([0, 1, 2, 3, 4], 5, "1234/main/0").tolist() == [1, 3, 2, 0, 4]


@pytest.mark.parametrize("n", [2**40, 2**40 - 12345, 2**32 + 1])
def test_shuffle_needs_no_table_for_a_trillion_rows(n):
    rows = np.random.default_rng(0).integers(0, n, 1000)
    order = shuffle(rows, n, "key")
    assert order.min() >= 0 and order.max() < n and (unshuffle(order, n, "key") == rows).all()
    assert [reference_shuffle(int(row), n, "key") for row in rows[:20]] == order[:20].tolist()


def test_shuffle_keeps_shapes_and_refuses_rows_outside():
    assert shuffle(3, 10, "k").shape == () and shuffle([[1, 2], [3, 4]], 10, "k").shape == (2, 2)
    for rows in (-1, 10, [0, 10]):
        with pytest.raises(IndexError, match=r"not within 0 \.\. 9"):
            shuffle(rows, 10, "k")


@pytest.mark.parametrize("n", [10_007, 65_536])
def test_shuffle_looks_like_a_random_permutation(n):
    order = shuffle(np.arange(n), n, "1/main/0")
    # where do the rows of each 20th of the stream go? counts in a 20 x 20 table: chi-square with 19 x 19
    # degrees of freedom has mean 361 and standard deviation 27
    table = np.histogram2d(np.arange(n), order, bins=20)[0]
    assert 361 - 5 * 27 < ((table - n / 400) ** 2 / (n / 400)).sum() < 361 + 5 * 27
    for lag in (1, 2, 16, 255, 256):  # correlation of neighbours' positions: 0 +- 1 / sqrt(n)
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < 5 / n**0.5
    assert (order == np.arange(n)).sum() <= 8  # fixed points: one is expected
    # gaps between a tenth of the rows are geometric: mean 10, std 9.5
    steps = np.diff(np.sort(order[: n // 10]))
    assert abs(steps.std() - 9.5) < 0.7
    other = shuffle(np.arange(n), n, "1/main/1")
    assert abs(np.corrcoef(order, other)[0, 1]) < 5 / n**0.5 and (order == other).sum() <= 8


# ---- what a dataset holds ---------------------------------------------------------------------------------


def test_every_row_is_its_slice_of_the_stream_and_appears_once_an_epoch(built):
    _, d = built
    streams = [[x for *_, tokens in stream_of(d, stage) for x in tokens] for stage in (0, 1)]
    n = [(len(stream) - 1) // T for stream in streams]
    assert d.n_rows == 2 * n[0] + n[1] and n[0] % 2 + n[1] % 2 > 0  # one is odd
    stage, epoch, row = d.locate(np.arange(d.n_rows))
    expected = [(0, e, r) for e in (0, 1) for r in range(n[0])] + [(1, 0, r) for r in range(n[1])]
    assert sorted(zip(stage.tolist(), epoch.tolist(), row.tolist())) == expected
    assert stage.tolist() == sorted(stage) and epoch[: 2 * n[0]].tolist() == [0] * n[0] + [1] * n[0]
    for rows, s, r in zip(d.rows(0, d.n_rows), stage, row):
        assert rows.tolist() == streams[s][r * T : r * T + T + 1]
    assert row[: n[0]].tolist() != row[n[0] : 2 * n[0]].tolist()  # each epoch has an order of its own


def test_locate_and_position_of_are_inverses(built):
    _, d = built
    stage, epoch, row = d.locate(np.arange(d.n_rows))
    for position in range(0, d.n_rows, 13):
        assert d.position_of(int(stage[position]), int(epoch[position]), int(row[position])) == position
    for positions in (-1, d.n_rows):
        with pytest.raises(IndexError):
            d.locate(positions)
    with pytest.raises(IndexError):
        d.position_of(1, 1, 0)


def test_documents_of_a_row_and_positions_of_a_document_agree_with_brute_force(built):
    _, d = built
    places: dict[tuple[str, str], set[int]] = {}
    stage, _, row = d.locate(np.arange(d.n_rows))
    for s in (0, 1):
        owners = [(source, id) for source, id, tokens in stream_of(d, s) for _ in tokens]
        # for each token, its number in its document
        ends = [k for *_, tokens in stream_of(d, s) for k in range(len(tokens))]
        for position in np.flatnonzero(stage == s):
            first = row[position] * T
            expected, pieces = owners[first : first + T + 1], []
            for i, owner in enumerate(expected):
                if not pieces or ends[first + i] == 0:
                    pieces.append([*owner, i, i + 1])
                pieces[-1][3] = i + 1
                places.setdefault(owner, set()).add(int(position))
            assert d.documents(int(position)) == [tuple(piece) for piece in pieces]
    for source, id, _ in documents_of("a") + documents_of("b"):
        assert d.positions(source, id).tolist() == sorted(places.get((source, id), []))
    assert d.positions(*documents_of("a", validation=True)[0][:2]).size == 0
    for source, id in (("a", "b-1"), ("c", "a-1")):
        with pytest.raises(ConfigError, match=r"has no (document|source)"):
            d.positions(source, id)


def test_validation_rows_are_of_documents_that_training_never_sees(built):
    _, d = built
    for name in "ab":
        held = documents_of(name, validation=True)
        stream = [x for *_, tokens in held for x in tokens]
        n = (len(stream) - 1) // T
        assert d.validation(name).tolist() == [stream[r * T : r * T + T + 1] for r in range(n)]
        stated = d.manifest["sources"][name]
        assert stated["validation_documents"] == len(held) and stated["validation_tokens"] == len(stream)
        assert stated["validation_bytes"] == len(stream) - len(held)
        assert (
            stated["validation_rows"] == n and stated["validation_dropped_tokens"] == len(stream) - n * T - 1
        )
    seen = {document[1] for position in range(d.n_rows) for document in d.documents(position)}
    assert seen and not any(for_validation(id) for id in seen)


def test_chunks_split_the_order_at_steps_and_state_their_sources(built):
    _, d = built
    sizes = [chunk["rows"] for chunk in d.manifest["chunks"]]
    assert sum(sizes) == d.n_rows and all(size % B == 0 for size in sizes[:-1])
    assert max(sizes[:-1]) - min(sizes) <= B and sizes[-1] - min(sizes) < 2 * B
    for k, chunk in enumerate(d.manifest["chunks"]):
        first, end = d.chunk_range(k)
        assert (first, end - first) == (chunk["first"], chunk["rows"])
        assert d.chunk_of(first) == d.chunk_of(end - 1) == k
        tokens, met = dict.fromkeys("ab", 0), {"a": set(), "b": set()}
        for position in range(first, end):
            for source, id, begin, stop in d.documents(position):
                tokens[source] += stop - max(begin, 1)
                met[source].add(id)
        assert chunk["sources"] == {
            name: {"tokens": tokens[name], "documents": len(met[name])} for name in "ab"
        }
        assert sum(tokens.values()) == chunk["tokens"] == chunk["rows"] * T
        raw = np.fromfile(d.folder / chunk["file"], "<u2").reshape(-1, T + 1)
        assert (raw == d.rows(first, end - first)).all()
    for call in (lambda: d.chunk_of(d.n_rows), lambda: d.chunk_of(-1), lambda: d.chunk_range(5)):
        with pytest.raises(IndexError):
            call()


def test_batch_is_a_pure_function_that_crosses_chunks(built):
    _, d = built
    everything = d.rows(0, d.n_rows)
    assert everything.dtype == np.int64 and everything.shape == (d.n_rows, T + 1)
    for size in (B, 10, 64):
        for step in reversed(range(d.n_rows // size)):  # in any order
            assert (d.rows(step * size, size) == everything[step * size : (step + 1) * size]).all()
        with pytest.raises(IndexError):
            d.rows(d.n_rows // size * size, size)


def test_counts_in_the_manifest_are_those_of_the_text(built):
    _, d = built
    for name, n in (("a", 97), ("b", 60)):
        kept, stated = documents_of(name), d.manifest["sources"][name]
        assert stated["files"] == 2 and stated["documents"] == len(kept)
        assert stated["documents"] + stated["validation_documents"] == n
        assert stated["tokens"] == sum(len(tokens) for *_, tokens in kept)
        assert stated["bytes"] == stated["tokens"] - len(kept)  # a byte a token, and the end of text
    for stage, stated in enumerate(d.manifest["stages"]):
        tokens = sum(len(tokens) for *_, tokens in stream_of(d, stage))
        assert stated["tokens"] == tokens == sum(part["tokens"] for part in stated["mixture"].values())
        assert stated["dropped_tokens"] == tokens - (stated["rows"] * T + 1) < T
    lines = [json.loads(line) for line in open(d.folder / "documents" / "a.jsonl")]
    assert [line["id"] for line in lines] == [f"a-{i}" for i in [*range(0, 97, 2), *range(1, 97, 2)]]
    assert [line["id"] for line in lines if line["validation"]] == [
        id for _, id, _ in documents_of("a", True)
    ]
    assert [d.document("a", n) for n in range(97)] == lines


def test_the_dataset_is_the_same_for_any_number_of_workers_and_block_sizes(built, tmp_path, monkeypatch):
    config, d = built
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 700)
    monkeypatch.setattr(chunks, "BLOCK_BYTES", 160)
    monkeypatch.setattr(chunks, "BLOCK_DOCUMENTS", 10)
    for workers in (1, 3):
        other = replace(
            config, dataset=str(tmp_path / str(workers)), data=replace(config.data, workers=workers)
        )
        assert Dataset(data.build(other)).sha256 == d.sha256


def tokens_in_chunks(d: Dataset) -> dict[str, int]:
    """Target tokens by source, summed over all chunks."""
    chunks = d.manifest["chunks"]
    return {name: sum(chunk["sources"][name]["tokens"] for chunk in chunks) for name in d.sources}


@pytest.mark.parametrize("weights", [{"b": 3, "a": 1}, {"a": 0.9, "b": 0.1}, {"b": 1}, {"a": 2, "b": 7.7}])
@pytest.mark.parametrize("tokens", [300, 6001])  # less than a pass of either source; many passes
def test_a_stage_gives_every_source_the_tokens_that_its_weights_ask_for(tmp_path, weights, tokens):
    stage = Stage("mix", weights=weights, tokens=tokens)
    d = Dataset(data.build(make(tmp_path, stages=(stage,), n_chunks=3)))
    mixture, got = d.manifest["stages"][0]["mixture"], tokens_in_chunks(d)
    assert sum(part["asked_tokens"] for part in mixture.values()) == tokens
    expected = []
    for name in sorted(weights):
        share, whole = tokens * weights[name] / sum(weights.values()), documents_of(name)
        assert abs(mixture[name]["asked_tokens"] - share) < 1 and abs(got[name] - share) <= T + 1
        assert mixture[name]["tokens"] == mixture[name]["asked_tokens"]
        passes, rest = divmod(mixture[name]["asked_tokens"], sum(len(tokens) for *_, tokens in whole))
        assert mixture[name]["epochs"] == pytest.approx(
            share / sum(len(tokens) for *_, tokens in whole), 0.01
        )
        last = a_last_pass(whole, rest, "mix") if rest else []
        cut = [(id, len(t)) for _, id, t in last if len(t) < len({w[1]: w[2] for w in whole}[id])]
        stated = mixture[name]["cut"]
        assert [(stated["id"], stated["tokens"])] == cut if stated else not cut
        expected += whole * passes + last
    stream = [x for *_, tokens in expected for x in tokens]
    _, _, row = d.locate(np.arange(d.n_rows))
    assert len(row) == (tokens - 1) // T
    for rows, r in zip(d.rows(0, d.n_rows), row):
        assert rows.tolist() == stream[r * T : r * T + T + 1]
    texts_by_id = {
        f"{name}-{i}": text for name, n in (("a", 97), ("b", 60)) for i, text in enumerate(texts(name, n))
    }
    for position in range(0, d.n_rows, 7):  # the table of documents says the same as the rows
        for source, id, first, end in d.documents(position):
            own = bytes(x for x in d.rows(position, 1)[0, first:end].tolist() if x < 256)
            assert own in texts_by_id[id].encode() and position in d.positions(source, id)


def test_one_long_document_gets_the_share_that_it_is_asked_for(tmp_path, capsys):
    (tmp_path / "book.txt").write_text("all in one document, " * 400)  # 8,400 tokens, the other source 2,512
    for name, weight in (("first", 0.3), ("second", 0.7)):
        stage = Stage("mix", weights={"book": weight, "a": 1 - weight}, tokens=5000)
        config = make(tmp_path)
        sources = *config.data.sources, Source("book", paths=(str(tmp_path / "book.txt"),))
        config = replace(config, data=replace(config.data, sources=sources, stages=(stage,)))
        config = replace(config, dataset=str(tmp_path / name))
        d = Dataset(data.build(config))
        assert abs(tokens_in_chunks(d)["book"] - 5000 * weight) <= T + 1
        said = capsys.readouterr().out
        assert f"{100 * weight:.2f}" in said and f"{5000 * weight:,.0f} of " in said  # asked for; the cut


def test_a_source_that_would_get_nothing_is_refused(tmp_path):
    for weight, tokens, says in (
        (1e-6, 900, r"'mix' would get 0 tokens of source 'b'"),
        (0.0055, 910, r"'mix': the 5 tokens of source 'b' would all be dropped .* last 6 tokens"),
    ):
        stage = Stage("mix", weights={"a": 1 - weight, "b": weight}, tokens=tokens)
        refuses(make(tmp_path, stages=(stage,)), says)


def test_the_order_has_a_seed_of_its_own_so_that_runs_in_other_orders_compare(built, tmp_path):
    config, d = built
    other = replace(config, dataset=str(tmp_path / "other"), data=replace(config.data, seed=12))
    other = Dataset(data.build(other))
    for name in "ab":
        assert (other.validation(name) == d.validation(name)).all() and len(d.validation(name))
    assert other.n_rows == d.n_rows and (other.rows(0, 60) != d.rows(0, 60)).any()
    held = replace(config, dataset=str(tmp_path / "held"), data=replace(config.data, validation_seed=12))
    assert Dataset(data.build(held)).validation("a").tolist() != d.validation("a").tolist()


def test_ids_that_come_twice_are_made_unique_counted_and_named(tmp_path, capsys):
    config = make(tmp_path, batch_size=1)
    ids = ["x", "y", "x", "x#2", "x", "y", "z", "x#2", *map(str, range(40))]
    lines = [json.dumps({"id": id, "text": f"{n} is the number of {id}"}) for n, id in enumerate(ids)]
    (tmp_path / "twice.jsonl").write_text("\n".join(lines))
    source = Source("s", paths=(str(tmp_path / "twice.jsonl"),))
    config = replace(config, data=replace(config.data, sources=(source,), validation_fraction=0.3))
    d = Dataset(data.build(config))
    expected = ["x", "y", "x#3", "x#2", "x#4", "y#2", "z", "x#2#2", *map(str, range(40))]
    found = [d.document("s", n) for n in range(48)]
    assert [document["id"] for document in found] == expected
    # copies are for validation together, by the id that they came with
    assert [document["validation"] for document in found] == [for_validation(id, 0.3) for id in ids]
    assert d.manifest["sources"]["s"]["duplicate_ids"] == 4
    assert "4 documents have an id that an earlier document has; they are called x#3, x#4, y#2, x#2#2" in (
        capsys.readouterr().out
    )
    trained = [n for n, document in enumerate(found) if not document["validation"]]
    by_row = {
        n: [p for p in range(d.n_rows) if expected[n] in {x[1] for x in d.documents(p)}] for n in trained
    }
    for n in trained:
        assert by_row[n] and d.positions("s", expected[n]).tolist() == by_row[n]


def test_a_document_that_the_tokenizer_refuses_is_bad_and_does_not_end_the_build(tmp_path, capsys):
    config = make(tmp_path, max_bad_fraction=0.1, n_chunks=2)
    content = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
    del content["model"]["vocab"]["q"]
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(content))
    lines = [json.dumps({"id": str(n), "text": f"text {n}" + " a q in it" * (n == 20)}) for n in range(50)]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    source = Source("s", paths=(str(tmp_path / "q.jsonl"),))
    d = Dataset(data.build(replace(config, data=replace(config.data, sources=(source,)))))
    stated = d.manifest["sources"]["s"]
    assert stated["bad"] == {"refused by the tokenizer": 1}
    assert stated["documents"] + stated["validation_documents"] == 49
    assert "bad: s, 20: 'text 20 a q in it' holds 'q', character 10" in capsys.readouterr().out
    config = replace(config, dataset=str(tmp_path / "other"))
    refuses(
        replace(config, data=replace(config.data, sources=(source,), max_bad_fraction=0.001)),
        r"1 of 50 documents cannot be used(?s:.*)holds 'q'",
    )


# ---- documents that are split inside ----------------------------------------------------------------------


def one_source(folder: Path, *texts: str, **changes) -> Config:
    """A config whose only source is a folder of .txt files."""
    config = make(folder, **changes)
    (folder / "books").mkdir()
    for n, text in enumerate(texts):
        (folder / "books" / f"{n}.txt").write_text(text)
    source = Source("books", paths=(str(folder / "books"),))
    return replace(config, data=replace(config.data, sources=(source,)))


def test_one_text_file_is_split_inside_with_a_gap_between_training_and_validation_text(tmp_path, capsys):
    text = " ".join(f"word{i}é" for i in range(900))
    d = Dataset(data.build(one_source(tmp_path, text, validation_fraction=0.05)))
    train, held = d.document("books", 0), d.document("books", 1)
    (begin, end), (begin_validation, end_validation) = train["characters"], held["characters"]
    assert (
        begin == 0 < end < begin_validation < end_validation == len(text)
        and train["id"] == held["id"] == "0.txt"
    )
    assert (train["validation"], held["validation"]) == (False, True)
    # the gap is about a row of T tokens, which are bytes here, from the beginning of a word to another
    gap = text[end:begin_validation]
    assert gap.startswith("word") and gap.endswith(" ") and T <= len(gap.encode()) <= T + 12
    assert held["gap_bytes"] == d.manifest["sources"]["books"]["gap_bytes"] == len(gap.encode())
    assert len(text[begin_validation:].encode()) == pytest.approx(0.05 * len(text.encode()), abs=12)
    stream = [*text[begin_validation:].encode(), 256]
    rows = [stream[r * T : r * T + T + 1] for r in range((len(stream) - 1) // T)]
    assert d.validation("books").tolist() == rows
    stream, (_, _, row) = [*text[:end].encode(), 256], d.locate(np.arange(d.n_rows))
    assert all(d.rows(p, 1)[0].tolist() == stream[r * T : r * T + T + 1] for p, r in enumerate(row))
    assert len(row) == (len(stream) - 1) // T
    said = capsys.readouterr().out
    assert "source 'books' has few documents: the end of 1 of them is for validation" in said
    assert f"{held['bytes']:,} bytes, after a gap of {len(gap.encode()):,} bytes" in said


def test_a_source_of_few_documents_never_loses_half_of_them_to_validation(tmp_path):
    texts = [f"{n} " + "some words and a few more " * 40 for n in range(3)]
    # by its hash the second of these ids is for validation: a third of all text, where a tenth is asked for
    seed = next(
        s for s in range(99) if [for_validation(f"{n}.txt", 0.1, s) for n in range(3)] == [False, True, False]
    )
    config = one_source(tmp_path, *texts, validation_fraction=0.1, validation_seed=seed)
    d = Dataset(data.build(config))
    stated = d.manifest["sources"]["books"]
    assert stated["split_inside"] and stated["documents"] == stated["validation_documents"] == 3
    assert 0.05 < stated["validation_tokens"] / (stated["tokens"] + stated["validation_tokens"]) < 0.15
    assert {d.document("books", n)["id"] for n in range(6)} == {"0.txt", "1.txt", "2.txt"}
    assert stated["duplicate_ids"] == 0  # two parts of one document are not two documents


def test_documents_too_short_to_be_split_keep_what_their_hashes_choose(tmp_path):
    texts = [f"{n} is short, so short" for n in range(6)]  # 3 rows each
    chosen = [False, True, False, False, True, False]  # a third, where a tenth was asked for
    seed = next(s for s in range(999) if [for_validation(f"{n}.txt", 0.1, s) for n in range(6)] == chosen)
    config = one_source(tmp_path, *texts, validation_fraction=0.1, validation_seed=seed, batch_size=1)
    d = Dataset(data.build(config))
    assert [d.document("books", n)["validation"] for n in range(6)] == chosen
    assert (
        len(d.validation("books")) == (2 * 21 - 1) // T and not d.manifest["sources"]["books"]["split_inside"]
    )


def test_short_documents_that_are_split_do_not_lose_much_more_than_is_asked_for(tmp_path):
    """A row of each of 60 documents of 10 rows would be a tenth of the text; a fiftieth is asked for."""
    config = one_source(
        tmp_path, *(f"{n:02d} " + "words. " * 10 for n in range(60)), validation_fraction=0.02
    )
    seed = next(s for s in range(999) if not any(for_validation(f"{n}.txt", 0.02, s) for n in range(60)))
    config = replace(config, data=replace(config.data, validation_seed=seed))
    stated = Dataset(data.build(config)).manifest["sources"]["books"]
    assert stated["split_inside"] and stated["validation_rows"] >= 2
    share = stated["validation_tokens"] / (stated["tokens"] + stated["validation_tokens"])
    assert 0.005 < share < 0.06


@pytest.mark.parametrize("fraction", [0.001, 0.45, 0.5, 0.8])
def test_one_file_gives_validation_the_fraction_that_is_asked_for_and_at_least_a_row(tmp_path, fraction):
    text = "word " * 300
    d = Dataset(data.build(one_source(tmp_path, text, validation_fraction=fraction)))
    held = d.manifest["sources"]["books"]["validation_bytes"]
    assert abs(held - max(fraction * len(text), T)) < 12 and len(d.validation("books")) >= 1


def test_only_some_documents_of_many_are_split_inside(tmp_path):
    config = one_source(
        tmp_path, *(f"{n} " + "a few words " * 9 for n in range(300)), validation_fraction=1e-9
    )
    stated = Dataset(data.build(config)).manifest["sources"]["books"]
    assert stated["split_inside"] and 0 < stated["validation_documents"] < 20 and stated["documents"] == 300


def test_documents_too_short_to_be_split_are_all_trained_on_and_a_note_says_so(tmp_path, capsys):
    texts = [f"{n}" * 11 for n in range(9)]
    seed = next(s for s in range(999) if not any(for_validation(f"{n}.txt", 0.2, s) for n in range(9)))
    d = Dataset(data.build(one_source(tmp_path, *texts, validation_seed=seed, batch_size=1)))
    assert d.validation("books").shape == (0, T + 1) and d.manifest["sources"]["books"]["documents"] == 9
    assert "source 'books' has no validation rows" in capsys.readouterr().out


def test_a_flipped_byte_in_a_list_of_documents_or_the_tokenizer_is_found_when_it_is_read(tmp_path):
    folder = data.build(make(tmp_path))
    for name, read in (
        ("documents/a.jsonl", lambda d: evaluation.validation_documents(d, "a")),
        ("documents/a.jsonl", lambda d: d.positions("a", "a-1")),
        ("documents/b.offsets.npy", lambda d: d.document("b", 3)),
        ("tokenizer.json", lambda d: None),
    ):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(before[:-3] + bytes([before[-3] ^ 1]) + before[-2:])
        with pytest.raises(ConfigError, match=f"{name} is damaged: its content differs"):
            read(Dataset(folder))
        (folder / name).write_bytes(before)
        read(Dataset(folder))


def test_a_file_that_two_sources_read_from_other_roots_is_one_document(tmp_path):
    """Otherwise it could be for validation in one source and trained on in the other."""
    config = make(tmp_path, validation_fraction=0.3)
    (tmp_path / "all" / "part").mkdir(parents=True)
    for n in range(50):
        (tmp_path / "all" / "part" / f"{n}.txt").write_text(f"text number {n}")
    (tmp_path / "all" / "more.txt").write_text("one more")
    sources = (
        Source("some", paths=(str(tmp_path / "all" / "part"),)),
        Source("all", paths=(str(tmp_path / "all"),)),
    )
    d = Dataset(data.build(replace(config, data=replace(config.data, sources=sources))))
    tables = {
        name: [json.loads(line) for line in open(d.folder / "documents" / f"{name}.jsonl")]
        for name in d.sources
    }
    split = [{x["id"]: x["validation"] for x in tables[name]} for name in ("some", "all")]
    assert split[1].pop("more.txt") in (True, False) and split[0] == split[1]
    assert "17.txt" in split[0] and 5 < sum(split[0].values()) < 30


def test_ids_beyond_two_bytes_are_stored_in_four(tmp_path):
    config = make(tmp_path, vocab_size=70_001)
    byte_tokenizer(tmp_path / "tokenizer", eot=70_000)
    d = Dataset(data.build(config))
    assert d.manifest["dtype"] == "uint32" and d.rows(0, d.n_rows).max() == 70_000
    assert Path(d.folder / "chunks/000.bin").stat().st_size == d.manifest["chunks"][0]["rows"] * (T + 1) * 4


def test_a_file_in_two_sources_is_for_validation_in_both_or_neither(tmp_path):
    config = make(tmp_path, validation_fraction=0.3)
    for i in range(40):
        (tmp_path / f"m{i}.py").write_text(f'"""Words of module {i}."""\n\nx = {i}\n')
    pattern = (str(tmp_path / "m*.py"),)
    sources = Source("code", paths=pattern), Source("docs", paths=pattern, read="docstrings")
    d = Dataset(data.build(replace(config, data=replace(config.data, sources=sources))))
    split = [[d.document(name, n)["validation"] for n in range(40)] for name in d.sources]
    assert split[0] == split[1] and 3 < sum(split[0]) < 25


def test_a_fraction_of_zero_gives_no_validation_rows(tmp_path):
    d = Dataset(data.build(make(tmp_path, validation_fraction=0.0)))
    assert d.validation("a").shape == (0, T + 1) and d.manifest["sources"]["a"]["documents"] == 97


# ---- errors -----------------------------------------------------------------------------------------------


def refuses(config: Config, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        data.build(config)
    folder = Path(config.dataset)
    assert not folder.exists() and not folder.with_name(folder.name + ".partial").exists()


def test_mistakes_are_named_and_leave_nothing_behind(tmp_path):
    config = make(tmp_path)
    change = lambda **settings: replace(config, data=replace(config.data, **settings))  # noqa: E731
    missing = replace(config, tokenizer=replace(config.tokenizer, path=str(tmp_path / "none")))
    refuses(missing, r"none; make it: python tokenizer\.py train test")
    refuses(
        make(tmp_path, vocab_size=256),
        r"257 entries, more than model\.vocab_size=256; set model\.vocab_size=257",
    )
    refuses(change(sources=()), "data.sources")
    refuses(change(sources=(Source("x", paths=(str(tmp_path / "no.txt"),)),)), r"source 'x'.*no\.txt")
    (tmp_path / "nothing.txt").write_text("")
    refuses(change(sources=(Source("x", paths=(str(tmp_path / "nothing.txt"),)),)), "'x'.* is empty")


def test_mistakes_that_only_the_text_shows_say_numbers_and_what_to_change(tmp_path):
    config = make(tmp_path)
    change = lambda **settings: replace(config, data=replace(config.data, **settings))  # noqa: E731
    few = r"(\d+) rows of model\.seq_len=7 are (\d+) steps of train\.batch_size=3, fewer than data\.n_chunks"
    refuses(change(n_chunks=9999), few)
    (tmp_path / "tiny.txt").write_text("123456")
    tiny = (Source("tiny", paths=(str(tmp_path / "tiny.txt"),)),)
    refuses(change(sources=tiny, validation_fraction=0.0), "stage 'main' has 7 tokens, not one row")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n' * 20 + "{\n" + '{"txt": "b"}\n')
    bad = Source("bad", paths=(str(tmp_path / "bad.jsonl"),))
    refuses(
        change(sources=(bad,)), r"'bad': 2 of 22 .*(?s:.*)bad\.jsonl:21: not JSON\n.*bad\.jsonl:22: no `text`"
    )
    allowed = data.build(change(sources=(bad,), max_bad_fraction=0.1, validation_fraction=0.0, n_chunks=1))
    stated = Dataset(allowed).manifest["sources"]["bad"]
    assert stated["bad"] == {"not JSON": 1, "no `text`": 1} and stated["documents"] == 20


def test_a_source_in_no_stage_is_a_warning(tmp_path, capsys):
    config = make(tmp_path, stages=(Stage("only", epochs={"a": 1}),))
    d = Dataset(data.build(config))
    assert "warning: source 'b' is in no stage" in capsys.readouterr().out
    assert len(d.validation("b")) and d.manifest["chunks"][0]["sources"]["b"] == {"tokens": 0, "documents": 0}


def test_what_is_built_is_not_built_again_and_what_differs_is_named(tmp_path, capsys):
    config = make(tmp_path)
    folder = data.build(config)
    before = Dataset(folder).sha256
    capsys.readouterr()
    data.build(replace(config, data=replace(config.data, workers=2)))  # workers do not change a dataset
    assert capsys.readouterr().out == f"{folder} is already built\n"
    for section, setting, message in (
        ("data", {"seed": 12}, r"data\.seed=11 \(now 12\)"),
        ("data", {"n_chunks": 4}, r"data\.n_chunks=5 \(now 4\)"),
        ("train", {"batch_size": 4}, r"train\.batch_size=3 \(now 4\)"),
        ("model", {"seq_len": 8}, r"model\.seq_len=7 \(now 8\)"),
    ):
        with pytest.raises(ConfigError, match=rf"was built with {message}(?s:.*)--dataset="):
            data.build(replace(config, **{section: replace(getattr(config, section), **setting)}))
    os.utime(tmp_path / "b1.jsonl", (1, 1))
    with pytest.raises(ConfigError, match=r"other files in source 'b': .*b1\.jsonl"):
        data.build(config)
    byte_tokenizer(tmp_path / "tokenizer", eot=299)
    with pytest.raises(ConfigError, match=r"tokenizer \w{12} \(now \w{12}\)"):
        data.build(replace(config, model=replace(config.model, vocab_size=300)))
    assert Dataset(folder).sha256 == before


def test_a_folder_that_is_no_dataset_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"is not a finished dataset.*build it with data\.py"):
        Dataset(tmp_path)
    for content in ("{", "[]", '{"format": 1}', '{"format": 2}'):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(ConfigError, match=r"manifest\.json is damaged"):
            Dataset(tmp_path)


# ---- verify -----------------------------------------------------------------------------------------------


def test_verify_names_what_was_changed_cut_added_or_removed(tmp_path):
    folder = data.build(make(tmp_path))
    assert verify(folder) == []
    flipped = bytearray((folder / "chunks/001.bin").read_bytes())
    flipped[5] ^= 1
    (folder / "chunks/001.bin").write_bytes(flipped)
    os.truncate(folder / "chunks/002.bin", 10)
    (folder / "validation/b.bin").unlink()
    (folder / "more.txt").write_text("more")
    size = len(Dataset(folder).rows(0, 3)) and Dataset(folder).manifest["chunks"][2]["rows"] * (T + 1) * 2
    assert verify(folder) == [
        "chunks/001.bin: its content differs",
        f"chunks/002.bin: has 10 bytes, should have {size}",
        "validation/b.bin: missing",
        "more.txt: is not in the manifest",
    ]
    for chunk, problem in ((1, "its content differs"), (2, "has 10 bytes, should have")):
        d = Dataset(folder)
        first, end = d.chunk_range(chunk)
        expected = rf"chunks/00{chunk}\.bin is damaged: {problem}.*; all of its files: python data\.py verify"
        with pytest.raises(ConfigError, match=expected):
            d.rows(first, end - first)
        assert chunk == 2 or Dataset(folder, verify=False).rows(first, 1).shape == (1, T + 1)
    with pytest.raises(ConfigError, match=r"002\.bin is missing or damaged; try: python data\.py verify"):
        Dataset(folder, verify=False).rows(0, d.n_rows)
    with pytest.raises(ConfigError, match=r"validation/b\.bin is damaged: missing"):
        Dataset(folder).validation("b")
    done = subprocess.run(
        [sys.executable, ROOT / "data.py", "verify", folder], capture_output=True, text=True
    )
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 4 and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "chunks/../../secret", "link/secret"])
def test_a_manifest_that_points_outside_its_folder_is_refused(tmp_path, name):
    folder = data.build(make(tmp_path))
    (tmp_path / "secret").write_text("secret")
    (folder / "link").symlink_to(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for call in (verify, Dataset):
        with pytest.raises(ConfigError, match="lies outside the folder"):
            call(folder)


# ---- the command ------------------------------------------------------------------------------------------


def command(folder: Path, n: int, workers: int = 2) -> list[str]:
    """`python data.py CONFIG` for a source of n documents of about 4 kB."""
    if not (folder / "text.jsonl").exists():
        byte_tokenizer(folder / "tokenizer")
        with open(folder / "text.jsonl", "w") as file:
            for i in range(n):
                file.write(json.dumps({"text": f"{i} {'words and numbers ' * 220}"}) + "\n")
    (folder / "big.py").write_text(
        "from config import Config, Data, Model, Source, Tokenizer, Train\n"
        f"sources = (Source('s', paths=({str(folder / 'text.jsonl')!r},)),)\n"
        f"config = Config(model=Model(vocab_size=257, seq_len=64), train=Train(batch_size=8),\n"
        f"    data=Data(sources=sources, n_chunks=3, workers={workers}), dataset={str(folder / 'big')!r},\n"
        f"    tokenizer=Tokenizer(path={str(folder / 'tokenizer')!r}))\n"
    )
    return [sys.executable, str(ROOT / "data.py"), str(folder / "big.py")]


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks at processes through /proc")
def test_a_build_killed_half_way_leaves_nothing_that_looks_finished_and_a_rerun_is_whole(tmp_path):
    run = command(tmp_path, 3000)
    tokens = tmp_path / "big.partial" / "work" / "s.tokens"
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: process.poll() is not None or (tokens.exists() and tokens.stat().st_size > 0))
    second = subprocess.run(run, capture_output=True, text=True)  # two builds at once
    assert second.returncode == 2 and "is being built by another process" in second.stderr
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert workers and not (tmp_path / "big").exists() and tokens.exists()
    wait_for(lambda: not any(Path(f"/proc/{pid}/task").exists() for pid in workers))  # none is left behind
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "big.partial").exists()
    assert verify(tmp_path / "big") == [] and not (tmp_path / "big" / "work").exists()
    counts = Dataset(tmp_path / "big").manifest["sources"]["s"]
    assert counts["documents"] + counts["validation_documents"] == 3000
    again = subprocess.run(run, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.endswith("big is already built\n")
    other = subprocess.run([*run, "--data.seed=5"], capture_output=True, text=True)
    assert (
        other.returncode == 2 and "data.seed=1234 (now 5)" in other.stderr and "Traceback" not in other.stderr
    )


def test_ctrl_c_cleans_up(tmp_path):
    process = subprocess.Popen(
        command(tmp_path, 3000), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # a shell that starts the tests in its background has them, and what they start, ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    tokens = tmp_path / "big.partial" / "work" / "s.tokens"
    wait_for(lambda: process.poll() is not None or (tokens.exists() and tokens.stat().st_size > 0))
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error == "interrupted; no half-built dataset was left\n"
    assert not list(tmp_path.glob("big*/"))


def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path):
    run = " ".join(f"'{part}'" for part in command(tmp_path, 500))
    limit = "trap '' XFSZ; ulimit -f 1000; "  # files of at most 1000 blocks: writing fails as on a full disk
    done = subprocess.run(["bash", "-c", limit + run], capture_output=True, text=True)
    assert (
        done.returncode == 2 and done.stderr.startswith("error: ") and "no half-built dataset" in done.stderr
    )
    assert not list(tmp_path.glob("big*/"))


def test_memory_is_bounded_however_large_the_corpus(tmp_path):
    script = (
        "import resource, sys; sys.path.insert(0, sys.argv[1].rpartition('/')[0]); sys.argv = sys.argv[1:]\n"
        # so that both corpora are many blocks
        "import chunks, data; chunks.BLOCK_BYTES = 1 << 22; data.main()\n"
        "peaks = [resource.getrusage(who).ru_maxrss for who in (0, -1)]\n"  # itself, workers
        "print(max(peaks) * (1 if sys.platform == 'darwin' else 1024))"
    )
    peaks = []
    # 6 and 20 MB of text; a token a byte: 12 and 40 MB of tokens, and as much again of rows
    for n in (1500, 5000):
        (tmp_path / str(n)).mkdir()
        python, *arguments = command(tmp_path / str(n), n, workers=1)
        # a process inherits the peak of the one that forked it: here a small shell, not this large one
        shell = ["bash", "-c", '"$@"; exit $?', "bash"]
        done = subprocess.run([*shell, python, "-c", script, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] < 150e6 and peaks[1] - peaks[0] < 15e6, peaks


def test_verify_of_a_whole_dataset_says_how_many_files(built):
    _, d = built
    done = subprocess.run(
        [sys.executable, ROOT / "data.py", "verify", d.folder], capture_output=True, text=True
    )
    assert (
        done.returncode == 0 and f"all {len(d.manifest['files'])} files are as they were built" in done.stdout
    )
    for arguments, code in ((["verify"], 2), (["verify", "nothing"], 2), ([], 2), (["--help"], 0)):
        done = subprocess.run([sys.executable, ROOT / "data.py", *arguments], capture_output=True, text=True)
        assert done.returncode == code and "Traceback" not in done.stderr


def test_reading_a_batch_takes_well_under_a_millisecond(built):
    _, d = built
    seconds = []
    for step in range(101):
        start = time.perf_counter()
        d.rows(step * B, B)
        seconds.append(time.perf_counter() - start)
    assert sorted(seconds)[50] < 1e-3  # the median: other programs also run
