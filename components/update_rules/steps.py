"""Step heads: from direction and log-magnitude to a step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from celo_nnx.errors import require
from celo_nnx.interfaces import StepHead, TensorSpec

Array = jax.Array


class DirectionStep(StepHead):
    """``y = a exp(exp_mult u)``, optionally times the parameter's RMS (OPTIMIZERS C6, E4 and E7).

    Args:
      exp_mult: 0 leaves the direction as it is (Celo2); 0.001 in Celo and VeLO.
      parameter_scale: multiply by ``rho = sqrt(mean(p^2) + 1e-9)`` over the whole tensor.
      scale_limit: ``rho`` is at most this times ``sqrt(N)``; 0 for no limit.
      aggregate_magnitude: use the mean of ``u`` over the tensor.
      precondition: at last, divide by ``sqrt(v + 1e-6)`` of the slowest second moment.

    Raises:
      UserError: a limit below 0.
    """

    def __init__(
        self,
        *,
        exp_mult: float = 0.0,
        parameter_scale: bool = False,
        scale_limit: float = 0.0,
        aggregate_magnitude: bool = False,
        precondition: bool = False,
    ) -> None:
        require(scale_limit >= 0, "scale_limit", scale_limit, "a number of at least 0")
        self.exp_mult, self.scale_limit = float(exp_mult), float(scale_limit)
        self.parameter_scale, self.precondition = bool(parameter_scale), bool(precondition)
        self.aggregate_magnitude = bool(aggregate_magnitude)

    @property
    def tiled(self) -> bool:
        return not (self.exp_mult and self.aggregate_magnitude) and not self.precondition

    def factor(self, param: Array, spec: TensorSpec) -> Array | None:
        if not self.parameter_scale:
            return None
        rho = jnp.sqrt(spec.across(jnp.mean(param * param)) + 1e-9)
        return jnp.minimum(rho, self.scale_limit * spec.size**0.5) if self.scale_limit else rho

    def __call__(self, direction: Array, magnitude: Array | None, spec: TensorSpec) -> Array:
        if not self.exp_mult or magnitude is None:
            return direction
        if self.aggregate_magnitude:
            magnitude = spec.across(jnp.mean(magnitude))
        return direction * jnp.exp(self.exp_mult * magnitude)

    def finish(self, step: Array, stats: dict[str, Any]) -> Array:
        return step * lax.rsqrt(stats["second_moment"][-1] + 1e-6) if self.precondition else step
