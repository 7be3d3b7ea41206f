"""What a grid will cost, from a few meta-iterations of its first cell."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from celo_nnx.errors import UserError
from celo_nnx.grids.plan import Cell
from celo_nnx.run_folder import RunFolder
from celo_nnx.training import train

DISPATCHES = 4  # of the probe; the first compiles


@dataclasses.dataclass(frozen=True)
class Probe:
    """What was measured.

    Attributes:
      start: seconds before the first meta-iterations are done, compilation above all.
      each: seconds of a meta-iteration.
      total: seconds of all cells one after the other, evaluation left out.
    """

    start: float
    each: float
    total: float


def probe(cells: Sequence[Cell]) -> Probe:
    """Times the first cell for a few dispatches, in a temporary folder.

    Args:
      cells: of a grid; the others are taken to cost as much a meta-iteration.

    Returns:
      The times.

    Raises:
      UserError: the cell cannot be trained here, such as without its data.

    Example:
      >>> probe(plan(load_grid("mlp_size"))).each  # doctest: +SKIP
      0.15
    """
    config = ConfigDict(copy.deepcopy(cells[0].config))
    per = config.run.iterations_per_dispatch
    config.run.update(iterations=DISPATCHES * per, checkpoint_seconds=1e9, snapshots=0, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = train(config, Path(folder) / "run")
        except UserError as error:
            raise UserError(f"cell {cells[0].name}: {error}") from None
        seconds = RunFolder(Path(folder) / "run").seconds_each()[1]
    each = float(np.median(seconds)) if len(seconds) else result.seconds / result.iteration
    start = max(0.0, result.seconds - each * result.iteration)
    iterations = sum(cell.config["run"]["iterations"] for cell in cells)
    return Probe(start, each, len(cells) * start + each * iterations)


def told(found: Probe, cells: Sequence[Cell]) -> str:
    """Returns the times in a sentence.

    Example:
      >>> told(Probe(15.0, 0.15, 5400.0), [None] * 24)
      'about 1.5 hours for 24 cells one after the other: 15 s to start and 0.15 s a meta-iteration, ...'
    """
    units = ((3600.0, "hours"), (60.0, "minutes"), (0.0, "seconds"))
    size, unit = next((size or 1.0, unit) for size, unit in units if found.total >= size)
    text = f"about {found.total / size:.2g} {unit} for {len(cells)} cells one after the other: "
    return text + f"{found.start:.2g} s to start and {found.each:.2g} s a meta-iteration, as the first"
