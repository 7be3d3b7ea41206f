"""Files as data: JSON and arrays read within limits, files whole or not there, nothing overwritten."""

from __future__ import annotations

import contextlib
import json
import math
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from celo_nnx.errors import UserError, require

if TYPE_CHECKING:
    import numpy as np

LARGEST = 64 * 2**20  # bytes of a JSON file


@contextlib.contextmanager
def told(path: object) -> Iterator[None]:
    """Turns what the system says of a path (no permission, name too long, disk full) into one line."""
    try:
        yield
    except OSError as error:
        text = error.strerror or type(error).__name__
        raise UserError(f"{str(path)[:200]} cannot be read or written: {text}") from None


def read_json(path: Path) -> Any:
    """Returns the file's JSON value, None where there is no file.

    Raises:
      UserError: unreadable, too large, or not JSON.
    """
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise UserError(f"{path} has {size} bytes, at most {LARGEST} are read")
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error})".replace("\n", " ")) from error


def read_npz(path: Path, largest: int) -> dict[str, np.ndarray]:
    """Returns the plain arrays of an npz file.

    Args:
      path: the file.
      largest: bytes of all arrays together, at most.

    Raises:
      UserError: damaged, too large, or an array of objects, which is never loaded; one line.
    """
    import numpy as np

    try:
        with zipfile.ZipFile(path) as members:
            listed = members.infolist()
            size = sum(member.file_size for member in listed)
            require(size <= largest, f"size of the arrays in {path}", size, f"at most {largest} bytes")
            for member in listed:
                _check_header(members, member)
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except UserError:
        raise
    # What zipfile, zlib and numpy raise on bytes that are not what they claim to be has no common class.
    except Exception as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is damaged or not a readable npz of plain arrays: {text}") from None


def _check_header(members: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Raises a ValueError unless a member is a plain array of as many bytes as its header says.

    numpy takes the memory that a header asks for before it looks at how much there is.
    """
    from numpy.lib import format

    read = {(1, 0): format.read_array_header_1_0, (2, 0): format.read_array_header_2_0}
    with members.open(member) as file:
        version = format.read_magic(file)
        if version not in read:
            raise ValueError(f"{member.filename!r} is of format version {version}")
        shape, _, dtype = read[version](file)
        if dtype.hasobject:
            raise ValueError(f"{member.filename!r} holds pickled objects, which are never loaded")
        size = file.tell() + math.prod(shape) * dtype.itemsize
    if size != member.file_size:
        raise ValueError(f"{member.filename!r} has {member.file_size} bytes, {size} for shape {list(shape)}")


def parse_json(text: str, where: str) -> dict[str, Any]:
    """Returns the JSON object of a text that came with a file.

    Raises:
      UserError: it is not one; the line begins with ``where``.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not readable JSON ({error})"[:300].replace("\n", " ")) from None
    if not isinstance(value, dict):
        raise UserError(f"{where} is not a JSON object")
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is the old one or the new one, whole."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def refuse_existing(path: Path) -> None:
    """Raises a :class:`UserError` where a file would be overwritten or has no folder to lie in."""
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists; name a new file")
    if not path.absolute().parent.is_dir():
        raise UserError(f"no folder {path.parent} for {path.name}")


def write_new(path: Path, data: bytes) -> None:
    """Writes a file that did not exist, whole: it appears under its name when all bytes are on disk.

    Raises:
      UserError: the file exists, or its folder does not.
    """
    refuse_existing(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
