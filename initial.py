"""The initial weights of a model: one seeded stream of random numbers, the same on every machine.

    for parameter, value in zip(model.parameters(), initial_weights(model, seed=1234)): ...

Every module says in `first_values` how its own parameters begin: a vector (a norm's weight, a bias) with that
constant, a matrix with normal random numbers of that standard deviation. A new scheme is a row in `init_std`
and a choice of Model.init in config.py.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from config import Model, choose
from linear import linear


class Linear(nn.Linear):
    """PyTorch's Linear, with the standard deviation of its initial weight."""

    def __init__(self, d_in: int, d_out: int, bias: bool, std: float):
        super().__init__(d_in, d_out, bias)
        self.first_values = {"weight": std, "bias": 0.0}

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """PyTorch's Embedding, with the standard deviation of its initial weight."""

    def __init__(self, n: int, d: int, std: float):
        super().__init__(n, d)
        self.first_values = {"weight": std}


def initial_weights(model: nn.Module, seed: int) -> Iterator[Tensor]:
    """The initial value of every parameter, in the order of model.parameters(), whole and on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    limit = 3.0 if model.cfg.init == "mitchell" else model.cfg.init_trunc  # in standard deviations; 0: none
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            value, first = torch.empty(parameter.shape), module.first_values[name]
            if parameter.ndim < 2:
                value.fill_(first)
            elif limit:
                nn.init.trunc_normal_(value, 0.0, first, -limit * first, limit * first, generator)
            else:
                nn.init.normal_(value, 0.0, first, generator)
            yield value


def init_std(cfg: Model, fan_in: int, layer: int | None = None, writes: bool = False) -> float:
    """The standard deviation of a matrix's initial values, before truncation.

    layer: None for embeddings and the head. writes: the matrix writes into the residual stream (o_proj and
    down_proj of each layer), which most schemes make smaller in deeper models.
    """
    D, L, std, depth = cfg.d_model, cfg.n_layers, cfg.init_std, 1 + (layer or 0)
    inner = std if layer is None else std * math.sqrt(cfg.mup_scale)
    table = {  # scheme: (most matrices, those that write into the residual stream)
        "normal": (std, std),  # LLaMA as Hugging Face trains it; Amber; OLMo 2, truncated at 3 deviations
        "gpt2": (std, std / math.sqrt(2 * L)),  # Radford et al. 2019, 2.3; GPT-NeoX; Pythia 6.9B, 12B
        "mitchell": (fan_in**-0.5, fan_in**-0.5 / math.sqrt(2 * depth)),  # OLMo's code, reset_parameters
        "small_wang": (math.sqrt(2 / (5 * D)), 2 / (L * math.sqrt(D))),  # Nguyen, Salazar 2019; GPT-J; Pythia
        "mup": (inner, inner / math.sqrt(2 * L)),  # CrystalCoder's released parameters
    }
    return choose("model.init", cfg.init, table)[writes]
