"""The sizes and SHA-256 of a folder's files, kept beside them: a damaged file is known by its name.

A folder may lack it, as one that was made before there was any, or whose process was killed right after the
files: it is then checked by other means. Names are compared with those on disk, and never opened.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from celo_nnx.errors import UserError, printable
from celo_nnx.files import read_json, told, write_json

FILE_NAME = "files.json"
Entry = list[int | str]  # size, SHA-256


def write(folder: Path) -> None:
    """Writes the manifest of a folder that is complete."""
    files = {name: _entry(path) for name, path in _files(folder).items()}
    write_json(folder / FILE_NAME, {"files": files, "digest": _digest(files)})


def check(folder: Path) -> None:
    """Compares the files with the manifest, sizes before contents.

    Raises:
      UserError: a file is missing, has another size or other contents; one line that names it.
    """
    path = folder / FILE_NAME
    content = read_json(path)
    if content is None:
        return
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or content.get("digest") != _digest(files):
        raise UserError(f"{path} is damaged: it does not match its own digest")
    there = _files(folder)
    if missing := sorted(files.keys() - there.keys()):
        raise UserError(f"{folder / printable(missing[0])} is missing")
    with told(folder):
        for name in sorted(files):
            size, found = files[name][0], there[name].stat().st_size
            if size != found:
                raise UserError(f"{there[name]} is damaged: it has {found} bytes, {size} were written")
        for name in sorted(files):
            if _entry(there[name]) != files[name]:
                raise UserError(f"{there[name]} is damaged: its SHA-256 is not that of what was written")


def _files(folder: Path) -> dict[str, Path]:
    """The files by their path below the folder, the manifest left out."""
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: path for name, path in found.items() if not name.startswith(FILE_NAME)}


def _entry(path: Path) -> Entry:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _digest(files: dict[str, Entry]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
