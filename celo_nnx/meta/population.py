"""The population of inner problems: families grouped into batches, pairs numbered, devices sharing them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from celo_nnx import processes
from celo_nnx.devices import TOGETHER
from celo_nnx.errors import UserError, is_count, is_number, require
from celo_nnx.interfaces import Array, Family, PyTree, Task
from celo_nnx.meta.unroll import Source

AXIS = "particles"
# A side also reads its own theta in each step, once, where it reads a parameter's planes some sixteen times.
# Counted in, VeLO of 46,000 meta-parameters takes 9 % less time.
THETA_SHARE = 16
SHARES = 4  # devices over which results agree to the order of sums; more have smaller chunks
TINY = 2**13  # parameters of a chunk, both sides, below which turns cost more than they are worth
Arrays = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Group:
    """Families of one task, side by side in one batch: family ``f``'s pairs are ``f * pairs ...``.

    Attributes:
      task: the task after augmentation.
      members: index of each family among all.
      start, count: first example and number of examples of each family, for each split.
      size: parameters of the task.
    """

    task: Task
    members: tuple[int, ...]
    start: dict[str, tuple[int, ...]]
    count: dict[str, tuple[int, ...]]
    size: int


class Pairs(NamedTuple):
    """What tells the ``N`` pairs of a group apart.

    Attributes:
      number: of the pair among all of the population, ``[N]`` int32.
      family: index of its family, ``[N]`` int32.
      weight: its share in the gradient, ``[N]``; all pairs' sum to 1.
      start, count: its examples in the arrays of each split, ``[N]`` int32.
    """

    number: Array
    family: Array
    weight: Array
    start: dict[str, Array]
    count: dict[str, Array]


class Feed(NamedTuple):
    """What the step of a group is given besides theta and the group's state.

    Attributes:
      pairs: this device's pairs of the group, or a chunk of them.
      data: the group's arrays by split, all examples of its families.
      key: of the meta-iteration, the same for all groups and devices.
      iteration: number of the meta-iteration, int32 scalar.
    """

    pairs: Pairs
    data: dict[str, Arrays]
    key: Array
    iteration: Array

    def source(self, split: str) -> Source:
        """Returns where batches of a split come from."""
        return Source(self.data[split], self.pairs.start[split], self.pairs.count[split])


class Part(NamedTuple):
    """What a group adds to a meta-iteration.

    Attributes:
      gradient: weighted sum of the pairs' estimates, ``[size of theta]``.
      state: the group's next state.
      loss: mean meta-loss of each pair, ``[N]``.
      counted: whether any step of a pair counts, so that it has a meta-loss, ``[N]`` bool.
      nonfinite: non-finite inner losses of each pair, ``[N]`` int32.
      lost: 1 for every pair whose estimate was not finite and is not in the sum, ``[N]`` int32.
    """

    gradient: Array
    state: PyTree
    loss: Array
    counted: Array
    nonfinite: Array
    lost: Array


class Population:
    """Pairs of inner problems over task families, each with the same number of pairs.

    Families with equal tasks run as one vmapped batch, the others side by side in the same program. With
    ``devices > 1`` pairs are spread over a mesh axis; what a pair does depends on its number only.

    Args:
      families: at least one.
      pairs: antithetic pairs a family.
      weights: of the families in the meta-gradient and in the mean loss; () for equal ones.
      augmentation: makes the task that is trained from a family's task.
      split: whose examples the meta-loss needs besides the training ones.
      devices: how many devices share the pairs.

    Raises:
      UserError: no family, arrays that do not fit, a loss that is not a scalar, or pairs that the devices
        cannot share equally.
    """

    def __init__(
        self,
        families: Sequence[Family],
        *,
        pairs: int,
        weights: Sequence[float] = (),
        augmentation: Callable[[Task], Task] = lambda task: task,
        split: str = "train",
        devices: int = 1,
    ) -> None:
        require(len(families) > 0, "number of task families", len(families), "at least 1")
        require(is_count(pairs), "estimator.pairs", pairs, "an integer >= 1")
        require(is_count(devices), "devices", devices, "an integer >= 1")
        self.names = tuple(family.name for family in families)
        self.pairs = pairs
        self.weights = _weights(weights, self.names)
        splits = ("train",) if split == "train" else ("train", split)
        self.groups, self.data = _grouped(families, augmentation, splits)
        self.mesh = self._make_mesh(devices)
        if self.mesh is not None:
            self.data = processes.put(self.data, NamedSharding(self.mesh, PartitionSpec()))

    def _make_mesh(self, devices: int) -> Mesh | None:
        if devices == 1:
            return None
        there = jax.device_count()
        require(devices <= there, "devices", devices, f"at most {there}, the number of devices here")
        for group in self.groups:
            total = len(group.members) * self.pairs
            if total % devices:
                raise UserError(
                    f"devices = {devices} cannot share {total} antithetic pairs equally ({self.pairs} pairs "
                    f"for each of {len(group.members)} families of one task): must divide {total}"
                )
        auto = (jax.sharding.AxisType.Auto,)
        return jax.make_mesh((devices,), (AXIS,), axis_types=auto, devices=processes.devices(devices))

    def numbers(self, group: Group) -> Pairs:
        """Returns what tells the pairs of a group apart."""

        def spread(values: Sequence[float], dtype: Any = jnp.int32) -> Array:
            return jnp.repeat(jnp.asarray(values, dtype), self.pairs)

        family = spread(group.members)
        share = [self.weights[i] / self.pairs for i in group.members]
        return Pairs(
            family * self.pairs + jnp.tile(jnp.arange(self.pairs, dtype=jnp.int32), len(group.members)),
            family,
            spread(share, jnp.float32),
            {name: spread(values) for name, values in group.start.items()},
            {name: spread(values) for name, values in group.count.items()},
        )

    def each(
        self,
        step: Callable[..., Part],
        theta: PyTree,
        states: list[PyTree],
        data: list[dict[str, Arrays]],
        key: Array,
        iteration: Array,
    ) -> tuple[Array, list[PyTree], dict[str, Array]]:
        """Does ``step(group, theta, state, feed)`` for every group, over all devices.

        Returns:
          (sum of the gradients ``[size of theta]``; next states; metrics ``loss``, ``family_loss``,
          ``nonfinite`` and ``nonfinite_gradient``). Losses are means over the pairs of which any step counts,
          and over the families that have such pairs; NaN without one.
        """

        def local(
            theta: PyTree, states: list[PyTree], pairs: list[Pairs], data: list[dict], shared: tuple
        ) -> tuple[Array, list[PyTree], dict[str, Array]]:
            feeds = [Feed(own, arrays, *shared) for own, arrays in zip(pairs, data, strict=True)]
            parts = [
                _in_turns(step, group, theta, state, feed, self._together(group, theta, feed.pairs))
                for group, state, feed in zip(self.groups, states, feeds, strict=True)
            ]
            sums = [self._sums(part, own) for part, own in zip(parts, pairs, strict=True)]
            total = jax.tree.map(lambda *x: sum(x), *sums)
            if self.mesh is not None:
                total = lax.psum(total, AXIS)
            return total["gradient"], [part.state for part in parts], total

        if self.mesh is not None:
            # What is not sharded is the same everywhere; out_specs P() of the sums holds by psum.
            P = PartitionSpec
            local = jax.shard_map(
                local,
                mesh=self.mesh,
                in_specs=(P(), P(AXIS), P(AXIS), P(), P()),
                out_specs=(P(), P(AXIS), P()),
                check_vma=False,
            )
        pairs = [self.numbers(group) for group in self.groups]
        gradient, states, total = local(theta, states, pairs, data, (key, iteration))
        # Times exactly 1 where all pairs count; 0 times infinity, NaN, where none does.
        family_loss = total["loss"] / self.pairs * (self.pairs / total["counted"])
        weights = jnp.asarray(self.weights, jnp.float32)
        usual = jnp.sum(total["loss"] / self.pairs * weights)  # to the last bit, where all pairs count
        some = _weighted(family_loss, total["counted"] > 0, weights)
        loss = jnp.where(jnp.all(total["counted"] == self.pairs), usual, some)
        counts = {name: total[name] for name in ("nonfinite", "nonfinite_gradient")}
        return gradient, states, {"loss": loss, "family_loss": family_loss, **counts}

    def _together(self, group: Group, theta: PyTree, pairs: Pairs) -> int:
        """Returns how many of this device's pairs of a group train together; the chunks come in turn.

        As many as each of :data:`SHARES` devices would have, so that fewer devices do the same arithmetic:
        the batch decides how sums are vectorized, and a meta-gradient is made of differences of losses that
        show it. Tiny problems, on which turns would tell, are all at once.
        """
        here = len(pairs.number)
        if jax.default_backend() != "cpu":
            return here
        size = 2 * (group.size + sum(leaf.size for leaf in jax.tree.leaves(theta)) // THETA_SHARE)
        total = len(group.members) * self.pairs
        share = math.gcd(here, total // math.gcd(total, SHARES))
        share = share if share * size >= TINY else here
        most = max(TOGETHER // size, 1)
        divisor = max(d for d in range(1, min(share, most) + 1) if share % d == 0)
        return divisor if 2 * divisor > most else share

    def _sums(self, part: Part, pairs: Pairs) -> dict[str, Array]:
        mine = pairs.family[None, :] == jnp.arange(len(self.names))[:, None]
        return {
            "gradient": part.gradient,
            "loss": jnp.sum(jnp.where(mine & part.counted, part.loss, 0.0), 1),
            "counted": jnp.sum(mine & part.counted, 1, dtype=jnp.int32),
            "nonfinite": jnp.sum(jnp.where(mine, part.nonfinite, 0), 1),
            "nonfinite_gradient": jnp.sum(jnp.where(mine, part.lost, 0), 1),
        }


def _in_turns(
    step: Callable[..., Part], group: Group, theta: PyTree, state: PyTree, feed: Feed, together: int
) -> Part:
    """Does a group's step chunk by chunk of ``together`` pairs."""
    count = len(feed.pairs.number)
    if together == count:
        return step(group, theta, state, feed)

    def one(total: Array, chunk: tuple[PyTree, Pairs]) -> tuple[Array, tuple[PyTree, Array, Array]]:
        part = step(group, theta, chunk[0], feed._replace(pairs=chunk[1]))
        return total + part.gradient, part[1:]

    chunks = jax.tree.map(lambda x: x.reshape(-1, together, *x.shape[1:]), (state, feed.pairs))
    zero = jnp.zeros(sum(leaf.size for leaf in jax.tree.leaves(theta)), jnp.float32)
    gradient, rest = lax.scan(one, zero, chunks)
    return Part(gradient, *jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), rest))


def _weighted(loss: Array, there: Array, weights: Array) -> Array:
    """Returns the weighted mean of the families' losses that are there, all ``[families]``."""
    # Where all are there, weights of sum 1 are not summed: that may differ from 1 in the last bit.
    share = jnp.where(jnp.all(there), 1.0, jnp.sum(jnp.where(there, weights, 0.0)))
    return jnp.sum(jnp.where(there, loss, 0.0) * weights) / share


def _weights(weights: Sequence[float], names: tuple[str, ...]) -> tuple[float, ...]:
    """Returns the families' weights, of sum 1."""
    listed = isinstance(weights, (tuple, list)) and all(is_number(w) and w >= 0 for w in weights)
    legal = f"() or a finite number >= 0 for each of the families {', '.join(names)}, not all 0"
    fit = listed and (not weights or len(weights) == len(names) and sum(weights) > 0)
    require(fit, "estimator.weights", weights, legal)
    weights = weights or (1.0,) * len(names)
    return tuple(w / sum(weights) for w in weights)


def _grouped(
    families: Sequence[Family], augmentation: Callable[[Task], Task], splits: Sequence[str]
) -> tuple[list[Group], list[dict[str, Arrays]]]:
    """Puts families with equal tasks together; returns the groups and their arrays, on the device."""
    by_task: dict[Task, list[int]] = {}
    for index, family in enumerate(families):
        by_task.setdefault(family.task, []).append(index)
    groups, data = [], []
    for task, members in by_task.items():
        start, count, arrays = {}, {}, {}
        for split in splits:
            parts = [getattr(families[i], split) for i in members]
            forms = [{k: (v.shape[1:], v.dtype) for k, v in part.items()} for part in parts]
            sizes = [len(next(iter(part.values()), ())) for part in parts]
            what = "training" if split == "train" else split
            for i, part, form, size in zip(members, parts, forms, sizes, strict=True):
                if form != forms[0]:
                    raise UserError(
                        f"the {what} arrays of task family {families[i].name!r} do not fit those of "
                        f"{families[members[0]].name!r}, whose task is the same: {form} against {forms[0]}"
                    )
                if size < 1 or any(len(v) != size for v in part.values()):
                    lengths = {k: len(v) for k, v in part.items()}
                    raise UserError(
                        f"the {what} arrays of task family {families[i].name!r} must have one length, "
                        f"a number of examples above 0: {lengths}"
                    )
            start[split], count[split] = tuple(np.cumsum([0, *sizes[:-1]]).tolist()), tuple(sizes)
            arrays[split] = {k: jax.device_put(np.concatenate([part[k] for part in parts])) for k in parts[0]}
        augmented = augmentation(task)
        size = _examine(augmented, arrays["train"], families[members[0]].name)
        groups.append(Group(augmented, tuple(members), start, count, size))
        data.append(arrays)
    return groups, data


def _examine(task: Task, arrays: Arrays, name: str) -> int:
    """Traces a task's loss, so that a mistake in it is told before anything compiles; counts parameters."""

    def trace(key: Array, arrays: Arrays) -> PyTree:
        sample = task.sample(key)
        params, state = task.init(key, sample)
        batch = task.draw(arrays, key, jnp.int32(0), jnp.int32(1))
        return task.loss(params, state, key, batch, sample)[0], params

    loss, params = jax.eval_shape(trace, jax.random.key(0), arrays)
    found = jax.tree.leaves(loss)
    if len(found) != 1 or found[0].shape != () or not jnp.issubdtype(found[0].dtype, jnp.floating):
        shown = ", ".join(f"{x.dtype}{list(x.shape)}" for x in found)
        raise UserError(f"the loss of task family {name!r} must be one float scalar, not {shown}")
    return sum(leaf.size for leaf in jax.tree.leaves(params))
