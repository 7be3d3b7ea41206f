"""``celo-nnx grid cell`` with the stand-in for the meta-trainer: ``python tests/fake_cell.py DIR``.

``FAKE_PAUSE`` is the time of a dispatch in seconds, or ``FAKE_PAUSE_ID`` that of the cell with this id. Where
a file ``break`` lies in the cell's folder, the cell fails with what it says; where it is named
``break-once``, only the first time.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest import mock

import fake_run

from celo_nnx import cli
from celo_nnx.grids import work


def main(folder: str) -> int:
    """Runs the cell as the command does, signals included."""
    train = work.training.train

    def breaking(*args, **options):
        for name in ("break", "break-once"):
            path = Path(folder) / name
            if path.exists():
                text = path.read_text()
                if name == "break-once":
                    path.unlink()
                raise RuntimeError(text)
        return train(*args, **options)

    own = f"FAKE_PAUSE_{Path(folder).name}"
    pause = float(os.environ.get(own, os.environ.get("FAKE_PAUSE", "0")))
    with fake_run.assembled(pause), mock.patch.object(work.training, "train", breaking):
        return cli.main(["grid", "cell", folder])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
