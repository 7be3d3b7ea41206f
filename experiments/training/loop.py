"""A training loop to copy: an nnx model, any optax optimizer, many steps a dispatch, checkpoints by Orbax.

Nothing in it knows which optimizer it runs: one is a function of a learning rate, :data:`OPTIMIZERS`. All of
them warm up and decay alike, and decay the same tensors.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

import celo_nnx
from celo_nnx.meta import checkpoint

Array = jax.Array
PyTree = Any
Rate = float | Array | optax.Schedule

DECAY = 0.1


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer as a function of its learning rate.

    Attributes:
      make: a learning rate or a schedule -> the optax transformation.
      grid: the rates that tuning begins with, ``10^(i/2)`` from the first number to the second.
      width_power: the power of a network's width with which a matrix's rate must change so that a step moves
        the next layer as much at every width. Unscaled, Adam's moves it in proportion to the width, an
        orthogonal one of RMS 1 to its root, and Muon's, whose singular values are 1, alike.
    """

    make: Callable[[Rate], optax.GradientTransformation]
    grid: tuple[int, int]
    width_power: float


def decayed(params: PyTree) -> PyTree:
    """Weight decay is for matrices and kernels, not for biases and scales."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def matrices(params: PyTree) -> PyTree:
    """What Muon orthogonalizes: dense and convolution kernels; Adam takes embeddings, positions, the head.

    That is its author's advice. A convolution ``[height, width, in, out]`` is a matrix of ``out`` columns.
    """

    def one(path: tuple[Any, ...], p: Array) -> optax.contrib.MuonDimensionNumbers | None:
        name = jax.tree_util.keystr(path)
        if "kernel" not in name or "head" in name or p.ndim < 2:
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(p.ndim - 1)), p.ndim - 1)

    return jax.tree_util.tree_map_with_path(one, params)


def adamw(rate: Rate) -> optax.GradientTransformation:
    """AdamW with the betas of language models."""
    return optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=DECAY, mask=decayed)


def muon(rate: Rate) -> optax.GradientTransformation:
    """Muon, and AdamW at the same rate for what is no matrix."""
    return optax.contrib.muon(
        rate,
        weight_decay=DECAY,
        weight_decay_mask=decayed,
        adam_b2=0.95,
        adam_weight_decay=DECAY,
        muon_weight_dimension_numbers=matrices,
    )


def celo2(rate: Rate) -> optax.GradientTransformation:
    """Celo2 with the package's weights, which finds out by itself what is a matrix."""
    return celo_nnx.celo2(rate, weight_decay=DECAY, mask=decayed)


def routed(weights: str, rate: Rate) -> optax.GradientTransformation:
    """Celo2 with Muon's routing: embeddings and head by Adam, at 5 instead of 20 times the rate."""
    rule = celo_nnx.load_optimizer("celo2", ("optimizer.routes.adam.multiplier=5",), weights=weights)
    return rule.as_optax(learning_rate=rate, weight_decay=DECAY, mask=decayed, dimensions=matrices)


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(adamw, (-6, -3), -1.0),
    "muon": Optimizer(muon, (-5, -2), 0.0),
    "celo2": Optimizer(celo2, (-7, -4), -0.5),
    # Steps on the way from Celo2 to Muon: what their difference is made of.
    "celo2_routed": Optimizer(functools.partial(routed, "celo2"), (-7, -4), -0.5),
    "hand_made_routed": Optimizer(functools.partial(routed, "hand_made"), (-7, -4), -0.5),
}
COMPARED = ("adamw", "muon", "celo2")  # without another wish


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What is trained.

    Attributes:
      name: for files and tables: letters, digits, ``-``.
      model: draws the network.
      loss: ``(model, batch) -> scalar``.
      draw: ``(key, train) -> batch``.
      train: arrays that batches are drawn from.
      validation: batches on a leading axis, ``[n_batches, ...]``; their mean loss is the validation loss.
      adjust: (an optimizer's name, the optimizer) -> the optimizer, for width multipliers.
    """

    name: str
    model: Callable[[nnx.Rngs], nnx.Module]
    loss: Callable[[Any, PyTree], Array]
    draw: Callable[[Array, PyTree], PyTree]
    train: PyTree
    validation: PyTree
    adjust: Callable[[str, optax.GradientTransformation], optax.GradientTransformation] = lambda _, tx: tx


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long, and how often something is looked at.

    Attributes:
      steps: updates of a run.
      every: updates between validations, a divisor of ``steps``; they are one dispatch.
      warmup: updates until the peak of the learning rate; a cosine to 0 follows.
      checkpoint_seconds: between checkpoints.
    """

    steps: int
    every: int
    warmup: int
    checkpoint_seconds: float = 60.0


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run left.

    Attributes:
      curve: rows (step, mean training loss since the last row, validation loss), until it ended or diverged.
      seconds: a step's, the median over dispatches but the first, which compiles; 0 where there was one.
    """

    curve: list[tuple[int, float, float]]
    seconds: float

    def final(self, steps: int) -> float:
        """The validation loss after all steps, infinite for a run that diverged."""
        step, _, loss = self.curve[-1]
        return loss if step == steps and math.isfinite(loss) else math.inf


def schedule(peak: float | Array, plan: Plan) -> optax.Schedule:
    """Warm-up from ``peak / warmup``, then a cosine to 0; ``peak`` may be traced.

    Example:
      >>> [round(float(schedule(0.1, Plan(10, 1, 4))(step)), 3) for step in (0, 4, 7, 10)]
      [0.025, 0.1, 0.05, 0.0]
    """
    start = 1 / max(plan.warmup, 1)
    shape = optax.warmup_cosine_decay_schedule(start, 1.0, plan.warmup, plan.steps)
    return lambda step: peak * shape(step)


@functools.lru_cache(maxsize=4)
def programs(problem: Problem, optimizer: str, plan: Plan) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns ``start(rate, seed)`` and ``advance(state, rate, seed, first, train, validation)``, compiled.

    Rate and seed are arguments, so that every run of a grid shares one program. The state is donated: its
    memory is used again for the next one.
    """

    def transformation(rate: Array) -> optax.GradientTransformation:
        return problem.adjust(optimizer, OPTIMIZERS[optimizer].make(schedule(rate, plan)))

    graph = nnx.graphdef(nnx.eval_shape(lambda: problem.model(nnx.Rngs(0))))

    def loss_of(params: PyTree, batch: PyTree) -> Array:
        return problem.loss(nnx.merge(graph, params), batch)

    @jax.jit
    def start(rate: Array, seed: Array) -> PyTree:
        params = nnx.state(problem.model(nnx.Rngs(jax.random.key(seed))), nnx.Param)
        return params, transformation(rate).init(params)

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(
        state: PyTree, rate: Array, seed: Array, first: Array, train: PyTree, validation: PyTree
    ) -> PyTree:
        tx = transformation(rate)

        def step(state: PyTree, index: Array) -> tuple[PyTree, Array]:
            params, opt_state = state
            batch = problem.draw(jax.random.fold_in(jax.random.key(seed), index), train)
            loss, grads = jax.value_and_grad(loss_of)(params, batch)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        state, losses = lax.scan(step, state, first + jnp.arange(plan.every))
        held_out = lax.map(lambda batch: loss_of(state[0], batch), validation)
        return state, losses.mean(), held_out.mean()

    return start, advance


def train(
    problem: Problem,
    optimizer: str,
    rate: float,
    seed: int,
    plan: Plan,
    folder: Path,
    told: Callable[[int, float], None] = lambda step, loss: None,
) -> Run:
    """Trains once, going on from the newest checkpoint in ``folder`` where there is one, to the same result.

    Args:
      problem: what is trained.
      optimizer: a key of :data:`OPTIMIZERS`.
      rate: the peak learning rate.
      seed: decides the start and every batch.
      plan: lengths.
      folder: of the run's checkpoints.
      told: called with (step, validation loss) at every validation.

    Returns:
      The run; it ends early where a loss is not finite.

    Raises:
      UserError: a checkpoint is damaged or of another model.
    """
    start, advance = programs(problem, optimizer, plan)
    rate, seed = jnp.float32(rate), jnp.uint32(seed)
    state, step, curve, seconds = start(rate, seed), 0, [], []
    if found := checkpoint.load(folder, lambda _: state):
        step, curve = found.step, [tuple(row) for row in found.record["curve"]]
        state = jax.tree.map(jnp.asarray, found.state)
    saved = time.monotonic()
    while step < plan.steps:
        begin = time.monotonic()
        out = advance(state, rate, seed, jnp.int32(step), problem.train, problem.validation)
        state, loss, held_out = out[0], float(out[1]), float(out[2])
        seconds.append((time.monotonic() - begin) / plan.every)
        step += plan.every
        curve.append((step, loss, held_out))
        told(step, held_out)
        if not math.isfinite(loss + held_out):
            break
        if step < plan.steps and time.monotonic() - saved >= plan.checkpoint_seconds:
            checkpoint.save(folder, step, state, {"curve": curve}, keep=1)
            saved = time.monotonic()
    middle = sorted(seconds[1:])[len(seconds[1:]) // 2] if len(seconds) > 1 else 0.0
    return Run(curve, middle)
