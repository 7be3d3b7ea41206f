"""A small residual network."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from celo_nnx.interfaces import Array
from celo_nnx.tasks.fields import ACTIVATIONS, check_counts, check_widths
from celo_nnx.tasks.image_task import ImageTask


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNet(ImageTask):
    """A 3x3 convolution, stages of residual blocks, mean over places, linear.

    A block is ``f(x + N(C(f(N(C(x))))))`` with 3x3 convolutions C, normalization N and activation f. The
    first block of every stage but the first has stride 2; where a block changes the shape, ``x`` goes through
    a 1x1 convolution and normalization.

    Attributes:
      channels: of each stage.
      blocks: of each stage, the same for all.

    Example:
      >>> import jax
      >>> sorted(ResNet(side=8, channels=(4,), blocks=1).init(jax.random.key(0))[0])
      ['block_0_0', 'head', 'norm', 'stem']
    """

    layers: ClassVar[tuple[str, ...]] = ("none", "layer", "batch")

    normalization: str = "batch"
    initialization: str = "he_normal"
    channels: tuple[int, ...] = (16, 32)
    blocks: int = 1

    def __post_init__(self) -> None:
        """Checks every value."""
        super().__post_init__()
        check_widths(self, "channels")
        check_counts(self, "blocks")

    def new_model(self, rngs: nnx.Rngs) -> nnx.Module:
        """Builds the network."""
        return _Net(self, rngs)


class _Block(nnx.Module):
    def __init__(self, task: ResNet, fan_in: int, fan_out: int, stride: int, rngs: nnx.Rngs) -> None:
        self.activation = ACTIVATIONS[task.activation]
        self.conv_0 = task.conv(fan_in, fan_out, 3, stride, rngs)
        self.norm_0 = task.norm(fan_out, rngs)
        self.conv_1 = task.conv(fan_out, fan_out, 3, 1, rngs)
        self.norm_1 = task.norm(fan_out, rngs)
        self.changes = fan_in != fan_out or stride != 1
        if self.changes:
            self.skip = task.conv(fan_in, fan_out, 1, stride, rngs)
            self.skip_norm = task.norm(fan_out, rngs)

    def __call__(self, x: Array) -> Array:
        y = self.activation(self.norm_0(self.conv_0(x)))
        y = self.norm_1(self.conv_1(y))
        return self.activation(y + (self.skip_norm(self.skip(x)) if self.changes else x))


class _Net(nnx.Module):
    def __init__(self, task: ResNet, rngs: nnx.Rngs) -> None:
        self.activation = ACTIVATIONS[task.activation]
        width = task.channels[0]
        self.stem = task.conv(task.colors, width, 3, 1, rngs)
        self.norm = task.norm(width, rngs)
        names = []
        for stage, fan_out in enumerate(task.channels):
            for i in range(task.blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                names.append(f"block_{stage}_{i}")
                setattr(self, names[-1], _Block(task, width, fan_out, stride, rngs))
                width = fan_out
        self.names = tuple(names)
        self.head = task.linear(width, task.classes, rngs)

    def __call__(self, x: Array) -> Array:
        x = self.activation(self.norm(self.stem(x)))
        for name in self.names:
            x = getattr(self, name)(x)
        return self.head(jnp.mean(x, axis=(1, 2)))
