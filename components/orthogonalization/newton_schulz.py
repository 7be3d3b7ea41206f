"""Newton-Schulz iteration: polynomials of the Gram matrix drive singular values to 1."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from celo_nnx.components.orthogonalization.coefficients import QUINTIC, Row, parse
from celo_nnx.components.orthogonalization.matrices import frobenius_norm, on_wide_matrix, over_norm
from celo_nnx.errors import UserError, require, unknown
from celo_nnx.interfaces import Orthogonalization, TensorSpec

Array = jax.Array

DTYPES = ("float32", "bfloat16")
GROWTH = 1000.0  # see _runs


class NewtonSchulz(Orthogonalization):
    """Drives the singular values of a step towards 1 (OPTIMIZERS S1 to S4; Jordan et al., Muon, 2024)::

        X <- X / (|X|_F + eps);   A = X X^T;   X <- c0 X + (c1 A + c2 A A) X      `steps` times

    on the smaller side, batched over the axes that are not the matrix. A tensor without a matrix is
    returned as it is. No shape-dependent factor. Each singular value goes through ``c0 s + c1 s^3 + c2 s^5``
    and nothing else changes, so a set of coefficients is a trade of speed against accuracy:

    - ``"celo2"``, the published numbers, also called ``"muon"``, for they are the same: 5 steps bring every
      singular value above 0.002 of the norm between 0.68 and 1.20; more steps come no closer than 1.13.
      Enough where direction is all that counts.
    - ``"polar_express"``: a polynomial for each step, the best for singular values above 0.001 of the norm.
      5 steps cost the same as those of ``"celo2"`` and end between 0.84 and 1.13, 7 within 1e-5 of 1.
    - ``"cubic"``, the classical iteration: converges from below, never above 1, but at 1.5 times a step for
      small singular values, so slowly: 12 steps for those above 0.02 of the norm. Saves the product A A.

    Singular values below rounding, 1e-7 of the norm in float32 and 4e-3 in bfloat16, are noise, which enough
    steps bring up to 1 with the rest; the part ``svd`` cuts it off.

    Args:
      coefficients: ``(c0, c1, c2)``; a tuple of such rows, one a step, the last repeated; or a name. In a
        config file write a name as ``("cubic",)``, so that the command line can still put numbers there.
      steps: 1 to 100.
      eps: above 0.
      gram: multiply the polynomials on the small side and apply them to X once. 5 steps cost 1.2 times less
        where the matrix is twice as long as wide, 1.8 times at four, more for a square. On decaying spectra
        the rounding error is 20 to 40 times larger, up to 1e-2 of the norm; with many steps the iteration
        starts anew from X before it can grow further. float32 only: bfloat16 rounding diverges.
      dtype: ``"float32"``; or ``"bfloat16"`` for what matrix products read, with float32 sums: an error of
        1e-2 to 3e-2 of the norm, and more where the step lacks rank. For accelerators: a CPU rounds
        likewise but gains no time.

    Example:
      >>> spec = TensorSpec("w", (2, 2), (0, 1), (0, 1))
      >>> NewtonSchulz(coefficients="polar_express", steps=8)(jnp.diag(jnp.array([3.0, 0.1])), spec).round(3)
      Array([[1., 0.],
             [0., 1.]], dtype=float32)

    Source:
      ``"polar_express"``: Amsel, Persson, Musco, Gower, The Polar Express, 2025, with the safety
      factor 1.01 inside the polynomials alone.
    """

    def __init__(
        self,
        *,
        coefficients: str | tuple = QUINTIC,
        steps: int = 5,
        eps: float = 1e-8,
        gram: bool = False,
        dtype: str = "float32",
    ) -> None:
        self.coefficients, self._rows = parse(coefficients)
        require(1 <= steps <= 100, "steps", steps, "an integer from 1 to 100")
        require(eps > 0, "eps", eps, "a number above 0")
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
        if gram and dtype != "float32":
            raise UserError(f"gram = True diverges with dtype = {dtype!r}: use float32 or gram = False")
        self.steps, self.eps, self.gram, self.dtype = int(steps), float(eps), bool(gram), dtype

    def __call__(self, step: Array, spec: TensorSpec) -> Array:
        return on_wide_matrix(self._orthogonalize, step, spec)

    def _orthogonalize(self, x: Array) -> Array:
        """Maps ``[..., n, m]`` with ``n <= m``."""
        x = over_norm(x, frobenius_norm(x), self.eps)
        rows = [self._rows[min(i, len(self._rows) - 1)] for i in range(self.steps)]
        for run in _runs(rows) if self.gram else ([row] for row in rows):
            gram = self._product(x, jnp.swapaxes(x, -1, -2))
            total = poly = self._polynomial(run[0], gram)
            for row in run[1:]:  # polynomials of one matrix commute: P A P is the next Gram matrix
                gram = self._product(self._product(poly, gram), poly)
                poly = self._polynomial(row, gram)
                total = self._product(poly, total)
            x = self._product(total, x)
        return x

    def _polynomial(self, row: Row, gram: Array) -> Array:
        c0, c1, c2 = row
        scaled = c0 * jnp.eye(gram.shape[-1], dtype=gram.dtype)  # so that c0 X takes no pass over X
        poly = scaled + c1 * gram
        return poly + c2 * self._product(gram, gram) if c2 else poly

    def _product(self, a: Array, b: Array) -> Array:
        if self.dtype == "bfloat16" and jax.default_backend() != "cpu":
            a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
            return jnp.matmul(a, b, preferred_element_type=jnp.float32)
        if (
            self.dtype == "bfloat16"
        ):  # the CPU compiler fails on some such products: the same numbers in float32
            a, b = lax.reduce_precision(a, 8, 7), lax.reduce_precision(b, 8, 7)
        return jnp.matmul(a, b, precision="highest")


def _runs(rows: list[Row]) -> list[list[Row]]:
    """Cuts the steps into runs, each of which starts from a fresh Gram matrix.

    Rounding leaves eigenvalues of about -1e-7 in it where X has none, and each step multiplies them by
    c0^2: a run ends before they reach a tenth, beyond which the iteration diverges.
    """
    runs: list[list[Row]] = []
    growth = math.inf
    for row in rows:
        growth *= abs(row[0])
        if growth > GROWTH:
            runs.append([])
            growth = abs(row[0])
        runs[-1].append(row)
    return runs
