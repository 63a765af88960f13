"""The decoder-only transformer: LLaMA, OLMo, OLMo 2, Pythia, CrystalCoder, baichuan. config.Model chooses.

    tokens -embed_tokens-> h -[h += self_attn(norm(h)); h += mlp(norm(h))] x n_layers-> norm -lm_head-> logits

config.Model says what each setting means, and configs/ which model has which. This file knows no device, no
rank, no optimizer and no file. Modules have the names that published checkpoints of the LLaMA family use;
formats/families.py has the names of other families. masks.py says which tokens a token sees, initial.py how
weights begin.

Norms, rotary embedding and loss are FP32 in every precision: `.float()` in this file and in loss.py does
that. So is the residual stream, unless train.residual=bf16. Under BF16 autocast the matmuls are BF16, also
the one that gives the logits.

Shapes: B sequences, T tokens, S tokens in the row so far (keys), D d_model, H query heads, K key/value heads,
Dh d_head, R rotary dimensions of a head, F d_ff, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ConfigError, Model, choose
from initial import Embedding, Linear, init_std, initial_weights
from linear import linear
from loss import Loss
from masks import Cache, alibi_slopes, flex, positions_and_mask

# By model.norm: x (..., width), the shape (width,), the norm's parameters by name, eps -> (..., width).
NORM_FORMULAS = {
    "rmsnorm": lambda x, shape, p, eps: F.rms_norm(x, shape, p["weight"], eps),
    "layernorm": lambda x, shape, p, eps: F.layer_norm(x, shape, p["weight"], p["bias"], eps),
    "nonparametric_layernorm": lambda x, shape, p, eps: F.layer_norm(x, shape, None, None, eps),
}


class Norm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019, eq. 4), LayerNorm, or LayerNorm without weight and bias (OLMo, 2.1).

    Always FP32, also under autocast: the mean of D squares would lose digits in BF16. config.NORMS says which
    parameters each norm has, and NORM_FORMULAS what it computes.
    """

    def __init__(self, cfg: Model, width: int = 0):
        super().__init__()
        self.shape, self.eps, kind = (width or cfg.d_model,), cfg.norm_eps, cfg.norm_kind
        self.formula = choose("model.norm", cfg.norm, NORM_FORMULAS)
        self.first_values = kind.per_channel | dict(kind.single)
        for name, first in self.first_values.items():
            shape = self.shape if name in kind.per_channel else (1,)
            self.register_parameter(name, nn.Parameter(torch.full(shape, first)))

    def forward(self, x: Tensor) -> Tensor:
        # Parameters are cast too, because FSDP may have gathered them in BF16.
        parameters = {name: getattr(self, name).float() for name in self.first_values}
        return self.formula(x.float(), self.shape, parameters, self.eps)


def rotary_frequencies(cfg: Model, device=None) -> Tensor:
    """Radians per position for each pair of rotary dimensions: (R/2), R = d_head x rope_fraction.

    theta^(-2i/R) (Su et al. 2021, section 3.2.2). Llama 3.1 divides the frequencies with fewer than `low`
    turns over the original context by `scaling`, keeps those with more than `high`, and blends between,
    linearly in the number of turns (its released code, apply_scaling).
    """
    R = int(cfg.d_head * cfg.rope_fraction)
    frequency = cfg.rope_theta ** -(torch.arange(0, R, 2, device=device, dtype=torch.float32) / R)
    if cfg.rope_scaling == 1:
        return frequency
    turns = cfg.rope_scaling_seq_len * frequency / (2 * math.pi)
    keep = (turns - cfg.rope_scaling_low) / (cfg.rope_scaling_high - cfg.rope_scaling_low)
    return torch.lerp(frequency / cfg.rope_scaling, frequency, keep.clamp(0, 1))


def rotary_angles(positions: Tensor, cfg: Model) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position x frequency: positions (T) or (B, T) -> 2 x (..., T, 1, R/2).

    Computed in each forward and in FP32, never stored in the model: a table that is cast to BF16 with the
    weights has positions off by several tokens at 2,048 (LLM360, section 4.1.5, warns of it).
    """
    angle = positions[..., None, None].float() * rotary_frequencies(cfg, positions.device)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, neighbours: bool = False) -> Tensor:
    """Rotates pairs of the first R dimensions of each head by their angles, in FP32: (B, T, H, Dh) -> same.

    A pair is (x_i, x_{i + R/2}), as published Hugging Face weights have it, or with `neighbours`
    (x_{2i}, x_{2i+1}), as the paper has it (Su et al. 2021, eq. 15).
    """
    R = 2 * cos.shape[-1]
    rotary, rest = x.split([R, x.shape[-1] - R], dim=-1)
    rotary = rotary.float()
    if neighbours:
        a, b = rotary[..., 0::2], rotary[..., 1::2]  # 2 x (B, T, H, R/2)
        y = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = rotary.chunk(2, dim=-1)
        y = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((y.type_as(x), rest), dim=-1) if rest.shape[-1] else y.type_as(x)


class Attention(nn.Module):
    """Causal self-attention; groups of H/K query heads share a key/value head (Ainslie et al. 2023)."""

    def __init__(self, cfg: Model, layer: int):
        super().__init__()
        self.layer, self.d_head, self.grouped = layer, cfg.d_head, cfg.n_kv_heads < cfg.n_heads
        self.clip = cfg.clip_qkv
        self.neighbours = choose("model.rope_pairs", cfg.rope_pairs, {"halves": False, "neighbours": True})
        self.slopes = alibi_slopes(cfg.n_heads) if cfg.positions == "alibi" else None
        # Under muP the scores q.k grow with d_head, not with its square root (Yang et al. 2022).
        self.scale = 1 / cfg.d_head if cfg.mup_base_width else cfg.d_head**-0.5

        D, q_width, kv_width = cfg.d_model, cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
        self.q_proj = Linear(D, q_width, cfg.bias, init_std(cfg, D, layer))
        self.k_proj = Linear(D, kv_width, cfg.bias, init_std(cfg, D, layer))
        self.v_proj = Linear(D, kv_width, cfg.bias, init_std(cfg, D, layer))
        self.o_proj = Linear(q_width, D, cfg.bias, init_std(cfg, q_width, layer, writes=True))
        self.q_norm = Norm(cfg, q_width) if cfg.qk_norm else None
        self.k_norm = Norm(cfg, kv_width) if cfg.qk_norm else None

    def forward(self, x: Tensor, rope, mask, cache: Cache | None) -> Tensor:
        """x (B, T, D) -> (B, T, D); rope: from rotary_angles, or None; mask: from
        masks.positions_and_mask: None (causal), a Tensor, or a block mask of flex attention.
        """
        # Queries, keys and values; OLMo-1.7 clamps them, OLMo 2 normalizes them over their whole width.
        x = cast_once(x)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # (B, T, H Dh), 2 x (B, T, K Dh)
        if self.clip:
            q, k, v = (y.clamp(-self.clip, self.clip) for y in (q, k, v))
        if self.q_norm is not None:
            q, k = self.q_norm(q).type_as(v), self.k_norm(k).type_as(v)

        # Heads, and the position of each token in its query and key.
        q, k, v = (y.view(*x.shape[:2], -1, self.d_head) for y in (q, k, v))
        if rope is not None:
            q, k = rotate(q, *rope, self.neighbours), rotate(k, *rope, self.neighbours)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H, T, Dh), 2 x (B, K, T, Dh)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, K, S, Dh)

        # softmax(scale q k^T + mask) v. With BF16 inputs its softmax is FP32 too, but not by a line of ours:
        # PyTorch's flash, cuDNN, memory-efficient and flex kernels compute scores and softmax in FP32 and
        # round only the probabilities, for the matmul with v; its math fallback casts q, k and v to FP32,
        # unless torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True) was called, which we never do.
        if mask is None or isinstance(mask, Tensor):
            if mask is not None and mask.dtype != torch.bool:
                mask = mask.to(q.dtype)
            causal = mask is None and q.shape[2] > 1  # a single new token sees all keys
            y = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=causal, scale=self.scale, enable_gqa=self.grouped
            )
        else:
            y = flex(q, k, v, mask, self.slopes, self.scale, self.grouped)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, D)


def cast_once(x: Tensor) -> Tensor:
    """Casts the input of several matmuls once: autocast would cast it, and keep a copy, for each of them."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


# The activation of each model.ffn; relu2: So et al. 2021 (Primer). A new feed-forward is a row here and, in
# config.py, a choice of Model.ffn and a row of Model.gated, which says whether it has a gate.
ACTIVATIONS = {"swiglu": F.silu, "geglu": F.gelu, "gelu": F.gelu, "relu2": lambda x: F.relu(x).square()}


class MLP(nn.Module):
    """The feed-forward: down(act(gate(x)) * up(x)) (Shazeer 2020, eq. 6), or down(act(up(x)))."""

    def __init__(self, cfg: Model, layer: int):
        super().__init__()
        D, d_ff = cfg.d_model, cfg.d_ff
        self.act = choose("model.ffn", cfg.ffn, ACTIVATIONS)
        self.gate_proj = Linear(D, d_ff, cfg.bias, init_std(cfg, D, layer)) if cfg.gated else None
        self.up_proj = Linear(D, d_ff, cfg.bias, init_std(cfg, D, layer))
        self.down_proj = Linear(d_ff, D, cfg.bias, init_std(cfg, d_ff, layer, writes=True))

    def forward(self, x: Tensor) -> Tensor:
        x = cast_once(x)
        if self.gate_proj is not None:
            return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(self.act(self.up_proj(x)))


class Block(nn.Module):
    """One layer: attention and feed-forward, each reading the residual stream h and adding to it."""

    def __init__(self, cfg: Model, layer: int):
        super().__init__()
        self.after = choose("model.norm_place", cfg.norm_place, {"before": False, "after": True})
        self.parallel = cfg.parallel_residual
        # The names are those of published checkpoints, in which "post_attention_layernorm" is the norm before
        # the feed-forward (LLaMA), or the norm on attention's output (OLMo 2).
        self.input_layernorm = None if self.after else Norm(cfg)
        self.self_attn = Attention(cfg, layer)
        self.post_attention_layernorm = Norm(cfg)
        self.mlp = MLP(cfg, layer)
        self.post_feedforward_layernorm = Norm(cfg) if self.after else None

    def forward(self, h: Tensor, rope, mask, cache: Cache | None) -> Tensor:
        if self.after:
            h = h + self.post_attention_layernorm(self.self_attn(h, rope, mask, cache)).type_as(h)
            return h + self.post_feedforward_layernorm(self.mlp(h)).type_as(h)
        attended = self.self_attn(self.input_layernorm(h), rope, mask, cache).type_as(h)
        if self.parallel:
            return h + attended + self.mlp(self.post_attention_layernorm(h)).type_as(h)
        h = h + attended
        return h + self.mlp(self.post_attention_layernorm(h)).type_as(h)


class Transformer(nn.Module):
    """model(tokens) -> logits; model(tokens, targets) -> the sum of the targets' losses: see `forward`."""

    def __init__(self, cfg: Model, eot: int | None = None):
        super().__init__()
        self.cfg = cfg = cfg.resolved()
        self.eot = eot  # the token that ends a document; only model.document_mask needs it
        if cfg.document_mask and eot is None:
            raise ConfigError("model.document_mask needs the id of end-of-text: Transformer(cfg, eot=ID)")
        D, V, std = cfg.d_model, cfg.vocab_size, init_std(cfg, cfg.d_model)
        self.embed_tokens = Embedding(V, D, std)
        embedded = {"rope": False, "alibi": False, "learned": True, "none": False}
        learned = choose("model.positions", cfg.positions, embedded)
        self.embed_positions = Embedding(cfg.seq_len, D, std) if learned else None
        self.layers = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layers))
        self.norm = Norm(cfg)
        self.lm_head = None if cfg.tie_embeddings else Linear(D, V, False, std)
        self.loss = Loss()
        self.stream_dtype = torch.float32  # of the residual stream; training sets it from train.residual

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """tokens (B, T) -> FP32 logits (B, T, V); with targets (B, T) -> the sum of their losses, a scalar.

        The loss is a sum, in nats, so that the caller, who knows the global batch, divides: a mean of means
        is wrong wherever micro-batches differ in size. With targets, logits are made a slice at a time
        (loss.py). With a cache, tokens are those after the tokens in it, and the cache grows by T.
        """
        h = self.hidden(tokens, cache)
        if targets is None:
            return linear(h, self.head).float()
        return self.loss(h, self.head, targets)

    @property
    def head(self) -> Tensor:
        """The matrix that maps the last hidden states to logits: (V, D)."""
        return (self.lm_head or self.embed_tokens).weight

    def hidden(self, tokens: Tensor, cache: Cache | None = None, lengths: Tensor | None = None) -> Tensor:
        """The hidden states that the head reads: tokens (B, T) -> (B, T, D).

        With a cache, `lengths` (B) says that row b has lengths[b] tokens and that the rest of it is padding:
        no token sees it, and the next forward continues where each row ended.
        """
        cfg, T = self.cfg, tokens.shape[1]
        positions, mask = positions_and_mask(cfg, self.eot, tokens, cache, lengths)
        rope = rotary_angles(positions, cfg) if cfg.positions == "rope" else None

        # Embedding, and the residual stream h, to which each layer adds.
        h = self.embed_tokens(tokens).float()  # (B, T, D)
        if cfg.embedding_multiplier != 1:
            h = h * cfg.embedding_multiplier
        if self.embed_positions is not None:
            if T + (0 if cache is None else cache.end) > cfg.seq_len:
                raise ValueError(f"there are learned positions for {cfg.seq_len} tokens, and no more")
            h = h + self.embed_positions(positions)

        # Layers. The cache counts the new tokens only after all layers have stored theirs.
        h = h.to(self.stream_dtype)
        for layer in self.layers:
            h = layer(h, rope, mask, cache)
        if cache is not None:
            cache.advance(T, lengths)

        # Final norm. The head has no bias, so multiplying its input multiplies the logits.
        h, multiplier = self.norm(h), cfg.logits_multiplier * cfg.mup_scale
        return h if multiplier == 1 else h * multiplier

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fills every parameter with its initial value: the same on any device and number of processes."""
        for parameter, value in zip(self.parameters(), initial_weights(self, seed)):
            parameter.copy_(value)
