"""What runs inside a Slurm job: the command of one cell, asked to save before its time is over."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LOOK = 0.2  # seconds between two looks at the process
GRACE = 600.0  # seconds that a job whose cell has saved on SIGTERM waits for Slurm to end or requeue it
FRUITLESS = 3  # jobs in a row that may come to their time limit without having saved anything
LEFT = 10.0  # seconds of the warning that are left for Slurm to requeue the job


class CellJob:
    """Runs a cell's command as a process of its own, so that a signal is answered while it compiles.

    Submitit pickles this and calls it in the job. At the time limit Slurm sends SIGUSR2, upon which submitit
    calls :meth:`checkpoint` and requeues the job. SIGTERM, of a preemption or ``scancel``, is passed on.
    Whatever else ends it, the cell goes on from its own checkpoint when the job runs again.

    Args:
      command: of the cell.
      log: file in the cell's folder that gets what it prints.
      warning: seconds between SIGUSR2 and the end of the job.
      idle: jobs in a row before this one that have saved nothing.
    """

    def __init__(self, command: Sequence[str], log: str, warning: float, idle: int = 0) -> None:
        self.command, self.log, self.warning, self.idle = list(command), log, warning, idle
        self._process: subprocess.Popen | None = None
        self._before: list[tuple[str, int]] = []
        self._terminated = False

    def __call__(self) -> int:
        """Returns the command's exit code.

        Raises:
          RuntimeError: the cell was stopped by SIGTERM, and Slurm has neither ended nor requeued the job.
        """
        self._before = saved(self.log)
        signal.signal(signal.SIGTERM, self._pass_on)
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Slurm signals every process of the step; unasked, this one would be ended by it.
                preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
            )
        while not self._ended():
            time.sleep(LOOK)
        if self._terminated and not Path(self.log).with_name("result.json").exists():
            time.sleep(GRACE)  # an orderly end would tell Slurm that there is nothing to requeue
            raise RuntimeError("stopped by SIGTERM")
        return self._process.wait()

    def checkpoint(self) -> Any:
        """Has the process save and end; returns what submitit is to run next time.

        That is nothing where several jobs in a row have saved nothing: the next one would not either.
        """
        from submitit.helpers import DelayedSubmission

        self._send(signal.SIGTERM)
        end = time.monotonic() + max(1.0, self.warning - LEFT)
        while not self._ended() and time.monotonic() < end:
            time.sleep(LOOK)
        self._send(signal.SIGKILL)  # it goes on from its last checkpoint
        idle = self.idle + 1 if saved(self.log) == self._before else 0
        if idle == FRUITLESS:
            from celo_nnx.grids.store import CellFolder

            error = f"{idle} times in a row, the time limit came before anything was saved"
            CellFolder(Path(self.log).parent).note("failed", error=error)
            return None
        return DelayedSubmission(CellJob(self.command, self.log, self.warning, idle))

    def _pass_on(self, signum: int, frame: Any) -> None:
        self._terminated = True
        self._send(signum)

    # Handlers may interrupt what follows; Popen's own methods hold a lock that these would wait for.
    def _send(self, signum: int) -> None:
        if not self._ended():
            assert self._process is not None
            os.kill(self._process.pid, signum)  # the process is there until it is waited for

    def _ended(self) -> bool:
        if self._process is None or self._process.returncode is not None:
            return True
        try:
            options = os.WEXITED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self._process.pid, options) is not None
        except ChildProcessError:
            return True


def saved(log: str) -> list[tuple[str, int]]:
    """Lists what a cell has saved, by the file of its log: checkpoints, named by iteration, and evaluations.

    Returns:
      Paths and sizes.

    Example:
      >>> saved("nowhere/log")
      []
    """
    cell = Path(log).parent
    found = [*cell.glob("run/checkpoints/*"), *cell.glob("evaluation/**/*")]
    return sorted((str(one), one.stat().st_size) for one in found if one.exists())
