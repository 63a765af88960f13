"""Every setting of nano360: its type, its default and its meaning; and how a config is loaded and checked.

A config is a plain Python file that ends in `config = Config(...)`. One spelling in three places:
`cfg.optim.lr` in code, `optim=Optim(lr=3e-4)` in a file, `--optim.lr=3e-4` on a command line.

    python train.py configs/demo.py --optim.lr=1e-3 --run=runs/hot     # any setting can be overridden
    python train.py demo --print-config                                # what would run, nothing runs
    python train.py --help                                             # every setting, default and meaning

`configs/demo.py`, `config/demo.py` and `demo` name the same file. This module imports no torch, so every
mistake in a config is reported in well under a second, before a GPU or a process group is touched.
"""

import ast
import dataclasses
import difflib
import json
import math
import os
import re
import runpy
import shlex
import sys
import textwrap
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from configurator import ConfigError, fail, script, show


class NormKind(NamedTuple):
    """What model.py and cost.py know of a norm. A new norm is a row of NORMS and a choice of Model.norm."""

    first_values: dict[str, float]  # what it learns for each channel, and the value that this begins with
    centred: bool  # it subtracts the mean (LayerNorm), or does not (RMSNorm)
    # FP32 numbers kept for backward beside the input: for each token, and on a CPU for each channel too
    # (tests/test_choices.py measures them)
    kept_per_token: int
    kept_per_channel_on_cpu: int


NORMS = {
    "rmsnorm": NormKind({"weight": 1.0}, False, 1, 1),  # a CPU computes it in steps and keeps x / rms(x)
    "layernorm": NormKind({"weight": 1.0, "bias": 0.0}, True, 2, 0),
    "nonparametric_layernorm": NormKind({}, True, 2, 0),
}


@dataclass(frozen=True)
class Model:
    """The transformer, by default LLaMA-7B but for norm_eps. A 0 marked "derived" is filled in later."""

    vocab_size: int = 32000  # rows of the embedding; at least the tokenizer's vocabulary
    seq_len: int = 2048  # tokens of context, T
    d_model: int = 4096  # width of the residual stream, D
    n_layers: int = 32  # blocks
    n_heads: int = 32  # query heads, H
    n_kv_heads: int = 0  # key/value heads, K: H/K queries share one; derived: n_heads
    d_head: int = 0  # width of a head, Dh; derived: d_model / n_heads
    d_ff: int = 11008  # hidden width of the feed-forward, F
    # the feed-forward: gated by SiLU (LLaMA) or GELU; or two matrices around GELU (Pythia) or squared ReLU
    ffn: Literal["swiglu", "geglu", "gelu", "relu2"] = "swiglu"
    # with a weight (LLaMA); with weight and bias (Pythia); with neither (OLMo-1)
    norm: Literal["rmsnorm", "layernorm", "nonparametric_layernorm"] = "rmsnorm"
    norm_eps: float = 1e-5  # added to the variance
    norm_place: Literal["before", "after"] = "before"  # on a sub-layer's input; or its output (OLMo 2)
    qk_norm: bool = False  # of queries and keys, over their whole width, before heads are cut (OLMo 2)
    clip_qkv: float = 0.0  # queries, keys and values are clamped to +- this; 0: not (OLMo-1.7: 8)
    bias: bool = False  # in every linear layer but the head (Pythia, CrystalCoder)
    parallel_residual: bool = False  # attention and feed-forward read the same stream (Pythia)
    positions: Literal["rope", "alibi", "learned", "none"] = "rope"  # how a token knows where it stands
    rope_theta: float = 10000.0  # base of the rotary frequencies
    rope_fraction: float = 1.0  # of each head's dimensions that are turned, the first ones (Pythia: 0.25)
    # dimensions that turn together: i and i + half (Hugging Face's LLaMA); 2i and 2i + 1 (CrystalCoder)
    rope_pairs: Literal["halves", "neighbours"] = "halves"
    rope_scaling: float = 1.0  # slow frequencies are divided by this, as Llama 3.1 does; 1: none
    rope_scaling_low: float = 1.0  # slow: fewer turns than this over the original context
    rope_scaling_high: float = 4.0  # fast, left alone: more turns than this; between: a blend
    rope_scaling_seq_len: int = 8192  # the original context
    window: int = 0  # tokens that a token sees, itself included; 0: all before it
    document_mask: bool = False  # tokens see their own document only, and positions restart with it
    tie_embeddings: bool = False  # lm_head shares the embedding's matrix (OLMo-1B)
    embedding_multiplier: float = 1.0  # times the embedding's output (CrystalCoder: 14.6)
    logits_multiplier: float = 1.0  # times the logits; under muP also times mup_base_width / d_model
    # muP: the width whose learning rate and multipliers carry over to this one (CrystalCoder: 256); 0: no muP
    mup_base_width: int = 0
    # how weights begin: Normal(0, init_std); the same, shrunk where a sub-layer ends (GPT-2); OLMo-1's;
    # Pythia's; CrystalCoder's
    init: Literal["normal", "gpt2", "mitchell", "small_wang", "mup"] = "normal"
    init_std: float = 0.02  # for normal, gpt2 and mup
    init_cut: float = 0.0  # no weight lies further out than so many deviations; 0: any may

    def __post_init__(self):
        check_types(self)
        at_least(self, 1, "vocab_size", "seq_len", "d_model", "n_layers", "n_heads", "d_ff", "rope_scaling")
        at_least(
            self, 0, "n_kv_heads", "d_head", "init_std", "init_cut", "clip_qkv", "window", "mup_base_width"
        )
        above(self, 0, "norm_eps", "rope_theta", "rope_fraction", "embedding_multiplier", "logits_multiplier")
        above(self, 0, "rope_scaling_low", "rope_scaling_seq_len")

    def resolved(self) -> "Model":
        """The same model with every derived value filled in and checked."""
        if not self.d_head and self.d_model % self.n_heads:
            raise ConfigError(
                f"model.d_model={self.d_model} does not divide by model.n_heads={self.n_heads}; "
                f"use a multiple of {self.n_heads}, or set model.d_head"
            )
        n_kv_heads = self.n_kv_heads or self.n_heads
        d_head = self.d_head or self.d_model // self.n_heads
        if self.n_heads % n_kv_heads:
            divisors = [k for k in range(1, self.n_heads + 1) if self.n_heads % k == 0]
            raise ConfigError(
                f"model.n_kv_heads={n_kv_heads} does not divide model.n_heads={self.n_heads}; "
                f"use one of {divisors}"
            )
        turned = d_head * self.rope_fraction
        if self.positions == "rope" and (turned % 2 or self.rope_fraction > 1):
            raise ConfigError(
                f"model.d_head={d_head} x model.rope_fraction={self.rope_fraction} = {turned} dimensions to "
                f"turn; rotary embedding turns pairs: use an even number of at most {d_head}"
            )
        if self.rope_scaling_high <= self.rope_scaling_low:
            raise ConfigError(
                f"model.rope_scaling_high={self.rope_scaling_high} must be above "
                f"model.rope_scaling_low={self.rope_scaling_low}"
            )
        if self.parallel_residual and self.norm_place == "after":
            raise ConfigError(
                "model.parallel_residual=True and model.norm_place='after' contradict each other: in a "
                "parallel block both sub-layers read the stream through a norm; use norm_place='before'"
            )
        if (self.init == "mup") != bool(self.mup_base_width):
            raise ConfigError(
                f"model.init={self.init!r} and model.mup_base_width={self.mup_base_width}: muP is both or "
                "neither; use init='mup' with the base width, or another init with mup_base_width=0"
            )
        if self.init == "mitchell" and self.init_cut not in (0, 3):
            raise ConfigError(
                f"model.init_cut={self.init_cut}: init='mitchell' always cuts at 3; leave it out"
            )
        return dataclasses.replace(self, n_kv_heads=n_kv_heads, d_head=d_head)

    @property
    def gated(self) -> bool:
        """Whether a third matrix gates the feed-forward."""
        return choose("model.ffn", self.ffn, {"swiglu": True, "geglu": True, "gelu": False, "relu2": False})

    @property
    def norm_kind(self) -> NormKind:
        return choose("model.norm", self.norm, NORMS)

    @property
    def mup_scale(self) -> float:
        """m, base width / width: 1/16 for CrystalCoder; 1 without muP."""
        return self.mup_base_width / self.d_model if self.mup_base_width else 1.0


@dataclass(frozen=True)
class Tokenizer:
    """Which tokenizer, and how `python tokenizer.py train CONFIG` makes it."""

    path: str = ""  # folder or file of the tokenizer; derived: tokenizers/<config's name>
    kind: Literal["bpe", "sentencepiece"] = "bpe"  # byte-level BPE; or LLaMA's kind
    vocab_size: int = 32000  # entries when trained, special tokens included
    split: str = "gpt4"  # no merge crosses the pieces it cuts: gpt4, gpt2 or a regular expression
    eot: str = "<|endoftext|>"  # the special token after every document
    special_tokens: tuple[str, ...] = ()  # more of them, after eot

    def __post_init__(self):
        check_types(self)
        at_least(self, 1, "vocab_size")


@dataclass(frozen=True)
class Source:
    """Where documents come from. Every document keeps the name of its source and its id for ever."""

    name: str  # short: it names rows in tables and lines in figures
    paths: tuple[str, ...]  # files, folders and globs
    exclude: tuple[str, ...] = ()  # globs, matched against the path below its folder, of files to leave out
    read: Literal["auto", "text", "docstrings"] = "auto"  # docstrings: English of Python files

    def __post_init__(self):
        check_types(self)
        check_name("data source", self.name)
        if not self.paths:
            raise ConfigError(
                f"data source {self.name!r} has no paths; give at least one file, folder or glob"
            )


@dataclass(frozen=True)
class Stage:
    """A part of training with its own mixture: how often each source is read, or in which proportion."""

    name: str = "main"  # names the stage in the manifest and in figures
    # passes over each source; none named: one over all. 2.3: two, and one that ends after 0.3 of the tokens
    epochs: dict[str, float] = field(default_factory=dict)
    # or shares of `tokens`, normalised: each source is read as often as its share needs
    weights: dict[str, float] = field(default_factory=dict)
    tokens: int = 0  # with weights: the length of the stage
    repeats: int = 1  # times the whole stage is trained through, each time in a new order

    def __post_init__(self):
        check_types(self)
        check_name("stage", self.name)
        at_least(self, 1, "repeats")
        if self.epochs and self.weights:
            raise ConfigError(f"stage {self.name!r} sets both epochs and weights; keep one")
        if bool(self.weights) != bool(self.tokens):
            raise ConfigError(f"stage {self.name!r}: weights and tokens go together; set both or neither")
        for name, value in {**self.epochs, **self.weights}.items():
            if not 0 < value < float("inf"):
                raise ConfigError(
                    f"stage {self.name!r}: {name}={value} must be above 0; leave a source out by name"
                )


@dataclass(frozen=True)
class Data:
    """Documents to shuffled rows to chunks (data.py)."""

    sources: tuple[Source, ...] = ()  # set in the config file
    stages: tuple[Stage, ...] = field(default_factory=lambda: (Stage(),))  # set in the config file
    n_chunks: int = 360  # files of rows; a checkpoint is taken at the end of each (Amber: 360)
    # of each source's documents, held out before chunking; of a source of few documents, of the text in them
    validation_fraction: float = 0.01
    seed: int = 1234  # keys the order of rows, and of documents in a pass that is not whole
    validation_seed: int = 1234  # keys the choice of held-out documents: the same for runs in another order
    workers: int = 0  # processes that encode; derived: one a core
    max_bad_fraction: float = 0.01  # a build stops where more of a source's documents are unreadable
    expected_tokens: int = 0  # to train on, for plan.py while there is no dataset yet (Amber: 1.258e12)

    def __post_init__(self):
        check_types(self)
        at_least(self, 1, "n_chunks")
        at_least(self, 0, "workers", "expected_tokens")
        for name in ("validation_fraction", "max_bad_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"data.{name}={getattr(self, name)} is a share; use 0 <= share < 1")
        for kind in ("sources", "stages"):
            names = [item.name for item in getattr(self, kind)]
            for name in names:
                if names.count(name) > 1:
                    raise ConfigError(f"data.{kind}: the name {name!r} is used {names.count(name)} times")
        known = [source.name for source in self.sources]
        for stage in self.stages:
            if stage.name.removesuffix(".offsets") in known and stage.name.endswith(".offsets"):
                raise ConfigError(f"stage {stage.name!r}: this name is a file of a source; use another")
            for name in {**stage.epochs, **stage.weights}:
                if name not in known:
                    raise ConfigError(
                        f"stage {stage.name!r} names source {name!r}{did_you_mean(name, known)}"
                    )


@dataclass(frozen=True)
class Optim:
    """AdamW or Muon, parameter groups, schedule, clipping (optim.py)."""

    # AdamW; or Muon for the matrices inside the layers, and AdamW for the rest
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 3e-4  # peak learning rate
    final_lr_fraction: float = 0.1  # of the peak, reached at the last step
    # from the peak to the end; constant: stays at the peak until the last decay_fraction of the steps
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    decay_fraction: float = 0.1  # of all steps, at the end, in which a constant rate falls linearly
    # with --init_from=CHECKPOINT: goes on from it, data and optimizer too; the rate falls to 0 in so many
    anneal_steps: int = 0
    warmup_steps: int = 2000  # linear, up to the peak
    # the schedule is laid out over this many steps, and later ones stay at its last learning rate; 0: over
    # all that the data have. An ablation asks for --train.steps=300 --optim.schedule_steps=300
    schedule_steps: int = 0
    # the schedule is laid out over this many tokens, and counts consumed tokens (OLMo-65B: 2e12, while its
    # batch doubles); 0: it counts steps
    schedule_tokens: int = 0
    warmup_tokens: int = 0  # with schedule_tokens, in place of warmup_steps
    warmup_start_fraction: float = 0.0  # of the peak, where warm-up begins (OLMo-1: 0.1)
    beta1: float = 0.9  # decay of the running mean of gradients
    beta2: float = 0.95  # decay of the running mean of their squares
    eps: float = 1e-8  # added to the root of the second moment (OLMo-1: 1e-5)
    weight_decay: float = 0.1  # decoupled, times the learning rate
    # which parameters decay: every one (Amber); linear layers' weights, a tied head not (OLMo-1); all
    # matrices, embeddings included (Pythia, CrystalCoder); all but embeddings (OLMo 2)
    decay: Literal["all", "linear", "matrices", "not_embeddings"] = "all"
    muon_momentum: float = 0.95  # Muon's running mean of gradients
    grad_clip: float = 1.0  # limit of the global L2 norm of the gradient; 0: no limit
    grad_clip_start_factor: float = 1.0  # the limit is so many times looser at the start (OLMo-7B: 10)
    grad_clip_start_steps: int = 1000  # and the start is so many steps long
    z_loss: float = 0.0  # also pulls log(sum of exp(logits)) to 0, so much times its square (PaLM: 1e-4)
    embedding_gradient: float = 1.0  # what the embedding's gradient is multiplied by (GLM-130B: 0.1)

    def __post_init__(self):
        check_types(self)
        above(self, 0, "lr", "eps", "grad_clip_start_factor")
        at_least(self, 0, "warmup_steps", "weight_decay", "grad_clip", "grad_clip_start_steps", "z_loss")
        at_least(self, 0, "anneal_steps", "embedding_gradient")
        at_least(self, 0, "schedule_steps", "schedule_tokens", "warmup_tokens")
        for name in (
            "final_lr_fraction", "warmup_start_fraction", "decay_fraction", "beta1", "beta2", "muon_momentum"
        ):  # fmt: skip
            if not 0 <= getattr(self, name) <= 1 or (name.startswith("beta") and getattr(self, name) == 1):
                raise ConfigError(f"optim.{name}={getattr(self, name)} is out of range; use 0 to 1")
        if self.schedule_tokens and self.schedule_steps:
            raise ConfigError(
                f"optim.schedule_steps={self.schedule_steps} and optim.schedule_tokens="
                f"{self.schedule_tokens} contradict each other: a schedule counts steps or tokens; keep one"
            )
        if self.warmup_tokens and not self.schedule_tokens:
            raise ConfigError(
                f"optim.warmup_tokens={self.warmup_tokens} needs a schedule that counts tokens; set "
                "optim.schedule_tokens, too, or optim.warmup_steps instead"
            )
        default = type(self).warmup_steps  # a config that counts tokens need not set it to 0
        if self.schedule_tokens and self.warmup_steps not in ((0, default) if self.warmup_tokens else (0,)):
            raise ConfigError(
                f"optim.schedule_tokens={self.schedule_tokens} counts tokens and optim.warmup_steps="
                f"{self.warmup_steps} counts steps; use --optim.warmup_steps=0 with --optim.warmup_tokens=N, "
                "or alone for no warm-up"
            )

    @property
    def warmup(self) -> int:
        """Length of the warm-up, in what the schedule counts: tokens or steps."""
        return self.warmup_tokens if self.schedule_tokens else self.warmup_steps


@dataclass(frozen=True)
class Train:
    """The loop (train.py)."""

    batch_size: int = 2048  # sequences a step, over all GPUs
    batch_double_tokens: int = 0  # the batch doubles after every so many tokens (OLMo-65B: 100e9); 0: never
    batch_size_max: int = 0  # up to so many sequences (OLMo-65B: 8192, from 1024)
    micro_batch_size: int = 8  # sequences in one forward on one GPU; accumulation is derived
    steps: int = 0  # stop after this many without changing the schedule (optim.schedule_steps does); 0: all
    seed: int = 1234  # of the initial weights
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA if there is one
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # bf16: autocast, weights FP32; auto: bf16 on CUDA
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile of each block; auto: on CUDA
    activation_checkpointing: int = 0  # of every n-th block, which backward computes again; 1: all; 0: none
    deterministic: bool = False  # the same bits in every run on the same GPUs; slower on CUDA
    log_every: int = 10  # steps between printed lines; metrics.jsonl has every step
    checkpoint_chunks: bool = True  # one when the last row of a data chunk has been consumed
    checkpoint_every: int = 0  # and one every so many steps; 0: none
    checkpoint_powers_of_two: bool = False  # and at steps 1, 2, 4, 8, ... (Pythia)
    # of checkpoints that neither end a chunk nor begin or end training, the newest so many are kept; 0: all
    keep_others: int = 0
    save_async: bool = True  # checkpoints are written while training goes on
    verify: bool = True  # compare the hashes of chunks and checkpoints when they are first read
    # a spike: loss or gradient norm so many deviations above the median of the last spike_window steps
    # (robust: 1.4826 x the median absolute deviation); 0: only what is not finite is an incident
    spike_z: float = 0.0
    spike_window: int = 128  # nothing is judged before so many steps have passed
    # what an incident does: stop; skip the update; defer the rest of the chunk to the end (K2); go back to a
    # checkpoint and leave batches out (PaLM, GLM-130B)
    on_spike: Literal["stop", "skip", "defer", "rollback"] = "stop"
    rollback_steps: int = 100  # the checkpoint is at least so many steps before the spike, else the first
    # batches left out by a rollback: half of them before the spike (not before the checkpoint), then the rest
    rollback_skip: int = 200
    max_incidents: int = 10  # the one after so many stops the run whatever on_spike says

    def __post_init__(self):
        check_types(self)
        at_least(self, 1, "batch_size", "micro_batch_size", "log_every", "rollback_skip")
        at_least(self, 4, "spike_window")
        at_least(
            self,
            0,
            "steps",
            "checkpoint_every",
            "activation_checkpointing",
            "keep_others",
            "spike_z",
            "rollback_steps",
        )
        at_least(self, 0, "max_incidents", "batch_double_tokens", "batch_size_max")
        largest = self.batch_size_max or self.batch_size
        doublings = largest / self.batch_size
        if bool(self.batch_double_tokens) != bool(self.batch_size_max):
            raise ConfigError(
                "train.batch_double_tokens and train.batch_size_max go together; set both or neither"
            )
        if doublings < 1 or largest != self.batch_size << int(math.log2(doublings)):
            raise ConfigError(
                f"train.batch_size_max={largest} must be train.batch_size={self.batch_size} times 2, 4 ..."
            )


@dataclass(frozen=True)
class Parallel:
    """How a run is spread over processes, one a GPU (parallel.py)."""

    # ddp: every GPU holds the whole model; fsdp: weights, gradients and moments are sharded over GPUs (FSDP2)
    strategy: Literal["ddp", "fsdp"] = "ddp"
    shard: int = 0  # fsdp: GPUs that share one copy, such as a node's 8 (hybrid sharding); 0: all of them
    reshard: bool = True  # fsdp: blocks' weights are let go after the forward, gathered again for backward
    tp: int = 1  # GPUs that split every matrix and the tokens between them (tensor and sequence parallel)
    timeout_seconds: int = 900  # a collective that takes longer ends the run: a process hangs, or is gone

    def __post_init__(self):
        check_types(self)
        at_least(self, 1, "tp", "timeout_seconds")
        at_least(self, 0, "shard")


@dataclass(frozen=True)
class Eval:
    """Loss on held-out text, and the memorization score of Analysis360 (eval.py)."""

    batch_size: int = 16  # rows in one forward when the loss is measured
    max_rows: int = 0  # validation rows a source, the first ones; 0: all
    prompt_tokens: int = 32  # memorization: k, tokens of the row that are given
    continuation_tokens: int = 32  # memorization: l, tokens that are compared with greedy decoding
    rows_per_chunk: int = 1000  # memorization: rows drawn from every chunk, and from the validation rows
    generate_batch_size: int = 128  # memorization: rows decoded at once (on a CPU: by each core)
    seed: int = 1234  # memorization: keys the draw
    # by source, what the last checkpoint must be below; eval.py --check fails where it is not
    expect_bits_per_byte: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        check_types(self)
        at_least(self, 1, "batch_size", "prompt_tokens", "continuation_tokens", "rows_per_chunk")
        at_least(self, 1, "generate_batch_size")
        at_least(self, 0, "max_rows")


@dataclass(frozen=True)
class Config:
    """All of it. Nothing edits a config after it is loaded: what is saved is what ran."""

    model: Model = field(default_factory=Model)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    parallel: Parallel = field(default_factory=Parallel)
    eval: Eval = field(default_factory=Eval)
    name: str = ""  # derived: the config file's name
    run: str = ""  # the run folder; derived: runs/<name>
    dataset: str = ""  # the dataset folder; derived: datasets/<name>
    init_from: str = ""  # begin with the weights of this checkpoint or model folder, not with model.init

    given = ()  # no setting: what `load` was given, the config's name and the overrides; see `again`

    def __post_init__(self):
        check_types(self)
        check_finite("", self)
        if set(self.name) & {"/", "\0"} or self.name in (".", "..") or len(os.fsencode(self.name)) > 200:
            raise ConfigError(
                f"name={self.name!r} becomes the name of folders, runs/<name> and others: use a short one "
                "without '/'"
            )

    def again(self, script: str) -> str:
        """The command that runs another script with this config, as it was given, and the same overrides.

        load("my.py", ["--run=x"]).again("tokenizer.py train") -> "python tokenizer.py train my.py --run=x"
        """
        script, *words = script.split()
        started = Path(sys.argv[0])  # another script is where this one was found
        if started.suffix == ".py" and started.resolve().parent == Path(__file__).resolve().parent:
            script = str(started.with_name(script))
        return shlex.join(["python", script, *words, *(self.given or [self.name or "CONFIG"])])

    def resolved(self) -> "Config":
        """The same config with every derived value filled in, and the checks that look across sections."""
        model, e = self.model.resolved(), self.eval
        if e.prompt_tokens + e.continuation_tokens > model.seq_len:
            raise ConfigError(
                f"eval.prompt_tokens={e.prompt_tokens} and eval.continuation_tokens={e.continuation_tokens} "
                f"do not fit into model.seq_len={model.seq_len}; make them shorter"
            )
        check_parallel(model, self.parallel, self.optim)
        if model.init in ("normal", "gpt2", "mup") and not model.init_std:
            raise ConfigError(
                f"model.init_std=0 with model.init={model.init!r}: every weight would begin at 0, and such a "
                "model learns nothing; 0.02 is usual"
            )
        if self.optim.anneal_steps and not self.init_from:
            raise ConfigError(
                f"optim.anneal_steps={self.optim.anneal_steps} needs --init_from=CHECKPOINT to begin at"
            )
        tokenizer = dataclasses.replace(self.tokenizer, path=self.tokenizer.path or f"tokenizers/{self.name}")
        data = dataclasses.replace(self.data, workers=self.data.workers or os.cpu_count() or 1)
        run, dataset = self.run or f"runs/{self.name}", self.dataset or f"datasets/{self.name}"
        return dataclasses.replace(
            self, model=model, tokenizer=tokenizer, data=data, run=run, dataset=dataset
        )


SECTIONS = {
    f.name: f.default_factory
    for f in dataclasses.fields(Config)
    if f.default_factory is not dataclasses.MISSING
}
SETTINGS = [  # every spelling on a command line: "optim.lr", ..., "run"
    *(f"{name}.{f.name}" for name, section in SECTIONS.items() for f in dataclasses.fields(section)),
    "run",
    "dataset",
    "init_from",
]


# ---- checks -----------------------------------------------------------------------------------------------


def did_you_mean(word: str, known: list[str]) -> str:
    """did_you_mean("optim.lrr", SETTINGS) -> ", which is not known; did you mean 'optim.lr'?" """
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(known)}"
    return f", which is not known; {hint}"


# What other programs call our settings.
OTHER_WORDS = {
    **dict.fromkeys(("learning_rate", "max_lr", "peak_lr"), "optim.lr"),
    **dict.fromkeys(("wd", "decay_rate"), "optim.weight_decay"),
    **dict.fromkeys(("clip", "max_grad_norm", "clip_grad", "gradient_clip"), "optim.grad_clip"),
    **dict.fromkeys(("warmup", "warmup_iters"), "optim.warmup_steps"),
    **dict.fromkeys(("hidden_size", "n_embd", "dim", "width"), "model.d_model"),
    **dict.fromkeys(("layers", "n_layer", "num_layers", "num_hidden_layers", "depth"), "model.n_layers"),
    **dict.fromkeys(("heads", "n_head", "num_heads", "num_attention_heads"), "model.n_heads"),
    **dict.fromkeys(("kv_heads", "num_key_value_heads", "num_kv_heads"), "model.n_kv_heads"),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "hidden_dim"), "model.d_ff"),
    **dict.fromkeys(
        ("block_size", "context", "context_length", "max_seq_len", "seq_length"), "model.seq_len"
    ),
    **dict.fromkeys(("activation", "hidden_act"), "model.ffn"),
    **dict.fromkeys(("initializer_range", "init_range"), "model.init_std"),
    **dict.fromkeys(("max_steps", "max_iters", "num_steps", "n_steps", "iterations"), "train.steps"),
    **dict.fromkeys(("micro_batch", "device_batch_size", "per_device_batch_size"), "train.micro_batch_size"),
    **dict.fromkeys(("dtype", "bf16", "fp32"), "train.precision"),
    **dict.fromkeys(("gradient_checkpointing", "recompute"), "train.activation_checkpointing"),
    **dict.fromkeys(("num_workers", "n_workers"), "data.workers"),
    **dict.fromkeys(("out", "out_dir", "output_dir"), "run"),
    **dict.fromkeys(("epochs", "weights", "sources", "stages"), "data.stages"),
    "rope_base": "model.rope_theta",
    "tie_word_embeddings": "model.tie_embeddings",
}


def did_you_mean_setting(key: str, flags: list[str] = ()) -> str:
    """did_you_mean_setting("learning_rate") -> ", which is not known; did you mean 'optim.lr'?"

    First whatever has this name in another section, then what other programs call so, then what is alike.
    """
    key = key.replace("-", "_")
    known = [*flags, *SETTINGS]
    last = {setting: setting.rpartition(".")[2] for setting in known}
    name = key.rpartition(".")[2]
    found = [setting for setting in known if last[setting] == name]
    found = found or [OTHER_WORDS[word] for word in (name,) if word in OTHER_WORDS]
    found = found or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not found and (close := difflib.get_close_matches(name, [*last.values(), *OTHER_WORDS], n=1)):
        found = [s for s in known if last[s] == close[0]] or [OTHER_WORDS[close[0]]]
    if not found:
        return did_you_mean(key, known)
    return f", which is not known; did you mean {' or '.join(map(repr, found))}?"


def spelled(section: object, name: str) -> str:
    """The setting as a user writes it: spelled(Optim(), "lr") -> "optim.lr"."""
    kind = type(section).__name__.lower()
    return name if kind == "config" else f"{kind}.{name}"


def choose(setting: str, choice: str, table: dict[str, object]) -> object:
    """What a table has for the choice of a setting: choose("optim.decay", "all", {"all": 1}) -> 1.

    A choice may be computed in several places. Where one of them lacks it, because it was added to the
    setting's Literal alone, this is an error: no place may take it for another choice.
    """
    if choice not in table:
        raise unknown(setting, choice)
    return table[choice]


def unknown(setting: str, choice: str) -> ValueError:
    """The error of code that lacks a choice. It is no ConfigError: its traceback says where to add it."""
    return ValueError(
        f"{setting}={choice!r} is a choice in config.py, and the code that raises this lacks it"
    )


def at_least(section: object, low: float, *names: str) -> None:
    for name in names:
        if not getattr(section, name) >= low:
            raise ConfigError(f"{spelled(section, name)}={getattr(section, name)} must be at least {low}")


def above(section: object, low: float, *names: str) -> None:
    for name in names:
        if not low < getattr(section, name) < float("inf"):
            raise ConfigError(
                f"{spelled(section, name)}={getattr(section, name)} must be a number above {low}"
            )


def check_name(what: str, name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):  # it becomes the name of a file
        raise ConfigError(f"{what} name {name!r}: use letters, digits, '.', '_' and '-' only")


def check_types(section: object) -> None:
    """Raises ConfigError where a value has not the type its annotation says; an int is welcome as a float."""
    for name, kind in typing.get_type_hints(type(section)).items():
        value = getattr(section, name)
        too_large = type(value) is int and not -(2**63) < value < 2**63
        if kind in (int, float) and too_large:
            raise ConfigError(f"{spelled(section, name)}={value} does not fit into 64 bits")
        if kind is float and type(value) in (int, float):
            # 1 and 1.0 are then the same config, also in JSON, and so are 0.0 and -0.0
            object.__setattr__(section, name, value + 0.0)
        elif not has_type(value, kind):
            want = (
                " or ".join(map(repr, typing.get_args(kind))) if typing.get_origin(kind) is Literal else kind
            )
            want = getattr(want, "__name__", want) if not isinstance(kind, types.GenericAlias) else kind
            raise ConfigError(
                f"{spelled(section, name)}={value!r} is a {type(value).__name__}; it must be {want}"
            )


def check_finite(name: str, value: object) -> None:
    """ConfigError where a number is inf or nan, wherever it stands in a config."""
    if dataclasses.is_dataclass(value):
        prefix = f"{name}." if name else ""
        for f in dataclasses.fields(value):
            check_finite(f"{prefix}{f.name}", getattr(value, f.name))
    elif isinstance(value, tuple | dict):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            check_finite(f"{name}[{getattr(item, 'name', key)!r}]", item)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}={value} must be a finite number")
    elif isinstance(value, int) and not -(2**63) < value < 2**63:
        raise ConfigError(f"{name}={value} does not fit into 64 bits")


def check_folder(what: str, path: str) -> None:
    """ConfigError where a name cannot be that of a folder, or leads through a file."""
    if "\0" in path or any(len(os.fsencode(part)) > 255 for part in Path(path).parts):
        raise ConfigError(
            f"{what}={path[:60]!r}... cannot be the name of a folder; names have up to 255 bytes"
        )
    for place in Path(path).parents:
        if place.exists() and not place.is_dir():
            raise ConfigError(f"{what}={path}: {place} is a file, not a folder; name another place")


def has_type(value: object, kind: object) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(has_type(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            has_type(k, arguments[0]) and has_type(v, arguments[1]) for k, v in value.items()
        )
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind  # not isinstance: True is an int to Python, but 1 head too many to us


def accumulation_steps(batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches that each GPU runs in one step: accumulation_steps(2240, 10, 224) -> 1.

    Raises ConfigError where the batch does not divide.
    """
    unit = micro_batch_size * world_size
    if batch_size % unit == 0:
        return batch_size // unit
    below = batch_size // unit * unit
    sizes = " or ".join(str(size) for size in (below, below + unit) if size)
    micro = [m for m in range(1, batch_size + 1) if batch_size % (m * world_size) == 0]
    micro = sorted(sorted(micro, key=lambda m: abs(m - micro_batch_size))[:2])
    other = f", or train.micro_batch_size={' or '.join(map(str, micro))}" if micro else ""
    raise ConfigError(
        f"train.batch_size={batch_size} does not divide by train.micro_batch_size={micro_batch_size} x "
        f"{world_size} process{'es' if world_size > 1 else ''}; use train.batch_size={sizes}{other}"
    )


def mesh_shape(settings: Parallel, processes: int) -> tuple[int, int, int]:
    """(replicate, shard, tp). Raises ConfigError where the processes do not divide so."""
    copies = processes // settings.tp  # of the data's shares: processes that see different rows
    if processes % settings.tp:
        raise ConfigError(f"{processes} process(es) do not divide by parallel.tp={settings.tp}")
    if settings.strategy == "ddp":
        if settings.shard > 1:
            raise ConfigError(f"parallel.shard={settings.shard} needs parallel.strategy='fsdp'")
        return copies, 1, settings.tp
    if settings.strategy != "fsdp":
        raise unknown("parallel.strategy", settings.strategy)
    shard = settings.shard or copies
    if copies % shard:
        raise ConfigError(
            f"parallel.shard={shard} does not divide {copies} process(es)"
            + f" ({processes} / parallel.tp={settings.tp})" * (settings.tp > 1)
        )
    return copies // shard, shard, settings.tp


def check_parallel(m: Model, p: Parallel, optim: Optim) -> None:
    """Raises ConfigError where a model cannot be split over p.tp GPUs, or an optimizer needs it whole."""
    whole = choose("optim.optimizer", optim.optimizer, {"adamw": False, "muon": True})
    if whole and (p.tp > 1 or p.strategy == "fsdp"):
        raise ConfigError(
            f"optim.optimizer={optim.optimizer!r} turns whole matrices, and parallel.strategy='fsdp' or "
            "parallel.tp leave none whole; use --parallel.strategy=ddp --parallel.tp=1, or adamw"
        )
    if p.tp == 1:
        return
    for name in ("n_heads", "n_kv_heads", "d_ff", "seq_len"):
        if getattr(m, name) % p.tp:
            raise ConfigError(f"model.{name}={getattr(m, name)} does not divide by parallel.tp={p.tp}")
    if m.qk_norm:  # of a whole row of queries, which no GPU has
        raise ConfigError("model.qk_norm with parallel.tp is not offered; use parallel.strategy='fsdp'")
    by_head = {"rope": False, "alibi": True, "learned": False, "none": False}
    if choose("model.positions", m.positions, by_head):  # each head has its own slope
        raise ConfigError(
            f"model.positions={m.positions!r} with parallel.tp is not offered; use parallel.strategy='fsdp'"
        )


def without_effect(c: Config) -> dict[str, str]:
    """Settings that nothing reads beside the others of this config, and what would make them count."""
    o, t, m = c.optim, c.train, c.model
    out = {}

    def needs(unmet: bool, what: str, *names: str) -> None:
        out.update(dict.fromkeys(names, what) if unmet else {})

    needs(o.schedule != "constant", "optim.schedule=constant", "optim.decay_fraction")
    flat = o.schedule == "constant" and not o.decay_fraction
    needs(flat, "optim.decay_fraction above 0", "optim.final_lr_fraction")
    needs(o.optimizer != "muon", "optim.optimizer=muon", "optim.muon_momentum")
    needs(not o.warmup, "a warm-up", "optim.warmup_start_fraction")
    needs(o.grad_clip_start_factor == 1, "optim.grad_clip_start_factor", "optim.grad_clip_start_steps")
    needs(not o.grad_clip, "optim.grad_clip above 0", "optim.grad_clip_start_factor")
    needs(t.on_spike != "rollback", "train.on_spike=rollback", "train.rollback_steps", "train.rollback_skip")
    needs(t.on_spike == "stop", "train.on_spike=skip, defer or rollback", "train.max_incidents")
    needs(not t.spike_z, "train.spike_z above 0", "train.spike_window")
    whole = c.parallel.strategy == "ddp" and c.parallel.tp == 1
    needs(whole, "parallel.strategy=fsdp", "parallel.reshard")
    rope = [f"model.rope_{name}" for name in ("theta", "fraction", "pairs", "scaling")]
    slow = [f"model.rope_scaling_{name}" for name in ("low", "high", "seq_len")]
    needs(m.rope_scaling == 1, "model.rope_scaling above 1", *slow)
    needs(m.positions != "rope", "model.positions=rope", *rope, *slow)
    needs(m.init in ("mitchell", "small_wang"), "model.init=normal, gpt2 or mup", "model.init_std")
    return out


def check_effect(c: Config, names: list[str]) -> None:
    """Raises ConfigError where one of the settings named was changed and nothing would read it.

    Asked of a file's own settings, and of those on the command line: what --optim.schedule=cosine leaves
    without effect of a file's settings for a constant schedule is no mistake.
    """
    missing = without_effect(c)
    for name in names:
        section, _, setting = name.partition(".")
        if name in missing and getattr(getattr(c, section), setting) != getattr(SECTIONS[section], setting):
            raise ConfigError(
                f"{name}={getattr(getattr(c, section), setting)} would have no effect: it needs "
                f"{missing[name]}; set that, too, or leave {name} out"
            )


# ---- loading ----------------------------------------------------------------------------------------------

CONFIGS = Path(__file__).parent / "configs"  # those that come with nano360


def find(name: str) -> tuple[Path, str]:
    """The file that a name on the command line means, and the entry in it where it holds a table of configs.

    find("demo") -> configs/demo.py, ""; find("pythia-160m") -> configs/pythia.py, "160m".
    """
    stem = Path(name).stem if name.endswith(".py") else Path(name).name
    places = [Path(name), Path(f"{name}.py")]
    # of another folder, only that folder's file is meant
    if str(Path(name).parent) in (".", "config", "configs"):
        places.append(CONFIGS / f"{stem}.py")
    for path in places:
        if path.is_file() and path.suffix == ".json":
            raise ConfigError(f"{path} is no config; a config is a Python file")
        if path.is_file():
            return path, ""
    family, dash, size = Path(name).name.removesuffix(".py").partition("-")
    for folder in (Path(name).parent, CONFIGS):
        if dash and (folder / f"{family}.py").is_file():
            return folder / f"{family}.py", size
    known = sorted(path.stem for path in CONFIGS.glob("*.py"))
    raise ConfigError(f"no config {name!r}; {did_you_mean(stem, known).partition('; ')[2]}")


def load(name: str, overrides: list[str] = ()) -> Config:
    """Config file and overrides -> a checked config with every value resolved. Raises ConfigError.

    load("demo", ["--optim.lr=1e-3"]).optim.lr -> 0.001
    """
    path, entry = find(name)
    sys.path.insert(0, str(Path(__file__).parent))  # so that the file can say `from config import Config`
    # one set of classes, also when this file is the script
    sys.modules.setdefault("config", sys.modules[__name__])
    try:
        found = runpy.run_path(str(path))
        config, table = found.get("config"), found.get("configs", {})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except TypeError as error:
        # an unknown setting: "Optim.__init__() got an unexpected keyword argument 'lrr'"
        match = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        section = globals().get(match[1]) if match else None
        if not dataclasses.is_dataclass(section):
            raise ConfigError(f"{path}: {error}") from None
        known = [f.name for f in dataclasses.fields(section)]
        hint = did_you_mean(match[2], known)
        if meant := OTHER_WORDS.get(match[2]):
            hint = f", which is not known; did you mean {meant.removeprefix(f'{match[1].lower()}.')!r}?"
        raise ConfigError(f"{path}: {match[1]} has {match[2]!r}{hint}") from None
    except (Exception, SystemExit) as error:  # whatever a user's file raises is about that file
        line = error.lineno if isinstance(error, SyntaxError) else last_line(error, path)
        raise ConfigError(f"{path}, line {line}: {type(error).__name__}: {error}") from None
    finally:
        sys.path.pop(0)
    if table and entry not in table:
        names = [f"{path.stem}-{known}" for known in table]
        asked = f"{path} has several configs" if not entry else f"{path} has no {name!r}"
        raise ConfigError(f"{asked}; use {' or '.join(names)}")
    config = table.get(entry, config)
    if not isinstance(config, Config):
        raise ConfigError(f"{path} must end in `config = Config(...)`")
    config = dataclasses.replace(config, name=config.name or "-".join(filter(None, (path.stem, entry))))
    try:
        check_effect(config, SETTINGS)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None

    changes: dict[str, dict] = {}
    for override in overrides:
        key, equals, text = override.removeprefix("--").partition("=")
        key = key.replace("-", "_")  # --init-from is --init_from
        if not override.startswith("--") or not equals:
            raise ConfigError(f"{override!r} is not an override; write --section.name=value")
        if key not in SETTINGS:
            raise ConfigError(f"--{key}{did_you_mean_setting(key)}")
        if key in ("run", "dataset") and not text.strip():
            raise ConfigError(f"--{key}= is empty; name a folder, or leave it out for {key}s/<name>")
        section, _, setting = key.rpartition(".")
        kind = typing.get_type_hints(type(getattr(config, section)) if section else Config)[setting]
        changes.setdefault(section, {})[setting] = parse(key, text, kind)
    top = changes.pop("", {})
    sections = {
        name: dataclasses.replace(getattr(config, name), **values) for name, values in changes.items()
    }
    config = dataclasses.replace(config, **sections, **top).resolved()
    check_effect(config, [f"{section}.{name}" for section, values in changes.items() for name in values])
    for setting in ("run", "dataset"):
        check_folder(f"--{setting}", getattr(config, setting))
    object.__setattr__(config, "given", (name, *overrides))
    return config


def last_line(error: BaseException, path: Path) -> object:
    """The line of the config file at which its own code failed."""
    lines = []
    step = error.__traceback__
    while step:
        if step.tb_frame.f_code.co_filename == str(path):
            lines.append(step.tb_lineno)
        step = step.tb_next
    return lines[-1] if lines else "?"


def parse(key: str, text: str, kind: object) -> object:
    """One value as written on a command line: parse("train.steps", "1e3", int) -> 1000."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if text not in arguments:
            raise ConfigError(f"--{key}={text}: use {' or '.join(map(repr, arguments))}")
        return text
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ConfigError(f"--{key}={text}: use true or false")
        return text.lower() in ("true", "1")
    if origin is tuple and arguments[0] is str:
        return tuple(part for part in text.split(",") if part)
    if kind in (int, float):
        try:
            number = float(text)
            if kind is int and "." not in text and "e" not in text.lower():
                return int(text)
            if kind is int and number != int(number):
                raise ValueError
            return kind(number)
        except (ValueError, OverflowError):
            raise ConfigError(
                f"--{key}={text}: use {'a whole number' if kind is int else 'a number'}"
            ) from None
    raise ConfigError(f"--{key} cannot be set on the command line; set it in the config file")


def from_dict(values: dict, kind: type = Config) -> Config:
    """The config that `to_dict` wrote. Raises ConfigError where a name or a type is not known."""
    hints = typing.get_type_hints(kind)
    unknown = [name for name in values if name not in hints]
    if unknown:
        raise ConfigError(f"{kind.__name__} has {unknown[0]!r}{did_you_mean(unknown[0], list(hints))}")
    return kind(**{name: from_json(value, hints[name]) for name, value in values.items()})


def from_json(value: object, kind: object) -> object:
    """JSON knows neither tuples nor our classes: give both back."""
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return from_dict(value, kind)
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        return tuple(from_json(item, typing.get_args(kind)[0]) for item in value)
    return value


def to_dict(config: Config) -> dict:
    """Every value, as JSON can hold it. from_dict(to_dict(config)) == config."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def load_run(run: str | Path) -> Config:
    """The config that a run folder was made with. Raises ConfigError where there is none."""
    path = Path(run) / "config.json"
    try:
        about = json.loads(path.read_text())
        if isinstance(about, dict) and "model_type" in about:
            raise ConfigError("this is a model folder or a checkpoint, not a run folder")
        return from_dict(about["config"])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{run} is not a run folder: it has no config.json; train one with train.py"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged: {type(error).__name__}: {error}") from None


# ---- the command line -------------------------------------------------------------------------------------


# A config of one's own; the README shows it too, and a test runs it.
EXAMPLE = """\
from config import Config, Data, Model, Optim, Source, Stage, Tokenizer, Train

notes = Source("notes", paths=("notes/", "book.txt"))  # a folder, and a file: a document a file
web = Source("web", paths=("web/*.jsonl.gz",))  # JSON lines: {"text": "..."}, a document a line
first = Stage("first", epochs={"web": 1})  # all of `web` once, then 2 M tokens of both, 70 % of them notes
second = Stage("second", weights={"web": 0.3, "notes": 0.7}, tokens=2_000_000)
config = Config(
    model=Model(vocab_size=4096, seq_len=256, d_model=256, n_layers=6, n_heads=4, d_ff=688),
    tokenizer=Tokenizer(vocab_size=4096),
    data=Data(sources=(notes, web), stages=(first, second), n_chunks=10),
    optim=Optim(lr=1e-3, warmup_steps=100),
    train=Train(batch_size=16, micro_batch_size=8),
)
"""


def settings_help() -> str:
    """Every setting with its default and its comment, read from this very file so that it cannot drift."""
    source = Path(__file__).read_text(encoding="utf-8")
    lines, out = source.splitlines(), []
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    sections = (
        "Model",
        "Tokenizer",
        "Data",
        "Optim",
        "Train",
        "Parallel",
        "Eval",
        "Config",
        "Source",
        "Stage",
    )
    for section in sections:
        out.append(f"\n{ast.get_docstring(classes[section]).splitlines()[0]}")
        for node in classes[section].body:
            if not isinstance(node, ast.AnnAssign):
                continue
            in_file = section in ("Source", "Stage")  # set in a config file, not on a command line
            name = node.target.id
            name = name if section == "Config" or in_file else f"{section.lower()}.{name}"
            if name not in SETTINGS and not in_file:
                continue
            comment, above = lines[node.end_lineno - 1].partition("  # ")[2], node.lineno - 2
            while not lines[node.end_lineno - 1].count("  # ") and lines[above].strip().startswith("# "):
                comment = f"{lines[above].strip()[2:]} {comment}".strip()  # a long one stands on lines before
                above -= 1
            annotation, default = ast.unparse(node.annotation), ast.unparse(node.value or ast.Name(""))
            default = default.strip("'")
            if annotation.startswith("Literal"):
                choices = " | ".join(re.findall("'([^']*)'", annotation))
                comment += f" [{choices}]"
            if "field(" in default:
                default = ""  # not a word for a command line: it is set in a config file
            out.append(f"  {'  ' if in_file else '--'}{name + '=' + (default or '...'):<42} {comment}")
    out.append(f"\nA config of your own, my.py, with text of your own:\n\n{textwrap.indent(EXAMPLE, '    ')}")
    return "\n".join(out)


def readable(config: Config) -> str:
    """What `--print-config` shows: one setting a line, sections in order."""
    out = [f"{name} = {getattr(config, name)!r}" for name in ("name", "run", "dataset", "init_from")]
    for name in SECTIONS:
        section = getattr(config, name)
        out.append("")
        for f in dataclasses.fields(section):
            value = getattr(section, f.name)
            if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
                out += [f"{name}.{f.name}[{item.name!r}] = {item}" for item in value]
            else:
                out.append(f"{name}.{f.name} = {value!r}")
    return "\n".join(out)


def from_command_line(doc: str, argv: list[str] | None = None, flags: dict[str, str] | None = None):
    """`script.py CONFIG [--section.name=value ...]` -> config; with `flags`, (config, flags that were given).

    flags={"--benchmark": "N", "--profile": ""}: one that takes a value, and one that takes none.
    Where asked, prints the help or the config and exits.
    Every mistake ends here: one message, exit code 2, no traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    known = flags or {}
    if not argv or "--help" in argv or "-h" in argv:
        more = "".join(f" [{flag} {value}".rstrip() + "]" for flag, value in known.items())
        usage = (
            f"Usage: python {Path(sys.argv[0]).name} CONFIG [--section.name=value ...] [--print-config]{more}"
        )
        show(f"{doc.strip()}\n\n{usage}\n{settings_help()}")
        sys.exit(0 if argv else 2)
    try:
        given = take_flags(argv, known)
        names = [argument for argument in argv if not argument.startswith("--")]
        overrides = [
            argument for argument in argv if argument.startswith("--") and argument != "--print-config"
        ]
        if len(names) != 1:
            said = f"not {len(names)}: {' '.join(names)}" if names else "there is none"
            raise ConfigError(f"give exactly one config, {said}; settings are written --section.name=value")
        config = load(names[0], overrides)
    except ConfigError as error:
        fail(error)
    if "--print-config" in argv:
        show(readable(config))
        sys.exit(0)
    return config if flags is None else (config, given)


def take_flags(argv: list[str], known: dict[str, str]) -> dict[str, str]:
    """Removes known flags from argv: --benchmark 30, or --benchmark=30 -> {"--benchmark": "30"}."""
    given = {}
    for argument in list(argv):
        flag, equals, value = argument.partition("=")
        if flag not in known:
            continue
        at = argv.index(argument)
        del argv[at]
        if known[flag] and not equals:
            if at == len(argv) or argv[at].startswith("--"):
                raise ConfigError(f"{flag} needs a value: {flag} {known[flag]}")
            value = argv.pop(at)
        if known[flag] == "N" and not (value.isdecimal() and int(value)):
            raise ConfigError(f"{flag} {value}: use a whole number of at least 1")
        if equals and not known[flag]:
            raise ConfigError(f"{flag} takes no value")
        given[flag] = value
    return given


if __name__ == "__main__":
    script(from_command_line)(__doc__)
