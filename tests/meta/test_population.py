"""Families: grouped or apart, weighted, on several devices; and families that cannot be trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from celo_nnx.errors import UserError
from celo_nnx.meta.estimators import ESTIMATORS, PES, SharedNoise, TruncatedBackprop
from celo_nnx.meta.objective import Objective
from celo_nnx.meta.population import Part, Population
from celo_nnx.meta.truncation import LogUniform

THETA = {"drift": jnp.float32(0.3)}


def estimates(toy, kind, tasks, weights, truncations=3):
    """Gradients and metrics of two families with other data, and how many groups they are."""
    options = {} if kind is TruncatedBackprop else {"std": 0.1}
    estimator = kind(
        toy.Drift(),
        [toy.family("low", tasks[0], -2.0, 0.0), toy.family("high", tasks[1], 0.0, 2.0)],
        pairs=3,
        weights=weights,
        truncation=5,
        unroll=LogUniform(minimum=3, maximum=9),
        **options,
    )

    @toy.jit
    def run(key):
        def one(state, k):
            gradient, state, metrics = estimator(THETA, state, jax.random.fold_in(key, k))
            return state, (gradient["drift"], metrics)

        return jax.lax.scan(one, estimator.init(THETA, key), jnp.arange(truncations))[1]

    gradient, metrics = jax.tree.map(np.asarray, run(jax.random.key(4)))
    return gradient, metrics, len(estimator.population.groups)


@pytest.mark.parametrize("kind", [PES, SharedNoise, TruncatedBackprop])
def test_families_of_one_task_are_one_batch_and_count_as_apart_with_their_weights(toy, kind):
    one = toy.Quadratic(noise=0.5, spread=1.0)
    alike = dataclasses.replace(one, bad_above=1e9)  # not equal, so apart, and computes the same
    gradient, metrics, groups = estimates(toy, kind, (one, one), (3.0, 1.0))
    low, low_metrics, apart = estimates(toy, kind, (one, alike), (1.0, 0.0))
    high, _, _ = estimates(toy, kind, (one, alike), (0, 5))
    assert groups == 1 and apart == 2
    assert np.all(np.abs(low - high) > 0.05 * np.abs(low))
    np.testing.assert_allclose(gradient, 0.75 * low + 0.25 * high, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["family_loss"], low_metrics["family_loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], metrics["family_loss"] @ [0.75, 0.25], rtol=1e-5)
    np.testing.assert_allclose(low_metrics["loss"], metrics["family_loss"][:, 0], rtol=1e-5)


def test_every_estimator_agrees_on_one_two_and_four_devices(toy, tmp_path):
    out = tmp_path / "found.npz"
    with toy.program(4, out, "estimates") as process:
        one = toy.first_estimates(1)
        message = process.communicate()[1]
    assert process.returncode == 0, message
    assert set(one) == {f"{kind} {what}" for kind in ESTIMATORS for what in ("gradient", "loss")}
    with np.load(out, allow_pickle=False) as file:
        assert len(file) == 2 * len(one)
        for name, value in one.items():
            assert np.all(value != 0)
            for devices in (2, 4):
                np.testing.assert_allclose(file[f"{devices} {name}"], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda loss: jnp.stack([loss, loss]), r"task family 'a' must be one float scalar, not float32\[2\]"),
        (lambda loss: (loss, loss), r"not float32\[\], float32\[\]"),
        (lambda loss: loss > 0, r"not bool\[\]"),
    ],
)
def test_a_loss_that_is_not_a_scalar_is_named(toy, result, message):
    @dataclasses.dataclass(frozen=True)
    class Odd(toy.Quadratic):
        def loss(self, params, state, key, batch, sample=()):
            loss, state, aux = super().loss(params, state, key, batch, sample)
            return result(loss), state, aux

    with pytest.raises(UserError, match=message) as caught:
        PES(toy.Drift(), [toy.family("a", Odd())])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"x": np.zeros((4, 3), np.float32)}}, "training arrays of task family 'b' do not fit"),
        ({"train": {"y": np.zeros(4, np.float32)}}, "'b' do not fit"),
        ({"train": {"x": np.zeros(0, np.float32)}}, "'b' must have one length, .* above 0: {'x': 0}"),
        ({"validation": {"x": np.zeros(4, np.int32)}}, "validation arrays of task family 'b' do not fit"),
    ],
)
def test_families_of_one_task_must_have_arrays_of_one_shape(toy, change, message):
    families = [toy.family("a"), dataclasses.replace(toy.family("b"), **change)]
    with pytest.raises(UserError, match=message) as caught:
        PES(toy.Drift(), families, objective=Objective(split="validation"))
    assert "\n" not in str(caught.value)


def test_families_without_a_counted_step_are_left_out_of_the_loss(toy):
    """A family's trajectories that have not ended leave the others' mean as it is."""
    families = [toy.family(name, toy.Quadratic(target=t)) for name, t in (("a", 1.0), ("b", 2.0), ("c", 3.0))]
    population = Population(families, pairs=2, weights=(1.0, 2.0, 5.0))
    counted = iter(([True, True], [False, True], [False, False]))

    def step(group, theta, state, feed):
        zero = jnp.zeros(2, jnp.int32)
        loss = jnp.array([1.0, 3.0]) + 10 * group.members[0]
        return Part(jnp.zeros(1), state, loss, jnp.array(next(counted)), zero, zero)

    _, _, metrics = population.each(step, THETA, [()] * 3, population.data, jax.random.key(0), jnp.int32(0))
    np.testing.assert_allclose(metrics["family_loss"], [2.0, 13.0, np.nan])
    np.testing.assert_allclose(metrics["loss"], (2.0 + 2 * 13.0) / 3, rtol=1e-6)


@pytest.mark.parametrize("weights", [(1.0,), (1.0, -1.0), (0.0, 0.0), (1.0, float("nan")), (1.0, "2")])
def test_weights_must_fit_the_families(toy, weights):
    with pytest.raises(UserError, match="estimator.weights = .* for each of the families a, b, not all 0"):
        PES(toy.Drift(), [toy.family("a"), toy.family("b")], weights=weights)
