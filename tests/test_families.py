"""formats/families.py: the family's own class reads what is written, and the way back is exact."""

import dataclasses
import json
import re

import conftest
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import EVERY, PUBLISHED, make, shaken, tokens_for

import checkpoint
import config
import optim
from config import ConfigError, Model, Optim
from formats import families
from model import Transformer

OWN = {  # models that no class of `transformers` computes
    "crystalcoder": EVERY["crystal"],
    "alibi": EVERY["alibi"],
    "learned positions": EVERY["learned"],
    "an OLMo with another epsilon": dataclasses.replace(EVERY["olmo"], norm_eps=1e-6),
    "a Pythia with grouped queries": dataclasses.replace(EVERY["neox"], n_heads=9, n_kv_heads=3),
    "heads that do not divide the width": dataclasses.replace(EVERY["llama"], d_model=62),
}
EVERYTHING = {**PUBLISHED, **OWN}


def saved(net: Transformer, run) -> object:
    """A checkpoint's folder."""
    state = {"step": 3, "rows": 6, "tokens": 9, "chunk": -1, "eot": 5}
    return conftest.save(run, net, [optim.adamw(net, Optim())], state)


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_opens_a_checkpoint_of_every_published_family_as_it_stands(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    net = shaken(PUBLISHED[name])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(saved(net, tmp_path)).eval()
    tokens = tokens_for(net.cfg)
    torch.testing.assert_close(theirs(tokens).logits, net(tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_folder_written_by_transformers_is_read_whole_and_in_shards(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    net = shaken(PUBLISHED[name])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(saved(net, tmp_path / "run"))
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    for folder in ("one", "many"):
        back = checkpoint.load_model(tmp_path / folder)
        assert back.cfg == dataclasses.replace(net.cfg, init="normal", init_trunc=0.0)
        for ours, theirs_back in zip(net.parameters(), back.parameters()):
            assert torch.equal(ours, theirs_back)


@pytest.mark.parametrize("name", EVERYTHING)
def test_settings_and_weights_survive_our_own_folder(tmp_path, name):
    net = shaken(EVERYTHING[name])
    folder = saved(net, tmp_path)
    family = families.read_config(folder)["model_type"]
    assert (family == "nano360") == (name in OWN)
    back = checkpoint.load_model(folder)
    same = net.cfg if name in OWN else dataclasses.replace(net.cfg, init="normal", init_trunc=0.0)
    assert back.cfg == same
    for ours, theirs in zip(net.parameters(), back.parameters()):
        assert torch.equal(ours, theirs)


def test_a_document_mask_survives_with_the_token_that_ends_a_document(tmp_path):
    for number, cfg in enumerate((EVERY["llama"], EVERY["crystal"])):
        net = make(dataclasses.replace(cfg, document_mask=True))
        back = checkpoint.load_model(saved(net, tmp_path / str(number)))
        assert back.cfg.document_mask and back.eot == 5


@pytest.mark.parametrize("bias", [False, True])
def test_neox_packs_by_head_and_baichuan_by_kind(bias):
    cfg = Model(
        vocab_size=9, d_model=6, n_layers=1, n_heads=3, d_ff=5, norm="layernorm", ffn="gelu", bias=bias
    )
    ours = make(cfg).state_dict()
    q, k, v = (ours[f"layers.0.self_attn.{x}_proj.weight"] for x in "qkv")
    packed = families.to_family(ours, cfg, "gpt_neox")["gpt_neox.layers.0.attention.query_key_value.weight"]
    # rows of a head: two of its query, two of its key, two of its value; then the next head's
    by_hand = [q[0], q[1], k[0], k[1], v[0], v[1], q[2], q[3], k[2], k[3], v[2], v[3]]
    assert torch.equal(packed[:12], torch.stack(by_hand))
    stacked = families.to_family(ours, cfg, "baichuan")["model.layers.0.self_attn.W_pack.weight"]
    assert torch.equal(stacked, torch.cat((q, k, v)))
    for family, tensor in (("gpt_neox", packed), ("baichuan", stacked)):
        for part, expected in enumerate((q, k, v)):
            assert torch.equal(families.unpack(tensor, part, cfg.resolved(), family), expected)


def baichuan_folder(folder, cfg: Model) -> Transformer:
    """A folder as baichuan published it."""
    net = shaken(cfg)
    folder.mkdir()
    save_file(families.to_family(net.state_dict(), net.cfg, "baichuan"), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(families.hf_config(net.cfg, 2, "baichuan")))
    return net


def test_baichuan_packed_weights_are_read_for_both_sizes(tmp_path):
    plain = dataclasses.replace(EVERY["llama"], n_kv_heads=6, d_head=10)
    for number, positions in enumerate(("rope", "alibi")):
        folder = tmp_path / str(number)
        net = baichuan_folder(folder, dataclasses.replace(plain, positions=positions))
        back = checkpoint.load_model(folder)
        assert back.cfg == net.cfg
        assert torch.equal(back(tokens_for(plain)), net(tokens_for(plain)))
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**hf, "vocab_size": 125696}))
    with pytest.raises(ConfigError, match="Baichuan 2"):
        checkpoint.load_model(folder)
    with pytest.raises(ConfigError, match=re.escape("model.window=7: baichuan's code computes 0 only")):
        families.hf_config(dataclasses.replace(plain, window=7), family="baichuan")


def test_buffers_of_older_versions_and_a_second_copy_of_a_tied_head_are_passed_over(tmp_path):
    net = shaken(dataclasses.replace(EVERY["llama"], tie_embeddings=True))
    folder = saved(net, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(7)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    (folder / "state.json").unlink()  # someone else's folder, which has no hashes
    assert torch.equal(checkpoint.load_model(folder)(tokens_for(net.cfg)), net(tokens_for(net.cfg)))


def test_a_folder_with_only_pickle_is_refused_with_the_way_out(tmp_path):
    folder = saved(make(EVERY["llama"]), tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"only as pickle \(pytorch_model.bin\).*save_pretrained"):
        checkpoint.load_model(folder)


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ({"weight_map": {"model.norm.weight": "../model.safetensors"}}, "no file of its own folder"),
        ({"weight_map": {"model.norm.weight": "model-2.safetensors"}}, "is missing"),
        ({"weight_map": {"nothing": "model.safetensors"}}, "nothing is in model.safetensors, and it is not"),
        ({"weight_map": {"model.norm.weight": "model.safetensors"}}, "another model"),
        ({"weight_map": ["model.safetensors"]}, "damaged"),
        ([], "damaged"),
    ],
)
def test_an_index_that_is_wrong_or_wicked_is_refused(tmp_path, index, expected):
    folder = saved(make(EVERY["llama"]), tmp_path)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "state.json").unlink()  # someone else's folder, which has no hashes
    with pytest.raises(ConfigError, match=expected):
        checkpoint.load_model(folder)


def test_every_shipped_config_is_a_family_that_is_named_as_published():
    expected = {"7b": "llama", "llama-3.1-8b": "llama", "olmo-1b": "olmo", "olmo-1.7-7b": "olmo",
                "olmo2-7b": "olmo2", "pythia-160m": "gpt_neox", "tinyllama": "llama", "baichuan-7b": "llama",
                "baichuan-13b": "nano360", "crystalcoder-phase1": "nano360"}  # fmt: skip
    for name, family in expected.items():
        assert families.family_of(config.load(name).model) == family, name


def test_packing_does_not_depend_on_the_order_of_a_state_dict():
    cfg = EVERY["neox"]
    ours = shaken(cfg).state_dict()
    theirs, backwards = families.to_family(ours, cfg), families.to_family(dict(reversed(ours.items())), cfg)
    assert all(torch.equal(theirs[name], backwards[name]) for name in theirs)


def test_a_mistral_without_a_window_in_its_config_has_the_class_default(tmp_path):
    hf = families.hf_config(PUBLISHED["mistral"])
    for window, expected in ((..., 4096), (None, 0), (9, 9)):
        values = {k: v for k, v in hf.items() if k != "sliding_window"}
        values |= {} if window is ... else {"sliding_window": window}
        assert families.settings(values).window == expected


def test_a_tied_model_with_another_head_in_its_file_is_refused(tmp_path):
    folder = saved(shaken(dataclasses.replace(EVERY["llama"], tie_embeddings=True)), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match='set "tie_word_embeddings": false'):
        checkpoint.load_model(folder)


def test_quantised_weights_are_refused(tmp_path):
    folder = saved(shaken(EVERY["llama"]), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="quantised"):
        checkpoint.load_model(folder)
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**hf, "quantization_config": {"bits": 8}}))
    with pytest.raises(ConfigError, match="quantised"):
        families.model_config(folder)


def test_a_mistral_whose_layers_differ_is_refused():
    hf = families.hf_config(PUBLISHED["mistral"])
    hf["layer_types"] = ["full_attention", "sliding_attention", "sliding_attention"]
    with pytest.raises(ConfigError, match="layer_types"):
        families.settings(hf)
    assert families.settings({**hf, "layer_types": ["sliding_attention"] * 3}).window == 7
