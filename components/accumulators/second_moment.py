"""The average of the squared gradient, elementwise."""

from __future__ import annotations

import jax

from celo_nnx.components.accumulators.bank import PlaneBank
from celo_nnx.interfaces import TensorSpec


class SecondMoment(PlaneBank):
    """``v_k <- d_k v_k + (1 - d_k) g^2``. State and reading: ``[k, *S]`` (OPTIMIZERS 1.5, "rms").

    Example:
      >>> SecondMoment(decays=(0.95,)).size
      1
    """

    def __init__(
        self, *, decays: tuple[float, ...] = (0.95,), learned: bool = False, bias_correction: bool = False
    ) -> None:
        super().__init__(decays=decays, learned=learned, bias_correction=bias_correction)

    def measure(self, grad: jax.Array, spec: TensorSpec) -> jax.Array:
        return grad * grad
