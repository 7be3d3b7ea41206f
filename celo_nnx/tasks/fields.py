"""Settings that tasks share: activations, initializations, normalization layers; checks, losses, batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from celo_nnx.errors import is_count, is_name, is_number, require, unknown
from celo_nnx.interfaces import Array

MAX_WIDTH = 65_536


def cut_normal(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Draws a normal of standard deviation ``1/sqrt(fan_in)`` cut at two of them, not rescaled after the cut.

    Source: META_TRAINING section 7.
    """
    normal = jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)
    return normal / math.sqrt(math.prod(shape[:-1]))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
}
# Of kernels [..., fan_in, fan_out]; biases start at zero, scales of normalization layers at one.
INITIALIZATIONS: dict[str, Callable[..., Array]] = {
    "cut_normal": cut_normal,
    "lecun_normal": jax.nn.initializers.lecun_normal(),
    "he_normal": jax.nn.initializers.he_normal(),
    "glorot_uniform": jax.nn.initializers.glorot_uniform(),
    "orthogonal": jax.nn.initializers.orthogonal(),
}


def no_normalization(x: Array) -> Array:
    """Returns its argument: the normalization layer ``none``."""
    return x


def _none(width: int, rngs: nnx.Rngs) -> Callable[[Array], Array]:
    return no_normalization


def _layer(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, rngs=rngs)


def _batch(width: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    # Running statistics of the last ten batches or so: a task's run may last a hundred steps.
    return nnx.BatchNorm(width, momentum=0.9, rngs=rngs)


# name -> (width, rngs) -> layer over the last axis; "batch" also means over all the other axes
NORMALIZATIONS: dict[str, Callable[[int, nnx.Rngs], Any]] = {"none": _none, "layer": _layer, "batch": _batch}


def check_counts(task: Any, *names: str) -> None:
    """Checks that these fields of a task are integers of at least 1."""
    for name in names:
        require(is_count(getattr(task, name)), name, getattr(task, name), "an integer >= 1")


def check_positive(task: Any, *names: str) -> None:
    """Checks that these fields of a task are finite numbers above 0."""
    for name in names:
        value = getattr(task, name)
        require(is_number(value) and value > 0, name, value, "a finite number > 0")


def check_widths(task: Any, name: str, least: int = 1) -> None:
    """Makes a field a tuple, and checks that it holds ``least`` widths or more."""
    value = getattr(task, name)
    value = tuple(value) if isinstance(value, (tuple, list)) else value
    good = isinstance(value, tuple) and all(is_count(n) and n <= MAX_WIDTH for n in value)
    legal = f"a tuple of {least} or more, each an integer from 1 to {MAX_WIDTH}"
    require(good and len(value) >= least, name, value, legal)
    object.__setattr__(task, name, value)


def check_names(task: Any, **tables: Iterable[str]) -> None:
    """Checks that fields of a task are names of their tables."""
    for name, table in tables.items():
        if not is_name(getattr(task, name), tuple(table)):
            raise unknown(name, getattr(task, name), table)


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Returns the mean of ``-ln softmax(logits)[label]``, for logits ``[..., k]`` and labels ``[...]`` int.

    One-hot and not a gather: the gradient of a gather is a scatter, slow on CPU under vmap.

    Example:
      >>> float(cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3])))  # ln 4
      1.386...
    """
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return jnp.mean(optax.softmax_cross_entropy(logits, one_hot))


def clipped(loss: Array, low: float, high: float) -> Array:
    """Returns ``clip(loss, low, high)`` float32, NaN becoming the upper bound."""
    return jnp.where(jnp.isnan(loss), high, jnp.clip(loss, low, high)).astype(jnp.float32)


def pick_examples(key: Array, start: Array | int, count: Array | int, batch_size: int) -> Array:
    """Draws indices with replacement, inside jit.

    Args:
      key: decides the batch.
      start: first example that may be drawn.
      count: how many examples may be drawn, from ``start`` on; at least 1.
      batch_size: examples drawn.

    Returns:
      Indices ``[batch_size]``, int32.
    """
    bits = jax.random.bits(key, (batch_size,), jnp.uint32)
    # The remainder favours small indices by at most count / 2^32, 2e-5 for the largest set here.
    return jnp.asarray(start, jnp.int32) + (bits % jnp.asarray(count, jnp.uint32)).astype(jnp.int32)
