"""Truncated unrolls of a batch of antithetic pairs of inner problems.

A *pair* is two copies of one inner problem, trained with ``theta + v`` and ``theta - v``. Both see the same
initial parameters, batches, lengths and resets, so everything but what training changes is held once a
pair. Arrays of a batch of ``N`` pairs lead with ``[N]``, those that differ by sign with ``[N, 2]``.

One step of a problem (META_TRAINING section 3): the loss ``l`` and its gradient at the parameters on a fresh
batch, an update with ``value=l``, and ``done`` when the trajectory has reached its length. The step after
that one resets: it draws a new problem and counts no loss (mask 0).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from celo_nnx.interfaces import Array, Optimizer, PyTree, Task, TruncationSchedule


class Problems(NamedTuple):
    """A batch of ``N`` pairs of inner problems on their way.

    Attributes:
      params, model, optimizer: what training changes, leaves ``[N, 2, ...]``, sign + first.
      sample: what the task drew for the trajectory, leaves ``[N, ...]``.
      inner_step: updates done in this trajectory, counting a skipped start, ``[N]`` int32.
      length: updates after which the trajectory ends, ``[N]`` int32.
      done: whether the trajectory has ended, so that the next step resets, ``[N]`` bool.
    """

    params: PyTree
    model: PyTree
    optimizer: PyTree
    sample: PyTree
    inner_step: Array
    length: Array
    done: Array


class Source(NamedTuple):
    """Where batches come from: example-major arrays, and each pair's part of them.

    Attributes:
      arrays: arrays by name, leading with all examples of all families of the batch.
      start, count: first example and number of examples of each pair's family, ``[N]`` int32.
    """

    arrays: dict[str, Array]
    start: Array
    count: Array


class Record(NamedTuple):
    """What an unroll of ``T`` steps leaves for the estimator.

    Attributes:
      loss: raw training losses before the update of each step, ``[T, N, 2]``.
      done: whether the trajectory ended with the step, ``[T, N]``.
      mask: whether the step counts (False where it was a reset), ``[T, N]``.
    """

    loss: Array
    done: Array
    mask: Array


def with_count(optimizer_state: PyTree, count: Array) -> PyTree:
    """Returns the optimizer state with its step count replaced.

    The one place that knows how an optimizer keeps its step: a dict state with an int32 entry ``count``.
    States without one are returned as they are.
    """
    if isinstance(optimizer_state, dict) and "count" in optimizer_state:
        old = jnp.asarray(optimizer_state["count"])
        return {**optimizer_state, "count": jnp.broadcast_to(count, old.shape).astype(old.dtype)}
    return optimizer_state


def both(function: Callable[..., PyTree], shared: int) -> Callable[..., PyTree]:
    """Maps ``function`` over pairs and signs; its last ``shared`` arguments are one for both signs."""

    def mapped(*args: PyTree) -> PyTree:
        signed = (0,) * (len(args) - shared)
        return jax.vmap(jax.vmap(function, signed + (None,) * shared))(*args)

    return mapped


def fresh(
    optimizer: Optimizer, task: Task, schedule: TruncationSchedule, thetas: PyTree, keys: Array
) -> Problems:
    """Draws new pairs: sample, length, initial parameters, and the optimizer's state for that length.

    Args:
      optimizer: the optimizer, with any theta.
      task: the task of all pairs.
      schedule: draws lengths.
      thetas: meta-parameters, leaves ``[N, 2, ...]``.
      keys: one key a pair, ``[N]``.

    Returns:
      Pairs at inner step 0.
    """

    def one(key: Array) -> tuple[PyTree, Array, PyTree, PyTree]:
        sample_key, length_key, init_key = jax.random.split(key, 3)
        sample = task.sample(sample_key)
        return (sample, schedule(length_key), *task.init(init_key, sample))

    def start(theta: PyTree, params: PyTree, length: Array) -> PyTree:
        return optimizer.with_theta(theta).init(params, length)

    sample, length, params, model = jax.vmap(one)(keys)
    state = both(start, shared=2)(thetas, params, length)
    params, model = jax.tree.map(lambda x: jnp.stack([x, x], 1), (params, model))
    zero = jnp.zeros_like(length)
    return Problems(params, model, state, sample, zero, length, zero > 0)


def partly_done(problems: Problems, keys: Array) -> Problems:
    """Starts each trajectory at an inner step drawn from ``[0, length)``, the optimizer's count with it.

    So the trajectories of a new run do not all end at once. Parameters and accumulators stay initial.
    """
    below = jax.vmap(lambda key, length: jax.random.randint(key, (), 0, length))(keys, problems.length)
    return problems._replace(
        inner_step=below,
        optimizer=both(with_count, shared=1)(problems.optimizer, below),
    )


def _train_step(
    optimizer: Optimizer,
    task: Task,
    thetas: PyTree,
    problems: Problems,
    source: Source,
    picked: PyTree,
    loss_keys: Array,
) -> tuple[Problems, Array]:
    """Takes one training step of every pair; returns the next pairs and the raw losses ``[N, 2]``."""
    batch = jax.vmap(task.take, (None, 0))(source.arrays, picked)

    def one(
        theta: PyTree, params: PyTree, model: PyTree, state: PyTree, key: Array, batch: PyTree, sample: PyTree
    ) -> tuple[PyTree, PyTree, PyTree, Array]:
        def objective(params: PyTree) -> tuple[Array, PyTree]:
            loss, next_model, _ = task.loss(params, model, key, batch, sample)
            return loss, next_model

        (loss, model), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, state = optimizer.with_theta(theta).update(grads, state, params, value=loss)
        return jax.tree.map(jnp.add, params, updates), model, state, task.unscale(loss, sample)

    params, model, state, loss = both(one, shared=3)(
        thetas, problems.params, problems.model, problems.optimizer, loss_keys, batch, problems.sample
    )
    step = problems.inner_step + 1
    done = ~problems.done & (step >= problems.length)
    moved = problems._replace(params=params, model=model, optimizer=state, inner_step=step, done=done)
    return moved, loss.astype(jnp.float32)


def unroll(
    optimizer: Optimizer,
    task: Task,
    schedule: TruncationSchedule,
    steps: int,
    thetas: PyTree,
    problems: Problems,
    source: Source,
    keys: Array,
) -> tuple[Problems, Record]:
    """Unrolls a truncation of ``steps`` steps of every pair.

    A step trains every pair; those whose trajectory had already ended are then overwritten by fresh ones.
    The loop over steps therefore runs until a step that must reset, and the reset stands outside of it: it
    costs nothing, not even a select, in the steps in which no pair resets.

    Args:
      optimizer: the optimizer, with any theta.
      task: the task of all pairs.
      schedule: draws the lengths of new trajectories.
      steps: ``T``.
      thetas: perturbed meta-parameters, leaves ``[N, 2, ...]``.
      problems: the pairs as the last truncation left them.
      source: where batches come from.
      keys: one key a pair, ``[N]``; nothing else is random.

    Returns:
      The pairs after ``T`` steps, and what happened.
    """
    pairs = problems.length.shape[0]
    draw_key, loss_key, reset_key = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 3))(keys), 1, 0)
    at = jax.vmap(jax.random.fold_in, (0, None))
    # For all steps at once: hashing a few numbers inside the loop costs a loop of its own each time.
    draw_keys, loss_keys = (jax.vmap(at, (None, 0))(key, jnp.arange(steps)) for key in (draw_key, loss_key))
    picks = jax.vmap(jax.vmap(task.pick), (0, None, None))(draw_keys, source.start, source.count)
    record = Record(
        jnp.zeros((steps, pairs, 2), jnp.float32),
        jnp.zeros((steps, pairs), bool),
        jnp.zeros((steps, pairs), bool),
    )
    # t, pairs that the last step has to reset, the pairs, the record.
    Carry = tuple[Array, Array, Problems, Record]

    def step(carry: Carry) -> Carry:
        t, _, problems, record = carry
        picked = jax.tree.map(lambda x: x[t], picks)
        moved, loss = _train_step(optimizer, task, thetas, problems, source, picked, loss_keys[t])
        row = Record(loss, moved.done, ~problems.done)
        record = jax.tree.map(lambda a, r: lax.dynamic_update_index_in_dim(a, r, t, 0), record, row)
        return t + 1, problems.done, moved, record

    def reset(carry: Carry) -> Carry:
        t, pending, problems, record = carry
        new = fresh(optimizer, task, schedule, thetas, at(reset_key, t))

        def choose(a: Array, b: Array) -> Array:
            return jnp.where(pending.reshape((pairs,) + (1,) * (a.ndim - 1)), a, b)

        return t, jnp.zeros_like(pending), jax.tree.map(choose, new, problems), record

    def segment(carry: Carry) -> Carry:
        carry = lax.while_loop(lambda c: (c[0] < steps) & ~jnp.any(c[1]), step, carry)
        return lax.cond(jnp.any(carry[1]), reset, lambda c: c, carry)

    carry = (jnp.int32(0), jnp.zeros_like(problems.done), problems, record)
    _, _, problems, record = lax.while_loop(lambda c: c[0] < steps, segment, carry)
    return problems, record
