"""Task families by kind, and the data sets that they know by name.

A new kind is a function ``(settings, data_dir) -> list[Family]`` and a line in :data:`TASKS`; a config file
of the user's own, being a program, may add the line itself (:class:`ModuleTask` wraps an NNX model).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from celo_nnx.errors import UserError, require, unknown
from celo_nnx.interfaces import Family
from celo_nnx.tasks.data import DATASETS, Data, listing, load
from celo_nnx.tasks.image_mlp import ImageMLP
from celo_nnx.tasks.nnx_task import ModuleTask

__all__ = ["DATASETS", "TASKS", "Data", "ImageMLP", "ModuleTask", "build_families", "listing", "load"]

IMAGE_MLP_KEYS = (
    "kind",
    "datasets",
    "image_size",
    "hidden",
    "activation",
    "batch_size",
    "normalizer_clip",
    "validation",
)


def image_mlp_families(settings: Mapping[str, Any], data_dir: str = "") -> list[Family]:
    """Returns one family a data set: its images at ``image_size``, grey, classified by one MLP.

    Families with as many classes have equal tasks, so they run as one batch.

    Args:
      settings: exactly the keys :data:`IMAGE_MLP_KEYS`.
      data_dir: a folder of ``NAME.npz``, looked up first; empty for none.

    Returns:
      The families, in the order of ``settings["datasets"]``.

    Raises:
      UserError: a key, name or value that is not legal, or data that cannot be had.
    """
    for key in settings:
        if key not in IMAGE_MLP_KEYS:
            raise unknown("setting", f"tasks.{key}", [f"tasks.{known}" for known in IMAGE_MLP_KEYS])
    for key in IMAGE_MLP_KEYS:
        if key not in settings:
            raise UserError(f"tasks.{key} is missing: the kind {settings['kind']!r} needs it")
    names, hidden = (settings[key] for key in ("datasets", "hidden"))
    for key, value in (("datasets", names), ("hidden", hidden)):
        if not isinstance(value, (tuple, list)):
            raise UserError(f"tasks.{key} = {value!r} is out of range: must be a tuple")
    if not names or len(set(names)) != len(names):
        raise UserError(
            f"tasks.datasets = {tuple(names)!r} is out of range: must be one or more different names"
        )

    def task(features: int, classes: int) -> ImageMLP:
        values = {key: settings[key] for key in ("activation", "batch_size", "normalizer_clip")}
        return ImageMLP(features=features, hidden=tuple(hidden), classes=classes, **values)

    task(features=1, classes=10)  # settings are checked before minutes may go into data
    share = settings["validation"]
    number = isinstance(share, (int, float)) and not isinstance(share, bool)
    require(number and 0 <= share < 1, "tasks.validation", share, "a fraction in [0, 1)")
    families = []
    for name in names:
        data = load(name, size=settings["image_size"], grey=True, data_dir=data_dir)
        families.append(
            Family(
                name=name,
                task=task(data.train_x.shape[1], data.classes),
                test={"x": data.test_x, "y": data.test_y},
                **hold_out({"x": data.train_x, "y": data.train_y}, share),
            )
        )
    return families


def hold_out(train: Mapping[str, np.ndarray], share: float) -> dict[str, dict[str, np.ndarray]]:
    """Holds a share of the training examples out, the same ones each time.

    Args:
      train: arrays by name, example axis leading.
      share: which part is held out, in [0, 1); rounded to whole examples.

    Returns:
      ``{"train": ..., "validation": ...}``, each in the order of ``train``; validation is empty for 0.

    Example:
      >>> {k: len(v["x"]) for k, v in hold_out({"x": np.arange(10)}, 0.2).items()}
      {'train': 8, 'validation': 2}
    """
    total = len(next(iter(train.values())))
    held = np.zeros(total, bool)
    held[np.random.default_rng(0).permutation(total)[: round(share * total)]] = True
    if not held.any():
        return {"train": dict(train), "validation": {}}
    return {
        "train": {name: x[~held] for name, x in train.items()},
        "validation": {name: x[held] for name, x in train.items()},
    }


TASKS: dict[str, Callable[[Mapping[str, Any], str], list[Family]]] = {"image_mlp": image_mlp_families}


def build_families(tasks_config: Mapping[str, Any], data_dir: str = "") -> list[Family]:
    """Returns the task families of a config's section ``tasks``.

    Args:
      tasks_config: ``kind``, a key of :data:`TASKS`, and that kind's settings.
      data_dir: a folder of ``NAME.npz``, looked up first; empty for none.

    Returns:
      The families.

    Raises:
      UserError: a key, name or value that is not legal, or data that cannot be had.

    Example:
      >>> from celo_nnx.experiments import fast_digits
      >>> [family.name for family in build_families(fast_digits.get_config())]
      ['digits']
    """
    kind = tasks_config.get("kind")
    if kind not in TASKS:
        raise unknown("task kind", kind, TASKS)
    return TASKS[kind](tasks_config, data_dir)
