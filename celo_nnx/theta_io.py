"""Theta as a ``.safetensors`` file: flat names joined by ``/``, a JSON header with config and digest."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from celo_nnx import weights
from celo_nnx.errors import UserError
from celo_nnx.meta.checkpoint import digest, flatten
from celo_nnx.meta.frozen import matching

FORMAT = "celo_nnx.theta/1"
FILE_NAME = "theta.safetensors"


def save_theta(path: str | os.PathLike[str], theta: Any, metadata: Mapping[str, str] | None = None) -> None:
    """Writes theta atomically: the file is the old one or the new one, whole.

    Args:
      path: the file to write.
      theta: nested dict of arrays.
      metadata: strings kept in the header, such as the config as JSON.

    Example:
      >>> import tempfile
      >>> file = Path(tempfile.mkdtemp()) / "theta.safetensors"
      >>> save_theta(file, {"mlp": {"b": np.zeros(2, np.float32)}})
      >>> load_theta(file)["mlp"]["b"].tolist()
      [0.0, 0.0]
    """
    from safetensors.numpy import save

    path = Path(path)
    arrays = {k: np.asarray(v, order="C") for k, v in flatten(jax.device_get(theta)).items()}
    header = {**(metadata or {}), "format": FORMAT, "digest": digest(arrays, {})}
    # The process id keeps two writers apart; a leftover of kill -9 is harmless and has another name.
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(partial, "wb") as file:
        file.write(save(arrays, metadata=header))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_theta(path: str | os.PathLike[str], like: Any = None) -> dict[str, Any]:
    """Reads theta from a file, from a run folder, or by the name of weights that come with the package.

    Args:
      path: a ``.safetensors`` file, a run folder that holds ``theta.safetensors``, or a name
        (:func:`celo_nnx.weights.names`).
      like: theta of the optimizer that will use it; names, shapes and dtypes must agree.

    Returns:
      A pure nested dict of numpy arrays.

    Raises:
      UserError: missing, truncated, altered, foreign, or not the theta of that optimizer; one line.
    """
    path = _file(path)
    if not path.is_file():
        known = ", ".join(weights.names())
        raise UserError(
            f"no theta at {path}: give a .safetensors file, a run folder that holds {FILE_NAME}, or a name "
            f"({known})"
        )
    arrays = _read(path)
    if like is not None:
        agree(path, arrays, flatten(like))
    return _nested(path, arrays)


def take(
    path: str | os.PathLike[str], theta: Mapping[str, Any], like: Mapping[str, Any], only: Sequence[str] = ()
) -> dict[str, Any]:
    """Puts leaves of one theta into another.

    Args:
      path: where ``theta`` was read, for messages.
      theta: nested dict of arrays.
      like: theta of the optimizer that gets the leaves.
      only: regular expressions searched in the paths of ``like``; without any, all leaves are taken, and
        there must be no others.

    Returns:
      ``like`` with the leaves taken, numpy.

    Raises:
      UserError: a pattern that is found nowhere; a leaf that is missing or of another shape; one line.

    Example:
      >>> new, old = ({"rule": {"w": np.full(2, x)}, "rate": np.full(1, x)} for x in (1.0, 0.0))
      >>> take("new", new, old, ("rule/",))
      {'rate': array([0.]), 'rule': {'w': array([1., 1.])}}
    """
    given, wanted = flatten(theta), flatten(like)
    if only:
        chosen = matching(wanted, only, "theta_init.only")
        given = {name: leaf for name, leaf in given.items() if name in chosen}
        wanted = {name: leaf for name, leaf in wanted.items() if name in chosen}
    agree(path, given, wanted)
    leaves = [given.get(name, leaf) for name, leaf in flatten(like).items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _nested(path: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns flat theta as nested dicts."""
    theta: dict[str, Any] = {}
    for name, array in arrays.items():
        *folders, last = name.split("/")
        node = theta
        for folder in folders:
            node = node.setdefault(folder, {})
            if not isinstance(node, dict):
                raise UserError(f"{path}: {name!r} lies below another leaf")
        if last in node:
            raise UserError(f"{path}: {name!r} is both a leaf and a folder")
        node[last] = array
    return theta


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Returns the header's strings (config, iteration, digest) of a theta file, run folder or name."""
    from safetensors import SafetensorError, safe_open

    path = _file(path)
    try:
        with safe_open(path, framework="numpy") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({_first_line(error)})") from error


def _file(path: str | os.PathLike[str]) -> Path:
    """Returns the theta file of a path or name."""
    path = weights.locate(path)
    return path / FILE_NAME if path.is_dir() else path


def _read(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no iterator
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({_first_line(error)})") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is not a theta of celo-nnx (no {FORMAT!r} in its header)")
    if metadata.get("digest") != digest(arrays, {}):
        raise UserError(f"{path} is damaged: its contents do not match its digest")
    return arrays


def agree(path: str | Path, arrays: Mapping[str, np.ndarray], like: Mapping[str, Any]) -> None:
    """Compares names, shapes and dtypes of flat theta with an optimizer's.

    Raises:
      UserError: they differ; one line that names ``path`` and the leaf.
    """
    if missing := sorted(like.keys() - arrays.keys()):
        raise UserError(f"{path} lacks {missing[0]!r} ({len(missing)} missing): theta of another optimizer")
    if extra := sorted(arrays.keys() - like.keys()):
        raise UserError(f"{path} has unknown {extra[0]!r} ({len(extra)} unknown): theta of another optimizer")
    for name, leaf in like.items():
        found, wanted = arrays[name], (np.shape(leaf), np.dtype(leaf.dtype))
        if (found.shape, found.dtype) != wanted:
            raise UserError(
                f"{path}: {name!r} is {found.dtype}{list(found.shape)}, "
                f"the optimizer has {wanted[1]}{list(wanted[0])}"
            )


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]
