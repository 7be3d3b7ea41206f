"""A small convolutional network."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from celo_nnx.errors import require
from celo_nnx.interfaces import Array
from celo_nnx.tasks.fields import ACTIVATIONS, check_counts, check_widths
from celo_nnx.tasks.image_task import ImageTask


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvNet(ImageTask):
    """Convolutions (each: convolution, normalization, activation), mean over places, linear.

    Attributes:
      channels: of each convolution.
      strides: of each convolution.
      kernel: height and width of the kernels.

    Example:
      >>> import jax
      >>> params, _ = ConvNet(side=8, channels=(4, 6), strides=(2, 1)).init(jax.random.key(0))
      >>> params["conv_1"]["kernel"].shape
      (3, 3, 4, 6)
    """

    layers: ClassVar[tuple[str, ...]] = ("none", "layer", "batch")

    channels: tuple[int, ...] = (32, 64, 64)
    strides: tuple[int, ...] = (2, 1, 1)
    kernel: int = 3

    def __post_init__(self) -> None:
        """Checks every value."""
        super().__post_init__()
        check_widths(self, "channels")
        check_widths(self, "strides")
        legal = f"as many as channels, {len(self.channels)}"
        require(len(self.strides) == len(self.channels), "strides", self.strides, legal)
        check_counts(self, "kernel")

    def new_model(self, rngs: nnx.Rngs) -> nnx.Module:
        """Builds the network."""
        return _Net(self, rngs)


class _Net(nnx.Module):
    def __init__(self, task: ConvNet, rngs: nnx.Rngs) -> None:
        self.task = task
        widths = (task.colors, *task.channels)
        for i, stride in enumerate(task.strides):
            setattr(self, f"conv_{i}", task.conv(widths[i], widths[i + 1], task.kernel, stride, rngs))
            setattr(self, f"norm_{i}", task.norm(widths[i + 1], rngs))
        self.head = task.linear(widths[-1], task.classes, rngs)

    def __call__(self, x: Array) -> Array:
        for i in range(len(self.task.channels)):
            x = getattr(self, f"norm_{i}")(getattr(self, f"conv_{i}")(x))
            x = ACTIVATIONS[self.task.activation](x)
        return self.head(jnp.mean(x, axis=(1, 2)))
