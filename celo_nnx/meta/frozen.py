"""Leaves of theta by pattern, and which of them meta-training leaves as they are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from celo_nnx.errors import UserError, require
from celo_nnx.interfaces import PyTree
from celo_nnx.meta.checkpoint import flatten


def matching(names: Iterable[str], patterns: Sequence[str], where: str) -> set[str]:
    """Returns the names in which one of some regular expressions is found.

    Args:
      names: paths of theta's leaves, joined by ``/``.
      patterns: each must be found somewhere.
      where: the config key that holds the patterns.

    Raises:
      UserError: not a tuple of regular expressions, or one that is found nowhere.

    Example:
      >>> matching(["rule/w", "schedule/w"], ("^rule/",), "meta.frozen")
      {'rule/w'}
    """
    names, found = list(names), set()
    strings = isinstance(patterns, (tuple, list)) and all(isinstance(p, str) and p for p in patterns)
    require(strings, where, patterns, "a tuple of regular expressions")
    for pattern in patterns:
        try:
            mine = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise UserError(f"{where}: {pattern!r} is not a regular expression: {error}") from None
        if not mine:
            tops = sorted({name.split("/")[0] + "/" * ("/" in name) for name in names})
            raise UserError(f"{where}: {pattern!r} is found in no path of theta ({', '.join(tops)})")
        found |= mine
    return found


def mask_of(theta: PyTree, patterns: Sequence[str], where: str) -> PyTree:
    """Tells which leaves of theta have one of the patterns in their path: a tree of bool.

    Args:
      theta: the meta-parameters, or their shapes.
      patterns, where: as for :func:`matching`, which refuses what it refuses.
    """
    names = list(flatten(theta))
    found = matching(names, patterns, where)
    return jax.tree.unflatten(jax.tree.structure(theta), [name in found for name in names])


def frozen_mask(theta: PyTree, patterns: Sequence[str]) -> PyTree:
    """Tells which leaves of theta rest: a tree of bool, true for a leaf whose path matches a pattern.

    Args:
      theta: the meta-parameters, or their shapes.
      patterns: ``config.meta.frozen``.

    Raises:
      UserError: as :func:`matching`, or nothing is left to learn.

    Example:
      >>> frozen_mask({"rule": {"w": np.ones(2)}, "schedule": {"w": np.ones(3)}}, ("schedule/",))
      {'rule': {'w': False}, 'schedule': {'w': True}}
    """
    mask = mask_of(theta, patterns, "meta.frozen")
    rests, leaves = jax.tree.leaves(mask), jax.tree.leaves(theta)
    if any(rests) and not any(np.size(leaf) for leaf, rest in zip(leaves, rests, strict=True) if not rest):
        raise UserError(f"meta.frozen = {tuple(patterns)!r} freezes all of theta: nothing is left to learn")
    return mask
