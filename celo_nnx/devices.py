"""How many devices a meta-training uses; decided before JAX starts its backend."""

from __future__ import annotations

import os

import jax

from celo_nnx.errors import require


def cores() -> int:
    """Returns how many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
    them all. Call it before anything asks JAX for its devices; later, what is there is used.

    Args:
      requested: number of devices, 0 for all that divide the pairs evenly.
      pairs: antithetic pairs per family.
      recorded: for ``requested`` 0, the number that a resumed run has used so far, taken again where
        possible, since the number of devices is part of what makes a run bit-identical; 0 for none.

    Returns:
      The number of devices to build the trainer for.

    Raises:
      UserError: a negative number, one that does not divide the pairs, or more than there are.
    """
    whole = isinstance(requested, int) and requested >= 0
    require(whole, "run.devices", requested, "an integer >= 0 (0 = all)")
    legal = f"0 or a divisor of meta.estimator.pairs = {pairs}"
    require(requested == 0 or pairs % requested == 0, "run.devices", requested, legal)
    recorded = recorded if recorded > 0 and pairs % recorded == 0 else 0
    # XLA's own flag for the same thing stands where the user has set it.
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        try:
            jax.config.update("jax_num_cpu_devices", requested or recorded or largest_divisor(pairs, cores()))
        except RuntimeError:  # the backend has started
            pass
    there = jax.local_device_count()
    require(requested <= there, "run.devices", requested, f"at most {there}, the devices of this process")
    if requested or 0 < recorded <= there:
        return requested or recorded
    return largest_divisor(pairs, there)
