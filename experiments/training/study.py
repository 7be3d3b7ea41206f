"""Trains with several optimizers, learning rates tuned alike, in a folder that the same command goes on with.

A run that has ended is a JSON file in the folder and is never done again; one that was interrupted goes on
from its checkpoint. Rates are tuned at a seed of their own: half-decades, widened while the best lies on an
edge, chosen by the final validation loss. Results are of other seeds, so choosing cannot flatter them.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from celo_nnx.compiled import keep_compiled
from celo_nnx.errors import UserError, is_number, printable, require, unknown
from celo_nnx.evaluation.progress import Progress
from celo_nnx.experiments.training.loop import COMPARED, OPTIMIZERS, Plan, Problem, Run, train
from celo_nnx.files import read_json, told, write_json
from celo_nnx.lock import hold
from celo_nnx.meta.checkpoint import digest, flatten

TUNING_SEED = 0  # results are of the seeds 1, 2, ...
LIMIT = 4  # half-decades that a grid may grow by at each end


@dataclasses.dataclass(frozen=True)
class Job:
    """One run: a problem, an optimizer, the rate ``10^(half / 2)``, a seed."""

    problem: Problem
    optimizer: str
    half: int
    seed: int

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return 10 ** (self.half / 2)

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.problem.name}_{self.optimizer}_rate{self.half:+d}_seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.problem.name} {self.optimizer} at {self.rate:.3g}, seed {self.seed}"


def work(jobs: Sequence[Job], plan: Plan, folder: Path) -> dict[Job, Run]:
    """Does what of the jobs is not done, with progress on stderr; returns all of them."""
    runs = {job: run for job in jobs if (run := _read(folder / f"{job.name}.json", plan))}
    left = [job for job in jobs if job not in runs]
    with Progress([1.0] * len(left), before=len(runs)) as progress:
        for job in left:
            progress.start(str(job))

            def say(step: int, loss: float, job: Job = job) -> None:
                progress.start(f"{job}: step {step} of {plan.steps}, validation loss {loss:.3f}")

            steps = folder / f"{job.name}.checkpoint"
            runs[job] = train(job.problem, job.optimizer, job.rate, job.seed, plan, steps, say)
            row = dataclasses.asdict(runs[job])
            # JSON has no infinity: a diverged run's last losses are null.
            row["curve"] = [[x if is_number(x) else None for x in point] for point in row["curve"]]
            write_json(folder / f"{job.name}.json", row)
            shutil.rmtree(steps, ignore_errors=True)
            progress.done(f"{job}: {runs[job].final(plan.steps):.4f}")
    return {job: runs[job] for job in jobs}


def _read(path: Path, plan: Plan) -> Run | None:
    """Reads a finished run, checked."""
    row = read_json(path)
    if row is None:
        return None
    try:
        curve = [tuple(float("inf") if x is None else x for x in point) for point in row["curve"]]
        good = curve and all(len(p) == 3 and p[0] == (i + 1) * plan.every for i, p in enumerate(curve))
        good = good and all(isinstance(x, (int, float)) for p in curve for x in p)
        good = good and is_number(row["seconds"])
    except (TypeError, KeyError):
        good = False
    if not good:
        raise UserError(f"{path} is not a run of this plan: remove it to have it done again")
    return Run(curve, row["seconds"])


def tune(problem: Problem, names: Sequence[str], plan: Plan, folder: Path) -> dict[str, dict[int, Run]]:
    """Runs every optimizer's grid at :data:`TUNING_SEED`, widened until the best lies inside.

    Returns:
      By optimizer and half-decade, ascending, the runs; :func:`best` chooses.
    """
    spans = {name: OPTIMIZERS[name].grid for name in names}
    while True:
        grids = {name: range(first, last + 1) for name, (first, last) in spans.items()}
        jobs = [Job(problem, name, half, TUNING_SEED) for name in names for half in grids[name]]
        runs = work(jobs, plan, folder)
        found = {name: {j.half: run for j, run in runs.items() if j.optimizer == name} for name in names}
        wider = {name: _widened(found[name], OPTIMIZERS[name].grid, plan) for name in names}
        if wider == spans:
            return found
        spans = wider


def best(runs: dict[int, Run], plan: Plan) -> int:
    """The half-decade with the smallest final validation loss."""
    return min(runs, key=lambda half: runs[half].final(plan.steps))


def _widened(runs: dict[int, Run], grid: tuple[int, int], plan: Plan) -> tuple[int, int]:
    first, last = min(runs), max(runs)
    at = best(runs, plan)
    if at == first:
        return max(first - 1, grid[0] - LIMIT), last
    return first, min(last + 1, grid[1] + LIMIT) if at == last else last


def count(text: str) -> int:
    """An argument that is an integer of at least 1."""
    if not text.isdecimal() or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def parser(
    name: str, about: str | None, *, steps: int, batch_size: int, examples: Sequence[str]
) -> argparse.ArgumentParser:
    """The options that the examples share."""
    prog = f"python -m celo_nnx.experiments.training.{name}"
    made = _Parser(
        prog=prog,
        description=(about or "").split("``python")[0].rstrip(": \n") + ".",
        epilog="examples:\n" + "\n".join(f"  {prog} {line}".rstrip() for line in ("", *examples)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = ",".join(OPTIMIZERS)
    made.add_argument(
        "--optimizers", default=",".join(COMPARED), help=f"some of {names}, default %(default)s"
    )
    made.add_argument("--steps", type=count, default=steps, help="updates of a run, default %(default)s")
    made.add_argument("--every", type=count, help="updates between validations, default a twentieth of them")
    made.add_argument("--batch-size", type=count, default=batch_size, help="default %(default)s")
    made.add_argument(
        "--seeds", type=count, default=3, help="runs at a rate that was chosen, default %(default)s"
    )
    made.add_argument(
        "--checkpoint-seconds", type=float, default=60.0, help="between checkpoints, default %(default)s"
    )
    made.add_argument(
        "--run-dir", type=Path, default=Path("runs") / name, help="default %(default)s; goes on there"
    )
    return made


def plan_of(args: argparse.Namespace) -> Plan:
    """The plan that the options ask for.

    Raises:
      UserError: validations that do not divide the run.
    """
    every = args.every or max(1, args.steps // 20)
    require(args.steps % every == 0, "every", every, f"a divisor of {args.steps} steps")
    require(args.checkpoint_seconds >= 0, "checkpoint-seconds", args.checkpoint_seconds, "at least 0")
    return Plan(args.steps, every, args.steps // 10, args.checkpoint_seconds)


def names_of(args: argparse.Namespace) -> list[str]:
    """The optimizers that the options name.

    Raises:
      UserError: there is none of a name.
    """
    names = args.optimizers.split(",")
    for name in names:
        if name not in OPTIMIZERS:
            raise unknown("optimizer", name, OPTIMIZERS)
    require(len(set(names)) == len(names), "optimizers", args.optimizers, "different names")
    return names


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Makes the folder, or goes on with one of the same settings.

    Raises:
      UserError: the folder is of a study with other settings, or holds other files.
    """
    with told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "settings.json"
        if not path.exists() and any(p.name != "lock" for p in folder.iterdir()):
            raise UserError(f"{folder} holds other files: name another --run-dir")
    there = read_json(path)
    if there is None:
        return write_json(path, settings)
    if there != settings:
        there = there if isinstance(there, dict) else {}
        both = sorted({*there, *settings}, key=lambda key: (key not in there, key))
        key = next(key for key in both if there.get(key) != settings.get(key))
        raise UserError(
            f"{folder} is of a study with {key} = {there.get(key)!r}, not {settings.get(key)!r}: "
            "name another --run-dir"
        )


def described(data: str, problem: Problem) -> str:
    """Says what a problem's data are, with a digest, as a file that was edited may be as long as before."""
    found = digest(flatten({"train": problem.train, "validation": problem.validation}), {})
    return f"{data}, sha256 {found[:12]}"


def settings_of(args: argparse.Namespace, plan: Plan, free: Sequence[str] = ()) -> dict[str, Any]:
    """What decides the runs of a folder; seeds, optimizers and what else is free may be changed later."""
    free = (*free, "run_dir", "checkpoint_seconds", "seeds", "optimizers", "every")
    return {k: v for k, v in vars(args).items() if k not in free} | {"every": plan.every}


def command(
    made: argparse.ArgumentParser,
    make: Callable[[argparse.Namespace], tuple[Problem, str]],
    argv: Sequence[str] | None,
) -> int:
    """Tunes every optimizer, trains it at its best rate with all seeds, writes CSV files and the picture."""
    from celo_nnx.experiments.training import picture

    def run(args: argparse.Namespace) -> None:
        plan, names = plan_of(args), names_of(args)
        problem, data = make(args)
        data = described(data, problem)
        claim(args.run_dir, settings_of(args, plan) | {"data": data})
        with hold(args.run_dir):
            print(f"{problem.name} on {printable(data)}; everything goes to {args.run_dir}", file=sys.stderr)
            tuned = tune(problem, names, plan, args.run_dir)
            seeds = range(1, args.seeds + 1)
            jobs = [Job(problem, name, best(tuned[name], plan), seed) for name in names for seed in seeds]
            results = work(jobs, plan, args.run_dir)
            picture.write(problem.name, tuned, results, plan, args.run_dir)

    return guarded(made, run, argv)


def guarded(
    made: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None], argv: Sequence[str] | None
) -> int:
    """Runs a command; a user's mistake is one line and the exit code 2."""
    try:
        args = made.parse_args(argv)
        keep_compiled()
        run(args)
    except UserError as error:
        print(f"{made.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{made.prog}: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0
