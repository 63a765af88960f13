"""The decoder-only transformer: LLaMA, OLMo, OLMo 2, Pythia, CrystalCoder, baichuan; all one, by settings.

    tokens --embed_tokens--> h --[ h += self_attn(norm(h));  h += mlp(norm(h)) ] x n_layers--> norm
    --lm_head--> logits

`config.Model` says what each setting means, and `configs/` which model has which. The file knows no device,
no rank, no optimizer and no file. Modules carry the names that published checkpoints of the LLaMA family
carry; families.py has the names of the others.

Shapes: B sequences, T tokens, S tokens seen so far (keys), D d_model, H query heads, K key/value heads,
Dh d_head, R of them turned, F d_ff, V vocabulary.
"""

import functools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ConfigError, Model, choose
from loss import Loss


class Norm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019, eq. 4), LayerNorm, or LayerNorm without weight and bias (OLMo, 2.1).

    Always in FP32, also under autocast: the mean of D squares loses digits in BF16.
    """

    def __init__(self, cfg: Model, width: int = 0):
        super().__init__()
        self.shape, self.eps, self.first = (width or cfg.d_model,), cfg.norm_eps, cfg.norm_parameters
        kinds = {"rmsnorm": True, "layernorm": False, "nonparametric_layernorm": False}
        self.rms = choose("model.norm", cfg.norm, kinds)
        self.weight, self.bias = (
            nn.Parameter(torch.full(self.shape, self.first[name])) if name in self.first else None
            for name in ("weight", "bias")
        )

    def forward(self, x: Tensor) -> Tensor:
        # of parameters too: parallel.py may have gathered them in BF16
        weight, bias = (p if p is None else p.float() for p in (self.weight, self.bias))
        if self.rms:
            return F.rms_norm(x.float(), self.shape, weight, self.eps)
        return F.layer_norm(x.float(), self.shape, weight, bias, self.eps)


# ---- where a token stands ---------------------------------------------------------------------------------


def rotary_frequencies(cfg: Model, device=None) -> Tensor:
    """Radians a position, of each of the pairs that are turned: (R/2), R = d_head x rope_fraction.

    theta^(-2i/R) (Su et al. 2021, section 3.2.2). Llama 3.1 divides those with fewer than `low` turns over
    the original context by `scaling`, leaves those with more than `high`, and blends between them, linearly
    in the number of turns (its released code, apply_scaling).
    """
    turned = int(cfg.d_head * cfg.rope_fraction)
    frequency = cfg.rope_theta ** -(torch.arange(0, turned, 2, device=device, dtype=torch.float32) / turned)
    if cfg.rope_scaling == 1:
        return frequency
    turns = cfg.rope_scaling_seq_len * frequency / (2 * math.pi)
    keep = (turns - cfg.rope_scaling_low) / (cfg.rope_scaling_high - cfg.rope_scaling_low)
    return torch.lerp(frequency / cfg.rope_scaling, frequency, keep.clamp(0, 1))


def rotary_angles(positions: Tensor, cfg: Model) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position x frequency: positions (T) or (B, T) -> 2 x (..., T, 1, R/2).

    Computed where it is used and in FP32, never stored in the model: a table cast to BF16 with the weights
    has positions off by several tokens at 2,048 (LLM360 section 4.1.5 warns of it).
    """
    angle = positions[..., None, None].float() * rotary_frequencies(cfg, positions.device)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, neighbours: bool = False) -> Tensor:
    """Turns pairs of the first R dimensions of each head by their angles, in FP32: (B, T, H, Dh) -> the same.

    A pair is (x_i, x_{i + R/2}), as published Hugging Face weights have it, or (x_{2i}, x_{2i+1}), as the
    paper has it (Su et al. 2021, eq. 15).
    """
    x_turned, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    x_turned = x_turned.float()
    if neighbours:
        a, b = x_turned[..., 0::2], x_turned[..., 1::2]  # 2 x (B, T, H, R/2)
        y = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = x_turned.chunk(2, dim=-1)
        y = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((y.type_as(x), rest), dim=-1) if rest.shape[-1] else y.type_as(x)


def alibi_slopes(n_heads: int) -> list[float]:
    """How much a head's score falls with each token of distance (Press et al. 2022, section 3).

    For 8 heads 1/2, 1/4, ..., 1/256. For a number that is no power of two, the slopes of the power below it,
    then every second one of the power above (the authors' released code).
    """
    power = 2 ** int(math.log2(n_heads))
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2.0 ** (-4 * (2 * i + 1) / power) for i in range(n_heads - power)]


class Cache:
    """Keys and values of the tokens seen so far, by layer, so that a step of decoding reads one token.

    Each forward with this cache appends its tokens. Room for `max_length` a sequence is made at the start.
    """

    def __init__(self, cfg: Model, batch_size: int, max_length: int, device=None, dtype=torch.float32):
        cfg = cfg.resolved()
        shape = (cfg.n_layers, batch_size, cfg.n_kv_heads, max_length, cfg.d_head)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.max_length, self.end = (
            max_length,
            0,
        )  # end: places in use, no fewer than the longest row's tokens
        self.length: int | Tensor = 0  # tokens in each: (B, 1) where they differ
        self.document_start: int | Tensor = 0  # index at which the next token's document begins: (B, 1)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v (B, K, T, Dh) of the newest tokens; returns those of all: (B, K, S, Dh)."""
        end = self.end + k.shape[2]
        if end > self.max_length:
            raise ValueError(
                f"the cache holds {self.max_length} tokens and {end} were asked for; make it longer"
            )
        if isinstance(self.length, int):
            self.keys[layer, :, :, self.length : end] = k
            self.values[layer, :, :, self.length : end] = v
        else:
            at = self.length + torch.arange(k.shape[2], device=k.device)  # (B, T)
            rows = torch.arange(len(k), device=k.device)[:, None]
            self.keys[layer][rows, :, at] = k.transpose(1, 2).to(self.keys.dtype)
            self.values[layer][rows, :, at] = v.transpose(1, 2).to(self.values.dtype)
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, n_tokens: int, lengths: Tensor | None) -> None:
        """Counts what a forward has appended. What it appended beyond a row's `lengths` is written over."""
        self.end += n_tokens
        self.length = self.length + (n_tokens if lengths is None else lengths[:, None])


# ---- the layers -------------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """A linear layer. `writes`: it writes into the residual stream, for which some inits make it smaller."""

    def __init__(self, d_in: int, d_out: int, bias: bool, writes: bool = False):
        super().__init__(d_in, d_out, bias)
        self.writes, self.first = writes, {"bias": 0.0}  # the weight begins as Transformer.deviation says


class Attention(nn.Module):
    """Causal self-attention; groups of H/K query heads share a key/value head (Ainslie et al. 2023)."""

    def __init__(self, cfg: Model, layer: int):
        super().__init__()
        self.layer, self.d_head, self.grouped = layer, cfg.d_head, cfg.n_kv_heads < cfg.n_heads
        self.clip = cfg.clip_qkv
        self.neighbours = choose("model.rope_pairs", cfg.rope_pairs, {"halves": False, "neighbours": True})
        # under muP the products of queries and keys grow with d_head, not with its root (Yang et al. 2022)
        self.scale = 1 / cfg.d_head if cfg.mup_base_width else cfg.d_head**-0.5
        self.slopes = alibi_slopes(cfg.n_heads) if cfg.positions == "alibi" else None
        q_width, kv_width = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
        self.q_proj = Linear(cfg.d_model, q_width, cfg.bias)
        self.k_proj = Linear(cfg.d_model, kv_width, cfg.bias)
        self.v_proj = Linear(cfg.d_model, kv_width, cfg.bias)
        self.o_proj = Linear(q_width, cfg.d_model, cfg.bias, writes=True)
        self.q_norm = Norm(cfg, q_width) if cfg.qk_norm else None
        self.k_norm = Norm(cfg, kv_width) if cfg.qk_norm else None

    def forward(self, x: Tensor, rope, mask, cache: Cache | None) -> Tensor:
        """x (B, T, D) -> (B, T, D); rope: what rotary_angles gives, or None; mask: what visible gives."""
        x = cast_once(x)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # (B, T, H Dh), 2 x (B, T, K Dh)
        if self.clip:
            q, k, v = (y.clamp(-self.clip, self.clip) for y in (q, k, v))
        if self.q_norm is not None:
            q, k = self.q_norm(q).type_as(v), self.k_norm(k).type_as(v)
        q, k, v = (y.view(*x.shape[:2], -1, self.d_head) for y in (q, k, v))
        if rope is not None:
            q, k = rotate(q, *rope, self.neighbours), rotate(k, *rope, self.neighbours)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H, T, Dh), 2 x (B, K, T, Dh)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, K, S, Dh)
        if mask is None or isinstance(mask, Tensor):
            mask = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
            causal = mask is None and q.shape[2] > 1
            y = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=causal, scale=self.scale, enable_gqa=self.grouped
            )
        else:
            y = flex(q, k, v, mask, self.slopes, self.scale, self.grouped)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, D)


def cast_once(x: Tensor) -> Tensor:
    """What several matrices read, cast once; autocast would cast, and keep a copy, once for each of them."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def squared_relu(x: Tensor) -> Tensor:
    """So et al. 2021 (Primer)."""
    return F.relu(x).square()


ACTIVATIONS = {"swiglu": F.silu, "geglu": F.gelu, "gelu": F.gelu, "relu2": squared_relu}  # by model.ffn


class MLP(nn.Module):
    """The feed-forward: down(act(gate(x)) * up(x)) (Shazeer 2020, eq. 6), or down(act(up(x)))."""

    def __init__(self, cfg: Model):
        super().__init__()
        self.act = choose("model.ffn", cfg.ffn, ACTIVATIONS)
        self.gate_proj = Linear(cfg.d_model, cfg.d_ff, cfg.bias) if cfg.gated else None
        self.up_proj = Linear(cfg.d_model, cfg.d_ff, cfg.bias)
        self.down_proj = Linear(cfg.d_ff, cfg.d_model, cfg.bias, writes=True)

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
        # The names are those of the published checkpoints, in which "post_attention_layernorm" is the norm
        # before the feed-forward (LLaMA), or the one on attention's output (OLMo 2).
        self.input_layernorm = None if self.after else Norm(cfg)
        self.self_attn = Attention(cfg, layer)
        self.post_attention_layernorm = Norm(cfg)
        self.mlp = MLP(cfg)
        self.post_feedforward_layernorm = Norm(cfg) if self.after else None

    def forward(self, h: Tensor, rope, mask, cache: Cache | None) -> Tensor:
        if self.after:
            h = h + self.post_attention_layernorm(self.self_attn(h, rope, mask, cache))
            return h + self.post_feedforward_layernorm(self.mlp(h))
        attended = self.self_attn(self.input_layernorm(h), rope, mask, cache)
        if self.parallel:
            return h + attended + self.mlp(self.post_attention_layernorm(h))
        h = h + attended
        return h + self.mlp(self.post_attention_layernorm(h))


class Transformer(nn.Module):
    """The whole model. model(tokens) -> logits; model(tokens, targets) -> summed loss; see forward."""

    def __init__(self, cfg: Model, eot: int | None = None):
        """`eot` is the token that ends a document; only model.document_mask needs it."""
        super().__init__()
        self.cfg = cfg = cfg.resolved()
        self.eot = eot
        if cfg.document_mask and eot is None:
            raise ConfigError(
                "model.document_mask needs the end-of-text token's id: Transformer(cfg, eot=ID)"
            )
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.d_model)
        embedded = {"rope": False, "alibi": False, "learned": True, "none": False}
        learned = choose("model.positions", cfg.positions, embedded)
        self.embed_positions = nn.Embedding(cfg.seq_len, cfg.d_model) if learned else None
        self.layers = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layers))
        self.norm = Norm(cfg)
        self.lm_head = None if cfg.tie_embeddings else Linear(cfg.d_model, cfg.vocab_size, bias=False)
        self.loss = Loss()

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """tokens (B, T) -> FP32 logits (B, T, V); with targets (B, T) -> the sum of their losses, a scalar.

        The loss is a sum, in nats, so that whoever knows the global batch divides: a mean of means is wrong
        wherever micro-batches differ in size. With targets, logits never stand in memory whole (loss.py).
        With a cache, tokens are the next ones after those in it, and it grows by T.
        """
        h = self.hidden(tokens, cache)
        if targets is None:
            return F.linear(h, self.head).float()
        return self.loss(h, self.head, targets)

    def hidden(self, tokens: Tensor, cache: Cache | None = None, lengths: Tensor | None = None) -> Tensor:
        """What the head reads: tokens (B, T) -> (B, T, D).

        With a cache, `lengths` (B) says that row b has lengths[b] tokens and that the rest of it is padding:
        nothing sees it, and the next forward goes on where each row ended.
        """
        cfg, T = self.cfg, tokens.shape[1]
        start = 0 if cache is None else cache.length
        index = start + torch.arange(T, device=tokens.device)  # of each token in its row: (T) or (B, T)
        positions, first = index, None  # first: the first token that each one sees; None: the row's first
        if cfg.document_mask:
            first = self.document_starts(tokens, index, cache, lengths)  # (B, T)
            positions = index - first
        if cfg.window:
            edge = index - cfg.window + 1
            first = edge.clamp(min=0) if first is None else torch.maximum(edge, first)

        h = self.embed_tokens(tokens).float()  # (B, T, D); the stream is FP32 whatever the precision
        if cfg.embedding_multiplier != 1:
            h = h * cfg.embedding_multiplier
        if self.embed_positions is not None:
            if T + (0 if cache is None else cache.end) > cfg.seq_len:
                raise ValueError(f"there are learned positions for {cfg.seq_len} tokens, and no more")
            h = h + self.embed_positions(positions)
        rope = rotary_angles(positions, cfg) if cfg.positions == "rope" else None
        mask = visible(cfg, index, first, cache)
        for layer in self.layers:
            h = layer(h, rope, mask, cache)
        if cache is not None:
            cache.advance(T, lengths)
        h, multiplier = self.norm(h), cfg.logits_multiplier * cfg.mup_scale
        return h if multiplier == 1 else h * multiplier  # which multiplies the logits: the head has no bias

    def document_starts(self, tokens: Tensor, index: Tensor, cache: Cache | None, lengths) -> Tensor:
        """The index at which the document of each token begins: tokens (B, T) -> (B, T).

        The end-of-text token belongs to the document that it ends.
        """
        begun = torch.zeros_like(tokens[:, :1]) + (0 if cache is None else cache.document_start)  # (B, 1)
        # of the token after each one
        next_start = torch.where(tokens == self.eot, index + 1, begun).cummax(dim=1).values
        if cache is not None:
            ends = tokens.shape[1] if lengths is None else lengths[:, None]
            cache.document_start = next_start.gather(1, torch.zeros_like(begun) + ends - 1)
        return torch.cat((begun, next_start[:, :-1]), dim=1)

    @property
    def head(self) -> Tensor:
        """The matrix that turns what the last layer says into logits: (V, D)."""
        return (self.lm_head or self.embed_tokens).weight

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fills every parameter from one seeded stream on the CPU: the same on any device and world size."""
        for parameter, value in zip(self.parameters(), self.initial_weights(seed)):
            parameter.copy_(value)

    def initial_weights(self, seed: int) -> Iterator[Tensor]:
        """Every parameter's first value, in the order of parameters(), whole and on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        cut = 3.0 if self.cfg.init == "mitchell" else self.cfg.init_trunc
        for path, module in self.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim < 2:  # a norm's weight, or a bias: its module knows
                    yield torch.full(parameter.shape, module.first[name])
                    continue
                value, std = torch.empty(parameter.shape), self.deviation(path, module)
                if cut:
                    nn.init.trunc_normal_(value, std=std, a=-cut * std, b=cut * std, generator=generator)
                else:
                    nn.init.normal_(value, std=std, generator=generator)
                yield value

    def deviation(self, path: str, module: nn.Module) -> float:
        """The standard deviation with which a matrix begins, before values far out are cut off.

        normal: init_std for all (LLaMA as Hugging Face trains it; Amber; OLMo 2, cut at 3 deviations).
        gpt2: init_std, and init_std / sqrt(2 L) for the two matrices a layer that write into the residual
            stream (Radford et al. 2019, section 2.3; GPT-NeoX's default, so Pythia 6.9B and 12B).
        mitchell: 1/sqrt(fan-in), those two divided by sqrt(2 (layer + 1)) (OLMo's code, reset_parameters).
        small_wang: sqrt(2 / (5 D)) (Nguyen & Salazar 2019), those two 2 / (L sqrt(D)) (GPT-J; Pythia).
        mup: embedding and head init_std; the rest init_std sqrt(m), m = mup_base_width / D; those two that
            / sqrt(2 L) (CrystalCoder's released parameters).
        """
        cfg, inside = self.cfg, path.startswith("layers.")
        D, L, layer = cfg.d_model, cfg.n_layers, int(path.split(".")[1]) if inside else 0
        plain, fan_in = cfg.init_std, module.weight.shape[1]
        scaled = plain * math.sqrt(cfg.mup_scale) if inside else plain
        # of most matrices, and of those that write into the residual stream
        table = {
            "normal": (plain, plain),
            "gpt2": (plain, plain / math.sqrt(2 * L)),
            "mitchell": (fan_in**-0.5, fan_in**-0.5 / math.sqrt(2 * (layer + 1))),
            "small_wang": (math.sqrt(2 / (5 * D)), 2 / (L * math.sqrt(D))),
            "mup": (scaled, scaled / math.sqrt(2 * L)),
        }
        return choose("model.init", cfg.init, table)[getattr(module, "writes", False)]


# ---- who sees whom ----------------------------------------------------------------------------------------


def visible(cfg: Model, index: Tensor, first: Tensor | None, cache: Cache | None):
    """What attention is told about who sees whom: token t the tokens first[t] ... t.

    None where order alone decides, else a mask for PyTorch's attention: of booleans, or for ALiBi of numbers
    to add, (B or 1, H or 1, T, S). On CUDA, where a row is read whole, it is flex attention's own form of a
    mask, which skips what is not seen instead of computing it.
    """
    T = index.shape[-1]
    plain = first is None and cfg.positions != "alibi"
    # whole rows see what is before them; one new token sees all keys, if no row of the cache has padding
    if plain and (cache is None or (isinstance(cache.length, int) and (cache.length == 0 or T == 1))):
        return None
    if cache is None and index.device.type == "cuda":
        return block_mask(first, T, index.device)
    keys = torch.arange(T if cache is None else cache.end + T, device=index.device)
    index = index.expand(1, T) if index.ndim == 1 else index  # (B or 1, T)
    distance = index[:, None, :, None] - keys  # (B or 1, 1, T, S)
    seen = distance >= 0
    if first is not None:
        first = first.expand(1, T) if first.ndim == 1 else first
        seen = seen & (keys >= first[:, None, :, None])
    if cfg.positions != "alibi":
        return seen
    slopes = torch.tensor(alibi_slopes(cfg.n_heads), device=index.device)[:, None, None]
    return (-slopes * distance).masked_fill(~seen, -torch.inf)


def block_mask(first: Tensor | None, T: int, device):
    """`visible` for flex attention: first (T) or (B, T), or None."""
    from torch.nn.attention.flex_attention import create_block_mask  # loads the compiler: seconds

    first = torch.zeros(T, dtype=torch.long, device=device) if first is None else first
    first = first.expand(1, T) if first.ndim == 1 else first

    def sees(b, h, q, k):
        return (k <= q) & (k >= first[b if len(first) > 1 else 0, q])

    rows = len(first) if len(first) > 1 else None
    return create_block_mask(
        sees, rows, None, T, T, device=device, _compile=torch.device(device).type == "cuda"
    )


def flex(q: Tensor, k: Tensor, v: Tensor, mask, slopes: list[float] | None, scale: float, grouped: bool):
    """PyTorch's flex attention: q (B, H, T, Dh), k and v (B, K, T, Dh) -> (B, H, T, Dh)."""
    bias = None
    if slopes is not None:
        slope = torch.tensor(slopes, device=q.device)

        def bias(score, b, h, t, s):
            return score - slope[h] * (t - s)

    attend = flex_attention(compiled=q.device.type == "cuda")  # what is not compiled holds all scores at once
    return attend(q, k, v, score_mod=bias, block_mask=mask, scale=scale, enable_gqa=grouped)


@functools.cache
def flex_attention(compiled: bool):
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention
