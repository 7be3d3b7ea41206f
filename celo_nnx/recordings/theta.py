"""A recording's theta, in this project's layout."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np

from celo_nnx.errors import UserError, require
from celo_nnx.recordings.files import Recording, read_npz
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
            recording, file=str(recording.folder / source), arrays=read_npz(recording.folder / source)
        )
    leaves = [(name, pieces, _parts(rule, name, _whole(pieces))) for name, pieces in rule.theta_leaves]
    known = {PREFIX + part for _, _, parts in leaves for part in parts}
    for key in sorted(key for key in recording.arrays if key.startswith(PREFIX) and key not in known):
        raise UserError(f"{recording.file}: array {key!r} has no place in this optimizer's theta")
    own: dict[str, Any] = {}
    for name, pieces, parts in leaves:
        shape = _whole(pieces)
        if parts == [name]:
            array = recording.array(PREFIX + name, shape)
        else:
            array = np.stack([recording.array(PREFIX + part, ()) for part in parts]).reshape(shape)
        ends = np.cumsum([shape[0] for _, shape in pieces if len(pieces) > 1])
        for (path, _), piece in zip(
            pieces, np.split(array, ends[:-1]) if len(ends) else [array], strict=True
        ):
            _put(own, path, piece)
    return own


def _whole(pieces: list[tuple[str, tuple[int, ...]]]) -> tuple[int, ...]:
    """Returns the shape of a leaf whose rows are these pieces."""
    first = pieces[0][1]
    return first if len(pieces) == 1 else (sum(shape[0] for _, shape in pieces), *first[1:])


def _parts(rule: Spec, name: str, shape: tuple[int, ...]) -> list[str]:
    """Returns the names of the arrays that hold a leaf: its own, or scalars ``w{l}_{in}_{out}``."""
    if not ("make_separate_weights" in rule and rule["make_separate_weights"] and name.startswith("nn/")):
        return [name]
    return [f"{name}_{'_'.join(map(str, index))}" for index in np.ndindex(*shape)]


def _put(tree: dict[str, Any], path: str, array: np.ndarray) -> None:
    *folders, last = path.split("/")
    for folder in folders:
        tree = tree.setdefault(folder, {})
    tree[last] = array
