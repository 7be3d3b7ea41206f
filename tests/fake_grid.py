"""``celo-nnx grid`` whose cells have the stand-in for the meta-trainer: ``fake_grid.py run ...``."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from celo_nnx import cli
from celo_nnx.grids import local, slurm


def command(path: Path) -> list[str]:
    """The command line of a cell."""
    return [sys.executable, str(Path(__file__).with_name("fake_cell.py")), str(path)]


if __name__ == "__main__":
    for engine in (local.Local, slurm.Slurm):
        engine.__init__ = functools.partialmethod(engine.__init__, command=command)
    sys.exit(cli.main(["grid", *sys.argv[1:]]))
