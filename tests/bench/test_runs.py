"""Collected runs keep what was measured and name no place of the machine that measured it."""

import json

from support_train import tiny_trainer

from bench import runs


def test_runs_are_collected(tmp_path, capsys):
    run = tiny_trainer(tmp_path / "one", epochs=1, data="/somewhere/private")
    run.folder.write_config(run.config, {"data": run.dataset.label})
    (row,) = run.fit()
    runs.main([str(tmp_path / "one"), "--out", str(tmp_path / "accuracy.json")])
    text = (tmp_path / "accuracy.json").read_text()
    (read,) = json.loads(text)["runs"]
    assert read["name"] == "one" and read["data"] == "tiny" and read["epochs"] == [row]
    assert read["options"]["batch_size"] == 16 and "/somewhere" not in text
    assert f"one: {row['val_accuracy']:.2%} on tiny after 1 epochs" in capsys.readouterr().out
