"""What the meta-training of a grid will cost, from a few meta-iterations of one cell of each program."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
      start: of every program the seconds before the first meta-iterations are done, compilation above all.
      each: of every program the seconds of a meta-iteration.
      total: seconds of all cells one after the other, evaluation left out.
    """

    start: tuple[float, ...]
    each: tuple[float, ...]
    total: float


def probe(cells: Sequence[Cell]) -> Probe:
    """Times the first cell of each program for a few dispatches, in a temporary folder; says so on stderr.

    Args:
      cells: of a grid. Those whose configs differ in seed, ``run`` and real numbers alone are one program:
        they are taken to cost as much a meta-iteration.

    Returns:
      The times.

    Raises:
      UserError: a cell cannot be trained here, such as without its data.

    Example:
      >>> probe(plan(load_grid("mlp_size"))).each[0]  # doctest: +SKIP
      0.15
    """
    programs: dict[str, list[Cell]] = {}
    for cell in cells:
        programs.setdefault(_program(cell), []).append(cell)
    start, each, total = [], [], 0.0
    for number, some in enumerate(programs.values(), 1):
        print(f"timing program {number} of {len(programs)}: {some[0].name}", file=sys.stderr, flush=True)
        begin, one = _timed(some[0])
        start.append(begin)
        each.append(one)
        total += sum(begin + one * cell.config["run"]["iterations"] for cell in some)
    return Probe(tuple(start), tuple(each), total)


def _program(cell: Cell) -> str:
    """What decides how long a meta-iteration takes, as text."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(one) for one in value]
        return 0.0 if isinstance(value, float) else value

    config = {key: plain(value) for key, value in cell.config.items() if key not in ("seed", "run")}
    return json.dumps(config, sort_keys=True)


def _timed(cell: Cell) -> tuple[float, float]:
    """Seconds to start a cell and of each of its meta-iterations."""
    config = ConfigDict(copy.deepcopy(cell.config))
    per = config.run.iterations_per_dispatch
    config.run.update(iterations=DISPATCHES * per, checkpoint_seconds=1e9, snapshots=0, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = train(config, Path(folder) / "run")
        except UserError as error:
            raise UserError(f"cell {cell.name}: {error}") from None
        seconds = RunFolder(Path(folder) / "run").seconds_each()[1]
    each = float(np.median(seconds)) if len(seconds) else result.seconds / result.iteration
    return max(0.0, result.seconds - each * result.iteration), each


def told(found: Probe, count: int, suite: str = "") -> str:
    """Returns the times in a sentence.

    Args:
      found: from :func:`probe`.
      count: of the cells.
      suite: what they are evaluated on, empty for nothing.

    Example:
      >>> told(Probe((15.0, 12.0), (0.2, 0.1), 5400.0), 24, "smoke")
      'about 1.5 hours for 24 cells one after the other: 12 to 15 s to start and 0.1 to 0.2 s a ...'
    """
    units = ((3600.0, "hours"), (60.0, "minutes"), (0.0, "seconds"))
    size, unit = next((size or 1.0, unit) for size, unit in units if found.total >= size)
    text = f"about {found.total / size:.2g} {unit} for {count} cells one after the other: "
    text += f"{_span(found.start)} s to start and {_span(found.each)} s a meta-iteration, as the first"
    text += f" of each of {len(found.each)} programs" if len(found.each) > 1 else ""
    return text + (f"; the evaluation on {suite} is not included" if suite else "")


def _span(values: Sequence[float]) -> str:
    ends = dict.fromkeys(f"{value:.2g}" for value in (min(values), max(values)))
    return " to ".join(ends)
