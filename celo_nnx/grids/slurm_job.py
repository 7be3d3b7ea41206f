"""What runs inside a Slurm job: the command of one cell, asked to save before its time is over."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import Any

LEFT = 10.0  # seconds of the warning that are left for Slurm to requeue the job


class CellJob:
    """Runs a cell's command as a process of its own, so that a signal is answered while it compiles.

    Submitit pickles this and calls it in the job. At the time limit Slurm sends SIGUSR2, upon which submitit
    calls :meth:`checkpoint` and requeues the job; whatever else ends it, the cell goes on from its own
    checkpoint when the job runs again.

    Args:
      command: of the cell.
      log: file that gets what it prints.
      warning: seconds between SIGUSR2 and the end of the job.
    """

    def __init__(self, command: Sequence[str], log: str, warning: float) -> None:
        self.command, self.log, self.warning = list(command), log, warning
        self._process: subprocess.Popen | None = None

    def __call__(self) -> int:
        """Returns the command's exit code."""
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Slurm signals every process of the step; unasked, this one would be ended by it.
                preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
            )
        return self._process.wait()

    def checkpoint(self) -> Any:
        """Has the process save and end; returns what submitit is to run next time."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None and not self._ended():
            self._process.terminate()
            end = time.monotonic() + max(1.0, self.warning - LEFT)
            while not self._ended() and time.monotonic() < end:
                time.sleep(0.1)
            if not self._ended():
                self._process.kill()  # it goes on from its last checkpoint
        return DelayedSubmission(CellJob(self.command, self.log, self.warning))

    def _ended(self) -> bool:
        """Whether the command has ended, asked of the system: ``Popen`` cannot say it inside its own wait."""
        assert self._process is not None
        try:
            options = os.WEXITED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self._process.pid, options) is not None
        except ChildProcessError:
            return True
