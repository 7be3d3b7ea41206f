"""The plain twin: Celo2 a second time, as published code works, without tricks.

It shares no code with ``celo_nnx.components`` and ``celo_nnx.optimizer``: tests compare the two, and
``bench --peer naive`` measures against it. Features of a tensor are stacked to ``[*S, 30]`` and go through
the MLP by matrix products. :mod:`celo_nnx.naive_zoo` has the other published optimizers and what they share
with this one; :mod:`celo_nnx.naive_meta` is the meta-training loop in the same manner.

Sources: OPTIMIZERS sections 1, 4 and 5; the equation numbers are theirs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from celo_nnx.errors import unknown
from celo_nnx.interfaces import Array, Family, Optimizer, PyTree
from celo_nnx.naive_zoo import tensors
from celo_nnx.naive_zoo.tensors import GROUPS, Axes, largest_axes, named_leaves, over, rs

if TYPE_CHECKING:
    from celo_nnx.naive_meta import NaiveTrainer


def everything_learned(path: str, shape: tuple[int, ...]) -> str:
    """The route of Celo2-base: no tensor goes to Adam."""
    return "learned"


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


def _matrix_axes(rank: int) -> tuple[int, ...]:
    """The last two tensor axes of an array with a trailing bank axis, or the only one."""
    return (0,) if rank == 1 else (rank - 2, rank - 1)


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
    factored_axes: Callable[[str, tuple[int, ...]], Axes] = largest_axes
    switches: Switches = Switches()

    def with_theta(self, theta: PyTree) -> NaiveCelo2:
        """Returns the same optimizer with other meta-parameters."""
        return dataclasses.replace(self, theta=theta)

    def init(self, params: PyTree, num_steps: Array | int) -> PyTree:
        """Returns zeros and a counter; ``num_steps`` plays no part."""
        leaves, _ = named_leaves(params)
        return {"count": jnp.zeros((), jnp.int32), "tensors": [self._zeros(*leaf) for leaf in leaves]}

    def update(self, grads: PyTree, state: PyTree, params: PyTree, *, value: Array) -> tuple[PyTree, PyTree]:
        """Returns (updates to add, next state), equations E1 to E8 and F1 to F4; the loss plays no part."""
        leaves, treedef = named_leaves(params)
        updates, states = [], []
        for (path, p), g, old in zip(leaves, treedef.flatten_up_to(grads), state["tensors"], strict=True):
            if self.route(path, p.shape) == "adam":
                step, new = self._adam(g, old, state["count"])
                rate = np.float32(self.learning_rate) * np.float32(self.adam_multiplier)
            else:
                step, new = self._celo2(path, p, g, old, state["count"])
                rate = np.float32(self.learning_rate)
            updates.append(-(rate * step) - np.float32(self.weight_decay) * p * rate)
            states.append(new)
        return treedef.unflatten(updates), {"count": state["count"] + 1, "tensors": states}

    @property
    def _decays(self) -> tensors.Decays:
        return {"momentum": self.momentum, "rms": self.rms, "factored": self.factored}

    def _zeros(self, path: str, p: Array) -> dict[str, Any]:
        if self.route(path, p.shape) == "adam":
            return {"m": jnp.zeros(p.shape, jnp.float32), "v": jnp.zeros(p.shape, jnp.float32)}
        return tensors.zero_accumulators(p.shape, self._decays, self.factored_axes(path, p.shape))

    def _adam(self, g: Array, old: dict[str, Array], count: Array) -> tuple[Array, dict[str, Array]]:
        b1, b2 = np.float32(self.b1), np.float32(self.b2)
        m = b1 * old["m"] + (1 - b1) * g
        v = b2 * old["v"] + (1 - b2) * g * g
        new = {"m": m, "v": v}
        if self.switches.adam_bias_correction:
            s = (count + 1).astype(jnp.float32)
            m, v = m / (1 - b1**s), v / (1 - b2**s)
        return m * rs(v + self.eps), new

    def _celo2(self, path: str, p: Array, g: Array, old: dict, count: Array) -> tuple[Array, dict[str, Any]]:
        options, shape = self.switches, p.shape
        axes = self.factored_axes(path, shape)
        p, g = tensors.at_least_1d(p), jnp.clip(tensors.at_least_1d(g), -1000.0, 1000.0)
        new, fac_g = tensors.accumulate(old, g, self._decays, axes)
        used = self._corrected(new, count) if options.bias_correction else new
        features = tensors.elementwise_features(p, g, used["m"], used["rms"], 1e-8)
        features["factored_gradient"] = fac_g
        if axes is not None:
            features |= tensors.factored_features(used["m"], used["factored"], axes)
        groups = tuple(name for name in options.groups if name in features)
        x = jnp.concatenate([features[name] for name in groups], axis=-1)
        if options.normalize_input:
            x = tensors.normalized(x, 1e-9, _matrix_axes(x.ndim - 1))
        o = tensors.mlp(self.theta["update_rule"], groups, x, options.activation)
        y, u = o[..., 0], o[..., 1]
        if options.aggregate_mag:
            u = jnp.mean(u)
        y = y * jnp.exp(options.exp_mult * u)
        if options.param_scale_mult:
            y = y * jnp.sqrt(jnp.mean(p * p) + 1e-9)
        if self.orthogonalize and p.ndim >= 2:
            y = newton_schulz(y, options.ns_coeffs, options.ns_iters, options.ns_eps)
        if options.normalize_output:
            y = y * rs(1e-9 + jnp.mean(y * y, axis=_matrix_axes(p.ndim), keepdims=True))
        y = options.rmsmult * y
        if options.precondition_output:
            y = y * rs(used["rms"][..., -1] + 1e-6)
        return y.reshape(shape), new

    def _corrected(self, new: dict[str, Any], count: Array) -> dict[str, Any]:
        s = (count + 1).astype(jnp.float32)

        def correct(x: Array, decays: tuple[float, ...]) -> Array:
            return x / (1 - over(decays, x) ** s)

        factored = {
            k: x if k == "diagonal" else correct(x, self.factored) for k, x in new["factored"].items()
        }
        return {
            "m": correct(new["m"], self.momentum),
            "rms": correct(new["rms"], self.rms),
            "factored": factored,
        }


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
    kinds = {"normalization": ("second_moment",), "output_normalization": ("second_moment", "identity")}
    for slot, legal in kinds.items():
        if config[slot].kind not in legal:
            raise unknown(f"{slot} of the plain twin", config[slot].kind, legal)
    return NaiveCelo2(
        None,
        orthogonalize=config.orthogonalization.kind != "identity",
        learning_rate=config.schedule.get("value", 1e-3),
        weight_decay=config.weight_decay,
        momentum=tuple(config.accumulators.momentum.decays),
        rms=tuple(config.accumulators.second_moment.decays),
        factored=tuple(config.accumulators.factored.decays),
        route=routes[routing.kind],
        switches=Switches(normalize_output=config.output_normalization.kind != "identity"),
        **known,
    )


def naive_trainer(
    config: ConfigDict, families: list[Family], theta: PyTree, optimizer: Optimizer | None = None
) -> NaiveTrainer:
    """Returns the published loop for a config: ``.init(key)`` makes a state, a call does one iteration."""
    from celo_nnx.naive_meta import NaiveTrainer  # which imports this module

    return NaiveTrainer(config, families, theta, optimizer)
