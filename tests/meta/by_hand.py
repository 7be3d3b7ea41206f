"""The toy problems and their estimates in numpy, by plain loops; the keys by their documented derivation."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from meta_toy import jit  # put there by the fixture

LAST = 2**32 - 1  # the number that no pair and no step has


class Inner(NamedTuple):
    """Inner problems between truncations: w and its slope in the drift ``[N, S]``, clocks ``[N]``."""

    w: np.ndarray
    slope: np.ndarray
    step: np.ndarray
    done: np.ndarray

    @staticmethod
    def start(pairs: int, signs: int = 2, step: Any = 0) -> Inner:
        zero = np.zeros((pairs, signs))
        steps = np.broadcast_to(np.asarray(step), (pairs,)).astype(int)
        return Inner(zero + 1.0, zero, steps, np.zeros(pairs, bool))


class Losses(NamedTuple):
    """What a truncation of T steps records: ``[T, N, S]`` and ``[T, N]``; slopes are of the training loss."""

    loss: np.ndarray
    held: np.ndarray
    slope: np.ndarray
    done: np.ndarray
    mask: np.ndarray


def train(
    drift: Any,
    at: Inner,
    steps: int,
    length: Any,
    x: Any = 0.0,
    held: Any = 0.0,
    rate: Any = 0.1,
    noise: Any = 0,
) -> tuple[Losses, Inner]:
    """Trains ``Quadratic(noise=noise)`` with steps ``-rate g + 0.1 drift``; x and held are ``[N, T]``."""
    shape = at.w.shape
    drift, rate = np.broadcast_to(drift, shape), np.broadcast_to(rate, shape)
    x, held = (noise * np.broadcast_to(b, (shape[0], steps)) for b in (x, held))
    w, slope, step, done = at
    rows = []
    for t in range(steps):
        grad = w + 0.5 + x[:, t, None]
        loss = 0.5 * (w + 0.5) ** 2
        row = [loss + x[:, t, None] * w, loss + held[:, t, None] * w, grad * slope]
        reset = done
        w = np.where(reset[:, None], 1.0, w - rate * grad + 0.1 * drift)
        slope = np.where(reset[:, None], 0.0, slope - rate * slope + 0.1)
        step = np.where(reset, 0, step + 1)
        done = ~reset & (step >= length)
        rows.append([*row, done, ~reset])
    return Losses(*(np.array(r) for r in zip(*rows, strict=True))), Inner(w, slope, step, done)


def counted_mean(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The mean over counted steps of ``[T, N, ...]``, ``[N, ...]``; NaN where none counts."""
    means = np.full(values.shape[1:], np.nan)
    for n in range(values.shape[1]):
        if counts[:, n].any():
            means[n] = np.mean(
                [value for value, own in zip(values[:, n], counts[:, n], strict=True) if own], 0
            )
    return means


def pes(
    loss: np.ndarray, done: np.ndarray, counts: np.ndarray, mask: np.ndarray, v: np.ndarray, seen: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The PES sums ``[N, size]``, to be divided by 2 std^2, and what trajectories have seen after it."""
    sums, after = np.zeros_like(v), np.zeros_like(v)
    for n in range(len(v)):
        total, terms = seen[n] + v[n], []
        for t in range(len(loss)):
            if not mask[t, n]:
                total = v[n]  # the step that begins a trajectory, which knows the present perturbation only
            if counts[t, n]:
                terms.append((loss[t, n, 0] - loss[t, n, 1]) * total)
            if done[t, n]:
                total = 0.0 * v[n]
        sums[n] = np.mean(terms, 0) if terms else 0.0
        after[n] = total
    return sums, after


@functools.partial(jit, static_argnames="size")
def _normal(key: Any, numbers: Any, size: int) -> Any:
    keys = jax.vmap(lambda n: jax.random.split(jax.random.fold_in(key, n))[0])(numbers)
    return jax.vmap(lambda key: jax.random.normal(key, (size,)))(keys)


def perturbations(key: Any, numbers: Any, std: Any, size: int = 1) -> np.ndarray:
    """What pairs add to theta in the meta-iteration of a key, ``[N, size]``."""
    return std * np.asarray(_normal(key, jnp.asarray(numbers), size), np.float64)


@jit
def unroll_keys(key: Any, numbers: Any) -> Any:
    """The keys of the pairs' unrolls in the meta-iteration of a key."""
    return jax.vmap(lambda n: jax.random.split(jax.random.fold_in(key, n))[1])(jnp.asarray(numbers))


@functools.partial(jit, static_argnames=("steps", "held"))
def _picked(keys: Any, start: Any, count: Any, steps: int, held: bool) -> Any:
    def one(key: Any, start: Any, count: Any) -> Any:
        draw = jax.random.split(key, 3)[0]
        draw = jax.random.fold_in(draw, jnp.uint32(LAST)) if held else draw
        at = jax.vmap(jax.random.fold_in, (None, 0))(draw, jnp.arange(steps))
        return jax.vmap(lambda key: start + jax.random.randint(key, (), 0, count))(at)

    return jax.vmap(one)(keys, start, count)


def batches(estimator: Any, keys: Any, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers that the first group's pairs draw with the keys of their unrolls, train and validation."""
    group = estimator.population.groups[0]
    family = np.repeat(np.arange(len(group.members)), estimator.pairs)
    found = []
    for split in ("train", "validation"):
        arrays = [getattr(estimator.families[i], split)["x"] for i in group.members]
        start = np.cumsum([0, *(len(x) for x in arrays[:-1])])[family]
        count = np.array([len(x) for x in arrays])[family]
        picked = _picked(keys, start, count, steps, split != "train")
        found.append(np.concatenate(arrays).astype(np.float64)[np.asarray(picked)])
    return found[0], found[1]


class Meta(NamedTuple):
    """Meta-losses ``[T, N, 2]``, what counts of them ``[T, N]``, the trajectories' first losses ``[N]``."""

    loss: np.ndarray
    counts: np.ndarray
    first: np.ndarray


def meta_losses(rows: Losses, first: np.ndarray, settings: dict[str, Any]) -> Meta:
    """The objective of a truncation by a loop over pairs; ``first`` is NaN where there is no loss yet."""
    held = settings.get("split", "train") != "train"
    loss = np.clip(rows.held if held else rows.loss, -50.0, 50.0)
    first, out = first.copy(), loss.copy()
    for n in range(loss.shape[1]):
        for t in range(len(loss)):
            if not rows.mask[t, n]:
                first[n] = np.nan
                continue
            first[n] = loss[t, n, 0] if np.isnan(first[n]) else first[n]
            if settings.get("scale") == "first":
                out[t, n] = loss[t, n] / abs(first[n])
            elif settings.get("scale") == "log":
                out[t, n] = np.log(np.maximum(loss[t, n], 1e-6))
    if settings.get("clip"):
        out = np.minimum(out, settings["clip"])
    counts = rows.mask & rows.done if settings.get("steps") == "last" else rows.mask
    return Meta(out, counts, first)
