"""From a config's section to task families: one class for each way in which tasks get their data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from celo_nnx.errors import UserError, is_number, require, unknown
from celo_nnx.interfaces import Family, Task
from celo_nnx.tasks.data import check_size, load
from celo_nnx.tasks.text import check_level, load_text

Section = Mapping[str, Any]
REQUIRED = object()
# Fields of tasks that the data decide.
GIVEN = ("features", "side", "colors", "classes", "vocabulary", "floor", "inner")
TEST_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class Families:
    """Builds the families of one kind: a callable ``(settings, data_dir) -> list[Family]``.

    Attributes:
      task: a frozen dataclass, whose fields are settings with their defaults.
    """

    task: type[Task]

    def extra(self) -> dict[str, Any]:
        """Returns the settings that are no fields of the task, with their defaults or :data:`REQUIRED`."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Returns every setting with its default or :data:`REQUIRED`."""
        fields = {f.name: f.default for f in dataclasses.fields(self.task) if f.name not in GIVEN}
        return {"kind": REQUIRED} | self.extra() | fields | dict(vary={}, sample=0, sample_seed=0)

    def complete(self, section: Section) -> dict[str, Any]:
        """Returns a section with every default filled in.

        Raises:
          UserError: a key that is unknown or missing.
        """
        known = self.settings()
        for key in section:
            if key not in known:
                raise unknown("setting", f"tasks.{key}", [f"tasks.{name}" for name in known])
        for key, default in known.items():
            if default is REQUIRED and key not in section:
                raise UserError(f"tasks.{key} is missing: the kind {section['kind']!r} needs it")
            if isinstance(default, tuple) and not isinstance(section.get(key, ()), (tuple, list)):
                require(False, f"tasks.{key}", section[key], "a tuple")
        return {key: section.get(key, default) for key, default in known.items()}

    def make(self, section: Section, given: Mapping[str, Any]) -> Any:
        """Builds the task of a section, with the fields that the data decide."""
        fields = [f.name for f in dataclasses.fields(self.task) if f.name not in GIVEN]
        return self.task(**{name: section[name] for name in fields}, **given)

    def trial(self, section: Section) -> Task:
        """Checks the values of a complete section in which nothing varies, without its data.

        Returns:
          The task, with stand-ins for what the data decide.

        Raises:
          UserError: a value that is not legal.
        """
        return self.make(section, {})

    def __call__(self, settings: Section, data_dir: str = "") -> list[Family]:
        """Returns the families.

        Args:
          settings: the section; see :meth:`settings`.
          data_dir: a folder of data files, looked up first; empty for none.

        Raises:
          UserError: a key, name or value that is not legal, or data that cannot be had.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class ImageFamilies(Families):
    """One family for each of ``datasets``: its images at ``image_size``, averaged over colours if ``grey``.

    Families with as many classes have equal tasks, so they run as one batch. ``validation`` is the share of
    the training images that is held out.
    """

    def extra(self) -> dict[str, Any]:
        """Returns the settings of the images."""
        return dict(datasets=REQUIRED, image_size=REQUIRED, grey=True, validation=0.0)

    def trial(self, section: Section) -> Task:
        """Checks the values of a complete section; see :meth:`Families.trial`."""
        size, grey = section["image_size"], section["grey"]
        check_names_and_share(section["datasets"], section["validation"])
        require(isinstance(grey, bool), "tasks.grey", grey, "True or False")
        check_size(size)
        return self.make(section, self.task.fields_of(size, 1 if grey else 3, 10))

    def __call__(self, settings: Section, data_dir: str = "") -> list[Family]:
        """Returns the families, in the order of ``settings["datasets"]``."""
        section = self.complete(settings)
        self.trial(section)  # settings are checked before minutes may go into data
        names, share, size, grey = (section[k] for k in ("datasets", "validation", "image_size", "grey"))
        families = []
        for name in names:
            data = load(name, size=size, grey=grey, data_dir=data_dir)
            given = self.task.fields_of(size, data.train_x.shape[1] // size**2, data.classes)
            task = self.make(section, given)
            if hasattr(task, "floor_of"):
                task = dataclasses.replace(task, floor=task.floor_of(data.train_x))
            parts = hold_out({"x": data.train_x, "y": data.train_y}, share)
            families.append(Family(name, task, test={"x": data.test_x, "y": data.test_y}, **parts))
        return families


@dataclasses.dataclass(frozen=True)
class TextFamilies(Families):
    """One family for each of ``datasets``: a text as tokens at a ``level``, ``words`` of them at most.

    The last tenth of the text is the test split, and of the rest the last ``validation`` is held out.
    """

    def extra(self) -> dict[str, Any]:
        """Returns the settings of the text."""
        return dict(datasets=REQUIRED, level="character", words=1000, validation=0.0)

    def trial(self, section: Section) -> Task:
        """Checks the values of a complete section; see :meth:`Families.trial`."""
        check_names_and_share(section["datasets"], section["validation"])
        check_level(section["level"], section["words"])
        return self.make(section, {"vocabulary": 2})

    def __call__(self, settings: Section, data_dir: str = "") -> list[Family]:
        """Returns the families, in the order of ``settings["datasets"]``."""
        section = self.complete(settings)
        self.trial(section)  # settings are checked before data are read
        names, share = section["datasets"], section["validation"]
        families = []
        for name in names:
            text = load_text(name, level=section["level"], words=section["words"], data_dir=data_dir)
            task = self.make(section, {"vocabulary": max(text.vocabulary, 2)})
            parts = split_text(text.tokens, share)
            for split, tokens in parts.items():
                need = task.length + 1
                if len(tokens) < need and (share > 0 or split != "validation"):
                    raise UserError(
                        f"tasks.length = {task.length} is out of range for the text {name!r}: must leave "
                        f"slices of {need} tokens in its {split} split, which has {len(tokens)}"
                    )
            arrays = {split: {"tokens": tokens} for split, tokens in parts.items() if len(tokens)}
            families.append(Family(name, task, **arrays))
        return families


@dataclasses.dataclass(frozen=True)
class AnalyticFamilies(Families):
    """One family, named by its kind or formula; it has no data."""

    def __call__(self, settings: Section, data_dir: str = "") -> list[Family]:
        """Returns one family."""
        section = self.complete(settings)
        nothing = {"none": np.zeros(1, np.float32)}  # families have at least one example
        name = section.get("formula", section["kind"])
        return [Family(name, self.make(section, {}), nothing, nothing)]


@dataclasses.dataclass(frozen=True)
class WrappingFamilies(Families):
    """One family for each of the section ``inner``, another section of tasks: a task around that task.

    Attributes:
      build, fill, attempt: of sections, as :func:`celo_nnx.tasks.build_families`, ``complete`` and ``trial``.
    """

    build: Callable[[Section, str], list[Family]]
    fill: Callable[[Section], dict[str, Any]]
    attempt: Callable[[Section], Task | None]

    def extra(self) -> dict[str, Any]:
        """Returns the inner section."""
        return dict(inner=REQUIRED)

    def complete(self, section: Section) -> dict[str, Any]:
        """Returns both sections with every default filled in."""
        section = super().complete(section)
        return section | {"inner": within("inner", self.fill, section["inner"])}

    def trial(self, section: Section) -> Task:
        """Checks the values of a complete section; see :meth:`Families.trial`."""
        inner = within("inner", self.attempt, section["inner"])
        return self.make(section, {"inner": inner or Task()})

    def __call__(self, settings: Section, data_dir: str = "") -> list[Family]:
        """Returns the families, in the order of the inner ones."""
        section = self.complete(settings)
        found = within("inner", self.build, section["inner"], data_dir)
        kind = section["kind"]
        return [
            dataclasses.replace(f, name=f"{kind}/{f.name}", task=self.make(section, {"inner": f.task}))
            for f in found
        ]


def within(place: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function on a section within a section, and tells errors with its place."""
    if not hasattr(arguments[0], "items"):
        raise UserError(f"tasks.{place} = {arguments[0]!r} must be a section with a key 'kind'")
    try:
        return function(*arguments)
    except UserError as error:
        raise type(error)(f"tasks.{place}: {error}") from None


def check_names_and_share(names: Any, share: Any) -> None:
    """Checks the settings ``datasets`` and ``validation``."""
    if not isinstance(names, (tuple, list)) or not all(isinstance(name, str) for name in names):
        raise UserError(f"tasks.datasets = {names!r} is out of range: must be a tuple of names")
    if not names or len(set(names)) != len(names):
        raise UserError(
            f"tasks.datasets = {tuple(names)!r} is out of range: must be one or more different names"
        )
    require(is_number(share) and 0 <= share < 1, "tasks.validation", share, "a fraction in [0, 1)")


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


def split_text(tokens: np.ndarray, share: float) -> dict[str, np.ndarray]:
    """Splits a text by position: training, validation (``share`` of what is not test), and a tenth of test.

    Example:
      >>> {split: part.tolist() for split, part in split_text(np.arange(10), 0.2).items()}
      {'train': [0, 1, 2, 3, 4, 5, 6], 'validation': [7, 8], 'test': [9]}
    """
    test = len(tokens) - round(TEST_SHARE * len(tokens))
    train = test - round(share * test)
    return {"train": tokens[:train], "validation": tokens[train:test], "test": tokens[test:]}
