"""The loss at ten time scales, compared with the best of each so far."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from celo_nnx.errors import MOST_WIDTH, is_width, require
from celo_nnx.interfaces import Tracker

Array = jax.Array
Pair = tuple[Array, Array]  # a number as the unevaluated sum of a float32 and a small correction
SLOWEST = np.float32(1 - 2**-24)  # the largest below 1; an average that decays by 1 is 0/0


class LossBuffer(Tracker):
    """Averages of the loss with time constants from 10 to the length of the run (OPTIMIZERS B0 to B8).

    ``size - 1`` numbers: each average above its own minimum, relative to the next slower one, minus 1,
    clipped to [-1, 1]; zero in the first two updates.

    The published features partly are the rounding noise of ``1 - d^t`` (OPTIMIZERS 14.2), so ``d^t`` is kept
    as a pair of floats and rounded once, which follows them over long runs.

    A NaN loss, a negative infinite one, or an infinite first one makes this and every later reading NaN. A
    later infinite loss does not show: it is cut to twice the largest average, as any spike is (B3).

    Args:
      size: number of averages, at least 2.
      horizon: the longest time constant; 0 for the length of the run. Beyond 2^24 updates (17 million) it is
        2^24, whose decay is the largest that float32 tells from 1.

    Example:
      >>> part = LossBuffer()
      >>> state = part.init(100)
      >>> for loss in (2.0, 1.8, 1.9):
      ...     state = part.update(state, jnp.float32(loss))
      >>> [round(float(x), 4) for x in part.read(state, jnp.float32(1.9))[:2]]
      [-0.2713, -0.2801]
    """

    needs_num_steps = True
    needs_value = True

    def __init__(self, *, size: int = 10, horizon: int = 0) -> None:
        require(is_width(size, 2), "size", size, f"an integer from 2 to {MOST_WIDTH}")
        require(type(horizon) is int and horizon >= 0, "horizon", horizon, "an integer of at least 0")
        self.size, self.width, self.horizon = size, size - 1, horizon

    def init(self, num_steps: Array | int) -> dict[str, Array]:
        decays = self._decays(num_steps)
        one = jnp.ones_like(decays)
        return {
            "means": jnp.zeros_like(decays),
            "running_min": jnp.full_like(decays, 999999999999.0),
            "iteration": jnp.zeros((), jnp.int32),
            "decays": decays,
            "power": jnp.stack([one, jnp.zeros_like(one)]),
        }

    def _decays(self, num_steps: Array | int) -> Array:
        """Returns the decays by the published float32 operations: their last bit shows in the features.

        The barrier keeps a known number of steps from being folded, which rounds otherwise.
        """
        length = lax.optimization_barrier(jnp.asarray(self.horizon or num_steps, jnp.float32))
        longest = jnp.log(jnp.maximum(length, 1.0)) / np.log(np.float32(10.0))
        return jnp.minimum(jnp.exp(-1.0 / 10.0 ** jnp.linspace(1.0, longest, self.size)), SLOWEST)

    def update(self, state: dict[str, Array], value: Array) -> dict[str, Array]:
        means, decays = state["means"], state["decays"]
        power = _times((state["power"][0], state["power"][1]), decays)
        fix = 1 - power[0]
        largest = jnp.where(state["iteration"] == 0, value, jnp.max(means / fix))
        value = jnp.minimum(2 * jnp.abs(largest), value)
        kept, error = _product(means, decays)
        added = value * (1 - decays)
        total, more = _sum(kept, added)
        means = total + (more + error)  # rounded once, as a fused multiply-add does
        return {
            "means": means,
            "running_min": jnp.minimum(state["running_min"], means / fix),
            "iteration": state["iteration"] + 1,
            "decays": decays,
            "power": jnp.stack(power),
        }

    def read(self, state: dict[str, Array], value: Array) -> Array:
        mean = state["means"] / (1 - state["power"][0])
        least = state["running_min"]
        ratio = (mean[:-1] - least[:-1]) / jnp.maximum(1e-8, mean[1:] - least[:-1])
        features = jnp.clip(ratio - 1, -1, 1)
        return jnp.where(state["iteration"] <= 2, features * 0, features)


def _sum(a: Array, b: Array) -> Pair:
    """Returns ``a + b`` and what rounding lost (Knuth's two-sum)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _product(a: Array, b: Array) -> Pair:
    """Returns ``a b`` and what rounding lost (Dekker's product; 12-bit halves)."""

    def split(x: Array) -> Pair:
        # Not by Veltkamp's multiplication with 4097, which overflows from 8e34 on.
        high = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=11)
        return high, x - high

    p = a * b
    (ah, al), (bh, bl) = split(a), split(b)
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def _times(pair: Pair, factor: Array) -> Pair:
    """Returns the pair times a float32, normalized so that its first part is the correctly rounded value."""
    high, low = _product(pair[0], factor)
    return _sum(high, low + pair[1] * factor)
