"""Measurements: one update against optax's own optimizers, one meta-iteration against the plain twin.

Every figure of the README comes from here. Ratios are meaningful within one run on a quiet machine.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from celo_nnx.errors import require, unknown

PyTree = Any

REPEATS = 15
PEERS = ("optax.adamw", "optax.contrib.muon")


def transformer_shapes(params: int) -> PyTree:
    """Returns abstract float32 parameters in transformer-like shapes, 148 tensors whatever the size.

    Twelve blocks of twelve tensors (attention query, key, value and output, two MLP matrices with biases,
    two layer norms) and embedding, positions, final layer norm; the width is chosen to come near
    ``params``.

    Example:
      >>> len(jax.tree.leaves(transformer_shapes(10_000_000)))
      148
    """
    require(params >= 200_000, "params", params, "an integer of at least 200000")
    width = 8
    while _count(width + 8) <= params * 1.02:
        width += 8

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def block() -> PyTree:
        norm = {"scale": array(width), "bias": array(width)}
        mlp = {
            "up": {"kernel": array(width, 4 * width), "bias": array(4 * width)},
            "down": {"kernel": array(4 * width, width), "bias": array(width)},
        }
        attention = {name: array(width, width) for name in ("query", "key", "value", "output")}
        return {"attention": attention, "mlp": mlp, "norm_1": norm, "norm_2": dict(norm)}

    tree = {f"block_{i:02d}": block() for i in range(12)}
    tree["embed"] = {"tokens": array(VOCABULARY * width // 64, width), "positions": array(256, width)}
    tree["norm"] = {"scale": array(width), "bias": array(width)}
    return tree


VOCABULARY = 1024  # rows of the embedding at width 64; grows with the width


def _count(width: int) -> int:
    return 12 * (12 * width**2 + 9 * width) + VOCABULARY * width // 64 * width + 258 * width


def _optimizers(names: Sequence[str]) -> dict[str, Callable[[], optax.GradientTransformation]]:
    from celo_nnx.config import load_optimizer, presets

    made: dict[str, Callable[[], Any]] = {
        "optax.adamw": lambda: optax.adamw(1e-3),
        "optax.contrib.muon": lambda: optax.contrib.muon(1e-3),
    }
    variants = [n for n, (_, whole) in presets().items() if whole]
    for name in names:
        if name not in made and name not in variants:
            raise unknown("optimizer", name, [*made, *variants])
        if name in variants:
            made[name] = lambda name=name: load_optimizer(name).as_optax(num_steps=1000)
    return made


def step(
    names: Sequence[str] = ("celo2_base", "celo2"), params: int = 10_000_000
) -> Iterator[dict[str, Any]]:
    """Times one update of each optimizer, optax.adamw and optax.contrib.muon always among them.

    Optimizers take turns, so that a machine that slows down slows all of them. The state is donated and
    parameters are updated in place, as in training.

    Args:
      names: variants of ``celo_nnx.experiments``.
      params: number of parameters, in 148 transformer-like tensors.

    Yields:
      A row for each: ``optimizer, params, ms_median, ms_min, ms_max, ns_per_param, ratio_to_adamw,
      temp_bytes_per_param`` (XLA's memory analysis), ``state_bytes_per_param, compile_s``.
    """
    table = _optimizers(names)
    shapes = transformer_shapes(params)
    count = sum(x.size for x in jax.tree.leaves(shapes))
    cells = {name: _StepCell(make(), shapes) for name, make in table.items()}
    for _ in range(REPEATS):
        for cell in cells.values():
            cell.time()
    base = statistics.median(cells["optax.adamw"].times)
    for name, cell in cells.items():
        median = statistics.median(cell.times)
        yield {
            "optimizer": name,
            "params": count,
            "ms_median": round(median * 1e3, 2),
            "ms_min": round(min(cell.times) * 1e3, 2),
            "ms_max": round(max(cell.times) * 1e3, 2),
            "ns_per_param": round(median / count * 1e9, 2),
            "ratio_to_adamw": round(median / base, 2),
            "temp_bytes_per_param": round(cell.temp_bytes / count, 2),
            "state_bytes_per_param": round(cell.state_bytes / count, 2),
            "compile_s": round(cell.compile_s, 1),
        }


class _StepCell:
    """One optimizer's compiled update, its state, and the seconds of each call."""

    def __init__(self, tx: optax.GradientTransformation, shapes: PyTree) -> None:
        rng = np.random.default_rng(0)

        def fill() -> PyTree:
            return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.02, x.shape), jnp.float32), shapes)

        self.params, self.grads = fill(), fill()
        self.state = jax.jit(tx.init)(self.params)

        def update(grads: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        start = time.perf_counter()
        lowered = jax.jit(update, donate_argnums=(1, 2)).lower(self.grads, self.state, self.params)
        self.compiled = lowered.compile()
        self.compile_s = time.perf_counter() - start
        self.temp_bytes = self.compiled.memory_analysis().temp_size_in_bytes
        self.state_bytes = sum(x.nbytes for x in jax.tree.leaves(self.state))
        self.times: list[float] = []
        for _ in range(2):
            self.time()
        self.times.clear()

    def time(self) -> None:
        """Times one update to its end."""
        start = time.perf_counter()
        self.params, self.state = self.compiled(self.grads, self.state, self.params)
        jax.block_until_ready((self.params, self.state))
        self.times.append(time.perf_counter() - start)


def peak_rss_mb() -> float:
    """Returns this process's peak resident memory in MB (10^6 bytes; Linux counts in kB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
