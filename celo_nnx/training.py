"""Meta-training as a run: a folder that starts, is interrupted, resumes and can be extended.

A run folder holds::

    config.json        the resolved config; everything outside ``run`` defines the result
    run_info.json      each start: versions, devices; digests of the data
    checkpoints/N/     Orbax: the whole state after N meta-iterations
    metrics.jsonl      one line a meta-iteration
    theta.safetensors  theta of the newest checkpoint, for use
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
import importlib.metadata
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from celo_nnx import processes
from celo_nnx.devices import choose_devices
from celo_nnx.errors import UserError, require
from celo_nnx.interfaces import Family, PyTree
from celo_nnx.meta import checkpoint, lock, pairs_of
from celo_nnx.meta.runlog import RunLog, Silent, rows
from celo_nnx.theta_io import FILE_NAME, save_theta

PACKAGES = ("celo-nnx", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
SECTIONS = ("seed", "optimizer", "theta_init", "tasks", "meta", "run")
Stop = Callable[[], int]


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a call of :func:`train` ended.

    Attributes:
      run_dir: the run folder.
      iteration: meta-iterations done over all starts.
      finished: all of ``run.iterations`` are done.
      stopped_by: the number of the signal that stopped it, 0 for none.
      theta: the meta-parameters, numpy.
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
    """What a run needs in memory: the trainer, the names of its families, and its data's digests."""

    trainer: Any
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
        with processes.together(), _disk_errors(run_dir):
            settings = resolve(config)
            _check_settings(settings)
            known = _read_config(run_dir) if writer else None
            if writer and known is None:
                _check_free(run_dir)
            if known is not None:
                stack.enter_context(lock.hold(run_dir))
                _agree(settings, _read_config(run_dir) or {}, f"the run in {run_dir}")
            pairs = pairs_of(settings["meta"]["estimator"])
            devices = choose_devices(settings["run"]["devices"], pairs, _recorded_devices(run_dir))
        processes.meet(devices)
        processes.same("their configs", checkpoint.canonical(settings))
        found = checkpoint.steps(run_dir / "checkpoints")
        processes.same(f"the newest checkpoint of {run_dir}", str(found[-1:]))
        with processes.together(), _disk_errors(run_dir):
            work = assemble(config, devices, resumed=bool(found))
            if writer and known is None:  # only now, so that a mistake in the config leaves no folder behind
                _make_folder(run_dir)
                stack.enter_context(lock.hold(run_dir))
                if (there := _read_config(run_dir)) is not None:
                    _agree(settings, there, f"the run in {run_dir}")
        processes.same("their data", checkpoint.canonical(work.data))
        with _disk_errors(run_dir):
            return _run(settings, run_dir, work, devices, progress, stop or (lambda: 0))


@contextlib.contextmanager
def _disk_errors(run_dir: Path) -> Iterator[None]:
    """Tells what the operating system refuses in one line."""
    try:
        yield
    except OSError as error:
        what = f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
        raise UserError(f"the run directory {run_dir} cannot be used: {what}") from error


def assemble(config: Any, devices: int, resumed: bool = False) -> Work:
    """Builds the optimizer with its first theta, the task families and the trainer.

    Args:
      config: the run's config.
      devices: from :func:`celo_nnx.devices.choose_devices`.
      resumed: theta comes from a checkpoint, so that a start from a file does not need the file again.

    Returns:
      The run's work; theta and the root key come from ``config.seed``.
    """
    from celo_nnx.build import build
    from celo_nnx.meta import build_trainer
    from celo_nnx.tasks import build_families

    families = build_families(config.tasks, config.run.data_dir)
    theta_key, _ = _keys(config.seed)
    optimizer = build(config.optimizer, key=theta_key, theta_init=None if resumed else config.theta_init)
    trainer = build_trainer(config, optimizer, families, devices=devices)
    return Work(trainer, tuple(f.name for f in families), {f.name: data_digest(f) for f in families})


def data_digest(family: Family) -> str:
    """Returns the SHA-256 over a family's training and test arrays."""
    arrays = {f"train/{k}": np.asarray(v) for k, v in family.train.items()}
    arrays |= {f"test/{k}": np.asarray(v) for k, v in family.test.items()}
    return checkpoint.digest(arrays, {})


def _keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """One key for the first theta, one for all of meta-training."""
    theta_key, root = jax.random.split(jax.random.key(seed))
    return theta_key, root


def _run(
    settings: dict[str, Any], run_dir: Path, work: Work, devices: int, progress: bool, stop: Stop
) -> TrainResult:
    """Loads the newest checkpoint, does what is left, and saves; the folder is locked."""
    options, folder = settings["run"], run_dir / "checkpoints"
    root = _keys(settings["seed"])[1]
    info = _environment(devices) | {"data": work.data}
    start = 0
    with processes.together(), _disk_errors(run_dir):
        # Shapes are enough to check a checkpoint against; a resumed run need not compile the first state.
        loaded = checkpoint.load(folder, jax.eval_shape(work.trainer.init, root))
        _note_start(run_dir, None, info)
        if loaded is None and ((run_dir / FILE_NAME).exists() or runlog_rows(run_dir)):
            raise UserError(
                f"{run_dir} has results but no checkpoint in {folder}; bring it back or use a new --run-dir"
            )
        if loaded is not None:
            start, state, record = loaded
            _agree(settings, record.get("config", {}), f"checkpoint {folder / str(start)}")
            _same_data(work.data, record.get("data", {}))
            _tell_differences(record, info)

    def begin_log() -> RunLog:
        write_json(run_dir / "config.json", settings)
        log = RunLog(
            run_dir,
            start,
            options["iterations"],
            progress=progress and options["progress"],
            tensorboard=options["tensorboard"],
            wandb=options["wandb"],
            name=run_dir.absolute().name,
        )
        _note_start(run_dir, start, info)
        return log

    log: RunLog | Silent = Silent()
    with processes.together(), _disk_errors(run_dir):
        if processes.is_first():
            log = begin_log()

    def save(iteration: int, state: PyTree) -> None:
        log.sync()
        checkpoint.save(folder, iteration, state, {"config": settings, **info}, options["keep"])
        keep_theta(iteration, processes.to_host(state["theta"]))

    def keep_theta(iteration: int, theta: PyTree) -> None:
        if processes.is_first():
            save_theta(run_dir / FILE_NAME, theta, _theta_header(settings, iteration))

    with contextlib.closing(log):
        begin = time.monotonic()
        if loaded is None:
            state = work.trainer.init(root)
            save(0, state)
        state, iteration, signum = _iterate(settings, work, state, start, log, save, stop)
        theta = processes.to_host(state["theta"])
        if iteration == start:  # the file may be older than the checkpoint, after a kill between the two
            keep_theta(iteration, theta)
    seconds = time.monotonic() - begin
    return TrainResult(run_dir, iteration, iteration >= options["iterations"], signum, theta, seconds)


def _iterate(
    settings: dict[str, Any],
    work: Work,
    state: PyTree,
    iteration: int,
    log: RunLog | Silent,
    save: Callable[[int, PyTree], None],
    stop: Stop,
) -> tuple[PyTree, int, int]:
    """Runs dispatches until all is done or ``stop``; ends with a checkpoint of the last iteration.

    The metrics of a dispatch are read while the next one runs, so the device never waits for the host.
    """
    total, most = settings["run"]["iterations"], settings["run"]["iterations_per_dispatch"]
    waiting: list[tuple[Any, int, int]] = []

    def flush() -> None:
        while waiting:
            metrics, first, count = waiting.pop(0)
            log.write(rows(processes.to_host(metrics), first, count, work.families, time.time()))

    saved, last = iteration, time.monotonic()

    def ask() -> list[int]:
        """The signal, and whether a checkpoint is due; processes ask for all of them."""
        due = time.monotonic() - last >= settings["run"]["checkpoint_seconds"]
        return processes.most([stop(), due], after=waiting)

    signum, due = ask()
    while iteration < total and not signum:
        count = min(most, total - iteration)
        state, metrics = work.trainer.run(state, count)
        flush()
        waiting.append((metrics, iteration, count))
        iteration += count
        signum, due = ask()
        if due:
            flush()
            save(iteration, state)
            saved, last = iteration, time.monotonic()
    flush()
    if saved != iteration:
        save(iteration, state)
    return state, iteration, signum * (iteration < total)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Turns SIGTERM and SIGINT into a request to save and stop.

    A second SIGINT quits at once, which loses no more than the time since the last checkpoint; a second
    SIGTERM does not, since cluster managers send it twice.

    Yields:
      A function that returns the number of the signal that came, or 0.
    """
    received: list[int] = []

    def handle(signum: int, frame: Any) -> None:
        if signum == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(signum)
        os.write(2, b"stopping: the dispatch under way is finished and saved\n")

    before = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def resolve(config: Any) -> dict[str, Any]:
    """Returns the config as JSON values (tuples become lists), the form that is stored and compared."""
    try:
        return json.loads(json.dumps(config.to_dict() if hasattr(config, "to_dict") else dict(config)))
    except (TypeError, ValueError) as error:
        raise UserError(f"the config has a value that JSON cannot hold: {error}") from error


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Lists the keys outside ``run`` whose values differ.

    Returns:
      (dotted key, value in ``one``, value in ``other``), sorted; an absent value is ``"(absent)"``.

    Example:
      >>> differences({"a": {"b": 1}, "run": 1}, {"a": {"b": 2}, "run": 2})
      [('a.b', 1, 2)]
    """
    flat_one, flat_other = _flat(one), _flat(other)
    result = []
    for key in sorted(flat_one.keys() | flat_other.keys()):
        pair = flat_one.get(key, "(absent)"), flat_other.get(key, "(absent)")
        if key.split(".")[0] != "run" and pair[0] != pair[1]:
            result.append((key, *pair))
    return result


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _agree(mine: Mapping[str, Any], theirs: Mapping[str, Any], where: str) -> None:
    found = differences(mine, theirs)
    if found:
        text = "; ".join(f"{key} = {a!r} here, {b!r} there" for key, a, b in found)
        raise UserError(
            f"the config differs from that of {where}: {text} (only run.* may change; use a new --run-dir)"
        )


def _check_settings(settings: Mapping[str, Any]) -> None:
    missing = [name for name in SECTIONS if name not in settings]
    if missing:
        raise UserError(f"the config lacks {', '.join(missing)}")
    seed, options = settings["seed"], settings["run"]
    require(_whole(seed, 0) and seed < 2**32, "seed", seed, "an integer from 0 to 2**32 - 1")
    for name, least in (("iterations", 0), ("iterations_per_dispatch", 1), ("keep", 1), ("devices", 0)):
        require(_whole(options[name], least), f"run.{name}", options[name], f"an integer >= {least}")
    seconds = options["checkpoint_seconds"]
    number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and seconds >= 0
    require(number, "run.checkpoint_seconds", seconds, "a number >= 0")
    pairs_of(settings["meta"]["estimator"])


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _read_config(run_dir: Path) -> dict[str, Any] | None:
    """Returns the run's config, or None where there is no run yet."""
    content = read_json(run_dir / "config.json")
    if content is None:
        return None
    if not isinstance(content, dict) or any(name not in content for name in SECTIONS):
        raise UserError(f"{run_dir / 'config.json'} is not the config of a run; choose another --run-dir")
    return content


def _check_free(run_dir: Path) -> None:
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"{run_dir} is a file, not a run directory; choose another --run-dir")
    # A start that was killed before it wrote its config leaves a lock file.
    others = sorted(p.name for p in run_dir.iterdir() if p.name != lock.LOCK_NAME) if run_dir.exists() else []
    others = [name for name in others if not name.startswith("config.json.")]
    if others:
        raise UserError(
            f"{run_dir} is not a run directory: it holds {others[0]!r} and no config.json; "
            "choose another --run-dir"
        )


def _make_folder(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run directory {run_dir}: {error.strerror}") from error


def _environment(devices: int) -> dict[str, Any]:
    """What bit-identity depends on besides the config and the data."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    device = jax.local_devices()[0]
    kind = {"platform": device.platform, "kind": device.device_kind, "count": devices}
    kind["processes"] = processes.count()
    return {"versions": versions, "devices": kind, "xla_flags": os.environ.get("XLA_FLAGS", "")}


def _recorded_devices(run_dir: Path) -> int:
    """How many CPU devices the run has used, 0 if none is known."""
    info = read_json(run_dir / "run_info.json")
    try:
        devices = info["starts"][-1]["devices"]
        return int(devices["count"]) if devices["platform"] == "cpu" else 0
    except (TypeError, KeyError, IndexError, ValueError):
        return 0


def runlog_rows(run_dir: Path) -> bool:
    """Tells whether the run has logged anything."""
    path = run_dir / "metrics.jsonl"
    return path.exists() and path.stat().st_size > 0


def _note_start(run_dir: Path, iteration: int | None, info: dict[str, Any]) -> None:
    """Notes a start in ``run_info.json``; without an iteration only checks that it can be noted."""
    path = run_dir / "run_info.json"
    before = read_json(path)
    starts = before.get("starts", []) if isinstance(before, dict) else []
    if not isinstance(starts, list):
        raise UserError(f"{path} is not the record of a run's starts; remove it to go on without")
    if iteration is None:
        return
    start = {"time": round(time.time(), 3), "iteration": iteration}
    start |= {k: v for k, v in info.items() if k != "data"}
    write_json(path, {"data": info["data"], "starts": [*starts, start]})


def _same_data(mine: Mapping[str, str], theirs: Mapping[str, str]) -> None:
    for name, value in mine.items():
        if theirs.get(name) != value:
            there = str(theirs.get(name, "(absent)"))
            raise UserError(
                f"data set {name!r} has changed since the run began: sha256 {value[:12]}... here, "
                f"{there[:12]}... in the checkpoint; bring back the old data or use a new --run-dir"
            )


def _tell_differences(record: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    keys = ("versions", "devices", "xla_flags")
    before = {k: record.get(k) for k in keys} | {"devices": {"processes": 1} | record.get("devices", {})}
    found = differences(before, {k: info[k] for k in keys})
    if found and processes.is_first():
        text = ", ".join(f"{key} {a!r} -> {b!r}" for key, a, b in found)
        print(f"note: not bit-identical to an uninterrupted run from here on: {text}", file=sys.stderr)


def _theta_header(settings: dict[str, Any], iteration: int) -> dict[str, str]:
    return {"config": checkpoint.canonical(settings), "iteration": str(iteration)}


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is the old one or the new one, whole."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    """Returns the file's JSON value, None where there is no file.

    Raises:
      UserError: unreadable, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error})".replace("\n", " ")) from error
