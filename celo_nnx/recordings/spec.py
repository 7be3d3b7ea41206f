"""What a recording says of its optimizer: constructor fields, tensors, theta; all checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from celo_nnx.errors import UserError, require, unknown
from celo_nnx.naive_zoo.tensors import largest_axes
from celo_nnx.pretrained import layouts
from celo_nnx.recordings.checks import found, integer
from celo_nnx.recordings.classes import CLASSES, Published, lookup
from celo_nnx.recordings.files import Recording

# Which constructor field gives the size that a letter of celo_nnx.pretrained.layouts stands for, or a list
# of that length.
_SIZES = {
    "ff_hidden_size": "H",
    "hidden_size": "H",
    "param_inits": "K",
    "lstm_hidden_size": "C",
    "from_lstm_size": "S",
    "from_mlp_size": "O",
    "lstm_to_ff": "E",
}
_LENGTHS = {
    "initial_momentum_decays": "M",
    "initial_rms_decays": "R",
    "initial_adafactor_decays": "A",
    "decays": "D",
}
_LAYERS = ("ff_hidden_layers", "hidden_layers", "hidden_layer")


@dataclasses.dataclass(frozen=True)
class Spec:
    """A recorded optimizer; equal and hashable by what it holds.

    Attributes:
      kind: key of ``CLASSES``.
      fields: every constructor field with its value, sorted by name.
      leaves: (path, route, (d1, d0) or None) of every tensor.
      num_steps: what the recorded optimizer's init was given.
    """

    kind: str
    fields: tuple[tuple[str, Any], ...]
    leaves: tuple[tuple[str, str, tuple[int, int] | None], ...]
    num_steps: int

    def __getitem__(self, name: str) -> Any:
        """Returns the value of a constructor field."""
        return dict(self.fields)[name]

    def __contains__(self, name: str) -> bool:
        """Whether the class has a constructor field of this name."""
        return name in dict(self.fields)

    @property
    def published(self) -> Published:
        """The published class."""
        return CLASSES[self.kind]

    @property
    def groups(self) -> tuple[str, ...]:
        """The feature groups of the split first layer that are on, in slot order."""
        groups = self.published.groups.items()
        return tuple(group for group, switches in groups if all(self[switch] for switch in switches))

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes by the letters of ``celo_nnx.pretrained.layouts``."""
        out = {letter: self[field] for field, letter in _SIZES.items() if field in self}
        out |= {letter: len(self[field]) for field, letter in _LENGTHS.items() if field in self}
        if "with_validation_feature_dim" in self:
            out["F"] = 18 + self["with_validation_feature_dim"]
            if self.published.layout == "velo":
                out["F"] += out["R"] + 5 + out["M"] + max(out["M"], out["R"])
        return out

    @property
    def layers(self) -> int:
        """Hidden layers of the update rule's MLP, 2 where there is none."""
        return next((self[field] for field in _LAYERS if field in self), 2)

    @property
    def theta_leaves(self) -> list[tuple[str, list[tuple[str, tuple[int, ...]]]]]:
        """Every leaf of the published theta: its name, and path and shape of its pieces here."""
        known = layouts.leaves(self.published.layout, groups=self.groups, layers=self.layers)
        without_mix = "mix_layers" in self and not self["mix_layers"]
        out = []
        for leaf in known:
            pieces = [
                (path, tuple(layouts.size(dim, self.sizes) for dim in dims)) for path, dims in leaf.pieces
            ]
            if without_mix and pieces[0][0] == "schedule/lstm/w":
                pieces = [(pieces[0][0], (self.sizes["F"] + self.sizes["C"], 4 * self.sizes["C"]))]
            if not (without_mix and pieces[0][0].startswith("schedule/mix/")):
                out.append((leaf.name, pieces))
        return out


def optimizer_name(recording: Recording) -> str:
    """Returns this project's name of the recorded optimizer, the published class's where it has none."""
    reference = recording.field("reference_class", str)
    kind = lookup(reference)
    return recording.field("optimizer", str, reference) if kind is None else CLASSES[kind].name


def spec(recording: Recording, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> Spec:
    """Returns the optimizer of a recording; route and factored axes from its leaves, else by its options.

    Args:
      recording: of kind optimizer_trajectory or inner_unroll.
      shapes: (path, shape) of every tensor.

    Raises:
      UserError: an unknown class, an unknown or illegal constructor field, or leaves that do not fit the
        shapes.
    """
    reference = recording.field("reference_class", str)
    kind = lookup(reference)
    if kind is None:
        raise unknown(f"reference_class in {recording.file}:", reference, CLASSES)
    values = _values(recording, CLASSES[kind])
    stated = {leaf["key"]: leaf for leaf in _stated(recording)}
    leaves = tuple(_leaf(recording, values, path, shape, stated.get(path, {})) for path, shape in shapes)
    num_steps = integer(1, 2**31 - 1)(
        f"{recording.file}: num_steps_given_to_init", recording.meta.get("num_steps_given_to_init", 1)
    )
    return Spec(kind, tuple(sorted(values.items())), leaves, num_steps)


def _values(recording: Recording, published: Published) -> dict[str, Any]:
    """Returns every constructor field's value, checked one by one and together."""
    table, where = published.fields, recording.file
    given = recording.field("constructor", dict)
    given = {name: value for name, value in given.items() if not name.startswith(published.inert)}
    for name in given:
        if name not in table:
            raise unknown(f"constructor field in {where}:", name, table)
    values = {
        name: check(f"{where}: {name}", given.get(name, default)) for name, (default, check) in table.items()
    }
    banks = [len(values[field]) for field in _LENGTHS if field in values]
    if published.layout == "celo_adam":
        fits = banks[0] == banks[1] or 1 in banks[:2]
        require(fits, f"{where}: sizes of momentum and rms banks", banks[:2], "equal, or one of them 1")
    elif len(banks) == 3:
        fits = banks[0] == banks[2] and banks[1] in (1, banks[0])
        require(fits, f"{where}: bank sizes", banks, "[k, 1 or k, k]")
    if published.groups:
        on = any(all(values[switch] for switch in switches) for switches in published.groups.values())
        require(on, f"{where}: feature groups", [], "at least one that is on")
    if published.layout == "adafac_mlp":
        one = values["concat_weights"] != values["make_separate_weights"]
        require(one, f"{where}: make_separate_weights", not one, "true where concat_weights is false only")
    return values


def _stated(recording: Recording) -> list[dict[str, Any]]:
    leaves = recording.field("param_leaves", list, [])
    for leaf in leaves:
        if not isinstance(leaf, dict) or not isinstance(leaf.get("key"), str):
            raise UserError(f"{recording.file}: an entry of param_leaves has no key")
    return leaves


def _leaf(
    recording: Recording, values: dict[str, Any], path: str, shape: tuple[int, ...], stated: dict[str, Any]
) -> tuple[str, str, tuple[int, int] | None]:
    where = f"{recording.file}: {path}"
    if "routed_to" in stated:
        route = stated["routed_to"]
        require(route in ("adam", "celo2"), f"{where}: route", route, "adam or celo2")
        adam = route == "adam"
    else:
        adam = bool(values.get("regex_1d")) and found(where, values["regex_1d"], path)
    if adam and "adam_b1" not in values:
        raise UserError(f"{where}: routed to adam, but the recorded optimizer has no Adam")
    axes = stated.get("factored_dims_d1_d0")
    if adam or len(shape) < 2:
        return path, "adam" if adam else "learned", None
    if axes is None:
        return path, "learned", largest_axes(path, shape)
    legal = isinstance(axes, list) and len(axes) == 2 and len(set(map(str, axes))) == 2
    legal = legal and all(type(axis) is int and 0 <= axis < len(shape) for axis in axes)
    require(legal, f"{where}: factored_dims_d1_d0", axes, f"two different axes below {len(shape)}")
    return path, "learned", (axes[0], axes[1])
