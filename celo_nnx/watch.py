"""Follows runs in a terminal: curves, losses of the families, non-finite counts, time left. Needs no JAX.

Everything is drawn from what a run folder holds; what is shown of it passes through ``printable``, and
nothing is markup.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from celo_nnx.errors import printable, require
from celo_nnx.meta.runlog import clock, speed
from celo_nnx.run_folder import RunFolder
from celo_nnx.series import SHARE, WINDOW, mean, resampled, running_mean

COLORS = {"starting": "cyan", "running": "green", "interrupted": "red", "finished": "bold green"}
BLOCKS = "▁▂▃▄▅▆▇█"
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of a braille cell: left, right, from above


def watch(paths: Sequence[str], *, every: float = 1.0, once: bool = False) -> None:
    """Shows runs until they are finished or Ctrl-C; without a terminal once, as plain text.

    Args:
      paths: run folders. One is shown in full, several as a table.
      every: seconds between two looks.
      once: show and end.

    Raises:
      UserError: a folder is not that of a run.

    Example:
      >>> watch(["runs/a"], once=True)  # doctest: +SKIP
    """
    require(0.1 <= every <= 3600, "every", every, "a number of seconds from 0.1 to 3600")
    with contextlib.suppress(AttributeError):  # a stream of another encoding shows "?"
        sys.stdout.reconfigure(errors="replace")
    with contextlib.suppress(KeyboardInterrupt):
        runs, console = [RunFolder(path) for path in paths], Console(highlight=False)
        if once or not sys.stdout.isatty():
            console.print(picture(runs, console))
            return
        with Live(console=console, auto_refresh=False) as display:
            while True:
                display.update(picture(runs, console), refresh=True)
                if all(run.state() == "finished" for run in runs):
                    return
                time.sleep(every)
                for run in runs:
                    run.read()


def picture(runs: Sequence[RunFolder], console: Console) -> RenderableType:
    """What is shown of runs now, to fit a console."""
    now = time.time()
    if len(runs) == 1:
        return full(runs[0], now, console.width, console.height)
    return table(runs, now, console.width)


def full(run: RunFolder, now: float, width: int, height: int) -> RenderableType:
    """One run: how it stands, the curve of its meta-loss, its losses by family.

    Args:
      run: as last read.
      now: seconds since the epoch.
      width, height: of the terminal, in characters.
    """
    losses = run.metrics.families("family_loss")
    room = max(4, height - 10)
    shown = dict(list(losses.items())[: max(1, room - 6)])
    parts: list[RenderableType] = [heading(run, now), *notes(run)]
    if len(run.metrics) > 1:
        smooth = running_mean(run.metrics["loss"], max(1, len(run.metrics) // SHARE))
        lines = curve(smooth, width, min(12, max(4, room - len(shown) - 2)), run.metrics["iteration"])
        parts += ["", Text("\n".join(lines), no_wrap=True)]
    if len(run.metrics):
        parts += ["", _families(run, shown)]
    if len(shown) < len(losses):
        parts.append(Text(f"and {len(losses) - len(shown)} families more", style="dim"))
    return Group(*parts)


def heading(run: RunFolder, now: float) -> Text:
    """Two lines: name, state, phase; iterations, speed, time left, age of what was last heard."""
    state, rate = run.state(now), run.rate()
    text = Text.assemble((run.name, "bold"), "  ", (state, COLORS[state]))
    if run.phase:
        text.append(f"  phase {run.phase}")
    share = f" ({run.iteration / run.total:.1%})" if run.total else ""
    text.append(f"\niteration {run.iteration:,} of {run.total:,}{share}")
    if state == "running":
        text.append(f"  {speed(rate if rate == rate else 0)} it/s  left {left(run, rate)}")
    if state != "finished" and not math.isnan(run.wrote()):
        text.append(f"  last heard of {clock(max(0.0, now - run.wrote()))} ago")
    return text


def notes(run: RunFolder) -> list[Text]:
    """What else is worth a line: resumptions, lines of the log that are no rows."""
    out = []
    resumed = [start.iteration for start in run.starts[1:]]
    if resumed:
        times = "once" if len(resumed) == 1 else f"{len(resumed):,} times"
        out.append(Text(f"resumed {times}, last from iteration {resumed[-1]:,}"))
    out += [Text(line, style="yellow") for line in run.metrics.spoiled()]
    if run.metrics.bad:
        out.append(Text(f"{run.metrics.bad:,} lines of metrics.jsonl are not rows", style="yellow"))
    return out


def left(run: RunFolder, rate: float) -> str:
    """The time left at a speed, ``?`` while that is unknown."""
    return clock((run.total - run.iteration) / rate if rate > 0 else math.inf)


def recent(values: np.ndarray) -> tuple[float, float]:
    """Returns (mean of the last iterations, change against as many before them).

    Example:
      >>> recent(np.array([3.0, 3.0, 2.0, 1.0]))
      (1.5, -1.5)
    """
    window = max(1, min(WINDOW, len(values) // 2))
    now = mean(values[-window:])
    return now, now - mean(values[-2 * window : -window])


def _families(run: RunFolder, losses: dict[str, np.ndarray]) -> Table:
    """Meta-loss and family losses with their change, non-finite counts, and sparklines."""
    counts = run.metrics.families("nonfinite")
    window = max(1, min(WINDOW, len(run.metrics) // 2))
    grid = _grid("loss" if window == 1 else f"mean of {window}", "loss", "change", "non-finite", "course")
    total = int(sum(np.nansum(column) for column in counts.values()))
    grid.add_row(*_cells("meta-loss", run.metrics["loss"], total), style="bold")
    for name, values in losses.items():
        own = int(np.nansum(counts[name])) if name in counts else 0
        grid.add_row(*_cells(printable(name), values, own))
    return grid


def _cells(name: str, values: np.ndarray, nonfinite: int, width: int = 24) -> tuple[Text, ...]:
    now, change = recent(values)
    course = sparkline(running_mean(values, max(1, len(values) // SHARE)), width)
    return Text(name), Text(_loss(now)), _change(change), _count(nonfinite), Text(course)


def _grid(first: str, *others: str, gap: int = 2) -> Table:
    grid = Table(box=None, header_style="dim", pad_edge=False, padding=(0, gap, 0, 0))
    grid.add_column(first, overflow="ellipsis", no_wrap=True)
    for name in others:
        plain = name in ("course", "state")
        grid.add_column(name, justify="left" if plain else "right", no_wrap=True)
    return grid


def _loss(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "-"


def _change(value: float) -> Text:
    if not math.isfinite(value):
        return Text("-")
    return Text(f"{value:+.3g}", style="green" if value < 0 else "red" if value > 0 else "")


def _count(value: int) -> Text:
    return Text(f"{value:,}", style="yellow" if value else "")


def table(runs: Sequence[RunFolder], now: float, width: int) -> Table:
    """Several runs, one line each; a wide terminal has room for speed and change too."""
    wide = width >= 110
    more = ("it/s", "change") if wide else ()
    names = ("state", "iteration", "done", "left", "meta-loss", *more, "nan", "course")
    grid = _grid("run", *names, gap=2 if wide else 1)
    for run in runs:
        state, rate = run.state(now), run.rate()
        running = state == "running"
        total = int(sum(np.nansum(column) for column in run.metrics.families("nonfinite").values()))
        _, loss, change, nan, course = _cells("", run.metrics["loss"], total, 10)
        cells = {"meta-loss": loss, "change": change, "nan": nan, "course": course}
        cells |= {
            "state": Text(f"{state} {run.phase}" if run.phase and wide else state, style=COLORS[state]),
            "iteration": Text(f"{run.iteration:,}"),
            "done": Text(f"{run.iteration / run.total:.0%}" if run.total else "-"),
            "left": Text(left(run, rate) if running else "-"),
            "it/s": Text(speed(rate) if running and rate == rate else "-"),
        }
        grid.add_row(Text(_short(run.path, 28 if wide else 15)), *(cells[name] for name in names))
    return grid


def _short(path: Path, most: int) -> str:
    """The end of a path; runs beside each other differ there."""
    text = printable(str(path))
    return text if len(text) <= most else f"…{text[1 - most :]}"


def sparkline(values: np.ndarray, width: int) -> str:
    """Draws a series in one line of block characters; spaces are holes.

    Example:
      >>> sparkline(np.array([0.0, 1.0, 2.0, 7.0]), 4)
      '▁▂▃█'
    """
    values = resampled(values, width) if len(values) > width else values
    low, span = _range(values)
    level = [None if math.isnan(v) else min(7, int((v - low) / span * 8)) for v in values]
    return "".join(" " if i is None else BLOCKS[i] for i in level)


def _range(values: np.ndarray) -> tuple[float, float]:
    """Returns (lowest, highest - lowest) of the finite values; equal ones are in the middle of the range."""
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
    return (low, high - low) if high > low else (low - 0.5, 1.0)


def curve(values: np.ndarray, width: int, height: int, iterations: np.ndarray) -> list[str]:
    """Draws a series in braille dots, with its range at the left and its first and last iteration below.

    The scale is logarithmic where the highest value is ten times the lowest or more.

    Args:
      values: ``[n]``; NaN is a hole.
      width, height: characters in all, at least 20 and 3.
      iterations: ``[n]``, n at least 1.

    Returns:
      ``height`` lines.

    Example:
      >>> for line in curve(np.array([3.0, 2.0, 1.0]), 20, 4, np.array([1, 2, 3])):
      ...     print(line)
      3 ⠉⠒⠢⠤⣀⣀
              ⠉⠑⠒⠤⢄⣀
      1             ⠉⠉⠒⠢⠤⣀
        1                3
    """
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
    log = low > 0 and high >= 10 * low
    labels = {0: _loss(high), height - 2: _loss(low)} if high > low else {(height - 1) // 2: _loss(low)}
    if log:
        values = np.log(values)
    margin = max(map(len, labels.values())) + 1
    columns = max(1, width - margin)
    drawn = braille(resampled(values, 2 * columns), height - 1)
    out = [f"{labels.get(i, ''):>{margin - 1}} {line}".rstrip() for i, line in enumerate(drawn)]
    first, last = (f"{int(i):,}" for i in iterations[[0, -1]])
    middle = " logarithmic " if log else ""
    ends = f"{first}{middle:^{max(0, columns - len(first) - len(last))}}{last}"
    return [*out, f"{'':>{margin}}{ends}"]


def braille(values: np.ndarray, height: int) -> list[str]:
    """Draws a line through values, two to a character, in ``height`` lines of as many characters each."""
    low, span = _range(values)
    top = 4 * height - 1
    cells = np.zeros((height, (len(values) + 1) // 2), int)
    before = None
    for x, value in enumerate(values):
        if math.isnan(value):
            before = None
            continue
        y = round((1 - (value - low) / span) * top)
        # Down or up from the neighbour, so that a steep line has no holes.
        ys = [y] if before is None or before == y else range(y, before, 1 if before > y else -1)
        for dot in ys:
            cells[dot // 4, x // 2] |= DOTS[x % 2][dot % 4]
        before = y
    return ["".join(chr(0x2800 + cell) if cell else " " for cell in row) for row in cells.tolist()]
