"""Effects of axes against numbers computed by hand, and the report that shows them."""

import csv
import json
import math
from pathlib import Path

import made_grid
import made_run
import numpy as np
import pytest

from celo_nnx.config import load
from celo_nnx.errors import UserError
from celo_nnx.grids import report
from celo_nnx.grids.drive import run
from celo_nnx.grids.effects import complete, effects, key
from celo_nnx.grids.grid_file import Grid, load_grid
from celo_nnx.grids.plan import differing, scales
from celo_nnx.grids.store import read_grid
from celo_nnx.run_files import resolve

# Meta-losses by rate, std and seed. The large rate is better by 1, 2 and 3, averaged over std; the large std
# is worse by 0.5 for every seed.
LOSSES = {
    ("1e-3", "small"): (4.0, 5.0, 6.0),
    ("1e-3", "large"): (4.5, 5.5, 6.5),
    ("3e-3", "small"): (3.0, 3.0, 3.0),
    ("3e-3", "large"): (3.5, 3.5, 3.5),
}
T2 = 4.302652729911275  # Student's 97.5 % quantile at two degrees of freedom
AXES = {"rate": ["1e-3", "3e-3"], "std": ["small", "large"]}


def table(without=()):
    out = {}
    for (rate, std), losses in LOSSES.items():
        for seed, loss in enumerate(losses):
            if (rate, std, seed) not in without:
                out[key({"rate": rate, "std": std}, seed)] = loss
    return out


def test_effects_are_those_computed_by_hand():
    found = {(e.axis, e.label): e for e in effects(AXES, list(table()), table())}
    rate = found["rate", "3e-3"]
    # -1, -2, -3 by seed: mean -2, standard deviation 1.
    assert rate.effect == pytest.approx(-2.0) and rate.half_width == pytest.approx(T2 / math.sqrt(3))
    assert rate.mean == pytest.approx(3.25)
    assert (rate.seeds, rate.combinations, rate.missing) == (3, 2, 0)
    std = found["std", "large"]
    assert (std.effect, std.half_width) == (pytest.approx(0.5), pytest.approx(0.0))
    for axis, labels in AXES.items():
        first = found[axis, labels[0]]
        assert first.effect == 0.0 and math.isnan(first.half_width)


def test_pairs_without_a_number_are_left_out_whole():
    planned = list(table())
    one = [("3e-3", "large", 1)]
    rate, std = (e for e in effects(AXES, planned, table(one)) if e.label in ("3e-3", "large"))
    # Seed 1 goes: -1 and -3 are left.
    assert rate.effect == pytest.approx(-2.0) and (rate.seeds, rate.combinations, rate.missing) == (2, 2, 1)
    assert rate.half_width == pytest.approx(12.706204736432095 * math.sqrt(2) / math.sqrt(2))
    assert std.effect == pytest.approx(0.5) and std.missing == 1
    nan = table() | {key({"rate": "3e-3", "std": "large"}, 1): math.nan}
    assert effects(AXES, planned, nan)[1] == rate
    combination = [("3e-3", "large", seed) for seed in range(3)]
    rate = effects(AXES, planned, table(combination))[1]
    assert (rate.seeds, rate.combinations) == (3, 1) and rate.effect == pytest.approx(-2.0)
    none = effects(AXES, planned, {})[1]
    assert math.isnan(none.effect) and (none.seeds, none.missing) == (0, 6)


def test_skipped_combinations_are_not_missing():
    planned = [k for k in table() if dict(k[0]) != {"rate": "3e-3", "std": "large"}]
    rate = effects(AXES, planned, {k: table()[k] for k in planned})[1]
    assert (rate.seeds, rate.combinations, rate.missing) == (3, 1, 0)


def test_what_lacks_most_goes_first():
    whole = np.ones((2, 8), bool)
    whole[1, 3] = False
    rows, columns = complete(whole)
    assert len(rows) == 2 and columns.tolist() == [0, 1, 2, 4, 5, 6, 7]


def nothing(folders, stop, tell):
    """An engine that runs no cell."""


def test_further_cells_are_compared_with_the_first_labels(tmp_path):
    def told(axes):
        cells = {"still": ("optimizer.weight_decay=0.2",), "decay": ("optimizer.weight_decay=0.1",)}
        grid = Grid("g", "Which?", "celo2:fast_digits", axes=axes, cells=cells, seeds=(0, 1, 2))
        run(grid, folder := tmp_path / f"{len(axes)}", nothing)
        losses = {"decay": (3.0, 3.0, 3.0), "still": (4.0, 5.0, 6.0)}
        for entry in read_grid(folder).cells:
            loss = (losses | {"": LOSSES.get(tuple(entry.labels.values()))})[entry.extra][entry.seed]
            (entry.folder.path / "result.json").write_text(json.dumps({"outcome": {"meta_loss": loss}}))
        text = report.write(folder).read_text()
        return text, list(csv.DictReader((folder / "effects.csv").read_text().splitlines()))

    std = {"small": (), "large": ("meta.estimator.std=0.1",)}
    text, rows = told({"rate": {x: (f"meta.optimizer.learning_rate={x}",) for x in AXES["rate"]}, "std": std})
    assert [row["axis"] for row in rows] == ["rate"] * 2 + ["std"] * 2 + ["further cell"] * 3
    assert [row["label"] for row in rows[-3:]] == ["rate=1e-3 std=small", "still", "decay"]
    # -1, -2, -3 by seed.
    assert rows[-1]["reference"] == "rate=1e-3 std=small" and rows[-1]["seeds"] == "3"
    assert float(rows[-1]["effect"]) == pytest.approx(-2.0) and float(rows[-2]["effect"]) == 0.0
    assert float(rows[-1]["low"]) == pytest.approx(-2 - T2 / math.sqrt(3))
    assert "<td>further cell</td><td>decay</td><td>3</td><td>-2</td>" in text
    _, rows = told({})  # the first one is what the others are compared with
    assert [(row["reference"], float(row["effect"])) for row in rows] == [("still", 0.0), ("still", -2.0)]


@pytest.fixture
def folder(tmp_path) -> Path:
    # Cells with other pairs, and the same perturbation: their meta-losses are of one scale.
    return made(tmp_path, made_grid.FILE.replace('"meta.estimator.std=0.1",', "").replace('=4")', '=4",)'))


def made(tmp_path: Path, text: str) -> Path:
    """A grid whose cells have made-up results, but for one that failed and one that waits."""
    grid = load_grid(made_grid.file(tmp_path, text))
    path = tmp_path / "<grid>"
    run(grid, path, nothing, command="celo-nnx grid run small.py --run-dir g")
    for entry in read_grid(path).cells:
        place = (entry.labels["rate"], entry.labels["std"])
        loss = LOSSES[place][entry.seed]
        if (*place, entry.seed) == ("3e-3", "large", 2):
            entry.folder.note("start")
            entry.folder.note("failed", error="ValueError: <b>bad</b>")
            continue
        if (*place, entry.seed) == ("3e-3", "large", 1):
            continue
        entry.folder.note("start")
        made_run.make(entry.folder.run_dir, made_run.course([loss + 1] * 6 + [loss] * 6), total=12)
        outcome = {"meta_loss": loss, "first_meta_loss": loss + 1, "iterations": 12, "nonfinite": 0}
        content = {"id": entry.id, "outcome": outcome, "cost": {"train_seconds": 5.0, "starts": 1}}
        (entry.folder.path / "result.json").write_text(json.dumps(content))
    return path


def test_the_report_tells_effects_failures_and_the_best(folder):
    path = report.write(folder)
    text = path.read_text()
    assert path == folder / "report.html" and "10 of 12 cells are done, 1 failed." in text
    assert "Which rate?" in text and "ValueError: &lt;b&gt;bad&lt;/b&gt;" in text and "<b>bad" not in text
    assert "<script" not in text and 'src="http' not in text and "@import" not in text
    assert text.count("<b>") == 1 and "<b>+0.5</b>" in text  # the effect of std, the same for all seeds
    assert text.count("<svg") == 4  # effects, variants, rate, std
    # Of the variants whose seeds are all done, 3e-3 with a small std is best.
    assert "mean over 3 seeds: rate=3e-3 std=small" in text
    assert "celo-nnx train celo2:fast_digits run.iterations=12" in text
    assert "meta.optimizer.learning_rate=3e-3 seed=0 --run-dir runs/best" in text
    assert "largest clear effect on the meta-loss: std large" in text and "not of one scale" not in text
    assert "<dd>120</dd>" in text and "<dd>0:50</dd>" in text
    rows = list(csv.DictReader((folder / "effects.csv").read_text().splitlines()))
    rate = next(row for row in rows if row["label"] == "3e-3")
    # Two of three seeds of the large std are missing, so the small one is what is compared: -1, -2, -3.
    assert float(rate["effect"]) == pytest.approx(-2.0) and float(rate["mean"]) == pytest.approx(3.0)
    assert float(rate["low"]) == pytest.approx(-2 - T2 / math.sqrt(3)) and rate["missing_pairs"] == "2"
    cells = list(csv.DictReader((folder / "cells.csv").read_text().splitlines()))
    assert [row["state"] for row in cells].count("done") == 10 and cells[0]["meta_loss"] == "4.0"
    assert report.write(folder) == path  # a newer one replaces an older
    (folder / "report.html").write_text("mine")
    with pytest.raises(UserError, match="exists"):
        report.write(folder)
    assert report.write(folder, folder.parent / "r.html").exists()
    assert (folder.parent / "r-cells.csv").exists()
    picture = (folder / "effects.svg").read_text()
    assert picture.startswith("<?xml") and "rate: 3e-3" in picture and "meta-loss, difference" in picture


SCALED = {
    "tasks.batch_size": ("tasks.batch_size=8",),
    "meta.unroll": ("meta.unroll.minimum=50",),
    "meta.estimator.weights": ("meta.estimator.weights=3,",),
    "meta.estimator.leaf_std": ("meta.estimator.leaf_std=(('update_rule', 1.0),)",),
    "meta.estimator.first.truncation": ("meta.estimator.first.truncation=5",),
    "meta.estimator.second.std": ("meta.estimator.second.std=0.1",),
    "meta.estimator.weight": ("meta.estimator.weight=0.9",),
}


@pytest.mark.parametrize("key", SCALED)
def test_what_changes_the_meta_loss_s_scale_is_found(key):
    mixed = ["meta.estimator.kind=mixture"] * (key.split(".")[2:3] in (["first"], ["second"], ["weight"]))
    base, other = (resolve(load("celo2_base:fast_digits", [*mixed, *more])) for more in ((), SCALED[key]))
    found = scales(differing([base, other]))
    assert len(found) == 1 and key.startswith(found[0])


def test_what_does_not_is_not_found():
    more = ["meta.optimizer.learning_rate=0.5", "meta.estimator.pairs=4", "optimizer.schedule.value=0.5"]
    configs = [resolve(load("celo2_base:fast_digits", some)) for some in ((), more)]
    assert len(differing(configs)) == 3 and scales(differing(configs)) == []
    assert scales(["meta.phases"]) == ["meta.phases"]  # a list of sections, which is compared as a whole


def test_meta_losses_of_several_scales_are_not_judged(tmp_path):
    folder = made(tmp_path, made_grid.FILE)
    text = report.write(folder).read_text()
    assert "Cells differ in meta.estimator.std" in text and "not of one scale" in text
    assert "<b>" not in text and "largest clear" not in text and "The best variant" not in text
    assert "Effects on the meta-loss" in text
    with_scores(folder)
    text = report.write(folder).read_text()
    assert "largest clear effect on the final-loss score: std large" in text
    assert "By final-loss score, mean over 3 seeds: rate=3e-3 std=small" in text and text.count("<b>") == 1


def test_scores_come_first(folder):
    with_scores(folder)
    text = report.write(folder).read_text()
    assert text.index("Effects on the final-loss score") < text.index("Effects on the meta-loss")
    assert "By final-loss score, mean over 3 seeds: rate=3e-3 std=small" in text


def with_scores(folder: Path) -> None:
    """Gives the finished cells scores too: 10 less the meta-loss."""
    for entry in read_grid(folder).cells:
        if (result := entry.folder.result()) is not None:
            result["outcome"] |= {"score": 10 - result["outcome"]["meta_loss"], "speedup": 1.5}
            (entry.folder.path / "result.json").write_text(json.dumps(result))


def test_a_grid_without_results_has_a_report(tmp_path):
    grid = load_grid(made_grid.file(tmp_path))
    run(grid, tmp_path / "g", nothing)
    text = report.write(tmp_path / "g").read_text()
    assert "0 of 12 cells are done." in text and "The best variant" not in text and "<svg" not in text
