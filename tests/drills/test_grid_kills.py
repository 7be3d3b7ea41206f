"""The drill: twelve cells of the stand-in trainer, killed 50 times at random: driver, cells or both.

``CELO_NNX_DRILL_KILLS`` is the number of kills, ``CELO_NNX_DRILL_SEED`` that of the moments; ``pytest -s``
shows the figures.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import made_grid
import pytest

from celo_nnx.grids.drive import run
from celo_nnx.grids.grid_file import load_grid
from celo_nnx.grids.store import CellFolder, read_grid

PROGRAM = Path(made_grid.__file__).with_name("fake_grid.py")
KILLS = int(os.environ.get("CELO_NNX_DRILL_KILLS", "50"))


def start(file: str, folder: Path, pause: float) -> subprocess.Popen:
    words = ["run", file, "--run-dir", str(folder), "--jobs", "2", "--retries", "100"]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    environment = os.environ | {"FAKE_PAUSE": str(pause)}
    return subprocess.Popen([sys.executable, str(PROGRAM), *words], env=environment, **options)


def cells(folder: Path) -> list[CellFolder]:
    return [entry.folder for entry in read_grid(folder).cells] if (folder / "grid.json").exists() else []


def finished(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Result and number of starts of each cell that is done, by its folder's name."""
    done = [cell for cell in cells(folder) if (cell.path / "result.json").exists()]
    return {cell.path.name: ((cell.path / "result.json").read_bytes(), cell.starts()) for cell in done}


def wait_for_another(folder: Path, count: int) -> None:
    end = time.monotonic() + 300.0
    while len(finished(folder)) <= count:
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def outcomes(folder: Path) -> dict[str, dict]:
    return {entry.name: entry.folder.result()["outcome"] for entry in read_grid(folder).cells}


@pytest.mark.drill
def test_no_finished_cell_is_lost_or_repeated(tmp_path: Path) -> None:
    rng = random.Random(int(os.environ.get("CELO_NNX_DRILL_SEED", "0")))
    file, folder, whole = made_grid.file(tmp_path), tmp_path / "killed", tmp_path / "whole"
    kept: dict[str, tuple[bytes, int]] = {}
    counts = {"driver": 0, "cells": 0}
    driver = start(file, folder, 0.2)
    while sum(counts.values()) < KILLS:
        time.sleep(rng.uniform(0.0, 6.0))
        if rng.random() < 0.2 and len(kept) < 10:  # so that there are finished cells, and cells that are not
            wait_for_another(folder, len(kept))
        kind = rng.choice(("driver", "cells", "both"))
        # A number may be another process's by the time it is killed: only those of cells that are locked.
        locked = [cell for cell in cells(folder) if cell.held()] if kind != "driver" else []
        alive = [pid for cell in locked if (pid := cell.pid())]
        for pid in alive:
            try:
                os.kill(pid, signal.SIGKILL)
                counts["cells"] += 1
            except ProcessLookupError:
                pass  # it ended by itself
        if kind != "cells" and driver.poll() is None:
            driver.kill()
            counts["driver"] += 1
        if kind != "cells" or driver.poll() is not None:
            driver.communicate()
            driver = start(file, folder, 0.2)
        for name, one in kept.items():
            assert finished(folder)[name] == one, f"the finished cell {name} was changed or started again"
        kept = finished(folder)
    done_before_the_last = len(kept)
    driver.kill()
    driver.communicate()
    driver = start(file, folder, 0.0)
    out, errors = driver.communicate(timeout=600)
    assert driver.returncode == 0 and json.loads(out)["done"] == 12, errors
    assert {name: finished(folder)[name] for name in kept} == kept and done_before_the_last >= KILLS // 10
    run(load_grid(file), whole, made_grid.inline)
    assert outcomes(folder) == outcomes(whole)
    starts = sum(cell.starts() for cell in cells(folder))
    print(
        json.dumps({"kills": counts, "cells": 12, "starts": starts, "done_under_fire": done_before_the_last})
    )
