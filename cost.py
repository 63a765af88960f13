"""What a config costs, as pure functions: parameters, FLOPs, memory on each GPU, steps, disk, hours, energy.

plan.py prints them as a report; benchmarks can ask for one figure. Memory is that of learner.py, parallel.py
and model.py as they stand (benchmarks/bench_memory.py compares). Reads the manifest of a dataset where one is
built; writes nothing; imports no torch.

Letters: T seq_len, D d_model, L n_layers, H query heads, K key/value heads, Dh d_head, F d_ff, V vocabulary.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import config
import steps
from config import Config, ConfigError, Model, choose
from steps import Steps

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
SHORT = {"a100": "a100-80gb", "h100": "h100-80gb", "4090": "rtx-4090", "rtx4090": "rtx-4090"}
# Others under the names that PyTorch gives them; the first whose words a device's name has counts.
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
SHARD_BYTES = 5_000_000_000  # checkpoint.SHARD_BYTES, for the same reason
MOST_GPUS = 4096  # that smallest_change asks about


# ---- parameters and FLOPs ---------------------------------------------------------------------------------


def parameters(model: Model) -> dict[str, int]:
    """Exact count by part: sum(parameters(Model()).values()) -> 6738415616. A tied head is the embedding."""
    m = model.resolved()
    D, q, kv = m.d_model, m.n_heads * m.d_head, m.n_kv_heads * m.d_head
    into = 2 if m.gated else 1  # matrices from D to F; one more leads back
    positions = {"rope": 0, "alibi": 0, "learned": m.seq_len * D, "none": 0}
    norm = len(m.norm_parameters)  # for each channel
    return {
        "embedding": m.vocab_size * D,
        "learned positions": choose("model.positions", m.positions, positions),
        "attention": m.n_layers * D * (2 * q + 2 * kv),
        "feed-forward": m.n_layers * D * m.d_ff * (into + 1),
        "norms": norm * (m.n_layers * (norms_of_a_block(m) * D + m.qk_norm * (q + kv)) + D),
        "biases": m.bias * m.n_layers * (q + 2 * kv + D + into * m.d_ff + D),
        "head": 0 if m.tie_embeddings else m.vocab_size * D,
    }


def norms_of_a_block(m: Model) -> int:
    """Those that are as wide as the stream."""
    return choose("model.norm_place", m.norm_place, {"before": 2, "after": 2})


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
    words = re.findall("[A-Za-z0-9]+", device)  # whole ones: an RTX A1000 is no A100
    if {*words} & {"MIG", "Laptop", "D", "64GB"}:  # a slice of a board, or another board of that name
        return None
    return next((flops for name, flops in PEAKS.items() if f" {name} " in f" {' '.join(words)} "), None)


# ---- memory -----------------------------------------------------------------------------------------------


def accumulation(cfg: Config, gpus: int) -> int:
    """Micro-batches of each GPU in a step, the first where batches double. Errors as config.mesh_shape."""
    replicate, shard, tp = config.mesh_shape(cfg.parallel, gpus)
    if tp > 1 and cfg.model.d_model % shard:  # of a matrix whose rows tp splits, FSDP shards the columns
        raise ConfigError(
            f"model.d_model={cfg.model.d_model} does not divide by {shard} shards, as parallel.tp={tp} with "
            "parallel.strategy='fsdp' needs; use another parallel.shard or number of processes"
        )
    return config.accumulation_steps(cfg.train.batch_size, cfg.train.micro_batch_size, replicate * shard)


def parts_of_a_process(m: Model, tp: int) -> tuple[float, int]:
    """Parameters before sharding: of a block, whose matrices are split over tp; and of all outside blocks."""
    counts, D = parameters(m), m.d_model
    outside = counts["embedding"] + counts["learned positions"] + counts["head"]
    norm = len(m.norm_parameters)
    outside += norm * D  # the final norm
    whole = norm * (norms_of_a_block(m) * D + m.qk_norm * (m.n_heads + m.n_kv_heads) * m.d_head)
    whole += 2 * D * m.bias  # of the two matrices whose sums are scattered over tokens
    block = (sum(counts.values()) - outside) // m.n_layers
    return whole + (block - whole) / tp, outside


def kept_by_layer(model: Model, n: int, bf16: bool, cuda: bool, tp: int = 1) -> float:
    """Bytes that one block of model.py keeps between its forward and its backward, for n tokens.

    The residual stream and norms are FP32. Matrix products run in c bytes, and keep what they read: under
    autocast one cast copy for all that read the same. Of tp processes each has n / tp tokens of the stream,
    all n of what matrices read, and for these 1 / tp of heads and hidden values.
    """
    m = model.resolved()
    D, q, kv = m.d_model, m.n_heads * m.d_head, m.n_kv_heads * m.d_head
    c, own = BF16 if bf16 else FP32, n / tp

    # what the norms read, in FP32: the stream (the same in a parallel block), or sub-layers' outputs
    norms = norms_of_a_block(m)
    kept = (1 if m.parallel_residual else norms) * FP32 * own * D + norms * kept_by_norm(m, own, D, cuda)
    kept += 2 * c * n * D  # what q, k and v read, and what gate and up read
    if m.qk_norm:
        kept += FP32 * n * (q + kv) + kept_by_norm(m, n, q, cuda) + kept_by_norm(m, n, kv, cuda)
    kept += (
        c * n * (2 * q + 2 * kv) + FP32 * n * m.n_heads
    ) / tp  # q, k, v, output; log of the softmax's sum
    kept += c * n * (q + 2 * kv) / tp * bool(m.clip_qkv)  # before they are clamped
    kept += (4 if m.gated else 2) * c * n * m.d_ff / tp  # gate, act(gate), up and product; or up and act(up)
    if bf16 or m.positions != "alibi":  # SDPA's own copy of the mask, one a block
        kept += c * mask_numbers(m, n, cuda)
    return kept


def mask_numbers(m: Model, n: int, cuda: bool) -> int:
    """Of a mask that says who sees whom. On CUDA flex attention works it out where it is needed."""
    if cuda or not (m.positions == "alibi" or m.window or m.document_mask):
        return 0
    heads, rows = m.n_heads if m.positions == "alibi" else 1, n // m.seq_len if m.document_mask else 1
    return rows * heads * m.seq_len**2


def kept_by_norm(m: Model, n: float, width: int, cuda: bool) -> float:
    """Beside its input: a number or two a token; and RMSNorm, made of several steps on a CPU, x / rms(x)."""
    numbers = {"rmsnorm": 1 if cuda else 1 + width, "layernorm": 2, "nonparametric_layernorm": 2}
    return FP32 * n * choose("model.norm", m.norm, numbers)


def kept_outside_layers(model: Model, n: int, bf16: bool, cuda: bool, tp: int = 1) -> float:
    """Bytes kept for backward beside the blocks': by the final norm, and what all blocks read."""
    m = model.resolved()
    shared = {
        # cosine and sine
        "rope": FP32 * (n if m.document_mask else m.seq_len) * int(m.d_head * m.rope_fraction),
        "alibi": 0 if bf16 else FP32 * mask_numbers(m, n, cuda),
        "learned": 0,
        "none": 0,
    }
    kept = FP32 * n / tp * m.d_model + kept_by_norm(m, n / tp, m.d_model, cuda)
    return kept + choose("model.positions", m.positions, shared)


def activations(model: Model, n: int, bf16: bool, cuda: bool, every: int = 0, tp: int = 1) -> float:
    """Bytes kept between forward and backward by all blocks and the final norm; the loss is counted apart.

    Every n-th block, from the first on, keeps only what it reads if its activations are computed again.
    """
    m = model.resolved()
    again = -(-m.n_layers // every) if every else 0
    blocks = (m.n_layers - again) * kept_by_layer(m, n, bf16, cuda, tp) + again * FP32 * n / tp * m.d_model
    return blocks + kept_outside_layers(m, n, bf16, cuda, tp)


def memory(cfg: Config, gpus: int, cuda: bool) -> dict[str, float]:
    """Bytes on each GPU by kind, at the moment of a step when their sum is the largest.

    Activations go while gradients come, and before that the loss holds the gradient of the head: which moment
    is the worst depends on the shape. `at` names it, and is no bytes. Raises ConfigError as
    config.mesh_shape.
    """
    m, micro, every = cfg.model.resolved(), cfg.train.micro_batch_size, cfg.train.activation_checkpointing
    replicate, shard, tp = config.mesh_shape(cfg.parallel, gpus)
    bf16, reshard = precision(cfg, cuda) == "bf16", cfg.parallel.reshard
    sharded = gpus > 1 and (cfg.parallel.strategy == "fsdp" or tp > 1)  # as parallel.start
    c, L, D, n = (
        BF16 if bf16 else FP32,
        m.n_layers,
        m.d_model,
        micro * m.seq_len,
    )  # n: tokens of a micro-batch
    own, table = n / tp, m.vocab_size * D  # tokens of the stream and the loss; the embedding, or the head
    block, outside = parts_of_a_process(m, tp)
    P = L * block + outside

    # Gradients stand from the start where they outlive a micro-batch, or are DDP's buckets.
    accumulates = cfg.train.batch_size > micro * replicate * shard or cfg.train.batch_size_max > 0
    gradients = FP32 * P / shard
    held = gradients if accumulates or (gpus > 1 and not sharded) else 0
    whole = sum(parameters(m).values())
    moments = optimizer_numbers(cfg) * P / whole  # a process of several has its share of all kinds

    layer, rest = kept_by_layer(m, n, bf16, cuda, tp), kept_outside_layers(m, n, bf16, cuda, tp)
    again = [every > 0 and i % every == 0 for i in range(L)]
    kept = [FP32 * own * D if recomputed else layer for recomputed in again]
    taken, begun = loss_bytes(m, own, bf16, cuda)

    # Copies. FSDP2 gathers blocks into a buffer, and from there into their places: forward holds the last
    # buffer until the next block needs one, backward has the next block's under way. Gradients travel in
    # FP32, each block's until the next one's do. What is outside of blocks is there from end to end. On a
    # CPU, gloo has a copy of its own of what is gathered, and FSDP2 one of what travels, to divide it.
    buffer, gloo = c * block * (shard > 1), shard > 1 and not cuda
    if sharded:
        forward = c * outside + buffer + c * L * block * (not reshard)
        begin = c * outside + (buffer if reshard else c * L * block)
    else:  # autocast's casts of all matrices, until backward has used them; or of one block, computed again
        forward, begin = c * L * block * bf16, c * block * bf16 * (L - sum(again))

    # Of a block's backward: gradients of the stream, of what gate and up gave, of the matrix after them.
    into = 2 if m.gated else 1
    busy = FP32 * own * D + c * n * D + into * c * n * m.d_ff / tp
    busy += (c if sharded else FP32 + c * bf16) * D * m.d_ff / tp

    at = {
        "the loss is taken": (held, forward, sum(kept) + rest, taken, FP32 * own * D),
        "backward begins": (held, begin, sum(kept) + rest, begun, 0),
    }
    if sharded:
        at["forward begins"] = (held, c * outside * (1 + (shard > 1) + gloo), 0, 0, 0)
    left, uncast = sum(kept), L - sum(again)  # of blocks that backward has not reached
    for i in reversed(range(L)):
        name = "the last block" if i == L - 1 else "the first block" if i == 0 else f"block {i + 1} of {L}"
        left -= kept[i]
        if sharded:
            come = held or FP32 * (L - 1 - i) * block / shard
            always = c * outside + c * table + buffer * (i > 0) * reshard + c * block * i * (not reshard)
            copies = (
                always + c * block + FP32 * block * (i < L - 1)
            )  # the last: gradients of the block before
            at[f"{name} is gathered"] = (
                come,
                copies + buffer * gloo,
                left + kept[i] + rest,
                0,
                FP32 * own * D,
            )
            at[f"{name} has gone backward"] = (come, copies + c * block, left + rest, 0, FP32 * own * D)
            travel = FP32 * block * (1 + 1 / shard) + (FP32 * block if gloo else c * block)
            at[f"gradients of {name} travel"] = (come, always + travel, left + rest, 0, FP32 * own * D)
        else:
            come = held or FP32 * (table + (L - 1 - i) * block)
            copies = c * block * bf16 * (uncast + again[i])
        uncast -= not again[i]
        at[f"{name} goes backward"] = (come, copies, left + layer + rest, 0, busy)
    # of the end of backward: the gradient of the embedding's output, and its matrix's, to be added to another
    embedding = FP32 * own * D
    if sharded:
        blocks = held or FP32 * L * block / shard
        at["backward ends"] = (blocks, 2 * c * outside + FP32 * block, 0, 0, embedding)
        # FSDP2 keeps a hold of the last one of a group's gradients until they have arrived
        travel = FP32 * outside * (1 + gloo) + FP32 * outside / shard + c * table * (not m.tie_embeddings)
        at["the last gradients travel"] = (blocks, max(travel, (c + FP32) * outside), 0, 0, 0)
    else:
        embedding += FP32 * table * (bool(held) or m.tie_embeddings)
        at["backward ends"] = (gradients, 0, 0, 0, embedding)
    at["the weights are moved"] = (gradients, 0, 0, 0, muon_bytes(m) * (cfg.optim.optimizer == "muon"))

    kinds = ("gradients", "copies", "activations", "loss", "working")
    worst = max(at, key=lambda moment: sum(at[moment]))
    standing = {"weights": FP32 * P / shard, "optimizer": FP32 * moments / shard}
    return {**standing, **dict(zip(kinds, at[worst])), "at": worst}


def optimizer_numbers(cfg: Config) -> int:
    """Moments: AdamW has two a parameter; Muon one for those of matrices inside the layers."""
    counts = parameters(cfg.model)
    whole, matrices = 2 * sum(counts.values()), counts["attention"] + counts["feed-forward"]
    return choose("optim.optimizer", cfg.optim.optimizer, {"adamw": whole, "muon": whole - matrices})


def muon_bytes(m: Model) -> float:
    """While one matrix is made orthogonal: its update in FP32; two of its iterates, two squares in BF16."""
    small, large = sorted((m.d_model, max(m.d_ff, m.n_heads * m.d_head)))
    return (FP32 + 2 * BF16) * small * large + 2 * BF16 * small**2


def loss_bytes(m: Model, n: float, bf16: bool, cuda: bool) -> tuple[float, float]:
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
    table = {"auto": "bf16" if cuda else "fp32", "fp32": "fp32", "bf16": "bf16"}
    return choose("train.precision", cfg.train.precision, table)


def fits(cfg: Config, gpus: int, gpu: str, have: float = 0) -> bool:
    """Whether every process has room, in `have` bytes or those of `gpu`. ConfigError as config.mesh_shape."""
    return total(memory(cfg, gpus, cuda=gpu != "cpu")) <= (have or usable(gpu, gpus))


def check_memory(cfg: Config, gpus: int, gpu: str, have: float = 0) -> None:
    """Raises ConfigError where a process has no room, with the smallest change that would fit.

    have: bytes for the tensors of one process, where that is a device at hand and none of GPUS.
    """
    if fits(cfg, gpus, gpu, have):
        return
    need, room = total(memory(cfg, gpus, gpu != "cpu")) / GIB, (have or usable(gpu, gpus)) / GIB
    change = " ".join(smallest_change(cfg, gpus, gpu, have))
    more = "" if gpu == "cpu" else f", on up to {MOST_GPUS:,} GPUs,"
    advice = f"it would with {change}" if change else (
        f"no smaller micro-batch, checkpointing, FSDP or tensor parallel{more} makes it fit; "
        f"use {'GPUs' if gpu == 'cpu' else 'a larger GPU'} or a smaller model"
    )  # fmt: skip
    raise ConfigError(f"this does not fit: {need:,.1f} GiB where {room:,.1f} are usable; {advice}")


def total(kinds: dict) -> float:
    return sum(value for kind, value in kinds.items() if kind != "at")


def usable(gpu: str, gpus: int) -> float:
    """Bytes for the tensors of one process. All processes of a CPU share its memory."""
    return machine(gpu).memory * (USABLE if gpu != "cpu" else USABLE_ON_CPU / gpus)


def machine(gpu: str) -> Gpu:
    if gpu == "cpu":
        return Gpu(machine_memory(), None, None)
    return GPUS[gpu]


def machine_memory(root: Path = Path("/")) -> int:
    """Bytes of this machine, or of the control group of this process (a container, a job) if it has fewer."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return limits[0]  # not Linux
    for group in groups:
        _, kinds, name = group.split(":", 2)  # "0::/user.slice", or of version 1 "9:memory:/docker/3f"
        if kinds and "memory" not in kinds.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if kinds else "")
        limit = "memory.limit_in_bytes" if kinds else "memory.max"
        folder = top / name.strip("/")
        for at in (folder, *folder.parents):  # a group's limit holds for the groups in it
            with contextlib.suppress(OSError, ValueError):  # it has no limit: "max"
                limits.append(int((at / limit).read_text()))
            if at == top:
                break
    return min(limits)


def smallest_change(cfg: Config, gpus: int, gpu: str, have: float = 0) -> list[str]:
    """The flags that make a plan fit which does not, [] where none do.

    On as few GPUs as possible (twice, four times ... as many, up to MOST_GPUS), and on them as few changes as
    possible, tried in this order: a smaller micro-batch, activation checkpointing of every block, FSDP over
    all GPUs. Only where no number of GPUs helps so, also with tensor parallel over 2, 4 or 8 GPUs of a node.
    """
    micro, every, own = cfg.train.micro_batch_size, cfg.train.activation_checkpointing, cfg.parallel
    strategies = dict.fromkeys(
        [(own.strategy, own.shard), ("fsdp", 0)][: 1 + (cfg.optim.optimizer == "adamw")]
    )
    options = list(itertools.product(strategies, dict.fromkeys([every, 1]), range(micro, 0, -1)))
    changed = [(s != (own.strategy, own.shard)) + (e != every) + (m != micro) for s, e, m in options]
    options = [options[i] for i in sorted(range(len(options)), key=changed.__getitem__)]
    splits = [own.tp] + [tp for tp in (2, 4, 8) if tp != own.tp and can_split(cfg, tp)]
    counts = [
        gpus << more for more in range(13 if gpu != "cpu" else 1) if gpus << more <= max(gpus, MOST_GPUS)
    ]
    for group in (splits[:1], splits[1:]):
        for count, tp, ((strategy, shard), e, m) in itertools.product(counts, group, options):
            if count > gpus and strategy == "ddp":  # more copies of the same model do not help
                continue
            other = variant(cfg, strategy, e, m, shard, tp)
            try:
                accumulation(other, count)
            except ConfigError:
                continue
            if fits(other, count, gpu, have):
                flags = [f"--train.micro_batch_size={m}"] * (m != micro)
                flags += [f"--train.activation_checkpointing={e}"] * (e != every)
                flags += [f"--parallel.strategy={strategy}"] * (strategy != own.strategy)
                flags += [f"--parallel.shard={shard}"] * (shard != own.shard)
                flags += [f"--parallel.tp={tp}"] * (tp != own.tp)
                return flags + [f"--gpus={count}"] * (count > gpus)
    return []


def can_split(cfg: Config, tp: int) -> bool:
    try:
        config.check_parallel(cfg.model.resolved(), dataclasses.replace(cfg.parallel, tp=tp), cfg.optim)
    except ConfigError:
        return False
    return True


def variant(
    cfg: Config, strategy: str, every: int, micro: int = 0, shard: int | None = None, tp: int = 0
) -> Config:
    """The same config with another strategy and activation checkpointing; others where they are given."""
    p, t = cfg.parallel, cfg.train
    shard = (p.shard if shard is None else shard) * (strategy == "fsdp")
    spread = dataclasses.replace(p, strategy=strategy, shard=shard, tp=tp or p.tp)
    loop = dataclasses.replace(
        t, activation_checkpointing=every, micro_batch_size=micro or t.micro_batch_size
    )
    return dataclasses.replace(cfg, parallel=spread, train=loop)


# ---- steps, chunks, checkpoints ---------------------------------------------------------------------------


class Schedule(NamedTuple):
    source: str  # where the number of rows is from
    steps: Steps  # which rows each step trains on: rows, steps and batch sizes of all the data
    begin: int  # the step it begins at: 0, or the origin's with optim.anneal_steps
    last_step: int  # train.steps or optim.anneal_steps may end it earlier
    chunks: list[tuple[int, int]]  # rows (first, end), in training order
    checkpoints: list[int]  # steps after which one is saved
    on_disk: list[int]  # those of them that train.keep_others leaves
    assumed: str = ""  # what stands for an origin that cannot be read here


def schedule(cfg: Config, tokens: float = 0) -> Schedule | None:
    """How long training is: by `tokens` if stated, else the dataset's manifest, else data.expected_tokens.

    None where nothing says it. Raises ConfigError where the dataset has another row length, the text is too
    short for a step a chunk or for annealing.
    """
    T, batch = cfg.model.seq_len, cfg.train.batch_size
    manifest = Path(cfg.dataset) / "manifest.json"
    if not tokens and manifest.exists():
        try:
            about = json.loads(manifest.read_text(encoding="utf-8"))
            rows, row_tokens = about["rows"], about["seq_len"]
            chunks = [(chunk["first"], chunk["first"] + chunk["rows"]) for chunk in about["chunks"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{manifest} is damaged or no manifest: {error}") from None
        if row_tokens != T:
            raise ConfigError(
                f"{cfg.dataset} has rows of {row_tokens} tokens and model.seq_len={T}; remove that folder "
                f"and build it again: {cfg.again('data.py')}; or name another with --dataset=FOLDER, or "
                "state --tokens"
            )
        source = f"{manifest}"
    elif tokens or cfg.data.expected_tokens:
        rows = int(tokens or cfg.data.expected_tokens) // T
        source = "--tokens" if tokens else "data.expected_tokens"
        n_chunks = cfg.data.n_chunks
        bounds = [k * (rows // batch) // n_chunks * batch for k in range(n_chunks)] + [rows]  # as data.py
        chunks = list(itertools.pairwise(bounds))
        if rows // batch < n_chunks:
            given = int(tokens or cfg.data.expected_tokens)
            raise ConfigError(
                f"{given:,} tokens are {rows // batch:,} steps of {batch:,} rows of {T:,}, fewer than "
                f"data.n_chunks={n_chunks}; lower it or the batch, or train on more"
            )
    else:
        return None
    if rows < batch:
        raise ConfigError(f"{cfg.dataset} has {rows} rows, train.batch_size={batch}: not one step")
    plan, anneal = steps.of(cfg, rows), cfg.optim.anneal_steps
    begin, order, assumed = origin(cfg, plan.n_steps) if anneal else (0, None, "")
    if order:
        plan = steps.of(cfg, rows, order)
    if begin + anneal > plan.n_steps:
        raise ConfigError(
            f"optim.anneal_steps={anneal}: after the origin's step {begin} there are data for "
            f"{max(0, plan.n_steps - begin)}; anneal in fewer steps, or from an earlier checkpoint"
        )
    last = min(cfg.train.steps or plan.n_steps, begin + anneal if anneal else plan.n_steps, plan.n_steps)
    if last <= begin:
        raise ConfigError(f"train.steps={cfg.train.steps} ends before annealing begins, after step {begin}")
    saved = [s for s in steps.checkpoint_steps(cfg, plan, chunks, last) if s > begin]
    kept = steps.kept_steps(cfg, plan, chunks, last) | {begin}
    left = left_on_disk(cfg, [begin, *saved], kept)
    return Schedule(source, plan, begin, last, chunks, [begin, *saved], left, assumed)


def origin(cfg: Config, n_steps: int) -> tuple[int, list | None, str]:
    """(step, order, what is assumed) of the checkpoint that annealing begins at, as far as it is here.

    One that cannot be read has the step of its name, or else begins as late as the data allow.
    """
    folder = Path(cfg.init_from)
    among = [(int(p.parent.name[5:]), p) for p in folder.glob("checkpoints/step-*/state.json")
             if p.parent.name[5:].isdecimal()]  # fmt: skip
    path = max(among)[1] if among else folder / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return int(state["step"]), state.get("order"), ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        name = re.fullmatch(r"step-(\d+)", folder.name)
    if name:
        return int(name[1]), None, f"the origin, {folder}, is not here: its step is taken from its name"
    latest = max(0, n_steps - cfg.optim.anneal_steps)
    assumed = f"the origin, {folder}, is not here: it is taken to be as late as the data allow"
    return latest, None, assumed


def left_on_disk(cfg: Config, saved: list[int], kept: set[int]) -> list[int]:
    """The steps whose checkpoints are there at the end, when train.keep_others has deleted the rest."""
    t, here = cfg.train, []
    for step in saved if t.keep_others else ():
        here.append(step)
        old = [s for s in here if s <= step - t.rollback_steps] if t.on_incident == "rollback" else []
        others = [s for s in here if s not in kept and s not in old[-1:]]
        gone = set(others[: -t.keep_others])
        here = [s for s in here if s not in gone]
    return here if t.keep_others else saved


def check_warmup(cfg: Config, plan: Steps) -> None:
    """Raises ConfigError where warm-up is as long as the schedule, or as the data: the peak never comes."""
    unit, warmup = "tokens" if cfg.optim.schedule_tokens else "steps", cfg.optim.warmup
    has = {
        "the data have": steps.schedule_position(cfg, plan, plan.n_steps),
        "the schedule has": steps.schedule_length(cfg, plan.n_steps),
    }
    shorter = min(has, key=has.get)
    if warmup and warmup >= has[shorter]:
        raise ConfigError(
            f"optim.warmup_{unit}={warmup} is too long, as {shorter} {has[shorter]} {unit}: the "
            f"learning rate never reaches its peak; use --optim.warmup_{unit}={has[shorter] // 10}, a tenth"
        )


def about_schedule(cfg: Config, plan: Steps, n_steps: int, last_step: int) -> str:
    """How much of the learning-rate schedule a run makes, and why; n_steps: those that the data have.

    ", the whole schedule" or " of a schedule of 1,203 steps (train.steps ends it early; ...)".
    """
    o, early = cfg.optim, "train.steps ends it early" if last_step == cfg.train.steps else ""
    if o.anneal_steps:
        falls = f", annealing: the learning rate falls to 0 in {o.anneal_steps:,} steps"
        return falls + f" ({early})" * bool(early)
    unit = "tokens" if o.schedule_tokens else "steps"
    length, end = steps.schedule_length(cfg, n_steps), steps.schedule_position(cfg, plan, last_step)
    # tokens need not divide by the batch, so the last, incomplete one does not count
    missing = length - end - (plan.size(last_step) * cfg.model.seq_len - 1) * bool(o.schedule_tokens)
    if end > length:
        return f"; the schedule ends after {length:,} {unit}, and the learning rate stays at its last value"
    if missing <= 0:
        return ", the whole schedule"
    fit = f"; --optim.schedule_{unit}={end} would fit the schedule to it" * (end > o.warmup)
    made = f", {end:,} tokens" * bool(o.schedule_tokens)
    return f"{made} of a schedule of {length:,} {unit} ({early or 'the data end before it'}{fit})"


def about_warmup(cfg: Config, plan: Steps, last_step: int) -> str:
    """Says so where a run ends inside its warm-up; "" where it does not."""
    o, at = cfg.optim, steps.schedule_position(cfg, plan, last_step - 1)
    if o.anneal_steps or at >= o.warmup:
        return ""
    share = o.warmup_start_fraction + (1 - o.warmup_start_fraction) * at / o.warmup
    unit = "tokens" if o.schedule_tokens else "steps"
    return f"it ends inside the warm-up of {o.warmup:,} {unit}, at {share:.1%} of the peak learning rate"


def disk(cfg: Config, n_checkpoints: int, begin: int = 0) -> dict[str, int]:
    """Bytes: of one checkpoint's weights (FP32) and moments (AdamW's two, Muon's one), and of all of them.

    The checkpoint of step 0 has no moments yet; that of the step at which annealing begins has them.
    """
    P = sum(parameters(cfg.model).values())
    weights, moments = FP32 * P, FP32 * optimizer_numbers(cfg)
    return {
        "weights": weights,
        "optimizer": moments,
        "all": weights * n_checkpoints + moments * (n_checkpoints - (begin == 0)),
        "all without optimizer": weights * n_checkpoints,
    }


def saving(cfg: Config, gpus: int) -> tuple[float, int]:
    """(bytes, writers): copies in host memory while checkpoint.Saving writes them, and the processes that do.

    Weights and moments in FP32, 12 bytes a parameter for AdamW, in files of SHARD_BYTES, each of one process.
    The memory stays taken between saves.
    """
    b = disk(cfg, 1)
    n_files = sum(-(-b[kind] // SHARD_BYTES) for kind in ("weights", "optimizer"))
    return b["weights"] + b["optimizer"], min(gpus, n_files)


# ---- time, energy, money ----------------------------------------------------------------------------------


def hours(tokens: float, tokens_per_second_per_gpu: float, gpus: int) -> float:
    """Of training without a pause: hours(1.2585e12, 2600, 224) / 24 -> 25.0 days, Amber's."""
    return tokens / (tokens_per_second_per_gpu * gpus) / 3600


def megawatt_hours(gpu_hours: float, watts: float) -> float:
    """What the GPUs draw, before the data centre's share."""
    return gpu_hours * watts / 1e6


PUE = 1.1  # power of the data centre over that of its computers: OLMo's and LLaMA's
KG_CO2_PER_KWH = 0.385  # LLaMA's, of the average US grid


def tonnes_co2(mwh: float, pue: float, kg_per_kwh: float) -> float:
    """OLMo section 4.4: energy of the hardware x power usage effectiveness x carbon intensity of the grid."""
    return mwh * pue * kg_per_kwh  # MWh x kg/kWh = t
