"""What augmentations share: a task that wraps another, and checked random ranges."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from celo_nnx.errors import is_number, require
from celo_nnx.interfaces import Array, PyTree, Task

SMALLEST, LARGEST = 1e-30, 1e30  # further out, float32 would round a factor to 0 or to infinity


@dataclasses.dataclass(frozen=True)
class Augmentation(Task):
    """A task that does all as the one it wraps does.

    An augmentation overrides what it changes, with ``sample["own"]`` for what it drew for the trajectory and
    ``super()`` for the rest. It is a frozen dataclass, so equal settings and tasks make equal tasks.

    Attributes:
      task: the task that is wrapped.
    """

    task: Task

    @property
    def floor(self) -> float | None:
        """The wrapped task's."""
        return self.task.floor

    @property
    def example_axis(self) -> int:
        """The wrapped task's."""
        return self.task.example_axis

    def own(self, key: Array, inner: PyTree) -> PyTree:
        """Draws what the augmentation varies between trajectories; nothing by default.

        Args:
          key: decides.
          inner: the wrapped task's sample.
        """
        return ()

    def sample(self, key: Array) -> dict[str, PyTree]:
        """Draws ``{"own": the augmentation's, "inner": the wrapped task's}``."""
        own_key, inner_key = jax.random.split(key)
        inner = self.task.sample(inner_key)
        return {"own": self.own(own_key, inner), "inner": inner}

    def init(self, key: Array, sample: PyTree = ()) -> tuple[PyTree, PyTree]:
        """Returns the wrapped task's (parameters, model state)."""
        return self.task.init(key, sample["inner"])

    def loss(
        self, params: PyTree, state: PyTree, key: Array, batch: PyTree, sample: PyTree = ()
    ) -> tuple[Array, PyTree, dict[str, Array]]:
        """Returns the wrapped task's (loss, next model state, auxiliary scalars)."""
        return self.task.loss(params, state, key, batch, sample["inner"])

    def evaluate(
        self, params: PyTree, state: PyTree, key: Array, batch: PyTree, sample: PyTree = ()
    ) -> Array:
        """Returns the wrapped task's held-out loss: noise on what is learned from does not reach it."""
        return self.task.evaluate(params, state, key, batch, sample["inner"])

    def unscale(self, loss: Array, sample: PyTree = ()) -> Array:
        """Returns the loss as the wrapped task reports it."""
        return self.task.unscale(loss, sample["inner"])

    def pick(self, key: Array, start: Array, count: Array) -> PyTree:
        """Picks a batch of the wrapped task."""
        return self.task.pick(key, start, count)

    def take(self, data: dict[str, Array], picked: PyTree) -> PyTree:
        """Returns the picked batch of the wrapped task."""
        return self.task.take(data, picked)

    def normalize(self, loss: Array) -> Array:
        """Maps an unscaled loss to the meta-loss as the wrapped task does."""
        return self.task.normalize(loss)


def check_range(low: object, high: object, least: float = SMALLEST, most: float = LARGEST) -> None:
    """Checks the range that an augmentation draws from.

    Raises:
      UserError: unless ``least <= low <= high <= most``.

    Example:
      >>> check_range(0.1, 10.0)
    """
    legal = f"a number from {least:g} to {most:g}"
    require(is_number(low) and least <= low <= most, "augmentation.low", low, legal)
    legal = f"a number from augmentation.low = {low} to {most:g}"
    require(is_number(high) and low <= high <= most, "augmentation.high", high, legal)


def log_uniform(key: Array, shape: tuple[int, ...], low: float, high: float) -> Array:
    """Draws ``exp(U(ln low, ln high))``, float32."""
    return jnp.exp(jax.random.uniform(key, shape, minval=math.log(low), maxval=math.log(high)))
