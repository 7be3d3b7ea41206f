"""The command ``celo-nnx``: arguments in, one function call, lines out.

Exit codes: 0 done (a run that was asked to stop and has saved is done too), 1 a replay is not within its
tolerance, cells of a grid have failed or the doctor has found a fault, 2 a mistake of the user, too little
memory, or a run that has stopped itself (run.stop_after_non_finite), told in one line, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import celo_nnx
from celo_nnx import commands, grid_commands, processes
from celo_nnx.errors import UserError, unknown


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
    parser.add_argument("--version", action="version", version=f"celo-nnx {celo_nnx.__version__}")
    verbs = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    def command(
        name: str,
        run: Callable[[argparse.Namespace], int],
        text: str,
        *examples: str,
        into: Any = verbs,
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
        sub.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help=text)

    sub = command("list", commands.list_, "list what there is to choose from", "list", "list parts")
    sub.add_argument(
        "what",
        nargs="?",
        metavar="parts|variants|weights|tasks|suites|grids|baselines|data",
        help="one kind only",
    )

    sub = command(
        "describe",
        commands.describe,
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
        commands.train,
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
        commands.watch,
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
        commands.report,
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
        commands.evaluate,
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
    sub.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help=text)
    text = (
        "baselines (muon), variants with the package's weights or else their hand-made theta (celo2), theta "
        "files, run folders and Python files with get_optimizer(learning_rate) ([LABEL=]PATH), separated by "
        "commas (default adam,muon,celo2; adam always)"
    )
    sub.add_argument("--optimizers", nargs="+", action="extend", default=[], metavar="NAMES", help=text)
    text = "theta of a variant, a path or a name (hand_made, celo-nnx list weights); several are compared"
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
        commands.replay,
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
        commands.import_,
        "published weights to a theta file: theta.state, safetensors or PyLO's, from a file or the Hub",
        "import celo.theta.state --out celo.safetensors",
        "import amoudgl/celo2 --variant celo2 --out celo2.safetensors",
        "import wide.state --variant celo2 optimizer.update_rule.hidden=(16,16) --out wide.safetensors",
    )
    text = "a file, a folder that holds one, or a Hub id (ORGANIZATION/NAME)"
    sub.add_argument("source", metavar="PATH|HUB_ID", help=text)
    sub.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", default=[], help="changes to the variant's preset"
    )
    sub.add_argument("--variant", metavar="NAME", help="whose weights they are (default: as the leaves say)")
    sub.add_argument("--out", required=True, metavar="FILE", help="the theta file, a new .safetensors")

    sub = command(
        "export",
        commands.export,
        "a theta file or run folder to a published format",
        "export runs/a --format celo --out theta.state",
        "export celo2.safetensors --format pylo --out celo2_pylo.safetensors",
    )
    sub.add_argument("theta", metavar="THETA", help="a theta file or a run folder")
    text = "celo: theta.state; pylo: PyLO's state dict; safetensors: published names joined by /"
    sub.add_argument("--format", required=True, metavar="celo|pylo|safetensors", help=text)
    sub.add_argument("--variant", metavar="NAME", help="whose theta it is (default: as the leaves say)")
    sub.add_argument("--out", required=True, metavar="FILE", help="a new file")

    sub = command(
        "verify",
        commands.verify,
        "run the first meta-iterations of the package's weights again and compare their losses with the log; "
        "one JSON line, exit code 1 if they differ",
        "verify celo2",
        "verify celo2 --data-dir data",
    )
    sub.add_argument("name", metavar="NAME", help="weights (celo-nnx list weights)")
    text = "a folder of data files, looked up before CELO_NNX_DATA"
    sub.add_argument("--data-dir", default="", metavar="DIR", help=text)

    sub = command(
        "card",
        commands.card,
        "make weights that can be shipped, into a new folder of their name: theta, its card (recipe, data, "
        "scores, learning rate) and the record: log, selection, evaluation, pictures",
        "card runs/a --selection runs/selection --evaluation runs/local --out celo2",
        "card runs/a --theta runs/a/snapshots/0000500.safetensors --selection runs/selection "
        "--evaluation runs/local --out celo2",
    )
    sub.add_argument("run_dir", metavar="RUN_DIR", help="the run folder of train")
    sub.add_argument("--theta", metavar="FILE", help="a snapshot of it (default: its last theta)")
    text = "folder of evaluate on validation tasks, with this theta and all other candidates"
    sub.add_argument("--selection", required=True, metavar="DIR", help=text)
    text = "folder of evaluate with this theta"
    sub.add_argument("--evaluation", required=True, metavar="DIR", help=text)
    sub.add_argument("--command", dest="made_by", default="", metavar="TEXT", help="what made the run")
    sub.add_argument("--about", default="", metavar="TEXT", help="a line for celo-nnx list weights")
    sub.add_argument("--out", required=True, metavar="DIR", help="a new folder")

    command(
        "doctor",
        commands.doctor,
        "check versions, devices, memory, folders and the hub, replay a recorded trajectory, write and read "
        "a checkpoint; lines for a bug report, exit code 1 if something that is needed fails",
        "doctor",
        "doctor > doctor.txt",
    )

    sub = command(
        "explain",
        commands.explain,
        "what a learned rule does, as an HTML page and a CSV: its step along each feature, first-layer "
        "weights, against momentum, Adam and sign, and without each feature; about a minute",
        "explain celo2",
        "explain runs/a --out a.html",
        "explain celo2=hand_made --steps 100",
    )
    text = "weights (celo-nnx list weights), a theta file or a run folder; with VARIANT= whose theta it is"
    sub.add_argument("weights", metavar="[VARIANT=]WEIGHTS", help=text)
    text = "updates of the recorded training of a small network on digits (default 60)"
    sub.add_argument("--steps", type=int, default=60, metavar="N", help=text)
    text = "of that training (default: the weights' card, else the optimizer's schedule)"
    sub.add_argument("--learning-rate", type=float, metavar="X", help=text)
    text = "a new .html file (default explain-NAME.html, or explain.html in the run folder; renewed)"
    sub.add_argument("--out", metavar="FILE", help=text)

    grid_commands.add(verbs, command)

    bench = verbs.add_parser(
        "bench",
        help="measure meta-iterations, seeds, optimizer steps, orthogonalizations; one JSON line each",
        epilog="celo-nnx bench meta --help and celo-nnx bench step --help show examples",
    )
    kinds = bench.add_subparsers(
        dest="kind", metavar="meta|seeds|step|orthogonalization", required=True, parser_class=_Parser
    )
    sub = command(
        "meta",
        commands.bench_meta,
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
        "seeds",
        commands.bench_seeds,
        "time a meta-iteration of several seeds: one after the other, each on a core, vmapped, in one batch",
        "bench seeds celo2:fast_velo",
        "bench seeds celo2:fast_digits run.devices=1 --seeds 8",
        into=kinds,
    )
    config(sub)
    sub.add_argument("--seeds", type=int, default=4, metavar="N", help="how many (default 4)")
    sub = command(
        "step",
        commands.bench_step,
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
        commands.bench_orthogonalization,
        "error and time of every orthogonalization on a few shapes, a minute in all",
        "bench orthogonalization",
        into=kinds,
    )

    sub = command(
        "plan",
        commands.plan,
        "what an update takes on a mesh of devices, for a model too large for this machine: bytes of "
        "parameters, state and temporaries, work and traffic of one device, against AdamW and Muon",
        "plan --model gpt3-xl",
        "plan --model gpt3-xl --mesh fsdp=8 data=2,fsdp=8 fsdp=4,tensor=2 --optimizer adamw celo2",
        "plan --model gpt3-xl --mesh fsdp=16,tensor=8 --optimizer celo2 --set optimizer.state.dtype=bfloat16",
    )
    sub.add_argument("--model", required=True, metavar="NAME", help="gpt2-small, gpt3-xl, vit-b16, ...")
    text = "axes data, fsdp, tensor with their sizes (default fsdp=1: one device)"
    sub.add_argument("--mesh", nargs="+", metavar="AXIS=N,...", help=text)
    text = "adamw, muon or variants (default adamw muon celo2)"
    sub.add_argument("--optimizer", nargs="+", metavar="NAME", help=text)
    sub.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes to the variants")

    text = "the whole job on digits in a few minutes, with an HTML report"
    sub = command("quickstart", commands.quickstart, text, "quickstart", "quickstart --out runs/first")
    sub.add_argument("--out", metavar="DIR", help="a new folder (default runs/quickstart-N)")
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    known = next(a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    if argv and not argv[0].startswith("-") and argv[0] not in known:
        raise unknown("command", argv[0], known)
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
    except (MemoryError, RuntimeError) as error:
        # JAX's error is told by its words: importing JAX takes time.
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        words = " ".join(str(error).split())[:200] or type(error).__name__
        print(f"celo-nnx: error: out of memory: {words}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("celo-nnx: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
