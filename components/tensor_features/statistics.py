"""Means, variances and norms over a tensor, on a logarithmic scale (OPTIMIZERS section 1.15)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from celo_nnx.errors import require, unknown
from celo_nnx.interfaces import RunView, TensorFeature

Array = jax.Array

QUANTITIES = ("gradient", "parameter", "momentum", "second_moment")
STATISTICS = ("mean", "mean_abs", "variance", "norm")


def quantity(view: RunView, name: str) -> Array:
    """Returns an array of a tensor by name; of a bank all its averages together."""
    assert view.tensor is not None
    if name == "gradient":
        return view.tensor.grad
    return view.tensor.param if name == "parameter" else view.tensor.stats[name]


def statistic(view: RunView, of: str, name: str) -> Array:
    """Returns one of :data:`STATISTICS` of an array of a tensor, scalar."""
    assert view.spec is not None
    x, across = quantity(view, of), view.spec.across
    if name == "mean":
        return across(jnp.mean(x))
    if name == "mean_abs":
        return across(jnp.mean(jnp.abs(x)))
    if name == "variance":
        return across(jnp.mean(jnp.square(x - across(jnp.mean(x)))))
    shares = view.spec.size // math.prod(view.spec.shape)
    return jnp.sqrt(shares * across(jnp.sum(x * x)))


class Statistic(TensorFeature):
    """One number of the tensor's arrays."""

    looks = True

    def __init__(self, *, of: str = "gradient") -> None:
        if of not in QUANTITIES:
            raise unknown("quantity", of, QUANTITIES)
        self.of = of

    def width(self, sizes: dict[str, int]) -> int:
        return 1


class LogStatistic(Statistic):
    """``gain clip(log(1e-8 + factor |x|), -5, 5)`` of a statistic ``x`` over the tensor.

    Args:
      of: ``"gradient"`` (clipped), ``"parameter"``, ``"momentum"`` or ``"second_moment"``.
      statistic: ``"mean"``, ``"mean_abs"``, ``"variance"`` or ``"norm"`` (the Euclidean one).
      factor, gain: above 0; 10 and 0.5 in VeLO, 1 and 0.5 in NN-Adam, 1 and 1 in RNN-MLP.
    """

    def __init__(
        self, *, of: str = "gradient", statistic: str = "mean", factor: float = 1.0, gain: float = 1.0
    ) -> None:
        super().__init__(of=of)
        if statistic not in STATISTICS:
            raise unknown("statistic", statistic, STATISTICS)
        require(factor > 0, "factor", factor, "a number above 0")
        require(gain > 0, "gain", gain, "a number above 0")
        self.statistic, self.factor, self.gain = statistic, float(factor), float(gain)

    def values(self, view: RunView) -> Array:
        x = statistic(view, self.of, self.statistic)
        return log_clipped(x, self.factor, self.gain)[None]


def log_clipped(x: Array, factor: float, gain: float) -> Array:
    """Returns ``gain clip(log(1e-8 + factor |x|), -5, 5)``.

    Example:
      >>> float(log_clipped(jnp.float32(0.0), 1.0, 0.5))
      -2.5
    """
    return gain * jnp.clip(jnp.log(1e-8 + factor * jnp.abs(x)), -5, 5)


class SignOfMean(Statistic):
    """The sign of the mean over the tensor; 0 for 0.

    Args:
      of: as in :class:`LogStatistic`.
    """

    def values(self, view: RunView) -> Array:
        return jnp.sign(statistic(view, self.of, "mean"))[None]


class LogNorm(Statistic):
    """``log(|x| + 1e-8)`` of the Euclidean norm.

    Args:
      of: as in :class:`LogStatistic`.
    """

    def __init__(self, *, of: str = "parameter") -> None:
        super().__init__(of=of)

    def values(self, view: RunView) -> Array:
        return jnp.log(statistic(view, self.of, "norm") + 1e-8)[None]
