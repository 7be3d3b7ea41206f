"""One process a run folder: an advisory lock that ends with its process, however the process ends."""

from __future__ import annotations

import contextlib
import os
import time
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

    path = directory / LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"cannot open the lock file {path}: {error.strerror}") from error
    try:
        try:
            _take(descriptor)
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


def _take(descriptor: int) -> None:
    """Locks now or not at all; :func:`held` of another process stands in the way for microseconds only."""
    import fcntl

    for patience in (0.02, 0.1, 0.0):
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not patience:
                raise
            time.sleep(patience)


def held(directory: Path) -> bool | None:
    """Tells whether a process holds the run folder, without writing there; None where that cannot be known.

    Example:
      >>> import tempfile
      >>> folder = Path(tempfile.mkdtemp())
      >>> with hold(folder):
      ...     inside = held(folder)
      >>> inside, held(folder)
      (True, False)
    """
    import fcntl

    try:
        descriptor = os.open(directory / LOCK_NAME, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
