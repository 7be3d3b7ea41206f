"""Composes parts into an optimizer, and hands it over as an optax transformation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from celo_nnx.errors import UserError, require
from celo_nnx.groups import stacked, update_group
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
    UpdateRule,
)
from celo_nnx.kernel import TensorKernel
from celo_nnx.precision import Storage, mix
from celo_nnx.tensors import Tensors, check_like, layout, tensor_paths
from celo_nnx.transform import as_optax

Array = jax.Array
PyTree = Any

LEARNED = "learned"
STATE_VERSION = 1  # of the optimizer state's tree; see LearnedOptimizer.init


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
      state: how accumulators are kept.
      gradient_clip: elementwise limit for learned tensors, above 0.
      weight_decay: decoupled, 0 or more.
      tile: elements at most in a tile of a large tensor; 0 decides by the device (CPU 262144, others none).
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
        state: Storage,
        gradient_clip: float,
        weight_decay: float,
        tile: int,
    ) -> None:
        require(gradient_clip > 0, "gradient_clip", gradient_clip, "a number above 0")
        require(weight_decay >= 0, "weight_decay", weight_decay, "a number of at least 0")
        require(type(tile) is int and tile >= 0, "tile", tile, "an integer of at least 0")
        self.accumulators, self.features = nnx.Dict(accumulators), nnx.Dict(features)
        self.feature_order = tuple(features)
        self.normalization, self.update_rule, self.step = normalization, update_rule, step
        self.orthogonalization, self.output_normalization = orthogonalization, output_normalization
        self.schedule, self.routing, self.routes = schedule, routing, nnx.Dict(routes)
        self.tensors, self.state = nnx.static(tensors), nnx.static(state)
        self.gradient_clip, self.weight_decay, self.tile = float(gradient_clip), float(weight_decay), tile

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

    def with_tensors(self, tensors: Tensors) -> LearnedOptimizer:
        """Returns this optimizer with another way of looking at tensors."""
        graphdef, theta, rest = nnx.split(self, MetaParam, ...)
        other = nnx.merge(graphdef, theta, rest)
        other.tensors = nnx.static(tensors)
        return other

    def _routes(self, params: PyTree) -> dict[str, str]:
        """Returns the route of each path; decided by path and shape alone, so the same at every call."""
        table = {}
        given = {path: rows for path, rows, _ in self.tensors.given}
        for path, leaf in tensor_paths(params):
            if path in table:
                raise UserError(f"two parameters have the path {path!r}: rename one of them")
            if not hasattr(leaf, "dtype"):
                raise UserError(f"parameter {path!r} is a {type(leaf).__name__}, not an array")
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise UserError(f"parameter {path!r} has dtype {leaf.dtype}: floating-point parameters only")
            route = self.routing(path, leaf.shape)
            if path in given and self.routes:
                route = next(iter(self.routes)) if given[path] is None else LEARNED
            if route != LEARNED and route not in self.routes:
                known = ", ".join((LEARNED, *self.routes))
                raise UserError(
                    f"tensor {path!r} is routed to {route!r}, which is not a route; known: {known}"
                )
            table[path] = route
        self.tensors.check_patterns(table)
        return table

    def specs(self, params: PyTree) -> dict[str, TensorSpec]:
        """Returns the description of every tensor by path, whatever its route."""
        return self.tensors.specs({path: tuple(leaf.shape) for path, leaf in tensor_paths(params)})

    def routing_table(self, params: PyTree) -> str:
        """Says for a model which tensor takes which rule, with which axes.

        Args:
          params: arrays or ``jax.ShapeDtypeStruct``.

        Returns:
          A line a tensor: path, shape, rule, how it is looked at; a tensor on a hand-made route is worked on
          elementwise.

        Example:
          >>> from celo_nnx import load_optimizer
          >>> params = {"conv": {"kernel": jnp.ones((3, 3, 8, 16)), "bias": jnp.ones(16)}}
          >>> print(load_optimizer("celo2").routing_table(params))
          tensor       shape          rule     axes
          conv/bias    (16,)          adam     elementwise
          conv/kernel  (3, 3, 8, 16)  learned  rows 0,1,2 x columns 3
        """
        table, specs = self._routes(params), self.specs(params)
        lines = [("tensor", "shape", "rule", "axes")]
        for path, leaf in tensor_paths(params):
            axes = layout(specs[path]) if table[path] == LEARNED else "elementwise"
            lines.append((path, str(tuple(leaf.shape)), table[path], axes))
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        padded = ("  ".join([*(f"{x:<{w}}" for x, w in zip(x, widths, strict=False)), x[3]]) for x in lines)
        return "\n".join(padded)

    def _groups(self, params: PyTree, table: dict[str, str]) -> dict[str, list[TensorSpec]]:
        """Returns the learned tensors by name of their shape and layout, in flatten order."""
        groups: dict[str, list[TensorSpec]] = {}
        specs = self.specs(params)
        for path, leaf in tensor_paths(params):
            if table[path] != LEARNED or not leaf.size:
                continue
            spec = specs[path]
            name = "x".join(str(n) for n in leaf.shape) or "scalar"
            usual = Tensors(axes="last_two").specs({path: tuple(leaf.shape)})[path]
            if spec != usual:
                axes = (
                    (*spec.rows, "by", *spec.columns, "factored", *spec.factored)
                    if spec.matrix
                    else ("vector",)
                )
                name += "-" + "-".join(str(a) for a in axes)
            groups.setdefault(name, []).append(spec)
        return groups

    def init(self, params: PyTree, num_steps: Array | int = 0) -> dict[str, PyTree]:
        """Makes the optimizer state.

        Args:
          params: floating-point arrays in any tree.
          num_steps: length of the run; only read by schedules that need it.

        Returns:
          ``{"version", "count", "num_steps": int32 scalars, "learned": {shape: {accumulator: state}},
          "routes": {route: its rule's state}}``. Tensors of one shape share an entry, stacked on a leading
          axis in flatten order, so that their update compiles once. ``version`` changes when this tree does:
          a restored state of another version is refused.

        Raises:
          UserError: an integer or complex parameter, an unknown route, axes out of range, or a pattern that
            is found in no path.
        """
        table = self._routes(params)
        others: dict[str, dict[str, Array]] = {name: {} for name in self.routes}
        for path, leaf in tensor_paths(params):
            if table[path] != LEARNED:
                others[table[path]][path] = leaf
        learned = {}
        for name, specs in self._groups(params, table).items():
            one = {n: self.state.init(a.init(specs[0]), specs[0].shape) for n, a in self.accumulators.items()}
            learned[name] = stacked(one, len(specs))
        return {
            "version": jnp.asarray(STATE_VERSION, jnp.int32),
            "count": jnp.zeros((), jnp.int32),
            "num_steps": jnp.asarray(num_steps, jnp.int32),
            "learned": learned,
            "routes": {n: self.state.init(self.routes[n].init(own)) for n, own in others.items() if own},
        }

    def update(
        self,
        grads: PyTree,
        state: dict[str, PyTree],
        params: PyTree,
        *,
        value: Array | float = 0.0,
        learning_rate: Array | float | None = None,
        weight_decay: Array | float | None = None,
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
          UserError: the trees of gradients, parameters and state do not match, or the state is of another
            version.
        """
        check_like(grads, params, "gradient")
        check_like(state, jax.eval_shape(self.init, params), "optimizer state")
        _check_version(state["version"])
        leaves, grad_of = tensor_paths(params), dict(tensor_paths(grads))
        mask = _decayed(decay_mask, params)
        lr = self.schedule(state["count"], state["num_steps"]) if learning_rate is None else learning_rate
        decay = self.weight_decay if weight_decay is None else weight_decay
        table = self._routes(params)
        pairs = {path: (grad_of[path], param) for path, param in leaves}
        steps = {path: jnp.zeros(p.shape, jnp.float32) for path, p in leaves if not p.size}
        learned, routes = {}, {}
        kernel, number = self._kernel(state["count"]), 0
        for name, specs in self._groups(params, table).items():
            of_group = [pairs[s.path] for s in specs]
            made, learned[name] = update_group(
                kernel, specs[0], of_group, state["learned"][name], number, self.tile
            )
            steps.update(zip((s.path for s in specs), made, strict=True))
            number += len(specs)
        for name in state["routes"]:
            gs, ps = ({p: pairs[p][i] for p, _ in leaves if table[p] == name} for i in (0, 1))
            gs, old = {path: g.astype(jnp.float32) for path, g in gs.items()}, state["routes"][name]
            made, new = self.routes[name].update(gs, self.state.load(old), ps, state["count"])
            routes[name] = self.state.keep(new, old, mix(kernel.seed, number))
            steps.update(made)
            number += 1
        updates = []
        for path, param in leaves:
            rate = lr if table[path] == LEARNED else lr * self.routes[table[path]].multiplier
            step = steps[path]
            if mask[path] and not (isinstance(decay, (int, float)) and decay == 0):
                step = step + decay * param.astype(jnp.float32)
            updates.append((-rate * step).astype(param.dtype))
        count = optax.safe_increment(state["count"])
        new_state = {**state, "count": count, "learned": learned, "routes": routes}
        return jax.tree.unflatten(jax.tree.structure(params), updates), new_state

    def _kernel(self, count: Array) -> TensorKernel:
        return TensorKernel(
            accumulators=dict(self.accumulators.items()),
            features={name: self.features[name] for name in self.feature_order},
            normalization=self.normalization,
            update_rule=self.update_rule,
            step=self.step,
            orthogonalization=self.orthogonalization,
            output_normalization=self.output_normalization,
            storage=self.state,
            gradient_clip=self.gradient_clip,
            seed=mix(jnp.uint32(0), count),
        )

    as_optax = as_optax


def _check_version(version: Array) -> None:
    """Refuses a state of another version, where it can be seen: inside jit it cannot."""
    if not isinstance(version, jax.core.Tracer) and (version != STATE_VERSION).any():
        raise UserError(
            f"the optimizer state has version {int(version.ravel()[0])}, this release reads {STATE_VERSION}"
        )


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
