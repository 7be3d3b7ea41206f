"""Composes parts into an optimizer, and hands it over as an optax transformation."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

from celo_nnx.errors import UserError, require
from celo_nnx.interfaces import (
    Accumulator,
    Feature,
    MetaParam,
    Normalization,
    Orthogonalization,
    RouteRule,
    Routing,
    Schedule,
    StepHead,
    TensorSpec,
    TensorView,
    UpdateRule,
)
from celo_nnx.planes import block_mean_squares, fence

Array = jax.Array
PyTree = Any

LANES = 16  # float32 lanes of the widest common vector register; a shorter last axis is not worth a loop
LEARNED = "learned"


def tensor_paths(tree: PyTree) -> list[tuple[str, Array]]:
    """Returns (path, leaf) pairs in flatten order; keys are joined by ``/``.

    A trailing ``value`` is dropped: nnx puts it there at init and not at update.
    """
    pairs = []
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if keys and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == "value":
            keys = keys[:-1]
        pairs.append((jax.tree_util.keystr(keys, simple=True, separator="/"), leaf))
    return pairs


def factored_axes(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Axes (d1, d0): second largest and largest, ties to the higher index (OPTIMIZERS section 1.4).

    Example:
      >>> factored_axes((7, 5)), factored_axes((16, 16)), factored_axes((3,))
      ((1, 0), (0, 1), None)
    """
    if len(shape) < 2:
        return None
    order = np.argsort(np.asarray(shape), kind="stable")
    return int(order[-2]), int(order[-1])


@dataclasses.dataclass(frozen=True)
class Tensors:
    """How tensors are looked at; the section ``optimizer.tensors`` of a config.

    Attributes:
      matrix: (pattern, rows, columns): for tensors whose path the regular expression is found in, the axes
        (negative ones count from the end) that are the matrix; the first match counts. Without a match the
        matrix is the last two axes, as published.
      factored: (path, d1, d0): overrides of the factored axes, for replays.

    Example:
      >>> Tensors(matrix=(("conv", 0, -1),)).spec("conv/kernel", (3, 3, 16, 32)).matrix
      (0, 3)
    """

    matrix: tuple[tuple[str, int, int], ...] = ()
    factored: tuple[tuple[str, int, int], ...] = ()

    def spec(self, path: str, shape: tuple[int, ...]) -> TensorSpec:
        """Returns the static description of a tensor.

        Raises:
          UserError: axes that are out of range or equal, named with the tensor.
        """
        rank = len(shape)
        if rank < 2:
            return TensorSpec(path, shape or (1,), None, None)
        given = {p: (d1, d0) for p, d1, d0 in self.factored}
        factored = _two_axes(given.get(path) or factored_axes(shape), shape, f"factored axes of {path!r}")
        own = next(((r, c) for pattern, r, c in self.matrix if re.search(pattern, path)), (-2, -1))
        matrix = _two_axes(own, shape, f"matrix axes of {path!r}")
        last_two = (rank - 2, rank - 1)
        flipped = matrix == last_two and shape[-1] < LANES and shape[-2] > shape[-1]
        if flipped:
            shape = (*shape[:-2], shape[-1], shape[-2])
            swap = {rank - 1: rank - 2, rank - 2: rank - 1}
            factored = tuple(swap.get(a, a) for a in factored)
        return TensorSpec(path, shape, matrix, factored, flipped)


def _two_axes(axes: tuple[int, int] | None, shape: tuple[int, ...], what: str) -> tuple[int, int]:
    """Returns two axes counted from the front; refuses equal ones and ones that the shape does not have."""
    rank = len(shape)
    assert axes is not None
    first, second = (a + rank if a < 0 else a for a in axes)
    if first == second or not (0 <= first < rank and 0 <= second < rank):
        raise UserError(
            f"{what} = {tuple(axes)} are out of range: must be two different axes of shape {shape}"
        )
    return first, second


class LearnedOptimizer(nnx.Module):
    """A learned optimizer composed of parts; fulfils :class:`celo_nnx.interfaces.Optimizer`.

    Per learned tensor and update (equations E1 to E8 of OPTIMIZERS section 4): clip the gradient, update
    the accumulators, make the feature planes, take their mean squares, run the update rule on normalized
    planes, then step head, orthogonalization, output normalization; ``p <- p - eta (y + wd p)``.

    Args:
      accumulators, features: by name, in order.
      normalization, update_rule, step, orthogonalization, output_normalization, schedule, routing: parts.
      routes: hand-made rules by route name.
      tensors: how tensors are looked at.
      gradient_clip: elementwise limit for learned tensors, above 0.
      weight_decay: decoupled, 0 or more.
    """

    def __init__(
        self,
        *,
        accumulators: dict[str, Accumulator],
        features: dict[str, Feature],
        normalization: Normalization,
        update_rule: UpdateRule,
        step: StepHead,
        orthogonalization: Orthogonalization,
        output_normalization: Normalization,
        schedule: Schedule,
        routing: Routing,
        routes: dict[str, RouteRule],
        tensors: Tensors,
        gradient_clip: float,
        weight_decay: float,
    ) -> None:
        require(gradient_clip > 0, "gradient_clip", gradient_clip, "a number above 0")
        require(weight_decay >= 0, "weight_decay", weight_decay, "a number of at least 0")
        self.accumulators, self.features = nnx.Dict(accumulators), nnx.Dict(features)
        self.feature_order = tuple(features)
        self.normalization, self.update_rule, self.step = normalization, update_rule, step
        self.orthogonalization, self.output_normalization = orthogonalization, output_normalization
        self.schedule, self.routing, self.routes = schedule, routing, nnx.Dict(routes)
        self.tensors = nnx.static(tensors)
        self.gradient_clip, self.weight_decay = float(gradient_clip), float(weight_decay)

    @property
    def theta(self) -> PyTree:
        """The meta-parameters as a pure nested dict of float32 arrays."""
        return nnx.to_pure_dict(nnx.state(self, MetaParam))

    def with_theta(self, theta: PyTree) -> LearnedOptimizer:
        """Returns this optimizer with other meta-parameters.

        Raises:
          UserError: the tree or a shape differs from the optimizer's own.
        """
        graphdef, own, rest = nnx.split(self, MetaParam, ...)
        check_like(theta, nnx.to_pure_dict(own), "theta")
        nnx.replace_by_pure_dict(own, theta)
        return nnx.merge(graphdef, own, rest)

    def _routes(self, params: PyTree) -> dict[str, str]:
        """Returns the route of each path; decided by path and shape alone, so the same at every call."""
        table = {}
        for path, leaf in tensor_paths(params):
            if path in table:
                raise UserError(f"two parameters have the path {path!r}: rename one of them")
            if not hasattr(leaf, "dtype"):
                raise UserError(f"parameter {path!r} is a {type(leaf).__name__}, not an array")
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise UserError(f"parameter {path!r} has dtype {leaf.dtype}: floating-point parameters only")
            route = self.routing(path, leaf.shape)
            if route != LEARNED and route not in self.routes:
                known = ", ".join((LEARNED, *self.routes))
                raise UserError(
                    f"tensor {path!r} is routed to {route!r}, which is not a route; known: {known}"
                )
            table[path] = route
        return table

    def _groups(self, params: PyTree, table: dict[str, str]) -> dict[str, list[TensorSpec]]:
        """Returns the learned tensors by name of their shape, in flatten order."""
        groups: dict[str, list[TensorSpec]] = {}
        for path, leaf in tensor_paths(params):
            if table[path] == LEARNED and leaf.size:
                spec = self.tensors.spec(path, leaf.shape)
                name = "x".join(str(n) for n in leaf.shape) or "scalar"
                usual = Tensors().spec(path, leaf.shape)
                if (spec.matrix, spec.factored) != (usual.matrix, usual.factored):
                    name += "-" + "-".join(str(a) for a in (*spec.matrix, *spec.factored))
                groups.setdefault(name, []).append(spec)
        return groups

    def init(self, params: PyTree, num_steps: Array | int = 0) -> dict[str, PyTree]:
        """Makes the optimizer state.

        Args:
          params: floating-point arrays in any tree.
          num_steps: length of the run; only read by schedules that need it.

        Returns:
          ``{"count", "num_steps": int32 scalars, "learned": {shape: {accumulator: state}}, "routes":
          {route: its rule's state}}``, float32. Tensors of one shape share an entry, stacked on a leading
          axis in flatten order, so that their update compiles once.

        Raises:
          UserError: an integer or complex parameter, or an unknown route.
        """
        table = self._routes(params)
        others: dict[str, dict[str, Array]] = {name: {} for name in self.routes}
        for path, leaf in tensor_paths(params):
            if table[path] != LEARNED:
                others[table[path]][path] = leaf
        learned = {}
        for name, specs in self._groups(params, table).items():
            one = {n: a.init(specs[0]) for n, a in self.accumulators.items()}
            learned[name] = one if len(specs) == 1 else _stacked(one, len(specs))
        return {
            "count": jnp.zeros((), jnp.int32),
            "num_steps": jnp.asarray(num_steps, jnp.int32),
            "learned": learned,
            "routes": {name: self.routes[name].init(leaves) for name, leaves in others.items() if leaves},
        }

    def update(
        self,
        grads: PyTree,
        state: dict[str, PyTree],
        params: PyTree,
        *,
        value: Array | float = 0.0,
        learning_rate: Array | float | None = None,
        weight_decay: float | None = None,
        decay_mask: PyTree | None = None,
    ) -> tuple[PyTree, dict[str, PyTree]]:
        """One update.

        Args:
          grads: like ``params``.
          state: from :meth:`init` or the last update.
          params: the parameters.
          value: the loss at ``params``; unused by the parts that need none.
          learning_rate: overrides the schedule, scalar.
          weight_decay: overrides the configured one.
          decay_mask: booleans like ``params``: which tensors are decayed; all by default.

        Returns:
          (updates to ADD to the parameters, in the parameters' dtypes; next state).

        Raises:
          UserError: the trees of gradients, parameters and state do not match.
        """
        check_like(grads, params, "gradient")
        check_like(state, jax.eval_shape(self.init, params), "optimizer state")
        leaves, grad_of = tensor_paths(params), dict(tensor_paths(grads))
        mask = _decayed(decay_mask, params)
        lr = self.schedule(state["count"], state["num_steps"]) if learning_rate is None else learning_rate
        decay = self.weight_decay if weight_decay is None else weight_decay
        table = self._routes(params)
        pairs = {path: (grad_of[path].astype(jnp.float32), param) for path, param in leaves}
        steps = {path: jnp.zeros(p.shape, jnp.float32) for path, p in leaves if not p.size}
        learned, routes = {}, {}
        for name, specs in self._groups(params, table).items():
            made, learned[name] = self._group(specs, [pairs[s.path] for s in specs], state["learned"][name])
            steps.update(zip((s.path for s in specs), made, strict=True))
        for name in state["routes"]:
            gs, ps = ({p: pairs[p][i] for p, _ in leaves if table[p] == name} for i in (0, 1))
            made, routes[name] = self.routes[name].update(gs, state["routes"][name], ps, state["count"])
            steps.update(made)
        updates = []
        for path, param in leaves:
            rate = lr if table[path] == LEARNED else lr * self.routes[table[path]].multiplier
            step = steps[path]
            if mask[path] and not (isinstance(decay, (int, float)) and decay == 0):
                step = step + decay * param.astype(jnp.float32)
            updates.append((-rate * step).astype(param.dtype))
        count = optax.safe_increment(state["count"])
        new_state = {"count": count, "num_steps": state["num_steps"], "learned": learned, "routes": routes}
        return jax.tree.unflatten(jax.tree.structure(params), updates), new_state

    def _group(
        self, specs: list[TensorSpec], pairs: list[tuple[Array, Array]], state: PyTree
    ) -> tuple[Array | list[Array], PyTree]:
        """Updates the tensors of one shape one after the other, so that they compile once.

        Gradients and parameters are fetched by a switch, not stacked: a stack would take as much memory
        as both of them. The stacked state is updated in place.
        """
        if len(specs) == 1:
            step, state = self._learned(specs[0], *pairs[0], state)
            return [step], state

        def body(carry: tuple[PyTree, Array], i: Array) -> tuple[tuple[PyTree, Array], None]:
            state, steps = carry
            grad, param = lax.switch(i, [lambda g=g, p=p: (g, p.astype(jnp.float32)) for g, p in pairs])
            own = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), state)
            step, new = self._learned(specs[0], grad, param, own)
            put = lambda x, y: lax.dynamic_update_index_in_dim(x, y, i, 0)  # noqa: E731
            return (jax.tree.map(put, state, new), put(steps, step)), None

        steps = jnp.zeros((len(specs), *pairs[0][0].shape), jnp.float32)
        (state, steps), _ = lax.scan(body, (state, steps), jnp.arange(len(specs)))
        return steps, state

    def _learned(
        self, spec: TensorSpec, grad: Array, param: Array, state: dict[str, PyTree]
    ) -> tuple[Array, dict[str, PyTree]]:
        """Returns (step of the tensor's own shape, next accumulators) of one learned tensor."""
        own_shape = grad.shape
        param = param.astype(jnp.float32)
        if spec.flipped:
            grad, param = jnp.swapaxes(grad, -1, -2), jnp.swapaxes(param, -1, -2)
        grad, param = grad.reshape(spec.shape), param.reshape(spec.shape)
        grad = jnp.clip(grad, -self.gradient_clip, self.gradient_clip)
        state = {name: a.update(state[name], grad, spec) for name, a in self.accumulators.items()}
        stats = {name: a.read(state[name], spec) for name, a in self.accumulators.items()}
        step = self.orthogonalization(self._direction(spec, grad, param, stats), spec)
        axes = self.output_normalization.axes(spec)
        square = block_mean_squares(lambda x: [x], step, spec.shape, axes)[0]
        step = step * self.output_normalization.scale(square)
        if spec.flipped:
            step = jnp.swapaxes(step, -1, -2)
        return step.reshape(own_shape), state

    def _direction(self, spec: TensorSpec, grad: Array, param: Array, stats: dict[str, Any]) -> Array:
        """Returns the update rule's step before orthogonalization, of ``spec.shape``."""

        def planes(tree: tuple[Array, Array, dict[str, Any]]) -> dict[str, list[Array]]:
            view = TensorView(param=tree[0], grad=tree[1], stats=tree[2], spec=spec)
            made = {name: self.features[name].planes(view) for name in self.feature_order}
            return {name: group for name, group in made.items() if group}

        view = (param, grad, stats)
        groups = tuple(planes(view))
        axes = self.normalization.axes(spec)
        squares = block_mean_squares(lambda t: sum(planes(t).values(), []), view, spec.shape, axes)
        weights = self.update_rule.first_layer(groups)
        scale = self.normalization.scale(squares)
        weights = weights.reshape(*weights.shape, *(1,) * len(spec.shape)) * scale[:, None]

        def rule(tree: tuple[Array, Array, dict[str, Any]], weights: Array) -> Array:
            flat = sum(planes(tree).values(), [])
            return self.step(*self.update_rule(flat, weights, spec.shape), tree[0], spec)

        return fence(rule, grad, view, weights)

    def as_optax(
        self,
        num_steps: int | None = None,
        *,
        learning_rate: float | Callable[[Array], Array] | None = None,
        weight_decay: float | None = None,
        mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    ) -> optax.GradientTransformationExtraArgs:
        """Returns the optimizer as an optax transformation.

        It works in ``optax.chain``, ``optax.partition``, ``optax.MultiSteps`` and ``nnx.Optimizer``, under
        jit, vmap, scan and donation. It applies the learning rate and decoupled weight decay itself.

        Args:
          num_steps: length of the run in updates; required where the schedule needs it.
          learning_rate: number or optax schedule; the config's schedule by default (1e-3 in the presets).
          weight_decay: decoupled; the config's by default (0 in the presets).
          mask: booleans like the parameters, or a function of them: which tensors are decayed.

        Returns:
          ``init(params)`` and ``update(grads, state, params, value=loss)``.

        Raises:
          UserError: ``num_steps`` is missing where the schedule needs it.

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
        if num_steps is None and self.schedule.needs_num_steps:
            raise UserError(
                "num_steps is required: the schedule of this optimizer uses the length of the run"
            )
        whole = isinstance(num_steps, int) and num_steps >= 1
        require(num_steps is None or whole, "num_steps", num_steps, "an integer of at least 1")
        for name, number in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
            fixed = isinstance(number, (int, float, str))
            good = not fixed or (not isinstance(number, str) and number >= 0)
            require(good, name, number, "a number of at least 0")
        optimizer = self

        def init(params: PyTree) -> PyTree:
            return optimizer.init(params, num_steps or 0)

        def update(
            grads: PyTree, state: PyTree, params: PyTree | None = None, *, value: Any = 0.0, **_: Any
        ) -> tuple[PyTree, PyTree]:
            if params is None:
                raise UserError("update needs params: tx.update(grads, state, params)")
            return optimizer.update(
                grads,
                state,
                params,
                value=value,
                learning_rate=learning_rate(state["count"]) if callable(learning_rate) else learning_rate,
                weight_decay=weight_decay,
                decay_mask=mask(params) if callable(mask) else mask,
            )

        return optax.GradientTransformationExtraArgs(init, update)


def _decayed(mask: PyTree | None, params: PyTree) -> dict[str, bool]:
    """Returns whether each path is decayed, from a mask that may be a prefix of the parameters' tree."""
    if mask is None:
        return {path: True for path, _ in tensor_paths(params)}
    try:
        return dict(tensor_paths(jax.tree.broadcast(mask, params)))
    except ValueError as error:
        raise UserError(
            f"the weight decay mask does not fit the parameters: {error}".split("\n")[0]
        ) from None


def _stacked(tree: PyTree, count: int) -> PyTree:
    """Returns the tree with every leaf repeated on a new leading axis."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), tree)


def check_like(tree: PyTree, like: PyTree, what: str) -> None:
    """Raises a :class:`UserError` that names the first leaf in which ``tree`` is not like ``like``."""
    have, want = dict(tensor_paths(tree)), dict(tensor_paths(like))
    for path in want:
        if path not in have:
            raise UserError(f"the {what} tree lacks {path!r}")
    for path, leaf in have.items():
        if path not in want:
            raise UserError(f"the {what} tree has {path!r}, which is not expected")
        if leaf.shape != want[path].shape:
            raise UserError(f"{what} {path!r} has shape {leaf.shape}, expected {want[path].shape}")
