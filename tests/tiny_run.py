"""The real meta-trainer at the smallest sizes, as processes: a meta-iteration takes a millisecond.

With a folder for compiled programs a start takes seconds, but for the first.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CHANGES = (
    "run.devices=1",
    "run.progress=False",
    "optimizer.features.groups=('gradient','momentum','factored_momentum')",
    "optimizer.update_rule.hidden=(2,2)",
    "tasks.hidden=(4,)",
    "tasks.batch_size=4",
    "meta.estimator.pairs=2",
    "meta.estimator.truncation=5",
    "meta.unroll.minimum=10",
    "meta.unroll.maximum=60",
)


def command(run_dir: Path, iterations: int, *changes: str) -> list[str]:
    """The command line of ``celo-nnx train``."""
    words = ["train", "celo2_base:fast_digits", *CHANGES, f"run.iterations={iterations}", *changes]
    return [sys.executable, "-m", "celo_nnx", *words, "--run-dir", str(run_dir)]


def start(run_dir: Path, iterations: int, *changes: str, cache: Path) -> subprocess.Popen:
    """Starts or resumes the run; ``cache`` keeps the compiled programs."""
    kept = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    pipe, words = subprocess.PIPE, command(run_dir, iterations, *changes)
    return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=os.environ | kept)


def finish(run_dir: Path, iterations: int, *changes: str, cache: Path) -> None:
    """Runs to the end."""
    child = start(run_dir, iterations, *changes, cache=cache)
    _, errors = child.communicate(timeout=900)
    assert child.returncode == 0, errors
