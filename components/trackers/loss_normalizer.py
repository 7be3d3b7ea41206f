"""The loss, normalized by its own running mean and variance."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from celo_nnx.errors import require
from celo_nnx.interfaces import Tracker

Array = jax.Array


class LossNormalizer(Tracker):
    """``clip((l - mean) / std, -5, 5)`` with bias-corrected averages, twice (OPTIMIZERS N1, N2; R1, R2).

    Two numbers: of the training loss, and of the validation loss, which is 0 since no validation is done.

    A NaN or infinite loss makes this and every later reading NaN. A finite one whose distance from the mean
    overflows when squared (about 2e19) makes the variance infinite: both numbers are 0 from then on.

    Args:
      decay: of mean and variance, in (0, 1).

    Example:
      >>> part = LossNormalizer()
      >>> state = part.update(part.init(1), jnp.float32(1.0))
      >>> round(float(part.read(state, jnp.float32(1.0))[0]), 3)
      0.0
    """

    width = 2

    def __init__(self, *, decay: float = 0.9) -> None:
        require(0 < decay < 1, "decay", decay, "a number in (0, 1)")
        self.decay = float(decay)

    def init(self, num_steps: Array | int) -> dict[str, Array]:
        zero = jnp.zeros((), jnp.float32)
        return {"mean": zero, "var": zero, "updates": jnp.zeros((), jnp.int32)}

    def update(self, state: dict[str, Array], value: Array) -> dict[str, Array]:
        d = self.decay
        mean = d * state["mean"] + (1 - d) * value
        var = d * state["var"] + (1 - d) * jnp.square(mean - value)
        return {"mean": mean, "var": var, "updates": state["updates"] + 1}

    def read(self, state: dict[str, Array], value: Array) -> Array:
        power = jnp.float32(self.decay) ** state["updates"].astype(jnp.float32)
        c = 1 / (1 - power + 1e-8)
        losses = jnp.stack([value, jnp.zeros_like(value)])
        return jnp.clip((losses - state["mean"] * c) * lax.rsqrt(state["var"] * c + 1e-8), -5, 5)
