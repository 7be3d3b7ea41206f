"""NN-Adam a second time (OPTIMIZERS section 9): an LSTM sets Adam's four numbers, tensor by tensor."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from celo_nnx.interfaces import Array, PyTree
from celo_nnx.naive_zoo.recurrent import dense, initial_state, lstm
from celo_nnx.naive_zoo.tensors import named_leaves
from celo_nnx.naive_zoo.trackers import clipped_log

HEADS = ("lr", "b1", "b2", "eps")
"""The four numbers, in the order of the heads' outputs."""


def natural(name: str, y: Array) -> Array:
    """Returns a number from its stored form."""
    if name in ("b1", "b2"):
        return 1.0 - jnp.exp(jnp.clip(10.0 * y, -10.0, 0.0))
    return jnp.clip(jnp.exp(10.0 * y), *((1e-8, 1e3) if name == "lr" else (1e-11, 1e4)))


def stored(name: str, x: Array) -> Array:
    """Returns the stored form of a number."""
    return 0.1 * jnp.log(1.0 - x if name in ("b1", "b2") else x)


@dataclasses.dataclass(frozen=True, eq=False)
class NaiveNNAdam:
    """NN-Adam, tensor by tensor; fulfils :class:`celo_nnx.interfaces.Optimizer`.

    Attributes:
      theta: ``{"schedule": {"initial", "lstm", "heads", "lr": [], "b1": [], "b2": [], "eps": []}}``.
      output_scale: of the heads.
      decay_strength: how far each number returns to theta's in an update.
    """

    theta: PyTree
    output_scale: float = 0.01
    decay_strength: float = 0.0

    def with_theta(self, theta: PyTree) -> NaiveNNAdam:
        """Returns the same optimizer with other meta-parameters."""
        return dataclasses.replace(self, theta=theta)

    def init(self, params: PyTree, num_steps: Array | int) -> PyTree:
        """Returns zero moments and every tensor's numbers from theta; ``num_steps`` plays no part."""
        leaves, _ = named_leaves(params)
        schedule, rows = self.theta["schedule"], len(leaves)
        return {
            "count": jnp.zeros((), jnp.int32),
            "tensors": [{name: jnp.zeros(p.shape, jnp.float32) for name in ("m", "rms")} for _, p in leaves],
            "numbers": {name: jnp.broadcast_to(schedule[name], (rows,)) for name in HEADS},
            "lstm": initial_state(schedule["initial"], rows),
        }

    def update(self, grads: PyTree, state: PyTree, params: PyTree, *, value: Array) -> tuple[PyTree, PyTree]:
        """Returns (updates to add, next state), equations H1 to H8; the loss plays no part."""
        leaves, treedef = named_leaves(params)
        y = state["numbers"]
        known = {name: natural(name, y[name]) for name in HEADS}  # of the previous update, as published
        steps, moments, rows = [], [], []
        for i, ((_, p), g) in enumerate(zip(leaves, treedef.flatten_up_to(grads), strict=True)):
            old, g = state["tensors"][i], jnp.clip(g, -1000.0, 1000.0)
            lr, b1, b2, eps = (known[name][i] for name in HEADS)
            m = b1 * old["m"] + (1.0 - b1) * g
            rms = b2 * old["rms"] + (1.0 - b2) * g * g
            steps.append(lr * (1.0 + eps) / (eps + jnp.sqrt(rms + 1e-10)) * m)
            moments.append({"m": m, "rms": rms})
            rows.append(_row({name: y[name][i] for name in HEADS}, p, g, m, rms))
        schedule = self.theta["schedule"]
        after = lstm(schedule["lstm"], state["lstm"], jnp.stack(rows))
        delta = self.output_scale * dense(schedule["heads"], after["hidden"])
        numbers = {name: self._next(name, y[name], delta[:, k]) for k, name in enumerate(HEADS)}
        return treedef.unflatten([-step for step in steps]), {
            "count": state["count"] + 1,
            "tensors": moments,
            "numbers": numbers,
            "lstm": after,
        }

    def _next(self, name: str, y: Array, delta: Array) -> Array:
        """Returns the stored numbers of all tensors after this update, H7 and H8."""
        y = y + delta
        y = y - np.float32(self.decay_strength) * (y - self.theta["schedule"][name])
        return stored(name, natural(name, y))


def _row(y: dict[str, Array], p: Array, g: Array, m: Array, rms: Array) -> Array:
    """Returns a tensor's row of the LSTM's input, ``[19]``: H5, keys in sorted order."""

    def log(x: Array) -> Array:
        return 0.5 * clipped_log(x)

    def spread(x: Array) -> Array:
        return log(jnp.mean((x - jnp.mean(x)) ** 2))

    def number(name: str) -> Array:
        return 0.2 * jnp.clip(y[name], -5.0, 5.0)

    return jnp.stack(
        [
            number("b1"),
            number("b2"),
            number("eps"),
            jnp.float32(1.0 if p.ndim == 1 else -1.0),
            jnp.float32(1.0 if p.ndim == 0 else -1.0),
            number("lr"),
            log(jnp.mean(g)),
            jnp.sign(jnp.mean(g)),
            log(jnp.mean(jnp.abs(g))),
            log(jnp.mean(m)),
            jnp.sign(jnp.mean(m)),
            log(jnp.mean(p)),
            jnp.sign(jnp.mean(p)),
            log(jnp.mean(rms)),
            jnp.sign(jnp.mean(rms)),
            spread(g),
            spread(m),
            spread(p),
            spread(rms),
        ]
    )
