"""Grid files and the cells that they make; the papers' grids."""

import csv
import dataclasses
import json
from pathlib import Path

import jax
import made_grid
import pytest
from ml_collections import ConfigDict

from celo_nnx.build import build
from celo_nnx.config import load
from celo_nnx.errors import UserError
from celo_nnx.grids.grid_file import Grid, grids, load_grid
from celo_nnx.grids.plan import differing, plan
from celo_nnx.grids.status import plan_lines

GRIDS = Path(__file__).resolve().parents[2] / "experiments" / "grids"
RATES = {x: (f"meta.optimizer.learning_rate={x}",) for x in ("1e-3", "3e-3")}


def grid(**changes):
    fields = dict(name="g", question="Which?", base="celo2:fast_digits", axes={"rate": RATES})
    return Grid(**(fields | changes))


def test_the_product_of_axes_and_further_cells_for_every_seed():
    std = {"0.01": (), "0.1": ("meta.estimator.std=0.1", "meta.estimator.pairs=2")}
    made = plan(grid(axes={"rate": RATES, "std": std}, cells={"fat": ("optimizer.tile=8",)}, seeds=(3, 5)))
    names = [cell.name for cell in made]
    assert names[:5] == [
        "rate=1e-3 std=0.01 seed=3",
        "rate=1e-3 std=0.1 seed=3",
        "rate=3e-3 std=0.01 seed=3",
        "rate=3e-3 std=0.1 seed=3",
        "fat seed=3",
    ]
    assert len(made) == 10 and names[5:] == [name.replace("seed=3", "seed=5") for name in names[:5]]
    config = made[8].config
    assert config["seed"] == 5 and config["meta"]["optimizer"]["learning_rate"] == 3e-3
    assert config["meta"]["estimator"]["std"] == 0.1 and config["meta"]["estimator"]["pairs"] == 2
    again = load("celo2:fast_digits", made[8].overrides)
    assert json.loads(json.dumps(again.to_dict())) == config  # the command of a cell makes its config
    keys = ["meta.estimator.pairs", "meta.estimator.std", "meta.optimizer.learning_rate", "optimizer.tile"]
    assert differing([cell.config for cell in made]) == keys


def test_skip_leaves_out_what_meets_a_condition():
    std = {x: (f"meta.estimator.std={x}",) for x in ("0.01", "0.1", "1.0")}
    axes = {"rate": RATES, "std": std}
    skip = ({"rate": "3e-3", "std": ("0.1", "1.0")}, {"std": "1.0"})
    kept = [tuple(labels.values()) for labels, *_ in grid(axes=axes, skip=skip).variants()]
    assert kept == [("1e-3", "0.01"), ("1e-3", "0.1"), ("3e-3", "0.01")]


def test_an_id_says_what_decides_the_result():
    one = grid()
    ids = [cell.id for cell in plan(one)]
    assert len(set(ids)) == 2 and all(len(x) == 12 and int(x, 16) >= 0 for x in ids)

    def with_overrides(*texts):
        return [cell.id for cell in plan(dataclasses.replace(one, overrides=texts))]

    assert with_overrides("run.devices=1", "run.data_dir=elsewhere") == ids
    assert not set(with_overrides("run.iterations=7")) & set(ids)
    assert not set(with_overrides("meta.estimator.std=0.02")) & set(ids)
    # What a cell is called decides nothing.
    renamed = {"pace": {"slow": RATES["1e-3"], "fast": RATES["3e-3"]}, "all": {"same": ()}}
    assert [cell.id for cell in plan(dataclasses.replace(one, axes=renamed))] == ids
    suites = [dataclasses.replace(one, suite="smoke", suite_overrides=x) for x in ((), ("steps=100",))]
    assert len({*ids, *(cell.id for some in suites for cell in plan(some))}) == 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            dict(axes={"rate": {"x": ("meta.optimizer.learning_rat=1",)}}),
            "cell rate=x seed=0: unknown config key",
        ),
        (dict(axes={"rate": {"x": ("meta.optimizer.learning_rate=fast",)}}), "expected float"),
        (dict(axes={"rate": {"x": ("optimizer.normalization.kind=x",)}}), "rate=x"),
        (dict(overrides=("meta.std=1",)), "unknown config key of meta, 'std'"),
        (dict(axes={"rate": RATES, "more": {"a": (), "b": ()}}), "have the same config"),
        (dict(axes={"x": {"a": ("run.devices=1",), "b": ("run.devices=2",)}}), "only run.iterations"),
        (dict(base="celo2_bas:fast_digits"), "unknown config 'celo2_bas' (did you mean 'celo2_base'?)"),
        (dict(suite="smok"), "unknown suite 'smok' (did you mean 'smoke'?)"),
        (dict(suite_overrides=("steps=5",)), "no suite"),
        (dict(skip=({"rate": ("1e-3", "3e-3")},)), "has 0 cells"),
        (dict(seeds=tuple(range(4000))), "8000 cells"),
        (dict(axes={"x": {"a": ("run.iterations=-1",)}}), "run.iterations = -1"),
    ],
)
def test_mistakes_are_told_before_anything_runs(changes, words):
    with pytest.raises(UserError) as caught:
        plan(grid(**changes))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(axes=ConfigDict({"rate": {"a": ()}})), "a tuple of pairs"),
        (dict(axes=("rate",)), "a tuple of pairs"),
        (dict(axes=(("rate", RATES), ("rate", RATES))), "different names"),
        (dict(axes={"rate": {"a": "seed=1"}}), "a tuple of overrides"),
        (dict(axes={"rate": {"a": ("seed=1",)}}), "seeds"),
        (dict(axes={"rate": {"a": ("std",)}}), "not of the form key=value"),
        (dict(axes={"rate": {}}), "one label or more"),
        (dict(axes=()), "one axis or more"),
        (dict(seeds=()), "different integers"),
        (dict(seeds=(1, 1)), "different integers"),
        (dict(question=""), "a text"),
        (dict(skip=({"rat": "1e-3"},)), "unknown axis in skip, 'rat' (did you mean 'rate'?)"),
        (dict(skip=({"rate": "1e-4"},)), "unknown label of axis 'rate'"),
        (dict(skip=("rate",)), "a tuple of conditions"),
    ],
)
def test_a_grid_of_another_form_is_refused(changes, words):
    with pytest.raises(UserError) as caught:
        grid(**changes)
    assert words in str(caught.value)


def test_files(tmp_path: Path):
    found = load_grid(made_grid.file(tmp_path), ["run.iterations=6"])
    assert found.name == "small" and list(found.axes) == ["rate", "std"]
    cells = plan(found)
    assert len(cells) == 12 and {cell.config["run"]["iterations"] for cell in cells} == {6}
    text = "\n".join(plan_lines(found, cells))
    assert "Which rate?" in text and "12 cells, 72 meta-iterations in all" in text
    assert "meta.optimizer.learning_rate: 0.001 (6); 0.003 (6)" in text
    with pytest.raises(UserError, match=r"unknown grid 'mlp_siz' \(did you mean 'mlp_size'\?\)"):
        load_grid("mlp_siz")
    path = made_grid.file(tmp_path, made_grid.FILE.replace("question=", "qestion="), name="typo.py")
    with pytest.raises(UserError, match="unknown setting of the grid .*typo.py, 'qestion'"):
        load_grid(path)
    path = made_grid.file(tmp_path, made_grid.FILE.replace('base="celo2:fast_digits",', ""), name="none.py")
    with pytest.raises(UserError, match="has no setting 'base'"):
        load_grid(path)


@pytest.mark.parametrize("name", sorted(grids()))
def test_the_papers_grids_can_be_planned_and_built(name):
    found = load_grid(name)
    cells = plan(found)
    assert found.question.endswith("?") and len(found.seeds) == 3 and grids()[name]
    for cell in cells:
        lengths = cell.config["meta"]["unroll"]
        assert lengths["minimum"] <= cell.suite["settings"]["steps"] <= lengths["maximum"]
    optimizers = {json.dumps(cell.config["optimizer"]): cell.config["optimizer"] for cell in cells}
    for section in optimizers.values():
        jax.eval_shape(lambda section=section: build(section).theta)
    assert len((GRIDS / f"{name}.py").read_text().splitlines()) <= 40
    recorded = GRIDS / "results" / f"{name}-cells.csv"
    if recorded.exists():
        rows = csv.DictReader(recorded.read_text().splitlines())
        assert [row["id"] for row in rows] == [cell.id for cell in cells]
