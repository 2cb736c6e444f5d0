"""A run's epochs in Weights & Biases: ``fastres train --callback examples/log_to_wandb.py:log``.

``WANDB_MODE=offline`` keeps them in the run's folder until ``wandb sync``. A run that is resumed goes on under its id.
"""

import wandb

_runs = {}  # by the run's id: a process may train several


def log(trainer, row):
    """Called after each epoch with its row of metrics.jsonl."""
    if trainer.run not in _runs:
        _runs[trainer.run] = wandb.init(
            project="fastres",
            id=trainer.run,
            resume="allow",
            name=trainer.folder.path.name,
            dir=str(trainer.folder.path),
            config={**trainer.config.to_dict(), "data": trainer.dataset.label},
        )
    values = {name: value for name, value in row.items() if value is not None}
    _runs[trainer.run].log(values, step=row["step"])
