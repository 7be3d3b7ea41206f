"""The weights in the package: loaded by name, and each with a card, a recipe and a record that agree."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import celo_nnx
from celo_nnx import load_optimizer, load_theta, weights
from celo_nnx.build import build
from celo_nnx.cards import FIRST
from celo_nnx.config import load
from celo_nnx.errors import UserError
from celo_nnx.evaluation.aggregates import aggregate
from celo_nnx.evaluation.contenders import contenders
from celo_nnx.meta.checkpoint import digest, flatten
from celo_nnx.run_files import differences, resolve
from celo_nnx.theta_io import read_metadata

RECORDS = Path(__file__).resolve().parents[1] / "experiments" / "weights"
NAMES = ("celo", "celo2", "celo2_base")
LARGEST = 300_000  # bytes of a theta file; celo's LSTM has 37,000 meta-parameters


def test_these_are_shipped() -> None:
    assert weights.names() == NAMES
    with pytest.raises(UserError, match="unknown weights 'celo3'"):
        weights.card("celo3")


@pytest.mark.parametrize("name", NAMES)
def test_a_card_agrees_with_its_file_its_recipe_and_its_record(name: str) -> None:
    card, file = weights.card(name), weights.theta_file(name)
    assert card["name"] == name and card["about"]
    assert digest(flatten(load_theta(file)), {}) == card["digest"] == read_metadata(file)["digest"]
    assert json.loads(read_metadata(file)["config"]) == card["config"]
    assert int(read_metadata(file)["iteration"]) == card["made"]["iteration"]
    assert file.stat().st_size < LARGEST and file.with_suffix(".json").stat().st_size < 100_000
    command = card["made"]["command"].split()
    source, *changes = command[command.index("train") + 1 : command.index("--run-dir")]
    recipe = resolve(load(str(RECORDS.parents[1] / source), changes))
    assert not differences(recipe, card["config"])
    assert recipe["run"]["iterations"] >= card["made"]["iteration"]


@pytest.mark.parametrize("name", NAMES)
def test_a_record_agrees_with_its_card(name: str) -> None:
    card, record = weights.card(name), RECORDS / name
    rows = list(csv.DictReader((record / "log.csv").read_text().splitlines()))
    assert [int(row["iteration"]) for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) >= card["made"]["iteration"]
    first = [float(row["loss"]) for row in rows[:FIRST]]
    np.testing.assert_allclose(first, card["made"]["first_losses"], rtol=1e-5)
    for file, key in (("summary.csv", "evaluation"), ("selection.csv", "selection")):
        table = {row["optimizer"]: row for row in csv.DictReader((record / file).read_text().splitlines())}
        told = card[key]["optimizers"] if key == "evaluation" else card[key]["candidates"]
        assert told
        for row in told:
            assert float(table[row["label"]]["score_iqm"]) == row["final_loss_iqm"][0]
            assert float(table[row["label"]]["speedup_iqm"]) == row["speedup_iqm"][0]
    assert card["digest"][:12] in (record / "summary.csv").read_text()
    best = max(card["selection"]["candidates"], key=lambda row: row["final_loss_iqm"][0])
    assert best["chosen"] and best["theta"] == card["digest"], "the selection rule chose another one"
    assert (record / "run.html").read_text().startswith("<!")


def rows_of(file: str) -> list[dict[str, str]]:
    return list(csv.DictReader((RECORDS / file).read_text().splitlines()))


def told(row: dict[str, str], what: str) -> str:
    """An interquartile mean and its interval as the model card writes them."""
    return "{:.2f} ({:.2f} to {:.2f})".format(
        *(float(row[f"{what}_iqm{end}"]) for end in ("", "_low", "_high"))
    )


def test_the_model_card_says_what_the_records_say() -> None:
    text = " ".join((RECORDS / "README.md").read_text().split())
    local = {row["optimizer"]: row for row in rows_of("celo2/summary.csv")}
    for name, label in (("celo2", "celo2, these weights"), ("muon", "muon")):
        row = local[name]
        assert f"| {label} | {told(row, 'score')} | at least {told(row, 'speedup')} |" in text
        assert int(row["speedup_lower_bounds"]) > 0
    cosine = {row["optimizer"]: row for row in rows_of("celo2/cosine_summary.csv")}
    for name, label in (
        ("celo2@celo2", "these weights"),
        ("muon", "muon"),
        ("celo2@hand_made", "`hand_made`)"),
    ):
        assert f"{label} | {told(cosine[name], 'score')} | {told(cosine[name], 'speedup')} |" in text
    short = {row["optimizer"]: told(row, "score") for row in rows_of("celo2_base/summary.csv")}
    assert f"it has {short['celo2']} of Adam's score" in text
    assert f"{short['celo2_base']} on `smoke`" in text
    for name in NAMES:
        best = next(row for row in weights.card(name)["selection"]["candidates"] if row["chosen"])
        assert "{:.2f} ({:.2f} to {:.2f})".format(*best["final_loss_iqm"]) in text


def test_the_model_card_says_how_the_language_models_went() -> None:
    text = (RECORDS / "README.md").read_text()
    rows = [row for row in rows_of("celo2/scores.csv") if row["task"].startswith(("rnn_", "transformer_"))]
    tasks = sorted({row["task"] for row in rows})
    for name in ("celo2", "muon"):
        found = []
        for what, digits in (("score", 3), ("speedup", 2)):
            table = [
                [float(r[what]) for r in rows if (r["optimizer"], r["task"]) == (name, t)] for t in tasks
            ]
            mean = aggregate(np.asarray(table).T, "iqm")
            found.append("{:.{d}f} ({:.{d}f} to {:.{d}f})".format(mean.value, mean.low, mean.high, d=digits))
        assert f"| {name} | {found[0]} | {found[1]} |" in text


@pytest.mark.parametrize("name", NAMES)
def test_names_stand_where_paths_do(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    theta = load_theta(name)
    same = lambda other: jax.tree.map(np.testing.assert_array_equal, other, theta)  # noqa: E731
    same(load_optimizer(name).theta)
    same(load_optimizer(name, weights=name).theta)
    same(build(load(name).optimizer, theta_init={"kind": "file", "path": name}).theta)
    same(contenders([name])[1].context[0])
    found = contenders([name], [f"{name}=hand_made", f"{name}={name}"])[1:]
    assert [c.label for c in found] == [f"{name}@hand_made", f"{name}@{name}"]
    assert found[0].config["theta"] != found[1].config["theta"] == weights.card(name)["digest"]
    # What exists is a path; the package's weights stay what a variant has by default.
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"no theta at {name}"):
        load_theta(name)
    same(load_optimizer(name).theta)


def test_weights_that_an_override_does_not_fit_are_told() -> None:
    with pytest.raises(
        UserError, match="the optimizer has float32.*weights='hand_made' needs no file"
    ) as error:
        load_optimizer("celo2", ["optimizer.update_rule.hidden=(4,4)"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_the_default_learning_rate_is_the_card_s(name: str) -> None:
    rate = weights.card(name)["learning_rate"]["recommended"]
    params = {"v": jnp.array([0.5, -1.0, 2.0])}
    options = {"num_steps": 10} if name == "celo" else {}
    moved = []
    for arguments in ({}, {"learning_rate": rate * (1e-3 if name == "celo" else 1.0)}):
        tx = getattr(celo_nnx, name)(**arguments, **options)
        moved.append(tx.update(params, tx.init(params), params, value=jnp.float32(1.0))[0]["v"])
    np.testing.assert_allclose(*moved, rtol=1e-2)
