"""Augmentations: tasks made from a task by changing what an optimizer sees of it.

A config's ``meta.augmentation`` is one section, or a list of them that are applied in order: the first is
innermost. A config file that puts a list in the place of the section deletes the section before::

    del config.meta.augmentation
    config.meta.augmentation = ({"kind": "label_noise", "high": 0.2}, {"kind": "loss_scale"})
"""

from __future__ import annotations

from collections.abc import Callable

from celo_nnx.interfaces import Task
from celo_nnx.meta.augmentations.base import Augmentation
from celo_nnx.meta.augmentations.batch_size import BatchSize
from celo_nnx.meta.augmentations.gradient_noise import GradientNoise
from celo_nnx.meta.augmentations.label_noise import LabelNoise
from celo_nnx.meta.augmentations.loss_scale import LossScale
from celo_nnx.meta.augmentations.none import no_augmentation
from celo_nnx.meta.augmentations.reparametrization import Reparametrized
from celo_nnx.meta.augmentations.reparametrization_list import ReparametrizedList

AUGMENTATIONS: dict[str, Callable[..., Task]] = {
    "none": no_augmentation,
    "reparametrization": Reparametrized,
    "reparametrization_list": ReparametrizedList,
    "batch_size": BatchSize,
    "label_noise": LabelNoise,
    "gradient_noise": GradientNoise,
    "loss_scale": LossScale,
}

__all__ = ["AUGMENTATIONS", "Augmentation"]
