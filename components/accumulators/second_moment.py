"""The average of the squared gradient, elementwise."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from celo_nnx.components.accumulators.bank import Bank
from celo_nnx.interfaces import TensorSpec

Array = jax.Array


class SecondMoment(Bank):
    """``v_k <- d_k v_k + (1 - d_k) g^2``. State and reading: ``[k, *S]`` (OPTIMIZERS 1.5, "rms").

    Example:
      >>> SecondMoment(decays=(0.95,)).size
      1
    """

    elementwise = True

    def __init__(
        self,
        *,
        decays: tuple[float, ...] = (0.95,),
        learned: bool = False,
        bias_correction: bool = False,
    ) -> None:
        super().__init__(decays=decays, learned=learned, bias_correction=bias_correction)

    def init(self, spec: TensorSpec) -> Array:
        return jnp.zeros((self.size, *spec.shape), jnp.float32)

    def update(self, state: Array, measured: Array, spec: TensorSpec, decay: Array | None = None) -> Array:
        return self.mix(state, measured * measured, decay)

    def read(self, state: Array, spec: TensorSpec, count: Array) -> Array:
        return self.corrected(state, count)
