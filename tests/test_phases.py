"""Phases: each has its own config and budget, and an interruption in or between them changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import fake_run
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from celo_nnx import training
from celo_nnx.config import load
from celo_nnx.errors import UserError
from celo_nnx.meta import checkpoint
from celo_nnx.phases import ENDLESS, plan
from celo_nnx.theta_io import load_theta, read_metadata

TINY = [
    "optimizer.features.groups=gradient,momentum",
    "meta.estimator.pairs=2",
    "meta.estimator.truncation=3",
    "meta.unroll.minimum=5",
    "meta.unroll.maximum=9",
    "run.devices=1",
    "run.progress=False",
]
# Dispatches of two meta-iterations do not divide the budgets: boundaries cut them.
TWO = (
    dict(name="rule", iterations=5, set=("meta.optimizer.learning_rate=0.02",)),
    dict(name="schedule", iterations=4, set=("meta.frozen=update_rule/",)),
    dict(name="all", iterations=0, set=("meta.optimizer.learning_rate=0.003",)),
)


def config(iterations: int = 13, phases: Any = TWO, **run: Any) -> ConfigDict:
    options = {"iterations": iterations, "iterations_per_dispatch": 2, "checkpoint_seconds": 0.0, "keep": 99}
    made = load("celo:fast_digits", TINY + [f"run.{key}={value}" for key, value in (options | run).items()])
    made.meta.phases = phases
    return made


def run(run_dir: Path, *args: Any, stop: Any = None, **options: Any) -> Any:
    with fake_run.assembled():
        return training.train(config(*args, **options), run_dir, stop=stop)


def results(run_dir: Path) -> tuple[Any, Any]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    theta = {name: x.tobytes() for name, x in load_theta(run_dir)["rule"].items()}
    return theta, [{k: v for k, v in row.items() if k != "time"} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    result = run(folder)
    assert result.finished and result.iteration == 13
    return folder


def test_every_iteration_belongs_to_its_phase(whole: Path) -> None:
    rows = results(whole)[1]
    assert [row["phase"] for row in rows] == ["rule"] * 5 + ["schedule"] * 4 + ["all"] * 4
    assert checkpoint.steps(whole / "checkpoints") == [0, 2, 4, 5, 7, 9, 11, 13]
    assert read_metadata(whole)["phase"] == "all"


def test_phases_start_anew_but_theta_and_iterations_go_on(whole: Path) -> None:
    with fake_run.assembled():
        works = training.Works(plan(config()), 1, None)
    like = jax.eval_shape(works.enter(works.phases[0]).trainer.init, jax.random.key(0))
    states = {i: checkpoint.load_step(whole / "checkpoints", i, like)[0] for i in (0, 5, 7, 9, 13)}
    age = {i: int(state["estimator"]["age"][0]) for i, state in states.items()}
    count = {i: int(state["meta_optimizer"][0].count) for i, state in states.items()}
    # A checkpoint at a boundary holds the phase that has ended there.
    assert age == count == {0: 0, 5: 5, 7: 2, 9: 4, 13: 4}
    assert all(int(state["iteration"]) == i for i, state in states.items())
    moved = np.abs(np.asarray(states[7]["theta"]["rule"]["w"]) - states[5]["theta"]["rule"]["w"]).max()
    assert 0 < moved <= 2 * 10 * 1e-4 * 1.1  # two steps of Adam at the second phase's rate


@pytest.mark.parametrize("step", [0, 2, 4, 5, 7, 9, 11])
def test_a_kill_after_any_checkpoint_changes_nothing(whole: Path, tmp_path: Path, step: int) -> None:
    """The log and theta may be ahead of the newest checkpoint, as they are after a kill."""
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    for later in checkpoint.steps(copy / "checkpoints"):
        if later > step:
            shutil.rmtree(copy / "checkpoints" / str(later))
    assert run(copy).finished
    assert results(copy) == results(whole)


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 5])
def test_stop_at_any_dispatch_changes_nothing(whole: Path, tmp_path: Path, after: int) -> None:
    calls = iter(range(100))
    stopped = run(tmp_path / "a", stop=lambda: int(next(calls) >= after))
    assert stopped.iteration == [0, 2, 4, 5, 7, 9][after] and not stopped.finished
    header = read_metadata(tmp_path / "a")
    assert header["iteration"] == str(stopped.iteration)
    assert header["phase"] == ("rule" if stopped.iteration <= 5 else "schedule")
    resaved = run(tmp_path / "a", stop=lambda: 1)  # stopped before anything is done: nothing moves
    assert resaved.iteration == stopped.iteration
    jax.tree.map(np.testing.assert_array_equal, resaved.theta, stopped.theta)
    assert run(tmp_path / "a").finished
    assert results(tmp_path / "a") == results(whole)


def test_extending_over_a_boundary(whole: Path, tmp_path: Path) -> None:
    for iterations in (3, 5, 8, 9, 13):
        result = run(tmp_path / "a", iterations)
        assert result.iteration == iterations and result.finished
    assert results(tmp_path / "a") == results(whole)


def test_budgets_end_a_run(tmp_path: Path) -> None:
    phases = (dict(name="one", iterations=3), dict(name="two", iterations=2))
    result = run(tmp_path / "a", 100, phases=phases)
    assert result.iteration == 5 and result.finished
    assert [row["phase"] for row in results(tmp_path / "a")[1]] == ["one"] * 3 + ["two"] * 2


def test_a_run_without_phases_has_one_without_a_name() -> None:
    (phase,) = plan(config(phases=()))
    assert (phase.name, phase.start, phase.end) == ("", 0, ENDLESS)


def test_each_phase_is_the_base_with_its_changes() -> None:
    one, two, three = plan(config(phases=[TWO[0], *TWO[1:]]))
    assert [(p.start, p.end) for p in (one, two, three)] == [(0, 5), (5, 9), (9, ENDLESS)]
    assert one.config.meta.optimizer.learning_rate == 0.02 and one.config.meta.frozen == ()
    assert two.config.meta.optimizer.learning_rate == 1e-4 and two.config.meta.frozen == ("update_rule/",)
    assert three.config.meta.frozen == () and three.config.meta.phases == ()
    # Cells of a grid train the config that they have stored, in which tuples are lists.
    _, stored, _ = plan(ConfigDict(json.loads(json.dumps(config().to_dict()))))
    assert tuple(stored.config.meta.frozen) == ("update_rule/",)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ((dict(name="a", iterations=0), dict(name="b", iterations=1)), r"meta.phases\[0\].iterations = 0"),
        ((dict(name="a", iterations=2.5),), r"meta.phases\[0\].iterations = 2.5"),
        ((dict(name="a"),), r"meta.phases\[0\].iterations = None"),
        ((dict(iterations=2),), r"meta.phases\[0\].name = None"),
        ((dict(name="a", iterations=2), dict(name="a", iterations=2)), r"meta.phases\[1\].name = 'a'"),
        ((dict(name="a", iterations=2, sets=()),), r"unknown key of meta.phases\[0\], 'sets' .*'set'"),
        ((dict(name="a", iterations=2, set="meta.average=0.9"),), r"meta.phases\[0\].set = "),
        ((dict(name="a", iterations=2, set=("seed=3",)),), "phase 'a' may not set 'seed'"),
        ((dict(name="a", iterations=2, set=("run.iterations=3",)),), "may not set 'run.iterations'"),
        ((dict(name="a", iterations=2, set=("meta.phases=()",)),), "may not set 'meta.phases'"),
        ((dict(name="a", iterations=2, set=("meta.averag=0.9",)),), "phase 'a': .*'averag' .*'average'"),
        ((dict(name="a", iterations=2, set=("meta.average=much",)),), "phase 'a': .*expected float"),
        ((dict(name="a", iterations=2, set=("meta.average",)),), "phase 'a': .*not of the form key=value"),
        ((3,), "must be a section of name, iterations, set"),
        (7, "meta.phases = 7"),
    ],
)
def test_mistakes_in_a_plan_are_told_in_one_line(phases: Any, message: str) -> None:
    made = config()
    with made.unlocked():
        del made.meta.phases
        made.meta.phases = phases
    with pytest.raises(UserError, match=message) as caught:
        plan(made)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.schedule.hidden=32", r"phase 'two' has another theta: 'schedule/.* in 'one' float32"),
        ("meta.frozen=^lstm/", "phase 'two': meta.frozen: '.lstm/' is found in no path of theta"),
        ("meta.frozen=schedule/,update_rule/", "phase 'two': meta.frozen = .* freezes all of theta"),
        ("meta.optimizer.kind=lion", r"phase 'two': meta.optimizer \(lion\) needs learning_rate"),
        ("meta.average=1.0", "phase 'two': meta.average = 1.0"),
        ("tasks.datasets=digit", "phase 'two': .*'digits'"),
        ("optimizer.update_rule.hidden=-1", "phase 'two': "),
    ],
)
def test_a_mistake_in_a_late_phase_is_told_before_the_first_one_runs(
    tmp_path: Path, change: str, message: str
) -> None:
    phases = (dict(name="one", iterations=5), dict(name="two", iterations=5, set=(change,)))
    with pytest.raises(UserError, match=message) as caught:
        training.train(config(phases=phases), tmp_path / "a")
    assert "\n" not in str(caught.value) and not (tmp_path / "a").exists()


def test_the_published_two_phases() -> None:
    rule, schedule = plan(load("celo_two_phases"))
    same = load("celo_phase1").optimizer.to_dict()
    assert rule.config.optimizer.to_dict() == same and rule.config.meta.frozen == ("schedule/",)
    assert schedule.config.optimizer.to_dict() == load("celo").optimizer.to_dict()
    assert schedule.config.meta.frozen == ("update_rule/",)
    assert {p.config.meta.optimizer.learning_rate for p in (rule, schedule)} == {3e-4}
    assert (rule.end, schedule.end) == (100_000, ENDLESS)
