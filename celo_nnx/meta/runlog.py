"""What a run tells: ``metrics.jsonl`` for programs, a progress line for people, optional sinks."""

from __future__ import annotations

import collections
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from celo_nnx.errors import UserError, is_integer

Row = dict[str, Any]
LONGEST = 2**20  # bytes of a line of metrics.jsonl
SCALARS = ("loss", "gradient_norm", "theta_norm", "update_norm")
FAULTS = ("nonfinite", "nonfinite_gradient", "nonfinite_theta")


def rows(
    metrics: dict[str, Any], start: int, count: int, families: Sequence[str], now: float, phase: str = ""
) -> list[Row]:
    """Turns one dispatch's metrics into rows, one a meta-iteration.

    Args:
      metrics: arrays ``[iterations, ...]`` of which the first ``count`` rows are valid.
      start: meta-iterations done before the dispatch.
      count: meta-iterations in it.
      families: names of the task families, in the order of ``family_loss``'s last axis.
      now: seconds since the epoch.
      phase: name of the phase, where the run has phases.

    Returns:
      Rows; a number that is not finite is None (JSON has no NaN). ``nonfinite`` counts the non-finite inner
      losses by family; where there are any, ``nonfinite_gradient`` the pairs, by family, whose estimate was
      left out of theta's gradient, and ``nonfinite_theta`` entries of theta and its gradient.
    """
    scalars = [name for name in SCALARS if name in metrics]
    result = []
    for i in range(count):
        row: Row = {"iteration": start + i + 1} | ({"phase": phase} if phase else {})
        row |= {name: finite(metrics[name][i]) for name in scalars}
        row["family_loss"] = dict(zip(families, map(finite, metrics["family_loss"][i]), strict=True))
        row["nonfinite"] = dict(zip(families, map(int, metrics["nonfinite"][i]), strict=True))
        if any(lost := [int(x) for x in metrics.get("nonfinite_gradient", {i: ()})[i]]):
            row["nonfinite_gradient"] = dict(zip(families, lost, strict=True))
        if entries := int(metrics.get("nonfinite_theta", {i: 0})[i]):
            row["nonfinite_theta"] = entries
        row["time"] = round(now, 3)
        result.append(row)
    return result


def finite(value: Any) -> float | None:
    """Returns the number, or None where it is not finite.

    Example:
      >>> finite(1.5), finite(float("nan"))
      (1.5, None)
    """
    number = float(np.asarray(value))
    return number if math.isfinite(number) else None


def read(path: Path, last: int | None = None) -> list[Row]:
    """Reads the rows of a metrics file up to iteration ``last``.

    The last line may be torn by a kill, and lines after a checkpoint are computed again after a resume:
    reading stops at the first line that is not whole or beyond ``last``.

    Args:
      path: the file; missing means no rows.
      last: the last iteration wanted, all where None.

    Returns:
      Rows, oldest first.
    """
    if not path.exists():
        return []
    result = []
    with open(path, encoding="utf-8", errors="replace") as file:
        while line := file.readline(LONGEST):
            row = parse(line)
            if row is None or (last is not None and row["iteration"] > last):
                break
            result.append(row)
    return result


def parse(line: str) -> Row | None:
    """Returns a line's row, None where it is torn or no row."""
    if not line.endswith("\n"):
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and is_integer(row.get("iteration")) else None


def trim(path: Path, last: int) -> int:
    """Cuts a metrics file after iteration ``last``, in place at one offset, so a kill in between is harmless.

    Returns:
      How many rows stay.
    """
    if not path.exists():
        return 0
    kept = end = 0
    with open(path, "rb+") as file:
        while raw := file.readline(LONGEST):
            row = parse(raw.decode("utf-8", "replace"))
            if row is None or row["iteration"] > last:
                break
            kept, end = kept + 1, end + len(raw)
        file.truncate(end)
    return kept


class Sink(Protocol):
    """Takes rows; what TensorBoard and Weights & Biases look like from here."""

    def write(self, row: Row) -> None: ...
    def close(self) -> None: ...


class RunLog:
    """The metrics file with its optional sinks and the progress display.

    Args:
      directory: the run folder.
      start: meta-iterations done; later rows of the file are cut.
      total: meta-iterations wanted.
      progress: show progress on stderr.
      tensorboard, wandb: also write there.
      name: the run's name at the sinks.

    Raises:
      UserError: a sink's package is not installed.
    """

    def __init__(
        self,
        directory: Path,
        start: int,
        total: int,
        *,
        progress: bool = True,
        tensorboard: bool = False,
        wandb: bool = False,
        name: str = "",
    ) -> None:
        self._sinks: list[Sink] = []
        if tensorboard:
            self._sinks.append(_tensorboard(directory, start))
        if wandb:
            self._sinks.append(_wandb(directory, name))
        path = directory / "metrics.jsonl"
        trim(path, start)
        self._file = open(path, "a", encoding="utf-8")
        self._progress = make_progress(start, total) if progress else None

    def write(self, new: Iterable[Row]) -> None:
        """Appends rows; they reach the operating system before this returns, so a kill cannot take them."""
        new = list(new)
        self._file.write("".join(json.dumps(row) + "\n" for row in new))
        self._file.flush()
        for sink in self._sinks:
            for row in new:
                sink.write(row)
        if self._progress and new:
            self._progress.show(new)

    def sync(self) -> None:
        """Puts the file on the disk, before a checkpoint says that its iterations are done."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file, the sinks and the display."""
        if self._progress:
            self._progress.close()
        for sink in self._sinks:
            sink.close()
        self._file.close()


class Counted:
    """A log that counts what was not finite, over the whole run, on the way to another log.

    Args:
      log: gets the rows.
      limit: how much is too much; 0 for nothing is, and then nothing is counted.
      before: the rows of earlier starts.
    """

    def __init__(self, log: RunLog | Silent, limit: int, before: Iterable[Row]) -> None:
        self._log, self._limit = log, limit
        self._counts: collections.Counter[str] = collections.Counter()
        self.sync, self.close = log.sync, log.close
        self._count(before)

    def write(self, new: Sequence[Row]) -> None:
        """Counts and passes on."""
        self._count(new)
        self._log.write(new)

    def _count(self, rows: Iterable[Row]) -> None:
        for row in rows if self._limit else ():
            for kind in FAULTS:
                found = row.get(kind)
                for name, count in found.items() if isinstance(found, dict) else [("theta", found)]:
                    self._counts[name] += count if isinstance(count, int) and count > 0 else 0

    def over(self) -> bool:
        """Whether it is too much."""
        return 0 < self._limit <= self._counts.total()

    def __str__(self) -> str:
        """How much there is, by family."""
        found = ", ".join(f"{name} {count:,}" for name, count in self._counts.most_common(5) if count)
        return f"{self._counts.total():,} numbers were not finite ({found})"


class Silent:
    """The log of a process that leaves writing to the first one."""

    def write(self, new: Iterable[Row]) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


def make_progress(start: int, total: int) -> Bar | Lines:
    """A bar on a terminal, plain lines elsewhere, of which the first comes before there is any figure."""
    if sys.stderr.isatty():
        return Bar(start, total)
    if start < total:
        print("compiling (about a minute)", file=sys.stderr, flush=True)
    return Lines(total)


class _Rate:
    """Recent meta-iterations a second; counts from the first report on, so compilation does not count."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, int]] = []

    def __call__(self, iteration: int) -> float:
        now = time.monotonic()
        self._marks = [*self._marks[-20:], (now, iteration)]
        then, first = self._marks[0]
        return (iteration - first) / max(now - then, 1e-9)


def clock(seconds: float) -> str:
    """Formats a time left.

    Example:
      >>> clock(75), clock(3 * 3600 + 60), clock(float("inf"))
      ('1:15', '3:01:00', '?')
    """
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def speed(rate: float) -> str:
    """Formats iterations a second; "-" until there are two reports to compare."""
    return f"{rate:.2f}" if rate else "-"


def mean_loss(new: Sequence[Row]) -> str:
    """The mean of the rows' finite meta-losses, as shown."""
    losses = [row["loss"] for row in new if row.get("loss") is not None]
    return f"{sum(losses) / len(losses):.4f}" if losses else "not finite"


class Lines:
    """A line every few seconds: meta-loss, iterations a second, time left."""

    def __init__(self, total: int, seconds: float = 5.0) -> None:
        self._rate, self._total, self._seconds = _Rate(), total, seconds
        self._next = 0.0

    def show(self, new: Sequence[Row]) -> None:
        """Prints the newest rows' state where the last line is old enough."""
        iteration = new[-1]["iteration"]
        rate = self._rate(iteration)
        if time.monotonic() >= self._next or iteration >= self._total:
            self._next = time.monotonic() + self._seconds
            left = clock((self._total - iteration) / rate if rate else math.inf)
            figures = f"meta-loss {mean_loss(new)}  {speed(rate)} it/s  left {left}"
            print(f"iteration {iteration}/{self._total}  {figures}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing to put away."""


class Bar:
    """A rich progress bar with the same figures."""

    def __init__(self, start: int, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = "meta-loss {task.fields[loss]}", "{task.fields[rate]} it/s", "left {task.fields[left]}"
        self._progress = Progress(
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(),
            *(TextColumn(column) for column in columns),
            console=Console(stderr=True),
        )
        self._rate, self._total = _Rate(), total
        self._task = self._progress.add_task("", total=total, completed=start, loss="-", rate="-", left="?")
        self._progress.start()

    def show(self, new: Sequence[Row]) -> None:
        """Moves the bar."""
        iteration = new[-1]["iteration"]
        rate = self._rate(iteration)
        left = clock((self._total - iteration) / rate if rate else math.inf)
        fields = {"loss": mean_loss(new), "rate": speed(rate), "left": left}
        self._progress.update(self._task, completed=iteration, **fields)

    def close(self) -> None:
        """Leaves the last state on the screen."""
        self._progress.stop()


def _flat(row: Row) -> dict[str, float]:
    flat = {}
    for name, value in row.items():
        for inner, number in value.items() if isinstance(value, dict) else [("", value)]:
            if number is not None and name not in ("iteration", "phase", "time"):
                flat[f"{name}/{inner}" if inner else name] = number
    return flat


def _tensorboard(directory: Path, start: int) -> Sink:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UserError("run.tensorboard needs tensorboardX: pip install 'celo-nnx[tb]'") from error
    writer = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)

    class TensorBoard:
        def write(self, row: Row) -> None:
            for name, number in _flat(row).items():
                writer.add_scalar(name, number, row["iteration"])

        def close(self) -> None:
            writer.close()

    return TensorBoard()


def _wandb(directory: Path, name: str) -> Sink:
    try:
        import wandb
    except ImportError as error:
        raise UserError("run.wandb needs wandb: pip install 'celo-nnx[wandb]'") from error
    try:
        run = wandb.init(project="celo-nnx", name=name, dir=str(directory), id=name, resume="allow")
    except wandb.errors.UsageError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"wandb cannot start ({reason}); WANDB_MODE=offline needs no account") from error

    class WeightsAndBiases:
        def write(self, row: Row) -> None:
            run.log(_flat(row), step=row["iteration"])

        def close(self) -> None:
            run.finish()

    return WeightsAndBiases()
