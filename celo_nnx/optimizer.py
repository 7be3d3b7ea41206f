"""Composes parts into an optimizer, and hands it over as an optax transformation."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from celo_nnx.errors import UserError, require
from celo_nnx.groups import rows_of_group, stacked, update_group
from celo_nnx.interfaces import (
    OUTPUT,
    Accumulator,
    Clip,
    Controls,
    Feature,
    Look,
    MetaParam,
    Normalization,
    Orthogonalization,
    RateScale,
    RouteRule,
    Routing,
    RunView,
    Schedule,
    StepHead,
    TensorFeature,
    TensorSpec,
    Tracker,
    UpdateRule,
)
from celo_nnx.kernel import TensorKernel
from celo_nnx.pallas_kernel import PallasKernel
from celo_nnx.precision import mix
from celo_nnx.settings import KERNEL_NAMES, Settings
from celo_nnx.sharding import Layout, check_given, layout, state_shardings, update_shares
from celo_nnx.tensors import (
    Tensors,
    axes_in_words,
    check_arrays,
    check_like,
    check_patterns,
    decay_masks,
    tensor_paths,
)
from celo_nnx.transform import as_optax, check_steps

Array = jax.Array
PyTree = Any

LEARNED = "learned"
KERNELS = dict(zip(KERNEL_NAMES, (TensorKernel, PallasKernel), strict=True))
STATE_VERSION = 1  # of the optimizer state's tree; see LearnedOptimizer.init


class LearnedOptimizer(nnx.Module):
    """A learned optimizer composed of parts; fulfils :class:`celo_nnx.interfaces.Optimizer`.

    An update follows the loss, clips the gradients, has the schedule decide from its rows, and then for every
    learned tensor (equations E1 to E8 of OPTIMIZERS section 4): updates the accumulators, makes the feature
    planes, takes their mean squares, runs the update rule on normalized planes, then step head,
    orthogonalization, output normalization; ``p <- p - eta rate (y + wd p)``.

    Args:
      parts: by slot; ``accumulators``, ``features``, ``context``, ``rows`` and ``routes`` are dicts by name,
        in order; the others single parts: ``clip``, ``normalization``, ``update_rule``, ``step``,
        ``orthogonalization``, ``output_normalization``, ``tracker``, ``schedule``, ``rate_scale``,
        ``routing``.
      settings: what is not a part.

    ``config`` is the resolved section ``optimizer`` that it was built from, as JSON.
    """

    config: str = "{}"
    accumulators: nnx.Dict[Accumulator]
    features: nnx.Dict[Feature]
    context: nnx.Dict[TensorFeature]
    rows: nnx.Dict[TensorFeature]
    routes: nnx.Dict[RouteRule]
    clip: Clip
    normalization: Normalization
    update_rule: UpdateRule
    step: StepHead
    orthogonalization: Orthogonalization
    output_normalization: Normalization
    tracker: Tracker
    schedule: Schedule
    rate_scale: RateScale
    routing: Routing

    def __init__(self, parts: Mapping[str, Any], settings: Settings) -> None:
        for slot, part in parts.items():
            setattr(self, slot, nnx.Dict(part) if isinstance(part, dict) else part)
        # An nnx.Dict is kept sorted; the order is that of the update rule's first layer and of the rows.
        self.orders = tuple((n, tuple(p)) for n, p in parts.items() if isinstance(p, dict))
        self.settings = nnx.static(settings)

    def named(self, slot: str) -> dict[str, Any]:
        """Returns the parts of a slot that holds several, in their order."""
        return {name: getattr(self, slot)[name] for name in dict(self.orders)[slot]}

    @property
    def needs_num_steps(self) -> bool:
        """Whether a part uses the length of the run."""
        features = (*self.rows.values(), *self.context.values())
        return any(part.needs_num_steps for part in (self.schedule, self.tracker, *features))

    @property
    def needs_value(self) -> bool:
        """Whether a part uses the loss."""
        return self.schedule.needs_value or self.tracker.needs_value

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

    def with_settings(self, **changes: Any) -> LearnedOptimizer:
        """Returns this optimizer with some of its :class:`Settings` changed."""
        graphdef, theta, rest = nnx.split(self, MetaParam, ...)
        other = nnx.merge(graphdef, theta, rest)
        other.settings = nnx.static(dataclasses.replace(self.settings, **changes))
        return other

    def _routes(self, params: PyTree) -> dict[str, str]:
        """Returns the route of each path; decided by path and shape alone, so the same at every call."""
        table = {}
        check_arrays(params, "parameter")
        given = {path: rows for path, rows, _ in self.settings.tensors.given}
        for path, leaf in tensor_paths(params):
            if path in table:
                raise UserError(f"two parameters have the path {path!r}: rename one of them")
            route = self.routing(path, leaf.shape)
            if path in given and self.routes:
                route = next(iter(self.routes)) if given[path] is None else LEARNED
            if route != LEARNED and route not in self.routes:
                known = ", ".join((LEARNED, *self.routes))
                raise UserError(
                    f"tensor {path!r} is routed to {route!r}, which is not a route; known: {known}"
                )
            table[path] = route
        tensors, matrices = self.settings.tensors, [p for p, leaf in tensor_paths(params) if leaf.ndim > 1]
        check_patterns("optimizer.tensors.matrix", [row[0] for row in tensors.matrix], matrices)
        check_patterns(
            "optimizer.tensors.factored", [f"^{re.escape(row[0])}$" for row in tensors.factored], table
        )
        check_patterns("optimizer.routing", self.routing.patterns, table)
        check_patterns("optimizer.rate_scale", self.rate_scale.patterns, table)
        return table

    def specs(self, params: PyTree) -> dict[str, TensorSpec]:
        """Returns the description of every tensor by path, whatever its route."""
        return self.settings.tensors.specs({path: tuple(leaf.shape) for path, leaf in tensor_paths(params)})

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
            axes = axes_in_words(specs[path]) if table[path] == LEARNED else "elementwise"
            lines.append((path, str(tuple(leaf.shape)), table[path], axes))
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        padded = ("  ".join([*(f"{x:<{w}}" for x, w in zip(x, widths, strict=False)), x[3]]) for x in lines)
        return "\n".join(padded)

    def _groups(self, params: PyTree, table: dict[str, str]) -> dict[str, list[TensorSpec]]:
        """Returns the learned tensors by name of their shape and layout, in flatten order."""
        groups: dict[str, list[TensorSpec]] = {}
        check_given(self.settings.shardings, params)
        specs, given = self.specs(params), dict(self.settings.shardings)
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
            if given and name in groups:
                split, first = (layout(s, given[s.path]).name for s in (spec, groups[name][0]))
                name += f"-on-{split}" if split != first else ""
            groups.setdefault(name, []).append(spec)
        return groups

    def _layouts(self, groups: dict[str, list[TensorSpec]]) -> dict[str, Layout]:
        """Returns how the tensors of each group are split; empty where they are not."""
        given = dict(self.settings.shardings)
        return {name: layout(specs[0], given[specs[0].path]) for name, specs in groups.items() if given}

    def _placed(self, state: PyTree, groups: dict[str, list[TensorSpec]], params: PyTree) -> PyTree:
        """Returns a state split over the mesh as the parameters are."""
        if not self.settings.shardings:
            return state
        places = state_shardings(state, self._layouts(groups), dict(self.settings.shardings), params)
        return jax.tree.map(jax.lax.with_sharding_constraint, state, places)

    def state_shardings(self, params: PyTree) -> PyTree:
        """Returns the sharding of every array of the state: what to restore a checkpoint onto.

        Raises:
          UserError: there are no shardings: ``with_settings(shardings=given_shardings(tree, params))``.
        """
        require(bool(self.settings.shardings), "shardings", (), "those of every parameter")
        groups = self._groups(params, self._routes(params))
        state = jax.eval_shape(self._init, params)
        return state_shardings(state, self._layouts(groups), dict(self.settings.shardings), params)

    def init(self, params: PyTree, num_steps: Array | int | None = None) -> dict[str, PyTree]:
        """Makes the optimizer state.

        Args:
          params: floating-point arrays in any tree.
          num_steps: length of the run in updates; required where :attr:`needs_num_steps`.

        Returns:
          ``{"version", "count", "num_steps": int32 scalars, "clip", "tracker", "schedule": those parts'
          states, "learned": {shape: {accumulator: state}}, "routes": {route: its rule's state}}``. Tensors of
          one shape share an entry, stacked on a leading axis in flatten order, so that their update compiles
          once; a rolling output normalization's average is in it as ``"output"``. ``version`` changes when
          this tree does: a restored state of another version is refused at the first update outside jit, and
          inside jit where its tree differs.

        Raises:
          UserError: an integer or complex parameter, an unknown route, axes out of range, a pattern that is
            found in no path, or ``num_steps`` is missing where a part uses it.
        """
        if self.needs_num_steps:
            check_steps(self, num_steps)
        return self._init(params, 0 if num_steps is None else num_steps)

    def _init(self, params: PyTree, num_steps: Array | int = 1) -> dict[str, PyTree]:
        table = self._routes(params)
        others: dict[str, dict[str, Array]] = {name: {} for name in self.routes}
        for path, leaf in tensor_paths(params):
            if table[path] != LEARNED:
                others[table[path]][path] = leaf
        learned, storage = {}, self.settings.state
        groups = self._groups(params, table)
        for name, specs in groups.items():
            one = {n: storage.init(a.init(specs[0]), specs[0].shape) for n, a in self.accumulators.items()}
            if self.output_normalization.decay is not None:
                axes = self.output_normalization.axes(specs[0])
                one[OUTPUT] = jnp.zeros([1 if a in axes else n for a, n in enumerate(specs[0].shape)])
            learned[name] = stacked(one, len(specs))
        state = {
            "version": jnp.asarray(STATE_VERSION, jnp.int32),
            "count": jnp.zeros((), jnp.int32),
            "num_steps": jnp.asarray(num_steps, jnp.int32),
            "clip": self.clip.init(),
            "tracker": self.tracker.init(num_steps),
            "schedule": self.schedule.init(self._rows(groups)),
            "learned": learned,
            "routes": {n: storage.init(self.routes[n].init(own)) for n, own in others.items() if own},
        }
        return self._placed(state, groups, params)

    def _rows(self, groups: dict[str, list[TensorSpec]]) -> int:
        """Returns how many rows the schedule sees: one where none of them looks at its tensor."""
        return max(1, sum(len(specs) for specs in groups.values())) if self._looks else 1

    @property
    def _looks(self) -> bool:
        return any(feature.looks for feature in self.rows.values())

    def update(
        self,
        grads: PyTree,
        state: dict[str, PyTree],
        params: PyTree,
        *,
        value: Array | float | None = None,
        learning_rate: Array | float | Callable[[Array], Array] | None = None,
        weight_decay: Array | float | None = None,
        decay_mask: PyTree | None = None,
    ) -> tuple[PyTree, dict[str, PyTree]]:
        """One update.

        Args:
          grads: like ``params``.
          state: from :meth:`init` or the last update.
          params: the parameters.
          value: the loss at ``params``; required where :attr:`needs_value`.
          learning_rate: overrides the schedule; a scalar, or a function of the number of updates so far.
          weight_decay: overrides the configured one.
          decay_mask: booleans like ``params``: which tensors are decayed; all by default.

        Returns:
          (updates to ADD to the parameters, in the parameters' dtypes; next state).

        Raises:
          UserError: the trees of gradients, parameters and state do not match, the mask holds something else
            than booleans, the state is of another version, or ``value`` is missing where a part uses it.
        """
        check_like(grads, params, "gradient")
        check_arrays(grads, "gradient")
        _check_version(state)
        check_like(state, jax.eval_shape(self._init, params), "optimizer state", dtypes=True)
        leaves, grad_of = tensor_paths(params), dict(tensor_paths(grads))
        mask = dict.fromkeys((path for path, _ in leaves), True)
        if decay_mask is not None:
            mask = decay_masks(decay_mask, params)
        if learning_rate is None:
            learning_rate = self.schedule.base(state["count"], state["num_steps"])
        lr = learning_rate(state["count"]) if callable(learning_rate) else learning_rate
        decay = self.settings.weight_decay if weight_decay is None else weight_decay
        table = self._routes(params)
        pairs = {path: (grad_of[path], param) for path, param in leaves}
        groups = self._groups(params, table)
        new = dict(state)
        kernel = self._decide(groups, pairs, state, new, self._value(value))
        steps = {path: jnp.zeros(p.shape, jnp.float32) for path, p in leaves if not p.size}
        rates, feedback, new["learned"], new["routes"] = {}, [], {}, {}
        layouts, given = self._layouts(groups), dict(self.settings.shardings)
        for name, specs in groups.items():
            of_group, number = [pairs[s.path] for s in specs], len(rates)
            own, tile = state["learned"][name], self.settings.tile
            if layouts:
                out = update_shares(kernel, layouts[name], of_group, own, number, tile)
            else:
                out = update_group(kernel, specs[0], of_group, own, number, tile)
            made, new["learned"][name], back = out
            feedback.append(back)
            for i, (spec, step) in enumerate(zip(specs, made, strict=True)):
                steps[spec.path] = step
                factor = self.rate_scale(spec.path, spec.tensor_shape)
                rate = kernel.controls.of(number + i).rate
                rates[spec.path] = factor if rate is None else factor * rate
        if self.update_rule.feedback and feedback:
            new["schedule"] = self.schedule.feed(new["schedule"], jnp.concatenate(feedback))
        # A rate that is one for all learned tensors is the run's, so hand-made routes follow it too.
        rate = kernel.controls.rate
        everywhere = 1.0 if rate is None or rate.shape[0] > 1 or self._looks else rate[0]
        for index, name in enumerate(state["routes"]):
            gs, ps = ({p: pairs[p][i] for p, _ in leaves if table[p] == name} for i in (0, 1))
            gs, old = {path: g.astype(jnp.float32) for path, g in gs.items()}, state["routes"][name]
            made, after = self.routes[name].update(gs, self.settings.state.load(old), ps, state["count"])
            seed = mix(kernel.seed, len(rates) + index)
            new["routes"][name] = self.settings.state.keep(after, old, seed)
            steps.update(made)
            rates |= {path: self.routes[name].multiplier * everywhere for path in made}
        updates = []
        for path, param in leaves:
            rate, step = lr * rates.get(path, 1.0), steps[path]
            if mask[path] and not (isinstance(decay, (int, float)) and decay == 0):
                step = step + decay * param.astype(jnp.float32)
            update = (-rate * step).astype(param.dtype)
            updates.append(jax.lax.with_sharding_constraint(update, given[path]) if given else update)
        new["count"] = optax.safe_increment(state["count"])
        new = self._placed(new, groups, params)
        return jax.tree.unflatten(jax.tree.structure(params), updates), new

    def look(
        self, grads: PyTree, state: dict[str, PyTree], params: PyTree, *, value: Array | float | None = None
    ) -> dict[str, Look]:
        """Returns what the update rule would be given at an update, by path of the learned tensors.

        Args:
          grads, state, params, value: as in :meth:`update`.

        Example:
          >>> from celo_nnx import load_optimizer
          >>> optimizer, params = load_optimizer("celo2"), {"w": jnp.ones((8, 4))}
          >>> look = optimizer.look(params, optimizer.init(params), params)["w"]
          >>> len(look.planes["momentum"]), look.scale.shape
          (3, (30, 1, 1))
        """
        grad_of, groups = dict(tensor_paths(grads)), self._groups(params, self._routes(params))
        pairs = {path: (grad_of[path], param) for path, param in tensor_paths(params)}
        kernel = self._decide(groups, pairs, state, dict(state), self._value(value))
        out: dict[str, Look] = {}
        for name, specs in groups.items():
            for i, spec in enumerate(specs):
                grad, param = (spec.enter(x).astype(jnp.float32) for x in pairs[spec.path])
                own = state["learned"][name]
                own = jax.tree.map(lambda x, i=i: x[i], own) if len(specs) > 1 else own
                out[spec.path] = kernel.look(spec, grad, param, own, len(out))
        return out

    def _value(self, value: Array | float | None) -> Array:
        if value is None and self.needs_value:
            raise UserError("update needs value: update(grads, state, params, value=loss)")
        return jnp.asarray(0.0 if value is None else value, jnp.float32)

    def _decide(
        self,
        groups: dict[str, list[TensorSpec]],
        pairs: dict[str, tuple[Array, Array]],
        state: dict[str, PyTree],
        new: dict[str, PyTree],
        value: Array,
    ) -> TensorKernel:
        """Follows the loss, limits the gradients and runs the schedule; writes their states to ``new``.

        Returns:
          The kernel of this update, with the schedule's controls.
        """
        new["tracker"] = self.tracker.update(state["tracker"], value)
        limit = self.clip.limit(state["clip"])
        if self.clip.measures:
            grads = [pairs[s.path][0].astype(jnp.float32) for specs in groups.values() for s in specs]
            clipped = grads if limit is None else [jnp.clip(g, -limit, limit) for g in grads]
            mean_square = jnp.mean(jnp.stack([jnp.mean(g * g) for g in clipped]))
            new["clip"] = self.clip.update(state["clip"], mean_square)
        run = RunView(
            count=state["count"],
            num_steps=state["num_steps"],
            loss=self.tracker.read(new["tracker"], value),
            tensors=sum(len(specs) for specs in groups.values()),
            shown={},
        )
        early = self.schedule.early(state["schedule"])
        kernel = self._kernel(run, limit, early)
        if not self.rows:
            return kernel
        shown, number, made = self.schedule.shown(state["schedule"]), 0, []
        if not self._looks:
            view = dataclasses.replace(run, shown={name: x[0] for name, x in shown.items()})
            made = [jnp.concatenate([f.values(view) for f in self.named("rows").values()])[None]]
        for name, specs in groups.items() if self._looks else ():

            def row(grad: Array, param: Array, own: PyTree, i: Array, spec=specs[0], first=number) -> Array:
                seen = {n: x[0] if x.shape[0] == 1 else x[first + i] for n, x in shown.items()}
                old = self.schedule.accumulators == "old"
                return kernel.row(spec, grad, param, own, first + i, self.named("rows"), seen, old)

            made.append(rows_of_group(specs[0], [pairs[s.path] for s in specs], state["learned"][name], row))
            number += len(specs)
        if not made:
            return kernel
        controls, new["schedule"] = self.schedule.advance(state["schedule"], jnp.concatenate(made))
        return dataclasses.replace(kernel, controls=controls)

    def _kernel(self, run: RunView, limit: Array | float | None, controls: Controls) -> TensorKernel:
        single = ("normalization", "update_rule", "step", "orthogonalization", "output_normalization")
        return KERNELS[self.settings.kernel](
            accumulators=self.named("accumulators"),
            features=self.named("features"),
            context=self.named("context"),
            **{slot: getattr(self, slot) for slot in single},
            storage=self.settings.state,
            limit=limit,
            controls=controls,
            run=run,
            seed=mix(jnp.uint32(0), run.count),
        )

    as_optax = as_optax


def _check_version(state: PyTree) -> None:
    """Refuses another optimizer's state, and another version's where that can be seen: not inside jit."""
    if not isinstance(state, Mapping) or "version" not in state:
        raise UserError(f"the optimizer state is a {type(state).__name__}, not one that init of this made")
    version = state["version"]
    if not isinstance(version, jax.core.Tracer) and (np.asarray(version) != STATE_VERSION).any():
        found = int(np.ravel(version)[0])
        raise UserError(f"the optimizer state has version {found}, this release reads {STATE_VERSION}")
