"""The training examples: a run that is interrupted ends as one that is not, tables and pictures, mistakes."""

from __future__ import annotations

import csv
import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import celo_nnx
from celo_nnx.experiments.training import conv_net, gpt, images, loop, picture, scaling, study, vit
from celo_nnx.experiments.training.loop import Plan, Problem, Run
from celo_nnx.meta import checkpoint

TINY = ["--width", "8", "--depth", "1", "--heads", "2", "--context", "8", "--batch-size", "2"]
SHORT = ["--text", "sums", "--steps", "3", "--every", "1", *TINY]


@pytest.fixture(autouse=True)
def no_compiled_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of compiled programs is the process's, so a test must not switch it on."""
    monkeypatch.setattr(study, "keep_compiled", lambda: None)


@pytest.fixture
def one_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every optimizer has one rate and no other."""
    made = {name: dataclasses.replace(one, grid=(-5, -5)) for name, one in loop.OPTIMIZERS.items()}
    monkeypatch.setattr(loop, "OPTIMIZERS", made)
    monkeypatch.setattr(study, "OPTIMIZERS", made)
    monkeypatch.setattr(study, "LIMIT", 0)


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_an_interrupted_gpt_ends_as_one_that_was_not(
    tmp_path: Path, one_rate: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # One problem for all commands, which then share a compiled program.
    sizes = dict(width=8, depth=1, heads=2, context=8, batch_size=2)
    made = gpt.problem(gpt.text_of("sums"), **sizes)
    monkeypatch.setattr(gpt, "problem", lambda *_, **__: made)
    options = [*SHORT, "--optimizers", "celo2", "--seeds", "1", "--run-dir"]
    assert gpt.main([*options, str(tmp_path / "whole")]) == 0

    save, saved = checkpoint.save, []

    def interrupted(folder: Path, step: int, *rest: Any, **more: Any) -> None:
        save(folder, step, *rest, **more)
        saved.append(step)
        if saved == [1, 2]:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", interrupted)
    again = [*options, str(tmp_path / "again"), "--checkpoint-seconds", "0"]
    assert gpt.main(again) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert gpt.main(again) == 0
    assert saved == [1, 2, 1, 2]  # the first run went on from its step 2, the second began

    whole, curves = (read(tmp_path / name / "curves.csv") for name in ("whole", "again"))
    assert curves == whole and [row["step"] for row in whole] == ["1", "2", "3"]
    assert float(whole[-1]["validation_loss"]) < float(whole[0]["validation_loss"])
    assert not list((tmp_path / "again").glob("*.checkpoint"))
    row = read(tmp_path / "again" / "summary.csv")[0]
    assert row["loss"] == f"{float(whole[-1]['validation_loss']):.5g}" and row["half_width"] == ""
    assert (tmp_path / "again" / "gpt.svg").read_text().startswith("<?xml")
    assert "celo2  lr 0.00316" in capsys.readouterr().out

    drawn = (tmp_path / "again" / "gpt.svg").read_bytes()
    assert gpt.main(again) == 0  # nothing is trained again
    assert (tmp_path / "again" / "gpt.svg").read_bytes() == drawn and saved == [1, 2, 1, 2]
    shutil.copy(tmp_path / "again" / "summary.csv", tmp_path / "again" / "gpt_celo2_rate-5_seed1.json")
    assert gpt.main(again) == 2


def test_images_train(tmp_path: Path, one_rate: None, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--steps=2", "--every=1", "--batch-size=2", "--seeds=2", "--optimizers=adamw,muon"]
    assert conv_net.main([*options, "--run-dir", str(tmp_path / "conv")]) == 0
    rows = {row["optimizer"]: row for row in read(tmp_path / "conv" / "summary.csv")}
    (gap,) = read(tmp_path / "conv" / "differences.csv")
    assert (gap["optimizer"], gap["less"]) == ("muon", "adamw")
    assert float(gap["loss"]) == pytest.approx(
        float(rows["muon"]["loss"]) - float(rows["adamw"]["loss"]), abs=1e-4
    )
    assert 2.0 < float(rows["adamw"]["loss"]) < 3.0  # near the logarithm of ten classes
    assert "digits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "size", "colors"), [(conv_net.ConvNet, 32, 3), (vit.ViT, 32, 3), (vit.ViT, 28, 1)]
)
def test_images_become_logits_and_kernels_are_matrices(model: Any, size: int, colors: int) -> None:
    def run() -> jax.Array:
        return model(size, colors, 10, rngs=nnx.Rngs(0))(jnp.zeros((2, size, size, colors)))

    assert jax.eval_shape(run).shape == (2, 10)
    params = nnx.state(nnx.eval_shape(lambda: model(size, colors, 10, rngs=nnx.Rngs(0))), nnx.Param)
    mine = {
        jax.tree_util.keystr(path)
        for path, numbers in jax.tree_util.tree_leaves_with_path(
            loop.matrices(params), is_leaf=lambda x: isinstance(x, optax.contrib.MuonDimensionNumbers)
        )
    }
    table = celo_nnx.load_optimizer("celo2").routing_table(params).splitlines()[1:]
    theirs = {line.split()[0] for line in table if " learned " in line} - {"head/kernel"}
    assert len(mine) == len(theirs) and all("kernel" in name for name in mine)


def fake(problem: Problem, optimizer: str, rate: float, seed: int, plan: Plan, *rest: Any) -> Run:
    """A run whose loss depends on the distance to the best rate, 10^-3.5 for Muon, else 10^-2.5."""
    best = {"muon": -3.5}.get(optimizer, -2.5)
    loss = 1 + abs(math.log10(rate) - best) + 0.01 * seed
    return Run([(step, loss, loss) for step in range(plan.every, plan.steps + 1, plan.every)], 0.001)


@pytest.mark.parametrize("program", [gpt, scaling])
def test_an_edited_text_of_the_same_length_is_another_study(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "train", fake)
    monkeypatch.setattr(picture, "write", lambda *_: None)
    file = tmp_path / "notes.txt"
    options = ["--text", str(file), "--steps", "2", "--context", "8", "--run-dir", str(tmp_path / "runs")]
    options += ["--widths", "8", "--depths", "1"] if program is scaling else ["--width", "8"]
    file.write_text("a study of notes " * 20)
    assert program.main(options) == program.main(options) == 0
    capsys.readouterr()
    file.write_text("a study of tones " * 20)
    assert program.main(options) == 2
    assert "is of a study with data = '340 characters of" in capsys.readouterr().err


def test_grids_widen_to_the_best_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "train", fake)
    monkeypatch.setattr(picture, "write", lambda name, tuned, *rest: found.update(tuned))
    found: dict[str, dict[int, Run]] = {}
    assert gpt.main([*SHORT, "--run-dir", str(tmp_path)]) == 0
    plan = Plan(3, 1, 0)
    assert {name: study.best(runs, plan) for name, runs in found.items()} == {
        "adamw": -5,
        "muon": -7,
        "celo2": -5,
    }
    assert sorted(found["muon"]) == list(range(-8, -1)) and sorted(found["adamw"]) == list(range(-6, -2))


def test_a_diverged_run_is_infinite_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "train", lambda *_: Run([(1, 2.0, 2.0), (2, math.nan, math.inf)], 0.0))
    problem = Problem("none", *[None] * 5)
    job = study.Job(problem, "adamw", -5, 1)
    for _ in range(2):
        run = study.work([job], Plan(3, 1, 0), tmp_path)[job]
        assert run.final(3) == math.inf and run.curve[0] == (1, 2.0, 2.0) and len(run.curve) == 2
    assert "NaN" not in (tmp_path / f"{job.name}.json").read_text()


def test_scaling_compares_the_kept_rate_with_its_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "train", fake)
    options = ["--text", "sums", "--steps", "2", "--widths", "8,16", "--depths", "1", "--context", "8"]
    assert scaling.main([*options, "--run-dir", str(tmp_path)]) == 0
    rows = read(tmp_path / "scaling.csv")
    assert {(row["width"], row["depth"]) for row in rows} == {("8", "2"), ("16", "2"), ("64", "1")}
    kept = {row["optimizer"]: row["learning_rate"] for row in rows if row["kept"] == "1"}
    assert kept == {"adamw": "0.003162", "muon": "0.0003162", "celo2": "0.003162"} and len(rows) == 27
    assert capsys.readouterr().out.count("the best") == 10  # nine points and the heading
    assert (tmp_path / "scaling.svg").read_text().startswith("<?xml")


def test_width_multipliers_scale_hidden_matrices_alone() -> None:
    text = gpt.text_of("sums")
    sizes = dict(width=128, depth=1, heads=4, context=8, batch_size=2)
    made, plain = (gpt.problem(text, **sizes, width_multipliers=on) for on in (True, False))
    params = nnx.state(made.model(nnx.Rngs(0)), nnx.Param)
    ones = jax.tree.map(jnp.ones_like, params)

    def first(tx: optax.GradientTransformation) -> dict[str, float]:
        updates, _ = tx.update(ones, tx.init(params), params)
        return {
            jax.tree_util.keystr(p): float(u.mean()) for p, u in jax.tree_util.tree_leaves_with_path(updates)
        }

    for name, factor in {"adamw": 1 / 4, "muon": 1.0, "celo2": 1 / 2}.items():
        scaled = first(made.adjust(name, optax.sgd(1.0)))
        assert all(
            value == (-factor if "blocks" in k and "norm" not in k else -1) for k, value in scaled.items()
        )
    assert first(plain.adjust("adamw", optax.sgd(1.0)))["['head']['kernel'].value"] == -1
    tokens = jnp.zeros((1, 8), jnp.int32)
    model, other = made.model(nnx.Rngs(0)), plain.model(nnx.Rngs(0))
    assert model.gain == 1 / 4 and model.blocks[0].scale == other.blocks[0].scale / 2
    assert model(tokens).shape == (1, 8, text.vocabulary)


def test_batches_are_of_the_text(tmp_path: Path) -> None:
    file = tmp_path / "numbers.dat"
    file.write_text("".join(chr(200 + i) for i in range(100)))
    text = gpt.text_of(str(file))
    made = gpt.problem(text, width=8, depth=1, heads=2, context=5, batch_size=3)
    batch = np.asarray(made.draw(jax.random.key(0), made.train))
    assert batch.shape == (3, 6) and (np.diff(batch, axis=1) == 1).all() and batch.max() < 90
    assert made.validation.shape == (16, 3, 6) and made.validation.min() == 90 and made.validation.max() == 99


@pytest.mark.parametrize(
    ("program", "options", "words"),
    [
        (gpt, ["--text", "short.txt"], "too few for a context of 64"),
        (gpt, ["--text", "absent.txt"], "no text at absent.txt"),
        (gpt, ["--text", "shakespear"], "did you mean 'shakespeare'"),
        (gpt, ["--optimizers", "adamw,muonn"], "unknown optimizer 'muonn' (did you mean 'muon'?)"),
        (gpt, ["--optimizers", "muon,muon"], "different names"),
        (gpt, ["--steps", "10", "--every", "3"], "a divisor of 10 steps"),
        (gpt, ["--steps", "0"], "'0' is not an integer of at least 1"),
        (gpt, ["--width", "10", "--heads", "4"], "a divisor of the width 10"),
        (gpt, ["--run-dir", "other"], "holds other files"),
        (gpt, ["--run-dir", "begun"], "is of a study with width = 8, not 64"),
        (gpt, ["--checkpoint-seconds", "-1"], "at least 0"),
        (vit, ["--data", "cifar"], "unknown data set 'cifar'"),
        (scaling, ["--widths", "64,32"], "does not ascend"),
    ],
)
def test_mistakes_are_told_in_one_line(
    program: Any,
    options: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("as short as can be\n" * 20)
    for folder, settings in (("other", None), ("begun", '{"width": 8}')):
        Path(folder).mkdir()
        Path(folder, "settings.json" if settings else "thesis.tex").write_text(settings or "")
    if program is gpt and "--text" not in options:
        options = ["--text", "sums", *options]
    assert program.main(options) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and "error:" in err


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for program in (gpt, conv_net, vit, scaling):
        with pytest.raises(SystemExit):
            program.main(["--help"])
        shown = capsys.readouterr().out
        assert shown.count(f"python -m {program.__name__}") >= 3 and "``" not in shown


def test_images_fall_back_to_digits() -> None:
    made = images.problem("digits", images.images_of(""), 4, conv_net.ConvNet)
    assert made.train[0].shape == (1400, 8, 8, 1) and made.validation[1].shape == (1, 100)


def test_rms_of_a_step_is_what_the_migration_table_says() -> None:
    """Celo2's is its rate; Muon's is the rate over the root of the rows, as near as Newton-Schulz comes."""
    params = {"wide": {"kernel": jnp.zeros((16, 48))}, "tall": {"kernel": jnp.zeros((48, 16))}}
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.shape[0]), p.shape), params)

    def rms(tx: optax.GradientTransformation) -> dict[str, float]:
        updates = jax.jit(lambda: tx.update(grads, tx.init(params), params)[0])()
        return {name: float(jnp.sqrt(jnp.mean(leaf["kernel"] ** 2))) for name, leaf in updates.items()}

    assert rms(loop.celo2(1e-2)) == pytest.approx({"wide": 1e-2, "tall": 1e-2}, rel=1e-3)
    assert rms(loop.muon(1e-2)) == pytest.approx({"wide": 1e-2 / 16**0.5, "tall": 1e-2 / 48**0.5}, rel=0.2)
    consistent = optax.contrib.muon(1e-2, consistent_rms=0.2)
    assert rms(consistent) == pytest.approx({"wide": 2e-3, "tall": 2e-3}, rel=0.2)
