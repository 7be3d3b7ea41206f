"""Celo a second time, phases 1 and 2 (OPTIMIZERS section 2); Celo-Adam and VeLO change single methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from celo_nnx.interfaces import Array, PyTree
from celo_nnx.naive_zoo import tensors
from celo_nnx.naive_zoo.recurrent import dense, initial_state, lstm, mix
from celo_nnx.naive_zoo.tensors import GROUPS, Axes, Decays, largest_axes, named_leaves, rs
from celo_nnx.naive_zoo.trackers import fraction_features, init_loss_buffer, update_loss_buffer

Leaves = list[tuple[str, Array]]


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the published class (table of OPTIMIZERS section 2).

    Attributes:
      momentum, rms, factored: decays of the three accumulator banks.
      groups: feature groups in slot order.
      mix_layers: without, the LSTM sees the raw rows.
      validation_flag: appended to every row of the LSTM's input unless None.
      exp_mult, step_mult: of equation C6.
      scheduled: the step is multiplied by the learned rate: phase 2.
      parameter_scale: rho of equation C6.
      largest_scale: rho is at most this times sqrt(N), unless None.
      precondition_output: one more factor of the step.
      state_decay: the LSTM's state is stored times 1 - this.
      constant_loss: the loss counts as 1.
    """

    momentum: tuple[float, ...] = (0.9, 0.99, 0.999)
    rms: tuple[float, ...] = (0.999,)
    factored: tuple[float, ...] = (0.9, 0.99, 0.999)
    groups: tuple[str, ...] = GROUPS
    mix_layers: bool = True
    validation_flag: float | None = None
    exp_mult: float = 0.001
    step_mult: float = 0.001
    scheduled: bool = True
    parameter_scale: bool = True
    largest_scale: float | None = None
    precondition_output: bool = False
    state_decay: float = 0.0
    constant_loss: bool = False

    @property
    def decays(self) -> Decays:
        """The three banks' decays by name."""
        return {"momentum": self.momentum, "rms": self.rms, "factored": self.factored}


@dataclasses.dataclass(frozen=True, eq=False)
class NaiveCelo:
    """Celo, tensor by tensor; fulfils :class:`celo_nnx.interfaces.Optimizer`.

    Attributes:
      theta: ``{"update_rule": {"w0": {group: [K, width, H]}, "b0": [K, H], ...}, "schedule": {...}}``.
      options: of the published class.
      factored_axes: ``(path, shape) -> (d1, d0) or None`` (below rank 2).
    """

    theta: PyTree
    options: Options = Options()
    factored_axes: Callable[[str, tuple[int, ...]], Axes] = largest_axes

    def with_theta(self, theta: PyTree) -> NaiveCelo:
        """Returns the same optimizer with other meta-parameters."""
        return dataclasses.replace(self, theta=theta)

    def init(self, params: PyTree, num_steps: Array | int) -> PyTree:
        """Returns zero accumulators, an empty loss buffer and the LSTM's initial rows."""
        leaves, _ = named_leaves(params)
        return {
            "count": jnp.zeros((), jnp.int32),
            "num_steps": jnp.asarray(num_steps, jnp.int32),
            "buffer": self.loss_buffer(num_steps),
            "lstm": initial_state(self.theta["schedule"]["initial"], len(leaves)),
            "tensors": [
                tensors.zero_accumulators(p.shape, self.options.decays, self.factored_axes(path, p.shape))
                for path, p in leaves
            ],
        }

    def update(self, grads: PyTree, state: PyTree, params: PyTree, *, value: Array) -> tuple[PyTree, PyTree]:
        """Returns (updates to add, next state), equations C1 to C7."""
        leaves, treedef = named_leaves(params)
        buffer, x = self.lstm_inputs(state, params, value=value)
        schedule, keep = self.theta["schedule"], np.float32(1.0 - self.options.state_decay)
        if self.options.mix_layers:
            x = mix(schedule["mix"], x)
        after = lstm(schedule["lstm"], state["lstm"], x)
        controls, rates = self.heads(after["hidden"])
        updates, states = [], []
        for i, (path, p) in enumerate(leaves):
            axes = self.factored_axes(path, p.shape)
            g = jnp.clip(treedef.flatten_up_to(grads)[i], -1000.0, 1000.0)
            new, fac_g = tensors.accumulate(
                state["tensors"][i], tensors.at_least_1d(g), self.options.decays, axes
            )
            seen = {"g": tensors.at_least_1d(g), "fac_g": fac_g, "count": state["count"]} | new
            weights = self.mixed_weights(controls[i]) if controls is not None else None
            step = self.step(tensors.at_least_1d(p), seen, axes, weights, rates[i])
            updates.append(-step.reshape(p.shape))
            states.append(new)
        return treedef.unflatten(updates), {
            "count": state["count"] + 1,
            "num_steps": state["num_steps"],
            "buffer": buffer,
            "lstm": jax.tree.map(lambda s: keep * s, self.stored(state["lstm"], after)),
            "tensors": states,
        }

    def lstm_inputs(self, state: PyTree, params: PyTree, *, value: Array) -> tuple[PyTree, Array]:
        """Returns the loss buffer after this update and the LSTM's rows ``[tensors, F]``: C1 and C3."""
        leaves, _ = named_leaves(params)
        loss = jnp.ones_like(value) if self.options.constant_loss else value
        buffer, losses = update_loss_buffer(state["buffer"], loss)
        fraction = fraction_features(state["count"], state["num_steps"])
        rows = [[fraction, losses, *own] for own in self.own_features(leaves, state["tensors"])]
        if self.options.validation_flag is not None:
            rows = [[*row, jnp.full((1,), self.options.validation_flag)] for row in rows]
        return buffer, jnp.stack([jnp.concatenate(row) for row in rows])

    # What differs between the optimizers of this family.

    def loss_buffer(self, num_steps: Array | int) -> dict[str, Array]:
        """Returns the loss buffer at the start."""
        return init_loss_buffer(num_steps)

    def own_features(self, leaves: Leaves, states: list[dict]) -> list[list[Array]]:
        """Returns for every tensor what its row has besides time and loss: for Celo nothing."""
        return [[] for _ in leaves]

    def heads(self, hidden: Array) -> tuple[Array | None, Array]:
        """Returns the weights of the bank's MLPs ``[tensors, K]`` and the rates ``[tensors]``: C5."""
        schedule = self.theta["schedule"]
        controls = jax.nn.softmax(dense(schedule["controls"], hidden), axis=-1)
        return controls, 0.1 * jnp.exp(dense(schedule["step"], hidden)[:, 0])

    def stored(self, before: PyTree, after: PyTree) -> PyTree:
        """Returns which LSTM state is kept."""
        return after

    def mixed_weights(self, control: Array) -> dict[str, Any]:
        """Returns a tensor's MLP: the mean over the bank of its MLPs times their controls ``[K]``."""

        def mean(bank: Array) -> Array:
            return jnp.mean(control.reshape((-1,) + (1,) * (bank.ndim - 1)) * bank, axis=0)

        return jax.tree.map(mean, self.theta["update_rule"])

    def step(
        self, p: Array, seen: dict[str, Any], axes: Axes, weights: dict[str, Any] | None, rate: Array
    ) -> Array:
        """Returns a tensor's step, to be subtracted: equation C6.

        Args:
          p: ``[*S]``, at least one axis.
          seen: clipped gradient ``g``, accumulators after this update, ``fac_g``, ``count``.
          axes: (d1, d0) where factored.
          weights: of the tensor's MLP.
          rate: its learned rate, scalar.
        """
        options = self.options
        features = tensors.elementwise_features(p, seen["g"], seen["m"], seen["rms"], 1e-6)
        features["factored_gradient"] = seen["fac_g"]
        if axes is None:
            features |= tensors.diagonal_features(seen["m"], seen["factored"], 0.0)
        else:
            features |= tensors.factored_features(seen["m"], seen["factored"], axes)
        x = jnp.concatenate([features[name] for name in options.groups], axis=-1)
        o = tensors.mlp(weights, options.groups, tensors.normalized(x, 1e-5, tensors.all_axes(x)))
        step = o[..., 0] * (self.scale(p) * jnp.exp(options.exp_mult * o[..., 1])) * options.step_mult
        step = rate * step if options.scheduled else step
        return step * rs(seen["rms"][..., -1] + 1e-6) if options.precondition_output else step

    def scale(self, p: Array) -> Array | float:
        """Returns rho, the parameters' root mean square."""
        if not self.options.parameter_scale:
            return 1.0
        rho = jnp.sqrt(jnp.mean(p * p) + 1e-9)
        largest = self.options.largest_scale
        return rho if largest is None else jnp.minimum(rho, largest * np.sqrt(np.float32(p.size)))
