"""The drill: a digits run killed 20 times at random moments ends where the uninterrupted one does."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from celo_nnx.meta import checkpoint, runlog
from celo_nnx.theta_io import load_theta

ITERATIONS = 240


def command(run_dir: Path) -> list[str]:
    changes = [
        f"run.iterations={ITERATIONS}",
        "run.iterations_per_dispatch=2",
        "run.checkpoint_seconds=0.0",
        "run.progress=False",
        "optimizer.features.groups=('gradient','momentum','factored_momentum')",  # a quicker compilation
        "meta.estimator.truncation=10",
        "meta.unroll.minimum=10",
        "meta.unroll.maximum=60",
    ]
    return [
        sys.executable,
        "-m",
        "celo_nnx",
        "train",
        "celo2:fast_digits",
        *changes,
        "--run-dir",
        str(run_dir),
    ]


def steps_done(run_dir: Path) -> int:
    return max(checkpoint.steps(run_dir / "checkpoints"), default=-1)


def start(run_dir: Path) -> subprocess.Popen:
    return subprocess.Popen(command(run_dir), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(run_dir: Path) -> None:
    child = start(run_dir)
    _, errors = child.communicate(timeout=900)
    assert child.returncode == 0, errors


def interrupt(run_dir: Path, number: int, wait_for: int, delay: float) -> None:
    """Starts the run; ``delay`` seconds after ``wait_for`` more iterations, sends it a signal."""
    before, child = steps_done(run_dir), start(run_dir)
    while child.poll() is None and steps_done(run_dir) < before + wait_for:
        time.sleep(0.01)
    time.sleep(delay)
    child.send_signal(number)
    _, errors = child.communicate(timeout=300)
    assert child.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 0), errors


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drill") / "whole"
    finish(folder)
    return folder


def same(one: Path, other: Path) -> None:
    a, b = load_theta(one)["update_rule"], load_theta(other)["update_rule"]
    for name in ("b0", "w1", "b1", "w2", "b2"):
        assert a[name].tobytes() == b[name].tobytes(), name
    assert all(np.array_equal(a["w0"][k], b["w0"][k]) for k in a["w0"])
    rows = [runlog.read(folder / "metrics.jsonl") for folder in (one, other)]
    strip = [[{k: v for k, v in row.items() if k != "time"} for row in r] for r in rows]
    assert len(strip[0]) == ITERATIONS and strip[0] == strip[1]


@pytest.mark.drill
def test_twenty_kills(whole: Path, tmp_path: Path) -> None:
    seed = int(os.environ.get("CELO_NNX_DRILL_SEED", "0"))
    rng = random.Random(seed)
    for kill in range(20):
        # Every fourth one dies while it starts, compiles or reads its checkpoint.
        early = kill % 4 == 3
        wait_for, delay = (0, rng.uniform(0.5, 8.0)) if early else (rng.randint(1, 8), rng.uniform(0.0, 0.5))
        interrupt(tmp_path / "a", signal.SIGKILL, wait_for, delay)
        assert steps_done(tmp_path / "a") < ITERATIONS, (
            "the run ended before all kills: more iterations are needed"
        )
    finish(tmp_path / "a")
    same(tmp_path / "a", whole)


@pytest.mark.drill
def test_three_sigterms(whole: Path, tmp_path: Path) -> None:
    for wait_for, delay in ((2, 0.1), (0, 10.0), (10, 0.0)):
        interrupt(tmp_path / "a", signal.SIGTERM, wait_for, delay)
    finish(tmp_path / "a")
    same(tmp_path / "a", whole)
