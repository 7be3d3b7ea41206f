"""Estimators that hold a perturbation for several truncations: GPES, and NRES or ES-single.

Vicol, "Low-Variance Gradient Estimation in Unrolled Computation Graphs with ES-Single", ICML 2023; Li et al.,
"Noise-Reuse in Online Evolution Strategies", NeurIPS 2023.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from celo_nnx.errors import is_integer, require
from celo_nnx.interfaces import Array, PyTree
from celo_nnx.meta.estimators.base import Perturbed, Truncated, flatten, mean_loss, nonfinite
from celo_nnx.meta.estimators.pes import credit, scaled
from celo_nnx.meta.population import Feed, Group, Part
from celo_nnx.meta.unroll import Problems


class SharedNoiseState(NamedTuple):
    """State of one group.

    Attributes:
      problems: the inner problems.
      v: the perturbation that each pair holds, ``[N, size of theta]``.
      seen: the sum of the perturbations that its trajectory has seen before that one, ``[N, size of theta]``.
      age: truncations for which it holds v; 0 where a new one is due, ``[N]`` int32.
    """

    problems: Problems
    v: Array
    seen: Array
    age: Array


@dataclasses.dataclass(eq=False)
class SharedNoise(Perturbed, Truncated):
    """GPES: PES whose perturbation is drawn anew only every ``reuse`` truncations of a trajectory.

    A loss is credited to the sum of the *different* perturbations that its trajectory has seen, the present
    one included::

        g = mean_n (mean_t l+ - mean_t l-) (seen_n + v_n) / (2 std^2)

    ``reuse=1`` is PES. ``reuse=0`` holds one perturbation for a whole trajectory: noise-reuse ES, which is
    ES-single; unbiased as well, and of lower variance where the gradients of the truncations agree. A
    trajectory that begins inside a truncation shares the perturbation of that truncation and draws its own
    with the next; both then count, as in PES.

    Attributes:
      reuse: truncations for which a perturbation is held; 0 for a trajectory's whole life.

    Raises:
      UserError: unless ``reuse`` is an integer of at least 0.

    Source: Vicol 2023, section 4 (ES-single); Li et al. 2023, section 3 (NRES and GPES).
    """

    reuse: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        legal = "an integer >= 0 (0: held for a trajectory's whole life)"
        require(is_integer(self.reuse) and self.reuse >= 0, "estimator.reuse", self.reuse, legal)

    def init_group(self, group: Group, theta: PyTree, key: Array, iteration: Array) -> SharedNoiseState:
        """Draws the inner problems; perturbations are due."""
        problems = self.first_problems(group, theta, key, iteration)
        pairs = problems.length.shape[0]
        nothing = jnp.zeros((pairs, flatten(theta).size), jnp.float32)
        return SharedNoiseState(problems, nothing, nothing, jnp.zeros(pairs, jnp.int32))

    def group_step(self, group: Group, theta: PyTree, state: SharedNoiseState, feed: Feed) -> Part:
        """One truncation of a group."""
        noise_keys, unroll_keys = self.pair_keys(feed.key, feed.pairs)
        drawn = self.perturbations(noise_keys)
        due_now = (state.age == 0)[:, None]
        seen = jnp.where(due_now, state.seen + state.v, state.seen)
        v = jnp.where(due_now, drawn, state.v)
        steps = self.steps(feed.key, feed.iteration)
        problems, record, loss, counts = self.truncate(
            group, self.antithetic(theta, v), state.problems, feed, unroll_keys, steps
        )
        due = credit(self.delta(loss, counts), record.done, counts, "exact", steps)
        gradient, lost = self.estimate(feed.pairs.weight, (due.old, seen + v), (due.new, v))
        # A trajectory that began here has seen v and draws its own next; after an end with the last step
        # the next one has seen nothing.
        on = due.keep_total > 0
        age = jnp.where(on, state.age + 1, 0)
        state = SharedNoiseState(
            problems,
            scaled(due.keep_total + due.keep_new, v),
            scaled(due.keep_total, seen),
            age % self.reuse if self.reuse else age,
        )
        return Part(gradient, state, *mean_loss(loss, counts), nonfinite(record), lost)
