"""A run's epochs in MLflow: ``fastres train --callback examples/log_to_mlflow.py:log``.

They go to ``MLFLOW_TRACKING_URI``, which may be a file of SQLite's (``sqlite:///mlflow.db``); a server need not run. A
run that is resumed goes on in the same one of MLflow's.
"""

import mlflow

_runs = {}  # MLflow's run by the run's id


def log(trainer, row):
    """Called after each epoch with its row of metrics.jsonl."""
    if trainer.run not in _runs:
        mlflow.set_experiment("fastres")
        known = mlflow.search_runs(filter_string=f"tags.fastres_run = '{trainer.run}'", output_format="list")
        if known:
            _runs[trainer.run] = mlflow.start_run(run_id=known[0].info.run_id)
        else:
            _runs[trainer.run] = mlflow.start_run(run_name=trainer.folder.path.name, tags={"fastres_run": trainer.run})
            mlflow.log_params({**trainer.config.to_dict(), "data": trainer.dataset.label})
    values = {name: float(value) for name, value in row.items() if value is not None}
    mlflow.log_metrics(values, step=row["step"])
