"""The run folder and the checkpoints in it: saved atomically, opened by anyone, resumed exactly.

    runs/demo/
      config.json    every resolved value, git commit, versions, device
      dataset.json   the manifest of the data, as it was
      ledger.jsonl   what happened: start, resume, checkpoint, interrupted, nonfinite, finish
      metrics.jsonl  one line a step; after a resume a step can stand twice, and the later line counts
      checkpoints/step-00000640/
        config.json model.safetensors tokenizer.json ...   a Hugging Face model folder, weights in FP32
        optimizer.safetensors                              AdamW's moments and the random state
        state.json                                         step, position in the data, hashes: written last

A checkpoint is written into a hidden folder beside the others and renamed when every byte of it is on disk.
A folder without state.json is incomplete and ignored. Nothing is pickled: it is safe to open a stranger's.
"""

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

import files
from config import ConfigError, Model
from model import Transformer

FORMAT = 1  # of state.json; a reader refuses what it does not know


class Checkpoint(NamedTuple):
    path: Path
    step: int  # finished updates
    state: dict  # state.json


# ---- our names and settings, and Hugging Face's -----------------------------------------------------------


def hf_config(cfg: Model, eot: int | None = None) -> dict:
    """config.json of the `transformers` class that computes this model. ConfigError where none does."""
    cfg = cfg.resolved()
    values = {
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.seq_len,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "intermediate_size": cfg.d_ff,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": cfg.tie_embeddings,
        "rope_theta": cfg.rope_theta,  # transformers 4 reads this one, 5 the next
        "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
        "initializer_range": cfg.init_std,
        "torch_dtype": "float32",
        "use_cache": True,
        "bos_token_id": None,  # nothing is put before a document; eot follows it
        "eos_token_id": eot,
        "pad_token_id": None,
    }
    if cfg.norm == "rmsnorm":
        own = {"rms_norm_eps": cfg.norm_eps, "head_dim": cfg.d_head, "mlp_bias": False}
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **values, **own}
    if cfg.norm_eps != 1e-5 or cfg.d_head * cfg.n_heads != cfg.d_model:
        raise ConfigError(
            f"model.norm_eps={cfg.norm_eps} and model.d_head={cfg.d_head}: OLMo-1, as published and as "
            f"transformers computes it, has norm_eps 1e-5 and d_head d_model / n_heads; use those"
        )
    return {"architectures": ["OlmoForCausalLM"], "model_type": "olmo", **values, "clip_qkv": None}


def model_config(folder: Path | str) -> Model:
    """The settings of the model in a Hugging Face folder, Llama or OLMo. Raises ConfigError for any other."""
    path = Path(folder) / "config.json"
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
        kind = hf["model_type"]
        if kind not in ("llama", "olmo"):
            raise ConfigError(
                f"{path}: model_type {kind!r} is not one that this reads; it reads llama and olmo"
            )
        rope = hf.get("rope_parameters") or {
            "rope_theta": hf.get("rope_theta", 10000.0),
            **(hf.get("rope_scaling") or {}),
        }
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ConfigError(f"{path}: scaled rotary embedding {rope} is not supported")
        unsupported = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "clip_qkv": None}
        for name, only in unsupported.items():
            if hf.get(name, only) != only:
                raise ConfigError(f"{path}: {name}={hf[name]!r} is not supported, only {only!r}")
        return Model(
            vocab_size=hf["vocab_size"],
            seq_len=hf["max_position_embeddings"],
            d_model=hf["hidden_size"],
            n_layers=hf["num_hidden_layers"],
            n_heads=hf["num_attention_heads"],
            n_kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
            d_head=hf.get("head_dim") or 0,
            d_ff=hf["intermediate_size"],
            norm="rmsnorm" if kind == "llama" else "nonparametric_layernorm",
            norm_eps=hf["rms_norm_eps"] if kind == "llama" else 1e-5,
            rope_theta=rope["rope_theta"],
            tie_embeddings=hf.get("tie_word_embeddings", False),
            init_std=hf.get("initializer_range", 0.02),
        ).resolved()
    except FileNotFoundError:
        raise ConfigError(f"{folder} is not a model folder: it has no config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged or not a model's: {type(error).__name__}: {error}") from None


def hf_name(name: str) -> str:
    """layers.0.mlp.up_proj.weight -> model.layers.0.mlp.up_proj.weight; the head alone stands outside."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def bare(model: nn.Module) -> Transformer:
    """The model itself, out of whatever wraps it."""
    return getattr(model, "module", model)


# ---- saving -----------------------------------------------------------------------------------------------


def save(
    run: Path | str, model: nn.Module, optimizer, state: dict, tokenizer_files: dict[str, bytes]
) -> Path:
    """Writes checkpoints/step-... and returns its path.

    `state` has step, rows, tokens, chunk and the hashes of the data. Killed at any moment, or stopped by a
    full disk, it leaves the checkpoints that were there as they were.
    """
    folder = Path(run) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{state['step']:08d}"
    for left in folder.glob(".step-*"):  # of a save that was killed
        shutil.rmtree(left, ignore_errors=True)
    aside = folder / f".{final.name}.{os.getpid()}"
    aside.mkdir()
    try:
        model = bare(model)
        weights = {hf_name(name): value.contiguous() for name, value in model.state_dict().items()}
        save_file(weights, aside / "model.safetensors", metadata={"format": "pt"})
        save_file(
            optimizer_tensors(model, optimizer), aside / "optimizer.safetensors", metadata={"format": "pt"}
        )
        (aside / "config.json").write_text(
            json.dumps(hf_config(model.cfg, state.get("eot")), indent=1) + "\n"
        )
        for name, content in tokenizer_files.items():
            (aside / name).write_bytes(content)
        written = sorted(aside.iterdir())
        for path in written:
            files.sync(path)
        hashes = {path.name: files.sha256(path) for path in written}
        state = {"format": FORMAT, **state, "time": time.time(), "files": hashes}
        files.write_json(aside / "state.json", state)
        if final.exists():  # without its state.json: someone's, not ours
            shutil.rmtree(final)
        os.replace(aside, final)
        files.sync(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return final


def optimizer_tensors(model: Transformer, optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state under the parameters' names, and the state of the random generators."""
    tensors = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value.contiguous()
    return tensors


# ---- loading ----------------------------------------------------------------------------------------------


def checkpoints(run: Path | str) -> list[Checkpoint]:
    """The complete checkpoints of a run, by ascending step, a number: 1,000,000 comes after 999,999."""
    found = []
    for path in (Path(run) / "checkpoints").glob("step-*"):
        if not (match := re.fullmatch(r"step-(\d+)", path.name)):
            continue
        try:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if not isinstance(state, dict):
            continue
        if state.get("format") != FORMAT or state.get("step") != int(match[1]):
            raise ConfigError(
                f"{path}/state.json says format {state.get('format')} and step {state.get('step')}; "
                f"this version reads format {FORMAT}, and the step must be the folder's"
            )
        found.append(Checkpoint(path, state["step"], state))
    return sorted(found, key=lambda c: c.step)


def load_weights(folder: Path | str, model: nn.Module) -> None:
    """model.safetensors of a folder into a model, in place. ConfigError unless names and shapes agree."""
    path = Path(folder) / "model.safetensors"
    target = {hf_name(name): value for name, value in bare(model).state_dict().items()}
    with open_tensors(path) as tensors:
        names = set(tensors.keys())
        if bare(model).cfg.tie_embeddings:
            names.discard("lm_head.weight")  # some writers store the shared matrix twice
        if names != set(target):
            strange, missing = sorted(names - set(target))[:3], sorted(set(target) - names)[:3]
            raise ConfigError(
                f"{path} is of another model: it has {strange} that this one lacks, and not {missing}"
            )
        for name, value in target.items():
            stored = tensors.get_tensor(name)
            if stored.shape != value.shape:
                raise ConfigError(
                    f"{path}: {name} is {tuple(stored.shape)}, the model wants {tuple(value.shape)}"
                )
            value.copy_(stored)


def load_optimizer(folder: Path | str, model: nn.Module, optimizer) -> None:
    """The optimizer as it was saved, and the random generators, in place."""
    path = Path(folder) / "optimizer.safetensors"
    with open_tensors(path) as tensors:
        names = set(tensors.keys())
        for name, parameter in bare(model).named_parameters():
            if names == {"random.cpu"} or names == {"random.cpu", "random.cuda"}:
                break  # step 0: nothing has moved yet
            moments = {key: f"{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq")}
            if not names.issuperset(moments.values()):
                raise ConfigError(
                    f"{path} lacks AdamW's state of {name}; it is of another model or optimizer"
                )
            optimizer.state[parameter] = {
                key: tensors.get_tensor(stored).to(parameter.device) for key, stored in moments.items()
            }
        torch.set_rng_state(tensors.get_tensor("random.cpu"))
        if "random.cuda" in names and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors.get_tensor("random.cuda"))


def open_tensors(path: Path):
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}; where it is damaged, remove its folder to go on without it"
        ) from None


def load_model(folder: Path | str, device: torch.device | str = "cpu") -> Transformer:
    """The model of a checkpoint folder, or of any Hugging Face folder of its families: FP32, in eval mode."""
    cfg = model_config(folder)
    with torch.device("meta"):
        model = Transformer(cfg)
    model = model.to_empty(device=device)
    with torch.no_grad():
        load_weights(folder, model)
    return model.eval().requires_grad_(False)
