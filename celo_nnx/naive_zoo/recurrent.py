"""The LSTM over tensors that the twins' schedules share (OPTIMIZERS sections 1.9 and 2, C4)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from celo_nnx.interfaces import Array


def dense(weights: dict[str, Array], x: Array) -> Array:
    """Returns x w + b: ``[rows, in]`` to ``[rows, out]``."""
    return jnp.matmul(x, weights["w"], precision="highest") + weights["b"][None, :]


def initial_state(start: dict[str, Array], rows: int) -> dict[str, Array]:
    """Repeats the learned initial ``hidden`` and ``cell``, each ``[1, H]``, for every tensor."""
    return {name: jnp.repeat(x, rows, axis=0) for name, x in start.items()}


def lstm(weights: dict[str, Array], state: dict[str, Array], x: Array) -> dict[str, Array]:
    """Returns the next state, equations L1 to L3; its ``hidden`` is the output.

    Args:
      weights: ``w: [in + H, 4H]``, ``b: [4H]``, blocks in the order input, candidate, forget, output.
      state: ``hidden`` and ``cell``, each ``[rows, H]``.
      x: ``[rows, in]``.
    """
    i, g, f, o = jnp.split(dense(weights, jnp.concatenate([x, state["hidden"]], axis=-1)), 4, axis=-1)
    cell = jax.nn.sigmoid(f + 1.0) * state["cell"] + jax.nn.sigmoid(i) * jnp.tanh(g)
    return {"hidden": jax.nn.sigmoid(o) * jnp.tanh(cell), "cell": cell}


def mix(weights: dict[str, Any], x: Array) -> Array:
    """Adds what is largest over tensors to every row, equation C4: ``[rows, F]`` to ``[rows, H]``.

    The published code computes a layer ``dead`` as well and never uses it.
    """
    largest = jnp.max(jax.nn.relu(dense(weights["max"], x)), axis=0, keepdims=True)
    return dense(weights["skip"], x) + largest
