"""Meta-training as the published loop does it: the plain twin of :mod:`celo_nnx.meta`, for measurements.

Families run one after the other, five dispatches of ten inner steps each, positive and negative
perturbations in turn with the same batches and keys, batches gathered on the host; a reset is computed in
every step and selected where a trajectory has ended.

Source: META_TRAINING sections 1 to 6.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from celo_nnx.errors import UserError, is_count, is_number
from celo_nnx.interfaces import Array, Family, Optimizer, PyTree, Task
from celo_nnx.naive import from_config

DISPATCH = 10  # inner steps a dispatch
# Settings of config.meta of which the loop implements one value, their default.
ONLY: dict[str, Any] = {
    "estimator.kind": "pes",
    "estimator.weights": (),
    "estimator.leaf_std": (),
    "estimator.sign_delta": 0.0,
    "objective.split": "train",
    "objective.steps": "all",
    "objective.scale": "task",
    "objective.clip": 0.0,
    "unroll.kind": "log_uniform",
    "optimizer.kind": "adamw",
    "optimizer.clip_norm": 0.0,
    "optimizer.warmup": 0,
    "frozen": (),
    "average": 0.0,
}
# Settings that must be there, as numbers and not as sections.
NUMBERS = ("estimator.pairs", "estimator.std", "estimator.truncation", "unroll.minimum", "unroll.maximum")
NUMBERS += tuple(f"optimizer.{name}" for name in ("learning_rate", "b1", "b2", "eps", "weight_decay"))


class Problem(NamedTuple):
    """One inner problem on its way; a family holds ``[N]`` of them for each sign."""

    params: PyTree
    model: PyTree
    optimizer: PyTree
    scale: Array
    inner_step: Array
    length: Array
    done: Array


class TrainerState(NamedTuple):
    """Theta, AdamW's state, each family's (positive, negative, accumulator), key, iteration, mean loss."""

    theta: PyTree
    adamw: PyTree
    families: tuple[tuple[Problem, Problem, PyTree], ...]
    key: Array
    iteration: int
    loss: Array


def pes_estimate(
    pos_loss: Array,
    neg_loss: Array,
    done: Array,
    mask: Array,
    perturbation: PyTree,
    accumulator: PyTree,
    std: float,
    finished_step: str = "published",
) -> tuple[PyTree, PyTree, Array]:
    """The PES gradient of one family, written out as in META_TRAINING section 4.

    Args:
      pos_loss, neg_loss, done, mask: ``[T, N]``.
      perturbation, accumulator: leaves ``[N, ...]``.
      std: of the perturbation.
      finished_step: ``"published"`` credits a trajectory's last loss to the last perturbation only,
        ``"exact"`` to the accumulated ones.

    Returns:
      (gradient, next accumulator, mean loss).
    """
    k = jnp.asarray(mask, jnp.float32)
    finished = jnp.cumsum(jnp.asarray(done, jnp.int32), axis=0) > 0
    f = finished
    if finished_step == "exact":
        f = jnp.concatenate([jnp.zeros_like(finished[:1]), finished[:-1]])
    delta, count = pos_loss - neg_loss, jnp.sum(k, axis=0)
    a, b = jnp.sum(delta * (1.0 - f) * k, axis=0) / count, jnp.sum(delta * f * k, axis=0) / count

    def weigh(weight: Array, leaf: Array) -> Array:
        return jnp.reshape(weight, (-1,) + (1,) * (leaf.ndim - 1)) * leaf

    def gradient(xi: Array, v: Array) -> Array:
        return jnp.mean((weigh(a, xi + v) + weigh(b, v)) / (2.0 * std * std), axis=0)

    def carry(xi: Array, v: Array) -> Array:
        last = finished[-1].astype(jnp.float32)
        kept = last * (1.0 - jnp.asarray(done[-1], jnp.float32)) if finished_step == "exact" else last
        return weigh(1.0 - last, xi + v) + weigh(kept, v)

    mean_loss = jnp.mean(jnp.sum((pos_loss + neg_loss) * k, axis=0) / count) / 2.0
    grads = jax.tree.map(gradient, accumulator, perturbation)
    return grads, jax.tree.map(carry, accumulator, perturbation), mean_loss


def check(meta: Mapping[str, Any]) -> None:
    """Checks that the published loop does what a config's section ``meta`` says.

    Its trajectories all begin at inner step 0, whatever ``estimator.initial_offset`` says: that is over with
    the first of them.

    Raises:
      UserError: the first setting that it does not implement.

    Example:
      >>> from celo_nnx.config import load
      >>> check(load("celo2:fast_digits").meta)
    """
    augmentation = meta["augmentation"]
    kind = augmentation.get("kind") if hasattr(augmentation, "items") else None
    if kind not in ("none", "reparametrization") or augmentation.get("level", "global") != "global":
        raise UserError("the published loop knows no meta.augmentation but none and global reparametrization")
    for name, known in ONLY.items():
        value = _setting(meta, name, known)
        if (tuple(value) if isinstance(value, list) else value) != known:
            raise UserError(f"the published loop knows no meta.{name} but {known!r}, not {value!r}")
    scale = ("augmentation.low", "augmentation.high") if kind == "reparametrization" else ()
    for name in (*NUMBERS, *scale):
        value = _setting(meta, name, None)
        if not is_number(value) or name == "estimator.truncation" and not is_count(value):
            shown = "a section" if hasattr(value, "items") else repr(value)
            raise UserError(f"the published loop needs a number for meta.{name}, not {shown}")


def _setting(meta: Mapping[str, Any], name: str, default: Any) -> Any:
    section, _, key = name.rpartition(".")
    return (meta.get(section, {}) if section else meta).get(key, default)


class NaiveTrainer:
    """The published loop: Python over families and dispatches, resets computed in every step.

    Args:
      config: sections ``optimizer`` and ``meta``, the latter as :func:`check` wants it.
      families: task families with data.
      theta: where meta-training starts.
      optimizer: the twin; by default :func:`celo_nnx.naive.from_config` of ``config.optimizer``.

    Raises:
      UserError: a setting that the loop does not implement.

    Example:
      >>> trainer = naive_trainer(config, families, theta)  # doctest: +SKIP
      >>> state = trainer(trainer.init(jax.random.key(0)))  # doctest: +SKIP
    """

    def __init__(
        self, config: ConfigDict, families: list[Family], theta: PyTree, optimizer: Optimizer | None = None
    ) -> None:
        self.meta, self.families, self.theta = config.meta, families, theta
        check(config.meta)
        self.optimizer = optimizer or from_config(config.optimizer)
        rule = config.meta.optimizer
        self.adamw = optax.adamw(
            rule.learning_rate, b1=rule.b1, b2=rule.b2, eps=rule.eps, weight_decay=rule.weight_decay
        )
        self.unroll = jax.jit(self._unroll, static_argnums=0)
        self.fresh = jax.jit(jax.vmap(self._fresh, (None, 0, 0)), static_argnums=0)
        self.perturb = jax.jit(self._perturb)
        self.estimate = jax.jit(pes_estimate, static_argnums=7)
        self.step = jax.jit(self._step)

    def init(self, key: Array) -> TrainerState:
        """Returns the start: every family's problems at inner step 0, accumulators zero."""
        pairs = self.meta.estimator.pairs
        start_key, key = jax.random.split(key)
        thetas = jax.tree.map(lambda x: jnp.broadcast_to(x, (pairs, *x.shape)), self.theta)
        zeros = jax.tree.map(jnp.zeros_like, thetas)
        families = []
        for index, family in enumerate(self.families):
            keys = jax.random.split(jax.random.fold_in(start_key, index), pairs)
            problems = self.fresh(family.task, thetas, keys)
            families.append((problems, problems, zeros))
        adamw = self.adamw.init(self.theta)
        return TrainerState(self.theta, adamw, tuple(families), key, 0, jnp.zeros(()))

    def __call__(self, state: TrainerState) -> TrainerState:
        """Does one meta-iteration."""
        meta, families, results = self.meta.estimator, [], []
        finished_step = meta.get("finished_step", "exact")
        key = jax.random.fold_in(state.key, state.iteration)
        host = np.random.default_rng((int(jax.random.bits(key, dtype=jnp.uint32)), state.iteration))
        for index, (family, old) in enumerate(zip(self.families, state.families, strict=True)):
            family_key = jax.random.fold_in(key, index)
            v, plus, minus = self.perturb(state.theta, family_key)
            pos, neg, records = *old[:2], []
            for start in range(0, meta.truncation, DISPATCH):
                steps = min(DISPATCH, meta.truncation - start)
                batches = _host_batches(family, host, (steps, meta.pairs))
                keys = jax.random.split(jax.random.fold_in(family_key, start), (steps, meta.pairs))
                pos, record = self.unroll(family.task, plus, pos, batches, keys)
                neg, (neg_loss, _, _) = self.unroll(family.task, minus, neg, batches, keys)
                records.append((record[0], neg_loss, *record[1:]))
            record = [jnp.concatenate(parts) for parts in zip(*records, strict=True)]
            gradient, accumulator, loss = self.estimate(*record, v, old[2], meta.std, finished_step)
            families.append((pos, neg, accumulator))
            results.append((gradient, loss))
        theta, adamw, loss = self.step(state.theta, state.adamw, results)
        return TrainerState(theta, adamw, tuple(families), state.key, state.iteration + 1, loss)

    def _fresh(self, task: Task, theta: PyTree, key: Array) -> Problem:
        """A new problem: scale, length and initial parameters drawn."""
        scale_key, length_key, init_key = jax.random.split(key, 3)
        unroll, augmentation = self.meta.unroll, self.meta.augmentation
        scale = jnp.ones(())
        if augmentation.kind != "none":
            scale = jnp.exp(
                jax.random.uniform(
                    scale_key, (), minval=np.log(augmentation.low), maxval=np.log(augmentation.high)
                )
            )
        bounds = dict(minval=np.log(unroll.minimum), maxval=np.log(unroll.maximum))
        length = jnp.exp(jax.random.uniform(length_key, (), **bounds)).astype(jnp.int32)
        params, model = task.init(init_key)
        params = jax.tree.map(lambda p: p / scale, params)
        optimizer = self.optimizer.with_theta(theta).init(params, length)
        return Problem(params, model, optimizer, scale, jnp.int32(0), length, jnp.bool_(False))

    def _unroll(self, task: Task, thetas: PyTree, problems: Problem, batches: PyTree, keys: Array) -> Any:
        """Ten steps of ``[N]`` problems; returns them and (normalized loss, done, mask), ``[steps, N]``."""

        def one(theta: PyTree, problem: Problem, batch: PyTree, key: Array) -> tuple[Problem, Any]:
            def train(problem: Problem) -> tuple[Problem, Array]:
                def objective(params: PyTree) -> tuple[Array, PyTree]:
                    whole = jax.tree.map(lambda p: p * problem.scale, params)
                    loss, model, _ = task.loss(whole, problem.model, key, batch)
                    return loss, model

                (loss, model), grads = jax.value_and_grad(objective, has_aux=True)(problem.params)
                rule = self.optimizer.with_theta(theta)
                updates, optimizer = rule.update(grads, problem.optimizer, problem.params, value=loss)
                params = jax.tree.map(jnp.add, problem.params, updates)
                step = problem.inner_step + 1
                done = step >= problem.length
                return Problem(params, model, optimizer, problem.scale, step, problem.length, done), loss

            def reset(problem: Problem) -> tuple[Problem, Array]:
                return self._fresh(task, theta, key), jnp.zeros(())

            counted = ~problem.done
            problem, loss = jax.lax.cond(problem.done, reset, train, problem)
            return problem, (task.normalize(loss), problem.done, counted)

        def step(problems: Problem, fed: tuple[PyTree, Array]) -> tuple[Problem, Any]:
            return jax.vmap(one)(thetas, problems, *fed)

        return jax.lax.scan(step, problems, (batches, keys))

    def _perturb(self, theta: PyTree, key: Array) -> tuple[PyTree, PyTree, PyTree]:
        """Returns v, theta + v and theta - v, leaves ``[N, ...]``."""
        leaves, treedef = jax.tree.flatten(theta)
        pairs, std = self.meta.estimator.pairs, self.meta.estimator.std
        keys = jax.random.split(key, len(leaves))
        noise = [std * jax.random.normal(k, (pairs, *x.shape)) for k, x in zip(keys, leaves, strict=True)]
        v = treedef.unflatten(noise)
        plus = jax.tree.map(lambda x, d: x[None] + d, theta, v)
        minus = jax.tree.map(lambda x, d: x[None] - d, theta, v)
        return v, plus, minus

    def _step(self, theta: PyTree, adamw: PyTree, results: list) -> tuple[PyTree, PyTree, Array]:
        """Averages the families, zeroes what is not finite, takes one AdamW step."""
        gradients, losses = zip(*results, strict=True)
        mean = jax.tree.map(lambda *g: sum(g) / len(g), *gradients)
        mean = jax.tree.map(lambda g: jnp.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0), mean)
        updates, adamw = self.adamw.update(mean, adamw, theta)
        return optax.apply_updates(theta, updates), adamw, sum(losses) / len(losses)


def _host_batches(family: Family, host: np.random.Generator, lead: tuple[int, int]) -> PyTree:
    """Gathers a block of batches on the host, ``[steps, N, batch, ...]``, each problem its own."""
    count = len(next(iter(family.train.values())))
    index = host.integers(0, count, (*lead, family.task.batch_size))
    return {name: x[index] for name, x in family.train.items()}
