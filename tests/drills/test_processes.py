"""The drills of several devices and processes with a real config, one of them under Slurm."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import toy_run

from celo_nnx.meta import checkpoint, runlog
from celo_nnx.theta_io import load_theta

ITERATIONS = 12


def command(run_dir: Path, *changes: str) -> list[str]:
    small = [
        f"run.iterations={ITERATIONS}",
        "run.iterations_per_dispatch=2",
        "run.checkpoint_seconds=0.0",
        "run.progress=False",
        "optimizer.features.groups=('gradient','momentum','factored_momentum')",  # a quicker compilation
        "meta.estimator.truncation=10",
        "meta.unroll.minimum=10",
        "meta.unroll.maximum=60",
        "meta.augmentation.high=1.0",  # larger scales amplify the order of a sum
    ]
    return ["-m", "celo_nnx", "train", "celo2:fast_digits", *small, *changes, "--run-dir", str(run_dir)]


def finish(run_dir: Path, *changes: str, count: int = 1) -> list[str]:
    """Runs to the end; returns what each process wrote on standard error."""
    ends = toy_run.ends(toy_run.start(command(run_dir, *changes), count))
    assert [code for code, _, _ in ends] == [0] * count, ends
    return [errors for _, _, errors in ends]


def steps_done(run_dir: Path) -> int:
    return max(checkpoint.steps(run_dir / "checkpoints"), default=-1)


def wait_for_step(child: subprocess.Popen, run_dir: Path, step: int) -> None:
    while child.poll() is None and steps_done(run_dir) < step:
        time.sleep(0.01)


def log(run_dir: Path) -> list[dict]:
    rows = runlog.read(run_dir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "time"} for row in rows]


def theta_bytes(run_dir: Path) -> dict[str, bytes]:
    return {k: v.tobytes() for k, v in checkpoint.flatten(load_theta(run_dir)).items()}


def assert_same(one: Path, other: Path) -> None:
    assert len(log(one)) == ITERATIONS and log(one) == log(other)
    assert theta_bytes(one) == theta_bytes(other)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drill") / "two"
    finish(folder, count=2)
    return folder


@pytest.mark.drill
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_and_the_run_resumes(two: Path, tmp_path: Path, victim: int) -> None:
    run_dir = tmp_path / "run"
    children = toy_run.start(command(run_dir), 2)
    wait_for_step(children[0], run_dir, 4)
    children[victim].kill()
    begin = time.monotonic()
    ends = toy_run.ends(children)
    assert time.monotonic() - begin < 120  # JAX's coordinator notices after 100 s at the latest
    assert ends[victim][0] == -signal.SIGKILL, ends[victim][2]
    assert ends[1 - victim][0] not in (0, 2), ends[1 - victim][2]
    assert steps_done(run_dir) < ITERATIONS
    finish(run_dir, count=2)
    assert_same(run_dir, two)


@pytest.mark.drill
def test_first_meta_iteration_is_that_of_one_device(two: Path, tmp_path: Path) -> None:
    finish(tmp_path / "one", "run.devices=1")
    one, several = log(tmp_path / "one")[0], log(two)[0]
    np.testing.assert_allclose(several["loss"], one["loss"], rtol=1e-6)
    np.testing.assert_allclose(several["gradient_norm"], one["gradient_norm"], rtol=1e-6)
    finish(tmp_path / "devices", "run.devices=2")
    assert_same(tmp_path / "devices", two)


@pytest.mark.drill
def test_different_commands_are_refused(tmp_path: Path) -> None:
    children = []
    environments = toy_run.environments(2)
    for seed, environment in enumerate(environments):
        words = [sys.executable, *command(tmp_path / "run", f"seed={seed}")]
        pipe = subprocess.PIPE
        children.append(subprocess.Popen(words, env=environment, stdout=pipe, stderr=pipe, text=True))
    first, second = toy_run.ends(children)
    assert first[0] == second[0] == 2, first[2] + second[2]
    assert "processes 0 and 1 differ in their configs" in first[2] and "celo-nnx" not in second[2]
    assert not (tmp_path / "run").exists()


@pytest.mark.drill
def test_four_devices_on_fewer_cores(tmp_path: Path) -> None:
    finish(tmp_path / "whole", "run.devices=4")
    [child] = toy_run.start(command(tmp_path / "four", "run.devices=4"))
    wait_for_step(child, tmp_path / "four", 4)
    child.send_signal(signal.SIGTERM)
    assert toy_run.ends([child])[0][0] == 0
    shutil.copytree(tmp_path / "four", tmp_path / "moved")
    [quiet] = finish(tmp_path / "four")  # run.devices=0 takes the four of the start
    assert_same(tmp_path / "four", tmp_path / "whole")
    assert "not bit-identical" not in quiet
    for number, iterations in ((1, 14), (2, 16), (4, 18)):
        changes = f"run.devices={number}", f"run.iterations={iterations}"
        [note] = finish(tmp_path / "moved", *changes)
        assert "not bit-identical" in note and "devices.count" in note
        rows = log(tmp_path / "moved")
        assert len(rows) == iterations and np.isfinite(rows[-1]["loss"])


@pytest.mark.drill
def test_srun(two: Path, tmp_path: Path) -> None:
    """Two tasks of a step are one run; a job of two tasks without srun is one process."""
    if not shutil.which("srun") or subprocess.run(["sinfo"], capture_output=True).returncode:
        pytest.skip("no Slurm here")
    environment = dict(os.environ) | {"PYTHONPATH": toy_run.environments(1)[0]["PYTHONPATH"]}

    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)

    done = run("srun", "-n", "2", sys.executable, *command(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 1 and rows[0]["iteration"] == ITERATIONS
    assert_same(tmp_path / "run", two)
    done = run("salloc", "-n", "2", sys.executable, *command(tmp_path / "shell", "run.iterations=2"))
    assert done.returncode == 0, done.stderr
    starts = json.loads((tmp_path / "shell" / "run_info.json").read_text())["starts"]
    assert starts[0]["devices"]["processes"] == 1
    done = run("srun", "-n", "2", sys.executable, *command(tmp_path / "run", "seed=1"))
    assert done.returncode == 2 and done.stderr.count("celo-nnx: error:") == 1, done.stderr
