"""Bytes on each GPU at the worst moment of a training step, and whether a config fits.

    memory.peak(cfg, 8, cuda=True)       # {"weights": ..., "activations": ..., "at": "backward begins"}
    memory.check(cfg, 8, "a100-80gb")    # ConfigError with the smallest change that would fit
    memory.chosen(cfg, 8, "h200")        # the micro-batch and the recompute, where the plan is to choose them

A step is followed from its forward pass to its update. At each moment the tensors are added up that this
code (model.py, loss.py, parallel.py, optim.py) and PyTorch's engines hold then; the largest sum counts.

The sums are derived from the code, and of compiled blocks from what PyTorch's partitioner keeps. On a CPU
they are within a few per cent of the profiler (benchmarks/bench_memory.py), on an H200 with one process
within 1 % of the allocator's peak (2026-11-26; tests/test_plan.py has the table). FSDP, HSDP and tensor
parallel have not been measured on GPUs. Imports no torch.

Letters: n tokens of a micro-batch; T seq_len, D d_model, L n_layers, F d_ff, V vocabulary; q, kv: the widths
of all queries and of all keys, H Dh and K Dh; c bytes of a number in matmuls.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import consistency
import cost
import hardware
from config import Config, ConfigError, Model, choose
from cost import BF16, FP32, accumulation, norms_of_a_block, optimizer_numbers, parameters, precision
from hardware import GIB

# These equal loss.LOGITS_BYTES and loss.LOGITS_BYTES_CUDA, which need torch to import; a test compares them.
LOGITS_BYTES, LOGITS_BYTES_CUDA = 2**25, 2**31
# cuBLAS and cuBLASLt each keep a workspace of 32 MiB on an H100 and an H200 (measured together: 67 MB).
WORKSPACES = 2 * 2**25
MOST_GPUS = 4096  # the largest number that smallest_change tries


# ---- activations ------------------------------------------------------------------------------------------


class How(NamedTuple):
    """How the numbers of a step are computed."""

    cuda: bool
    compiled: bool = False
    bf16: bool = False  # matmuls, under autocast
    residual: int = FP32  # bytes of a number of the residual stream

    @property
    def c(self) -> int:
        """Bytes of a number in matmuls."""
        return BF16 if self.bf16 else FP32


def kept_by_layer(model: Model, n: int, how: How, tp: int = 1, selective: bool = False) -> float:
    """Bytes that one block of model.py keeps between its forward and its backward, for n tokens.

    Matmuls run in c bytes and keep their inputs: under autocast one cast copy for all matmuls that read the
    same input. With tensor parallel over tp processes, each has n / tp tokens of the stream, all n tokens of
    matmul inputs, and 1 / tp of the heads and hidden values.

    A compiled block keeps what matmuls read and wrote, and computes in backward what lies between: the
    stream after attention, the inputs of norms in FP32, the activation (PyTorch's min-cut partitioner).
    Selective recompute keeps the block's input and what matmuls and attention made of it.
    """
    m, c, local = model.resolved(), how.c, n / tp
    D, q, kv = m.d_model, m.n_heads * m.d_head, m.n_kv_heads * m.d_head
    stream, after = how.residual * local * D, m.norm_place == "after"

    # Attention: q, k, v and its output, and for each head and token the log of the softmax's sum, in FP32.
    attention = (c * n * (2 * q + 2 * kv) + FP32 * n * m.n_heads) / tp
    hidden = c * n * m.d_ff / tp

    if selective:
        # The outputs of o_proj and down_proj. The compiler drops that of down_proj, unless a norm reads it:
        # its sum with the stream needs nothing for backward.
        outputs = 1 if how.compiled and not after else 2
        return stream + outputs * c * local * D + attention + (2 if m.gated else 1) * hidden

    norms = norms_of_a_block(m)
    kept = attention + 2 * c * n * D  # the inputs of matmuls: one for q, k and v, and one for gate and up
    if how.compiled:
        # The block's input, and o_proj's output, which is added to it; or the two outputs that norms read.
        inputs = 2 * c * local * D if after else stream + c * local * D * (not m.parallel_residual)
        inputs += (1 if m.parallel_residual else norms) * kept_by_norm(m, local, D, True)
        if not after and not how.bf16 and not m.norm_kind.n_parameters(D):
            # The output of a norm without weight, which a matmul keeps, is all that its backward needs:
            # instead of the stream it keeps a number for each token.
            inputs = (1 if m.parallel_residual else norms) * FP32 * local
        kept += inputs
        if m.qk_norm:
            kept += c * n * (q + kv) + kept_by_norm(m, n, q, True) + kept_by_norm(m, n, kv, True)
        # Whether a query, key or value was clipped: a byte each.
        kept += n * (q + 2 * kv) / tp * bool(m.clip_qkv)
        # Gate, up and their product; without a gate up and act(up).
        kept += (3 if m.gated else 2) * hidden
    else:
        # The inputs of norms, in FP32: the stream (the same in a parallel block), or sub-layers' outputs.
        inputs = norms * FP32 * local * D if after or not m.parallel_residual else FP32 * local * D
        kept += inputs + norms * kept_by_norm(m, local, D, how.cuda)
        # The inputs of the norms of queries and keys.
        if m.qk_norm:
            kept += FP32 * n * (q + kv)
            kept += kept_by_norm(m, n, q, how.cuda) + kept_by_norm(m, n, kv, how.cuda)
        # Queries, keys and values before they are clipped.
        kept += c * n * (q + 2 * kv) / tp * bool(m.clip_qkv)
        # Gate, act(gate), up and their product; without a gate up and act(up).
        kept += (4 if m.gated else 2) * hidden
    # A mask that PyTorch's attention casts is copied in each block. ALiBi in FP32 needs no cast.
    if how.bf16 or m.positions != "alibi":
        kept += c * mask_numbers(m, n, how.cuda)
    return kept


def mask_numbers(m: Model, n: int, cuda: bool) -> int:
    """Numbers in the attention mask. On CUDA, flex attention computes it where it is needed."""
    if cuda or not (m.positions == "alibi" or m.window or m.document_mask):
        return 0
    heads = m.n_heads if m.positions == "alibi" else 1
    rows = n // m.seq_len if m.document_mask else 1
    return rows * heads * m.seq_len**2


def kept_by_norm(m: Model, n: float, width: int, cuda: bool) -> float:
    """Bytes that a norm over `width` channels keeps for backward beside its input, for n tokens."""
    kind = m.norm_kind
    on_cpu = 0 if cuda else kind.kept_per_channel_on_cpu * width
    return FP32 * n * (kind.kept_per_token + on_cpu)


def kept_outside_layers(model: Model, n: int, how: How, tp: int) -> float:
    """Bytes kept for backward outside of blocks: by the final norm, and the positions that blocks read."""
    m = model.resolved()
    positions = {
        # Cosine and sine.
        "rope": FP32 * (n if m.document_mask else m.seq_len) * int(m.d_head * m.rope_fraction),
        "alibi": 0 if how.bf16 else FP32 * mask_numbers(m, n, how.cuda),
        "learned": 0,
        "none": 0,
    }
    kept = FP32 * n / tp * m.d_model + kept_by_norm(m, n / tp, m.d_model, how.cuda)
    return kept + choose("model.positions", m.positions, positions)


def loss_bytes(m: Model, n: float, how: How) -> tuple[float, float]:
    """Bytes that loss.py holds while it computes slice by slice, and when backward scales its gradients."""
    c, table = how.c, m.vocab_size * m.d_model
    # Logits of one slice. All slices have the same size, but for the last.
    most = max(1, (LOGITS_BYTES_CUDA if how.cuda else LOGITS_BYTES) // (FP32 * m.vocab_size))
    slice_rows = math.ceil(n / math.ceil(n / most))
    logits = slice_rows * m.vocab_size
    # Gradients of the head's input, and of the head.
    gradients = c * n * m.d_model + FP32 * table
    # With BF16: casts of both factors; in eager code the logits in FP32. After them, on a CPU, a slice's
    # gradient of the head: with BF16 also cast to FP32, with FP32 beside oneDNN's copy of the logits.
    casts = how.bf16 * BF16 * (n * m.d_model + table)
    in_fp32 = FP32 * logits * (how.bf16 and not how.compiled)
    of_head = 0 if how.cuda else FP32 * table + (BF16 * table if how.bf16 else FP32 * logits)
    # Backward has both gradients before and after scaling, which is done in FP32.
    scaling = gradients + FP32 * (table + n * m.d_model)
    return gradients + c * logits + casts + max(in_fp32, of_head), scaling


# ---- the moments of a step --------------------------------------------------------------------------------


class Moment(NamedTuple):
    """Bytes on one GPU at one moment of a step, beside the weights and the optimizer's moments."""

    gradients: float = 0  # FP32; with FSDP, this process's shard
    copies: float = 0  # weights that are all-gathered or cast; gradients that are being reduced
    activations: float = 0
    loss: float = 0  # logits and what loss.py makes of them
    working: float = 0  # memory that is freed when its operation ends


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes that make up the moments of a step, for one process: bytes, or counts of parameters."""

    sharded: bool  # by FSDP2, which tensor parallel uses too
    shard: int  # processes that FSDP2 shards over
    reshard: bool  # whether FSDP2 frees a block's weights after its forward and gathers them again
    tp: int
    how: How

    selective: bool  # recompute
    n_layers: int
    block: float  # parameters of a block after tensor parallel, before FSDP
    outside: int  # parameters outside of blocks
    table: int  # parameters of the embedding; the head has as many
    tied: bool

    gradients: float  # all of them
    early_gradients: float  # those that exist during the whole step: all, or none
    recomputed: list[bool]  # for each block: all of it; selective recompute counts as no
    kept: list[float]  # for each block: the activations that it keeps after its forward
    layer: float  # activations of a block that is not recomputed, or during its recompute
    outer: float  # activations outside of blocks
    stream: float  # the residual stream of a micro-batch, or its gradient
    busy: float  # working memory of a block's backward


def peak(cfg: Config, gpus: int, cuda: bool) -> dict[str, float | str]:
    """Bytes on each GPU by kind, at the moment of a step when their sum is the largest; `at` names it.

    Which moment is the worst depends on the shape: during backward, activations are freed block by block
    while gradients appear; before it, the loss holds the gradient of the head. Raises ConfigError as
    consistency.mesh_shape.
    """
    s, m = sizes(cfg, gpus, cuda), cfg.model.resolved()

    # Forward ends with the loss, backward begins with its gradient. All activations are there.
    n = cfg.train.micro_batch_size * m.seq_len / s.tp
    computing, scaling = loss_bytes(m, n, s.how)
    gathered, begin = copies_after_forward(s)
    kept = sum(s.kept) + s.outer
    moments = {
        "the loss is computed": Moment(
            s.early_gradients, gathered, kept, computing, working=FP32 * n * m.d_model
        ),
        "backward begins": Moment(s.early_gradients, begin, kept, scaling),
    }

    # Backward, block by block, and the update.
    moments.update(moments_with_fsdp(s) if s.sharded else moments_of_whole_weights(s))
    muon = muon_bytes(m, cuda) if cfg.optim.optimizer == "muon" else 0
    moments["the weights are updated"] = Moment(s.gradients, working=muon)

    # Weights and moments of the optimizer are there all the time. Tensor parallel splits both alike.
    P = s.n_layers * s.block + s.outside
    optimizer = optimizer_numbers(cfg) * P / sum(parameters(m).values())
    worst = max(moments, key=lambda name: sum(moments[name]))
    always = {"weights": FP32 * P / s.shard, "optimizer": FP32 * optimizer / s.shard}
    found = moments[worst]._asdict()
    return {**always, **found, "working": found["working"] + WORKSPACES * cuda, "at": worst}


def sizes(cfg: Config, gpus: int, cuda: bool) -> Sizes:
    """The sizes of a config on one of `gpus` GPUs."""
    m, micro = cfg.model.resolved(), cfg.train.micro_batch_size
    assert micro, "chosen comes before sizes"
    replicate, shard, tp = consistency.mesh_shape(cfg.parallel, gpus)
    sharded = gpus > 1 and (cfg.parallel.strategy == "fsdp" or tp > 1)  # as parallel.start
    compiled = choose("train.compile", cfg.train.compile, {"auto": cuda, "on": True, "off": False})
    residual = choose("train.residual", cfg.train.residual, {"fp32": FP32, "bf16": BF16})
    how = How(cuda, compiled, precision(cfg, cuda) == "bf16", residual)
    c, n = how.c, micro * m.seq_len
    block, outside = parts_of_a_process(m, tp)

    # Gradients exist during the whole step where they are summed over micro-batches, or are DDP's buckets.
    gradients = FP32 * (m.n_layers * block + outside) / shard
    accumulates = cfg.train.batch_size > micro * replicate * shard or cfg.train.batch_size_max > 0
    early = accumulates or (gpus > 1 and not sharded)

    # The feed-forward layer's backward needs the most working memory. It holds the gradients of the stream
    # (in FP32, and as its matmul reads it), of the outputs of gate and up, and of the matrix that leads back
    # to the stream (under autocast in both types).
    stream = how.residual * (n / tp) * m.d_model
    busy = stream + c * n * m.d_model + (2 if m.gated else 1) * c * n * m.d_ff / tp
    busy += (c if sharded else FP32 + c * how.bf16) * m.d_model * m.d_ff / tp

    if not cuda and not how.bf16:  # oneDNN's copy of a matmul's input, which it reads transposed
        busy += c * n * m.d_model

    # A block that is recomputed keeps only its input.
    every, selective = cfg.train.activation_checkpointing, False
    if isinstance(every, str):
        every, selective = choose("train.activation_checkpointing", every, {"selective": (0, True)})
    recomputed = [every > 0 and i % every == 0 for i in range(m.n_layers)]
    layer = kept_by_layer(m, n, how, tp)
    not_recomputed = kept_by_layer(m, n, how, tp, selective)

    return Sizes(
        sharded=sharded,
        shard=shard,
        reshard=cfg.parallel.reshard,
        tp=tp,
        how=how,
        selective=selective,
        n_layers=m.n_layers,
        block=block,
        outside=outside,
        table=m.vocab_size * m.d_model,
        tied=m.tie_embeddings,
        gradients=gradients,
        early_gradients=gradients if early else 0,
        recomputed=recomputed,
        kept=[stream if again else not_recomputed for again in recomputed],
        layer=layer,
        outer=kept_outside_layers(m, n, how, tp),
        stream=stream,
        busy=busy,
    )


def parts_of_a_process(m: Model, tp: int) -> tuple[float, int]:
    """Parameters before FSDP: (in a block, whose matrices are split over tp; outside of blocks)."""
    counts, D = parameters(m), m.d_model
    outside = counts["embedding"] + counts["learned positions"] + counts["head"]
    norm = m.norm_kind.n_parameters  # of a width
    outside += norm(D)  # the final norm
    whole = norms_of_a_block(m) * norm(D)
    whole += m.qk_norm * (norm(m.n_heads * m.d_head) + norm(m.n_kv_heads * m.d_head))
    whole += 2 * D * m.bias  # biases of the two matrices whose outputs are scattered over tokens
    block = (sum(counts.values()) - outside) // m.n_layers
    return whole + (block - whole) / tp, outside


def copies_after_forward(s: Sizes) -> tuple[float, float]:
    """Bytes of copies of weights when the loss is computed, and when backward begins."""
    if s.sharded:
        # FSDP2 has the weights outside of blocks gathered. It has those of all blocks too; or with reshard
        # only the buffer of its last all-gather, which it frees after the next one has begun.
        buffer, blocks = gather_buffer(s), s.how.c * s.n_layers * s.block
        gathered = s.how.c * s.outside + buffer + blocks * (not s.reshard)
        return gathered, s.how.c * s.outside + (buffer if s.reshard else blocks)
    # Backward needs the casts of the blocks that it does not recompute. Autocast keeps those of all matrices
    # until forward ends; compiled code those that backward needs.
    block = s.how.c * s.block * s.how.bf16
    begin = block * s.recomputed.count(False) * (not s.selective)
    return begin if s.how.compiled else block * s.n_layers, begin


def backward_order(s: Sizes) -> Iterator[tuple[int, str, float]]:
    """For each block, from the last to the first: index, name, and activations that exist beside its own."""
    left = sum(s.kept)
    for i in reversed(range(s.n_layers)):
        left -= s.kept[i]
        if i == s.n_layers - 1:
            name = "the last block"
        else:
            name = f"block {i + 1} of {s.n_layers}" if i else "the first block"
        yield i, name, left + s.outer


def moments_of_whole_weights(s: Sizes) -> dict[str, Moment]:
    """Backward of one process, or of DDP: each process has all weights and all gradients."""
    moments = {}
    for i, name, left in backward_order(s):
        # Gradients of the head and of the blocks after this one, if they were not there from the start.
        gradients = s.early_gradients or FP32 * (s.table + (s.n_layers - 1 - i) * s.block)
        # The casts of the blocks before this one that are not recomputed, and of this one.
        n_casts = s.recomputed[:i].count(False) * (not s.selective) + 1
        casts = s.how.c * s.block * s.how.bf16 * n_casts
        moments[f"{name} goes backward"] = Moment(gradients, casts, left + s.layer, working=s.busy)
    # Last come the gradient of the embedding's output, and one of its matrix if it is added to another.
    added = FP32 * s.table * (bool(s.early_gradients) or s.tied)
    moments["backward ends"] = Moment(s.gradients, working=s.stream + added)
    return moments


def gather_buffer(s: Sizes) -> float:
    """Bytes of the buffer into which FSDP all-gathers the weights of one block."""
    return s.how.c * s.block * (s.shard > 1)


def moments_with_fsdp(s: Sizes) -> dict[str, Moment]:
    """Backward with FSDP2, HSDP or tensor parallel: a process has a shard of weights and gradients.

    FSDP2 all-gathers the weights of a block into a buffer and copies them from there into the parameters.
    During backward the next block's all-gather is under way. Gradients are reduce-scattered in FP32; those of
    a block are freed when the next block's are done. Weights outside of blocks stay gathered during the step.
    On a CPU, gloo keeps its own copy of what it gathers, and FSDP2 a copy of gradients to divide them.
    """
    c, buffer = s.how.c, gather_buffer(s)
    gloo = s.shard > 1 and not s.how.cuda
    outside = c * s.outside
    moments = {"forward begins": Moment(s.early_gradients, outside * (1 + (s.shard > 1) + gloo))}

    for i, name, left in backward_order(s):
        # Shards of the gradients of the blocks after this one, if they were not there from the start.
        gradients = s.early_gradients or FP32 * (s.n_layers - 1 - i) * s.block / s.shard
        # These exist during this block's whole backward: weights outside of blocks, the gradient of the head,
        # the buffer of the next all-gather; or without reshard, the weights of all blocks still to come.
        always = outside + c * s.table + buffer * (i > 0) * s.reshard + c * s.block * i * (not s.reshard)
        # This block's weights, and the FP32 gradients of the block before, which are being reduce-scattered.
        copies = always + c * s.block + FP32 * s.block * (i < s.n_layers - 1)
        gathered, kept = copies + buffer * gloo, left + s.kept[i]
        moments[f"{name} is all-gathered"] = Moment(gradients, gathered, kept, working=s.stream)
        moments[f"{name} goes backward"] = Moment(gradients, copies, left + s.layer, working=s.busy)
        # Afterwards its gradients are there in c bytes. They are cast to FP32 for the reduce-scatter, whose
        # result is a shard.
        moments[f"{name} has gone backward"] = Moment(gradients, copies + c * s.block, left, working=s.stream)
        reduced = always + FP32 * s.block * (1 + 1 / s.shard) + (FP32 * s.block if gloo else c * s.block)
        at = f"gradients of {name} are reduce-scattered"
        moments[at] = Moment(gradients, reduced, left, working=s.stream)

    # At the end, weights and gradients outside of blocks exist while the first block's gradients are
    # reduce-scattered. Then these gradients are too, and FSDP2 keeps one of them in c bytes meanwhile.
    gradients = s.early_gradients or FP32 * s.n_layers * s.block / s.shard
    moments["backward ends"] = Moment(gradients, 2 * outside + FP32 * s.block, working=s.stream)
    reduced = FP32 * s.outside * (1 + gloo) + FP32 * s.outside / s.shard + c * s.table * (not s.tied)
    copies = max(reduced, (c + FP32) * s.outside)
    moments["the last gradients are reduce-scattered"] = Moment(gradients, copies)
    return moments


def muon_bytes(m: Model, cuda: bool) -> float:
    """Bytes while one matrix is made orthogonal: its update in FP32, two iterates and two squares, which are
    BF16 on a GPU.
    """
    c = BF16 if cuda else FP32
    small, large = sorted((m.d_model, max(m.d_ff, m.n_heads * m.d_head)))
    return (FP32 + 2 * c) * small * large + 2 * c * small**2


# ---- what fits --------------------------------------------------------------------------------------------


def total(kinds: dict) -> float:
    """The sum of what peak returns: total(peak(cfg, 8, True)) -> bytes."""
    return sum(value for kind, value in kinds.items() if kind != "at")


def fits(cfg: Config, gpus: int, gpu: str, have: float = 0) -> bool:
    """Whether every process has room, in `have` bytes or those of `gpu`. ConfigError as mesh_shape."""
    return total(peak(cfg, gpus, cuda=gpu != "cpu")) <= (have or hardware.usable(gpu, gpus))


# What train.activation_checkpointing="auto" may become, by the FLOPs of its recompute, the fewest first.
RECOMPUTES = (0, "selective", 4, 3, 2, 1)


def chosen(cfg: Config, gpus: int, gpu: str, have: float = 0) -> Config:
    """The same config with the micro-batch and the recompute that the plan chooses, where it is to choose.

    train.micro_batch_size=0 becomes the largest micro-batch that divides a process's share of the batch and
    fits; train.activation_checkpointing="auto" the first of RECOMPUTES that fits. Where both are to be chosen
    they compete for the same memory, and the pair that makes the fastest step by cost.slowdown wins. Some
    thousand tokens already fill a GPU, and recompute of whole blocks costs more than small micro-batches do:
    measured at 7B on one H200, micro-batches of 2 x 2048 tokens with nothing recomputed reach 54.5 % MFU, of
    4 with every second block 50.8 %, of 10 with every block 46.2 %. Selective recompute costs less: with
    three of 7B's layers, 4 rows with it were 1.06 times as fast as 2 with nothing recomputed.

    Where nothing fits, the pair that needs the least memory, which `check` then refuses. Raises ConfigError
    where the batch does not divide over the processes. gpu, have: as in `check`.
    """
    train = cfg.train
    if train.micro_batch_size and train.activation_checkpointing != "auto":
        return cfg
    recomputes, micros = [train.activation_checkpointing], [train.micro_batch_size]
    if recomputes == ["auto"]:
        recomputes = RECOMPUTES
    if micros == [0]:
        rows = accumulation(with_choice(cfg, 1, 0), gpus)  # of a process in a step
        micros = [n for n in range(1, rows + 1) if rows % n == 0]

    options = [with_choice(cfg, micro, recompute) for recompute in recomputes for micro in micros]
    fitting = [option for option in options if fits(option, gpus, gpu, have)]

    def seconds(option: Config) -> float:
        tokens = option.train.micro_batch_size * option.model.seq_len
        return cost.slowdown(tokens, option.train.activation_checkpointing, option.model.n_layers)

    return min(fitting, key=seconds, default=with_choice(cfg, micros[0], recomputes[-1]))


def with_choice(cfg: Config, micro: int, recompute: int | str) -> Config:
    """The same config, as it was given, with another micro-batch and another recompute."""
    train = dataclasses.replace(cfg.train, micro_batch_size=micro, activation_checkpointing=recompute)
    other = dataclasses.replace(cfg, train=train)
    object.__setattr__(other, "given", cfg.given)  # what Config.again repeats
    return other


def about_choice(cfg: Config, gpus: int, gpu: str, have: float = 0) -> str:
    """What was chosen, and whether it fits: "micro-batches of 2 rows, nothing recomputed: 125.1 GiB; ..."."""
    need, room = total(peak(cfg, gpus, gpu != "cpu")), have or hardware.usable(gpu, gpus)
    share = hardware.USABLE_ON_CPU if gpu == "cpu" else hardware.USABLE
    micro = cfg.train.micro_batch_size
    what = f"micro-batches of {micro} row{'s' * (micro > 1)}"
    what += f", {about_recompute(cfg.train.activation_checkpointing)}"
    room_is = f"usable are {room / GIB:,.2f}, which is {share:.0%} of the memory"
    least = "; this is the least that can be chosen" * (need > room)
    return f"{what}: {need / GIB:,.2f} GiB; {room_is}{least}"


def about_recompute(kind: int | str) -> str:
    """In words: about_recompute(0) -> "nothing recomputed"; about_recompute(4) -> "every 4th block ..."."""
    if isinstance(kind, str):
        words = {"selective": "all but matmuls and attention recomputed"}
        return choose("train.activation_checkpointing", kind, words)
    nth = {2: "second ", 3: "third "}.get(kind, f"{kind}th " if kind > 1 else "")
    return f"every {nth}block recomputed" if kind else "nothing recomputed"


def check(cfg: Config, gpus: int, gpu: str, have: float = 0) -> None:
    """Raises ConfigError where a process has no room, with the smallest change that would fit.

    have: bytes for the tensors of one process, where that is a device at hand and none of hardware.GPUS.
    """
    if fits(cfg, gpus, gpu, have):
        return
    need = total(peak(cfg, gpus, gpu != "cpu")) / GIB
    room = (have or hardware.usable(gpu, gpus)) / GIB
    change = " ".join(smallest_change(cfg, gpus, gpu, have))
    if change:
        advice = f"it would with {change}"
    else:
        more = "" if gpu == "cpu" else f", on up to {MOST_GPUS:,} GPUs,"
        larger = "GPUs" if gpu == "cpu" else "a larger GPU"
        advice = f"no smaller micro-batch, checkpointing, FSDP or tensor parallel{more} makes it fit; "
        advice += f"use {larger} or a smaller model"
    raise ConfigError(f"this does not fit: {need:,.1f} GiB where {room:,.1f} are usable; {advice}")


def smallest_change(cfg: Config, gpus: int, gpu: str, have: float = 0) -> list[str]:
    """The flags that make a plan fit which does not fit, [] where none do.

    It uses as few GPUs as possible (twice, four times ... as many, up to MOST_GPUS), and on them as few
    changes as possible, tried in this order: a smaller micro-batch, selective recompute, recompute of every
    block, FSDP over all GPUs. Where no number of GPUs helps, it tries tensor parallel over 2, 4 or 8 GPUs of
    a node.
    """
    micro, every, now = cfg.train.micro_batch_size, cfg.train.activation_checkpointing, cfg.parallel
    strategies = [(now.strategy, now.shard)]
    if cfg.optim.optimizer == "adamw":
        strategies.append(("fsdp", 0))

    def n_changes(option: tuple) -> int:
        strategy, recompute, rows = option
        return (strategy != strategies[0]) + (recompute != every) + (rows != micro)

    # List what can change on a given number of GPUs, the fewest changes first.
    recomputes = dict.fromkeys([every, "selective", 1])
    options = itertools.product(dict.fromkeys(strategies), recomputes, range(micro, 0, -1))
    options = sorted(options, key=n_changes)
    counts = [gpus]
    while gpu != "cpu" and 2 * counts[-1] <= MOST_GPUS:
        counts.append(2 * counts[-1])
    splits = [tp for tp in (2, 4, 8) if tp != now.tp and can_split(cfg, tp)]

    # Try all numbers of GPUs with the given tensor parallel first, then all with another one.
    for tps in ([now.tp], splits):
        for count, tp, ((strategy, shard), recompute, rows) in itertools.product(counts, tps, options):
            if count > gpus and strategy == "ddp":  # more copies of the same model do not help
                continue
            other = variant(cfg, strategy, recompute, rows, shard, tp)
            try:
                accumulation(other, count)
            except ConfigError:  # it does not divide
                continue
            if fits(other, count, gpu, have):
                flags = [f"--train.micro_batch_size={rows}"] * (rows != micro)
                flags += [f"--train.activation_checkpointing={recompute}"] * (recompute != every)
                flags += [f"--parallel.strategy={strategy}"] * (strategy != now.strategy)
                flags += [f"--parallel.shard={shard}"] * (shard != now.shard)
                flags += [f"--parallel.tp={tp}"] * (tp != now.tp)
                return flags + [f"--gpus={count}"] * (count > gpus)
    return []


def can_split(cfg: Config, tp: int) -> bool:
    """Whether the model can be split over tp GPUs by tensor parallel."""
    try:
        consistency.check_parallel(cfg.model.resolved(), dataclasses.replace(cfg.parallel, tp=tp), cfg.optim)
    except ConfigError:
        return False
    return True


def variant(
    cfg: Config, strategy: str, every: int | str, micro: int = 0, shard: int | None = None, tp: int = 0
) -> Config:
    """The same config with another strategy and activation checkpointing; others where they are given."""
    if shard is None:
        shard = cfg.parallel.shard
    parallel = dataclasses.replace(
        cfg.parallel,
        strategy=strategy,
        shard=shard if strategy == "fsdp" else 0,
        tp=tp or cfg.parallel.tp,
    )
    other = with_choice(cfg, micro or cfg.train.micro_batch_size, every)
    return dataclasses.replace(other, parallel=parallel)
