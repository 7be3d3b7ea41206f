"""``bench seeds``: what is vmapped is the same meta-iteration; no time is asserted."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from celo_nnx import bench, bench_seeds, cli
from celo_nnx.build import build
from celo_nnx.config import load
from celo_nnx.meta import build_trainer
from celo_nnx.meta.trainer import COMPILER_OPTIONS

SMALL = [
    "tasks.hidden=(4,)",
    "tasks.batch_size=4",
    "run.devices=1",
    "run.iterations_per_dispatch=1",
    "meta.estimator.pairs=2",
    "meta.estimator.truncation=5",
    "meta.unroll.minimum=2",  # trajectories end inside of the truncation, each seed's at steps of its own
    "meta.unroll.maximum=6",
    "meta.augmentation.high=1.0",  # larger scales make losses chaotic: rounding decides them
]
SEEDS = 3


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(bench_seeds, "REPEATS", 1)
    monkeypatch.setattr(bench, "EXAMPLES", 32)


def close(ours, theirs, tolerance=1e-5):
    for path, mine in jax.tree.leaves_with_path(ours):
        other = np.asarray(theirs[path[0].key] if isinstance(theirs, dict) else theirs)
        assert np.linalg.norm(np.asarray(mine) - other) <= tolerance * np.linalg.norm(other), path


def test_vmapped_seeds_have_the_losses_and_the_meta_gradient_of_separate_runs(monkeypatch):
    # Compiled as for users: the gradient is a small difference of losses, in which rounding shows.
    options = COMPILER_OPTIONS | {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}
    monkeypatch.setattr(bench_seeds, "COMPILER_OPTIONS", options)
    config = load("nn_adam:fast_digits", SMALL)
    optimizers = [build(config.optimizer, jax.random.key(i), None) for i in range(SEEDS)]
    trainer = build_trainer(config, optimizers[0], bench.synthetic_families(config.tasks))

    def first(state):
        key = jax.random.fold_in(state["key"], 0)
        gradient, _, metrics = trainer.estimator(state["theta"], state["estimator"], key, 0)
        return {"gradient": jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(gradient)]), **metrics}

    def states():
        return [trainer.init(jax.random.key(i), o.theta) for i, o in enumerate(optimizers)]

    alone = [jax.jit(first, compiler_options=options)(state) for state in states()]
    together = jax.jit(jax.vmap(first), compiler_options=options)(bench_seeds.stacked(states()))
    for i, one in enumerate(alone):
        close({name: x[i] for name, x in together.items()}, one)
    assert len({float(one["loss"]) for one in alone}) == SEEDS
    assert all(np.any(np.asarray(one["gradient"])) for one in alone)

    program = bench_seeds.vmapped(trainer)
    after, metrics = program(bench_seeds.stacked(states()), jnp.int32(1), trainer._data)
    assert after["iteration"].tolist() == [1] * SEEDS
    for i, one in enumerate(alone):
        close({name: metrics[name][i, 0] for name in ("loss", "family_loss")}, one)
        close(metrics["gradient_norm"][i, 0], jnp.linalg.norm(one["gradient"]))


def test_a_row_for_each_way(capsys):
    assert cli.main(["bench", "seeds", "nn_adam:fast_digits", *SMALL, "--seeds", "2"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["thing"] for row in rows] == ["in_turn", "apart", "vmapped", "pooled"]
    assert all(row["seeds"] == 2 and row["devices"] == 1 and row["gain"] > 0 for row in rows)
    assert rows[0]["gain"] == rows[0]["gain_min"] == rows[0]["gain_max"] == 1.0


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--seeds", "1"], "--seeds = 1"),
        (["--seeds", "many"], "--seeds"),
        (["meta.estimator.kind=mixture"], "meta.estimator.pairs"),
        (["run.devices=3"], "run.devices"),
        (["tasks.kind=text"], "image_mlp"),
    ],
)
def test_it_refuses_before_it_compiles(capsys, argv, words):
    assert cli.main(["bench", "seeds", "nn_adam:fast_digits", *argv]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and "\n" not in said
