"""VeLO's look at the accumulators, relative to the parameter's size."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from celo_nnx.components.tensor_features.statistics import log_clipped
from celo_nnx.errors import unknown
from celo_nnx.interfaces import RunView, TensorFeature

Array = jax.Array

MOMENTS = ("mean_second_moment", "variance_momentum", "variance_second_moment")


class NormalizedMoment(TensorFeature):
    """``0.5 clip(log(1e-8 + 10 x), -5, 5)`` of a moment ``x`` of scaled momenta or second moments.

    Both are scaled by ``z = 1 / RMS(p)`` once, and the "variance" of the second moment is taken around the
    momentum's mean, one number for each momentum: as published (OPTIMIZERS V1, V2).

    Args:
      moment: ``"mean_second_moment"`` (one number for each decay), ``"variance_momentum"``,
        ``"variance_second_moment"`` (one for each momentum).
    """

    looks = True

    def __init__(self, *, moment: str = "variance_momentum") -> None:
        if moment not in MOMENTS:
            raise unknown("moment", moment, MOMENTS)
        self.moment = moment

    def width(self, sizes: dict[str, int]) -> int:
        return sizes["second_moment" if self.moment == "mean_second_moment" else "momentum"]

    def values(self, view: RunView) -> Array:
        assert view.tensor is not None and view.spec is not None
        across = view.spec.across
        param, stats = view.tensor.param, view.tensor.stats
        axes = tuple(range(1, param.ndim + 1))
        z = lax.rsqrt(jnp.maximum(1e-9, across(jnp.mean(param * param))))
        second = z * stats["second_moment"]
        if self.moment == "mean_second_moment":
            return log_clipped(across(jnp.mean(second, axes)), 10.0, 0.5)
        momentum = z * stats["momentum"]
        mean = across(jnp.mean(momentum, axes, keepdims=True))
        x = momentum if self.moment == "variance_momentum" else second
        return log_clipped(across(jnp.mean(jnp.square(x - mean), axes)), 10.0, 0.5)
