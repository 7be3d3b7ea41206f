"""No orthogonalization."""

from __future__ import annotations

import jax

from celo_nnx.interfaces import Orthogonalization, TensorSpec


class Identity(Orthogonalization):
    """Returns the step as it is."""

    def __call__(self, step: jax.Array, spec: TensorSpec) -> jax.Array:
        return step
