"""The drill: 5,000 meta-iterations with a checkpoint every ten; memory, open files, folder stay flat."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny_run

from celo_nnx import training
from celo_nnx.config import load
from celo_nnx.meta import checkpoint

ITERATIONS, SETTLED, KEEP = 5000, 500, 2


def measured(run_dir: Path) -> dict[str, float]:
    """Resident memory of this process in MB, its open files and threads; the folder without its log in kB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    files = [p for p in run_dir.rglob("*") if p.is_file() and p.name != "metrics.jsonl"]
    size = sum(path.stat().st_size for path in files) / 1000
    handles, threads = len(os.listdir("/proc/self/fd")), int(status["Threads"])
    return {"mb": int(status["VmRSS"].split()[0]) / 1024, "files": handles, "threads": threads, "kb": size}


@pytest.mark.drill
def test_nothing_grows(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc")
    changes = (f"run.iterations={ITERATIONS}", "run.checkpoint_seconds=0.0", f"run.keep={KEEP}")
    config = load("celo2_base:fast_digits", [*tiny_run.CHANGES, *changes])
    folder, seen, save = tmp_path / "a", {}, checkpoint.save

    def noted(directory: Path, step: int, *arguments: Any) -> None:
        save(directory, step, *arguments)
        if step >= SETTLED and step % SETTLED == 0:
            seen[step] = measured(folder)

    with mock.patch.object(checkpoint, "save", noted):
        assert training.train(config, folder, progress=False).finished
    begin, end = seen[SETTLED], seen[ITERATIONS]
    figures = {"meta_iterations": ITERATIONS, "checkpoints": ITERATIONS // 10}
    for name in begin:
        most = max(row[name] for row in seen.values())
        figures[name] = {
            "after_500": round(begin[name], 1),
            "most": round(most, 1),
            "end": round(end[name], 1),
        }
    print(json.dumps(figures))
    assert end["mb"] <= 1.05 * begin["mb"] and end["files"] <= begin["files"]
    assert end["threads"] <= begin["threads"] + 2  # pools that fill up when they are needed
    assert end["kb"] <= 1.05 * begin["kb"] and len(checkpoint.steps(folder / "checkpoints")) == KEEP
