"""What the orthogonalizations share: bringing a tensor's matrix to the last two axes and back."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from celo_nnx.interfaces import TensorSpec

Array = jax.Array

SHRINK = 2.0**-80  # a power of two: scaling by it rounds nothing


def on_wide_matrix(function: Callable[[Array], Array], step: Array, spec: TensorSpec) -> Array:
    """Returns ``function`` of a step's matrices, ``[..., n, m]`` with ``n <= m``, put back in place.

    ``function`` must commute with transposition. A tensor without a matrix is returned as it is.

    Example:
      >>> spec = TensorSpec("w", (3, 5, 2), (0, 2), (0, 1))
      >>> on_wide_matrix(lambda x: x * x.shape[-2], jnp.ones((3, 5, 2)), spec)[0, 0].tolist()
      [2.0, 2.0]
    """
    if spec.matrix is None:
        return step
    x = jnp.moveaxis(step, spec.matrix, (-2, -1))
    tall = x.shape[-2] > x.shape[-1]
    y = function(jnp.swapaxes(x, -1, -2) if tall else x)
    return jnp.moveaxis(jnp.swapaxes(y, -1, -2) if tall else y, (-2, -1), spec.matrix)


def frobenius_norm(x: Array) -> Array:
    """Returns the norms ``[..., 1, 1]`` of matrices ``[..., n, m]``, also where their squares overflow.

    Example:
      >>> print(f"{frobenius_norm(jnp.array([[3e30, 4e30]]))[0, 0]:.3g}")
      5e+30
    """
    square = jnp.sum(x * x, (-2, -1), keepdims=True)
    large = jnp.isinf(square)
    # Ones where squares do not overflow: those of shrunk numbers vanish there, and the root's derivative at 0
    # would make the whole gradient NaN.
    small = jnp.where(large, x * SHRINK, 1.0)
    norm = jnp.sqrt(jnp.sum(small * small, (-2, -1), keepdims=True)) / SHRINK
    return jnp.where(large, norm, root(square))


def root(square: Array) -> Array:
    """Returns the square root, with derivative 0 at 0, where that of ``jnp.sqrt`` is infinite."""
    zero = square == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, square)))


def over_norm(x: Array, norm: Array, eps: float) -> Array:
    """Returns ``x / (norm + eps)``, with derivative 0 where the norm is 0.

    The true one there, 1 / eps, would swamp every other in a meta-gradient by backpropagation.

    Example:
      >>> jax.grad(lambda x: over_norm(x, jnp.abs(x), 1e-8))(0.0).item()
      0.0
    """
    return jnp.where(norm > 0, x, lax.stop_gradient(x)) / (norm + eps)
