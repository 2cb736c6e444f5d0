"""Options: valid ones round-trip, each kind of bad one is named with its remedy."""

import pytest

from fastres.errors import FastresError
from fastres.train import PRESETS, TrainConfig, preset


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_round_trip(name):
    assert TrainConfig.from_dict(preset(name).to_dict()) == preset(name)


def test_the_notebook_preset_is_the_notebook():
    config = preset("notebook")
    assert (config.model, config.image_size, config.batch_size, config.steps) == ("notebook", 96, 64, 20_000)
    assert (config.lr, config.momentum, config.nesterov, config.schedule) == (0.01, 0.9, False, "constant")
    assert (config.weight_decay, config.flip, config.crop_pad) == (0.0, "none", 0)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(lr=-1.0), "--lr -1.0 is too small"),
        (dict(lr=float("nan")), "--lr nan"),
        (dict(lr=float("inf")), "--lr inf is not a finite number"),
        (dict(seed=10**30), "--seed 1000000000000000000000000000000 is too large"),
        (dict(batch_size=1), "leaves one image a part"),
        (dict(batch_size=8, accumulate=8), "leaves one image a part"),
        (dict(momentum=1.5), "--momentum 1.5 is too large"),
        (dict(schedule="exponential"), "choose from constant, cosine, step, triangular"),
        (dict(batch_size=0), "--batch-size 0 is too small"),
        (dict(batch_size=10, accumulate=3), "--accumulate 3"),
        (dict(batch_size=2.5), "is not of type int"),
        (dict(epochs=3, steps=5), "exactly one of --epochs and --steps"),
        (dict(momentum=0.0), "--no-nesterov"),
        (dict(precision="fp8"), "fp32, bf16, fp16"),
        (dict(model=None), "--model must have a value"),
        (dict(compile=1), "is not of type bool"),
        (dict(optimizer="adam"), "choose from sgd, muon"),
        (dict(optimizer="muon", decoupled=False), "leave out --no-decoupled"),
        (dict(muon_momentum=1.5), "--muon-momentum 1.5 is too large"),
        (dict(bias_lr=-1.0), "--bias-lr -1.0 is too small"),
        (dict(milestones="0.5,0.4"), "--milestones '0.5,0.4' must be growing shares"),
        (dict(milestones="a"), "--milestones 'a' must be"),
        (dict(ema=1.0), "--ema 1 never lets the average follow the weights"),
        (dict(ema=0.0), "--ema 0 makes the average the weights themselves"),
        (dict(warmup=1.0), "--warmup 1 never ends the warmup: lower it"),
        (dict(clip=0.0), "--clip 0 leaves nothing of the gradient"),
        (dict(lr=0.0), "--lr 0 leaves the weights as they are"),
        (dict(decay_factor=1.0), "--decay-factor 1 lowers no rate"),
        (dict(label_smoothing=1.0), "--label-smoothing 1 leaves nothing of the labels"),
        (dict(save_minutes=0.0), "--save-minutes 0 would save after every step"),
        (dict(save_steps=0), "--save-steps 0 is too small"),
        (dict(milestones="0.5,1"), "--milestones '0.5,1' must be"),
    ],
)
def test_bad_values_are_named(change, words):
    with pytest.raises(FastresError, match=words.replace("(", r"\(")):
        TrainConfig().replace(**change)


def test_steps_take_the_place_of_epochs():
    assert TrainConfig().replace(steps=7).epochs is None
    assert preset("notebook").replace(epochs=2).steps is None


def test_unknown_preset_names_the_nearest():
    with pytest.raises(FastresError, match="did you mean 'notebook'"):
        preset("notebok")


def test_configuration_of_another_version():
    with pytest.raises(FastresError, match="unknown option 'colour'"):
        TrainConfig.from_dict({"colour": "red"})
