"""Leaves that rest keep every bit, and the average of theta is the one that numpy computes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from celo_nnx.errors import UserError
from celo_nnx.meta import build_estimator, build_trainer
from celo_nnx.meta.frozen import frozen_mask
from celo_nnx.meta.trainer import MetaTrainer
from celo_nnx.meta.truncation import Constant

START = {"drift": 0.0, "schedule": {"w": [1.0, -0.0, 3.0], "b": 1e-3}}


def theta() -> Any:
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32), START, is_leaf=lambda x: isinstance(x, list))


def made(toy: Any, rule: Any = None, **options: Any) -> MetaTrainer:
    estimator = toy.PES(
        toy.Drift(theta()), [toy.family()], pairs=2, std=0.1, truncation=3, unroll=Constant(length=9)
    )
    rule = optax.adamw(0.1, weight_decay=0.5) if rule is None else rule
    return MetaTrainer(toy.Drift(theta()), estimator, rule, iterations_per_dispatch=4, **options)


def run(trainer: MetaTrainer, *parts: int) -> tuple[Any, list[Any]]:
    """The last state, and theta after each call."""
    state, thetas = trainer.init(jax.random.key(1)), []
    for n in parts:
        state, _ = trainer.run(state, n)
        thetas.append(jax.device_get(state["theta"]))
    return jax.device_get(state), thetas


def test_the_average_is_bias_corrected(toy: Any) -> None:
    decay = 0.7
    state, thetas = run(made(toy, average=decay), 1, 1, 1, 1, 1)
    weights = (1 - decay) * decay ** np.arange(4, -1, -1.0) / (1 - decay**5)
    expected = jax.tree.map(lambda *x: np.tensordot(weights, np.stack(x).astype(float), 1), *thetas)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-6, atol=1e-7),
        state["average"]["theta"],
        expected,
    )
    assert state["average"]["count"] == 5
    assert abs(state["average"]["theta"]["drift"] - state["theta"]["drift"]) > 1e-2


def test_the_first_average_is_theta_and_averaging_changes_no_bit_of_it(toy: Any) -> None:
    first, _ = run(made(toy, average=0.999), 1)
    whole, _ = run(made(toy, average=0.999), 4, 1)
    plain, _ = run(made(toy), 4, 1)
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)  # noqa: E731
    same(first["average"]["theta"], first["theta"])
    same(whole["theta"], plain["theta"])
    assert set(whole) - set(plain) == {"average"}


@pytest.mark.parametrize("kind", ["adamw", "lion", "noise"])
def test_frozen_leaves_keep_their_bits(toy: Any, kind: str) -> None:
    rules = {
        "adamw": optax.adamw(0.1, weight_decay=0.5),
        "lion": optax.lion(0.1, weight_decay=0.5),
        "noise": optax.chain(optax.add_noise(0.1, 0.5, 3), optax.sgd(0.1)),
    }
    trainer = made(toy, rules[kind], frozen=frozen_mask(theta(), ("^schedule/",)), average=0.5)
    start, (state, _) = theta(), run(trainer, 4)
    for now in (state["theta"], state["average"]["theta"]):
        for name, leaf in start["schedule"].items():
            assert np.asarray(leaf).tobytes() == now["schedule"][name].tobytes(), name
        assert abs(now["drift"]) > 0.05
    # Without freezing all of them move.
    moved, _ = run(made(toy, rules[kind]), 4)
    assert all((moved["theta"]["schedule"][n] != np.asarray(x)).any() for n, x in start["schedule"].items())


def test_frozen_leaves_do_not_count_in_norms(toy: Any) -> None:
    trainer = made(toy, frozen=frozen_mask(theta(), ("schedule/",)))
    state, metrics = trainer.run(trainer.init(jax.random.key(1)), 1)
    drift = float(state["theta"]["drift"])
    np.testing.assert_allclose(metrics["update_norm"][0], abs(drift), rtol=1e-6)
    moments = [x for x in jax.tree.leaves(state["meta_optimizer"]) if x.dtype == jnp.float32]
    assert [x.shape for x in moments] == [(), ()]  # the meta-optimizer keeps nothing for leaves that rest


def test_the_mask_says_which_leaves_rest() -> None:
    assert frozen_mask(theta(), ()) == {"drift": False, "schedule": {"w": False, "b": False}}
    assert frozen_mask(theta(), ("e/b$", "^drift")) == {"drift": True, "schedule": {"w": False, "b": True}}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("schedule/", "rule/"), r"meta.frozen: 'rule/' is found in no path of theta \(drift, schedule/\)"),
        (("schedule/", "dri"), "freezes all of theta"),
        ((".",), "freezes all of theta"),
        (("(",), r"meta.frozen: '\(' is not a regular expression"),
        ((3,), "must be a tuple of regular expressions"),
        (("",), "must be a tuple of regular expressions"),
        ("schedule", "must be a tuple of regular expressions"),
    ],
)
def test_mistakes_in_patterns(toy: Any, patterns: Any, message: str) -> None:
    meta = {
        "estimator": {"kind": "pes", "pairs": 2, "truncation": 5},
        "unroll": {"kind": "log_uniform", "minimum": 10, "maximum": 20},
        "augmentation": {"kind": "reparametrization"},
        "optimizer": {"kind": "adamw"},
        "frozen": patterns,
    }
    config = ml_collections.ConfigDict({"meta": meta, "run": {"iterations_per_dispatch": 2}})
    with pytest.raises(UserError, match=message) as caught:
        build_trainer(config, toy.Drift(theta()), [toy.family()])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message):  # the same of an estimator alone
        build_estimator(meta, toy.Drift(theta()), [toy.family()])


@pytest.mark.parametrize("average", [1.0, -0.1, "0.9", True])
def test_an_average_out_of_range(toy: Any, average: Any) -> None:
    with pytest.raises(UserError, match=r"meta.average = .* \[0, 1\)"):
        made(toy, average=average)
