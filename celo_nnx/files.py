"""Files as data: JSON read within limits, files that are whole or not there, nothing overwritten."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from celo_nnx.errors import UserError

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
