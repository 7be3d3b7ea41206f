"""The adafactor MLP, also known as small_fc_lopt, a second time (OPTIMIZERS section 8)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from celo_nnx.interfaces import Array, PyTree
from celo_nnx.naive_zoo import tensors
from celo_nnx.naive_zoo.tensors import GROUPS, Axes, Decays, largest_axes, named_leaves
from celo_nnx.naive_zoo.trackers import tanh_time

FEATURES = tuple(name for name in GROUPS if name not in ("clipped_gradient", "gradient_rms"))


@dataclasses.dataclass(frozen=True, eq=False)
class NaiveAdafacMLP:
    """An MLP over elements whose accumulators' decays are learned; fulfils ``interfaces.Optimizer``.

    Attributes:
      theta: ``{"accumulators": {bank: {"offset": [k]}}, "update_rule": {...}}``.
      momentum, rms, factored: decays at offset 0.
      exp_mult, step_mult: of equation G5.
      factored_axes: ``(path, shape) -> (d1, d0) or None`` (below rank 2).
    """

    theta: PyTree
    momentum: tuple[float, ...] = (0.9, 0.99, 0.999)
    rms: tuple[float, ...] = (0.999,)
    factored: tuple[float, ...] = (0.9, 0.99, 0.999)
    exp_mult: float = 0.001
    step_mult: float = 0.001
    factored_axes: Callable[[str, tuple[int, ...]], Axes] = largest_axes

    def with_theta(self, theta: PyTree) -> NaiveAdafacMLP:
        """Returns the same optimizer with other meta-parameters."""
        return dataclasses.replace(self, theta=theta)

    def init(self, params: PyTree, num_steps: Array | int) -> PyTree:
        """Returns zeros and a counter; ``num_steps`` plays no part."""
        start = {"momentum": self.momentum, "rms": self.rms, "factored": self.factored}
        return {
            "count": jnp.zeros((), jnp.int32),
            "tensors": [
                tensors.zero_accumulators(p.shape, start, self.factored_axes(path, p.shape))
                for path, p in named_leaves(params)[0]
            ],
        }

    def update(self, grads: PyTree, state: PyTree, params: PyTree, *, value: Array) -> tuple[PyTree, PyTree]:
        """Returns (updates to add, next state), equations G1 to G5; the loss plays no part."""
        leaves, treedef = named_leaves(params)
        decays, time = self._decays(), tanh_time(state["count"])
        updates, states = [], []
        for (path, p), g, old in zip(leaves, treedef.flatten_up_to(grads), state["tensors"], strict=True):
            axes = self.factored_axes(path, p.shape)
            new, step = self._tensor(tensors.at_least_1d(p), tensors.at_least_1d(g), old, decays, axes, time)
            updates.append(-step.reshape(p.shape))
            states.append(new)
        return treedef.unflatten(updates), {"count": state["count"] + 1, "tensors": states}

    def _decays(self) -> Decays:
        """Returns 1 - (1 - d) exp(10 offset) in the published float32 form, equation G1."""
        learned = self.theta["accumulators"]

        def decay(start: tuple[float, ...], name: str) -> Array:
            logarithm = jnp.log(1.0 - np.asarray(start, np.float32)) / 10.0
            return 1.0 - jnp.exp(10.0 * (logarithm + learned[name]["offset"]))

        return {
            "momentum": decay(self.momentum, "momentum"),
            "rms": decay(self.rms, "second_moment"),
            "factored": decay(self.factored, "factored"),
        }

    def _tensor(
        self, p: Array, g: Array, old: dict[str, Any], decays: Decays, axes: Axes, time: Array
    ) -> tuple[dict[str, Any], Array]:
        """Returns a tensor's new accumulators and its step, G2 to G5."""
        new, fac_g = tensors.accumulate(old, g, decays, axes)
        m, v = new["m"], new["factored"]
        features = tensors.elementwise_features(p, g, m, new["rms"], 1e-6) | {"factored_gradient": fac_g}
        if axes is None:
            features |= tensors.diagonal_features(m, v, 1e-6)
        else:
            features |= tensors.factored_features(m, v, axes)
        x = jnp.concatenate([features[name] for name in FEATURES], axis=-1)
        x = tensors.normalized(x, 1e-5, tensors.all_axes(x))
        time = jnp.broadcast_to(time, (*p.shape, time.size))
        x = jnp.concatenate([x, time], axis=-1)
        o = tensors.mlp(self.theta["update_rule"], (*FEATURES, "time_tanh"), x)
        return new, o[..., 0] * jnp.exp(self.exp_mult * o[..., 1]) * self.step_mult
