"""VeLO a second time (OPTIMIZERS section 6): per-tensor rows, raw heads, the rest as Celo."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from celo_nnx.interfaces import Array, PyTree
from celo_nnx.naive_zoo.celo import Leaves, NaiveCelo
from celo_nnx.naive_zoo.recurrent import dense
from celo_nnx.naive_zoo.tensors import rs
from celo_nnx.naive_zoo.trackers import clipped_log, init_loss_buffer


@dataclasses.dataclass(frozen=True, eq=False)
class NaiveVelo(NaiveCelo):
    """VeLO, tensor by tensor.

    Attributes:
      ff_mult: scales every weight of the mixed MLPs.
      keep_lstm_state: the published flag ``use_bugged_next_lstm_state``: the state is never replaced.
      short_loss_buffer: the published flag ``use_bugged_loss_features``: a buffer for 10 steps.
    """

    ff_mult: float = 1.0
    keep_lstm_state: bool = False
    short_loss_buffer: bool = False

    def loss_buffer(self, num_steps: Array | int) -> dict[str, Array]:
        """Returns the loss buffer at the start."""
        return init_loss_buffer(10 if self.short_loss_buffer else num_steps)

    def own_features(self, leaves: Leaves, states: list[dict]) -> list[list[Array]]:
        """Returns equations V1 to V3 for every tensor, of the accumulators before this update."""
        return [row_statistics(p, old["m"], old["rms"]) for (_, p), old in zip(leaves, states, strict=True)]

    def heads(self, hidden: Array) -> tuple[Array, Array]:
        """Returns raw controls ``[tensors, K]`` and raw rates ``[tensors]``, equation V4."""
        schedule = self.theta["schedule"]
        return dense(schedule["controls"], hidden), dense(schedule["step"], hidden)[:, 0]

    def stored(self, before: PyTree, after: PyTree) -> PyTree:
        """Returns which LSTM state is kept, equation V5."""
        return before if self.keep_lstm_state else after

    def mixed_weights(self, control: Array) -> dict[str, Any]:
        """Returns a tensor's MLP, equation V6."""
        return jax.tree.map(lambda w: np.float32(self.ff_mult) * w, super().mixed_weights(control))


def row_statistics(p: Array, m: Array, rms: Array) -> list[Array]:
    """Returns mean_rms ``[K_r]``, rank ``[5]``, var_m ``[K_m]`` and var_rms of a tensor."""
    axes = tuple(range(m.ndim - 1))
    z = rs(jnp.maximum(1e-9, jnp.mean(p * p)))
    m, rms = z * m, z * rms
    mean = jnp.mean(m, axis=axes, keepdims=True)
    var_m = jnp.mean((m - mean) ** 2, axis=axes)
    var_rms = jnp.mean((rms - mean) ** 2, axis=axes)  # around the mean of the momentum, as published
    rank = np.arange(5) == sum(size > 1 for size in p.shape)
    logs = (0.5 * clipped_log(10.0 * x) for x in (jnp.mean(rms, axis=axes), var_m, var_rms))
    mean_rms, var_m, var_rms = logs
    return [mean_rms, jnp.asarray(rank, jnp.float32), var_m, var_rms]
