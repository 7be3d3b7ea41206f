"""How many devices a meta-training uses, decided before JAX starts its backend; what a CPU device holds."""

from __future__ import annotations

import contextlib
import os

import jax

from celo_nnx import processes
from celo_nnx.errors import require

# Parameters of inner problems that train together on a CPU device: more of them outgrow its cache, and each
# then takes longer. Measured on antithetic pairs of 8x8 image MLPs: 4.6 ms a pair for 32 pairs, 5.6 for 256.
TOGETHER = 2**17


def cores() -> int:
    """Returns how many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share() -> int:
    """Returns how many cores this process has for itself.

    Slurm says how many; processes that another launcher has started are taken to be all on this machine.
    """
    launch = processes.launched(os.environ)
    if launch is None:
        return cores()
    return min(cores(), launch.cores) if launch.cores else max(1, cores() // launch.count)


def largest_divisor(number: int, limit: int) -> int:
    """Returns the largest divisor of ``number`` that is at most ``limit``.

    Example:
      >>> largest_divisor(8, 6), largest_divisor(7, 6)
      (4, 1)
    """
    return max(d for d in range(1, max(1, limit) + 1) if number % d == 0)


def choose_devices(requested: int, pairs: int, recorded: int = 0) -> int:
    """Decides over how many devices the antithetic pairs are split, and has the CPU show that many.

    XLA runs a meta-iteration's many small operations on one CPU core; as many host devices as cores use
    them all. Call it before anything asks JAX for its devices; later, what is there is used. Several
    processes have equally many devices each.

    Args:
      requested: number of devices over all processes, 0 for all that divide the pairs evenly.
      pairs: antithetic pairs per family.
      recorded: for ``requested`` 0, the number that a resumed run has used so far, taken again where
        possible, since the number of devices is part of what makes a run bit-identical; 0 for none.

    Returns:
      The number of devices to build the trainer for.

    Raises:
      UserError: a negative number, one that does not divide the pairs or that processes cannot share, more
        than there are, or more processes than pairs.
    """
    several = processes.count()
    whole = isinstance(requested, int) and requested >= 0
    require(whole, "run.devices", requested, "an integer >= 0 (0 = all)")
    divides = f"a divisor of meta.estimator.pairs = {pairs}"
    require(pairs % several == 0, "number of processes", several, divides)
    legal = f"0 or {divides}" + f" and a multiple of {several}, the number of processes" * (several > 1)
    fits = requested == 0 or (pairs % requested == 0 and requested % several == 0)
    require(fits, "run.devices", requested, legal)
    fits = recorded > 0 and pairs % recorded == 0 and recorded % several == 0
    recorded = recorded if fits else 0
    # XLA's own flag for the same thing stands where the user has set it.
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        each = (requested or recorded) // several or largest_divisor(pairs // several, share())
        # The backend has started where this fails.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", each)
    each = jax.local_device_count()
    same = jax.device_count() == several * each
    require(same, "devices of this process", each, f"as many as of the others ({jax.device_count()} in all)")
    where = "this process" if several == 1 else f"{several} processes"
    require(
        requested <= several * each, "run.devices", requested, f"at most {several * each}, those of {where}"
    )
    if requested or 0 < recorded <= several * each:
        return requested or recorded
    return several * largest_divisor(pairs // several, each)
