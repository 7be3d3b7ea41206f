"""What the learned schedules share: dense layers and the LSTM cell; rows are tensors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from celo_nnx.errors import MOST_WIDTH, is_width, require
from celo_nnx.interfaces import MetaParam, Schedule

Array = jax.Array


class Dense(nnx.Module):
    """``x W + b``, ``W ~ TN(1/sqrt(in))`` cut at two deviations, ``b = 0`` (OPTIMIZERS 1.3).

    Args:
      inputs, outputs: sizes.
      key: draws the start.
      zero: start from zeros instead.
    """

    def __init__(self, inputs: int, outputs: int, key: Array, zero: bool = False) -> None:
        drawn = jax.random.truncated_normal(key, -2.0, 2.0, (inputs, outputs), jnp.float32)
        self.w = MetaParam(jnp.zeros_like(drawn) if zero else drawn / jnp.sqrt(jnp.float32(inputs)))
        self.b = MetaParam(jnp.zeros((outputs,), jnp.float32))

    def __call__(self, x: Array) -> Array:
        return jnp.matmul(x, self.w[...], precision="highest") + self.b[...]


class Recurrent(Schedule):
    """A schedule around an LSTM cell with gates i, g, f, o and a learned initial state (OPTIMIZERS 1.9).

    Args:
      inputs: width of what goes into the cell.
      hidden: units, at least 1.
      key: draws the start.
    """

    accumulators = "new"

    def __init__(self, inputs: int, hidden: int, key: Array) -> None:
        require(is_width(hidden), "hidden", hidden, f"an integer from 1 to {MOST_WIDTH}")
        require(inputs >= 1, "optimizer.rows", inputs, "at least one feature for a learned schedule")
        self.hidden = hidden
        self.lstm = Dense(inputs + hidden, 4 * hidden, key)
        self.initial = nnx.Dict(
            {name: MetaParam(jnp.zeros((1, hidden), jnp.float32)) for name in ("hidden", "cell")}
        )

    def init(self, rows: int) -> dict[str, Array]:
        return {name: jnp.broadcast_to(x[...], (rows, self.hidden)) for name, x in self.initial.items()}

    def cell(self, x: Array, state: dict[str, Array]) -> dict[str, Array]:
        """Returns the next ``hidden``, which is the output, and ``cell`` (L1 to L3), ``[rows, H]`` each."""
        gates = self.lstm(jnp.concatenate([x, state["hidden"]], -1))
        i, g, f, o = jnp.split(gates, 4, -1)
        cell = jax.nn.sigmoid(f + 1.0) * state["cell"] + jax.nn.sigmoid(i) * jnp.tanh(g)
        return {"hidden": jax.nn.sigmoid(o) * jnp.tanh(cell), "cell": cell}

    def hand_made(self) -> dict[str, Any]:
        return nnx.to_pure_dict(nnx.state(self, MetaParam))
