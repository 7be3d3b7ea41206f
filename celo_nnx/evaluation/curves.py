"""Training curves of one optimizer over a grid of learning rates and seeds, in one compiled program."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from celo_nnx.errors import require
from celo_nnx.interfaces import Array, PyTree, Task

FINAL_FRACTION = 0.05


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What a learning-rate grid says.

    Attributes:
      learning_rates: ``[n_lr]``, ascending.
      final: final losses, ``[n_lr, n_seeds]``; ``inf`` where a run diverged.
      medians: median over seeds, ``[n_lr]``.
      best: index of the learning rate with the smallest median.
      warning: empty, or what is wrong with the grid: the best rate lies on its edge, or nothing converged.
    """

    learning_rates: np.ndarray
    final: np.ndarray
    medians: np.ndarray
    best: int
    warning: str

    @property
    def learning_rate(self) -> float:
        """The best learning rate."""
        return float(self.learning_rates[self.best])

    @property
    def median(self) -> float:
        """The median final loss at the best learning rate."""
        return float(self.medians[self.best])


def train_curves(
    make_tx: Callable[..., optax.GradientTransformation],
    task: Task,
    data: dict[str, Any],
    *,
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    steps: int,
    context: tuple[PyTree, ...] = (),
) -> np.ndarray:
    """Trains a task once for every learning rate and seed, and returns the loss of every step.

    A seed fixes the initial parameters and every batch, so runs of equal seed are paired across learning
    rates and optimizers. The recorded loss of step ``t`` is the one on its batch before its update. A run is
    diverged from its first non-finite loss on, and ``inf`` from there: it is never dropped.

    Runs are spread over all local devices. The learning rate and ``context`` are traced, so calls with the
    same ``make_tx``, task and sizes share one compilation.

    Args:
      make_tx: gives the optax rule for ``(learning_rate, *context)``; the loss reaches rules that take it as
        ``value=``.
      task: what is trained.
      data: the task's arrays, example axis leading.
      learning_rates: ``[n_lr]`` positive numbers.
      seeds: ``[n_seeds]`` integers.
      steps: updates per run.
      context: arrays that ``make_tx`` needs, such as meta-parameters.

    Returns:
      Losses, ``[n_lr, n_seeds, steps]`` float32.

    Raises:
      UserError: an empty grid, a learning rate that is not positive, or fewer than one step.

    Example:
      >>> losses = train_curves(optax.adam, task, data, learning_rates=[1e-3, 1e-2], seeds=[0], steps=100)
      ... # doctest: +SKIP
    """
    rates = np.asarray(learning_rates, np.float32).ravel()
    require(steps >= 1, "steps", steps, "an integer >= 1")
    require(len(seeds) >= 1, "seeds", list(seeds), "at least one integer")
    legal = "at least one number, all finite and > 0"
    require(
        rates.size >= 1 and np.all(rates > 0) and np.all(np.isfinite(rates)), "learning_rates", rates, legal
    )
    runs = rates.size * len(seeds)
    devices = min(jax.local_device_count(), runs)
    padded = math.ceil(runs / devices) * devices
    index = np.minimum(np.arange(padded), runs - 1)
    batch_rates = np.repeat(rates, len(seeds))[index]
    batch_seeds = np.tile(np.asarray(seeds, np.uint32), rates.size)[index]
    arrays = {name: jnp.asarray(value) for name, value in data.items()}
    losses = _train(make_tx, task, steps, devices, batch_rates, batch_seeds, arrays, context)
    return np.asarray(losses)[:runs].reshape(rates.size, len(seeds), steps)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _train(
    make_tx: Callable[..., optax.GradientTransformation],
    task: Task,
    steps: int,
    devices: int,
    rates: Array,
    seeds: Array,
    data: dict[str, Array],
    context: tuple[PyTree, ...],
) -> Array:
    """Losses ``[runs, steps]`` for rates ``[runs]`` and seeds ``[runs]``."""

    def runs(rates: Array, seeds: Array, data: dict[str, Array], context: tuple[PyTree, ...]) -> Array:
        one = functools.partial(_train_one, make_tx, task, steps, data=data, context=context)
        return jax.vmap(one)(rates, seeds)

    if devices == 1:
        return runs(rates, seeds, data, context)
    mesh = Mesh(np.array(jax.local_devices()[:devices]), ("runs",))
    each, shared = PartitionSpec("runs"), PartitionSpec()
    spread = jax.shard_map(
        runs, mesh=mesh, in_specs=(each, each, shared, shared), out_specs=each, check_vma=False
    )
    return spread(rates, seeds, data, context)


def _train_one(
    make_tx: Callable[..., optax.GradientTransformation],
    task: Task,
    steps: int,
    rate: Array,
    seed: Array,
    *,
    data: dict[str, Array],
    context: tuple[PyTree, ...],
) -> Array:
    """Losses ``[steps]`` of one run."""
    sample_key, init_key, step_key = jax.random.split(jax.random.key(seed), 3)
    sample = task.sample(sample_key)
    params, model_state = task.init(init_key, sample)
    tx = optax.with_extra_args_support(make_tx(rate, *context))
    count = jnp.int32(jax.tree.leaves(data)[0].shape[0]) if data else jnp.int32(0)

    def step(carry: PyTree, index: Array) -> tuple[PyTree, Array]:
        params, model_state, opt_state = carry
        draw_key, loss_key = jax.random.split(jax.random.fold_in(step_key, index))
        batch = task.draw(data, draw_key, jnp.int32(0), count)

        def objective(params: PyTree) -> tuple[Array, PyTree]:
            loss, state, _ = task.loss(params, model_state, loss_key, batch, sample)
            return loss, state

        (loss, model_state), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss)
        return (optax.apply_updates(params, updates), model_state, opt_state), loss

    _, losses = jax.lax.scan(step, (params, model_state, tx.init(params)), jnp.arange(steps))
    diverged = jnp.cumsum(~jnp.isfinite(losses)) > 0
    return jnp.where(diverged, jnp.inf, losses)


def final_losses(losses: np.ndarray) -> np.ndarray:
    """The final loss of each run: the mean of the last 5 % of its steps (at least one step).

    Args:
      losses: ``[..., steps]``.

    Returns:
      ``[...]``; ``inf`` for a diverged run.

    Example:
      >>> float(final_losses(np.array([9.0] * 38 + [1.0, 3.0])))
      2.0
    """
    last = max(1, round(losses.shape[-1] * FINAL_FRACTION))
    return np.mean(losses[..., -last:].astype(np.float64), axis=-1)


def tune(losses: np.ndarray, learning_rates: Sequence[float]) -> Tuned:
    """Chooses the learning rate by the median over seeds of the final loss.

    Args:
      losses: ``[n_lr, n_seeds, steps]``, as :func:`train_curves` returns.
      learning_rates: ``[n_lr]``, ascending.

    Returns:
      The choice; its ``warning`` says when the grid was too narrow to trust it.

    Raises:
      UserError: the grid does not match the losses or does not ascend.

    Example:
      >>> tune(np.array([[[3.0]], [[1.0]], [[2.0]]]), [0.1, 0.2, 0.3]).learning_rate
      0.2
    """
    rates = np.asarray(learning_rates, np.float64)
    fits = rates.ndim == 1 and len(rates) == len(losses) and bool(np.all(np.diff(rates) > 0))
    require(fits, "learning_rates", list(learning_rates), f"{len(losses)} ascending numbers")
    final = final_losses(losses)
    medians = np.median(final, axis=1)
    best = int(np.argmin(medians))
    warning = ""
    if not np.isfinite(medians[best]):
        warning = "diverged at every learning rate of the grid"
    elif best in (0, len(rates) - 1) and len(rates) > 1:
        edge = "lower" if best == 0 else "upper"
        warning = f"the best learning rate, {rates[best]:.3g}, lies on the grid's {edge} edge: widen the grid"
    return Tuned(rates, final, medians, best, warning)
