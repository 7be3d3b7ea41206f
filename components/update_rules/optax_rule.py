"""Any optax rule as the target of a route."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from celo_nnx.errors import UserError, require, unknown
from celo_nnx.interfaces import RouteRule

Array = jax.Array
Tensors = dict[str, Array]


def _rules() -> dict[str, Any]:
    return {
        n: getattr(optax, n) for n in dir(optax) if n.startswith("scale_by_") and callable(getattr(optax, n))
    }


class OptaxRule(RouteRule):
    """``optax.scale_by_NAME(**arguments)``: its output is the step, scaled by the learning rate here.

    Args:
      name: what follows ``scale_by_``, such as ``"adam"`` or ``"lion"``.
      arguments: its arguments, numbers and booleans only.
      multiplier: of the learning rate, above 0.

    Raises:
      UserError: no such rule, or it does not take these arguments.
    """

    def __init__(
        self, *, name: str = "adam", arguments: dict[str, Any] | None = None, multiplier: float = 1.0
    ) -> None:
        table = _rules()
        if f"scale_by_{name}" not in table:
            raise unknown("optax rule", name, [n.removeprefix("scale_by_") for n in table])
        require(multiplier > 0, "multiplier", multiplier, "a number above 0")
        arguments = dict(arguments or {})
        try:
            inspect.signature(table[f"scale_by_{name}"]).bind(**arguments)
            rule = table[f"scale_by_{name}"](**arguments)
        except (TypeError, ValueError) as error:
            raise UserError(f"optax.scale_by_{name} does not take {arguments}: {error}") from None
        self.name, self.multiplier = name, float(multiplier)
        self.rule = nnx.static(optax.with_extra_args_support(rule))

    def init(self, params: Tensors) -> Any:
        return self.rule.init(jax.tree.map(lambda p: p.astype(jnp.float32), params))

    def update(self, grads: Tensors, state: Any, params: Tensors, count: Array) -> tuple[Tensors, Any]:
        return self.rule.update(grads, state, params)
