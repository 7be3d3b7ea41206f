"""The names and shapes of a model's parameters, from the header of a safetensors file."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jax.numpy as jnp

from celo_nnx.errors import UserError
from celo_nnx.optimizer import LearnedOptimizer

FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of what an optimizer can update


def read_shapes(path: str | os.PathLike[str]) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Reads a safetensors file's header, and nothing else of it.

    Args:
      path: the file. Names are nested by ``/``, or by ``.`` where none has a ``/``.

    Returns:
      Shape by path, keys joined by ``/``; names of tensors that are not floating-point.

    Raises:
      UserError: no such file, not safetensors, a header that does not fit the file's size, a name that
        cannot be printed, or two names for one path.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file {path}")
    try:
        # The header's length is checked against the file's, and the tensors' extents too, before any is used.
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no iterator
            found = {name: (tuple(x.get_shape()), x.get_dtype()) for name, x in slices.items()}
    except (SafetensorError, OSError) as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is not a readable safetensors file ({text})") from None
    separator = "/" if any("/" in name for name in found) else "."
    shapes: dict[str, tuple[int, ...]] = {}
    others = []
    for name, (shape, dtype) in found.items():
        if not name.isprintable():
            raise UserError(f"{path}: the name {name!r} has characters that cannot be printed")
        if dtype not in FLOATS:
            others.append(name)
            continue
        key = "/".join(part for part in name.split(separator) if part)
        if key in shapes:
            raise UserError(f"{path}: {name!r} is a second tensor at {key!r}")
        shapes[key] = shape
    return dict(sorted(shapes.items())), sorted(others)


def routing_report(optimizer: LearnedOptimizer, path: str | os.PathLike[str]) -> str:
    """Returns the optimizer's routing table for the model in a file; see :func:`read_shapes`.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> from safetensors.numpy import save_file
      >>> from celo_nnx import load_optimizer
      >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> arrays = {"dense.kernel": np.zeros((8, 4)), "dense.bias": np.zeros(4), "step": np.zeros(1, int)}
      >>> save_file(arrays, file)
      >>> print(routing_report(load_optimizer("celo2"), file))
      tensor        shape   rule     axes
      dense/bias    (4,)    adam     elementwise
      dense/kernel  (8, 4)  learned  rows 0 x columns 1
      left out, not floating-point: step
    """
    shapes, others = read_shapes(path)
    if not shapes:
        raise UserError(f"{path} has no floating-point tensor")
    # One level is enough: a key with slashes makes the same path as nested keys.
    structs = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    lines = [optimizer.routing_table(structs)]
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        lines.append(f"left out, not floating-point: {', '.join(others[:5])}{more}")
    return "\n".join(lines)
