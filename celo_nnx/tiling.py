"""Runs an elementwise function of planes as a Pallas kernel over blocks of a tensor's matrix.

The function is one of whole arrays; :mod:`celo_nnx.unrolled` says how it is cut into tiles. What a block sums
is written to a row of its own and added outside: no atomics, so a run repeats bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from celo_nnx.unrolled import Cells, UnsupportedError, evaluate

Array = jax.Array
PyTree = Any

SIDES = {"gpu": (2, 2), "tpu": (8, 128), "cpu": (2, 2)}  # rows and columns of a block at least
COLUMNS = 128  # of a block at most, before rows are added
WARPS = 8  # of a Triton program; see BLOCK of the kernel


def platform() -> str:
    """Returns what kernels are made for: ``"gpu"`` (Triton), ``"tpu"``, or ``"cpu"`` (interpreted)."""
    return jax.default_backend()


@dataclasses.dataclass(frozen=True)
class Tiling:
    """A tensor's matrix cut into blocks, one program each; leading axes are a batch.

    Attributes:
      shape: ``[*batch, n, m]``.
      rows, columns: of a block, powers of two (Triton knows no others).
    """

    shape: tuple[int, ...]
    rows: int
    columns: int

    @staticmethod
    def of(shape: tuple[int, ...], limit: int) -> Tiling:
        """Returns blocks of at most ``limit`` elements, but not below the device's least.

        Args:
          shape: of a tensor whose sides are at least those of :data:`SIDES`.
          limit: at least 1.

        Example:
          >>> Tiling.of((300, 500), 1024), Tiling.of((3, 2000), 1024).columns
          (Tiling(shape=(300, 500), rows=8, columns=128), 256)
        """
        n, m = (1 << (size - 1).bit_length() for size in shape[-2:])
        least_rows, least_columns = SIDES[platform()]
        limit = 1 << (limit.bit_length() - 1)
        columns = min(m, COLUMNS, max(least_columns, limit // least_rows))
        rows = min(n, max(least_rows, limit // columns))
        return Tiling(tuple(shape), rows, min(m, max(columns, limit // rows)))

    @property
    def tile(self) -> tuple[int, ...]:
        """The shape of a block, ``[*1s, rows, columns]``."""
        return (*(1 for _ in self.shape[:-2]), self.rows, self.columns)

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of blocks along every axis."""
        return tuple(-(-n // own) for n, own in zip(self.shape, self.tile, strict=True))

    def place(self, number: Array) -> list[Array]:
        """Returns where a program's block is: its number along every axis."""
        place = []
        for count in reversed(self.counts):
            place.insert(0, lax.rem(number, jnp.int32(count)))
            number = lax.div(number, jnp.int32(count))
        return place

    def covers(self, x: Any, full: bool = False) -> bool:
        """Whether an array is ``[*lead, *shape]``, with size 1 on some of those axes unless ``full``."""
        own = x.shape[len(x.shape) - len(self.shape) :]
        small = 0 if full else 1
        return len(own) == len(self.shape) and all(
            a in (n, small) for a, n in zip(own, self.shape, strict=True)
        )

    def means(self, sums: Array, axes: tuple[int, ...]) -> Array:
        """Returns means over ``axes``, both of the matrix among them, from sums ``[blocks, k]``.

        Returns:
          ``[k, *shape with 1 on axes]``.
        """
        total = jnp.sum(sums.reshape(*self.counts, sums.shape[-1]), axes, keepdims=True)
        return jnp.moveaxis(total, -1, 0) / math.prod(self.shape[a] for a in axes)

    def run(
        self, function: Callable[..., tuple[PyTree, list[Array]]], args: PyTree, like: PyTree
    ) -> tuple[PyTree, Array]:
        """Runs ``function(first, *args) -> (arrays to write, planes to sum)``, elementwise over the matrix.

        Args:
          function: is given blocks ``[*lead, *tile]`` of the args, size 1 where they have it, and a number
            ``first``: ``first * columns`` numbers the block's first element, unlike that of any other block.
          args: arrays ``[*lead, *shape]`` with size 1 on any of the shape's axes; others are handed over
            whole, and should be small.
          like: what is written: shapes, or an array among ``args`` in whose place it is written.

        Returns:
          (arrays like ``like``, sums over every block ``[blocks, planes to sum]``).

        Raises:
          UnsupportedError: the function is more than elementwise, or writes something else than planes.
        """
        leaves, treedef = jax.tree.flatten(args)
        outs, written = jax.tree.flatten(like)
        if not all(self.covers(x, full=True) for x in outs):
            raise UnsupportedError(f"arrays other than planes are written, to a tensor {self.shape}")
        operands = [_Operand(self, x, self.covers(x)) for x in leaves]
        examples = [jax.ShapeDtypeStruct(o.block, x.dtype) for o, x in zip(operands, leaves, strict=True)]
        first = jax.ShapeDtypeStruct((), jnp.int32)
        closed, (_, planes) = jax.make_jaxpr(function, return_shape=True)(first, *treedef.unflatten(examples))
        # Pallas takes no captured arrays: what is known now is written into the kernel, the rest handed over.
        operands += [_Operand(self, x, False) for x in closed.consts if isinstance(x, jax.core.Tracer)]
        results = [_Operand(self, x, True) for x in outs]

        def body(*refs: Any) -> None:
            number = pl.program_id(0)
            inside = self._inside(number)
            read = [o.read(ref, inside) for o, ref in zip(operands, refs, strict=False)]
            rest = iter(read[len(leaves) :])
            consts = [
                next(rest) if isinstance(x, jax.core.Tracer) else Cells.scalars(np.asarray(x))
                for x in closed.consts
            ]
            offset = Cells.of([number * self.rows], (), ())
            made = evaluate(closed, consts, [offset, *read[: len(leaves)]])
            for o, ref, cells in zip(results, refs[len(operands) :], made, strict=False):
                o.write(ref, cells, inside)
            for k, cells in enumerate(made[len(outs) :]):
                x = jnp.broadcast_to(cells.cells.item(), self.tile[-2:])
                mask = inside.mask(self.tile[-2:])
                refs[-1][0, k] = jnp.sum(x if mask is None else jnp.where(mask, x, 0.0))

        blocks, width = math.prod(self.counts), max(1, len(planes))
        made = pl.pallas_call(
            body,
            grid=(blocks,),
            in_specs=[o.spec for o in operands],
            out_specs=[*(o.spec for o in results), _spec((None, 1, width), lambda p: (p, 0, 0), True)],
            out_shape=[
                *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outs),
                jax.ShapeDtypeStruct((blocks, 1, width), jnp.float32),
            ],
            input_output_aliases={i: o for o, y in enumerate(outs) for i, x in enumerate(leaves) if x is y},
            compiler_params=_triton().CompilerParams(num_warps=WARPS) if platform() == "gpu" else None,
            interpret=platform() == "cpu",
        )(*(o.x if o.plane else o.x.reshape(-1) for o in operands))
        return written.unflatten(made[:-1]), made[-1][:, 0, : len(planes)]

    def _inside(self, number: Array) -> _Inside:
        """Returns which elements of a program's block are the tensor's."""
        masks: list[Array | None] = []
        for axis, at in zip((0, 1), self.place(number)[-2:], strict=True):
            size, own = self.shape[axis - 2], self.tile[axis - 2]
            line = (own, 1) if axis == 0 else (1, own)
            index = lax.broadcasted_iota(jnp.int32, line, axis) + at * own
            masks.append(index < size if size % own else None)
        return _Inside(*masks)


@dataclasses.dataclass(frozen=True)
class _Operand:
    """An array that a kernel reads or writes.

    Attributes:
      x: the array, or its shape and dtype.
      plane: whether it is ``[*lead, *shape]`` with size 1 on some of the shape's axes, and goes block by
        block; otherwise all of it goes to every program.
    """

    tiling: Tiling
    x: Any
    plane: bool

    @property
    def lead(self) -> tuple[int, ...]:
        return self.x.shape[: self.x.ndim - len(self.tiling.shape)]

    @property
    def block(self) -> tuple[int, ...]:
        """What a program sees of it."""
        if not self.plane:
            return self.x.shape
        own = zip(self.x.shape[len(self.lead) :], self.tiling.tile, strict=True)
        return (*self.lead, *(1 if n == 1 else size for n, size in own))

    @property
    def spec(self) -> pl.BlockSpec:
        if not self.plane:
            return _spec((math.prod(self.x.shape),), lambda p: (0,), True)
        own = self.x.shape[len(self.lead) :]

        def index(p: Array) -> tuple[Any, ...]:
            place = (at if n > 1 else 0 for n, at in zip(own, self.tiling.place(p), strict=True))
            return (*(0 for _ in self.lead), *place)

        batch = tuple(None for _ in own[:-2])
        return _spec((*self.lead, *batch, *self.block[-2:]), index, self.block[-2:] == (1, 1))

    def read(self, ref: Any, inside: _Inside) -> Cells:
        """Returns what a program sees, elements outside the tensor being 0."""
        if not self.plane:
            return Cells.scalars(self.x, lambda i: ref[i])
        size = self.block[-2:]
        mask = inside.mask(size)
        cells = [_load(ref, at, size, mask) for at in np.ndindex(self.lead)]
        return Cells.of(cells, self.block, (*self.lead, *(1 for _ in self.tiling.shape)))

    def write(self, ref: Any, cells: Cells, inside: _Inside) -> None:
        """Writes a block, but for elements outside the tensor."""
        size = self.block[-2:]
        mask = inside.mask(size)
        laid = np.broadcast_to(cells.cells, (*self.lead, *(1 for _ in self.tiling.shape)))
        for at, x in zip(np.ndindex(self.lead), laid.flat, strict=True):
            _store(ref, at, size, mask, x)


@dataclasses.dataclass(frozen=True)
class _Inside:
    """Which elements of a block are the tensor's: ``rows`` ``[rows, 1]``, ``columns`` ``[1, columns]``.

    None where all are.
    """

    rows: Array | None
    columns: Array | None

    def mask(self, size: tuple[int, int]) -> Array | None:
        """Returns the mask of a block ``[*size]``; on an axis of size 1 there is nothing outside."""
        masks = [x for x, n in zip((self.rows, self.columns), size, strict=True) if x is not None and n > 1]
        masks = [jnp.broadcast_to(x, size) for x in masks]
        return masks[0] & masks[1] if len(masks) == 2 else masks[0] if masks else None


def _spec(block: tuple[Any, ...], index: Callable[[Array], tuple[Any, ...]], scalars: bool) -> pl.BlockSpec:
    """Returns a block's specification; a TPU reads and writes scalars in a memory of their own."""
    if scalars and platform() == "tpu":
        from jax.experimental.pallas import tpu

        return pl.BlockSpec(block, index, memory_space=tpu.SMEM)
    return pl.BlockSpec(block, index)


def _triton() -> Any:
    """Returns Pallas' module for Triton, which takes a while to import; interpreted kernels use it too."""
    from jax.experimental.pallas import triton

    return triton


def _load(ref: Any, at: tuple[int, ...], size: tuple[int, int], mask: Array | None) -> Array:
    if size == (1, 1):
        return ref[(*at, 0, 0)]
    if mask is None or platform() == "tpu":  # which fills a block that reaches outside
        x = ref[(*at, slice(None), slice(None))]
        return x if mask is None else jnp.where(mask, x, jnp.zeros_like(x))
    return _triton().load(ref.at[(*map(np.int32, at), slice(None), slice(None))], mask=mask, other=0)


def _store(ref: Any, at: tuple[int, ...], size: tuple[int, int], mask: Array | None, x: Any) -> None:
    if mask is None or platform() == "tpu":
        ref[(*at, slice(None), slice(None))] = jnp.broadcast_to(x, size)
    else:
        _triton().store(
            ref.at[(*map(np.int32, at), slice(None), slice(None))], jnp.broadcast_to(x, size), mask=mask
        )
