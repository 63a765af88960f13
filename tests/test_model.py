"""model.py: equal to independent implementations, causal, and the same with and without a cache."""

import dataclasses
import math
import warnings

import pytest
import torch
import torch.nn.functional as F

import config
import masks
import model
from config import Model
from formats import families
from masks import Cache
from model import Transformer

# Pairwise different sizes, so that a wrong transpose cannot pass; head counts that are no power of two.
LLAMA = Model(vocab_size=97, seq_len=40, d_model=60, n_layers=3, n_heads=6, n_kv_heads=2, d_head=14, d_ff=44)
OLMO = Model(
    vocab_size=101, seq_len=36, d_model=48, n_layers=2, n_heads=4, d_ff=70, norm="nonparametric_layernorm",
    init="mitchell", tie_embeddings=True, rope_theta=500.0,
)  # fmt: skip
NEOX = Model(
    vocab_size=89, seq_len=38, d_model=72, n_layers=2, n_heads=3, d_ff=53, norm="layernorm", ffn="gelu",
    bias=True, parallel_residual=True, rope_fraction=0.25, init="small_wang", rope_theta=700.0,
)  # fmt: skip
OLMO2 = Model(
    vocab_size=103, seq_len=44, d_model=56, n_layers=3, n_heads=7, d_ff=66, norm_place="after", qk_norm=True,
    norm_eps=1e-6, init_trunc=3.0,
)  # fmt: skip
CRYSTAL = Model(
    vocab_size=79, seq_len=42, d_model=64, n_layers=2, n_heads=4, d_ff=58, norm="layernorm", bias=True,
    rope_fraction=0.25, rope_pairs="neighbours", tie_embeddings=True, embedding_multiplier=14.6,
    logits_multiplier=2.22, mup_base_width=16, init="mup", init_std=0.073, init_trunc=2.0,
)  # fmt: skip
ALIBI = dataclasses.replace(LLAMA, positions="alibi")
WINDOW = dataclasses.replace(LLAMA, window=5)
LEARNED = dataclasses.replace(NEOX, positions="learned", ffn="relu2")
EVERY = dict(
    llama=LLAMA,
    olmo=OLMO,
    neox=NEOX,
    olmo2=OLMO2,
    crystal=CRYSTAL,
    alibi=ALIBI,
    window=WINDOW,
    learned=LEARNED,
)
FAMILIES = pytest.mark.parametrize("cfg", EVERY.values(), ids=EVERY)


def make(cfg: Model, seed: int = 1) -> Transformer:
    net = Transformer(cfg, eot=0)
    net.init_weights(seed)
    return net.eval()


def tokens_for(cfg: Model, batch: int = 3, length: int = 23, seed: int = 5) -> torch.Tensor:
    return torch.randint(cfg.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


# What a class of `transformers` computes: every family, with what it leaves open set in different ways.
PUBLISHED = {
    "llama": LLAMA,
    "llama, one key and value head, tied": dataclasses.replace(LLAMA, n_kv_heads=1, tie_embeddings=True),
    "llama, five heads": dataclasses.replace(LLAMA, n_heads=5, n_kv_heads=5, d_head=0, rope_theta=300.0),
    "llama, nine heads, biases": dataclasses.replace(LLAMA, d_model=63, n_heads=9, n_kv_heads=3, bias=True),
    # slow, blended and fast frequencies: wavelengths from 6 to 2,000 over a context of 64
    "llama 3.1": dataclasses.replace(LLAMA, rope_theta=2e3, rope_scaling=8.0, rope_scaling_seq_len=64),
    "mistral": dataclasses.replace(LLAMA, window=7),
    "olmo": OLMO,
    "olmo 1.7": dataclasses.replace(OLMO, clip_qkv=0.3, tie_embeddings=False, n_kv_heads=2),
    "olmo 2": OLMO2,
    "olmo 2, grouped, tied": dataclasses.replace(OLMO2, n_heads=4, n_kv_heads=2, tie_embeddings=True),
    "pythia": NEOX,
    "neox, one after the other, all dimensions rotary": dataclasses.replace(
        NEOX, parallel_residual=False, rope_fraction=1.0
    ),
}
COMPUTED_BY_OTHERS = pytest.mark.parametrize("cfg", PUBLISHED.values(), ids=PUBLISHED)


def shaken(cfg: Model) -> Transformer:
    """A model whose norms and biases, too, are no ones and zeros behind which a mistake could hide."""
    net = make(cfg)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return net


def in_transformers(net: Transformer):
    """The same model, computed by `transformers`."""
    transformers = pytest.importorskip("transformers")
    values = families.hf_config(net.cfg)
    kind = getattr(transformers, values.pop("architectures")[0])
    theirs = kind(kind.config_class(**values, attn_implementation="eager")).eval()
    state = families.to_family(net.state_dict(), net.cfg)
    state = {name.replace("embed_out", "lm_head"): value for name, value in state.items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if net.cfg.tie_embeddings else set())
    theirs.tie_weights()
    return theirs


def published(name: str, theirs) -> str:
    """A parameter's name in published files: transformers 5 calls GPT-NeoX's head otherwise in memory."""
    return name.replace("lm_head", "embed_out") if theirs.config.model_type == "gpt_neox" else name


@COMPUTED_BY_OTHERS
def test_logits_loss_and_every_gradient_equal_transformers(cfg):
    ours = shaken(cfg)
    theirs = in_transformers(ours)
    tokens = tokens_for(cfg)
    assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    loss = ours(inputs, targets) / targets.numel()
    logits = theirs(inputs).logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert abs(loss - expected) < 1e-5
    loss.backward()
    expected.backward()
    gradients = families.to_family({name: p.grad for name, p in ours.named_parameters()}, cfg)
    for name, parameter in theirs.named_parameters():
        assert (gradients.pop(published(name, theirs)) - parameter.grad).abs().max() < 1e-4, name
    assert not gradients


@COMPUTED_BY_OTHERS
def test_in_bf16_the_distance_to_transformers_is_that_of_bf16_itself(cfg):
    ours, tokens = shaken(cfg), tokens_for(cfg)
    theirs = in_transformers(ours)
    exact = ours(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        ours_bf16, theirs_bf16 = ours(tokens), theirs(tokens).logits.float()
    # Two roundings of the same numbers: neither is further from the exact logits than twice the other, and
    # both are as near as 8 bits a factor let them be.
    ours_off, theirs_off = ((y - exact).square().mean().sqrt() for y in (ours_bf16, theirs_bf16))
    assert 0 < ours_off < 2 * theirs_off
    assert ours_off < 2**-8 * 8 * exact.square().mean().sqrt()


@FAMILIES
def test_a_token_never_sees_a_later_one(cfg):
    net, tokens = make(cfg), tokens_for(cfg)
    before = net(tokens)
    changed = tokens.clone()
    changed[:, 15] = (changed[:, 15] + 1) % cfg.vocab_size
    after = net(changed)
    assert torch.equal(before[:, :15], after[:, :15])
    assert (before[:, 15:] != after[:, 15:]).any(-1).all()  # and every later one sees it


@FAMILIES
@pytest.mark.parametrize("pieces", [[23], [22, 1], [1] * 23, [5, 1, 7, 1, 1, 8]])
def test_with_a_cache_is_the_same_as_without(cfg, pieces):
    net, tokens = make(cfg), tokens_for(cfg)
    cache = Cache(cfg, batch_size=3, max_length=23)
    logits = torch.cat([net(piece, cache=cache) for piece in tokens.split(pieces, dim=1)], dim=1)
    assert cache.length == 23
    torch.testing.assert_close(logits, net(tokens), atol=2e-6, rtol=1e-5)


@FAMILIES
@pytest.mark.parametrize("document_mask", [False, True])
def test_rows_padded_on_the_right_are_as_if_each_were_alone(cfg, document_mask):
    cfg = dataclasses.replace(cfg, document_mask=document_mask)
    net, tokens, lengths = make(cfg), tokens_for(cfg, batch=4, length=19), torch.tensor([11, 3, 1, 8])
    tokens[0, [4, 9]] = tokens[3, 7] = tokens[1, 11] = 0  # ends of documents, one of them in padding
    cache = Cache(cfg, batch_size=4, max_length=19)
    h = net.hidden(tokens[:, :11], cache, lengths)
    for b, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(h[b : b + 1, :n], net.hidden(tokens[b : b + 1, :n]), atol=2e-5, rtol=1e-4)
    h = torch.cat([net.hidden(tokens[:, 11:16], cache), net.hidden(tokens[:, 16:17], cache)], dim=1)
    for b, n in enumerate(lengths.tolist()):
        alone = torch.cat((tokens[b : b + 1, :n], tokens[b : b + 1, 11:17]), dim=1)
        torch.testing.assert_close(h[b : b + 1], net.hidden(alone)[:, n:], atol=2e-5, rtol=1e-4)


@FAMILIES
def test_documents_in_a_row_are_as_if_each_were_alone(cfg):
    cfg = dataclasses.replace(cfg, document_mask=True)
    net, tokens = make(cfg), tokens_for(cfg, batch=2)
    tokens = tokens.clamp(min=1)
    ends = [[6, 7, 18], [0, 11, 22]]
    for row, at in zip(tokens, ends):
        row[at] = 0
    logits = net(tokens)
    for b, at in enumerate(ends):
        for first, last in zip([-1, *at], [*at, 22]):
            alone = tokens[b : b + 1, first + 1 : last + 1]
            if alone.numel():
                torch.testing.assert_close(
                    logits[b : b + 1, first + 1 : last + 1], net(alone), atol=2e-5, rtol=1e-4
                )
    without = make(dataclasses.replace(cfg, document_mask=False))(tokens)
    assert (without - logits)[0, 8:].abs().amax(-1).min() > 1e-5  # and off by default, they are not


def test_a_document_mask_needs_to_know_what_ends_a_document():
    with pytest.raises(config.ConfigError, match="end-of-text"):
        Transformer(dataclasses.replace(LLAMA, document_mask=True))


@pytest.mark.parametrize("kind", ["alibi", "window", "documents", "documents in a window"])
def test_the_mask_for_cuda_lets_the_same_tokens_be_seen(kind, monkeypatch):
    """On a CPU flex attention computes a forward, so that what CUDA is given can be checked here."""
    cfg = dataclasses.replace(
        LLAMA, positions="alibi" if kind == "alibi" else "rope", window=4 if "window" in kind else 0,
        document_mask="documents" in kind,
    )  # fmt: skip
    net, tokens = make(cfg), tokens_for(cfg, batch=2, length=40)
    tokens[0, [3, 17]] = tokens[1, 9] = 0
    expected = net(tokens)
    monkeypatch.setattr(
        masks, "visible", lambda cfg, index, first, cache: masks.block_mask(first, index.shape[-1], "cpu")
    )
    with torch.no_grad():
        torch.testing.assert_close(net(tokens), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("positions", ["rope", "alibi"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "itself compiled, as on CUDA"])
def test_a_compiled_layer_with_flex_attention_computes_the_same_without_a_warning(
    positions, nested, monkeypatch
):
    """Dynamo warns where compiled code calls a function that functools.cache wraps, and ignores the cache."""
    net, tokens = (
        make(dataclasses.replace(LLAMA, positions=positions, window=9)),
        tokens_for(LLAMA, length=40),
    )
    monkeypatch.setattr(masks, "FLEX_ATTENTION", {})
    monkeypatch.setattr(
        masks, "visible", lambda cfg, index, first, cache: masks.block_mask(first, index.shape[-1], "cpu")
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # flex attention says that it is slow without torch.compile
        expected = net(tokens)
        if nested:
            masks.FLEX_ATTENTION["cpu"] = torch.compile(masks.FLEX_ATTENTION["cpu"], backend="eager")
        for block in net.layers:
            block.compile(backend="eager", fullgraph=True)
        warnings.simplefilter("error")
        torch._dynamo.reset()
        torch.testing.assert_close(net(tokens), expected, atol=2e-5, rtol=1e-4)


def test_a_full_cache_says_so():
    net, cache = make(LLAMA), Cache(LLAMA, batch_size=3, max_length=22)
    with pytest.raises(ValueError, match="holds 22 tokens and 23"):
        net(tokens_for(LLAMA), cache=cache)


def test_a_uniform_model_has_loss_ln_v():
    net = make(LLAMA)
    torch.nn.init.zeros_(net.lm_head.weight)
    tokens = tokens_for(LLAMA)
    loss = net(tokens[:, :-1], tokens[:, 1:]) / (3 * 22)
    assert abs(loss.item() - math.log(97)) < 1e-6


def test_under_bf16_autocast_logits_and_loss_are_fp32_and_close():
    net, tokens = make(LLAMA), tokens_for(LLAMA)
    exact, exact_loss = net(tokens), net(tokens[:, :-1], tokens[:, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = net(tokens), net(tokens[:, :-1], tokens[:, 1:])
    assert logits.dtype == loss.dtype == torch.float32
    # BF16 keeps 8 bits of each factor
    assert 0 < (logits - exact).abs().max() < 2**-8 * 8 * exact.abs().max()
    assert abs(loss - exact_loss) < 0.01 * exact_loss
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())


@pytest.mark.parametrize("kernel", ["FLASH_ATTENTION", "MATH", "flex attention"])
def test_the_softmax_of_attention_is_fp32_also_in_bf16(kernel):
    """No line of ours makes it so: PyTorch's kernels do. Those of a CPU are measured here."""
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, 2, 512, 32, generator=generator).bfloat16() for _ in range(3))
    q = q * 3
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    if kernel == "flex attention":
        mask = masks.block_mask(None, 512, "cpu")
        found = masks.flex(q, k, v, mask, None, 32**-0.5, grouped=False)
    else:
        with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, kernel)):
            found = F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def off(y):
        return (y.double() - exact).norm() / exact.norm()

    later = torch.ones(512, 512, dtype=torch.bool).triu(1)
    scores = (q @ k.mT * 32**-0.5).masked_fill(later, -torch.inf)
    all_bf16 = scores.softmax(-1) @ v
    # Kernels may round probabilities to BF16 for the matmul with v: as much again as rounding the result.
    assert off(found) < 1.6 * off(exact.bfloat16()) < 0.5 * off(all_bf16)
    assert not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()


@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
def test_rotary_keeps_lengths_and_depends_on_distance_only(pairs):
    cfg = Model(d_model=8, n_heads=1, rope_pairs=pairs).resolved()
    angles, neighbours = model.rotary_angles(torch.arange(50), cfg), pairs == "neighbours"
    q, k = torch.randn(8), torch.randn(8)
    rotated_q = model.rotate(q.expand(1, 50, 1, 8), *angles, neighbours)[0, :, 0]
    rotated_k = model.rotate(k.expand(1, 50, 1, 8), *angles, neighbours)[0, :, 0]
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm().expand(50))
    scores = rotated_q @ rotated_k.T
    torch.testing.assert_close(scores.diagonal(3), scores[3 - 3, 3].expand(47), atol=1e-5, rtol=1e-4)
    # position 2, first pair, frequency 1: (a cos 2 - b sin 2, b cos 2 + a sin 2)
    other = 1 if neighbours else 4  # b is beside a, or half a head away
    a, b = q[0].item(), q[other].item()
    assert rotated_q[2, 0].item() == pytest.approx(a * math.cos(2) - b * math.sin(2), abs=1e-5)
    assert rotated_q[2, other].item() == pytest.approx(b * math.cos(2) + a * math.sin(2), abs=1e-5)


def truncated_std(sigmas: float) -> float:
    """Deviation of a standard normal number truncated at +- s: sqrt(1 - 2 s phi(s) / (2 Phi(s) - 1))."""
    if not sigmas:
        return 1.0
    density = math.exp(-(sigmas**2) / 2) / math.sqrt(2 * math.pi)
    return math.sqrt(1 - 2 * sigmas * density / math.erf(sigmas / math.sqrt(2)))


# Of d_model 128, d_ff 300, 3 layers: by scheme, the deviation of embeddings and head, of other matrices, and
# of the two matrices of layer i that write into the residual stream, (attention's, feed-forward's).
SCHEMES = {
    "normal": (dict(init_std=0.03), 0.03, 0.03, lambda i: (0.03, 0.03)),
    "normal, truncated": (dict(init_std=0.02, init_trunc=3.0), 0.02, 0.02, lambda i: (0.02, 0.02)),  # OLMo 2
    "gpt2": (dict(init="gpt2"), 0.02, 0.02, lambda i: (0.02 / math.sqrt(6),) * 2),
    "mitchell": (
        dict(init="mitchell"), 128**-0.5, 128**-0.5,
        lambda i: ((2 * 128 * (i + 1)) ** -0.5, (2 * 300 * (i + 1)) ** -0.5),
    ),
    "small_wang": (
        dict(init="small_wang"), math.sqrt(2 / 640), math.sqrt(2 / 640),
        lambda i: (2 / (3 * math.sqrt(128)),) * 2,
    ),
    # m = 1/4: 0.073 x sqrt(1/4) = 0.0365
    "mup": (
        dict(init="mup", init_std=0.073, init_trunc=2.0, mup_base_width=32), 0.073, 0.0365,
        lambda i: (0.0365 / math.sqrt(6),) * 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("ffn", ["swiglu", "gelu"])
def test_initialisation_has_the_deviations_that_were_published(scheme, ffn):
    settings, outer, inner, writes = SCHEMES[scheme]
    cfg = Model(
        vocab_size=500, d_model=128, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=300, norm="layernorm",
        bias=True, ffn=ffn, positions="learned", seq_len=90, **settings,
    )  # fmt: skip
    limit = 3.0 if scheme == "mitchell" else cfg.init_trunc
    for name, p in make(cfg).named_parameters():
        if p.ndim == 1:
            assert torch.equal(p, torch.full_like(p, 0.0 if name.endswith("bias") else 1.0)), name
            continue
        expected = inner if name.startswith("layers.") else outer
        for matrix, std in zip(
            ("o_proj", "down_proj"), writes(int(name.split(".")[1]) if "layers" in name else 0)
        ):
            expected = std if matrix in name else expected
        # the sample deviation of n normal numbers has a relative error of 1/sqrt(2n); five of those
        assert abs(p.std() / (truncated_std(limit) * expected) - 1) < 5 / math.sqrt(2 * p.numel()), name
        assert not limit or p.abs().max() <= limit * expected


def test_the_seed_alone_decides_the_weights():
    a, b, c = make(LLAMA, 1), make(LLAMA, 1), make(LLAMA, 2)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)


@pytest.mark.parametrize(
    ("name", "parameters"),
    # OLMo-1B: 16 x (4 x 2048^2 + 3 x 2048 x 8192) + 50304 x 2048
    [("7b", 6_738_415_616), ("olmo-1b", 1_176_764_416)],
)
def test_parameters_are_counted_as_published(name, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(config.load(name).model).parameters()) == parameters
