"""The plain twin: Celo2 a second time, as published code works, without tricks.

It shares no code with ``celo_nnx.components`` and ``celo_nnx.optimizer``: tests compare the two, and
``bench --peer naive`` measures against it. Features of a tensor are stacked to ``[*S, 30]`` and go through
the MLP by matrix products. :mod:`celo_nnx.naive_meta` is the meta-training loop in the same manner.

Sources: OPTIMIZERS sections 1, 4 and 5; the equation numbers are theirs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from celo_nnx.errors import unknown
from celo_nnx.interfaces import Array, Family, PyTree

if TYPE_CHECKING:
    from celo_nnx.naive_meta import NaiveTrainer

GROUPS = (
    "gradient",
    "clipped_gradient",
    "parameter",
    "momentum",
    "second_moment",
    "momentum_rms",
    "rsqrt_second_moment",
    "factored_gradient",
    "gradient_rms",
    "row",
    "column",
    "rsqrt_row",
    "rsqrt_column",
    "factored_momentum",
)
"""The feature groups in slot order (OPTIMIZERS section 1.6)."""


def everything_learned(path: str, shape: tuple[int, ...]) -> str:
    """The route of Celo2-base: no tensor goes to Adam."""
    return "learned"


def largest_axes(path: str, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Returns axes (d1, d0), the second largest and the largest, by a stable sort (OPTIMIZERS 1.4)."""
    if len(shape) < 2:
        return None
    order = sorted(range(len(shape)), key=lambda axis: shape[axis])
    return order[-2], order[-1]


@dataclasses.dataclass(frozen=True)
class Switches:
    """The options of the published class that its factory leaves alone (table of OPTIMIZERS section 4)."""

    activation: str = "relu"
    exp_mult: float = 0.0
    rmsmult: float = 1.0
    param_scale_mult: bool = False
    aggregate_mag: bool = False
    bias_correction: bool = False
    precondition_output: bool = False
    normalize_input: bool = True
    normalize_output: bool = True
    ns_coeffs: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    ns_iters: int = 5
    ns_eps: float = 1e-8
    adam_bias_correction: bool = False
    groups: tuple[str, ...] = GROUPS


def newton_schulz(x: Array, coeffs: tuple[float, float, float], steps: int, eps: float) -> Array:
    """Orthogonalizes the last two axes, batched over the rest: equations S1 to S4.

    Args:
      x: ``[..., n, m]``.
      coeffs: the polynomial's coefficients (c0, c1, c2).
      steps: iterations.
      eps: added to the Frobenius norm.

    Returns:
      ``[..., n, m]`` with singular values near 1.
    """
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if tall else x
    x = x / (jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True)) + eps)
    c0, c1, c2 = coeffs
    for _ in range(steps):
        a = jnp.matmul(x, jnp.swapaxes(x, -1, -2), precision="highest")
        b = c1 * a + c2 * jnp.matmul(a, a, precision="highest")
        x = c0 * x + jnp.matmul(b, x, precision="highest")
    return jnp.swapaxes(x, -1, -2) if tall else x


def _rs(x: Array) -> Array:
    return 1.0 / jnp.sqrt(x)


def _srs(x: Array) -> Array:
    return 1.0 / jnp.sqrt(jnp.maximum(x, 1e-9))


def _over(vector: Any, like: Array) -> Array:
    """Gives a bank's vector ``[k]`` the rank of ``like``, whose last axis is the bank's."""
    return jnp.reshape(jnp.asarray(vector, jnp.float32), (1,) * (like.ndim - 1) + (-1,))


def _matrix_axes(rank: int) -> tuple[int, ...]:
    """The last two tensor axes of an array with a trailing bank axis, or the only one."""
    return (0,) if rank == 1 else (rank - 2, rank - 1)


def factored_statistics(v: dict[str, Array], axes: tuple[int, int]) -> tuple[Array, Array]:
    """Returns R and C of equation A1, each with size 1 where it is constant: ``[*S, k]`` broadcastable."""
    d1, d0 = axes
    row = jnp.expand_dims(v["row"], d0)
    column = jnp.expand_dims(v["column"], d1)
    mean = jnp.mean(row, axis=d1, keepdims=True)
    return _srs(row / (mean + 1e-9)), _srs(column)


def accumulate_factored(
    v: dict[str, Array], g: Array, decays: tuple[float, ...], axes: tuple[int, int] | None
) -> dict[str, Array]:
    """Updates the factored second moment (OPTIMIZERS 1.5); ``g: [*S]``, bank axis last in the state."""
    q = g * g + 1e-30

    def mix(old: Array, new: Array) -> Array:
        d = jnp.clip(_over(decays, old), 0.0, 1.0)
        return d * old + (1.0 - d) * new[..., None]

    if axes is None:
        return {"diagonal": mix(v["diagonal"], q)}
    return {"row": mix(v["row"], q.mean(axis=axes[1])), "column": mix(v["column"], q.mean(axis=axes[0]))}


def _leaves(tree: PyTree) -> tuple[list[tuple[str, Array]], Any]:
    """Returns the leaves with their paths, keys joined by ``/``."""
    leaves, treedef = jax.tree.flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves], treedef


@dataclasses.dataclass(frozen=True, eq=False)
class NaiveCelo2:
    """Celo2 and Celo2-base, tensor by tensor; fulfils :class:`celo_nnx.interfaces.Optimizer`.

    Attributes:
      theta: ``{"update_rule": {"w0": {group: [width, H]}, "b0": [H], "w1": [H, H], ...}}``.
      orthogonalize: Newton-Schulz on the step of tensors of rank 2 and more.
      learning_rate: eta of equation E8.
      weight_decay: decoupled, times the learning rate of the tensor's route.
      adam_multiplier: what Adam's learning rate is times eta.
      b1, b2, eps: of the Adam route; eps is inside the root.
      momentum, rms, factored: decays of the three accumulator banks.
      route: ``(path, shape) -> "learned" | "adam"``.
      factored_axes: ``(path, shape) -> (d1, d0) or None`` (below rank 2).
      switches: options that the published factory leaves alone.
    """

    theta: PyTree
    orthogonalize: bool = True
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    adam_multiplier: float = 20.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    momentum: tuple[float, ...] = (0.9, 0.99, 0.999)
    rms: tuple[float, ...] = (0.95,)
    factored: tuple[float, ...] = (0.9, 0.99, 0.999)
    route: Callable[[str, tuple[int, ...]], str] = everything_learned
    factored_axes: Callable[[str, tuple[int, ...]], tuple[int, int] | None] = largest_axes
    switches: Switches = Switches()

    def with_theta(self, theta: PyTree) -> NaiveCelo2:
        """Returns the same optimizer with other meta-parameters."""
        return dataclasses.replace(self, theta=theta)

    def init(self, params: PyTree, num_steps: Array | int) -> PyTree:
        """Returns zeros and a counter; ``num_steps`` plays no part."""
        leaves, _ = _leaves(params)
        return {"count": jnp.zeros((), jnp.int32), "tensors": [self._zeros(*leaf) for leaf in leaves]}

    def update(self, grads: PyTree, state: PyTree, params: PyTree, *, value: Array) -> tuple[PyTree, PyTree]:
        """Returns (updates to add, next state), equations E1 to E8 and F1 to F4; the loss plays no part."""
        leaves, treedef = _leaves(params)
        updates, tensors = [], []
        for (path, p), g, old in zip(leaves, treedef.flatten_up_to(grads), state["tensors"], strict=True):
            if self.route(path, p.shape) == "adam":
                step, new = self._adam(g, old, state["count"])
                rate = np.float32(self.learning_rate) * np.float32(self.adam_multiplier)
            else:
                step, new = self._celo2(path, p, g, old, state["count"])
                rate = np.float32(self.learning_rate)
            updates.append(-(rate * step) - np.float32(self.weight_decay) * p * rate)
            tensors.append(new)
        return treedef.unflatten(updates), {"count": state["count"] + 1, "tensors": tensors}

    def _zeros(self, path: str, p: Array) -> dict[str, Any]:
        if self.route(path, p.shape) == "adam":
            return {"m": jnp.zeros(p.shape, jnp.float32), "v": jnp.zeros(p.shape, jnp.float32)}
        shape, axes = p.shape or (1,), self.factored_axes(path, p.shape)
        bank = (len(self.factored),)
        if axes is None:
            v = {"diagonal": jnp.zeros(shape + bank, jnp.float32)}
        else:
            without = [tuple(s for i, s in enumerate(shape) if i != d) for d in axes]
            v = {"row": jnp.zeros(without[1] + bank), "column": jnp.zeros(without[0] + bank)}
        return {
            "m": jnp.zeros(shape + (len(self.momentum),), jnp.float32),
            "rms": jnp.zeros(shape + (len(self.rms),), jnp.float32),
            "factored": v,
        }

    def _adam(self, g: Array, old: dict[str, Array], count: Array) -> tuple[Array, dict[str, Array]]:
        b1, b2 = np.float32(self.b1), np.float32(self.b2)
        m = b1 * old["m"] + (1 - b1) * g
        v = b2 * old["v"] + (1 - b2) * g * g
        new = {"m": m, "v": v}
        if self.switches.adam_bias_correction:
            s = (count + 1).astype(jnp.float32)
            m, v = m / (1 - b1**s), v / (1 - b2**s)
        return m * _rs(v + self.eps), new

    def _celo2(self, path: str, p: Array, g: Array, old: dict, count: Array) -> tuple[Array, dict[str, Any]]:
        options, shape = self.switches, p.shape
        axes = self.factored_axes(path, shape)
        p, g = (p.reshape(1), g.reshape(1)) if shape == () else (p, g)
        g = jnp.clip(g, -1000.0, 1000.0)
        new, fac_g = self._accumulate(g, old, axes)
        used = self._corrected(new, count) if options.bias_correction else new
        y, u = self._mlp(self._features(p, g, used, fac_g, axes))
        if options.aggregate_mag:
            u = jnp.mean(u)
        y = y * jnp.exp(options.exp_mult * u)
        if options.param_scale_mult:
            y = y * jnp.sqrt(jnp.mean(p * p) + 1e-9)
        if self.orthogonalize and p.ndim >= 2:
            y = newton_schulz(y, options.ns_coeffs, options.ns_iters, options.ns_eps)
        if options.normalize_output:
            y = y * _rs(1e-9 + jnp.mean(y * y, axis=_matrix_axes(p.ndim), keepdims=True))
        y = options.rmsmult * y
        if options.precondition_output:
            y = y * _rs(used["rms"][..., -1] + 1e-6)
        return y.reshape(shape), new

    def _accumulate(self, g: Array, old: dict, axes: tuple[int, int] | None) -> tuple[dict[str, Any], Array]:
        """Returns the new accumulators and the preconditioned gradient of equations A1 and A2."""
        v = accumulate_factored(old["factored"], g, self.factored, axes)
        g = g[..., None]
        d, c = _over(self.momentum, g), jnp.clip(_over(self.rms, g), 0.0, 1.0)
        new = {"m": d * old["m"] + (1 - d) * g, "rms": c * old["rms"] + (1 - c) * g * g, "factored": v}
        if axes is None:
            return new, g * _srs(v["diagonal"] + 1e-9)
        row, column = factored_statistics(v, axes)
        return new, g * row * column

    def _corrected(self, new: dict[str, Any], count: Array) -> dict[str, Any]:
        s = (count + 1).astype(jnp.float32)

        def correct(x: Array, decays: tuple[float, ...]) -> Array:
            return x / (1 - _over(decays, x) ** s)

        factored = {
            k: x if k == "diagonal" else correct(x, self.factored) for k, x in new["factored"].items()
        }
        return {
            "m": correct(new["m"], self.momentum),
            "rms": correct(new["rms"], self.rms),
            "factored": factored,
        }

    def _features(self, p: Array, g: Array, acc: dict, fac_g: Array, axes: tuple[int, int] | None) -> dict:
        """Returns the groups of slots 0 to 8, and 9 to 13 where the tensor is factored: ``[*S, width]``."""
        m, rms, g1 = acc["m"], acc["rms"], g[..., None]
        r = _rs(rms + 1e-8)
        groups = {
            "gradient": g1,
            "clipped_gradient": jnp.clip(g1, -0.1, 0.1),
            "parameter": p[..., None],
            "momentum": m,
            "second_moment": rms,
            "momentum_rms": m * r,
            "rsqrt_second_moment": r,
            "factored_gradient": fac_g,
            "gradient_rms": g1 * r,
        }
        if axes is not None:
            v, whole = acc["factored"], g.shape + (len(self.factored),)
            row = jnp.broadcast_to(jnp.expand_dims(v["row"], axes[1]), whole)
            column = jnp.broadcast_to(jnp.expand_dims(v["column"], axes[0]), whole)
            r_factor, c_factor = factored_statistics(v, axes)
            groups |= {
                "row": row,
                "column": column,
                "rsqrt_row": _rs(row + 1e-8),
                "rsqrt_column": _rs(column + 1e-8),
                "factored_momentum": m * r_factor * c_factor,
            }
        return {name: groups[name] for name in self.switches.groups if name in groups}

    def _mlp(self, groups: dict[str, Array]) -> tuple[Array, Array]:
        """Stacks, normalizes (OPTIMIZERS 1.7) and applies the MLP (M1 to M3); returns a and u: ``[*S]``."""
        weights = self.theta["update_rule"]
        x = jnp.concatenate(list(groups.values()), axis=-1)
        if self.switches.normalize_input:
            mean_square = jnp.mean(x * x, axis=_matrix_axes(x.ndim - 1), keepdims=True)
            x = x * _rs(1e-9 + mean_square)
        activation = {"relu": jax.nn.relu, "tanh": jnp.tanh}[self.switches.activation]
        first = jnp.concatenate([weights["w0"][name] for name in groups], axis=0)
        h = jnp.matmul(x, first, precision="highest")
        h = h + _over(weights["b0"], h)
        for layer in range(1, sum(name.startswith("w") for name in weights)):
            h = jnp.matmul(activation(h), weights[f"w{layer}"], precision="highest")
            h = h + _over(weights[f"b{layer}"], h)
        return h[..., 0], h[..., 1]


def from_config(config: ConfigDict) -> NaiveCelo2:
    """Returns the twin of a config's section ``optimizer``, without theta; for the presets of Celo2.

    Only what the presets differ in is read: decays, orthogonalization, routing, rates.

    Raises:
      UserError: a routing or an orthogonalization that the twin does not have.
    """
    routing, adam = config.routing, config.routes.get("adam", {})
    names = ("multiplier", "b1", "b2", "eps")
    known = {("adam_multiplier" if n == "multiplier" else n): adam[n] for n in names if n in adam}

    def by_pattern(path: str, shape: tuple[int, ...]) -> str:
        return "adam" if re.search(routing.get("pattern", "/b$"), path) else "learned"

    def by_rank(path: str, shape: tuple[int, ...]) -> str:
        # Biases, scales and embeddings by rank: enough for the tasks that meta-training has.
        return "adam" if len(shape) < 2 else "learned"

    routes = {"single": everything_learned, "regex": by_pattern, "celo2": by_rank}
    if routing.kind not in routes:
        raise unknown("routing of the plain twin", routing.kind, routes)
    if config.orthogonalization.kind not in ("newton_schulz", "identity"):
        kind = config.orthogonalization.kind
        raise unknown("orthogonalization of the plain twin", kind, ("newton_schulz", "identity"))
    return NaiveCelo2(
        None,
        orthogonalize=config.orthogonalization.kind != "identity",
        learning_rate=config.schedule.get("value", 1e-3),
        weight_decay=config.weight_decay,
        momentum=tuple(config.accumulators.momentum.decays),
        rms=tuple(config.accumulators.second_moment.decays),
        factored=tuple(config.accumulators.factored.decays),
        route=routes[routing.kind],
        **known,
    )


def naive_trainer(
    config: ConfigDict, families: list[Family], theta: PyTree, optimizer: NaiveCelo2 | None = None
) -> NaiveTrainer:
    """Returns the published loop for a config: ``.init(key)`` makes a state, a call does one iteration."""
    from celo_nnx.naive_meta import NaiveTrainer  # which imports this module

    return NaiveTrainer(config, families, theta, optimizer)
