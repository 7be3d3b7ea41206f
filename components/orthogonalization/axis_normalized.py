"""Rows, columns or both brought to one size: a cheap stand-in for orthogonalization."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from celo_nnx.components.orthogonalization.matrices import over_norm, root
from celo_nnx.errors import require, unknown
from celo_nnx.interfaces import Orthogonalization, TensorSpec

Array = jax.Array

AXES = ("rows", "columns", "both")


class AxisNormalized(Orthogonalization):
    """Divides each row or column of a step by its root mean square::

        X_ij <- X_ij / (eps + sqrt(mean_j X_ij^2))        rows; over i for columns

    or rows, then columns, ``steps`` times, as Sinkhorn's iteration does with sums. The root mean square
    rather than the 2-norm, since both can then be reached at once: rows of 2-norm 1 have the Frobenius norm
    sqrt(n), columns of 2-norm 1 sqrt(m). A matrix with orthogonal rows of one size has normalized rows; here
    they need not be orthogonal. Costs a few passes over the step and no matrix product, so it tells whether
    an experiment needs orthogonal steps or only even ones: where rows and columns are even already, as in a
    matrix with random singular vectors, the result is no nearer to the polar factor than the step was.

    Batched over the axes that are not the matrix; a tensor without one is returned as it is. In a kernel
    ``[inputs, outputs]`` a row is what one input feeds, a column what one output collects.

    Args:
      axes: ``"rows"``, ``"columns"`` or ``"both"``.
      steps: of ``"both"``, 1 to 100; columns come last and are exact.
      eps: above 0; a row of zeros stays zero.

    Example:
      >>> spec = TensorSpec("w", (2, 2), (0, 1), (0, 1))
      >>> AxisNormalized()(jnp.array([[3.0, 3.0], [0.0, -0.5]]), spec).round(3)
      Array([[ 1.   ,  1.   ],
             [ 0.   , -1.414]], dtype=float32)

    Source:
      ``"both"``: Scetbon, Ma, Gong, Meeds, Gradient Multi-Normalization for Stateless and Scalable LLM
      Training, 2025.
    """

    def __init__(self, *, axes: str = "rows", steps: int = 5, eps: float = 1e-8) -> None:
        if axes not in AXES:
            raise unknown("axes", axes, AXES)
        require(1 <= steps <= 100, "steps", steps, "an integer from 1 to 100")
        require(eps > 0, "eps", eps, "a number above 0")
        self.axes, self.steps, self.eps = axes, int(steps), float(eps)

    def __call__(self, step: Array, spec: TensorSpec) -> Array:
        if spec.matrix is None:
            return step
        rows, columns = spec.matrix
        over = {"rows": [columns], "columns": [rows], "both": [columns, rows] * self.steps}
        for axis in over[self.axes]:
            step = self._normalize(step, axis)
        return step

    def _normalize(self, x: Array, axis: int) -> Array:
        largest = jnp.max(jnp.abs(x), axis, keepdims=True)
        unit = jnp.where(largest > 0, largest, 1.0)  # squares of x itself may overflow
        rms = largest * root(jnp.mean(jnp.square(x / unit), axis, keepdims=True))
        return over_norm(x, rms, self.eps)
