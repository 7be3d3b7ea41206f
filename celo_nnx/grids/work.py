"""One cell: meta-training, evaluation, and the result, which is written last."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from celo_nnx import lock, training
from celo_nnx.errors import UserError
from celo_nnx.files import read_json, told, write_json
from celo_nnx.grids.store import CELL_NAME, RESULT_NAME, CellFolder
from celo_nnx.meta.checkpoint import digest, flatten
from celo_nnx.run_folder import RunFolder
from celo_nnx.series import mean
from celo_nnx.theta_io import load_theta

LAST = 5  # the meta-loss of a cell is the mean over the last fifth of its meta-iterations
LABEL = "theta"  # of what is evaluated


def run_cell(path: Path | str, *, stop: training.Stop | None = None) -> str:
    """Runs a cell, or goes on with it; a cell that has its result is left alone.

    Args:
      path: the cell's folder, with its ``cell.json``.
      stop: asked between dispatches; a true value saves and ends the call.

    Returns:
      ``"done"`` or ``"stopped"``.

    Raises:
      UserError: not a cell, in use, or what training or evaluation refuses, which is noted in the folder.

    Example:
      >>> run_cell("runs/grid/cells/0123456789ab")  # doctest: +SKIP
      'done'
    """
    folder, stop = CellFolder(path), stop or (lambda: 0)
    with told(path):
        content = folder.read()
        with lock.hold(folder.path):
            if folder.result() is not None:
                return "done"
            folder.note("start")
            try:
                result = _work(folder, content, stop)
            except KeyboardInterrupt:
                folder.note("stopped")
                raise
            except BaseException as error:
                with contextlib.suppress(OSError):  # such as a full disk, which may be the failure
                    folder.note("failed", error=_reason(error), mistake=_is_mistake(error))
                raise
            if result is None:
                folder.note("stopped")
                return "stopped"
            write_json(folder.path / RESULT_NAME, result)
            folder.note("done")
            return "done"


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())[:2000]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _is_mistake(error: BaseException) -> bool:
    """Whether a user has to change something; a full disk or a lost file system may mend by itself."""
    return isinstance(error, UserError) and not isinstance(error.__context__, OSError)


def _work(folder: CellFolder, content: dict[str, Any], stop: training.Stop) -> dict[str, Any] | None:
    """The cell's result, None where it was stopped."""
    config = ConfigDict(content["config"])
    trained = training.train(config, folder.run_dir, stop=stop)
    if not trained.finished:
        return None
    run = RunFolder(folder.run_dir)
    outcome = course(run.metrics["loss"])
    outcome["iterations"] = trained.iteration
    outcome["nonfinite"] = int(sum(np.nansum(x) for x in run.metrics.families("nonfinite").values()))
    outcome["theta"] = digest(flatten(load_theta(folder.run_dir)), {})
    cost = {"train_seconds": round(run.seconds(), 3), "starts": folder.starts()}
    if content["suite"] is not None:
        try:
            with _interruptible(stop):
                scores, seconds = evaluated(folder, content)
        except KeyboardInterrupt:
            return None
        outcome |= scores
        cost["evaluation_seconds"] = round(seconds, 3)
    return {"id": content["id"], "outcome": outcome, "cost": cost}


def course(losses: np.ndarray) -> dict[str, Any]:
    """Returns the meta-loss over the first and the last fifth, None where none of it is finite.

    Args:
      losses: of every meta-iteration, ``[n]``.

    Example:
      >>> course(np.array([4.0, 3.0, 2.0, 1.0, 0.5, np.nan, 0.25, 0.5, 0.5, 0.25]))
      {'first_meta_loss': 3.5, 'meta_loss': 0.375}
    """
    few = max(1, len(losses) // LAST)
    first, last = mean(losses[:few]), mean(losses[-few:])
    return {
        "first_meta_loss": first if np.isfinite(first) else None,
        "meta_loss": last if np.isfinite(last) else None,
    }


def evaluated(folder: CellFolder, content: dict[str, Any]) -> tuple[dict[str, float], float]:
    """Evaluates the cell's theta on its suite.

    Adam, which scores are relative to, is the same for all cells: its runs are another cell's where one has
    finished them.

    Returns:
      Interquartile means of its final-loss score and speedup, and the seconds of the runs that it made.
    """
    from celo_nnx.evaluation.cells import Cells
    from celo_nnx.evaluation.evaluate import evaluate
    from celo_nnx.evaluation.results import ADAM, load_results
    from celo_nnx.evaluation.standings import standings
    from celo_nnx.evaluation.suites import load_suite

    wanted = content["suite"]
    suite = load_suite(wanted["source"], wanted["overrides"])
    data_dir = content["config"]["run"]["data_dir"]
    names = [f"{LABEL}={folder.run_dir}"]
    _borrow(folder, wanted["settings"])
    evaluate(suite, names, folder=folder.evaluation, data_dir=data_dir)
    results = load_results(folder.evaluation)
    found = next((s for s in standings(results) if s.label == LABEL), None)
    if found is None:
        reasons = "; ".join(f"{task}: {reason}" for task, reason in results.missing().items())
        raise UserError(f"the evaluation gave no scores: {reasons}")
    borrowed = any(row["event"] == "borrowed" for row in folder.attempts())
    mine = [cell for cell in Cells(folder.evaluation) if not (borrowed and cell.optimizer == ADAM)]
    seconds = sum(cell.measured.get("seconds", 0.0) for cell in mine)
    return {name: float(getattr(found, name)["iqm"].value) for name in ("score", "speedup")}, seconds


def _borrow(folder: CellFolder, suite: dict[str, Any]) -> None:
    """Begins an evaluation with Adam's runs of a finished cell on the same suite, where there is one."""
    from celo_nnx.evaluation.cells import Cells
    from celo_nnx.evaluation.results import ADAM, FILE_NAME, read_evaluation, write_evaluation

    if folder.evaluation.exists():
        return
    for path in sorted(folder.path.absolute().parent.glob(f"*/{RESULT_NAME}")):
        other = CellFolder(path.parent)
        theirs = (read_json(other.path / CELL_NAME) or {}).get("suite")
        if theirs is None or theirs["settings"] != suite or not (other.evaluation / FILE_NAME).exists():
            continue
        evaluation, cells = read_evaluation(other.evaluation), Cells(other.evaluation)
        adam = tuple(one for one in evaluation.optimizers if one["label"] == ADAM)
        folder.note("borrowed", cell=other.path.name)
        mine = Cells(folder.evaluation)
        write_evaluation(folder.evaluation, dataclasses.replace(evaluation, optimizers=adam))
        for cell in cells:
            if cell.optimizer == ADAM:
                mine.add(cell, cells.curves(cell))
        return


@contextlib.contextmanager
def _interruptible(stop: training.Stop) -> Iterator[None]:
    """Turns SIGTERM and SIGINT into a KeyboardInterrupt: evaluation keeps what it has finished."""

    def handle(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread, which alone may handle signals
        before = {}
    try:
        if stop():  # it came before the handlers were set
            raise KeyboardInterrupt
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
