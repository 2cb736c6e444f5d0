"""A saved optimizer's state taken up where steps are computed otherwise."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

# Entries of a parameter group that say how steps are computed: they are the machine's, not the run's.
OWN = ("lr", "capturable", "foreach", "fused")


def load_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Take up a saved `state_dict`, computing steps as the optimizer did before.

    Learning rates have the saved values and stay tensors or numbers: a CUDA graph would keep a number for good.

    Raises:
        ValueError: where it is of another optimizer or other parameters.
    """
    if not isinstance(optimizer, Optimizer):  # it is made of several, and has each take up its own
        optimizer.load_state_dict(state)
        return
    own = [{name: group[name] for name in OWN if name in group} for group in optimizer.param_groups]
    saved = state["param_groups"]
    if len(saved) == len(own):  # else PyTorch says what is wrong
        state = {**state, "param_groups": [{**group, **mine} for group, mine in zip(saved, own)]}
    optimizer.load_state_dict(state)
    for group, mine, before in zip(optimizer.param_groups, own, saved):
        rate = float(before["lr"])
        group["lr"] = mine["lr"].fill_(rate) if isinstance(mine["lr"], Tensor) else rate
