"""Measurements: one update against optax's own optimizers, one meta-iteration against the plain twin.

Every figure of docs/speed.md comes from here. Ratios are meaningful within one run on a quiet machine.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from celo_nnx import processes
from celo_nnx.errors import UserError, is_count, require, unknown
from celo_nnx.interfaces import Family, GradientEstimator
from celo_nnx.model_shapes import array, block

PyTree = Any

REPEATS = 15
META_REPEATS = 7  # dispatches
EXAMPLES = 50_000  # of each family, as CIFAR-10 has
BASE = "optax.adamw"  # what ratios are taken to
PEERS = (BASE, "optax.contrib.muon")


def transformer_shapes(params: int) -> PyTree:
    """Returns abstract float32 parameters in transformer-like shapes, 148 tensors whatever the size.

    Twelve blocks of twelve tensors (attention query, key, value and output, two MLP matrices with biases,
    two layer norms) and embedding, positions, final layer norm; the width is chosen to come near
    ``params``.

    Example:
      >>> len(jax.tree.leaves(transformer_shapes(10_000_000)))
      148
    """
    require(200_000 <= params <= 10**10, "params", params, "an integer from 200000 to 10**10")
    width = 8
    while _count(width + 8) <= params * 1.02:
        width += 8

    tree = {f"block_{i:02d}": block(width, attention_bias=False) for i in range(12)}
    tree["embed"] = {"tokens": array(VOCABULARY * width // 64, width), "positions": array(256, width)}
    tree["norm"] = {"scale": array(width), "bias": array(width)}
    return tree


VOCABULARY = 1024  # rows of the embedding at width 64; grows with the width


def _count(width: int) -> int:
    return 12 * (12 * width**2 + 9 * width) + VOCABULARY * width // 64 * width + 258 * width


def _optimizers(
    names: Sequence[str], peers: Sequence[str]
) -> dict[str, Callable[[], optax.GradientTransformation]]:
    from celo_nnx.config import load_optimizer, presets

    known: dict[str, Callable[[], Any]] = {
        "optax.adamw": lambda: optax.adamw(1e-3),
        "optax.contrib.muon": lambda: optax.contrib.muon(1e-3),
    }
    for peer in peers:
        if peer not in known:
            raise unknown("peer", peer, known)
    made = {name: known[name] for name in known if name in (BASE, *peers)}
    variants = [n for n, (_, whole) in presets().items() if whole]
    for name in names:
        if name not in known and name not in variants:
            raise unknown("optimizer", name, [*known, *variants])
        if name in variants:
            made[name] = lambda name=name: load_optimizer(name).as_optax(num_steps=1000)
    return made


def suite_shapes(source: str, overrides: Sequence[str] = ()) -> dict[str, PyTree]:
    """Returns the abstract parameters of every task of a suite, by task.

    Raises:
      UserError: an unknown suite, or data of a task that are absent.

    Example:
      >>> sorted(suite_shapes("smoke"))
      ['conv', 'mlp', 'text']
    """
    from celo_nnx.evaluation.suites import load_suite, task_family

    suite, keys = load_suite(source, overrides), jax.random.split(jax.random.key(0))

    def shapes(name: str) -> PyTree:
        task = task_family(suite, name).task
        return jax.eval_shape(lambda: task.init(keys[0], task.sample(keys[1]))[0])

    return {name: shapes(name) for name in suite.tasks}


def step(
    names: Sequence[str] = ("celo2_base", "celo2"),
    params: int | PyTree = 10_000_000,
    peers: Sequence[str] = PEERS,
) -> Iterator[dict[str, Any]]:
    """Times one update of each optimizer, optax.adamw always among them.

    Optimizers take turns, so that a machine that slows down slows all of them. The state is donated and
    parameters are updated in place, as in training.

    Args:
      names: variants of ``celo_nnx.experiments``.
      params: number of parameters, in 148 transformer-like tensors; or abstract parameters.
      peers: which of optax's optimizers take part.

    Yields:
      A row for each: ``optimizer, params, ms_median, ms_min, ms_max, ns_per_param, ratio_to_adamw,
      temp_bytes_per_param`` (XLA's memory analysis), ``state_bytes_per_param, compile_s``.
    """
    table = _optimizers(names, peers)
    shapes = transformer_shapes(params) if isinstance(params, int) else params
    count = sum(x.size for x in jax.tree.leaves(shapes))
    cells = {name: _StepCell(make(), shapes) for name, make in table.items()}
    for _ in range(REPEATS):
        for cell in cells.values():
            cell.time()
    base = statistics.median(cells[BASE].times)
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


def synthetic_families(tasks: Mapping[str, Any]) -> list[Family]:
    """Returns the families of a config's ``tasks`` on random images: time does not depend on the data."""
    from celo_nnx.tasks import TASKS
    from celo_nnx.tasks.variation import combinations

    kind = tasks["kind"]
    if kind != "image_mlp":
        raise UserError(f"bench meta measures tasks.kind 'image_mlp', not {kind!r}")
    builder, rng, families = TASKS[kind], np.random.default_rng(0), []
    for suffix, section in combinations(builder.complete(tasks)):
        given = builder.task.fields_of(section["image_size"], 1 if section["grey"] else 3, classes=10)
        task = builder.make(section, given)
        for name in section["datasets"]:
            x = rng.random((EXAMPLES, task.features), np.float32)
            data = {"x": x, "y": rng.integers(0, 10, EXAMPLES).astype(np.int32)}
            families.append(Family(name + suffix, task, train=data, test=data, validation=data))
    return families


def inner_steps(estimator: GradientEstimator, families: int) -> int | None:
    """Returns the inner steps of one meta-iteration, resets among them; None where their number varies."""
    from celo_nnx.meta.estimators.base import Perturbed

    truncation = getattr(estimator, "truncation", None)  # full ES and mixtures have none
    if not is_count(truncation):
        return None
    return (2 if isinstance(estimator, Perturbed) else 1) * estimator.pairs * families * truncation


def meta(config: ConfigDict, peers: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Times whole meta-iterations of a config, on random images of its shapes.

    Args:
      config: resolved; ``run.iterations_per_dispatch`` meta-iterations are timed together.
      peers: ``"naive"`` also measures :mod:`celo_nnx.naive_meta`, in turns with it, on one device.

    Yields:
      A row for each: ``thing, devices, processes, s_per_meta_iteration`` (median), ``s_min, s_max,
      inner_steps_per_s`` (None where their number varies), ``compile_s, temp_bytes, argument_bytes,
      peak_rss_mb``; with a peer also ``speedup``, the ratio of its median to the fused program's.

    Raises:
      UserError: tasks other than image MLPs, an unknown peer, or a config that the peer does not implement.
    """
    from celo_nnx.build import build
    from celo_nnx.devices import choose_devices
    from celo_nnx.meta import build_trainer, pairs_of
    from celo_nnx.pretrained.convert import first_theta

    for peer in peers:
        if peer != "naive":
            raise unknown("peer", peer, ("naive",))
    if peers:  # before minutes go into compiling the fused program
        from celo_nnx.naive import naive_trainer
        from celo_nnx.naive_meta import check
        from celo_nnx.naive_variants import twin

        check(config.meta)
        rule = twin(config.optimizer)
    processes.join()
    with processes.together():
        devices = choose_devices(config.run.devices, pairs_of(config.meta.estimator))
        families = synthetic_families(config.tasks)
        start = first_theta(config.theta_init, config.optimizer)
        optimizer = build(config.optimizer, jax.random.key(0), start)
        trainer = build_trainer(config, optimizer, families, devices=devices)
    processes.meet(devices)
    cells: list[Any] = [_MetaCell(trainer, devices)]
    if peers:
        cells.append(_NaiveCell(naive_trainer(config, families, optimizer.theta, rule)))
    for _ in range(META_REPEATS):
        for cell in cells:
            cell.time()
    steps = inner_steps(trainer.estimator, len(families))
    fused = statistics.median(cells[0].times)
    for cell in cells:
        median = statistics.median(cell.times)
        row = {
            "thing": cell.name,
            "devices": cell.devices,
            "processes": processes.count(),
            "s_per_meta_iteration": round(median, 4),
            "s_min": round(min(cell.times), 4),
            "s_max": round(max(cell.times), 4),
            "inner_steps_per_s": steps and round(steps / median),
            "compile_s": round(cell.compile_s, 1),
            "temp_bytes": cell.temp_bytes,
            "argument_bytes": cell.argument_bytes,
            "peak_rss_mb": round(peak_rss_mb()),
        }
        yield row if cell is cells[0] else row | {"speedup": round(median / fused, 2)}


class _MetaCell:
    """The fused trainer: seconds of a meta-iteration, several of them to a dispatch."""

    name = "fused"

    def __init__(self, trainer: Any, devices: int) -> None:
        self.trainer, self.devices, self.times = trainer, devices, []
        self.state = trainer.init(jax.random.key(0))
        start = time.perf_counter()
        lowered = trainer.compiled_run.lower(self.state, jnp.int32(1), trainer._data)
        memory = lowered.compile().memory_analysis()
        self.compile_s = time.perf_counter() - start
        self.temp_bytes, self.argument_bytes = memory.temp_size_in_bytes, memory.argument_size_in_bytes
        self.time()
        self.times.clear()

    def time(self) -> None:
        n = self.trainer.iterations_per_dispatch
        start = time.perf_counter()
        self.state, _ = self.trainer.run(self.state, n)
        jax.block_until_ready(self.state["theta"])
        self.times.append((time.perf_counter() - start) / n)


class _NaiveCell:
    """The published way of working: one meta-iteration is many dispatches."""

    name, devices, temp_bytes, argument_bytes = "naive", 1, None, None

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.times = trainer, []
        self.state = trainer.init(jax.random.key(0))
        start = time.perf_counter()
        self.time()
        self.compile_s = time.perf_counter() - start
        self.time()
        self.times.clear()

    def time(self) -> None:
        start = time.perf_counter()
        self.state = self.trainer(self.state)
        jax.block_until_ready(self.state.theta)
        self.times.append(time.perf_counter() - start)


def peak_rss_mb() -> float:
    """Returns this process's peak resident memory in MB (10^6 bytes; macOS counts in bytes, Linux in kB)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
