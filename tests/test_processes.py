"""Several devices and several processes: the same numbers, one folder, one voice, nobody left waiting."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import toy_run

from celo_nnx import devices, lock, processes, training
from celo_nnx.errors import UserError
from celo_nnx.meta import checkpoint, runlog
from celo_nnx.theta_io import load_theta, read_metadata

EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "node1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3", "SLURM_NTASKS": "8"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, None),  # a shell of salloc
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),  # a batch script
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),  # one task of many
        (STEP, processes.Launch(3, 8, cores=1)),
        ({**STEP, "SLURM_CPUS_PER_TASK": "6"}, processes.Launch(3, 8, cores=6)),
        (EXPLICIT, processes.Launch(2, 4, "node1:1234")),
        ({**STEP, **EXPLICIT}, processes.Launch(2, 4, "node1:1234")),
        ({**STEP, "JAX_NUM_PROCESSES": "1"}, None),
    ],
)
def test_who_launched(environment: dict[str, str], expected: processes.Launch | None) -> None:
    assert processes.launched(environment) == expected


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID = 4 is out of range: must be from 0 to 3"),
        ({"JAX_PROCESS_ID": "two"}, "JAX_PROCESS_ID = 'two' is not an integer"),
        ({"JAX_PROCESS_ID": ""}, "is set, so JAX_PROCESS_ID must be too"),
        ({"JAX_COORDINATOR_ADDRESS": "node1"}, "'node1' must be HOST:PORT"),
    ],
)
def test_contradicting_variables(changes: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        processes.launched(EXPLICIT | changes)


def test_cores_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cores", lambda: 16)
    for name in (*EXPLICIT, *STEP, "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    assert devices.share() == 16
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    assert devices.share() == 1
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert devices.share() == 6
    for name, value in EXPLICIT.items():
        monkeypatch.setenv(name, value)
    assert devices.share() == 4


def test_devices_of_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count", lambda: 4)
    monkeypatch.setattr(jax, "local_device_count", lambda: 3)
    monkeypatch.setattr(jax, "device_count", lambda: 12)
    assert devices.choose_devices(0, 16) == 8  # 4 of 3 each is 12, which does not divide 16
    assert devices.choose_devices(4, 16) == 4
    assert devices.choose_devices(0, 16, recorded=4) == 4
    assert devices.choose_devices(0, 16, recorded=2) == 8
    for requested, pairs, words in [
        (2, 16, "run.devices = 2 .* multiple of 4, the number of processes"),
        (12, 16, "run.devices = 12 .* divisor of meta.estimator.pairs = 16"),
        (32, 16, "run.devices = 32 .* divisor of meta.estimator.pairs = 16"),
        (16, 16, "run.devices = 16 .* at most 12, those of 4 processes"),
        (0, 2, "number of processes = 4 .* divisor of meta.estimator.pairs = 2"),
    ]:
        with pytest.raises(UserError, match=words):
            devices.choose_devices(requested, pairs)
    monkeypatch.setattr(jax, "device_count", lambda: 11)
    with pytest.raises(UserError, match="as many as of the others"):
        devices.choose_devices(0, 16)


ITERATIONS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for runs whose programs are compiled once."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield folder


@pytest.fixture(scope="module")
def two(folder: Path) -> Path:
    """A finished run of two processes."""
    first, second = toy_run.ends(toy_run.start_run(folder / "two", ITERATIONS, count=2))
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert json.loads(first[1])["iteration"] == ITERATIONS and second[1] == ""
    return folder / "two"


def log(run_dir: Path) -> list[dict[str, Any]]:
    rows = runlog.read(run_dir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "time"} for row in rows]


def assert_same(one: Path, other: Path) -> None:
    assert len(log(one)) == ITERATIONS and log(one) == log(other)
    assert load_theta(one)["drift"].tobytes() == load_theta(other)["drift"].tobytes()


def test_two_processes_are_one_process_with_two_devices(two: Path, folder: Path) -> None:
    [(code, _, errors)] = toy_run.ends(toy_run.start_run(folder / "one", ITERATIONS, "devices=2"))
    assert code == 0, errors
    assert_same(folder / "one", two)
    files = [sorted(str(p.relative_to(d)) for p in d.glob("*")) for d in (folder / "one", two)]
    assert files[0] == files[1]
    assert checkpoint.steps(two / "checkpoints") == checkpoint.steps(folder / "one" / "checkpoints")
    kind = json.loads((two / "run_info.json").read_text())["starts"][0]["devices"]
    assert (kind["count"], kind["processes"]) == (2, 2)


def wait_for_row(children: list[subprocess.Popen], run_dir: Path, iteration: int) -> None:
    deadline = time.monotonic() + 240
    while all(child.poll() is None for child in children) and time.monotonic() < deadline:
        if (rows := log(run_dir)) and rows[-1]["iteration"] >= iteration:
            return
        time.sleep(0.01)


def test_a_signal_to_one_process_stops_all_after_the_same_dispatch(two: Path, folder: Path) -> None:
    children = toy_run.start_run(folder / "stopped", ITERATIONS, "pause=0.5", count=2)
    wait_for_row(children, folder / "stopped", 2)
    children[1].send_signal(signal.SIGTERM)
    first, second = toy_run.ends(children)
    assert first[0] == second[0] == 0, first[2] + second[2]
    told = json.loads(first[1])
    assert told["stopped_by"] == signal.SIGTERM and 2 <= told["iteration"] < ITERATIONS
    assert "stopped and saved" in first[2] and second[1] == ""
    ends = toy_run.ends(toy_run.start_run(folder / "stopped", ITERATIONS, count=2))
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert not any("not bit-identical" in errors for _, _, errors in ends)
    assert_same(folder / "stopped", two)


def test_one_process_goes_on_from_two(two: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(two, folder / "fewer")
    with toy_run.assembled():
        result = training.train(toy_run.config(ITERATIONS + 2, devices=1), folder / "fewer", progress=False)
    assert result.iteration == ITERATIONS + 2 and read_metadata(folder / "fewer")["iteration"] == "10"
    note = capsys.readouterr().err
    assert "not bit-identical" in note and "devices.processes 2 -> 1" in note
    assert log(folder / "fewer")[:ITERATIONS] == log(two)


def test_a_mistake_is_told_once_and_ends_all(two: Path, folder: Path) -> None:
    (folder / "locked").mkdir()
    shutil.copy(two / "config.json", folder / "locked")
    with lock.hold(folder / "locked"):
        children = toy_run.start_run(folder / "locked", ITERATIONS, count=2)
        first, second = toy_run.ends(children)
    assert first[0] == second[0] == 2, first[2] + second[2]
    lines = [line for line in first[2].splitlines() if "celo-nnx" in line]
    assert len(lines) == 1 and "in use by pid" in lines[0]
    assert "celo-nnx" not in second[2] and first[1] == second[1] == ""


FOUR_DEVICES = """
import jax, sys
jax.config.update("jax_num_cpu_devices", 4)
sys.path.insert(0, sys.argv[1])
import numpy as np, pathlib, toy
from celo_nnx.meta import checkpoint

trainers = {n: toy.trainer(n, tasks=1) for n in (1, 2, 4)}
folder, step = pathlib.Path(sys.argv[2]), 0
state = trainers[4].init(jax.random.key(3))
for n in (4, 1, 4, 2, 1, 2, 4):  # every way from one number to another
    state, _ = trainers[n].run(state, 2)
    step += 2
    checkpoint.save(folder, step, state, {})
    saved = checkpoint.to_host(state)
    for other in (1, 2, 4):
        like = jax.eval_shape(trainers[other].init, jax.random.key(0))
        found, back, _, _ = checkpoint.load(folder, lambda _: like)
        back = trainers[other].place(back)
        read = checkpoint.to_host(back)
        assert found == step and saved.keys() == read.keys()
        for name, value in saved.items():
            assert value.dtype == read[name].dtype, (n, other, name)
            assert value.tobytes() == read[name].tobytes(), (n, other, name)
        leaf = jax.tree.leaves(back["estimator"])[0]
        assert len(getattr(leaf, "devices", lambda: [0])()) == other, (other, leaf)
    _, state, _, _ = checkpoint.load(folder, lambda _: like)
assert int(state["iteration"]) == 14 and np.isfinite(state["theta"]["drift"])
"""


def test_a_checkpoint_moves_between_numbers_of_devices(folder: Path) -> None:
    tests = Path(__file__).parent / "meta"
    ends = toy_run.ends(toy_run.start(["-c", FOUR_DEVICES, tests, folder / "moved"]))
    assert ends[0][0] == 0, ends[0][2]


def test_arrays_survive_the_way_to_the_host() -> None:
    tree = {"key": jax.random.key(3), "x": np.arange(3.0), "n": 5}
    back = processes.to_host(tree)
    np.testing.assert_array_equal(jax.random.key_data(back["key"]), jax.random.key_data(tree["key"]))
    np.testing.assert_array_equal(back["x"], tree["x"])
    assert back["n"] == 5
