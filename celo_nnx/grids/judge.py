"""What the end of a cell's process means: done, to be tried again, or failed for good."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from celo_nnx.errors import require
from celo_nnx.grids.store import LOG_NAME, CellFolder

Tell = Callable[[str, CellFolder], None]
TAIL = 1000  # bytes of a log that a reason quotes


class Judge:
    """Judges cells by their folders and counts their failures, for one call of an engine.

    Args:
      retries: how many more attempts a cell has that fails or dies, unless by a mistake of the user.
      tell: called with ``"done"``, ``"damaged"``, ``"retried"`` or ``"failed"``.
    """

    def __init__(self, retries: int, tell: Tell) -> None:
        self._retries, self._tell = retries, tell
        self._failures: dict[Path, int] = {}

    def __call__(self, folder: CellFolder, starts: int, reason: Callable[[], str] | None) -> bool:
        """Tells how a process ended.

        Args:
          folder: of its cell.
          starts: of the cell before it.
          reason: says why it ended, where it has noted nothing itself; None where nobody can know.

        Returns:
          Whether the cell is to be tried again.
        """
        if (state := folder.state()) in ("done", "damaged"):
            self._tell(state, folder)
            return False
        if folder.held():  # two drivers' processes have met; this one gave way
            return True
        noted = folder.failure() and folder.starts() > starts
        if reason is not None and not noted:
            folder.note("failed", error=reason())
        self._failures[folder.path] = self._failures.get(folder.path, 0) + 1
        again = self._failures[folder.path] <= self._retries and not folder.mistaken()
        self._tell("retried" if again else "failed", folder)
        return again


def check_retries(retries: int) -> None:
    """Refuses a number of retries out of range.

    Raises:
      UserError: it is not an integer from 0 to 100.
    """
    require(type(retries) is int and 0 <= retries <= 100, "--retries", retries, "an integer from 0 to 100")


def last_words(folder: CellFolder) -> str:
    """Returns the last line of a cell's log."""
    return last_line(folder.path / LOG_NAME) or "without a word"


def last_line(path: Path, but: str = "\n") -> str:
    """Returns the last line of a log, "" where there is none.

    Args:
      path: of the log.
      but: how lines begin that say nothing.
    """
    try:
        lines = path.read_bytes()[-TAIL:].decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line.strip() and not line.startswith(but)), "")
