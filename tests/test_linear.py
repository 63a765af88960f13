"""linear.py: the same results and gradients as float64, up to roundings, whichever library multiplies."""

import pytest
import torch
import torch.nn.functional as F

import linear

ROUNDING = 2.0**-24


def with_gradients(function, x, weight, bias):
    """The result for x, weight and bias, and the gradients of its sum with fixed random factors."""
    inputs = [y.detach().clone().requires_grad_() for y in (x, weight, *([] if bias is None else [bias]))]
    y = function(*inputs)
    factors = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y, *torch.autograd.grad((y * factors).sum(), inputs)]


@pytest.mark.parametrize("available", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(5, 31, 47), (200, 47), (3, 1, 47)])  # the last has few rows
def test_results_and_gradients_are_those_of_float64(shape, biased, available, monkeypatch):
    monkeypatch.setattr(linear, "AVAILABLE", linear.AVAILABLE and available)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(29, 47), torch.randn(29) if biased else None
    ours = with_gradients(linear.linear, x, weight, bias)
    exact = with_gradients(F.linear, x.double(), weight.double(), bias.double() if biased else None)
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == torch.float32 and a.shape == b.shape
        assert (a - b).norm() < 16 * ROUNDING * b.norm()


@pytest.mark.skipif(not linear.AVAILABLE, reason="PyTorch has no oneDNN for this CPU")
def test_onednn_multiplies_fp32_of_many_rows_and_nothing_else(monkeypatch):
    asked = []
    monkeypatch.setattr(linear, "product", lambda x, w, b=None: asked.append(x.shape) or F.linear(x, w, b))
    weight = torch.randn(29, 47)
    few, many = torch.randn(3, 47), torch.randn(4, 50, 47)
    linear.linear(few, weight)
    linear.linear(many.bfloat16(), weight.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert linear.linear(many, weight).dtype == torch.bfloat16
    assert linear.linear(many.to("meta"), weight.to("meta")).shape == (4, 50, 29)
    assert asked == []
    linear.linear(many, weight)
    assert asked == [(4, 50, 47)]
