"""Training and held-out curves of one optimizer over learning rates and seeds, in one compiled program."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from celo_nnx.devices import TOGETHER
from celo_nnx.errors import require
from celo_nnx.evaluation.baselines import trained
from celo_nnx.evaluation.scores import final_loss
from celo_nnx.interfaces import Array, PyTree, Task

HELD_OUT_KEY = 0x5EED  # decides the held-out batches, the same for every run of a task


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


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What runs are evaluated on besides their training loss.

    A held-out loss is the mean of :meth:`~celo_nnx.interfaces.Task.evaluate` over ``batches`` batches drawn
    from the examples once: the same for all runs, optimizers and evaluations of a task.

    Attributes:
      sets: examples by name of the set, ``{"validation": arrays, "test": arrays}``.
      every: steps between evaluations, a divisor of the run's; 0 for one at the end.
      batches: batches a set.
    """

    sets: dict[str, dict[str, Any]]
    every: int = 0
    batches: int = 16


@dataclasses.dataclass(frozen=True)
class Cost:
    """What runs cost.

    Attributes:
      compile_seconds: of compilation; 0 where an equal program was there.
      run_seconds: of training, held-out losses included.
      step_seconds: of one device for a step of one run, while runs train together.
      temp_bytes: temporaries of the compiled program, by XLA's analysis, shared out over the runs of a device
        that train at once.
    """

    compile_seconds: float = 0.0
    run_seconds: float = 0.0
    step_seconds: float = 0.0
    temp_bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        """Both grids' cost: of a step and a run, the part that ran longer tells."""
        main = max(self, other, key=lambda cost: cost.run_seconds)
        return Cost(
            self.compile_seconds + other.compile_seconds,
            self.run_seconds + other.run_seconds,
            main.step_seconds,
            main.temp_bytes,
        )


@dataclasses.dataclass(frozen=True)
class Curves:
    """What a grid of runs measured.

    Attributes:
      losses: training loss of every step, ``[n_lr, n_seeds, steps]`` float32, ``inf`` from divergence on.
      held_out: by set, ``[n_lr, n_seeds, evaluations]`` float32, the last one at the end, ``inf`` from
        divergence on.
      cost: what the runs cost.
    """

    losses: np.ndarray
    held_out: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    cost: Cost = Cost()


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
    """The training losses of :func:`train_runs`, ``[n_lr, n_seeds, steps]``.

    Example:
      >>> losses = train_curves(optax.adam, task, data, learning_rates=[1e-3, 1e-2], seeds=[0], steps=100)
      ... # doctest: +SKIP
    """
    grid = dict(learning_rates=learning_rates, seeds=seeds, steps=steps)
    return train_runs(make_tx, task, data, context=context, **grid).losses


def train_runs(
    make_tx: Callable[..., optax.GradientTransformation],
    task: Task,
    data: dict[str, Any],
    *,
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    steps: int,
    context: tuple[PyTree, ...] = (),
    held_out: HeldOut | None = None,
    eval_params: Callable[[PyTree, PyTree], PyTree] = trained,
) -> Curves:
    """Trains a task once for every learning rate and seed.

    A seed fixes the initial parameters and every batch, so runs of equal seed are paired across learning
    rates and optimizers. The recorded loss of step ``t`` is the one on its batch before its update. A run is
    diverged from its first non-finite loss on, and ``inf`` from there: it is never dropped.

    Runs are spread over all local devices; on CPU, those of a device train in turns of as many as fit its
    cache. The learning rate and ``context`` are traced, so calls with an equal ``make_tx``, task and sizes
    share one compilation.

    Args:
      make_tx: gives the optax rule for ``(learning_rate, *context)``; the loss reaches rules that take it as
        ``value=``.
      task: what is trained.
      data: the task's arrays, example axis leading.
      learning_rates: ``[n_lr]`` positive numbers.
      seeds: ``[n_seeds]`` integers.
      steps: updates per run.
      context: arrays that ``make_tx`` needs, such as meta-parameters.
      held_out: further examples to evaluate on.
      eval_params: (optimizer state, parameters) -> parameters at which held-out losses are taken.

    Returns:
      The curves.

    Raises:
      UserError: an empty grid, a learning rate that is not positive, fewer than one step, or evaluations that
        do not divide the run.

    Example:
      >>> curves = train_runs(optax.adam, task, data, learning_rates=[1e-2], seeds=[0], steps=100,
      ...     held_out=HeldOut({"validation": other}))  # doctest: +SKIP
    """
    rates = np.asarray(learning_rates, np.float32).ravel()
    held_out = held_out or HeldOut({})
    require(steps >= 1, "steps", steps, "an integer >= 1")
    require(len(seeds) >= 1, "seeds", list(seeds), "at least one integer")
    legal = "at least one number, all finite and > 0"
    require(
        rates.size >= 1 and np.all(rates > 0) and np.all(np.isfinite(rates)), "learning_rates", rates, legal
    )
    every = held_out.every or steps
    require(1 <= every and steps % every == 0, "every", held_out.every, f"0 or a divisor of {steps} steps")
    require(held_out.batches >= 1, "batches", held_out.batches, "an integer >= 1")
    runs = rates.size * len(seeds)
    devices = min(jax.local_device_count(), runs)
    together = _together(task, math.ceil(runs / devices))
    padded = math.ceil(runs / (devices * together)) * devices * together
    index = np.minimum(np.arange(padded), runs - 1)
    batch_rates = np.repeat(rates, len(seeds))[index]
    batch_seeds = np.tile(np.asarray(seeds, np.uint32), rates.size)[index]
    arrays, sets = jax.tree.map(jnp.asarray, (dict(data), dict(held_out.sets)))
    program = _Program(make_tx, task, steps, every, held_out.batches, devices, together, eval_params)
    arguments = jax.tree.map(jnp.asarray, (batch_rates, batch_seeds, arrays, sets, context))
    shapes, tree = jax.tree.flatten(jax.eval_shape(lambda *x: x, *arguments))
    begin = time.monotonic()
    compiled = _compiled(program, tuple(shapes), tree)
    ready = time.monotonic()
    losses, other = jax.device_get(compiled(*arguments))
    took = time.monotonic() - ready
    temp_bytes = compiled.memory_analysis().temp_size_in_bytes / together
    cost = Cost(ready - begin, took, took * devices / (padded * steps), temp_bytes)
    grid = (rates.size, len(seeds), -1)
    held = {name: value[:runs].reshape(grid) for name, value in other.items()}
    return Curves(losses[:runs].reshape(grid), held, cost)


def _together(task: Task, here: int) -> int:
    """Returns how many of a device's runs train at once: all, or on CPU what its cache holds."""
    if jax.default_backend() != "cpu":
        return here
    keys = jax.random.split(jax.random.key(0))
    params = jax.eval_shape(lambda: task.init(keys[0], task.sample(keys[1]))[0])
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    turns = math.ceil(here / max(TOGETHER // max(size, 1), 1))
    return math.ceil(here / turns)


@dataclasses.dataclass(frozen=True)
class _Program:
    """What a compiled program depends on besides the shapes of its arrays."""

    make_tx: Callable[..., optax.GradientTransformation]
    task: Task
    steps: int
    every: int
    batches: int
    devices: int
    together: int
    eval_params: Callable[[PyTree, PyTree], PyTree]


@functools.lru_cache(maxsize=16)
def _compiled(program: _Program, shapes: tuple[jax.ShapeDtypeStruct, ...], tree: Any) -> Any:
    """The compiled program for arguments of these shapes; kept, since thetas and grids share them."""
    return jax.jit(functools.partial(_train, program)).lower(*jax.tree.unflatten(tree, shapes)).compile()


def _train(
    program: _Program, rates: Array, seeds: Array, data: PyTree, sets: PyTree, context: tuple[PyTree, ...]
) -> tuple[Array, dict[str, Array]]:
    """(losses ``[runs, steps]``, by set ``[runs, evaluations]``); rates and seeds are ``[runs]``."""

    def runs(rates: Array, seeds: Array, data: PyTree, sets: PyTree, context: PyTree) -> PyTree:
        def one(run: tuple[Array, Array]) -> PyTree:
            return _train_one(program, *run, data=data, sets=sets, context=context)

        turns = jax.tree.map(lambda x: x.reshape(-1, program.together), (rates, seeds))
        found = lax.map(jax.vmap(one), turns) if len(turns[0]) > 1 else jax.vmap(one)((rates, seeds))
        return jax.tree.map(lambda x: x.reshape(len(rates), -1), found)

    if program.devices == 1:
        return runs(rates, seeds, data, sets, context)
    mesh = Mesh(np.array(jax.local_devices()[: program.devices]), ("runs",))
    each, shared = PartitionSpec("runs"), PartitionSpec()
    specs = (each, each, shared, shared, shared)
    spread = jax.shard_map(runs, mesh=mesh, in_specs=specs, out_specs=each, check_vma=False)
    return spread(rates, seeds, data, sets, context)


def _train_one(
    program: _Program, rate: Array, seed: Array, *, data: PyTree, sets: PyTree, context: tuple[PyTree, ...]
) -> tuple[Array, dict[str, Array]]:
    """(losses ``[steps]``, by set ``[evaluations]``) of one run."""
    task = program.task
    sample_key, init_key, step_key = jax.random.split(jax.random.key(seed), 3)
    sample = task.sample(sample_key)
    params, model_state = task.init(init_key, sample)
    tx = optax.with_extra_args_support(program.make_tx(rate, *context))
    count = _count(data)

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

    def stretch(carry: PyTree, indices: Array) -> tuple[PyTree, tuple[Array, dict[str, Array]]]:
        carry, losses = lax.scan(step, carry, indices)
        params = program.eval_params(carry[2], carry[0])
        other = {name: _held_out(program, params, carry[1], sample, data) for name, data in sets.items()}
        return carry, (losses, other)

    start = (params, model_state, tx.init(params))
    _, (losses, other) = lax.scan(stretch, start, jnp.arange(program.steps).reshape(-1, program.every))
    losses, finite = _diverged_to_inf(losses.ravel())
    by_then = ~finite.reshape(-1, program.every)[:, -1]
    return losses, {k: _diverged_to_inf(jnp.where(by_then, jnp.inf, x))[0] for k, x in other.items()}


def _diverged_to_inf(losses: Array) -> tuple[Array, Array]:
    """(losses ``[n]`` with ``inf`` from the first non-finite one on, where they are finite)."""
    finite = jnp.cumsum(~jnp.isfinite(losses)) == 0
    return jnp.where(finite, losses, jnp.inf), finite


def _held_out(program: _Program, params: PyTree, model_state: PyTree, sample: PyTree, data: PyTree) -> Array:
    """The mean loss over the held-out batches of one set, one batch at a time."""
    count = _count(data)

    def one(index: Array) -> Array:
        draw_key, loss_key = jax.random.split(jax.random.fold_in(jax.random.key(HELD_OUT_KEY), index))
        batch = program.task.draw(data, draw_key, jnp.int32(0), count)
        return program.task.evaluate(params, model_state, loss_key, batch, sample)

    return jnp.mean(lax.map(one, jnp.arange(program.batches)))


def _count(data: dict[str, Array]) -> Array:
    return jnp.int32(jax.tree.leaves(data)[0].shape[0]) if data else jnp.int32(0)


def tune(losses: np.ndarray, learning_rates: Sequence[float]) -> Tuned:
    """Chooses the learning rate by the final training loss, as :func:`celo_nnx.evaluation.scores.final_loss`.

    Args:
      losses: ``[n_lr, n_seeds, steps]``, as :func:`train_curves` returns.
      learning_rates: ``[n_lr]``, ascending.

    Returns:
      The choice; see :func:`choose`.

    Example:
      >>> tune(np.array([[[3.0]], [[1.0]], [[2.0]]]), [0.1, 0.2, 0.3]).learning_rate
      0.2
    """
    return choose(final_loss(losses), learning_rates)


def choose(final: np.ndarray, learning_rates: Sequence[float]) -> Tuned:
    """Chooses the learning rate with the smallest median over seeds.

    Args:
      final: ``[n_lr, n_seeds]`` final losses, ``inf`` for a diverged run.
      learning_rates: ``[n_lr]``, ascending.

    Returns:
      The choice; its ``warning`` says when the grid was too narrow to trust it.

    Raises:
      UserError: the grid does not match the losses or does not ascend.

    Example:
      >>> choose(np.array([[3.0], [2.0], [1.0]]), [0.1, 0.2, 0.3]).warning
      "the best learning rate, 0.3, lies on the grid's upper edge: widen the grid"
    """
    rates = np.asarray(learning_rates, np.float64)
    fits = rates.ndim == 1 and len(rates) == len(final) and bool(np.all(np.diff(rates) > 0))
    require(fits, "learning_rates", list(learning_rates), f"{len(final)} ascending numbers")
    medians = np.median(final, axis=1)
    best = int(np.argmin(medians))
    warning = ""
    if not np.isfinite(medians[best]):
        warning = "diverged at every learning rate of the grid"
    elif best in (0, len(rates) - 1) and len(rates) > 1:
        edge = "lower" if best == 0 else "upper"
        warning = f"the best learning rate, {rates[best]:.3g}, lies on the grid's {edge} edge: widen the grid"
    return Tuned(rates, final, medians, best, warning)
