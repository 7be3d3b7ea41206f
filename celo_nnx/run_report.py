"""The report of a meta-training run: what ran, how it went and how to use it, as one HTML file.

Everything comes from the run folder as data: the optimizer is built with shapes alone, so no value in its
config can take memory, and all text is escaped.
"""

from __future__ import annotations

import base64
import datetime
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import markupsafe
import numpy as np

from celo_nnx.build import build
from celo_nnx.config import load, presets
from celo_nnx.description import describe
from celo_nnx.diagram import draw
from celo_nnx.errors import UserError, printable
from celo_nnx.evaluation import page, plots
from celo_nnx.evaluation.contenders import parts_of
from celo_nnx.evaluation.plots import Line
from celo_nnx.files import told
from celo_nnx.meta.runlog import clock
from celo_nnx.run_files import flat, resolve
from celo_nnx.run_folder import RunFolder, Start
from celo_nnx.series import SHARE, WINDOW, even, extremes, mean, running_mean
from celo_nnx.theta_io import FILE_NAME as THETA_NAME

FILE_NAME = "report.html"
POINTS = 1000  # of a curve
FAMILIES = 12  # curves of families in one picture
SPANS = 12  # rows of the course as numbers
EVENTS = 8  # dashed lines in a picture
STARTS = 20  # rows of the table of starts
SCALARS = ("loss", "gradient_norm", "update_norm", "theta_norm")


def write(run_dir: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Writes the report of a run, whatever its state.

    Args:
      run_dir: the run folder of ``celo-nnx train``.
      out: a new file; by default ``report.html`` in the run folder, where a newer report replaces an older.

    Returns:
      The file's path.

    Raises:
      UserError: the folder is not that of a run, or a file would be overwritten.

    Example:
      >>> write("runs/a")  # doctest: +SKIP
      PosixPath('runs/a/report.html')
    """
    run = RunFolder(run_dir)
    default = run.path / FILE_NAME
    path = default if out is None else Path(out)
    with told(path):
        page.refuse_foreign(path, default)
    try:
        text = html(run)
    except RecursionError:
        raise UserError(f"{run.path / 'config.json'} is nested too deeply to be shown") from None
    with told(path):
        return page.write(path, text)


def html(run: RunFolder, now: float | None = None) -> str:
    """Returns the page.

    Args:
      run: as last read.
      now: seconds since the epoch.
    """
    state = run.state(now)
    name = printable(run.path.absolute().name)
    description, drawing = described(made_for(run), name)
    preset, changed = compared(run.config)
    data = run.info.get("data")
    return page.render(
        "run_report.html",
        title=f"Meta-training run {name}",
        summary=summary(run, state),
        state=state,
        window=min(WINDOW, len(run.metrics)),
        losses=losses(run),
        figures=figures(run),
        spans=spans(run),
        usage=usage(run.path),
        times=times(run),
        starts=[_start_row(start) for start in run.starts[-STARTS:]],
        started=len(run.starts),
        description=description,
        drawing=drawing,
        preset=preset,
        changed=changed,
        config=[(printable(key), shown(value)) for key, value in flat(run.config).items()],
        data=[(printable(k), shown(v)) for k, v in data.items()] if isinstance(data, dict) else [],
    )


def summary(run: RunFolder, state: str) -> list[str]:
    """Where the run stands and how low its meta-loss is, in sentences."""
    begin = {
        "finished": "The run is finished:",
        "interrupted": "The run is not finished and nobody works at it:",
        "running": "The run is under way:",
        "starting": "The run is starting:",
    }[state]
    out = [f"{begin} {run.iteration:,} of {run.total:,} meta-iterations are done."]
    values = run.metrics["loss"]
    if not len(values):
        return [*out, "It has logged no meta-iteration yet."]
    window = min(WINDOW, len(values))
    last, first = mean(values[-window:]), mean(values[:window])
    if math.isfinite(last):
        out.append(
            f"The meta-loss averaged over the last {window} meta-iterations is {text(last)}; "
            f"over the first {window} it was {text(first)}."
        )
    else:
        out.append(f"No meta-loss of the last {window} meta-iterations is finite.")
    if count := sum(map(_total, run.metrics.families("nonfinite").values())):
        out.append(f"{count:,} inner losses were not finite.")
    out += run.metrics.spoiled()
    if run.metrics.bad:
        out.append(f"{run.metrics.bad:,} lines of metrics.jsonl are not rows and were left out.")
    return out


def losses(run: RunFolder) -> list[dict[str, str]]:
    """A row for the meta-loss and one for every family; none without metrics."""
    if not len(run.metrics):
        return []
    counts = {name: _total(column) for name, column in run.metrics.families("nonfinite").items()}
    window = min(WINDOW, len(run.metrics))

    def row(name: str, values: np.ndarray, count: int) -> dict[str, str]:
        first, last = mean(values[:window]), mean(values[-window:])
        change = f"{last - first:+.3g}" if math.isfinite(last - first) else "-"
        return dict(name=name, first=text(first), last=text(last), change=change, nonfinite=f"{count:,}")

    families = run.metrics.families("family_loss").items()
    out = [row("meta-loss", run.metrics["loss"], sum(counts.values()))]
    return out + [row(printable(name), values, counts.get(name, 0)) for name, values in families]


def _total(column: np.ndarray) -> int:
    return int(np.nansum(column))


def figures(run: RunFolder) -> list[dict[str, Any]]:
    """Title, SVG and caption of every picture that the log has numbers for."""
    x = run.metrics["iteration"]
    if len(x) < 2:
        return []
    window, happened = max(1, len(x) // SHARE), events(run)

    def smooth(name: str, values: np.ndarray, most: int = POINTS) -> Line:
        places = even(len(x), most)
        return Line(name, x[places], running_mean(values, window)[places])

    def raw(values: np.ndarray) -> Line:
        places = extremes(values, POINTS)
        return Line("", x[places], values[places], faint=True)

    out = []

    def add(title: str, caption: str, lines: Sequence[Line], y: str, marked: bool = False) -> None:
        if any(np.isfinite(line.y).any() for line in lines):
            figure = plots.course_figure(lines, y, happened if marked else ())
            svg = markupsafe.Markup(plots.to_svg(figure, f"course{'abcdef'[len(out)]}"))
            out.append({"title": title, "svg": svg, "caption": caption})

    mean_of = f"mean of {window:,} meta-iterations"
    loss = run.metrics["loss"]
    caption = (
        "Pale: single meta-iterations, where there are many the extremes of each stretch. Rare ones may lie "
    )
    caption += "beyond the picture." + (" Dashed: resumptions and phases." if happened else "")
    add("Meta-loss", caption, [raw(loss), smooth(mean_of, loss)], "meta-loss", True)
    families = run.metrics.families("family_loss")
    few = dict(list(families.items())[:FAMILIES])
    more = f" The first {FAMILIES} of {len(families)}." if len(few) < len(families) else ""
    share = max(50, 4 * POINTS // max(1, len(few)))
    lines = [smooth(printable(name)[:40], values, min(POINTS, share)) for name, values in few.items()]
    add("Losses of the families", f"Each is a {mean_of}.{more}", lines, "loss")
    norms = {"gradient": "gradient_norm", "update": "update_norm", "theta": "theta_norm"}
    lines = [smooth(name, run.metrics[column]) for name, column in norms.items()]
    add("Norms", f"Euclidean norms of the meta-gradient, the update and theta; {mean_of}.", lines, "norm")
    if sum(map(_total, counts := list(run.metrics.families("nonfinite").values()))):
        places = even(len(x), POINTS)
        line = Line("non-finite", x[places], np.cumsum(np.nansum(counts, axis=0))[places])
        add("Non-finite inner losses", "Counted from the start.", [line], "non-finite inner losses")
    at, seconds = run.seconds_each()
    if len(at) > 1:
        places, few = extremes(seconds, POINTS), even(len(at), POINTS)
        window = max(1, len(at) // SHARE)
        smoothed = Line(f"mean of {window:,} reports", at[few], running_mean(seconds, window)[few])
        lines = [Line("", at[places], seconds[places], faint=True), smoothed]
        add("Time of a meta-iteration", "Between reports, compilation left out.", lines, "seconds")
    return out


def events(run: RunFolder) -> list[tuple[int, str]]:
    """What a picture marks: the last resumptions and beginnings of phases, in the order of iterations."""
    resumed = [(start.iteration, "resumed") for start in run.starts if start.iteration > 0]
    phases = [(at, f"phase {printable(name)[:30]}") for at, name in run.metrics.phases if at > 1]
    return sorted([*resumed, *phases])[-EVENTS:]


def spans(run: RunFolder) -> list[tuple[str, list[str]]]:
    """The course in equal shares: which iterations, and means of the scalars."""
    iterations = run.metrics["iteration"]
    edges = np.unique(np.linspace(0, len(iterations), SPANS + 1).astype(int))
    columns = [run.metrics[name] for name in SCALARS]
    out = []
    for a, b in zip(edges[:-1], edges[1:], strict=True):
        name = f"{int(iterations[a]):,} to {int(iterations[b - 1]):,}"
        out.append((name, [text(mean(column[a:b])) for column in columns]))
    return out


def times(run: RunFolder) -> list[tuple[str, str]]:
    """How long the run took and a meta-iteration takes."""
    out = []
    if len(run.metrics):
        out.append(("Total, compilation included, of the meta-iterations in the log", clock(run.seconds())))
        out.append(("Last meta-iteration logged (UTC)", date(run.metrics["time"][-1])))
    each = run.seconds_each()[1]
    if len(each):
        out.append(("Median of a meta-iteration, between reports", f"{np.median(each):.3g} s"))
    return out


def _start_row(start: Start) -> list[str]:
    versions, devices = start.info.get("versions"), start.info.get("devices")
    kind = shown(devices)
    if isinstance(devices, dict) and {"count", "kind"} <= devices.keys():
        kind = f"{shown(devices['count'])} x {shown(devices['kind'])}"
    names = [f"{printable(k)} {shown(v)}" for k, v in versions.items()] if isinstance(versions, dict) else []
    flags = start.info.get("xla_flags")
    return [date(start.time), f"{start.iteration:,}", kind, ", ".join(names), shown(flags) if flags else "-"]


def usage(path: Path) -> str:
    """Python that makes an optax transformation of the run's theta."""
    return "\n".join(
        [
            "import json",
            "from celo_nnx.build import build",
            "from celo_nnx.theta_io import read_metadata",
            "",
            f"path = {str(path / THETA_NAME)!r}",
            'config = json.loads(read_metadata(path)["config"])',
            'optimizer = build(config["optimizer"], theta_init={"kind": "file", "path": path})',
            "tx = optimizer.as_optax(num_steps=1000)  # the length of your training run",
        ]
    )


def made_for(run: RunFolder) -> Any:
    """Returns the section ``optimizer`` that theta is for, its phase's; without theta the config's."""
    try:
        return parts_of(str(run.path / THETA_NAME))
    except UserError:
        return run.config.get("optimizer")


def described(section: Any, title: str) -> tuple[str, str]:
    """Builds an optimizer from the config's section, with shapes in place of arrays.

    Returns:
      The table of its parts and its drawing as a ``data:`` address; if it cannot be built, why and nothing.
    """
    made: list[str] = []

    def trace() -> int:
        optimizer = build(section)
        made.extend([describe(optimizer), draw(optimizer, title)])
        return 0

    try:
        jax.eval_shape(trace)
    except Exception as error:  # whatever another version or a damaged file holds, the rest is worth a report
        return f"the optimizer cannot be built here: {' '.join(str(error).split())[:500]}", ""
    drawing = base64.b64encode(made[1].encode("utf-8", "backslashreplace")).decode("ascii")
    return made[0], f"data:image/svg+xml;base64,{drawing}"


def compared(config: Mapping[str, Any]) -> tuple[str, list[tuple[str, str, str]]]:
    """Finds the built-in config that is nearest.

    Returns:
      Its name, and (key, value here, value there) where they differ.
    """
    known = presets()
    variants = {name: resolve(load(name)) for name, (_, whole) in known.items() if whole}
    variant = min(variants, key=lambda name: len(_differ(config, variants[name], "optimizer")))
    named = [f"{variant}:{name}" for name, (_, whole) in known.items() if not whole]
    tasks = {name: resolve(load(name)) for name in named}
    name = min(tasks, key=lambda name: len(_differ(config, tasks[name], "tasks")))
    rows = _differ(config, tasks[name])
    return name, [(printable(key), shown(mine), shown(theirs)) for key, mine, theirs in rows]


def _differ(
    mine: Mapping[str, Any], theirs: Mapping[str, Any], section: str = ""
) -> list[tuple[str, Any, Any]]:
    one, other = flat(mine), flat(theirs)
    rows = [(key, one.get(key, "(absent)"), other.get(key, "(absent)")) for key in one | other]
    return [row for row in rows if row[1] != row[2] and row[0].startswith(section)]


def shown(value: Any) -> str:
    """A JSON value as text."""
    return printable(value) if isinstance(value, str) and value else json.dumps(value)


def text(value: float) -> str:
    """A number to four digits, a dash for none.

    Example:
      >>> text(2.02834), text(float("nan"))
      ('2.028', '-')
    """
    return f"{value:.4g}" if math.isfinite(value) else "-"


def date(seconds: float) -> str:
    """Seconds since the epoch as a date, UTC.

    Example:
      >>> date(0.0), date(1e30)
      ('1970-01-01 00:00:00', '-')
    """
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return "-"
