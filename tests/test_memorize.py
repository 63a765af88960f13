import contextlib
import dataclasses
import io
import json
import random
import shutil

import conftest
import numpy as np
import pytest
import torch

import checkpoint
import config
import data
import files
import measure
import memorize
import optim
import run_folder
import sample
import tokenizer
from config import Config, ConfigError, Data, Eval, Model, Source, Train
from dataset import Dataset
from formats import families
from model import Transformer

pytestmark = pytest.mark.usefixtures("one_thread")

K, L = 6, 10


def make_run(folder):
    """A real dataset of 2 sources and 3 chunks; a run with checkpoints of steps 0 and 9 (18 rows seen)."""
    rng = random.Random(0)
    words = ["".join(rng.choices("aeioubcdfg", k=rng.randint(2, 7))) for _ in range(90)]
    for source, n in (("code", 40), ("docs", 25)):
        (folder / source).mkdir(parents=True)
        for i in range(n):
            (folder / source / f"{i}.txt").write_text(
                " ".join(rng.choices(words, k=rng.randint(20, 60))) + " é\n"
            )
    cfg = Config(
        model=Model(vocab_size=300, seq_len=41, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24),
        tokenizer=config.Tokenizer(path=str(folder / "tokenizer")),
        data=Data(
            sources=tuple(Source(name, paths=(str(folder / name),)) for name in ("code", "docs")),
            n_chunks=3,
            validation_fraction=0.2,
            workers=1,
        ),
        train=Train(batch_size=2, micro_batch_size=2, device="cpu"),
        eval=Eval(
            prompt_tokens=K,
            continuation_tokens=L,
            rows_per_chunk=13,
            batch_size=4,
            generate_batch_size=5,
        ),
        name="tiny",
        run=str(folder / "run"),
        dataset=str(folder / "dataset"),
    ).resolved()  # fmt: skip
    text = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*/*.txt"))]
    tok = tokenizer.train_byte_pair(text, config.Tokenizer(vocab_size=290))
    (folder / "tokenizer").mkdir()
    tok.save(folder / "tokenizer")
    with contextlib.redirect_stdout(io.StringIO()):
        data.build(cfg)
    dataset, run = Dataset(cfg.dataset), folder / "run"
    run.mkdir()
    files.write_json(run / "config.json", {"format": 1, "config": config.to_dict(cfg)})
    for step, chunk in ((0, -1), (9, dataset.chunk_of(18) - 1)):
        model = Transformer(cfg.model)
        model.init_weights(step)
        state = {
            "step": step,
            "rows": 2 * step,
            "tokens": 82 * step,
            "chunk": chunk,
            "eot": dataset.manifest["eot"],
            "dataset_sha256": dataset.sha256,
            "tokenizer_sha256": dataset.manifest["tokenizer"]["sha256"],
        }
        names = ("tokenizer.json", "tokenizer_config.json")
        own = {name: (dataset.folder / name).read_bytes() for name in names}
        conftest.save(run, model, [optim.adamw(model, cfg.optim)], state, own)
    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("memorize"))


def compute(run, chunks=None):
    opened = measure.open_run(run)
    return measure.every(opened, memorize.metric(opened, chunks))


def lines_of(run):
    paths = sorted((run / "memorization").glob("*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


# ---- the score --------------------------------------------------------------------------------------------


def trained_on(rows, vocab_size, steps=150):
    """A small model that has seen nothing but these rows, over and over."""
    cfg = Model(vocab_size=vocab_size, seq_len=rows.shape[1], d_model=48, n_layers=2, n_heads=4, d_ff=96)
    torch.manual_seed(0)
    model = Transformer(cfg)
    model.init_weights(1)
    adam = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        loss = model(rows[:, :-1], rows[:, 1:]) / rows[:, 1:].numel()
        loss.backward()
        adam.step()
        adam.zero_grad()
    return model.eval().requires_grad_(False), loss.item()


def random_rows(n, length, vocab_size, seed):
    return torch.randint(vocab_size, (n, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def planted():
    """(model, rows that it was trained on with an end-of-text token, 0, in every continuation)"""
    rows = random_rows(11, 19, 67, seed=1)
    rows[:, 12] = 0
    model, _ = trained_on(rows, 67)
    return model, rows


def test_planted_text_scores_1_also_past_an_end_of_text_and_unseen_text_scores_near_chance(planted):
    model, rows = planted
    assert memorize.count_matches(model, rows.numpy(), 7, batch_size=4).tolist() == [12] * 11
    unseen = random_rows(400, 19, 67, seed=2)
    score = memorize.count_matches(model, unseen.numpy(), 7, batch_size=64).mean() / 12
    assert score < 3 / 67  # chance is 1 / 67


def test_matches_are_counted_by_position_without_synchronising_again(planted):
    model, rows = planted
    truth = rows.clone()
    truth[0, 9] = (
        truth[0, 9] + 1
    ) % 67  # one other token: the greedy text stays what it was, before and after
    truth[1, 7:] = torch.cat((rows[1, 8:], rows[1, 7:8]))  # one ahead
    counts = memorize.count_matches(model, truth.numpy(), 7, batch_size=11)
    ahead = int((rows[1, 7:] == truth[1, 7:]).sum())
    assert counts.tolist() == [11, ahead] + [12] * 9


def test_exactly_l_tokens_are_made_whatever_the_model_says(planted):
    model, rows = planted
    made = sample.generate(model, rows[:, :7], 12)
    assert made.shape == (11, 19)
    assert (made[:, 12] == 0).all() and torch.equal(made, rows)


@pytest.mark.parametrize(("batch_size", "threads"), [(1, 2), (3, 1), (3, 3), (32, 2), (1000, 1)])
def test_counts_do_not_depend_on_the_batch_size_and_the_cores(planted, batch_size, threads):
    model, rows = planted
    some = torch.cat((rows, random_rows(50, 19, 67, seed=3))).numpy()
    expected = memorize.count_matches(model, some, 7, batch_size=61)
    assert expected.std() > 1
    torch.set_num_threads(threads)
    done = []
    counts = memorize.count_matches(model, some, 7, batch_size, done=done.append)
    assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    assert counts.tolist() == expected.tolist()
    assert sum(done) == 61 and max(done) <= batch_size


def test_counts_are_those_of_transformers(planted):
    transformers = pytest.importorskip("transformers")
    rows = torch.cat((planted[1], random_rows(40, 19, 67, seed=4)))
    fresh = Transformer(planted[0].cfg).eval()
    fresh.init_weights(2)
    for model in (planted[0], fresh):
        values = families.hf_config(model.cfg, eot=0)
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).eval()
        theirs.load_state_dict(families.to_family(model.state_dict(), model.cfg))
        # min_new_tokens forbids the end-of-text token by setting its logit to -inf; the protocol lets it
        # come, and continues. So here none is told which token that is.
        theirs.generation_config.eos_token_id = None
        with torch.inference_mode():
            made = theirs.generate(
                rows[:, :7], attention_mask=torch.ones_like(rows[:, :7]), do_sample=False, pad_token_id=1,
                min_new_tokens=12, max_new_tokens=12,
            )  # fmt: skip
        expected = (made[:, 7:] == rows[:, 7:]).sum(1)
        assert memorize.count_matches(model, rows.numpy(), 7, batch_size=16).tolist() == expected.tolist()


# ---- which rows -------------------------------------------------------------------------------------------


def test_rows_are_drawn_once_each_sorted_and_by_key():
    drawn = memorize.draw(1000, 100, "1234/memorization/5")
    assert len(np.unique(drawn)) == 100 and (np.diff(drawn) > 0).all() and drawn[0] >= 0 and drawn[-1] < 1000
    assert drawn.tolist() == memorize.draw(1000, 100, "1234/memorization/5").tolist()
    other = memorize.draw(1000, 100, "1234/memorization/6")
    assert len(np.intersect1d(drawn, other)) < 30  # 10 are expected
    assert memorize.draw(7, 100, "x").tolist() == list(range(7))
    assert memorize.draw(0, 100, "x").tolist() == []
    # The rule is fixed: published counts are about these rows.
    assert memorize.draw(1000, 5, "1234/memorization/0").tolist() == [200, 229, 578, 773, 828]


def test_every_checkpoint_is_asked_about_the_same_rows_of_every_chunk_and_of_validation_text(run):
    cfg = config.load_run(run)
    dataset = Dataset(cfg.dataset)
    asked = {}
    for c, lines in compute(run):
        for chunk, line in lines.items():
            asked.setdefault(chunk, []).append(line["rows"])
            assert line["matches"] and len(line["matches"]) == len(line["rows"]) == line["total"] == len(
                line["seen"]
            )
            if isinstance(chunk, int):
                first, end = dataset.chunk_range(chunk)
                assert len(line["rows"]) == min(13, end - first)
                assert all(first <= row < end for row in line["rows"])
                assert line["seen"] == [row < c.state["rows"] for row in line["rows"]]
            else:
                assert len(line["rows"]) == min(13, len(dataset.validation(chunk.partition(":")[2])))
                assert not any(line["seen"])
    assert list(asked) == [0, 1, 2, "validation:code", "validation:docs"]
    assert all(first == second for first, second in asked.values())
    assert sum(sum(line["seen"]) for line in lines.values()) > 0


def test_a_line_holds_the_counts_of_its_own_rows(run):
    table = compute(run)
    cfg = config.load_run(run)
    dataset = Dataset(cfg.dataset)
    for c, lines in table:
        model = checkpoint.load_model(c.path)
        for chunk, line in lines.items():
            if isinstance(chunk, int):
                rows = np.concatenate([dataset.rows(row, 1) for row in line["rows"]])
            else:
                rows = dataset.validation(chunk.partition(":")[2])[line["rows"]]
            tokens = torch.from_numpy(rows[:, : K + L].astype(np.int64))
            text = tokens[:, :K]
            for _ in range(L):
                text = torch.cat((text, model(text)[:, -1].argmax(-1, keepdim=True)), 1)
            assert line["matches"] == (text[:, K:] == tokens[:, K:]).sum(1).tolist()
            assert line["score"] == pytest.approx(sum(line["matches"]) / L / line["total"])
            assert line["full"] == line["matches"].count(L)


# ---- kept, and computed once ------------------------------------------------------------------------------


def test_nothing_is_computed_twice_and_a_killed_run_goes_on(run):
    compute(run)
    before = lines_of(run)
    assert len(before) == 2 * 5
    path = run / "memorization" / "step-00000009.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:3]) + whole[3][:40])  # killed in the middle of a line
    scored = []
    opened = measure.open_run(run)
    metric = memorize.metric(opened)

    def score(model, c, chunks, done):
        scored.extend((c.step, chunk) for chunk in chunks)
        return metric.compute(model, c, chunks, done)

    table = measure.every(opened, metric._replace(compute=score))
    assert scored == [(9, "validation:code"), (9, "validation:docs")]
    assert [line for _, lines in table for line in lines.values()] == before


def test_results_are_kept_under_everything_that_determines_them(run):
    opened = measure.open_run(run)
    c, cfg = opened.checkpoints[-1], opened.cfg

    def inputs(c=c, cfg=cfg, **changes):
        changed = opened._replace(cfg=cfg, **changes)
        return measure.inputs_of(changed, memorize.metric(changed), c)

    seen = [inputs()]
    for name, value in (
        ("prompt_tokens", 5),
        ("continuation_tokens", 9),
        ("rows_per_chunk", 12),
        ("seed", 1),
    ):
        other = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, **{name: value}))
        seen.append(inputs(cfg=other))
    seen.append(inputs(precision=torch.bfloat16))
    weights = {**c.state, "files": {**c.state["files"], "model.safetensors": "0" * 64}}
    seen.append(inputs(c._replace(state=weights)))
    seen.append(inputs(c._replace(state={**c.state, "rows": 1})))
    opened.dataset.sha256 = "0" * 64
    seen.append(inputs())
    assert len({json.dumps(inputs) for inputs in seen}) == 9
    faster = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, generate_batch_size=999))
    assert inputs(cfg=faster, dataset=Dataset(cfg.dataset)) == seen[0]


def test_some_chunks_can_be_chosen(run):
    ((_, first), _) = compute(run, [2, 0, 2])
    assert list(first) == [0, 2, "validation:code", "validation:docs"]
    with pytest.raises(ConfigError, match="no chunk 3; it has 0 to 2"):
        compute(run, [3])


def test_rows_of_small_chunks_are_decoded_together(run):
    metric = memorize.metric(measure.open_run(run))
    metric = metric._replace(items=dict(enumerate([400, 400, 400, 1000, 1, 1])))
    assert measure.groups(metric, list(range(6))) == [[0, 1, 2], [3], [4, 5]]


def test_the_table_separates_seen_newest_unseen_and_validation(run):
    c = run_folder.chosen(run)[-1]._replace(state={"chunk": 1, "rows": 6})

    def line(matches, seen):
        return {"matches": matches, "seen": seen, "total": len(matches), "continuation_tokens": 10}

    lines = {
        0: line([10, 10, 4], [True] * 3),
        1: line([10, 1], [True, True]),
        2: line([0, 3], [False, False]),
        "validation:code": line([2], [False]),
    }
    _, row = memorize.show([(c, lines)]).splitlines()
    # seen (10 + 10 + 4 + 10 + 1) / 50, newest 11 / 20, unseen 3 / 20, validation 2 / 10
    assert row.split() == ["step-00000009", "0.7000", "0.5500", "0.1500", "0.2000", "3", "/", "5"]


def test_another_dataset_than_the_one_trained_on_is_refused(run, tmp_path):
    cfg = config.load_run(run)
    shutil.copytree(cfg.dataset, tmp_path / "other")
    manifest = tmp_path / "other" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    of = run_folder.chosen(run)
    with pytest.raises(ConfigError, match="was trained with another dataset than the one in"):
        measure.dataset_of(run, dataclasses.replace(cfg, dataset=str(tmp_path / "other")), of)
    with pytest.raises(ConfigError, match="which is not here"):
        measure.dataset_of(run, dataclasses.replace(cfg, dataset="datasets/none"), of)


def test_the_rows_with_most_matches_have_their_documents_named(run):
    dataset = measure.open_run(run).dataset
    for _, lines in compute(run):
        for chunk, line in lines.items():
            named = [i for i, names in enumerate(line["documents"]) if names]
            assert len(line["documents"]) == line["total"]
            if isinstance(chunk, str):
                assert named == []
                continue
            assert named == sorted(np.argsort(-np.array(line["matches"]), kind="stable")[: memorize.BEST])
            for i in named:
                spans = dataset.documents(line["rows"][i])
                expected = [[source, id] for source, id, first, _ in spans if first < K + L]
                assert [list(pair) for pair in line["documents"][i]] == expected
