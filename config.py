"""Every setting of nano360: its type, its default, what it is for, and the checks that need several settings.

A config is a plain Python file that ends in `config = Config(...)`. One spelling in three places:
`cfg.optim.lr` in code, `optim=Optim(lr=3e-4)` in a file, `--optim.lr=3e-4` on a command line.

    python train.py configs/demo.py --optim.lr=1e-3 --run=runs/hot     # any setting can be overridden
    python train.py demo --print-config                                # what would run, nothing runs
    python train.py --help                                             # every setting, default and meaning

`configs/demo.py`, `config/demo.py` and `demo` name the same file. configurator.py reads files, overrides and
the comments below, and checks types and ranges. It does not import torch: a mistake is reported in well under
a second, before a GPU or a process group is touched.
"""

import dataclasses
import enum
import functools
import os
from dataclasses import field
from typing import Literal, NamedTuple

import configurator
import consistency

# did_you_mean, to_dict and unknown are here for the files that import them from this one.
from configurator import ConfigError, choose, did_you_mean, to_dict, unknown  # noqa: F401


class Purpose(enum.Flag):
    """The purpose of a setting. Purposes combine with |; a setting without one is an error in the tests."""

    DATASET = 1  # decides what the dataset is: used when a dataset is built again or compared
    LEARNED = 2  # decides what a run learns: may not change when the run resumes
    WEIGHTS = 4  # decides what weights mean: must agree with the model that --init_from names, and so must
    # model.seq_len where positions are learned; what decides this decides also what is learned
    MODEL = WEIGHTS | LEARNED
    RUN = 8  # decides only how it is run: may change at any time


DATASET, LEARNED, MODEL, RUN = Purpose.DATASET, Purpose.LEARNED, Purpose.MODEL, Purpose.RUN

# Names that settings had. They still load, with a note that says the new one.
RENAMED = {"train.on_spike": "train.on_incident", "model.init_cut": "model.init_trunc"}
section = functools.partial(configurator.section, RENAMED)  # a frozen dataclass that is checked
setting = configurator.setting


class NormKind(NamedTuple):
    """What a norm learns and keeps. A new norm is a row of NORMS, a choice of Model.norm, and its formula."""

    per_channel: dict[str, float]  # parameters with a number for each channel: name -> initial value
    # FP32 numbers kept for backward beside the input: for each token, and on a CPU for each channel too
    # (tests/test_choices.py measures them)
    kept_per_token: int
    kept_per_channel_on_cpu: int
    single: tuple[tuple[str, float], ...] = ()  # parameters of one number: (name, initial value)

    def n_parameters(self, width: int) -> int:
        return width * len(self.per_channel) + len(self.single)


NORMS = {
    "rmsnorm": NormKind({"weight": 1.0}, 1, 1),  # a CPU computes it in steps and keeps x / rms(x)
    "layernorm": NormKind({"weight": 1.0, "bias": 0.0}, 2, 0),
    "nonparametric_layernorm": NormKind({}, 2, 0),
}


@section
class Model:
    """The transformer; the defaults are LLaMA-7B's, except norm_eps. A 0 that is "derived" is filled in."""

    vocab_size: int = setting(32000, MODEL, least=1)  # rows of the embedding, at least the tokenizer's
    seq_len: int = setting(2048, DATASET | LEARNED, least=1)  # tokens of context, T
    d_model: int = setting(4096, MODEL, least=1)  # width of the residual stream, D
    n_layers: int = setting(32, MODEL, least=1)  # number of blocks
    n_heads: int = setting(32, MODEL, least=1)  # query heads, H
    n_kv_heads: int = setting(0, MODEL, least=0)  # key/value heads, K; H/K queries share one; derived: H
    d_head: int = setting(0, MODEL, least=0)  # width of a head, Dh; derived: d_model / n_heads
    d_ff: int = setting(11008, MODEL, least=1)  # hidden width of the feed-forward, F
    # feed-forward: gated by SiLU (LLaMA) or GELU; or two matrices with GELU (Pythia) or squared ReLU between
    ffn: Literal["swiglu", "geglu", "gelu", "relu2"] = setting("swiglu", MODEL)
    # norm: with a weight (LLaMA); with weight and bias (Pythia); with neither (OLMo-1)
    norm: Literal["rmsnorm", "layernorm", "nonparametric_layernorm"] = setting("rmsnorm", MODEL)
    norm_eps: float = setting(1e-5, MODEL, above=0)  # added to the variance
    # where the norms are: on the input of a sub-layer, or on its output (OLMo 2)
    norm_place: Literal["before", "after"] = setting("before", MODEL)
    qk_norm: bool = setting(False, MODEL)  # norm of queries and keys over all heads together (OLMo 2)
    clip_qkv: float = setting(0.0, MODEL, least=0)  # clamp q, k and v to +- this; 0: off (OLMo-1.7: 8)
    bias: bool = setting(False, MODEL)  # a bias in every linear layer but the head (Pythia, CrystalCoder)
    parallel_residual: bool = setting(False, MODEL)  # attention and feed-forward read one stream (Pythia)
    # how a token knows its position
    positions: Literal["rope", "alibi", "learned", "none"] = setting("rope", MODEL)
    rope_theta: float = setting(10000.0, MODEL, above=0)  # base of the rotary frequencies
    rope_fraction: float = setting(1.0, MODEL, above=0)  # rotary share of a head's dimensions (Pythia: 0.25)
    # rotary dimensions that form a pair: i and i + half (Hugging Face's LLaMA); 2i and 2i + 1 (CrystalCoder)
    rope_pairs: Literal["halves", "neighbours"] = setting("halves", MODEL)
    rope_scaling: float = setting(1.0, MODEL, least=1)  # divides slow frequencies (Llama 3.1); 1: none
    # slow frequencies make fewer turns than this over the original context
    rope_scaling_low: float = setting(1.0, MODEL, above=0)
    # fast frequencies make more turns than this, and stay as they are; those between are blended
    rope_scaling_high: float = setting(4.0, MODEL)
    rope_scaling_seq_len: int = setting(8192, MODEL, above=0)  # tokens of the original context
    # sliding window: the number of tokens that a token sees, itself included; 0: all before it
    window: int = setting(0, MODEL, least=0)
    document_mask: bool = setting(False, LEARNED)  # a token sees its own document only; positions restart
    tie_embeddings: bool = setting(False, MODEL)  # lm_head shares the embedding's matrix (OLMo-1B)
    embedding_multiplier: float = setting(1.0, MODEL, above=0)  # factor of embeddings (CrystalCoder: 14.6)
    # factor of the logits; with muP they are also multiplied by mup_base_width / d_model
    logits_multiplier: float = setting(1.0, MODEL, above=0)
    # muP: learning rate and multipliers are those of a model of this width (CrystalCoder: 256); 0: no muP
    mup_base_width: int = setting(0, MODEL, least=0)
    # initial weights: Normal(0, init_std); the same, smaller where a sub-layer ends (GPT-2); OLMo-1's;
    # Pythia's; CrystalCoder's
    init: Literal["normal", "gpt2", "mitchell", "small_wang", "mup"] = setting("normal", LEARNED)
    init_std: float = setting(0.02, LEARNED, least=0)  # standard deviation for normal, gpt2 and mup
    init_trunc: float = setting(0.0, LEARNED, least=0)  # trunc-normal at this many deviations; 0: no limit

    def resolved(self) -> "Model":
        """The same model with every derived value filled in, and checked."""
        consistency.check_width(self)
        n_kv_heads = self.n_kv_heads or self.n_heads
        d_head = self.d_head or self.d_model // self.n_heads
        model = dataclasses.replace(self, n_kv_heads=n_kv_heads, d_head=d_head)
        consistency.check_model(model)
        return model

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


@section
class Tokenizer:
    """The tokenizer, and how `python tokenizer.py train CONFIG` makes it."""

    path: str = setting("", DATASET)  # folder or file of the tokenizer; derived: tokenizers/<config's name>
    kind: Literal["bpe", "sentencepiece"] = setting("bpe", DATASET)  # byte-level BPE; or LLaMA's kind
    vocab_size: int = setting(32000, DATASET, least=1)  # entries when trained, special tokens included
    # pre-tokenization, into pieces that no merge crosses: gpt4, gpt2 or a regular expression
    split: str = setting("gpt4", DATASET)
    eot: str = setting("<|endoftext|>", DATASET)  # the special token after every document
    special_tokens: tuple[str, ...] = setting((), DATASET)  # more special tokens, after eot


@section
class Source:
    """Where documents come from. Every document keeps the name of its source and its id for ever."""

    name: str  # short: it names rows in tables and lines in figures
    paths: tuple[str, ...]  # files, folders and globs
    exclude: tuple[str, ...] = ()  # globs of files to leave out, matched against the path below its folder
    read: Literal["auto", "text", "docstrings"] = "auto"  # docstrings: only the English of Python files
    check = consistency.check_source


@section
class Stage:
    """A part of training with its own mixture: how often each source is read, or in which proportion."""

    name: str = "main"  # names the stage in the manifest and in figures
    # passes over each source, by name; {}: one over all. 2.3 is two passes and 0.3 of the tokens of a third
    epochs: dict[str, float] = field(default_factory=dict)
    # instead of epochs: the share of each source in `tokens`, normalised; it is read as often as that needs
    weights: dict[str, float] = field(default_factory=dict)
    tokens: int = 0  # with weights: the length of the stage
    repeats: int = 1  # how often the whole stage is trained on, each time in a new order
    check = consistency.check_stage


@section
class Data:
    """The dataset: documents become shuffled rows, and rows become chunks (data.py)."""

    sources: tuple[Source, ...] = setting((), DATASET | LEARNED)  # set in the config file
    stages: tuple[Stage, ...] = setting(lambda: (Stage(),), DATASET | LEARNED)  # set in the config file
    # files of rows; a checkpoint is saved at the end of each (Amber: 360)
    n_chunks: int = setting(360, DATASET | LEARNED, least=1)
    # share of each source's documents that become validation rows; of few documents, share of their text
    validation_fraction: float = setting(0.01, DATASET | LEARNED, least=0, below=1)
    # keys the order of rows, and of the documents in a pass that is not whole
    seed: int = setting(1234, DATASET | LEARNED)
    # keys the choice of validation documents, which stays the same for runs in another order
    validation_seed: int = setting(1234, DATASET | LEARNED)
    workers: int = setting(0, RUN, least=0)  # processes that encode; derived: one per core
    # a build stops if a larger share of a source's documents is unreadable
    max_bad_fraction: float = setting(0.01, RUN, least=0, below=1)
    # tokens to train on, for plan.py while there is no dataset yet (Amber: 1.258e12)
    expected_tokens: int = setting(0, RUN, least=0)
    check = consistency.check_data


@section
class Optim:
    """The update: AdamW or Muon, parameter groups, schedule, clipping (optim.py)."""

    # AdamW; or Muon for the matrices inside the layers, and AdamW for the rest
    optimizer: Literal["adamw", "muon"] = setting("adamw", LEARNED)
    lr: float = setting(3e-4, LEARNED, above=0)  # peak learning rate
    # learning rate at the end of the schedule, as a fraction of the peak
    final_lr_fraction: float = setting(0.1, LEARNED, least=0, most=1)
    # decay from the peak to the end; constant: stays at the peak, then falls in the last decay_fraction
    schedule: Literal["cosine", "linear", "constant"] = setting("cosine", LEARNED)
    # share of all steps, at the end, in which a constant learning rate falls linearly
    decay_fraction: float = setting(0.1, LEARNED, least=0, most=1)
    # annealing steps: with --init_from=CHECKPOINT, continue that checkpoint (data and optimizer state) while
    # the learning rate falls linearly to 0 over this many steps
    anneal_steps: int = setting(0, LEARNED, least=0)
    warmup_steps: int = setting(2000, LEARNED, least=0)  # linear warm-up to the peak
    # length of the schedule in steps; later steps keep its last learning rate; 0: all steps that the data
    # have. For an ablation: --train.steps=300 --optim.schedule_steps=300
    schedule_steps: int = setting(0, LEARNED, least=0)
    # length of the schedule in consumed tokens, which it then counts (OLMo-65B: 2e12, as its batch doubles);
    # 0: it counts steps
    schedule_tokens: int = setting(0, LEARNED, least=0)
    warmup_tokens: int = setting(0, LEARNED, least=0)  # instead of warmup_steps, with schedule_tokens
    # learning rate at which warm-up begins, as a fraction of the peak (OLMo-1: 0.1)
    warmup_start_fraction: float = setting(0.0, LEARNED, least=0, most=1)
    beta1: float = setting(0.9, LEARNED, least=0, below=1)  # decay of the running mean of gradients
    beta2: float = setting(0.95, LEARNED, least=0, below=1)  # decay of the running mean of their squares
    eps: float = setting(1e-8, LEARNED, above=0)  # added to the root of the second moment (OLMo-1: 1e-5)
    weight_decay: float = setting(0.1, LEARNED, least=0)  # decoupled, times the learning rate
    # parameters with weight decay: all (Amber); weights of linear layers, without a tied head (OLMo-1); all
    # matrices, with embeddings (Pythia, CrystalCoder); all but embeddings (OLMo 2)
    decay: Literal["all", "linear", "matrices", "not_embeddings"] = setting("all", LEARNED)
    muon_momentum: float = setting(0.95, LEARNED, least=0, most=1)  # decay of Muon's mean of gradients
    grad_clip: float = setting(1.0, LEARNED, least=0)  # limit of the gradient's global L2 norm; 0: no limit
    # the limit is this many times looser in the first grad_clip_start_steps steps (OLMo-7B: 10)
    grad_clip_start_factor: float = setting(1.0, LEARNED, above=0)
    grad_clip_start_steps: int = setting(1000, LEARNED, least=0)  # length of that start
    # z-loss: this times log(sum of exp(logits))^2 joins the gradient, not the logged loss (PaLM: 1e-4)
    z_loss: float = setting(0.0, LEARNED, least=0)
    embedding_gradient: float = setting(1.0, LEARNED, least=0)  # factor of its gradient (GLM-130B: 0.1)
    check = consistency.check_optim

    @property
    def warmup(self) -> int:
        """Length of the warm-up, in the unit that the schedule counts: tokens or steps."""
        return self.warmup_tokens if self.schedule_tokens else self.warmup_steps


@section
class Train:
    """The training loop (train.py)."""

    # sequences in a step, over all GPUs; chunks of the dataset end at multiples of it
    batch_size: int = setting(2048, DATASET | LEARNED, least=1)
    # the batch doubles each time this many tokens have been trained on (OLMo-65B: 100e9); 0: never
    batch_double_tokens: int = setting(0, LEARNED, least=0)
    batch_size_max: int = setting(0, LEARNED, least=0)  # sequences in the largest batch (OLMo-65B: 8192)
    # sequences in one forward pass on one GPU; the number of accumulation steps is derived; 0: the plan
    # chooses, as many as fit (memory.chosen)
    micro_batch_size: int = setting(8, RUN, least=0)
    # stop after this many steps, on the same schedule (see optim.schedule_steps); 0: all that the data have
    steps: int = setting(0, RUN, least=0)
    seed: int = setting(1234, LEARNED)  # seed of the initial weights
    device: Literal["auto", "cpu", "cuda"] = setting("auto", RUN)  # auto: CUDA if there is one (ROCm too)
    # bf16: autocast, with weights in FP32; auto: bf16 on CUDA
    precision: Literal["auto", "fp32", "bf16"] = setting("auto", LEARNED)
    residual: Literal["fp32", "bf16"] = setting("fp32", LEARNED)  # the residual stream, also under autocast
    attention: Literal["auto", "FA3", "FA4"] = setting("auto", RUN)  # auto: PyTorch's choice of its kernels
    compile: Literal["auto", "on", "off"] = setting("auto", RUN)  # torch.compile of each block; auto: on CUDA
    # to save memory, recompute in the backward pass: every N-th block (0: none; 1: every block); selective:
    # in every block all but matmuls and attention; auto: the plan chooses the least that fits
    activation_checkpointing: Literal["auto", "selective"] | int = setting(0, RUN, least=0)
    deterministic: bool = setting(False, RUN)  # the same bits in every run on the same GPUs; slower on CUDA
    log_every: int = setting(10, RUN, least=1)  # steps between printed lines; metrics.jsonl has every step
    # save a checkpoint when the last row of a data chunk has been consumed
    checkpoint_chunks: bool = setting(True, RUN)
    checkpoint_every: int = setting(0, RUN, least=0)  # also save one every N steps; 0: off
    checkpoint_powers_of_two: bool = setting(False, RUN)  # also at steps 1, 2, 4, 8, ... (Pythia)
    # keep the newest N of the checkpoints that neither end a chunk nor begin or end training; 0: all
    keep_others: int = setting(0, RUN, least=0)
    save_async: bool = setting(True, RUN)  # write checkpoints while training continues
    verify: bool = setting(True, RUN)  # compare the hashes of chunks and checkpoints when they are first read
    # spike: loss or gradient norm more than this many deviations above the median of the last spike_window
    # steps (robust: 1.4826 x the median absolute deviation); 0: only what is not finite is an incident
    spike_z: float = setting(0.0, RUN, least=0)
    spike_window: int = setting(128, RUN, least=4)  # no step is judged as a spike before this many
    # after an incident: stop; skip the update; defer the rest of the chunk to the end (K2); or roll back to a
    # checkpoint and leave batches out (PaLM, GLM-130B)
    on_incident: Literal["stop", "skip", "defer", "rollback"] = setting("stop", RUN)
    # a rollback goes to a checkpoint at least this many steps before the incident, else to the first
    rollback_steps: int = setting(100, RUN, least=0)
    # batches that a rollback leaves out: half before the incident (none before the checkpoint), then the rest
    rollback_skip: int = setting(200, RUN, least=1)
    # a run survives this many incidents; the next one stops it, whatever on_incident says
    max_incidents: int = setting(10, RUN, least=0)
    check = consistency.check_train


@section
class Parallel:
    """How a run is spread over processes, one per GPU (parallel.py)."""

    # ddp: every GPU holds the whole model; fsdp: weights, gradients and moments are sharded over GPUs (FSDP2)
    strategy: Literal["ddp", "fsdp"] = setting("ddp", RUN)
    shard: int = setting(0, RUN, least=0)  # fsdp: GPUs that share one copy, such as a node's 8 (HSDP); 0: all
    reshard: bool = setting(True, RUN)  # fsdp: free weights after the forward, all-gather them again
    tp: int = setting(1, RUN, least=1)  # tensor and sequence parallel: GPUs that split matrices and tokens
    # a collective that takes longer ends the run: a process hangs, or is gone
    timeout_seconds: int = setting(900, RUN, least=1)


@section
class Eval:
    """Loss on validation rows (eval.py), and the memorization score of Analysis360 (memorize.py)."""

    batch_size: int = setting(16, RUN, least=1)  # rows in one forward pass when the loss is measured
    max_rows: int = setting(0, RUN, least=0)  # validation rows of each source, the first ones; 0: all
    prompt_tokens: int = setting(32, RUN, least=1)  # memorization: k, tokens of the row that are given
    continuation_tokens: int = setting(32, RUN, least=1)  # memorization: l, tokens that are compared
    # memorization: rows drawn from each chunk, and from the validation rows
    rows_per_chunk: int = setting(1000, RUN, least=1)
    # memorization: rows decoded at once (on a CPU: by each core)
    generate_batch_size: int = setting(128, RUN, least=1)
    seed: int = setting(1234, RUN)  # memorization: seed of the draw
    # upper limits for the last checkpoint, by source; eval.py --check fails above them
    expect_bits_per_byte: dict[str, float] = setting(dict, RUN)


@section
class Config:
    """All settings. Nothing edits a config after it is loaded: what is saved is what ran."""

    model: Model = field(default_factory=Model)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    parallel: Parallel = field(default_factory=Parallel)
    eval: Eval = field(default_factory=Eval)
    name: str = setting("", RUN)  # derived: the config file's name
    run: str = setting("", RUN)  # the run folder; derived: runs/<name>
    dataset: str = setting("", RUN)  # the dataset folder; derived: datasets/<name>
    init_from: str = setting("", LEARNED)  # begin with the weights of this checkpoint or model folder

    given = ()  # no setting: what `load` was given, the config's name and the overrides; see `again`

    def check(self) -> None:
        if set(self.name) & {"/", "\0"} or self.name in (".", "..") or len(os.fsencode(self.name)) > 200:
            problem = "becomes the name of folders, runs/<name> and others: use a short one without '/'"
            raise ConfigError(f"name={self.name!r} {problem}")

    def resolved(self) -> "Config":
        """The same config with every derived value filled in, and the checks that look across sections."""
        path = self.tokenizer.path or f"tokenizers/{self.name}"
        config = dataclasses.replace(
            self,
            model=self.model.resolved(),
            tokenizer=dataclasses.replace(self.tokenizer, path=path),
            data=dataclasses.replace(self.data, workers=self.data.workers or os.cpu_count() or 1),
            run=self.run or f"runs/{self.name}",
            dataset=self.dataset or f"datasets/{self.name}",
        )
        consistency.check_config(config)
        return config

    def again(self, script: str) -> str:
        """The command that runs another script with this config, as it was given, and the same overrides.

        load("my.py", ["--run=x"]).again("tokenizer.py train") -> "python tokenizer.py train my.py --run=x"
        """
        return configurator.command(self, script)

    without_effect = consistency.without_effect


SECTIONS = configurator.sections_of(Config)  # {"model": Model, ...}
SETTINGS = configurator.settings_of(Config)  # every spelling on a command line: "optim.lr", ..., "run"


def settings_for(purpose: Purpose) -> list[str]:
    """The names of settings by purpose: settings_for(DATASET) -> ["model.seq_len", "tokenizer.path", ...]."""
    fields = configurator.fields_of(Config)
    return [name for name, f in fields.items() if purpose in f.metadata["purpose"]]


# What configurator.py does with any dataclass, here with Config.
load = functools.partial(configurator.load, Config)  # load("demo", ["--optim.lr=1e-3"]).optim.lr -> 0.001
load_run = functools.partial(configurator.load_run, Config)  # the config that a run folder was made with
settings_help = functools.partial(configurator.settings_help, Config)  # what --help says of every setting
from_command_line = functools.partial(configurator.from_command_line, Config)
did_you_mean_setting = functools.partial(configurator.did_you_mean_setting, SETTINGS)

if __name__ == "__main__":
    configurator.script(from_command_line)(__doc__)
