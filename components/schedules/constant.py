"""A constant learning rate."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from celo_nnx.errors import require
from celo_nnx.interfaces import Schedule

Array = jax.Array


class Constant(Schedule):
    """``eta`` at every update.

    Args:
      value: 0 or more.

    Example:
      >>> float(Constant(value=0.5).base(0, 10))
      0.5
    """

    def __init__(self, *, value: float = 1e-3) -> None:
        require(value >= 0, "value", value, "a number of at least 0")
        self.value = float(value)

    def base(self, count: Array, num_steps: Array) -> Array:
        return jnp.float32(self.value)
