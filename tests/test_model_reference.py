"""model.py against the float64 NumPy implementation in reference.py: every architecture, and values by hand.

Sizes are pairwise different, and every parameter is random, also norm weights and biases: so anything that is
forgotten, transposed or applied twice shows. Documents end with token 0.
"""

import functools
import math
import zlib

import numpy as np
import pytest
import reference
import torch

import masks
import model
from config import NORMS, Model
from initial import initial_weights
from masks import Cache
from model import Transformer

# flex attention, which only CUDA uses in training, runs here as PyTorch's slow uncompiled version
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

EOT, BATCH, TOKENS = 0, 5, 13
# norm_eps is large enough to be seen
PLAIN = dict(vocab_size=37, seq_len=17, d_model=20, n_layers=3, n_heads=4, d_head=6, d_ff=28, norm_eps=0.03)
GPT = dict(norm="layernorm", bias=True)
CRYSTAL = dict(
    GPT,
    d_head=16,  # 4 of them rotary
    rope_fraction=0.25,
    rope_pairs="neighbours",
    tie_embeddings=True,
    embedding_multiplier=14.6,
    logits_multiplier=2.22,
    mup_base_width=5,  # m = 1/4
    init="mup",
)
PACKED = dict(document_mask=True)
# turns of its 8 pairs over 64 tokens: 10.2, 5.7 (fast: above 4), 3.2, 1.8, 1.02 (blends), 0.6, 0.3, 0.2
LLAMA3 = dict(n_kv_heads=2, d_head=16, rope_theta=100.0, rope_scaling=8.0, rope_scaling_seq_len=64)
ARCHITECTURES = {
    "LLaMA": {},
    "LLaMA 2, grouped queries": dict(n_kv_heads=2),
    "one key and value head for all": dict(n_kv_heads=1),
    "LLaMA 3.1": LLAMA3,
    "OLMo 1B": dict(norm="nonparametric_layernorm", tie_embeddings=True),
    "OLMo 1.7, clipped": dict(norm="nonparametric_layernorm", clip_qkv=0.8),
    "OLMo 2": dict(norm_place="after", qk_norm=True),
    "OLMo 2, grouped queries": dict(norm_place="after", qk_norm=True, n_kv_heads=2),
    "Pythia": dict(GPT, d_head=16, rope_fraction=0.25, parallel_residual=True, ffn="gelu"),
    "CrystalCoder": CRYSTAL,
    "CrystalCoder, document mask": dict(CRYSTAL, **PACKED),
    "baichuan 13B, ALiBi": dict(positions="alibi"),
    "ALiBi, 12 heads": dict(positions="alibi", n_heads=12, n_kv_heads=6, d_head=2),
    "MPT, ALiBi, 6 heads": dict(GPT, positions="alibi", n_heads=6, ffn="gelu"),
    "Mistral, sliding window": dict(window=4, n_kv_heads=2),
    "GPT-2": dict(GPT, positions="learned", ffn="gelu", tie_embeddings=True),
    "no positions": dict(positions="none"),
    "GeGLU": dict(ffn="geglu"),
    "GELU": dict(ffn="gelu"),
    "squared ReLU": dict(ffn="relu2"),
    "qk_norm before": dict(qk_norm=True, clip_qkv=0.8),
    "qk_norm by LayerNorm": dict(qk_norm=True, norm="layernorm"),
    "document mask": PACKED,
    "document mask, window": dict(PACKED, window=3),
    "document mask, ALiBi": dict(PACKED, positions="alibi", n_heads=6),
    "document mask, ALiBi, window": dict(PACKED, positions="alibi", window=3),
    "document mask, learned": dict(PACKED, positions="learned"),
    "ALiBi, window": dict(positions="alibi", window=4),
}
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def settings(name: str, **changes) -> Model:
    return Model(**{**PLAIN, **ARCHITECTURES[name], **changes})


def random_model(cfg: Model, seed: int) -> tuple[Transformer, dict[str, np.ndarray]]:
    """A model whose every parameter is random, and the same numbers in float64."""
    net = Transformer(cfg, eot=EOT).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for (name, parameter), first in zip(net.named_parameters(), initial_weights(net, 0), strict=True):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:  # 1.3: attention is then neither flat nor all on one token
                spread = 1.3 / math.sqrt(parameter.shape[1])
                if "embed_" in name:
                    spread = 1.3 / cfg.embedding_multiplier  # else layers would be lost beside embeddings
                elif cfg.mup_base_width and ("q_proj" in name or "k_proj" in name):
                    spread *= net.cfg.d_head**0.25  # else 1/d_head would leave attention flat
                parameter.copy_(spread * noise)
            else:
                parameter.copy_(0.3 * noise + first)  # around 1 for a norm's weight, around 0 for a bias
    return net, {name: p.detach().double().numpy() for name, p in net.named_parameters()}


def random_tokens(cfg: Model, seed: int, *shape: int) -> torch.Tensor:
    """About every fifth is the end of a document; row 0 begins with two of them, and one ends with one."""
    generator = torch.Generator().manual_seed(seed + 1)
    tokens = torch.randint(1, cfg.vocab_size, shape, generator=generator)
    tokens[torch.rand(shape, generator=generator) < 0.2] = EOT
    tokens[0, :2] = tokens[-1, -1] = EOT
    return tokens


@functools.cache
def case(name: str):
    """cfg, model, weights, tokens, targets, and the reference's logits, of one architecture."""
    cfg, seed = settings(name), zlib.crc32(name.encode())
    net, weights = random_model(cfg, seed)
    row = random_tokens(cfg, seed, BATCH, TOKENS + 1)
    tokens, targets = row[:, :-1], row[:, 1:]
    return cfg, net, weights, tokens, targets, reference.logits(cfg, weights, tokens.numpy(), EOT)


def difference(found: torch.Tensor, expected: np.ndarray) -> float:
    """The largest one, as a share of the expected values' root mean square."""
    assert found.shape == expected.shape and found.dtype == torch.float32
    return np.abs(found.detach().numpy() - expected).max() / root_mean_square(expected)


def root_mean_square(x: np.ndarray) -> float:
    return np.sqrt(np.square(x).mean())


# ---- the whole model --------------------------------------------------------------------------------------

# Of the logits' root mean square. Seen: 1e-6 to 7e-6. FP32 rounds at 2^-24 = 6e-8, and a logit is far from
# the embedding.
LOGITS = 2e-5


@every_architecture
def test_logits_and_loss_equal_the_reference(name):
    _, net, _, tokens, targets, expected = case(name)
    assert difference(net(tokens), expected) < LOGITS
    nats = reference.nats(expected, targets.numpy())
    assert net(tokens, targets).item() == pytest.approx(nats, rel=1e-6)  # seen: 1.4e-7


@pytest.mark.parametrize("seed", range(24))
def test_settings_combine_at_random(seed):
    draw = np.random.default_rng(seed)

    def one_of(*choices):
        return choices[draw.integers(len(choices))]

    place, parallel = one_of(("before", False), ("after", False), ("before", True))
    cfg = settings(
        "LLaMA",
        **one_of(
            dict(n_heads=4, n_kv_heads=2), dict(n_heads=6, n_kv_heads=3), dict(n_heads=12, n_kv_heads=1)
        ),
        d_head=one_of(4, 8, 16),
        ffn=one_of("swiglu", "geglu", "gelu", "relu2"),
        norm=one_of(*NORMS),
        norm_place=place,
        parallel_residual=parallel,
        clip_qkv=one_of(0.0, 0.9),
        bias=one_of(True, False),
        positions=one_of("rope", "alibi", "learned", "none"),
        rope_fraction=one_of(0.5, 1.0),
        rope_pairs=one_of("halves", "neighbours"),
        rope_scaling=one_of(1.0, 4.0),
        rope_scaling_seq_len=32,
        window=one_of(0, 0, 1, 5, 40),
        document_mask=one_of(True, False),
        tie_embeddings=one_of(True, False),
        embedding_multiplier=one_of(1.0, 0.7),
        logits_multiplier=one_of(1.0, 1.9),
        **one_of(dict(init="mup", mup_base_width=5), {}),
    )
    net, weights = random_model(cfg, seed)
    tokens = random_tokens(cfg, seed, 2, 9)
    expected = reference.logits(cfg, weights, tokens.numpy(), EOT)
    assert difference(net(tokens), expected) < LOGITS


@pytest.mark.parametrize(
    "name, change",
    [
        ("LLaMA", dict(norm_eps=0.02)),
        ("LLaMA", dict(rope_pairs="neighbours")),
        ("LLaMA", dict(rope_theta=9000.0)),
        ("LLaMA", dict(rope_fraction=2 / 3)),
        ("LLaMA 3.1", dict(rope_scaling=7.0)),
        ("LLaMA 3.1", dict(rope_scaling_low=0.8)),
        ("LLaMA 3.1", dict(rope_scaling_high=5.0)),
        ("OLMo 1.7, clipped", dict(clip_qkv=0.9)),
        ("Pythia", dict(parallel_residual=False)),
        ("Pythia", dict(rope_fraction=1.0)),
        ("CrystalCoder", dict(rope_pairs="halves")),
        ("CrystalCoder", dict(bias=False)),
        ("CrystalCoder", dict(embedding_multiplier=14.5)),
        ("CrystalCoder", dict(logits_multiplier=2.21)),
        ("CrystalCoder", dict(mup_base_width=0, init="normal", logits_multiplier=2.22 / 4)),  # 1/sqrt(d_head)
        ("Mistral, sliding window", dict(window=5)),
        ("GeGLU", dict(ffn="swiglu")),
        ("document mask", dict(document_mask=False)),
        ("document mask, ALiBi, window", dict(window=4)),
    ],
)
def test_the_comparison_would_notice_a_setting_that_is_ignored(name, change):
    *_, weights, tokens, _, expected = case(name)
    other = reference.logits(settings(name, **change), weights, tokens.numpy(), EOT)
    assert np.abs(other - expected).max() > 100 * LOGITS * root_mean_square(expected)


def test_every_tensor_matters_to_the_reference():
    for name in ("CrystalCoder", "OLMo 2, grouped queries", "document mask, learned"):
        cfg, _, weights, tokens, _, expected = case(name)
        tokens, expected = tokens[1:2, :9], expected[1:2, :9]
        for changed in weights:
            others = {**weights, changed: weights[changed][::-1]}  # OLMo 2 would not notice a factor
            other = reference.logits(cfg, others, tokens.numpy(), EOT)
            least = 100 * LOGITS * root_mean_square(expected)
            assert np.abs(other - expected).max() > least, (name, changed)


@every_architecture
def test_the_gradient_of_the_whole_equals_the_reference_along_a_random_direction(name):
    cfg, net, weights, tokens, targets, _ = case(name)
    tokens, targets = tokens[:2, :8], targets[:2, :8]
    net.zero_grad()
    net(tokens, targets).backward()
    draw, step = np.random.default_rng(7), 1e-6
    way = {name: draw.standard_normal(array.shape) for name, array in weights.items()}

    def loss(step):
        moved = {name: array + step * way[name] for name, array in weights.items()}
        return reference.nats(reference.logits(cfg, moved, tokens.numpy(), EOT), targets.numpy())

    slope = (loss(step) - loss(-step)) / (2 * step)
    found = sum((p.grad.double().numpy() * way[name]).sum() for name, p in net.named_parameters())
    size = math.sqrt(sum(p.grad.double().square().sum() for p in net.parameters()))
    assert abs(found - slope) < 1e-5 * size  # seen: 1.8e-6


def test_crystalcoders_gradients_equal_central_differences_in_every_tensor():
    cfg, net, weights, tokens, targets, _ = case("CrystalCoder")
    tokens, targets = tokens[1:3, :5], targets[1:3, :5]
    net.zero_grad()
    net(tokens, targets).backward()
    draw, step = np.random.default_rng(8), 1e-5
    assert len(weights) == 1 + 2 + cfg.n_layers * (2 * 2 + 4 * 2 + 3 * 2)  # tied: no lm_head
    for name, parameter in net.named_parameters():
        gradient = parameter.grad.numpy()
        for at in draw.choice(gradient.size, size=2, replace=False):
            where, sides = np.unravel_index(at, gradient.shape), []
            for signed in (step, -step):
                moved = weights[name].copy()
                moved[where] += signed
                scores = reference.logits(cfg, {**weights, name: moved}, tokens.numpy())
                sides.append(reference.nats(scores, targets.numpy()))
            slope = (sides[0] - sides[1]) / (2 * step)
            # seen: 7e-7
            assert abs(gradient[where] - slope) < 1e-5 * np.abs(gradient).max(), (name, where)


# ---- beyond what the whole model shows --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["baichuan 13B, ALiBi", "ALiBi, 12 heads", "document mask, ALiBi"])
def test_alibi_reads_beyond_the_length_it_was_trained_at(name):
    cfg, net, weights, *_ = case(name)
    tokens = random_tokens(cfg, 9, 2, 3 * cfg.seq_len)
    expected = reference.logits(cfg, weights, tokens.numpy(), EOT)
    assert difference(net(tokens), expected) < LOGITS


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if n.startswith(("ALiBi", "document", "Mistral"))])
def test_flex_attention_which_cuda_takes_equals_the_reference_too(name, monkeypatch):
    _, net, _, tokens, _, expected = case(name)
    asked = []

    def on_cuda(cfg, index, first, cache):
        asked.append(first)
        return masks.block_mask(first, index.shape[-1], index.device)

    monkeypatch.setattr(masks, "visible", on_cuda)
    with torch.no_grad():  # on a CPU, flex attention has no backward
        assert difference(net(tokens), expected) < LOGITS
    assert len(asked) == 1


@every_architecture
def test_the_cache_gives_what_a_whole_row_gives(name):
    cfg, net, _, tokens, _, expected = case(name)
    cache, at, pieces = Cache(cfg, BATCH, TOKENS), 0, []
    for length in (4, 1, 1, 5, 2):  # the prompt, single tokens, and pieces as of a conversation
        pieces.append(net(tokens[:, at : at + length], cache=cache))
        at += length
    assert at == TOKENS
    assert difference(torch.cat(pieces, dim=1), expected) < LOGITS


@every_architecture
def test_rows_of_different_lengths_continue_where_each_ended(name):
    cfg, net, _, tokens, _, expected = case(name)
    lengths = torch.tensor([3, 7, 1, 5, 6])
    prompt = tokens[:, :7].clone()
    prompt[torch.arange(7) >= lengths[:, None]] = EOT  # padding that would begin a document, were it seen
    cache = Cache(cfg, BATCH, TOKENS)
    with torch.no_grad():
        head = net.head
        first = net.hidden(prompt, cache, lengths) @ head.T
        for b, length in enumerate(lengths):
            assert difference(first[b, :length], expected[b, :length]) < LOGITS
        for step in range(6):
            following = tokens.gather(1, lengths[:, None] + step)
            scores = net(following, cache=cache)
            for b, length in enumerate(lengths):
                assert difference(scores[b, 0], expected[b, length + step]) < LOGITS


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if "document mask" in name])
def test_a_document_in_a_row_is_a_document_alone(name):
    _, packed, weights, tokens, _, expected = case(name)
    alone = Transformer(settings(name, document_mask=False)).eval()
    alone.load_state_dict(packed.state_dict())
    logits, several = packed(tokens), 0
    for b, row in enumerate(tokens):
        ends = [t + 1 for t in range(TOKENS) if row[t] == EOT]
        for start, end in zip([0, *ends], [*ends, TOKENS]):
            if start < end:
                several += end - start > 1
                document = tokens[b : b + 1, start:end]
                assert difference(alone(document), expected[b : b + 1, start:end]) < LOGITS
                assert difference(logits[b, start:end], alone(document)[0].detach().double().numpy()) < LOGITS
                unmasked = reference.logits(settings(name, document_mask=False), weights, document[0].numpy())
                np.testing.assert_allclose(unmasked, expected[b, start:end], atol=1e-12)
    assert several > BATCH


# ---- values worked by hand --------------------------------------------------------------------------------


@pytest.mark.parametrize("slopes", [masks.alibi_slopes, reference.alibi_slopes])
def test_alibi_slopes_are_the_papers(slopes):
    root = math.sqrt(2)
    powers = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert slopes(8) == pytest.approx(powers, rel=1e-15)  # section 3
    # section 3: for 16 heads 2^-0.5, 2^-1, 2^-1.5, ..., 2^-8
    assert slopes(16) == pytest.approx(
        [1 / root, 1 / 2, 1 / (2 * root), 1 / 4] + [2 ** (-k / 2) for k in range(5, 17)]
    )
    # the 1st, 3rd, 5th and 7th of 16
    assert slopes(12) == pytest.approx([*powers, 1 / root, 1 / (2 * root), 1 / (4 * root), 1 / (8 * root)])
    assert slopes(1) == [1 / 256]
    assert slopes(2) == [1 / 16, 1 / 256]
    assert slopes(3) == [1 / 16, 1 / 256, 1 / 4]
    assert slopes(6) == [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8]
    baichuan = slopes(40)  # 32 and every other of 64: 2^(-1/8), 2^(-3/8), ..., 2^(-15/8)
    assert baichuan[:32] == pytest.approx([2 ** (-k / 4) for k in range(1, 33)])
    assert baichuan[32:] == pytest.approx([2 ** (-k / 8) for k in (1, 3, 5, 7, 9, 11, 13, 15)])


@pytest.mark.parametrize(
    "ffn, expected",
    [
        ("relu2", [0, 0.25, 9]),
        ("gelu", [-2 * 0.02275013, 0.5 * 0.69146246, 3 * 0.99865010]),  # x times a table's Phi(x)
        # gate and up are both x: x act(x)
        ("geglu", [4 * 0.02275013, 0.25 * 0.69146246, 9 * 0.99865010]),
        ("swiglu", [4 / (1 + math.e**2), 0.25 / (1 + math.e**-0.5), 9 / (1 + math.e**-3)]),
    ],
)
def test_feed_forwards_of_a_tiny_vector(ffn, expected):
    cfg = settings("LLaMA", d_model=3, d_ff=3, ffn=ffn)
    mlp, x = model.MLP(cfg.resolved(), 0), [-2.0, 0.5, 3.0]
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.copy_(torch.eye(3))
    # FP32 has steps of 2^-23 of a value, and processors differ in the last bit of erf: two steps
    assert mlp(torch.tensor(x)).tolist() == pytest.approx(expected, rel=2 * 2**-23, abs=1e-7)
    weights = {name: p.detach().double().numpy() for name, p in mlp.named_parameters()}
    found = reference.feed_forward(cfg, weights, np.array([x]))[0]
    assert found.tolist() == pytest.approx(expected, abs=1e-7)


def test_norms_of_a_tiny_vector():
    # [1, 2, 3, 6]: mean 3, variance (4 + 1 + 0 + 9)/4 = 3.5, mean square 12.5; eps brings them to 4 and 13
    x = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    weight, bias = torch.tensor([1.0, -2.0, 3.0, 0.5]), torch.tensor([0.0, 1.0, 0.0, -1.0])
    expected = {
        ("rmsnorm", 0.5): [c / math.sqrt(13) for c in (1, -4, 9, 3)],
        ("layernorm", 0.5): [-1, 1 + 1, 0, 0.75 - 1],
        ("nonparametric_layernorm", 0.5): [-1, -0.5, 0, 1.5],
    }
    for (norm, eps), values in expected.items():
        cfg = settings("LLaMA", d_model=4, d_head=2, norm=norm, norm_eps=eps)
        module = model.Norm(cfg)
        given = {"weight": weight, "bias": bias}
        module.load_state_dict({name: given[name] for name, _ in module.named_parameters()})
        assert module(x)[0].tolist() == pytest.approx(values, abs=1e-6), norm
        given = {name: value.double().numpy() for name, value in given.items()}
        assert reference.normed(cfg, given, x.double().numpy())[0].tolist() == pytest.approx(values), norm


@pytest.mark.parametrize("pairs, expected", [("neighbours", (1, 2, 3, 4)), ("halves", (1, 3, 2, 4))])
def test_rotary_embedding_of_a_tiny_head(pairs, expected):
    # theta 100, 4 of 6 dimensions: pairs turn 1 and 100^(-2/4) = 0.1 a position; at 2 they are at 2 and 0.2
    cfg = settings("LLaMA", rope_theta=100.0, rope_fraction=2 / 3, rope_pairs=pairs)
    a, b, c, d = expected  # the values that make the first pair and the second
    x, first, second = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], (a, b), (c, d)
    rotated = {}
    for (p, q), angle in ((first, 2.0), (second, 0.2)):
        rotated[p] = p * math.cos(angle) - q * math.sin(angle)
        rotated[q] = p * math.sin(angle) + q * math.cos(angle)
    by_hand = [rotated[1], rotated[2], rotated[3], rotated[4], 5, 6]
    assert reference.rotated(cfg, np.array(x), 2).tolist() == pytest.approx(by_hand)
    rope = model.rotary_angles(torch.tensor([2]), cfg)
    found = model.rotate(torch.tensor(x).view(1, 1, 1, 6), *rope, pairs == "neighbours")
    assert found.flatten().tolist() == pytest.approx(by_hand, abs=1e-6)


def test_llama_31_leaves_fast_frequencies_divides_slow_ones_and_blends_between():
    cfg = Model(d_head=128, rope_theta=500_000.0, rope_scaling=8.0)  # as released: low 1, high 4, 8,192
    plain = [500_000 ** (-i / 64) for i in range(64)]
    turns = [8192 * f / (2 * math.pi) for f in plain]
    found = model.rotary_frequencies(cfg.resolved()).tolist()
    assert found == pytest.approx([reference.frequency(cfg, i, 128) for i in range(64)], rel=1e-6)
    assert [round(turns[i], 3) for i in (28, 29, 34, 35)] == [4.187, 3.411, 1.224, 0.997]
    assert found[:29] == pytest.approx(plain[:29], rel=1e-6)
    assert found[35:] == pytest.approx([f / 8 for f in plain[35:]], rel=1e-6)
    # pair 29: (3.41 - 1) / 3 = 0.804 of the plain one and 0.196 of an eighth of it
    kept = (turns[29] - 1) / 3
    assert found[29] == pytest.approx(plain[29] * (kept + (1 - kept) / 8), rel=1e-6)


@pytest.mark.parametrize("positions", ["rope", "alibi", "none"])
def test_a_window_of_one_returns_the_value_itself(positions):
    cfg = settings("LLaMA", window=1, positions=positions, n_kv_heads=2)
    net, weights = random_model(cfg, 10)
    seen = {}
    for layer, block in enumerate(net.layers):
        block.self_attn.register_forward_hook(
            lambda module, args, output, layer=layer: seen.update({layer: (args[0], output)})
        )
    net(random_tokens(cfg, 10, BATCH, TOKENS))
    for layer, (x, output) in seen.items():
        w = reference.part(weights, f"layers.{layer}.self_attn.")
        value = x.detach().numpy() @ w["v_proj.weight"].T
        heads = [value[..., h * 6 : (h + 1) * 6] for h in (0, 0, 1, 1)]  # 4 query heads share 2 values
        assert difference(output, np.concatenate(heads, axis=-1) @ w["o_proj.weight"].T) < LOGITS
    assert len(seen) == cfg.n_layers


def test_alibi_by_hand_where_all_scores_are_equal():
    # Queries of zero: only distance speaks. 2 heads, slopes 1/16 and 1/256; keys 2, 1 and 0 tokens back
    cfg = settings("LLaMA", d_model=4, n_heads=2, d_head=2, n_layers=1, positions="alibi").resolved()
    attention = model.Attention(cfg, 0)
    with torch.no_grad():
        attention.q_proj.weight.zero_()
        attention.v_proj.weight.copy_(torch.eye(4))
        attention.o_proj.weight.copy_(torch.eye(4))
    x = torch.tensor([[[1.0, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]]])
    mask = masks.visible(cfg, torch.arange(3), None, None)
    last = attention(x, None, mask, None)[0, 2].tolist()
    expected = []
    for slope in (1 / 16, 1 / 256):
        far, near, own = math.exp(-2 * slope), math.exp(-slope), 1.0
        expected += [far / (far + near + own), near / (far + near + own)]
    assert last == pytest.approx(expected, abs=1e-6)
    weights = {name: p.detach().double().numpy() for name, p in attention.named_parameters()}
    found = reference.attention(cfg, weights, x[0].double().numpy(), [0, 0, 0], [0, 1, 2])[2]
    assert found.tolist() == pytest.approx(expected)


def test_documents_and_positions_of_a_row():
    assert reference.documents([5, 0, 6, 7], 0) == ([0, 0, 1, 1], [0, 1, 0, 1])
    assert reference.documents([0, 0, 6, 0], 0) == ([0, 1, 2, 2], [0, 0, 0, 1])
    assert reference.documents([5, 0, 6, 7], None) == ([0, 0, 0, 0], [0, 1, 2, 3])


def test_crystalcoder_scales_as_published():
    # configs/crystalcoder.py: 256/4096 = 1/16; logits 2.22 x 0.0625 = 0.13875
    cfg = Model(d_model=4096, mup_base_width=256, init="mup", logits_multiplier=2.22)
    assert cfg.logits_multiplier * reference.width_scale(cfg) == pytest.approx(0.13875)
    assert cfg.mup_scale == reference.width_scale(cfg) == 0.0625
    with torch.device("meta"):
        assert model.Attention(cfg.resolved(), 0).scale == 1 / 128  # d_head = 4096 / 32; not its root
