"""Phases: a run as a list of configs, each the base with a few changes and a budget of its own.

Celo learns its update rule first, then its schedule while the rule rests::

    meta.phases = (
        dict(name="rule", iterations=100_000, set=("optimizer.schedule.rate=none", "meta.frozen=schedule/")),
        dict(name="schedule", iterations=0, set=("meta.frozen=update_rule/",)),
    )

From one phase to the next theta goes on; the meta-optimizer, the average of theta and the estimator's inner
problems start anew. Meta-iterations and the random numbers that come from them count through.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from celo_nnx import config as configs
from celo_nnx.errors import UserError, require, unknown

KEYS = ("name", "iterations", "set")
MAY_CHANGE = ("optimizer.", "meta.", "tasks.")
ENDLESS = sys.maxsize


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase of a run.

    Attributes:
      number: 0 for the first.
      name: shown in metrics; "" where the config has no phases.
      config: what it trains; without phases of its own.
      start, end: meta-iterations done before and after it; ``ENDLESS`` for as many as the run wants.
    """

    number: int
    name: str
    config: Any
    start: int
    end: int


def plan(config: Any) -> tuple[Phase, ...]:
    """Returns the phases of a config, each with its whole config; one phase where it has none.

    Args:
      config: a resolved config; ``meta.phases`` holds sections ``name``, ``iterations`` (0 for the last one:
        as many as the run wants) and ``set`` (overrides ``KEY=VALUE`` of optimizer, meta or tasks).

    Raises:
      UserError: a mistake in a phase; one line that names it.
    """
    sections = config["meta"].get("phases", ())
    require(isinstance(sections, (tuple, list)), "meta.phases", sections, "a tuple of sections")
    if not sections:
        return (Phase(0, "", config, 0, ENDLESS),)
    base = ConfigDict(config.to_dict())
    base.meta.phases = ()
    phases: list[Phase] = []
    for number, section in enumerate(sections):
        where = f"meta.phases[{number}]"
        name, budget, changes = _section(section, where, last=number == len(sections) - 1)
        require(name not in [p.name for p in phases], f"{where}.name", name, "a name of its own")
        try:
            changed = configs.load(base, changes)
        except UserError as error:
            raise UserError(f"phase {name!r}: {error}") from None
        start = phases[-1].end if phases else 0
        phases.append(Phase(number, name, changed, start, start + budget if budget else ENDLESS))
    return tuple(phases)


def _section(section: Any, where: str, last: bool) -> tuple[str, int, tuple[str, ...]]:
    """Checks one section; returns its name, budget and overrides."""
    if not hasattr(section, "items"):
        raise UserError(f"{where} = {section!r} must be a section of {', '.join(KEYS)}")
    for key in section:
        if key not in KEYS:
            raise unknown(f"key of {where},", key, KEYS)
    name, budget, changes = section.get("name"), section.get("iterations"), section.get("set", ())
    require(isinstance(name, str) and name != "", f"{where}.name", name, "a name")
    least = 0 if last else 1
    legal = f"an integer >= {least} and < 2**31" + (" (0 = until run.iterations)" if last else "")
    require(type(budget) is int and least <= budget < 2**31, f"{where}.iterations", budget, legal)
    strings = isinstance(changes, (tuple, list)) and all(isinstance(change, str) for change in changes)
    require(strings, f"{where}.set", changes, "a tuple of overrides KEY=VALUE")
    for change in changes:
        key = change.partition("=")[0].strip()
        if not key.startswith(MAY_CHANGE) or key == "meta.phases":
            legal = "optimizer.*, meta.* (but no phases) and tasks.*"
            raise UserError(f"phase {name!r} may not set {key!r}: only {legal}")
    return name, budget, tuple(changes)


def phase_at(phases: Sequence[Phase], iteration: int) -> Phase:
    """Returns the phase that a checkpoint belongs to: at a boundary the one that has ended there.

    Args:
      phases: from :func:`plan`.
      iteration: meta-iterations done.

    Example:
      >>> two = (Phase(0, "rule", None, 0, 5), Phase(1, "schedule", None, 5, ENDLESS))
      >>> [phase_at(two, i).name for i in (0, 5, 6)]
      ['rule', 'rule', 'schedule']
    """
    return next((phase for phase in phases if iteration <= phase.end), phases[-1])
