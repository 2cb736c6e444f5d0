"""What traces, transforms, wraps or copies modules: with fused and folded networks as with eager ones, or a clear
error.
"""

import copy
import io
import pickle

import pytest
import torch
import torchvision
from support_nets import assert_same, perturbed, train_step
from torch import nn
from torch.autograd import forward_ad
from torch.optim.swa_utils import AveragedModel
from torchvision import tv_tensors
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock

from fastres.nn import fold, fuse, report, unfuse
from fastres.nn.classes import Fused
from fastres.reference.preact import PreActResNet

X = (2, 3, 33, 32)


def network(blocks=(1, 2, 1, 1)):
    torch.manual_seed(0)
    return perturbed(torchvision.models.ResNet(BasicBlock, list(blocks), num_classes=3)).double()


@pytest.fixture
def twins():
    return network().eval(), fuse(network()).eval()


@pytest.fixture(params=["fused", "folded", "preactivation", "folded preactivation"])
def pair(request):
    """An eager network and what was made of it, in evaluation mode."""
    eager = perturbed(PreActResNet(11)).double() if "preact" in request.param else network()
    return eager.eval(), (fold if "folded" in request.param else fuse)(copy.deepcopy(eager).eval())


def images():
    torch.manual_seed(1)
    return torch.randn(X, dtype=torch.float64)


def test_symbolic_tracing(pair):
    eager, model = pair
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(images()), eager(images()))


def test_a_feature_extractor_returns_what_eagers_does(twins):
    nodes = ["relu", "layer2.1.relu", "layer3", "avgpool"]
    theirs, ours = (create_feature_extractor(model, nodes)(images()) for model in twins)
    assert_same(ours, theirs, 1e-10)


def test_jit_trace(pair):
    eager, model = pair
    x = images()
    traced = torch.jit.trace(model, x)
    assert "fastres::" not in str(traced.inlined_graph) and "PythonOp" not in str(traced.inlined_graph)
    assert "aten::_convolution" in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), eager(x))


def test_jit_script_names_the_remedy(twins):
    eager, fused = twins
    with pytest.raises(RuntimeError, match=r"fastres.nn.unfuse\(model\) first"):
        torch.jit.script(fused)
    torch.testing.assert_close(torch.jit.script(unfuse(fused))(images()), eager(images()))


def test_functional_transforms(pair):
    eager, model = pair
    x, v = images(), torch.ones(X, dtype=torch.float64)
    for transform in (
        lambda f: torch.func.grad(lambda x: f(x).square().sum())(x),
        lambda f: torch.func.jvp(f, (x,), (v,))[1],
        lambda f: torch.func.vmap(f)(x[None])[0],
        lambda f: torch.func.jacrev(lambda x: f(x).sum(0))(x[:, :, :20, :20]),
    ):
        torch.testing.assert_close(transform(model), transform(eager))


def test_hessian_of_a_part(twins):
    x = torch.randn(1, 64, 3, 3, dtype=torch.float64)
    theirs, ours = (torch.func.hessian(lambda x, m=m: m.layer1(x).square().sum())(x) for m in twins)
    torch.testing.assert_close(ours, theirs)


def test_forward_mode(pair):
    eager, model = pair
    with forward_ad.dual_level():
        x = forward_ad.make_dual(images(), torch.ones(X, dtype=torch.float64))
        theirs, ours = (forward_ad.unpack_dual(m(x)).tangent for m in (eager, model))
    torch.testing.assert_close(ours, theirs)


def test_gradients_with_respect_to_images(pair):
    eager, model = pair
    grads = []
    for m in (eager, model):
        x = images().requires_grad_()
        m(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0])


def test_onnx_export_of_a_fused_network(twins):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    eager, fused = (model.float() for model in twins)
    program = torch.onnx.export(fused, (images().float(),), dynamo=True, verbose=False)
    kinds = {node.op_type for node in program.model_proto.graph.node}
    assert "Conv" in kinds and {node.domain for node in program.model_proto.graph.node} == {""}


def test_tensor_subclasses_and_function_modes(twins):
    class Counting(torch.overrides.TorchFunctionMode):
        convolutions = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.convolutions += "conv2d" in getattr(function, "__name__", "")
            return function(*args, **(kwargs or {}))

    eager, fused = twins
    image = tv_tensors.Image(images())
    torch.testing.assert_close(fused(image), eager(image))
    counts = []
    for model in twins:
        with Counting() as mode:
            model(images())
        counts.append(mode.convolutions)
    assert counts[0] == counts[1] > 0
    with torch.device("cpu"):  # such a mode changes no call
        fused(images())


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: AveragedModel(m).module],
    ids=["deepcopy", "pickle", "average"],
)
def test_copies_are_fused_and_unfuse(copied):
    eager, fused = network(), fuse(network())
    again = copied(fused)
    assert type(again) is type(fused) and not report(again).left
    expected = train_step(eager, images())
    assert_same(train_step(again, images()), expected, 1e-9)
    assert [type(m) for m in unfuse(again).modules()] == [type(m) for m in eager.modules()]


class Net(torchvision.models.ResNet):
    """A subclass that changes nothing in the forward."""

    def __init__(self):
        super().__init__(Unit, [1, 1, 1, 1], num_classes=2)


class Unit(BasicBlock):
    """The same of a block."""


def test_subclasses_that_keep_the_forward_are_fused_saved_and_unfused():
    torch.manual_seed(0)
    eager = perturbed(Net()).double()
    fused, file = fuse(copy.deepcopy(eager)), io.BytesIO()
    assert str(report(fused)) == "Net: fused 4 of 4 blocks, 1 stem, 1 head"
    torch.save(fused, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, Net) and isinstance(loaded, Fused)
    assert_same(train_step(loaded, images()), train_step(eager, images()), 1e-9)
    unfuse(loaded)
    assert type(loaded) is Net and type(loaded.layer1[0]) is Unit


def test_deferred_initialisation():
    with torch.device("meta"):
        fused = fuse(torchvision.models.ResNet(BasicBlock, [1, 2, 1, 1], num_classes=3)).double()
    fused.to_empty(device="cpu").load_state_dict(network().state_dict())
    assert_same(train_step(fused, images()), train_step(network(), images()), 1e-9)
    with torch.device("meta"):
        fused = fuse(torchvision.models.ResNet(BasicBlock, [1, 2, 1, 1], num_classes=3)).double()
    fused.load_state_dict(network().state_dict(), assign=True)
    assert_same(train_step(fused, images()), train_step(network(), images()), 1e-9)


def test_conversions_and_swapped_tensors():
    fused = fuse(network().float())
    for convert in (nn.Module.half, nn.Module.double):
        convert(fused)
    eager = network().float().half().double()
    assert_same(train_step(fused, images()), train_step(eager, images()), 1e-9)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        fused.float().double(), eager.float().double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_same(train_step(fused, images()), train_step(eager, images()), 1e-9)


def test_wrapped_networks_are_fused_and_unfused():
    eager, x = network(), images()
    expected = train_step(eager, x)["logits"]
    for wrap in (nn.DataParallel, lambda m: torch.compile(m, backend="eager")):
        model = wrap(network())
        fuse(model)
        assert sum(isinstance(m, Fused) for m in model.modules()) > 5
        torch.testing.assert_close(model(x), expected)
        unfuse(model)
        assert not any(isinstance(m, Fused) for m in model.modules())
        torch.testing.assert_close(model(x), expected)


def test_replicas_of_data_parallel_compute_the_same():
    """A replica's parameters are plain attributes, so it runs eagerly."""
    fused = fuse(network())
    block = fused.layer2[1]
    replica = block._replicate_for_data_parallel()
    for name, child in block.named_children():
        twin = child._replicate_for_data_parallel()
        for key, value in child._parameters.items():
            setattr(twin, key, None if value is None else value * 1)
        replica._modules[name] = twin
    x = torch.randn(2, 128, 5, 5, dtype=torch.float64)
    block.eval(), [child.eval() for child in replica._modules.values()]
    torch.testing.assert_close(replica(x), block(x))


def test_a_method_that_was_kept_before_unfusing_is_the_eager_one(twins):
    eager, fused = twins
    kept = fused.forward, fused.layer1[0].forward
    unfuse(fused)
    torch.testing.assert_close(kept[0](images()), eager(images()))
    y = torch.randn(1, 64, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(kept[1](y), eager.layer1[0](y))


def test_offloaded_weights():
    accelerate = pytest.importorskip("accelerate")
    eager, fused = network().eval(), fuse(network().eval())
    accelerate.cpu_offload(fused, execution_device=torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(fused(images()), eager(images()))
