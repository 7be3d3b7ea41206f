"""A ConvNet on CIFAR-10 or digits, with AdamW, Muon and Celo2 in turn: ``python -m`` this module."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import jax
from flax import nnx

from celo_nnx.experiments.training import images

CHANNELS = (32, 64, 64)


class ConvNet(nnx.Module):
    """Three times convolution of stride 2, normalization over channels, GELU; mean over places, linear."""

    def __init__(self, size: int, colors: int, classes: int, rngs: nnx.Rngs) -> None:
        widths = (colors, *CHANNELS)
        layers = [
            nnx.Conv(widths[i], widths[i + 1], (3, 3), strides=2, rngs=rngs) for i in range(len(CHANNELS))
        ]
        self.layers = nnx.List(layers)
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for width in CHANNELS])
        self.head = nnx.Linear(CHANNELS[-1], classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[n, size, size, colors]`` -> logits ``[n, classes]``."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = nnx.gelu(norm(layer(x)))
        return self.head(x.mean(axis=(1, 2)))


def main(argv: Sequence[str] | None = None) -> int:
    """Tunes, trains and draws; returns the exit code."""
    return images.command("conv_net", __doc__, ConvNet, argv)


if __name__ == "__main__":
    sys.exit(main())
