"""convert.py: every family in and out bit for bit, baichuan's packed folders, and llama2.c's files."""

import io
import itertools
import json
import runpy
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import conftest
import numpy as np
import pytest
import reference
import sentencepiece
import torch
import transformers
from conftest import ROOT
from safetensors.torch import load_file, save_file

import checkpoint
import convert
import optim
import sample
import tokenizer
from config import Model, Optim
from formats import families, shards
from model import Transformer

STORIES = Path(__file__).parents[2] / "shared" / "assets" / "stories260K"
with_stories = pytest.mark.skipif(not STORIES.is_dir(), reason="the stories260K files are not here")
WEIGHTS = "model.safetensors"


def run(*words) -> None:
    """Runs the command line in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["convert.py", *map(str, words)])
        convert.main()


def refused(capsys, *words) -> str:
    """The one line that the command line ends with."""
    capsys.readouterr()  # what came before
    with pytest.raises(SystemExit) as ended:
        run(*words)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    return said


def everything(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def randomised(net: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter random, norms and biases too, so that none can be lost or swapped."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise + (1 if parameter.ndim == 1 and name.endswith("weight") else 0))
    return net.eval()


def tokens(vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, (3, 11), generator=torch.Generator().manual_seed(5))


def settings(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """The same names, and bit for bit the same tensors."""
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


# ---- the families that transformers knows -----------------------------------------------------------------

PLAIN = dict(vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=6, intermediate_size=28,
             max_position_embeddings=16)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", rope_theta=100.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)  # fmt: skip
IDS = dict(bos_token_id=3, eos_token_id=7, pad_token_id=None)
PUBLISHED = {
    "LLaMA, grouped queries": ("Llama", dict(num_key_value_heads=3, rms_norm_eps=1e-6)),
    "LLaMA, tied": ("Llama", dict(tie_word_embeddings=True)),
    "LLaMA, biases, wide heads": ("Llama", dict(attention_bias=True, mlp_bias=True, head_dim=10)),
    "LLaMA 3.1": ("Llama", dict(num_key_value_heads=2, rope_parameters=LLAMA3)),
    "Mistral": ("Mistral", dict(num_key_value_heads=2, sliding_window=4, head_dim=8)),
    "OLMo, clipped": ("Olmo", dict(clip_qkv=0.4, tie_word_embeddings=True)),
    "OLMo 2": ("Olmo2", dict(num_key_value_heads=2)),
    "Pythia": ("GPTNeoX", dict(rotary_pct=0.5, use_parallel_residual=True)),
    "GPT-NeoX, one after the other": ("GPTNeoX", dict(rotary_pct=1.0, use_parallel_residual=False)),
}


def theirs(name: str, seed: int = 1):
    family, changes = PUBLISHED[name]
    cfg = getattr(transformers, family + "Config")(**{**PLAIN, **IDS, **changes})
    return randomised(getattr(transformers, family + "ForCausalLM")(cfg), seed)


def opened(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("shard", ["", "6KB"])
def test_a_published_model_goes_through_unchanged(tmp_path, name, shard):
    net, x = theirs(name), tokens(PLAIN["vocab_size"])
    net.save_pretrained(tmp_path / "in", **(dict(max_shard_size=shard) if shard else {}))
    assert (tmp_path / "in" / WEIGHTS).exists() != bool(shard)
    run(tmp_path / "in", tmp_path / "out", "--shard_gb", 1e-5 if shard else 1)

    again, expected = opened(tmp_path / "out"), net(x).logits
    assert type(again) is type(net) and same(again.state_dict(), net.state_dict())
    assert torch.equal(again(x).logits, expected)  # so config.json says all that counts
    assert {key: getattr(again.config, key) for key in IDS} == IDS
    with torch.inference_mode():
        ours = checkpoint.load_model(tmp_path / "out")(x)
    assert (ours - expected).abs().max() < 1e-5 * expected.square().mean().sqrt()  # FP32: 6e-8 a rounding
    written = sorted(path.name for path in (tmp_path / "out").glob("model*"))
    assert (written == [WEIGHTS]) != bool(shard)
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert not shard or path.stat().st_size < 1e4 + 2e3  # the names at the head of a file come on top


def test_sixteen_bits_go_to_fp32_and_back_without_a_change(tmp_path, capsys):
    net = theirs("Pythia").to(torch.bfloat16)
    net.save_pretrained(tmp_path / "bf16")
    run(tmp_path / "bf16", tmp_path / "fp32")
    assert {t.dtype for t in load_file(tmp_path / "fp32" / WEIGHTS).values()} == {torch.float32}
    assert settings(tmp_path / "fp32")["dtype"] == settings(tmp_path / "fp32")["torch_dtype"] == "float32"
    run(tmp_path / "fp32", tmp_path / "back", "--dtype", "bf16")
    assert "loses" not in capsys.readouterr().out
    assert same(load_file(tmp_path / "back" / WEIGHTS), load_file(tmp_path / "bf16" / WEIGHTS))
    assert (
        opened(tmp_path / "back").dtype == torch.bfloat16
        and settings(tmp_path / "back")["dtype"] == "bfloat16"
    )


def test_lost_digits_are_said_and_lost_numbers_refused(tmp_path, capsys):
    net = theirs("LLaMA, tied")
    net.save_pretrained(tmp_path / "in")
    run(tmp_path / "in", tmp_path / "fp16", "--dtype", "fp16")
    assert f"fp16 loses digits of {len(list(net.parameters()))} tensors" in capsys.readouterr().out
    with torch.no_grad():
        net.model.norm.weight[3] = 7e4  # FP16 ends at 65,504
    net.save_pretrained(tmp_path / "large")
    before = everything(tmp_path)
    said = refused(capsys, tmp_path / "large", tmp_path / "out", "--dtype", "fp16")
    assert "norm.weight" in said and "70000" in said and everything(tmp_path) == before


def test_the_newest_checkpoint_of_a_run_becomes_a_folder_for_others(tmp_path):
    cfg = Model(vocab_size=67, seq_len=16, d_model=24, n_layers=2, n_heads=6, n_kv_heads=3, d_ff=28)
    for step in (999, 1000):
        net = randomised(Transformer(cfg), step)
        state = {"step": step, "eot": 5}
        conftest.save(tmp_path / "run", net, [optim.adamw(net, Optim())], state, {"tokenizer.json": b"{}"})
    run(tmp_path / "run", tmp_path / "far" / "off" / "out")
    folder = tmp_path / "far" / "off" / "out"
    assert {p.name for p in folder.iterdir()} == {"config.json", WEIGHTS, "tokenizer.json"}
    assert settings(folder)["eos_token_id"] == 5 and (folder / "tokenizer.json").read_bytes() == b"{}"
    assert same(checkpoint.load_model(folder).state_dict(), net.state_dict())
    assert torch.equal(
        opened(folder)(tokens(67)).logits,
        opened(tmp_path / "run/checkpoints/step-00001000")(tokens(67)).logits,
    )


def test_a_model_of_no_family_keeps_our_names(tmp_path):
    crystal = dict(norm="layernorm", bias=True, rope_fraction=0.25, rope_pairs="neighbours", init="mup")
    crystal |= dict(tie_embeddings=True, embedding_multiplier=14.6, mup_base_width=8, document_mask=True)
    cfg = Model(vocab_size=61, seq_len=16, d_model=24, n_layers=2, n_heads=3, d_ff=20, **crystal)
    net = randomised(Transformer(cfg, eot=0), 3)
    conftest.save(tmp_path / "run", net, [optim.adamw(net, Optim())], {"step": 1, "eot": 0})
    run(tmp_path / "run", tmp_path / "out")
    again = checkpoint.load_model(tmp_path / "out")
    assert settings(tmp_path / "out")["model_type"] == "nano360" and again.cfg == net.cfg
    assert same(again.state_dict(), net.state_dict()) and torch.equal(again(tokens(61)), net(tokens(61)))


# ---- baichuan ---------------------------------------------------------------------------------------------

# The keys of the config.json of baichuan-inc/Baichuan-7B and of Baichuan-13B-Base, with small values.
BAICHUAN_7B = {
    "architectures": ["BaiChuanForCausalLM"], "model_type": "baichuan", "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "hidden_act": "silu", "hidden_size": 24, "initializer_range": 0.02,
    "intermediate_size": 28, "max_position_embeddings": 16, "num_attention_heads": 6, "num_hidden_layers": 2,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "torch_dtype": "float32", "use_cache": True,
    "vocab_size": 61,
}  # fmt: skip
BAICHUAN_13B = {**BAICHUAN_7B, "architectures": ["BaichuanForCausalLM"], "model_max_length": 16}
del BAICHUAN_13B["max_position_embeddings"]


def packed(folder: Path, config: dict, llama: dict[str, torch.Tensor]) -> None:
    """A folder as baichuan published it, of a LLaMA's tensors: query over key over value, in one."""
    folder.mkdir()
    stored = {}
    for name, value in llama.items():
        if "q_proj" in name:
            three = [llama[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            stored[name.replace("q_proj", "W_pack")] = torch.cat(three)
        elif "k_proj" not in name and "v_proj" not in name:
            stored[name] = value
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def test_baichuan_7b_becomes_a_llama_and_is_packed_again(tmp_path):
    cfg = transformers.LlamaConfig(**PLAIN, rms_norm_eps=1e-6)
    llama, x = randomised(transformers.LlamaForCausalLM(cfg), 4), tokens(61)
    packed(tmp_path / "in", BAICHUAN_7B, llama.state_dict())
    (tmp_path / "in" / "tokenizer_config.json").write_text("{}")
    run(tmp_path / "in", tmp_path / "llama")
    again = opened(tmp_path / "llama")
    assert settings(tmp_path / "llama")["model_type"] == "llama"
    assert same(again.state_dict(), llama.state_dict()) and torch.equal(again(x).logits, llama(x).logits)

    run(tmp_path / "llama", tmp_path / "back", "--to", "baichuan", "--shard_gb", 1)
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (tmp_path / "in" / WEIGHTS).read_bytes()
    assert settings(tmp_path / "back").items() >= BAICHUAN_7B.items()
    run(tmp_path / "in", tmp_path / "parts", "--to", "baichuan", "--shard_gb", 1e-5)
    run(tmp_path / "parts", tmp_path / "whole", "--to", "baichuan")
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == (tmp_path / "in" / WEIGHTS).read_bytes()


def test_baichuan_13b_keeps_alibi(tmp_path):
    cfg = Model(vocab_size=61, seq_len=16, d_model=24, n_layers=2, n_heads=6, d_ff=28, norm_eps=1e-6,
                positions="alibi").resolved()  # fmt: skip
    llama = randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**PLAIN)), 5).state_dict()
    packed(tmp_path / "in", BAICHUAN_13B, llama)
    run(tmp_path / "in", tmp_path / "out")
    net = checkpoint.load_model(tmp_path / "out")
    assert net.cfg == cfg and settings(tmp_path / "out")["model_type"] == "nano360"
    weights = {name.removeprefix("model."): value.double().numpy() for name, value in llama.items()}
    expected = reference.logits(cfg, weights, tokens(61).numpy())
    assert np.abs(net(tokens(61)).numpy() - expected).max() < 2e-5 * np.sqrt(np.square(expected).mean())
    run(tmp_path / "out", tmp_path / "back", "--to", "baichuan")
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (tmp_path / "in" / WEIGHTS).read_bytes()
    assert settings(tmp_path / "back").items() >= BAICHUAN_13B.items()
    assert "max_position_embeddings" not in settings(tmp_path / "back")


def test_baichuans_tokenizer_loses_the_code_that_it_names(tmp_path):
    tokens_of = tokenizer.train_sentencepiece(["one two three, one two"] * 9, tokenizer.config.Tokenizer(
        kind="sentencepiece", vocab_size=270, eot="</s>"))  # fmt: skip
    llama = randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**PLAIN)), 5).state_dict()
    packed(tmp_path / "in", BAICHUAN_7B, llama)
    (tmp_path / "in" / "tokenizer.model").write_bytes(tokens_of.content)
    code = {
        "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaiChuanTokenizer", None]},
        "eos_token": "</s>",
    }
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps(code))
    run(tmp_path / "in", tmp_path / "llama")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "llama")
    ids = theirs("two one", add_special_tokens=False).input_ids
    assert ids == tokens_of.encode("two one") and theirs.eos_token == "</s>"
    assert not tokenizer.load(tmp_path / "llama").adds_bos
    code |= {"bos_token": "<s>", "add_bos_token": True}
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps(code))
    run(tmp_path / "in", tmp_path / "begins")
    assert (tokenizer.load(tmp_path / "begins").bos, tokenizer.load(tmp_path / "begins").adds_bos) == (
        1,
        True,
    )
    run(tmp_path / "in", tmp_path / "same", "--to", "baichuan")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "same" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()


# ---- llama2.c ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stories") / "folder"
    run(STORIES / "stories260K.bin", folder, "--tokenizer", STORIES / "tok512.bin")
    return folder


@with_stories
def test_the_stories_model_tells_its_published_story(stories):
    """run.c makes 256 steps, its default. The first reads <s>, and each prints the token that it gives."""
    expected = (STORIES / "greedy-expected.txt").read_text()
    net, tokens_of = checkpoint.load_model(stories), tokenizer.load(stories)
    assert tokens_of.eot == 1 and settings(stories)["eos_token_id"] == 1
    start = torch.tensor([[1]])
    ids = sample.generate(net, start, 256)[0].tolist()
    assert ids[1:9] == [token.item() for token in sample.stream(net, start, 8)]
    assert tokens_of.decode(ids) == "<s>" + expected
    assert "".join(sample.text_of(tokens_of, [1], ids[1:])) == expected


@with_stories
def test_it_does_so_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(STORIES)
    out = str(tmp_path / "out")
    for script, *words in (
        ["convert.py", "stories260K.bin", out, "--tokenizer", "tok512.bin"],
        ["sample.py", out, "--temperature", "0", "--tokens", "256"],
    ):
        monkeypatch.setattr(sys, "argv", [script, *words])
        capsys.readouterr()
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert capsys.readouterr().out == Path("greedy-expected.txt").read_text() + "\n"


@with_stories
def test_transformers_computes_it_alike(stories):
    net, x = checkpoint.load_model(stories), tokens(512)
    assert (opened(stories)(x).logits - net(x)).abs().max() < 1e-4


@with_stories
def test_the_stories_file_comes_back_byte_for_byte(stories, tmp_path):
    run(stories, tmp_path / "again.bin", "--to", "llama2.c")
    again, content = (tmp_path / "again.bin").read_bytes(), (STORIES / "stories260K.bin").read_bytes()
    table = 2 * 512 * 4 * 4  # cosines and sines, (T, Dh/2) in FP32, the last thing in the file
    assert len(again) == len(content) and again[:-table] == content[:-table]
    # another processor's cosine may round otherwise: 2^-23 is one step in FP32 below 1, run.c skips them
    found, expected = (np.frombuffer(data[-table:], "<f4") for data in (again, content))
    assert np.abs(found - expected).max() <= 2**-23


def llama2c_encode(text: str, vocabulary: list[tuple[str, float]]) -> list[int]:
    """Encodes as run.c's encode() does: characters or bytes, then the neighbours whose union scores best."""
    ids_of = {piece: id for id, (piece, _) in enumerate(vocabulary)}
    ids = [ids_of[" "]] if text else []
    for character in text:
        ids += [ids_of[character]] if character in ids_of else [3 + byte for byte in character.encode()]
    while True:
        best = (-1e10, 0, 0)
        for i, (a, b) in enumerate(itertools.pairwise(ids)):
            union = ids_of.get(vocabulary[a][0] + vocabulary[b][0])
            if union is not None and vocabulary[union][1] > best[0]:
                best = (vocabulary[union][1], i, union)
        if not best[2]:
            return ids
        ids[best[1] : best[1] + 2] = [best[2]]


TEXTS = [
    "", " ", "Once upon a time, there was a little girl named Lily.", "  two  spaces   three", "a\nb\n\n c\t",
    "\u201cquoted\u201d \u2014 caf\u00e9 \u4f60\u597d \U0001f600", "\u2581 itself",
    "<s> and </s> and <0x41>", "\0 \x7f", "zzz 1234567890 !?;",
]  # fmt: skip


@with_stories
def test_its_tokenizer_gives_the_ids_of_llama2c(stories):
    vocabulary = llama2c_vocabulary()
    loaded, fast = tokenizer.load(stories), transformers.AutoTokenizer.from_pretrained(stories)
    for text in [*TEXTS, (STORIES / "greedy-expected.txt").read_text()]:
        ids = llama2c_encode(text, vocabulary)
        assert loaded.encode(text) == ids and loaded.decode(ids) == text, text
        if (
            "<" not in text and "\u2581" not in text
        ):  # transformers looks for <s>, and takes U+2581 for a space
            assert fast(text, add_special_tokens=False).input_ids == ids, text
    assert fast.eos_token == "<s>" and fast.eos_token_id == 1

    model = sentencepiece.SentencePieceProcessor(model_file=str(stories / "tokenizer.model"))
    assert model.unk_id() == 0 and model.is_control(1) and model.is_control(2) and model.vocab_size() == 512
    assert all(
        model.is_byte(3 + byte) and model.id_to_piece(3 + byte) == f"<0x{byte:02X}>" for byte in range(256)
    )
    assert [model.get_score(id) for id in range(512)] == [score for _, score in vocabulary]


def llama2c_vocabulary() -> list[tuple[str, float]]:
    content, at, vocabulary = (STORIES / "tok512.bin").read_bytes(), 4, []
    while at < len(content):
        score, length = struct.unpack_from("<fi", content, at)
        vocabulary.append((content[at + 8 : at + 8 + length].decode(), score))
        at += 8 + length
    return vocabulary


def sampled(folder: Path, *words) -> str:
    """The text that the command prints with greedy decoding."""
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["sample.py", folder, "--temperature", 0, *words]
        patch.setattr(sys, "argv", list(map(str, arguments)))
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
        sample.main()
        sys.stdout.flush()
        return sys.stdout.buffer.getvalue().decode()


@with_stories
def test_a_prompted_story_is_the_one_that_llama2c_tells(stories, tmp_path):
    """run.c reads <s>, then the prompt's tokens, then its own likeliest ones, each printed as its piece."""
    prompt, vocabulary = "Tom had a dog. The dog", llama2c_vocabulary()
    net = checkpoint.load_model(stories)
    weights = {name: value.double().numpy() for name, value in net.state_dict().items()}
    ids = [1, *llama2c_encode(prompt, vocabulary)]
    n = len(ids)
    while len(ids) < n + 30:
        ids.append(int(reference.logits(net.cfg, weights, np.array([ids]))[0, -1].argmax()))
    assert 1 not in ids[1:]
    story = "".join(vocabulary[id][0] for id in ids[1:]).removeprefix(" ")
    assert story.startswith(prompt)

    assert sampled(stories, "--prompt", prompt, "--tokens", 30) == story + "\n"
    assert sampled(stories, "--prompt", prompt, "--tokens", 30, "--bos", "on") == story + "\n"
    assert sampled(stories, "--prompt", prompt, "--tokens", 30, "--bos", "off") != story + "\n"
    told = json.loads((stories / "tokenizer_config.json").read_text())
    assert (told["bos_token"], told["add_bos_token"]) == ("<s>", True)
    # a folder from before these two were written opens, and can be asked for the same
    shutil.copytree(stories, tmp_path / "old")
    del told["bos_token"], told["add_bos_token"]
    (tmp_path / "old" / "tokenizer_config.json").write_text(json.dumps(told))
    assert sampled(tmp_path / "old", "--prompt", prompt, "--tokens", 30, "--bos", "on") == story + "\n"
    assert sampled(tmp_path / "old", "--tokens", 9) == sampled(stories, "--tokens", 9)


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama2c_file_written_by_hand_is_the_model_with_neighbouring_pairs(tmp_path, tied):
    cfg = Model(vocab_size=271, seq_len=16, d_model=24, n_layers=2, n_heads=3, n_kv_heads=1, d_ff=20,
                rope_pairs="neighbours", tie_embeddings=tied).resolved()  # fmt: skip
    net = randomised(Transformer(cfg), 6)
    weights = {name: value.numpy() for name, value in net.state_dict().items()}
    angle = np.arange(16)[:, None] * 10000.0 ** -(np.arange(0, 8, 2) / 8)
    content = (
        struct.pack("<7i", 24, 20, 2, 3, 1, 271 if tied else -271, 16)
        + weights["embed_tokens.weight"].tobytes()
    )
    attention = ["input_layernorm", *(f"self_attn.{name}_proj" for name in "qkvo")]
    feed_forward = ["post_attention_layernorm", *(f"mlp.{name}_proj" for name in ("gate", "down", "up"))]
    for part in attention + feed_forward:
        content += b"".join(weights[f"layers.{layer}.{part}.weight"].tobytes() for layer in range(2))
    content += weights["norm.weight"].tobytes()
    content += np.cos(angle).astype("<f4").tobytes() + np.sin(angle).astype("<f4").tobytes()
    content += b"" if tied else weights["lm_head.weight"].tobytes()
    (tmp_path / "a.bin").write_bytes(content)
    learned = tokenizer.train_sentencepiece(["some words, some more words"] * 9, tokenizer.config.Tokenizer(
        kind="sentencepiece", vocab_size=271, eot="</s>"))  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(learned.content)
    run(tmp_path / "a.bin", tmp_path / "out", "--tokenizer", tmp_path / "tokenizer.model")
    again = checkpoint.load_model(tmp_path / "out")
    assert again.cfg.rope_pairs == "halves" and again.cfg.tie_embeddings == tied
    expected = net(tokens(271))
    assert (again(tokens(271)) - expected).abs().max() < 1e-5 * expected.square().mean().sqrt()
    assert (opened(tmp_path / "out")(tokens(271)).logits - expected).abs().max() < 1e-4
    run(tmp_path / "out", tmp_path / "b.bin", "--to", "llama2.c")
    differ = [
        i for i, (a, b) in enumerate(zip(content, (tmp_path / "b.bin").read_bytes(), strict=True)) if a != b
    ]
    end = len(content) - (0 if tied else 4 * 271 * 24)  # of the table, in which cosines of NumPy's may differ
    assert all(end - 4 * angle.size * 2 <= i < end for i in differ)


# ---- what is refused, and what is left behind -------------------------------------------------------------


@pytest.fixture
def llama(tmp_path) -> Path:
    theirs("LLaMA, grouped queries").save_pretrained(tmp_path / "in")
    return tmp_path / "in"


def sharded(folder: Path) -> Path:
    theirs("LLaMA, grouped queries").save_pretrained(folder / "parts", max_shard_size="6KB")
    return folder / "parts"


@pytest.mark.parametrize(
    "case, says",
    [
        ("nothing", "not a folder"),
        ("no config", "config.json"),
        ("pickle", "pickle"),
        ("gpt2", "model_type 'gpt2'"),
        ("not json", "damaged"),
        ("truncated", "model.safetensors"),
        ("other weights", "intermediate"),
        ("missing shard", "is missing"),
        ("evil index", "'../evil'"),
        ("short index", "of another model"),
    ],
)
def test_a_bad_folder_is_refused_in_one_line(tmp_path, llama, capsys, case, says):
    if case == "nothing":
        llama = tmp_path / "nowhere"
    elif case == "no config":
        (llama / "config.json").unlink()
    elif case == "pickle":
        (llama / WEIGHTS).rename(llama / "pytorch_model.bin")
    elif case == "gpt2":
        (llama / "config.json").write_text('{"model_type": "gpt2"}')
    elif case == "not json":
        (llama / "config.json").write_text('{"model_type": ')
    elif case == "truncated":
        (llama / WEIGHTS).write_bytes((llama / WEIGHTS).read_bytes()[:-1])
    elif case == "other weights":
        (llama / "config.json").write_text(json.dumps({**settings(llama), "intermediate_size": 30}))
        says = "the model wants (30, 24)"
    else:
        llama = sharded(tmp_path)
        index = llama / "model.safetensors.index.json"
        places = json.loads(index.read_text())
        if case == "missing shard":
            next(llama.glob("model-00002*")).unlink()
        elif case == "evil index":
            places["weight_map"]["model.norm.weight"] = "../evil"
        else:
            del places["weight_map"]["model.norm.weight"]
        index.write_text(json.dumps(places))
    before = everything(tmp_path)
    assert says in refused(capsys, llama, tmp_path / "out") and everything(tmp_path) == before


def test_a_bad_target_is_refused(tmp_path, llama, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "old.bin").write_text("precious")
    before = everything(tmp_path)
    for words, says in (
        ((tmp_path / "full",), "is there already"),
        ((tmp_path / "file",), "is there already"),
        ((tmp_path / "old.bin", "--to", "llama2.c"), "is there already"),
        ((llama / "out",), "is inside SOURCE"),
        ((llama,), "is there already"),
        ((tmp_path / "out.bin",), "--to hf writes a folder"),
        ((tmp_path / "out", "--to", "llama2.c"), "--to llama2.c writes a file"),
        ((tmp_path / "out.bin", "--to", "llama2.c", "--dtype", "bf16"), "--dtype bf16"),
        ((tmp_path / "out", "--shard_gb", 0), "--shard_gb 0"),
        ((tmp_path / "out", "--tokenizer", "tok512.bin"), "--tokenizer tok512.bin"),
        ((tmp_path / "file" / "out",), "nothing was written"),
    ):
        assert says in refused(capsys, llama, *words)
    assert everything(tmp_path) == before


def test_an_empty_folder_is_a_target(tmp_path, llama):
    (tmp_path / "out").mkdir()
    run(llama, tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).exists()


@pytest.mark.parametrize(
    "name, changes, says",
    [
        ("LLaMA, grouped queries", {}, "model.norm_eps=1e-06"),
        ("LLaMA, biases, wide heads", {"rms_norm_eps": 1e-5}, "model.bias=True"),
        ("LLaMA 3.1", {"rms_norm_eps": 1e-5}, "model.rope_scaling=8.0"),
        ("Mistral", {"rms_norm_eps": 1e-5}, "model.window=4"),
        ("OLMo, clipped", {}, "model.norm='nonparametric_layernorm'"),
        ("Pythia", {}, "model.ffn='gelu'"),
    ],
)
def test_llama2c_and_baichuan_refuse_what_they_do_not_compute(tmp_path, capsys, name, changes, says):
    theirs(name).save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "config.json").write_text(json.dumps({**settings(tmp_path / "in"), **changes}))
    before = everything(tmp_path)
    assert says in refused(capsys, tmp_path / "in", tmp_path / "no" / "out.bin", "--to", "llama2.c")
    assert "model." in refused(capsys, tmp_path / "in", tmp_path / "no" / "out", "--to", "baichuan")
    assert everything(tmp_path) == before


@with_stories
def test_a_bad_llama2c_file_or_tokenizer_is_refused(tmp_path, capsys):
    content, pieces = ((STORIES / name).read_bytes() for name in ("stories260K.bin", "tok512.bin"))
    for name, damaged in (
        ("short", content[:-1]),
        ("long", content + b"\0"),
        ("cut", content[: len(content) // 2]),
        ("header", content[:27]),
        ("empty", b""),
        ("pickle", b"PK\3\4" * 1000),
        ("zeros", bytes(28)),
        ("version 1", struct.pack("<2i", 0x616B3432, 1) + content),
    ):
        (tmp_path / f"{name}.bin").write_bytes(damaged)
    (tmp_path / "pieces.bin").write_bytes(pieces[:-1])
    (tmp_path / "fewer.bin").write_bytes(pieces[: pieces.rindex(struct.pack("<fi", -252.0, 3))])
    before = everything(tmp_path)
    tok = ("--tokenizer", STORIES / "tok512.bin")
    for name in ("short", "long", "cut", "header", "empty", "pickle", "zeros", "version 1"):
        said = refused(capsys, tmp_path / f"{name}.bin", tmp_path / "out", *tok)
        assert "is no .bin of llama2.c's version 0" in said
    assert "1,056,539 bytes, not the 1,056,540" in refused(
        capsys, tmp_path / "short.bin", tmp_path / "out", *tok
    )
    real = STORIES / "stories260K.bin"
    for words, says in (
        ((), "holds no tokenizer"),
        (("--tokenizer", tmp_path / "none.bin"), "cannot be read"),
        (("--tokenizer", tmp_path / "none.model"), "no tokenizer"),
        (("--tokenizer", tmp_path / "pieces.bin"), "entry 511"),
        (("--tokenizer", tmp_path / "fewer.bin"), "511 entries"),
        (("--tokenizer", real), "no tokenizer of llama2.c"),
    ):
        assert says in refused(capsys, real, tmp_path / "out", *words)
    assert "there is no file" in refused(capsys, tmp_path / "none.bin", tmp_path / "out", *tok)
    assert everything(tmp_path) == before


def test_a_full_disk_leaves_nothing_behind(tmp_path, llama, capsys, monkeypatch):
    before = everything(tmp_path)

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save", full)
    assert "No space left" in refused(capsys, llama, tmp_path / "out") and everything(tmp_path) == before


def test_a_kill_leaves_no_target_and_the_next_call_cleans_up(tmp_path, llama):
    code = (
        "import os, signal, sys; sys.path.insert(0, sys.argv.pop(1)); import convert\n"
        "def dies(tensors, path):\n"
        "    path.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "convert.shards.save = dies; convert.main()"
    )
    killed = subprocess.run([sys.executable, "-c", code, ROOT, llama, tmp_path / "out"])
    assert killed.returncode == -9 and not (tmp_path / "out").exists()
    assert {path.name.rstrip("0123456789") for path in tmp_path.iterdir()} == {"in", ".out.converting."}
    run(llama, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
    assert families.read_config(tmp_path / "out") and checkpoint.load_model(tmp_path / "out")
