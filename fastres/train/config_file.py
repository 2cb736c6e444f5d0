"""Options from a file: a run's ``config.json``, or a JSON or YAML file of a user's own."""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastres.errors import FastresError
from fastres.train.config import TrainConfig

_OPTIONS = {f.name: f for f in dataclasses.fields(TrainConfig)}
_LENGTHS = ("epochs", "steps")


@dataclass(frozen=True)
class OptionsFile:
    """What a file asks for.

    Attributes:
        options: by name.
        preset: the recipe that they start from; None: the command line's.
        whole: whether it holds every option of a run, and not only those that somebody wrote down.
    """

    options: dict[str, Any]
    preset: str | None = None
    whole: bool = False

    def merged(self, given: dict[str, Any]) -> dict[str, Any]:
        """The options of the file and those of the command line, which overrule them; a length overrules both."""
        kept = {name: value for name, value in self.options.items()
                if not (name in _LENGTHS and any(given.get(length) is not None for length in _LENGTHS))}  # fmt: skip
        return {**kept, **given}


def read_options(path: Path) -> OptionsFile:
    """Read a file of options: ``NAME: VALUE`` pairs, ``-`` or ``_`` in the names, and ``preset`` if you like.

    Raises:
        FastresError: where it cannot be read, is no such file, or names an option that there is not.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "it is no text"
        raise FastresError(f"cannot read --config {path}: {reason}; name a config.json, JSON or YAML file") from error
    content = _yaml(path, text) if path.suffix.lower() in (".yaml", ".yml") else _json(path, text)
    if not isinstance(content, dict):
        raise FastresError(f"--config {path} holds no options: write NAME: VALUE pairs, such as lr: 0.1")
    whole = isinstance(content.get("options"), dict)
    pairs = content["options"] if whole else content
    options: dict[str, Any] = {}
    for written, value in pairs.items():
        name = str(written).replace("-", "_")
        if name == "preset" and not whole:
            continue
        if name not in _OPTIONS:
            near = difflib.get_close_matches(name, _OPTIONS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise FastresError(
                f"--config {path}: unknown option {str(written)!r}: {hint}`fastres train --help` lists all"
            )
        if name in options:
            raise FastresError(f"--config {path} has {written} twice: remove one")
        options[name] = _value(name, value)
    named = None if whole else content.get("preset")
    if named is not None and not isinstance(named, str):
        raise FastresError(f"--config {path}: preset {named!r} is not a name")
    return OptionsFile(options, named, whole)


def _value(name: str, value: Any) -> Any:
    """As the option takes it: YAML reads 1e-3 as text, and lists are written for text with commas."""
    kind = _OPTIONS[name].metadata["kind"]
    if kind is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value  # the check of the configuration names it
    if kind is str and isinstance(value, list):
        return ",".join(map(str, value))
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return value


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FastresError(f"--config {path} is no JSON ({error}): correct it, or call a YAML file .yaml") from error


def _yaml(path: Path, text: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise FastresError(f"--config {path} needs PyYAML: pip install pyyaml, or write it as JSON") from None
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise FastresError(f"--config {path} is no YAML ({reason}): correct it") from error
