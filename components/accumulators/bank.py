"""What the banks of exponential averages share: one average for each decay, the bank axis leading."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from celo_nnx.errors import require
from celo_nnx.interfaces import Accumulator, MetaParam, TensorSpec

Array = jax.Array


class Bank(Accumulator):
    """Exponential averages ``a_k <- d_k a_k + (1 - d_k) x``, ``1 - d_k`` in float32 (OPTIMIZERS 1.1).

    Args:
      decays: one in [0, 1) for each average; ``k`` of them.
      learned: theta holds ``offset`` ``[k]``, zero at the start: ``d = 1 - (1 - decay) exp(10 offset)`` (G1).
      bias_correction: readings are divided by ``1 - d^(t+1)``; the state is not.

    Raises:
      UserError: a decay is out of range, or there is none.
    """

    limited = True  # whether learned decays are kept in [0, 1]

    def __init__(
        self,
        *,
        decays: tuple[float, ...] = (0.9, 0.99, 0.999),
        learned: bool = False,
        bias_correction: bool = False,
    ) -> None:
        decays = tuple(float(d) for d in decays)
        legal = "a tuple of at least one number in [0, 1)"
        require(len(decays) > 0 and all(0 <= d < 1 for d in decays), "decays", decays, legal)
        self.decays, self.bias_correction = decays, bool(bias_correction)
        if learned:
            self.offset = MetaParam(jnp.zeros((len(decays),), jnp.float32))

    @property
    def size(self) -> int:
        """Number of averages."""
        return len(self.decays)

    def rates(self, decay: Array | None = None) -> Array:
        """Returns the decays in use, ``[k]``; ``decay`` is a schedule's, for all of them."""
        if decay is not None:
            return jnp.broadcast_to(decay, (self.size,))
        own = jnp.asarray(self.decays, jnp.float32)
        if not hasattr(self, "offset"):
            return own
        learned = 1 - jnp.exp(10 * (jnp.log(1 - own) / 10 + self.offset[...]))
        return jnp.clip(learned, 0, 1) if self.limited else learned

    def mix(self, average: Array, value: Array, decay: Array | None = None) -> Array:
        """Returns the averages ``[k, *s]`` after ``value`` of shape ``[*s]``."""
        d = self.rates(decay).reshape((-1,) + (1,) * value.ndim)
        return average * d + value[None] * (1 - d)

    def corrected(self, average: Array, count: Array) -> Array:
        """Returns the averages ``[k, *s]`` free of their start at zero, where that is asked for."""
        if not self.bias_correction:
            return average
        fix = 1 - self.rates() ** (count + 1).astype(jnp.float32)
        return average / fix.reshape((-1,) + (1,) * (average.ndim - 1))


class PlaneBank(Bank):
    """A bank of averages as large as the tensor: state and reading are ``[k, *S]``."""

    elementwise = True

    def init(self, spec: TensorSpec) -> Array:
        return jnp.zeros((self.size, *spec.shape), jnp.float32)

    def update(self, state: Array, measured: Array, spec: TensorSpec, decay: Array | None = None) -> Array:
        return self.mix(state, measured, decay)

    def read(self, state: Array, spec: TensorSpec, count: Array) -> Array:
        return self.corrected(state, count)
