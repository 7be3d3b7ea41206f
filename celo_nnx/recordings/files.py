"""Reads recorded trajectories: a JSON and an npz file of one name, taken as data and checked key by key.

Nothing in a recording is evaluated, and only files of its own folder are opened.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from celo_nnx.errors import UserError, unknown
from celo_nnx.files import read_json, read_npz
from celo_nnx.recordings.checks import number

KINDS = ("optimizer_trajectory", "inner_unroll", "pes_estimate", "normalizer", "image_pipeline")
LARGEST = 2**28  # bytes of arrays in one file; a recording has a few hundred kilobytes


@dataclasses.dataclass(frozen=True)
class Recording:
    """One recording: ``meta`` is the JSON object, ``arrays`` the npz, ``file`` the name to show."""

    file: str
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]
    folder: Path

    def array(self, key: str, shape: tuple[int, ...] | None = None, kind: str = "f") -> np.ndarray:
        """Returns an array after checking its shape and its dtype's kind (``f`` means float32).

        Raises:
          UserError: the key is missing, or shape or dtype differ.
        """
        if key not in self.arrays:
            raise UserError(f"{self.file}: array {key!r} is missing")
        x = self.arrays[key]
        if shape is not None and x.shape != tuple(shape):
            raise UserError(f"{self.file}: array {key!r} has shape {x.shape}, expected {tuple(shape)}")
        if x.dtype.kind not in kind or (x.dtype.kind == "f" and x.dtype != np.float32):
            names = {"f": "float32", "i": "integer", "u": "unsigned integer", "b": "boolean"}
            wanted = " or ".join(names[k] for k in kind)
            raise UserError(f"{self.file}: array {key!r} has dtype {x.dtype}, expected {wanted}")
        return x

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        """Returns the arrays whose key starts with ``prefix``, by the rest of the key; at least one."""
        found = {key[len(prefix) :]: self.array(key) for key in sorted(self.arrays) if key.startswith(prefix)}
        if not found:
            raise UserError(f"{self.file}: no array {prefix}*")
        return found

    def field(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Returns a field of the JSON, checked to be of one of the types."""
        value = self.meta.get(name, default)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"{self.file}: field {name!r} of the JSON is missing or of the wrong type")
        return value

    def tolerance(self, name: str, default: float) -> float:
        """Returns a bound from the JSON's ``tolerance``, or the default where it states none."""
        return self.bound(name, self.field("tolerance", dict, {}).get(name, default))

    def bound(self, name: str, value: Any) -> float:
        """Checks one bound of the JSON's ``tolerance``."""
        return number(0.0, 1e6)(f"{self.file}: tolerance.{name}", value)


def read(path: str | Path) -> Recording:
    """Reads a recording named by its .json, its .npz or the stem of both.

    Raises:
      UserError: a file is missing, truncated, holds pickled objects or is of an unknown kind.
    """
    text = str(path)
    stem = Path(text[: -len(Path(text).suffix)] if text.endswith((".json", ".npz")) else text)
    header = stem.with_name(stem.name + ".json")
    meta = _read_json(header)
    if meta.get("kind") not in KINDS:
        raise unknown(f"kind in {header}:", meta.get("kind"), KINDS)
    return Recording(text, meta, read_arrays(stem.with_name(stem.name + ".npz")), stem.parent)


def _read_json(path: Path) -> dict[str, Any]:
    meta = read_json(path)
    if meta is None:
        raise UserError(f"no file {path}: a recording is NAME.json with NAME.npz beside it")
    if not isinstance(meta, dict):
        raise UserError(f"{path} is not a JSON object")
    return meta


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of an npz file of a recording."""
    if not path.exists():
        raise UserError(f"no file {path}: a recording is NAME.json with NAME.npz beside it")
    return read_npz(path, LARGEST)
