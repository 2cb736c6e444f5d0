"""Operations of a bottleneck's training step, each by every implementation that this machine has."""

import pytest
import torch

from bench.layer_calls import bottleneck_calls, implementations

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = [f"{op} {layer}" for layer in ("1x1 in", "3x3", "1x1 out") for op in ("conv", "conv_backward")]
NAMES += ["bn_add_relu", "bn_add_relu_backward", "moments"]


@pytest.mark.parametrize("candidate", [*implementations(DEVICE), "bare convolution"])
@pytest.mark.parametrize("name", NAMES)
def test_operation(name, candidate, setting, measured):
    batch = setting.pick(256, 4, 2)
    calls = bottleneck_calls(batch, 28, 128, setting.device, setting.dtype)
    call = next(call for call in calls if call.name == name)
    if candidate not in call.candidates:
        pytest.skip(f"{candidate} has no {name}")
    measured(call.candidates[candidate], flops=call.flops, bytes=call.bytes)
