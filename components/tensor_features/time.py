"""How far the run is: OPTIMIZERS section 1.10. The count is that of updates done before this one."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from celo_nnx.interfaces import RunView, TensorFeature

Array = jax.Array

CENTRES = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
SCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0, 30000.0, 100000.0)


class TimeFraction(TensorFeature):
    """``tanh(10 (t / T - c))`` for nine fractions ``c`` of the run (T1).

    Example:
      >>> part = TimeFraction()
      >>> view = RunView(jnp.int32(0), jnp.int32(100), jnp.zeros(0), 1, {})
      >>> [round(float(x), 4) for x in part.values(view)[:2]]
      [-0.2913, -0.7616]
    """

    needs_num_steps = True

    def width(self, sizes: dict[str, int]) -> int:
        return len(CENTRES)

    def values(self, view: RunView) -> Array:
        fraction = view.count.astype(jnp.float32) / view.num_steps.astype(jnp.float32)
        return jnp.tanh(10.0 * (fraction - jnp.asarray(CENTRES, jnp.float32)))


class TimeTanh(TensorFeature):
    """``tanh(t / s - 1)`` for eleven time scales ``s`` from 1 to 100,000 (T2)."""

    def width(self, sizes: dict[str, int]) -> int:
        return len(SCALES)

    def values(self, view: RunView) -> Array:
        return jnp.tanh(view.count.astype(jnp.float32) / jnp.asarray(SCALES, jnp.float32) - 1.0)


class TimeSine(TensorFeature):
    """``sin(t / (s pi))`` for the same scales (T3)."""

    def width(self, sizes: dict[str, int]) -> int:
        return len(SCALES)

    def values(self, view: RunView) -> Array:
        return jnp.sin(view.count.astype(jnp.float32) / (jnp.asarray(SCALES, jnp.float32) * jnp.pi))
