"""Exponential moving average of a network's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class WeightAverage:
    """A copy of a network that follows it: ``average = decay * average + (1 - decay) * weights`` after each step.

    Running statistics are averaged as the weights are; integer buffers are copied. The first update copies all, so
    the initial weights have no part in the average. Unlike with ``torch.optim.swa_utils.AveragedModel`` an update never
    makes the host wait for a GPU, and a CUDA graph can hold it.

    Args:
        model: network on its final device.
        decay: share of the former average that an update keeps, in [0, 1].
    """

    def __init__(self, model: nn.Module, decay: float):
        self.module, self.decay, self.started = copy.deepcopy(model).requires_grad_(False), decay, False
        pairs = list(zip(self.module.state_dict().values(), model.state_dict().values()))
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._others = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Take the network's present weights into the average."""
        averages, weights = zip(*self._floats)
        if self.started:
            torch._foreach_lerp_(averages, weights, 1 - self.decay)
        else:
            torch._foreach_copy_(averages, weights)
        for average, value in self._others:
            average.copy_(value)
        self.started = True

    def state_dict(self) -> dict:
        """What a resumed run needs."""
        return {"weights": self.module.state_dict(), "started": self.started}

    def load_state_dict(self, state: dict) -> None:
        """Take up a saved `state_dict`, in place."""
        self.module.load_state_dict(state["weights"])
        self.started = state["started"]
