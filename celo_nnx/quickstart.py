"""The whole job in a few minutes: meta-train, lose the process, resume, use the result, report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from celo_nnx.build import build
from celo_nnx.config import load
from celo_nnx.description import describe
from celo_nnx.devices import choose_devices, cores
from celo_nnx.errors import UserError
from celo_nnx.evaluation import report
from celo_nnx.evaluation.curves import train_curves, tune
from celo_nnx.evaluation.page import number
from celo_nnx.evaluation.plots import MetaCurve, Method, to_svg, training_figure
from celo_nnx.tasks import build_families
from celo_nnx.theta_io import load_theta

POLL_SECONDS = 0.25
STOP_SECONDS = 60.0  # a child that was asked to stop has this long to save


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the quickstart does; the defaults fit six minutes on two cores.

    Attributes:
      config: the variant and its tasks.
      overrides: changes to it, for meta-training.
      iterations: meta-iterations.
      seconds: meta-training is stopped (and saved) after this long even if iterations are left.
      hidden: widths of the unseen network's hidden layers.
      activation: of the unseen network.
      steps: updates per training run of the unseen network.
      seeds: one run for each.
      learning_rates: one grid for every optimizer.
    """

    config: str = "celo2:fast_digits"
    overrides: tuple[str, ...] = (
        "theta_init.kind=hand_made",
        "theta_init.noise=0.01",
        "meta.optimizer.learning_rate=3e-4",
    )
    iterations: int = 800
    seconds: float = 130.0
    hidden: tuple[int, ...] = (128, 128)
    activation: str = "tanh"
    steps: int = 200
    seeds: tuple[int, ...] = (0, 1, 2)
    learning_rates: tuple[float, ...] = tuple(float(f"{10 ** (k / 2):.3g}") for k in range(-8, -1))


class Narrator:
    """Tells what is going on: lines with the time passed, and one line that is rewritten on a terminal."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self._terminal = sys.stdout.isatty()
        self._shown = 0
        self._last = self.start

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def say(self, text: str) -> None:
        """Prints a line."""
        self._clear()
        print(f"[{self.seconds():4.0f} s] {text}", flush=True)

    def progress(self, text: str) -> None:
        """Shows a passing state: in place on a terminal, else a line every ten seconds."""
        if self._terminal:
            self._clear()
            line = f"[{self.seconds():4.0f} s] {text}"[:100]
            print(line, end="\r", flush=True)
            self._shown = len(line)
        elif time.monotonic() - self._last >= 10:
            self._last = time.monotonic()
            self.say(text)

    def _clear(self) -> None:
        if self._shown:
            print(" " * self._shown, end="\r")
            self._shown = 0


@dataclasses.dataclass(frozen=True)
class Course:
    """How meta-training went: the log's records and the interruptions, as (iteration, words)."""

    records: list[dict[str, Any]]
    events: tuple[tuple[int, str], ...]
    seconds: float


def run(out_dir: str | os.PathLike[str] | None = None, settings: Settings | None = None) -> Path:
    """Meta-trains a small Celo2 from the hand-made theta, kills and resumes it, and compares the result.

    Args:
      out_dir: a folder that does not exist yet or is empty; by default the next free
        ``runs/quickstart-<n>``.
      settings: sizes; by default about five minutes on two cores.

    Returns:
      The path of the HTML report. Beside it lie ``results.json``, ``curves.svg`` and the run folder ``meta``.

    Raises:
      UserError: the folder holds files, or meta-training failed.

    Example:
      >>> run()  # doctest: +SKIP
      PosixPath('runs/quickstart-1/report.html')
    """
    settings = settings or Settings()
    folder = _claim(out_dir)
    narrator = Narrator()
    narrator.say(f"quickstart: everything goes to {folder}")
    course = meta_train(settings, folder, narrator)
    return _write(settings, folder, course, narrator)


def train_command(settings: Settings, run_dir: Path) -> list[str]:
    """The command line that starts meta-training, and that resumes it after any interruption."""
    command = [sys.executable, "-m", "celo_nnx", "train", settings.config, *settings.overrides]
    command += [f"run.iterations={settings.iterations}", "run.checkpoint_seconds=5.0", "run.progress=False"]
    return [*command, "--run-dir", str(run_dir)]


def meta_train(settings: Settings, folder: Path, narrator: Narrator) -> Course:
    """Runs the train command in a child, kills it half way with SIGKILL, and runs the same command again."""
    begin = narrator.seconds()
    command = train_command(settings, folder / "meta")
    narrator.say(f"meta-training: celo-nnx {' '.join(command[3:])}")
    log = _Log(folder / "meta" / "metrics.jsonl")
    label = f"of {settings.iterations}"

    with _child(command, folder / "train.log") as child:
        saved, first = folder / "meta" / "theta.safetensors", float("inf")
        while child.poll() is None:
            log.read()
            if log.records:
                first = min(first, time.time())
            narrator.progress(f"meta-iteration {log.told()} {label}" if log.records else "compiling")
            late = narrator.seconds() - begin > settings.seconds / 2
            # Theta is also saved at the very start; a later save means that there is progress to resume.
            has_saved = saved.exists() and saved.stat().st_mtime > first
            if (late or log.iteration >= settings.iterations / 2) and has_saved:
                child.kill()
            time.sleep(POLL_SECONDS)
        _check(child.returncode, (0, -signal.SIGKILL), folder)
    log.read()
    events = ()
    if child.returncode == -signal.SIGKILL:
        killed = log.iteration
        narrator.say(f"killed with kill -9 at meta-iteration {killed}; starting the same command again")
        resumed = _resume(command, settings, folder, log, narrator, begin)
        events = ((killed, f"kill -9 here; resumed by itself from iteration {resumed}"),)
    if not log.records:
        raise UserError(f"meta-training left no records: see {folder / 'train.log'}")
    narrator.say(f"meta-trained: iteration {log.told()}")
    return Course(log.records, events, narrator.seconds() - begin)


def _resume(
    command: list[str], settings: Settings, folder: Path, log: _Log, narrator: Narrator, begin: float
) -> int:
    """Runs the command to its end or to the time limit; returns the iteration that it resumed from."""
    resumed, told, stopped = log.iteration, False, False
    with _child(command, folder / "train.log") as child:
        while child.poll() is None:
            log.read()
            # The log is cut back to the checkpoint first; new records come after the compilation.
            resumed = min(resumed, log.iteration)
            if log.iteration > resumed and not told:
                narrator.say(f"it resumed by itself from its checkpoint at meta-iteration {resumed}")
                told = True
            state = f"meta-iteration {log.told()} of {settings.iterations}" if told else "compiling again"
            narrator.progress(state)
            if told and not stopped and narrator.seconds() - begin > settings.seconds:
                narrator.say("the time for meta-training is over: SIGINT, upon which it saves and ends")
                child.send_signal(signal.SIGINT)
                stopped = True
            time.sleep(POLL_SECONDS)
        _check(child.returncode, (0, 128 + signal.SIGINT, -signal.SIGINT) if stopped else (0,), folder)
    log.read()
    return resumed


class _Log:
    """The records of a growing ``metrics.jsonl``; a torn last line is left for the next reading."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []

    @property
    def iteration(self) -> int:
        """Meta-iterations recorded so far."""
        return int(self.records[-1]["iteration"]) if self.records else 0

    def told(self) -> str:
        """The last record in words."""
        losses = [r["loss"] for r in self.records[-50:] if r["loss"] is not None]
        return f"{self.iteration} (meta-loss {np.mean(losses):.3f})" if losses else str(self.iteration)

    def read(self) -> None:
        """Reads the file anew; before it exists there are no records."""
        with contextlib.suppress(FileNotFoundError):
            lines = self.path.read_text("utf-8").split("\n")[:-1]
            self.records = [json.loads(line) for line in lines if line.strip()]


@contextlib.contextmanager
def _child(command: list[str], log: Path) -> Iterator[subprocess.Popen]:
    """Runs a command with its output in a file, and never leaves it behind."""
    with open(log, "ab") as output:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            yield child
        finally:
            if child.poll() is None:
                child.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(STOP_SECONDS)
            if child.poll() is None:
                child.kill()
            child.wait()


def _check(code: int, good: tuple[int, ...], folder: Path) -> None:
    """Raises when the train command failed, with the last line that it printed."""
    if code not in good:
        log = folder / "train.log"
        lines = [line for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
        last = lines[-1] if lines else "it printed nothing"
        raise UserError(f"meta-training ended with exit code {code}: {last} (all of its output: {log})")


def _claim(out_dir: str | os.PathLike[str] | None) -> Path:
    """Makes the folder that everything goes to; never one that holds files."""
    if out_dir:
        folder = Path(out_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            used = any(folder.iterdir())
        except OSError as error:
            raise UserError(f"cannot use {folder} as the output folder: {error.strerror}") from error
        if used:
            raise UserError(f"{folder} is not empty: name a new folder, so that nothing is overwritten")
        return folder
    for n in range(1, 10_000):
        folder = Path("runs") / f"quickstart-{n}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(
                f"cannot make {folder} here: {error.strerror}; name a folder with --out"
            ) from error
    raise UserError("runs/quickstart-1 to -9999 all exist: name a folder with --out")


def compare(settings: Settings, config: Any, run_dir: Path, narrator: Narrator) -> list[Method]:
    """Trains the unseen network with the meta-trained, the hand-made and a random theta, and with Adam.

    All share the learning-rate grid, the cosine schedule, the seeds and so the batches.

    Args:
      settings: the network, the grid and the seeds.
      config: the resolved config of meta-training.
      run_dir: where meta-training left its theta.
      narrator: is told what is going on.

    Returns:
      The methods, Adam last.
    """
    family = build_families(config.tasks, config.run.data_dir)[0]
    task = dataclasses.replace(family.task, hidden=settings.hidden, activation=settings.activation)
    learned = build(config.optimizer, theta_init={"kind": "hand_made"})
    drawn = build(config.optimizer, key=jax.random.key(config.seed), theta_init={"kind": "random"})

    def decay(rate: Any) -> optax.Schedule:
        return lambda count: rate * 0.5 * (1 + jnp.cos(jnp.pi * count / settings.steps))

    def make_learned(rate: Any, theta: Any) -> optax.GradientTransformation:
        return learned.with_theta(theta).as_optax(num_steps=settings.steps, learning_rate=decay(rate))

    def make_adam(rate: Any) -> optax.GradientTransformation:
        return optax.adam(decay(rate))

    contenders = [
        ("Celo2, meta-trained here", make_learned, (load_theta(run_dir, like=learned.theta),)),
        ("Celo2, hand-made theta", make_learned, (learned.theta,)),
        ("Celo2, random theta", make_learned, (drawn.theta,)),
        ("Adam", make_adam, ()),
    ]
    grid = dict(learning_rates=settings.learning_rates, seeds=settings.seeds, steps=settings.steps)
    runs = len(settings.learning_rates) * len(settings.seeds)
    methods = []
    for name, make, context in contenders:
        narrator.say(f"training the unseen network {runs} times with: {name}")
        begin = narrator.seconds()
        losses = train_curves(make, task, family.train, context=context, **grid)
        tuned = tune(losses, settings.learning_rates)
        methods.append(Method(name, losses, tuned, narrator.seconds() - begin))
    return methods


def _summary(methods: list[Method]) -> list[str]:
    """The result in words, whichever way it came out."""
    ours, hand, _, adam = (method.tuned for method in methods)
    ranking = "at or below" if ours.median <= adam.median else "above"
    return [
        f"The optimizer that was meta-trained here reaches a median final loss of {number(ours.median)} on "
        f"a network that it never saw, {ranking} the {number(adam.median)} of Adam, both at their best "
        "learning rate.",
        f"The hand-made theta that meta-training started from reaches {number(hand.median)}.",
    ]


def _steps(settings: Settings, course: Course) -> list[str]:
    """What was done, in order."""
    rates = ", ".join(f"{rate:g}" for rate in settings.learning_rates)
    return [
        f"Meta-trained {settings.config} with {', '.join(settings.overrides)} for "
        f"{course.records[-1]['iteration']} meta-iterations.",
        *(f"At meta-iteration {iteration}: {what}." for iteration, what in course.events),
        f"Trained the unseen network with every learning rate of {rates} and {len(settings.seeds)} seeds: "
        "with the meta-trained theta, with the hand-made one (Muon's rule written in the MLP's weights), "
        "with a random one (where meta-training from scratch would start), and with Adam.",
        "Chose every optimizer's learning rate by its median final loss.",
    ]


def _write(settings: Settings, folder: Path, course: Course, narrator: Narrator) -> Path:
    """Compares on the unseen network and writes the report and the files beside it."""
    # Runs are spread over as many host devices as there are cores; JAX must know before its first use.
    choose_devices(0, cores())
    config = load(settings.config, [*settings.overrides, f"run.iterations={settings.iterations}"])
    methods = compare(settings, config, folder / "meta", narrator)
    widths, met = ("-".join(map(str, hidden)) or "none" for hidden in (settings.hidden, config.tasks.hidden))
    records = course.records
    losses = np.array([np.nan if r["loss"] is None else r["loss"] for r in records], np.float64)
    content = report.Report(
        title="Celo2, meta-trained, interrupted, resumed and used",
        summary=_summary(methods),
        steps=_steps(settings, course),
        meta=MetaCurve(np.array([r["iteration"] for r in records]), losses, course.events),
        methods=methods,
        task=f"An MLP with hidden layers {widths} ({settings.activation}) on {config.tasks.datasets[0]}, "
        f"{settings.steps} steps of batch {config.tasks.batch_size}, cosine schedule. "
        f"Meta-training only saw the hidden layers {met} ({config.tasks.activation}).",
        optimizer=describe(build(config.optimizer, theta_init={"kind": "hand_made"})),
        config=json.dumps(json.loads(config.to_json()), indent=2),
        timings=[
            ("Meta-training, with the restart", course.seconds),
            *((f"Training with {method.name}, compilation included", method.seconds) for method in methods),
            ("Total", narrator.seconds()),
        ],
    )
    picture = to_svg(training_figure(methods), "curves", standalone=True)
    (folder / "curves.svg").write_text(picture, encoding="utf-8")
    rows = report.score_rows(methods)
    (folder / "results.json").write_text(json.dumps(_jsonable(rows), indent=2), encoding="utf-8")
    path = report.write(content, folder / "report.html")
    narrator.say("done; median final loss at each optimizer's best learning rate:")
    for row in rows:
        seeds = ", ".join(number(loss) for loss in row["seeds"])
        print(f"  {row['name']:<26} {number(row['median']):>9}   lr {row['learning_rate']:<8g} seeds {seeds}")
        if row["warning"]:
            print(f"  {'':<26} note: {row['warning']}")
    print(f"report: {path.resolve()}", flush=True)
    return path


def _jsonable(value: Any) -> Any:
    """The same with None for numbers that JSON lacks."""
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
