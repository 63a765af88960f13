"""The decoder-only transformer: the LLaMA family and OLMo-1, every difference a setting of `config.Model`.

    tokens --embed_tokens--> h --[ h += self_attn(norm(h));  h += mlp(norm(h)) ] x n_layers--> norm
    --lm_head--> logits

It knows no device, no rank, no optimizer and no file. Modules carry the names that published checkpoints
carry, so a state dict is a Hugging Face one but for the prefix "model." (checkpoint.py).

Shapes: B sequences, T tokens, D d_model, H query heads, K key/value heads, Dh d_head, F d_ff, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Model

IGNORE = -100  # a target with this value is not predicted: no loss, no gradient (PyTorch's own convention)


class Norm(nn.Module):
    """RMSNorm with a weight, or LayerNorm without weight and bias.

    Zhang & Sennrich 2019, eq. 4, and OLMo, section 2.1. Always in FP32: the mean of D squares loses digits in
    BF16, whatever precision the matrices have.
    """

    def __init__(self, cfg: Model):
        super().__init__()
        self.shape, self.eps, self.rms = (cfg.d_model,), cfg.norm_eps, cfg.norm == "rmsnorm"
        self.weight = nn.Parameter(torch.ones(cfg.d_model)) if self.rms else None

    def forward(self, x: Tensor) -> Tensor:
        if self.rms:
            return F.rms_norm(x.float(), self.shape, self.weight, self.eps)
        return F.layer_norm(x.float(), self.shape, None, None, self.eps)


def rotary_angles(start: int, end: int, d_head: int, theta: float, device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position x frequency, for positions start..end-1 -> 2 x (T, Dh/2).

    Su et al. 2021, eq. 15. Computed where it is used and in FP32, never stored in the model: a table cast to
    BF16 with the weights has positions off by several tokens at 2,048 (LLM360 section 4.1.5 warns of it).
    """
    frequency = theta ** -(torch.arange(0, d_head, 2, device=device, dtype=torch.float32) / d_head)  # (Dh/2)
    angle = torch.arange(start, end, device=device, dtype=torch.float32)[:, None] * frequency  # (T, Dh/2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x_i, x_{i + Dh/2}) by their angles, in FP32: (B, T, H, Dh) -> the same.

    The published Hugging Face weights pair dimension i with i + Dh/2; the paper pairs neighbours.
    """
    a, b = x.float().chunk(2, dim=-1)  # 2 x (B, T, H, Dh/2)
    cos, sin = cos[:, None], sin[:, None]  # (T, 1, Dh/2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


class Cache:
    """Keys and values of the tokens seen so far, by layer, so that a step of decoding reads one token.

    `length` tokens are filled; each forward with this cache appends its own. Room for `max_length` tokens is
    made at the start.
    """

    def __init__(self, cfg: Model, batch_size: int, max_length: int, device=None, dtype=torch.float32):
        cfg = cfg.resolved()
        shape = (cfg.n_layers, batch_size, cfg.n_kv_heads, max_length, cfg.d_head)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length, self.max_length = 0, max_length

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v (B, K, T, Dh) of the newest tokens; returns those of all: (B, K, length + T, Dh)."""
        end = self.length + k.shape[2]
        if end > self.max_length:
            raise ValueError(
                f"the cache holds {self.max_length} tokens and {end} were asked for; make it longer"
            )
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """Causal self-attention with rotary positions; groups of H/K query heads share a key/value head (GQA)."""

    def __init__(self, cfg: Model, layer: int):
        super().__init__()
        self.layer, self.d_head, self.grouped = layer, cfg.d_head, cfg.n_kv_heads < cfg.n_heads
        self.q_proj = nn.Linear(cfg.d_model, cfg.n_heads * cfg.d_head, bias=False)
        self.k_proj = nn.Linear(cfg.d_model, cfg.n_kv_heads * cfg.d_head, bias=False)
        self.v_proj = nn.Linear(cfg.d_model, cfg.n_kv_heads * cfg.d_head, bias=False)
        self.o_proj = nn.Linear(cfg.n_heads * cfg.d_head, cfg.d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None) -> Tensor:
        heads = (*x.shape[:2], -1, self.d_head)
        q = rotate(self.q_proj(x).view(heads), cos, sin).transpose(1, 2)  # (B, H, T, Dh)
        k = rotate(self.k_proj(x).view(heads), cos, sin).transpose(1, 2)  # (B, K, T, Dh)
        v = self.v_proj(x).view(heads).transpose(1, 2)  # (B, K, T, Dh)
        seen = 0
        if cache is not None:
            seen = cache.length
            k, v = cache.append(self.layer, k, v)  # (B, K, seen + T, Dh)
        mask = None
        if seen and q.shape[2] > 1:
            # several tokens after a prefix: token t sees the prefix and the first t of them
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).tril(seen)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=not seen, enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, T, D)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, eq. 6): down(silu(gate(x)) * up(x))."""

    def __init__(self, cfg: Model):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.up_proj = nn.Linear(cfg.d_model, cfg.d_ff, bias=False)
        self.down_proj = nn.Linear(cfg.d_ff, cfg.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: attention and feed-forward, each reading the residual stream by a norm and adding to it."""

    def __init__(self, cfg: Model, layer: int):
        super().__init__()
        self.input_layernorm = Norm(cfg)
        self.self_attn = Attention(cfg, layer)
        self.post_attention_layernorm = Norm(cfg)
        self.mlp = MLP(cfg)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor, cache: Cache | None) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h), cos, sin, cache)
        return h + self.mlp(self.post_attention_layernorm(h))


class Transformer(nn.Module):
    """The whole model. model(tokens) -> logits; model(tokens, targets) -> summed loss; see forward."""

    def __init__(self, cfg: Model):
        super().__init__()
        self.cfg = cfg = cfg.resolved()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.layers = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layers))
        self.norm = Norm(cfg)
        self.lm_head = None if cfg.tie_embeddings else nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """tokens (B, T) -> FP32 logits (B, T, V); with targets (B, T) -> the sum of their losses, a scalar.

        The loss is a sum, in nats, so that whoever knows the global batch divides: a mean of means is wrong
        wherever micro-batches differ in size. With targets, logits never stand in memory whole (see
        VocabularyLoss). With a cache, tokens are the next ones after those in it, and it grows by T.
        """
        h = self.hidden(tokens, cache)
        if targets is None:
            return F.linear(h, self.head).float()
        return vocabulary_loss(h.flatten(0, 1), self.head, targets.flatten())

    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """What the head reads: tokens (B, T) -> (B, T, D)."""
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        cos, sin = rotary_angles(start, end, self.cfg.d_head, self.cfg.rope_theta, tokens.device)
        h = self.embed_tokens(tokens)  # (B, T, D)
        for layer in self.layers:
            h = layer(h, cos, sin, cache)
        if cache is not None:
            cache.length = end
        return self.norm(h)

    @property
    def head(self) -> Tensor:
        """The matrix that turns what the last layer says into logits: (V, D)."""
        return (self.lm_head or self.embed_tokens).weight

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fills every parameter from one seeded stream on the CPU: the same on any device and world size.

        normal: Normal(0, init_std) for all matrices (LLaMA as Hugging Face trains it, Amber).
        mitchell: truncated at 3 sigma, sigma = 1/sqrt(fan-in), and 1/sqrt(2 (layer + 1)) of that for the two
        matrices that write into the residual stream (OLMo's released code, model.py reset_parameters).
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:  # a norm's weight
                parameter.fill_(1.0)
                continue
            value = torch.empty(parameter.shape)
            if self.cfg.init == "normal":
                nn.init.normal_(value, std=self.cfg.init_std, generator=generator)
            else:
                std = self.cfg.d_model**-0.5 if "embed_tokens" in name else parameter.shape[1] ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= math.sqrt(2 * (int(name.split(".")[1]) + 1))
                nn.init.trunc_normal_(value, std=std, a=-3 * std, b=3 * std, generator=generator)
            parameter.copy_(value)


# ---- the loss over a large vocabulary ---------------------------------------------------------------------

# of logits that stand in memory at once: 32 MiB, about what stays in a processor's cache
LOGITS_BYTES = 2**25


def vocabulary_loss(h: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log softmax(h @ head.T)[target] over all tokens: h (N, D), head (V, D), targets (N) -> FP32.

    Equals F.cross_entropy(..., reduction="sum") on whole logits, in a fraction of the memory.
    """
    if torch.is_autocast_enabled(h.device.type):  # a Function is opaque to autocast, so its cast is made here
        dtype = torch.get_autocast_dtype(h.device.type)
        h, head = h.to(dtype), head.to(dtype)
    return VocabularyLoss.apply(h, head, targets)


class VocabularyLoss(torch.autograd.Function):
    """The loss a slice of tokens at a time, with the gradients taken while the slice's logits are at hand.

    For a token with logits z: loss = logsumexp(z) - z_target, and d loss / d z = softmax(z) - onehot(target).
    The second needs nothing but z, so forward turns each slice of logits into its gradient in place,
    multiplies it into d h and d head, and forgets it. Logits of 3,072 tokens x 50,257 entries would be 618
    MB, and as much for the gradient. The same three matrix products are made as without slices; backward only
    scales what forward left.
    """

    @staticmethod
    def forward(ctx, h: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        with_gradient = any(ctx.needs_input_grad)
        rows = max(1, LOGITS_BYTES // (4 * head.shape[0]))
        total = torch.zeros((), device=h.device, dtype=torch.float32)
        d_h = torch.empty_like(h) if with_gradient else None
        d_head = torch.zeros_like(head, dtype=torch.float32) if with_gradient else None
        room = torch.empty(min(rows, len(h)), head.shape[0], device=h.device, dtype=h.dtype)
        for start in range(0, len(h), rows):
            x, target = h[start : start + rows], targets[start : start + rows, None]  # (n, D), (n, 1)
            keep = target != IGNORE
            target = target.clamp(min=0)
            z = torch.mm(x, head.T, out=room[: len(x)]).float()  # (n, V)
            peak = z.amax(1, keepdim=True)  # so that exp cannot overflow
            chosen = z.gather(1, target) - peak
            z.sub_(peak).exp_()
            partition = z.sum(1, keepdim=True)
            total += ((partition.log() - chosen) * keep).sum()
            if with_gradient:
                z.mul_(keep / partition)  # softmax; zero where the target is ignored
                z.scatter_add_(1, target, -keep.float())
                gradient = z.to(h.dtype)
                torch.mm(gradient, head, out=d_h[start : start + rows])
                if head.dtype == torch.float32:
                    d_head.addmm_(gradient.T, x)
                else:
                    d_head += gradient.T @ x  # BF16 product, FP32 sum over slices
        if with_gradient:
            ctx.save_for_backward(d_h, d_head)
            ctx.head_dtype = head.dtype
        return total

    @staticmethod
    def backward(ctx, scale: Tensor):
        d_h, d_head = ctx.saved_tensors
        return d_h * scale.to(d_h.dtype), (d_head * scale).to(ctx.head_dtype), None
