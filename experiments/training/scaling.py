"""The GPT at several widths and depths, rates tuned at the smallest and kept: ``python -m`` this module."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from celo_nnx.errors import printable
from celo_nnx.evaluation.plots import label_axes, legend_above, positive, style, to_svg
from celo_nnx.experiments.training import gpt, picture, study
from celo_nnx.experiments.training.loop import OPTIMIZERS, Plan, Problem, Run
from celo_nnx.experiments.training.study import Job
from celo_nnx.lock import hold

DEPTH, WIDTH = 2, 64  # of the networks of several widths; of those of several depths
HEADS = 4
NEIGHBOURS = (-1, 0, 1)  # half-decades around the kept rate that are tried as well, to see whether it moved
HEADINGS = ("optimizer", "width", "depth", "learning_rate", "kept", "seed", "validation_loss")


@dataclasses.dataclass(frozen=True)
class Point:
    """An optimizer at one size: its mean validation losses by half-decade, and the rate that was kept."""

    optimizer: str
    width: int
    depth: int
    losses: dict[int, float]
    kept: int

    @property
    def best(self) -> int:
        """The best of the rates that were tried."""
        return min(self.losses, key=self.losses.__getitem__)


def numbers(text: str) -> tuple[int, ...]:
    """An argument that is a list of ascending integers, the first of which is the smallest size."""
    found = tuple(study.count(part) for part in text.split(","))
    if list(found) != sorted(set(found)):
        raise argparse.ArgumentTypeError(f"{text!r} does not ascend")
    return found


def sizes_of(args: argparse.Namespace) -> list[tuple[int, int]]:
    """(width, depth) of every network, the smallest width first, where rates are tuned."""
    sizes = [(width, DEPTH) for width in args.widths] + [(WIDTH, depth) for depth in args.depths]
    return list(dict.fromkeys(sizes))


def scale(args: argparse.Namespace) -> None:
    """Tunes at the first size, trains at all of them, writes ``scaling.csv`` and the picture."""
    plan, names, text = study.plan_of(args), study.names_of(args), gpt.text_of(args.text)
    problems = {}
    for width, depth in sizes_of(args):
        problems[width, depth] = gpt.problem(
            text,
            width=width,
            depth=depth,
            heads=HEADS,
            context=args.context,
            batch_size=args.batch_size,
            width_multipliers=args.width_multipliers,
            name=f"gpt-{width}x{depth}",
        )
    data = study.described(f"{len(text.tokens)} characters of {text.name}", next(iter(problems.values())))
    settings = study.settings_of(args, plan, free=("widths", "depths"))
    study.claim(args.run_dir, settings | {"data": data, "tuned_at": args.widths[0]})
    with hold(args.run_dir):
        print(f"scaling on {printable(data)}; everything goes to {args.run_dir}", file=sys.stderr)
        base = next(iter(problems.values()))
        tuned = study.tune(base, names, plan, args.run_dir)
        kept = {name: study.best(runs, plan) for name, runs in tuned.items()}
        seeds = range(1, args.seeds + 1)
        jobs = [
            Job(problem, name, kept[name] + apart, seed)
            for problem in problems.values()
            for name in names
            for apart in NEIGHBOURS
            for seed in seeds
        ]
        runs = study.work(jobs, plan, args.run_dir)
        write(problems, kept, runs, plan, args)


def write(
    problems: dict[tuple[int, int], Problem],
    kept: dict[str, int],
    runs: dict[Job, Run],
    plan: Plan,
    args: argparse.Namespace,
) -> None:
    """Writes the table and the picture, and prints what the kept rates cost."""
    points, lines = [], []
    for (width, depth), problem in problems.items():
        for name, half in kept.items():
            losses: dict[int, list[float]] = {}
            for job, run in runs.items():
                if job.problem is problem and job.optimizer == name:
                    final = run.final(plan.steps)
                    losses.setdefault(job.half, []).append(final)
                    same = int(job.half == half)
                    lines.append((name, width, depth, f"{job.rate:.4g}", same, job.seed, f"{final:.5f}"))
            means = {rate: float(np.mean(found)) for rate, found in losses.items()}
            points.append(Point(name, width, depth, means, half))
    picture.write_csv(args.run_dir / "scaling.csv", HEADINGS, lines)
    drawn = to_svg(figure(points, args.widths, args.depths), "scaling", standalone=True)
    (args.run_dir / "scaling.svg").write_text(drawn, encoding="utf-8")
    print(f"validation loss after {plan.steps} steps at the kept rate; the best of three rates beside it:")
    for point in points:
        best, lost = point.best, point.losses[point.kept] - point.losses[point.best]
        moved = f"{lost:.4f} better at {10 ** (best / 2):.3g}" if lost > 0 else "the best"
        size = f"width {point.width:<4} depth {point.depth:<2}"
        rate = f"lr {10 ** (point.kept / 2):<8.3g}"
        print(f"  {size} {point.optimizer:<6} {rate} {point.losses[point.kept]:.4f}  {moved}")
    print(f"picture: {args.run_dir / 'scaling.svg'}")


def figure(points: Sequence[Point], widths: Sequence[int], depths: Sequence[int]) -> Figure:
    """Loss against width and against depth: lines at the kept rate, rings at the best of three."""
    drawn = Figure(figsize=(9.6, 3.9), layout="constrained")
    left, right = drawn.subplots(1, 2, sharey=True)
    label_axes(left, f"width (depth {DEPTH})", "validation loss")
    label_axes(right, f"depth (width {WIDTH})", "")
    at = {(point.optimizer, point.width, point.depth): point for point in points}
    for name in dict.fromkeys(point.optimizer for point in points):
        _line(left, name, widths, [at[name, width, DEPTH] for width in widths])
        _line(right, name, depths, [at[name, WIDTH, depth] for depth in depths])
    for axes, ticks in ((left, widths), (right, depths)):
        axes.set_xscale("log")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    legend_above(left, 3)
    return drawn


def _line(axes: Axes, name: str, at: Sequence[int], points: Sequence[Point]) -> None:
    color, dashes = style(list(OPTIMIZERS).index(name))
    kept = positive(np.array([point.losses[point.kept] for point in points]))
    best = positive(np.array([point.losses[point.best] for point in points]))
    label = f"{name} (lr {10 ** (points[0].kept / 2):.2g})"
    axes.plot(at, kept, color=color, linestyle=dashes, marker=".", label=label)
    axes.plot(at, best, "o", markerfacecolor="none", markeredgecolor=color, markersize=8)


def main(argv: Sequence[str] | None = None) -> int:
    """Tunes, trains and draws; returns the exit code."""
    examples = ("--width-multipliers --run-dir runs/scaling-mup", "--widths 32,64 --depths 2 --steps 200")
    parser = study.parser("scaling", __doc__, steps=500, batch_size=16, examples=examples)
    parser.set_defaults(seeds=1, run_dir=Path("runs/scaling"))
    parser.add_argument("--text", default="", help="a file, or a name such as shakespeare or sums")
    parser.add_argument("--context", type=study.count, default=32, help="default 32")
    parser.add_argument(
        "--widths", type=numbers, default=(32, 64, 128), help=f"at depth {DEPTH}, default 32,64,128"
    )
    parser.add_argument("--depths", type=numbers, default=(1, 2, 4), help=f"at width {WIDTH}, default 1,2,4")
    parser.add_argument(
        "--width-multipliers",
        action="store_true",
        help=f"muP: scales rates, logits and attention by powers of width over {gpt.BASE_WIDTH}",
    )
    return study.guarded(parser, scale, argv)


if __name__ == "__main__":
    sys.exit(main())
