"""What a run writes beside its checkpoints, and the checks that keep one run from overwriting another."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from celo_nnx import lock, processes
from celo_nnx.errors import UserError, is_integer, is_number, require
from celo_nnx.files import read_json, write_json
from celo_nnx.meta import checkpoint
from celo_nnx.phases import Phase

PACKAGES = ("celo-nnx", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
SECTIONS = ("seed", "optimizer", "theta_init", "tasks", "meta", "run")


@contextlib.contextmanager
def disk_errors(run_dir: Path) -> Iterator[None]:
    """Tells what the operating system refuses in one line."""
    try:
        yield
    except OSError as error:
        what = f"{error.strerror or error}: {error.filename}" if error.filename else str(error)
        raise UserError(f"the run directory {run_dir} cannot be used: {what}") from error


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
    flat_one, flat_other = flat(one), flat(other)
    result = []
    for key in sorted(flat_one.keys() | flat_other.keys()):
        pair = flat_one.get(key, "(absent)"), flat_other.get(key, "(absent)")
        if key.split(".")[0] != "run" and pair[0] != pair[1]:
            result.append((key, *pair))
    return result


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested dicts by dotted key.

    Example:
      >>> flat({"a": {"b": 1, "c": {}}})
      {'a.b': 1, 'a.c': {}}
    """
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return out


def agree(mine: Mapping[str, Any], theirs: Mapping[str, Any], where: str) -> None:
    """Raises a :class:`UserError` that names the keys outside ``run`` in which two configs differ.

    Of a part that was swapped, its kind.
    """
    found = differences(mine, theirs)
    if found:
        swapped = tuple(key.removesuffix("kind") for key, _, _ in found if key.endswith(".kind"))
        shown = [one for one in found if one[0].endswith(".kind") or not one[0].startswith(swapped)]
        text = "; ".join(f"{key} = {a!r} here, {b!r} there" for key, a, b in shown)
        raise UserError(
            f"the config differs from that of {where}: {text} (only run.* may change; use a new --run-dir)"
        )


def check_settings(settings: Mapping[str, Any]) -> None:
    """Checks sections, and the values of ``seed`` and ``run``."""
    missing = [name for name in SECTIONS if name not in settings]
    if missing:
        raise UserError(f"the config lacks {', '.join(missing)}")
    seed, options = settings["seed"], settings["run"]
    require(_whole(seed, 0) and seed < 2**32, "seed", seed, "an integer from 0 to 2**32 - 1")
    for name, least in (
        ("iterations", 0),
        ("iterations_per_dispatch", 1),
        ("keep", 1),
        ("snapshots", 0),
        ("devices", 0),
        ("stop_after_non_finite", 0),
    ):
        value = options.get(name, 0) if name == "stop_after_non_finite" else options[name]
        legal = f"an integer >= {least} and < 2**31"  # counted in int32
        require(_whole(value, least) and value < 2**31, f"run.{name}", value, legal)
    seconds = options["checkpoint_seconds"]
    require(is_number(seconds) and seconds >= 0, "run.checkpoint_seconds", seconds, "a finite number >= 0")


def _whole(value: Any, least: int) -> bool:
    return is_integer(value) and value >= least


def read_config(run_dir: Path) -> dict[str, Any] | None:
    """Returns the run's config, or None where there is no run yet."""
    content = read_json(run_dir / "config.json")
    if content is None:
        return None
    if not isinstance(content, dict) or any(name not in content for name in SECTIONS):
        raise UserError(f"{run_dir / 'config.json'} is not the config of a run; choose another --run-dir")
    return content


def check_free(run_dir: Path) -> None:
    """Raises a :class:`UserError` where a new run would share a folder with something else."""
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


def make_folder(run_dir: Path) -> None:
    """Makes the run folder."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run directory {run_dir}: {error.strerror}") from error


def environment(devices: int) -> dict[str, Any]:
    """What bit-identity depends on besides the config and the data."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    device = jax.local_devices()[0]
    kind = {"platform": device.platform, "kind": device.device_kind, "count": devices}
    kind["processes"] = processes.count()
    return {"versions": versions, "devices": kind, "xla_flags": os.environ.get("XLA_FLAGS", "")}


def recorded_devices(run_dir: Path) -> int:
    """How many CPU devices the run has used, 0 if none is known."""
    info = read_json(run_dir / "run_info.json")
    try:
        devices = info["starts"][-1]["devices"]
        return int(devices["count"]) if devices["platform"] == "cpu" else 0
    except (TypeError, KeyError, IndexError, ValueError):
        return 0


def has_rows(run_dir: Path) -> bool:
    """Tells whether the run has logged anything."""
    path = run_dir / "metrics.jsonl"
    return path.exists() and path.stat().st_size > 0


def note_start(run_dir: Path, iteration: int | None, info: dict[str, Any]) -> None:
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


def same_data(mine: Mapping[str, str], theirs: Mapping[str, str]) -> None:
    """Raises a :class:`UserError` where the digest of a data set is not the recorded one."""
    for name, value in mine.items():
        if theirs.get(name) != value:
            there = str(theirs.get(name, "(absent)"))
            raise UserError(
                f"data set {name!r} has changed since the run began: sha256 {value[:12]}... here, "
                f"{there[:12]}... in the checkpoint; bring back the old data or use a new --run-dir"
            )


def tell_differences(record: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Notes on stderr what has changed that bit-identity depends on."""
    keys = ("versions", "devices", "xla_flags")
    before = {k: record.get(k) for k in keys} | {"devices": {"processes": 1} | record.get("devices", {})}
    found = differences(before, {k: info[k] for k in keys})
    if found and processes.is_first():
        text = ", ".join(f"{key} {a!r} -> {b!r}" for key, a, b in found)
        print(f"note: not bit-identical to an uninterrupted run from here on: {text}", file=sys.stderr)


def theta_header(settings: dict[str, Any], iteration: int, phase: Phase) -> dict[str, str]:
    """Returns what the header of a run's theta says: config, iteration, phase, decay of the average."""
    header = {"iteration": str(iteration)}
    if phase.name:  # theta is used with its phase's optimizer
        settings = settings | {"optimizer": resolve(phase.config)["optimizer"]}
        header["phase"] = phase.name
    if average := phase.config["meta"].get("average", 0.0):
        header["average"] = str(average)
    return header | {"config": checkpoint.canonical(settings)}
