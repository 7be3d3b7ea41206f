"""What the loss tracker and the schedule know, and the size of the network."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from celo_nnx.errors import require, unknown
from celo_nnx.interfaces import RunView, TensorFeature

Array = jax.Array


class Loss(TensorFeature):
    """The loss tracker's numbers.

    Args:
      index: which of them; -1 for all.
    """

    def __init__(self, *, index: int = -1) -> None:
        require(type(index) is int and index >= -1, "index", index, "an integer of at least -1")
        self.index = index

    def width(self, sizes: dict[str, int]) -> int:
        require(self.index < sizes["loss"], "index", self.index, f"below the tracker's width {sizes['loss']}")
        return sizes["loss"] if self.index < 0 else 1

    def values(self, view: RunView) -> Array:
        return view.loss if self.index < 0 else view.loss[self.index : self.index + 1]


class Shown(TensorFeature):
    """``gain clip(x, -limit, limit)`` of something that the schedule shows of its state.

    Args:
      name: what, such as ``"controls"`` for the context that the schedule decided.
      gain: a factor.
      limit: above 0; infinity for none.
    """

    def __init__(self, *, name: str = "controls", gain: float = 1.0, limit: float = math.inf) -> None:
        require(limit > 0, "limit", limit, "a number above 0")
        self.name, self.gain, self.limit = str(name), float(gain), float(limit)

    def width(self, sizes: dict[str, int]) -> int:
        if self.name not in sizes:
            raise unknown("thing that the schedule shows,", self.name, sizes)
        return sizes[self.name]

    def values(self, view: RunView) -> Array:
        return self.gain * jnp.clip(view.shown[self.name], -self.limit, self.limit)


class Constant(TensorFeature):
    """A constant, such as the published flag of a validation step.

    Args:
      value: any number.
    """

    def __init__(self, *, value: float = 1.0) -> None:
        self.value = float(value)

    def width(self, sizes: dict[str, int]) -> int:
        return 1

    def values(self, view: RunView) -> Array:
        return jnp.full((1,), self.value, jnp.float32)


class LogTensors(TensorFeature):
    """``log(n) - 1`` of the number of learned tensors."""

    def width(self, sizes: dict[str, int]) -> int:
        return 1

    def values(self, view: RunView) -> Array:
        return jnp.full((1,), math.log(max(view.tensors, 1)) - 1.0, jnp.float32)
