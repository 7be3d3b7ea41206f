"""``celo-nnx grid``: its arguments and what they do; nothing here imports JAX before a command runs."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable
from typing import Any

from celo_nnx.errors import UserError

SLURM = ("time", "partition", "cpus", "gpus", "sbatch")  # options of that engine alone


def add(verbs: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds the commands.

    Args:
      verbs: the sub-parsers of ``celo-nnx``.
      command: makes the parser of a command.
    """
    grids = verbs.add_parser(
        "grid",
        help="ablation grids: many cells of meta-training and evaluation, one report",
        epilog="celo-nnx grid run --help and so on show examples",
    )
    kinds = grids.add_subparsers(
        dest="kind",
        metavar="plan|run|cell|status|cancel|report",
        required=True,
        parser_class=type(verbs.choices["list"]),
    )

    def grid(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "grid", metavar="GRID", help="a grid (celo-nnx list grids), or a path to a grid file"
        )
        text = "changes to all cells, such as run.iterations=100"
        sub.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help=text)

    sub = command(
        "plan",
        grid_plan,
        "show the cells of a grid, how many there are and in what they differ",
        "grid plan output_normalization",
        "grid plan my_grid.py run.iterations=100 --probe",
        into=kinds,
    )
    grid(sub)
    text = (
        "also meta-train one cell of each program (cells that differ in seed and real numbers alone have "
        "one) for a few meta-iterations, and say how long the meta-training of all cells will take"
    )
    sub.add_argument("--probe", action="store_true", help=text)
    sub = command(
        "run",
        grid_run,
        "run the cells that have no result yet, each as a process of its own; the same command goes on after "
        "any interruption. SIGTERM and Ctrl-C save and stop; jobs of Slurm go on. Exit code 1 if cells have "
        "failed for good or a result is damaged",
        "grid run output_normalization --run-dir runs/output --jobs 2",
        "grid run output_normalization run.iterations=50 --run-dir runs/few --retries 0",
        "grid run output_normalization --run-dir runs/output --engine slurm --gpus 1 --time 4:00:00",
        into=kinds,
    )
    grid(sub)
    sub.add_argument("--run-dir", required=True, metavar="DIR", help="the folder of the grid")
    text = "local: processes of this machine (default); slurm: a job array"
    sub.add_argument("--engine", choices=("local", "slurm"), default="local", help=text)
    text = (
        "cells at a time; the local engine shares cores and GPUs out among them (default 1; slurm: no limit)"
    )
    sub.add_argument("--jobs", type=int, metavar="N", help=text)
    text = "further attempts of a cell that fails or is killed (default 2)"
    sub.add_argument("--retries", type=int, default=2, metavar="N", help=text)
    of_slurm = sub.add_argument_group("with --engine slurm")
    text = (
        "minutes, H:MM:SS or D-HH:MM:SS (default 1:00:00); a cell that needs longer is requeued and goes on"
    )
    of_slurm.add_argument("--time", metavar="LIMIT", help=text)
    of_slurm.add_argument("--partition", metavar="NAME", help="of the cluster")
    of_slurm.add_argument("--cpus", type=int, metavar="N", help="cores of a cell (default 1)")
    of_slurm.add_argument("--gpus", type=int, metavar="N", help="GPUs of a cell (default none)")
    text = "another option of sbatch, such as account=me, mem=8G or constraint=h100; may be given again"
    of_slurm.add_argument("--sbatch", metavar="OPTION=VALUE", action="append", default=[], help=text)
    text = "run cells anew that have begun with another config; the old folders stay"
    sub.add_argument("--accept-changed", action="store_true", help=text)
    text = "run one cell, or go on with it; what grid run starts"
    sub = command("cell", grid_cell, text, "grid cell runs/output/cells/0123456789ab", into=kinds)
    sub.add_argument("dir", metavar="DIR", help="the cell's folder")
    text = "a line for each cell: its state, how far it is, its numbers or why it failed"
    sub = command("status", grid_status, text, "grid status runs/output", into=kinds)
    sub.add_argument("dir", metavar="DIR", help="the folder of a grid")
    text = "stop a grid: its driver, which has its cells save, and its jobs in Slurm"
    sub = command("cancel", grid_cancel, text, "grid cancel runs/output", into=kinds)
    sub.add_argument("dir", metavar="DIR", help="the folder of a grid")
    sub = command(
        "report",
        grid_report,
        "one HTML file on a grid, under way or over: effects of the axes, curves, cells, failures, cost, the "
        "best cell's command; with cells.csv, effects.csv and effects.svg beside it",
        "grid report runs/output",
        "grid report runs/output --out output.html",
        into=kinds,
    )
    sub.add_argument("dir", metavar="DIR", help="the folder of a grid")
    sub.add_argument("--out", metavar="FILE", help="a new file (default DIR/report.html, which is renewed)")


def grid_plan(args: argparse.Namespace) -> int:
    from celo_nnx.grids.grid_file import load_grid
    from celo_nnx.grids.plan import plan
    from celo_nnx.grids.status import plan_lines

    grid = load_grid(args.grid, args.overrides)
    cells = plan(grid)
    print(*plan_lines(grid, cells), sep="\n", flush=True)
    if not args.probe:
        print("--probe says about how long they take, from a few meta-iterations of one cell of each program")
        return 0
    from celo_nnx.grids.probe import probe, told

    print(told(probe(cells), len(cells), grid.suite))
    return 0


def grid_run(args: argparse.Namespace) -> int:
    import dataclasses

    from celo_nnx.training import stop_on_signals

    local = args.engine == "local"
    saving, leaving = (
        "stopping: cells under way finish their dispatch and save",
        "leaving: jobs go on in Slurm",
    )
    with stop_on_signals(saving if local else leaving) as stop:
        from celo_nnx.grids.drive import run
        from celo_nnx.grids.grid_file import load_grid

        engine = _local(args) if local else _slurm(args)
        grid = load_grid(args.grid, args.overrides)
        words = ["celo-nnx", "grid", "run", args.grid, *args.overrides, "--run-dir", args.run_dir]
        command = shlex.join([*words, *_engine_words(args)])
        options = dict(accept_changed=args.accept_changed, command=command, stop=stop)
        outcome = run(grid, args.run_dir, engine, **options)
    print(json.dumps(dataclasses.asdict(outcome)))
    if outcome.stopped_by:
        left = "jobs go on in Slurm (celo-nnx grid cancel ends them)"
        kept = "finished cells are kept" if local else left
        print(f"stopped; {kept}, and this goes on: {command}", file=sys.stderr)
        return 0
    print(f"its effects as a page: celo-nnx grid report {shlex.quote(args.run_dir)}", file=sys.stderr)
    return 0 if outcome.done == outcome.cells else 1


def _local(args: argparse.Namespace) -> Any:
    from celo_nnx.grids.local import Local

    given = [name for name in SLURM if getattr(args, name) not in (None, [])]
    if given:
        raise UserError(f"--{given[0]} is for --engine slurm")
    return Local(jobs=1 if args.jobs is None else args.jobs, retries=args.retries)


def _slurm(args: argparse.Namespace) -> Any:
    from pathlib import Path

    from celo_nnx.grids.slurm import Slurm, require_slurm

    pairs = [text.partition("=") for text in args.sbatch]
    for (key, equals, value), text in zip(pairs, args.sbatch, strict=True):
        if not (equals and value and key.replace("-", "").isalnum()):
            raise UserError(f"--sbatch {text!r}: give OPTION=VALUE, such as --sbatch account=me")
    more = {key: value for key, _, value in pairs}
    more |= {"partition": args.partition} if args.partition else {}
    more |= {"gpus-per-node": str(args.gpus)} if args.gpus else {}
    settings = {"minutes": _minutes(args.time) if args.time else None, "cpus": args.cpus, "jobs": args.jobs}
    settings = {key: value for key, value in settings.items() if value is not None}
    engine = Slurm(Path(args.run_dir), retries=args.retries, more=more, **settings)
    require_slurm()
    return engine


def _minutes(text: str) -> int:
    """Minutes of ``90``, ``1:30:00`` or ``1-12:00:00``; seconds are rounded up."""
    found = re.fullmatch(r"(?:(\d{1,3})-)?(\d{1,3}):(\d\d):(\d\d)|(\d{1,7})", text)
    if not found:
        raise UserError(f"--time {text!r}: give minutes, H:MM:SS or D-HH:MM:SS")
    days, hours, minutes, seconds, alone = (int(part or 0) for part in found.groups())
    return alone or days * 1440 + hours * 60 + minutes + (seconds > 0)


def _engine_words(args: argparse.Namespace) -> list[str]:
    """The options that go on with a grid."""
    out = [] if args.engine == "local" else ["--engine", args.engine]
    for name in ("jobs", "retries", *SLURM):
        value = getattr(args, name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        out += [word for one in values for word in (f"--{name}", str(one))]
    return out


def grid_cancel(args: argparse.Namespace) -> int:
    from celo_nnx.grids.drive import cancel

    jobs = cancel(args.dir)
    print(f"cancelled: its driver has stopped, if it had one; {jobs} jobs were ended in Slurm")
    return 0


def grid_cell(args: argparse.Namespace) -> int:
    from celo_nnx.training import stop_on_signals

    with stop_on_signals() as stop:
        from celo_nnx.compiled import keep_compiled
        from celo_nnx.grids.work import run_cell

        keep_compiled()  # cells that differ in the seed only compile the same programs
        print(json.dumps({"cell": args.dir, "state": run_cell(args.dir, stop=stop)}))
    return 0


def grid_status(args: argparse.Namespace) -> int:
    from celo_nnx.grids.status import status_lines
    from celo_nnx.grids.store import read_grid

    print(*status_lines(read_grid(args.dir)), sep="\n")
    return 0


def grid_report(args: argparse.Namespace) -> int:
    from celo_nnx.grids.report import write

    print(f"report: {write(args.dir, args.out)}")
    return 0
