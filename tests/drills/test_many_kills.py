"""The drill: one meta-training, 200 kills at random moments; it ends where the undisturbed one does.

``CELO_NNX_DRILL_KILLS`` is the number of kills, ``CELO_NNX_DRILL_SEED`` that of the moments; ``pytest -s``
shows the figures.
"""

from __future__ import annotations

import collections
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import tiny_run

from celo_nnx.meta import checkpoint, runlog
from celo_nnx.theta_io import load_theta

KILLS = int(os.environ.get("CELO_NNX_DRILL_KILLS", "200"))
INTERVAL = 2  # meta-iterations between checkpoints
ITERATIONS = 60 * KILLS + 200
OFTEN = (f"run.iterations_per_dispatch={INTERVAL}", "run.checkpoint_seconds=0.0")


def newest(run_dir: Path) -> int:
    return max(checkpoint.steps(run_dir / "checkpoints"), default=0)


def unfinished(run_dir: Path) -> set[str]:
    """Names of checkpoints under way, or cut off."""
    folder = run_dir / "checkpoints"
    return {name for name in os.listdir(folder) if not name.isdecimal()} if folder.is_dir() else set()


def logged(run_dir: Path) -> int:
    rows = runlog.read(run_dir / "metrics.jsonl")
    return rows[-1]["iteration"] if rows else 0


def wait(child, condition, seconds: float = 600.0) -> None:
    end = time.monotonic() + seconds
    while child.poll() is None and not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.001)


def disturb(run_dir: Path, cache: Path, kind: str, rng: random.Random) -> tuple[int, int, bool]:
    """Starts the run and kills it; returns where it began, where it ended, whether a write was cut off."""
    before, old = newest(run_dir), unfinished(run_dir)
    child = tiny_run.start(run_dir, ITERATIONS, *OFTEN, cache=cache)
    if kind == "any":
        time.sleep(rng.uniform(0.0, 5.0))
    else:
        wait(child, lambda: newest(run_dir) > before)
    if kind == "stopped":
        child.send_signal(signal.SIGSTOP)
        time.sleep(rng.uniform(0.0, 0.5))
        child.send_signal(signal.SIGCONT)
    if kind == "writing":
        wait(child, lambda: unfinished(run_dir) - old)
        time.sleep(rng.uniform(0.0, 0.05))
    elif kind != "any":
        time.sleep(rng.uniform(0.0, 0.5))
    if kind == "terminated":
        child.send_signal(signal.SIGTERM)
        _, errors = child.communicate(timeout=600)
        assert child.returncode == 0, errors
    else:
        child.kill()
        _, errors = child.communicate(timeout=600)
        assert child.returncode == -signal.SIGKILL, errors
    return before, logged(run_dir), bool(unfinished(run_dir) - old)


def same(one: Path, other: Path) -> None:
    a, b = (checkpoint.flatten(load_theta(folder)) for folder in (one, other))
    assert a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)
    rows = [runlog.read(folder / "metrics.jsonl") for folder in (one, other)]
    strip = [[{k: v for k, v in row.items() if k != "time"} for row in found] for found in rows]
    assert len(strip[0]) == ITERATIONS and strip[0] == strip[1]


@pytest.mark.drill
def test_every_kill_costs_one_interval_and_one_write_at_most(tmp_path: Path) -> None:
    rng = random.Random(int(os.environ.get("CELO_NNX_DRILL_SEED", "0")))
    cache, killed, whole = tmp_path / "cache", tmp_path / "killed", tmp_path / "whole"
    lost, cut, kinds = [], 0, collections.Counter()
    while kinds.total() - kinds["terminated"] < KILLS:
        kind = rng.choice(("any", "running", "stopped", "writing", "writing", "terminated"))
        before, reached, torn = disturb(killed, cache, kind, rng)
        kinds[kind] += 1
        cut += torn
        # Rows are written as soon as their dispatch is done; the write of its checkpoint follows at once.
        lost.append(max(reached - newest(killed), 0))
        assert before <= newest(killed) < ITERATIONS, "the run ended before all kills"
        assert lost[-1] <= INTERVAL, (kind, reached, newest(killed))
        assert kind != "terminated" or lost[-1] == 0
    # A third of the kills wait for a write to begin, and most of those cut it off.
    assert cut >= KILLS // 10 and cut > 0, "no checkpoint was being written when the run was killed"
    tiny_run.finish(killed, ITERATIONS, cache=cache)
    tiny_run.finish(whole, ITERATIONS, cache=cache)
    same(killed, whole)
    starts = json.loads((killed / "run_info.json").read_text())["starts"]
    begun = [start["iteration"] for start in starts]
    assert begun == sorted(begun)
    figures = {"kills": KILLS, "sigterms": kinds["terminated"], "stopped_and_continued": kinds["stopped"]}
    figures |= {"writes_cut_off": cut, "starts_that_trained": len(starts), "meta_iterations": ITERATIONS}
    figures |= {"most_iterations_lost": max(lost), "iterations_lost": sum(lost), "interval": INTERVAL}
    print(json.dumps(figures | {"theta": "bit-identical"}))
