"""What an optimizer takes on a mesh of devices, before anything is trained: bytes, work, traffic.

Shapes alone are evaluated and nothing of a model's size is ever in memory. The update is lowered and compiled
for as many devices as the mesh has, so its temporaries are XLA's own figure, for the kind of device that it
was compiled for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from celo_nnx.devices import cores
from celo_nnx.errors import UserError, unknown
from celo_nnx.model_shapes import mesh_sizes, model_shapes, shardings
from celo_nnx.sharding import given_shardings
from celo_nnx.tensors import tensor_paths
from celo_nnx.work import floating_point_work

PyTree = Any

PEERS = {"adamw": lambda: optax.adamw(1e-3), "muon": lambda: optax.contrib.muon(1e-3)}
OPTIMIZERS = ("adamw", "muon", "celo2")
MESHES = ("fsdp=1",)
MOST = 512  # devices that a host may be told to have
ON_A_CPU = (
    "compiled for a CPU: temporaries are those of its program, where a learned rule updates large tensors in "
    "tiles; on other devices they differ"
)


def plan(
    model: str,
    meshes: Sequence[str] = MESHES,
    optimizers: Sequence[str] = OPTIMIZERS,
    overrides: Sequence[str] = (),
    tell: Callable[[str], None] = lambda line: None,
) -> Iterator[dict[str, Any]]:
    """Yields what each optimizer takes on each mesh.

    Args:
      model: of :data:`celo_nnx.model_shapes.MODELS`.
      meshes: as :func:`celo_nnx.model_shapes.mesh_sizes` reads them.
      optimizers: ``"adamw"``, ``"muon"`` or variants of ``celo_nnx.experiments``.
      overrides: of the variants' configs, such as ``optimizer.state.dtype=bfloat16``.
      tell: is given a line before each compilation, and one where a mesh does not divide a matrix as usual.

    Yields:
      A row for each: ``model, mesh, devices, optimizer, params`` (numbers of the model); ``params_bytes,
      state_bytes, temp_bytes`` of one device; ``gflop``, the floating-point operations of one device, 10^9;
      ``traffic_bytes``, what it must at least read and write: gradients are read; parameters, state and
      temporaries read and written, once each; ``compile_s`` and the ``platform`` compiled for.

    Raises:
      UserError: an unknown model, optimizer or mesh axis, a wrong override, or more devices than there can
        be; before anything is compiled.
    """
    from celo_nnx.config import load_optimizer, presets

    shapes = model_shapes(model)
    variants = [name for name, (_, whole) in presets().items() if whole]
    for name in optimizers:
        if name not in PEERS and name not in variants:
            raise unknown("optimizer", name, [*PEERS, *variants])
    sizes = {text: mesh_sizes(text) for text in meshes}
    devices = _devices(max(math.prod(of.values()) for of in sizes.values()))
    places = {}
    for text, of in sizes.items():
        say = lambda line, text=text: tell(f"{model} on {text}: {line}")  # noqa: E731
        places[text] = shardings(shapes, _mesh(of, devices), say)
    # Mistakes in overrides are told before minutes go into compiling.
    built = {name: load_optimizer(name, overrides) for name in optimizers if name not in PEERS}

    def row(text: str, name: str) -> dict[str, Any]:
        tell(f"compiling an update of {model} by {name} on {text}")
        return {"model": model, "mesh": text, **_figures(name, shapes, places[text], built)}

    pairs = [(text, name) for text in places for name in optimizers]
    with futures.ThreadPoolExecutor(cores()) as pool:  # a compilation is one core's work
        # The longest first: XLA takes a minute to divide Muon's 144 matrices of GPT-3 XL, one by one.
        order = sorted(pairs, key=lambda pair: (pair[1] != "muon", -math.prod(sizes[pair[0]].values())))
        made = {pair: pool.submit(row, *pair) for pair in order}
        for pair in pairs:
            yield made[pair].result()


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the rows of :func:`plan` as lines to read, in the order given."""
    head = (
        "mesh",
        "optimizer",
        "GB of parameters",
        "of state",
        "of temporaries",
        "GFLOP",
        "GB moved at least",
    )
    bytes_of = ("params_bytes", "state_bytes", "temp_bytes")
    cells = [head]
    for row in rows:
        numbers = [f"{row[name] / 1e9:.3f}" for name in bytes_of]
        work = (f"{row['gflop']:,.1f}", f"{row['traffic_bytes'] / 1e9:.3f}")
        cells.append((row["mesh"], row["optimizer"], *numbers, *work))
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    lines = []
    for line in cells:
        padded = [
            x.ljust(w) if i < 2 else x.rjust(w) for i, (x, w) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    if any(row["platform"] == "cpu" for row in rows):
        lines.append(ON_A_CPU)
    return [f"{rows[0]['model']}, one device (10^9 bytes; an update, not the gradients before it):", *lines]


def _devices(number: int) -> list[Any]:
    """Returns so many devices, of a host that is told to have them where it has not started yet."""
    if number > MOST:
        raise UserError(f"a mesh of {number} devices is more than the {MOST} that can be planned for")
    try:
        jax.config.update("jax_num_cpu_devices", number)
    except RuntimeError:
        pass  # the backend has started
    if jax.device_count() < number:
        raise UserError(f"a mesh of {number} devices, of which this process has {jax.device_count()}")
    return jax.devices()[:number]


def _mesh(sizes: dict[str, int], devices: list[Any]) -> Mesh:
    count = math.prod(sizes.values())
    grid = np.array(devices[:count]).reshape(tuple(sizes.values()))
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _figures(name: str, shapes: PyTree, places: PyTree, built: Mapping[str, Any]) -> dict[str, Any]:
    tx, state_places = _variant(built[name], shapes, places) if name in built else _peer(name, shapes, places)
    params = _placed(shapes, places)
    state = _placed(jax.eval_shape(tx.init, shapes), state_places)

    def update(grads: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
        updates, state = tx.update(grads, state, params, value=0.0)  # a loss, for those that follow it
        return optax.apply_updates(params, updates), state

    start = time.perf_counter()
    traced = jax.jit(update, donate_argnums=(1, 2), out_shardings=(places, state_places)).trace(
        params, state, params
    )
    # Never run, so machine code may be slow; what is in memory has been decided before it is made.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
    compiled = traced.lower().compile(compiler_options=quick)
    seconds = time.perf_counter() - start
    mesh = jax.tree.leaves(places)[0].mesh
    own, kept = _bytes(params), _bytes(state)
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    # Outside of shard_map a program is one for all devices; replicas do the same.
    parts = mesh.size // mesh.shape.get("data", 1)
    return {
        "devices": mesh.size,
        "optimizer": name,
        "params": sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)),
        "params_bytes": own,
        "state_bytes": kept,
        "temp_bytes": temporaries,
        "gflop": round(floating_point_work(traced.jaxpr, parts) / 1e9, 3),
        "traffic_bytes": 3 * own + 2 * kept + 2 * temporaries,
        "compile_s": round(seconds, 1),
        "platform": jax.default_backend(),
    }


def _placed(shapes: PyTree, places: PyTree) -> PyTree:
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, places)


def _bytes(tree: PyTree) -> int:
    """Returns the bytes of one device's shares."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _peer(name: str, shapes: PyTree, places: PyTree) -> tuple[Any, PyTree]:
    """Returns one of optax's optimizers, and where its state lies: like its parameters."""
    tx = optax.with_extra_args_support(PEERS[name]())
    everywhere = NamedSharding(jax.tree.leaves(places)[0].mesh, PartitionSpec())
    at = dict(tensor_paths(places))
    state = jax.eval_shape(tx.init, shapes)
    # Averages have their parameter's path at the end of their own; counters have none of them.
    keys = [path.split("/") for path, _ in tensor_paths(state)]
    found = [next((at[p] for i in range(len(k)) if (p := "/".join(k[i:])) in at), everywhere) for k in keys]
    return tx, jax.tree.unflatten(jax.tree.structure(state), found)


def _variant(optimizer: Any, shapes: PyTree, places: PyTree) -> tuple[Any, PyTree]:
    split = optimizer.with_settings(shardings=given_shardings(places, shapes))
    return optimizer.as_optax(num_steps=1000, shardings=places), split.state_shardings(shapes)
