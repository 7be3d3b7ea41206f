"""Is everything here that the project needs? Lines to read, and to paste into a bug report.

Nothing in them is secret: the values of a few named environment variables, the home folder as ``~``, no host
and no user name.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from celo_nnx.errors import UserError, printable

OK, WARN, FAIL = "ok", "warn", "FAIL"
Finding = tuple[str, str]  # how it is, and what was found
LITTLE = 2**30  # bytes of memory or disk below which a run may end early
EXTRAS = ("hub", "slurm", "tb", "wandb")
PATIENCE = 4.0  # seconds for the hub
RECORDING = Path(__file__).with_name("recordings") / "self_test.npz"
VARIABLES = (
    "CELO_NNX_CACHE",
    "CELO_NNX_DATA",
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_ENABLE_X64",
    "JAX_PLATFORMS",
    "XLA_FLAGS",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
)


def doctor(say: Callable[[str], None] = print) -> bool:
    """Checks what the project needs and says each finding as soon as there is one.

    Args:
      say: takes a line.

    Returns:
      Whether nothing that is needed has failed; what is merely worth knowing is a warning.

    Example:
      >>> doctor()  # doctest: +SKIP
      True
    """
    counts = {OK: 0, WARN: 0, FAIL: 0}
    say(f"celo-nnx doctor, {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC")
    for name, check in CHECKS:
        for state, text in _guarded(check):
            counts[state] += 1
            say(_short(f"{state:<5} {name:<12} {text}"))
    say(f"{counts[OK]} ok, {counts[WARN]} warn, {counts[FAIL]} FAIL")
    return not counts[FAIL]


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """The findings of a check; an error of any kind is one of them."""
    try:
        yield from check()
    except UserError as error:
        yield FAIL, str(error)
    except Exception as error:  # whatever is wrong with an installation is a line
        yield FAIL, f"{type(error).__name__}: {error}"[:300]


def _short(line: str) -> str:
    """One printable line, with the home folder as ``~``."""
    line = printable(" ".join(line.splitlines()))
    home = str(Path.home()) if "HOME" in os.environ else ""
    return line.replace(home, "~") if len(home) > 1 else line


def _system() -> Iterator[Finding]:
    kind = platform.python_implementation()
    yield OK, f"{kind} {platform.python_version()}, {platform.platform()}, {platform.machine()}"


def _packages() -> Iterator[Finding]:
    """This package and what it requires, extras of users too, against the ranges that it states."""
    from packaging.requirements import Requirement

    try:
        found = f"celo-nnx {importlib.metadata.version('celo-nnx')}"
        lines = importlib.metadata.requires("celo-nnx") or []
    except importlib.metadata.PackageNotFoundError:
        yield WARN, "celo-nnx is not installed but found beside the command: its requirements are unknown"
        return
    yield OK, found
    needed, extras = [], {}
    for requirement in map(Requirement, lines):
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = ""
        if requirement.marker is not None:
            if any(requirement.marker.evaluate({"extra": extra}) for extra in EXTRAS):
                extras[requirement.name] = version
        elif not version:
            yield FAIL, f"{requirement.name} is not installed: pip install '{requirement}'"
        elif not requirement.specifier.contains(version, prereleases=True):
            yield WARN, f"{requirement.name} {version} is not of the tested versions {requirement.specifier}"
        else:
            needed.append(f"{requirement.name} {version}")
    needed += [f"{name} {importlib.metadata.version(name)}" for name in ("jaxlib", "numpy")]
    yield OK, ", ".join(sorted(needed))
    there = [f"{name} {version}" for name, version in sorted(extras.items()) if version]
    absent = ", ".join(name for name, version in sorted(extras.items()) if not version)
    yield OK, f"optional: {', '.join(there) or 'none'}" + (f"; not installed: {absent}" if absent else "")


def _devices() -> Iterator[Finding]:
    import jax

    devices = jax.devices()
    kinds = sorted({f"{d.platform} {d.device_kind}" for d in devices})
    yield OK, f"{len(devices)} x {', '.join(kinds)} (JAX's default backend: {jax.default_backend()})"
    if jax.default_backend() == "cpu" and shutil.which("nvidia-smi"):
        yield WARN, "there is an NVIDIA driver, but JAX uses the CPU: pip install 'celo-nnx[gpu]'"


def _cores() -> Iterator[Finding]:
    from celo_nnx.devices import cores

    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    yield OK, f"{cores()} for this process of {os.cpu_count()} in the machine{load}"


def _memory() -> Iterator[Finding]:
    free, total = _memory_bytes()
    if not total:
        yield WARN, "unknown on this system"
        return
    yield OK if free >= LITTLE else WARN, f"{_size(free)} free of {_size(total)}"


def _memory_bytes() -> tuple[int, int]:
    """Returns (free, all) bytes of memory that this process may use; zeros where that is unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        free, total = values["MemAvailable"], values["MemTotal"]
    except (OSError, KeyError, ValueError, IndexError):
        return 0, 0
    try:  # of a container
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return min(free, max(0, limit - used)), min(total, limit)
    except (OSError, ValueError):  # "max" is no number: there is no limit
        return free, total


def _size(count: float) -> str:
    """Bytes for people.

    Example:
      >>> _size(3 * 2**30)
      '3.0 GiB'
    """
    return f"{count / 2**30:.1f} GiB"


def _folders() -> Iterator[Finding]:
    """The folders that are written to; a run folder may lie elsewhere and the cache may be missing."""
    cache = Path(os.environ.get("CELO_NNX_CACHE") or Path.home() / ".cache" / "celo_nnx")
    yield _folder("current", Path.cwd(), WARN)
    yield _folder("cache", cache, WARN)
    yield _folder("temporary", Path(tempfile.gettempdir()), FAIL)


def _folder(name: str, path: Path, otherwise: str) -> Finding:
    """Whether something can be written there, or in the nearest folder above where there is none yet."""
    there = next(p for p in (path, *path.absolute().parents) if p.is_dir())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x" * 4096)
            file.flush()
    except OSError as error:
        return otherwise, f"{name} {path}: cannot be written ({error.strerror})"
    free = shutil.disk_usage(there).free
    return OK if free >= LITTLE else WARN, f"{name} {path}: writable, {_size(free)} free"


def _environment() -> Iterator[Finding]:
    found = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    yield OK, " ".join(found) or "none of the variables that matter is set"


def _hub() -> Iterator[Finding]:
    """Whether the hub answers. Name servers may take their time, so a thread is asked and left alone."""
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    host = urllib.parse.urlsplit(endpoint).hostname or "?"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield OK, "switched off by HF_HUB_OFFLINE"
        return
    said: list[str] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(endpoint, method="HEAD")
            urllib.request.urlopen(request, timeout=PATIENCE).close()
            said.append("")
        except Exception as error:
            # The text of an error may hold a proxy's address with a password.
            code = getattr(error, "code", None)
            said.append("" if code else type(getattr(error, "reason", error)).__name__)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE + 1)
    reason = said[0] if said else f"no answer in {PATIENCE:g} s"
    if reason:
        yield WARN, f"{host} cannot be reached ({reason}): no downloads of data or weights, all else works"
        return
    try:
        importlib.metadata.version("huggingface_hub")
        yield OK, f"{host} answers"
    except importlib.metadata.PackageNotFoundError:
        yield WARN, f"{host} answers; pip install 'celo-nnx[hub]' to use it"


def _replay() -> Iterator[Finding]:
    """The first updates of a recorded trajectory of the published Celo2, which come with the package."""
    from celo_nnx.replay import replay

    begin = time.monotonic()
    row = replay(RECORDING)
    text = f"{row['steps']} recorded updates of {row['optimizer']}, largest error {row['max_abs_error']}"
    yield OK if row["ok"] else FAIL, f"{text} ({time.monotonic() - begin:.1f} s)"


def _checkpoint() -> Iterator[Finding]:
    """A state with every kind of leaf, written and read back."""
    import jax
    import jax.numpy as jnp

    from celo_nnx.meta import checkpoint

    begin = time.monotonic()
    key = jax.random.key(0)
    leaves = {"w": jax.random.normal(key, (64, 8)), "half": jnp.ones(3, jnp.bfloat16), "empty": jnp.zeros(0)}
    state = {"theta": leaves, "iteration": jnp.int32(1), "done": jnp.array([True, False]), "key": key}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder) / "checkpoints", 1, state, {"config": {}})
        loaded = checkpoint.load(Path(folder) / "checkpoints", lambda _: state)
    wrote, read = (checkpoint.digest(checkpoint.to_host(x), {}) for x in (state, loaded.state))
    text = "written and read back bit by bit" if wrote == read else "what was read is not what was written"
    yield OK if wrote == read else FAIL, f"{text} ({time.monotonic() - begin:.1f} s)"


CHECKS: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
    ("python", _system),
    ("packages", _packages),
    ("devices", _devices),
    ("cores", _cores),
    ("memory", _memory),
    ("folder", _folders),
    ("environment", _environment),
    ("hub", _hub),
    ("replay", _replay),
    ("checkpoint", _checkpoint),
)


def main() -> int:
    """Prints the findings; returns 0, or 1 where something has failed."""
    return 0 if doctor(lambda line: print(line, file=sys.stdout, flush=True)) else 1
