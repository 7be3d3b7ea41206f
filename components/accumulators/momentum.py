"""Momentum at several time scales."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from celo_nnx.components.accumulators.bank import Bank
from celo_nnx.interfaces import TensorSpec

Array = jax.Array


class Momentum(Bank):
    """``m_k <- d_k m_k + (1 - d_k) g``. State and reading: ``[k, *S]`` (OPTIMIZERS 1.5).

    Example:
      >>> Momentum(decays=(0.9, 0.99)).size
      2
    """

    elementwise = True
    limited = False

    def __init__(
        self,
        *,
        decays: tuple[float, ...] = (0.9, 0.99, 0.999),
        learned: bool = False,
        bias_correction: bool = False,
    ) -> None:
        super().__init__(decays=decays, learned=learned, bias_correction=bias_correction)

    def init(self, spec: TensorSpec) -> Array:
        return jnp.zeros((self.size, *spec.shape), jnp.float32)

    def update(self, state: Array, measured: Array, spec: TensorSpec, decay: Array | None = None) -> Array:
        return self.mix(state, measured, decay)

    def read(self, state: Array, spec: TensorSpec, count: Array) -> Array:
        return self.corrected(state, count)
