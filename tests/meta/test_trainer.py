"""The loop: the same numbers however it is cut, on however many devices."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from celo_nnx.errors import UserError
from celo_nnx.meta import build_estimator, build_trainer, meta_optimizer
from celo_nnx.meta.truncation import Constant


def bits(state):
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}
    return {
        k: np.asarray(jax.random.key_data(v) if k == "['key']" else v).tobytes() for k, v in leaves.items()
    }


@pytest.fixture(scope="module")
def trainer(toy):
    return toy.trainer()


def test_any_split_over_calls_gives_the_same_bits_and_one_program(trainer):
    def run(*parts):
        state, rows = trainer.init(jax.random.key(8)), []
        for n in parts:
            state, metrics = trainer.run(state, n)
            rows.append({k: np.asarray(v)[:n] for k, v in metrics.items()})
        return bits(state), {k: np.concatenate([r[k] for r in rows]) for k in rows[0]}

    whole, rows = run(7)
    for parts in ((3, 4), (1,) * 7, (0, 7)):
        other, other_rows = run(*parts)
        assert other == whole
        for name, value in rows.items():
            np.testing.assert_array_equal(other_rows[name], value)
    assert trainer.compiled_run._cache_size() == 1
    assert rows["family_loss"].shape == (7, 2) and rows["nonfinite"].shape == (7, 2)
    counts = {"nonfinite", "nonfinite_gradient", "nonfinite_theta"}
    assert set(rows) == {"loss", "family_loss", "gradient_norm", "theta_norm", "update_norm"} | counts
    assert len(np.unique(rows["gradient_norm"])) == 7


def test_the_seed_decides_and_the_optimizer_keeps_its_theta(trainer):
    first, _ = trainer.run(trainer.init(jax.random.key(8)), 2)
    second, _ = trainer.run(trainer.init(jax.random.key(9)), 2)
    assert bits(first) != bits(second)
    assert float(trainer.optimizer.theta["drift"]) == 0.0
    assert int(first["iteration"]) == 2 and first["iteration"].dtype == jnp.int32


def test_a_meta_iteration_is_the_estimate_and_the_optax_rule(trainer):
    state = trainer.init(jax.random.key(8))
    key = jax.random.fold_in(state["key"], 0)
    gradient, _, metrics = jax.jit(trainer.estimator)(state["theta"], state["estimator"], key)
    rule = optax.adamw(0.01, weight_decay=1e-4)
    updates, _ = rule.update(gradient, rule.init(state["theta"]), state["theta"])
    expected = np.asarray(updates["drift"])
    after, rows = trainer.run(state, 1)
    np.testing.assert_allclose(after["theta"]["drift"], expected, rtol=1e-5)
    np.testing.assert_allclose(rows["loss"][0], metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(rows["gradient_norm"][0], abs(float(gradient["drift"])), rtol=1e-4)


def test_meta_training_finds_the_best_drift(toy):
    estimator = toy.PES(
        toy.Drift(), [toy.family()], pairs=32, std=0.1, truncation=5, unroll=Constant(length=40)
    )
    trainer = toy.MetaTrainer(
        toy.Drift(), estimator, toy.adamw(learning_rate=0.05), iterations_per_dispatch=200
    )
    state, metrics = trainer.run(trainer.init(jax.random.key(0)), 200)
    # Steps end at target + drift; the way there is from above, so a negative drift gets there sooner.
    loss = np.asarray(metrics["loss"])
    assert loss[-20:].mean() < loss[:20].mean() and float(state["theta"]["drift"]) < -0.05


def test_two_devices_agree_in_the_first_meta_iteration(toy, tmp_path):
    out = tmp_path / "two.npz"
    with toy.program(2, out, "iterations") as process:
        one = toy.four_iterations(1)
        message = process.communicate()[1]
    assert process.returncode == 0, message
    with np.load(out, allow_pickle=False) as file:
        two = {name.removeprefix("2 "): value for name, value in file.items()}
    assert one["programs"] == two["programs"] == 1 and two["iteration"] == 4
    for name in set(one) - {"programs", "drift"}:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(two["drift"], one["drift"], atol=1e-3)


def config(**changes):
    meta = {
        "estimator": {"kind": "pes", "pairs": 2, "std": 0.01, "truncation": 5, "finished_step": "exact"},
        "unroll": {"kind": "log_uniform", "minimum": 10, "maximum": 20},
        "augmentation": {"kind": "reparametrization", "level": "global", "low": 1e-3, "high": 1e3},
        "optimizer": {"kind": "adamw", "learning_rate": 1e-4, "b1": 0.9, "b2": 0.999, "eps": 1e-8},
    }
    whole = ml_collections.ConfigDict({"meta": meta, "run": {"iterations_per_dispatch": 2}})
    for key, value in changes.items():
        section, name = key.split("__")
        whole.meta[section][name] = value
    return whole


def test_a_config_builds_a_trainer(toy):
    trainer = build_trainer(config(), toy.Drift(), [toy.family()])
    state, _ = trainer.run(trainer.init(jax.random.key(0)), 2)
    assert int(state["iteration"]) == 2 and trainer.estimator.pairs == 2


def test_meta_learning_rates_share_a_program_and_are_followed(toy):
    """A grid of rates compiles once, and a rate that is data has the bits of one that is a constant."""
    texts, ends = [], []
    for rate in (1e-4, 3e-2):
        trainer = build_trainer(config(optimizer__learning_rate=rate), toy.Drift(), [toy.family()])
        state = trainer.init(jax.random.key(0))
        texts.append(trainer.compiled_run.lower(state, jnp.int32(2), trainer._data).as_text())
        ends.append(bits(trainer.run(state, 2)[0]))
    assert texts[0] == texts[1] and ends[0] != ends[1]
    rule = meta_optimizer({"kind": "adamw", "learning_rate": 3e-2, "b1": 0.9, "b2": 0.999, "eps": 1e-8})
    fixed = toy.MetaTrainer(toy.Drift(), trainer.estimator, rule, iterations_per_dispatch=2)
    assert bits(fixed.run(fixed.init(jax.random.key(0)), 2)[0]) == ends[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"estimator__kind": "pess"}, "unknown meta.estimator.kind 'pess' .*'pes'"),
        ({"estimator__pair": 3}, "unknown key of meta.estimator 'pair' .*'pairs'"),
        ({"estimator__devices": 3}, "unknown key of meta.estimator 'devices'"),
        ({"unroll__kind": "constant"}, "unknown key of meta.unroll 'm"),
        ({"augmentation__low": -1.0}, "low = -1.0"),
        ({"augmentation__task": 1}, "unknown key of meta.augmentation 'task'"),
        ({"optimizer__b1": 1.0}, r"meta.optimizer.b1 = 1.0 .* \[0, 1\)"),
        ({"optimizer__learning_rate": -1.0}, "learning_rate = -1.0"),
        ({"optimizer__kind": "adamww"}, "unknown meta.optimizer.kind 'adamww' .*'adamw'"),
    ],
)
def test_mistakes_in_the_config_are_named(toy, changes, message):
    with pytest.raises(UserError, match=message):
        build_trainer(config(**changes), toy.Drift(), [toy.family()])


def test_missing_sections_are_named(toy):
    meta = config().meta
    del meta.unroll
    with pytest.raises(UserError, match="no section meta.unroll"):
        build_estimator(meta, toy.Drift(), [toy.family()])
    with pytest.raises(UserError, match="unknown key of meta 'unrol'"):
        build_estimator({**meta, "unrol": {}}, toy.Drift(), [toy.family()])
    with pytest.raises(UserError, match="must be a section"):
        meta_optimizer("adamw")


def test_too_many_iterations_a_dispatch_are_refused(trainer):
    with pytest.raises(UserError, match="8 .* from 0 to 7"):
        trainer.run(trainer.init(jax.random.key(0)), 8)
