"""From the config's ``meta`` section to an estimator and a trainer; checks every key and range."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from celo_nnx.errors import UserError, is_count, is_name, require, unknown
from celo_nnx.interfaces import Family, GradientEstimator, Optimizer, Task
from celo_nnx.meta.augmentations import AUGMENTATIONS
from celo_nnx.meta.estimators import ESTIMATORS
from celo_nnx.meta.estimators.base import Estimator
from celo_nnx.meta.frozen import frozen_mask
from celo_nnx.meta.meta_optimizers import meta_optimizer, of_rate
from celo_nnx.meta.objective import Objective
from celo_nnx.meta.trainer import MetaTrainer
from celo_nnx.meta.truncation import TRUNCATIONS

SECTIONS = ("estimator", "objective", "unroll", "augmentation", "optimizer")
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
    arguments = _items(name, section)
    kind = arguments.pop("kind", None)
    if not is_name(kind, table):
        raise unknown(f"{name}.kind", kind, table)
    parameters = inspect.signature(table[kind]).parameters.values()
    known = [p for p in parameters if p.name not in given]
    for key in arguments:
        if key not in [p.name for p in known]:
            raise unknown(f"key of {name}", key, ["kind", *(p.name for p in known)])
    return functools.partial(table[kind], **arguments)


def _items(name: str, section: Any) -> dict[str, Any]:
    if not hasattr(section, "items"):
        raise UserError(f"{name} = {section!r} must be a section with a key 'kind'")
    return dict(section.items())


def _section(meta: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    for name in meta:
        if name not in SECTIONS + OPTIONS:
            raise unknown("key of meta", name, SECTIONS + OPTIONS)
    if key not in meta:
        raise UserError(f"the config has no section meta.{key}")
    return meta[key]


def build_augmentation(sections: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Callable[[Task], Task]:
    """Builds what makes the task that is trained from a family's task.

    Args:
      sections: ``config.meta.augmentation``: one section, or a list of them, the first innermost.

    Raises:
      UserError: for an unknown kind or key; a value out of range is found when a task is augmented.

    Example:
      >>> from celo_nnx.tasks import ImageMLP
      >>> augment = build_augmentation(({"kind": "label_noise", "high": 0.1}, {"kind": "loss_scale"}))
      >>> type(augment(ImageMLP(features=64))).__name__
      'LossScale'
    """
    name = "meta.augmentation"
    named = {name: sections}
    if isinstance(sections, (tuple, list)):
        named = {f"{name}[{i}]": section for i, section in enumerate(sections)}
    makers = [_choose(n, section, AUGMENTATIONS, frozenset({"task"})) for n, section in named.items()]
    return lambda task: functools.reduce(lambda inner, make: make(inner), makers, task)


def build_estimator(
    meta: Mapping[str, Any], optimizer: Optimizer, families: Sequence[Family], devices: int = 1
) -> GradientEstimator:
    """Builds the estimator of the meta-gradient with its objective, unroll lengths and augmentation.

    Args:
      meta: ``config.meta``.
      optimizer: whose theta is learned.
      families: task families with data.
      devices: how many devices share the pairs.

    Raises:
      UserError: for an unknown kind or key, or a value out of range.
    """
    objective = {"kind": "objective", **_items("meta.objective", meta.get("objective", {}))}
    given = dict(
        unroll=_choose("meta.unroll", _section(meta, "unroll"), TRUNCATIONS)(),
        augmentation=build_augmentation(_section(meta, "augmentation")),
        objective=_choose("meta.objective", objective, {"objective": Objective})(),
        frozen=meta.get("frozen", ()),
        devices=devices,
    )
    return _estimator("meta.estimator", _section(meta, "estimator"), optimizer, families, given)


def _estimator(
    name: str,
    section: Mapping[str, Any],
    optimizer: Optimizer,
    families: Sequence[Family],
    given: Mapping[str, Any],
) -> GradientEstimator:
    """Builds the estimator of a section; a mixture's are sections of its own."""
    values = _items(name, section)
    if values.get("kind") == "mixture":
        for part in ("first", "second"):
            if part not in values:
                raise UserError(f"the config has no section {name}.{part}")
            values[part] = _estimator(f"{name}.{part}", values[part], optimizer, families, given)
        return _choose(name, values, ESTIMATORS)()
    if hasattr(values.get("truncation"), "items"):
        values["truncation"] = _choose(f"{name}.truncation", values["truncation"], TRUNCATIONS)()
    return _choose(name, values, ESTIMATORS, Estimator.GIVEN)(optimizer, families, **given)


def pairs_of(estimator: Mapping[str, Any]) -> int:
    """Returns how many pairs a family must be shared by the devices: a mixture's greatest common divisor.

    Args:
      estimator: ``config.meta.estimator``.

    Raises:
      UserError: it is no section, or the number of pairs is out of range.

    Example:
      >>> pairs_of({"kind": "mixture", "first": {"pairs": 8}, "second": {"pairs": 12}})
      4
    """
    return _pairs("meta.estimator", estimator)


def _pairs(name: str, section: Any) -> int:
    values = _items(name, section)
    if values.get("kind") == "mixture":
        parts = (part for part in ("first", "second") if part in values)
        return math.gcd(*(_pairs(f"{name}.{part}", values[part]) for part in parts))
    pairs = values.get("pairs", Estimator.pairs)
    require(is_count(pairs), f"{name}.pairs", pairs, "an integer >= 1")
    return pairs


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
    if not jax.tree.leaves(optimizer.theta):
        raise UserError("the optimizer has no meta-parameters: there is nothing to meta-train")
    section = _section(config.meta, "optimizer")
    rule, by_rate = meta_optimizer(section, optimizer.theta), of_rate(section)
    frozen = frozen_mask(optimizer.theta, config.meta.get("frozen", ()))
    estimator = build_estimator(config.meta, optimizer, families, devices)
    return MetaTrainer(
        optimizer,
        estimator,
        by_rate or rule,
        learning_rate=section["learning_rate"] if by_rate else None,
        iterations_per_dispatch=config.run.iterations_per_dispatch,
        average=config.meta.get("average", 0.0),
        frozen=frozen,
    )
