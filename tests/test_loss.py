"""loss.py: the sliced loss equals the whole one, in value and in every gradient."""

import pytest
import torch
import torch.nn.functional as F

import loss
from loss import IGNORE


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_the_loss_in_slices_equals_the_loss_on_whole_logits(rows, monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_BYTES", 4 * 53 * rows)
    torch.manual_seed(0)
    h, head = torch.randn(64, 19, requires_grad=True), torch.randn(53, 19, requires_grad=True)
    targets = torch.randint(53, (64,))
    targets[[3, 40, 41]] = IGNORE
    ours = torch.autograd.grad(3.0 * loss.vocabulary_loss(h, head, targets), (h, head))
    whole = F.cross_entropy(h @ head.T, targets, reduction="sum", ignore_index=IGNORE)
    theirs = torch.autograd.grad(3.0 * whole, (h, head))
    torch.testing.assert_close(loss.vocabulary_loss(h, head, targets), whole)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def masked_case(masked: list[int]):
    """h, head and 64 targets, of which those named are masked."""
    torch.manual_seed(3)
    h, head = torch.randn(64, 19, requires_grad=True), torch.randn(53, 19, requires_grad=True)
    targets = torch.randint(53, (64,))
    targets[masked] = IGNORE
    return h, head, targets


@pytest.mark.parametrize("rows", [1, 7, 1000])  # 7: the masked targets fill some slices, and parts of others
@pytest.mark.parametrize("masked", [[5], list(range(25)), list(range(40, 64)), list(range(63))])
def test_masked_targets_have_neither_loss_nor_gradient(rows, masked, monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_BYTES", 4 * 53 * rows)
    h, head, targets = masked_case(masked)
    ours = loss.vocabulary_loss(h, head, targets)
    theirs = F.cross_entropy(h @ head.T, targets, reduction="sum", ignore_index=IGNORE)
    torch.testing.assert_close(ours, theirs)
    (d_h, d_head), expected = (torch.autograd.grad(x, (h, head)) for x in (ours, theirs))
    torch.testing.assert_close(d_h, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(d_head, expected[1], atol=1e-4, rtol=1e-5)
    assert (d_h[masked] == 0).all() and (d_h[targets != IGNORE] != 0).any(1).all()
    # what a masked token says does not matter: the same tokens without it have the same loss and gradients
    kept = targets != IGNORE
    alone = loss.vocabulary_loss(h[kept], head, targets[kept])
    torch.testing.assert_close(ours, alone)
    torch.testing.assert_close(d_head, torch.autograd.grad(alone, head)[0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("bf16", [False, True])
def test_where_all_targets_are_masked_loss_and_gradients_are_zero(rows, z_loss, bf16, monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_BYTES", 4 * 53 * rows)
    h, head, targets = masked_case(list(range(64)))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        value = loss.vocabulary_loss(h, head, targets, z_loss)
    assert value.item() == 0.0
    for gradient in torch.autograd.grad(value, (h, head)):
        assert torch.equal(gradient, torch.zeros_like(gradient))  # and so none is nan


def test_the_loss_survives_logits_that_would_overflow_exp():
    h, head = torch.full((2, 3), 100.0), torch.tensor([[10.0] * 3, [9.0] * 3])
    assert loss.vocabulary_loss(h, head, torch.tensor([0, 1])).item() == pytest.approx(300.0)


def test_without_gradients_none_are_computed_though_parameters_want_them(monkeypatch):
    h, head = torch.randn(5, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    targets = torch.tensor([1, 2, IGNORE, 4, 6])
    with torch.no_grad():
        quiet = loss.vocabulary_loss(h, head, targets)
        # of the three matmuls of a slice, two are for gradients
        with torch.profiler.profile() as profile:
            loss.vocabulary_loss(h, head, targets)
    assert (
        sum(event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm")) == 1
    )
    torch.testing.assert_close(quiet, loss.vocabulary_loss(h, head, targets).detach())


def test_a_target_that_is_no_id_is_refused():
    with pytest.raises((RuntimeError, IndexError)):
        loss.vocabulary_loss(torch.randn(2, 3), torch.randn(7, 3), torch.tensor([1, -1]))


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("z_loss", [1e-4, 0.05, 2.0])
def test_z_loss_adds_its_gradient_and_not_its_value(rows, z_loss, monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_BYTES", 4 * 53 * rows)
    torch.manual_seed(1)
    h, head = torch.randn(64, 19, requires_grad=True), torch.randn(53, 19, requires_grad=True)
    targets = torch.randint(53, (64,))
    targets[[0, 40, 41, 63]] = IGNORE
    value = loss.vocabulary_loss(h, head, targets, z_loss)
    ours = torch.autograd.grad(3.0 * value, (h, head))

    wide = [x.detach().double().requires_grad_() for x in (h, head)]
    logits = wide[0] @ wide[1].T
    cross = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE)
    # PaLM, section 5; a token without a target has no z-loss either
    square = torch.logsumexp(logits, 1).square()[targets != IGNORE].sum()
    theirs = torch.autograd.grad(3.0 * (cross + z_loss * square), wide)

    torch.testing.assert_close(value.double(), cross)
    torch.testing.assert_close(value, loss.vocabulary_loss(h, head, targets))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.double(), b, atol=1e-5 * b.abs().max().item(), rtol=1e-5)
    assert (ours[0][[0, 40, 41, 63]] == 0).all()
    # and it is no rounding error: without it gradients are others
    without = torch.autograd.grad(3.0 * loss.vocabulary_loss(h, head, targets), (h, head))
    assert (ours[0] - without[0]).norm() > 0.5 * z_loss * without[0].norm()


def test_z_loss_by_hand():
    """One token, logits 2 and 0, target 0: log Z = log(e^2 + 1) = 2.126928, softmax 0.880797 and 0.119203."""
    h, head = torch.tensor([[2.0]], requires_grad=True), torch.tensor([[1.0], [0.0]])
    value = loss.vocabulary_loss(h, head, torch.tensor([0]), 0.5)
    assert value.item() == pytest.approx(0.126928, abs=1e-6)
    value.backward()
    # d / d z_0 = 0.880797 - 1 + 2 x 0.5 x 2.126928 x 0.880797 = 1.754189, and h reaches z_0 alone
    assert h.grad.item() == pytest.approx(0.880797 - 1 + 2.126928 * 0.880797, abs=1e-5)


def test_z_loss_of_large_logits_does_not_overflow():
    h, head = torch.full((1, 3), 100.0, requires_grad=True), torch.tensor([[10.0] * 3, [9.0] * 3])
    loss.vocabulary_loss(h, head, torch.tensor([0]), 1e-4).backward()
    # log Z = 3,000; softmax 1 and 0: d h = 2 x 1e-4 x 3,000 x 10
    assert h.grad.tolist() == [pytest.approx([6.0] * 3)]


def test_the_module_passes_its_z_loss_on():
    module, h, head = loss.Loss(), torch.randn(2, 5, 3, requires_grad=True), torch.randn(7, 3)
    targets = torch.randint(7, (2, 5))
    for z_loss in (0.0, 0.3):
        module.z_loss = z_loss
        (ours,) = torch.autograd.grad(module(h, head, targets), h)
        (theirs,) = torch.autograd.grad(
            loss.vocabulary_loss(h.flatten(0, 1), head, targets.flatten(), z_loss), h
        )
        assert torch.equal(ours, theirs)


def test_z_loss_in_bf16_is_off_by_what_bf16_explains():
    torch.manual_seed(2)
    h, head = torch.randn(64, 19, requires_grad=True), torch.randn(53, 19, requires_grad=True)
    targets = torch.randint(53, (64,))
    exact = torch.autograd.grad(loss.vocabulary_loss(h, head, targets, 0.05), (h, head))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss.vocabulary_loss(h, head, targets, 0.05)
    assert value.dtype == torch.float32
    for a, b in zip(torch.autograd.grad(value, (h, head)), exact):
        # operands, logits and their gradient are rounded to 8 bits: logits are some 10 in size, so that each
        # probability is off by up to 10 x 2^-8 of itself
        assert (a - b).norm() < 10 * 2.0**-8 * b.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("slice_bytes", [2**31, 2**24])  # one slice, and eight
def test_on_a_gpu_the_compiled_loss_is_as_near_to_float64_as_bf16_allows(z_loss, slice_bytes, monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_BYTES_CUDA", slice_bytes)
    generator = torch.Generator("cuda").manual_seed(0)
    make = {"device": "cuda", "generator": generator}
    h = torch.randn(3000, 256, **make).requires_grad_()
    head = (torch.randn(5003, 256, **make) / 16).requires_grad_()
    targets = torch.randint(5003, (3000,), **make)
    targets[::7] = IGNORE
    compiled = torch.compile(loss.differentiate)
    with torch.autocast("cuda", torch.bfloat16):
        ours = loss.vocabulary_loss(h, head, targets, z_loss, compiled)
        with torch.no_grad():
            alone = loss.vocabulary_loss(h, head, targets, z_loss, compiled)
    found = torch.autograd.grad(ours, (h, head))
    assert ours == alone

    exact = [x.detach().bfloat16().double().requires_grad_() for x in (h, head)]
    z = exact[0] @ exact[1].T
    whole = F.cross_entropy(z, targets, reduction="sum", ignore_index=IGNORE)
    penalty = z_loss * (torch.logsumexp(z, 1)[targets != IGNORE] ** 2).sum()
    expected = torch.autograd.grad(whole + penalty, exact)
    assert ours.item() == pytest.approx(whole.item(), rel=1e-5)  # logits are rounded to BF16
    for a, b, tolerance in zip(found, expected, (5e-3, 1e-3)):
        assert ((a.double() - b).norm() / b.norm()).item() < tolerance
