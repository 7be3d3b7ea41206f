"""Several seeds of one variant: one after the other, each on a core of its own, or vmapped into one program.

Ratios are comparable within one run on a quiet machine; seconds of CPU also on a busy one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from celo_nnx import bench, processes
from celo_nnx.devices import choose_devices, largest_divisor
from celo_nnx.errors import UserError, is_count, require
from celo_nnx.interfaces import Array, PyTree
from celo_nnx.meta.population import AXIS as PAIRS
from celo_nnx.meta.trainer import COMPILER_OPTIONS, MetaTrainer

REPEATS = 5
SEEDS = 4
AXIS = "seeds"
Place = Callable[[PyTree], PyTree]
Program = Callable[[PyTree, Array, PyTree], tuple[PyTree, PyTree]]


def stacked(states: list[PyTree]) -> PyTree:
    """Returns the states of several seeds as one, leaves ``[seeds, ...]``."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


def vmapped(trainer: MetaTrainer) -> Program:
    """Returns the program of :meth:`MetaTrainer.run` for states of several seeds, leaves ``[seeds, ...]``.

    Args:
      trainer: of one seed.

    Example:
      >>> program = vmapped(trainer)  # doctest: +SKIP
      >>> states, metrics = program(stacked(states), jnp.int32(10), trainer._data)  # doctest: +SKIP
    """
    return _jitted(jax.vmap(trainer._iterations, (0, None, None)))


def _jitted(function: Any) -> Program:
    return jax.jit(function, donate_argnums=0, compiler_options=COMPILER_OPTIONS)


def _apart(trainer: MetaTrainer, devices: int) -> tuple[Program, Any]:
    """Seeds spread over devices, on each one after the other, and how states are laid out for it."""
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((devices,), (AXIS,), axis_types=auto, devices=processes.devices(devices))

    def turns(states: PyTree, n: Array, data: PyTree) -> tuple[PyTree, PyTree]:
        return jax.lax.map(lambda state: trainer._iterations(state, n, data), states)

    mine, same = PartitionSpec(AXIS), PartitionSpec()
    spread = jax.shard_map(turns, mesh=mesh, in_specs=(mine, same, same), out_specs=mine, check_vma=False)
    return _jitted(spread), NamedSharding(mesh, mine)


def seeds(config: ConfigDict, count: int = SEEDS) -> Iterator[dict[str, Any]]:
    """Times a meta-iteration of several seeds of a config, on random images of its shapes.

    Four ways take turns, so that a machine that slows down slows all of them:

    - ``in_turn``: one seed after the other, each over all devices, as ``grid run`` does;
    - ``apart``: seeds spread over the devices, each on one, as ``grid run --jobs N`` does in N processes;
    - ``vmapped``: the program of one seed under ``jax.vmap``, over all devices. Loops that end, and resets
      that fall, at other steps for other seeds become selects over the whole state in every step;
    - ``pooled``: one seed with as many pairs as all seeds have: the same inner steps in one batch, with none
      of those selects. What any way of batching seeds could gain at best.

    Args:
      config: resolved; ``run.iterations_per_dispatch`` meta-iterations are timed together.
      count: how many seeds.

    Yields:
      A row for each: ``thing, seeds, devices, s_per_meta_iteration`` of all seeds together (median),
      ``s_min, s_max, cpu_s`` (seconds of CPU, median), ``gain`` (how many times faster than ``in_turn``:
      median over the turns of the ratio) with ``gain_min, gain_max``, ``compile_s`` and ``compile_cpu_s``,
      tracing included.

    Raises:
      UserError: a number out of range, tasks other than image MLPs, an estimator without ``pairs``, or
        several processes.
    """
    from celo_nnx.build import build
    from celo_nnx.meta import build_trainer, pairs_of
    from celo_nnx.pretrained.convert import first_theta

    require(is_count(count) and 2 <= count <= 1024, "--seeds", count, "an integer from 2 to 1024")
    if processes.count() > 1:
        raise UserError("bench seeds measures one process, not several")
    if "pairs" not in config.meta.estimator:
        raise UserError("bench seeds needs meta.estimator.pairs, which a mixture of estimators has not")
    devices = choose_devices(config.run.devices, pairs_of(config.meta.estimator))
    families = bench.synthetic_families(config.tasks)
    start = first_theta(config.theta_init, config.optimizer)
    optimizers = [build(config.optimizer, jax.random.key(i), start) for i in range(count)]

    def trainer(devices: int, times: int = 1) -> MetaTrainer:
        larger = config.copy_and_resolve_references()
        larger.meta.estimator.pairs *= times
        return build_trainer(larger, optimizers[0], families, devices=devices)

    def states(trainer: MetaTrainer) -> list[PyTree]:
        return [trainer.init(jax.random.key(i), optimizer.theta) for i, optimizer in enumerate(optimizers)]

    one, whole = trainer(1), trainer(devices)
    spread = largest_divisor(count, devices)
    apart, layout = _apart(one, spread)
    pooled = trainer(devices, times=count)
    cells = {
        "in_turn": _Cell(whole, whole.compiled_run, whole.place, states(whole), devices),
        "apart": _Cell(one, apart, lambda x: jax.device_put(x, layout), [stacked(states(one))], spread),
        "vmapped": _Cell(whole, vmapped(whole), _layout(whole), [stacked(states(whole))], devices),
        "pooled": _Cell(pooled, pooled.compiled_run, pooled.place, states(pooled)[:1], devices),
    }
    for _ in range(REPEATS):
        for cell in cells.values():
            cell.time()
    base = cells["in_turn"].times
    for name, cell in cells.items():
        gains = [a / b for a, b in zip(base, cell.times, strict=True)]
        yield {
            "thing": name,
            "seeds": count,
            "devices": cell.devices,
            "s_per_meta_iteration": round(statistics.median(cell.times), 4),
            "s_min": round(min(cell.times), 4),
            "s_max": round(max(cell.times), 4),
            "cpu_s": round(statistics.median(cell.cpu), 4),
            "gain": round(statistics.median(gains), 2),
            "gain_min": round(min(gains), 2),
            "gain_max": round(max(gains), 2),
            "compile_s": round(cell.compile_s, 1),
            "compile_cpu_s": round(cell.compile_cpu_s, 1),
        }


def _layout(trainer: MetaTrainer) -> Place:
    """Puts stacked states where the vmapped program wants them: pairs over the mesh, seeds not."""
    mesh = trainer._mesh
    if mesh is None:
        return lambda states: states
    pairs, same = (NamedSharding(mesh, spec) for spec in (PartitionSpec(None, PAIRS), PartitionSpec()))
    return lambda states: {
        name: jax.device_put(part, pairs if name == "estimator" else same) for name, part in states.items()
    }


class _Cell:
    """One way: its compiled program, its states, and the seconds of a meta-iteration of all seeds."""

    def __init__(
        self, trainer: MetaTrainer, program: Program, place: Place, states: list[PyTree], devices: int
    ) -> None:
        self.n, self.data = trainer.iterations_per_dispatch, trainer._data
        self.place, self.states, self.devices = place, states, devices
        wall, cpu = time.perf_counter(), time.process_time()
        self.program = program.lower(place(states[0]), jnp.int32(self.n), self.data).compile()
        self.compile_s, self.compile_cpu_s = time.perf_counter() - wall, time.process_time() - cpu
        self.times: list[float] = []
        self.cpu: list[float] = []
        self.time()
        self.times.clear()
        self.cpu.clear()

    def time(self) -> None:
        """Times one dispatch of all seeds to its end."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.states = [self._run(state) for state in self.states]
        jax.block_until_ready([state["theta"] for state in self.states])
        self.times.append((time.perf_counter() - wall) / self.n)
        self.cpu.append((time.process_time() - cpu) / self.n)

    def _run(self, state: PyTree) -> PyTree:
        return self.program(self.place(state), jnp.int32(self.n), self.data)[0]
