"""What each command of ``celo-nnx`` does: parsed arguments in, one function call, lines out, an exit code.

Nothing here imports JAX before a command runs: ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterator

from celo_nnx import processes
from celo_nnx.errors import UserError


def list_(args: argparse.Namespace) -> int:
    from celo_nnx import listing

    text = "\n".join(listing.lines(what) for what in ([args.what] if args.what else listing.KINDS))
    print(text)
    if "OPTIMIZERS" in text:
        print(f"\n{listing.SOURCES}")
    return 0


def describe(args: argparse.Namespace) -> int:
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


def train(args: argparse.Namespace) -> int:
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


def watch(args: argparse.Namespace) -> int:
    from celo_nnx.watch import watch

    watch(args.run_dirs, every=args.every, once=args.once)
    return 0


def report(args: argparse.Namespace) -> int:
    from celo_nnx.evaluation import results

    if os.path.exists(os.path.join(args.run_dir, results.FILE_NAME)):
        from celo_nnx.evaluation.suite_report import write
    else:
        from celo_nnx.run_report import write
    print(f"report: {write(args.run_dir, args.out)}")
    return 0


def evaluate(args: argparse.Namespace) -> int:
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
        with _data_dir_as_typed():
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


@contextlib.contextmanager
def _data_dir_as_typed() -> Iterator[None]:
    """Calls the folder of data files in a mistake as the user does."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("run.data_dir", "--data-dir")) from None


def _is_setting(text: str) -> bool:
    """Whether a text changes a suite, as in ``steps=500`` or ``tasks.mlp.batch_size=8``."""
    from celo_nnx.evaluation.suites import SETTINGS

    key, equals, _ = text.partition("=")
    return bool(equals) and key.split(".")[0] in SETTINGS


def replay(args: argparse.Namespace) -> int:
    from celo_nnx.replay import main as replay

    return replay(args.files, args.tolerance, twin=args.twin, overrides=args.set)


def bench_meta(args: argparse.Namespace) -> int:
    from celo_nnx import bench
    from celo_nnx.config import load

    config = load(args.config, args.overrides)
    with processes.session():
        for row in bench.meta(config, args.peer):
            if processes.is_first():
                print(json.dumps(row), flush=True)
    return 0


def bench_seeds(args: argparse.Namespace) -> int:
    from celo_nnx.bench_seeds import seeds
    from celo_nnx.config import load

    for row in seeds(load(args.config, args.overrides), args.seeds):
        print(json.dumps(row), flush=True)
    return 0


def bench_step(args: argparse.Namespace) -> int:
    from celo_nnx import bench

    named = {"names": args.optimizer} if args.optimizer else {}
    if args.suite and args.params:
        raise UserError("--params and --suite are two ways to say which models: give one of them")
    models = [({}, bench.transformer_shapes(params)) for params in args.params or [10_000_000]]
    if args.suite:
        models = [({"task": task}, tree) for task, tree in bench.suite_shapes(args.suite).items()]
    for told, params in models:
        for row in bench.step(**named, params=params, peers=args.peer or bench.PEERS):
            print(json.dumps(told | row), flush=True)
    return 0


def bench_orthogonalization(args: argparse.Namespace) -> int:
    from celo_nnx.bench_orthogonalization import orthogonalization

    for row in orthogonalization():
        print(json.dumps(row), flush=True)
    return 0


def plan(args: argparse.Namespace) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a plan is for other machines' devices
    from celo_nnx import plan

    rows = []
    options = dict(meshes=args.mesh or plan.MESHES, optimizers=args.optimizer or plan.OPTIMIZERS)
    tell = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    for row in plan.plan(args.model, **options, overrides=args.set, tell=tell):
        print(json.dumps(row), flush=True)
        rows.append(row)
    print(*plan.table(rows), sep="\n", file=sys.stderr)
    return 0


def quickstart(args: argparse.Namespace) -> int:
    from celo_nnx.quickstart import run

    run(args.out)
    return 0


def import_(args: argparse.Namespace) -> int:
    from celo_nnx.pretrained.convert import import_weights

    row = import_weights(args.source, args.out, variant=args.variant, overrides=args.overrides)
    print(json.dumps(row))
    return 0


def export(args: argparse.Namespace) -> int:
    from celo_nnx.pretrained.convert import export_weights

    print(json.dumps(export_weights(args.theta, args.out, format=args.format, variant=args.variant)))
    return 0


def doctor(args: argparse.Namespace) -> int:
    from celo_nnx.doctor import main

    return main()


def verify(args: argparse.Namespace) -> int:
    from celo_nnx.verify import verify

    with _data_dir_as_typed():
        row = verify(args.name, data_dir=args.data_dir)
    print(json.dumps(row))
    return 0 if row["ok"] else 1


def card(args: argparse.Namespace) -> int:
    from celo_nnx.cards import write_card

    options = dict(selection=args.selection, evaluation=args.evaluation, theta=args.theta)
    made = write_card(args.run_dir, args.out, command=args.made_by, about=args.about, **options)
    row = {"folder": args.out, "name": made["name"], "digest": made["digest"]}
    print(json.dumps(row | made["learning_rate"] | made["evaluation"]["at_recommended_rate"]))
    return 0


def explain(args: argparse.Namespace) -> int:
    from celo_nnx.explain.page import explain

    options = dict(steps=args.steps, learning_rate=args.learning_rate)
    print(f"explained: {explain(args.weights, args.out, **options)}")
    return 0
