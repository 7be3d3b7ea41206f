"""From the config's ``meta`` section to an estimator and a trainer; checks every key and range."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from celo_nnx.errors import UserError, unknown
from celo_nnx.interfaces import Family, GradientEstimator, Optimizer
from celo_nnx.meta.augmentation import AUGMENTATIONS
from celo_nnx.meta.estimators import ESTIMATORS
from celo_nnx.meta.frozen import frozen_mask
from celo_nnx.meta.meta_optimizers import meta_optimizer
from celo_nnx.meta.trainer import MetaTrainer
from celo_nnx.meta.truncation import TRUNCATIONS

SECTIONS = ("estimator", "unroll", "augmentation", "optimizer")
OPTIONS = ("average", "frozen", "phases")


def _choose(
    name: str,
    section: Mapping[str, Any],
    table: Mapping[str, Callable[..., Any]],
    given: frozenset[str] = frozenset(),
) -> functools.partial[Any]:
    """Looks the section's ``kind`` up and binds its other keys as keyword arguments.

    Args:
      name: of the section, such as ``meta.unroll``.
      section: ``kind`` and arguments.
      table: what a kind builds.
      given: arguments that are not the user's to set.

    Raises:
      UserError: for a missing or unknown kind, or an unknown argument.
    """
    if not isinstance(section, Mapping) and not hasattr(section, "items"):
        raise UserError(f"{name} = {section!r} must be a section with a key 'kind'")
    arguments = dict(section.items())
    kind = arguments.pop("kind", None)
    if kind not in table:
        raise unknown(f"{name}.kind", kind, table)
    parameters = inspect.signature(table[kind]).parameters.values()
    known = [p for p in parameters if p.name not in given]
    for key in arguments:
        if key not in [p.name for p in known]:
            raise unknown(f"key of {name}", key, ["kind", *(p.name for p in known)])
    return functools.partial(table[kind], **arguments)


def _section(meta: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    for name in meta:
        if name not in SECTIONS + OPTIONS:
            raise unknown("key of meta", name, SECTIONS + OPTIONS)
    if key not in meta:
        raise UserError(f"the config has no section meta.{key}")
    return meta[key]


def build_estimator(
    meta: Mapping[str, Any], optimizer: Optimizer, families: Sequence[Family], devices: int = 1
) -> GradientEstimator:
    """Builds the estimator of the meta-gradient with its unroll lengths and augmentation.

    Args:
      meta: ``config.meta``.
      optimizer: whose theta is learned.
      families: task families with data.
      devices: how many devices share the pairs.

    Raises:
      UserError: for an unknown kind or key, or a value out of range.
    """
    own = frozenset({"optimizer", "families", "unroll", "augmentation", "devices"})
    estimator = _choose("meta.estimator", _section(meta, "estimator"), ESTIMATORS, own)
    schedule = _choose("meta.unroll", _section(meta, "unroll"), TRUNCATIONS)()
    augmentation = _choose(
        "meta.augmentation", _section(meta, "augmentation"), AUGMENTATIONS, frozenset({"task"})
    )
    return estimator(optimizer, families, unroll=schedule, augmentation=augmentation, devices=devices)


def build_trainer(
    config: Any, optimizer: Optimizer, families: Sequence[Family], devices: int = 1
) -> MetaTrainer:
    """Builds the trainer that a config describes.

    Args:
      config: sections ``meta`` and ``run``.
      optimizer: whose theta is learned, and where it starts.
      families: task families with data.
      devices: how many devices share the pairs.

    Raises:
      UserError: for an unknown kind or key, or a value out of range.
    """
    rule = meta_optimizer(_section(config.meta, "optimizer"), optimizer.theta)
    frozen = frozen_mask(optimizer.theta, config.meta.get("frozen", ()))
    # A leaf that rests is still perturbed here: a standard deviation per leaf would be told ``frozen``.
    estimator = build_estimator(config.meta, optimizer, families, devices)
    return MetaTrainer(
        optimizer,
        estimator,
        rule,
        iterations_per_dispatch=config.run.iterations_per_dispatch,
        average=config.meta.get("average", 0.0),
        frozen=frozen,
    )
