"""Truncated evolution strategies (ES) with antithetic pairs: PES without memory."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from celo_nnx.interfaces import Array, PyTree
from celo_nnx.meta.estimators.base import Perturbed, Truncated, mean_loss, nonfinite
from celo_nnx.meta.population import Feed, Group, Part
from celo_nnx.meta.unroll import Problems


@dataclasses.dataclass(eq=False)
class TruncatedES(Perturbed, Truncated):
    """Truncated ES: the gradient of a truncation's loss, its start held fixed.

    Both sides start each truncation where the positive one has ended the last::

        g = mean_n (mean_t l+ - mean_t l-) v_n / (2 std^2)

    Of low variance, and blind to what theta does beyond a truncation: biased towards short horizons.

    Source: META_TRAINING section 8; Metz et al., "Understanding and correcting pathologies in the training
    of learned optimizers", ICML 2019.
    """

    def init_group(self, group: Group, theta: PyTree, key: Array, iteration: Array) -> Problems:
        """Draws the inner problems."""
        return self.first_problems(group, theta, key, iteration)

    def group_step(self, group: Group, theta: PyTree, state: Problems, feed: Feed) -> Part:
        """One truncation of a group."""
        noise_keys, unroll_keys = self.pair_keys(feed.key, feed.pairs)
        v = self.perturbations(noise_keys)
        positive = jax.tree.map(
            lambda x: jnp.broadcast_to(x[:, :1], x.shape), (state.params, state.model, state.optimizer)
        )
        start = state._replace(params=positive[0], model=positive[1], optimizer=positive[2])
        problems, record, loss, counts = self.truncate(
            group,
            self.antithetic(theta, v),
            start,
            feed,
            unroll_keys,
            self.steps(feed.key, feed.iteration),
        )
        delta = jnp.sum(self.delta(loss, counts), 0) / jnp.maximum(jnp.sum(counts, 0), 1)
        gradient, lost = self.estimate(feed.pairs.weight, (delta, v))
        return Part(gradient, problems, *mean_loss(loss, counts), nonfinite(record), lost)
