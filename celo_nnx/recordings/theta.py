"""A recording's theta, in this project's layout."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np

from celo_nnx.errors import UserError, require
from celo_nnx.recordings.files import Recording, read_arrays
from celo_nnx.recordings.spec import Spec

PREFIX = "theta/"


def theta(recording: Recording, rule: Spec) -> dict[str, Any]:
    """Returns a recording's theta, or that of the file it names: a nested dict of arrays.

    Raises:
      UserError: ``theta_from`` is not a plain name, or a weight is missing, unknown or not of the shape
        that the constructor asks for.
    """
    source = recording.field("theta_from", str, "") or None
    if source is not None and source != Path(recording.file).name:
        plain = re.fullmatch(r"[\w.+-]+\.npz", source) and source not in (".npz", "..npz")
        require(bool(plain), f"{recording.file}: theta_from", source, "a plain NAME.npz of the same folder")
        recording = dataclasses.replace(
            recording, file=str(recording.folder / source), arrays=read_arrays(recording.folder / source)
        )
    wanted = theta_arrays(rule)
    for key in sorted(key for key in recording.arrays if key.startswith(PREFIX)):
        if key.removeprefix(PREFIX) not in wanted:
            raise UserError(f"{recording.file}: array {key!r} has no place in this optimizer's theta")
    arrays = {name: recording.array(PREFIX + name, shape) for name, shape in wanted.items()}
    own: dict[str, Any] = {}
    for name, pieces in rule.theta_leaves:
        shape = _whole(pieces)
        whole = arrays[name] if name in arrays else _stack(arrays, name, shape)
        ends = np.cumsum([shape[0] for _, shape in pieces if shape])
        split = [whole] if len(pieces) == 1 else np.split(whole, ends[:-1])
        for (path, _), piece in zip(pieces, split, strict=True):
            _put(own, path, piece)
    return own


def theta_arrays(rule: Spec) -> dict[str, tuple[int, ...]]:
    """Returns name and shape of every array of a recording's theta, without the prefix ``theta/``."""
    shapes = {name: _whole(pieces) for name, pieces in rule.theta_leaves}
    if "make_separate_weights" not in rule or not rule["make_separate_weights"]:
        return shapes
    deep = {name: shape for name, shape in shapes.items() if name.startswith("nn/")}
    scalars = {part: () for name, shape in deep.items() for part in _scalars(name, shape)}
    return {name: shape for name, shape in shapes.items() if name not in deep} | scalars


def _whole(pieces: list[tuple[str, tuple[int, ...]]]) -> tuple[int, ...]:
    """Returns the shape of a leaf whose rows are these pieces."""
    first = pieces[0][1]
    return first if len(pieces) == 1 else (sum(shape[0] for _, shape in pieces), *first[1:])


def _scalars(name: str, shape: tuple[int, ...]) -> list[str]:
    """Returns the names ``w{l}_{in}_{out}`` of a matrix that is kept number by number."""
    return [f"{name}_{'_'.join(map(str, index))}" for index in np.ndindex(*shape)]


def _stack(arrays: dict[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.stack([arrays[part] for part in _scalars(name, shape)]).reshape(shape)


def _put(tree: dict[str, Any], path: str, array: np.ndarray) -> None:
    *folders, last = path.split("/")
    for folder in folders:
        tree = tree.setdefault(folder, {})
    tree[last] = array
