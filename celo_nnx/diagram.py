"""An optimizer as a picture: its parts as boxes in the order in which an update goes through them, in SVG.

On the left is what every learned tensor goes through, on the right what is decided for it (loss, rows,
schedule, context) and where the other tensors go. Text is set in a monospaced font, whose width is known, so
that nothing overlaps whatever a config holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from xml.sax.saxutils import escape

import jax
import jax.numpy as jnp

from celo_nnx.description import NUMBERS, Row, general, rows, totals, wrapped
from celo_nnx.errors import printable
from celo_nnx.optimizer import LearnedOptimizer

LEFT = (
    "clip",
    "accumulators",
    "features",
    "normalization",
    "update_rule",
    "step",
    "orthogonalization",
    "output_normalization",
)
RIGHT = ("tracker", "rows", "schedule", "context", "rate_scale", "routing", "routes")
BRIEF = ("rows", "context")  # of these, only settings that are not the default are shown

WIDTH, COLUMN, MARGIN, GAP, PAD, LINE, BAR = 1080, 476, 28, 22, 12, 17, 34
CHAR = 7.3  # pixels: the widest common monospaced font at 12 pixels
ROOM = int((COLUMN - 2 * PAD) / CHAR)  # characters in a line of a box
XS = {slot: MARGIN for slot in LEFT} | {slot: WIDTH - MARGIN - COLUMN for slot in RIGHT}

STYLE = """
text { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace;
  white-space: pre; fill: #57606a }
.paper { fill: #ffffff; stroke: #d0d7de }
.box { fill: #f6f8fa; stroke: #afb8c1 }
.learned { fill: #e7f1ff; stroke: #3b82d6; stroke-width: 1.6 }
.empty { fill: none; stroke: #c4ccd4; stroke-dasharray: 4 3 }
.bar { fill: #e6e9ec; stroke: #afb8c1 }
.title { font-size: 17px; font-weight: 700; fill: #1f2328 }
.slot, .changed { font-weight: 700; fill: #1f2328 }
.name { fill: #1f2328 }
.kind { font-weight: 700; fill: #0a58b5 }
.wire { fill: none; stroke: #7d8590; stroke-width: 1.5 }
.tip { fill: #7d8590 }
@media (prefers-color-scheme: dark) {
  text { fill: #9aa4ae }
  .paper { fill: #0f141a; stroke: #30363d }
  .box { fill: #181e26; stroke: #444c56 }
  .learned { fill: #10233d; stroke: #4c94e6 }
  .empty { stroke: #3a424b }
  .bar { fill: #262c33; stroke: #444c56 }
  .title, .slot, .changed, .name { fill: #e6edf3 }
  .kind { fill: #79b8ff }
}
"""


@dataclasses.dataclass(frozen=True)
class Text:
    """A line: pieces (text, class) from the left, indented by so many characters, and a text at the right."""

    pieces: Sequence[tuple[str, str]]
    right: str = ""
    indent: int = 0


@dataclasses.dataclass(frozen=True)
class Box:
    """A part's place: left, top and height in pixels, class, lines."""

    x: float
    y: float
    height: float
    style: str
    lines: list[Text]

    @property
    def middle(self) -> float:
        return self.y + self.height / 2

    @property
    def bottom(self) -> float:
        return self.y + self.height


def draw(optimizer: LearnedOptimizer, title: str = "", notes: Sequence[str] = ()) -> str:
    """Draws an optimizer.

    Args:
      optimizer: as :func:`celo_nnx.build.build` made it.
      title: above the picture.
      notes: lines below it, after the totals.

    Returns:
      A self-contained SVG file's text, readable on light and dark pages.

    Example:
      >>> from celo_nnx import load_optimizer
      >>> draw(load_optimizer("celo2"), "celo2").startswith("<svg")
      True
    """
    parts, top = rows(optimizer), MARGIN + 26
    decided = _decided(optimizer, sum(row.width or 0 for row in parts if row.slot == "rows"))
    boxes: dict[str, Box] = {}
    for column in (LEFT, RIGHT):
        y = top + BAR + GAP
        for slot in column:
            own = [row for row in parts if row.slot == slot]
            lines = _lines(slot, own)
            if slot == "schedule" and decided:
                lines.append(Text([("decides for each tensor:", ""), (", ".join(decided), "changed")]))
            style = "learned" if any(row.theta for row in own) else "box" if own else "empty"
            boxes[slot] = Box(XS[slot], y, len(lines) * LINE + 2 * PAD - 5, style, lines)
            y = boxes[slot].bottom + GAP
    end = max(box.bottom for box in boxes.values()) + GAP
    shapes = [
        _line(MARGIN, MARGIN + 10, Text([(printable(title or "optimizer")[:96], "title")])),
        _bar(top, "gradients, parameters and loss of one update"),
        _bar(end, "update = − learning rate × rate × (step + weight_decay × parameters)"),
        *_wires(optimizer, boxes, decided, (top + BAR, end)),
        *(shape for box in boxes.values() for shape in _box(box)),
    ]
    below = [f"{name}: {'  '.join(map(str, settings))}" for name, settings in general(optimizer).items()]
    below = [*below, *totals(optimizer, parts), *notes, "Bold settings are not the part's default."]
    cut = wrapped([(text, "") for text in below], int((WIDTH - 2 * MARGIN) / CHAR))
    y = end + BAR + GAP + 6
    for line in (piece for pieces in cut for piece in pieces):
        shapes.append(_line(MARGIN, y, Text([line])))
        y += LINE
    return _document(y + MARGIN - LINE, shapes)


def _decided(optimizer: LearnedOptimizer, width: int) -> list[str]:
    """Returns the names of what the schedule decides for each tensor, besides the learning rate."""
    schedule = optimizer.schedule

    def controls() -> tuple:
        state = schedule.init(1)
        late = schedule.advance(state, jnp.zeros((1, width)))[0] if width else None
        return schedule.early(state), late

    made = [vars(x) for x in jax.eval_shape(controls) if x is not None]
    return [name for name in made[0] if any(x[name] not in (None, {}) for x in made)]


def _lines(slot: str, own: Sequence[Row]) -> list[Text]:
    """Returns the lines of a slot's box."""
    several = [row for row in own if row.name]
    kind = [(printable(row.kind), "kind") for row in own if not row.name] if own else [("none", "")]
    width = sum(row.width or 0 for row in own)
    state = sum(row.state or 0 for row in own) if slot == "accumulators" else None
    number = f"{width} {NUMBERS[slot]}" if width else ""
    right = _counts(number, sum(row.theta for row in own), state)
    lines = _wrapped([(slot, "slot"), *kind], right)
    for row in own:
        settings = [(str(s), "changed" if s.changed else "") for s in row.settings]
        if slot in BRIEF:
            settings = [(text, mark) for text, mark in settings if mark]
        if not several:
            return lines + _wrapped(settings)
        names = [(printable(row.name), "name"), (printable(row.kind), "kind")]
        right = _counts("" if row.width is None else str(row.width), row.theta, row.state)
        lines += _wrapped([*names[: 1 + (row.kind != row.name)], *settings], right, indent=2)
    return lines


def _counts(width: str, theta: int, state: float | None) -> str:
    learned = f"{theta:,} meta-parameters" if theta else ""
    return ", ".join(x for x in (width, learned, "" if state is None else f"{state:.2f} bytes") if x)


def _wrapped(pieces: Sequence[tuple[str, str]], right: str = "", indent: int = 0) -> list[Text]:
    """Returns lines that fit into a box; only the first leaves room at the right, the others are indented."""
    room = ROOM - indent - (len(right) + 2 if right else 0)
    count = used = 0
    for text, _ in pieces:
        used += len(text)
        if count and used > room:
            break
        used, count = used + 2, count + 1
    lines = wrapped(pieces[:count], room) + wrapped(pieces[count:], ROOM - 2 * indent)
    return [Text(line, "" if i else right, 2 * indent if i else indent) for i, line in enumerate(lines)]


def _wires(
    optimizer: LearnedOptimizer, boxes: dict[str, Box], decided: Sequence[str], bars: tuple[float, float]
) -> list[str]:
    """Returns the arrows: down each column, and through three lanes between them.

    Args:
      optimizer: tells which slots have to do with each other.
      boxes: by slot.
      decided: what the schedule decides for each tensor.
      bars: bottom of the upper bar, top of the lower one.
    """
    left, right = XS["clip"] + COLUMN, XS["schedule"]
    near, lane, far = (left + (right - left) * share for share in (0.22, 0.5, 0.78))
    centre = left - COLUMN / 2
    ys = [bars[0], *(y for slot in LEFT for y in (boxes[slot].y, boxes[slot].bottom)), bars[1]]
    wires = [[(centre, a), (centre, b)] for a, b in zip(ys[::2], ys[1::2], strict=True)]
    centre = right + COLUMN / 2
    schedule, rule = boxes["schedule"], boxes["update_rule"]
    if optimizer.tracker.width:
        wires.append([(centre, bars[0]), (centre, boxes["tracker"].y)])
        wires.append([(centre, boxes["tracker"].bottom), (centre, boxes["rows"].y)])
    if optimizer.rows:
        wires.append([(centre, boxes["rows"].bottom), (centre, schedule.y)])
    if any(feature.looks for feature in optimizer.rows.values()):
        y, to = boxes["accumulators"].middle, boxes["rows"].middle
        wires.append([(left, y), (lane, y), (lane, to), (right, to)])
    for slot, needed in (("accumulators", {"decays"}), ("update_rule", {"mix", "eps", "context"})):
        if needed & {*decided} and not (needed & {*decided} == {"context"} and optimizer.context):
            y, to = schedule.middle - 8, boxes[slot].middle + 8
            wires.append([(right, y), (near, y), (near, to), (left, to)])
    if optimizer.context:
        y, to = boxes["context"].middle, rule.middle - 8
        wires.append([(right, y), (near, y), (near, to), (left, to)])
        if "context" in decided:
            wires.append([(centre, schedule.bottom), (centre, boxes["context"].y)])
    rate = boxes["rate_scale"].middle
    wires.append([(right, schedule.middle + 8), (far, schedule.middle + 8), (far, bars[1])])
    shapes = [f'<path class="wire" d="M{right:g} {rate:g}H{far:g}"/>']
    if optimizer.routes:
        wires.append([(centre, boxes["routing"].bottom), (centre, boxes["routes"].y)])
        wires.append([(centre, boxes["routes"].bottom), (centre, bars[1])])
    return shapes + [shape for wire in wires for shape in _arrow(wire)]


def _arrow(points: Sequence[tuple[float, float]]) -> list[str]:
    """Returns a line through points with a tip at the last."""
    (x, y), (x0, y0) = points[-1], points[-2]
    dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
    ends = [*points[:-1], (x - 5 * dx, y - 5 * dy)]
    path = "M" + "L".join(f"{a:g} {b:g}" for a, b in ends)
    side = [(x - 8 * dx + 4 * s * dy, y - 8 * dy + 4 * s * dx) for s in (1, -1)]
    tip = " ".join(f"{a:g},{b:g}" for a, b in [(x, y), *side])
    return [f'<path class="wire" d="{path}"/>', f'<polygon class="tip" points="{tip}"/>']


def _bar(y: float, text: str) -> str:
    width = WIDTH - 2 * MARGIN
    x = MARGIN + (width - CHAR * len(text)) / 2
    rect = f'<rect class="bar" x="{MARGIN}" y="{y:g}" width="{width}" height="{BAR}" rx="{BAR / 2:g}"/>'
    return rect + _line(x, y + BAR / 2 + 4, Text([(text, "changed")]))


def _box(box: Box) -> list[str]:
    at = f'x="{box.x:g}" y="{box.y:g}" width="{COLUMN}" height="{box.height:g}"'
    shapes = [f'<rect class="{box.style}" {at} rx="6"/>']
    for i, line in enumerate(box.lines):
        shapes.append(_line(box.x + PAD, box.y + PAD + 9 + i * LINE, line))
    return shapes


def _line(x: float, y: float, line: Text) -> str:
    """Returns a line of text whose baseline is at ``y``."""
    spans = "  ".join(f'<tspan class="{c}">{escape(t)}</tspan>' if c else escape(t) for t, c in line.pieces)
    x += CHAR * line.indent
    out = f'<text x="{x:g}" y="{y:g}" xml:space="preserve">{spans}</text>'
    if line.right:
        end = x - CHAR * line.indent + COLUMN - 2 * PAD
        out += f'<text x="{end:g}" y="{y:g}" text-anchor="end">{escape(line.right)}</text>'
    return out


def _document(height: float, shapes: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}"'
    paper = f'<rect class="paper" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:g}" rx="10"/>'
    body = "\n".join([paper, *shapes])
    return f'{head} width="{WIDTH}" height="{height:g}">\n<style>{STYLE}</style>\n{body}\n</svg>\n'
