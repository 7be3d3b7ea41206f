"""The drill: twelve cells on two cores, the driver and two cells killed at random three times."""

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

from celo_nnx.grids.store import CellFolder, GridFolder, read_grid


def start(file: Path, folder: Path) -> subprocess.Popen:
    words = ["grid", "run", str(file), "--run-dir", str(folder), "--jobs", "2"]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-m", "celo_nnx", *words], **options)


def finish(file: Path, folder: Path) -> GridFolder:
    driver = start(file, folder)
    out, errors = driver.communicate(timeout=1800)
    assert driver.returncode == 0 and json.loads(out)["done"] == 12, errors
    return read_grid(folder)


def kept(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in folder.glob("cells/*/result.json")}


def running(folder: Path) -> list[CellFolder]:
    cells = [entry.folder for entry in read_grid(folder).cells] if (folder / "grid.json").exists() else []
    return [cell for cell in cells if cell.pid()]


@pytest.mark.drill
def test_three_times_the_driver_and_two_cells_are_killed(tmp_path: Path) -> None:
    rng = random.Random(int(os.environ.get("CELO_NNX_DRILL_SEED", "0")))
    file, folder = tmp_path / "twelve.py", tmp_path / "killed"
    file.write_text(made_grid.TWELVE)
    whole = finish(file, tmp_path / "whole")
    for _ in range(3):
        before = len(kept(folder))
        driver = start(file, folder)
        wanted = before + rng.randint(0, 2)
        while len(kept(folder)) < wanted or len(running(folder)) < 2:
            assert driver.poll() is None, driver.communicate()[1]
            time.sleep(0.05)
        time.sleep(rng.uniform(0.0, 8.0))
        for cell in running(folder):
            if pid := cell.pid():
                os.kill(pid, signal.SIGKILL)
        driver.kill()
        driver.communicate()
        assert len(kept(folder)) < 12, "the grid ended before all kills: longer cells are needed"
    results = kept(folder)
    killed = finish(file, folder)
    assert {key: value for key, value in kept(folder).items() if key in results} == results
    for one, other in zip(killed.cells, whole.cells, strict=True):
        mine, theirs = one.folder.result(), other.folder.result()
        assert one.name == other.name and mine["outcome"] == theirs["outcome"], one.name
    ends = [[row["event"] for row in entry.folder.attempts()].count("done") for entry in killed.cells]
    assert ends == [1] * 12  # none was run again
    assert sum(entry.folder.starts() for entry in killed.cells) >= 12 + 3
