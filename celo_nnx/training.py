"""Meta-training as a run: a folder that starts, is interrupted, resumes and can be extended.

A run folder holds::

    config.json        the resolved config; everything outside ``run`` defines the result
    run_info.json      each start: versions, devices; digests of the data
    checkpoints/N/     Orbax: the whole state after N meta-iterations
    metrics.jsonl      one line a meta-iteration
    damaged/           checkpoints that could not be used when the run was resumed
    theta.safetensors  theta of the newest checkpoint, for use
    snapshots/         theta after every ``run.snapshots`` meta-iterations, where that is not 0
    lock               held by the one process that writes here

A run of several processes (:mod:`celo_nnx.processes`) has one folder, which the first process writes and
all read.

Everything random comes from the seed and the iteration number, and a checkpoint holds the whole state, so
a run that is killed at any moment and started again ends with the same theta, bit for bit, given the same
device kind and count, library versions and XLA flags.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from celo_nnx import lock, processes, run_files
from celo_nnx.devices import choose_devices
from celo_nnx.errors import UserError
from celo_nnx.interfaces import Family, PyTree
from celo_nnx.meta import checkpoint, pairs_of
from celo_nnx.meta.runlog import Counted, RunLog, Silent, read, rows
from celo_nnx.phases import Phase, phase_at, plan
from celo_nnx.theta_io import FILE_NAME, save_theta

Stop = Callable[[], int]
SNAPSHOTS = "snapshots"
NON_FINITE = 128  # in the place of a signal: no signal has so high a number


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a call of :func:`train` ended.

    Attributes:
      run_dir: the run folder.
      iteration: meta-iterations done over all starts.
      finished: all of ``run.iterations``, or of the phases' budgets, are done.
      stopped_by: the number of the signal that stopped it, 0 for none.
      theta: the meta-parameters, numpy; their average where ``meta.average`` keeps one.
      seconds: wall-clock time of this call's meta-iterations, the first one's compilation included.
    """

    run_dir: Path
    iteration: int
    finished: bool
    stopped_by: int
    theta: PyTree
    seconds: float


@dataclasses.dataclass
class Work:
    """What a phase needs in memory.

    Attributes:
      trainer: the meta-trainer.
      theta: shapes of its theta.
      families: names of its task families.
      data: digests of their data by name.
    """

    trainer: Any
    theta: PyTree
    families: tuple[str, ...]
    data: dict[str, str]


def train(
    config: Any, run_dir: str | os.PathLike[str], *, progress: bool = True, stop: Stop | None = None
) -> TrainResult:
    """Starts the run of this folder, or resumes it.

    Args:
      config: a ``ConfigDict`` with the sections ``seed, optimizer, theta_init, tasks, meta, run``.
      run_dir: the run folder; made if missing.
      progress: show progress on stderr (``run.progress`` must be true as well).
      stop: asked between dispatches; a true value saves and ends the call, see :func:`stop_on_signals`.

    Returns:
      How it ended.

    Raises:
      UserError: a config that differs from the run's outside ``run``, a folder in use or not a run's, a
        checkpoint that is not intact, changed data, a value out of range. Nothing is overwritten then.

    Example:
      >>> train(load("celo2:fast_digits", ["run.iterations=100"]), "runs/a")  # doctest: +SKIP
    """
    run_dir = Path(run_dir)
    processes.join()
    writer = processes.is_first()
    with contextlib.ExitStack() as stack:
        with processes.together(), run_files.disk_errors(run_dir):
            settings = run_files.resolve(config)
            run_files.check_settings(settings)
            phases = plan(config)
            known = run_files.read_config(run_dir) if writer else None
            if writer and known is None:
                run_files.check_free(run_dir)
            if known is not None:
                stack.enter_context(lock.hold(run_dir))
                run_files.agree(settings, run_files.read_config(run_dir) or {}, f"the run in {run_dir}")
            pairs = math.gcd(*(pairs_of(phase.config["meta"].get("estimator")) for phase in phases))
            recorded = run_files.recorded_devices(run_dir)
            devices = choose_devices(settings["run"]["devices"], pairs, recorded)
        processes.meet(devices)
        processes.same("their configs", checkpoint.canonical(settings))
        newest = max(checkpoint.steps(run_dir / "checkpoints"), default=None)
        processes.same(f"the newest checkpoint of {run_dir}", str(newest))
        with processes.together(), run_files.disk_errors(run_dir):
            works = Works(phases, devices, newest)
            if writer and known is None:  # only now, so that a mistake in the config leaves no folder behind
                run_files.make_folder(run_dir)
                stack.enter_context(lock.hold(run_dir))
                if (there := run_files.read_config(run_dir)) is not None:
                    run_files.agree(settings, there, f"the run in {run_dir}")
        processes.same("their data", checkpoint.canonical(works.data))
        with run_files.disk_errors(run_dir):
            return _run(settings, run_dir, works, devices, progress, stop or (lambda: 0))


def read_families(tasks: Mapping[str, Any], data_dir: str) -> tuple[list[Family], dict[str, str]]:
    """Returns the task families of ``config.tasks``, and the digests of their data by name."""
    from celo_nnx.tasks import build_families

    families = build_families(tasks, data_dir)
    return families, {family.name: checkpoint.data_digest(family) for family in families}


def assemble(
    config: Any, devices: int, resumed: bool = False, read: Callable[..., Any] = read_families
) -> Work:
    """Builds the optimizer with its first theta, the task families and the trainer.

    Args:
      config: the run's config, or a phase's.
      devices: from :func:`celo_nnx.devices.choose_devices`.
      resumed: theta comes from a checkpoint, so that a start from a file does not need the file again.
      read: gives families and digests.

    Returns:
      The work; theta and the root key come from ``config.seed``.
    """
    from celo_nnx.build import build
    from celo_nnx.meta import build_trainer
    from celo_nnx.pretrained.convert import first_theta

    families, data = read(config.tasks, config.run.data_dir)
    theta_key, _ = _keys(config.seed)
    start = None if resumed else first_theta(config.theta_init, config.optimizer)
    optimizer = build(config.optimizer, key=theta_key, theta_init=start)
    trainer = build_trainer(config, optimizer, families, devices=devices)
    theta = jax.eval_shape(lambda: optimizer.theta)
    return Work(trainer, theta, tuple(f.name for f in families), data)


def _keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """One key for the first theta, one for all of meta-training."""
    theta_key, root = jax.random.split(jax.random.key(seed))
    return theta_key, root


class Works:
    """Builds the work of every phase once, so that a mistake in a late one is told at the start.

    Only the work of the phase that was entered last is kept: its data lie on the device.

    Args:
      phases: of the run.
      devices: how many are used.
      at: meta-iterations of the newest checkpoint, None where there is none.

    Attributes:
      data: digests of all phases' data by name.

    Raises:
      UserError: a phase that cannot be built, or has another theta than the first.
    """

    def __init__(self, phases: Sequence[Phase], devices: int, at: int | None) -> None:
        self.phases, self._devices, self._resumed = phases, devices, at is not None
        self._read: dict[str, Any] = {}
        self._entered: tuple[Phase, Work] | None = None
        self.data: dict[str, str] = {}
        current = phase_at(phases, at or 0)
        # The one that will run comes last and stays.
        ordered = sorted(phases, key=lambda phase: phase is current)
        leaves = {phase.number: self._leaves(phase) for phase in ordered}
        for phase in phases[1:]:
            first, mine = leaves[0], leaves[phase.number]
            for name in sorted(first.keys() | mine.keys()):
                if first.get(name) != mine.get(name):
                    pair = f"{mine.get(name, 'absent')}, in {phases[0].name!r} {first.get(name, 'absent')}"
                    raise UserError(f"phase {phase.name!r} has another theta: {name!r} is {pair}")

    def enter(self, phase: Phase) -> Work:
        """Returns the work of a phase."""
        if self._entered is None or self._entered[0] is not phase:
            self._entered = None  # frees the arrays of the phase before
            work = self._assemble(phase)
            self._entered = phase, work
        return self._entered[1]

    def _assemble(self, phase: Phase) -> Work:
        """The first phase alone starts from ``theta_init``; the others go on with what they are given."""
        try:
            return assemble(phase.config, self._devices, self._resumed or phase.number > 0, self._families)
        except UserError as error:
            raise UserError(f"phase {phase.name!r}: {error}" if phase.name else str(error)) from None

    def _leaves(self, phase: Phase) -> dict[str, str]:
        """Shape and dtype of theta's leaves in a phase, as text; notes the digests of its data."""
        work = self.enter(phase)
        self.data |= {f"{phase.name}/{k}" if phase.name else k: v for k, v in work.data.items()}
        return {k: f"{x.dtype}{list(x.shape)}" for k, x in checkpoint.flatten(work.theta).items()}

    def _families(self, tasks: Any, data_dir: str) -> Any:
        """Families and digests; those of equal tasks are read once."""
        key = json.dumps(tasks.to_dict(), sort_keys=True)
        if key not in self._read:
            self._read[key] = read_families(tasks, data_dir)
        return self._read[key]


def _run(
    settings: dict[str, Any], run_dir: Path, works: Works, devices: int, progress: bool, stop: Stop
) -> TrainResult:
    """Loads the newest checkpoint, does what is left, and saves; the folder is locked."""
    options, folder = settings["run"], run_dir / "checkpoints"
    root, total = _keys(settings["seed"])[1], min(options["iterations"], works.phases[-1].end)
    info = run_files.environment(devices) | {"data": works.data}
    with processes.together(), run_files.disk_errors(run_dir):
        loaded = _load(settings, run_dir, works, root, info)
    start = loaded.step if loaded else 0

    log: RunLog | Silent = Silent()
    with processes.together(), run_files.disk_errors(run_dir):
        if processes.is_first():
            for step, reason in loaded.refused if loaded else ():
                place = checkpoint.set_aside(folder, step)
                print(f"note: {reason}; it is now {place}, the run goes on from {start}", file=sys.stderr)
            run_files.write_json(run_dir / "config.json", settings)
            log = RunLog(
                run_dir,
                start,
                total,
                progress=progress and options["progress"],
                tensorboard=options["tensorboard"],
                wandb=options["wandb"],
                name=run_dir.absolute().name,
            )
            run_files.note_start(run_dir, start, info)

    def save(iteration: int, state: PyTree) -> None:
        log.sync()
        checkpoint.save(folder, iteration, state, {"config": settings, **info}, options["keep"])
        keep_theta(iteration, processes.to_host(learned(state)))

    def keep_theta(iteration: int, theta: PyTree) -> None:
        if processes.is_first():
            header = run_files.theta_header(settings, iteration, phase_at(works.phases, iteration))
            save_theta(run_dir / FILE_NAME, theta, header)
            if snapshot_due(options["snapshots"], iteration) == iteration:
                (run_dir / SNAPSHOTS).mkdir(exist_ok=True)
                save_theta(run_dir / SNAPSHOTS / f"{iteration:07d}.safetensors", theta, header)

    limit = options.get("stop_after_non_finite", 0)
    counted = Counted(log, limit, read(run_dir / "metrics.jsonl", start) if limit else ())

    def stop_or_spoiled() -> int:
        return NON_FINITE if counted.over() else stop()

    with contextlib.closing(counted):
        begin = time.monotonic()
        if loaded is not None:
            state = loaded.state
            # A kill may have come between the checkpoint and these files.
            keep_theta(start, processes.to_host(learned(state)))
        else:
            state = works.enter(phase_at(works.phases, 0)).trainer.init(root)
            save(0, state)
        state, iteration, signum = _iterate(
            options, total, works, root, state, start, counted, save, stop_or_spoiled
        )
        theta = processes.to_host(learned(state))
    seconds = time.monotonic() - begin
    if signum == NON_FINITE:
        with processes.together():
            raise UserError(
                f"{run_dir} is stopped and saved after meta-iteration {iteration}: {counted}, and "
                f"run.stop_after_non_finite = {limit}; a larger number, or 0 for never, goes on from here"
            )
    return TrainResult(run_dir, iteration, iteration >= total, signum, theta, seconds)


def _load(
    settings: dict[str, Any], run_dir: Path, works: Works, root: jax.Array, info: dict[str, Any]
) -> checkpoint.Loaded | None:
    """Reads the newest checkpoint that can be used, None at the start of a run; changes nothing."""
    folder = run_dir / "checkpoints"

    def like(step: int) -> PyTree:
        # Shapes are enough to check a checkpoint against; a resumed run need not compile the first state.
        return jax.eval_shape(works.enter(phase_at(works.phases, step)).trainer.init, root)

    def check(step: int, record: dict[str, Any]) -> None:
        run_files.agree(settings, record.get("config", {}), f"checkpoint {folder / str(step)}")
        run_files.same_data(works.data, record.get("data", {}))

    loaded = checkpoint.load(folder, like, check)
    run_files.note_start(run_dir, None, info)
    if loaded is not None:
        run_files.tell_differences(loaded.record, info)
    elif (run_dir / FILE_NAME).exists() or run_files.has_rows(run_dir):
        raise UserError(
            f"{run_dir} has results but no checkpoint in {folder}; bring it back or use a new --run-dir"
        )
    return loaded


def learned(state: Mapping[str, PyTree]) -> PyTree:
    """Returns what a run has learned: the average of theta where the state keeps one, else theta."""
    return state["average"]["theta"] if "average" in state else state["theta"]


def snapshot_due(every: int, iteration: int) -> int:
    """Returns the first iteration from this one on whose theta is kept for good; none is with ``every`` 0.

    Example:
      >>> snapshot_due(500, 501), snapshot_due(500, 1000)
      (1000, 1000)
    """
    return math.ceil(iteration / every) * every if every else sys.maxsize


def _iterate(
    options: Mapping[str, Any],
    total: int,
    works: Works,
    root: jax.Array,
    state: PyTree,
    iteration: int,
    log: Counted,
    save: Callable[[int, PyTree], None],
    stop: Stop,
) -> tuple[PyTree, int, int]:
    """Runs dispatches until all is done or ``stop``; ends with a checkpoint of the last iteration.

    The metrics of a dispatch are read while the next one runs, so the device never waits for the host. A
    phase is left when the next one's first dispatch is due: a checkpoint at a boundary is the ended phase's.
    """
    waiting: list[tuple[Any, int, int]] = []
    phase = phase_at(works.phases, iteration)
    work = works.enter(phase)

    def flush() -> None:
        while waiting:
            metrics, first, count = waiting.pop(0)
            values = processes.to_host(metrics)
            log.write(rows(values, first, count, work.families, time.time(), phase.name))

    saved, last = iteration, time.monotonic()

    def ask() -> list[int]:
        """The signal, and whether a checkpoint is due; processes ask for all of them."""
        due = time.monotonic() - last >= options["checkpoint_seconds"]
        return processes.most([stop(), due], after=waiting)

    signum, due = ask()
    while iteration < total and not signum:
        if iteration == phase.end:
            flush()
            if saved != iteration:
                save(iteration, state)
                saved, last = iteration, time.monotonic()
            theta = processes.to_host(state["theta"])
            phase = works.phases[phase.number + 1]
            work = works.enter(phase)
            state = work.trainer.init(root, theta, iteration=iteration, phase=phase.number)
        snapshot = snapshot_due(options["snapshots"], iteration + 1)
        count = min(options["iterations_per_dispatch"], min(total, phase.end, snapshot) - iteration)
        state, metrics = work.trainer.run(state, count)
        flush()
        waiting.append((metrics, iteration, count))
        iteration += count
        signum, due = ask()
        if due or iteration == snapshot:
            flush()
            save(iteration, state)
            saved, last = iteration, time.monotonic()
    flush()
    if saved != iteration:
        save(iteration, state)
    return state, iteration, signum * (iteration < total)


@contextlib.contextmanager
def stop_on_signals(words: str = "stopping: the dispatch under way is finished and saved") -> Iterator[Stop]:
    """Turns SIGTERM and SIGINT into a request to save and stop.

    A second SIGINT quits at once, which loses no more than the time since the last checkpoint; a second
    SIGTERM does not, since cluster managers send it twice.

    Args:
      words: what a signal is answered with on stderr.

    Yields:
      A function that returns the number of the signal that came, or 0.
    """
    received: list[int] = []

    def handle(signum: int, frame: Any) -> None:
        if signum == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(signum)
        os.write(2, f"{words}\n".encode())

    before = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
