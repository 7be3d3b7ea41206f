"""Image classification by an NNX model: what convolutional and attention models share."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import lax

from celo_nnx.errors import is_count, require
from celo_nnx.interfaces import Array, PyTree
from celo_nnx.tasks.fields import (
    ACTIVATIONS,
    INITIALIZATIONS,
    check_counts,
    check_names,
    check_positive,
    clipped,
    cross_entropy,
)
from celo_nnx.tasks.nnx_task import LayeredTask


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTask(LayeredTask):
    """Mean softmax cross-entropy of images ``[n, side, side, colors]``; subclasses say which model.

    Attributes:
      side: height and width of an image.
      colors: channels of an image.
      classes: number of classes.
      batch_size: examples a batch.
      activation: a key of :data:`~celo_nnx.tasks.fields.ACTIVATIONS`.
      normalization: one of the model's :attr:`layers`.
      initialization: of kernels, a key of :data:`~celo_nnx.tasks.fields.INITIALIZATIONS`; biases are zero.
      normalizer_clip: the meta-loss is cut at this many times ``ln(classes)``, the loss of a uniform guess.
    """

    layers: ClassVar[tuple[str, ...]] = ("none", "layer")

    side: int
    colors: int = 1
    classes: int = 10
    batch_size: int = 64
    activation: str = "relu"
    normalization: str = "none"
    initialization: str = "lecun_normal"
    normalizer_clip: float = 1.5

    def __post_init__(self) -> None:
        """Checks every value; raises :class:`~celo_nnx.errors.UserError`."""
        check_counts(self, "side", "colors", "batch_size")
        require(is_count(self.classes) and self.classes >= 2, "classes", self.classes, "an integer >= 2")
        check_positive(self, "normalizer_clip")
        check_names(self, activation=ACTIVATIONS, normalization=self.layers, initialization=INITIALIZATIONS)

    @staticmethod
    def fields_of(side: int, colors: int, classes: int) -> dict[str, int]:
        """Returns the fields that images of this size decide."""
        return {"side": side, "colors": colors, "classes": classes}

    def model_loss(self, model: Any, batch: PyTree, key: Array) -> Array:
        """Returns the mean cross-entropy of ``batch = {"x": [n, side * side * colors], "y": [n]}``."""
        return cross_entropy(model(batch["x"].reshape(-1, self.side, self.side, self.colors)), batch["y"])

    def normalize(self, loss: Array) -> Array:
        """Returns ``clip(loss, 0, normalizer_clip ln(classes))``, NaN becoming the upper bound."""
        return clipped(loss, 0.0, self.normalizer_clip * math.log(self.classes))

    def conv(self, fan_in: int, fan_out: int, size: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
        """Returns a ``size x size`` convolution, padded to ``ceil(side / stride)``.

        It has no bias before batch normalization, which would undo it.
        """
        return nnx.Conv(
            fan_in,
            fan_out,
            (size, size),
            stride,
            use_bias=self.normalization != "batch",
            kernel_init=INITIALIZATIONS[self.initialization],
            conv_general_dilated=patch_conv,
            rngs=rngs,
        )


def check_patch(task: Any) -> None:
    """Checks that a task's ``patch`` divides its ``side``."""
    check_counts(task, "patch")
    require(task.side % task.patch == 0, "patch", task.patch, f"a divisor of the image side {task.side}")


def patches(x: Array, size: int) -> Array:
    """Cuts images ``[n, s, s, c]`` into ``[n, (s / size)^2, size * size * c]``, row by row."""
    n, side, _, colors = x.shape
    count = side // size
    x = x.reshape(n, count, size, count, size, colors)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(n, count * count, size * size * colors)


def patch_conv(x: Array, kernel: Array, strides: tuple[int, ...], padding: Any, **_: Any) -> Array:
    """Computes a convolution as one matrix product of shifted images; takes the place of ``lax``'s in nnx.

    Under ``vmap`` over kernels it stays a batched matrix product, where XLA makes a grouped convolution,
    whose gradient is slow on CPUs.

    Args:
      x: images ``[n, h, w, c]``.
      kernel: ``[kh, kw, c, out]``.
      strides: of the two axes.
      padding: ``"SAME"``, ``"VALID"`` or pairs.

    Returns:
      ``[n, h', w', out]``.
    """
    height, width, fan_in, fan_out = kernel.shape
    pads = (
        lax.padtype_to_pads(x.shape[1:3], (height, width), strides, padding)
        if isinstance(padding, str)
        else padding
    )
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows, columns = ((x.shape[i + 1] - (height, width)[i]) // strides[i] + 1 for i in (0, 1))
    shifted = [
        x[
            :,
            i : i + (rows - 1) * strides[0] + 1 : strides[0],
            j : j + (columns - 1) * strides[1] + 1 : strides[1],
        ]
        for i in range(height)
        for j in range(width)
    ]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(height * width * fan_in, fan_out)
