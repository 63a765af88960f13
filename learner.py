"""One step of learning on all processes at once: forward, backward, the gradient's norm, the update.

train.py runs it over the data, benchmark.py over made-up tokens.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

import optim
import parallel
from config import Config
from model import Transformer


class Learner:
    """A model and its optimizers, spread over the processes of a run, with weights to be filled in."""

    def __init__(self, cfg: Config, world: parallel.World, eot: int | None):
        self.cfg, self.world = cfg, world
        with torch.device("meta"):
            self.model = Transformer(cfg.model, eot)
        self.model.loss.z_loss = cfg.optim.z_loss
        optim.shrink_embedding_gradient(self.model, cfg.optim.embedding_gradient)
        self.wrapped = world.spread(self.model, cfg)
        self.optimizers = optim.optimizers(self.model, cfg.optim, cfg.model.mup_scale)

    def fill(self, values: Iterable[Tensor]) -> None:
        """Gives every parameter its value, whole ones in the order of the model's parameters."""
        for parameter, value in zip(self.model.parameters(), values, strict=True):
            parallel.put(parameter, value)
        self.world.alike(self.model)

    def gradients(self, batch: Tensor, n_tokens: int) -> Tensor:
        """Takes the gradient of the mean loss over the global batch, which has n_tokens targets.

        batch (b, T+1) is this process's share of it. Returns the sum of its losses, still on the device; the
        gradient is the same on all processes, or each has its shard of it.
        """
        nats = torch.zeros((), device=batch.device)
        micro_batches = batch.split(self.cfg.train.micro_batch_size)
        for i, rows in enumerate(micro_batches):
            with self.world.accumulate(self.wrapped, last=i == len(micro_batches) - 1):
                with parallel.autocast(self.world.device, self.world.dtype):
                    loss = self.wrapped(rows[:, :-1], rows[:, 1:])  # a sum over this micro-batch
                # Gradients are averaged over the copies: undo that.
                (loss * (self.world.dp_size / n_tokens)).backward()
            nats += loss.detach()
        return nats

    def norm(self) -> Tensor:
        """The gradient's global L2 norm, still on the device."""
        return optim.grad_norm(self.model)

    def update(self, lr: float, norm: float, limit: float) -> None:
        """Moves the weights by the gradient, clipped to `limit`, and forgets it."""
        optim.update(self.model, self.optimizers, lr, norm, limit)

    def forget(self) -> None:
        """Drops the gradient."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
