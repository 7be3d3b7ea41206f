"""An optimizer as an optax transformation, and the per-tensor figures that it can keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from celo_nnx.errors import UserError, require
from celo_nnx.sharding import given_shardings
from celo_nnx.tensors import dimension_numbers, tensor_paths

Array = jax.Array
PyTree = Any


def as_optax(
    optimizer: Any,
    num_steps: int | None = None,
    *,
    learning_rate: float | Callable[[Array], Array] | None = None,
    weight_decay: float | None = None,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    dimensions: PyTree | Callable[[PyTree], PyTree] | None = None,
    shardings: PyTree | Callable[[PyTree], PyTree] | None = None,
    diagnostics: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer as an optax transformation.

    It works in ``optax.chain``, ``optax.partition``, ``optax.MultiSteps`` and ``nnx.Optimizer``, under
    jit, vmap, scan and donation. It applies the learning rate and decoupled weight decay itself.

    Args:
      num_steps: length of the run in updates; required where the schedule needs it.
      learning_rate: number or optax schedule; the config's schedule by default (1e-3 in the presets).
      weight_decay: decoupled; the config's by default (0 in the presets).
      mask: Python or numpy booleans like the parameters, or a function of them: which tensors are decayed.
      dimensions: ``optax.contrib.MuonDimensionNumbers`` or None for each tensor, as
        ``optax.contrib.muon`` takes them, or a function of the parameters: which axes are the matrix;
        None sends a tensor to the hand-made route, and where there is none leaves it to the config's
        ``tensors``, which decide by default.
      shardings: ``jax.sharding.NamedSharding`` of each parameter, as a tree like them or a function of them:
        the state is then split over the mesh as they are, and each device updates its share.
      diagnostics: keep per-tensor figures of the last update in the state; see :func:`diagnostics`.

    Returns:
      ``init(params)`` and ``update(grads, state, params, value=loss)``.

    Raises:
      UserError: ``num_steps`` is missing where the schedule needs it; at an update, ``value`` likewise; an
        argument out of its range.

    Example:
      >>> import optax
      >>> from celo_nnx import load_optimizer
      >>> tx = load_optimizer("celo2").as_optax(learning_rate=1e-2)
      >>> params = {"w": jnp.ones((4, 4))}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.ones((4, 4))}, state, params)
      >>> optax.apply_updates(params, updates)["w"].shape
      (4, 4)
    """
    check_steps(optimizer, num_steps)
    _check_number("learning_rate", None if callable(learning_rate) else learning_rate)
    if callable(weight_decay):
        raise UserError("weight_decay takes no schedule, only a number: see optax.inject_hyperparams")
    _check_number("weight_decay", weight_decay)

    def rate(count: Array) -> Array:
        made = learning_rate(count)
        require(_is_scalar(made), "learning_rate(count)", made, "a number")
        return made

    def looking(params: PyTree) -> Any:
        changes: dict[str, Any] = {}
        if dimensions is not None:
            given = dimension_numbers(dimensions, params)
            changes["tensors"] = dataclasses.replace(optimizer.settings.tensors, given=given)
        if shardings is not None:
            changes["shardings"] = given_shardings(shardings, params)
        return optimizer.with_settings(**changes) if changes else optimizer

    def init(params: PyTree) -> PyTree:
        state = looking(params).init(params, num_steps)
        if not diagnostics:
            return state
        figures = jax.eval_shape(lambda: _diagnostics(params, params, params, None))
        return state | {"diagnostics": jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), figures)}

    def update(
        grads: PyTree, state: PyTree, params: PyTree | None = None, *, value: Any = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        if params is None:
            raise UserError("update needs params: tx.update(grads, state, params)")
        if value is None and optimizer.needs_value:
            raise UserError("update needs value: tx.update(grads, state, params, value=loss)")
        if optimizer.needs_value:
            require(_is_scalar(value), "value", value, "a number, the loss")
        updates, new = looking(params).update(
            grads,
            _without_diagnostics(state) if diagnostics else state,
            params,
            value=value if optimizer.needs_value else None,
            learning_rate=rate if callable(learning_rate) else learning_rate,
            weight_decay=weight_decay,
            decay_mask=mask(params) if callable(mask) else mask,
        )
        if diagnostics:
            new["diagnostics"] = _diagnostics(grads, params, updates, optimizer.clip.limit(state["clip"]))
        return updates, new

    return optax.GradientTransformationExtraArgs(init, update)


def check_steps(optimizer: Any, num_steps: Any) -> None:
    """Refuses a length of the run that is missing where a part uses it; no count, where that can be seen."""
    if num_steps is None and optimizer.needs_num_steps:
        raise UserError("num_steps is required: a part of this optimizer uses the length of the run")
    if not isinstance(num_steps, jax.Array):
        whole = isinstance(num_steps, Integral) and not isinstance(num_steps, bool) and num_steps >= 1
        require(num_steps is None or whole, "num_steps", num_steps, "an integer of at least 1")


def _is_scalar(x: Any) -> bool:
    return isinstance(x, (int, float, np.generic, np.ndarray, jax.Array)) and np.shape(x) == ()


def _check_number(name: str, number: Any) -> None:
    """Refuses what is no scalar, and a negative one where that can be seen."""
    good = number is None or (hasattr(number, "dtype") and number.shape == ())
    if isinstance(number, (int, float, np.generic)):
        good = number >= 0
    require(good, name, number, "a number of at least 0")


def _without_diagnostics(state: PyTree) -> PyTree:
    kept = isinstance(state, Mapping) and "diagnostics" in state
    require(kept, "state", type(state).__name__, "one that init with diagnostics made")
    return {name: entry for name, entry in state.items() if name != "diagnostics"}


def diagnostics(state: PyTree) -> dict[str, dict[str, Array]]:
    """Returns the figures of the last update that ``as_optax(diagnostics=True)`` keeps.

    Args:
      state: the optimizer's, or one of optax wrappers around it or around several.

    Returns:
      ``{path: {"update_rms", "param_rms", "clipped"}}``, scalars: root mean squares of the update (learning
      rate and decay included) and of the parameter before it, and the share of the gradient's elements beyond
      the limit that learned tensors' gradients are clipped to (a hand-made route does not clip its own). All
      are 0 before the first update.

    Raises:
      UserError: there are none.
    """
    kept = optax.tree.get_all_with_path(state, "diagnostics")
    found = [figures for _, figures in kept if isinstance(figures, Mapping)]
    if not found:
        raise UserError("this optimizer state has no diagnostics: make it with diagnostics=True")
    return {path: figures for of_one in found for path, figures in of_one.items()}


def _diagnostics(
    grads: PyTree, params: PyTree, updates: PyTree, limit: Array | float | None
) -> dict[str, dict[str, Array]]:
    limit = jnp.inf if limit is None else limit

    def mean(x: Array) -> Array:
        return jnp.sum(x.astype(jnp.float32)) / max(1, x.size)  # a tensor without elements has 0

    def rms(x: Array) -> Array:
        return jnp.sqrt(mean(jnp.square(x.astype(jnp.float32))))

    grad_of, update_of = dict(tensor_paths(grads)), dict(tensor_paths(updates))
    out = {}
    for path, param in tensor_paths(params):
        clipped = mean(jnp.abs(grad_of[path]) > limit)
        out[path] = {"update_rms": rms(update_of[path]), "param_rms": rms(param), "clipped": clipped}
    return out
