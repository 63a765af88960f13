"""What a config costs, as pure functions: parameters, FLOPs, memory on each GPU, steps, disk, hours, energy.

plan.py prints them as a report; train.py and benchmarks can ask for one figure. Memory is that of train.py
and model.py as they stand; FSDP and activation checkpointing are a forecast. Reads the manifest of a dataset
where one is built; writes nothing; imports no torch.

Letters: T seq_len, D d_model, L n_layers, H query heads, K key/value heads, Dh d_head, F d_ff, V vocabulary.
"""

import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import NamedTuple

import config
from config import Config, ConfigError, Model

GIB = 2**30
FP32, BF16 = 4, 2  # bytes of a number


class Gpu(NamedTuple):
    memory: float  # bytes that PyTorch finds on it: less than the name says
    flops: float | None  # peak of dense BF16 products with FP32 sums, a second
    watts: float | None  # of the board at most; a long run draws about that much


# Peaks and watts: NVIDIA's data sheets (of the SXM boards, and of the RTX 4090), without sparsity.
GPUS = {
    "a100-40gb": Gpu(39.4 * GIB, 312e12, 400),
    "a100-80gb": Gpu(79.1 * GIB, 312e12, 400),
    "h100-80gb": Gpu(79.1 * GIB, 989e12, 700),
    "h200": Gpu(139.7 * GIB, 989e12, 700),
    "rtx-4090": Gpu(23.6 * GIB, 165e12, 450),
}
# Others under the names that PyTorch gives them; the first that is part of a device's name counts.
PEAKS = {
    "A100": GPUS["a100-80gb"].flops,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": GPUS["h100-80gb"].flops,
    "H200 NVL": 836e12,
    "H200": GPUS["h200"].flops,
    "RTX 4090": GPUS["rtx-4090"].flops,
}
# The rest is for what is not our tensors: CUDA's context, buffers of cuBLAS and NCCL, gaps between tensors.
USABLE = 0.95
# A CPU process was resident with 1.2 to 1.6 times its tensors (benchmarks/bench_memory.py): malloc's gaps.
USABLE_ON_CPU = 0.6
# loss.LOGITS_BYTES and LOGITS_BYTES_CUDA, which cannot be imported without torch; a test compares them
LOGITS_BYTES, LOGITS_BYTES_CUDA = 2**25, 2**29


# ---- parameters and FLOPs ---------------------------------------------------------------------------------


def parameters(model: Model) -> dict[str, int]:
    """Exact count by part: sum(parameters(Model()).values()) -> 6738415616. A tied head is the embedding."""
    m = model.resolved()
    D, q, kv = m.d_model, m.n_heads * m.d_head, m.n_kv_heads * m.d_head
    into = 2 if gated(m) else 1  # matrices from D to F; one more leads back
    norm = {"rmsnorm": 1, "layernorm": 2, "nonparametric_layernorm": 0}[m.norm]  # numbers a channel
    return {
        "embedding": m.vocab_size * D,
        "learned positions": m.seq_len * D if m.positions == "learned" else 0,
        "attention": m.n_layers * D * (2 * q + 2 * kv),
        "feed-forward": m.n_layers * D * m.d_ff * (into + 1),
        "norms": norm * (m.n_layers * (2 * D + m.qk_norm * (q + kv)) + D),
        "biases": m.bias * m.n_layers * (q + 2 * kv + D + into * m.d_ff + D),
        "head": 0 if m.tie_embeddings else m.vocab_size * D,
    }


def gated(m: Model) -> bool:
    return m.ffn in ("swiglu", "geglu")


def without_padding(model: Model, entries: int) -> int:
    """The size, had the vocabulary only the `entries` of the tokenizer and no rows to round it up."""
    return sum(parameters(dataclasses.replace(model, vocab_size=entries)).values())


def flops_per_token(model: Model) -> dict[str, int]:
    """Of training on one token, forward and backward: {"6N": 6 N, "attention": 12 L (H Dh) T}.

    Two conventions are in use: the first alone (Kaplan et al. 2020), and the sum (PaLM, appendix B). N is all
    parameters, embedding included, as in the published figures. Nothing is taken off for the causal half, and
    recomputed activations do not count. A window shorter than T takes its place.
    """
    m = model.resolved()
    seen = min(m.seq_len, m.window or m.seq_len)
    return {
        "6N": 6 * sum(parameters(m).values()),
        "attention": 12 * m.n_layers * m.n_heads * m.d_head * seen,
    }


def mfu(model: Model, tokens_per_second_per_gpu: float, peak: float) -> tuple[float, float]:
    """Model FLOPs utilisation, shares of the peak: by 6N, and by 6N + attention (see flops_per_token)."""
    flops = flops_per_token(model)
    return tuple(tokens_per_second_per_gpu * f / peak for f in (flops["6N"], sum(flops.values())))


def peak_flops(device: str) -> float | None:
    """Of a device by its name, None where it is not known: peak_flops("NVIDIA H100 80GB HBM3") -> 989e12."""
    return next((flops for name, flops in PEAKS.items() if name in device), None)


# ---- memory -----------------------------------------------------------------------------------------------


def kept_by_layer(model: Model, n: int, bf16: bool, cuda: bool) -> int:
    """Bytes that one block of model.py keeps between its forward and its backward, for n tokens.

    The residual stream and norms are FP32. Matrix products run in c bytes, and keep what they read: under
    autocast one cast copy for all that read the same.
    """
    m = model.resolved()
    D, q, kv = m.d_model, m.n_heads * m.d_head, m.n_kv_heads * m.d_head
    c = BF16 if bf16 else FP32

    # what the two norms read, in FP32: the stream (the same in a parallel block), or sub-layers' outputs
    kept = (1 if m.parallel_residual else 2) * FP32 * n * D + 2 * kept_by_norm(m, n, D, cuda)
    kept += 2 * c * n * D  # what q, k and v read, and what gate and up read
    if m.qk_norm:
        kept += FP32 * n * (q + kv) + kept_by_norm(m, n, q, cuda) + kept_by_norm(m, n, kv, cuda)
    kept += c * n * (2 * q + 2 * kv) + FP32 * n * m.n_heads  # q, k, v, output; log of the softmax's sum
    kept += c * n * (q + 2 * kv) * bool(m.clip_qkv)  # before they are clamped
    kept += (4 if gated(m) else 2) * c * n * m.d_ff  # gate, act(gate), up and product; or up and act(up)
    if bf16 or m.positions != "alibi":  # SDPA's own copy of the mask, one a block
        kept += c * mask_numbers(m, n, cuda)
    return kept


def mask_numbers(m: Model, n: int, cuda: bool) -> int:
    """Of a mask that says who sees whom. On CUDA flex attention works it out where it is needed."""
    if cuda or not (m.positions == "alibi" or m.window or m.document_mask):
        return 0
    heads, rows = m.n_heads if m.positions == "alibi" else 1, n // m.seq_len if m.document_mask else 1
    return rows * heads * m.seq_len**2


def kept_by_norm(m: Model, n: int, width: int, cuda: bool) -> int:
    """Beside its input: a number or two a token; and RMSNorm, made of several steps on a CPU, x / rms(x)."""
    if m.norm == "rmsnorm":
        return FP32 * n * (1 if cuda else 1 + width)
    return 2 * FP32 * n


def activations(model: Model, n: int, bf16: bool, cuda: bool, checkpointing: str = "none") -> int:
    """Bytes kept for backward by all blocks and the final norm, for n tokens; the loss is counted apart.

    checkpointing="all": a block keeps only what it reads, and one at a time is computed again.
    """
    m = model.resolved()
    layer, stream = kept_by_layer(m, n, bf16, cuda), FP32 * n * m.d_model
    blocks = m.n_layers * layer if checkpointing == "none" else m.n_layers * stream + layer
    shared = 0 if bf16 else FP32 * mask_numbers(m, n, cuda) * (m.positions == "alibi")
    if m.positions == "rope":  # cosine and sine
        shared += FP32 * (n if m.document_mask else m.seq_len) * int(m.d_head * m.rope_fraction)
    return blocks + stream + kept_by_norm(m, n, m.d_model, cuda) + shared


def memory(cfg: Config, gpus: int, strategy: str, checkpointing: str, cuda: bool) -> dict[str, float]:
    """Bytes on each GPU by kind, at the moment of a step when their sum is the largest.

    Activations go while gradients come, and before that the loss holds the gradient of the head: which moment
    is the worst depends on the shape. `at` names it, and is no bytes.
    """
    m, micro = cfg.model.resolved(), cfg.train.micro_batch_size
    bf16, fsdp = precision(cfg, cuda) == "bf16", strategy == "fsdp" and gpus > 1
    c, shards = BF16 if bf16 else FP32, gpus if fsdp else 1
    accumulation = config.accumulation_steps(cfg.train.batch_size, micro, gpus)
    counts, n, D = parameters(m), micro * m.seq_len, m.d_model  # n: tokens of a micro-batch
    P, table = sum(counts.values()), m.vocab_size * D  # table: the embedding, or the head
    block = (counts["attention"] + counts["feed-forward"]) // m.n_layers

    # Gradients stand from the start where they outlive a micro-batch, or are DDP's buckets.
    gradients = FP32 * P / shards
    held = gradients if accumulation > 1 or (gpus > 1 and not fsdp) else 0

    if fsdp:  # gathered: this block and the next one, embedding and head all the time; gradients on their way
        forward_copies = backward_copies = (
            c * (2 * block + counts["embedding"] + counts["head"]) + FP32 * block
        )
    else:  # autocast's casts of all matrices, until backward has used them; or of one block, computed again
        forward_copies = c * m.n_layers * block * bf16
        backward_copies = c * block * bf16 if checkpointing == "all" else forward_copies

    kept, layer = activations(m, n, bf16, cuda, checkpointing), kept_by_layer(m, n, bf16, cuda)
    # what a block leaves for backward; with checkpointing one more block is there while it is computed again
    each, after_forward = (layer, kept) if checkpointing == "none" else (FP32 * n * D, kept - layer)
    # of a block's backward: gradients of the stream, of what gate and up gave, of the matrix after them
    into = 2 if gated(m) else 1
    busy = (FP32 + c) * n * D + into * c * n * m.d_ff + (FP32 + c * bf16) * D * m.d_ff
    # of the end of backward: the gradient of the embedding's output, and its matrix's, to be added to another
    embedding = FP32 * n * D + FP32 * table * (bool(held) or m.tie_embeddings)
    taken, begun = loss_bytes(m, n, bf16, cuda)

    most, first = FP32 * (P - block - table) / shards, kept - (m.n_layers - 1) * each

    kinds = ("gradients", "copies", "activations", "loss", "working")
    moments = {
        "the loss is taken": (held, forward_copies, after_forward, taken, FP32 * n * D),
        "backward begins": (held, backward_copies, after_forward, begun, 0),
        "the last block goes backward": (held or FP32 * table / shards, backward_copies, kept, 0, busy),
        "the first block goes backward": (held or most, backward_copies, first, 0, busy),
        "backward ends": (gradients, forward_copies * fsdp, 0, 0, embedding),
    }
    at = max(moments, key=lambda moment: sum(moments[moment]))
    return {"weights": gradients, "optimizer": 2 * gradients, **dict(zip(kinds, moments[at])), "at": at}


def loss_bytes(m: Model, n: int, bf16: bool, cuda: bool) -> tuple[float, float]:
    """Of loss.py: bytes while it goes through its slices, and when its backward scales what they left."""
    c, table = BF16 if bf16 else FP32, m.vocab_size * m.d_model
    rows = min(n, max(1, (LOGITS_BYTES_CUDA if cuda else LOGITS_BYTES) // (FP32 * m.vocab_size)))
    logits = rows * m.vocab_size * (FP32 + 2 * BF16 * bf16)  # a slice's; in BF16 once before and once after
    left = c * n * m.d_model + FP32 * table  # the gradients of what the head reads, and of its matrix
    casts = bf16 * BF16 * (n * m.d_model + table)  # of both factors
    product = (
        bf16 * table * (BF16 if cuda else BF16 + FP32)
    )  # a slice's; a CPU makes it FP32 before it adds it
    # backward has both gradients twice, before and after scaling, and the head's once more in its own type
    return left + logits + casts + product, 2 * left + c * bf16 * table


def precision(cfg: Config, cuda: bool) -> str:
    """The precision of matrix products: what parallel.precision makes of train.precision."""
    return ("bf16" if cuda else "fp32") if cfg.train.precision == "auto" else cfg.train.precision


def fits(cfg: Config, gpus: int, strategy: str, checkpointing: str, gpu: str) -> bool:
    kinds = memory(cfg, gpus, strategy, checkpointing, cuda=gpu != "cpu")
    return total(kinds) <= usable(gpu, gpus)


def total(kinds: dict) -> float:
    return sum(value for kind, value in kinds.items() if kind != "at")


def usable(gpu: str, gpus: int) -> float:
    """Bytes for the tensors of one process. All processes of a CPU share its memory."""
    return machine(gpu).memory * (USABLE if gpu != "cpu" else USABLE_ON_CPU / gpus)


def machine(gpu: str) -> Gpu:
    if gpu == "cpu":
        return Gpu(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None, None)
    return GPUS[gpu]


def smallest_change(cfg: Config, gpus: int, strategy: str, checkpointing: str, gpu: str) -> list[str]:
    """The flags that make a plan fit which does not, [] where none do.

    On as few GPUs as possible (twice, four times ... as many, up to 4,096), and on them as few changes as
    possible, tried in this order: a smaller micro-batch, activation checkpointing, FSDP.
    """
    batch, micro = cfg.train.batch_size, cfg.train.micro_batch_size
    strategies = [strategy] if gpu == "cpu" else dict.fromkeys([strategy, "fsdp"])
    options = list(itertools.product(strategies, dict.fromkeys([checkpointing, "all"]), range(micro, 0, -1)))
    changed = [(s != strategy) + (c != checkpointing) + (m != micro) for s, c, m in options]
    options = [options[i] for i in sorted(range(len(options)), key=changed.__getitem__)]
    for more in range(13 if gpu != "cpu" else 1):
        count = gpus << more
        for s, c, m in options:
            # more copies of the same model do not help
            if batch % (m * count) or count > max(gpus, 4096) or (more and s == "ddp"):
                continue
            smaller = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, micro_batch_size=m))
            if fits(smaller, count, s, c, gpu):
                flags = [f"--train.micro_batch_size={m}"] * (m != micro)
                flags += [f"--checkpointing={c}"] * (c != checkpointing)
                flags += [f"--strategy={s}"] * (s != strategy)
                return flags + [f"--gpus={count}"] * (more > 0)
    return []


# ---- steps, chunks, checkpoints ---------------------------------------------------------------------------


class Schedule(NamedTuple):
    source: str  # where the number of rows is from
    rows: int
    steps: int  # of the schedule
    last_step: int  # train.steps may end it earlier
    chunk_ends: list[int]  # rows, in training order
    checkpoints: list[int]  # steps after which one is saved


def schedule(cfg: Config, tokens: float = 0) -> Schedule | None:
    """How long training is: by `tokens` if stated, else the dataset's manifest, else data.expected_tokens.

    None where nothing says it. Raises ConfigError where the dataset has another row length, or the text is
    too short for a step a chunk.
    """
    T, batch = cfg.model.seq_len, cfg.train.batch_size
    manifest = Path(cfg.dataset) / "manifest.json"
    if not tokens and manifest.exists():
        try:
            about = json.loads(manifest.read_text(encoding="utf-8"))
            rows, row_tokens = about["rows"], about["seq_len"]
            ends = [chunk["first"] + chunk["rows"] for chunk in about["chunks"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{manifest} is damaged or no manifest: {error}") from None
        if row_tokens != T:
            raise ConfigError(
                f"{cfg.dataset} has rows of {row_tokens} tokens and model.seq_len={T}; build it again with "
                "data.py, name another with --dataset=FOLDER, or state --tokens"
            )
        source = f"{manifest}"
    elif tokens or cfg.data.expected_tokens:
        rows = int(tokens or cfg.data.expected_tokens) // T
        source = "--tokens" if tokens else "data.expected_tokens"
        n_chunks = cfg.data.n_chunks
        ends = [k * (rows // batch) // n_chunks * batch for k in range(1, n_chunks)] + [rows]
        if rows // batch < n_chunks:
            given = int(tokens or cfg.data.expected_tokens)
            raise ConfigError(
                f"{given:,} tokens are {rows // batch:,} steps of {batch:,} rows of {T:,}, fewer than "
                f"data.n_chunks={n_chunks}; lower it or the batch, or train on more"
            )
    else:
        return None
    steps = rows // batch
    if not steps:
        raise ConfigError(f"{cfg.dataset} has {rows} rows, train.batch_size={batch}: not one step")
    last = min(cfg.train.steps or steps, steps)
    return Schedule(source, rows, steps, last, ends, checkpoint_steps(cfg, ends, last))


def checkpoint_steps(cfg: Config, chunk_ends: list[int], last_step: int) -> list[int]:
    """Steps after which train.py saves a checkpoint: 0, the last, those that end a chunk, those asked for."""
    steps = {0, last_step}
    if cfg.train.checkpoint_chunks:
        steps |= {-(-end // cfg.train.batch_size) for end in chunk_ends}
    if cfg.train.checkpoint_every:
        steps |= set(range(0, last_step, cfg.train.checkpoint_every))
    if cfg.train.checkpoint_powers_of_two:
        steps |= {2**i for i in range(last_step.bit_length())}
    return sorted(step for step in steps if step <= last_step)


def disk(model: Model, n_checkpoints: int) -> dict[str, int]:
    """Bytes: of one checkpoint's weights (FP32) and AdamW's two moments, and of all with and without those.

    The checkpoint of step 0 has no moments yet.
    """
    P = sum(parameters(model).values())
    weights, moments = FP32 * P, 2 * FP32 * P
    return {
        "weights": weights,
        "optimizer": moments,
        "all": weights * n_checkpoints + moments * (n_checkpoints - 1),
        "all without optimizer": weights * n_checkpoints,
    }


# ---- time, energy, money ----------------------------------------------------------------------------------


def hours(tokens: float, tokens_per_second_per_gpu: float, gpus: int) -> float:
    """Of training without a pause: hours(1.2585e12, 2600, 224) / 24 -> 25.0 days, Amber's."""
    return tokens / (tokens_per_second_per_gpu * gpus) / 3600


def megawatt_hours(gpu_hours: float, watts: float) -> float:
    """What the GPUs draw, before the data centre's share."""
    return gpu_hours * watts / 1e6


def tonnes_co2(mwh: float, pue: float, kg_per_kwh: float) -> float:
    """OLMo section 4.4: energy of the hardware x power usage effectiveness x carbon intensity of the grid."""
    return mwh * pue * kg_per_kwh  # MWh x kg/kWh = t
