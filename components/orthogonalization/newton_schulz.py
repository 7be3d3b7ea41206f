"""Newton-Schulz iteration with a quintic polynomial."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from celo_nnx.errors import require
from celo_nnx.interfaces import Orthogonalization, TensorSpec

Array = jax.Array


class NewtonSchulz(Orthogonalization):
    """Drives the singular values of a step towards 1 (OPTIMIZERS S1 to S4; Jordan et al., Muon, 2024)::

        X <- X / (|X|_F + eps);   A = X X^T;   X <- c0 X + (c1 A + c2 A A) X      `steps` times

    on the smaller side, batched over the axes that are not the matrix. A tensor without a matrix is
    returned as it is. No shape-dependent factor.

    Args:
      coefficients: ``(c0, c1, c2)``.
      steps: 1 to 100.
      eps: above 0.

    Example:
      >>> spec = TensorSpec("w", (2, 2), (0, 1), (0, 1))
      >>> NewtonSchulz()(jnp.eye(2), spec).shape
      (2, 2)
    """

    def __init__(
        self,
        *,
        coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        steps: int = 5,
        eps: float = 1e-8,
    ) -> None:
        coefficients = tuple(float(c) for c in coefficients)
        require(len(coefficients) == 3, "coefficients", coefficients, "three numbers")
        require(1 <= steps <= 100, "steps", steps, "an integer from 1 to 100")
        require(eps > 0, "eps", eps, "a number above 0")
        self.coefficients, self.steps, self.eps = coefficients, int(steps), float(eps)

    def __call__(self, step: Array, spec: TensorSpec) -> Array:
        if spec.matrix is None:
            return step
        rows, columns = spec.matrix
        x = jnp.moveaxis(step, (rows, columns), (-2, -1))
        tall = x.shape[-2] > x.shape[-1]
        if tall:
            x = jnp.swapaxes(x, -1, -2)
        x = x / (jnp.sqrt(jnp.sum(x * x, (-2, -1), keepdims=True)) + self.eps)
        c0, c1, c2 = self.coefficients
        scaled = c0 * jnp.eye(x.shape[-2], dtype=x.dtype)  # c0 X joins the small side: one pass less over X
        for _ in range(self.steps):
            gram = jnp.matmul(x, jnp.swapaxes(x, -1, -2), precision="highest")
            poly = scaled + c1 * gram + c2 * jnp.matmul(gram, gram, precision="highest")
            x = jnp.matmul(poly, x, precision="highest")
        if tall:
            x = jnp.swapaxes(x, -1, -2)
        return jnp.moveaxis(x, (-2, -1), (rows, columns))
