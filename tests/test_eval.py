import contextlib
import dataclasses
import io
import json
import math
import re
import shutil
import sys
import unicodedata

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_memorize import make_run
from test_tokenizer import ASSETS, corpora, gpt2_file, needs_assets

import config
import data
import eval as evaluation
import files
import measure
import memorize
import report
import tokenizer
import train
from config import ConfigError, Model
from dataset import Dataset
from model import Transformer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("eval"))


def model_of(**changes):
    cfg = Model(vocab_size=53, seq_len=17, d_model=16, n_layers=2, n_heads=4, d_ff=24)
    model = Transformer(dataclasses.replace(cfg, **changes)).eval().requires_grad_(False)
    model.init_weights(1)
    return model


def rows_of(n, seed=0):
    return np.random.default_rng(seed).integers(0, 53, (n, 18), dtype=np.uint16)


# ---- the numbers ------------------------------------------------------------------------------------------


def test_the_loss_of_a_uniform_model_is_the_logarithm_of_the_vocabulary():
    model = model_of(init_std=0.0)
    rows = rows_of(5)
    measured = evaluation.measures(evaluation.nats_of(model, rows, 2), 5 * 17, 5 * 17)
    assert measured["loss"] == pytest.approx(math.log(53), rel=1e-6)
    assert measured["perplexity"] == pytest.approx(53, rel=1e-5)
    assert measured["bits_per_byte"] == pytest.approx(math.log2(53), rel=1e-6)  # with a byte to every token
    assert (measured["tokens"], measured["bytes"]) == (5 * 17, 5 * 17)


def test_measures_equal_values_worked_out_by_hand():
    # 6 targets of 2, 3, 2, 0 (end of text), 1 and 4 bytes: 12 bytes; 18 ln 2 nats are 18 bits
    n_bytes = np.array([[2, 3, 2], [0, 1, 4]])
    measured = evaluation.measures(18 * math.log(2), n_bytes.size, n_bytes.sum())
    assert measured == {
        "loss": pytest.approx(3 * math.log(2)),
        "perplexity": pytest.approx(8),
        "bits_per_byte": pytest.approx(1.5),
        "tokens": 6,
        "bytes": 12,
    }
    assert evaluation.measures(1.0, 3, 0)["bits_per_byte"] is None
    # The reported number is rounded; the divisor is not.
    measured = evaluation.measures(18 * math.log(2), 6, 32 / 3)
    assert measured["bytes"] == 10.667 and measured["bits_per_byte"] == pytest.approx(18 * 3 / 32, rel=1e-12)
    assert type(evaluation.measures(1.0, 6, 12.0000000001)["bytes"]) is int


def test_nats_are_those_of_pytorch_over_every_token_but_the_first():
    model, rows = model_of(init_std=0.4), rows_of(7)
    tokens = torch.from_numpy(rows.astype(np.int64))
    expected = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    assert evaluation.nats_of(model, rows, 3) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 7, 100])
def test_nats_do_not_depend_on_the_batch_size(batch_size):
    model, rows, done = model_of(init_std=0.4), rows_of(7), []
    one_by_one = sum(evaluation.nats_of(model, rows[i : i + 1], 1) for i in range(7))
    assert evaluation.nats_of(model, rows, batch_size, done.append) == pytest.approx(one_by_one, rel=1e-6)
    assert sum(done) == 7


# ---- the bytes of the text --------------------------------------------------------------------------------

WORDS = "one word and two words and three words, 12 345 (and) so on.\n  Then: été, naïve"
TEXTS = [
    *(f"{WORDS[i % 50 : i % 50 + 9]} {'xyz'[i % 3]} word" for i in range(30)),  # of about three words
    *(f"{' ' * (i % 4)}word number {i}" for i in range(20)),  # that begin with no space, one, or more
    *(f"你好 \U0001f642{i} \u2581 word" for i in range(20)),  # of characters that no vocabulary here has
    *("cafe\u0301 nai\u0308ve " + "e\u0301" * (1 + i % 7) for i in range(20)),  # of accents that NFC composes
    *(" " * (1 + i) for i in range(9)),
]


def recipe(folder, tok, texts, seq_len=5, fraction=0.8):
    """A config of one source, "all", with these documents."""
    tok.save(folder / "tokenizer")
    lines = (json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(texts))
    (folder / "text.jsonl").write_text("".join(lines))
    source = config.Source("all", paths=(str(folder / "text.jsonl"),))
    return config.Config(
        model=Model(vocab_size=tok.vocab_size, seq_len=seq_len, d_model=16, n_layers=1, n_heads=2, d_ff=24),
        tokenizer=config.Tokenizer(path=str(folder / "tokenizer"), eot=tok.token_bytes[tok.eot].decode()),
        data=config.Data(sources=(source,), n_chunks=1, validation_fraction=fraction, workers=1),
        train=config.Train(batch_size=1, micro_batch_size=1, device="cpu"),
        eval=config.Eval(prompt_tokens=2, continuation_tokens=2),
        run=str(folder / "run"),
        dataset=str(folder / f"dataset-{seq_len}"),
    ).resolved()  # fmt: skip


def build(folder, tok, texts, *sizes, **more):
    """A real dataset, and the texts of its validation documents, in reading order."""
    cfg = recipe(folder, tok, texts, *sizes, **more)
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = Dataset(data.build(cfg))
    table = map(json.loads, (dataset.folder / "documents" / "all.jsonl").read_text().splitlines())
    return dataset, [texts[int(line["id"])] for line in table if line["validation"]]


def bytes_of_targets(dataset, n_rows=0):
    n_rows = n_rows or len(dataset.validation("all"))
    return evaluation.target_bytes(dataset, "all", n_rows, tokenizer.load(dataset.folder))


def by_document(dataset, held):
    """For each validation document: its text, its ids, and the bytes of its tokens that are targets."""
    tok, found, end = tokenizer.load(dataset.folder), bytes_of_targets(dataset).ravel(), 0
    for text in held:
        ids = tok.encode(text)
        start, end = end, end + len(ids) + 1
        yield text, ids, found[max(0, start - 1) : end - 1]  # the very first token is no target


def exact_bytes(tok, text):
    """The bytes of each token of a document, by decoding longer and longer beginnings of it; its end: 0."""
    ids = tok.encode(text)
    assert tok.decode_bytes(ids) == text.encode()
    return [*np.diff([len(tok.decode_bytes(ids[:n])) for n in range(len(ids) + 1)]), 0]


def learn_sentencepiece(**changes):
    model = io.BytesIO()
    settings = {"vocab_size": 330, "byte_fallback": True, "normalization_rule_name": "identity", **changes}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS, "word cafe one two"] * 40), model_writer=model, model_type="bpe",
        remove_extra_whitespaces=settings["normalization_rule_name"] != "identity", minloglevel=2, **settings,
    )  # fmt: skip
    return tokenizer.sentencepiece_tokenizer(model.getvalue())


def learn_byte_pair(normalizer=None):
    made = tokenizer.train_byte_pair([WORDS] * 9, config.Tokenizer(vocab_size=290))
    content = {**json.loads(made.content), "normalizer": normalizer}
    return tokenizer.byte_pair_tokenizer(json.dumps(content).encode())


@pytest.mark.parametrize("kind", ["SentencePiece", "byte-level BPE"])
def test_where_tokens_decode_to_the_text_every_token_has_its_own_bytes(tmp_path, kind):
    tok = learn_sentencepiece() if kind == "SentencePiece" else learn_byte_pair()
    dataset, held = build(tmp_path, tok, TEXTS)
    got, rows = bytes_of_targets(dataset), dataset.validation("all")
    exact = np.concatenate([exact_bytes(tok, text) for text in held])
    assert got.ravel().tolist() == exact[1 : got.size + 1].tolist()
    # From the texts alone: all of their bytes, but for the first token and for what is dropped.
    first, dropped = exact[0], exact[got.size + 1 :]
    assert len(dropped) == dataset.manifest["sources"]["all"]["validation_dropped_tokens"]
    assert got.sum() == sum(len(text.encode()) for text in held) - first - sum(dropped)
    # The tokens decode to more one by one: a space for each document.
    n_starts = sum(len(part) > 0 for _, _, part in by_document(dataset, held)) - 1
    more = tok.n_bytes[rows[:, 1:]].sum() - got.sum()
    assert more == (n_starts if kind == "SentencePiece" else 0)
    # Rows end within characters.
    assert any(max(tok.token_bytes[token]) >= 0x80 for token in rows[:-1, -1])


@pytest.mark.parametrize(("dropped", "last"), [(1, "e\u0301 " * 20), (2, WORDS), (20, WORDS)])
def test_with_nfc_every_document_has_the_bytes_of_its_text_spread_in_proportion(tmp_path, dropped, last):
    tok, texts = learn_byte_pair({"type": "NFC"}), TEXTS + [last] * 9
    (tmp_path / "first").mkdir()
    _, held = build(tmp_path / "first", tok, texts)
    # The first one is made longer until this number of tokens is dropped from the end of the last one.
    first, size = texts.index(held[0]), sum(len(tok.encode(text)) + 1 for text in held[1:])
    longer = (held[0] + "x" * n for n in range(99))
    texts[first] = next(text for text in longer if (len(tok.encode(text)) + size) % 24 == dropped)
    dataset, held = build(tmp_path, tok, texts, seq_len=24)
    before, after = 0, 0  # bytes of all texts but the last, and what their tokens decode to
    for i, (text, ids, part) in enumerate(by_document(dataset, held)):
        size, decoded = len(text.encode()), np.array([*tok.n_bytes[ids], 0])
        assert decoded.sum() == len(unicodedata.normalize("NFC", text).encode())
        ratio = size / decoded.sum()
        if i == len(held) - 1:
            assert 0 < len(part) == len(ids) + 1 - dropped
            if (
                dropped > 1
            ):  # what the dropped tokens decode to is not known: the ratio of the others is taken
                ratio = min(before / after, size / decoded[: len(part)].sum())
                assert ratio == before / after or dropped == 2
        assert part == pytest.approx((decoded * ratio)[i == 0 :][: len(part)])
        before, after = before + size, after + decoded.sum()
    assert before > after


def test_a_model_that_rewrites_text_or_lacks_characters_is_counted_by_document(tmp_path):
    tok = learn_sentencepiece(vocab_size=45, normalization_rule_name="nmt_nfkc", byte_fallback=False)
    unknown = ["你好", "好  你好", "\ufb01 word \u2460", "\u200b", "你 你", "word 你"]
    texts = TEXTS + [text + " " * i for text in unknown for i in range(4)]
    dataset, held = build(tmp_path, tok, texts, fraction=0.9)
    kinds = set()
    for text, ids, part in list(by_document(dataset, held))[1:]:
        if len(part) <= len(ids):
            break  # the last one, of which the end is dropped
        assert part.sum() == pytest.approx(len(text.encode())), text
        decoded = tok.decode_bytes([id for id in ids if id != tok.special_tokens["<unk>"]])
        kinds.add((bool(ids), bool(decoded)))
        if not decoded:  # evenly; no tokens at all: the end of text has them
            assert part[: max(1, len(ids))] == pytest.approx(len(text.encode()) / max(1, len(ids))), text
    assert kinds == {(True, True), (True, False), (False, False)}


def test_the_end_of_text_has_no_bytes_though_its_token_may_stand_for_text(tmp_path):
    tok = tokenizer.sentencepiece_tokenizer(learn_sentencepiece().content, eot="w")
    assert tok.n_bytes[tok.eot] == 1
    dataset, held = build(tmp_path, tok, TEXTS)
    got = bytes_of_targets(dataset).ravel()
    exact = np.concatenate([exact_bytes(tok, text) for text in held])
    assert got.tolist() == exact[1 : got.size + 1].tolist()


@pytest.mark.parametrize("n_rows", [1, 2, 40])
def test_the_first_rows_alone_have_the_bytes_that_they_have_among_all(tmp_path, n_rows):
    dataset, _ = build(tmp_path, learn_byte_pair({"type": "NFC"}), TEXTS)
    assert len(dataset.validation("all")) > n_rows
    assert bytes_of_targets(dataset, n_rows).tolist() == bytes_of_targets(dataset)[:n_rows].tolist()


def test_a_document_longer_than_all_rows_has_its_own_bytes(tmp_path):
    tok, texts = learn_byte_pair(), [f"{WORDS} {i} {'é' * i} " * 9 for i in range(6)]
    dataset, held = build(tmp_path, tok, texts, seq_len=40, fraction=0.5)
    got = bytes_of_targets(dataset, 1)
    assert 1 <= len(held) < 6 and got.tolist() == [exact_bytes(tok, held[0])[1:41]]


def test_a_table_of_other_documents_than_the_rows_is_an_error(tmp_path):
    dataset, _ = build(tmp_path, learn_byte_pair(), TEXTS)
    path = dataset.folder / "documents" / "all.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for text in ("", "".join(lines[:50]), path.read_text().replace('"tokens"', '"token"')):
        path.write_text(text)
        dataset.verify = False  # else the changed hash of the table is noticed first
        with pytest.raises(ConfigError, match=r"all.*try: python data\.py verify"):
            bytes_of_targets(dataset)


@needs_assets
@pytest.mark.parametrize("name", ["llama2", "gpt-neox-20b", "gpt2"])
def test_real_tokenizers_have_the_bytes_of_real_texts(tmp_path, name):
    files = {"llama2": "tokenizer.model", "gpt-neox-20b": "20B_tokenizer.json"}
    path = ASSETS / "tokenizers" / name / files[name] if name in files else gpt2_file(tmp_path)
    tok, texts = tokenizer.load(path), [text[:700] for text in corpora(25)]
    texts += [f"cafe\u0301 of nai\u0308ve {i}" for i in range(40)]
    dataset, held = build(tmp_path, tok, texts, seq_len=64, fraction=0.5)
    got, rows = bytes_of_targets(dataset), dataset.validation("all")
    for text, ids, part in list(by_document(dataset, held))[1:]:
        if len(part) <= len(ids):
            break
        assert part.sum() == pytest.approx(len(text.encode()), rel=1e-12)
        if name != "gpt-neox-20b" or unicodedata.is_normalized("NFC", text):
            assert part.tolist() == exact_bytes(tok, text)
    change = tok.n_bytes[rows[:, 1:]].sum() / got.sum() - 1
    assert (change > 0, change < 0) == {"llama2": (1, 0), "gpt-neox-20b": (0, 1), "gpt2": (0, 0)}[name]


# ---- of a run ---------------------------------------------------------------------------------------------


def evaluate(run, sources=("code", "docs"), max_rows=0):
    opened = measure.open_run(run)
    return measure.every(opened, evaluation.metric(opened, list(sources), max_rows))


def problems_of(run, cfg=None):
    """The problems that --check finds in a run, perhaps with another config."""
    opened = measure.open_run(run)
    return evaluation.check(opened._replace(cfg=cfg or opened.cfg), 0)


def lines_of(run):
    return [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]


def test_bytes_are_those_of_the_decoded_text_and_end_of_text_has_none(run):
    cfg = config.load_run(run)
    dataset = Dataset(cfg.dataset)
    tok = tokenizer.load(dataset.folder)
    for _, lines in evaluate(run):
        for source, line in lines.items():
            rows = dataset.validation(source)
            targets = rows[:, 1:].flatten()
            assert (targets == tok.eot).any()
            assert line["bytes"] == len(tok.decode_bytes([id for id in targets if id != tok.eot]))
            assert (line["tokens"], line["rows"]) == (targets.size, len(rows))
            bits = line["loss"] * line["tokens"] / math.log(2)
            assert line["bits_per_byte"] == pytest.approx(bits / line["bytes"])


def test_nothing_is_computed_twice_and_a_killed_run_goes_on(run, monkeypatch):
    evaluate(run)
    before = lines_of(run)
    assert [(line["step"], line["source"]) for line in before] == [
        (step, source) for step in (0, 9) for source in ("code", "docs")
    ]
    text = (run / "evals.jsonl").read_text()
    (run / "evals.jsonl").write_text(text[: text.rindex("{", 0, -90) + 30])  # half of the last line
    counted = []
    nats_of = evaluation.nats_of
    monkeypatch.setattr(evaluation, "nats_of", lambda *a: counted.append(len(a[1])) or nats_of(*a))
    table = evaluate(run)
    assert len(counted) == 1
    got = [{**line, "seconds": 0} for _, lines in table for line in lines.values()]
    assert got == [{**line, "seconds": 0} for line in before]
    evaluate(run)
    assert len(counted) == 1
    evaluate(run, ["docs"], max_rows=2)
    assert counted[1:] == [2, 2]


def test_results_are_kept_under_everything_that_determines_them(run):
    opened = measure.open_run(run)
    c = opened.checkpoints[-1]

    def inputs(c=c, max_rows=0, **changes):
        changed = opened._replace(**changes)
        return measure.inputs_of(changed, evaluation.metric(changed, ["code"], max_rows), c)

    weights = {**c.state, "files": {**c.state["files"], "model.safetensors": "0" * 64}}
    seen = [
        inputs(),
        inputs(max_rows=1),
        inputs(precision=torch.bfloat16),
        inputs(c._replace(state=weights)),
        inputs(verify=False),
    ]
    opened.dataset.sha256 = "0" * 64
    seen.append(inputs())
    assert len({json.dumps(inputs) for inputs in seen}) == 6


# ---- the command ------------------------------------------------------------------------------------------


def main(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as leaving:
        evaluation.main()
    return leaving.value.code, *capsys.readouterr()


def test_one_command_computes_everything_and_says_what_it_found(run, monkeypatch, capsys):
    code, out, _ = main(monkeypatch, capsys, run)
    assert not code
    tables = out.strip().split("\n\n")
    assert [len(table.splitlines()) for table in tables] == [1 + 2 * 2, 1 + 2]
    assert len({len(line) for line in tables[0].splitlines()}) == 1  # aligned
    assert {path.name for path in (run / "memorization").iterdir()} == {
        "step-00000000.jsonl",
        "step-00000009.jsonl",
    }


def test_the_check_names_what_is_missing_or_not_good_enough(run, monkeypatch, capsys):
    code, _, errors = main(monkeypatch, capsys, run, "--no-memorization", "--check")
    assert code == 1
    for problem in (
        "bits per byte, not below 60% of step 0's",  # nothing was trained
        "chunk 2 has no checkpoint",
        "step-00000009, memorization of validation:docs: missing",
    ):
        assert problem in errors, errors


def whole(run):
    """Makes a run that passes: a checkpoint for every chunk, and lines that say it has learned."""
    cfg = config.load_run(run)
    cfg = dataclasses.replace(
        cfg, eval=dataclasses.replace(cfg.eval, expect_bits_per_byte={"code": 2.0, "docs": 2.0})
    )
    files.write_json(run / "config.json", {"format": 1, "config": config.to_dict(cfg)})
    dataset = Dataset(cfg.dataset)
    shutil.rmtree(run / "checkpoints" / "step-00000009")
    for chunk in range(3):
        rows = dataset.chunk_range(chunk)[1]
        folder = run / "checkpoints" / f"step-{rows:08d}"
        shutil.copytree(run / "checkpoints" / "step-00000000", folder)
        state = json.loads((folder / "state.json").read_text())
        weights = folder / "model.safetensors"  # the same numbers in another file: another hash
        save_file(load_file(weights), weights, metadata={"format": "pt", "rows": str(rows)})
        state["files"]["model.safetensors"] = files.sha256(weights)
        files.write_json(folder / "state.json", {**state, "step": rows, "rows": rows, "chunk": chunk})
    evaluate(run)
    opened = measure.open_run(run)
    measure.every(opened, memorize.metric(opened))
    lines = lines_of(run)
    for line in lines:
        line["bits_per_byte"] = 8.0 if line["step"] == 0 else 1.9
    (run / "evals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return cfg


def test_the_check_passes_a_whole_run_and_sees_every_single_damage(run, monkeypatch, capsys):
    cfg = whole(run)
    assert problems_of(run) == []
    code, out, errors = main(monkeypatch, capsys, run, "--check")
    assert not code and "check passed" in out, errors

    stricter = {"code": 1.8, "docs": 2.0, "web": 1.0}
    other = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, expect_bits_per_byte=stricter))
    assert problems_of(run, other) == [
        "eval.expect_bits_per_byte names 'web', no source",
        "code: 1.9000 bits per byte, expected below 1.8",
    ]
    for bounds, problems in (
        ({"code": 2.0}, ["eval.expect_bits_per_byte names no bound for 'docs'"]),
        ({}, []),
    ):
        other = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, expect_bits_per_byte=bounds))
        assert problems_of(run, other) == problems
    path = sorted((run / "memorization").iterdir())[1]
    good = path.read_text()
    for field, change in (
        ("matches", lambda v: v[:-1]),
        ("matches", lambda v: [11, *v[1:]]),
        ("rows", lambda v: [v[0] + 1, *v[1:]]),
        ("seen", lambda v: [not v[0], *v[1:]]),
        ("full", lambda v: v + 1),
        ("total", lambda v: v + 1),
        ("score", lambda v: v + 0.01),
    ):
        line = json.loads(good.splitlines()[0])
        line[field] = change(line[field])
        path.write_text("\n".join([json.dumps(line), *good.splitlines()[1:]]) + "\n")
        (problem,) = problems_of(run)
        assert problem.startswith(f"{path.stem}, memorization of 0: its counts contradict"), field
    path.write_text("".join(good.splitlines(keepends=True)[:-1]))
    assert problems_of(run) == [f"{path.stem}, memorization of validation:docs: missing"]
    path.write_text(good)
    shutil.rmtree(run / "checkpoints" / "step-00000000")
    problems = problems_of(run)
    assert problems[0] == "there is no checkpoint of step 0"


def test_mistakes_are_one_line_and_exit_code_2(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "fresh").mkdir()
    shutil.copy(run / "config.json", tmp_path / "fresh")
    shutil.copytree(run, tmp_path / "moved")
    about = json.loads((run / "config.json").read_text())
    about["config"]["dataset"] = "datasets/none"
    files.write_json(tmp_path / "moved" / "config.json", about)
    for arguments, message in [
        ((tmp_path,), "is not a run folder"),
        ((tmp_path / "fresh",), "no complete checkpoint yet"),
        ((tmp_path / "moved",), "datasets/none, which is not here"),
        ((run, "--checkpoint", 3), "no complete checkpoint of step 3; it has 0, 9"),
        ((run, "--source", "web"), "no source 'web'"),
        ((run, "--max_rows", "-1"), "--max_rows -1"),
    ]:
        code, _, errors = main(monkeypatch, capsys, *arguments)
        assert code == 2
        assert message in errors and errors.count("\n") == 1, errors


def test_the_check_knows_every_chunk_that_a_step_ends(run):
    cfg = config.load_run(run)
    dataset = Dataset(cfg.dataset)
    sizes = [end - first for first, end in map(dataset.chunk_range, range(3))]
    # step 1 ends chunk 0; step 2, the last whole batch, chunk 1 and, as no step follows, chunk 2
    B = dataset.n_rows // 3 + 1
    assert sizes[0] <= B < sizes[0] + sizes[1] <= 2 * B < dataset.n_rows < 3 * B
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, batch_size=B))
    shutil.rmtree(run / "checkpoints" / "step-00000009")
    for step, chunk in ((1, 0), (2, 2)):
        folder = run / "checkpoints" / f"step-{step:08d}"
        shutil.copytree(run / "checkpoints" / "step-00000000", folder)
        state = json.loads((folder / "state.json").read_text())
        files.write_json(folder / "state.json", {**state, "step": step, "rows": step * B, "chunk": chunk})

    def missing():
        problems = problems_of(run, cfg)
        return [problem for problem in problems if "has no checkpoint" in problem]

    assert missing() == []
    # after an incident chunk 0 is at the end of the order: step 1 ends chunk 1, step 2 the others
    assert sizes[1] <= B
    for path in (run / "checkpoints").glob("*/state.json"):
        state = json.loads(path.read_text())
        state["order"] = [[sizes[0], dataset.n_rows], [0, sizes[0]]]
        files.write_json(path, state)
    assert missing() == []
    shutil.copytree(run / "checkpoints" / "step-00000001", run / "aside")
    shutil.rmtree(run / "checkpoints" / "step-00000001")
    assert missing() == ["chunk 1 has no checkpoint"]
    shutil.move(run / "aside", run / "checkpoints" / "step-00000001")
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    assert missing() == ["chunk 0 has no checkpoint", "chunk 2 has no checkpoint"]


def hold_nothing_out(run, *sources):
    """Gives a run a dataset of its own, in which some sources have no validation row."""
    cfg = config.load_run(run)
    folder = shutil.copytree(cfg.dataset, run.parent / "dataset")
    manifest = json.loads((folder / "manifest.json").read_text())
    for source in sources:
        manifest["sources"][source]["validation_rows"] = 0
        name = f"validation/{source}.bin"
        (folder / name).write_bytes(b"")
        manifest["files"][name], manifest["file_bytes"][name] = files.sha256(folder / name), 0
    files.write_json(folder / "manifest.json", manifest)
    cfg = dataclasses.replace(cfg, dataset=str(folder))
    files.write_json(run / "config.json", {"format": 1, "config": config.to_dict(cfg)})
    files.write_json(run / "dataset.json", manifest)
    for path in (run / "checkpoints").glob("*/state.json"):
        state = json.loads(path.read_text())
        files.write_json(path, {**state, "dataset_sha256": Dataset(folder).sha256})
    return cfg, Dataset(folder)


def test_a_source_that_holds_nothing_out_is_named_and_the_others_are_evaluated(run, monkeypatch, capsys):
    cfg, dataset = hold_nothing_out(run, "docs")
    code, out, errors = main(monkeypatch, capsys, run)
    assert not code, errors
    assert out.splitlines()[0] == f"{dataset.folder} has no validation row of docs: not evaluated"
    assert {line["source"] for line in lines_of(run)} == {"code"} and " validation " in out
    page = report.write(run).read_text()
    assert "could not be shown" not in page and "Nothing is held out of docs." in page

    code, _, errors = main(monkeypatch, capsys, run, "--source", "docs")
    assert code == 2 and "has no validation row of docs" in errors and errors.count("\n") == 1
    problems = problems_of(run)
    assert any(problem.startswith("code: ") for problem in problems)
    assert not any("docs" in problem for problem in problems)
    expect = {"code": 20.0, "docs": 20.0}
    cfg = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, expect_bits_per_byte=expect))
    told = "eval.expect_bits_per_byte names 'docs', which has no validation row"
    assert told in problems_of(run, cfg)


def test_where_nothing_is_held_out_memorization_and_page_continue(run, monkeypatch, capsys):
    _, dataset = hold_nothing_out(run, "code", "docs")
    code, out, errors = main(monkeypatch, capsys, run)
    assert not code, errors
    head, table = out.strip().split("\n\n")
    assert head == f"{dataset.folder} has no validation row of any source: there is no loss to measure"
    assert len(table.splitlines()) == 3 and not (run / "evals.jsonl").exists()
    code, _, errors = main(monkeypatch, capsys, run, "--check")
    expected = [f"check failed: chunk {chunk} has no checkpoint" for chunk in range(3)]
    assert code == 1 and errors.splitlines() == expected  # and nothing about validation text
    code, out, errors = main(
        monkeypatch, capsys, run / "checkpoints/step-00000009", "--dataset", dataset.folder
    )
    assert not code and out == head + "\n"
    page = report.write(run).read_text()
    assert "could not be shown" not in page and "No text is held out, so there is no loss" in page


def test_one_source_of_one_document_of_which_nothing_is_held_out(tmp_path, monkeypatch, capsys):
    cfg = recipe(tmp_path, learn_byte_pair(), [WORDS], fraction=0.0)
    cfg = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, warmup_steps=2))
    data.build(cfg)
    train.train(cfg)
    capsys.readouterr()
    code, out, errors = main(monkeypatch, capsys, cfg.run, "--check")
    assert not code, errors
    assert "has no validation row of any source" in out and "check passed" in out and "step-00000000" in out
    page = report.write(cfg.run).read_text()
    assert "could not be shown" not in page and "No text is held out, so there is no loss" in page
    figures = re.findall("<svg.*?</svg>", page, re.S)
    assert len(figures) >= 7 and "validation" not in "".join(figures)


def test_a_source_without_validation_rows_is_an_error_that_says_what_to_raise(run):
    dataset = measure.open_run(run).dataset
    dataset.validation = lambda source: np.empty((0, 42), np.uint16)
    with pytest.raises(ConfigError, match=r"raise data\.validation_fraction"):
        evaluation.with_validation_rows(dataset, ["code"])
