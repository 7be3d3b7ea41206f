"""The learned update of one tensor, whole or in tiles: the hot kernel.

What depends on what fixes the passes over memory: the gradient's row and column means come first, then the
factors made of them, then the mean square of every feature plane, then the update rule, then the step's own
mean square. A small tensor is one expression that XLA fuses. A large one is three loops over tiles of rows,
so that nothing of its size is made but the step: measure the gradient; average the accumulators on the fly
for the planes' squares; average them again, keep them, and write the step (about 84 bytes a parameter with
the state of Celo2-base in float32).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from celo_nnx.interfaces import (
    OUTPUT,
    Accumulator,
    Controls,
    Feature,
    Look,
    Normalization,
    Orthogonalization,
    RunView,
    StepHead,
    TensorFeature,
    TensorSpec,
    TensorView,
    UpdateRule,
)
from celo_nnx.planes import BLOCKS, block_mean_squares, fence, row_sums, rows
from celo_nnx.precision import Storage, mix

Array = jax.Array
PyTree = Any
Fetch = Callable[[Array | int, int], tuple[Array, Array]]  # (first row, rows) -> (gradient, parameter)


@dataclasses.dataclass(frozen=True)
class TensorKernel:
    """The parts that a tensor's update goes through, bound together for one update.

    Attributes:
      accumulators, features, context: by name, in order.
      normalization, update_rule, step, orthogonalization, output_normalization: parts.
      storage: how accumulators are kept.
      limit: largest magnitude of a gradient's element that passes; None for no limit.
      controls: what the schedule has decided, of all tensors.
      run: what context features see of the run; ``shown`` is taken from ``controls``.
      seed: uint32 scalar, another for every update; only read by stochastic rounding.
      unfinished: end before orthogonalization, which then sees all tensors of a shape at once, and leave the
        rest to :meth:`finish`.
    """

    accumulators: Mapping[str, Accumulator]
    features: Mapping[str, Feature]
    context: Mapping[str, TensorFeature]
    normalization: Normalization
    update_rule: UpdateRule
    step: StepHead
    orthogonalization: Orthogonalization
    output_normalization: Normalization
    storage: Storage
    limit: Array | float | None
    controls: Controls
    run: RunView
    seed: Array
    unfinished: bool = False

    def whole(
        self, spec: TensorSpec, grad: Array, param: Array, state: dict[str, PyTree], number: Array | int
    ) -> tuple[Array, dict[str, PyTree], Array]:
        """Updates a tensor in one piece.

        Args:
          spec: the tensor's description.
          grad, param: working views ``[*S]``, float32.
          state: of every accumulator.
          number: the tensor's among the learned ones.

        Returns:
          (step ``[*S]``, to be subtracted; next state; the update rule's feedback).
        """
        grad, controls, old = self._clip(grad), self.controls.of(number), state
        state, stats = self.accumulate(spec, grad, old, number, controls)
        view = (param, grad, stats)
        axes = self.normalization.axes(spec)
        squares = block_mean_squares(lambda t: self._flat(spec, t), view, spec.shape, axes)
        squares = spec.across(squares, axes)
        groups = tuple(self._groups(spec, view))
        prepared = self._prepare(spec, groups, squares, controls, lambda: TensorView(*view, spec))
        step, feedback = self._fenced_rule(spec, view, prepared, spec.shape, self.step.factor(param, spec))
        feedback = spec.across(feedback)
        if self.unfinished:
            return step, state, feedback
        step = self.orthogonalization(step, spec)
        step, average = self.finish(spec, step, stats, old.get(OUTPUT))
        return step, state | average, feedback

    def finish(
        self, spec: TensorSpec, step: Array, stats: dict[str, Any], average: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        """Returns an orthogonalized step normalized and finished, and its next average where one is kept."""
        scale, average = self._output_scale(step, spec, average)
        return self.step.finish(step * scale, stats), average

    def look(
        self, spec: TensorSpec, grad: Array, param: Array, state: dict[str, PyTree], number: Array | int
    ) -> Look:
        """Returns what the update rule is given of a tensor; arguments as in :meth:`whole`."""
        grad, controls = self._clip(grad), self.controls.of(number)
        view = (param, grad, self.accumulate(spec, grad, state, number, controls)[1])
        axes = self.normalization.axes(spec)
        squares = block_mean_squares(lambda t: self._flat(spec, t), view, spec.shape, axes)
        context = self._context(spec, controls, lambda: TensorView(*view, spec))
        return Look(self._groups(spec, view), self.normalization.scale(squares), context, controls, spec)

    def accumulate(
        self,
        spec: TensorSpec,
        grad: Array,
        state: dict[str, PyTree],
        number: Array | int,
        controls: Controls,
    ) -> tuple[dict[str, PyTree], dict[str, Any]]:
        """Returns the accumulators' next state after a clipped gradient, and its readings."""
        new = {}
        for n, a in self._all():
            measured = self._across(a, a.measure(grad, spec), spec)
            new[n] = self._advance(n, state[n], measured, spec, number, controls)
        return new, self.read(spec, new)

    def read(self, spec: TensorSpec, state: dict[str, PyTree]) -> dict[str, Any]:
        """Returns the readings of some accumulators."""
        loaded = self.storage.load({n: x for n, x in state.items() if n != OUTPUT})
        return {n: self.accumulators[n].read(x, spec, self.run.count) for n, x in loaded.items()}

    def tiled(
        self,
        spec: TensorSpec,
        fetch: Fetch,
        param: Callable[[], Array],
        state: dict[str, PyTree],
        steps: Array,
        index: Array,
        number: Array | int,
        size: int,
    ) -> tuple[dict[str, PyTree], Array, Array, Array]:
        """Updates a tensor in tiles of ``size`` rows.

        Args:
          spec: the tensor's description, of rank 2 or more.
          fetch: returns working rows of gradient and parameter, float32.
          param: returns the whole parameter.
          state: of every accumulator, stacked ``[tensors, ...]``.
          steps: ``[tensors, *S]``, written in place.
          index: which of the stacked tensors.
          number: the tensor's among the learned ones.
          size: rows of a tile.

        Returns:
          (state, steps, factor ``[*S with 1s]`` that the tensor's step is still to be multiplied by, the
          update rule's feedback).
        """
        full, controls = spec.shape[-2], self.controls.of(number)
        state = dict(state)
        state |= self._reduce(spec, fetch, state, index, number, controls, size)
        moving = {n: state[n] for n, a in self._all() if a.elementwise}
        fixed = self.read(spec, {n: _at(state[n], index) for n, a in self._all() if not a.elementwise})

        def tile(moving: dict[str, PyTree], start: Array | int, count: int) -> tuple[Any, dict[str, PyTree]]:
            """Returns what features see of rows, and the accumulators' new rows as they are kept."""
            grad, weight = fetch(start, count)
            grad, old = self._clip(grad), _rows(moving, index, start, count)
            new = {
                n: self._advance(
                    n, old[n], self.accumulators[n].measure(grad, spec), spec, number, controls, start
                )
                for n in moving
            }
            stats = self.read(spec, new) | rows(fixed, len(spec.shape), start, count, full)
            return (weight, grad, stats), new

        groups, squares = self._tiled_squares(spec, tile, moving, fixed, size)
        # Only where context looks at the tensor is all of it made.
        whole = lambda: TensorView(*tile(moving, 0, full)[0], spec)  # noqa: E731
        prepared = self._prepare(spec, groups, squares, controls, whole)
        factor = self.step.factor(param(), spec)

        def write(carry: tuple[PyTree, Array, Array], start: Array | int, count: int) -> Any:
            moving, steps, total = carry
            view, new = tile(moving, start, count)
            shape = (*spec.shape[:-2], count, spec.shape[-1])
            own = rows(prepared, len(spec.shape) + 2, start, count, full)
            step, feedback = self._fenced_rule(spec, view, own, shape, factor)
            moving, steps = (_put_rows(x, y, index, start) for x, y in ((moving, new), (steps, step)))
            return moving, steps, total + feedback * (count / full)

        total = jnp.zeros((self.update_rule.feedback,), jnp.float32)
        moving, steps, total = over_tiles(full, size, write, (moving, steps, total))
        state, total = state | moving, spec.across(total)
        if self.unfinished:
            return state, steps, jnp.ones((1,) * len(spec.shape)), total
        step = lax.dynamic_index_in_dim(steps, index, keepdims=False)
        made = self.orthogonalization(step, spec)
        if made is not step:
            steps = lax.dynamic_update_index_in_dim(steps, made, index, 0)
        kept = _at(state[OUTPUT], index) if OUTPUT in state else None
        scale, average = self._output_scale(made, spec, kept)
        state |= {n: lax.dynamic_update_index_in_dim(state[n], x, index, 0) for n, x in average.items()}
        return state, steps, scale, total

    def row(
        self,
        spec: TensorSpec,
        grad: Array,
        param: Array,
        state: dict[str, PyTree],
        number: Array | int,
        features: Mapping[str, TensorFeature],
        shown: dict[str, Array],
        old: bool,
    ) -> Array:
        """Returns the schedule's row of one tensor, ``[width]``.

        Args:
          spec, grad, param, state, number: as in :meth:`whole`.
          features: of the row, in order.
          shown: what the schedule shows of its state for this tensor.
          old: whether readings are those before this update.
        """
        grad = self._clip(grad)
        stats = self.read(spec, state)
        if not old:
            _, stats = self.accumulate(spec, grad, state, number, self.controls.of(number))
        tensor = TensorView(param, grad, stats, spec)
        view = dataclasses.replace(self.run, shown=shown, tensor=tensor, spec=spec)
        return jnp.concatenate([f.values(view) for f in features.values()])

    def _clip(self, grad: Array) -> Array:
        return grad if self.limit is None else jnp.clip(grad, -self.limit, self.limit)

    def _reduce(
        self,
        spec: TensorSpec,
        fetch: Fetch,
        state: dict[str, PyTree],
        index: Array,
        number: Array | int,
        controls: Controls,
        size: int,
    ) -> dict[str, PyTree]:
        """Returns the next states of the accumulators that reduce the gradient, still stacked."""
        parts = {n: a for n, a in self._all() if not a.elementwise}
        if not parts:
            return {}

        def measure(grad: Array) -> dict[str, PyTree]:
            return {n: a.measure(grad, spec) for n, a in parts.items()}

        def add(total: dict[str, PyTree], start: Array | int, count: int) -> dict[str, PyTree]:
            grad = self._clip(fetch(start, count)[0])

            def join(whole: Array, part: Array) -> Array:
                if whole.shape[-2] == 1:  # a mean over the rows
                    return whole + part * (count / spec.shape[-2])
                return lax.dynamic_update_slice_in_dim(whole, part, start, whole.ndim - 2)

            return jax.tree.map(join, total, measure(grad))

        shapes = jax.eval_shape(measure, jax.ShapeDtypeStruct(spec.shape, jnp.float32))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        measured = over_tiles(spec.shape[-2], size, add, zeros)
        out = {}
        for n in parts:
            whole = self._across(parts[n], measured[n], spec)
            new = self._advance(n, _at(state[n], index), whole, spec, number, controls)
            out[n] = jax.tree.map(lambda x, y: lax.dynamic_update_index_in_dim(x, y, index, 0), state[n], new)
        return out

    def _tiled_squares(
        self, spec: TensorSpec, tile: Callable[..., Any], moving: dict[str, PyTree], fixed: Any, size: int
    ) -> tuple[tuple[str, ...], Array]:
        """Returns (the names of the tensor's feature groups, mean squares of their planes)."""
        shape, axes = spec.shape, self.normalization.axes(spec)
        groups, planes, big = self._small_planes(spec, moving, fixed)
        kept = tuple(1 if a in axes else n for a, n in enumerate(shape))
        over_rows = kept[-2] == 1
        others = [a - len(shape) for a in axes if a != len(shape) - 2]

        def add(total: Array, start: Array | int, count: int) -> Array:
            view, _ = tile(moving, start, count)
            own = (*shape[:-2], count, shape[-1])
            if over_rows and count >= BLOCKS:
                sums = row_sums(lambda t: self._flat(spec, t), view, own, big)
                return total + jnp.sum(sums, others, keepdims=True)
            made = self._flat(spec, view)
            sums = jnp.stack([jnp.sum(made[j] * made[j], axes, keepdims=True) for j in big])
            if over_rows:
                return total + sums
            return lax.dynamic_update_slice_in_dim(total, sums, start, total.ndim - 2)

        total = over_tiles(shape[-2], size, add, jnp.zeros((len(big), *kept), jnp.float32))
        squares = dict(zip(big, total / math.prod(shape[a] for a in axes), strict=True))
        return groups, spec.across(self._with_small(squares, planes, spec), axes)

    def _small_planes(
        self, spec: TensorSpec, moving: Iterable[str], fixed: Any
    ) -> tuple[tuple[str, ...], list[Array], list[int]]:
        """Returns (the names of the feature groups, their planes, which of them are of the tensor's shape).

        Planes of row and column factors alone are small; others, made of zeros here, are never evaluated.
        """
        zeros = jnp.zeros(spec.shape, jnp.float32)
        stats = self.read(spec, {n: self.accumulators[n].init(spec) for n in moving})
        groups = self._groups(spec, (zeros, zeros, stats | fixed))
        planes = sum(groups.values(), [])
        return tuple(groups), planes, [j for j, x in enumerate(planes) if x.shape == spec.shape]

    def _with_small(self, squares: dict[int, Array], planes: Sequence[Array], spec: TensorSpec) -> Array:
        """Returns the mean squares of all planes, given those of the planes of the tensor's shape."""
        axes = self.normalization.axes(spec)
        kept = tuple(1 if a in axes else n for a, n in enumerate(spec.shape))
        own = {j: jnp.mean(x * x, axes, keepdims=True) for j, x in enumerate(planes) if j not in squares}
        return jnp.stack([jnp.broadcast_to((squares | own)[j], kept) for j in range(len(planes))])

    @staticmethod
    def _across(part: Accumulator, measured: PyTree, spec: TensorSpec) -> PyTree:
        """Returns what a whole tensor measures from what a share does; see :class:`Accumulator`."""
        if part.elementwise or not spec.shards:
            return measured

        def over_reduced(x: Array) -> Array:
            first = x.ndim - len(spec.shape)
            return spec.across(x, [a for a, n in enumerate(spec.shape) if n > 1 and x.shape[first + a] == 1])

        return jax.tree.map(over_reduced, measured)

    def _all(self) -> Any:
        return self.accumulators.items()

    def _advance(
        self,
        name: str,
        old: PyTree,
        measured: PyTree,
        spec: TensorSpec,
        number: Array | int,
        controls: Controls,
        offset: Array | int = 0,
    ) -> PyTree:
        """Returns an accumulator's next state as it is kept."""
        part = self.accumulators[name]
        new = part.update(self.storage.load(old), measured, spec, controls.decays.get(name))
        seed = mix(mix(self.seed, number), list(self.accumulators).index(name))
        return self.storage.keep(new, old, seed, offset)

    def _groups(self, spec: TensorSpec, tree: tuple[Array, Array, dict[str, Any]]) -> dict[str, list[Array]]:
        view = TensorView(param=tree[0], grad=tree[1], stats=tree[2], spec=spec)
        made = {name: feature.planes(view) for name, feature in self.features.items()}
        return {name: group for name, group in made.items() if group}

    def _flat(self, spec: TensorSpec, tree: tuple[Array, Array, dict[str, Any]]) -> list[Array]:
        return sum(self._groups(spec, tree).values(), [])

    def _prepare(
        self,
        spec: TensorSpec,
        groups: tuple[str, ...],
        squares: Array,
        controls: Controls,
        tensor: Callable[[], TensorView],
    ) -> dict[str, Array]:
        """Returns what the update rule shares over the tensor."""
        context, scale = self._context(spec, controls, tensor), self.normalization.scale(squares)
        return self.update_rule.prepare(groups, scale, context, controls)

    def _context(
        self, spec: TensorSpec, controls: Controls, tensor: Callable[[], TensorView]
    ) -> dict[str, Array]:
        """Returns the numbers of each context group."""
        shown = {} if controls.context is None else {"controls": controls.context}
        view = dataclasses.replace(self.run, shown=shown, spec=spec)
        if any(feature.looks for feature in self.context.values()):
            view = dataclasses.replace(view, tensor=tensor())
        return {name: feature.values(view) for name, feature in self.context.items()}

    def _fenced_rule(
        self, spec: TensorSpec, view: Any, prepared: PyTree, shape: tuple[int, ...], factor: Array | None
    ) -> tuple[Array, Array]:
        """Returns (step before orthogonalization, feedback) of a tensor or of a tile."""

        def rule(view: Any, prepared: PyTree) -> tuple[Array, Array]:
            direction, magnitude, more = self.update_rule(self._groups(spec, view), prepared, shape)
            step = self.step(direction, magnitude, spec)
            feedback = jnp.stack([jnp.mean(x) for x in more]) if more else jnp.zeros((0,), jnp.float32)
            return (step if factor is None else step * factor), feedback

        like = (view[1], jax.ShapeDtypeStruct((self.update_rule.feedback,), jnp.float32))
        return fence(rule, like, view, prepared)

    def _output_scale(
        self, step: Array, spec: TensorSpec, average: Array | None, square: Array | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """Returns the step's factor, and the next average of its mean square where one is kept.

        Args:
          step: after orthogonalization.
          spec: the tensor's description.
          average: of the mean squares of the steps before, as it is kept; None where none is.
          square: the step's mean square, where it is known.
        """
        norm = self.output_normalization
        if square is None:
            square = block_mean_squares(lambda x: [x], step, spec.shape, norm.axes(spec))[0]
            square = spec.across(square, norm.axes(spec))
        if norm.decay is None:
            return norm.scale(square), {}
        average = norm.decay * average + (1 - norm.decay) * square
        return norm.scale(average / (1 - norm.decay ** (self.run.count + 1.0))), {OUTPUT: average}


def over_tiles(full: int, size: int, body: Callable[..., PyTree], carry: PyTree) -> PyTree:
    """Runs ``body(carry, first row, rows)`` over tiles of ``size`` of ``full`` rows, the rest last."""
    count = full // size
    carry = lax.fori_loop(0, count, lambda j, c: body(c, j * size, size), carry)
    return body(carry, count * size, full - count * size) if full % size else carry


def tile_rows(shape: tuple[int, ...], limit: int) -> int:
    """Returns how many rows a tile of at most ``limit`` elements has; 0 for a tensor that is not cut.

    A divisor of the rows where one is not much smaller: a rest compiles a second time.

    Example:
      >>> tile_rows((4096, 512), 65536), tile_rows((8, 8), 65536), tile_rows((50257, 512), 65536)
      (128, 0, 128)
    """
    if limit == 0 or len(shape) < 2 or math.prod(shape) <= limit:
        return 0
    full = shape[-2]
    most = min(full, max(1, limit * full // math.prod(shape)))
    divisor = next(d for d in range(most, 0, -1) if full % d == 0)
    size = divisor if 2 * divisor > most else most
    return size if size < full else 0


def _at(tree: PyTree, index: Array) -> PyTree:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _rows(tree: PyTree, index: Array, start: Array | int, count: int) -> PyTree:
    """Returns rows of one of the stacked tensors; leaves ``[tensors, ..., n, m]``."""

    def cut(x: Array) -> Array:
        at = _start(x, index, start)
        return lax.dynamic_slice(x, at, (1, *x.shape[1:-2], count, x.shape[-1]))[0]

    return jax.tree.map(cut, tree)


def _put_rows(tree: PyTree, new: PyTree, index: Array, start: Array | int) -> PyTree:
    """Writes rows of one of the stacked tensors in place."""

    def put(x: Array, y: Array) -> Array:
        return lax.dynamic_update_slice(x, y[None], _start(x, index, start))

    return jax.tree.map(put, tree, new)


def _start(x: Array, index: Array, start: Array | int) -> list[Array]:
    at = [index] + [0] * (x.ndim - 1)
    at[-2] = start
    return [jnp.asarray(a, jnp.int32) for a in at]  # of one type, with 64 bits enabled too
