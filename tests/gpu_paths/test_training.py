"""Whole training runs on fake CUDA: no host wait and no copy of unpinned memory in a step, everything on its device."""

from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from support_fakecuda import FakeCuda, fake_cuda
from support_train import tiny_config, tiny_dataset

from fastres.data import Split
from fastres.train import Trainer, build, evaluate, machine, trainer
from fastres.train.run_folder import RunFolder
from fastres.train.signals import StopRequest

CASES = {
    "plain": dict(backend="fused", precision="bf16", recompute=True, flip="alternating", cuda_graph=False),
    "unless told": dict(backend="fused", precision="bf16", cuda_graph=None),
    "graph": dict(backend="fused", precision="bf16", cuda_graph=True, ema=0.9, clip=1.0, image_size=16),
    "graphs": dict(
        backend="fused", precision="fp32", cuda_graph=True, progressive="8:0.5", accumulate=2, epochs=4, decoupled=False
    ),
    "muon": dict(backend="eager", precision="bf16", cuda_graph=True, optimizer="muon", muon_decay=0.1, epochs=3),
    "lamb": dict(backend="fused", precision="bf16", cuda_graph=True, optimizer="lamb", freeze="stem,layer1", epochs=3),
    "speed": dict(
        backend="fused", precision="bf16", cuda_graph=True, optimizer="muon", tta=True, cutout=3, flip="random",
        label_smoothing=0.1, epochs=3, model="speed", whiten=False,
    ),
}  # fmt: skip


def takes_graph(changes: dict) -> bool:
    """Whether a case's steps are graphs."""
    return changes.get("cuda_graph") is not False


@contextmanager
def on_fake_cuda(device: str, folder, **changes):
    """A trainer on a fake device; what reads values or writes files is left out, and steps are told from the rest.

    Yields:
        the fake devices, the trainer.
    """
    config, dataset = tiny_config(device=device, **{"model": "resnet8", **changes}), tiny_dataset()
    with fake_cuda(pick=1) as cuda, ExitStack() as stack:

        def patch(*args):
            stack.enter_context(mock.patch.object(*args))

        patch(RunFolder, "save", lambda *_: None)
        patch(RunFolder, "save_best", lambda *_: None)
        patch(evaluate.Tally, "means", lambda tally: (1.0, 0.5))  # an epoch's end waits, once
        patch(Trainer, "check_finite", lambda run: None)
        patch(RunFolder, "write_curves", lambda *_: None)
        patch(Split, "to", _split_on)
        patch(torch, "_fused_sgd_", _fused_sgd)
        patch(trainer, "WeightAverage", _average_of(config, dataset))
        yield cuda, Trainer(config, dataset, RunFolder(folder, resume=True), say=lambda line: None)


def _split_on(split, device):
    images = torch.empty(split.images.shape, dtype=torch.uint8, device=device)
    labels = torch.empty(split.labels.shape, dtype=torch.int64, device=device)
    return Split(images.contiguous(memory_format=torch.channels_last), labels)


def _fused_sgd(parameters, gradients, momenta, *, lr, **_):
    """PyTorch has no fake form of it; it asks that shapes, dtypes, devices and layouts agree."""
    for p, *rest in zip(parameters, gradients, momenta):
        for other in rest:
            assert (other.shape, other.dtype, other.device) == (p.shape, p.dtype, p.device)
            assert other.stride() == p.stride()
        assert not isinstance(lr, torch.Tensor) or lr.device == p.device


def _average_of(config, dataset):
    """`WeightAverage`, whose copy of the network is made anew: a fake tensor's storage cannot be copied."""
    real = trainer.WeightAverage

    def make(model, decay):
        device = next(model.parameters()).device
        with mock.patch("copy.deepcopy", lambda _: build.build_model(config, dataset, device)):
            return real(model, decay)

    return make


def in_steps(run: Trainer, cuda: FakeCuda) -> list[str]:
    """Train and validate epochs; what made the host wait in those of training but the first, which allocates."""
    found = []
    while run.step < run.total_steps:
        cuda.waits.clear()
        cuda.copies.clear()
        run._train_epoch(StopRequest())
        if run.epoch:
            found += cuda.waits + cuda.copies
        run._end_epoch(StopRequest())
    return found


@pytest.mark.parametrize("name", CASES)
def test_no_step_waits(name, tmp_path):
    changes = CASES[name]
    with on_fake_cuda("cuda", tmp_path, **changes) as (cuda, run):
        assert all(tensor.device.type == "cuda" for tensor in run.model.state_dict().values())
        assert in_steps(run, cuda) == []
        assert cuda.disagreements == []
        steps = run.total_steps
        shapes = 1 + ("progressive" in changes)
        assert (cuda.captures, cuda.replays) == ((shapes, steps - 3 * shapes) if takes_graph(changes) else (0, 0))
        assert cuda.streams == bool(cuda.captures)  # each has memory of its own


@pytest.mark.parametrize("name", ["plain", "graph"])
def test_a_second_device_runs_all_of_it(name, tmp_path):
    with on_fake_cuda("cuda:1", tmp_path, **{**CASES[name], "epochs": 2}) as (cuda, run):
        assert cuda.current == 1  # new streams and NCCL belong to it
        assert all(tensor.device == torch.device("cuda", 1) for tensor in run.model.state_dict().values())
        cuda.current = 0  # as another trainer or the user may have left it
        assert in_steps(run, cuda) == []
        assert cuda.devices() == {1} and cuda.current == 0


def test_evaluation_runs_on_the_networks_device():
    seen = []

    class Network(torch.nn.Linear):
        def forward(self, x):
            seen.append((x.device.index, torch.cuda.current_device()))
            return super().forward(x.flatten(1)[:, :4])

    with fake_cuda() as cuda, mock.patch.object(evaluate.Tally, "means", lambda tally: (1.0, 0.5)):
        network = Network(4, 10).to("cuda:1")
        batch = torch.zeros(2, 3, 4, 4, device="cuda:1"), torch.zeros(2, dtype=torch.int64, device="cuda:1")
        batches = mock.Mock(epoch=lambda epoch: iter([batch]))
        assert evaluate.evaluate(network, batches, torch.float32, None).accuracy == 0.5
        assert seen == [(1, 1)] and cuda.current == 0 and cuda.waits == []


def test_a_device_without_a_number_is_the_current_one():
    with fake_cuda() as cuda:
        for name, current in (("cuda:1", 1), ("cuda", 1), ("cpu", 1), ("cuda:0", 0)):
            machine.use_device(machine.pick_device(name))
            assert cuda.current == current
        with machine.on_device(torch.device("cuda", 1)):
            assert cuda.current == 1
        with machine.on_device(torch.device("cpu")):
            assert cuda.current == 0
