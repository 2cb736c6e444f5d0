"""Networks of other libraries, small, with what of them is fused: the rows of docs/compatibility.md."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import detection, segmentation
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from fastres.nn.report import survey


class Case(NamedTuple):
    """A network of a library."""

    library: str
    network: str  # as the page calls it
    build: Callable[..., nn.Module]  # with small=True of fewer blocks, where the library lets one say so
    call: Callable[[nn.Module, Tensor], Tensor]  # all of the result in one tensor


def tensors(result) -> list[Tensor]:
    """Those of a nest, in order."""
    if isinstance(result, Tensor):
        return [result]
    values = result.values() if isinstance(result, dict) else result
    return [tensor for value in values if value is not None for tensor in tensors(value)]


def joined(result) -> Tensor:
    """All of a result in one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors(result)])


def plain(model: nn.Module, x: Tensor) -> Tensor:
    """The forward of a batch."""
    return joined(model(x))


def features(model: nn.Module, x: Tensor) -> Tensor:
    """timm's ``forward_features``."""
    return joined(model.forward_features(x))


def hidden_states(model: nn.Module, x: Tensor) -> Tensor:
    """transformers' states between the stages too."""
    return joined(model(pixel_values=x, output_hidden_states=True).to_tuple())


def library(name: str):
    """The module; the test is skipped where it is not installed."""
    return pytest.importorskip(name, reason=f"{name} is a test extra, and only its own networks are tried with it")


def timm(name: str, **options) -> Callable[..., nn.Module]:
    """A timm network of 10 classes, at random."""

    def build(small: bool = False):
        fewer = {"layers": (1, 2, 1, 1)} if small else {}
        return library("timm").create_model(name, pretrained=False, num_classes=10, **options, **fewer)

    return build


def transformers(name: str, **options) -> Callable[..., nn.Module]:
    """A transformers ResNet of a configuration made here."""
    sizes = dict(embedding_size=16, hidden_sizes=[32, 64, 64, 96], depths=[1, 2, 1, 1], num_labels=10)

    def build(small: bool = False):
        module = library("transformers")
        return getattr(module, name)(module.ResNetConfig(**{**sizes, **options}))

    return build


def resnet(block: str, depths: list[int], **options) -> Callable[..., nn.Module]:
    """A torchvision ResNet of few blocks."""
    kind = getattr(torchvision.models.resnet, block)
    return lambda small=False: torchvision.models.ResNet(kind, depths, num_classes=10, **options)


def segmenting(name: str) -> Callable[..., nn.Module]:
    """A torchvision segmentation network, nothing downloaded; its heads drop nothing, so that twins agree."""

    def build(small: bool = False):
        model = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=3)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model

    return build


def detecting(name: str) -> Callable[..., nn.Module]:
    """The backbone with FPN of a torchvision detector."""
    build = getattr(detection, name)
    return lambda small=False: (
        build(weights=None, weights_backbone=None, num_classes=3, trainable_backbone_layers=5).backbone
    )


def frozen_backbone(small: bool = False) -> nn.Module:
    return resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=torchvision.ops.FrozenBatchNorm2d, trainable_layers=5
    )


def sliced(small: bool = False) -> nn.Module:
    return nn.Sequential(*list(torchvision.models.resnet18().children())[:-2])


def layer_getter(small: bool = False) -> nn.Module:
    return IntermediateLayerGetter(torchvision.models.resnet18(), {"layer2": "a", "layer4": "b"})


def reset(model: nn.Module) -> nn.Module:
    model.reset_classifier(7, global_pool="catavgmax")
    return model


def standardised(small: bool = False) -> nn.Module:
    return timm("resnetv2_50", conv_layer=library("timm.layers").StdConv2d)(small)


CASES = [
    Case("torchvision", "resnet18", resnet("BasicBlock", [2, 2, 2, 2]), plain),
    Case("torchvision", "wide_resnet50_2", resnet("Bottleneck", [1, 1, 1, 1], width_per_group=128), plain),
    Case("torchvision", "resnext50_32x4d", resnet("Bottleneck", [1, 1, 1, 1], groups=32, width_per_group=4), plain),
    Case("torchvision", "nn.Sequential of all but resnet18's head", sliced, plain),
    Case("torchvision", "IntermediateLayerGetter of resnet18", layer_getter, plain),
    Case("torchvision", "fcn_resnet50", segmenting("fcn_resnet50"), plain),
    Case("torchvision", "deeplabv3_resnet50", segmenting("deeplabv3_resnet50"), plain),
    Case("torchvision", "resnet_fpn_backbone, FrozenBatchNorm2d", frozen_backbone, plain),
    Case("torchvision", "backbone of fasterrcnn_resnet50_fpn", detecting("fasterrcnn_resnet50_fpn"), plain),
    Case("torchvision", "backbone of retinanet_resnet50_fpn", detecting("retinanet_resnet50_fpn"), plain),
    Case("timm", "resnet18", timm("resnet18"), plain),
    Case("timm", "resnet34, forward_features", timm("resnet34"), features),
    Case("timm", "resnet50", timm("resnet50"), plain),
    Case("timm", "resnet50, output_stride=8", timm("resnet50", output_stride=8), plain),
    Case("timm", "resnet18d", timm("resnet18d"), plain),
    Case("timm", "resnet50d", timm("resnet50d"), plain),
    Case("timm", "wide_resnet50_2", timm("wide_resnet50_2"), plain),
    Case("timm", "resnet18, features_only", timm("resnet18", features_only=True), plain),
    Case(
        "timm", "resnet18, reset_classifier(7, 'catavgmax')", lambda small=False: reset(timm("resnet18")(small)), plain
    ),
    Case("timm", "resnet18, global_pool='avgmax'", timm("resnet18", global_pool="avgmax"), plain),
    Case("timm", "resnet18, drop_path_rate=0.1", timm("resnet18", drop_path_rate=0.1), plain),
    Case("timm", "seresnet50", timm("seresnet50"), plain),
    Case("timm", "resnetblur50", timm("resnetblur50"), plain),
    Case("timm", "resnext50_32x4d", timm("resnext50_32x4d"), plain),
    Case("timm", "resnetv2_50 (BatchNormAct2d)", timm("resnetv2_50"), plain),
    Case("timm", "resnetv2_50d", timm("resnetv2_50d"), plain),
    Case("timm", "resnetv2_34", timm("resnetv2_34"), plain),
    Case("timm", "resnetv2_50, features_only", timm("resnetv2_50", features_only=True), plain),
    Case("timm", "resnetv2_50, drop_path_rate=0.1", timm("resnetv2_50", drop_path_rate=0.1), plain),
    Case("timm", "resnetv2_50, preact=False", timm("resnetv2_50", preact=False), plain),
    Case("timm", "resnetv2_50d, preact=False", timm("resnetv2_50d", preact=False), plain),
    Case("timm", "resnetv2_50d_gn", timm("resnetv2_50d_gn"), plain),
    Case("timm", "resnetv2_50, conv_layer=StdConv2d", standardised, plain),
    Case("timm", "resnet50_gn", timm("resnet50_gn"), plain),
    Case(
        "transformers",
        "ResNetForImageClassification, bottleneck",
        transformers("ResNetForImageClassification"),
        hidden_states,
    ),
    Case(
        "transformers",
        "ResNetForImageClassification, basic",
        transformers("ResNetForImageClassification", layer_type="basic"),
        hidden_states,
    ),
    Case("transformers", "ResNetModel", transformers("ResNetModel", downsample_in_bottleneck=True), hidden_states),
    Case(
        "transformers",
        "ResNetBackbone",
        transformers("ResNetBackbone", out_features=["stage2", "stage4"]),
        lambda model, x: joined(model(x).feature_maps),
    ),
]
BY_NAME = {f"{case.library}: {case.network}": case for case in CASES}


def row(case: Case) -> str:
    """The line of the page's table."""
    found = survey(case.build(), planned=True)
    fused = str(found).split(": fused ", 1)[1].split("; left ")[0] if found.found else "nothing"
    return f"| {case.library} | {case.network} | {fused} | {found.reasons() if found.left else ''} |"


def version(name: str) -> str:
    """Of an installed library."""
    return importlib.import_module(name).__version__


if __name__ == "__main__":
    for case in CASES:
        print(row(case))
