"""The key/value cache, and attention masks: documents, windows, ALiBi, and PyTorch's flex attention.

model.py calls `positions_and_mask` once in each forward and hands the mask to every layer. A causal model
that is trained on whole rows has no mask and needs only the first line of `visible`.

Shapes: B sequences, T tokens, S tokens in the row so far (keys), H query heads, K key/value heads, Dh d_head.
`index`: the number of each token in its row, from 0, (T) or (B, T). `first`: the index of the first token
that each token sees, (T) or (B, T); None: the first token of the row.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from config import Model


class Cache:
    """Keys and values of the tokens seen so far, by layer, so that a step of decoding reads one token.

    Each forward with this cache appends its tokens. The memory for `max_length` tokens of each sequence is
    allocated at the start.
    """

    def __init__(self, cfg: Model, batch_size: int, max_length: int, device=None, dtype=torch.float32):
        cfg = cfg.resolved()
        shape = (cfg.n_layers, batch_size, cfg.n_kv_heads, max_length, cfg.d_head)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.max_length = max_length
        self.end = 0  # columns in use: at least as many as the longest row has tokens
        self.length: int | Tensor = 0  # tokens in each row: (B, 1) where rows differ
        self.document_start: int | Tensor = 0  # index at which the next token's document begins: (B, 1)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v (B, K, T, Dh) of the newest tokens; returns those of all tokens: (B, K, S, Dh)."""
        end = self.end + k.shape[2]
        if end > self.max_length:
            raise ValueError(
                f"the cache holds {self.max_length} tokens and {end} were asked for; make it longer"
            )
        if isinstance(self.length, int):  # all rows have the same length
            self.keys[layer, :, :, self.length : end] = k
            self.values[layer, :, :, self.length : end] = v
        else:  # each row continues where its own tokens end
            at = self.length + torch.arange(k.shape[2], device=k.device)  # (B, T)
            rows = torch.arange(len(k), device=k.device)[:, None]
            self.keys[layer][rows, :, at] = k.transpose(1, 2).to(self.keys.dtype)
            self.values[layer][rows, :, at] = v.transpose(1, 2).to(self.values.dtype)
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, n_tokens: int, lengths: Tensor | None) -> None:
        """Counts the tokens that a forward appended. Padding beyond `lengths` (B) is overwritten later."""
        self.end += n_tokens
        self.length = self.length + (n_tokens if lengths is None else lengths[:, None])


# ---- positions and masks ----------------------------------------------------------------------------------


def positions_and_mask(
    cfg: Model, eot: int | None, tokens: Tensor, cache: Cache | None, lengths: Tensor | None
):
    """The position of each token, (T) or (B, T), and the mask for attention: see `visible`.

    Positions count from the start of the row, or of the document where model.document_mask is set. `eot` is
    the token that ends a document. `lengths` (B): tokens of each row that are no padding; None: all.
    """
    start = 0 if cache is None else cache.length
    index = start + torch.arange(tokens.shape[1], device=tokens.device)
    positions, first = index, None

    # A token sees its own document only, and positions restart with each document.
    if cfg.document_mask:
        first = document_starts(tokens, eot, index, cache, lengths)  # (B, T)
        positions = index - first

    # A window ends the view earlier, wherever the row or the document begins before it.
    if cfg.window:
        edge = index - cfg.window + 1
        first = edge.clamp(min=0) if first is None else torch.maximum(edge, first)

    return positions, visible(cfg, index, first, cache)


def document_starts(
    tokens: Tensor, eot: int, index: Tensor, cache: Cache | None, lengths: Tensor | None
) -> Tensor:
    """The index at which the document of each token begins: tokens (B, T) -> (B, T).

    The end-of-text token belongs to the document that it ends.
    """
    # next_start: for each token, the index at which the document of the token after it begins.
    first_start = torch.zeros_like(tokens[:, :1]) + (0 if cache is None else cache.document_start)  # (B, 1)
    next_start = torch.where(tokens == eot, index + 1, first_start).cummax(dim=1).values

    # The next forward with this cache continues the document that is open at the end of each row.
    if cache is not None:
        ends = tokens.shape[1] if lengths is None else lengths[:, None]
        cache.document_start = next_start.gather(1, torch.zeros_like(first_start) + ends - 1)
    return torch.cat((first_start, next_start[:, :-1]), dim=1)


def visible(cfg: Model, index: Tensor, first: Tensor | None, cache: Cache | None):
    """The mask by which token t sees the tokens first[t] ... t.

    Returns None where plain causal order is enough; else a mask for PyTorch's attention, (B or 1, H or 1, T,
    S): booleans, or for ALiBi numbers that are added to the scores. On CUDA, where whole rows are read, it is
    the BlockMask of flex attention, which skips tokens that are not seen instead of computing them.
    """
    # These need no mask: whole rows without a cache, the first tokens in a cache, or one new token that sees
    # all keys. Rows of different lengths need one, because the cache then has padding among its keys.
    T = index.shape[-1]
    plain = first is None and cfg.positions != "alibi"
    if plain and (cache is None or (isinstance(cache.length, int) and (cache.length == 0 or T == 1))):
        return None
    if cache is None and index.device.type == "cuda":
        return block_mask(first, T, index.device)

    # Booleans: a token sees itself and the tokens before it, from `first` on.
    keys = torch.arange(T if cache is None else cache.end + T, device=index.device)
    index = index.expand(1, T) if index.ndim == 1 else index  # (B or 1, T)
    distance = index[:, None, :, None] - keys  # (B or 1, 1, T, S)
    seen = distance >= 0
    if first is not None:
        first = first.expand(1, T) if first.ndim == 1 else first
        seen = seen & (keys >= first[:, None, :, None])
    if cfg.positions != "alibi":
        return seen

    # ALiBi: each head lowers a score in proportion to the distance.
    slopes = torch.tensor(alibi_slopes(cfg.n_heads), device=index.device)[:, None, None]
    return (-slopes * distance).masked_fill(~seen, -torch.inf)


def alibi_slopes(n_heads: int) -> list[float]:
    """How much a head's score falls with each token of distance (Press et al. 2022, section 3).

    8 heads have the slopes 1/2, 1/4, ..., 1/256. A number that is no power of two has the slopes of the power
    of two below it, then every second slope of the power above it (the authors' released code).
    """
    power = 2 ** int(math.log2(n_heads))
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2.0 ** (-4 * (2 * i + 1) / power) for i in range(n_heads - power)]


# ---- flex attention ---------------------------------------------------------------------------------------

# flex attention for each type of device. `block_mask` fills it before the first layer runs: importing the
# function loads the compiler, which takes seconds, and a functools.cache around the import would be called
# inside the compiled layers, where Dynamo (PyTorch 2.13) warns about it and ignores the cache. It can become
# such a cache when Dynamo follows one.
FLEX_ATTENTION: dict[str, Callable] = {}


def block_mask(first: Tensor | None, T: int, device):
    """`visible` as flex attention reads it: a BlockMask of T x T tokens."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Without compilation, which only CUDA needs here, flex attention holds all scores at once.
    kind = torch.device(device).type
    if kind not in FLEX_ATTENTION:
        FLEX_ATTENTION[kind] = torch.compile(flex_attention) if kind == "cuda" else flex_attention

    first = torch.zeros(T, dtype=torch.long, device=device) if first is None else first
    first = first.expand(1, T) if first.ndim == 1 else first  # (B or 1, T)
    one_for_all = len(first) == 1

    def sees(b, h, q, k):
        return (k <= q) & (k >= first[0 if one_for_all else b, q])

    rows = None if one_for_all else len(first)
    return create_block_mask(sees, rows, None, T, T, device=device, _compile=kind == "cuda")


def flex(
    q: Tensor, k: Tensor, v: Tensor, mask, slopes: list[float] | None, scale: float, grouped: bool
) -> Tensor:
    """softmax(scale q k^T) v with a BlockMask: q (B, H, T, Dh), k and v (B, K, T, Dh) -> (B, H, T, Dh).

    ALiBi is a function of the score here, so that no mask has to hold its numbers. `grouped`: K < H.
    """
    lower_with_distance = None
    if slopes is not None:
        slope = torch.tensor(slopes, device=q.device)

        def lower_with_distance(score, b, h, t, s):
            return score - slope[h] * (t - s)

    flex_attention = FLEX_ATTENTION[q.device.type]
    return flex_attention(
        q, k, v, score_mod=lower_with_distance, block_mask=mask, scale=scale, enable_gqa=grouped
    )
