"""The arguments of every command. Nothing here needs PyTorch, whose import would make ``--help`` wait."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import fastres
from fastres.train.config import GROUPS, TrainConfig
from fastres.train.presets import PRESETS, preset

OPTIONS = {f.name: f for f in dataclasses.fields(TrainConfig)}
EXPORTS = {
    ".onnx": "ONNX",
    ".pt2": "a program for torch.export.load",
    ".pt": "the weights for torchvision's network of the same name",
    ".safetensors": "the weights of any network",
    "": "without an ending, a folder for the Hugging Face Hub, which timm reads",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, and that takes no part of an option's name for the whole."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def positive(text: str) -> int:
    """An integer of at least 1, as a type for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def groups() -> dict[str, list[str]]:
    """The configuration's options by the heading that they stand under in the help."""
    headings = {first: heading for heading, first in GROUPS.items()}
    found: dict[str, list[str]] = {}
    for name in OPTIONS:
        heading = headings.get(name, next(reversed(found), ""))
        found.setdefault(heading, []).append(name)
    return found


def add_options(parser: argparse.ArgumentParser, names: Iterable[str] = OPTIONS, recipe: str | None = None) -> None:
    """Add configuration options to a command, under headings; one that is not given leaves no trace in the result.

    Args:
        recipe: preset whose values the help shows; None: those that have none.
    """
    wanted, values = set(names), (preset(recipe) if recipe else TrainConfig()).to_dict()
    for heading, members in groups().items():
        if not wanted.intersection(members):
            continue
        group = parser.add_argument_group(heading)
        for name in members:
            if name in wanted:
                _add_option(group, name, values[name])


def _add_option(group: Any, name: str, value: Any) -> None:
    meta = OPTIONS[name].metadata
    flag = "--" + name.replace("_", "-")
    shown = ("on" if value else "off") if meta["kind"] is bool else "none" if value is None else value
    help = f"{meta['help']} [{shown}]".replace("%", "%%")
    if meta["kind"] is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help)
    else:
        group.add_argument(
            flag, type=meta["kind"], choices=meta["choices"], default=argparse.SUPPRESS, help=help,
            metavar=None if meta["choices"] else meta["kind"].__name__.upper(),
        )  # fmt: skip


def _recipe(parser: argparse.ArgumentParser, named: str) -> None:
    parser.description = f"{parser.description} Values in brackets are those of preset {named}."
    parser.add_argument("--preset", help=f"recipe that the options start from: {', '.join(PRESETS)} [fast]")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="options from a run's config.json, a JSON or a YAML file; others here overrule it",
    )


def _train(parser: argparse.ArgumentParser, named: str) -> None:
    _recipe(parser, named)
    parser.add_argument("--out", metavar="FOLDER", help="new run folder [runs/MODEL-TIME]")
    parser.add_argument("--resume", metavar="FOLDER", help="go on with the run in this folder")
    parser.add_argument(
        "--callback", action="append", default=[], metavar="FILE.py:FUNCTION",
        help="call it with the trainer and each epoch's row; or package.module:FUNCTION; may be given again",
    )  # fmt: skip
    parser.add_argument(
        "--lr-find", type=Path, metavar="FOLDER",
        help="train nothing, but write there how the loss depends on the learning rate, and suggest one",
    )  # fmt: skip
    add_options(parser, recipe=named)


def _sweep(parser: argparse.ArgumentParser, named: str) -> None:
    _recipe(parser, named)
    parser.add_argument("--seeds", type=positive, default=5, metavar="INT", help="seeds a setting, from --seed on [5]")
    parser.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE,VALUE",
        help="values to try, in all combinations where given again; parted by ; where they have commas",
    )  # fmt: skip
    parser.add_argument("--out", metavar="FOLDER", help="folder of all runs; the same one goes on [sweeps/PRESET-TIME]")
    add_options(parser, recipe=named)


def _eval(parser: argparse.ArgumentParser, _: str) -> None:
    parser.add_argument(
        "--report", type=Path, metavar="FOLDER", help="write accuracy by class and confusion matrix there"
    )
    parser.add_argument("checkpoint", nargs="?", metavar="RUN", help="run folder or checkpoint [newest under runs/]")
    data = ("data", "data_root", "val_share", "val_seed", "skip_bad", "limit_test", "eval_batch_size")
    add_options(parser, (*data, "tta", "tta_shift", "memory_budget", "workers", "device", "precision"))


def _predict(parser: argparse.ArgumentParser, _: str) -> None:
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="image file, folder, pattern such as 'a/**/*.jpg', or - for a name a line",
    )
    parser.add_argument("--run", dest="checkpoint", metavar="RUN", help="run folder or checkpoint [newest under runs/]")
    parser.add_argument("--top", type=positive, default=3, help="classes to print [3]", metavar="INT")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a JSON object a line")
    form.add_argument("--csv", action="store_true", help="print a CSV table")
    add_options(parser, ("skip_bad", "tta", "tta_shift", "device"))


def _export(parser: argparse.ArgumentParser, _: str) -> None:
    parser.add_argument("checkpoint", nargs="?", metavar="RUN", help="run folder or checkpoint [newest under runs/]")
    kinds = "; ".join(f"{suffix}: {meaning}" if suffix else meaning for suffix, meaning in EXPORTS.items())
    parser.add_argument("--out", type=Path, metavar="FILE", default=Path("model.onnx"), help=f"{kinds} [model.onnx]")


def _bench(parser: argparse.ArgumentParser, _: str) -> None:
    parser.add_argument(
        "--model", default="resnet18", help="network, or package.module:function of your own [resnet18]"
    )
    parser.add_argument("--batch-size", type=positive, default=128, metavar="INT", help="images a step [128]")
    parser.add_argument("--image-size", type=positive, default=32, metavar="INT", help="height and width, pixels [32]")
    parser.add_argument("--device", default="auto", metavar="STR", help="auto, cpu, cuda or cuda:N [auto]")
    parser.add_argument(
        "--precision",
        choices=OPTIONS["precision"].metadata["choices"],
        default="auto",
        help="see `fastres train` [auto]",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        metavar="NAME",
        help="such as eager compile fused; a wrong name lists all [all that run here]",
    )
    parser.add_argument("--rounds", type=positive, default=10, metavar="INT", help="timed samples of each variant [10]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")


def _models(parser: argparse.ArgumentParser, _: str) -> None:
    pass


def _cache(parser: argparse.ArgumentParser, _: str) -> None:
    parser.add_argument("--clear", action="store_true", help="remove it all; it is made again where it is needed")


# command -> (where it is, what it does, its arguments)
COMMANDS: dict[str, tuple[str, str, Callable[[argparse.ArgumentParser, str], None]]] = {
    "train": (
        "fastres.commands.train:train",
        "Train a network and leave a run folder; `torchrun -m fastres.cli train` trains it with several processes.",
        _train,
    ),
    "sweep": (
        "fastres.commands.sweep:sweep",
        "Train a recipe with several seeds and options, and print means and standard errors.",
        _sweep,
    ),
    "eval": ("fastres.commands.evaluate:eval_", "Print loss and accuracy of a trained network on a test set.", _eval),
    "predict": ("fastres.predict:predict", "Print the most probable classes of image files.", _predict),
    "export": ("fastres.commands.export:export", "Write a trained network for other programs.", _export),
    "models": ("fastres.commands.models:models", "List the networks.", _models),
    "bench": (
        "fastres.commands.bench:bench", "Time a training step of a network: eager, compiled, fused.", _bench
    ),
    "cache": (
        "fastres.commands.cache:cache",
        "Show or clear what fastres keeps on this machine: decoded images, compiled passes, timed choices.",
        _cache,
    ),
}  # fmt: skip


def make_parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The whole command line.

    Args:
        argv: the words that will be parsed: the help shows the values of the preset that they name.
    """
    parser = Parser(prog="fastres", description="Fast residual networks on PyTorch.")
    parser.add_argument("--version", action="version", version=f"fastres {fastres.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=Parser)
    for name, (_, what, add_arguments) in COMMANDS.items():
        sub = commands.add_parser(name, help=what, description=what)
        add_arguments(sub, named_preset(argv))
    return parser


def named_preset(argv: Sequence[str]) -> str:
    """The last preset that a command line names, ``fast`` where it names none that there is."""
    pairs = [word.partition("=")[::2] if "=" in word else (word, after) for word, after in zip(argv, [*argv[1:], ""])]
    named = [value for option, value in pairs if option == "--preset"]
    return named[-1] if named and named[-1] in PRESETS else "fast"
