"""What estimators share: settings, the population, perturbations, truncations of antithetic pairs."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from celo_nnx.errors import is_count, is_number, require, unknown
from celo_nnx.interfaces import Array, Family, Optimizer, PyTree, Task, TruncationSchedule
from celo_nnx.meta.frozen import frozen_mask, mask_of
from celo_nnx.meta.objective import Objective
from celo_nnx.meta.population import Feed, Group, Pairs, Part, Population
from celo_nnx.meta.truncation import NEVER, LogUniform
from celo_nnx.meta.unroll import Problems, Record, fresh, partly_done, unroll

OFFSETS = ("uniform", "none")


def flatten(tree: PyTree) -> Array:
    """Returns all leaves as one vector."""
    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])


def unflatten(flat: Array, like: PyTree) -> PyTree:
    """Splits vectors ``[..., size]`` into trees; leaves ``[..., *shape]``."""
    leaves, treedef = jax.tree.flatten(like)
    ends = np.cumsum([leaf.size for leaf in leaves]).tolist()
    parts = jnp.split(flat, ends[:-1], axis=-1)
    shaped = [x.reshape(*x.shape[:-1], *leaf.shape) for x, leaf in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(treedef, shaped)


@dataclasses.dataclass(eq=False)
class Estimator:
    """An estimator of the meta-gradient over task families; a subclass says what a group of families does.

    Attributes:
      optimizer: the optimizer whose theta is learned.
      families: at least one; equal tasks run as one vmapped batch.
      pairs: antithetic pairs a family (problems a family, where nothing is perturbed).
      weights: of the families in the gradient and the mean loss; () for equal ones.
      unroll: draws the lengths of trajectories.
      augmentation: makes the task that is trained from a family's task.
      objective: what the meta-loss of a step is.
      frozen: patterns of theta's paths that are not learned, and so not perturbed.
      devices: how many devices share the pairs.

    Raises:
      UserError: for a value out of range, or pairs that the devices cannot share equally.
    """

    optimizer: Optimizer
    families: Sequence[Family]
    _: dataclasses.KW_ONLY
    pairs: int = 8
    weights: tuple[float, ...] = ()
    unroll: TruncationSchedule = LogUniform()
    augmentation: Callable[[Task], Task] = lambda task: task
    objective: Objective = Objective()
    frozen: tuple[str, ...] = ()
    devices: int = 1

    # Settings that come from elsewhere than the config's section of the estimator.
    GIVEN = frozenset({"optimizer", "families", "unroll", "augmentation", "objective", "frozen", "devices"})

    def __post_init__(self) -> None:
        self.objective.check(self.families)
        self.population = Population(
            self.families,
            pairs=self.pairs,
            weights=self.weights,
            augmentation=self.augmentation,
            split=self.objective.split,
            devices=self.devices,
        )
        self.data, self.mesh = self.population.data, self.population.mesh
        self.learned = ~self.entries(frozen_mask(self.optimizer.theta, self.frozen))

    def with_data(self, data: PyTree) -> Self:
        """Returns the same estimator with other arrays in the place of :attr:`data`.

        A jitted caller passes ``data`` as an argument and binds it inside: arrays that a jitted function
        closes over become constants of the program.
        """
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, data=data)
        return other

    def entries(self, mask: PyTree) -> np.ndarray:
        """Spreads a bool of each leaf of theta over its entries, ``[size of theta]``."""
        sizes = [np.size(leaf) for leaf in jax.tree.leaves(self.optimizer.theta)]
        return np.repeat(np.array(jax.tree.leaves(mask), bool), sizes)

    def init(self, theta: PyTree, key: Array, iteration: Array | int = 0) -> list[PyTree]:
        """Returns the state before a meta-iteration, one a group of families, all drawn from ``key``."""
        iteration = jnp.asarray(iteration, jnp.int32)
        return [self.init_group(group, theta, key, iteration) for group in self.population.groups]

    def __call__(
        self, theta: PyTree, state: list[PyTree], key: Array, iteration: Array | int = 0
    ) -> tuple[PyTree, list[PyTree], dict[str, Array]]:
        """Estimates the gradient; see :class:`celo_nnx.interfaces.GradientEstimator`.

        Non-finite entries of the gradient become 0; ``nonfinite_theta`` counts them.
        """
        iteration = jnp.asarray(iteration, jnp.int32)
        gradient, state, metrics = self.population.each(
            self.group_step, theta, state, self.data, key, iteration
        )
        metrics["nonfinite_theta"] = jnp.sum(~jnp.isfinite(gradient), dtype=jnp.int32)
        gradient = jnp.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        return unflatten(gradient, theta), state, metrics

    def init_group(self, group: Group, theta: PyTree, key: Array, iteration: Array) -> PyTree:
        """Returns the state of a group of families at the start."""
        raise NotImplementedError

    def group_step(self, group: Group, theta: PyTree, state: PyTree, feed: Feed) -> Part:
        """Does the part of this device in one meta-iteration of a group."""
        raise NotImplementedError

    def pair_keys(self, key: Array, pairs: Pairs) -> tuple[Array, Array]:
        """Two keys for each pair ``[N]``: for its perturbation, and for its unroll."""
        keys = jax.vmap(jax.random.split)(jax.vmap(jax.random.fold_in, (None, 0))(key, pairs.number))
        return keys[:, 0], keys[:, 1]


@dataclasses.dataclass(eq=False)
class Perturbed(Estimator):
    """An estimator from differences of losses between ``theta + v`` and ``theta - v``.

    Attributes:
      std: standard deviation of the perturbation v.
      leaf_std: ``(pattern, std)`` pairs for leaves of theta whose path has the pattern; the first counts.
      sign_delta: where above 0, a pair's difference of losses is replaced by the sign of its mean times this.
    """

    std: float = 0.01
    leaf_std: tuple[tuple[str, float], ...] = ()
    sign_delta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("std", self.std), *(("leaf_std", std) for _, std in self._leaf_std())):
            good = is_number(value) and np.float32(value) > 0  # the smallest numbers are 0 in float32
            require(good, f"estimator.{name}", value, "a finite number > 0")
        legal = "a finite number >= 0 (0 for off)"
        good = is_number(self.sign_delta) and self.sign_delta >= 0
        require(good, "estimator.sign_delta", self.sign_delta, legal)
        self.stds = self._stds()

    def _leaf_std(self) -> Sequence[tuple[str, float]]:
        pairs = self.leaf_std
        good = isinstance(pairs, (tuple, list)) and all(
            isinstance(p, (tuple, list)) and len(p) == 2 and isinstance(p[0], str) for p in pairs
        )
        require(good, "estimator.leaf_std", pairs, 'pairs of a pattern and a number: (("schedule/", 0.003),)')
        return pairs

    def _stds(self) -> np.ndarray:
        """Returns the standard deviation of every meta-parameter, ``[size of theta]``; 0 where frozen."""
        stds = np.full(self.learned.shape, self.std, np.float32)
        for pattern, std in reversed(self._leaf_std()):
            stds[self.entries(mask_of(self.optimizer.theta, (pattern,), "estimator.leaf_std"))] = std
        return np.where(self.learned, stds, np.float32(0.0))

    def perturbations(self, keys: Array) -> Array:
        """Draws v for each key, ``[N, size of theta]``."""
        return self.stds * jax.vmap(lambda key: jax.random.normal(key, self.stds.shape))(keys)

    def antithetic(self, theta: PyTree, v: Array) -> PyTree:
        """Returns theta + v and theta - v, leaves ``[N, 2, ...]``."""
        flat = flatten(theta)
        return unflatten(jnp.stack([flat + v, flat - v], 1), theta)

    def delta(self, loss: Array, mask: Array) -> Array:
        """Returns the counted differences of losses ``[T, N]`` of losses ``[T, N, 2]``, or their signs."""
        delta = jnp.where(mask, loss[..., 0] - loss[..., 1], 0.0)
        if self.sign_delta:
            delta = jnp.where(mask, jnp.sign(jnp.sum(delta, 0)) * self.sign_delta, 0.0)
        return delta

    def estimate(self, weight: Array, *terms: tuple[Array, Array]) -> tuple[Array, Array]:
        """Returns the weighted sum of the pairs' estimates, without those that are not finite.

        Args:
          weight: of the pairs, ``[N]``.
          terms: differences of losses ``[N]``, and the perturbations that they are due to ``[N, size]``.

        Returns:
          (gradient ``[size]``, 1 for every pair that was left out and else 0 ``[N]`` int32).
        """
        finite = functools.reduce(operator.and_, (jnp.isfinite(delta) for delta, _ in terms))
        sums = [(jnp.where(finite, delta, 0.0) * weight) @ v for delta, v in terms]
        return self.gradient(functools.reduce(operator.add, sums)), (~finite).astype(jnp.int32)

    def gradient(self, directions: Array) -> Array:
        """Divides a weighted sum of ``(l+ - l-) v``, ``[size]``, by twice the variance of v."""
        inverse = np.where(self.stds > 0, 1.0, 0.0) / np.maximum(2.0 * np.square(self.stds), 1e-37)
        return directions * inverse.astype(np.float32)


@dataclasses.dataclass(eq=False)
class Truncated(Estimator):
    """An estimator that goes on, in each meta-iteration, with the inner problems where the last one stopped.

    Attributes:
      truncation: inner steps a meta-iteration, ``T``; or a schedule that draws it for each meta-iteration.
      initial_offset: where the first trajectories begin: at an inner step ``uniform`` below their length, so
        that they do not all end at once, or ``none``, at 0; trajectories that never end begin at 0.
    """

    truncation: int | TruncationSchedule = 50
    initial_offset: str = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not hasattr(self.truncation, "maximum"):
            require(is_count(self.truncation), "estimator.truncation", self.truncation, "an integer >= 1")
        if self.initial_offset not in OFFSETS:
            raise unknown("estimator.initial_offset", self.initial_offset, OFFSETS)
        never = self.objective.steps == "last" and self.unroll.maximum == NEVER
        legal = "a schedule whose trajectories end: meta.objective.steps = 'last' counts no other loss"
        require(not never, "meta.unroll", "never", legal)
        self.most = getattr(self.truncation, "maximum", self.truncation)
        require(self.most < NEVER, "estimator.truncation", "never", "a schedule of truncations that end")

    def steps(self, key: Array, iteration: Array) -> Array | int:
        """Returns the steps of this truncation; the same on every device."""
        if not hasattr(self.truncation, "maximum"):
            return self.truncation
        return self.truncation(jax.random.fold_in(key, 2**32 - 1), iteration)

    def first_problems(
        self, group: Group, theta: PyTree, key: Array, iteration: Array, signs: int = 2
    ) -> Problems:
        """Draws the inner problems of a group, all signs at the unperturbed theta."""
        numbers = self.population.numbers(group)
        start, offset = self.pair_keys(key, numbers)
        pairs = len(numbers.number)
        thetas = jax.tree.map(lambda x: jnp.broadcast_to(x, (pairs, signs, *jnp.shape(x))), theta)
        problems = fresh(self.optimizer, group.task, self.unroll, thetas, start, iteration)
        # A trajectory without an end has no inner step to be spread over.
        if self.initial_offset == "none" or self.unroll.maximum == NEVER:
            return problems
        return partly_done(problems, offset)

    def truncate(
        self,
        group: Group,
        thetas: PyTree,
        problems: Problems,
        feed: Feed,
        keys: Array,
        steps: Array | int,
        differentiable: bool = False,
    ) -> tuple[Problems, Record, Array, Array]:
        """Unrolls one truncation.

        Returns:
          (the next problems, the record, meta-losses ``[T, N, 2]``, whether a step counts ``[T, N]``).
        """
        split = self.objective.split
        after, record = unroll(
            self.optimizer,
            group.task,
            self.unroll,
            self.most,
            thetas,
            problems,
            feed.source("train"),
            keys,
            held=None if split == "train" else feed.source(split),
            steps=steps,
            iteration=feed.iteration,
            differentiable=differentiable,
        )
        loss, counts, first = self.objective(group.task, record, problems, steps)
        return after._replace(first=first), record, loss, counts


def nonfinite(record: Record) -> Array:
    """Returns how many losses of each pair's counted steps are not finite, ``[N]`` int32."""
    return jnp.sum(~jnp.isfinite(record.loss) & record.mask[..., None], (0, 2), dtype=jnp.int32)


def mean_loss(loss: Array, counts: Array) -> tuple[Array, Array]:
    """Returns of each pair the mean of its counted meta-losses ``[T, N, 2]``, and whether any step counts.

    Both are ``[N]``; a mean of nothing is 0, so that its gradient is too.
    """
    total = jnp.sum(jnp.where(counts[..., None], loss, 0.0), (0, 2))
    return total / (loss.shape[2] * jnp.maximum(jnp.sum(counts, 0), 1)), jnp.any(counts, 0)
