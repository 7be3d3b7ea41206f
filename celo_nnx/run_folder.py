"""What a run folder says: config, starts and metrics, read as data while the run goes on. Needs no JAX."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from celo_nnx import lock
from celo_nnx.errors import UserError, printable
from celo_nnx.files import read_json
from celo_nnx.meta.runlog import LONGEST, SCALARS, parse

FAMILIES = 256  # the most task families that are told apart
RECENT = 60.0  # seconds; where a file system has no locks, a run that wrote since then is taken to be alive
MARKS = 21  # reports that the speed is measured over


@dataclasses.dataclass(frozen=True)
class Start:
    """A start of the run, the first or a resumption.

    Attributes:
      time: seconds since the epoch.
      iteration: meta-iterations done before it.
      info: what else ``run_info.json`` says of it, such as versions and devices.
    """

    time: float
    iteration: int
    info: Mapping[str, Any]


class Metrics:
    """The rows of a growing ``metrics.jsonl`` as columns; :meth:`read` reads only what was appended.

    A torn last line waits for the next reading. A resumed run cuts its file back, and then everything is
    read anew. A line that is no row, or not after the row before it, is left out and counted.

    Args:
      path: the file; as long as it is missing there are no rows.

    Attributes:
      bad: how many lines were left out.
      phases: (iteration, name) of the first row of every phase, where rows name one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._clear()

    def _clear(self) -> None:
        self._offset, self._last = 0, b""
        self._columns = {name: array("d") for name in ("iteration", "time", "nonfinite_theta", *SCALARS)}
        self._families = {"family_loss": {}, "nonfinite": {}, "nonfinite_gradient": {}}
        self.bad = 0
        self.phases: list[tuple[int, str]] = []

    def __len__(self) -> int:
        return len(self._columns["iteration"])

    def __getitem__(self, name: str) -> np.ndarray:
        """A column, float64 ``[rows]``; NaN where a row has no number."""
        return np.array(self._columns[name])

    def families(self, name: str) -> dict[str, np.ndarray]:
        """The columns of ``family_loss``, ``nonfinite`` or ``nonfinite_gradient``, by family."""
        return {family: np.array(column) for family, column in self._families[name].items()}

    def spoiled(self) -> list[str]:
        """What else than inner losses was not finite, in sentences: estimates of pairs, theta."""
        lost = {k: int(np.nansum(x)) for k, x in self.families("nonfinite_gradient").items()}
        out = []
        if total := sum(lost.values()):
            named = ", ".join(f"{printable(k)} {count:,}" for k, count in lost.items() if count)
            out.append(
                f"{total:,} estimates of pairs were not finite and left out of the gradient ({named})."
            )
        if total := int(np.nansum(self["nonfinite_theta"])):
            out.append(f"{total:,} entries of theta or of its gradient were not finite.")
        return out

    @property
    def iteration(self) -> int:
        """The last row's meta-iteration, 0 without rows."""
        return int(self._columns["iteration"][-1]) if len(self) else 0

    def read(self) -> None:
        """Takes in what was appended since the last call.

        Raises:
          UserError: the file cannot be read or is not a metrics file.
        """
        if not self._path.exists():
            self._clear()
            return
        if not self._path.is_file():
            raise UserError(f"{self._path} is not a file")
        try:
            with open(self._path, "rb") as file:
                self._read(file)
        except OSError as error:
            raise UserError(f"{self._path} cannot be read: {error.strerror}") from error

    def _read(self, file: BinaryIO) -> None:
        file.seek(self._offset - len(self._last))
        if file.read(len(self._last)) != self._last:
            self._clear()
            file.seek(0)
        while line := file.readline(LONGEST):
            if not line.endswith(b"\n"):
                if len(line) == LONGEST:
                    raise UserError(
                        f"{self._path} is not a metrics file: a line is longer than {LONGEST} bytes"
                    )
                return
            self._offset, self._last = self._offset + len(line), line
            self._add(line)

    def _add(self, line: bytes) -> None:
        row = parse(line.decode("utf-8", "replace"))
        if row is None or not self.iteration < row["iteration"] < 2**53:
            self.bad += 1
            return
        rows = len(self)
        for name, column in self._columns.items():
            column.append(number(row.get(name)))
        for name, columns in self._families.items():
            values = row.get(name)
            values = values if isinstance(values, dict) else {}
            for family in values:
                if family not in columns:
                    columns[family] = array("d", [math.nan]) * rows
            if len(columns) > FAMILIES:
                raise UserError(f"{self._path} names more than {FAMILIES} task families")
            for family, column in columns.items():
                column.append(number(values.get(family)))
        phase = row.get("phase")
        if isinstance(phase, (str, int)) and (not self.phases or self.phases[-1][1] != str(phase)):
            self.phases.append((row["iteration"], str(phase)))


class RunFolder:
    """A run folder; :meth:`read` brings everything up to date.

    Args:
      path: the folder.

    Attributes:
      config: ``config.json``.
      info: ``run_info.json``, empty where there is none.
      starts: oldest first.
      metrics: the log.

    Raises:
      UserError: the folder is not that of a run.

    Example:
      >>> RunFolder("runs/a").metrics.iteration  # doctest: +SKIP
      1200
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.metrics = Metrics(self.path / "metrics.jsonl")
        self._seen: dict[str, Any] = {}
        self.read()

    def read(self) -> None:
        """Reads what has changed."""
        if not self.path.is_dir():
            what = "is a file" if self.path.exists() else "does not exist"
            raise UserError(f"{self.path} {what}; name the run folder of celo-nnx train")
        self.config = self._json("config.json")
        options = self.config.get("run") if isinstance(self.config, dict) else None
        total = options.get("iterations") if isinstance(options, dict) else None
        if type(total) is not int or not 0 <= total < 2**53:
            what = "holds no config.json" if self.config is None else "has a config.json of something else"
            raise UserError(f"{self.path} is not a run folder: it {what}")
        self.total: int = min(total, budget(self.config))
        self.metrics.read()
        info = self._json("run_info.json")
        self.info: dict[str, Any] = info if isinstance(info, dict) else {}
        starts = self.info.get("starts")
        self.starts = [s for x in (starts if isinstance(starts, list) else []) if (s := _start(x))]

    def _json(self, name: str) -> Any:
        """A file's JSON value, parsed again only when the file has changed."""
        path = self.path / name
        try:
            stat = path.stat()
        except OSError:
            return read_json(path)
        key = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        if self._seen.get(name, (None,))[0] != key:
            self._seen[name] = key, read_json(path)
        return self._seen[name][1]

    @property
    def name(self) -> str:
        """The folder's path as text for people."""
        return printable(str(self.path))

    @property
    def iteration(self) -> int:
        """Meta-iterations done, as far as the folder tells."""
        return self.metrics.iteration

    @property
    def phase(self) -> str:
        """The phase of the last row, empty where rows name none."""
        return printable(self.metrics.phases[-1][1]) if self.metrics.phases else ""

    def wrote(self) -> float:
        """When something was last heard of the run, in seconds since the epoch; NaN where nothing was."""
        rows = self.metrics["time"][-1:].tolist()
        return max([x for x in [*rows, *(s.time for s in self.starts[-1:])] if x == x], default=math.nan)

    def state(self, now: float | None = None) -> str:
        """Returns ``starting``, ``running``, ``interrupted`` or ``finished``.

        A process that works here holds the folder's lock, however it ends; without locks the age of the
        last row has to do.
        """
        now = time.time() if now is None else now
        alive = lock.held(self.path)
        if alive is None:
            alive = now - self.wrote() < RECENT
        if not alive:
            return "finished" if self.iteration >= self.total else "interrupted"
        row = self.metrics["time"][-1:]
        begun = self.starts[-1].time if self.starts else -math.inf
        return "running" if len(row) and not row[0] < begun else "starting"

    def segments(self) -> np.ndarray:
        """Returns for every row the number of its start, ``[rows]``; the clock tells them apart."""
        times = np.array([start.time for start in self.starts])
        return np.maximum(np.searchsorted(times, self.metrics["time"], side="right") - 1, 0)

    def marks(self) -> np.ndarray:
        """Returns the places of rows that end a report: all rows of a dispatch share one time."""
        times, segments = self.metrics["time"], self.segments()
        ends = (np.diff(times) != 0) | (np.diff(segments) != 0)
        return np.concatenate([np.flatnonzero(ends), [len(times) - 1]]) if len(times) else np.array([], int)

    def rate(self) -> float:
        """Returns recent meta-iterations a second of the last start; NaN until there are two reports."""
        marks, segments = self.marks(), self.segments()
        marks = marks[segments[marks] == segments[-1]][-MARKS:] if len(marks) else marks
        if len(marks) < 2:
            return math.nan
        time, iteration = (self.metrics[name][marks[[0, -1]]] for name in ("time", "iteration"))
        seconds = float(time[1] - time[0])
        return float(iteration[1] - iteration[0]) / seconds if seconds > 0 else math.nan

    def seconds_each(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns (iterations, seconds a meta-iteration) between the reports of each start, ``[reports]``."""
        marks, segments = self.marks(), self.segments()
        time, iteration = self.metrics["time"][marks], self.metrics["iteration"][marks]
        inside = np.diff(segments[marks]) == 0
        return iteration[1:][inside], (np.diff(time) / np.diff(iteration))[inside]

    def seconds(self) -> float:
        """Returns how long the run took: over its starts, from the start to its last row in the log."""
        times, total = self.metrics["time"], 0.0
        segments = self.segments()
        for i in np.unique(segments):
            if self.starts:
                total += max(0.0, float(np.nanmax(times[segments == i])) - self.starts[i].time)
            else:
                total += float(np.ptp(times[segments == i]))
        return total


def _start(entry: Any) -> Start | None:
    if not isinstance(entry, dict):
        return None
    moment, iteration = number(entry.get("time")), number(entry.get("iteration"))
    if not (math.isfinite(moment) and math.isfinite(iteration)):
        return None
    return Start(moment, int(iteration), {k: v for k, v in entry.items() if k not in ("time", "iteration")})


def budget(config: Mapping[str, Any]) -> float:
    """Returns how many meta-iterations the phases of a config allow; infinite where they have no end.

    Example:
      >>> budget({"meta": {"phases": [{"iterations": 5}, {"iterations": 3}]}})
      8
    """
    meta = config.get("meta")
    phases = meta.get("phases") if isinstance(meta, dict) else None
    sections = phases if isinstance(phases, list) else []
    counts = [section.get("iterations") if isinstance(section, dict) else None for section in sections]
    endless = not counts or any(type(count) is not int or count < 1 for count in counts)
    return math.inf if endless else sum(counts)


def number(value: Any) -> float:
    """Returns a JSON number, NaN for anything else.

    Example:
      >>> number(2), number("2"), number(None), number(True)
      (2.0, nan, nan, nan)
    """
    if type(value) not in (int, float):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan
