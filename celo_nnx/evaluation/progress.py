"""How far a list of jobs is: a bar with the time left on a terminal, elsewhere a line for each."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence

from celo_nnx.meta.runlog import clock


class Progress:
    """Tells on stderr what is under way, what was done, and how long the rest may take.

    Args:
      work: how long each job is, in any unit.
      before: jobs that were done earlier, for counting.

    Example:
      >>> with Progress([1.0, 2.0]) as progress:
      ...     progress.start("one")
      ...     progress.done("one: 0.5")  # printed on stderr
    """

    def __init__(self, work: Sequence[float], before: int = 0) -> None:
        self._work, self._before, self._number = list(work), before, 0
        self._begin, self._bar = time.monotonic(), None

    def __enter__(self) -> Progress:
        self._begin = time.monotonic()
        if self._work and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = "{task.description}", "left {task.fields[left]}"
            shown = [BarColumn(24), *(TextColumn(column) for column in columns)]
            self._bar = Bar(*shown, console=Console(stderr=True))
            self._job = self._bar.add_task("", total=sum(self._work), left="?")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, what: str) -> None:
        """Says what is under way; only a terminal shows it."""
        if self._bar is not None:
            self._bar.update(self._job, description=f"{self._count(1)} {what}")

    def done(self, what: str) -> None:
        """Prints a line about the job that has ended."""
        self._number += 1
        done = sum(self._work[: self._number])
        rest = sum(self._work) - done
        left = clock(rest / done * (time.monotonic() - self._begin) if done else math.inf)
        line = f"{self._count()} {what}"
        if self._bar is None:
            print(f"{line}  left {left}", file=sys.stderr, flush=True)
        else:
            self._bar.console.print(line, markup=False, highlight=False)
            self._bar.update(self._job, completed=done, left=left)

    def _count(self, ahead: int = 0) -> str:
        total = self._before + len(self._work)
        return f"[{self._before + self._number + ahead:{len(str(total))}d}/{total}]"
