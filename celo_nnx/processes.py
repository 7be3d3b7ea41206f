"""Several processes that share one run: how they find each other, and what they agree on.

Every process runs the same program on its own devices. Under Slurm, the tasks of one ``srun`` step are the
processes of one run; other launchers set the variables in :data:`VARIABLES`. Process 0 writes; the functions
marked *collective* must be called by all processes in the same order, and do nothing in a run of one
process. There must be none inside a block of :func:`together`, which one process may leave early, and none
before :func:`celo_nnx.devices.choose_devices`, since JAX's devices are fixed by their first use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from celo_nnx.errors import UserError

# JAX is imported inside functions: the command line asks is_first() for a mistake in its arguments.

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
LINE = 1024  # bytes of what one process tells the others


@dataclasses.dataclass(frozen=True)
class Launch:
    """A process as its launcher describes it.

    Attributes:
      index: of this process, from 0.
      count: of all processes, at least 2.
      address: ``host:port`` of process 0; "" under Slurm, where JAX finds it.
      cores: CPU cores for each process; 0 where the launcher does not say.
    """

    index: int
    count: int
    address: str = ""
    cores: int = 0


class Agreed(Exception):
    """An error that all processes raise together."""


class AgreedMistake(Agreed, UserError):
    """A mistake of the user that at least one process has found."""


class AgreedFailure(Agreed, RuntimeError):
    """Another failure of at least one process."""


def launched(environment: Mapping[str, str]) -> Launch | None:
    """Reads from environment variables whether this process is one of several.

    A job or an interactive shell of Slurm with several tasks is one process all the same, unless ``srun``
    started it: only a step has several of them running.

    Args:
      environment: such as ``os.environ``. Variables of JAX go before those of Slurm.

    Returns:
      The process's place, None for a single process.

    Raises:
      UserError: variables that are missing or contradict each other.

    Example:
      >>> launched({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"})
      >>> launched({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3", "SLURM_CPUS_PER_TASK": "4"})
      Launch(index=3, count=8, address='', cores=4)
    """
    given = [name for name in VARIABLES if environment.get(name)]
    count, index = (_number(environment, name) for name in VARIABLES[1:])
    if count == 1:
        return None
    if len(given) == len(VARIABLES):
        if not 0 <= index < count:
            raise UserError(f"JAX_PROCESS_ID = {index} is out of range: must be from 0 to {count - 1}")
        if not environment[VARIABLES[0]].rpartition(":")[2].isdecimal():
            address = environment[VARIABLES[0]]
            raise UserError(f"JAX_COORDINATOR_ADDRESS = {address!r} must be HOST:PORT of process 0")
        return Launch(index, count, environment[VARIABLES[0]])
    if given:
        missing = [name for name in VARIABLES if name not in given]
        raise UserError(f"{given[0]} is set, so {' and '.join(missing)} must be too")
    tasks, rank = _number(environment, "SLURM_STEP_NUM_TASKS"), _number(environment, "SLURM_PROCID")
    if tasks < 2 or rank < 0:
        return None
    # Slurm's own default is one core a task.
    return Launch(rank, tasks, cores=max(1, _number(environment, "SLURM_CPUS_PER_TASK")))


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name) or "-1"
    try:
        return int(text)
    except ValueError:
        raise UserError(f"the environment variable {name} = {text!r} is not an integer") from None


def join() -> None:
    """Connects this process to the others where there are several; collective, before JAX is used.

    JAX ends a process that has waited for the others for 5 minutes.

    Raises:
      UserError: contradicting variables, or JAX is in use already.
    """
    launch = launched(os.environ)
    if launch is None:
        return
    import jax

    if jax.distributed.is_initialized():
        return
    # JAX's own handler of SIGTERM would replace the one that saves and stops.
    jax.config.update("jax_enable_preemption_service", False)
    place: dict[str, Any] = {"num_processes": launch.count, "process_id": launch.index}
    if launch.address:
        place |= {"coordinator_address": launch.address, "cluster_detection_method": "deactivate"}
    elif "," not in os.environ.get("CUDA_VISIBLE_DEVICES", ","):
        place["local_device_ids"] = 0  # Slurm has given the task one GPU; JAX would look for its rank's
    who = f"process {launch.index} of {launch.count}"
    patience = threading.Timer(
        20, print, [f"{who} waits for the others"], {"file": sys.stderr, "flush": True}
    )
    patience.daemon = True
    patience.start()
    try:
        jax.distributed.initialize(**place)
    except (RuntimeError, ValueError) as error:
        text = str(error).strip().splitlines()[0]
        raise UserError(f"{who} cannot join the others: {text}") from error
    finally:
        patience.cancel()


def index() -> int:
    """Returns the number of this process."""
    if launch := launched(os.environ):
        return launch.index
    jax = sys.modules.get("jax")
    return jax.process_index() if jax and jax.distributed.is_initialized() else 0


def count() -> int:
    """Returns how many processes have joined."""
    jax = sys.modules.get("jax")
    if not jax or not jax.distributed.is_initialized():
        return 1
    launch = launched(os.environ)
    return launch.count if launch else jax.process_count()


def is_first() -> bool:
    """Tells whether this is the process that writes files and speaks to the user."""
    try:
        return index() == 0
    except UserError:  # the variables contradict each other, which every process says for itself
        return True


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Joins the other processes for the time of a command, and never leaves one waiting.

    A process that ends by an error the others do not know of ends at once, so that their next exchange
    fails; an orderly exit would wait for them, and they for it. What libraries print on standard output
    (Gloo tells its connections) goes to standard error, so that standard output holds results only.
    """
    join()
    if count() == 1:
        yield
        return
    before, out = sys.stdout, os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout.flush()
    os.dup2(2, 1)
    sys.stdout = out
    try:
        yield
    except Agreed:
        raise
    except BaseException as error:
        sys.stdout.flush()
        os._exit(_last_words(error))
    finally:
        sys.stdout = before
        out.flush()
        os.dup2(out.fileno(), 1)
        out.close()


def _last_words(error: BaseException) -> int:
    """Says why this process ends alone; returns its exit code."""
    who, code = f"celo-nnx: error: process {index()}", 1
    if isinstance(error, UserError):
        print(f"{who}: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    elif isinstance(error, KeyboardInterrupt):
        print("celo-nnx: interrupted", file=sys.stderr)
        code = 130
    elif "Gloo" in str(error):
        line = str(error).strip().splitlines()[0]
        print(f"{who}: another process has ended or cannot be reached: {line}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stderr.flush()
    return code


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Runs a block that only some processes may fail in; an error in one is raised in all. Collective.

    Raises:
      AgreedMistake: some process has raised a UserError; the first such process's text.
      AgreedFailure: some process has raised something else.
    """
    if count() == 1:
        yield
        return
    found: Exception | None = None
    try:
        yield
    except Exception as error:
        found = error
    said = _tell(_line(found))
    failed = [(text, i) for i, text in enumerate(said) if text]
    if not failed:
        return
    if found is not None and not isinstance(found, UserError):
        traceback.print_exception(found)
    text, who = failed[0]
    kind = AgreedMistake if text.startswith("UserError: ") else AgreedFailure
    text = text.removeprefix("UserError: ")
    raise kind(text if who == 0 else f"process {who}: {text}") from found


def _line(error: Exception | None) -> str:
    if error is None:
        return ""
    kind = "UserError" if isinstance(error, UserError) else type(error).__name__
    return f"{kind}: {' '.join(str(error).split())}"


def meet(number: int) -> None:
    """Connects the devices that a run uses. Collective.

    Gloo gives up on a first exchange that another process is 30 s late for, as after a long compilation;
    once connected, they wait for each other however long it takes.

    Args:
      number: of devices over all processes, as for :func:`devices`.
    """
    if count() == 1:
        return
    import jax
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices("meet")  # as Orbax does around a checkpoint
    mesh = _line_up(number)
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("line"))
    values = np.zeros(number, np.int32)
    jax.block_until_ready(_everywhere(mesh)(put(values, spread)))


def same(what: str, value: str) -> None:
    """Checks that a text is the same in every process. Collective.

    Raises:
      AgreedMistake: it is not.
    """
    if count() == 1:
        return
    said = _tell(hashlib.sha256(value.encode()).hexdigest())
    for other, text in enumerate(said):
        if text != said[0]:
            raise AgreedMistake(
                f"processes 0 and {other} differ in {what}: all {count()} processes of a run need the same "
                "command and the same files (JAX_NUM_PROCESSES=1 keeps the tasks of a Slurm step apart)"
            )


def most(values: Sequence[int], after: Any = ()) -> list[int]:
    """Returns the largest of each number over all processes. Collective.

    Args:
      values: numbers of this process, of magnitude below 2**31.
      after: arrays that are waited for first, so that no two exchanges are under way at once.
    """
    if count() == 1:
        return [int(v) for v in values]
    import jax

    jax.block_until_ready(after)
    return _gather(np.asarray(values, np.int32)).max(0).tolist()


def devices(number: int) -> list[Any]:
    """Returns ``number`` devices, equally many of every process, ordered by process."""
    import jax

    by_process: dict[int, list[Any]] = {}
    for device in jax.devices():
        by_process.setdefault(device.process_index, []).append(device)
    share = number // len(by_process)
    return [device for _, own in sorted(by_process.items()) for device in own[:share]]


def put(tree: Any, sharding: Any) -> Any:
    """Places arrays that every process holds whole; arrays that are placed already stay where they are."""
    import jax

    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def place(x: Any) -> Any:
        if isinstance(x, jax.core.Tracer):
            return jax.device_put(x, sharding)
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x
        if _is_key(x):
            return jax.random.wrap_key_data(place(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])

    return jax.tree.map(place, tree)


def to_host(tree: Any) -> Any:
    """Returns whole arrays, numpy and typed keys, of arrays that are spread over processes. Collective."""
    import jax

    leaves, treedef = jax.tree.flatten(tree)
    raw = [jax.random.key_data(x) if _is_key(x) else x for x in leaves]
    far = [i for i, x in enumerate(raw) if isinstance(x, jax.Array) and not x.is_fully_addressable]
    if far:
        whole = _everywhere(raw[far[0]].sharding.mesh)([raw[i] for i in far])
        for i, x in zip(far, whole, strict=True):
            raw[i] = x.addressable_data(0)
    raw = jax.device_get(raw)
    keys = {i: jax.random.key_impl(x) for i, x in enumerate(leaves) if _is_key(x)}
    out = [jax.random.wrap_key_data(x, impl=keys[i]) if i in keys else x for i, x in enumerate(raw)]
    return jax.tree.unflatten(treedef, out)


def _is_key(x: Any) -> bool:
    import jax

    return isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


@functools.cache
def _everywhere(mesh: Any) -> Callable[[Any], Any]:
    """A program that copies arrays of a mesh to all of its devices."""
    import jax

    return jax.jit(lambda x: x, out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))


@functools.cache
def _line_up(number: int) -> Any:
    """A mesh of devices, equally many of every process."""
    import jax

    auto = (jax.sharding.AxisType.Auto,)
    return jax.sharding.Mesh(np.array(devices(number)), ("line",), axis_types=auto)


def _gather(values: np.ndarray) -> np.ndarray:
    """Returns the arrays of all processes, stacked, by way of one device of each."""
    import jax

    mesh = _line_up(count())
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("line"))
    whole = jax.make_array_from_callback((count(), *values.shape), spread, lambda _: values[None])
    return np.asarray(_everywhere(mesh)(whole).addressable_data(0))


def _tell(text: str) -> list[str]:
    """Returns the texts of all processes, cut at LINE bytes."""
    row = np.zeros(LINE, np.uint8)
    raw = text.encode()[:LINE]
    row[: len(raw)] = np.frombuffer(raw, np.uint8)
    return [bytes(r).rstrip(b"\0").decode(errors="ignore") for r in _gather(row)]
