"""RNN-MLP a second time (OPTIMIZERS section 7): an LSTM over tensors and an MLP over elements that talk."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from celo_nnx.interfaces import Array, PyTree
from celo_nnx.naive_zoo import tensors
from celo_nnx.naive_zoo.recurrent import dense, initial_state, lstm
from celo_nnx.naive_zoo.tensors import Decays, named_leaves
from celo_nnx.naive_zoo.trackers import (
    clipped_log,
    corrected_mean,
    init_loss_normalizer,
    power,
    sine_time,
    update_loss_normalizer,
    weigh_loss,
)

NORMALIZED = (
    "gradient",
    "parameter",
    "log_parameter",
    "momentum",
    "second_moment",
    "momentum_rms",
    "rsqrt_second_moment",
)
CONTEXT = ("time_sine", "log_tensors", "log_norm", "log_size", "controls")
_TRAIN, _VALID, _CLIP = 0.9, 0.95, 0.99  # decays of the two loss normalizers and of the dynamic clip


@dataclasses.dataclass(frozen=True, eq=False)
class NaiveRNNMLP:
    """RNN-MLP, tensor by tensor; fulfils :class:`celo_nnx.interfaces.Optimizer`.

    The validation loss is taken to be never known, as in a training update without one.

    Attributes:
      theta: ``{"update_rule": {...}, "schedule": {"initial_shared": [s], "initial_own": [o], ...}}``.
      decays: of both banks.
      magnitude_rate: what the magnitude is multiplied by before exp.
      step_mult: scale of the step.
    """

    theta: PyTree
    decays: tuple[float, ...] = (0.5, 0.9, 0.99, 0.999, 0.9999)
    magnitude_rate: float = 0.001
    step_mult: float = 0.001

    def with_theta(self, theta: PyTree) -> NaiveRNNMLP:
        """Returns the same optimizer with other meta-parameters."""
        return dataclasses.replace(self, theta=theta)

    @property
    def _banks(self) -> Decays:
        return {"momentum": self.decays, "rms": self.decays}

    def init(self, params: PyTree, num_steps: Array | int) -> PyTree:
        """Returns zero accumulators and what the LSTM starts from; ``num_steps`` plays no part."""
        leaves, _ = named_leaves(params)
        schedule, rows = self.theta["schedule"], len(leaves)
        return {
            "count": jnp.zeros((), jnp.int32),
            "tensors": [
                {name: tensors.zero_bank((p.size,), self.decays) for name in ("m", "rms")} for _, p in leaves
            ],
            "lstm": initial_state(schedule["initial"], rows),
            "from_mlp": jnp.repeat(schedule["initial_own"][None, :], rows, axis=0),
            "from_lstm": jnp.asarray(schedule["initial_shared"]),
            "train_loss": init_loss_normalizer(),
            "valid_loss": init_loss_normalizer(),
            "clip": jnp.asarray(1.0 - _CLIP, jnp.float32),
        }

    def update(self, grads: PyTree, state: PyTree, params: PyTree, *, value: Array) -> tuple[PyTree, PyTree]:
        """Returns (updates to add, next state), equations R1 to R8."""
        leaves, treedef = named_leaves(params)
        shapes = [p.shape for _, p in leaves]
        flat = [p.reshape(-1) for _, p in leaves]
        train = update_loss_normalizer(state["train_loss"], value, _TRAIN)
        losses = (value, corrected_mean(state["valid_loss"], _VALID))
        gs, clip = self._clip([g.reshape(-1) for g in treedef.flatten_up_to(grads)], state)
        banks = [
            tensors.accumulate_moments(old, g, self._banks)
            for old, g in zip(state["tensors"], gs, strict=True)
        ]
        weighed = [weigh_loss(train, loss, _TRAIN) for loss in losses]
        x = jnp.stack(
            [
                _row(state["from_lstm"], state["from_mlp"][i], shapes[i], p, gs[i], banks[i], weighed)
                for i, p in enumerate(flat)
            ]
        )
        schedule = self.theta["schedule"]
        after = lstm(schedule["lstm"], state["lstm"], x)
        controls = dense(schedule["to_rule"], after["hidden"])
        outputs = [
            self._mlp(p, gs[i], banks[i], controls[i], state["count"], len(leaves))
            for i, p in enumerate(flat)
        ]
        steps = [
            o[:, 0] * jnp.exp(self.magnitude_rate * o[:, 1]) * self.step_mult for o in outputs
        ]  # equation R7
        return treedef.unflatten([-s.reshape(shape) for s, shape in zip(steps, shapes, strict=True)]), {
            "count": state["count"] + 1,
            "tensors": banks,
            "lstm": after,
            "from_mlp": jnp.stack([jnp.mean(o[:, 2:], axis=0) for o in outputs]),
            "from_lstm": jnp.mean(dense(schedule["to_shared"], after["hidden"]), axis=0),
            "train_loss": train,
            "valid_loss": state["valid_loss"],
            "clip": clip,
        }

    def _clip(self, gs: list[Array], state: PyTree) -> tuple[list[Array], Array]:
        """Clips by ten times the running root mean square of what was left before: D1 to D4."""
        bound = 10.0 * state["clip"] / (1.0 - power(np.float32(_CLIP), state["count"] + 1))
        gs = [jnp.clip(g, -bound, bound) for g in gs]
        size = jnp.sqrt(1e-8 + jnp.mean(jnp.stack([jnp.mean(g * g) for g in gs])))
        return gs, np.float32(_CLIP) * state["clip"] + np.float32(1.0 - _CLIP) * size

    def _mlp(self, p: Array, g: Array, bank: dict, control: Array, count: Array, n_tensors: int) -> Array:
        """Returns the MLP's outputs ``[N, 2 + o]`` for the elements of a tensor: R6."""
        features = tensors.elementwise_features(p, g, bank["m"], bank["rms"], 1e-6)
        features["log_parameter"] = jnp.log(jnp.abs(p) + 1e-8)[:, None]
        x = tensors.normalized(jnp.concatenate([features[k] for k in NORMALIZED], axis=-1), 1e-5, (0,))
        norm = jnp.sqrt(jnp.sum(p * p))
        logs = (math.log(n_tensors) - 1.0, jnp.log(norm + 1e-8), math.log(p.size))
        context = jnp.concatenate(
            [sine_time(count), jnp.stack([jnp.asarray(x, jnp.float32) for x in logs]), control]
        )
        x = jnp.concatenate([x, jnp.broadcast_to(context, (p.size, context.size))], axis=-1)
        return tensors.mlp(self.theta["update_rule"], NORMALIZED + CONTEXT, x)


def _row(
    shared: Array,
    own: Array,
    shape: tuple[int, ...],
    p: Array,
    g: Array,
    bank: dict[str, Array],
    losses: list[Array],
) -> Array:
    """Returns a tensor's row of the LSTM's input, ``[36 + s + o - 18]``: R4, keys in sorted order."""
    m, rms = bank["m"], bank["rms"]

    def norm(x: Array) -> Array:
        return clipped_log(jnp.sqrt(jnp.sum(x * x)))

    def spread(x: Array) -> Array:
        return clipped_log(jnp.mean((x - jnp.mean(x)) ** 2))

    sizes = (tuple(shape) + (1, 1, 1, 1))[:4]
    numbers: list[Any] = [
        norm(g),
        -1.0 if shape else 1.0,
        clipped_log(jnp.mean(m)),
        jnp.sign(jnp.mean(m)),
        clipped_log(jnp.mean(rms)),
        jnp.sign(jnp.mean(rms)),  # named mean_sign, but of the second moment, as published
        clipped_log(jnp.mean(p)),
        jnp.sign(jnp.mean(p)),
        norm(p),
        *(math.log(size) - 1.0 for size in sizes),
        *losses,
        spread(m),
        spread(rms),
        spread(p),
    ]
    return jnp.concatenate([shared, own, jnp.stack([jnp.asarray(x, jnp.float32) for x in numbers])])
