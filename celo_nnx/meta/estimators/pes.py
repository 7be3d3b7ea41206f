"""Persistent evolution strategies (PES) with antithetic pairs over several task families.

Vicol, Metz and Sohl-Dickstein, "Unbiased Gradient Estimation in Unrolled Computation Graphs with Persistent
Evolution Strategies", ICML 2021; as restated in META_TRAINING sections 2 to 5.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from celo_nnx.errors import UserError, require, unknown
from celo_nnx.interfaces import Array, Family, Optimizer, PyTree, Task, TruncationSchedule
from celo_nnx.meta.truncation import LogUniform, is_count
from celo_nnx.meta.unroll import Problems, Source, fresh, partly_done, unroll

FINISHED_STEP = ("exact", "published")
AXIS = "particles"


def _scaled(weight: Array, leaf: Array) -> Array:
    """Multiplies ``leaf`` ``[N, ...]`` by one weight ``[N]`` each."""
    return weight.reshape(weight.shape + (1,) * (leaf.ndim - weight.ndim)) * leaf


def _flatten(tree: PyTree) -> Array:
    """Returns all leaves as one vector."""
    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])


def _unflatten(flat: Array, like: PyTree) -> PyTree:
    """Splits vectors ``[n, size]`` into trees; leaves ``[n, ...]``."""
    leaves, treedef = jax.tree.flatten(like)
    ends = np.cumsum([leaf.size for leaf in leaves]).tolist()
    parts = jnp.split(flat, ends[:-1], axis=1)
    shaped = [x.reshape(len(flat), *leaf.shape) for x, leaf in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(treedef, shaped)


def pes_terms(
    pos_loss: Array,
    neg_loss: Array,
    done: Array,
    mask: Array,
    perturbation: PyTree,
    accumulator: PyTree,
    std: Array | float,
    finished_step: str,
) -> tuple[PyTree, PyTree, Array]:
    """The PES estimate of each pair; arguments and mathematics as in :func:`pes_gradient`.

    Returns:
      (estimates, leaves ``[N, ...]``; next accumulator; mean loss ``[N]``).
    """
    ended = lax.cummax(done.astype(jnp.int32), axis=0) > 0
    # Steps of trajectories that began inside this truncation know its perturbation only.
    new = ended if finished_step == "published" else jnp.concatenate([jnp.zeros_like(ended[:1]), ended[:-1]])
    counted = jnp.maximum(jnp.sum(mask, 0), 1)
    delta = jnp.where(mask, pos_loss - neg_loss, 0.0)
    old_part = jnp.sum(jnp.where(new, 0.0, delta), 0) / counted
    new_part = jnp.sum(jnp.where(new, delta, 0.0), 0) / counted

    total = jax.tree.map(jnp.add, accumulator, perturbation)
    scale = 1.0 / (2.0 * jnp.square(std))
    estimate = jax.tree.map(
        lambda a, v: (_scaled(old_part, a) + _scaled(new_part, v)) * scale, total, perturbation
    )
    keep_total = (~ended[-1]).astype(jnp.float32)
    keep_new = ended[-1]
    if finished_step == "exact":
        # After an end with the last step the next trajectory has seen nothing yet: it begins afterwards.
        keep_new = keep_new & ~done[-1]
    keep_new = keep_new.astype(jnp.float32)
    carried = jax.tree.map(lambda a, v: _scaled(keep_total, a) + _scaled(keep_new, v), total, perturbation)
    mean_loss = jnp.sum(jnp.where(mask, pos_loss + neg_loss, 0.0), 0) / (2.0 * counted)
    return estimate, carried, mean_loss


def pes_gradient(
    pos_loss: Array,
    neg_loss: Array,
    done: Array,
    mask: Array,
    perturbation: PyTree,
    accumulator: PyTree,
    std: Array | float,
    finished_step: str = "exact",
) -> tuple[PyTree, PyTree, Array]:
    """The PES gradient from the losses of one truncation of ``N`` antithetic pairs.

    With ``A = accumulator + perturbation``, ``k`` the mask and ``F`` marking the steps of trajectories that
    began in this truncation::

        g = mean_n [ A_n sum_t (l+ - l-) (1 - F) k + v_n sum_t (l+ - l-) F k ] / (2 std^2 sum_t k)

    ``exact``: F begins after the step that ends a trajectory, so its last loss is credited to all that moved
    it, and a trajectory that ends with the truncation leaves accumulator 0. ``published``: F includes that
    step, and the accumulator is then ``v_n``; biased.

    Args:
      pos_loss, neg_loss: meta-losses with theta + v and theta - v, ``[T, N]``.
      done: whether the trajectory ended with the step, ``[T, N]`` bool.
      mask: whether the step counts, ``[T, N]`` bool.
      perturbation: v, leaves ``[N, ...]``.
      accumulator: sum of the perturbations that the trajectory has seen before, leaves ``[N, ...]``.
      std: standard deviation of the perturbation.
      finished_step: ``exact`` or ``published``.

    Returns:
      (gradient, next accumulator, mean loss scalar).

    Raises:
      UserError: for an unknown ``finished_step``.

    Source: META_TRAINING section 4.
    """
    if finished_step not in FINISHED_STEP:
        raise unknown("finished_step", finished_step, FINISHED_STEP)
    estimate, accumulator, loss = pes_terms(
        pos_loss, neg_loss, done, mask, perturbation, accumulator, std, finished_step
    )
    return jax.tree.map(lambda g: jnp.mean(g, 0), estimate), accumulator, jnp.mean(loss)


@dataclasses.dataclass(frozen=True)
class Group:
    """Families of one task, side by side in one batch: family ``f``'s pairs are ``f * pairs ...``.

    Attributes:
      task: the task after augmentation.
      members: index of each family among all.
      start, count: first example and number of examples of each family in the group's arrays.
    """

    task: Task
    members: tuple[int, ...]
    start: tuple[int, ...]
    count: tuple[int, ...]


class GroupState(NamedTuple):
    """State of one group: its inner problems, and the PES accumulator, ``[N, size of theta]``.

    Perturbations, accumulators and estimates are flat: leaf by leaf they are hundreds of tiny ops.
    """

    problems: Problems
    accumulator: Array


def _grouped(
    families: Sequence[Family], augmentation: Callable[[Task], Task]
) -> tuple[list[Group], list[dict]]:
    """Puts families with equal tasks together; returns the groups and their arrays, on the device."""
    by_task: dict[Task, list[int]] = {}
    for index, family in enumerate(families):
        by_task.setdefault(family.task, []).append(index)
    groups, data = [], []
    for task, members in by_task.items():
        parts = [families[i].train for i in members]
        forms = [{k: (v.shape[1:], v.dtype) for k, v in part.items()} for part in parts]
        sizes = [len(next(iter(part.values()))) for part in parts]
        for i, form, size in zip(members, forms, sizes, strict=True):
            if form != forms[0] or size < 1 or any(len(v) != size for v in families[i].train.values()):
                raise UserError(
                    f"the training arrays of task family {families[i].name!r} do not fit those of "
                    f"{families[members[0]].name!r}, whose task is the same: {form} against {forms[0]}"
                )
        starts = np.cumsum([0, *sizes[:-1]])
        groups.append(Group(augmentation(task), tuple(members), tuple(starts.tolist()), tuple(sizes)))
        data.append({k: jax.device_put(np.concatenate([part[k] for part in parts])) for k in parts[0]})
    return groups, data


class PES:
    """Truncated PES over task families, each with the same number of antithetic pairs.

    A meta-iteration draws one ``v = std * N(0, I)`` for each pair, trains both sides for ``truncation`` inner
    steps from where the last meta-iteration left them, and averages :func:`pes_gradient` over the families
    with equal weights. Non-finite entries of the gradient become 0.

    With ``devices > 1`` pairs are spread over a mesh axis; what a pair does depends on its number only.

    Args:
      optimizer: the optimizer whose theta is learned.
      families: at least one; equal tasks run as one vmapped batch.
      pairs: antithetic pairs a family.
      std: standard deviation of the perturbation.
      truncation: inner steps a meta-iteration, ``T``.
      finished_step: ``exact`` or ``published`` (see :func:`pes_gradient`).
      unroll: draws the lengths of trajectories.
      augmentation: makes the task that is trained from a family's task.
      devices: how many devices share the pairs.

    Raises:
      UserError: for a value out of range, or families times pairs that the devices cannot share equally.

    Example:
      >>> estimator = PES(optimizer, families, pairs=8, std=0.01, truncation=50)  # doctest: +SKIP
      >>> state = estimator.init(optimizer.theta, jax.random.key(0))  # doctest: +SKIP
      >>> gradient, state, metrics = estimator(optimizer.theta, state, jax.random.key(1))  # doctest: +SKIP
    """

    def __init__(
        self,
        optimizer: Optimizer,
        families: Sequence[Family],
        *,
        pairs: int = 8,
        std: float = 0.01,
        truncation: int = 50,
        finished_step: str = "exact",
        unroll: TruncationSchedule | None = None,
        augmentation: Callable[[Task], Task] = lambda task: task,
        devices: int = 1,
    ) -> None:
        require(len(families) > 0, "number of task families", len(families), "at least 1")
        require(is_count(pairs), "estimator.pairs", pairs, "an integer >= 1")
        number = isinstance(std, (int, float)) and not isinstance(std, bool)
        require(number and 0 < std < math.inf, "estimator.std", std, "a finite number > 0")
        require(is_count(truncation), "estimator.truncation", truncation, "an integer >= 1")
        require(is_count(devices), "devices", devices, "an integer >= 1")
        if finished_step not in FINISHED_STEP:
            raise unknown("estimator.finished_step", finished_step, FINISHED_STEP)
        self.optimizer = optimizer
        self.families = tuple(family.name for family in families)
        self.pairs, self.std, self.truncation, self.finished_step = (
            pairs,
            float(std),
            truncation,
            finished_step,
        )
        self.schedule = LogUniform() if unroll is None else unroll
        self.groups, self.data = _grouped(families, augmentation)
        self.mesh = self._make_mesh(devices)
        if self.mesh is not None:
            self.data = jax.device_put(self.data, NamedSharding(self.mesh, PartitionSpec()))

    def with_data(self, data: list[dict[str, Array]]) -> PES:
        """Returns the same estimator with other arrays in the place of :attr:`data`.

        A jitted caller passes ``data`` as an argument and binds it inside: arrays that a jitted function
        closes over become constants of the program.
        """
        other = object.__new__(PES)
        other.__dict__.update(self.__dict__, data=data)
        return other

    def init(self, theta: PyTree, key: Array) -> list[GroupState]:
        """Draws the inner problems, partly done, with accumulators 0; one state a group of families.

        Args:
          theta: unperturbed meta-parameters.
          key: what is drawn depends on.
        """
        return [self._init_group(group, theta, key) for group in self.groups]

    def __call__(
        self, theta: PyTree, state: list[GroupState], key: Array
    ) -> tuple[PyTree, list[GroupState], dict[str, Array]]:
        """Estimates the gradient with one truncation; see :class:`celo_nnx.interfaces.GradientEstimator`."""
        numbers = [self._pair_numbers(group) for group in self.groups]
        step = self._meta_step
        if self.mesh is not None:
            # What is not sharded is the same everywhere; out_specs P() of the sums holds by psum.
            P = PartitionSpec
            step = jax.shard_map(
                step,
                mesh=self.mesh,
                in_specs=(P(), P(AXIS), P(), P(AXIS), P()),
                out_specs=(P(), P(AXIS), P()),
                check_vma=False,
            )
        gradient, state, sums = step(theta, state, key, numbers, self.data)
        share = 1.0 / (self.pairs * len(self.families))
        gradient = jnp.nan_to_num(gradient * share, nan=0.0, posinf=0.0, neginf=0.0)
        gradient = jax.tree.map(lambda g: g[0], _unflatten(gradient[None], theta))
        family_loss = sums["loss"] / self.pairs
        metrics = {"loss": jnp.mean(family_loss), "family_loss": family_loss, "nonfinite": sums["nonfinite"]}
        return gradient, state, metrics

    def _make_mesh(self, devices: int) -> Mesh | None:
        if devices == 1:
            return None
        there = jax.devices()
        require(
            devices <= len(there), "devices", devices, f"at most {len(there)}, the number of devices here"
        )
        for group in self.groups:
            total = len(group.members) * self.pairs
            if total % devices:
                raise UserError(
                    f"devices = {devices} cannot share {total} antithetic pairs equally ({self.pairs} pairs "
                    f"for each of {len(group.members)} families of one task): must divide {total}"
                )
        auto = (jax.sharding.AxisType.Auto,)
        return jax.make_mesh((devices,), (AXIS,), axis_types=auto, devices=there[:devices])

    def _pair_numbers(self, group: Group) -> dict[str, Array]:
        """What tells the pairs of a group apart: a number that is theirs alone, family, part of the data."""

        def spread(values: Sequence[int]) -> Array:
            return jnp.repeat(jnp.asarray(values, jnp.int32), self.pairs)

        family = spread(group.members)
        number = family * self.pairs + jnp.tile(jnp.arange(self.pairs, dtype=jnp.int32), len(group.members))
        return {
            "number": number,
            "family": family,
            "start": spread(group.start),
            "count": spread(group.count),
        }

    def _init_group(self, group: Group, theta: PyTree, key: Array) -> GroupState:
        numbers = self._pair_numbers(group)["number"]
        keys = jax.vmap(jax.random.split)(jax.vmap(jax.random.fold_in, (None, 0))(key, numbers))
        pairs = len(numbers)
        thetas = jax.tree.map(lambda x: jnp.broadcast_to(x, (pairs, 2, *jnp.shape(x))), theta)
        problems = fresh(self.optimizer, group.task, self.schedule, thetas, keys[:, 0])
        accumulator = jnp.zeros((pairs, _flatten(theta).size), jnp.float32)
        return GroupState(partly_done(problems, keys[:, 1]), accumulator)

    def _meta_step(
        self, theta: PyTree, state: list[GroupState], key: Array, numbers: list[dict], data: list[dict]
    ) -> tuple[PyTree, list[GroupState], dict[str, Array]]:
        """One truncation of the pairs of this device; returns sums over the pairs of all devices."""
        parts = [
            self._group_step(group, theta, *rest, key)
            for group, *rest in zip(self.groups, state, numbers, data, strict=True)
        ]
        gradients, states, sums = (list(x) for x in zip(*parts, strict=True))
        gradient, sums = jax.tree.map(lambda *x: sum(x), *zip(gradients, sums, strict=True))
        if self.mesh is not None:
            gradient, sums = lax.psum((gradient, sums), AXIS)
        return gradient, states, sums

    def _group_step(
        self, group: Group, theta: PyTree, state: GroupState, numbers: dict, data: dict, key: Array
    ) -> tuple[PyTree, GroupState, dict[str, Array]]:
        keys = jax.vmap(jax.random.split)(jax.vmap(jax.random.fold_in, (None, 0))(key, numbers["number"]))
        flat = _flatten(theta)
        perturbation = self.std * jax.vmap(lambda key: jax.random.normal(key, flat.shape))(keys[:, 0])
        thetas = jnp.stack([flat + perturbation, flat - perturbation], 1)
        thetas = jax.vmap(_unflatten, (0, None))(thetas, theta)
        source = Source(data, numbers["start"], numbers["count"])
        problems, record = unroll(
            self.optimizer,
            group.task,
            self.schedule,
            self.truncation,
            thetas,
            state.problems,
            source,
            keys[:, 1],
        )
        loss = jax.vmap(group.task.normalize)(record.loss.reshape(-1)).reshape(record.loss.shape)
        gradient, accumulator, mean_loss = pes_terms(
            loss[..., 0],
            loss[..., 1],
            record.done,
            record.mask,
            perturbation,
            state.accumulator,
            self.std,
            self.finished_step,
        )
        nonfinite = jnp.sum(~jnp.isfinite(record.loss) & record.mask[..., None], (0, 2), dtype=jnp.int32)
        mine = numbers["family"][None, :] == jnp.arange(len(self.families))[:, None]
        sums = {
            "loss": jnp.sum(jnp.where(mine, mean_loss, 0.0), 1),
            "nonfinite": jnp.sum(jnp.where(mine, nonfinite, 0), 1),
        }
        return jnp.sum(gradient, 0), GroupState(problems, accumulator), sums
