"""Real processes: a cell and the driver killed, a driver asked to stop; nothing is lost or done twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import made_grid

from celo_nnx.grids.drive import run
from celo_nnx.grids.grid_file import load_grid
from celo_nnx.grids.store import CellFolder, read_grid
from celo_nnx.meta import checkpoint

PROGRAM = Path(made_grid.__file__).with_name("fake_grid.py")


def start(file: str, folder: Path, pause: float) -> subprocess.Popen:
    words = ["run", file, "--run-dir", str(folder), "--jobs", "2"]
    environment = os.environ | {"FAKE_PAUSE": str(pause)}
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    return subprocess.Popen([sys.executable, str(PROGRAM), *words], **options)


def wait_for(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def done(cell: CellFolder) -> int:
    return max(checkpoint.steps(cell.run_dir / "checkpoints"), default=-1)


def outcomes(folder: Path) -> dict[str, dict]:
    return {entry.name: entry.folder.result()["outcome"] for entry in read_grid(folder).cells}


def test_killed_and_stopped_it_ends_as_if_nothing_had_happened(tmp_path):
    text = (
        made_grid.FILE[: made_grid.FILE.index('                ("std"')]
        + "            ),\n            seeds=(0,),"
    )
    file = made_grid.file(tmp_path, text + "\n        )\n    )\n")
    folder = tmp_path / "g"

    driver = start(file, folder, 0.5)
    wait_for(lambda: (folder / "grid.json").exists())
    one, other = (entry.folder for entry in read_grid(folder).cells)
    wait_for(lambda: done(one) >= 2)
    wait_for(lambda: done(other) >= 2)
    os.kill(one.pid(), signal.SIGKILL)
    driver.kill()
    driver.communicate()
    left = other.pid()
    assert left and one.state() != "done"  # the other cell's process outlives its driver

    driver = start(file, folder, 0.5)
    wait_for(lambda: one.starts() >= 2 and one.held())
    wait_for(lambda: done(one) >= 4)
    driver.send_signal(signal.SIGTERM)
    out, errors = driver.communicate(timeout=120)
    assert driver.returncode == 0, errors
    if json.loads(out)["done"] < 2:
        assert json.loads(out)["stopped_by"] == signal.SIGTERM
    assert not one.held() and not other.held()

    driver = start(file, folder, 0.0)
    out, errors = driver.communicate(timeout=120)
    assert driver.returncode == 0 and json.loads(out)["done"] == 2, errors
    assert one.starts() >= 2

    whole = tmp_path / "whole"
    run(load_grid(file), whole, made_grid.inline)
    assert outcomes(folder) == outcomes(whole)
