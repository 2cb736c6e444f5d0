"""Networks of torchvision, timm and transformers: fused and folded they are what they were, and the docs say of them
what is.
"""

import copy
import statistics
from pathlib import Path

import pytest
import torch
from support_fused import relative_error
from support_libraries import BY_NAME, library, plain, row, timm, transformers
from support_nets import perturbed
from torch import nn

from fastres.nn import fold, fuse, report, unfuse
from fastres.nn.report import survey

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
pytestmark = pytest.mark.filterwarnings("ignore:Changing trainable_backbone_layers has no effect")


def twins(case):
    """An eager network of the case with random statistics, in training mode, and images for it."""
    torch.manual_seed(0)
    return perturbed(case.build(small=True)).train(), torch.randn(2, 3, 40, 36)


def step(model, case, x):
    """Results of a training step by name: what the network gives, every gradient, and the buffers after it."""
    torch.manual_seed(1)  # of paths that are dropped
    out = case.call(model, x)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype)).sum().backward()
    found = {"out": out.detach()}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: b.clone() for name, b in model.named_buffers() if b.is_floating_point()}


def assert_close(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name] - value).abs().max() <= tolerance * max(value.abs().max().item(), 1e-3), name


@pytest.mark.parametrize("name", BY_NAME)
def test_is_what_it_was(name):
    """A training step, evaluation and folding in fp64; names of the state_dict; and the way back."""
    case = BY_NAME[name]
    eager, x = twins(case)
    eager, x = eager.double(), x.double()
    if not survey(eager, planned=True).found:
        with pytest.raises(ValueError, match="no block to fuse"):
            fuse(eager)
        return
    model = fuse(copy.deepcopy(eager))
    assert report(model).fused_blocks == survey(eager, planned=True).fused_blocks
    assert_close(step(model, case, x), step(eager, case, x), 1e-8)
    assert list(model.state_dict()) == list(eager.state_dict())
    classes = [type(module) for module in eager.modules()]
    with torch.no_grad():
        expected = case.call(eager.eval(), x)
        torch.testing.assert_close(case.call(model.eval(), x), expected, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(case.call(fold(eager), x), expected, rtol=1e-8, atol=1e-8)
        assert [type(module) for module in unfuse(model).modules()] == classes
        torch.testing.assert_close(case.call(model, x), expected, rtol=1e-9, atol=1e-9)  # weights are channels-last now


REDUCED = [
    "torchvision: deeplabv3_resnet50", "torchvision: resnet_fpn_backbone, FrozenBatchNorm2d",
    "timm: resnet50, output_stride=8", "timm: resnet18d", "transformers: ResNetForImageClassification, bottleneck",
]  # fmt: skip


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", REDUCED)
def test_errs_no_more_than_eager(name, amp):
    """In the median over what a step gives, against fp64."""
    case = BY_NAME[name]
    eager, x = twins(case)
    exact = step(copy.deepcopy(eager).double(), case, x.double())
    errors = []
    for model in (fuse(copy.deepcopy(eager)), eager):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            found = step(model, case, x)
        errors.append(statistics.median(relative_error(found[key], value) for key, value in exact.items()))
    assert errors[0] <= max(2 * errors[1], 8e-3 if amp else 5e-6)


def test_the_page_says_what_happens():
    """Every row of docs/compatibility.md, and no other; those of libraries that are missing are not looked at."""
    lines = PAGE.read_text().splitlines()
    written = {tuple(cell.strip() for cell in line.split("|")[1:3]): line for line in lines if line.startswith("| ")}
    assert len(written) == len(BY_NAME) + 2  # and the head
    for case in BY_NAME.values():
        line = written[case.library, case.network]
        try:
            expected = row(case)
        except pytest.skip.Exception:
            continue
        assert line == expected


def test_drop_path_is_left_eager_in_training_alone(caplog):
    model = timm("resnet18", drop_path_rate=0.5)(small=True)
    left = survey(model, planned=True).left
    assert "layer2.0" in left and all("DropPath" in reason for reason in left.values())
    model = fuse(model)
    assert report(model).left == left
    assert report(model.eval()).fused_blocks == report(model).blocks
    eager = unfuse(copy.deepcopy(model))
    x = torch.randn(4, 3, 32, 32)
    for mode in (True, False):
        outs = []
        for one in (model, eager):
            torch.manual_seed(3)
            outs.append(plain(one.train(mode), x).detach())
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)


def test_timms_switches_after_fuse():
    """Checkpointing, dropout before the classifier and another head are as eager's, whenever they are switched on."""
    model = timm("resnet18")(small=True).double()
    fused, x = fuse(copy.deepcopy(model)), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for one in (model, fused):
        torch.manual_seed(5)
        one.set_grad_checkpointing(True)
        one.drop_rate = 0.5
        one.reset_classifier(4, global_pool="max")
    fused.load_state_dict(model.state_dict())
    case = BY_NAME["timm: resnet18"]
    ours, theirs = step(fused.double(), case, x), step(model.double(), case, x)
    assert ours["out"].numel() == 8
    assert_close(*({k: v for k, v in found.items() if "running" not in k} for found in (ours, theirs)), 1e-8)


@pytest.mark.parametrize(
    "part", ["embedder.embedder", "encoder.stages.1.layers.0.layer.1", "encoder.stages.1.layers.0.shortcut"]
)
def test_hooks_inside_transformers_layers_run(part):
    model = fuse(transformers("ResNetModel")()).eval()
    x, seen = torch.randn(1, 3, 32, 32), []
    expected = unfuse(copy.deepcopy(model))(x).pooler_output
    model.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(x).pooler_output, expected, rtol=1e-4, atol=1e-4)
    assert seen == [1]


def test_a_shortcut_without_a_kernel_in_transformers_layers_is_called():
    """Its pair of convolution and BatchNorm is looked at as all others are."""
    model = transformers("ResNetModel")().double().eval()
    block = model.encoder.stages[1].layers[0]
    block.shortcut.convolution = nn.Conv2d(32, 64, 1, 2, bias=True).double()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    expected = model(x).pooler_output
    for made in (fuse(copy.deepcopy(model)), fold(model)):
        torch.testing.assert_close(made(x).pooler_output, expected, rtol=1e-9, atol=1e-9)


def test_transformers_own_message_for_channels():
    library("transformers")
    with pytest.raises(ValueError, match="channel dimension of the pixel values match"):
        fuse(transformers("ResNetModel")())(torch.randn(1, 4, 32, 32))


def test_a_class_that_was_patched_before_is_not_known_by_its_name():
    """Its forward is another than the library's."""
    timm_resnet = library("timm.models.resnet")
    namespace = {"__module__": "timm.models.resnet", "forward": lambda self, x: x}
    patched = type("BasicBlock", (nn.Module,), namespace)
    assert timm_resnet.BasicBlock is not patched
    block = patched()
    block.conv1, block.bn1 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    assert survey(block, planned=True).blocks == 0
