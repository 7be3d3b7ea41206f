"""Small grids for tests: files, and an engine that runs cells of the stand-in trainer in this process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import fake_run

from celo_nnx.errors import UserError
from celo_nnx.grids.store import CellFolder
from celo_nnx.grids.work import run_cell

FILE = '''
"""A small grid."""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(
        dict(
            question="Which rate?",
            base="celo2:fast_digits",
            overrides=(
                "run.iterations=12",
                "run.iterations_per_dispatch=2",
                "run.checkpoint_seconds=0.0",
                "run.devices=1",
                "run.progress=False",
            ),
            axes=(
                ("rate", {"1e-3": ("meta.optimizer.learning_rate=1e-3",), "3e-3": RATE}),
                ("std", {"small": (), "large": ("meta.estimator.std=0.1", "meta.estimator.pairs=4")}),
            ),
            seeds=(0, 1, 2),
        )
    )
'''
RATE = '("meta.optimizer.learning_rate=3e-3",)'

# Cells of the real trainer.
TWELVE = '''
"""Twelve short cells."""

from ml_collections import ConfigDict


def get_config():
    rates = {x: (f"meta.optimizer.learning_rate={x}",) for x in ("3e-4", "1e-3", "3e-3")}
    stds = {x: (f"meta.estimator.std={x}",) for x in ("0.01", "0.1")}
    return ConfigDict(
        dict(
            question="Does a grid survive?",
            base="celo2_base:fast_digits",
            overrides=(
                "run.iterations=60",
                "run.iterations_per_dispatch=2",
                "run.checkpoint_seconds=0.0",
                "run.devices=1",
                "optimizer.features.groups=('gradient','momentum')",
                "meta.estimator.truncation=10",
            ),
            axes=(("rate", rates), ("std", stds)),
            seeds=(0, 1),
        )
    )
'''


def file(folder: Path, text: str = FILE, rate: str = RATE, name: str = "small.py") -> str:
    """Writes a grid file."""
    path = folder / name
    path.write_text(text.replace("RATE", rate))
    return str(path)


def inline(folders: Sequence[CellFolder], stop, tell) -> None:
    """An engine: one cell after the other, here."""
    with fake_run.assembled():
        for folder in [one for one in folders if one.result() is None]:
            if stop():
                return
            tell("started", folder)
            try:
                run_cell(folder.path, stop=stop)
                tell("done", folder)
            except (UserError, RuntimeError):
                tell("failed", folder)
