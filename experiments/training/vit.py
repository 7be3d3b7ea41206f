"""A small ViT on CIFAR-10 or digits, with AdamW, Muon and Celo2 in turn: ``python -m`` this module."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from celo_nnx.experiments.training import images

WIDTH, DEPTH, HEADS = 64, 3, 4


class Block(nnx.Module):
    """Attention, then an MLP, each normalized before and added to its input."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.norm_1, self.norm_2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.query, self.key, self.value = (linear(WIDTH, WIDTH) for _ in range(3))
        self.out = linear(WIDTH, WIDTH)
        self.up, self.down = linear(WIDTH, 2 * WIDTH), linear(2 * WIDTH, WIDTH)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[n, patches, WIDTH]`` -> the same."""
        h = self.norm_1(x)
        query, key, value = (
            layer(h).reshape(*x.shape[:2], HEADS, -1) for layer in (self.query, self.key, self.value)
        )
        x = x + self.out(jax.nn.dot_product_attention(query, key, value).reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class ViT(nnx.Module):
    """Linear of patches and learned positions, blocks, normalization, mean over patches, linear."""

    def __init__(self, size: int, colors: int, classes: int, rngs: nnx.Rngs) -> None:
        self.patch = max(2, size // 8)
        self.side = size // self.patch
        self.patches = nnx.Linear(self.patch**2 * colors, WIDTH, rngs=rngs)
        init = nnx.initializers.normal(0.02)
        self.positions = nnx.Embed(self.side**2, WIDTH, embedding_init=init, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(DEPTH)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[n, size, size, colors]`` -> logits ``[n, classes]``; rows that fill no patch are left out."""
        n, edge = len(x), self.side * self.patch
        x = x[:, :edge, :edge].reshape(n, self.side, self.patch, self.side, self.patch, -1)
        x = self.patches(x.swapaxes(2, 3).reshape(n, self.side**2, -1))
        x = x + self.positions(jnp.arange(self.side**2))[None]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(axis=1))


def main(argv: Sequence[str] | None = None) -> int:
    """Tunes, trains and draws; returns the exit code."""
    return images.command("vit", __doc__, ViT, argv)


if __name__ == "__main__":
    sys.exit(main())
