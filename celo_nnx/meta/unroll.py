"""Truncated unrolls of a batch of antithetic pairs of inner problems.

A *pair* is two copies of one inner problem, trained with ``theta + v`` and ``theta - v``. Both see the same
initial parameters, batches, lengths and resets, so everything but what training changes is held once a
pair. Arrays of a batch of ``N`` pairs lead with ``[N]``, those that differ by sign with ``[N, 2]``; an
estimator that does not perturb has ``[N, 1]``.

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
      first: the normalized loss of the trajectory's first step, NaN before it, ``[N]``.
    """

    params: PyTree
    model: PyTree
    optimizer: PyTree
    sample: PyTree
    inner_step: Array
    length: Array
    done: Array
    first: Array


class Source(NamedTuple):
    """Where batches come from: example-major arrays of one split, and each pair's part of them.

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
      held: raw losses of the same parameters on a batch of another split, ``[T, N, 2]``; None without one.
      done: whether the trajectory ended with the step, ``[T, N]``.
      mask: whether the step counts (False where it was a reset, or beyond a shorter truncation), ``[T, N]``.
    """

    loss: Array
    held: Array | None
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
    optimizer: Optimizer,
    task: Task,
    schedule: TruncationSchedule,
    thetas: PyTree,
    keys: Array,
    iteration: Array | int = 0,
) -> Problems:
    """Draws new pairs: sample, length, initial parameters, and the optimizer's state for that length.

    Args:
      optimizer: the optimizer, with any theta.
      task: the task of all pairs.
      schedule: draws lengths.
      thetas: meta-parameters, leaves ``[N, 2, ...]``.
      keys: one key a pair, ``[N]``.
      iteration: the meta-iteration, for schedules that follow it.

    Returns:
      Pairs at inner step 0.
    """

    def one(key: Array) -> tuple[PyTree, Array, PyTree, PyTree]:
        sample_key, length_key, init_key = jax.random.split(key, 3)
        sample = task.sample(sample_key)
        return (sample, schedule(length_key, iteration), *task.init(init_key, sample))

    def start(theta: PyTree, params: PyTree, length: Array) -> PyTree:
        return optimizer.with_theta(theta).init(params, length)

    sample, length, params, model = jax.vmap(one)(keys)
    state = both(start, shared=2)(thetas, params, length)
    signs = jax.tree.leaves(thetas)[0].shape[1]
    params, model = jax.tree.map(lambda x: jnp.stack([x] * signs, 1), (params, model))
    zero = jnp.zeros_like(length)
    unseen = jnp.full(length.shape, jnp.nan, jnp.float32)
    return Problems(params, model, state, sample, zero, length, zero > 0, unseen)


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
    batches: tuple[PyTree, PyTree],
    loss_keys: Array,
) -> tuple[Problems, Array, Array | None]:
    """Takes one training step of every pair.

    Args:
      batches: of the training split and of the held-out one, None without one.

    Returns:
      (the next pairs, raw losses ``[N, 2]``, raw losses on the held-out batch or None).
    """

    def one(
        theta: PyTree,
        params: PyTree,
        model: PyTree,
        state: PyTree,
        key: Array,
        batches: tuple[PyTree, PyTree],
        sample: PyTree,
    ) -> tuple[PyTree, PyTree, PyTree, Array, Array | None]:
        batch, unseen = batches
        held = None if unseen is None else task.evaluate(params, model, key, unseen, sample)

        def objective(params: PyTree) -> tuple[Array, PyTree]:
            loss, next_model, _ = task.loss(params, model, key, batch, sample)
            return loss, next_model

        (loss, model), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, state = optimizer.with_theta(theta).update(grads, state, params, value=loss)
        loss = task.unscale(loss, sample).astype(jnp.float32)
        held = None if held is None else held.astype(jnp.float32)
        return jax.tree.map(jnp.add, params, updates), model, state, loss, held

    params, model, state, loss, held = both(one, shared=3)(
        thetas, problems.params, problems.model, problems.optimizer, loss_keys, batches, problems.sample
    )
    step = problems.inner_step + 1
    done = ~problems.done & (step >= problems.length)
    moved = problems._replace(params=params, model=model, optimizer=state, inner_step=step, done=done)
    return moved, loss, held


def unroll(
    optimizer: Optimizer,
    task: Task,
    schedule: TruncationSchedule,
    most: int,
    thetas: PyTree,
    problems: Problems,
    source: Source,
    keys: Array,
    *,
    held: Source | None = None,
    steps: Array | int | None = None,
    iteration: Array | int = 0,
    differentiable: bool = False,
) -> tuple[Problems, Record]:
    """Unrolls a truncation of every pair.

    A step trains every pair; those whose trajectory had already ended are then overwritten by fresh ones.
    The loop over steps therefore runs until a step that must reset, and the reset stands outside of it: it
    costs nothing, not even a select, in the steps in which no pair resets.

    Args:
      optimizer: the optimizer, with any theta.
      task: the task of all pairs.
      schedule: draws the lengths of new trajectories.
      most: ``T``, the rows of the record.
      thetas: perturbed meta-parameters, leaves ``[N, 2, ...]``.
      problems: the pairs as the last truncation left them.
      source: where training batches come from.
      keys: one key a pair, ``[N]``; nothing else is random.
      held: where the batches of a held-out split come from, if its losses are wanted.
      steps: steps to do, at most ``T``, which is the default; later rows of the record have mask False.
      iteration: the meta-iteration, for schedules that follow it.
      differentiable: loop so that reverse mode can follow, each step computed again on the way back; all
        ``T`` steps are done.

    Returns:
      The pairs after the steps, and what happened.
    """
    pairs = problems.length.shape[0]
    steps = most if steps is None else steps
    draw_key, loss_key, reset_key = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 3))(keys), 1, 0)
    at = jax.vmap(jax.random.fold_in, (0, None))
    times = jnp.arange(most)
    # For all steps at once: hashing a few numbers inside the loop costs a loop of its own each time.
    draw_keys, loss_keys = (jax.vmap(at, (None, 0))(key, times) for key in (draw_key, loss_key))
    pick = jax.vmap(jax.vmap(task.pick), (0, None, None))
    picks = pick(draw_keys, source.start, source.count), None
    if held is not None:
        # A number that no step has, whatever T is: a shorter truncation sees the same batches.
        held_keys = jax.vmap(at, (None, 0))(at(draw_key, jnp.uint32(2**32 - 1)), times)
        picks = picks[0], pick(held_keys, held.start, held.count)
    take = jax.vmap(task.take, (None, 0))

    # t, pairs that the last step has to reset, the pairs.
    Moving = tuple[Array, Array, Problems]

    def step(moving: Moving) -> tuple[Moving, Record]:
        t, _, problems = moving
        picked, unseen = jax.tree.map(lambda x: x[t], picks)
        batches = take(source.arrays, picked), None if held is None else take(held.arrays, unseen)
        moved, loss, other = _train_step(optimizer, task, thetas, problems, batches, loss_keys[t])
        return (t + 1, problems.done, moved), Record(loss, other, moved.done, ~problems.done)

    def reset(moving: Moving) -> Moving:
        t, pending, problems = moving
        new = fresh(optimizer, task, schedule, thetas, at(reset_key, t), iteration)

        def choose(a: Array, b: Array) -> Array:
            return jnp.where(pending.reshape((pairs,) + (1,) * (a.ndim - 1)), a, b)

        return t, jnp.zeros_like(pending), jax.tree.map(choose, new, problems)

    moving = (jnp.int32(0), jnp.zeros_like(problems.done), problems)
    if differentiable:
        return _scan(step, reset, moving, most)

    Carry = tuple[Moving, Record]
    losses = jnp.zeros((most, *jax.tree.leaves(problems.params)[0].shape[:2]), jnp.float32)
    flags = jnp.zeros((most, pairs), bool)
    record = Record(losses, None if held is None else losses, flags, flags)

    def recorded_step(carry: Carry) -> Carry:
        t = carry[0][0]
        moving, row = step(carry[0])
        record = jax.tree.map(lambda a, r: lax.dynamic_update_index_in_dim(a, r, t, 0), carry[1], row)
        return moving, record

    def segment(carry: Carry) -> Carry:
        moving, record = lax.while_loop(lambda c: (c[0][0] < steps) & ~jnp.any(c[0][1]), recorded_step, carry)
        return lax.cond(jnp.any(moving[1]), reset, lambda m: m, moving), record

    (_, _, problems), record = lax.while_loop(lambda c: c[0][0] < steps, segment, (moving, record))
    return problems, record


def _scan(
    step: Callable[..., tuple[PyTree, Record]], reset: Callable[..., PyTree], moving: PyTree, steps: int
) -> tuple[Problems, Record]:
    """The loop of :func:`unroll` as one that reverse mode can follow."""

    def body(moving: PyTree, _: None) -> tuple[PyTree, Record]:
        moving, row = step(moving)
        return lax.cond(jnp.any(moving[1]), reset, lambda m: m, moving), row

    (_, _, problems), record = lax.scan(jax.checkpoint(body), moving, None, length=steps)
    return problems, record


def losses_at_end(task: Task, problems: Problems, source: Source, keys: Array, batches: int) -> Array:
    """The mean normalized loss of each problem on fresh batches, its parameters as they are.

    Args:
      task: the task of all pairs.
      problems: the pairs.
      source: where batches come from.
      keys: one key a pair, ``[N]``.
      batches: how many batches the mean is over.

    Returns:
      Losses ``[N, 2]``.
    """

    def one(params: PyTree, model: PyTree, key: Array, batch: PyTree, sample: PyTree) -> Array:
        return task.normalize(task.evaluate(params, model, key, batch, sample).astype(jnp.float32))

    def add(i: Array, total: Array) -> Array:
        draw, noise = jnp.moveaxis(jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, i)))(keys), 1, 0)
        batch = jax.vmap(task.draw, (None, 0, 0, 0))(source.arrays, draw, source.start, source.count)
        return total + both(one, shared=3)(problems.params, problems.model, noise, batch, problems.sample)

    signs = jax.tree.leaves(problems.params)[0].shape[:2]
    return lax.fori_loop(0, batches, add, jnp.zeros(signs, jnp.float32)) / batches
