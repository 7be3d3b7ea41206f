"""A small network trained by the rule: what the rule was given, what it did, and what without a feature.

Each lane of a run is one theta and one seed: the first theta is the rule itself, each further one cannot see
one feature group. In every step the lanes go on by themselves, and all thetas are also tried where the rule
itself stands, so that their steps can be compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from celo_nnx.errors import UserError, require
from celo_nnx.explain.subject import first_layer, without
from celo_nnx.interfaces import Controls, Family, Look, TensorSpec
from celo_nnx.optimizer import LearnedOptimizer
from celo_nnx.tasks import build_families
from celo_nnx.tensors import tensor_paths

Array = jax.Array
PyTree = Any

AGAINST = ("momentum", "adam", "sign", "gradient")  # what steps are compared with
MOST = 100_000  # steps, all of which are kept
DECAY = 0.9  # of the momentum that steps are compared with


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One learned tensor over the recorded steps, of the first seed; ``T`` steps, ``n`` elements.

    Attributes:
      spec: how it is looked at.
      groups: its feature groups with the number of planes of each, in order.
      planes: what the MLP is given, normalized, ``[T, planes, n]``.
      raw: the MLP's step, before orthogonalization and output normalization, ``[T, n]``.
      step: the step as it is made, up to a factor for the whole tensor, ``[T, n]``.
      against: momentum, Adam, sign and the gradient itself, ``[T, n]`` each.
      aligned: the same after the rule's own orthogonalization; empty where it has none.
      context, controls: what the MLP is given besides, leaves ``[T, ...]``.
      change: of the step without a feature group, by group: RMS over that of the step, ``[seeds, T]``.
      raw_change: the same of the MLP's step, of the first seed, ``[1, T]``.
      cosine: between the step and that without a feature group, by group, ``[seeds, T]``.
    """

    spec: TensorSpec
    groups: tuple[tuple[str, int], ...]
    planes: np.ndarray
    raw: np.ndarray
    step: np.ndarray
    against: dict[str, np.ndarray]
    aligned: dict[str, np.ndarray]
    context: dict[str, np.ndarray]
    controls: Controls
    change: dict[str, np.ndarray]
    raw_change: dict[str, np.ndarray]
    cosine: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Recording:
    """What a rule did on a network.

    Attributes:
      learning_rate: at which it trained.
      losses: training losses of the rule, ``[seeds, T]``.
      losses_without: the same for a rule that cannot see a feature group, by group.
      tensors: by path; those that the routing leaves to the learned rule.
    """

    learning_rate: float
    losses: np.ndarray
    losses_without: dict[str, np.ndarray]
    tensors: dict[str, Tensor]


def digits(hidden: tuple[int, ...] = (32,), batch_size: int = 64) -> Family:
    """Returns the network that is trained by default, an MLP on 8x8 digits, and its data."""
    section = dict(kind="image_mlp", datasets=("digits",), image_size=8)
    return build_families(section | dict(hidden=hidden, batch_size=batch_size), "")[0]


def record(
    optimizer: LearnedOptimizer,
    family: Family | None = None,
    *,
    steps: int = 60,
    seeds: int = 3,
    learning_rate: float | None = None,
    told: Callable[[int], None] = lambda step: None,
) -> Recording:
    """Trains a network with the rule and records it.

    Args:
      optimizer: its update rule is an MLP over features.
      family: the network and its data; by default :func:`digits`.
      steps: updates, from 2 to :data:`MOST`.
      seeds: networks, at least 1; each starts and draws batches in its own way, the same for every theta.
      learning_rate: by default the optimizer's schedule.
      told: is called with the number of steps done, after each.

    Returns:
      The recording, numpy.

    Raises:
      UserError: no MLP, a number out of range, or a network without a tensor for the learned rule.

    Example:
      >>> from celo_nnx import load_optimizer
      >>> recording = record(load_optimizer("celo2"), steps=60)  # doctest: +SKIP
    """
    require(type(steps) is int and 2 <= steps <= MOST, "steps", steps, f"an integer from 2 to {MOST}")
    require(type(seeds) is int and seeds >= 1, "seeds", seeds, "an integer of at least 1")
    optimizer = optimizer.with_settings(kernel="xla", tile=0)
    groups = tuple(first_layer(optimizer))
    lanes = _Lanes(optimizer, family or digits(), groups, steps, seeds, learning_rate)
    lanes.start()
    rows = []
    for step in range(steps):
        rows.append(lanes.advance(step))
        told(step + 1)
    losses = np.stack([row.losses for row in rows], axis=-1)
    rate = learning_rate
    if rate is None:
        rate = float(optimizer.schedule.base(jnp.int32(0), jnp.int32(steps)))
    return Recording(
        learning_rate=rate,
        losses=losses[0],
        losses_without=dict(zip(groups, losses[1:], strict=True)),
        tensors={
            path: _joined(spec, lanes.groups[path], [row.tensors[path] for row in rows], groups)
            for path, spec in lanes.specs.items()
        },
    )


@dataclasses.dataclass(frozen=True)
class _Row:
    """One step: losses ``[thetas, seeds]`` and, by path, what is recorded of a tensor."""

    losses: np.ndarray
    tensors: dict[str, dict[str, Any]]


class _Lanes:
    """The programs of a recording, compiled once each, and where its lanes stand."""

    def __init__(
        self,
        optimizer: LearnedOptimizer,
        family: Family,
        groups: tuple[str, ...],
        steps: int,
        seeds: int,
        learning_rate: float | None,
    ) -> None:
        self.optimizer, self.task, self.steps, self.seeds = optimizer, family.task, steps, seeds
        self.data = jax.tree.map(jnp.asarray, dict(family.train))
        self.options = dict(weight_decay=0.0, learning_rate=learning_rate)
        thetas = [optimizer.theta, *(without(optimizer, group) for group in groups)]
        self.thetas = jax.tree.map(lambda *x: jnp.stack(x), *thetas)
        self.count = len(thetas)
        self.adam = optax.scale_by_adam()
        self.specs: dict[str, TensorSpec] = {}
        self.groups: dict[str, tuple[tuple[str, int], ...]] = {}
        self.grads = jax.jit(jax.vmap(jax.vmap(self._grads, (0, 0, 0, None)), (None, 0, 0, None)))
        per_seed = jax.vmap(self._update, (None, 0, 0, 0, 0))
        self.update = jax.jit(jax.vmap(per_seed, (0, 0, 0, 0, 0)))
        self.look = jax.jit(self._look)

    def start(self) -> None:
        """Makes the state of every lane."""

        def one(seed: Array) -> PyTree:
            sample_key, init_key, self_key = jax.random.split(jax.random.key(seed), 3)
            sample = self.task.sample(sample_key)
            params, model = self.task.init(init_key, sample)
            return (self_key, sample), (params, model, self.optimizer.init(params, self.steps))

        keys, lanes = jax.jit(jax.vmap(one))(jnp.arange(self.seeds, dtype=jnp.uint32))
        repeat = lambda x: jnp.broadcast_to(x, (self.count, *x.shape))  # noqa: E731
        self.keys, (self.params, self.model, self.state) = keys, jax.tree.map(repeat, lanes)
        first, state = self._first(self.params), self._first(self.state)

        def seen() -> int:
            # Jitted functions give dicts back sorted, and planes are in the order of the groups.
            for path, look in self.optimizer.look(first, state, first, value=0.0).items():
                self.specs[path] = look.spec
                self.groups[path] = tuple((name, len(planes)) for name, planes in look.planes.items())
            return 0

        jax.eval_shape(seen)
        if not self.specs:
            raise UserError("the routing leaves no tensor of the network to the learned rule")
        self.momentum = jax.tree.map(jnp.zeros_like, first)
        self.moments = self.adam.init(first)

    def _first(self, tree: PyTree) -> PyTree:
        """The rule itself with the first seed."""
        return jax.tree.map(lambda x: x[0, 0], tree)

    def _grads(self, keys: PyTree, params: PyTree, model: PyTree, step: Array) -> PyTree:
        draw_key, loss_key = jax.random.split(jax.random.fold_in(keys[0], step))
        batch = self.task.draw(
            self.data, draw_key, jnp.int32(0), jnp.int32(len(jax.tree.leaves(self.data)[0]))
        )

        def objective(params: PyTree) -> tuple[Array, PyTree]:
            loss, new, _ = self.task.loss(params, model, loss_key, batch, keys[1])
            return loss, new

        return jax.value_and_grad(objective, has_aux=True)(params)

    def _update(self, theta: PyTree, grads: PyTree, state: PyTree, params: PyTree, value: Array) -> PyTree:
        rule = self.optimizer.with_theta(theta)
        return rule.update(grads, state, params, value=value, **self.options)

    def _look(
        self,
        thetas: PyTree,
        here: tuple[PyTree, PyTree, PyTree, Array],
        momentum: PyTree,
        moments: PyTree,
    ) -> tuple[dict[str, dict[str, Any]], PyTree, PyTree]:
        """What the rule is given in a step, and what others would do: by path, then the others' states."""
        grads, state, params, value = here
        momentum = jax.tree.map(lambda m, g: DECAY * m + (1 - DECAY) * g, momentum, grads)
        adam, moments = self.adam.update(grads, moments)
        others = dict(zip(AGAINST, (momentum, adam, jax.tree.map(jnp.sign, grads), grads), strict=True))
        others = {name: dict(tensor_paths(tree)) for name, tree in others.items()}
        out = {}
        for path, look in self.optimizer.look(grads, state, params, value=value).items():
            pairs = zip(sum(look.planes.values(), []), look.scale, strict=True)
            normal = [jnp.broadcast_to(x * s, look.spec.shape) for x, s in pairs]
            raw = jax.vmap(lambda theta, look=look: raw_step(self.optimizer.with_theta(theta), look))
            against = {name: look.spec.enter(tree[path]) for name, tree in others.items()}
            turned = self.optimizer.orthogonalization
            aligned = {name: turned(x, look.spec) for name, x in against.items()}
            out[path] = dict(
                context=look.context,
                controls=look.controls,
                planes=jnp.stack([x.ravel() for x in normal]),
                raw=raw(thetas),
                against=against,
                aligned={} if all(aligned[name] is against[name] for name in AGAINST) else aligned,
            )
        return out, momentum, moments

    def advance(self, step: int) -> _Row:
        """Does one step of every lane."""
        (value, model), grads = self.grads(self.keys, self.params, self.model, jnp.int32(step))
        here = (grads, self.state, self.params, value)
        shared = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), here)
        tried, _ = self.update(self.thetas, *shared)
        found, self.momentum, self.moments = self.look(
            self.thetas, self._first(here), self.momentum, self.moments
        )
        updates, self.state = self.update(self.thetas, *here)
        self.params, self.model = optax.apply_updates(self.params, updates), model
        tried = {path: np.asarray(-x, np.float64) for path, x in tensor_paths(tried)}
        found = jax.device_get(found)
        for path, spec in self.specs.items():
            raw = found[path]["raw"]
            found[path] |= compared(tried[path]) | {"step": spec.enter(tried[path][0, 0]), "raw": raw[0]}
            found[path]["raw_change"] = compared(raw[:, None])["change"]
        return _Row(np.asarray(value), found)


def raw_step(optimizer: LearnedOptimizer, look: Look) -> Array:
    """Returns the MLP's step ``[*S]``, before the tensor's factor, orthogonalization and normalization."""
    rule = optimizer.update_rule
    prepared = rule.prepare(tuple(look.planes), look.scale, look.context, look.controls)
    direction, magnitude, _ = rule(look.planes, prepared, look.spec.shape)
    return optimizer.step(direction, magnitude, look.spec)


def compared(steps: np.ndarray) -> dict[str, np.ndarray]:
    """Compares steps with the first of them.

    Args:
      steps: ``[1 + others, seeds, *S]``.

    Returns:
      ``change``, RMS of the difference over that of the first, and ``cosine``, both ``[others, seeds]``; 0
      and 1 where nothing moves.

    Example:
      >>> {k: v.tolist() for k, v in compared(np.array([[[3.0, 4.0]], [[6.0, 8.0]]])).items()}
      {'change': [[1.0]], 'cosine': [[1.0]]}
    """
    flat = steps.reshape(*steps.shape[:2], -1)
    size = np.linalg.norm(flat, axis=-1)
    apart = np.linalg.norm(flat[1:] - flat[:1], axis=-1)
    change = np.divide(apart, size[0], out=np.where(apart > 0, np.inf, 0.0), where=size[0] > 0)
    return {"change": change, "cosine": cosine(flat[1:], flat[:1])}


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the cosine between vectors ``[..., n]``; 0 where one of them is zero, 1 where both are."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    sizes = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
    product = np.asarray(sizes[0] * sizes[1])
    neither = np.asarray((sizes[0] == 0) & (sizes[1] == 0), np.float64)
    return np.where(product > 0, np.sum(a * b, -1) / np.where(product > 0, product, 1.0), neither)


def _joined(
    spec: TensorSpec, own: tuple[tuple[str, int], ...], rows: list[dict[str, Any]], groups: tuple[str, ...]
) -> Tensor:
    """Puts the steps of one tensor together; ``own`` are its groups, ``groups`` all that were left out."""

    def over_steps(*leaves: np.ndarray) -> np.ndarray:
        return np.stack(leaves)

    def flat(name: str) -> Any:
        made = jax.tree.map(over_steps, *[row[name] for row in rows])
        return jax.tree.map(lambda x: x.reshape(len(rows), -1), made)

    def by_group(name: str) -> dict[str, np.ndarray]:
        return dict(zip(groups, np.stack([row[name] for row in rows], axis=-1), strict=True))

    return Tensor(
        spec=spec,
        groups=own,
        planes=np.stack([row["planes"] for row in rows]),
        **{name: flat(name) for name in ("raw", "step", "against", "aligned")},
        **{name: jax.tree.map(over_steps, *[row[name] for row in rows]) for name in ("context", "controls")},
        **{name: by_group(name) for name in ("change", "raw_change", "cosine")},
    )


def fullest(recording: Recording) -> Mapping[str, Tensor]:
    """Returns the recorded tensors that show the most planes: the others lack some feature groups."""
    most = max(x.planes.shape[1] for x in recording.tensors.values())
    return {path: x for path, x in recording.tensors.items() if x.planes.shape[1] == most}
