"""Made-up evaluations: folders of curves that are formulas, written as ``celo-nnx evaluate`` writes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from celo_nnx.evaluation.cells import Cell, Cells
from celo_nnx.evaluation.curves import Curves, choose, tune
from celo_nnx.evaluation.results import Evaluation, write_evaluation

STEPS, SEEDS = 200, (0, 1, 2)
RATES = (0.001, 0.01, 0.1, 1.0)
VERSIONS = {"python": "3.12.0", "jax": "0.10.2", "devices": "2 x cpu"}
ABOUT = {"adam": "betas 0.9, 0.999", "fast": "theta of runs/a, digest 12ab", "bad": "noisy"}


def suite(tasks: Sequence[str], **changes: Any) -> dict[str, Any]:
    """A suite's part of ``evaluation.json``."""
    plan = dict(name="made", steps=STEPS, schedule="constant", seeds=list(SEEDS), evaluations=2, batches=4)
    return plan | {"tasks": {name: {"kind": "image_mlp", "width": 8} for name in tasks}} | changes


def begin(folder: Path, tasks: Sequence[str], labels: Sequence[str], skipped: dict[str, str] | None = None):
    """Writes ``evaluation.json``."""
    plan = suite([*tasks, *(skipped or {})])
    optimizers = tuple({"label": label, "about": ABOUT.get(label, "")} for label in labels)
    write_evaluation(
        folder, Evaluation(plan, optimizers, skipped or {}, "celo-nnx evaluate mine --run-dir here")
    )


def grid(
    curve: Callable[[np.ndarray, float, int], np.ndarray],
    steps: int = STEPS,
    rates: Sequence[float] = RATES,
    seeds: Sequence[int] = SEEDS,
) -> np.ndarray:
    """Losses ``[n_lr, n_seeds, steps]`` of a formula of (steps ``[steps]``, learning rate, seed)."""
    at = np.arange(1, steps + 1, dtype=np.float64)
    return np.array([[curve(at, rate, seed) for seed in seeds] for rate in rates], np.float32)


def add(
    cells: Cells,
    task: str,
    label: str,
    losses: np.ndarray,
    *,
    rates: Sequence[float] = RATES,
    validation: np.ndarray | None = None,
    **changes: Any,
) -> Cell:
    """Adds a cell with these curves, tuned by them; ``changes`` to its fields."""
    tuned, warnings = tune(losses, rates), []
    other = None if validation is None else choose(validation[..., -1], rates)
    for words, choice in (("training", tuned), ("validation", other)):
        warnings += [f"{words}: {choice.warning}"] if choice is not None and choice.warning else []
    measured = dict(seconds=9.0, compile_seconds=2.0, step_seconds=1e-3, state_bytes=800.0, temp_bytes=4e5)
    fields: dict[str, Any] = dict(
        task=task,
        optimizer=label,
        schedule="constant",
        steps=losses.shape[-1],
        seeds=SEEDS,
        learning_rates=tuple(rates),
        training=tuned.best,
        validation=None if other is None else other.best,
        warnings=tuple(warnings),
        floor=None,
        measured=measured | {"parameters": 100.0},
        config={"task": {"kind": "image_mlp", "width": 8}},
        versions=VERSIONS,
    )
    held_out = {} if validation is None else {"validation": validation}
    return cells.add(Cell(**(fields | changes)), Curves(losses, held_out))


def falling(at: np.ndarray, rate: float, seed: int, *, low: float = 0.2, pace: float = 1.0) -> np.ndarray:
    """A loss that falls without noise, fastest at a rate of 0.1; seeds differ a little."""
    speed = pace / 60 / (1 + np.log10(rate / 0.1) ** 2)
    return low + (2 + 0.01 * seed) * np.exp(-speed * at)


def noisy(at: np.ndarray, rate: float, seed: int, *, low: float = 0.2, pace: float = 1.0) -> np.ndarray:
    """The same with noise."""
    generator = np.random.default_rng([seed, int(1e6 * rate)])
    return falling(at, rate, seed, low=low, pace=pace) * np.exp(0.1 * generator.normal(size=len(at)))


def adam(cells: Cells, task: str, curve: Callable[..., np.ndarray], **changes: Any) -> None:
    """Adds Adam's cells for K and 4 K steps."""
    held_out = grid(curve)[..., [99, 199]] + np.float32(0.1)
    add(cells, task, "adam", grid(curve), validation=held_out, **changes)
    add(cells, task, "adam", grid(curve, 4 * STEPS, RATES[1:]), rates=RATES[1:], **changes)


def make(folder: Path) -> Path:
    """Three optimizers on three tasks, with all that a report must tell.

    On ``smooth``, ``fast`` is Adam at half the steps. On ``noisy`` a run of ``bad`` diverged and its best
    learning rate lies on the edge. On ``hard``, with a floor, Adam never gets as low as ``fast``. A task was
    skipped.
    """
    begin(folder, ("smooth", "noisy", "hard"), ("adam", "fast", "bad"), {"lm_large": "text 'lm1b' not found"})
    cells = Cells(folder)
    adam(cells, "smooth", falling)
    add(cells, "smooth", "fast", grid(lambda at, rate, seed: falling(2 * at, rate, seed)))
    add(cells, "smooth", "bad", grid(lambda at, rate, seed: falling(at / 3, rate, seed)))
    adam(cells, "noisy", noisy)
    fast = grid(lambda at, rate, seed: noisy(at, rate, seed + 10, pace=1.5))
    held_out = np.flip(fast, axis=0)[..., [99, 199]]  # chooses another rate
    more = {"seconds": 9.0, "step_seconds": 3e-3, "state_bytes": 1600.0, "parameters": 100.0}
    add(cells, "noisy", "fast", fast, validation=held_out, measured=more)
    bad = grid(lambda at, rate, seed: noisy(at, 0.1, seed, pace=0.1 + rate / 10))
    bad[-1, 2, 150:] = np.inf
    add(cells, "noisy", "bad", bad)
    adam(cells, "hard", lambda at, rate, seed: falling(at, rate, seed, low=1.5), floor=1.0)
    add(cells, "hard", "fast", grid(lambda at, rate, seed: falling(at, rate, seed, low=1.25)), floor=1.0)
    add(cells, "hard", "bad", grid(lambda at, rate, seed: falling(at, rate, seed, low=2.0)), floor=1.0)
    return folder
