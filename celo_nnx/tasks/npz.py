"""Reads a data set from ``NAME.npz``: every header is checked before memory is taken."""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from celo_nnx.errors import UserError

KEYS = ("train_x", "train_y", "test_x", "test_y")
LIMIT_BYTES = 2**32
MAX_SIDE = 4096
MAX_CHANNELS = 16
MAX_CLASSES = 10_000
LAYOUT = "train_x, test_x uint8 [n, h, w] or [n, h, w, c]; train_y, test_y integer [n]"
# What zipfile, zlib and numpy raise on bytes that are not what they claim to be.
BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    ValueError,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
    MemoryError,
)


def read(path: Path) -> dict[str, np.ndarray]:
    """Reads and checks the four arrays of a data set.

    Args:
      path: the file; arrays as :data:`LAYOUT` says, labels ``0 .. classes-1``.

    Returns:
      The arrays by key, C-contiguous, images with a channel axis.

    Raises:
      UserError: one line naming the file, the key, what was expected and what was found.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(path, archive)
            shapes = {key: _checked_header(path, key, archive, members[key]) for key in KEYS}
            _check_agreement(path, shapes)
            arrays = {key: _array(path, key, archive, members[key]) for key in KEYS}
    except BROKEN as error:
        raise UserError(
            f"{path}: expected a numpy .npz file, found a damaged or other file ({_line(error)})"
        ) from None
    return check_labels(str(path), arrays)


def check_labels(where: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Checks that labels are class indices, and gives images their channel axis.

    Raises:
      UserError: a label below 0 or not below :data:`MAX_CLASSES`.
    """
    for key in ("train_y", "test_y"):
        low, high = int(arrays[key].min()), int(arrays[key].max())
        if low < 0 or high >= MAX_CLASSES:
            raise UserError(
                f"{where}: {key}: expected labels from 0 to {MAX_CLASSES - 1}, found {low} to {high}"
            )
    images = {key: arrays[key] for key in ("train_x", "test_x")}
    return arrays | {key: x[..., None] if x.ndim == 3 else x for key, x in images.items()}


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Returns the archive's entries by key, if they are the four and no others."""
    found = [entry.filename.removesuffix(".npy") for entry in archive.infolist()]
    if sorted(found) != sorted(KEYS):
        names = ", ".join(sorted(found)[:8]) or "none"
        raise UserError(f"{path}: expected exactly the arrays {', '.join(KEYS)} ({LAYOUT}), found {names}")
    return dict(zip(found, archive.infolist(), strict=True))


def _checked_header(
    path: Path, key: str, archive: zipfile.ZipFile, entry: zipfile.ZipInfo
) -> tuple[int, ...]:
    """Reads one array's header, checks type, shape and size, and returns the shape."""
    with archive.open(entry) as file:
        try:
            shape, dtype = _header(file)
        except (*BROKEN, RecursionError) as error:
            raise UserError(
                f"{path}: {key}: expected a .npy array, found something else ({_line(error)})"
            ) from None
        header_bytes = file.tell()
    if dtype.hasobject:
        raise UserError(f"{path}: {key}: expected plain numbers, found pickled objects (never loaded)")
    images = key.endswith("_x")
    good = dtype == np.uint8 and len(shape) in (3, 4) if images else dtype.kind in "iu" and len(shape) == 1
    if not good:
        expected = "uint8 [n, h, w] or [n, h, w, c]" if images else "integer [n]"
        raise UserError(f"{path}: {key}: expected {expected}, found {dtype} {list(shape)}")
    limits = (math.inf, MAX_SIDE, MAX_SIDE, MAX_CHANNELS)
    if any(not 1 <= n <= most for n, most in zip(shape, limits, strict=False)):
        legal = f"1 image or more, sides of 1 to {MAX_SIDE}, 1 to {MAX_CHANNELS} channels"
        raise UserError(f"{path}: {key}: expected {legal}, found shape {list(shape)}")
    size = math.prod(shape) * dtype.itemsize
    if size > LIMIT_BYTES:
        raise UserError(f"{path}: {key}: expected at most {LIMIT_BYTES} bytes, found {size}")
    if entry.file_size != header_bytes + size:
        stored = entry.file_size - header_bytes
        raise UserError(f"{path}: {key}: expected {size} bytes for shape {list(shape)}, found {stored}")
    return shape


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Reads (shape, dtype) of a .npy stream and leaves the stream at the data."""
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"format version {version}")
    shape, _, dtype = readers[version](file)
    return shape, dtype


def _check_agreement(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Checks that images and labels are equally many and that both splits have one image shape."""
    for split in ("train", "test"):
        images, labels = shapes[f"{split}_x"][0], shapes[f"{split}_y"][0]
        if images != labels:
            raise UserError(
                f"{path}: {split}_y: expected {images} labels, as {split}_x has images, found {labels}"
            )
    train, test = shapes["train_x"][1:], shapes["test_x"][1:]
    if train != test:
        raise UserError(
            f"{path}: test_x: expected images of shape {list(train)} as in train_x, found {list(test)}"
        )


def _array(path: Path, key: str, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    """Reads one array whose header was found good."""
    try:
        with archive.open(entry) as file:
            return np.ascontiguousarray(np.lib.format.read_array(file, allow_pickle=False))
    except BROKEN as error:
        raise UserError(
            f"{path}: {key}: expected a whole array, found damaged data ({_line(error)})"
        ) from None


def _line(error: BaseException) -> str:
    """Returns the message of a library's error as one short line."""
    return " ".join(str(error).split())[:160] or type(error).__name__
