"""Counts the floating-point operations of a traced program."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

MOVES = {  # nothing is computed
    "broadcast_in_dim", "reshape", "transpose", "squeeze", "slice", "dynamic_slice", "dynamic_update_slice",
    "pad", "concatenate", "convert_element_type", "bitcast_convert_type", "copy", "gather", "iota", "rev",
    "select_n", "stop_gradient", "optimization_barrier", "all_to_all", "all_gather", "sharding_constraint",
    "split",
}  # fmt: skip
REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "argmax", "argmin", "cumsum"}


def floating_point_work(jaxpr: Any, parts: int = 1) -> float:
    """Returns the floating-point operations of a program, of one of ``parts`` that it is divided into.

    A matrix product counts two for each multiplication, anything elementwise one for each element, whether it
    is a sum or a root. Loops count as often as they run; of branches the costliest. What is under
    ``shard_map`` is written for one device already; the rest is taken to be divided evenly.

    Args:
      jaxpr: a closed jaxpr; every loop a scan, or a ``while`` counted once.
      parts: devices that share what is not under ``shard_map``.

    Example:
      >>> import jax
      >>> f = lambda x: jax.lax.fori_loop(0, 10, lambda i, y: y @ x + 1.0, x)
      >>> floating_point_work(jax.make_jaxpr(f)(jnp.ones((4, 4))))
      1440.0
    """
    return sum(_work(eqn, parts) for eqn in jaxpr.jaxpr.eqns)


def _work(eqn: Any, parts: int) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return params["length"] * floating_point_work(params["jaxpr"], parts)
    if name == "cond":
        return max(floating_point_work(branch, parts) for branch in params["branches"])
    if name == "while":
        return floating_point_work(params["body_jaxpr"], parts)
    if name == "shard_map":
        return sum(_work(inner, 1) for inner in params["jaxpr"].eqns)
    for inner in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if inner in params:
            body = params[inner]
            return sum(_work(e, parts) for e in getattr(body, "jaxpr", body).eqns)
    out = eqn.outvars[0].aval
    if name in MOVES or not jnp.issubdtype(getattr(out, "dtype", None), jnp.floating):
        return 0.0
    size = math.prod(out.shape)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        return 2.0 * size * inner / parts
    if name in REDUCTIONS:
        size = math.prod(eqn.invars[0].aval.shape)
    return size / parts
