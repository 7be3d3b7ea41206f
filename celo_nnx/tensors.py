"""How tensors are looked at: paths, which axes are the matrix and which a batch, which are factored.

The learned rule works on a *working* view of each tensor: batch axes first, then the rows and the columns
of the matrix, each of them possibly several own axes merged (a convolution's kernel height, width and inputs
are its rows). Statistics, orthogonalization and tiles then always run over the last two axes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from celo_nnx.errors import UserError, unknown
from celo_nnx.interfaces import TensorSpec

Array = jax.Array
PyTree = Any
Axes = tuple[int, ...]
Shapes = Mapping[str, tuple[int, ...]]

LANES = 16  # float32 lanes of the widest common vector register; a shorter last axis is not worth a loop
READINGS = ("networks", "last_two")
SMALL_KERNEL = 7  # spatial axes of a convolution whose name does not say so


def tensor_paths(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[str, Array]]:
    """Returns (path, leaf) pairs in flatten order; keys are joined by ``/``.

    A trailing ``value`` is dropped: nnx puts it there at init and not at update.
    """
    pairs = []
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]:
        if keys and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == "value":
            keys = keys[:-1]
        pairs.append((jax.tree_util.keystr(keys, simple=True, separator="/"), leaf))
    return pairs


def check_like(tree: PyTree, like: PyTree, what: str, dtypes: bool = False) -> None:
    """Raises a :class:`UserError` that names the first leaf in which ``tree`` is not like ``like``."""
    have, want = dict(tensor_paths(tree)), dict(tensor_paths(like))
    for path in want:
        if path not in have:
            raise UserError(f"the {what} tree lacks {path!r}")
    for path, leaf in have.items():
        if path not in want:
            raise UserError(f"the {what} tree has {path!r}, which is not expected")
        if np.shape(leaf) != want[path].shape:
            raise UserError(f"{what} {path!r} has shape {np.shape(leaf)}, expected {want[path].shape}")
        if dtypes and (found := jax.dtypes.result_type(leaf)) != want[path].dtype:
            raise UserError(f"{what} {path!r} has dtype {found}, expected {want[path].dtype}")


def check_arrays(tree: PyTree, what: str) -> None:
    """Raises a :class:`UserError` that names the first leaf that is no floating-point array."""
    for path, leaf in tensor_paths(tree):
        if not hasattr(leaf, "dtype"):
            raise UserError(f"{what} {path!r} is a {type(leaf).__name__}, not an array")
        if not jax.dtypes.issubdtype(leaf.dtype, np.floating):
            raise UserError(f"{what} {path!r} has dtype {leaf.dtype}: floating-point {what}s only")


def spread(
    tree: PyTree, params: PyTree, what: str, is_leaf: Callable[[Any], bool] | None = None
) -> dict[str, Any]:
    """Returns a value for the path of every parameter, from a tree like the parameters or a prefix of it.

    Args:
      tree: values; one above several parameters is for all of them.
      params: the parameters; parts that optax has masked out have no leaves and may have values.
      what: the tree's name in messages.
      is_leaf: what else counts as a value.

    Raises:
      UserError: a parameter without a value, or a value without a place; it is named.

    Example:
      >>> spread({"a": True, "b": False}, {"a": {"w": np.ones(2), "b": np.ones(2)}, "b": np.ones(1)}, "mask")
      {'a/b': True, 'a/w': True, 'b': False}
    """
    given, used, out = dict(tensor_paths(tree, is_leaf)), set(), {}

    def above(path: str) -> list[str]:
        keys = path.split("/")
        return ["/".join(keys[:n]) for n in range(len(keys), -1, -1)]

    places = dict(tensor_paths(params, lambda x: not jax.tree.leaves(x)))
    for path, leaf in places.items():
        found = next((p for p in above(path) if p in given), None)
        used.add(found)
        if not jax.tree.leaves(leaf):
            continue
        if found is None:
            raise UserError(f"the {what} does not fit the parameters: it has nothing for {path!r}")
        out[path] = given[found]
    empty = {path for path, leaf in places.items() if not jax.tree.leaves(leaf)}
    for path in given:
        if path not in used and empty.isdisjoint(above(path)):
            raise UserError(f"the {what} does not fit the parameters: {path!r} is none of them")
    return out


def decay_masks(mask: PyTree, params: PyTree) -> dict[str, bool]:
    """Returns which tensors are decayed, by path; Python or numpy booleans, known while a program is traced.

    Raises:
      UserError: the mask does not fit the parameters, or has something else for a tensor, which is named.
    """
    single = jax.tree_util.treedef_is_leaf(jax.tree.structure(params))
    if isinstance(mask, (bool, np.bool_, jax.Array)) and not single:
        # optax.inject_hyperparams has called the function with the number of updates.
        raise UserError(
            "the weight decay mask is a single value, not booleans like the parameters: "
            'optax.inject_hyperparams needs static_args=("mask",)'
        )
    found = spread(mask, params, "weight decay mask")
    for path, on in found.items():
        if not isinstance(on, (bool, np.bool_)):
            shown = "an array" if hasattr(on, "dtype") else repr(on)
            raise UserError(f"the weight decay mask of {path!r} is {shown}, not a Python or numpy boolean")
    return found


def check_patterns(what: str, patterns: Iterable[str], paths: Iterable[str]) -> None:
    """Refuses a pattern that is found in none of the paths: it would silently do nothing.

    Example:
      >>> check_patterns("routing", ("/b$",), ["layer/b"])
    """
    paths = list(paths)
    for pattern in patterns:
        if paths and not any(re.search(pattern, path) for path in paths):
            raise UserError(
                f"{what}: the pattern {pattern!r} is found in no tensor's path; "
                f"paths are like {', '.join(repr(p) for p in paths[:3])}"
            )


def factored_axes(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Axes (d1, d0): second largest and largest, ties to the higher index (OPTIMIZERS section 1.4).

    Example:
      >>> factored_axes((7, 5)), factored_axes((16, 16)), factored_axes((3,))
      ((1, 0), (0, 1), None)
    """
    if len(shape) < 2:
        return None
    order = np.argsort(np.asarray(shape), kind="stable")
    return int(order[-2]), int(order[-1])


@dataclasses.dataclass(frozen=True)
class Tensors:
    """How tensors are looked at; the section ``optimizer.tensors`` of a config.

    Attributes:
      axes: ``"networks"`` recognises the kernels of nnx and linen: a dense kernel, one with several input
        or output axes (attention heads: told by the shape of its bias, or by its name and its siblings), a
        convolution (rows are kernel positions and inputs), an embedding, and stacks of those along a leading
        axis, which is a batch (of a convolution without a bias: told by the normalization beside it); a bias
        or scale is one vector. Factored axes are then the matrix's.
        ``"last_two"`` is the published reading: the last two axes are the matrix, the factored axes are the
        two largest, whatever they mean.
      matrix: (pattern, rows, columns): for tensors whose path the regular expression is found in, the axis
        or tuple of axes (negative ones count from the end) that are the matrix's rows and columns; the first
        match counts; all other axes are a batch.
      factored: (path, d1, d0): overrides of the factored axes, for replays; ``last_two`` only.
      given: (path, rows, columns) of :class:`optax.contrib.MuonDimensionNumbers`; rows None sends the tensor
        to the hand-made route. Not a config key: see ``LearnedOptimizer.as_optax``.

    Example:
      >>> spec = Tensors().specs({"conv/kernel": (3, 3, 16, 32)})["conv/kernel"]
      >>> spec.shape, spec.matrix
      ((144, 32), (0, 1))
    """

    axes: str = "networks"
    matrix: tuple[tuple[str, int | Axes, int | Axes], ...] = ()
    factored: tuple[tuple[str, int, int], ...] = ()
    given: tuple[tuple[str, Axes | None, Axes | None], ...] = ()

    def __post_init__(self) -> None:
        if self.axes not in READINGS:
            raise unknown("optimizer.tensors.axes", self.axes, READINGS)
        if self.factored and self.axes != "last_two":
            raise UserError("optimizer.tensors.factored needs optimizer.tensors.axes = 'last_two'")

    def specs(self, shapes: Shapes) -> dict[str, TensorSpec]:
        """Returns the static description of every tensor, from the paths and shapes of a whole tree.

        Raises:
          UserError: axes that are out of range or named twice, with the tensor.
        """
        return {path: self._spec(path, shapes) for path in shapes}

    def _spec(self, path: str, shapes: Shapes) -> TensorSpec:
        shape = shapes[path]
        if len(shape) < 2:
            return TensorSpec(path, shape or (1,), None, None, own=shape)
        explicit = next(((r, c) for p, r, c in self.given if p == path and r is not None), None)
        explicit = explicit or next(((r, c) for p, r, c in self.matrix if re.search(p, path)), None)
        if explicit is not None:
            return _working(path, shape, *_checked(path, shape, *explicit))
        if self.axes == "networks":
            rows, columns = recognise(path, shapes)
            if not rows:
                return TensorSpec(path, (math.prod(shape),), None, None, own=shape)
            return _working(path, shape, rows, columns)
        rank = len(shape)
        given = {p: (d1, d0) for p, d1, d0 in self.factored}
        factored = _two_axes(given.get(path) or factored_axes(shape), shape, path)
        return _working(path, shape, (rank - 2,), (rank - 1,), factored)


def recognise(path: str, shapes: Shapes) -> tuple[Axes, Axes]:
    """Returns the axes (rows, columns) of a kernel of nnx or linen; ``((), ())`` for a vector.

    Args:
      path: the tensor's; its name is the last key.
      shapes: of all tensors by path: a kernel's bias and its siblings tell how to read it.

    Example:
      >>> heads = {"mha/query/kernel": (64, 4, 16), "mha/query/bias": (4, 16)}
      >>> recognise("mha/query/kernel", heads)
      ((0,), (1, 2))
    """
    shape = shapes[path]
    rank = len(shape)
    *parents, name = path.split("/")
    if name in ("bias", "b", "scale", "offset"):
        return (), ()
    every, stacked = tuple(range(rank)), tuple(range(1, rank))
    folder = "/".join(parents)
    if rank > 2:
        if (outputs := _outputs(folder, shape, shapes)) is not None:
            inner, outs = outputs
            return inner[: len(inner) - outs], inner[len(inner) - outs :]
        if (heads := _heads(parents, name, shapes)) is not None:
            inner = every if rank == 3 else stacked
            return inner[:heads], inner[heads:]
        lead = 1 if _in_stack(parents, shape, shapes) else 0
        own = shape[lead:]
        spatial = len(own) >= 4 and max(own[:-2]) <= SMALL_KERNEL and own[-1] > SMALL_KERNEL
        if re.search("conv", path, re.IGNORECASE) or (spatial and name in ("kernel", "w", "weight")):
            return every[lead:-1], every[-1:]
    return every[-2:-1], every[-1:]


def _outputs(folder: str, shape: tuple[int, ...], shapes: Shapes) -> tuple[Axes, int] | None:
    """Returns a kernel's axes without a stack's, and how many are outputs: as many as its bias has."""
    for name in ("bias", "b"):
        bias = shapes.get(f"{folder}/{name}" if folder else name)
        if not bias or len(bias) >= len(shape):
            continue
        every, own = tuple(range(len(shape))), len(bias)
        stacked = own > 1 and bias[0] == shape[0] and bias[1:] == shape[1 - own :]
        # Where heads are as many as inputs, (inputs, heads, size) with (heads, size) looks like a stack.
        heads = own == 2 and bias == shape[-2:] and re.search(r"(^|/)(query|key|value)$", folder)
        if stacked and not heads:
            return every[1:], own - 1
        if bias == shape[-own:]:
            return every, own
    return None


def _heads(parents: Sequence[str], name: str, shapes: Shapes) -> int | None:
    """Returns how many inner axes of an attention kernel without a bias are its inputs: 1, or 2 for out.

    Query, key and value end in (heads, size of a head), with which the output's kernel begins.
    """
    if not parents or parents[-1] not in ("query", "key", "value", "out"):
        return None
    folder = "/".join(parents[:-1])
    query, out = (shapes.get("/".join(filter(None, (folder, k, name)))) for k in ("query", "out"))
    if query is None or out is None or len(query) != len(out) or len(query) not in (3, 4):
        return None
    if query[-2:] != out[-3:-1]:
        return None
    return 2 if parents[-1] == "out" else 1


def _in_stack(parents: Sequence[str], shape: tuple[int, ...], shapes: Shapes) -> bool:
    """Tells whether the first axis is a stack's: the nearest normalization scales have it too.

    A convolution without a bias does not say how many spatial axes it has.
    """
    for depth in range(len(parents), -1, -1):
        folder = "/".join((*parents[:depth], ""))
        scales = [s for p, s in shapes.items() if p.startswith(folder) and p.split("/")[-1] == "scale"]
        if scales:
            return all(len(s) == 2 and s[0] == shape[0] for s in scales)
    return False


def _checked(path: str, shape: tuple[int, ...], rows: Any, columns: Any) -> tuple[Axes, Axes]:
    """Returns row and column axes counted from the front."""
    out = []
    for axes in (rows, columns):
        axes = (axes,) if isinstance(axes, int) else tuple(axes)
        out.append(tuple(a + len(shape) if a < 0 else a for a in axes))
    together = out[0] + out[1]
    good = all(out) and len(set(together)) == len(together)
    if not good or not all(0 <= a < len(shape) for a in together):
        raise UserError(
            f"matrix axes of {path!r} = {rows}, {columns} are out of range: must be different axes of "
            f"shape {shape}, at least one on each side"
        )
    return out[0], out[1]


def _two_axes(axes: tuple[int, int] | None, shape: tuple[int, ...], path: str) -> tuple[int, int]:
    """Checks overridden factored axes."""
    assert axes is not None
    if len(set(axes)) != 2 or not all(0 <= a < len(shape) for a in axes):
        raise UserError(
            f"factored axes of {path!r} = {axes} are out of range: must be two different axes of {shape}"
        )
    return axes


def _working(
    path: str, shape: tuple[int, ...], rows: Axes, columns: Axes, factored: tuple[int, int] | None = None
) -> TensorSpec:
    """Returns the description of a tensor with a matrix.

    Args:
      path, shape: the tensor's own.
      rows, columns: own axes.
      factored: own axes (d1, d0), of tensors whose rows and columns are one axis each; by default the
        matrix's, ties to the columns.
    """
    batch = tuple(a for a in range(len(shape)) if a not in rows + columns)
    n, m = (math.prod(shape[a] for a in axes) for axes in (rows, columns))
    at = len(batch)
    # Loops run over the last axis: the longer side goes there where the other is shorter than a register.
    flipped = m < LANES and n > m
    working = (*(shape[a] for a in batch), *((m, n) if flipped else (n, m)))
    matrix = (at + 1, at) if flipped else (at, at + 1)
    if factored is None:
        factored = matrix if m >= n else (matrix[1], matrix[0])
    else:
        order = batch + (columns + rows if flipped else rows + columns)
        factored = (order.index(factored[0]), order.index(factored[1]))
    return TensorSpec(path, working, matrix, factored, own=shape, rows=rows, columns=columns)


def dimension_numbers(tree: PyTree, params: PyTree) -> tuple[tuple[str, Axes | None, Axes | None], ...]:
    """Returns the rows of ``Tensors.given`` from a tree of optax's ``MuonDimensionNumbers`` or None.

    Args:
      tree: like ``params``, or a prefix of it, or a function of the parameters that returns one.
      params: the parameters.

    Raises:
      UserError: the tree does not fit, or a leaf is something else.
    """
    tree = tree(params) if callable(tree) else tree
    numbers = spread(tree, params, "tree of dimension numbers", lambda x: x is None or _is_numbers(x))
    rows: list[tuple[str, Axes | None, Axes | None]] = []
    for path, param in tensor_paths(params):
        leaf = numbers[path]
        if leaf is None:
            rows.append((path, None, None))
        elif _is_numbers(leaf):
            rows.append((path, *_checked(path, param.shape, leaf.reduction_axis, leaf.output_axis)))
        else:
            raise UserError(
                f"dimension numbers of {path!r}: {leaf!r} is neither MuonDimensionNumbers nor None"
            )
    return tuple(rows)


def _is_numbers(x: Any) -> bool:
    return hasattr(x, "reduction_axis") and hasattr(x, "output_axis")


def axes_in_words(spec: TensorSpec) -> str:
    """Says in words how a tensor is looked at, for the routing table.

    Example:
      >>> axes_in_words(Tensors().specs({"conv/kernel": (3, 3, 16, 32)})["conv/kernel"])
      'rows 0,1,2 x columns 3'
    """
    if spec.matrix is None:
        return "vector" if spec.own else "scalar"
    names = [",".join(str(a) for a in axes) for axes in (spec.rows, spec.columns, spec.batch)]
    return f"rows {names[0]} x columns {names[1]}" + (f", batch {names[2]}" if names[2] else "")
