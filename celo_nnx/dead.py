"""Which meta-parameters have no effect on any update, found by experiment.

Let ``u(theta)`` be five updates of small tensors of ranks 0 to 4, with random gradients, parameters and
losses. An entry of theta is dead if no value of it changes ``u``. Two tests find those of any variant:

1. The gradient of a random linear functional ``<c, u(theta)>`` gives all of theta at once, exactly, without
   rounding hiding a small effect. Entries for which it differs from 0 at one of sixteen random theta are
   alive. The theta come in pairs around 0 and around the given one, at several scales, so that a unit of relu
   that is off at one is on at another, and what is clipped at one is not at another. One tensor is enough
   for most entries, and compiles quickly.
2. The rest is a guess, since a derivative may vanish where there is an effect. So the rest is redrawn, all at
   once, small and large, and ``u`` of the tensors of all ranks must stay the same to the last bit. Where it
   does not, gradients on tensors of the other ranks follow, then halves of what is left are redrawn.

NaN in an entry's place tells why it is dead: where updates stay the same, none reads it; where NaN spreads,
it is read and cancels (a softmax of one number). What only tensors of more axes or longer runs would need is
reported as dead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from celo_nnx.errors import UserError
from celo_nnx.optimizer import LEARNED, LearnedOptimizer
from celo_nnx.settings import Settings
from celo_nnx.tensors import Tensors, tensor_paths

Leaves = list[np.ndarray]
Shapes = dict[str, tuple[int, ...]]

# In the order in which gradients are taken.
SHAPES: Shapes = {
    "rank2/kernel": (3, 4),
    "rank1/kernel": (3,),
    "rank4/kernel": (2, 2, 3, 4),
    "rank3/kernel": (2, 3, 4),
    "rank0/kernel": (),
}
UPDATES = 5
SCALES = (0.3, 0.03, 1.0, 0.1)
THETAS = 4 * len(SCALES)
AMPLITUDES = (1.0, 1e3)
MOST_RUNS = 4000  # of the search by halves; what is left counts as alive
# Compilation takes nearly all of the time, and the programs run for milliseconds.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_llvm_disable_expensive_passes": True,
}


@dataclasses.dataclass(frozen=True)
class Dead:
    """Meta-parameters without effect.

    Attributes:
      where: a folder of theta, a leaf, or a slice of one: ``"update_rule/w2[:, 1:]"``.
      count: how many.
      read: whether an update reads them, so that their effect cancels.
    """

    where: str
    count: int
    read: bool


def find_dead(optimizer: LearnedOptimizer) -> list[Dead]:
    """Finds the meta-parameters that have no effect, as the module's docstring says.

    Args:
      optimizer: any; its theta only is a place to search around.

    Returns:
      Folders, leaves and slices, in theta's order, that do not overlap.

    Raises:
      UserError: the routing sends no tensor to the learned rule.
    """
    names = [path for path, _ in tensor_paths(optimizer.theta)]
    if not names:
        return []
    probe = _Probe(optimizer)
    masks = _dead_masks(probe)
    return [
        Dead(where, sum(int(m.sum()) for m in part), not probe.same(part, [np.float32(np.nan)]))
        for where, part in _places(names, masks)
    ]


def report(dead: Sequence[Dead], total: int) -> str:
    """Returns a table of :func:`find_dead`'s result.

    Example:
      >>> print(report([Dead("update_rule/b2[1:]", 2, False)], 347))
      meta-parameters without effect: 2 of 347
        update_rule/b2[1:]      2  no update reads them
    """
    lines = [f"meta-parameters without effect: {sum(d.count for d in dead):,} of {total:,}"]
    wide = max((len(d.where) for d in dead), default=0)
    for d in dead:
        reason = "read, but no value of them changes an update" if d.read else "no update reads them"
        lines.append(f"  {d.where:<{wide}}  {d.count:>5,}  {reason}")
    return "\n".join(lines)


class _Probe:
    """Compiled experiments on one optimizer."""

    def __init__(self, optimizer: LearnedOptimizer) -> None:
        # How state is stored and large tensors are worked on changes no entry's part in the arithmetic;
        # rounding to bfloat16 has no derivative, and axes by path are not for these tensors.
        plain = Settings(tensors=Tensors(axes=optimizer.settings.tensors.axes))
        self._optimizer = optimizer.with_settings(**vars(plain))
        for part in (self._optimizer.routing, self._optimizer.rate_scale):
            part.patterns = ()  # need not be found in the names of these tensors
        params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
        routes = {name: self._optimizer.routing(name, x.shape) for name, x in params.items()}
        self.learned = [name for name in SHAPES if routes[name] == LEARNED]
        if not self.learned:
            raise UserError(f"the routing sends no tensor to the learned rule, of {', '.join(SHAPES)}")
        leaves, self._tree = jax.tree.flatten(optimizer.theta)
        self.theta: Leaves = [np.asarray(leaf) for leaf in leaves]
        self._updates = self._compiled(self._flat_updates, tuple(SHAPES))
        self._before: dict[int, np.ndarray] = {}
        self.runs = 0

    def _flat_updates(self, leaves: Sequence[Any], key: Any, names: tuple[str, ...]) -> Any:
        """Returns all updates of five steps, ``[5, elements]``."""
        optimizer = self._optimizer.with_theta(jax.tree.unflatten(self._tree, leaves))
        shapes = {name: SHAPES[name] for name in names}
        state = optimizer.init({name: jnp.ones(shape) for name, shape in shapes.items()}, 100)

        def step(state: Any, key: Any) -> tuple[Any, Any]:
            keys = jax.random.split(key, 4)
            size = 10.0 ** jax.random.uniform(keys[2], (), minval=-2.0, maxval=1.0)
            grads = {n: size * x for n, x in _drawn(shapes, keys[0]).items()}
            value = jax.random.uniform(keys[3], (), minval=0.5, maxval=2.0)
            updates, state = optimizer.update(grads, state, _drawn(shapes, keys[1]), value=value)
            return state, jnp.concatenate([x.ravel() for x in updates.values()])

        return jax.lax.scan(step, state, jax.random.split(key, UPDATES))[1]

    def _compiled(self, function: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
        """Returns ``run(leaves, number)``, the function at a key of that number."""
        device = _cpu()
        with jax.default_device(device):
            lowered = jax.jit(function, static_argnums=2).lower(self.theta, jax.random.key(0), names)
            try:
                compiled = lowered.compile(QUICK)
            except jax.errors.JaxRuntimeError:  # a release of XLA without one of the options
                compiled = lowered.compile()

        def run(leaves: Leaves, number: int) -> Any:
            with jax.default_device(device):
                return jax.device_get(compiled(leaves, jax.random.key(number)))

        return run

    def gradients(self, name: str) -> Iterator[Leaves]:
        """Yields the gradient of a random functional of one tensor's updates, at each of the random theta."""

        def functional(leaves: Any, key: Any, names: tuple[str, ...]) -> Any:
            updates = self._flat_updates(leaves, key, names)
            return jnp.sum(updates * jax.random.normal(jax.random.fold_in(key, 1), updates.shape))

        run = self._compiled(jax.grad(functional), (name,))
        for number in range(THETAS):
            yield run(_random_theta(self.theta, number), number)

    def same(self, masks: Leaves, fillers: Sequence[np.float32] = ()) -> bool:
        """Tells whether updates stay the same to the last bit when the masked entries are redrawn.

        Args:
          masks: booleans like theta's leaves.
          fillers: numbers that are put there instead of random ones.
        """
        for number in range(THETAS):
            theta = _random_theta(self.theta, number)
            if number not in self._before:
                self._before[number] = self._updates(theta, number)
            rng = np.random.default_rng((number, 1))
            for size in fillers or AMPLITUDES:
                drawn = [size * (1 if fillers else _normal(x, rng)) for x in theta]
                other = [np.where(m, d, x) for m, d, x in zip(masks, drawn, theta, strict=True)]
                self.runs += 1
                after = self._updates([x.astype(np.float32) for x in other], number)
                if not np.array_equal(self._before[number], after, equal_nan=True):
                    return False
        return True


def _cpu() -> Any:
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        return jax.devices()[0]


def _drawn(shapes: Shapes, key: Any) -> dict[str, Any]:
    keys = jax.random.split(key, len(shapes))
    return {name: jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}


def _normal(leaf: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns random numbers like a leaf; those of a matrix keep the size of what it is multiplied with."""
    drawn = rng.normal(size=leaf.shape)
    return drawn / np.sqrt(leaf.shape[-2]) if leaf.ndim >= 2 else drawn


def _random_theta(start: Leaves, number: int) -> Leaves:
    """Returns a random theta: pairs ``centre + x``, ``centre - x``, around 0 and around ``start``."""
    pair, sign = number // 2, 1 - 2 * (number % 2)
    rng, scale = np.random.default_rng((pair, 0)), SCALES[pair // 2]
    noise = [sign * scale * _normal(x, rng) for x in start]
    return [np.asarray(x * (pair % 2) + n, np.float32) for x, n in zip(start, noise, strict=True)]


def _dead_masks(probe: _Probe) -> Leaves:
    """Returns which entries are dead, as booleans like theta's leaves."""
    left = [np.ones(x.shape, bool) for x in probe.theta]
    for name in probe.learned:
        for gradient in probe.gradients(name):
            left = [m & ~(np.isfinite(g) & (g != 0)) for m, g in zip(left, gradient, strict=True)]
        if not any(m.any() for m in left) or probe.same(left):
            return left
    nothing = [np.zeros_like(m) for m in left]
    return [_by_halves(probe, nothing, i, mask) for i, mask in enumerate(left)]


def _by_halves(probe: _Probe, nothing: Leaves, index: int, mask: np.ndarray) -> np.ndarray:
    """Returns the entries of one leaf, among the masked ones, that can be redrawn without a change."""
    found, waiting = np.zeros_like(mask), [mask]
    while waiting and probe.runs < MOST_RUNS:
        part = waiting.pop()
        if not part.any():
            continue
        if probe.same([part if i == index else m for i, m in enumerate(nothing)]):
            found |= part
        elif part.sum() > 1:
            indices = _indices(part)
            axis = max(range(part.ndim), key=lambda a: len(indices[a]))
            half = np.zeros(part.shape[axis], bool)
            half[indices[axis][: len(indices[axis]) // 2]] = True
            half = half.reshape([-1 if a == axis else 1 for a in range(part.ndim)])
            waiting += [part & half, part & ~half]
    return found


def _places(names: Sequence[str], masks: Leaves) -> Iterator[tuple[str, Leaves]]:
    """Yields (name, masks like theta's leaves) of what is dead: whole folders first, then leaves, slices."""
    nothing = [np.zeros_like(m) for m in masks]
    done = 0
    for i, (name, mask) in enumerate(zip(names, masks, strict=True)):
        if i < done or not mask.any():
            continue
        if not mask.all():
            for where, box in _boxes(mask):
                yield name + where, [box if j == i else m for j, m in enumerate(nothing)]
            continue
        folders = name.split("/")
        for depth in range(1, len(folders) + 1):  # the outermost folder that is dead as a whole
            prefix = "/".join(folders[:depth])
            inside = [j for j, n in enumerate(names) if n == prefix or n.startswith(f"{prefix}/")]
            if all(masks[j].all() for j in inside):
                break
        done = inside[-1] + 1
        yield prefix, [masks[j] if j in inside else m for j, m in enumerate(nothing)]


def _indices(mask: np.ndarray) -> list[np.ndarray]:
    """Returns, for each axis, the indices at which something is masked."""
    others = [tuple(b for b in range(mask.ndim) if b != a) for a in range(mask.ndim)]
    return [np.flatnonzero(mask.any(axes)) for axes in others]


def _boxes(mask: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (slice, part) of a mask: the whole if it is a box, else slices through all of an axis, a rest.

    Example:
      >>> [where for where, _ in _boxes(np.array([[True, False], [True, True]]))]
      ['[1, :]', '[0, 0]']
    """
    for axis in (*range(mask.ndim), None):
        part = mask
        if axis is not None and not _is_box(mask):
            others = tuple(b for b in range(mask.ndim) if b != axis)
            part = mask & mask.all(others, keepdims=True)
        if part.any() and _is_box(part):
            text = (_slice(i, n) for i, n in zip(_indices(part), mask.shape, strict=True))
            yield f"[{', '.join(text)}]", part
        elif axis is None and part.any():
            first = ", ".join(str(i) for i in np.argwhere(part)[0])
            yield f"[{first}] and others", part
        else:
            continue
        mask = mask & ~part


def _is_box(mask: np.ndarray) -> bool:
    return bool(mask[np.ix_(*_indices(mask))].all())


def _slice(indices: np.ndarray, size: int) -> str:
    """Returns indices of an axis as they are written in brackets.

    Example:
      >>> [_slice(np.array(i), 4) for i in ([2], [2, 3], [0, 1], [1, 2], [0, 1, 2, 3], [0, 2])]
      ['2', '2:', ':2', '1:3', ':', '(0, 2)']
    """
    first, last = int(indices[0]), int(indices[-1])
    if len(indices) == size and size > 1:
        return ":"
    if len(indices) == 1:
        return str(first)
    if last - first + 1 > len(indices):
        return f"({', '.join(str(i) for i in indices)})"
    return f"{first if first else ''}:{last + 1 if last + 1 < size else ''}"
