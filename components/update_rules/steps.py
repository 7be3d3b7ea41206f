"""Step heads: from direction and log-magnitude to a step."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from celo_nnx.interfaces import StepHead

Array = jax.Array


class DirectionStep(StepHead):
    """``y = a exp(exp_mult u)``, optionally times the parameter's RMS (OPTIMIZERS C6 and E4).

    Args:
      exp_mult: 0 leaves the direction as it is (Celo2); 0.001 in Celo and VeLO.
      parameter_scale: multiply by ``sqrt(mean(p^2) + 1e-9)`` over the whole tensor.
      aggregate_magnitude: use the mean of ``u`` over the tensor.
    """

    def __init__(
        self, *, exp_mult: float = 0.0, parameter_scale: bool = False, aggregate_magnitude: bool = False
    ) -> None:
        self.exp_mult = float(exp_mult)
        self.parameter_scale = bool(parameter_scale)
        self.aggregate_magnitude = bool(aggregate_magnitude)

    @property
    def tiled(self) -> bool:
        return not (self.exp_mult and self.aggregate_magnitude)

    def factor(self, param: Array) -> Array | None:
        return jnp.sqrt(jnp.mean(param * param) + 1e-9) if self.parameter_scale else None

    def __call__(self, direction: Array, magnitude: Array) -> Array:
        if not self.exp_mult:
            return direction
        if self.aggregate_magnitude:
            magnitude = jnp.mean(magnitude)
        return direction * jnp.exp(self.exp_mult * magnitude)
