"""The local engine: cells as processes, a number of them at a time, cores and GPUs shared out.

An engine takes cell folders and returns when each has its result, has failed for good, or ``stop`` asks it
to. It judges a cell by its folder alone, so that another engine only has to submit ``celo-nnx grid cell DIR``
and to look at the same files.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from celo_nnx.devices import cores
from celo_nnx.errors import UserError, require
from celo_nnx.grids.judge import Judge, Tell, check_retries, last_words
from celo_nnx.grids.store import LOG_NAME, CellFolder

LOOK = 0.1  # seconds between two looks at the processes
PATIENCE = 300.0  # seconds that a process has to finish its dispatch and save


class Engine(Protocol):
    """Runs cells; see the module's docstring."""

    def __call__(self, folders: Sequence[CellFolder], stop: Callable[[], int], tell: Tell) -> None:
        """Submits cells and waits for them.

        Args:
          folders: all cells of the grid, each with its ``cell.json``; those with a result are left alone.
          stop: a true value has the engine stop its processes, which save, and return.
          tell: called with ``"started"`` or ``"submitted"``, ``"done"``, ``"damaged"``, ``"retried"``,
            ``"failed"`` or ``"adopted"``.
        """


def cell_command(path: Path) -> list[str]:
    """Returns the command line of one cell."""
    return [sys.executable, "-m", "celo_nnx", "grid", "cell", str(path)]


@dataclasses.dataclass(frozen=True)
class Slot:
    """What one of the processes at a time may use.

    Attributes:
      cores: of the CPU; empty for all.
      environment: variables that say which GPUs.
    """

    cores: tuple[int, ...]
    environment: Mapping[str, str]


@dataclasses.dataclass
class _Active:
    folder: CellFolder
    slot: Slot
    process: subprocess.Popen | None  # None for one that an earlier driver has left
    starts: int


@dataclasses.dataclass
class Local:
    """A pool of processes.

    Cores and GPUs are shared out by ``jobs`` and the size of the grid, not by what is left to do: a cell
    that is run after an interruption has as many as without one, and so the same result.

    Attributes:
      jobs: how many cells at a time.
      retries: how many more attempts a cell has that fails or dies.
      command: of one cell.

    Raises:
      UserError: a number out of range.
    """

    jobs: int = 1
    retries: int = 2
    command: Callable[[Path], list[str]] = cell_command

    def __post_init__(self) -> None:
        """Checks the numbers."""
        require(1 <= self.jobs <= 1024, "--jobs", self.jobs, "an integer from 1 to 1024")
        check_retries(self.retries)

    def __call__(self, folders: Sequence[CellFolder], stop: Callable[[], int], tell: Tell) -> None:
        """See :class:`Engine`."""
        waiting = deque(folder for folder in folders if not folder.has_result())
        free = deque(slots(min(self.jobs, max(1, len(folders)))))
        judge = Judge(self.retries, tell)
        active: list[_Active] = []
        try:
            while (waiting or active) and not stop():
                while waiting and free:
                    active.append(self._start(waiting.popleft(), free.popleft(), tell))
                for one in [one for one in active if _ended(one)]:
                    active.remove(one)
                    free.append(one.slot)
                    reason = None if one.process is None else lambda one=one: _ending(one)
                    if judge(one.folder, one.starts, reason):
                        waiting.append(one.folder)
                time.sleep(LOOK)
        finally:
            _stop(active)

    def _start(self, folder: CellFolder, slot: Slot, tell: Tell) -> _Active:
        """Starts a cell's process; one that an earlier driver's process still works at is waited for."""
        if folder.held():
            tell("adopted", folder)
            return _Active(folder, slot, None, folder.starts())
        starts = folder.starts()
        with open(folder.path / LOG_NAME, "ab") as log, _on_cores(slot.cores):
            process = subprocess.Popen(
                self.command(folder.path),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | slot.environment,
                start_new_session=True,  # Ctrl-C is for the driver, which passes it on once
            )
        tell("started", folder)
        return _Active(folder, slot, process, starts)


def _ended(one: _Active) -> bool:
    return not one.folder.held() if one.process is None else one.process.poll() is not None


def _ending(one: _Active) -> str:
    """How a process ended that noted no reason itself, with the last words of its log."""
    assert one.process is not None
    code = one.process.returncode
    if code < 0:
        try:
            what = f"ended by {signal.Signals(-code).name}"
        except ValueError:
            what = f"ended by signal {-code}"
        return what
    if code == 0:
        return "stopped from outside"
    return f"exit code {code}: {last_words(one.folder)}"


def _stop(active: Sequence[_Active]) -> None:
    """Has the processes save and end, those too that an earlier driver has left."""
    for one in active:
        pid = one.folder.pid() if one.process is None else one.process.pid
        if pid and (one.process is None or one.process.poll() is None):
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                continue
            except PermissionError as error:
                raise UserError(f"cannot stop process {pid}: {error.strerror}") from None
    end = time.monotonic() + PATIENCE
    while any(not _ended(one) for one in active) and time.monotonic() < end:
        time.sleep(LOOK)
    for one in active:
        if one.process is not None and one.process.poll() is None:
            one.process.kill()
            one.process.wait()


def slots(jobs: int) -> list[Slot]:
    """Shares cores and GPUs out evenly, so that a cell's devices do not depend on its turn.

    Where there are fewer of them than jobs, several jobs share one.

    Args:
      jobs: how many at a time.

    Example:
      >>> len(slots(2))
      2
    """
    own = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(cores()))
    gpus = visible_gpus(os.environ)
    out = []
    for i in range(jobs):
        environment: dict[str, str] = {}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(_part(gpus, i, jobs))
            sharing = -(-jobs // len(gpus))
            if sharing > 1 and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
                environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / sharing:.3f}"
        out.append(Slot(tuple(_part(own, i, jobs)), environment))
    return out


def _part(things: Sequence[Any], i: int, count: int) -> Sequence[Any]:
    """The i-th of as many parts of one size."""
    size = max(1, len(things) // count)
    begin = i * size % len(things)
    return things[begin : begin + size]


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Returns the names of NVIDIA GPUs that a process may use, without starting a driver.

    Example:
      >>> visible_gpus({"CUDA_VISIBLE_DEVICES": "2,3"}), visible_gpus({"CUDA_VISIBLE_DEVICES": ""})
      (['2', '3'], [])
    """
    if "CUDA_VISIBLE_DEVICES" in environment:
        return [name for name in environment["CUDA_VISIBLE_DEVICES"].split(",") if name.strip()]
    return sorted((path.removeprefix("/dev/nvidia") for path in glob.glob("/dev/nvidia[0-9]*")), key=int)


@contextmanager
def _on_cores(wanted: Sequence[int]) -> Iterator[None]:
    """A process that this thread starts inside inherits the cores; JAX counts those."""
    if not wanted or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, wanted)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
