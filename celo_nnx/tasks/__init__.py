"""Task families by kind, and the data sets that they know by name.

A new kind is a function ``(settings, data_dir) -> list[Family]`` and a line in :data:`TASKS`; a config file
of the user's own, being a program, may add the line itself (:class:`ModuleTask` wraps an NNX model).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from celo_nnx.errors import UserError, is_name, told, unknown
from celo_nnx.interfaces import Family, Task
from celo_nnx.tasks.analytic import Analytic, Quadratic
from celo_nnx.tasks.autoencoder import Autoencoder
from celo_nnx.tasks.builders import (
    AnalyticFamilies,
    ImageFamilies,
    TextFamilies,
    WrappingFamilies,
    hold_out,
    within,
)
from celo_nnx.tasks.conv_net import ConvNet
from celo_nnx.tasks.data import DATASETS, Data, load
from celo_nnx.tasks.data import listing as image_listing
from celo_nnx.tasks.image_mlp import ImageMLP
from celo_nnx.tasks.learned_optimizer import LearnedOptimizerTask
from celo_nnx.tasks.mlp_mixer import MLPMixer
from celo_nnx.tasks.nnx_task import ModelTask, ModuleTask
from celo_nnx.tasks.res_net import ResNet
from celo_nnx.tasks.rnn import RecurrentLM
from celo_nnx.tasks.text import load_text, texts
from celo_nnx.tasks.transformer import TransformerLM
from celo_nnx.tasks.variation import combinations
from celo_nnx.tasks.vision_transformer import VisionTransformer

__all__ = [
    "DATASETS",
    "TASKS",
    "Data",
    "ImageMLP",
    "ModelTask",
    "ModuleTask",
    "build_families",
    "complete",
    "hold_out",
    "listing",
    "load",
    "load_text",
    "trial",
]


def listing(data_dir: str = "") -> dict[str, str]:
    """Returns one line about every data set that has a name here: images, then texts."""
    return image_listing(data_dir) | texts(data_dir)


def build_families(tasks_config: Mapping[str, Any], data_dir: str = "") -> list[Family]:
    """Returns the task families of a config's section ``tasks``.

    Args:
      tasks_config: ``kind``, a key of :data:`TASKS`, and that kind's settings. With ``vary``, ``sample`` and
        ``sample_seed`` it stands for several sections: see :func:`celo_nnx.tasks.variation.combinations`.
      data_dir: a folder of data files, looked up first; empty for none.

    Returns:
      The families; their names differ.

    Raises:
      UserError: a key, name or value that is not legal, or data that cannot be had.

    Example:
      >>> from celo_nnx.experiments import fast_digits
      >>> [family.name for family in build_families(fast_digits.get_config())]
      ['digits']
    """
    section = complete(tasks_config)
    build = TASKS[section["kind"]]
    ours = getattr(build, "__module__", "").startswith("celo_nnx.")
    made = []
    for suffix, one in combinations(section):
        with contextlib.nullcontext() if ours else told(f"task {section['kind']!r}"):
            families = build(one, data_dir)
        made += [dataclasses.replace(f, name=f.name + suffix) for f in families] if suffix else families
    return made


def complete(section: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a section of tasks with every default filled in.

    Kinds that are plain functions know no defaults: their sections are returned as they are.

    Raises:
      UserError: a kind or key that is unknown, or a key that is missing.
    """
    section = dict(section.items())
    kind = section.get("kind")
    if not is_name(kind, TASKS):
        raise unknown("task kind", kind, TASKS)
    fill = getattr(TASKS[kind], "complete", None)
    return fill(section) if fill else section


def trial(section: Mapping[str, Any]) -> Task | None:
    """Checks the values of a complete section in which nothing varies, without its data.

    Returns:
      The task, with stand-ins for what the data decide; None where the kind can only be built with data.

    Raises:
      UserError: a value that is not legal.

    Example:
      >>> trial(complete(dict(kind="recurrent_lm", datasets=("sums",), width=8))).width
      8
    """
    attempt = getattr(TASKS[section["kind"]], "trial", None)
    return attempt(section) if attempt else None


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The families of several sections, ``parts``, side by side: named ``PART/FAMILY``."""

    def complete(self, section: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the section with every default of its parts filled in."""
        for key in section:
            if key not in ("kind", "parts"):
                raise unknown("setting", f"tasks.{key}", ("tasks.kind", "tasks.parts"))
        parts = section.get("parts")
        if not parts or not hasattr(parts, "items"):
            raise UserError(
                f"tasks.parts = {parts!r} is out of range: must be a section of one or more sections"
            )
        return dict(section) | {
            "parts": {name: within(f"parts.{name}", complete, part) for name, part in parts.items()}
        }

    def __call__(self, settings: Mapping[str, Any], data_dir: str = "") -> list[Family]:
        """Returns the families, part by part."""
        return [
            dataclasses.replace(family, name=f"{name}/{family.name}")
            for name, part in self.complete(settings)["parts"].items()
            for family in within(f"parts.{name}", build_families, part, data_dir)
        ]


TASKS: dict[str, Callable[[Mapping[str, Any], str], list[Family]]] = {
    "image_mlp": ImageFamilies(ImageMLP),
    "image_autoencoder": ImageFamilies(Autoencoder),
    "conv_net": ImageFamilies(ConvNet),
    "res_net": ImageFamilies(ResNet),
    "vision_transformer": ImageFamilies(VisionTransformer),
    "mlp_mixer": ImageFamilies(MLPMixer),
    "recurrent_lm": TextFamilies(RecurrentLM),
    "transformer_lm": TextFamilies(TransformerLM),
    "quadratic": AnalyticFamilies(Quadratic),
    "analytic": AnalyticFamilies(Analytic),
    "learned_optimizer": WrappingFamilies(LearnedOptimizerTask, build_families, complete, trial),
    "mixture": Mixture(),
}
