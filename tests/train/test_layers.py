"""Layers of a network: their rates, and those that stay as they are."""

import pytest
import torch
from support_train import same_weights, tiny_trainer

from fastres.errors import FastresError
from fastres.models import create_model, model_names
from fastres.train.layers import Frozen, depths, head_name, layers
from fastres.train.optimizer import make_optimizer


@pytest.mark.parametrize("name", sorted(set(model_names()) - {"resnet1202", "preact_resnet1001"}))
def test_every_parameter_is_of_one_layer(name):
    with torch.device("meta"):
        model = create_model(name)
    found = layers(model)
    assert found[0][0] == "conv1" and found[-1] == [head_name(model)] == ["fc"]
    assert depths(model).keys() == {id(p) for p in model.parameters()}
    assert set(depths(model).values()) == set(range(len(found)))


def test_layers_of_resnet18():
    with torch.device("meta"):
        model = create_model("resnet18")
    assert (
        layers(model)[:3] == [["conv1", "bn1", "relu", "maxpool"], ["layer1.0"], ["layer1.1"]]
        and len(layers(model)) == 10
    )


def test_rates_fall_from_the_head_to_the_stem():
    model = create_model("resnet8")
    optimizer = make_optimizer(
        model, 0.5, 0.9, True, 1e-3, False, bias_lr=4.0, layer_decay=0.1, depths=depths(model)
    )  # fmt: skip
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    for name, behind in {
        "fc.weight": 0,
        "layer3.0.conv1.weight": 1,
        "layer1.0.bn2.weight": 3,
        "conv1.weight": 4,
    }.items():
        assert rates[id(model.get_parameter(name))] == pytest.approx(0.5 * 0.1**behind)
    assert rates[id(model.get_parameter("layer3.0.bn1.bias"))] == pytest.approx(4 * 0.05)
    decays = {id(p): group["decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(model.fc.weight)] == 1e-3 and decays[id(model.bn1.weight)] == 0.0


@pytest.mark.parametrize("backend", ["eager", "fused"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_frozen_parts_stay_to_the_bit(tmp_path, backend, optimizer):
    run = tiny_trainer(
        tmp_path,
        model="resnet8",
        freeze="stem, layer1",
        backend=backend,
        optimizer=optimizer,
        lr=1e-2,
        clip=1.0,
        ema=0.9,
    )
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.fit()
    after = run.model.state_dict()
    for name in before:
        if name.endswith("num_batches_tracked"):
            continue
        still = name.startswith(("conv1", "bn1", "layer1"))
        assert torch.equal(before[name], after[name]) is still, name
        assert torch.allclose(before[name], run.average.module.state_dict()[name], rtol=1e-6, atol=0) is still, name
    assert not any(
        p.grad is not None for name, p in run.model.named_parameters() if name.startswith(("conv1", "layer1"))
    )


def test_fused_and_eager_learn_the_same_behind_frozen_parts(tmp_path):
    losses = {}
    for backend in ("eager", "fused"):
        run = tiny_trainer(tmp_path / backend, model="resnet8", freeze="layer1,layer2.0", backend=backend, steps=4)
        losses[backend] = run.fit()[-1]["train_loss"]
    assert losses["fused"] == pytest.approx(losses["eager"], rel=1e-3)


def test_the_backbone_is_all_but_the_head(tmp_path):
    run = tiny_trainer(tmp_path, model="resnet20", freeze="backbone")
    assert [name for name, p in run.model.named_parameters() if p.requires_grad] == ["fc.weight", "fc.bias"]
    before = {name: value.clone() for name, value in run.model.state_dict().items() if not name.startswith("fc")}
    run.fit()
    after = run.model.state_dict()
    assert same_weights(before, {name: after[name] for name in before})


@pytest.mark.parametrize(
    "parts, words",
    [
        ("layer9", "'layer9' is no part of the network: did you mean layer"),
        ("stem,", "'' is no part of the network: .*choose from stem, backbone, conv1, bn1, layer1"),
        ("backbone,fc", "leaves nothing to be trained: leave the head, fc, out"),
    ],
)
def test_parts_that_there_are_not(parts, words):
    with pytest.raises(FastresError, match=words):
        Frozen(create_model("resnet8"), parts)
