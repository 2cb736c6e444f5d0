"""Whole fused networks against their eager originals."""

import copy
import io
import statistics

import pytest
import torch
import torchvision
from support_nets import SMALL, assert_same, perturbed, train_step, twins
from torch import nn

from fastres.models import model_names
from fastres.models.fused import create_fused_model
from fastres.nn import fold, fuse, unfuse

IMAGES = (4, 3, 33, 32)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_a_training_step_equals_eager(name, recompute):
    eager, fused = twins(name, recompute=recompute)
    x = torch.randn(IMAGES, dtype=torch.float64)
    assert_same(train_step(fused, x), train_step(eager, x), 1e-10)


@pytest.mark.parametrize("name", SMALL)
def test_evaluation_and_folding_equal_eager(name):
    eager, fused = twins(name)
    x = torch.randn(IMAGES, dtype=torch.float64)
    eager.eval(), fused.eval()
    with torch.no_grad():
        expected = eager(x)
        torch.testing.assert_close(fused(x), expected)
        for model in (eager, fused):
            torch.testing.assert_close(fold(model)(x), expected)


@pytest.mark.parametrize("name", SMALL)
def test_training_a_frozen_network_equals_eager(name):
    eager, fused = twins(name)
    eager.eval(), fused.eval()
    x = torch.randn(IMAGES, dtype=torch.float64)
    assert_same(train_step(fused, x), train_step(eager, x), 1e-10)


@pytest.mark.parametrize("name", ["cifar", "bottleneck", "notebook", "preact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_err_no_more_than_eagers(name, dtype):
    """Over a whole network, both in autocast for bf16, against fp64."""
    eager, fused = twins(name, torch.float32)
    exact = train_step(copy.deepcopy(eager).double(), x := torch.randn(16, 3, 32, 32).double())

    def errors(model):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            got = train_step(model, x.float(), lambda x: model(x).float())
        return {
            k: ((got[k].double() - v).norm() / v.norm().clamp_min(1e-9)).item()
            for k, v in exact.items()
            if v.is_floating_point()
        }

    # medians, as a ReLU whose input rounds to the other side of zero puts any one gradient off by 1e-3
    ours, theirs = (statistics.median(errors(model).values()) for model in (fused, eager))
    assert ours <= max(2 * theirs, 5e-6 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize(
    "name", [name for name in SMALL if name != "torchvision-dilated"]
)  # the graph of "torchvision"
@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "autocast"])
def test_compiles_whole(name, amp):
    _, fused = twins(name, torch.float32)
    compiled = copy.deepcopy(fused)
    # oneDNN 3.x without native bf16 reads uninitialised memory in small convolutions such as 3x2 pixels at stride 2
    x = torch.randn(4, 3, 64, 64) if name == "torchvision" else torch.randn(IMAGES)
    torch._dynamo.reset()
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        assert_same(
            train_step(compiled, x, lambda x: call(x).float()),
            train_step(fused, x, lambda x: fused(x).float()),
            5e-2 if amp else 1e-6,
        )


def test_compiles_whole_before_its_first_call():
    """Classes are then looked up while it is traced."""

    class Own(torchvision.models.ResNet):
        pass

    model = Own(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=2).eval()
    x = torch.randn(1, 3, 32, 32)
    fuse(model)
    torch._dynamo.reset()
    out = torch.compile(model, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(out, model(x), rtol=1e-4, atol=1e-4)


def test_compiles_with_inductor():
    _, fused = twins("cifar-plain", torch.float32)
    compiled, x = copy.deepcopy(fused), torch.randn(IMAGES)
    torch._dynamo.reset()
    call = torch.compile(compiled, fullgraph=True)
    assert_same(train_step(compiled, x, call), train_step(fused, x), 1e-5)


@pytest.mark.parametrize("name", ["cifar", "preact"])
def test_checkpointing_changes_neither_gradients_nor_statistics(name):
    _, fused = twins(name)
    checkpointed = copy.deepcopy(fused)
    checkpointed.checkpoint_every = 2
    x = torch.randn(IMAGES, dtype=torch.float64)
    assert_same(train_step(checkpointed, x), train_step(fused, x), 0)


def test_functional_call_with_other_parameters():
    eager, fused = twins("cifar")
    x = torch.randn(IMAGES, dtype=torch.float64)
    other = {name: p.detach() * 1.1 for name, p in eager.named_parameters()}
    expected = torch.func.functional_call(eager, other, (x,))
    torch.testing.assert_close(torch.func.functional_call(fused, other, (x,)), expected)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_fusing_keeps_every_object_name_and_memory(layout):
    model = SMALL["torchvision"]().to(memory_format=layout)
    modules, state = dict(model.named_modules()), list(model.state_dict())
    tensors = [id(t) for t in (*model.parameters(), *model.buffers())]
    assert fuse(model) is model
    assert all(module is modules[name] for name, module in model.named_modules())
    assert [id(t) for t in (*model.parameters(), *model.buffers())] == tensors
    assert list(model.state_dict()) == state
    assert model.layer1[0].conv2.weight.is_contiguous(memory_format=layout)
    assert fuse(model) is model
    assert type(unfuse(model)) is type(SMALL["torchvision"]())


def test_weights_interchange_with_torchvisions():
    eager, fused = twins("torchvision")
    fresh = fuse(SMALL["torchvision"]()).double()
    fresh.load_state_dict(eager.state_dict())
    back = SMALL["torchvision"]().double()
    back.load_state_dict(fresh.state_dict())
    x = torch.randn(IMAGES, dtype=torch.float64)
    with torch.no_grad():
        expected = eager.eval()(x)
        torch.testing.assert_close(fresh.eval()(x), expected)
        torch.testing.assert_close(back.eval()(x), expected)


def test_fused_networks_can_be_copied_and_saved_whole():
    _, fused = twins("notebook")
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = torch.randn(IMAGES, dtype=torch.float64)
    assert_same(train_step(loaded, x), train_step(copy.deepcopy(fused), x), 0)


def test_hooks_on_stages_and_blocks_run():
    _, fused = twins("torchvision")
    seen = []
    for name in ("layer3", "layer3.0"):
        fused.get_submodule(name).register_forward_hook(lambda module, inputs, out: seen.append(out.shape[1]))
    fused(torch.randn(IMAGES, dtype=torch.float64))
    assert seen == [1024, 1024]


def test_an_imagenet_head_can_be_replaced():
    eager, fused = twins("torchvision")
    eager.fc = fused.fc = nn.Identity()
    x = torch.randn(IMAGES, dtype=torch.float64)
    torch.testing.assert_close(fused(x), eager(x))


def test_activations_stay_channels_last_without_copies(monkeypatch):
    """Between blocks every NHWC view is contiguous already, whatever the layout of the images."""
    _, fused = twins("cifar", torch.float32)
    layouts = []
    for stage in (fused.layer1, fused.layer2, fused.layer3):
        for block in stage:
            block.register_forward_hook(
                lambda module, inputs, out: layouts.append(out.permute(0, 2, 3, 1).is_contiguous())
            )
    fused(torch.randn(IMAGES))
    assert len(layouts) == 6 and all(layouts)


@pytest.mark.parametrize("name", ["notebook", "resnet20", "resnet8", "resnet50"])
def test_every_registered_network_has_a_fused_form(name):
    with torch.device("meta"):
        model = create_fused_model(name)
    assert type(model).__module__ == "fastres.nn.networks"
    assert name in model_names()


def test_folded_networks_cannot_train():
    folded = fold(SMALL["cifar"]())
    with pytest.raises(RuntimeError, match="for inference only"):
        folded.train()


def test_folding_leaves_the_original_alone():
    model = perturbed(SMALL["cifar"]())
    state = copy.deepcopy(model.state_dict())
    fold(model)
    assert model.training and all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_nothing_to_fold():
    with pytest.raises(ValueError, match="Linear has nothing to fold"):
        fold(nn.Linear(2, 2))


def test_a_network_without_running_statistics_cannot_be_folded():
    model = SMALL["cifar"]()
    model.layer1[0].bn1 = nn.BatchNorm2d(8, track_running_stats=False)
    with pytest.raises(ValueError, match="without running statistics"):
        fold(model)
