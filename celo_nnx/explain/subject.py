"""The rule that is explained: found by what a user calls it, refused where it has no MLP."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import jax
import numpy as np

from celo_nnx.build import build
from celo_nnx.config import load, presets
from celo_nnx.errors import UserError, unknown
from celo_nnx.evaluation.contenders import is_path, parts_of, stem
from celo_nnx.optimizer import LearnedOptimizer
from celo_nnx.weights import FOLDER, HAND_MADE, card, locate, names


@dataclasses.dataclass(frozen=True)
class Subject:
    """A learned optimizer with its theta.

    Attributes:
      name: short, fit for a file's name.
      about: where theta is from, in words.
      optimizer: with that theta.
      learning_rate: what its card recommends; None where there is none, or the schedule decides it.
    """

    name: str
    about: str
    optimizer: LearnedOptimizer
    learning_rate: float | None = None


def find(text: str) -> Subject:
    """Finds a rule.

    Args:
      text: ``[VARIANT=]WEIGHTS``: weights that come with the package, a theta file or a run folder, whose
        header says which optimizer it is for; or those of a variant, ``hand_made`` among them.

    Raises:
      UserError: an unknown name, weights that cannot be read or do not fit, or a rule without an MLP.

    Example:
      >>> find("celo2").learning_rate, find("celo2=hand_made").name
      (0.001, 'celo2-hand_made')
    """
    variant, weights = ("", text) if os.path.exists(text) else text.rpartition("=")[::2]
    whole = [name for name, (_, is_whole) in presets().items() if is_whole]
    if variant and variant not in whole:
        raise unknown("variant", variant, whole)
    known = (*names(), HAND_MADE) if variant else names()
    if weights not in known and not is_path(weights):
        raise unknown("weights", weights, known)
    parts = load(variant).optimizer.to_dict() if variant else parts_of(weights, told="")
    made = weights == HAND_MADE and bool(variant)
    start = {"kind": HAND_MADE} if made else {"kind": "file", "path": weights}
    optimizer = build(parts, jax.random.key(0), start)
    ours = not made and locate(weights).parent == FOLDER
    if made:
        about = f"the hand-made theta of {variant}"
    else:
        about = f"the package's weights {locate(weights).stem}" if ours else f"theta of {weights}"
    name = f"{variant}-{stem(weights)}" if variant else stem(weights)
    first_layer(optimizer, name)
    rate = None
    if ours and not optimizer.schedule.decides_rate:
        rate = float(card(Path(locate(weights)).stem)["learning_rate"]["recommended"])
    return Subject(name, about, optimizer, rate)


def first_layer(optimizer: LearnedOptimizer, name: str = "it") -> dict[str, np.ndarray]:
    """Returns the first layer's weights by group, features first, then context: ``[..., planes, hidden]``.

    Raises:
      UserError: the update rule is not an MLP with a first layer split by group.

    Example:
      >>> from celo_nnx import load_optimizer
      >>> first_layer(load_optimizer("celo2"))["momentum"].shape
      (3, 8)
    """
    groups = [*optimizer.named("features"), *optimizer.named("context")]
    pieces = optimizer.theta.get("update_rule", {}).get("w0")
    if not isinstance(pieces, dict) or set(pieces) != set(groups):
        kind = json.loads(optimizer.config).get("update_rule", {}).get("kind", "another")
        raise UserError(f"{name} cannot be explained: its update rule {kind!r} is not an MLP over features")
    return {group: np.asarray(pieces[group]) for group in groups}


def without(optimizer: LearnedOptimizer, group: str) -> dict:
    """Returns theta with the group's rows of the first layer at zero: the rule cannot see it."""
    theta = optimizer.theta
    rule = theta["update_rule"]
    pieces = rule["w0"] | {group: np.zeros_like(rule["w0"][group])}
    return theta | {"update_rule": rule | {"w0": pieces}}
