"""The training loss of soft labels, smoothed and weighted, against its definition in float64."""

import pytest
import support_train
import torch
from support_train import same_weights, tiny_trainer

from fastres.errors import FastresError
from fastres.train import TrainConfig
from fastres.train.evaluate import Tally
from fastres.train.loss import balanced_weights, cross_entropy


def defined(logits, shares, smoothing, weights):
    """Each image's cross-entropy with its smoothed shares, each class' part weighed, in the mean over images."""
    classes = logits.shape[1]
    target = shares * (1 - smoothing) + smoothing / classes
    return -(target * weights * logits.double().log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_against_its_definition(soft, weighted, smoothing):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(9, 5, generator=generator), torch.randint(5, (9,), generator=generator)
    hot = torch.nn.functional.one_hot(labels, 5).float()
    shares = 0.3 * hot + 0.7 * hot.roll(1, 0) if soft else hot
    weights = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.1]) if weighted else None
    found = cross_entropy(logits, shares if soft else labels, smoothing, weights)
    expected = defined(logits, shares.double(), smoothing, 1.0 if weights is None else weights.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    parts = [
        cross_entropy(part, label, smoothing, weights)
        for part, label in zip(logits.split(3), (shares if soft else labels).split(3))
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), found)  # a batch in parts has the same loss


def test_balanced_weights_make_up_for_the_numbers_of_images():
    labels = torch.tensor([0] * 6 + [1] * 3 + [3])
    weights = balanced_weights(labels, 4)
    assert weights[labels].mean() == pytest.approx(1)
    sums = weights * labels.bincount(minlength=4)
    assert sums[0] == pytest.approx(sums[1].item()) and sums[0] == pytest.approx(sums[3].item()) and sums[2] == 0


def test_the_accuracy_on_mixed_images_is_of_their_larger_part():
    tally = Tally.zero(torch.device("cpu"))
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    tally.add(torch.tensor(1.0), logits, torch.tensor([[0.6, 0.0, 0.4], [0.9, 0.0, 0.1]]))
    assert tally.means() == (1.0, 0.5)


MIXED = dict(
    mixup=0.2, cutmix=1.0, color_jitter=0.2, auto_augment="trivial", random_erasing=0.3, label_smoothing=0.1,
    class_weights="balanced", workers=0, model="resnet8", crop_pad=0, accumulate=2,
)  # fmt: skip


def test_an_augmented_run_is_resumed_bit_for_bit(tmp_path):
    whole = tiny_trainer(tmp_path / "whole", **MIXED)
    history = whole.fit()
    assert 0 < history[-1]["train_accuracy"] <= 1
    run = tiny_trainer(tmp_path / "run", **MIXED)
    for images, labels in run.train_batches.epoch(0):
        assert labels.shape == (16, 3)
        run.train_step(images, labels)
        if run.step == 2:
            break
    run.save()
    run.folder.close()
    again = tiny_trainer(tmp_path / "run", **MIXED)
    again.resume()
    again.fit()
    assert same_weights(whole.model.state_dict(), again.model.state_dict())


def test_crops_by_scale_of_images_in_memory(tmp_path):
    run = tiny_trainer(tmp_path / "run", crop_scale=0.5, workers=0, model="resnet8", steps=2, sampling="balanced")
    run.fit()
    labels = torch.cat([labels for _, labels in run.train_batches.epoch(0)])
    assert labels.bincount().tolist() == [32, 32, 32] and len(support_train.CLASSES) == 3


def test_rare_classes_are_made_up_for_once():
    with pytest.raises(FastresError, match="twice: leave one out"):
        TrainConfig(sampling="balanced", class_weights="balanced").check()
