"""Checkpoints of a meta-training run: Orbax for the arrays and the commit, an own digest for the trust.

Orbax keeps no checksum of its array files, so each step carries a SHA-256 over every leaf (path, dtype,
shape, bytes) and over the record beside them, and a manifest (:mod:`celo_nnx.meta.manifest`) that names the
file which is damaged. The state is stored flat, ``{path: numpy array}``: names,
shapes and dtypes can then be compared before a byte of array data is read, and optax's named tuples come
back as what they were, because the tree is the running program's, never the file's.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import itertools
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from celo_nnx import processes
from celo_nnx.errors import UserError
from celo_nnx.interfaces import Family
from celo_nnx.meta import manifest

FORMAT = "celo_nnx.run/1"
Record = dict[str, Any]


class Loaded(NamedTuple):
    """A step that was read.

    Attributes:
      step: meta-iterations done.
      state: numpy arrays and typed keys.
      record: what was kept beside them.
      refused: newer steps that cannot be used, newest first, and why.
    """

    step: int
    state: Any
    record: Record
    refused: tuple[tuple[int, str], ...]


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def flatten(tree: Any) -> dict[str, Any]:
    """Returns the leaves by path, keys joined by ``/``.

    Example:
      >>> flatten({"a": [1, {"b": 2}]})
      {'a/0': 1, 'a/1/b': 2}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def to_host(state: Any) -> dict[str, np.ndarray]:
    """Copies a state to numpy arrays by path; a PRNG key becomes its key data."""
    flat = {k: jax.random.key_data(v) if _is_key(v) else v for k, v in flatten(state).items()}
    return {k: np.asarray(v) for k, v in processes.to_host(flat).items()}


def digest(arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> str:
    """Returns the SHA-256 over a JSON record and all arrays, independent of their order.

    Args:
      arrays: arrays by path.
      record: JSON values kept beside them.

    Returns:
      The digest, 64 hexadecimal digits.
    """
    total = hashlib.sha256(canonical(record).encode())
    for path in sorted(arrays):
        array = np.asarray(arrays[path], order="C")
        head = json.dumps([path, array.dtype.name, list(array.shape)])
        total.update(hashlib.sha256(head.encode()).digest())
        total.update(hashlib.sha256(array.tobytes()).digest())
    return total.hexdigest()


def data_digest(family: Family) -> str:
    """Returns the SHA-256 over a family's arrays."""
    splits = {"train": family.train, "test": family.test, "validation": family.validation}
    arrays = {f"{split}/{k}": np.asarray(v) for split, data in splits.items() for k, v in data.items()}
    return digest(arrays, {})


def canonical(value: Any) -> str:
    """Returns JSON text that is equal exactly where the values are equal."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def save(directory: Path, step: int, state: Any, record: Record, keep: int = 2) -> None:
    """Writes one step and waits until it is on disk; the commit is one rename, so it is there or not.

    All processes of a run call it together, since Orbax has them wait for each other; the first one writes.

    Args:
      directory: the folder of all steps.
      step: meta-iterations done.
      state: pytree of arrays and typed PRNG keys.
      record: JSON values kept beside the arrays: the resolved config, versions, devices.
      keep: how many of the newest steps stay.

    Raises:
      OSError: what the system refuses, such as a full disk; the steps that were there stay.
    """
    from orbax.checkpoint import v1 as ocp

    training = ocp.training
    arrays = to_host(state)
    metadata = {
        "format": FORMAT,
        "record": record,
        "digest": digest(arrays, {"record": record, "step": step}),
    }
    # An array without elements cannot be written; it has nothing to restore but its shape.
    stored = {k: v for k, v in arrays.items() if v.size}
    with (
        _system_errors(directory / str(step)),
        _quiet(),
        training.Checkpointer(
            directory.absolute(),
            # Orbax's default policy skips a save while another one runs.
            save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        ) as checkpointer,
    ):
        checkpointer.save_checkpointables(step, {"state": stored}, custom_metadata=metadata)
    if processes.is_first():
        manifest.write(directory / str(step))


@contextlib.contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    """Raises what the system refuses as an ``OSError``: TensorStore tells it in a ``ValueError``'s text."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            code = re.search(r"os_error_code='(\d+)'", str(cause))
            number = int(code[1]) if code else getattr(cause, "errno", None)
            if number:
                raise OSError(number, os.strerror(number), str(path)) from error
            cause = cause.__cause__ or cause.__context__
        raise


def steps(directory: Path) -> list[int]:
    """Returns the committed steps, oldest first; Orbax names unfinished ones differently."""
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdecimal())


def load(
    directory: Path, like: Callable[[int], Any], check: Callable[[int, Record], None] = lambda *_: None
) -> Loaded | None:
    """Reads the newest step that is intact, checked file by file, leaf by leaf and against its digest.

    Args:
      directory: the folder of all steps.
      like: gives for a step a state, or its shapes, with the tree, shapes and dtypes that are wanted.
      check: raises a UserError for a step with a record of something else.

    Returns:
      The step, None where there is none. Nothing is changed: see :func:`set_aside` for the refused ones.

    Raises:
      UserError: no step can be used; says why of the newest.
    """
    refused: list[tuple[int, str]] = []
    for step in reversed(steps(directory)):
        try:
            state, record = load_step(directory, step, like(step))
            check(step, record)
        except UserError as error:
            refused.append((step, str(error)))
            continue
        return Loaded(step, state, record, tuple(refused))
    if not refused:
        return None
    raise UserError(
        f"{refused[0][1]}; nothing was changed; no older step can be used: start a new run folder"
    )


def set_aside(directory: Path, step: int) -> Path:
    """Moves a step into the folder ``damaged`` beside the folder of all steps; returns where it is now."""
    place = directory.parent / "damaged"
    place.mkdir(exist_ok=True)
    names = (f"{step}.{i}" if i else f"{step}" for i in itertools.count())
    new = next(path for name in names if not (path := place / name).exists())
    (directory / str(step)).rename(new)
    return new


def load_step(directory: Path, step: int, like: Any) -> tuple[Any, Record]:
    """Reads and checks one step.

    Returns:
      (state as numpy arrays and typed keys, record).

    Raises:
      UserError: truncated, altered, foreign, or of another tree, shape or dtype.
    """
    path = directory / str(step)
    try:
        manifest.check(path)
    except UserError as error:
        raise UserError(f"checkpoint {path} cannot be used: {error}") from error
    record, expected = _metadata(path, flatten(like))
    from orbax.checkpoint import v1 as ocp

    try:
        with _quiet(), _alone():
            stored = ocp.load_checkpointables(path.absolute())["state"]
    except Exception as error:  # Orbax and TensorStore raise many kinds; each means the files are not whole.
        raise UserError(f"checkpoint {path} cannot be read ({_reason(error)})") from error
    arrays = {}
    for name, leaf in flatten(like).items():
        shape, dtype = _shape_dtype(leaf)
        arrays[name] = np.asarray(stored[name]) if math.prod(shape) else np.zeros(shape, dtype)
    if digest(arrays, {"record": record, "step": step}) != expected:
        raise UserError(f"checkpoint {path} is damaged: its contents do not match its digest")
    leaves = [_typed(arrays[name], leaf) for name, leaf in flatten(like).items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), record


def _metadata(path: Path, like: dict[str, Any]) -> tuple[Record, str]:
    """Reads a step's record and compares names, shapes and dtypes, before any array is read."""
    from orbax.checkpoint import v1 as ocp

    try:
        with _quiet(), _alone():
            metadata = ocp.checkpointables_metadata(path.absolute())
        custom, stored = metadata.custom_metadata, metadata.metadata["state"]
        stored = {name: (tuple(m.shape), np.dtype(m.dtype)) for name, m in stored.items()}
    except Exception as error:  # as above
        raise UserError(f"checkpoint {path} cannot be read ({_reason(error)})") from error
    known = isinstance(custom, dict) and custom.get("format") == FORMAT
    if not known or not isinstance(custom.get("record"), dict) or not isinstance(custom.get("digest"), str):
        raise UserError(f"checkpoint {path} is not one of celo-nnx (no {FORMAT!r} record)")
    wanted = {k: _shape_dtype(v) for k, v in like.items()}
    wanted = {k: v for k, v in wanted.items() if math.prod(v[0])}
    if missing := sorted(wanted.keys() - stored.keys()):
        raise UserError(f"checkpoint {path} lacks {missing[0]!r} ({len(missing)} missing)")
    if extra := sorted(stored.keys() - wanted.keys()):
        raise UserError(f"checkpoint {path} has the unknown leaf {extra[0]!r} ({len(extra)} unknown)")
    for name, (shape, dtype) in wanted.items():
        if stored[name] != (shape, dtype):
            found = f"{stored[name][1]}{list(stored[name][0])}"
            raise UserError(f"checkpoint {path}: {name!r} is {found}, expected {dtype}{list(shape)}")
    return custom["record"], custom["digest"]


def _shape_dtype(leaf: Any) -> tuple[tuple[int, ...], np.dtype]:
    if _is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return tuple(np.shape(leaf)), np.dtype(jax.dtypes.canonicalize_dtype(leaf.dtype))


def _typed(array: np.ndarray, like: Any) -> Any:
    """A PRNG key again where one is wanted; the rest stays on the host, for the program to place."""
    if not _is_key(like):
        return array
    impl: list[Any] = []
    jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), like)  # a shape alone has no key_impl
    return jax.random.wrap_key_data(array, impl=str(impl[0]))


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause: Orbax wraps the one that says something."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]


def _alone() -> Any:
    """Has Orbax read in this process without waiting for the others, which may have failed already."""
    from orbax.checkpoint import v1 as ocp

    me, context = jax.process_index(), ocp.Context()
    context.multiprocessing.primary_host, context.multiprocessing.active_processes = me, {me}
    return context


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what Orbax prints about a damaged file off the terminal: the raised error says it in one line.

    When one array cannot be read, Orbax closes its event loop while the reads of the others are under way.
    Each of those reports "Event loop is closed" through the unraisable hook, at any time later, so the hook
    stays; and asyncio logs their errors when they are collected as garbage.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    if not isinstance(sys.unraisablehook, _Swallow):
        sys.unraisablehook = _Swallow(sys.unraisablehook)
    try:
        yield
    except Exception as error:
        _forget(error)
        time.sleep(0.1)
        gc.collect()
        raise
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _forget(error: BaseException | None) -> None:
    """Drops the frames of an error and its causes, which hold what failed from being collected."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


class _Swallow:
    """An unraisable hook that passes on all but what a closed event loop leaves behind."""

    def __init__(self, hook: Callable[[Any], Any]) -> None:
        self._hook = hook

    def __call__(self, unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            self._hook(unraisable)
