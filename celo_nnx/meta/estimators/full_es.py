"""Full evolution strategies: whole trajectories in one meta-iteration, nothing carried over."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from celo_nnx.errors import is_count, require
from celo_nnx.interfaces import Array, PyTree
from celo_nnx.meta.estimators.base import Perturbed, nonfinite
from celo_nnx.meta.population import Feed, Group, Part
from celo_nnx.meta.truncation import NEVER
from celo_nnx.meta.unroll import Problems, fresh, losses_at_end, unroll

CHUNK = 50  # inner steps whose losses are held at once


@dataclasses.dataclass(eq=False)
class FullES(Perturbed):
    """ES on the loss of whole trajectories.

    A meta-iteration draws one length for all pairs, starts every pair anew, trains to the end, and takes ::

        g = mean_n (L+ - L-) v_n / (2 std^2)

    with L the mean meta-loss of all steps, or, where ``objective.steps`` is ``last``, the mean loss of the
    final parameters on ``batches`` fresh batches. Unbiased; a meta-iteration costs a whole trajectory. The
    published one takes the last loss with ``sign_delta=1``.

    Attributes:
      batches: fresh batches of the last loss.

    Raises:
      UserError: unless ``batches >= 1``.

    Source: META_TRAINING section 8.
    """

    batches: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_count(self.batches), "estimator.batches", self.batches, "an integer >= 1")
        legal = "a schedule whose trajectories end"
        require(self.unroll.maximum < NEVER, "meta.unroll of full_es", "never", legal)

    def init_group(self, group: Group, theta: PyTree, key: Array, iteration: Array) -> tuple[()]:
        """Nothing is carried over."""
        return ()

    def group_step(self, group: Group, theta: PyTree, state: tuple[()], feed: Feed) -> Part:
        """Whole trajectories of a group."""
        noise_keys, run_keys = self.pair_keys(feed.key, feed.pairs)
        v = self.perturbations(noise_keys)
        thetas = self.antithetic(theta, v)
        # Not a pair's key: one length for all, on every device.
        length = self.unroll(jax.random.fold_in(feed.key, 2**32 - 1), feed.iteration)
        start_keys, train_keys, end_keys = jnp.moveaxis(
            jax.vmap(lambda key: jax.random.split(key, 3))(run_keys), 1, 0
        )
        problems = fresh(
            self.optimizer, group.task, lambda key, i: length, thetas, start_keys, feed.iteration
        )
        problems, loss, bad = self._train(group, thetas, problems, feed, train_keys, length)
        if self.objective.steps == "last":
            source = feed.source(self.objective.split)
            final = losses_at_end(group.task, problems, source, end_keys, self.batches)
            loss = self.objective.rescale(final, problems.first[:, None])
        delta = self.delta(loss[None], jnp.ones((1, len(loss)), bool))[0]
        gradient, lost = self.estimate(feed.pairs.weight, (delta, v))
        return Part(gradient, (), jnp.mean(loss, 1), jnp.ones(len(loss), bool), bad, lost)

    def _train(
        self,
        group: Group,
        thetas: PyTree,
        problems: Problems,
        feed: Feed,
        keys: Array,
        length: Array,
    ) -> tuple[Problems, Array, Array]:
        """Trains to the end; returns (problems, mean meta-loss ``[N, 2]``, non-finite losses ``[N]``)."""
        # With "last" the loss comes after the end, so that no step need see another split.
        split = "train" if self.objective.steps == "last" else self.objective.split
        held = None if split == "train" else feed.source(split)
        objective = dataclasses.replace(self.objective, steps="all")

        def chunk(carry: tuple) -> tuple:
            done, problems, total, bad = carry
            steps = jnp.minimum(CHUNK, length - done)
            after, record = unroll(
                self.optimizer,
                group.task,
                lambda key, i: length,
                CHUNK,
                thetas,
                problems,
                feed.source("train"),
                jax.vmap(jax.random.fold_in, (0, None))(keys, done),
                held=held,
                steps=steps,
            )
            loss, counts, first = objective(group.task, record, problems, steps)
            total += jnp.sum(jnp.where(counts[..., None], loss, 0.0), 0)
            bad += nonfinite(record)
            return done + steps, after._replace(first=first), total, bad

        count = problems.length.shape[0]
        start = jnp.int32(0), problems, jnp.zeros((count, 2), jnp.float32), jnp.zeros(count, jnp.int32)
        _, problems, total, bad = lax.while_loop(lambda carry: carry[0] < length, chunk, start)
        return problems, total / length, bad
