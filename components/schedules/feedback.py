"""The LSTM of the RNN-MLP optimizer: it gives the update rule numbers, and takes some back."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from celo_nnx.components.schedules.cell import Dense, Recurrent
from celo_nnx.errors import MOST_WIDTH, is_width, require
from celo_nnx.interfaces import Controls, MetaParam

Array = jax.Array
State = dict[str, Array]


class FeedbackLstm(Recurrent):
    """Rows go through the LSTM without mixing; each tensor's output becomes context of its update rule::

        h, c = LSTM(x, h, c);   context = h W_rule + b;   shared = mean_i (h W_shared + b)

    ``shared`` and each tensor's ``own``, the mean of further outputs of its update rule, are shown to the
    next update's rows (OPTIMIZERS R4, R5, R7).

    Args:
      width: of a row.
      key: draws the published random start.
      value: learning rate (``step_multiplier``), 0 or more.
      hidden: units of the LSTM.
      context: numbers given to the update rule.
      shared: numbers that all tensors share.
      own: numbers that an update rule gives back; its ``feedback``.

    Raises:
      UserError: a size below 1, or a learning rate below 0.
    """

    def __init__(
        self,
        *,
        width: int,
        key: Array,
        value: float = 1e-3,
        hidden: int = 64,
        context: int = 17,
        shared: int = 18,
        own: int = 16,
    ) -> None:
        require(value >= 0, "value", value, "a number of at least 0")
        for name, number in (("context", context), ("shared", shared), ("own", own)):
            require(is_width(number), name, number, f"an integer from 1 to {MOST_WIDTH}")
        keys = jax.random.split(key, 5)
        super().__init__(width, hidden, keys[0])
        self.value, self.context_size = float(value), context
        self.to_rule, self.to_shared = Dense(hidden, context, keys[1]), Dense(hidden, shared, keys[2])
        self.initial_shared = MetaParam(_scaled(keys[3], shared))
        self.initial_own = MetaParam(_scaled(keys[4], own))

    def sizes(self) -> dict[str, int]:
        return {
            "from_lstm": self.initial_shared[...].shape[0],
            "from_mlp": self.initial_own[...].shape[0],
            "controls": self.context_size,
        }

    def base(self, count: Array, num_steps: Array) -> Array:
        return jnp.float32(self.value)

    def init(self, rows: int) -> State:
        own = jnp.broadcast_to(self.initial_own[...], (rows, *self.initial_own[...].shape))
        return super().init(rows) | {"shared": self.initial_shared[...] + 0.0, "own": own}

    def shown(self, state: State) -> dict[str, Array]:
        return {"from_lstm": state["shared"][None], "from_mlp": state["own"]}

    def advance(self, state: State, rows: Array) -> tuple[Controls, State]:
        new = self.cell(rows, state)
        shared = jnp.mean(self.to_shared(new["hidden"]), 0)
        return Controls(context=self.to_rule(new["hidden"])), {**state, **new, "shared": shared}

    def feed(self, state: State, feedback: Array) -> State:
        return {**state, "own": feedback}


def _scaled(key: Array, size: int) -> Array:
    """A vector with standard deviation ``1/sqrt(size)`` after the cut at two deviations (OPTIMIZERS 1.3)."""
    drawn = jax.random.truncated_normal(key, -2.0, 2.0, (size,), jnp.float32)
    return drawn / (jnp.sqrt(jnp.float32(size)) * 0.87962566)
