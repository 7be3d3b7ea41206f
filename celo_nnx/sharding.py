"""Tensors split over a mesh of devices: state as the parameters, each device working on its own share.

An update under plain jit would be right but not fast: loops over tiles and stacks slice axes that are split,
and XLA gathers whole matrices for them. So the learned tensors are updated under ``shard_map``, where the
kernel sees one device's share as if it were the tensor and passes every mean through
:meth:`TensorSpec.across`. Only orthogonalization needs whole matrices. It sees all tensors of one shape at
once: an all-to-all gives each device an equal part of the stack, whole, and another gives the results back,
so that work and memory are divided and no matrix is gathered on every device. Along mesh axes that split no
parameter, data parallelism's, all devices do the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from celo_nnx.errors import UserError
from celo_nnx.groups import Pairs, update_group
from celo_nnx.interfaces import OUTPUT, TensorSpec
from celo_nnx.kernel import TensorKernel
from celo_nnx.precision import mix
from celo_nnx.tensors import spread, tensor_paths

Array = jax.Array
PyTree = Any
Names = tuple[str, ...]  # of mesh axes
Given = tuple[tuple[str, NamedSharding], ...]


def given_shardings(tree: PyTree, params: PyTree) -> Given:
    """Returns the sharding of every parameter by path, from a tree like the parameters or a function of them.

    Args:
      tree: ``jax.sharding.NamedSharding`` leaves; a leaf above several parameters is for all of them, and any
        other sharding, or None, leaves a parameter whole on every device.
      params: arrays or ``jax.ShapeDtypeStruct``.

    Raises:
      UserError: the tree does not fit, has no NamedSharding, or more than one mesh; an axis that a mesh axis
        does not divide, which is named; a mesh with axes that are not ``AxisType.Auto``.
    """
    tree = tree(params) if callable(tree) else tree
    leaf = lambda x: x is None or isinstance(x, jax.sharding.Sharding)  # noqa: E731
    found = spread(tree, params, "tree of shardings", leaf)
    wrong = next((path for path, x in found.items() if not leaf(x)), None)
    if wrong is not None:
        raise UserError(f"the sharding of {wrong!r} is a {type(found[wrong]).__name__}, not a NamedSharding")
    if not found:
        return ()  # optax.partition may leave a rule nothing
    meshes = {x.mesh for x in found.values() if isinstance(x, NamedSharding)}
    if not meshes:
        raise UserError("no parameter has a NamedSharding: split some over a mesh, or give no shardings")
    if len(meshes) > 1:
        raise UserError(f"the shardings have {len(meshes)} meshes: all parameters must lie on one mesh")
    (mesh,) = meshes
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        kinds = f"(AxisType.Auto,) * {len(mesh.axis_names)}"
        raise UserError(f"the mesh has explicit axes: make it with jax.make_mesh(..., axis_types={kinds})")
    whole = NamedSharding(mesh, PartitionSpec())
    out = {path: x if isinstance(x, NamedSharding) else whole for path, x in found.items()}
    given = tuple(sorted(out.items()))
    check_given(given, params)
    return given


def check_given(given: Given, params: PyTree) -> None:
    """Refuses shardings that are not those of these parameters."""
    found = dict(given)
    for path, param in tensor_paths(params) if given else ():
        if path not in found:
            raise UserError(f"the shardings have nothing for {path!r}: use given_shardings(tree, params)")
        check_divides(path, param.shape, found[path])


def check_divides(path: str, shape: tuple[int, ...], sharding: NamedSharding) -> None:
    """Refuses an axis that its mesh axes do not divide."""
    if len(sharding.spec) > len(shape):
        raise UserError(f"the sharding of {path!r} has {len(sharding.spec)} axes, its shape is {shape}")
    for axis, names in enumerate(_names(sharding, len(shape))):
        parts = math.prod(sharding.mesh.shape[n] for n in names)
        if shape[axis] % parts:
            over = " x ".join(f"{n}={sharding.mesh.shape[n]}" for n in names)
            raise UserError(f"axis {axis} of {path!r}, shape {shape}, is not divided by the mesh's {over}")


def _names(sharding: NamedSharding, rank: int) -> list[Names]:
    """Returns the mesh axes longer than 1 that split each axis of an array."""
    out = []
    for entry in (*sharding.spec, *(None,) * (rank - len(sharding.spec))):
        names = entry if isinstance(entry, tuple) else (entry,)
        out.append(tuple(n for n in names if isinstance(n, str) and sharding.mesh.shape[n] > 1))
    return out


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one learned tensor lies on a mesh.

    Attributes:
      mesh: the devices.
      spec: the tensor's description, over all devices.
      share: one device's share of it, with ``shards``.
      own: the own axes' split during the update: the parameter's, less what :func:`layout` leaves out.
    """

    mesh: Mesh
    spec: TensorSpec
    share: TensorSpec
    own: PartitionSpec

    @property
    def name(self) -> str:
        """Names the split, for the group of tensors that share it."""
        return "x".join("+".join(names) or "whole" for names in self.share.shards)

    def of_state(self, shape: tuple[int, ...]) -> PartitionSpec:
        """Returns how a state array ``[..., *s]`` is split, each of ``s`` the working shape's or 1."""
        work = self.spec.shape
        lead = len(shape) - len(work)
        if lead < 0:
            return PartitionSpec()
        pairs = zip(shape[lead:], work, self.share.shards, strict=True)
        return PartitionSpec(
            *(None,) * lead, *((names or None) if n == full else None for n, full, names in pairs)
        )


def layout(spec: TensorSpec, sharding: NamedSharding) -> Layout:
    """Returns how a tensor is updated, given how its parameter is split.

    Several own axes may be one side of the matrix (heads and their size, or a convolution's kernel and
    inputs). A split of such an axis is kept where its shares stay contiguous: only axes of size 1, or split
    down to it, stand before it. Any other split, and one that leaves a device a single row, is left out: the
    tensor is then gathered along those mesh axes for its update.
    """
    own = spec.tensor_shape
    names = _names(sharding, len(own))
    sizes = dict(sharding.mesh.shape)
    parts = lambda of: math.prod(sizes[n] for n in of)  # noqa: E731
    sides = [tuple(range(len(own)))]
    if spec.matrix is not None:
        both = (spec.columns, spec.rows) if spec.matrix[0] > spec.matrix[1] else (spec.rows, spec.columns)
        sides = [*((a,) for a in spec.batch), *both]
    kept: list[Names] = [()] * len(own)
    for side in sides:
        contiguous = True
        for axis in side:
            if contiguous:
                kept[axis] = names[axis]
            contiguous = contiguous and own[axis] == parts(kept[axis])
    merged = [sum((kept[a] for a in side), ()) for side in sides]
    for at, side in enumerate(sides):
        if merged[at] and spec.shape[at] == parts(merged[at]):
            merged[at] = ()
            for axis in side:
                kept[axis] = ()
    merged = merged[: len(spec.shape)]
    share = dataclasses.replace(
        spec,
        shape=tuple(n // parts(m) for n, m in zip(spec.shape, merged, strict=True)),
        own=tuple(n // parts(k) for n, k in zip(own, kept, strict=True)),
        shards=tuple(merged),
        total=own,
    )
    return Layout(sharding.mesh, spec, share, PartitionSpec(*((k or None) for k in kept)))


def state_shardings(
    state: PyTree, layouts: Mapping[str, Layout], given: Mapping[str, NamedSharding], params: PyTree
) -> PyTree:
    """Returns the shardings of an optimizer's state.

    Args:
      state: arrays or ``jax.ShapeDtypeStruct``.
      layouts: of each group of learned tensors, by its name in the state.
      given: of every parameter, by path.
      params: arrays or ``jax.ShapeDtypeStruct``.
    """
    mesh = next(iter(given.values())).mesh
    everywhere = NamedSharding(mesh, PartitionSpec())
    shapes = {path: x.shape for path, x in tensor_paths(params)}

    def routed(keys: tuple[Any, ...], x: Array) -> NamedSharding:
        # A hand-made rule keeps arrays like its parameters under their paths, and numbers that all share.
        paths = [k.key for k in keys if isinstance(k, jax.tree_util.DictKey) and k.key in given]
        return given[paths[-1]] if paths and x.shape == shapes[paths[-1]] else everywhere

    out = jax.tree.map(lambda _: everywhere, state)
    for name, own in state["learned"].items():
        of = layouts[name].of_state
        out["learned"][name] = jax.tree.map(lambda x, of=of: NamedSharding(mesh, of(x.shape)), own)
    out["routes"] = jax.tree_util.tree_map_with_path(routed, state["routes"])
    return out


def update_shares(
    kernel: TensorKernel, layout: Layout, pairs: Pairs, state: PyTree, number: int, tile: int
) -> tuple[list[Array], PyTree, Array]:
    """Updates the tensors of one shape and one split; as :func:`celo_nnx.groups.update_group`."""
    share = layout.share
    names = sum(share.shards, ())

    def body(pairs: Pairs, state: PyTree) -> tuple[list[Array], PyTree, Array]:
        # Shares are rounded stochastically each with its own noise.
        seed = mix(kernel.seed, lax.axis_index(names)) if names else kernel.seed
        first = dataclasses.replace(kernel, unfinished=True, seed=seed)
        kept = {n: x for n, x in state.items() if n != OUTPUT}
        steps, new, feedback = update_group(first, share, pairs, kept, number, tile)
        stack = _orthogonalized(kernel, layout, jnp.stack([share.enter(x) for x in steps]))

        def finish(step: Array, new: PyTree, average: Array | None) -> tuple[Array, PyTree]:
            return kernel.finish(share, step, kernel.read(share, new), average)

        if len(pairs) > 1:
            stack, averages = jax.vmap(finish)(stack, new, state.get(OUTPUT))
        else:
            step, averages = finish(stack[0], new, state.get(OUTPUT))
            stack = step[None]
        return [share.leave(x) for x in stack], new | averages, feedback

    splits = jax.tree.map(lambda x: layout.of_state(x.shape), state)
    out = ([layout.own] * len(pairs), splits, PartitionSpec())
    # Replicas compute the same numbers, which the check of varying axes cannot see.
    spread_out = jax.shard_map(
        body, mesh=layout.mesh, in_specs=(layout.own, splits), out_specs=out, check_vma=False
    )
    return spread_out(list(pairs), state)


def _orthogonalized(kernel: TensorKernel, layout: Layout, steps: Array) -> Array:
    """Orthogonalizes shares of steps ``[tensors, *share]``, each device some of the matrices."""
    inner = 1 if layout.spec.matrix is None else 2
    lead = len(layout.spec.shape) - inner
    matrix = layout.spec.matrix and tuple(a - lead for a in layout.spec.matrix)
    whole = TensorSpec(layout.spec.path, layout.spec.shape[lead:], matrix, None)
    stack = steps.reshape(-1, *steps.shape[1 + lead :])
    probe = stack[0]
    if kernel.orthogonalization(probe, whole) is probe:  # nothing to do: no need to exchange anything
        return steps
    split = [(axis, names) for axis, names in enumerate(layout.share.shards[lead:], start=1) if names]
    count = stack.shape[0]
    parts = math.prod(layout.mesh.shape[n] for _, names in split for n in names)
    stack = jnp.pad(stack, [(0, -count % parts)] + [(0, 0)] * inner)
    for axis, names in split:
        stack = lax.all_to_all(stack, names, 0, axis, tiled=True)
    stack = lax.map(lambda x: kernel.orthogonalization(x, whole), stack)
    for axis, names in reversed(split):
        stack = lax.all_to_all(stack, names, axis, 0, tiled=True)
    return stack[:count].reshape(steps.shape)
