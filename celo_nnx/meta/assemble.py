"""From the config's ``meta`` section to an estimator and a trainer; checks every key and range."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optax

from celo_nnx.errors import UserError, unknown
from celo_nnx.interfaces import Family, GradientEstimator, Optimizer, Task
from celo_nnx.meta.augmentations import AUGMENTATIONS
from celo_nnx.meta.estimators import ESTIMATORS
from celo_nnx.meta.trainer import META_OPTIMIZERS, MetaTrainer
from celo_nnx.meta.truncation import TRUNCATIONS

SECTIONS = ("estimator", "unroll", "augmentation", "optimizer")


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
        if name not in SECTIONS:
            raise unknown("key of meta", name, SECTIONS)
    if key not in meta:
        raise UserError(f"the config has no section meta.{key}")
    return meta[key]


def meta_optimizer(section: Mapping[str, Any]) -> optax.GradientTransformation:
    """Builds the optax rule for theta.

    Args:
      section: ``config.meta.optimizer``.

    Raises:
      UserError: for an unknown kind or key, or a value out of range.

    Example:
      >>> tx = meta_optimizer({"kind": "adamw", "learning_rate": 1e-4})
    """
    return _choose("meta.optimizer", section, META_OPTIMIZERS)()


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
    augmentation = build_augmentation(_section(meta, "augmentation"))
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
    rule = meta_optimizer(_section(config.meta, "optimizer"))
    estimator = build_estimator(config.meta, optimizer, families, devices)
    steps = config.run.iterations_per_dispatch
    return MetaTrainer(optimizer, estimator, rule, iterations_per_dispatch=steps)
