"""Truncated backpropagation through the unroll."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from celo_nnx.errors import is_count, require
from celo_nnx.interfaces import Array, PyTree
from celo_nnx.meta.estimators.base import Truncated, flatten, mean_loss, nonfinite, unflatten
from celo_nnx.meta.population import Feed, Group, Part
from celo_nnx.meta.unroll import Problems


@dataclasses.dataclass(eq=False)
class TruncatedBackprop(Truncated):
    """The gradient of a truncation's mean meta-loss by reverse-mode differentiation, its start held fixed.

    Nothing is perturbed: each family has ``pairs`` problems, each trained once. Exact for the truncation, at
    about three times the cost of an unroll and with the state of every step in memory; biased towards short
    horizons, and large where the inner training is chaotic: clip the meta-gradient. A problem whose gradient
    is not finite adds nothing.

    Source: Werbos, "Backpropagation through time", 1990; Metz et al. 2019 for its use here.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        legal = "an integer >= 1 (not a schedule: the differentiated loop has a fixed length)"
        require(is_count(self.truncation), "estimator.truncation", self.truncation, legal)

    def init_group(self, group: Group, theta: PyTree, key: Array, iteration: Array) -> Problems:
        """Draws the inner problems."""
        return self.first_problems(group, theta, key, iteration, signs=1)

    def group_step(self, group: Group, theta: PyTree, state: Problems, feed: Feed) -> Part:
        """One truncation of a group, and back."""
        _, keys = self.pair_keys(feed.key, feed.pairs)
        count = len(feed.pairs.number)

        def objective(flat: Array) -> tuple[Array, tuple[Problems, Array, Array, Array]]:
            thetas = unflatten(flat[:, None], theta)
            problems, record, loss, counts = self.truncate(
                group, thetas, state, feed, keys, self.most, differentiable=True
            )
            loss, counted = mean_loss(loss, counts)
            return jnp.sum(loss * feed.pairs.weight), (problems, loss, counted, nonfinite(record))

        # A theta for each problem, so that one that diverges does not take the others with it.
        flat = flatten(theta)
        each, (problems, loss, counted, bad) = jax.grad(objective, has_aux=True)(
            jnp.broadcast_to(flat, (count, flat.size))
        )
        finite = jnp.all(jnp.isfinite(each), 1)
        gradient = jnp.sum(jnp.where(finite[:, None] & self.learned, each, 0.0), 0)
        return Part(gradient, problems, loss, counted, bad, (~finite).astype(jnp.int32))
