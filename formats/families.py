"""Published model families: finds the family of a model, and translates its settings and tensors.

    families.family_of(cfg)                          # "llama"
    families.hf_config(cfg, eot)                     # config.json, as a dict
    families.model_config("models/pythia")           # settings of a published folder, or a ConfigError
    families.place("layers.0.mlp.up_proj.weight", "llama")  # that family's name for a tensor of ours

A checkpoint is a Hugging Face model folder. Other tools look in it for a config.json and for tensors by the
names of a family. This file translates in both directions; checkpoint.py and convert.py read and write the
files.

    llama      LLaMA 1, 2, 3, 3.1, Amber, TinyLlama, OpenLLaMA      mistral    the same with a sliding window
    olmo       OLMo 1 and 1.7                                       olmo2      OLMo 2
    gpt_neox   Pythia, GPT-NeoX                                     baichuan   baichuan-7B and 13B (packed)
    nano360    every other model of ours, with our own names: no class of `transformers` computes it

A model belongs to the first family whose class computes it: a plain LLaMA of baichuan's sizes is a "llama".
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from config import ConfigError, Model
from formats import shards

# The settings in which families differ, with the values that LLaMA's class computes.
LLAMA = dict(
    ffn="swiglu", norm="rmsnorm", norm_place="before", qk_norm=False, clip_qkv=0.0, bias=False,
    parallel_residual=False, positions="rope", rope_fraction=1.0, rope_pairs="halves", rope_scaling=1.0,
    window=0, embedding_multiplier=1.0, logits_multiplier=1.0, mup_base_width=0,
)  # fmt: skip
NEOX = {**LLAMA, "ffn": "gelu", "norm": "layernorm", "bias": True}
FAMILIES = {  # name -> (what it fixes, what it leaves open)
    "llama": (LLAMA, {"bias", "rope_scaling"}),
    "mistral": (LLAMA, {"window"}),
    "olmo": ({**LLAMA, "norm": "nonparametric_layernorm", "norm_eps": 1e-5}, {"clip_qkv"}),
    "olmo2": ({**LLAMA, "norm_place": "after", "qk_norm": True}, set()),
    "gpt_neox": (NEOX, {"rope_fraction", "parallel_residual"}),
}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "olmo": "OlmoForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
}
READ = (*FAMILIES, "baichuan", "nano360")  # every model_type that is read
FORMAT = 1  # the format of a "nano360" config.json
# Buffers that older versions of `transformers` stored beside the weights. They are computed here.
NOT_WEIGHTS = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")


def family_of(cfg: Model) -> str:
    """The first family whose class computes the model: family_of(Model()) -> "llama"."""
    return next((family for family in FAMILIES if computes(family, cfg.resolved())), "nano360")


def computes(family: str, cfg: Model) -> bool:
    """Whether the family's class computes this model."""
    fixed, free = FAMILIES[family]
    if any(getattr(cfg, name) != value for name, value in fixed.items() if name not in free):
        return False
    if cfg.d_model % cfg.n_heads:  # every class demands this, even where the width of a head is a setting
        return False
    if family not in ("llama", "mistral") and cfg.d_head != cfg.d_model // cfg.n_heads:
        return False
    return not (family == "gpt_neox" and cfg.n_kv_heads != cfg.n_heads)


# ---- settings ---------------------------------------------------------------------------------------------


def hf_config(cfg: Model, eot: int | None = None, family: str = "") -> dict:
    """config.json of the `transformers` class that computes this model, or our own where there is none.

    `eot`: id of the token that ends a document. `family`: "" for the first that fits, or "baichuan" for a
    folder as baichuan published it.
    """
    cfg = cfg.resolved()
    family = family or family_of(cfg)
    ids = {"bos_token_id": None, "eos_token_id": eot, "pad_token_id": None}  # nothing precedes a document
    if family == "nano360":
        own = {"format": FORMAT, "model": dataclasses.asdict(cfg)}
        return {"architectures": ["Transformer"], "model_type": family, **own, **ids}

    # Rotary positions, and Llama 3.1's scaling of them.
    rope = {"rope_type": "default", "rope_theta": cfg.rope_theta}
    if cfg.rope_scaling != 1:
        rope |= {"rope_type": "llama3", "factor": cfg.rope_scaling}
        rope |= {"low_freq_factor": cfg.rope_scaling_low, "high_freq_factor": cfg.rope_scaling_high}
        rope |= {"original_max_position_embeddings": cfg.rope_scaling_seq_len}

    # The entries that all families have.
    values = {
        "architectures": [CLASSES.get(family, "BaiChuanForCausalLM")],
        "model_type": family,
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.seq_len,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "intermediate_size": cfg.d_ff,
        "hidden_act": "silu",
        "attention_bias": cfg.bias,
        "tie_word_embeddings": cfg.tie_embeddings,
        "rope_theta": cfg.rope_theta,  # transformers 4 reads this one, 5 the next
        "rope_parameters": rope,
        "initializer_range": cfg.init_std,
        "torch_dtype": "float32",
        "use_cache": True,
        **ids,
    }
    if cfg.rope_scaling != 1:
        values["rope_scaling"] = rope  # transformers 4 again
    if cfg.document_mask:
        values["document_mask"] = True  # ours alone: others let documents in a row see one another

    # The entries of each family.
    if family in ("llama", "mistral"):
        values |= {"rms_norm_eps": cfg.norm_eps, "head_dim": cfg.d_head}
        values |= {"mlp_bias": cfg.bias} if family == "llama" else {"sliding_window": cfg.window}
    elif family == "olmo":
        values["clip_qkv"] = cfg.clip_qkv or None
    elif family == "olmo2":
        values["rms_norm_eps"] = cfg.norm_eps
    elif family == "gpt_neox":
        rope["partial_rotary_factor"] = cfg.rope_fraction
        values |= {"hidden_act": "gelu", "layer_norm_eps": cfg.norm_eps, "rotary_pct": cfg.rope_fraction}
        values |= {"rotary_emb_base": cfg.rope_theta, "use_parallel_residual": cfg.parallel_residual}
    elif family == "baichuan":
        check_baichuan(cfg)
        values["rms_norm_eps"] = cfg.norm_eps
        if cfg.positions == "alibi":  # the 13B; the name of the length tells the two apart
            values["model_max_length"] = values.pop("max_position_embeddings")
            values["architectures"] = ["BaichuanForCausalLM"]
    return values


def check_baichuan(cfg: Model) -> None:
    """Raises ConfigError for a model that baichuan's code does not compute."""
    fixed = {**LLAMA, "rope_theta": 10000.0, "n_kv_heads": cfg.n_heads, "d_head": cfg.d_model // cfg.n_heads}
    check_fixed(cfg, {**fixed, "positions": cfg.positions}, "baichuan")
    if cfg.positions not in ("rope", "alibi"):
        raise ConfigError(f"model.positions={cfg.positions!r}: baichuan's code has rope (7B) and alibi (13B)")


def check_fixed(cfg: Model, fixed: dict, whose: str) -> None:
    """Raises ConfigError where a setting is not what `whose` code computes, the value in `fixed`."""
    for name, value in fixed.items():
        if getattr(cfg, name) != value:
            said = f"model.{name}={getattr(cfg, name)!r}"
            raise ConfigError(f"{said}: {whose}'s code computes {value!r} only; write a plain folder")


def read_config(folder: Path | str) -> dict:
    """config.json of a model folder. ConfigError where there is none, or it is no model's."""
    path = Path(folder) / "config.json"
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{folder} is not a model folder: it has no config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is damaged or not a model's: {type(error).__name__}: {error}") from None
    family = hf.get("model_type") if isinstance(hf, dict) else None
    if family not in READ:
        raise ConfigError(
            f"{path}: model_type {family!r} is not one that this reads; it reads {', '.join(READ)}"
        )
    return hf


def model_config(folder: Path | str) -> Model:
    """The settings of the model in a folder of any of these families. Raises ConfigError for any other.

    Of the settings for initialisation the file has only init_std; the others keep their defaults.
    """
    hf, path = read_config(folder), Path(folder) / "config.json"
    try:
        return settings(hf).resolved()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{path} is damaged or not a model's: {type(error).__name__}: {error}") from None


def settings(hf: dict) -> Model:
    """config.json -> our settings. Raises ConfigError for a model that is not computed here."""
    family = hf["model_type"]
    if family == "nano360":
        if hf.get("format") != FORMAT:
            raise ConfigError(f"format {hf.get('format')}; this version reads format {FORMAT}")
        return Model(**hf["model"])
    if hf.get("quantization_config"):
        raise ConfigError("its weights are quantised, and those are not read")
    neox = family == "gpt_neox"
    fixed = dict(FAMILIES.get(family, FAMILIES["llama"])[0])

    # Rotary positions. transformers 5 has a table of them, 4 has single entries and a table for scaling.
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    rope.setdefault("rope_theta", hf.get("rotary_emb_base" if neox else "rope_theta", 10000.0))
    rope.setdefault("partial_rotary_factor", hf.get("rotary_pct", 0.25) if neox else 1.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "llama3":
        fixed["rope_scaling"] = float(rope["factor"])
        fixed["rope_scaling_low"] = float(rope["low_freq_factor"])
        fixed["rope_scaling_high"] = float(rope["high_freq_factor"])
        fixed["rope_scaling_seq_len"] = rope["original_max_position_embeddings"]
    elif kind != "default":
        raise ConfigError(f"rotary embedding scaled as {kind!r} is not supported, only 'llama3'")
    fixed["rope_theta"] = float(rope["rope_theta"])
    if neox:
        fixed["rope_fraction"] = rope["partial_rotary_factor"]
    else:
        require(rope, partial_rotary_factor=1.0)

    # Biases and the activation.
    if family == "llama":
        fixed["bias"] = hf.get("attention_bias", False)
        require(hf, mlp_bias=fixed["bias"])
    else:
        require(hf, attention_bias=neox, mlp_bias=False)
    require(hf, hidden_act="gelu" if neox else "silu")

    # The entries of each family. A missing one means the default of the family's class.
    if family == "olmo":
        fixed["clip_qkv"] = float(hf.get("clip_qkv") or 0)
    if family == "mistral":
        fixed["window"] = hf.get("sliding_window", 4096) or 0
        kinds = set(hf.get("layer_types") or ["sliding_attention"])
        if fixed["window"] and kinds != {"sliding_attention"}:
            raise ConfigError("layer_types: layers with and without a sliding window are not supported")
    if neox:
        fixed["parallel_residual"] = hf.get("use_parallel_residual", True)
    if family == "baichuan":
        if hf["vocab_size"] == 125696:
            raise ConfigError(
                "this is Baichuan 2, whose head is normalised; only the first baichuan is supported"
            )
        fixed["positions"] = "rope" if "max_position_embeddings" in hf else "alibi"
    if neox:
        fixed["norm_eps"] = hf.get("layer_norm_eps", 1e-5)
    elif family != "olmo":
        fixed["norm_eps"] = hf.get("rms_norm_eps", 1e-5 if family == "olmo2" else 1e-6)

    return Model(
        vocab_size=hf["vocab_size"],
        seq_len=hf["model_max_length"] if fixed["positions"] == "alibi" else hf["max_position_embeddings"],
        d_model=hf["hidden_size"],
        n_layers=hf["num_hidden_layers"],
        n_heads=hf["num_attention_heads"],
        n_kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
        d_head=hf.get("head_dim") or 0,
        d_ff=hf["intermediate_size"],
        tie_embeddings=hf.get("tie_word_embeddings", False),
        document_mask=hf.get("document_mask", False),
        init_std=hf.get("initializer_range", 0.02),
        **fixed,
    )


def require(hf: dict, **values) -> None:
    """Raises ConfigError where an entry exists and has another value than the one given."""
    for name, only in values.items():
        if hf.get(name, only) != only:
            raise ConfigError(f"{name}={hf[name]!r} is not supported, only {only!r}")


def end_of_text(hf: dict) -> int | None:
    """Id of the token that ends a document, by a folder's config.json: the first where there are several."""
    eot = hf.get("eos_token_id")
    return (eot[0] if eot else None) if isinstance(eot, list) else eot


# ---- tensors ----------------------------------------------------------------------------------------------

NEOX_NAMES = {
    "embed_tokens": "gpt_neox.embed_in",
    "self_attn.o_proj": "attention.dense",
    "mlp.up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
    "norm": "gpt_neox.final_layer_norm",
    "lm_head": "embed_out",
}
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # one tensor in GPT-NeoX and baichuan


def place(name: str, family: str) -> tuple[str, int | None]:
    """Where a family keeps a tensor of ours: its name there, and its part where three are packed in one.

    place("layers.0.mlp.up_proj.weight", "llama") -> "model.layers.0.mlp.up_proj.weight", None
    place("layers.0.self_attn.k_proj.weight", "baichuan") -> "model.layers.0.self_attn.W_pack.weight", 1
    """
    module, _, kind = name.rpartition(".")
    prefix, inside = "", module
    if module.startswith("layers."):
        _, layer, inside = module.split(".", 2)
        prefix = f"layers.{layer}."
    part = PARTS.index(inside) if inside in PARTS else None
    if family == "gpt_neox":
        inside = "attention.query_key_value" if part is not None else NEOX_NAMES.get(inside, inside)
        return f"{'gpt_neox.' if prefix else ''}{prefix}{inside}.{kind}", part
    top = "" if module == "lm_head" else "model."
    if family == "baichuan" and part is not None:
        return f"{top}{prefix}self_attn.W_pack.{kind}", part
    return f"{top}{prefix}{inside}.{kind}", None


def unpack(stored: Tensor, part: int | None, cfg: Model, family: str) -> Tensor:
    """A tensor of ours, taken out of the stored tensor and part that `place` names.

    GPT-NeoX packs (H, 3, Dh): the query, key and value rows of a head are together. baichuan packs (3, H Dh).
    """
    if part is None:
        return stored
    if family == "gpt_neox":
        by_head = stored.unflatten(0, (cfg.n_heads, 3, cfg.d_head))
        return by_head[:, part].flatten(0, 1)
    return stored.unflatten(0, (3, -1))[part]


def to_family(tensors: dict[str, Tensor], cfg: Model, family: str = "") -> dict[str, Tensor]:
    """Our tensors by our names -> the family's, packed where it packs. `unpack` is the way back."""
    cfg = cfg.resolved()
    family = family or family_of(cfg)
    out, packed = {}, {}
    for name, value in tensors.items():
        theirs, part = place(name, family)
        if part is None:
            out[theirs] = value.contiguous()
        else:
            packed.setdefault(theirs, [None] * 3)[part] = value

    # A packed tensor is made once its three parts are known, whatever their order was.
    for theirs, three in packed.items():
        if family == "gpt_neox":
            by_head = [value.unflatten(0, (cfg.n_heads, cfg.d_head)) for value in three]
            out[theirs] = torch.stack(by_head, dim=1).flatten(0, 2)
        else:
            out[theirs] = torch.cat(three)
    return out


def reader(folder: Path | str, model) -> Callable[[str], torch.Tensor]:
    """Returns a function that reads a tensor of a model folder by our name for it; for use inside `compared`.

    Raises ConfigError unless names and shapes agree. It reads the files' headers for that, and no tensor
    except a second copy of a tied head.
    """
    # Find our tensors, and where the family keeps them.
    model, family = getattr(model, "module", model), read_config(folder)["model_type"]
    cfg, tensors = model.cfg, shards.open_weights(folder)
    ours = {name: (value.shape, *place(name, family)) for name, value in model.state_dict().items()}
    theirs = {stored for _, stored, _ in ours.values()}

    # Compare the names. Some writers store a tied head a second time.
    names = {name for name in tensors if not name.endswith(NOT_WEIGHTS)}
    head, shared = (place(f"{name}.weight", family)[0] for name in ("lm_head", "embed_tokens"))
    twice = cfg.tie_embeddings and names - theirs == {head}
    if twice:
        names -= {head}
    if names != theirs:
        strange, missing = sorted(names - theirs)[:3], sorted(theirs - names)[:3]
        raise ConfigError(
            f"the weights in {folder} are of another model: they have {strange} that this one lacks, and not "
            f"{missing}"
        )

    # Compare the types and shapes.
    for shape, name, part in ours.values():
        header = tensors[name].get_slice(name)
        stored, wanted = tuple(header.get_shape()), ((1 if part is None else 3) * shape[0], *shape[1:])
        if not header.get_dtype().startswith(("F", "BF")):  # F32, BF16, F8_E4M3, ..., not I8 or U8
            dtype = tensors[name].get_tensor(name).dtype
            raise ConfigError(
                f"{folder}: {name} is {dtype}, not numbers but codes; quantised weights are not read"
            )
        if stored != wanted:
            raise ConfigError(f"{folder}: {name} is {stored}, the model wants {wanted}")
    if twice and not torch.equal(tensors[head].get_tensor(head), tensors[shared].get_tensor(shared)):
        raise ConfigError(
            f"{folder}: config.json ties the head to the embedding, and {head} is not {shared}; if the "
            'model has a head of its own, set "tie_word_embeddings": false there'
        )

    def read(name: str) -> torch.Tensor:
        _, stored, part = ours[name]
        return unpack(tensors[stored].get_tensor(stored), part, cfg, family)

    return read


def layout(
    shapes: dict[str, Tensor], cfg: Model, family: str = "", itemsize: int = 4, limit: float = 0
) -> tuple[dict[str, list[str]], dict[str, bytes]]:
    """(file -> our names of its tensors; the index) of a model to be written, as shards.layout gives it.

    A family can store several of our tensors as one (Pythia's q, k, v): they are in the same file.
    """
    parts: dict[str, list[str]] = {}  # the family's name for a tensor -> our names for its parts
    for name in shapes:
        parts.setdefault(place(name, family or family_of(cfg))[0], []).append(name)
    sizes = {
        stored: itemsize * sum(shapes[name].numel() for name in names) for stored, names in parts.items()
    }
    files, index = shards.layout("model", sizes, limit)
    ours = {}
    for file, stored_names in files.items():
        ours[file] = [name for stored in stored_names for name in parts[stored]]
    return ours, index
