"""How long a trajectory lives: schedules that draw its length in inner steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from celo_nnx.errors import require
from celo_nnx.interfaces import Array, TruncationSchedule


def is_count(value: object) -> bool:
    """Tells whether ``value`` is an integer >= 1 that fits in int32 (a bool is not)."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogUniform:
    """Lengths whose logarithm is uniform: ``int(exp(U(ln minimum, ln maximum)))``.

    Attributes:
      minimum: shortest length, in inner steps.
      maximum: upper bound of the length.

    Raises:
      UserError: unless ``1 <= minimum <= maximum``.

    Example:
      >>> int(LogUniform(minimum=7, maximum=7)(jax.random.key(0)))
      7

    Source: META_TRAINING section 0.
    """

    minimum: int = 100
    maximum: int = 2000

    def __post_init__(self) -> None:
        require(is_count(self.minimum), "unroll.minimum", self.minimum, "an integer >= 1")
        legal = f"an integer >= unroll.minimum = {self.minimum}"
        require(
            is_count(self.maximum) and self.maximum >= self.minimum, "unroll.maximum", self.maximum, legal
        )

    def __call__(self, key: Array) -> Array:
        """Draws a length, int32 scalar."""
        low, high = math.log(self.minimum), math.log(self.maximum)
        length = jnp.exp(jax.random.uniform(key, minval=low, maxval=high)).astype(jnp.int32)
        # Rounding of exp(log(minimum)) may fall just short of an integer, truncation would then lose one.
        return jnp.clip(length, self.minimum, self.maximum)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """The same length for every trajectory.

    Attributes:
      length: inner steps.

    Raises:
      UserError: unless ``length >= 1``.
    """

    length: int = 1000

    def __post_init__(self) -> None:
        require(is_count(self.length), "unroll.length", self.length, "an integer >= 1")

    @property
    def maximum(self) -> int:
        """The longest length that can be drawn."""
        return self.length

    def __call__(self, key: Array) -> Array:
        """Returns the length, int32 scalar; the key is not used."""
        return jnp.int32(self.length)


TRUNCATIONS: dict[str, Callable[..., TruncationSchedule]] = {"log_uniform": LogUniform, "constant": Constant}
