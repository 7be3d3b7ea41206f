"""Files as data: JSON read within limits, and files that are whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from celo_nnx.errors import UserError

LARGEST = 64 * 2**20  # bytes of a JSON file


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
