"""Cards of weights, from made-up runs and evaluations whose answers are known."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import fake_run
import made_evaluation as made
import made_run
import numpy as np
import pytest

from celo_nnx import cards, cli, weights
from celo_nnx.config import load
from celo_nnx.errors import UserError
from celo_nnx.evaluation.cells import Cells
from celo_nnx.evaluation.results import load_results
from celo_nnx.meta.checkpoint import canonical
from celo_nnx.theta_io import load_theta, read_metadata, save_theta

PARTS = {"update_rule": "made"}


def theta_file(path: Path, value: float, config: dict[str, Any], **more: str) -> str:
    """Writes a theta and returns its digest."""
    header = {"iteration": "4", "config": canonical(config)} | more
    save_theta(path, {"rule": {"w": np.full(3, value, np.float32)}}, header)
    return read_metadata(path)["digest"]


def evaluation(folder: Path, learned: dict[str, tuple[str, float]], parts: Any = PARTS) -> Path:
    """Two tasks; each learned optimizer, by label, has a digest of theta and a pace relative to Adam's."""
    made.begin(folder, ("one", "two"), ("adam", *learned))
    cells = Cells(folder)
    for task, low in (("one", 0.2), ("two", 0.4)):
        made.adam(cells, task, lambda at, rate, seed, low=low: made.falling(at, rate, seed, low=low))
        for label, (of_theta, pace) in learned.items():
            losses = made.grid(
                lambda at, rate, seed, low=low, pace=pace: made.falling(at, rate, seed, low=low, pace=pace)
            )
            if task == "two":
                losses[-1, 0, 100:] = np.inf  # diverges at the largest rate
            config = {"optimizer": {"learned": parts, "theta": of_theta}}
            made.add(cells, task, label, losses, config=config)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Any]:
    config = fake_run.config(6)
    run = made_run.make(tmp_path / "run", made_run.course([3.0, 2.0, 1.5, 1.25, 1.0, 0.5]), 6, config=config)
    best = theta_file(run / "snapshot.safetensors", 1.0, config)
    last = theta_file(run / "theta.safetensors", 2.0, config)
    candidates = {"start": ("0" * 64, 1.0), "best": (best, 1.5), "last": (last, 1.2)}
    selection = evaluation(tmp_path / "selection", candidates)
    judged = evaluation(tmp_path / "judged", {"mine": (best, 1.4)})
    return dict(run_dir=run, selection=selection, evaluation=judged, theta=run / "snapshot.safetensors")


def test_a_card_says_what_the_folders_say(folders: dict[str, Any], tmp_path: Path) -> None:
    card = cards.write_card(out=tmp_path / "fine", command="celo-nnx train x --run-dir y", **folders)
    assert json.loads((tmp_path / "fine" / "fine.json").read_text()) == card
    assert card["format"] == weights.FORMAT and card["name"] == "fine"
    assert card["digest"] == read_metadata(tmp_path / "fine" / "fine.safetensors")["digest"]
    assert load_theta(tmp_path / "fine" / "fine.safetensors")["rule"]["w"].tolist() == [1, 1, 1]
    assert card["made"]["first_losses"] == [3.0, 2.0, 1.5, 1.25, 1.0, 0.5]
    assert card["made"]["iteration"] == 4 and card["made"]["seconds"] == 11.0
    assert {row["label"]: row["chosen"] for row in card["selection"]["candidates"]} == {
        "start": False,
        "best": True,
        "last": False,
    }
    assert [row["label"] for row in card["selection"]["others"]] == ["adam"]
    assert card["learning_rate"]["recommended"] == 0.1, "the formula's losses fall fastest there"
    at = card["evaluation"]["at_recommended_rate"]
    entry = load_results(folders["evaluation"]).tasks[0].entries["mine"]
    assert card["evaluation"]["label"] == "mine" and at["runs"] == 6 and at["diverged"] == []
    assert at["final_loss_iqm"][0] == pytest.approx(
        next(r["final_loss_iqm"][0] for r in card["evaluation"]["optimizers"] if r["label"] == "mine")
    )
    assert entry.tuned.learning_rate == 0.1
    rows = list(csv.DictReader((tmp_path / "fine" / "log.csv").read_text().splitlines()))
    assert [float(row["loss"]) for row in rows] == card["made"]["first_losses"]
    assert float(rows[0]["loss of one"]) == 3.5
    for name in ("scores.svg", "profile_score.svg", "profile_speedup.svg", "meta_loss.svg"):
        assert "<svg" in (tmp_path / "fine" / name).read_text()


def test_runs_that_diverge_at_the_rate_are_named(folders: dict[str, Any]) -> None:
    found = cards.at_rate(load_results(folders["evaluation"]), "mine", 1.0)
    assert found["diverged"] == ["two"] and found["runs"] == 6
    with pytest.raises(UserError, match="mine was not run at 0.5 on one"):
        cards.at_rate(load_results(folders["evaluation"]), "mine", 0.5)


def test_a_rate_that_one_task_has_not_survived_is_not_recommended(tmp_path: Path) -> None:
    made.begin(tmp_path, ("one", "two"), ("adam", "x"))
    cells = Cells(tmp_path)
    for task in ("one", "two"):
        made.adam(cells, task, made.falling)
        losses = made.grid(made.falling)
        if task == "two":
            losses[2, :2, 100:] = np.inf  # the best rate of the other task
        made.add(cells, task, "x", losses)
    assert cards.fixed_rate(load_results(tmp_path), "x") == pytest.approx(0.01)


def test_what_the_rule_does_not_choose_gets_no_card(folders: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the selection rule prefers 'best' to 'last'"):
        judged = evaluation(
            tmp_path / "other",
            {"x": (read_metadata(folders["run_dir"] / "theta.safetensors")["digest"], 1.0)},
        )
        cards.write_card(out=tmp_path / "new", **folders | {"theta": None, "evaluation": judged})
    with pytest.raises(UserError, match="has no optimizer with the theta of digest"):
        cards.write_card(out=tmp_path / "new", **folders | {"evaluation": made.make(tmp_path / "made")})
    other = fake_run.config(6)
    other["seed"] = 5
    theta_file(tmp_path / "foreign.safetensors", 1.0, other)
    with pytest.raises(UserError, match="the config differs from that of the theta .*: seed"):
        cards.write_card(out=tmp_path / "new", **folders | {"theta": tmp_path / "foreign.safetensors"})
    with pytest.raises(UserError, match="out = .* a new folder"):
        cards.write_card(out=tmp_path, **folders)
    alone = {"best": (read_metadata(folders["theta"])["digest"], 1.5)}
    selection = evaluation(tmp_path / "alone", alone)
    with pytest.raises(UserError, match="alone has no candidate but 'best'"):
        cards.write_card(out=tmp_path / "new", **folders | {"selection": selection})
    assert not (tmp_path / "new").exists()


def test_a_phase_s_theta_gets_a_card_with_its_optimizer(folders: dict[str, Any], tmp_path: Path) -> None:
    config = json.loads(load("celo:fast_digits", ["run.iterations=6"]).to_json())
    change = "optimizer.schedule.rate=none"
    config["meta"]["phases"] = [{"name": "rule", "iterations": 4, "set": [change]}]
    config["meta"]["phases"] += [{"name": "schedule", "iterations": 0}]
    (folders["run_dir"] / "config.json").write_text(json.dumps(config))
    of_phase = json.loads(load("celo:fast_digits", [change]).to_json())["optimizer"]
    theta_file(folders["theta"], 1.0, config | {"optimizer": of_phase}, phase="rule")
    card = cards.write_card(out=tmp_path / "fine", **folders)
    assert card["config"]["optimizer"] == of_phase != config["optimizer"]
    theta_file(folders["theta"], 1.0, config, phase="rule")
    with pytest.raises(UserError, match=r"optimizer\.schedule\.rate = 'none' here"):
        cards.write_card(out=tmp_path / "new", **folders)


def test_the_command(folders: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["card", str(folders["run_dir"]), "--theta", str(folders["theta"])]
    words += ["--selection", str(folders["selection"]), "--evaluation", str(folders["evaluation"])]
    assert cli.main([*words, "--out", str(tmp_path / "fine")]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["name"] == "fine" and row["recommended"] == 0.1 and row["diverged"] == []
    assert cli.main([*words, "--out", str(tmp_path / "fine")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
