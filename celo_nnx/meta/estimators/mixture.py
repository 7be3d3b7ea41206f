"""A mixture of two estimators: their weighted mean, or one of them at a time."""

from __future__ import annotations

from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from celo_nnx.errors import is_number, require, unknown
from celo_nnx.interfaces import Array, GradientEstimator, PyTree

MODES = ("average", "switch")


class Mixture:
    """Two estimators that learn one theta, each with its own inner problems.

    Args:
      first, second: the estimators, of the same families and devices.
      mode: ``average`` takes ``weight g1 + (1 - weight) g2``; ``switch`` uses the first with probability
        ``weight``, else the second, in each meta-iteration, and costs only the one.
      weight: of the first, in [0, 1].

    Raises:
      UserError: for an unknown mode or a weight out of range.

    Example:
      >>> Mixture(pes, backprop, mode="switch", weight=0.9)  # doctest: +SKIP
    """

    def __init__(
        self,
        first: GradientEstimator,
        second: GradientEstimator,
        *,
        mode: str = "average",
        weight: float = 0.5,
    ) -> None:
        if mode not in MODES:
            raise unknown("estimator.mode", mode, MODES)
        require(is_number(weight) and 0 <= weight <= 1, "estimator.weight", weight, "a number from 0 to 1")
        if _same(first.data, second.data):  # the same families: their arrays are there once
            second = second.with_data(first.data)
        self.first, self.second, self.mode, self.weight = first, second, mode, float(weight)
        self.data, self.mesh = (first.data, second.data), first.mesh

    def with_data(self, data: PyTree) -> Self:
        """Returns the same estimator with other arrays in the place of :attr:`data`."""
        first, second = (part.with_data(d) for part, d in zip((self.first, self.second), data, strict=True))
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, first=first, second=second, data=data)
        return other

    def init(self, theta: PyTree, key: Array, iteration: Array | int = 0) -> tuple[PyTree, PyTree]:
        """Returns both estimators' states before a meta-iteration."""
        keys = jax.random.split(key)
        return self.first.init(theta, keys[0], iteration), self.second.init(theta, keys[1], iteration)

    def __call__(
        self, theta: PyTree, state: tuple[PyTree, PyTree], key: Array, iteration: Array | int = 0
    ) -> tuple[PyTree, tuple[PyTree, PyTree], dict[str, Array]]:
        """Estimates the gradient; see :class:`celo_nnx.interfaces.GradientEstimator`."""
        first_key, second_key, coin = jax.random.split(key, 3)
        if self.mode == "switch":

            def one(state: tuple[PyTree, PyTree]) -> tuple:
                gradient, new, metrics = self.first(theta, state[0], first_key, iteration)
                return gradient, (new, state[1]), metrics

            def other(state: tuple[PyTree, PyTree]) -> tuple:
                gradient, new, metrics = self.second(theta, state[1], second_key, iteration)
                return gradient, (state[0], new), metrics

            return lax.cond(jax.random.uniform(coin) < self.weight, one, other, state)
        gradient, first, metrics = self.first(theta, state[0], first_key, iteration)
        gradient2, second, metrics2 = self.second(theta, state[1], second_key, iteration)

        def mean(a: Array, b: Array) -> Array:
            return a + b if jnp.issubdtype(a.dtype, jnp.integer) else self.weight * a + (1 - self.weight) * b

        gradient, own = jax.tree.map(mean, (gradient, metrics), (gradient2, metrics2))
        for name in ("loss", "family_loss"):  # of one part only, where no step of the other counts
            a, b = metrics[name], metrics2[name]
            own[name] = jnp.where(jnp.isnan(a), b, jnp.where(jnp.isnan(b), a, own[name]))
        return gradient, (first, second), own


def _same(one: PyTree, other: PyTree) -> bool:
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)
