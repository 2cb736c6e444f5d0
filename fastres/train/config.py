"""Every option of a training run, its default, its help line and its valid values, in one place.

The command line, the presets, the saved ``config.json`` and the checks below all read this dataclass.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastres.errors import FastresError
from fastres.train.progressive import parse_progressive
from fastres.train.schedule import parse_milestones

if TYPE_CHECKING:  # `fastres --help` reads this module, and starts without PyTorch
    from fastres.train.views import Views


def option(
    default: Any,
    help: str,
    *,
    kind: type,
    choices: tuple | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A dataclass field that knows its ``--help`` line, its scalar type and its valid values."""
    return field(default=default, metadata={"help": help, "kind": kind, "choices": choices, "low": low, "high": high})


ADAPTIVE = ("adamw", "lamb")
# heading in the help -> the first option under it
GROUPS = {
    "network": "model", "data": "data", "length": "epochs", "optimisation": "optimizer", "machine": "device",
}  # fmt: skip

# values with which a run is not what their option promises
_WITHOUT_EFFECT = (
    ("ema", 1.0, "never lets the average follow the weights: lower it, or leave it out"),
    ("ema", 0.0, "makes the average the weights themselves: raise it, or leave it out"),
    ("warmup", 1.0, "never ends the warmup: lower it"),
    ("clip", 0.0, "leaves nothing of the gradient: raise it, or leave it out"),
    ("layer_decay", 0.0, "leaves all but the head as it is: say --freeze backbone, or raise it"),
    ("layer_decay", 1.0, "lowers no rate: lower it, or leave it out"),
    ("lr", 0.0, "leaves the weights as they are: raise it"),
    ("decay_factor", 1.0, "lowers no rate: lower it, or take another --schedule"),
    ("label_smoothing", 1.0, "leaves nothing of the labels: lower it"),
    ("save_minutes", 0.0, "would save after every step: say --save-steps 1, or raise it"),
)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        return ()


def parse_channels(name: str, text: str, low: float = 0.0) -> tuple[float, float, float]:
    """Red, green and blue of ``"0.485,0.456,0.406"``.

    Raises:
        FastresError: for anything but three numbers from ``low`` to 1.
    """
    values = _numbers(text)
    if len(values) != 3 or not all(low <= value <= 1 for value in values):
        raise FastresError(f"--{name} {text!r} must be three numbers from {low:g} to 1, such as 0.485,0.456,0.406")
    return values  # type: ignore[return-value]


def parse_betas(text: str) -> tuple[float, float]:
    """The decays of ``"0.9,0.999"``.

    Raises:
        FastresError: for anything but two numbers from 0 up to, but without, 1.
    """
    values = _numbers(text)
    if len(values) != 2 or not all(0 <= value < 1 for value in values):
        raise FastresError(f"--betas {text!r} must be two numbers from 0 and below 1, such as 0.9,0.999")
    return values  # type: ignore[return-value]


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Lengths are in images or optimizer steps, learning rates per step.

    Raises:
        FastresError: from `check`, for a value out of range or two options that exclude each other.
    """

    # network
    model: str = option("resnet20", "network, see `fastres models`", kind=str)
    stem: str = option(
        "auto",
        "first layers of resnet18..152: auto takes cifar up to 64 pixels",
        kind=str,
        choices=("auto", "cifar", "imagenet"),
    )
    whiten: bool = option(False, "fix the first layer to filters that whiten the training images' patches", kind=bool)
    checkpoint_every: int = option(
        0, "recompute activations in groups of this many blocks (0: store all)", kind=int, low=0
    )
    weights: str | None = option(
        None,
        "start from torchvision, a name of timm's, a file or a run; the head is new where classes differ",
        kind=str,
    )
    freeze: str | None = option(
        None, "parts that stay as they are, BatchNorm's statistics too: stem, layer1, ..., or backbone", kind=str
    )
    # data
    data: str = option("auto", "auto, cifar10, cifar100, synthetic, or a path, see docs/data.md", kind=str)
    data_root: str = option("data", "folder that CIFAR-10 is looked for in and downloaded to", kind=str)
    image_size: int | None = option(
        None,
        "pixels a side of every image; none: a folder's median shorter side, at most 224",
        kind=int,
        low=8,
        high=1024,
    )
    center_share: float | None = option(
        None, "part of a photo's shorter side that its central square has, such as 0.875 beside --crop-scale; none: "
        "that of --weights, or all of it", kind=float, low=0.1, high=1.0,
    )  # fmt: skip
    val_share: float | None = option(
        None, "share of each class kept from training to pick the best epoch; a test set then picks nothing",
        kind=float, low=0.0, high=1.0,
    )  # fmt: skip
    val_seed: int = option(0, "seed of the draw of --val-share", kind=int, low=0, high=2**63 - 1)
    skip_bad: bool = option(False, "go on without image files that cannot be read", kind=bool)
    memory_budget: float | None = option(
        None, "GiB of decoded images that are held in memory; larger sets are streamed from their files; none: a third "
        "of the host's free memory, at most half of the GPU's", kind=float, low=0.0,
    )  # fmt: skip
    workers: int | None = option(
        None, "processes that decode streamed images; none: the cores, or a quarter of them where they train",
        kind=int, low=0, high=1024,
    )  # fmt: skip
    limit_train: int | None = option(None, "use only so many images of the training set, drawn once", kind=int, low=1)
    limit_test: int | None = option(None, "use only so many images of the test set, drawn once", kind=int, low=1)
    mean: str | None = option(
        None, "mean of red, green and blue, 0..1; none: that of --weights, or of the training images", kind=str
    )
    std: str | None = option(None, "their standard deviations, as --mean", kind=str)
    crop_pad: int = option(4, "random crop: pixels of reflect padding", kind=int, low=0)
    flip: str = option("alternating", "horizontal flips", kind=str, choices=("none", "random", "alternating"))
    crop_scale: float | None = option(
        None, "random resized crop of at least this share of the photo, instead of --crop-pad", kind=float, low=0.01,
        high=1.0,
    )  # fmt: skip
    color_jitter: float = option(
        0.0, "brightness, contrast and saturation change by up to this share", kind=float, low=0.0, high=1.0
    )
    auto_augment: str = option(
        "none", "RandAugment or TrivialAugment of each image", kind=str, choices=("none", "rand", "trivial")
    )
    magnitude: int = option(9, "strength of --auto-augment rand", kind=int, low=0, high=30)
    random_erasing: float = option(
        0.0, "probability that a rectangle of an image is set to the mean", kind=float, low=0.0, high=1.0
    )
    mixup: float = option(
        0.0, "mix images in pairs, by shares of a Beta distribution with this alpha", kind=float, low=0.0, high=100.0
    )
    cutmix: float = option(
        0.0, "paste a rectangle of another image, of a share of such a distribution", kind=float, low=0.0, high=100.0
    )
    sampling: str = option(
        "shuffle", "balanced: an epoch has as many images of each class, of rare ones some again", kind=str,
        choices=("shuffle", "balanced"),
    )  # fmt: skip
    cutout: int = option(0, "side of the square that is cut out, in pixels", kind=int, low=0, high=1024)
    progressive: str | None = option(
        None, "smaller images first, as SIZE:SHARE-OF-RUN pairs such as 16:0.3,24:0.7", kind=str
    )
    # length
    epochs: int | None = option(10, "passes over the training set", kind=int, low=1)
    steps: int | None = option(None, "optimizer steps, instead of --epochs", kind=int, low=1)
    patience: int | None = option(None, "end after so many epochs without a better one", kind=int, low=1)
    batch_size: int = option(128, "images per optimizer step", kind=int, low=1)
    accumulate: int = option(1, "micro-batches that one step's batch is split into", kind=int, low=1)
    eval_batch_size: int = option(500, "images per validation batch", kind=int, low=1)
    # optimisation
    optimizer: str = option(
        "sgd", "sgd; muon for the convolutions behind the first and sgd for the rest; adamw; lamb", kind=str,
        choices=("sgd", "muon", "adamw", "lamb"),
    )  # fmt: skip
    lr: float = option(0.1, "peak learning rate", kind=float, low=0.0)
    bias_lr: float = option(1.0, "factor of the learning rate of biases, BatchNorm's too", kind=float, low=0.0)
    momentum: float = option(0.9, "SGD momentum", kind=float, low=0.0, high=1.0)
    nesterov: bool = option(True, "Nesterov momentum", kind=bool)
    betas: str = option("0.9,0.999", "decays of adamw's and lamb's two averages", kind=str)
    weight_decay: float = option(5e-4, "weight decay, but of muon's parameters", kind=float, low=0.0)
    layer_decay: float | None = option(
        None, "factor of the learning rate from each block to the one before it", kind=float, low=0.0, high=1.0
    )
    decoupled: bool = option(
        True, "decay apart from the momentum and not of BatchNorm and biases; else L2 of all parameters", kind=bool
    )
    muon_lr: float = option(0.03, "peak learning rate of muon", kind=float, low=0.0)
    muon_momentum: float = option(0.9, "momentum of muon", kind=float, low=0.0, high=1.0)
    muon_decay: float = option(0.0, "decoupled weight decay of muon's parameters", kind=float, low=0.0)
    schedule: str = option(
        "cosine", "learning-rate schedule", kind=str, choices=("constant", "cosine", "step", "triangular")
    )
    warmup: float = option(0.05, "share of the run before the peak learning rate", kind=float, low=0.0, high=1.0)
    milestones: str = option("0.5,0.75", "shares of the run at which schedule step lowers the rate", kind=str)
    decay_factor: float = option(0.1, "factor of each step of schedule step", kind=float, low=0.0, high=1.0)
    label_smoothing: float = option(0.0, "label smoothing", kind=float, low=0.0, high=1.0)
    class_weights: str = option(
        "none", "balanced: each class weighs the same in the loss, whatever its number of images", kind=str,
        choices=("none", "balanced"),
    )  # fmt: skip
    clip: float | None = option(None, "largest norm of the whole gradient", kind=float, low=0.0)
    ema: float | None = option(None, "decay of the weight average that is evaluated", kind=float, low=0.0, high=1.0)
    tta: bool = option(
        False,
        "report the accuracy over each image and its mirror image too: of the last epoch, with --patience of each",
        kind=bool,
    )
    tta_shift: int = option(
        0, "with --tta also over both moved by so many pixels, up-left and down-right: six views", kind=int, low=0
    )
    # machine
    device: str = option("auto", "auto, cpu, cuda or cuda:N", kind=str)
    precision: str = option(
        "auto",
        "auto takes bf16 where the hardware multiplies it fast",
        kind=str,
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    backend: str = option(
        "auto",
        "blocks: fused operations, or plain eager PyTorch; auto takes eager only on a CPU without a C++ compiler",
        kind=str,
        choices=("auto", "fused", "eager"),
    )
    recompute: bool = option(
        False,
        "fused blocks compute some outputs again in backward, for less memory",
        kind=bool,
    )
    channels_last: bool = option(True, "NHWC activations and weights", kind=bool)
    compile: bool = option(False, "run the network through torch.compile", kind=bool)
    cuda_graph: bool | None = option(
        None,
        "launch each training step as one CUDA graph; unless told, where one GPU trains a network of `fastres models`",
        kind=bool,
    )
    sync_bn: bool = option(False, "BatchNorm by all ranks' images together, under torchrun", kind=bool)
    save_minutes: float | None = option(
        None, "save a checkpoint within an epoch too, after so many minutes", kind=float, low=0.0
    )
    save_steps: int | None = option(None, "save a checkpoint within an epoch too, after so many steps", kind=int, low=1)
    requeue: bool = option(
        False, "in a job of SLURM: have it started again where a signal of SLURM's ended the run", kind=bool
    )
    seed: int = option(0, "seed of initial weights, order and augmentation", kind=int, low=0, high=2**63 - 1)
    deterministic: bool = option(False, "only deterministic algorithms; else cuDNN takes its fastest", kind=bool)

    def check(self) -> TrainConfig:
        """Return the configuration itself, or raise for the first value that cannot be right."""
        for f in dataclasses.fields(self):
            self._check_value(f, getattr(self, f.name))
        if (self.epochs is None) == (self.steps is None):
            raise FastresError(
                f"give exactly one of --epochs and --steps, not epochs={self.epochs} and steps={self.steps}"
            )
        if self.batch_size % self.accumulate:
            raise FastresError(
                f"--batch-size {self.batch_size} does not split into --accumulate {self.accumulate} equal parts: "
                "make it a multiple"
            )
        if self.batch_size == self.accumulate:
            raise FastresError(
                f"--batch-size {self.batch_size} in --accumulate {self.accumulate} parts leaves one image a part, "
                "of which BatchNorm has no statistics: make it at least 2"
            )
        if self.nesterov and self.momentum == 0 and self.optimizer not in ADAPTIVE:
            raise FastresError("--nesterov needs a --momentum above 0: add --no-nesterov")
        for name, value, what in _WITHOUT_EFFECT:
            if getattr(self, name) == value:
                raise FastresError(f"--{name.replace('_', '-')} {value:g} {what}")
        if self.optimizer != "sgd" and not self.decoupled:
            raise FastresError(
                f"--optimizer {self.optimizer} has decoupled weight decay only: leave out --no-decoupled"
            )
        if self.optimizer == "muon" and self.layer_decay is not None:
            raise FastresError("--layer-decay is not of --optimizer muon: take sgd, adamw or lamb, or leave it out")
        if self.weights is not None and self.whiten:
            raise FastresError("--whiten makes the first layer that --weights brings: leave one of them out")
        if (self.mean is None) != (self.std is None):
            raise FastresError("give --mean and --std together, or neither")
        if self.mean is not None and self.std is not None:
            parse_channels("mean", self.mean)
            parse_channels("std", self.std, low=1e-3)
        parse_betas(self.betas)
        if self.class_weights != "none" and self.sampling != "shuffle":
            raise FastresError(
                "--class-weights balanced and --sampling balanced would make up for rare classes twice: leave one out"
            )
        parse_milestones(self.milestones)
        if self.progressive is not None:
            parse_progressive(self.progressive)
        return self

    @staticmethod
    def _check_value(f: dataclasses.Field, value: Any) -> None:
        flag, meta = "--" + f.name.replace("_", "-"), f.metadata
        if value is None:
            if "None" in str(f.type):
                return
            raise FastresError(f"{flag} must have a value")
        accepted = (int, float) if meta["kind"] is float else meta["kind"]
        if not isinstance(value, accepted) or (isinstance(value, bool) and meta["kind"] is not bool):
            raise FastresError(f"{flag} {value!r} is not of type {meta['kind'].__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise FastresError(f"{flag} {value} is not a finite number")
        if meta["choices"] and value not in meta["choices"]:
            raise FastresError(f"{flag} {value!r} is unknown: choose from {', '.join(meta['choices'])}")
        if meta["low"] is not None and not value >= meta["low"]:
            raise FastresError(f"{flag} {value} is too small: the least is {meta['low']}")
        if meta["high"] is not None and not value <= meta["high"]:
            raise FastresError(f"{flag} {value} is too large: the most is {meta['high']}")

    def replace(self, **changes: Any) -> TrainConfig:
        """A checked copy with other values; a length given in steps replaces one in epochs and the reverse."""
        if changes.get("steps") is not None and "epochs" not in changes:
            changes["epochs"] = None
        if changes.get("epochs") is not None and "steps" not in changes:
            changes["steps"] = None
        return dataclasses.replace(self, **changes).check()

    @property
    def views(self) -> Views | None:
        """Those over which the accuracy is reported too; None: none."""
        from fastres.train.views import Views

        return Views(self.tta_shift) if self.tta else None

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The reverse of `to_dict`; an unknown key is an error, as the file is then of another version."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise FastresError(f"unknown option {unknown[0]!r} in the saved configuration: it is of another version")
        return cls(**values).check()
