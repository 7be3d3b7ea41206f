"""The factored second moment of Adafactor, at several time scales."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from celo_nnx.components.accumulators.bank import Bank
from celo_nnx.interfaces import TensorSpec
from celo_nnx.planes import rsqrt_floored

Array = jax.Array


@struct.dataclass
class FactoredReading:
    """What features see of a factored second moment; every array has the bank axis ``k`` leading.

    Attributes:
      row: ``[k, *S]`` with size 1 on d0; None where the tensor is not factored, like the next three.
      column: ``[k, *S]`` with size 1 on d1.
      factors: R and C of OPTIMIZERS (A1), shaped like ``row`` and ``column``.
      raw_factors: the same without bias correction, which the gradient's preconditioner never has.
      diagonal: ``[k, *S]``, the unfactored average; None where the tensor is factored.
    """

    row: Array | None = None
    column: Array | None = None
    factors: tuple[Array, Array] | None = None
    raw_factors: tuple[Array, Array] | None = None
    diagonal: Array | None = None

    def preconditioner(self, k: int, raw: bool = False) -> Array:
        """Returns the plane that multiplies a gradient (raw) or momentum.

        It is ``R_k C_k``, or ``srs(v_diag + 1e-9)`` for an unfactored tensor.
        """
        if self.diagonal is not None:
            return rsqrt_floored(self.diagonal[k] + 1e-9)
        factors = self.raw_factors if raw else self.factors
        assert factors is not None
        return factors[0][k] * factors[1][k]


class Factored(Bank):
    """Row and column means of ``q = g^2 + 1e-30``, averaged: ``v_row`` over d0, ``v_col`` over d1.

    A vector keeps the whole average instead. State: ``{"row", "column"}`` or ``{"diagonal"}``; the reading is
    a :class:`FactoredReading` (OPTIMIZERS 1.5, A1 and A2).

    Args:
      decays, learned: as in :class:`Bank`.
      bias_correction: of rows, columns and their factors, but not of the gradient's preconditioner nor of the
        unfactored average, as published.

    Example:
      >>> Factored(decays=(0.9,)).size
      1
    """

    def _shape(self, spec: TensorSpec, reduced: int) -> tuple[int, ...]:
        return (self.size, *(1 if a == reduced else s for a, s in enumerate(spec.shape)))

    def init(self, spec: TensorSpec) -> dict[str, Array]:
        if spec.factored is None:
            return {"diagonal": jnp.zeros((self.size, *spec.shape), jnp.float32)}
        d1, d0 = spec.factored
        shapes = {"row": self._shape(spec, d0), "column": self._shape(spec, d1)}
        return {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}

    def measure(self, grad: Array, spec: TensorSpec) -> dict[str, Array]:
        square = grad * grad + 1e-30
        if spec.factored is None:
            return {"diagonal": square}
        d1, d0 = spec.factored
        return {"row": jnp.mean(square, d0, keepdims=True), "column": jnp.mean(square, d1, keepdims=True)}

    def update(
        self,
        state: dict[str, Array],
        measured: dict[str, Array],
        spec: TensorSpec,
        decay: Array | None = None,
    ) -> dict[str, Array]:
        return {name: self.mix(state[name], value, decay) for name, value in measured.items()}

    def read(self, state: dict[str, Array], spec: TensorSpec, count: Array) -> FactoredReading:
        if spec.factored is None:
            return FactoredReading(diagonal=state["diagonal"])
        d1 = spec.factored[0] + 1

        def factors(row: Array, column: Array) -> tuple[Array, Array]:
            mean = spec.across(jnp.mean(row, d1, keepdims=True), (d1 - 1,))
            return rsqrt_floored(row / (mean + 1e-9)), rsqrt_floored(column)

        row, column = (self.corrected(state[name], count) for name in ("row", "column"))
        return FactoredReading(row, column, factors(row, column), factors(state["row"], state["column"]))
