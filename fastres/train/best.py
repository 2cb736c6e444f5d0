"""``best.pt`` of a run that goes on: whether it is of the best epoch, and what to do where it is not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from fastres.errors import FastresError
from fastres.train import report, state
from fastres.train.content import RUN, check_content
from fastres.train.run_folder import RunFolder
from fastres.train.trained import evaluated_weights

if TYPE_CHECKING:
    from fastres.train.trainer import Trainer


def held_epoch(trainer: Trainer) -> int | None:
    """The epoch that ``best.pt`` is of, made of what there is where it is missing, damaged or of a lesser epoch.

    A process may have ended between the two files, or somebody's disk damaged one: then the best epoch's weights may
    still be in ``last.pt`` or ``previous.pt``. Where they are not, the best of the epochs that are left takes their
    place, and a warning says which are lost. Called on rank 0, whose trainer has taken up the last checkpoint.

    Returns:
        The epoch; None: no whole epoch's weights are there, and the next one's will be saved.

    Raises:
        FastresError: when ``best.pt`` is another run's, or cannot be written.
    """
    rows = {row["epoch"]: row for row in trainer.history}
    if not rows:
        return None
    best = max(rows.values(), key=report.rank)
    held = trainer.folder.best_epoch(trainer.run)
    if held is not None and (held == best["epoch"] or held > trainer.epoch):  # the latter comes again, and was better
        return best["epoch"]
    found: dict[int, tuple[str, dict[str, Any]]] = {}
    if (previous := _previous(trainer)) is not None and previous["epoch"] in rows:
        found[previous["epoch"]] = "previous.pt", _of_checkpoint(trainer, previous)
    if trainer.batch == 0 and trainer.epoch in rows:
        found[trainer.epoch] = "last.pt", {**state.identity(trainer), "weights": trainer.evaluated.state_dict()}
    known = {epoch for epoch in (held, *found) if epoch in rows}
    chosen = max(known, key=lambda epoch: report.rank(rows[epoch]), default=None)
    damaged = held is None and trainer.folder.best.exists()
    if chosen is not None and chosen != held:
        trainer.folder.save_best(found[chosen][1])
    fault = "is damaged" if damaged else "is missing" if held is None else f"is of epoch {held}"
    if chosen != best["epoch"]:
        now = (
            "the next epoch will be saved there"
            if chosen is None
            else f"it now holds epoch {chosen} ({_score(rows[chosen])})"
        )
        lost = f"the weights of epoch {best['epoch']} ({_score(best)}), the best one, are lost"
        trainer.say(f"warning: {trainer.folder.best} {fault}, and {lost}: {now}")
    elif found[chosen][0] != "last.pt" or damaged:
        trainer.say(f"warning: {trainer.folder.best} {fault}: made again of {found[chosen][0]}, epoch {chosen}")
    return chosen


def _score(row: dict[str, Any]) -> str:
    return f"validation accuracy {row['val_accuracy']:.2%}"


def _previous(trainer: Trainer) -> dict[str, Any] | None:
    """The checkpoint before the last, where it is this run's and of an epoch's end."""
    folder = cast(RunFolder, trainer.folder)  # of rank 0
    saved = folder.load_previous()
    if saved is None or saved.get("run") != trainer.run:
        return None
    try:
        check_content(saved, RUN, folder.previous, "nothing can be made of it")
    except FastresError:
        return None
    return (
        saved if saved["batch"] == 0 and saved["history"] and saved["history"][-1]["epoch"] == saved["epoch"] else None
    )


def _of_checkpoint(trainer: Trainer, saved: dict[str, Any]) -> dict[str, Any]:
    weights, _ = evaluated_weights(saved)
    return {**{name: saved[name] for name in state.identity(trainer) if name in saved}, "weights": weights}
