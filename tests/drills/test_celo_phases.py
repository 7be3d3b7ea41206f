"""The drill: Celo's two phases, broken off in each and between them, end where the whole run does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from celo_nnx.config import load
from celo_nnx.meta import checkpoint, runlog
from celo_nnx.theta_io import load_theta, read_metadata
from celo_nnx.training import train

SMALL = [
    "optimizer.features.groups=gradient,momentum",
    "meta.estimator.pairs=2",
    "meta.estimator.truncation=4",
    "meta.unroll.minimum=6",
    "meta.unroll.maximum=12",
    "meta.average=0.8",
    "run.iterations=11",
    "run.iterations_per_dispatch=2",
    "run.checkpoint_seconds=0.0",
    "run.keep=99",
    "run.devices=1",
    "run.progress=False",
]


def start(run_dir: Path, stop: Any = None) -> Any:
    config = load("celo_two_phases:fast_digits", SMALL)
    config.meta.phases = tuple(
        section | {"iterations": budget} for section, budget in zip(config.meta.phases, (5, 0), strict=True)
    )
    return train(config, run_dir, progress=False, stop=stop)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "time"} for row in runlog.read(run_dir / "metrics.jsonl")]


def arrays(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    from orbax.checkpoint import v1 as ocp

    return ocp.load_checkpointables((run_dir / "checkpoints" / str(step)).absolute())["state"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phases") / "whole"
    assert start(folder).finished
    return folder


@pytest.mark.drill
def test_each_phase_learns_its_part(whole: Path) -> None:
    assert [row["phase"] for row in rows(whole)] == ["rule"] * 5 + ["schedule"] * 6
    states = {i: arrays(whole, i) for i in (0, 5, 11)}
    for now, after, rests in ((0, 5, "theta/schedule/"), (5, 11, "theta/update_rule/")):
        for name in states[now]:
            if name.startswith("theta/"):
                same = states[now][name].tobytes() == states[after][name].tobytes()
                # The layer "dead" has no effect: without weight decay on a gradient 0 nothing moves it.
                assert same == name.startswith(rests) or "/dead/" in name, (now, name)
    last = load_theta(whole)
    assert read_metadata(whole)["average"] == "0.8"
    step = last["schedule"]["step"]["w"]
    np.testing.assert_array_equal(step, states[11]["average/theta/schedule/step/w"])
    assert (step != states[11]["theta/schedule/step/w"]).any()


@pytest.mark.drill
@pytest.mark.parametrize("step", [0, 2, 4, 5, 7, 9])
def test_killed_after(whole: Path, tmp_path: Path, step: int) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    for later in checkpoint.steps(copy / "checkpoints"):
        if later > step:
            shutil.rmtree(copy / "checkpoints" / str(later))
    assert start(copy).finished
    assert rows(copy) == rows(whole)
    mine, theirs = arrays(copy, 11), arrays(whole, 11)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert mine[name].tobytes() == value.tobytes(), name


@pytest.mark.drill
def test_stopped_in_each_phase(whole: Path, tmp_path: Path) -> None:
    for dispatches in (1, 2, 1):
        calls = iter(range(100))
        assert not start(tmp_path / "a", lambda calls=calls, last=dispatches: next(calls) >= last).finished
    assert start(tmp_path / "a").finished
    assert rows(tmp_path / "a") == rows(whole)
    for name, value in arrays(whole, 11).items():
        assert arrays(tmp_path / "a", 11)[name].tobytes() == value.tobytes(), name
