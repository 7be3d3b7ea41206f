"""Persistent evolution strategies (PES) with antithetic pairs.

Vicol, Metz and Sohl-Dickstein, "Unbiased Gradient Estimation in Unrolled Computation Graphs with Persistent
Evolution Strategies", ICML 2021; as restated in META_TRAINING sections 2 to 5.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from celo_nnx.errors import unknown
from celo_nnx.interfaces import Array, PyTree
from celo_nnx.meta.estimators.base import Perturbed, Truncated, flatten, mean_loss, nonfinite
from celo_nnx.meta.population import Feed, Group, Part
from celo_nnx.meta.unroll import Problems

FINISHED_STEP = ("exact", "published")


def scaled(weight: Array, leaf: Array) -> Array:
    """Multiplies ``leaf`` ``[N, ...]`` by one weight ``[N]`` each."""
    return weight.reshape(weight.shape + (1,) * (leaf.ndim - weight.ndim)) * leaf


class Credit(NamedTuple):
    """How the differences of losses of one truncation are credited.

    Attributes:
      old: mean difference that is due to all perturbations that the trajectory has seen, ``[N]``.
      new: mean difference of trajectories that began in this truncation, ``[N]``.
      keep_total: whether the trajectory goes on with all it has seen, ``[N]`` 0 or 1.
      keep_new: whether a trajectory that has seen this perturbation only goes on, ``[N]`` 0 or 1.
    """

    old: Array
    new: Array
    keep_total: Array
    keep_new: Array


def credit(
    delta: Array, done: Array, mask: Array, finished_step: str = "exact", steps: Array | int | None = None
) -> Credit:
    """Splits the differences of losses of a truncation between its trajectories.

    Args:
      delta: counted differences, 0 elsewhere, ``[T, N]``.
      done, mask: as in :func:`pes_gradient`.
      finished_step: ``exact`` or ``published``.
      steps: steps that the truncation has done; ``T`` by default.
    """
    steps = len(done) if steps is None else steps
    ended = lax.cummax(done.astype(jnp.int32), axis=0) > 0
    # Steps of trajectories that began inside this truncation know its perturbation only.
    new = ended if finished_step == "published" else jnp.concatenate([jnp.zeros_like(ended[:1]), ended[:-1]])
    counted = jnp.maximum(jnp.sum(mask, 0), 1)
    keep_new = ended[-1]
    if finished_step == "exact":
        # After an end with the last step the next trajectory has seen nothing yet: it begins afterwards.
        keep_new = keep_new & ~done[steps - 1]
    return Credit(
        jnp.sum(jnp.where(new, 0.0, delta), 0) / counted,
        jnp.sum(jnp.where(new, delta, 0.0), 0) / counted,
        (~ended[-1]).astype(jnp.float32),
        keep_new.astype(jnp.float32),
    )


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
      (gradient, next accumulator, mean loss scalar: NaN where no step counts).

    Raises:
      UserError: for an unknown ``finished_step``.

    Source: META_TRAINING section 4.
    """
    if finished_step not in FINISHED_STEP:
        raise unknown("finished_step", finished_step, FINISHED_STEP)
    done, mask = jnp.asarray(done, bool), jnp.asarray(mask, bool)
    due = credit(jnp.where(mask, pos_loss - neg_loss, 0.0), done, mask, finished_step)
    scale = 1.0 / (2.0 * jnp.square(std))
    total = jax.tree.map(jnp.add, accumulator, perturbation)
    gradient = jax.tree.map(
        lambda a, v: jnp.mean(scaled(due.old, a) + scaled(due.new, v), 0) * scale, total, perturbation
    )
    carried = jax.tree.map(
        lambda a, v: scaled(due.keep_total, a) + scaled(due.keep_new, v), total, perturbation
    )
    loss, counted = mean_loss(jnp.stack([pos_loss, neg_loss], -1), mask)
    return gradient, carried, jnp.sum(loss) / jnp.sum(counted)


class PESState(NamedTuple):
    """State of one group: its inner problems, and the PES accumulator, ``[N, size of theta]``.

    Perturbations, accumulators and estimates are flat: leaf by leaf they are hundreds of tiny ops.
    """

    problems: Problems
    accumulator: Array


@dataclasses.dataclass(eq=False)
class PES(Perturbed, Truncated):
    """Truncated PES: :func:`pes_gradient`, averaged over families.

    A meta-iteration draws one ``v = std * N(0, I)`` for each pair and trains both sides for ``truncation``
    inner steps from where the last meta-iteration left them. Unbiased for the mean over truncations, with a
    variance that grows with the number of truncations in a trajectory.

    Attributes:
      finished_step: ``exact`` or ``published`` (see :func:`pes_gradient`).

    Example:
      >>> estimator = PES(optimizer, families, pairs=8, std=0.01, truncation=50)  # doctest: +SKIP
      >>> state = estimator.init(optimizer.theta, jax.random.key(0))  # doctest: +SKIP
      >>> gradient, state, metrics = estimator(optimizer.theta, state, jax.random.key(1))  # doctest: +SKIP

    Source: META_TRAINING sections 2 to 5.
    """

    finished_step: str = "exact"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.finished_step not in FINISHED_STEP:
            raise unknown("estimator.finished_step", self.finished_step, FINISHED_STEP)

    def init_group(self, group: Group, theta: PyTree, key: Array, iteration: Array) -> PESState:
        """Draws the inner problems; accumulators start at 0."""
        problems = self.first_problems(group, theta, key, iteration)
        return PESState(problems, jnp.zeros((problems.length.shape[0], flatten(theta).size), jnp.float32))

    def group_step(self, group: Group, theta: PyTree, state: PESState, feed: Feed) -> Part:
        """One truncation of a group."""
        noise_keys, unroll_keys = self.pair_keys(feed.key, feed.pairs)
        v = self.perturbations(noise_keys)
        steps = self.steps(feed.key, feed.iteration)
        problems, record, loss, counts = self.truncate(
            group, self.antithetic(theta, v), state.problems, feed, unroll_keys, steps
        )
        due = credit(self.delta(loss, counts), record.done, counts, self.finished_step, steps)
        total = state.accumulator + v
        gradient, lost = self.estimate(feed.pairs.weight, (due.old, total), (due.new, v))
        carried = scaled(due.keep_total, total) + scaled(due.keep_new, v)
        state = PESState(problems, carried)
        return Part(gradient, state, *mean_loss(loss, counts), nonfinite(record), lost)
