"""One process a run folder: an advisory lock that ends with its process, however the process ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from celo_nnx.errors import UserError

LOCK_NAME = "lock"


@contextlib.contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Holds the run folder for this process.

    The kernel drops an ``flock`` when the last descriptor closes, so ``kill -9`` leaves nothing behind;
    the file stays, since removing it would let two processes lock two files of one name.

    Args:
      directory: the run folder, which exists.

    Yields:
      Nothing; the lock is held inside the ``with`` block.

    Raises:
      UserError: another process holds the folder, or the file system has no locks.

    Example:
      >>> import tempfile
      >>> with hold(Path(tempfile.mkdtemp())):
      ...     pass
    """
    import fcntl

    path = directory / LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"cannot open the lock file {path}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
            raise UserError(f"run directory {directory} is in use by pid {owner}") from None
        except OSError as error:
            raise UserError(f"cannot lock {path}: {error.strerror}; use a local file system") from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
        yield
    finally:
        os.close(descriptor)
