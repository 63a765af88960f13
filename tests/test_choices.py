"""Every setting that is a list of choices: each choice is computed, counted, and another one than the rest.

The settings are found in config.py, so that a new one fails here until SETTINGS says how to see what it does;
and a choice that was added to config.py alone is an error wherever it would be used, never another choice.
"""

import dataclasses
import json
import math
import typing
import zlib

import numpy as np
import pytest
import reference
import torch
from conftest import load
from test_incidents import B, Faults
from test_plan import kept_by_autograd, planned_to_be_kept
from torch import Tensor

import config
import consistency
import cost
import hardware
import incidents
import measure
import memory
import optim
import parallel
import plan
import tokenizer as tokenizers
import train
from config import Config, ConfigError, Model, Optim, Parallel, Train
from dataset import Dataset
from formats import documents, families
from initial import initial_weights
from model import Transformer

SIZES = dict(vocab_size=61, seq_len=14, d_model=24, n_layers=2, n_heads=3, n_kv_heads=1, d_head=10, d_ff=34)
TOKENS = torch.randint(61, (2, 13), generator=torch.Generator().manual_seed(5))


def literals() -> dict[str, tuple[type, str, tuple[str, ...]]]:
    """{"model.ffn": (Model, "ffn", ("swiglu", ...)), ...}: every setting that is a list of choices."""
    found = {}
    for section in vars(config).values():
        if dataclasses.is_dataclass(section) and section.__module__ == "config":
            for name, kind in typing.get_type_hints(section).items():
                if "Literal[" in str(kind):  # also one inside of a tuple, which nothing here would look into
                    if typing.get_args(kind)[1:] == (int,):  # words in the place of a number
                        kind = typing.get_args(kind)[0]
                    assert typing.get_origin(kind) is typing.Literal, f"{section.__name__}.{name}: {kind}"
                    found[f"{section.__name__.lower()}.{name}"] = section, name, typing.get_args(kind)
    return found


LITERALS = literals()
OF_THE_MODEL = [key for key, (section, _, _) in LITERALS.items() if section is Model]
CHOICES = [(key, choice) for key, (_, _, choices) in LITERALS.items() for choice in choices]


def with_choice(key: str, choice: str, **more):
    """The section of a setting: with_choice("optim.decay", "all", lr=0.1) -> Optim(decay="all", lr=0.1)."""
    section, name, _ = LITERALS[key]
    if section is Model:
        more = SIZES | {"mup_base_width": 8 if choice == "mup" else 0} | more
    made = section(**{name: choice}, **more)
    return made.resolved() if section is Model else made


# ---- how to see what a setting does -----------------------------------------------------------------------


def filled(cfg: Model) -> Transformer:
    """A model in which parameters of the same name are alike, and norms and biases no ones and zeros."""
    net = Transformer(cfg)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.normal_(0, 0.3, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    return net


def logits(key: str, choice: str, get) -> Tensor:
    return filled(with_choice(key, choice))(TOKENS).detach()


def first_values(key: str, choice: str, get) -> Tensor:
    net = Transformer(with_choice(key, choice))
    return torch.cat([value.flatten() for value in initial_weights(net, 3)])


def learned(cfg: Optim) -> tuple[Transformer, list[torch.optim.Optimizer]]:
    """A model with norms and biases after one update, and its optimizers."""
    net = filled(Model(**SIZES, norm="layernorm", bias=True))
    net(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    made = optim.optimizers(net, cfg)
    for optimizer in made:
        optimizer.step()
    return net, made


def updated_weights(key: str, choice: str, get) -> Tensor:
    net, _ = learned(with_choice(key, choice, lr=0.1, weight_decay=0.5))
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def rates(key: str, choice: str, get) -> Tensor:
    cfg = with_choice(key, choice, lr=1.0, warmup_steps=5)
    return torch.tensor([optim.learning_rate(step, 40, cfg) for step in range(41)])


def devices(key: str, choice: str, get) -> tuple:
    """Where a run trains with a GPU and without one."""
    found = []
    get("monkeypatch").setattr(torch.cuda, "device_count", lambda: 1)
    for there in (True, False):
        get("monkeypatch").setattr(torch.cuda, "is_available", lambda there=there: there)
        try:
            found.append(hardware.device(choice).type)
        except ConfigError:
            found.append("refused")
    return tuple(found)


def precisions(key: str, choice: str, get) -> tuple:
    get("monkeypatch").setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    found = [parallel.precision(choice, torch.device(where)) for where in ("cuda", "cpu")]
    names = {torch.bfloat16: "bf16", torch.float32: "fp32"}
    planned = [cost.precision(Config(train=with_choice(key, choice)), cuda) for cuda in (True, False)]
    assert planned == [names[dtype] for dtype in found]
    return tuple(found)


def residuals(key: str, choice: str, get) -> tuple:
    """What a block adds to, and the loss."""
    cfg = Config(model=Model(**SIZES), train=with_choice(key, choice, device="cpu"))
    net, _ = train.build(cfg, parallel.alone(), None)
    parallel.alone().fill(net, (p.detach() for p in filled(cfg.model.resolved()).parameters()))
    seen = []
    net.layers[1].register_forward_pre_hook(lambda block, arguments: seen.append(arguments[0].dtype))
    return net(TOKENS[:, :-1], TOKENS[:, 1:]).item(), *seen


def attentions(key: str, choice: str, get) -> tuple:
    """Which implementation is asked for, and whether cuDNN's kernels, which would come first, stay."""
    asked, monkeypatch = [], get("monkeypatch")
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", asked.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", asked.append)
    hardware.use_attention(with_choice(key, choice).attention, torch.device("cuda"))
    return tuple(asked)


def compiled(key: str, choice: str, get) -> tuple:
    """Whether blocks are compiled on CUDA, and on a CPU. Nothing is moved to a GPU, which need not exist."""
    get("monkeypatch").setattr(Transformer, "to_empty", lambda net, device: net)
    cfg, found = Config(train=with_choice(key, choice)), []
    for where in ("cuda", "cpu"):
        net = Transformer(Model(**SIZES))
        parallel.World(0, 1, torch.device(where), torch.float32).spread(net, cfg)
        found.append("forward" in vars(net.layers[0]))
    return tuple(found)


def recomputed(key: str, choice: str, get) -> list[float]:
    """Bytes that each block keeps for its backward, as planned."""
    cfg = memory.chosen(Config(model=Model().resolved(), train=with_choice(key, choice)), 1, "h200")
    return memory.sizes(cfg, 1, cuda=True).kept


def meshes(key: str, choice: str, get) -> tuple:
    return consistency.mesh_shape(with_choice(key, choice), 4)


def after_an_incident(key: str, choice: str, get) -> tuple:
    """The first row of every batch that a run learned from, whose fourth is bad once; how the run ended."""
    run, recipe = get("tmp_path") / choice, get("recipe")
    back = ("--train.rollback_steps=1", "--train.rollback_skip=2") if choice == "rollback" else ()
    asked = (f"--{key}={choice}", *back, "--train.steps=9")
    cfg, end = load(recipe, run, *asked), "finished"
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch, Dataset(cfg.dataset), {3 * B: math.nan}, times=1)
        try:
            train.train(cfg)
        except incidents.Stopped:
            end = "stopped"
    return [batch[0] for batch in faults.seen], end


def texts(key: str, choice: str, get) -> list[str]:
    folder = get("tmp_path")
    (folder / "code.py").write_text('def f():\n    "What it does."\n')
    (folder / "web.jsonl").write_text(json.dumps({"text": "One page."}) + "\n")
    source = with_choice(key, choice, name="mixed", paths=(f"{folder}/code.py", f"{folder}/web.jsonl"))
    return [document.text for document in documents.read(source)]


def ids(key: str, choice: str, get) -> list[int]:
    folder = get("tmp_path")
    (folder / "some.txt").write_text(
        "".join(f"{n} sheep went up the hill with {n**3} pigs\n" for n in range(60))
    )
    tokenizers.train([f"{folder}/some.txt"], f"{folder}/{choice}", {"kind": choice, "vocab_size": 300}, [])
    return tokenizers.load(f"{folder}/{choice}").encode("seven goats went up the hill")


# For every setting: what shows the difference between its choices, and whether cost.py depends on it.
SETTINGS = {
    "model.ffn": (logits, True),
    "model.norm": (logits, True),
    "model.norm_place": (logits, True),
    "model.positions": (logits, True),
    "model.rope_pairs": (logits, False),
    "model.init": (first_values, False),
    "tokenizer.kind": (ids, False),
    "source.read": (texts, False),
    "optim.optimizer": (updated_weights, True),
    "optim.schedule": (rates, False),
    "optim.decay": (updated_weights, False),
    "train.device": (devices, False),
    "train.precision": (precisions, True),
    "train.residual": (residuals, True),
    "train.attention": (attentions, False),
    "train.compile": (compiled, True),
    "train.activation_checkpointing": (recomputed, True),
    "train.on_incident": (after_an_incident, False),
    "parallel.strategy": (meshes, True),
}


def same(a, b) -> bool:
    """Equal, or closer than two ways to compute the same numbers."""
    return torch.allclose(a, b, rtol=1e-3, atol=1e-5) if isinstance(a, Tensor) else a == b


# ---- what is held to it -----------------------------------------------------------------------------------


def test_every_setting_with_choices_is_looked_at():
    assert set(SETTINGS) == set(LITERALS)


@pytest.mark.parametrize("key", LITERALS)
def test_every_choice_is_computed_and_differs_from_all_others(key, request):
    see, choices = SETTINGS[key][0], LITERALS[key][2]
    found = {choice: see(key, choice, request.getfixturevalue) for choice in choices}
    alike = [(a, b) for a in choices for b in choices if a < b and same(found[a], found[b])]
    assert not alike, f"{key}: these do the same: {alike}"


@pytest.fixture
def another(monkeypatch):
    """another("model.ffn") adds a choice to config.py alone, and is its name."""

    def add(key: str) -> str:
        section, name, choices = LITERALS[key]
        more, has_numbers = typing.Literal[(*choices, "another")], type(getattr(section, name)) is int
        monkeypatch.setitem(section.__annotations__, name, more | int if has_numbers else more)
        return "another"

    return add


@pytest.mark.parametrize("key", LITERALS)
def test_a_choice_that_config_alone_has_is_an_error_and_no_other_choice(key, another, request):
    with pytest.raises(ValueError, match=f"{LITERALS[key][1]}='another'"):
        SETTINGS[key][0](key, another(key), request.getfixturevalue)


# Where the tests above do not come: results, a plan's GPU, an optimizer's shards, tensor parallel.
ALSO_USED_BY = [
    ("train.device", lambda: measure.device_of(Config(train=Train(device="another")))),
    ("train.device", lambda: plan.command_line(["7b", "--train.device=another"])),
    ("optim.optimizer", lambda: Config(optim=Optim(optimizer="another")).resolved()),
    ("model.positions", lambda: Config(model=Model(positions="another"), parallel=Parallel(tp=2)).resolved()),
]


@pytest.mark.parametrize("key, use", ALSO_USED_BY)
def test_a_choice_that_config_alone_has_is_an_error_of_others_that_ask_for_it(key, use, another):
    another(key)
    with pytest.raises(ValueError, match=f"{key}='another'"):
        use()


# ---- the model, by others ---------------------------------------------------------------------------------


@pytest.mark.parametrize("key, choice", [(key, choice) for key, choice in CHOICES if key in OF_THE_MODEL])
def test_every_choice_of_the_model_is_the_one_of_the_independent_implementation(key, choice):
    net = filled(with_choice(key, choice))
    weights = {name: p.detach().double().numpy() for name, p in net.named_parameters()}
    expected = reference.logits(net.cfg, weights, TOKENS.numpy())
    np.testing.assert_allclose(net(TOKENS).detach().numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("key", [key for key in OF_THE_MODEL if key != "model.init"])
def test_every_choice_of_the_model_is_written_into_a_checkpoint(key, another):
    for choice in (*LITERALS[key][2], another(key)):
        cfg = with_choice(key, choice)
        assert families.settings(families.hf_config(cfg)) == cfg, choice
        assert choice != "another" or families.family_of(cfg) == "nano360"


def test_a_vector_begins_as_its_module_says():
    net = Transformer(Model(**SIZES, norm="layernorm", bias=True))
    norm = net.layers[1].post_attention_layernorm
    norm.scale, norm.first_values["scale"] = torch.nn.Parameter(torch.empty(7)), 0.5
    began = dict(zip([name for name, _ in net.named_parameters()], initial_weights(net, 1), strict=True))
    assert torch.equal(began["layers.1.post_attention_layernorm.scale"], torch.full((7,), 0.5))
    assert torch.equal(began["layers.1.post_attention_layernorm.weight"], torch.ones(24))
    assert torch.equal(began["layers.1.self_attn.o_proj.bias"], torch.zeros(24))
    del norm.first_values["scale"]  # and nobody guesses where it says nothing
    with pytest.raises(KeyError, match="scale"):
        list(initial_weights(net, 1))


# ---- what it costs ----------------------------------------------------------------------------------------


def config_with(key: str, choice: str) -> Config:
    sections = {f.name: f.type for f in dataclasses.fields(Config)}
    section = key.split(".")[0]
    model = {"model": Model(**SIZES).resolved(), "train": Train(batch_size=8, micro_batch_size=2)}
    return Config(**model | ({section: with_choice(key, choice)} if section in sections else {}))


@pytest.mark.parametrize("key, choice", CHOICES)
def test_every_choice_is_counted(key, choice):
    if key in OF_THE_MODEL:
        model = with_choice(key, choice)
        with torch.device("meta"):
            net = Transformer(model)
        assert sum(cost.parameters(model).values()) == sum(p.numel() for p in net.parameters())
        for bf16 in (False, True):
            assert planned_to_be_kept(model, 3, bf16) == kept_by_autograd(model, 3, bf16)
    if key == "optim.optimizer":
        net, made = learned(with_choice(key, choice))
        moments = [m for o in made for state in o.state.values() for m in state.values() if m.numel() > 1]
        cfg = Config(model=net.cfg, optim=with_choice(key, choice))
        assert cost.optimizer_numbers(cfg) == sum(m.numel() for m in moments)
    for gpus in (1, 4):
        for cuda in (False, True):
            cfg = memory.chosen(config_with(key, choice), gpus, "h200" if cuda else "cpu")
            assert 0 < memory.total(memory.peak(cfg, gpus, cuda)) < 1e7 + memory.WORKSPACES


@pytest.mark.parametrize("key", LITERALS)
def test_a_choice_that_is_not_counted_is_an_error_of_the_plan_where_it_costs_something(key, another):
    costs, cfg = SETTINGS[key][1], config_with(key, another(key))
    if not costs:
        plain = config_with(key, LITERALS[key][2][0])
        assert memory.peak(cfg, 4, cuda=True) == memory.peak(plain, 4, cuda=True)
        return
    with pytest.raises(ValueError, match=rf"{key}='another'"):
        memory.peak(cfg, 4, cuda=True)
    if key in OF_THE_MODEL:
        for count in (cost.parameters, cost.flops_per_token, lambda m: planned_to_be_kept(m, 2, True)):
            with pytest.raises(ValueError, match=rf"{key}='another'"):
                count(cfg.model)
