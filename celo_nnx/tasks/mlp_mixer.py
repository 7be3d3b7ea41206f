"""A small MLP-Mixer."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx

from celo_nnx.interfaces import Array
from celo_nnx.tasks.fields import ACTIVATIONS, check_counts
from celo_nnx.tasks.image_task import ImageTask, check_patch, patches


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPMixer(ImageTask):
    """Linear of patches, blocks that mix patches, then channels, normalization, mean over patches, linear.

    A block is ``x + M(N(x)^T)^T``, then ``x + M'(N(x))``, with M and M' linear, activation, linear.
    Pixels are first mapped from [0, 1] to [-1, 1]: a patch of zeros would stay zero up to the first
    normalization.

    Attributes:
      patch: height and width of a patch, a divisor of ``side``.
      width: channels of a patch.
      depth: number of blocks.
      patch_hidden, channel_hidden: hidden widths of M and M'.

    Example:
      >>> import jax
      >>> params, _ = MLPMixer(side=8, width=8, depth=1).init(jax.random.key(0))
      >>> params["block_0"]["patches_0"]["kernel"].shape
      (4, 16)

    Source: Tolstikhin and others, "MLP-Mixer", NeurIPS 2021.
    """

    activation: str = "gelu"
    normalization: str = "layer"
    patch: int = 4
    width: int = 64
    depth: int = 2
    patch_hidden: int = 16
    channel_hidden: int = 128

    def __post_init__(self) -> None:
        """Checks every value."""
        super().__post_init__()
        check_patch(self)
        check_counts(self, "width", "depth", "patch_hidden", "channel_hidden")

    def new_model(self, rngs: nnx.Rngs) -> nnx.Module:
        """Builds the network."""
        return _Net(self, rngs)


class _Block(nnx.Module):
    def __init__(self, task: MLPMixer, rngs: nnx.Rngs) -> None:
        self.activation = ACTIVATIONS[task.activation]
        places = (task.side // task.patch) ** 2
        self.norm_0 = task.norm(task.width, rngs)
        self.patches_0 = task.linear(places, task.patch_hidden, rngs)
        # No bias: layer normalization over channels would undo it.
        self.patches_1 = task.linear(task.patch_hidden, places, rngs, use_bias=False)
        self.norm_1 = task.norm(task.width, rngs)
        self.channels_0 = task.linear(task.width, task.channel_hidden, rngs)
        self.channels_1 = task.linear(task.channel_hidden, task.width, rngs)

    def __call__(self, x: Array) -> Array:
        y = self.patches_0(self.norm_0(x).swapaxes(1, 2))
        x = x + self.patches_1(self.activation(y)).swapaxes(1, 2)
        return x + self.channels_1(self.activation(self.channels_0(self.norm_1(x))))


class _Net(nnx.Module):
    def __init__(self, task: MLPMixer, rngs: nnx.Rngs) -> None:
        self.patch, self.depth = task.patch, task.depth
        self.embed = task.linear(task.patch**2 * task.colors, task.width, rngs)
        for i in range(task.depth):
            setattr(self, f"block_{i}", _Block(task, rngs))
        self.norm = task.norm(task.width, rngs)
        self.head = task.linear(task.width, task.classes, rngs)

    def __call__(self, x: Array) -> Array:
        x = self.embed(patches(2 * x - 1, self.patch))
        for i in range(self.depth):
            x = getattr(self, f"block_{i}")(x)
        return self.head(jnp.mean(self.norm(x), axis=1))
