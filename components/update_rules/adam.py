"""Celo2's Adam for the tensors that its route sends there."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from celo_nnx.errors import require
from celo_nnx.interfaces import RouteRule

Array = jax.Array
Tensors = dict[str, Array]


class Celo2Adam(RouteRule):
    """``m <- b1 m + (1-b1) g; v <- b2 v + (1-b2) g^2; y = m / sqrt(v + eps)`` (OPTIMIZERS F1 to F3).

    Unlike ``optax.adam``: eps inside the root, no bias correction unless asked for, no gradient clipping.
    The step is scaled by ``multiplier`` times the learning rate (F4).

    Args:
      b1, b2: in [0, 1).
      eps: above 0.
      multiplier: of the learning rate; the published factor is 20.
      bias_correction: divide ``m`` and ``v`` by ``1 - b^(t+1)``.
    """

    def __init__(
        self,
        *,
        b1: float = 0.9,
        b2: float = 0.95,
        eps: float = 1e-8,
        multiplier: float = 20.0,
        bias_correction: bool = False,
    ) -> None:
        require(0 <= b1 < 1, "b1", b1, "a number in [0, 1)")
        require(0 <= b2 < 1, "b2", b2, "a number in [0, 1)")
        require(eps > 0, "eps", eps, "a number above 0")
        require(multiplier > 0, "multiplier", multiplier, "a number above 0")
        self.b1, self.b2, self.eps = float(b1), float(b2), float(eps)
        self.multiplier, self.bias_correction = float(multiplier), bool(bias_correction)

    def init(self, params: Tensors) -> dict[str, Tensors]:
        return {name: {path: jnp.zeros(p.shape, jnp.float32) for path, p in params.items()} for name in "mv"}

    def update(
        self, grads: Tensors, state: dict[str, Tensors], params: Tensors, count: Array
    ) -> tuple[Tensors, dict[str, Tensors]]:
        b1, b2 = jnp.float32(self.b1), jnp.float32(self.b2)
        m = {path: b1 * state["m"][path] + (1 - b1) * g for path, g in grads.items()}
        v = {path: b2 * state["v"][path] + (1 - b2) * g * g for path, g in grads.items()}
        power = (count + 1).astype(jnp.float32)
        fix1 = 1 - b1**power if self.bias_correction else 1.0
        fix2 = 1 - b2**power if self.bias_correction else 1.0
        steps = {path: (m[path] / fix1) * lax.rsqrt(v[path] / fix2 + self.eps) for path in grads}
        return steps, {"m": m, "v": v}
