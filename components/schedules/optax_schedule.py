"""Any optax schedule, by name."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from celo_nnx.errors import UserError, unknown
from celo_nnx.interfaces import Schedule

Array = jax.Array


def _schedules() -> dict[str, Any]:
    return {
        n: getattr(optax, n) for n in dir(optax) if n.endswith("_schedule") and callable(getattr(optax, n))
    }


class OptaxSchedule(Schedule):
    """``optax.NAME(**arguments)``, evaluated at the update count.

    Args:
      name: an optax schedule such as ``"cosine_decay_schedule"``.
      arguments: its arguments, numbers only.

    Raises:
      UserError: no such schedule, or it does not take these arguments.

    Example:
      >>> part = OptaxSchedule(name="linear_schedule", arguments={
      ...     "init_value": 1.0, "end_value": 0.0, "transition_steps": 10})
      >>> float(part.base(5, 10))
      0.5
    """

    def __init__(self, *, name: str = "constant_schedule", arguments: dict[str, Any] | None = None) -> None:
        table = _schedules()
        if name not in table:
            raise unknown("optax schedule", name, table)
        arguments = dict(arguments or {"value": 1e-3})
        try:
            inspect.signature(table[name]).bind(**arguments)
            function = table[name](**arguments)
        except (TypeError, ValueError) as error:
            raise UserError(f"optax.{name} does not take {arguments}: {error}") from None
        self.name = name
        self.arguments = nnx.static(tuple(sorted(arguments.items())))
        self.function = nnx.static(function)

    def base(self, count: Array, num_steps: Array) -> Array:
        return jnp.asarray(self.function(count), jnp.float32)
