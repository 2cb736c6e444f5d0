"""Steps of eager PyTorch and of torch.compile with cuDNN, from the same model.

A convolution is three products, each the model's plain product of that size (`bench.machine.product`) that moves the
convolution's own tensors once; every other launch moves the bytes that `bench.traffic` counted at the memory's rate,
which favours the peer: no pass is slower than a copy. Channels of an image are padded to 8, as tensor cores want them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from bench import roofline
from bench.machine.chips import LAUNCH, Chip
from bench.machine.product import PLAIN, TUNED, Tile, product
from fastres.models import create_model

TINY = 1e-6  # s that the smallest kernel takes [A]
# The two ends of the range for a library's convolutions.
ENDS: dict[str, tuple[Tile, ...]] = {"tuned": TUNED, "plain": PLAIN}


class Convolution(NamedTuple):
    """A convolution of a batch; sizes in pixels, of the whole batch."""

    inputs: int
    outputs: int
    cin: int
    cout: int
    taps: int
    stride: int
    first: bool = False  # its input needs no gradient

    @property
    def moved(self) -> int:
        """Bytes of input, output and weight in 16 bits; of a pointwise input only the pixels that are read."""
        read = self.inputs // (self.stride**2 if self.taps == 1 else 1)
        return 2 * (read * self.cin + self.outputs * self.cout + self.cin * self.cout * self.taps)

    def seconds(self, direction: str, tiles: tuple[Tile, ...], arch: int, chip: Chip) -> float:
        """Of the quickest product. direction: "forward", "dgrad" or "wgrad"."""
        cin = math.ceil(self.cin / 8) * 8
        if direction == "wgrad":
            columns = cin * self.taps
            programs = math.ceil(self.cout / 128) * math.ceil(columns / 128)
            most = max(1, min(2 * chip.sms // programs, self.outputs // 512))
            found = [
                product(self.cout, columns, self.outputs, self.moved, tiles, arch, chip, splits).seconds
                + 2 * (splits > 1) * splits * 4 * self.cout * columns / chip.bandwidth
                for splits in sorted({most, max(1, most // 2)})
            ]
            return min(found)
        if direction == "forward":
            return product(self.outputs, self.cout, cin * self.taps, self.moved, tiles, arch, chip).seconds
        depth = max(self.cout, self.cout * self.taps // self.stride**2)  # of the taps that reach a pixel
        rows = self.outputs if self.taps == 1 else self.inputs
        zeros = 2 * (self.inputs - rows) * self.cin  # that a pointwise convolution with a stride writes in between
        return product(rows, cin, depth, self.moved + zeros, tiles, arch, chip).seconds


def convolutions(model: str, size: int, options: dict[str, Any], batch: int) -> list[Convolution]:
    """Those of a network, in order."""
    found: list[Convolution] = []

    def note(conv: nn.Conv2d, inputs: tuple, output: torch.Tensor) -> None:
        read, made = (batch * one.shape[2] * one.shape[3] for one in (inputs[0], output))
        taps = conv.kernel_size[0] * conv.kernel_size[1]
        found.append(Convolution(read, made, conv.in_channels, conv.out_channels, taps, conv.stride[0], not found))

    network = create_model(model, **options).to("meta")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    with torch.no_grad():
        network(torch.empty(1, 3, size, size, device="meta"))
    return found


def convolution_seconds(found: list[Convolution], end: str, arch: int, chip: Chip) -> float:
    """All products of a step. end: key of `ENDS`."""
    return sum(one.seconds(way, ENDS[end], arch, chip) for one in found for way in directions(one))


def directions(one: Convolution) -> Iterator[str]:
    """The products of a training step."""
    yield "forward"
    if not one.first:
        yield "dgrad"
    yield "wgrad"


def streaming_seconds(step: list[roofline.Launch], chip: Chip) -> float:
    """The launches of a counted step that are no convolutions."""
    return sum(
        launch.times * (max(launch.bytes / chip.bandwidth, TINY) + LAUNCH) for launch in step if not launch.flops
    )


def others_seconds(network: dict[str, Any], chip: Chip) -> float:
    """What a fused step launches beside Triton's kernels, of a network that `bench.traffic` counted."""
    total = 0.0
    for first, whole in network["stages"]:
        times = 1.0 if whole["counted"] == whole["blocks"] else (whole["blocks"] - 1) / (whole["counted"] - 1)
        for one, share in ((whole, times), (first, 1 - times)):
            moved = [call["loaded"] + call["stored"] for call in one["other"]]
            total += share * sum(max(count / chip.bandwidth, TINY) + LAUNCH for count in moved)
    return total
