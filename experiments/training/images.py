"""Images for the ConvNet and the ViT: CIFAR-10 where it is found, else the embedded digits."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from celo_nnx.errors import MissingData, require
from celo_nnx.experiments.training import study
from celo_nnx.experiments.training.loop import Problem
from celo_nnx.tasks import data

Array = jax.Array

BATCH = 100  # images of a validation batch
BATCHES = 10  # of validation, at most


def images_of(name: str) -> data.Data:
    """Loads images by name; without one CIFAR-10 where it is found, else digits."""
    if not name:
        try:
            return data.load("cifar10", size=32, grey=False)
        except MissingData:
            name = "digits"
    grey = name in ("digits", "mnist", "fashion_mnist")
    return data.load(name, size=8 if name == "digits" else 28 if grey else 32, grey=grey)


def loss(model: Any, batch: tuple[Array, Array]) -> Array:
    """The mean cross-entropy in nats; images ``[n, size, size, colors]`` in [0, 1], classes ``[n]``."""
    images, classes = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(2 * images - 1), classes).mean()


def problem(
    name: str, images: data.Data, batch_size: int, new_model: Callable[[int, int, int, nnx.Rngs], nnx.Module]
) -> Problem:
    """Classification; the last tenth of the training images, 1,000 at most, is for validation.

    Args:
      name: of the problem.
      images: what :func:`images_of` returns.
      batch_size: images a step.
      new_model: ``(size, colors, classes, rngs)`` -> the network, ``[n, size, size, colors]`` to logits.
    """
    count, pixels = images.train_x.shape
    colors = 1 if round(pixels**0.5) ** 2 == pixels else 3
    size = round((pixels / colors) ** 0.5)
    batches = min(BATCHES, count // 10 // BATCH)
    require(batches >= 1, f"images of {images.name}", count, f"at least {10 * BATCH}")
    cut = count - batches * BATCH
    x, y = images.train_x.reshape(count, size, size, colors), images.train_y
    train = jnp.asarray(x[:cut]), jnp.asarray(y[:cut])
    split = lambda held: jnp.asarray(held[cut:].reshape(batches, BATCH, *held.shape[1:]))  # noqa: E731
    validation = split(x), split(y)

    def draw(key: Array, train: tuple[Array, Array]) -> tuple[Array, Array]:
        at = jax.random.randint(key, (batch_size,), 0, cut)
        return train[0][at], train[1][at]

    model = lambda rngs: new_model(size, colors, images.classes, rngs)  # noqa: E731
    return Problem(name, model, loss, draw, train, validation)


def command(
    name: str,
    about: str | None,
    new_model: Callable[[int, int, int, nnx.Rngs], nnx.Module],
    argv: Sequence[str] | None,
) -> int:
    """Tunes, trains and draws; returns the exit code."""
    examples = ("--data mnist", "--data digits --steps 200 --seeds 1")
    parser = study.parser(name, about, steps=500, batch_size=64, examples=examples)
    parser.add_argument("--data", default="", help="such as cifar10, digits or a NAME.npz in CELO_NNX_DATA")

    def make(args: argparse.Namespace) -> tuple[Problem, str]:
        images = images_of(args.data)
        made = problem(name, images, args.batch_size, new_model)
        return made, f"{len(images.train_x)} images of {images.name}"

    return study.command(parser, make, argv)
