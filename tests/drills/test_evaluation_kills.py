"""The drill: an evaluation, killed, terminated or stopped at random moments, ends as an undisturbed one.

``CELO_NNX_DRILL_KILLS`` is the number of signals that end it, ``CELO_NNX_DRILL_SEED`` that of the moments;
``pytest -s`` shows the figures.
"""

from __future__ import annotations

import collections
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from celo_nnx import lock
from celo_nnx.evaluation.cells import Cells

KILLS = int(os.environ.get("CELO_NNX_DRILL_KILLS", "12"))
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"  # to compile, as tests do
SUITE = '''
"""Two quadratics."""

from ml_collections import ConfigDict


def get_config():
    bowl = dict(kind="quadratic", eigenvalues=(1.0, 0.1), columns=3, rotated=False)
    tasks = dict(bowl=bowl, noisy=dict(bowl, noise=0.1))
    return ConfigDict(dict(steps=20, schedule="constant", seeds=2, evaluations=2, batches=1, tasks=tasks))
'''


def start(file: Path, folder: Path, cache: Path) -> subprocess.Popen:
    words = ["evaluate", str(file), "--optimizers", "adam,sgd,lion", "--run-dir", str(folder)]
    kept = {
        "XLA_FLAGS": QUICK,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | kept)
    return subprocess.Popen([sys.executable, "-m", "celo_nnx", *words], **options)


def finish(file: Path, folder: Path, cache: Path) -> int:
    """Runs to the end; returns how many cells it computed."""
    child = start(file, folder, cache)
    out, errors = child.communicate(timeout=900)
    assert child.returncode == 0, errors
    return json.loads(out)["computed"]


def cells(folder: Path) -> bytes:
    """The lines of finished cells, without one that was cut off."""
    file = folder / "cells.jsonl"
    text = file.read_bytes() if file.exists() else b""
    return text[: text.rfind(b"\n") + 1]


def wait(child: subprocess.Popen, condition) -> None:
    end = time.monotonic() + 600.0
    while child.poll() is None and not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def refused(file: Path, folder: Path, cache: Path, pid: int) -> None:
    """A second start, while the first is stopped, ends with one line that names it."""
    second = start(file, folder, cache)
    out, errors = second.communicate(timeout=600)
    assert second.returncode == 2 and not out, errors
    assert errors.splitlines()[-1].endswith(f"is in use by pid {pid}") and "Traceback" not in errors


def same(one: Path, other: Path) -> None:
    mine, theirs = ({cell.key: cell for cell in Cells(folder)} for folder in (one, other))
    assert mine.keys() == theirs.keys() and len(cells(one).splitlines()) == len(mine)  # none was run again
    for key in mine:
        a, b = Cells(one).curves(mine[key]), Cells(other).curves(theirs[key])
        np.testing.assert_array_equal(a.losses, b.losses)
        for split in b.held_out:
            np.testing.assert_array_equal(a.held_out[split], b.held_out[split])


@pytest.mark.drill
def test_no_cell_is_lost_or_repeated(tmp_path: Path) -> None:
    rng = random.Random(int(os.environ.get("CELO_NNX_DRILL_SEED", "0")))
    file, cache, whole = tmp_path / "bowls.py", tmp_path / "cache", tmp_path / "whole"
    file.write_text(SUITE)
    everything = finish(file, whole, cache)
    kinds, rounds, kept = collections.Counter(), 0, 0
    while kinds.total() < KILLS:
        folder = tmp_path / f"killed{rounds}"
        before = cells(folder)
        child = start(file, folder, cache)
        wait(child, lambda folder=folder: lock.held(folder))
        if rng.random() < 0.5:
            wait(child, lambda folder=folder, before=before: len(cells(folder)) > len(before))
        time.sleep(rng.uniform(0.0, 1.0))
        kind = rng.choice(("killed", "killed", "terminated", "stopped"))
        if child.poll() is None and kind == "stopped":
            child.send_signal(signal.SIGSTOP)
            if lock.held(folder):
                refused(file, folder, cache, child.pid)
            child.send_signal(signal.SIGCONT)
            time.sleep(rng.uniform(0.0, 0.5))
        child.send_signal(signal.SIGTERM if kind == "terminated" else signal.SIGKILL)
        child.communicate(timeout=600)
        assert child.returncode in (0, -signal.SIGTERM, -signal.SIGKILL)
        assert cells(folder).startswith(before), "a finished cell was changed"
        if child.returncode:
            kinds[kind] += 1
        if child.returncode == 0 or kinds.total() == KILLS:
            found = len(cells(folder).splitlines())
            assert finish(file, folder, cache) == everything - found
            same(folder, whole)
            rounds, kept = rounds + 1, kept + found
    print(json.dumps({"signals": kinds, "evaluations": rounds, "cells_each": everything, "kept": kept}))
