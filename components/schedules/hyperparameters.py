"""NN-Adam's schedule: an LSTM moves each tensor's Adam hyperparameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from celo_nnx.components.schedules.cell import Dense, Recurrent
from celo_nnx.errors import require
from celo_nnx.interfaces import Controls, MetaParam

Array = jax.Array
State = dict[str, Array]

NAMES = ("lr", "b1", "b2", "eps")  # in the order of the LSTM's heads


class AdamHyperparameters(Recurrent):
    """Each tensor's learning rate, decays and epsilon, stored on a logarithmic scale (OPTIMIZERS H2 to H8)::

        y <- y + output_scale (h W + b);   y <- y - decay_strength (y - y_theta);   y <- fwd(inv(y))

    An update uses the values of the update before. The decays are those of the accumulators ``momentum`` and
    ``second_moment``.

    Args:
      width: of a row.
      key: draws the published random start.
      hidden: units of the LSTM.
      output_scale: above 0.
      decay_strength: pull towards theta's values, in [0, 1).
      learning_rate, b1, b2, eps: where theta starts.

    Raises:
      UserError: a hyperparameter or scale out of its range.
    """

    def __init__(
        self,
        *,
        width: int,
        key: Array,
        hidden: int = 64,
        output_scale: float = 0.01,
        decay_strength: float = 0.0,
        learning_rate: float = 1e-4,
        b1: float = 0.9,
        b2: float = 0.999,
        eps: float = 1e-8,
    ) -> None:
        require(output_scale > 0, "output_scale", output_scale, "a number above 0")
        require(0 <= decay_strength < 1, "decay_strength", decay_strength, "a number in [0, 1)")
        require(1e-8 <= learning_rate <= 1e3, "learning_rate", learning_rate, "a number from 1e-8 to 1e3")
        for name, value in (("b1", b1), ("b2", b2)):
            require(0 < value < 1, name, value, "a number in (0, 1)")
        require(1e-11 <= eps <= 1e4, "eps", eps, "a number from 1e-11 to 1e4")
        keys = jax.random.split(key)
        super().__init__(width, hidden, keys[0])
        self.output_scale, self.decay_strength = float(output_scale), float(decay_strength)
        self.heads = Dense(hidden, 4, keys[1], zero=True)
        for name, value in zip(NAMES, (learning_rate, b1, b2, eps), strict=True):
            setattr(self, name, MetaParam(stored(name, jnp.float32(value))))

    @property
    def decides_rate(self) -> bool:
        """True: the rate is one of the hyperparameters."""
        return True

    def sizes(self) -> dict[str, int]:
        return {name: 1 for name in NAMES}

    def base(self, count: Array, num_steps: Array) -> Array:
        return jnp.float32(1.0)

    def init(self, rows: int) -> State:
        own = {name: jnp.broadcast_to(getattr(self, name)[...], (rows,)) for name in NAMES}
        return super().init(rows) | own

    def shown(self, state: State) -> dict[str, Array]:
        return {name: state[name][:, None] for name in NAMES}

    def early(self, state: State) -> Controls:
        lr, b1, b2, eps = (natural(name, state[name]) for name in NAMES)
        return Controls(rate=lr, decays={"momentum": b1, "second_moment": b2}, eps=eps)

    def advance(self, state: State, rows: Array) -> tuple[Controls, State]:
        new = self.cell(rows, state)
        deltas = self.output_scale * self.heads(new["hidden"])
        for i, name in enumerate(NAMES):
            y = state[name] + deltas[:, i]
            if self.decay_strength:
                y = y - self.decay_strength * (y - getattr(self, name)[...])
            new[name] = stored(name, natural(name, y))
        return self.early(state), new

    def hand_made(self) -> dict[str, Any]:
        theta = super().hand_made()
        theta["heads"] = jax.tree.map(jnp.zeros_like, theta["heads"])
        return theta


def stored(name: str, x: Array) -> Array:
    """Returns a hyperparameter as it is stored: a tenth of its logarithm, of ``1 - b`` for decays."""
    return 0.1 * jnp.log(1 - x if name in ("b1", "b2") else x)


def natural(name: str, y: Array) -> Array:
    """Returns a stored hyperparameter's value, within its range.

    Example:
      >>> round(float(natural("b1", stored("b1", jnp.float32(0.9)))), 5)
      0.9
    """
    if name in ("b1", "b2"):
        return 1 - jnp.exp(jnp.clip(10 * y, -10, 0))
    low, high = (1e-8, 1e3) if name == "lr" else (1e-11, 1e4)
    return jnp.clip(jnp.exp(10 * y), low, high)
