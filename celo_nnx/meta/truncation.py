"""How many inner steps: schedules that draw the length of a trajectory or of a truncation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from celo_nnx.errors import is_count, require
from celo_nnx.interfaces import Array, TruncationSchedule

NEVER = 2**31 - 1  # the length of a trajectory that does not end, int32's largest


def _require_count(name: str, value: int, least: int = 1, least_name: str = "") -> None:
    legal = f"an integer >= {least_name and f'{least_name} = '}{least}"
    require(is_count(value) and value >= least, name, value, legal)


def _log_uniform(key: Array, minimum: Array | int, maximum: Array | int) -> Array:
    low, high = jnp.log(jnp.float32(minimum)), jnp.log(jnp.float32(maximum))
    length = jnp.exp(jax.random.uniform(key, minval=low, maxval=high)).astype(jnp.int32)
    # Rounding of exp(log(minimum)) may fall just short of an integer, truncation would then lose one.
    return jnp.clip(length, minimum, maximum)


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
        _require_count("unroll.minimum", self.minimum)
        _require_count("unroll.maximum", self.maximum, self.minimum, "unroll.minimum")

    def __call__(self, key: Array, iteration: Array | int = 0) -> Array:
        """Draws a length, int32 scalar; the meta-iteration is not used."""
        return _log_uniform(key, self.minimum, self.maximum)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Growing:
    """Log-uniform lengths whose upper bound grows geometrically with the meta-iteration.

    The bound is ``start`` at meta-iteration 0 and ``maximum`` from meta-iteration ``iterations`` on, so
    that training begins on short trajectories, whose meta-loss is smooth.

    Attributes:
      minimum: shortest length, in inner steps.
      start: the first upper bound.
      maximum: the last upper bound.
      iterations: meta-iterations of growth.

    Raises:
      UserError: unless ``1 <= minimum <= start <= maximum`` and ``iterations >= 1``.

    Example:
      >>> schedule = Growing(minimum=5, start=5, maximum=500, iterations=10)
      >>> int(schedule.bound(0)), int(schedule.bound(5)), int(schedule.bound(99))
      (5, 50, 500)
    """

    minimum: int = 10
    start: int = 100
    maximum: int = 2000
    iterations: int = 10_000

    def __post_init__(self) -> None:
        _require_count("unroll.minimum", self.minimum)
        _require_count("unroll.start", self.start, self.minimum, "unroll.minimum")
        _require_count("unroll.maximum", self.maximum, self.start, "unroll.start")
        _require_count("unroll.iterations", self.iterations)

    def bound(self, iteration: Array | int) -> Array:
        """Returns the upper bound at a meta-iteration, int32 scalar."""
        part = jnp.clip(jnp.asarray(iteration, jnp.float32) / self.iterations, 0.0, 1.0)
        bound = self.start * jnp.exp(part * math.log(self.maximum / self.start))
        return jnp.clip(jnp.round(bound).astype(jnp.int32), self.start, self.maximum)

    def __call__(self, key: Array, iteration: Array | int = 0) -> Array:
        """Draws a length at a meta-iteration, int32 scalar."""
        return _log_uniform(key, self.minimum, self.bound(iteration))


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
        _require_count("unroll.length", self.length)

    @property
    def maximum(self) -> int:
        """The longest length that can be drawn."""
        return self.length

    def __call__(self, key: Array, iteration: Array | int = 0) -> Array:
        """Returns the length, int32 scalar; nothing is drawn."""
        return jnp.int32(self.length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeverEnding:
    """Trajectories that are never reset.

    An optimizer that follows the fraction of training done is told 2^31 - 1 steps, so its fraction stays 0.

    Example:
      >>> int(NeverEnding()(jax.random.key(0)))
      2147483647
    """

    maximum: int = dataclasses.field(default=NEVER, init=False)

    def __call__(self, key: Array, iteration: Array | int = 0) -> Array:
        """Returns the largest int32; nothing is drawn."""
        return jnp.int32(NEVER)


TRUNCATIONS: dict[str, Callable[..., TruncationSchedule]] = {
    "log_uniform": LogUniform,
    "growing": Growing,
    "constant": Constant,
    "never": NeverEnding,
}
