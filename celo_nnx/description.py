"""What an optimizer is made of: its parts with settings and sizes, as rows, as text, on a terminal."""

from __future__ import annotations

import dataclasses
import json
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from celo_nnx.build import GROUPS, PLAIN, SCALARS, SLOTS, find, parameters
from celo_nnx.errors import printable
from celo_nnx.interfaces import MetaParam
from celo_nnx.optimizer import LearnedOptimizer
from celo_nnx.settings import Settings
from celo_nnx.tensors import Tensors, tensor_paths

# Every slot in the order in which an update goes through them.
ORDER = (
    "clip",
    "accumulators",
    "features",
    "normalization",
    "context",
    "update_rule",
    "step",
    "orthogonalization",
    "output_normalization",
    "tracker",
    "rows",
    "schedule",
    "rate_scale",
    "routing",
    "routes",
)
NUMBERS = {  # what the numbers of a slot's parts count
    "accumulators": "averages",
    "features": "planes",
    "context": "numbers",
    "tracker": "numbers",
    "rows": "numbers",
}
SIDE = 1024  # of the tensor on which state is measured


@dataclasses.dataclass(frozen=True)
class Setting:
    """One key of a part's section, as text; ``changed`` where it is not the part's default."""

    key: str
    value: str
    changed: bool

    def __str__(self) -> str:
        return f"{self.key}={self.value}" if self.key else self.value


@dataclasses.dataclass(frozen=True)
class Row:
    """One part.

    Attributes:
      slot: a key of ``config.optimizer``.
      name: the part's among those of its slot; empty in a slot that holds one part.
      kind: its name in the table of parts.
      settings: all of them, in the constructor's order.
      width: how many planes or numbers it makes; None where that is no question.
      theta: number of its meta-parameters.
      state: bytes for each parameter of a tensor that it works on; None for parts that keep none.
    """

    slot: str
    name: str
    kind: str
    settings: tuple[Setting, ...]
    width: int | None = None
    theta: int = 0
    state: float | None = None


def rows(optimizer: LearnedOptimizer) -> list[Row]:
    """Returns a row for every part, in the order of :data:`ORDER`.

    Example:
      >>> from celo_nnx import load_optimizer
      >>> [(r.kind, r.width, r.theta) for r in rows(load_optimizer("celo2")) if r.slot == "accumulators"]
      [('factored', 3, 0), ('momentum', 3, 0), ('second_moment', 1, 0)]
    """
    config, widths, state = json.loads(optimizer.config), _widths(optimizer), state_bytes(optimizer)
    out = []
    for slot in ORDER:
        several = slot in GROUPS or slot == "features"
        for name, part in optimizer.named(slot).items() if several else [("", getattr(optimizer, slot))]:
            section = config[slot]
            if slot == "features":
                section = {"kind": name, **section["options"].get(name, {})}
            elif several:
                section = section[name]
            table = GROUPS.get(slot) or SLOTS.get(slot, slot)
            defaults = parameters(find(table, section["kind"]))
            leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(part, MetaParam)))
            out.append(
                Row(
                    slot,
                    name,
                    section["kind"],
                    tuple(_settings({k: v for k, v in section.items() if k != "kind"}, defaults)),
                    widths.get((slot, name)),
                    sum(leaf.size for leaf in leaves),
                    state.get((slot, name)),
                )
            )
    return out


def general(optimizer: LearnedOptimizer) -> dict[str, tuple[Setting, ...]]:
    """Returns what a config says besides parts, by key of ``config.optimizer``."""
    settings, out = optimizer.settings, {}
    for name, made in PLAIN.items():
        defaults = dataclasses.asdict(made())
        own = {k: v for k, v in dataclasses.asdict(getattr(settings, name)).items() if k != "given"}
        out[name] = tuple(_settings(own, defaults))
    for name in SCALARS:
        value = getattr(settings, name)
        out[name] = (Setting("", _text(value), value != getattr(Settings(), name)),)
    return out


def _settings(section: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[Setting]:
    for key, value in section.items():
        # A config that has been JSON has lists for tuples.
        changed = json.dumps(value, default=str) != json.dumps(defaults.get(key), default=str)
        yield Setting(key, _text(value), changed)


def _text(value: Any) -> str:
    """Returns a setting's value as one line.

    Example:
      >>> _text([0.9, 1e-8]), _text({"b1": 0.5}), _text("a\\x1b")
      ('(0.9, 1e-08)', '{b1: 0.5}', "'a\\\\x1b'")
    """
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_text(v) for v in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{k}: {_text(v)}' for k, v in value.items())}}}"
    if isinstance(value, float):
        return format(value, ".6g") if math.isclose(float(format(value, ".6g")), value) else repr(value)
    return printable(str(value))


def _widths(optimizer: LearnedOptimizer) -> dict[tuple[str, str], int]:
    """Returns how many planes or numbers the parts make that make any."""
    sizes = {n: getattr(a, "size", 1) for n, a in optimizer.named("accumulators").items()}
    out = {("accumulators", n): size for n, size in sizes.items()}
    out |= {("features", n): f.width(sizes) for n, f in optimizer.named("features").items()}
    sizes = sizes | {"loss": optimizer.tracker.width} | optimizer.schedule.sizes()
    for slot in ("context", "rows"):
        out |= {(slot, n): f.width(sizes) for n, f in optimizer.named(slot).items()}
    if optimizer.tracker.width:
        out["tracker", ""] = optimizer.tracker.width
    return out


def state_bytes(optimizer: LearnedOptimizer) -> dict[tuple[str, str], float]:
    """Returns bytes of state a parameter by (slot, name), as stored for a 1024 x 1024 tensor."""
    shape, stored = (SIDE, SIDE), optimizer.settings.state.init
    spec = Tensors(axes=optimizer.settings.tensors.axes).specs({"w": shape})["w"]

    def size(function: Callable[[], Any]) -> float:
        leaves = jax.tree.leaves(jax.eval_shape(function))
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves) / math.prod(shape)

    out = {}
    for name, part in optimizer.named("accumulators").items():
        out["accumulators", name] = size(lambda part=part: stored(part.init(spec), spec.shape))
    for name, rule in optimizer.named("routes").items():
        out["routes", name] = size(lambda rule=rule: stored(rule.init({"w": jnp.zeros(shape)})))
    return out


def count(optimizer: LearnedOptimizer) -> int:
    """Returns the number of meta-parameters."""
    return sum(leaf.size for _, leaf in tensor_paths(optimizer.theta))


def totals(optimizer: LearnedOptimizer, parts: list[Row]) -> list[str]:
    """Returns lines that sum up: meta-parameters, state of a learned tensor and of each route."""
    learned = sum(row.state for row in parts if row.slot == "accumulators" and row.state is not None)
    dtype = optimizer.settings.state.dtype
    lines = [
        f"meta-parameters: {count(optimizer):,}",
        f"state of a learned {SIDE} x {SIDE} tensor: {learned:.2f} bytes a parameter ({dtype})",
    ]
    routed = (row for row in parts if row.slot == "routes")
    return lines + [f"state on route {row.name}: {row.state:.2f} bytes a parameter" for row in routed]


@dataclasses.dataclass(frozen=True)
class Line:
    """A row of the table as cells: part, width, meta-parameters, state, kind, settings."""

    part: str
    width: str = ""
    theta: str = ""
    state: str = ""
    kind: str = ""
    settings: tuple[Setting, ...] = ()


HEADER = Line("part", "width", "theta", "bytes", "kind, settings (* not the default)")


def table(optimizer: LearnedOptimizer, parts: list[Row]) -> list[Line]:
    """Returns the rows' cells, with a line above the parts of each slot that holds several."""
    lines = []
    for slot in ORDER:
        own = [row for row in parts if row.slot == slot]
        several = slot in GROUPS or slot == "features"
        if several:
            total = sum(row.width for row in own if row.width is not None)
            state = sum(row.state for row in own if row.state is not None)
            cells = str(total) if total else "", "", f"{state:.2f}" if slot == "accumulators" else ""
            lines.append(Line(slot, *cells, "" if own else "none"))
        for row in own:
            lines.append(
                Line(
                    f"  {printable(row.name)}" if several else slot,
                    "" if row.width is None else str(row.width),
                    f"{row.theta:,}" if row.theta else "",
                    "" if row.state is None else f"{row.state:.2f}",
                    "" if slot == "features" else row.kind,
                    row.settings,
                )
            )
    return lines + [Line(name, settings=settings) for name, settings in general(optimizer).items()]


def wrapped(pieces: Sequence[tuple[str, Any]], width: int) -> list[list[tuple[str, Any]]]:
    """Returns pieces of text in lines of at most ``width`` characters, two between them; long ones are cut.

    Args:
      pieces: (text, anything that goes with it).
      width: at least 1.

    Example:
      >>> wrapped([("a=1", 0), ("b=(2, 2, 2, 2)", 1)], 10)
      [[('a=1', 0)], [('b=(2, 2,', 1)], [('2, 2)', 1)]]
    """
    lines: list[list[tuple[str, Any]]] = []
    left = 0
    for text, mark in pieces:
        for piece in textwrap.wrap(text, width, break_on_hyphens=False):
            if not lines or len(piece) > left:
                lines.append([])
                left = width
            lines[-1].append((piece, mark))
            left -= len(piece) + 2
    return lines


def describe(optimizer: LearnedOptimizer, width: int = 100) -> str:
    """Returns a table of the parts with their settings, theta's shapes and state bytes a parameter.

    Args:
      optimizer: as :func:`celo_nnx.build.build` made it.
      width: characters in a line.

    Returns:
      Plain text. ``width`` is how many averages, planes or numbers a part makes, ``theta`` its number of
      meta-parameters, ``bytes`` its state for each parameter of a 1024 x 1024 tensor.

    Example:
      >>> from celo_nnx import load_optimizer
      >>> text = describe(load_optimizer("celo2"))
      >>> [line for line in text.splitlines() if line.startswith("meta-parameters")]
      ['meta-parameters: 347']
    """
    parts = rows(optimizer)
    cells = [HEADER, *table(optimizer, parts)]
    wide = max(len(line.part) for line in cells)
    out = []
    for line in cells:
        left = f"{line.part:<{wide}}  {line.width:>5}  {line.theta:>9}  {line.state:>6}  "
        pieces = [line.kind, *(f"{s}{'*' * s.changed}" for s in line.settings)]
        for i, few in enumerate(
            wrapped([(x, None) for x in pieces if x], max(30, width - len(left))) or [[]]
        ):
            text = "  ".join(x for x, _ in few)
            out.append(((" " * len(left) if i else left) + text).rstrip())
    leaves = [(path, str(tuple(x.shape)), f"{x.size:,}") for path, x in tensor_paths(optimizer.theta)]
    widths = [max((len(leaf[i]) for leaf in leaves), default=0) for i in range(3)]
    out += ["", "theta" if leaves else "theta: none"]
    out += [f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}" for a, b, c in leaves]
    return "\n".join([*out, "", *totals(optimizer, parts)])


def show(optimizer: LearnedOptimizer) -> None:
    """Prints :func:`describe`'s contents in columns of a terminal, what is not default in bold."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, parts = Console(highlight=False), rows(optimizer)
    grid = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("part", "width", "theta", "bytes"):
        grid.add_column(name, justify="left" if name == "part" else "right", no_wrap=True)
    grid.add_column("kind, settings (bold: not the default)")
    for line in table(optimizer, parts):
        text = Text(line.kind, style="cyan")
        for s in line.settings:
            text.append("  " if text else "").append(str(s), style="bold default" if s.changed else "default")
        grid.add_row(Text(line.part), line.width, line.theta, line.state, text)
    console.print(grid)
    leaves = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("theta", "shape", "count"):
        leaves.add_column(name, justify="right" if name == "count" else "left")
    for path, leaf in tensor_paths(optimizer.theta):
        leaves.add_row(Text(path), str(tuple(leaf.shape)), f"{leaf.size:,}")
    console.print("", leaves, "", *totals(optimizer, parts), sep="\n")
