"""Every network's launches on fake CUDA tensors: arguments, grids, devices, candidates, and no wait."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from support_fakecuda import fake_cuda
from support_ops import Calls

from fastres import ops
from fastres.models import create_model
from fastres.models.fused import create_fused_model
from fastres.nn import fold, fuse
from fastres.ops.backends.triton import Triton, Way
from fastres.reference.preact import PreActResNet

SIZES = {"resnet50": 64, "notebook": 96}
OPTIONS = {"resnet50": {"stem": "imagenet"}, "resnet18": {"stem": "cifar"}}
CASES = [  # network, recompute, dtype, whose turn each timed choice is
    ("resnet50", False, torch.bfloat16, 0),
    ("resnet50", True, torch.float16, 1),
    ("resnet18", False, torch.float32, 2),
    ("resnet18", True, torch.bfloat16, 3),
    ("resnet20", False, torch.float16, 4),
    ("resnet20", True, torch.bfloat16, 1),
    ("preact", False, torch.bfloat16, 1),
    ("preact", False, torch.float32, 0),
    ("notebook", False, torch.bfloat16, 2),
    ("notebook", True, torch.float32, 1),
    ("speed", False, torch.float16, 1),
    ("speed", True, torch.bfloat16, 2),
]
GRADIENTS = {"conv_dgrad_kernel", "conv_wgrad_kernel"}
BLOCKS = {"conv_kernel", *GRADIENTS, "finalize_kernel", "bn_backward_coef_kernel"}


def network(name, recompute=False):
    """With the weights on the host; `preact` is 20 layers of the kind that has 164 and 1001."""
    if name == "preact":
        return fuse(PreActResNet(20), recompute)
    return create_fused_model(name, recompute=recompute, **OPTIONS.get(name, {}))


def images(name, device, count=2):
    size = SIZES.get(name, 32)
    return torch.randn(count, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)


def step(model, x, dtype):
    """Forward and backward; all parameters have a gradient afterwards."""
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        logits = model(x)
    F.cross_entropy(logits.float(), torch.randint(10, (len(x),), device=x.device)).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name, recompute, dtype, pick", CASES)
def test_training_and_inference(name, recompute, dtype, pick):
    model = network(name, recompute)
    folded = None if name == "preact" else fold(create_model(name, **OPTIONS.get(name, {})))
    with fake_cuda(pick) as cuda:
        model.to("cuda", memory_format=torch.channels_last)
        x = images(name, "cuda")
        step(model, x, dtype)
        assert cuda.kernels() >= BLOCKS
        with torch.no_grad(), torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            model.eval()(x)
            if folded is not None:
                copy.copy(folded).to("cuda", memory_format=torch.channels_last)(x)
        assert cuda.disagreements == [] and cuda.waits == [] and cuda.copies == [] and cuda.devices() == {0}
        assert {len(names) for names in cuda.choices.values()} >= {4, 9}  # of a convolution, and of its gradients


@pytest.mark.parametrize("mode", ["auto", "untimed", "triton"])
def test_launches_go_to_the_tensors_device(mode, monkeypatch):
    """In each way of choosing, whichever device is the current one; it is the current one again afterwards."""
    if mode == "untimed":
        monkeypatch.setenv("FASTRES_TIMED", "0")
    model = network("resnet20")
    with fake_cuda(1) as cuda, ops.implementation("triton" if mode == "triton" else "auto"):
        model.to("cuda:1", memory_format=torch.channels_last)
        step(model, images("resnet20", "cuda:1"), torch.bfloat16)
        assert cuda.devices() == {1} and cuda.current == 0
        assert bool(cuda.choices) == (mode == "auto")


def test_two_devices_in_turn():
    with fake_cuda(1) as cuda:
        for device in (1, 0, 1):
            model = network("resnet20").to(f"cuda:{device}", memory_format=torch.channels_last)
            cuda.launches.clear()
            step(model, images("resnet20", f"cuda:{device}"), torch.bfloat16)
            assert cuda.devices() == {device}


@pytest.mark.parametrize("name, norms, operations", [("resnet18", 20, 5), ("notebook", 15, 3)])
def test_small_work_is_a_launch_a_layer_each_way(name, norms, operations):
    """Of a training step with 256 images: statistics are merged at once, and what joins no other launch is a sum of
    parts at the end of an operation.
    """
    model = network(name)
    with fake_cuda() as cuda, ops.implementation("triton"):
        model.to("cuda", memory_format=torch.channels_last)
        with Calls() as calls:
            step(model, images(name, "cuda", 256), torch.bfloat16)
    found = Counter(launch.kernel for launch in cuda.launches)
    assert found["finalize_kernel"] == found["bn_backward_coef_kernel"] == norms
    assert not {"merge_kernel", "partial_sums_kernel"} & found.keys()
    assert found["sum_parts_kernel"] <= operations
    joined = [launch for launch in cuda.launches if launch.arguments.get("parts_ptr") is not None]
    assert len({launch.arguments["parts_ptr"] for launch in joined}) == len(joined) > norms - operations
    assert calls.found["_foreach_copy_"] == calls.found["cat"] == operations and calls.found["_to_copy"] < 10


@pytest.mark.parametrize("untimed", [False, True])
def test_turing_takes_the_librarys_convolutions(untimed, monkeypatch):
    """Triton has no tensor cores there: its convolutions are not even candidates."""
    if untimed:
        monkeypatch.setenv("FASTRES_TIMED", "0")
    model = network("resnet20")
    with fake_cuda(shared_memory=64 * 1024, capability=(7, 5)) as cuda:
        model.to("cuda", memory_format=torch.channels_last)
        step(model, images("resnet20", "cuda"), torch.float16)
        assert not {"conv_kernel", *GRADIENTS} & cuda.kernels() and "finalize_kernel" in cuda.kernels()
        assert not cuda.choices


def test_little_shared_memory_means_smaller_tiles():
    """Gradients of 3x3 convolutions, whose prologue reads two tensors, on an H100 and where there are 64 KiB."""
    model = network("resnet18")
    largest = {}
    for size in (227, 64):
        with fake_cuda(shared_memory=size * 1024) as cuda, ops.implementation(Triton(way=Way.ONCE)):
            model.to("cuda", memory_format=torch.channels_last)
            step(model, images("resnet18", "cuda", 256), torch.bfloat16)
        gradients = [launch.arguments for launch in cuda.launches if launch.kernel in GRADIENTS]
        largest[size] = max((a["BLOCK_M"], a["BLOCK_N"]) for a in gradients if a["KH"] == 3 and a["y_ptr"] is not None)
    assert largest[227] > largest[64], largest
