"""A disk that fills, a folder that cannot be written, a clock that jumps: one clear line, and it goes on."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_run
import numpy as np
import pytest

from celo_nnx import training
from celo_nnx.cli import main
from celo_nnx.errors import UserError
from celo_nnx.meta import checkpoint, runlog

ITERATIONS = 12
SPACE = 2**20  # bytes


def train(folder: Path, stop: Any = None, iterations: int = ITERATIONS) -> dict[str, np.ndarray]:
    with fake_run.assembled():
        result = training.train(fake_run.config(iterations), folder, progress=False, stop=stop)
    return checkpoint.flatten(result.theta)


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys() and all(one[k].tobytes() == other[k].tobytes() for k in one)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return train(tmp_path_factory.mktemp("whole") / "a")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    try:
        words = ["mount", "-t", "tmpfs", "-o", f"size={SPACE}", "tmpfs", str(path)]
        made = subprocess.run(words, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no mount: {error}")
    if made.returncode:
        pytest.skip(f"a small file system needs root: {made.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def fill(disk: Path, left: int) -> Path:
    """Takes all the space but ``left`` bytes."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    with open(disk / "filler", "wb") as file, contextlib.suppress(OSError):
        file.write(bytes(max(free - left, 0)))
    return disk / "filler"


# Less than a page, a part of a checkpoint, a checkpoint but not the log or theta beside it.
@pytest.mark.parametrize("left", (0, 4096, 12288, 24576, 40960))
def test_a_full_disk_loses_nothing(left: int, disk: Path, whole: dict[str, np.ndarray]) -> None:
    folder, asked = disk / "a", []

    def stop() -> int:
        asked.append(1)
        if len(asked) == 3:
            fill(disk, left)
        return 0

    with pytest.raises(UserError, match="No space left on device") as told:
        train(folder, stop)
    assert len(str(told.value).splitlines()) == 1
    kept = max(checkpoint.steps(folder / "checkpoints"))
    assert kept >= 2
    with pytest.raises(UserError, match="No space left on device"):  # no room to go on: refused, not damaged
        train(folder)
        fill(disk, 0)
        train(folder)
    (disk / "filler").unlink()
    same(train(folder), whole)
    assert len(runlog.read(folder / "metrics.jsonl")) == ITERATIONS


def test_a_read_only_folder_is_refused_and_can_be_looked_at(disk: Path, capsys: Any, tmp_path: Path) -> None:
    folder = disk / "a"
    train(folder, iterations=4)
    before = contents(folder)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(UserError, match="Read-only file system") as told:
        train(folder)
    assert len(str(told.value).splitlines()) == 1
    with pytest.raises(UserError, match="Read-only file system"):
        train(disk / "new")
    assert main(["watch", str(folder), "--once"]) == 0
    assert main(["report", str(folder)]) == 2
    assert "Read-only file system" in capsys.readouterr().err
    assert main(["report", str(folder), "--out", str(tmp_path / "a.html")]) == 0
    assert contents(folder) == before


@pytest.mark.parametrize("jump", (-1e9, 1e9, -3600.0))
def test_a_clock_that_jumps_changes_no_result(
    jump: float, whole: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    clock, asked, folder = time.time, [], tmp_path / "a"
    monkeypatch.setattr(time, "time", lambda: clock() + jump * (len(asked) > 2))

    def stop() -> int:
        asked.append(1)
        return 15 * (len(asked) == 5)

    train(folder, stop)
    asked.clear()  # and back
    for path in folder.rglob("*"):
        os.utime(path, (clock() + 1e8, clock() + 1e8))
    same(train(folder), whole)
    rows = runlog.read(folder / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [*range(1, ITERATIONS + 1)]
    assert main(["watch", str(folder), "--once"]) == 0
    assert "finished" in capsys.readouterr().out
    assert main(["report", str(folder)]) == 0
