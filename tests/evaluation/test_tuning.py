"""Tuning on problems whose best learning rate is known."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from celo_nnx.errors import UserError
from celo_nnx.evaluation import curves, tuning
from celo_nnx.evaluation.curves import HeldOut
from celo_nnx.interfaces import Task


@dataclasses.dataclass(frozen=True)
class Bowl(Task):
    """|x|^2 from x = 1, where gradient descent is fastest at rate 1/2; held out, x near 0.6 is best."""

    def init(self, key, sample=()):
        return {"x": jnp.ones(2)}, ()

    def loss(self, params, state, key, batch, sample=()):
        return jnp.sum(params["x"] ** 2), state, {}

    def evaluate(self, params, state, key, batch, sample=()):
        return jnp.sum(jnp.abs(params["x"] - 0.6))

    def draw(self, data, key, start, count):
        return ()


def search(grid, **options):
    return tuning.search(optax.sgd, Bowl(), {}, grid=grid, seeds=[0, 1], steps=10, **options)


def final(rates):
    return 2 * (1 - 2 * np.asarray(rates)) ** 18


def test_rates_are_half_decades():
    np.testing.assert_allclose(tuning.half_decades(-3, 1), [10**-1.5, 0.1, 10**-0.5, 1.0, 10**0.5])


def test_a_best_rate_inside_is_left_alone():
    found = search((-4, 0))
    assert found.training.learning_rate == pytest.approx(10**-0.5) and found.training.warning == ""
    assert found.learning_rates.shape == (5,) and found.validation is None
    np.testing.assert_allclose(found.training.final[:, 0], final(found.learning_rates), rtol=1e-4)


@pytest.mark.parametrize(("grid", "rates"), [((-5, -3), (-5, 1)), ((0, 2), (-2, 2))])
def test_a_grid_is_widened_until_the_best_lies_inside(grid, rates):
    found = search(grid)
    np.testing.assert_allclose(found.learning_rates, tuning.half_decades(*rates))
    assert found.training.learning_rate == pytest.approx(10**-0.5) and found.training.warning == ""
    # The joined runs are those of the whole grid at once.
    at_once = curves.train_curves(
        optax.sgd, Bowl(), {}, learning_rates=found.learning_rates, seeds=[0, 1], steps=10
    )
    np.testing.assert_allclose(found.curves.losses, at_once, rtol=1e-5)


def test_at_the_limit_there_is_a_warning():
    found = search((-12, -10))
    np.testing.assert_allclose(found.learning_rates, tuning.half_decades(-12, -6))
    assert "upper edge" in found.training.warning
    assert len(search((-12, -10), limit=0).learning_rates) == 3
    assert len(search((-12, -10), limit=1).learning_rates) == 4


def test_a_grid_that_only_diverges_is_widened_downwards():
    rates = [21, 23]
    found = tuning.search(optax.sgd, Bowl(), {}, grid=rates, seeds=[0], steps=10)
    assert found.learning_rates[0] == pytest.approx(10**8.5) and len(found.learning_rates) == 7
    assert "diverged at every" in found.training.warning


def test_the_validation_loss_chooses_for_itself_and_widens_too():
    # After ten steps x = (1 - 2 lr)^10, which is nearest to 0.6 at 0.0249: of half-decades, at 10^-1.5.
    found = search((-2, -1), held_out=HeldOut({"validation": {}}, batches=1))
    assert found.training.learning_rate == pytest.approx(10**-0.5)
    assert found.validation.learning_rate == pytest.approx(10**-1.5)
    np.testing.assert_allclose(found.learning_rates, tuning.half_decades(-4, 1))
    assert found.training.warning == found.validation.warning == ""
    x = (1 - 2 * found.learning_rates) ** 10
    np.testing.assert_allclose(found.validation.final[:, 1], 2 * np.abs(x - 0.6), rtol=1e-3)
    assert found.curves.held_out["validation"].shape == (6, 2, 1)


@pytest.mark.parametrize(
    ("arguments", "words"), [({"grid": (0, -1)}, "grid"), ({"grid": (0, 1), "limit": -1}, "limit = -1")]
)
def test_mistakes_are_told_in_one_line(arguments, words):
    with pytest.raises(UserError, match=words) as caught:
        search(**arguments)
    assert "\n" not in str(caught.value)
