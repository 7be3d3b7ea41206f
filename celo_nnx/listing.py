"""What ``celo-nnx list`` shows: parts, variants, weights, tasks, suites, grids, baselines, data sets."""

from __future__ import annotations

from collections.abc import Mapping

from celo_nnx.errors import unknown

KINDS = ("parts", "variants", "weights", "tasks", "suites", "grids", "baselines", "data")
SOURCES = "OPTIMIZERS 1.5, (T1), ...: sections and equations of docs/formulas/optimizers.md (documentation)"


def lines(what: str) -> str:
    """Returns the names of one kind with a line about each.

    Args:
      what: one of :data:`KINDS`.

    Raises:
      UserError: another word.

    Example:
      >>> lines("variants").splitlines()[0]
      'variants'
    """
    if what == "parts":
        from celo_nnx.build import list_parts
        from celo_nnx.meta.augmentations import AUGMENTATIONS

        augmentations = {name: (part.__doc__ or "").split("\n")[0] for name, part in AUGMENTATIONS.items()}
        tables = {**list_parts(), "augmentations": augmentations}
        return "\n".join(_table(kind, names) for kind, names in tables.items())
    if what == "data":
        from celo_nnx.tasks import listing

        return _table("data sets", listing())
    if what == "suites":
        from celo_nnx.evaluation.suites import suites

        return _table(what, suites())
    if what == "grids":
        from celo_nnx.grids.grid_file import grids

        return _table(what, grids())
    if what == "baselines":
        from celo_nnx.evaluation.baselines import BASELINES

        return _table(what, {name: f"{one.about} ({one.source})" for name, one in BASELINES.items()})
    if what == "weights":
        from celo_nnx import weights

        return _table(what, {name: weights.about(name) for name in weights.names()})
    if what in ("variants", "tasks"):
        from celo_nnx.config import presets

        wanted = what == "variants"
        return _table(what, {name: about for name, (about, whole) in presets().items() if whole == wanted})
    raise unknown("list", what, KINDS)


def _table(title: str, names: Mapping[str, str]) -> str:
    width = max((len(name) for name in names), default=0)
    # First lines of docstrings have the marks of their markup.
    plain = {name: about.replace("``", "").removesuffix("::") for name, about in names.items()}
    return "\n".join([title, *(f"  {name:<{width}}  {about}".rstrip() for name, about in plain.items())])
