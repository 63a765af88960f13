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


def test_the_loss_survives_logits_that_would_overflow_exp():
    h, head = torch.full((2, 3), 100.0), torch.tensor([[10.0] * 3, [9.0] * 3])
    assert loss.vocabulary_loss(h, head, torch.tensor([0, 1])).item() == pytest.approx(300.0)


def test_without_gradients_none_are_computed_though_parameters_want_them(monkeypatch):
    h, head = torch.randn(5, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    targets = torch.tensor([1, 2, IGNORE, 4, 6])
    with torch.no_grad():
        quiet = loss.vocabulary_loss(h, head, targets)
        # of the three matrix products of a slice, two are for gradients
        with torch.profiler.profile() as profile:
            loss.vocabulary_loss(h, head, targets)
    assert (
        sum(event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm")) == 1
    )
    torch.testing.assert_close(quiet, loss.vocabulary_loss(h, head, targets).detach())


def test_a_target_that_is_no_id_is_refused():
    with pytest.raises((RuntimeError, IndexError)):
        loss.vocabulary_loss(torch.randn(2, 3), torch.randn(7, 3), torch.tensor([1, -1]))
