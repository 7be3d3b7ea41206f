"""The learned schedule of Celo, Celo-Adam and VeLO."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from celo_nnx.components.schedules.cell import Dense, Recurrent
from celo_nnx.errors import MOST_WIDTH, is_width, require, unknown
from celo_nnx.interfaces import Controls

Array = jax.Array
State = dict[str, Array]

RATES = ("exp", "raw", "none")


class LstmSchedule(Recurrent):
    """An LSTM over rows decides each tensor's rate and how a bank of update rules is mixed::

        v = max_i relu(x_i W_max + b);  x' = x W_skip + b + v;  h, c = LSTM(x', h, c)
        mix = softmax(h W_controls + b);  rate = factor exp(h W_step + b)

    OPTIMIZERS C3 to C5 (Celo) and V4, V5 (VeLO: ``softmax`` off, ``rate`` raw). The mix couples tensors, the
    layer ``mix/dead`` is one of the published theta that nothing reads. Where no row looks at its tensor,
    all rows are the same and there is one.

    Args:
      width: of a row.
      key: draws the published random start.
      value: learning rate that the rate multiplies, 0 or more (``step_mult``).
      hidden: units of the LSTM.
      mixing: whether rows are mixed before the LSTM.
      controls: size of the bank, 0 for none.
      softmax: of the controls.
      rate: ``"exp"``, ``"raw"`` (may be negative) or ``"none"``: 1 whatever the LSTM says, as in Celo's
        first phase.
      rate_factor: of ``"exp"``, above 0.
      state_decay: share of the LSTM's state that is forgotten at each update, in [0, 1).

    Raises:
      UserError: a value out of range.
    """

    accumulators = "old"

    def __init__(
        self,
        *,
        width: int,
        key: Array,
        value: float = 1e-3,
        hidden: int = 64,
        mixing: bool = True,
        controls: int = 0,
        softmax: bool = True,
        rate: str = "exp",
        rate_factor: float = 0.1,
        state_decay: float = 0.0,
    ) -> None:
        require(value >= 0, "value", value, "a number of at least 0")
        require(is_width(controls, 0), "controls", controls, f"an integer from 0 to {MOST_WIDTH}")
        require(rate_factor > 0, "rate_factor", rate_factor, "a number above 0")
        require(0 <= state_decay < 1, "state_decay", state_decay, "a number in [0, 1)")
        if rate not in RATES:
            raise unknown("rate", rate, RATES)
        keys = jax.random.split(key, 6)
        super().__init__(hidden if mixing else width, hidden, keys[0])
        self.value, self.softmax, self.rate = float(value), bool(softmax), rate
        self.rate_factor, self.state_decay = float(rate_factor), float(state_decay)
        self.mixing, self.bank = bool(mixing), controls
        if mixing:
            layers = zip(("dead", "max", "skip"), keys[1:4], strict=True)
            self.mix = nnx.Dict({name: Dense(width, hidden, k) for name, k in layers})
        if controls:
            self.controls = Dense(hidden, controls, keys[4])
        self.step = Dense(hidden, 1, keys[5])

    @property
    def decides_rate(self) -> bool:
        """Whether the LSTM sets the rate."""
        return self.rate != "none"

    def base(self, count: Array, num_steps: Array) -> Array:
        return jnp.float32(self.value)

    def advance(self, state: State, rows: Array) -> tuple[Controls, State]:
        x = rows
        if self.mixing:
            x = self.mix["skip"](rows) + jnp.max(jax.nn.relu(self.mix["max"](rows)), 0, keepdims=True)
        state = self.cell(x, state)
        out, mix, rate = state["hidden"], None, None
        if self.bank:
            mix = self.controls(out)
            mix = jax.nn.softmax(mix, -1) if self.softmax else mix
        if self.rate != "none":
            rate = self.step(out)[:, 0]
            rate = self.rate_factor * jnp.exp(rate) if self.rate == "exp" else rate
        if self.state_decay:
            state = {name: (1 - self.state_decay) * x for name, x in state.items()}
        return Controls(rate=rate, mix=mix), state

    def hand_made(self) -> dict[str, Any]:
        theta = super().hand_made()
        one = -math.log(self.rate_factor) if self.rate == "exp" else 1.0
        theta["step"] = {"w": jnp.zeros_like(theta["step"]["w"]), "b": jnp.full((1,), one, jnp.float32)}
        if self.bank:
            even = jnp.full((self.bank,), 0.0 if self.softmax else 1.0 / self.bank, jnp.float32)
            theta["controls"] = {"w": jnp.zeros_like(theta["controls"]["w"]), "b": even}
        return theta
