"""The command line's help, and options from files."""

import json
import subprocess
import sys

import pytest

from fastres.arguments import COMMANDS, groups, make_parser, named_preset
from fastres.cli import main
from fastres.commands.options import recipe
from fastres.train import PRESETS, preset, report


def asked(*argv: str):
    return recipe(make_parser(argv).parse_args(["train", *argv]))


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_needs_no_pytorch(command):
    code = "import sys\nfrom fastres.cli import main\ntry:\n main(sys.argv[1:])\nexcept SystemExit as end:\n"
    code += " assert not end.code\nbig = {'torch', 'numpy', 'PIL', 'triton'} & set(sys.modules)\nassert not big, big"
    shown = subprocess.run([sys.executable, "-c", code, *command.split(), "--help"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("usage: fastres")


def test_help_has_groups_and_the_values_of_the_preset(capsys):
    for name in PRESETS:
        with pytest.raises(SystemExit):
            main(["train", "--preset", name, "--help"])
        out = "".join(capsys.readouterr().out.split())  # without the lines' ends, which may be in a word
        values = preset(name)
        for text in (
            f"those of preset {name}.",
            f"network, see `fastres models` [{values.model}]",
            f"peak learning rate [{values.lr}]",
            f"weight decay, but of muon's parameters [{values.weight_decay}]",
            *("network:", "data:", "length:", "optimisation:", "machine:"),
        ):
            assert text.replace(" ", "") in out, text
    assert sum(groups().values(), []) == list(preset("fast").to_dict())


@pytest.mark.parametrize(
    "argv, name",
    [([], "fast"), (["--preset", "speed"], "speed"), (["--preset=notebook"], "notebook"), (["--preset"], "fast"),
     (["--preset", "none such"], "fast"), (["--preset", "speed", "--preset", "notebook"], "notebook")],
)  # fmt: skip
def test_the_preset_that_is_named(argv, name):
    assert named_preset(argv) == name


def test_options_from_a_file(tmp_path):
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"preset": "speed", "epochs": 3, "weight-decay": 1e-3, "milestones": [0.5, 0.75]}))
    found = asked("--config", str(file), "--steps", "7")
    assert found.preset == "speed" and found.config.model == "speed" and found.config.weight_decay == 1e-3
    assert (found.config.steps, found.config.epochs, found.config.milestones) == (7, None, "0.5,0.75")
    assert set(found.given) == {"steps", "weight_decay", "milestones"}


def test_options_of_a_run(tmp_path):
    """Every option is the run's, whatever the preset has; another batch leaves its learning rate, and says so."""
    kept = preset("notebook", lr=0.07, seed=3)
    (tmp_path / "config.json").write_text(json.dumps({"checksum": "", "options": kept.to_dict(), "data": "x"}))
    found = asked("--config", str(tmp_path / "config.json"))
    assert found.config == kept and not found.given and not found.notes
    found = asked("--config", str(tmp_path / "config.json"), "--batch-size", "32", "--epochs", "2")
    assert found.config == kept.replace(batch_size=32, epochs=2) and "stays 0.07" in found.notes[0]


def test_yaml(tmp_path):
    pytest.importorskip("yaml")
    file = tmp_path / "own.yaml"
    file.write_text("lr: 1e-3\nnesterov: off\nmodel: resnet20\nmilestones: [0.5, 0.75]\nschedule: step\n")
    found = asked("--config", str(file)).config
    assert (found.lr, found.nesterov, found.model, found.milestones) == (1e-3, False, "resnet20", "0.5,0.75")
    file.write_text("lr: [")
    with pytest.raises(ValueError, match="is no YAML"):
        asked("--config", str(file))


def test_yaml_without_its_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "own.yml").write_text("lr: 0.1")
    assert main(["train", "--config", str(tmp_path / "own.yml")]) == 2
    assert "needs PyYAML: pip install pyyaml, or write it as JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "is no JSON"),
        ("[1]", "holds no options"),
        ('{"lrr": 1}', "unknown option 'lrr': did you mean lr?"),
        ('{"lr": "high"}', "--lr 'high' is not of type float"),
        ('{"weight-decay": 1, "weight_decay": 1}', "has weight_decay twice"),
        ('{"preset": 3}', "preset 3 is not a name"),
        ('{"muon_lr": 0.1}', "--muon-lr does nothing without --optimizer muon"),
    ],
)
def test_bad_files_are_one_line(text, words, tmp_path, capsys):
    (tmp_path / "o.json").write_text(text)
    assert main(["train", "--config", str(tmp_path / "o.json")]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_a_file_that_is_not_there_or_not_wanted(tmp_path, capsys):
    assert main(["train", "--config", str(tmp_path / "none.json")]) == 2
    assert "cannot read --config" in capsys.readouterr().err
    assert main(["train", "--resume", str(tmp_path), "--config", "x.json"]) == 2
    assert "--config cannot change in a resumed run" in capsys.readouterr().err


@pytest.mark.parametrize("tta", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_table_fits_80_columns(tta, scaled):
    row = {key: 99999 if form == "{:d}" else 1.0 for key, form in report.FORMS.items()}
    row.update(lr=0.4, images_per_second=1234567.0, seconds=99999.9, train_loss=12.5, val_loss=12.5)
    heading, line = report.heading(tta, scaled), report.line(row, tta, scaled)
    assert len(heading) == len(line) <= 80
    assert ("tta acc" in heading, "skipped" in heading) == (tta, scaled)
    assert len(report.line({**row, "tta_accuracy": None}, tta, scaled)) == len(line)
