"""One update: nothing in it waits for the device, and a CUDA graph of it learns the same."""

import dataclasses
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from support_train import NoWait, same_weights, tiny_config, tiny_trainer

from bench import stand_ins
from fastres import ops
from fastres.errors import FastresError
from fastres.ops.graphs import is_one_graph
from fastres.train import graph, machine
from fastres.train.evaluate import all_finite
from fastres.train.signals import StopRequest
from fastres.train.update import GraphedUpdate


@pytest.mark.parametrize(
    "changes",
    [
        dict(ema=0.9, clip=1.0, accumulate=2, cutout=3, progressive="8:0.5", bias_lr=4.0),
        dict(optimizer="muon", precision="bf16"),
        dict(flip="random", decoupled=False, label_smoothing=0.1),
    ],
)
def test_no_wait_inside_an_epoch(tmp_path, monkeypatch, changes):
    run = tiny_trainer(tmp_path, **changes)
    run._train_epoch(StopRequest())
    run._end_epoch(StopRequest())
    checks = []
    monkeypatch.setattr(run, "check_finite", lambda: checks.append(run.batch))
    with NoWait() as waits:
        run._train_epoch(StopRequest())
    assert waits.seen == [] and checks == [0, 1, 2, 3, 4, 5, 6]  # on a GPU the last one alone


def test_the_check_of_all_weights_is_one_wait():
    tensors = [torch.randn(3, 4), torch.full((2,), 3e38), torch.zeros(5)]
    with NoWait() as waits:
        assert all_finite(tensors)
    assert waits.seen == ["_local_scalar_dense"]
    for bad in (float("nan"), float("inf")):
        assert not all_finite([*tensors, torch.tensor([0.0, bad])])


def test_learning_rates_as_tensors_are_the_same_numbers(tmp_path):
    numbers, tensors = tiny_trainer(tmp_path / "a"), tiny_trainer(tmp_path / "b")
    for group in tensors.optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    for run in (numbers, tensors):
        run.fit()
    assert all(isinstance(group["lr"], torch.Tensor) for group in tensors.optimizer.param_groups)
    for a, b in zip(numbers.model.parameters(), tensors.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a device that is absent")
def test_a_graph_needs_a_gpu(tmp_path):
    with pytest.raises(FastresError, match="--cuda-graph needs a CUDA device, not cpu"):
        tiny_trainer(tmp_path, cuda_graph=True)


@pytest.mark.parametrize(
    "graphed, changes, ranks",
    [(True, {}, 1), (False, {}, 2), (False, dict(precision="fp16"), 1), (False, dict(compile=True), 1),
     (False, dict(checkpoint_every=2), 1), (False, dict(model="timm/resnet50"), 1), (False, dict(device="cpu"), 1),
     (False, dict(cuda_graph=False), 1), (True, dict(cuda_graph=True, compile=True), 1)],
    ids=str,
)  # fmt: skip
def test_a_step_is_a_graph_where_that_is_known_to_be_right(graphed, changes, ranks):
    config = dataclasses.replace(tiny_config(device="cuda"), **changes)
    dtype = torch.float16 if config.precision == "fp16" else torch.bfloat16
    assert machine.takes_graph(config, torch.device(config.device), dtype, ranks) == graphed


@pytest.mark.parametrize("dtype, ranks, wrong", [(torch.float16, 1, "loss scaling"), (torch.bfloat16, 2, "ranks")])
def test_a_graph_is_refused_where_it_cannot_be(dtype, ranks, wrong):
    with pytest.raises(FastresError, match=wrong):
        machine.takes_graph(tiny_config(cuda_graph=True), torch.device("cuda"), dtype, ranks)


def test_warm_up_and_recording_share_a_stream(monkeypatch):
    """Each stream has its own pool of memory."""
    made, ran, current = [], [], ["default"]

    class Stream(SimpleNamespace):
        def wait_stream(self, other):
            pass

    @contextmanager
    def running_on(stream, **_):
        before, current[0] = current[0], stream
        yield
        current[0] = before

    def stream(device):
        made.append(Stream(device=device))
        return made[-1]

    for name, new in {
        "Stream": stream,
        "stream": running_on,
        "graph": lambda graph, stream: running_on(stream),
        "current_stream": lambda: Stream(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: ran.append("replay")),
    }.items():
        monkeypatch.setattr(torch.cuda, name, new)
    side = graph.side_stream(torch.device("cuda:1"))
    for _ in range(2):
        with graph.aside(side):
            ran.append(current[0])
            assert is_one_graph()
    replay, result = graph.record(lambda: ran.append(current[0]) or (5, is_one_graph()), side)
    assert current == ["default"] and result == (5, True) and not is_one_graph()
    replay()
    assert made == [side] and side.device == torch.device("cuda:1") and ran == [side, side, side, "replay"]


@pytest.mark.parametrize("changes", [dict(ema=0.9, clip=1.0), dict(progressive="8:0.5", accumulate=2)], ids=str)
def test_a_stand_in_for_the_graph_learns_the_same(tmp_path, changes):
    """The rule that picks warm-up, recording and replay; the graph itself needs a GPU."""
    plain, graphed = (tiny_trainer(tmp_path / name, epochs=3, **changes) for name in ("plain", "graphed"))
    graphed.learn = GraphedUpdate(graphed.update)
    with stand_ins.on_a_cpu():
        for run in (plain, graphed):
            run.fit()
    assert len(graphed.learn._recorded) == 1 + ("progressive" in changes)
    assert same_weights(plain.model.state_dict(), graphed.model.state_dict())


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "fused"])
@pytest.mark.parametrize(
    "changes",
    [dict(ema=0.9, clip=1.0), dict(progressive="8:0.5", accumulate=2), dict(optimizer="muon"),
     dict(optimizer="adamw", lr=1e-3, layer_decay=0.8), dict(optimizer="lamb", lr=5e-3, freeze="stem,layer1")],
    ids=str,
)  # fmt: skip
def test_a_graph_learns_the_same(tmp_path, backend, changes):
    common = dict(device="cuda", backend=backend, epochs=4, deterministic=True, **changes)
    plain = tiny_trainer(tmp_path / "plain", cuda_graph=False, **common)
    graphed = tiny_trainer(tmp_path / "graphed", cuda_graph=True, **common)
    assert isinstance(graphed.learn, GraphedUpdate)
    with ops.implementation("triton"):  # timed choices differ: without a graph the host's time counts
        for run in (plain, graphed):
            run.fit()
    assert len(graphed.learn._recorded) == 1 + ("progressive" in changes)
    for a, b in zip(plain.history, graphed.history):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-3)
        assert a["train_accuracy"] == pytest.approx(b["train_accuracy"], abs=0.03)
    graphed.folder.close()  # it is locked
    again = tiny_trainer(tmp_path / "graphed", cuda_graph=True, **{**common, "epochs": 5})
    again.resume()
    assert same_weights(again.model.state_dict(), graphed.model.state_dict())
    with ops.implementation("triton"):
        assert len(again.fit()) == 5


@pytest.mark.gpu
def test_an_epoch_on_a_gpu_never_waits(tmp_path):
    run = tiny_trainer(tmp_path, device="cuda", ema=0.9, cutout=3, epochs=3, cuda_graph=False)
    run._train_epoch(StopRequest())
    run._end_epoch(StopRequest())
    run.check_finite = lambda: None  # at an epoch's end it waits, once
    torch.cuda.set_sync_debug_mode("error")
    try:
        run._train_epoch(StopRequest())
    finally:
        torch.cuda.set_sync_debug_mode("default")
