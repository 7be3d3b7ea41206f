"""Runs: interruption anywhere changes nothing, and nothing is overwritten by mistake."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fake_run
import jax
import numpy as np
import pytest

from celo_nnx import lock, training
from celo_nnx.devices import choose_devices, largest_divisor
from celo_nnx.errors import UserError
from celo_nnx.meta import checkpoint, runlog
from celo_nnx.theta_io import load_theta, read_metadata, save_theta


def run(
    run_dir: Path, iterations: int = 12, *, stop: Any = None, data: str = "0" * 64, **options: Any
) -> Any:
    with fake_run.assembled(data=data):
        config = options.pop("config", None) or fake_run.config(iterations, **options)
        return training.train(config, run_dir, stop=stop)


def log(run_dir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "time"} for row in rows]


def theta_bytes(run_dir: Path) -> dict[str, bytes]:
    return {k: v.tobytes() for k, v in load_theta(run_dir)["rule"].items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(folder).finished
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(match: str, run_dir: Path, **options: Any) -> str:
    before = contents(run_dir) if run_dir.exists() else None
    with pytest.raises(UserError, match=match) as caught:
        run(run_dir, **options)
    assert "\n" not in str(caught.value)
    after = contents(run_dir) if run_dir.exists() else None
    assert before == after
    return str(caught.value)


def test_a_run_leaves_its_files(whole: Path) -> None:
    rows = log(whole)
    assert [row["iteration"] for row in rows] == list(range(1, 13))
    assert rows[3]["loss"] is None and rows[4]["loss"] is not None  # not finite, and training went on
    assert rows[3]["family_loss"] == {"one": None, "two": 1.0} and rows[3]["nonfinite"] == {
        "one": 2,
        "two": 0,
    }
    info = json.loads((whole / "run_info.json").read_text())
    assert info["starts"][0]["versions"]["jax"] == jax.__version__
    assert json.loads((whole / "config.json").read_text())["run"]["iterations"] == 12
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["10", "12"]
    assert read_metadata(whole)["iteration"] == "12"


@pytest.mark.parametrize("after", [0, 2])
def test_stop_then_resume_is_bit_identical(whole: Path, tmp_path: Path, after: int) -> None:
    calls = iter(range(100))
    result = run(tmp_path / "a", stop=lambda: signal.SIGTERM * (next(calls) >= after))
    assert (result.iteration, result.finished, result.stopped_by) == (2 * after, False, signal.SIGTERM)
    assert run(tmp_path / "a").finished
    assert theta_bytes(tmp_path / "a") == theta_bytes(whole)
    assert log(tmp_path / "a") == log(whole)


def test_extending_a_finished_run(whole: Path, tmp_path: Path) -> None:
    for iterations in (5, 5, 12):
        assert run(tmp_path / "a", iterations).iteration == iterations
    assert theta_bytes(tmp_path / "a") == theta_bytes(whole)
    assert log(tmp_path / "a") == log(whole)


def test_dispatch_size_changes_nothing(whole: Path, tmp_path: Path) -> None:
    run(tmp_path / "a", iterations_per_dispatch=7, checkpoint_seconds=100.0)
    assert theta_bytes(tmp_path / "a") == theta_bytes(whole)


def test_snapshots_are_theta_at_their_iterations(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    run(folder, 7, snapshots=5, checkpoint_seconds=100.0, iterations_per_dispatch=4)
    run(folder, 12, snapshots=5, checkpoint_seconds=100.0, iterations_per_dispatch=4)
    assert theta_bytes(folder) == theta_bytes(whole) and log(folder) == log(whole)
    found = sorted(p.name for p in (folder / training.SNAPSHOTS).iterdir())
    assert found == ["0000000.safetensors", "0000005.safetensors", "0000010.safetensors"]
    run(tmp_path / "b", 5)
    assert theta_bytes(folder / training.SNAPSHOTS / found[1]) == theta_bytes(tmp_path / "b")
    header = read_metadata(folder / training.SNAPSHOTS / found[1])
    assert header["iteration"] == "5" and "optimizer" in json.loads(header["config"])
    assert not (tmp_path / "b" / training.SNAPSHOTS).exists()


def test_a_snapshot_that_a_kill_prevented_is_written_on_resume(tmp_path: Path) -> None:
    run(tmp_path / "a", 5, snapshots=5)
    snapshot = tmp_path / "a" / training.SNAPSHOTS / "0000005.safetensors"
    before = theta_bytes(snapshot)
    snapshot.unlink()  # as after a kill right after the checkpoint
    run(tmp_path / "a", 7, snapshots=5)
    assert theta_bytes(snapshot) == before and read_metadata(snapshot)["iteration"] == "5"


def test_log_beyond_the_checkpoint_and_a_torn_line_are_cut(whole: Path, tmp_path: Path) -> None:
    run(tmp_path / "a", 6)
    with open(tmp_path / "a" / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 7, "loss": 99}\n{"iteration": 8, "lo')
    (tmp_path / "a" / "theta.safetensors").unlink()
    assert run(tmp_path / "a", 6).finished  # theta is written again from the checkpoint
    assert read_metadata(tmp_path / "a")["iteration"] == "6"
    run(tmp_path / "a")
    assert log(tmp_path / "a") == log(whole)


def test_differing_keys_are_all_named(tmp_path: Path) -> None:
    run(tmp_path / "a", 4)
    config = fake_run.config(9)
    config["seed"] = 1
    config["meta"]["optimizer"]["learning_rate"] = 0.5
    message = refused("differs", tmp_path / "a", config=config)
    assert "seed = 1 here, 0 there" in message
    assert "meta.optimizer.learning_rate = 0.5 here, 0.001 there" in message
    assert "iterations" not in message


def test_checkpoint_of_another_config(tmp_path: Path) -> None:
    run(tmp_path / "a", 4)
    text = (tmp_path / "a" / "config.json").read_text()
    (tmp_path / "a" / "config.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    config = fake_run.config(9)
    config["seed"] = 1
    refused("differs from that of checkpoint .*4: seed = 1 here, 0 there", tmp_path / "a", config=config)


def test_damaged_checkpoint(tmp_path: Path) -> None:
    run(tmp_path / "a", 4)
    for step in (2, 4):
        manifest = tmp_path / "a" / "checkpoints" / str(step) / "state" / "manifest.ocdbt"
        manifest.write_bytes(manifest.read_bytes()[:20])
    refused("4/state/manifest.ocdbt is damaged.*nothing was changed; no older step", tmp_path / "a")


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    for _ in range(2):
        shutil.copytree(whole, copy, dirs_exist_ok=True)
        file = copy / "checkpoints" / "12" / "state" / "manifest.ocdbt"
        file.write_bytes(file.read_bytes()[:20])
        assert run(copy).finished
        assert theta_bytes(copy) == theta_bytes(whole) and log(copy) == log(whole)
        assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == ["10", "12"]
        told = capsys.readouterr().err
        assert f"{file} is damaged: it has 20 bytes" in told and "the run goes on from 10" in told
    assert sorted(p.name for p in (copy / "damaged").iterdir()) == ["12", "12.1"]


def test_changed_data(tmp_path: Path) -> None:
    run(tmp_path / "a", 4)
    refused("data set 'one' has changed", tmp_path / "a", data="1" * 64)


def test_folders_that_are_not_runs(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("mine")
    refused("not a run directory: it holds 'thesis.tex'", tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text('{"model_type": "bert"}')
    refused("not the config of a run", tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text("{")
    refused("not readable JSON", tmp_path / "b")
    (tmp_path / "c").write_text("a file")
    with pytest.raises(UserError, match="is a file"):
        run(tmp_path / "c")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": -1}, "run.iterations = -1 is out of range: must be an integer >= 0"),
        ({"iterations_per_dispatch": 0}, "run.iterations_per_dispatch = 0"),
        ({"keep": 0}, "run.keep = 0"),
        ({"snapshots": -1}, "run.snapshots = -1"),
        ({"checkpoint_seconds": -1.0}, "run.checkpoint_seconds = -1.0"),
        ({"devices": 3}, "run.devices = 3 is out of range: must be 0 or a divisor"),
    ],
)
def test_out_of_range(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    refused(message, tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


def test_one_process_a_folder(tmp_path: Path) -> None:
    run(tmp_path / "a", 2)
    with lock.hold(tmp_path / "a"):
        refused(f"in use by pid {os.getpid()}", tmp_path / "a")
    assert run(tmp_path / "a", 4).finished


def start(run_dir: Path, *, pause: float = 0.05, iterations: int = 12) -> subprocess.Popen:
    command = [sys.executable, fake_run.__file__, str(run_dir), str(iterations), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_row(child: subprocess.Popen, run_dir: Path, iteration: int) -> None:
    deadline = time.monotonic() + 60
    while child.poll() is None and time.monotonic() < deadline:
        rows = runlog.read(run_dir / "metrics.jsonl")
        if rows and rows[-1]["iteration"] >= iteration:
            return
        time.sleep(0.005)


def test_kill_9_three_times(whole: Path, tmp_path: Path) -> None:
    rng, kills = random.Random(0), 0
    for iteration in (1, 5, 9):
        child = start(tmp_path / "a")
        wait_for_row(child, tmp_path / "a", iteration)
        time.sleep(rng.uniform(0, 0.08))
        child.kill()
        child.communicate()
        kills += child.returncode == -signal.SIGKILL
    assert kills == 3
    child = start(tmp_path / "a", pause=0)
    _, errors = child.communicate()
    assert child.returncode == 0, errors
    assert theta_bytes(tmp_path / "a") == theta_bytes(whole)
    assert log(tmp_path / "a") == log(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_exits_cleanly(whole: Path, tmp_path: Path, number: int) -> None:
    child = start(tmp_path / "a")
    wait_for_row(child, tmp_path / "a", 3)
    with pytest.raises(UserError, match=f"in use by pid {child.pid}"):
        run(tmp_path / "a")
    child.send_signal(number)
    out, errors = child.communicate()
    assert child.returncode == 0, errors
    result = json.loads(out)
    assert result["stopped_by"] == number and 3 <= result["iteration"] < 12
    assert runlog.read(tmp_path / "a" / "metrics.jsonl")[-1]["iteration"] == result["iteration"]
    assert run(tmp_path / "a").finished
    assert theta_bytes(tmp_path / "a") == theta_bytes(whole)


def test_the_run_stops_after_what_is_not_finite(whole: Path, tmp_path: Path) -> None:
    """The stand-in has two such losses a meta-iteration; those before the last start count too."""
    folder, calls = tmp_path / "a", iter(range(9))
    run(folder, stop=lambda: signal.SIGTERM * (next(calls) >= 2))
    assert len(log(folder)) == 4
    for _ in range(2):  # the second time there is nothing to do
        with pytest.raises(UserError, match=r"\(one 16\), and run.stop_after_non_finite = 11; .* goes on"):
            run(folder, stop_after_non_finite=11)
        # 12 after 6, seen a dispatch later, since the device never waits.
        assert checkpoint.steps(folder / "checkpoints")[-1] == len(log(folder)) == 8
    assert run(folder, stop_after_non_finite=25).finished
    assert theta_bytes(folder) == theta_bytes(whole) and log(folder) == log(whole)
    refused("run.stop_after_non_finite = -1 .* integer >= 0", folder, stop_after_non_finite=-1)


def test_rows_name_what_else_was_not_finite(tmp_path: Path) -> None:
    metrics = {"loss": np.ones(2), "family_loss": np.ones((2, 2)), "nonfinite": np.zeros((2, 2), int)}
    metrics |= {"nonfinite_gradient": np.array([[0, 0], [0, 3]]), "nonfinite_theta": np.array([0, 2])}
    healthy, bad = runlog.rows(metrics, 0, 2, ["a", "b"], 0.0)
    assert "nonfinite_gradient" not in healthy and "nonfinite_theta" not in healthy
    assert bad["nonfinite_gradient"] == {"a": 0, "b": 3} and bad["nonfinite_theta"] == 2
    odd = {"iteration": 3, "nonfinite": [1], "nonfinite_gradient": {"a": "x"}, "nonfinite_theta": -4}
    log = runlog.Counted(runlog.Silent(), 5, [healthy, bad, odd])
    assert log.over() and str(log) == "5 numbers were not finite (b 3, theta 2)"
    assert not runlog.Counted(runlog.Silent(), 6, [bad]).over()
    assert not runlog.Counted(runlog.Silent(), 0, [bad]).over()


def test_rows_and_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {
        "loss": np.array([1.0, np.inf]),
        "family_loss": np.array([[1.0], [np.nan]]),
        "nonfinite": np.array([[0], [3]]),
    }
    rows = runlog.rows(metrics, 4, 2, ["digits"], 12.3456)
    assert rows[1] == {
        "iteration": 6,
        "loss": None,
        "family_loss": {"digits": None},
        "nonfinite": {"digits": 3},
        "time": 12.346,
    }
    out = runlog.RunLog(tmp_path, 0, 10)
    assert capsys.readouterr().err == "compiling (about a minute)\n"
    out.write(rows[:1])
    out.close()
    assert "iteration 5/10  meta-loss 1.0000" in capsys.readouterr().err
    bar = runlog.Bar(0, 10)
    bar.show(rows)
    bar.close()
    assert "meta-loss" in capsys.readouterr().err


@pytest.mark.parametrize("sink", ["tensorboard", "wandb"])
def test_sinks_name_their_extra(tmp_path: Path, sink: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, {"tensorboard": "tensorboardX"}.get(sink, sink), None)
    with pytest.raises(UserError, match=r"pip install 'celo-nnx\["):
        runlog.RunLog(tmp_path, 0, 10, progress=False, **{sink: True})


def test_devices() -> None:
    assert [largest_divisor(8, n) for n in (1, 2, 3, 6, 64)] == [1, 2, 2, 4, 8]
    there = jax.local_device_count()
    assert choose_devices(0, 8 * there) == there
    with pytest.raises(UserError, match="run.devices = 4 .* at most"):
        choose_devices(4, 4) if there < 4 else choose_devices(4 * there, 4 * there)


def test_theta_file(tmp_path: Path) -> None:
    theta = {"rule": {"w": np.ones((2, 3), np.float32), "b": np.zeros(3, np.float32)}, "s": np.float32(2)}
    file = tmp_path / "theta.safetensors"
    save_theta(file, theta, {"config": "{}"})
    back = load_theta(tmp_path, like=theta)
    assert jax.tree.structure(back) == jax.tree.structure(theta)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, back, theta)))
    assert read_metadata(file)["config"] == "{}"

    for other, match in [
        ({"rule": {"w": theta["rule"]["w"]}, "s": theta["s"]}, "unknown 'rule/b'"),
        ({**theta, "more": np.zeros(1)}, "lacks 'more'"),
        ({**theta, "s": np.zeros(2, np.float32)}, r"'s' is float32\[\], the optimizer has float32\[2\]"),
        ({**theta, "s": np.int32(2)}, "the optimizer has int32"),
    ]:
        with pytest.raises(UserError, match=match):
            load_theta(file, like=other)

    whole = file.read_bytes()
    for broken, match in [
        (whole[:-4], "not a readable safetensors"),
        (whole[:5], "not a readable safetensors"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "do not match its digest"),
        (b"\xff" * 64, "not a readable safetensors"),
    ]:
        file.write_bytes(broken)
        with pytest.raises(UserError, match=match):
            load_theta(file)
    from safetensors.numpy import save_file

    save_file({"w": np.ones(2)}, file)
    with pytest.raises(UserError, match="not a theta of celo-nnx"):
        load_theta(file)
    with pytest.raises(UserError, match="no theta at"):
        load_theta(tmp_path / "none")


def test_results_without_a_checkpoint_are_not_overwritten(whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "checkpoints")
    refused("has results but no checkpoint", copy)


def test_a_renamed_step_is_set_aside(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    newest = checkpoint.steps(copy / "checkpoints")[-1]
    (copy / "checkpoints" / str(newest)).rename(copy / "checkpoints" / str(newest + 1000))
    assert run(copy).finished and theta_bytes(copy) == theta_bytes(whole)
    assert "do not match its digest" in capsys.readouterr().err


def test_damaged_start_record(whole: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    (copy / "run_info.json").write_text('{"starts": 5}')
    refused("not the record of a run's starts", copy)


def test_the_average_is_what_a_run_gives_away(tmp_path: Path) -> None:
    config = fake_run.config(4)
    config["meta"]["average"] = 0.9
    made = fake_run.Averaging(2)
    with fake_run.assembled(trainer=made):
        result = training.train(config, tmp_path / "a")
    state, _ = checkpoint.load_step(tmp_path / "a" / "checkpoints", 4, made.init(jax.random.key(0)))
    theta, average = (x["rule"]["w"] for x in (state["theta"], state["average"]["theta"]))
    assert (np.asarray(theta) != average).all()
    np.testing.assert_array_equal(load_theta(tmp_path / "a")["rule"]["w"], average)
    np.testing.assert_array_equal(result.theta["rule"]["w"], average)
    assert read_metadata(tmp_path / "a")["average"] == "0.9"
