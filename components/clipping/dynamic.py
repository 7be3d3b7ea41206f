"""A limit that follows the size of the gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from celo_nnx.errors import require
from celo_nnx.interfaces import Clip

Array = jax.Array


class Dynamic(Clip):
    """Limits to a multiple of the running root mean square of clipped gradients (OPTIMIZERS D1 to D4)::

        a = multiplier value / (1 - decay^iteration);   value <- decay value + (1 - decay) sqrt(1e-8 + q)

    where ``q`` is the mean over tensors of the mean square of their clipped gradients. The first limit is
    ``multiplier``.

    Args:
      multiplier: above 0.
      decay: in (0, 1).

    Example:
      >>> part = Dynamic()
      >>> round(float(part.limit(part.init())), 3)
      10.0
    """

    measures = True

    def __init__(self, *, multiplier: float = 10.0, decay: float = 0.99) -> None:
        require(multiplier > 0, "multiplier", multiplier, "a number above 0")
        require(0 < decay < 1, "decay", decay, "a number in (0, 1)")
        self.multiplier, self.decay = float(multiplier), float(decay)

    def init(self) -> dict[str, Array]:
        return {"iteration": jnp.ones((), jnp.float32), "value": jnp.full((), 1 - self.decay, jnp.float32)}

    def limit(self, state: dict[str, Array]) -> Array:
        return self.multiplier * state["value"] / (1 - jnp.float32(self.decay) ** state["iteration"])

    def update(self, state: dict[str, Array], mean_square: Array) -> dict[str, Array]:
        root = jnp.sqrt(1e-8 + mean_square)
        value = self.decay * state["value"] + (1 - self.decay) * root
        return {"iteration": state["iteration"] + 1, "value": value}
