"""The command ``celo-nnx``: arguments in, one function call, lines out.

Exit codes: 0 done (a run that was asked to stop and has saved is done too), 1 a replay is not within its
tolerance, 2 a mistake of the user, told in one line, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from celo_nnx import processes
from celo_nnx.errors import UserError, unknown

# Nothing here imports JAX before a command runs: --help answers at once.


def _list(args: argparse.Namespace) -> int:
    from celo_nnx import listing

    for what in [args.what] if args.what else listing.KINDS:
        print(listing.lines(what))
    return 0


def _describe(args: argparse.Namespace) -> int:
    from pathlib import Path

    import jax

    from celo_nnx import dead, description, diagram, model_file
    from celo_nnx.build import build
    from celo_nnx.config import load
    from celo_nnx.files import refuse_existing, told, write_new
    from celo_nnx.pretrained.convert import first_theta

    if args.svg:
        with told(args.svg):
            refuse_existing(Path(args.svg))
    config = load(args.config, args.overrides)
    start = first_theta(config.theta_init, config.optimizer)
    optimizer = build(config.optimizer, key=jax.random.key(config.seed), theta_init=start)
    routing = model_file.routing_report(optimizer, args.params) if args.params else ""
    if sys.stdout.isatty():
        description.show(optimizer)
    else:
        print(description.describe(optimizer), flush=True)
    notes = []
    if args.dead:
        notes = dead.report(dead.find_dead(optimizer), description.count(optimizer)).splitlines()
        print("", *notes, sep="\n")
    if routing:
        print("", routing, sep="\n")
    if args.svg:
        title = " ".join([args.config, *args.overrides])
        with told(args.svg):
            write_new(Path(args.svg), diagram.draw(optimizer, title, notes).encode())
    return 0


def _train(args: argparse.Namespace) -> int:
    from celo_nnx.training import stop_on_signals, train

    with stop_on_signals() as stop:
        from celo_nnx.config import load

        config = load(args.config, args.overrides)
        with processes.session():
            result = train(config, args.run_dir, stop=stop)
    row = {"run_dir": str(result.run_dir), "iteration": result.iteration, "finished": result.finished}
    row |= {"stopped_by": result.stopped_by, "seconds": round(result.seconds, 3)}
    if processes.is_first():
        print(json.dumps(row))
        if not result.finished:
            print("stopped and saved; the same command goes on from here", file=sys.stderr)
        print(f"its curves as a page: celo-nnx report {shlex.quote(args.run_dir)}", file=sys.stderr)
    return 0


def _watch(args: argparse.Namespace) -> int:
    from celo_nnx.watch import watch

    watch(args.run_dirs, every=args.every, once=args.once)
    return 0


def _report(args: argparse.Namespace) -> int:
    from celo_nnx.evaluation import results

    if os.path.exists(os.path.join(args.run_dir, results.FILE_NAME)):
        from celo_nnx.evaluation.suite_report import write
    else:
        from celo_nnx.run_report import write
    print(f"report: {write(args.run_dir, args.out)}")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    import dataclasses

    from celo_nnx.evaluation import suite_report
    from celo_nnx.evaluation.evaluate import DEFAULT, evaluate
    from celo_nnx.evaluation.results import load_results
    from celo_nnx.evaluation.standings import standings
    from celo_nnx.evaluation.suite_words import table
    from celo_nnx.evaluation.suites import load_suite

    # argparse gives KEY=VALUE after an option to the option; a label is no setting of a suite.
    for listed in (args.optimizers, args.weights):
        args.overrides += [text for text in listed if _is_setting(text)]
        listed[:] = [text for text in listed if not _is_setting(text)]
    suite = load_suite(args.suite, args.overrides)
    if args.seeds is not None:
        suite = dataclasses.replace(suite, seeds=args.seeds)
    optimizers = [name for text in args.optimizers for name in text.split(",") if name] or DEFAULT
    folder = args.run_dir or f"runs/evaluate-{suite.name}"
    words = ["celo-nnx", "evaluate", args.suite, *args.overrides, "--optimizers", ",".join(optimizers)]
    words += ["--weights", *args.weights] if args.weights else []
    words += ["--seeds", str(args.seeds)] if args.seeds is not None else []
    words += ["--data-dir", args.data_dir] if args.data_dir else []
    words += ["--skip-missing"] if args.skip_missing else []
    command = shlex.join([*words, "--run-dir", folder])
    options = dict(weights=args.weights, data_dir=args.data_dir, skip_missing=args.skip_missing)
    try:
        outcome = evaluate(suite, optimizers, folder=folder, command=command, **options)
    except KeyboardInterrupt:
        print(f"stopped; finished cells are kept, and this goes on: {command}", file=sys.stderr)
        return 130
    row = dataclasses.asdict(outcome) | {"folder": str(outcome.folder), "seconds": round(outcome.seconds, 1)}
    print(json.dumps(row), flush=True)
    lines = table(standings(load_results(outcome.folder)))
    if lines:
        print(
            "IQM over tasks and seeds, tuned adam = 1, with 95 % intervals:",
            *lines,
            sep="\n",
            file=sys.stderr,
        )
    print(f"report: {suite_report.write(outcome.folder)}", file=sys.stderr)
    return 0


def _is_setting(text: str) -> bool:
    """Whether a text changes a suite, as in ``steps=500`` or ``tasks.mlp.batch_size=8``."""
    from celo_nnx.evaluation.suites import SETTINGS

    key, equals, _ = text.partition("=")
    return bool(equals) and key.split(".")[0] in SETTINGS


def _replay(args: argparse.Namespace) -> int:
    from celo_nnx.replay import main as replay

    return replay(args.files, args.tolerance, twin=args.twin, overrides=args.set)


def _bench_meta(args: argparse.Namespace) -> int:
    from celo_nnx import bench
    from celo_nnx.config import load

    config = load(args.config, args.overrides)
    with processes.session():
        for row in bench.meta(config, args.peer):
            if processes.is_first():
                print(json.dumps(row), flush=True)
    return 0


def _bench_step(args: argparse.Namespace) -> int:
    from celo_nnx import bench

    named = {"names": args.optimizer} if args.optimizer else {}
    if args.suite and args.params:
        raise UserError("--params and --suite are two ways to say which models: give one of them")
    models = [({}, params) for params in args.params or [10_000_000]]
    if args.suite:
        models = [({"task": task}, tree) for task, tree in bench.suite_shapes(args.suite).items()]
    for told, params in models:
        for row in bench.step(**named, params=params, peers=args.peer or bench.PEERS):
            print(json.dumps(told | row), flush=True)
    return 0


def _bench_orthogonalization(args: argparse.Namespace) -> int:
    from celo_nnx.bench_orthogonalization import orthogonalization

    for row in orthogonalization():
        print(json.dumps(row), flush=True)
    return 0


def _quickstart(args: argparse.Namespace) -> int:
    from celo_nnx.quickstart import run

    run(args.out)
    return 0


def _import(args: argparse.Namespace) -> int:
    from celo_nnx.pretrained.convert import import_weights

    row = import_weights(args.source, args.out, variant=args.variant, overrides=args.overrides)
    print(json.dumps(row))
    return 0


def _export(args: argparse.Namespace) -> int:
    from celo_nnx.pretrained.convert import export_weights

    print(json.dumps(export_weights(args.theta, args.out, format=args.format, variant=args.variant)))
    return 0


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="celo-nnx",
        description="Learned optimizers from interchangeable parts: assemble, meta-train, use.",
        epilog="celo-nnx COMMAND --help shows a command's arguments with examples.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str, *examples: str, into: Any = commands
    ) -> argparse.ArgumentParser:
        sub = into.add_parser(
            name,
            help=text,
            description=text,
            epilog="examples:\n" + "\n".join(f"  celo-nnx {line}" for line in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(run=run)
        return sub

    def config(sub: argparse.ArgumentParser) -> None:
        text = "a variant (celo2), a variant and its tasks (celo2:fast_digits), or a path to a config file"
        sub.add_argument("config", metavar="CONFIG", help=text)
        text = "changes to it, such as meta.optimizer.learning_rate=3e-4"
        sub.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=text)

    sub = command("list", _list, "list what there is to choose from", "list", "list parts")
    sub.add_argument(
        "what", nargs="?", metavar="parts|variants|tasks|suites|baselines|data", help="one kind only"
    )

    sub = command(
        "describe",
        _describe,
        "show a variant's parts, shapes, number of meta-parameters and state",
        "describe celo2 optimizer.schedule.value=0.01",
        "describe celo --dead --svg celo.svg",
        "describe celo2 --params model.safetensors",
    )
    config(sub)
    text = "also name meta-parameters without effect, found by experiment; compiles for about 20 seconds"
    sub.add_argument("--dead", action="store_true", help=text)
    sub.add_argument("--svg", metavar="FILE", help="draw the variant, into a new file")
    text = "a model's safetensors file: say which tensor takes which rule (only its header is read)"
    sub.add_argument("--params", metavar="FILE", help=text)

    sub = command(
        "train",
        _train,
        "meta-train; the same command resumes. SIGTERM and Ctrl-C save and stop with exit code 0. "
        "On resume only run.* may differ (more run.iterations extend a run)",
        "train celo2:fast_digits run.iterations=500 --run-dir runs/a",
        "train celo2:fast_digits run.iterations=1000 --run-dir runs/a    # extends it",
        "train celo2:fast_velo --run-dir runs/b    # the same behind srun: one run on all its tasks",
    )
    config(sub)
    sub.add_argument("--run-dir", required=True, metavar="DIR", help="the run folder")

    sub = command(
        "watch",
        _watch,
        "follow meta-training in the terminal until it is finished or Ctrl-C; without a terminal, show once",
        "watch runs/a",
        "watch runs/* --once",
    )
    sub.add_argument(
        "run_dirs", nargs="+", metavar="RUN_DIR", help="a run folder of train; several are a table"
    )
    sub.add_argument("--once", action="store_true", help="show and end")
    text = "time between two looks (default 1)"
    sub.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help=text)

    sub = command(
        "report",
        _report,
        "one HTML file on a meta-training run or an evaluation, under way or over: what ran, curves, time, "
        "and how to use theta, or scores, with CSV files beside it",
        "report runs/a",
        "report runs/a --out a.html",
        "report runs/smoke    # report.html, scores.csv and summary.csv",
    )
    sub.add_argument("run_dir", metavar="DIR", help="a run folder of train, or the folder of evaluate")
    sub.add_argument("--out", metavar="FILE", help="a new file (default DIR/report.html, which is renewed)")

    sub = command(
        "evaluate",
        _evaluate,
        "tune and train optimizers on a suite of tasks, cell by cell; the same command resumes, and one with "
        "more optimizers adds them",
        "evaluate smoke",
        "evaluate celo17_local --optimizers adam,muon,celo2,runs/a --run-dir runs/local",
        "evaluate celo17 steps=500 tasks.*.batch_size=64 --seeds 5 --skip-missing --optimizers lion",
        "evaluate smoke schedule=cosine --optimizers celo2 --weights celo2=hand_made celo2=theta.safetensors",
    )
    text = "a suite (celo-nnx list suites), or a path to a config file"
    sub.add_argument("suite", metavar="SUITE", help=text)
    text = "changes to it; tasks.*.KEY changes every task that has KEY"
    sub.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help=text)
    text = (
        "baselines (muon), variants with their hand-made theta (celo2), theta files, run folders and Python "
        "files with get_optimizer(learning_rate) ([LABEL=]PATH), separated by commas (default "
        "adam,muon,celo2; adam always)"
    )
    sub.add_argument("--optimizers", nargs="+", action="extend", default=[], metavar="NAMES", help=text)
    text = "theta of a variant, in the place of the hand-made one; several are compared"
    sub.add_argument("--weights", nargs="+", action="extend", default=[], metavar="[VARIANT=]PATH", help=text)
    sub.add_argument(
        "--seeds", type=int, metavar="N", help="runs of every learning rate (default: the suite's)"
    )
    text = "the folder of results (default runs/evaluate-SUITE)"
    sub.add_argument("--run-dir", metavar="DIR", help=text)
    text = "a folder of data files, looked up before CELO_NNX_DATA"
    sub.add_argument("--data-dir", default="", metavar="DIR", help=text)
    text = "leave out tasks whose data are absent, and say so in the report"
    sub.add_argument("--skip-missing", action="store_true", help=text)

    sub = command(
        "replay",
        _replay,
        "replay recorded trajectories; one JSON line a file, exit code 1 if one is not within tolerance",
        "replay golden/*.npz",
        "replay golden/celo2_wd0.npz --tolerance 1e-6 --set tile=2",
    )
    sub.add_argument("files", nargs="+", metavar="FILE", help="a recorded .npz or .json")
    sub.add_argument("--tolerance", type=float, metavar="X", help="besides each file's own")
    sub.add_argument("--twin", action="store_true", help="replay with the plain second implementation")
    text = "change the composed optimizer's config, such as tile=2; may be given several times"
    sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)

    sub = command(
        "import",
        _import,
        "published weights to a theta file: theta.state, safetensors or PyLO's, from a file or the Hub",
        "import celo.theta.state --out celo.safetensors",
        "import amoudgl/celo2 --variant celo2 --out celo2.safetensors",
        "import wide.state --variant celo2 optimizer.update_rule.hidden=(16,16) --out wide.safetensors",
    )
    text = "a file, a folder that holds one, or a Hub id (ORGANIZATION/NAME)"
    sub.add_argument("source", metavar="PATH|HUB_ID", help=text)
    sub.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="changes to the variant's preset")
    sub.add_argument("--variant", metavar="NAME", help="whose weights they are (default: as the leaves say)")
    sub.add_argument("--out", required=True, metavar="FILE", help="the theta file, a new .safetensors")

    sub = command(
        "export",
        _export,
        "a theta file or run folder to a published format",
        "export runs/a --format celo --out theta.state",
        "export celo2.safetensors --format pylo --out celo2_pylo.safetensors",
    )
    sub.add_argument("theta", metavar="THETA", help="a theta file or a run folder")
    text = "celo: theta.state; pylo: PyLO's state dict; safetensors: published names joined by /"
    sub.add_argument("--format", required=True, metavar="celo|pylo|safetensors", help=text)
    sub.add_argument("--variant", metavar="NAME", help="whose theta it is (default: as the leaves say)")
    sub.add_argument("--out", required=True, metavar="FILE", help="a new file")

    bench = commands.add_parser(
        "bench",
        help="measure meta-iterations, optimizer steps, orthogonalizations; one JSON line each",
        epilog="celo-nnx bench meta --help and celo-nnx bench step --help show examples",
    )
    kinds = bench.add_subparsers(
        dest="kind", metavar="meta|step|orthogonalization", required=True, parser_class=_Parser
    )
    sub = command(
        "meta",
        _bench_meta,
        "time a meta-iteration",
        "bench meta celo2:fast_velo",
        "bench meta celo2:fast_digits --peer naive",
        into=kinds,
    )
    config(sub)
    sub.add_argument(
        "--peer", action="append", default=[], metavar="naive", help="also measure the plain twin"
    )
    sub = command(
        "step",
        _bench_step,
        "time an optimizer step, beside optax.adamw and optax.contrib.muon",
        "bench step --optimizer celo2_base --params 1000000 10000000 --peer optax.adamw",
        "bench step --suite smoke",
        into=kinds,
    )
    sub.add_argument("--optimizer", nargs="+", action="extend", default=[], metavar="NAME", help="variants")
    sub.add_argument(
        "--params",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="parameters, of one or several models (default 10 million)",
    )
    sub.add_argument("--suite", metavar="SUITE", help="instead: the models of a suite's tasks")
    text = "optax's optimizers beside them (default both; optax.adamw always)"
    sub.add_argument("--peer", nargs="+", action="extend", default=[], metavar="NAME", help=text)
    command(
        "orthogonalization",
        _bench_orthogonalization,
        "error and time of every orthogonalization on a few shapes, a minute in all",
        "bench orthogonalization",
        into=kinds,
    )

    text = "the whole job on digits in a few minutes, with an HTML report"
    sub = command("quickstart", _quickstart, text, "quickstart", "quickstart --out runs/first")
    sub.add_argument("--out", metavar="DIR", help="a new folder (default runs/quickstart-N)")
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    commands = next(a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    if argv and not argv[0].startswith("-") and argv[0] not in commands:
        raise unknown("command", argv[0], commands)
    args, rest = parser.parse_known_args(argv)
    # argparse does not take KEY=VALUE after an option; people write it there.
    if rest and hasattr(args, "overrides"):
        args.overrides += [text for text in rest if not text.startswith("-")]
        rest = [text for text in rest if text.startswith("-")]
    if rest:
        raise UserError(f"unknown argument {rest[0]!r} (see celo-nnx {args.command} --help)")
    for text in getattr(args, "overrides", []):
        if "=" not in text:
            raise UserError(f"{text!r} is not of the form KEY=VALUE (see celo-nnx {args.command} --help)")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: arguments without the program's name; the process's own by default.

    Returns:
      The exit code.

    Example:
      >>> main(["frobnicate"])
      2
    """
    try:
        args = _parse(sys.argv[1:] if argv is None else list(argv))
        return args.run(args)
    except UserError as error:
        if processes.is_first():
            print(f"celo-nnx: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("celo-nnx: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
