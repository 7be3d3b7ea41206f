"""A small vision transformer."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx

from celo_nnx.interfaces import Array
from celo_nnx.tasks.attention import Block, check_attention
from celo_nnx.tasks.image_task import ImageTask, check_patch, patches


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionTransformer(ImageTask):
    """Linear of patches plus learned positions, attention blocks, normalization, mean over patches, linear.

    Pixels are first mapped from [0, 1] to [-1, 1].

    Attributes:
      patch: height and width of a patch, a divisor of ``side``.
      width: of the residual stream.
      depth: number of blocks.
      heads: of attention, a divisor of ``width``.
      expansion: hidden width of a block's MLP, in widths.

    Example:
      >>> import jax
      >>> params, _ = VisionTransformer(side=8, width=8, depth=1, heads=2).init(jax.random.key(0))
      >>> params["positions"].shape
      (4, 8)

    Source: Dosovitskiy and others, "An image is worth 16x16 words", ICLR 2021, without the class token.
    """

    activation: str = "gelu"
    normalization: str = "layer"
    patch: int = 4
    width: int = 64
    depth: int = 2
    heads: int = 4
    expansion: int = 2

    def __post_init__(self) -> None:
        """Checks every value."""
        super().__post_init__()
        check_patch(self)
        check_attention(self)

    def new_model(self, rngs: nnx.Rngs) -> nnx.Module:
        """Builds the network."""
        return _Net(self, rngs)


class _Net(nnx.Module):
    def __init__(self, task: VisionTransformer, rngs: nnx.Rngs) -> None:
        self.patch, self.depth = task.patch, task.depth
        self.embed = task.linear(task.patch**2 * task.colors, task.width, rngs)
        places = (task.side // task.patch) ** 2
        self.positions = nnx.Param(0.02 * rngs.params.normal((places, task.width)))
        for i in range(task.depth):
            setattr(self, f"block_{i}", Block(task, rngs))
        self.norm = task.norm(task.width, rngs)
        self.head = task.linear(task.width, task.classes, rngs)

    def __call__(self, x: Array) -> Array:
        x = self.embed(patches(2 * x - 1, self.patch)) + self.positions[...][None]
        for i in range(self.depth):
            x = getattr(self, f"block_{i}")(x)
        return self.head(jnp.mean(self.norm(x), axis=1))
