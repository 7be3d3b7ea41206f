"""Several families from one section: every combination of some settings' values, or a sample of them."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

from celo_nnx.errors import UserError, is_count, is_integer, require, unknown

MAX_COMBINATIONS = 256
FIXED = ("kind", "datasets", "inner", "parts", "vary", "sample", "sample_seed")


def combinations(section: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Returns one section for each combination of what varies.

    Args:
      section: of tasks, complete. ``vary``: ``{setting: values}``; ``sample``: how many of the combinations
        are taken, different ones at random, 0 for all; ``sample_seed``: which.

    Returns:
      Pairs of a suffix for the names of families (empty if nothing varies) and a section, in which nothing
      varies.

    Raises:
      UserError: an unknown setting, no values, or more combinations than there are or than allowed.

    Example:
      >>> section = dict(kind="x", width=1, act="relu", vary=dict(width=(1, 2), act=("relu", "tanh")))
      >>> [name for name, _ in combinations(section)]
      [':width=1:act=relu', ':width=1:act=tanh', ':width=2:act=relu', ':width=2:act=tanh']
    """
    vary = section.get("vary") or {}
    if not hasattr(vary, "items"):
        raise UserError(
            f"tasks.vary = {vary!r} is out of range: must be a section of settings and their values"
        )
    vary = dict(vary.items())
    for name, values in vary.items():
        legal = [key for key in section if key not in FIXED]
        if name not in legal:
            raise unknown("setting", f"tasks.vary.{name}", [f"tasks.vary.{key}" for key in legal])
        good = isinstance(values, (tuple, list)) and 0 < len(values) == len({_shown(v) for v in values})
        require(good, f"tasks.vary.{name}", values, "a tuple of one or more different values")
    plain = {key: value for key, value in section.items() if key not in ("vary", "sample", "sample_seed")}
    if not vary:
        return [("", plain)]
    out = []
    for number in _chosen(section, math.prod(len(values) for values in vary.values())):
        chosen = {}
        for name, values in reversed(vary.items()):  # the last varies fastest
            number, place = divmod(number, len(values))
            chosen[name] = values[place]
        suffix = "".join(f":{name}={_shown(chosen[name])}" for name in vary)
        out.append((suffix, plain | chosen))
    return out


def _chosen(section: Mapping[str, Any], total: int) -> list[int]:
    """Returns the numbers of the combinations that are taken, ascending."""
    sample, seed = section.get("sample", 0), section.get("sample_seed", 0)
    most = min(total, MAX_COMBINATIONS)
    good = is_count(sample) and sample <= most or sample == 0
    require(good, "tasks.sample", sample, f"0 for all {total} combinations, or an integer from 1 to {most}")
    require(sample > 0 or total <= most, "number of combinations", total, f"at most {most}; set tasks.sample")
    require(is_integer(seed) and seed >= 0, "tasks.sample_seed", seed, "an integer >= 0")
    return sorted(random.Random(seed).sample(range(total), sample)) if sample else list(range(total))


def _shown(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
