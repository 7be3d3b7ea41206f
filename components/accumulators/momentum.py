"""Momentum at several time scales."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from celo_nnx.components.accumulators.bank import Bank
from celo_nnx.interfaces import TensorSpec

Array = jax.Array


class Momentum(Bank):
    """``m_k <- d_k m_k + (1 - d_k) g``, no bias correction. State and reading: ``[k, *S]`` (OPTIMIZERS 1.5).

    Example:
      >>> Momentum(decays=(0.9, 0.99)).size
      2
    """

    elementwise = True

    def __init__(self, *, decays: tuple[float, ...] = (0.9, 0.99, 0.999)) -> None:
        super().__init__(decays=decays)

    def init(self, spec: TensorSpec) -> Array:
        return jnp.zeros((self.size, *spec.shape), jnp.float32)

    def update(self, state: Array, measured: Array, spec: TensorSpec) -> Array:
        return self.mix(state, measured)

    def read(self, state: Array, spec: TensorSpec) -> Array:
        return state
