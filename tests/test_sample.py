import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import config
import sample
import tokenizer
from config import ConfigError, Model
from model import Transformer

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = dict(vocab_size=59, seq_len=23, d_model=24, n_layers=3, n_heads=6, n_kv_heads=2, d_ff=40)


@pytest.fixture(scope="module")
def model():
    model = Transformer(Model(**SETTINGS, init_std=0.3)).eval().requires_grad_(False)
    model.init_weights(3)
    return model


def prompts(n, length, seed=0):
    return torch.randint(59, (n, length), generator=torch.Generator().manual_seed(seed))


def test_greedy_text_is_that_of_whole_forwards_without_a_cache(model):
    tokens = prompts(5, 7)
    expected = tokens
    for _ in range(11):
        expected = torch.cat((expected, model(expected)[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(sample.generate(model, tokens, 11), expected)


def test_a_prompt_read_in_parts_gives_the_same_text(model, monkeypatch):
    tokens = prompts(5, 7)
    expected = sample.generate(model, tokens, 11)
    monkeypatch.setattr(sample, "PREFILL_TOKENS", 15)  # 15 // 7 = 2 sequences at a time: 2, 2 and 1
    assert torch.equal(sample.generate(model, tokens, 11), expected)


def test_every_position_the_model_was_trained_on_can_be_used_and_none_beyond(model):
    assert sample.generate(model, prompts(1, 20), 4).shape == (1, 24)  # the 24th token is never read
    with pytest.raises(ConfigError, match="20 tokens of prompt and 5 more do not fit"):
        sample.generate(model, prompts(1, 20), 5)
    with pytest.raises(ConfigError, match="do not fit"):
        sample.generate(model, prompts(1, 0), 5)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_settings_that_mean_nothing_are_errors(model, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        sample.generate(model, prompts(1, 3), 2, **wrong)


def test_a_sequence_that_has_stopped_is_filled_with_the_stop_token(model):
    tokens = prompts(6, 5)
    free = sample.generate(model, tokens, 13)
    stop = int(free[2, 9])
    got = sample.generate(model, tokens, 13, stop=stop)
    for row, made in zip(got.tolist(), free.tolist()):
        end = made.index(stop, 5) if stop in made[5:] else len(made)
        assert row == made[:end] + [stop] * (len(made) - end)


def test_no_new_tokens_are_no_new_tokens(model):
    assert torch.equal(sample.generate(model, prompts(2, 5), 0), prompts(2, 5))


# ---- drawing ----------------------------------------------------------------------------------------------


LOGITS = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]]).log()


def probabilities(**settings):
    p, ids = sample.distribution(LOGITS, **settings)
    return torch.zeros_like(p).scatter(1, ids, p)


def test_top_k_and_top_p_keep_what_is_worked_out_by_hand():
    close = dict(rtol=0, atol=1e-6)
    expected = torch.tensor([[0, 4 / 7, 0, 3 / 7], [0.5, 0.5, 0, 0]])  # of equals the lower ids
    torch.testing.assert_close(probabilities(temperature=1.0, top_k=2), expected, **close)
    # row 0: 0.4 + 0.3 is not yet 0.8, so 0.2 belongs to it; row 1: four quarters are needed for more than 3/4
    expected = torch.tensor([[0, 4 / 9, 2 / 9, 3 / 9], [0.25] * 4])
    torch.testing.assert_close(probabilities(temperature=1.0, top_p=0.8), expected, **close)
    # top_k first: of 4/7 and 3/7 the first alone reaches 0.5
    expected = torch.tensor([[0, 1.0, 0, 0], [0.5, 0.5, 0, 0]])
    got = probabilities(temperature=1.0, top_k=2, top_p=0.55)
    torch.testing.assert_close(got[0], expected[0], **close)
    # at temperature 1/2 probabilities are squared: 1, 16, 4, 9 of 30
    got = probabilities(temperature=0.5)
    torch.testing.assert_close(got[0], torch.tensor([1, 16, 4, 9]) / 30, **close)


def test_the_likeliest_token_stays_whatever_is_ruled_out():
    got = probabilities(temperature=1e-30, top_p=1e-9)
    assert got[0].tolist() == [0, 1, 0, 0]
    assert torch.isfinite(got).all()


def test_draws_follow_the_distribution():
    n = 20_000
    logits = LOGITS[:1].expand(n, -1)
    drawn = sample.choose(logits, 1.0, 0, 1.0, torch.Generator().manual_seed(0))
    shares = drawn.bincount(minlength=4) / n
    for share, p in zip(shares.tolist(), (0.1, 0.4, 0.2, 0.3)):
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_ties_are_broken_by_the_lowest_id():
    assert sample.choose(torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]]), 0, 0, 1.0).tolist() == [1, 0]


def test_a_seed_gives_the_same_text_and_another_seed_another(model):
    def draw(seed):
        return sample.generate(model, prompts(3, 4), 19, 1.0, 9, 0.9, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(5), draw(5))
    assert not torch.equal(draw(5), draw(6))


# ---- text -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bytes_only():
    """A tokenizer without merges: every byte is a token."""
    return tokenizer.train_byte_pair(["nothing to merge"], config.Tokenizer(vocab_size=257))


def test_a_character_spread_over_tokens_is_held_back_until_it_is_whole(bytes_only):
    ids = bytes_only.encode("aé€🙂b")
    assert len(ids) == 1 + 2 + 3 + 4 + 1
    pieces = list(sample.text_of(bytes_only, [], ids))
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "🙂", "b", ""]


def test_text_ends_at_the_end_of_text_token_and_broken_bytes_are_shown(bytes_only):
    euro = bytes_only.encode("€")
    ids = [*bytes_only.encode("a"), *euro[:2], bytes_only.eot, *bytes_only.encode("never")]
    assert "".join(sample.text_of(bytes_only, [], ids)) == "a\ufffd"
    ids = [*euro[:2], *bytes_only.encode("b"), *euro]
    assert "".join(sample.text_of(bytes_only, [], ids)) == bytes_only.decode(ids) == "\ufffdb€"


def test_an_id_beyond_the_vocabulary_is_shown_as_unknown(bytes_only):
    ids = [*bytes_only.encode("a"), 300, *bytes_only.encode("b")]
    assert "".join(sample.text_of(bytes_only, [], ids)) == "a\ufffdb"


def test_sentencepiece_keeps_the_space_between_prompt_and_continuation():
    path = Path(__file__).parents[2] / "shared" / "assets" / "tokenizers"
    files = sorted(path.rglob("tokenizer.model")) if path.exists() else []
    if not files:
        pytest.skip("no SentencePiece model here")
    pieces = tokenizer.load(files[0])
    ids = pieces.encode("Once upon a time, 猫🙂.")
    for cut in range(len(ids)):
        prompt = pieces.decode(ids[:cut])
        if "\ufffd" not in prompt:
            assert prompt + "".join(sample.text_of(pieces, ids[:cut], ids[cut:])) == "Once upon a time, 猫🙂."


# ---- the command ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from test_memorize import make_run

    return make_run(tmp_path_factory.mktemp("sample"))


def command(*arguments):
    script = Path(__file__).parents[1] / "sample.py"
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)], capture_output=True, encoding="utf-8", check=False
    )


def test_the_command_prints_prompt_and_text_and_saves_them_where_asked(run):
    prompt = "naïve <|endoftext|> 🙂"
    done = command(run, "--prompt", prompt, "--tokens", 3, "--seed", 7, "--save")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(prompt)
    (line,) = (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    saved = json.loads(line)
    assert saved["text"] + "\n" == done.stdout
    assert saved == {
        **{"format": 1, "checkpoint": "step-00000009", "prompt": prompt, "text": saved["text"]},
        **{"temperature": 0.8, "top_k": 0, "top_p": 1.0, "seed": 7},
    }
    folder = run / "checkpoints" / "step-00000009"
    again = command(folder, "--prompt", prompt, "--tokens", 3, "--seed", 7)
    assert again.stdout == done.stdout


def test_several_prompts_give_the_texts_that_each_gives_alone(run, monkeypatch, capsys):
    how = (run, "--tokens", 5, "--seed", 3)
    alone = [main(monkeypatch, capsys, *how, "--prompt", prompt)[1] for prompt in ("x = 1", "a")]
    together = main(monkeypatch, capsys, *how, "--prompt", "x = 1", "--prompt", "a")
    assert together[:2] == (0, "".join(alone)) and alone[0].startswith("x = 1") and alone[1].startswith("a")


def main(monkeypatch, capsys, *arguments):
    """The command, without the seconds in which a new process imports torch: (exit code, output, errors)."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    code = 0
    try:
        sample.main()
    except SystemExit as error:
        code = error.code
    sys.stdout.flush()
    return code, sys.stdout.buffer.getvalue().decode(), capsys.readouterr().err


def test_an_empty_prompt_starts_a_document_and_fills_what_the_model_has_room_for(run, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(sample, "text_of", lambda tokenizer, ids, tokens: made.extend([ids, *tokens]) or [])
    code, _, _ = main(monkeypatch, capsys, run, "--checkpoint", "step-00000000", "--prompt", "")
    assert code == 0
    assert made[0] == [tokenizer.load(run / "checkpoints" / "step-00000000").eot]
    assert len(made) == 1 + 41  # the model has 41 positions, and the last token needs none


def test_a_bos_comes_before_a_prompt_where_the_models_tokenizer_puts_one_or_where_asked(
    run, tmp_path, monkeypatch, capsys
):
    made = []
    monkeypatch.setattr(sample, "text_of", lambda tokenizer, ids, tokens: made.append(ids) or [])
    own = run / "checkpoints" / "step-00000009"
    begins, silent = tmp_path / "begins", tmp_path / "silent"  # as a foreign folder may say of its tokenizer
    for folder, adds in ((begins, True), (silent, False)):
        shutil.copytree(own, folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings |= {"bos_token": "<bos>", "add_bos_token": adds}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        file = json.loads((folder / "tokenizer.json").read_text())
        (token,) = [token for token in file["added_tokens"] if token["id"] == 0]
        file["added_tokens"].append({**token, "id": 256 + 41, "content": "<bos>"})
        (folder / "tokenizer.json").write_text(json.dumps(file))
        (folder / "state.json").unlink()
    one = tokenizer.load(own)
    text, eot, bos = one.encode("x = 1"), one.eot, 256 + 41
    for folder, asked, prompted, empty in [
        (own, "auto", text, [eot]),  # documents of nano360 only end in a token
        (own, "off", text, [eot]),
        (own, "on", [eot, *text], [eot]),  # as if a document had ended before
        (begins, "auto", [bos, *text], [bos]),
        (begins, "off", text, [eot]),
        (begins, "on", [bos, *text], [bos]),
        (silent, "auto", text, [eot]),
        (silent, "on", [bos, *text], [bos]),
    ]:
        for prompt in ("x = 1", ""):
            code, _, errors = main(
                monkeypatch, capsys, folder, "--prompt", prompt, "--tokens", 2, "--bos", asked
            )
            assert code == 0, errors
        assert made[-2:] == [prompted, empty], (folder.name, asked)


def test_what_is_saved_says_that_a_token_was_put_before_the_prompt(run, monkeypatch, capsys):
    (run / "samples.jsonl").unlink(missing_ok=True)
    for asked in ("auto", "on"):
        arguments = (run, "--prompt", "x = 1", "--tokens", 2, "--bos", asked, "--save")
        assert main(monkeypatch, capsys, *arguments)[0] == 0
    auto, on = map(json.loads, (run / "samples.jsonl").read_text().splitlines())
    assert "bos" not in auto and on["bos"] == tokenizer.load(run / "checkpoints" / "step-00000009").eot
    assert on["prompt"] == "x = 1" and on["text"].startswith("x = 1")


def test_mistakes_are_one_line_and_exit_code_2(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        ((tmp_path / "nowhere",), "is not a folder"),
        ((tmp_path / "empty",), "is not a run folder"),
        ((run, "--checkpoint", 4), "no complete checkpoint of step 4; it has 0, 9"),
        ((run / "checkpoints" / "step-00000009", "--checkpoint", 0), "is itself a checkpoint"),
        ((run, "--prompt", "x y " * 100), "do not fit"),
        ((run, "--top_p", 2), "top_p=2.0"),
    ]:
        code, _, errors = main(monkeypatch, capsys, *arguments)
        assert code == 2
        assert message in errors and errors.count("\n") == 1, errors


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prompts_of_different_lengths_padded_on_the_right_go_on_as_if_alone(model, monkeypatch, temperature):
    monkeypatch.setattr(sample, "PREFILL_TOKENS", 20)  # prompts are read 2 at a time
    tokens, lengths = prompts(5, 9), torch.tensor([9, 1, 4, 8, 2])
    if temperature:  # one generator draws for all rows: nothing to compare with but the shapes
        made = sample.generate(model, tokens, 6, temperature, lengths=lengths)
        assert made.shape == (5, 15)
        return
    made = sample.generate(model, tokens, 11, lengths=lengths)
    for b, n in enumerate(lengths.tolist()):
        alone = sample.generate(model, tokens[b : b + 1, :n], 11)[0]
        assert torch.equal(made[b, : n + 11], alone)


def test_right_padded_greedy_text_is_that_of_transformers(model):
    transformers = pytest.importorskip("transformers")
    from formats import families

    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**families.hf_config(model.cfg, eot=0)))
    theirs.load_state_dict(families.to_family(model.state_dict(), model.cfg))
    tokens, lengths = prompts(4, 8, seed=3).clamp(min=1), torch.tensor([8, 3, 5, 1])
    made = sample.generate(model, tokens, 7, lengths=lengths)
    left = torch.zeros_like(tokens)  # `generate` there wants padding on the left
    for b, n in enumerate(lengths.tolist()):
        left[b, 8 - n :] = tokens[b, :n]
    mask = torch.arange(8) >= 8 - lengths[:, None]
    expected = theirs.eval().generate(
        left, attention_mask=mask.long(), max_new_tokens=7, min_new_tokens=7, do_sample=False, pad_token_id=0
    )
    for b, n in enumerate(lengths.tolist()):
        # min_new_tokens forbids the end of text there: what came before it must agree
        ours = made[b, n : n + 7].tolist()
        until = ours.index(0) if 0 in ours else 7
        assert ours[:until] == expected[b, 8 : 8 + until].tolist()


@pytest.mark.parametrize("lengths", [[0, 3], [9, 3], [3]])
def test_lengths_that_cannot_be_are_refused(model, lengths):
    with pytest.raises(ConfigError, match="give each as 1 to 8"):
        sample.generate(model, prompts(2, 8), 3, lengths=torch.tensor(lengths))


def test_padding_of_a_row_that_has_stopped_is_written_over(model):
    tokens, lengths = prompts(3, 9), torch.tensor([2, 4, 3])
    free = sample.generate(model, tokens, 6, lengths=lengths)
    stop = free[0, 2].item()  # the first row stops at once
    made = sample.generate(model, tokens, 6, stop=stop, lengths=lengths)
    for b, n in enumerate(lengths.tolist()):
        alone = sample.generate(model, tokens[b : b + 1, :n], 6, stop=stop)[0]
        assert torch.equal(made[b, : n + 6], alone)
    assert made[0, 2:8].tolist() == [stop] * 6
