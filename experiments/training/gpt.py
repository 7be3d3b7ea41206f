"""A character-level GPT on any text, with AdamW, Muon and Celo2 in turn: ``python -m`` this module."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from celo_nnx.errors import MissingData, UserError, require
from celo_nnx.experiments.training import study
from celo_nnx.experiments.training.loop import OPTIMIZERS, Problem
from celo_nnx.tasks.text import Text, load_file, load_text

Array = jax.Array

BATCHES = 16  # of validation
BASE_WIDTH = 32  # where width multipliers are 1


class Block(nnx.Module):
    """Causal attention, then an MLP, each normalized before and added to its input."""

    def __init__(self, width: int, heads: int, scale: float, rngs: nnx.Rngs) -> None:
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.heads, self.scale = heads, scale
        self.norm_1, self.norm_2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.query, self.key, self.value = (linear(width, width) for _ in range(3))
        self.out = linear(width, width)
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)

    def __call__(self, x: Array) -> Array:
        """``[batch, length, width]`` -> the same."""
        split = lambda y: y.reshape(*x.shape[:2], self.heads, -1)  # noqa: E731
        h = self.norm_1(x)
        query, key, value = (split(layer(h)) for layer in (self.query, self.key, self.value))
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True, scale=self.scale)
        x = x + self.out(mixed.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class GPT(nnx.Module):
    """Embedding and learned positions, blocks, normalization, linear.

    Args:
      vocabulary, context: number of tokens, and how many are seen at once.
      width, depth, heads: of the network.
      gain: of the logits; with width multipliers it shrinks with the width.
      scale: of the attention's products; ``1 / sqrt(width of a head)`` by default.
      rngs: draws the parameters.
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        width: int,
        depth: int,
        heads: int,
        *,
        gain: float = 1.0,
        scale: float | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        small = nnx.initializers.normal(0.02)
        self.gain = gain
        self.embed = nnx.Embed(vocabulary, width, embedding_init=small, rngs=rngs)
        self.positions = nnx.Embed(context, width, embedding_init=small, rngs=rngs)
        scale = (heads / width) ** 0.5 if scale is None else scale
        self.blocks = nnx.List([Block(width, heads, scale, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, use_bias=False, kernel_init=small, rngs=rngs)

    def __call__(self, tokens: Array) -> Array:
        """``[batch, length]`` tokens -> ``[batch, length, vocabulary]`` logits of the next ones."""
        x = self.embed(tokens) + self.positions(jnp.arange(tokens.shape[1]))[None]
        for block in self.blocks:
            x = block(x)
        return self.gain * self.head(self.norm(x))


def loss(model: GPT, tokens: Array) -> Array:
    """The mean cross-entropy in nats a character; tokens ``[batch, context + 1]``."""
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def text_of(name: str) -> Text:
    """Reads a text by name or path; without a name Shakespeare where it is found, else sums in words."""
    if not name:
        try:
            return load_text("shakespeare", level="character")
        except MissingData:
            return load_text("sums", level="character")
    if os.sep in name or Path(name).suffix or Path(name).exists():
        return load_file(Path(name), level="character")
    return load_text(name, level="character")


def problem(
    text: Text,
    *,
    width: int,
    depth: int,
    heads: int,
    context: int,
    batch_size: int,
    width_multipliers: bool = False,
    name: str = "gpt",
) -> Problem:
    """The GPT on a text whose last tenth is for validation.

    Raises:
      UserError: the text is too short for the context, or heads do not divide the width.
    """
    require(width % heads == 0, "heads", heads, f"a divisor of the width {width}")
    cut = len(text.tokens) * 9 // 10
    if len(text.tokens) - cut <= context:
        raise UserError(
            f"text {text.name} has {len(text.tokens)} characters, too few for a context of {context}: its "
            f"last tenth, for validation, needs more than {context}; name a longer text or a shorter context"
        )
    parts = [jnp.asarray(part, jnp.int32) for part in (text.tokens[:cut], text.tokens[cut:])]
    window = jnp.arange(context + 1)

    def draw(key: Array, tokens: Array) -> Array:
        starts = jax.random.randint(key, (batch_size, 1), 0, len(tokens) - context)
        return tokens[starts + window]

    starts = np.linspace(0, len(parts[1]) - context - 1, BATCHES * batch_size).astype(int)
    validation = parts[1][starts.reshape(BATCHES, batch_size, 1) + window]
    ratio, options = width / BASE_WIDTH, {}
    if width_multipliers:
        # At the base width the network is the plain one; attention products shrink as 1 / width of a head.
        options = dict(gain=1 / ratio, scale=(heads / BASE_WIDTH) ** 0.5 / ratio)

    def adjust(optimizer: str, tx: optax.GradientTransformation) -> optax.GradientTransformation:
        scale = optax.scale(ratio ** OPTIMIZERS[optimizer].width_power)
        return optax.chain(tx, optax.masked(scale, hidden)) if width_multipliers else tx

    model = functools.partial(GPT, text.vocabulary, context, width, depth, heads, **options)
    return Problem(name, lambda rngs: model(rngs=rngs), loss, draw, parts[0], validation, adjust)


def hidden(params: Any) -> Any:
    """Which parameters are matrices between two layers of the network's width."""
    named = lambda path, p: "blocks" in jax.tree_util.keystr(path) and p.ndim > 1  # noqa: E731
    return jax.tree_util.tree_map_with_path(named, params)


def main(argv: Sequence[str] | None = None) -> int:
    """Tunes, trains and draws; returns the exit code."""
    examples = ("--text my.txt --width 128", "--text sums --steps 200 --seeds 1")
    parser = study.parser("gpt", __doc__, steps=1000, batch_size=16, examples=examples)
    parser.add_argument("--text", default="", help="a file, or a name such as shakespeare or sums")
    for option, value in (("width", 64), ("depth", 2), ("heads", 4), ("context", 64)):
        parser.add_argument(f"--{option}", type=study.count, default=value, help=f"default {value}")

    def make(args: Any) -> tuple[Problem, str]:
        text = text_of(args.text)
        sizes = {key: getattr(args, key) for key in ("width", "depth", "heads", "context", "batch_size")}
        return problem(text, **sizes), f"{len(text.tokens)} characters of {text.name}"

    return study.command(parser, make, argv)


if __name__ == "__main__":
    sys.exit(main())
