"""The family of `model.py` a second time: float64 NumPy, one head and one token after another, no torch.

Written from the papers, and for CrystalCoder from its released parameters. It shares no line and no trick
with `model.py`: where the two agree (test_model_reference.py), both understood the paper in the same way.
Slow and plain on purpose:

    logits(cfg, {name: array}, tokens) -> scores of the next token

`weights` are a state dict's, as float64 arrays. Shapes: `T` tokens, `D` d_model, `H` query heads, `K` key and
value heads, `Dh` d_head, `F` d_ff, `V` vocabulary. A weight is (out, in), as checkpoints have it.
"""

import math

import numpy as np

from config import Model


def logits(
    cfg: Model, weights: dict[str, np.ndarray], tokens: np.ndarray, eot: int | None = None
) -> np.ndarray:
    """Token ids (T,) -> logits (T, V); or (B, T) -> (B, T, V). `eot` ends documents under document_mask."""
    cfg = cfg.resolved()
    if tokens.ndim == 2:
        return np.stack([logits(cfg, weights, row, eot) for row in tokens])

    document, position = documents(tokens, eot if cfg.document_mask else None)
    x = np.zeros((len(tokens), cfg.d_model))
    for t, token in enumerate(tokens):
        x[t] = weights["embed_tokens.weight"][token] * cfg.embedding_multiplier
        if cfg.positions == "learned":
            x[t] += weights["embed_positions.weight"][position[t]]

    for layer in range(cfg.n_layers):
        x = block(cfg, part(weights, f"layers.{layer}."), x, document, position)
    x = normed(cfg, part(weights, "norm."), x)

    head = weights["embed_tokens.weight" if cfg.tie_embeddings else "lm_head.weight"]
    return x @ head.T * cfg.logits_multiplier * width_scale(cfg)


def nats(scores: np.ndarray, targets: np.ndarray) -> float:
    """The loss, summed: -log softmax(scores)[target] of logits (B, T, V) and targets (B, T)."""
    return -sum(math.log(softmax(scores[at])[target]) for at, target in np.ndenumerate(targets))


def documents(tokens: np.ndarray, eot: int | None) -> tuple[list[int], list[int]]:
    """For each token the number of its document, and its position in it.

    An end-of-text token belongs to the document that it ends. documents([5, 0, 6, 7], 0) -> [0, 0, 1, 1],
    [0, 1, 0, 1]; without eot the row is one document.
    """
    document, position = [], []
    number = at = 0
    for token in tokens:
        document.append(number)
        position.append(at)
        if eot is not None and token == eot:
            number, at = number + 1, 0
        else:
            at += 1
    return document, position


def part(weights: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The weights below one prefix: part(weights, "layers.0.")["mlp.up_proj.weight"]."""
    return {name[len(prefix) :]: array for name, array in weights.items() if name.startswith(prefix)}


def block(cfg: Model, w: dict, x: np.ndarray, document: list[int], position: list[int]) -> np.ndarray:
    """One layer of the stream: (T, D) -> (T, D)."""

    def attend(h):
        return attention(cfg, part(w, "self_attn."), h, document, position)

    def feed(h):
        return feed_forward(cfg, part(w, "mlp."), h)

    def norm(name, h):
        return normed(cfg, part(w, name + "."), h)

    if cfg.parallel_residual:  # GPT-NeoX-20B (Black et al. 2022), section 2.1.2; two norms, as released
        return x + attend(norm("input_layernorm", x)) + feed(norm("post_attention_layernorm", x))
    if cfg.norm_place == "after":  # OLMo 2 (2025), section 2.1
        x = x + norm("post_attention_layernorm", attend(x))
        return x + norm("post_feedforward_layernorm", feed(x))
    x = x + attend(norm("input_layernorm", x))
    return x + feed(norm("post_attention_layernorm", x))


def normed(cfg: Model, w: dict, x: np.ndarray) -> np.ndarray:
    """The norm that `cfg.norm` names, of each row of (T, D)."""
    out = np.zeros_like(x)
    for t, row in enumerate(x):
        if cfg.norm == "rmsnorm":
            out[t] = rms_norm(row, w["weight"], cfg.norm_eps)
        else:
            out[t] = layer_norm(row, cfg.norm_eps)
            if cfg.norm == "layernorm":
                out[t] = out[t] * w["weight"] + w["bias"]
    return out


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Zhang and Sennrich 2019, eq. 4, with LLaMA's eps inside the root."""
    return x / math.sqrt(sum(x * x) / len(x) + eps) * weight


def layer_norm(x: np.ndarray, eps: float) -> np.ndarray:
    """Ba et al. 2016, eq. 4, before gain and bias: mean 0, variance 1 (divided by n, not n - 1)."""
    centred = x - sum(x) / len(x)
    return centred / math.sqrt(sum(centred * centred) / len(x) + eps)


def linear(cfg: Model, w: dict, name: str, x: np.ndarray) -> np.ndarray:
    out = x @ w[name + ".weight"].T
    return out + w[name + ".bias"] if cfg.bias else out


# ---- attention --------------------------------------------------------------------------------------------


def attention(cfg: Model, w: dict, x: np.ndarray, document: list[int], position: list[int]) -> np.ndarray:
    """Attention of every head at every position, and the projection of what they found: (T, D) -> (T, D)."""
    T, H, K, Dh = len(x), cfg.n_heads, cfg.n_kv_heads, cfg.d_head
    q, k, v = (linear(cfg, w, name, x) for name in ("q_proj", "k_proj", "v_proj"))  # (T, H Dh), (T, K Dh) x 2
    if cfg.clip_qkv:  # before the norm, as in OLMo's code
        q, k, v = (np.minimum(np.maximum(a, -cfg.clip_qkv), cfg.clip_qkv) for a in (q, k, v))
    if cfg.qk_norm:
        q, k = normed(cfg, part(w, "q_norm."), q), normed(cfg, part(w, "k_norm."), k)

    # trained q and k agree, so that q.k grows with Dh, not with its root (muP: Yang et al. 2022, 4.1)
    scale = 1 / Dh if cfg.mup_base_width else 1 / math.sqrt(Dh)
    slopes = alibi_slopes(H) if cfg.positions == "alibi" else [0.0] * H
    found = np.zeros((T, H * Dh))
    for h in range(H):
        shared = h // (H // K)  # the key/value head that this query head shares with its neighbours
        mine, theirs = slice(h * Dh, (h + 1) * Dh), slice(shared * Dh, (shared + 1) * Dh)
        queries, keys, values = q[:, mine], k[:, theirs], v[:, theirs]
        if cfg.positions == "rope":
            queries = np.array([rotated(cfg, row, p) for row, p in zip(queries, position)])
            keys = np.array([rotated(cfg, row, p) for row, p in zip(keys, position)])
        for i in range(T):
            seen = [j for j in range(i + 1) if sees(cfg, i, j, document)]
            scores = [queries[i] @ keys[j] * scale - slopes[h] * (i - j) for j in seen]
            found[i, mine] = softmax(np.array(scores)) @ values[seen]
    return linear(cfg, w, "o_proj", found)


def sees(cfg: Model, i: int, j: int, document: list[int]) -> bool:
    """Whether position i may look at position j."""
    if j > i:
        return False
    if cfg.window and i - j >= cfg.window:  # a window of 1 is the token itself
        return False
    return document[i] == document[j]


def softmax(x: np.ndarray) -> np.ndarray:
    raised = np.exp(x - max(x))
    return raised / sum(raised)


def rotated(cfg: Model, x: np.ndarray, position: int) -> np.ndarray:
    """One head's query or key (Dh,) after rotary embedding (Su et al. 2021, eq. 15).

    Pair i of the first r = fraction x Dh dimensions is rotated by position x frequency(i); the others stay.
    "neighbours" is the paper's pairing, 2i with 2i + 1; "halves" is GPT-NeoX's and LLaMA's, i with i + r/2.
    """
    r = round(cfg.d_head * cfg.rope_fraction)
    out = x.copy()
    for i in range(r // 2):
        a, b = (2 * i, 2 * i + 1) if cfg.rope_pairs == "neighbours" else (i, i + r // 2)
        angle = position * frequency(cfg, i, r)
        out[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
        out[b] = x[a] * math.sin(angle) + x[b] * math.cos(angle)
    return out


def frequency(cfg: Model, i: int, r: int) -> float:
    """Radians per position of pair i of r/2, theta^(-2i/r); slow pairs slower still, as in Llama 3.1.

    Where a pair makes `turns` turns over the original context, it keeps its frequency above `high` turns,
    is divided by the factor below `low`, and between is the mix of both that is linear in turns.
    """
    plain = cfg.rope_theta ** (-2 * i / r)
    turns = cfg.rope_scaling_seq_len * plain / (2 * math.pi)
    if turns > cfg.rope_scaling_high:
        return plain
    if turns < cfg.rope_scaling_low:
        return plain / cfg.rope_scaling
    kept = (turns - cfg.rope_scaling_low) / (cfg.rope_scaling_high - cfg.rope_scaling_low)
    return kept * plain + (1 - kept) * plain / cfg.rope_scaling


def alibi_slopes(n_heads: int) -> list[float]:
    """For each head, how much a token of distance lowers a score (Press et al. 2022, section 3).

    For n heads, a power of two: 2^(-8/n), its square, ..., 2^-8. For others, as in the authors' code:
    those of the largest power of two below, then the 1st, 3rd, 5th, ... of twice that power.
    """
    below = 1
    while below * 2 <= n_heads:
        below *= 2
    first = [2 ** (-8 * k / below) for k in range(1, below + 1)]
    finer = [2 ** (-8 * k / (2 * below)) for k in range(1, 2 * below + 1, 2)]
    return first + finer[: n_heads - below]


def width_scale(cfg: Model) -> float:
    """muP's m: the base width over this one, 256/4096 for CrystalCoder."""
    return cfg.mup_base_width / cfg.d_model if cfg.mup_base_width else 1.0


# ---- feed-forward -----------------------------------------------------------------------------------------


def feed_forward(cfg: Model, w: dict, x: np.ndarray) -> np.ndarray:
    """(T, D) -> (T, F) -> (T, D); gated ones as Shazeer 2020, eq. 6."""
    up = linear(cfg, w, "up_proj", x)
    if cfg.ffn == "swiglu":
        hidden = each(silu, linear(cfg, w, "gate_proj", x)) * up
    elif cfg.ffn == "geglu":
        hidden = each(gelu, linear(cfg, w, "gate_proj", x)) * up
    elif cfg.ffn == "gelu":
        hidden = each(gelu, up)
    else:
        assert cfg.ffn == "relu2"
        hidden = each(relu2, up)
    return linear(cfg, w, "down_proj", hidden)


def each(function, x: np.ndarray) -> np.ndarray:
    return np.array([function(value) for value in x.flat]).reshape(x.shape)


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def gelu(x: float) -> float:
    """x times the normal distribution function at x (Hendrycks and Gimpel 2016, section 2), exactly."""
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


def relu2(x: float) -> float:
    """The square of what is positive (Primer: So et al. 2021)."""
    return max(x, 0.0) ** 2
