"""Reads recorded trajectories: a JSON and an npz file of one name, taken as data and checked key by key.

What a recording says of its optimizer becomes a :class:`Spec`: hashable, every value in its range, every
field known. Nothing in a recording is evaluated, and only files of its own folder are opened.
"""

from __future__ import annotations

import dataclasses
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from celo_nnx.errors import UserError, require, unknown
from celo_nnx.naive import GROUPS, largest_axes

KINDS = ("optimizer_trajectory", "inner_unroll", "pes_estimate", "normalizer", "image_pipeline")
LARGEST = 2**31  # bytes of arrays in one file; a recording has a few hundred kilobytes


@dataclasses.dataclass(frozen=True)
class Recording:
    """One recording: ``meta`` is the JSON object, ``arrays`` the npz, ``file`` the name to show."""

    file: str
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]
    folder: Path

    def array(self, key: str, shape: tuple[int, ...] | None = None, kind: str = "f") -> np.ndarray:
        """Returns an array after checking its shape and its dtype's kind (``f`` means float32).

        Raises:
          UserError: the key is missing, or shape or dtype differ.
        """
        if key not in self.arrays:
            raise UserError(f"{self.file}: array {key!r} is missing")
        x = self.arrays[key]
        if shape is not None and x.shape != tuple(shape):
            raise UserError(f"{self.file}: array {key!r} has shape {x.shape}, expected {tuple(shape)}")
        if x.dtype.kind not in kind or (x.dtype.kind == "f" and x.dtype != np.float32):
            names = {"f": "float32", "i": "integer", "u": "unsigned integer", "b": "boolean"}
            wanted = " or ".join(names[k] for k in kind)
            raise UserError(f"{self.file}: array {key!r} has dtype {x.dtype}, expected {wanted}")
        return x

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        """Returns the arrays whose key starts with ``prefix``, by the rest of the key; at least one."""
        found = {key[len(prefix) :]: self.array(key) for key in sorted(self.arrays) if key.startswith(prefix)}
        if not found:
            raise UserError(f"{self.file}: no array {prefix}*")
        return found

    def field(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Returns a field of the JSON, checked to be of one of the types."""
        value = self.meta.get(name, default)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"{self.file}: field {name!r} of the JSON is missing or of the wrong type")
        return value

    def tolerance(self, name: str, default: float) -> float:
        """Returns a bound from the JSON's ``tolerance``, or the default where it states none."""
        return self.bound(name, self.field("tolerance", dict, {}).get(name, default))

    def bound(self, name: str, value: Any) -> float:
        """Checks one bound of the JSON's ``tolerance``."""
        return _number(0.0, 1e6)(f"{self.file}: tolerance.{name}", value)


def read(path: str | Path) -> Recording:
    """Reads a recording named by its .json, its .npz or the stem of both.

    Raises:
      UserError: a file is missing, truncated, holds pickled objects or is of an unknown kind.
    """
    text = str(path)
    stem = Path(text[: -len(Path(text).suffix)] if text.endswith((".json", ".npz")) else text)
    header = stem.with_name(stem.name + ".json")
    meta = _read_json(header)
    if meta.get("kind") not in KINDS:
        raise unknown(f"kind in {header}:", meta.get("kind"), KINDS)
    return Recording(text, meta, _read_npz(stem.with_name(stem.name + ".npz")), stem.parent)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no file {path}: a recording is NAME.json with NAME.npz beside it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON: {_line(error)}") from None
    if not isinstance(meta, dict):
        raise UserError(f"{path} is not a JSON object")
    return meta


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as members:
            size = sum(member.file_size for member in members.infolist())
        require(size <= LARGEST, f"size of the arrays in {path}", size, f"at most {LARGEST} bytes")
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except FileNotFoundError:
        raise UserError(f"no file {path}: a recording is NAME.json with NAME.npz beside it") from None
    except (OSError, ValueError, EOFError, KeyError, MemoryError, NotImplementedError) as error:
        raise UserError(f"{path} is not a readable npz of plain arrays: {_line(error)}") from None
    except (zipfile.BadZipFile, zlib.error, SyntaxError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} is damaged or not an npz: {_line(error)}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# --- what a recording says of its optimizer ---------------------------------------------------------------


def _number(low: float, high: float) -> Callable[[str, Any], float]:
    def check(name: str, value: Any) -> float:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        require(fits, name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    return check


def _integer(low: int, high: int) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        require(fits, name, value, f"an integer from {low} to {high}")
        return value

    return check


def _boolean(name: str, value: Any) -> bool:
    require(isinstance(value, bool), name, value, "true or false")
    return value


def _numbers(low: float, high: float, least: int, most: int) -> Callable[[str, Any], tuple[float, ...]]:
    def check(name: str, value: Any) -> tuple[float, ...]:
        fits = isinstance(value, list | tuple) and least <= len(value) <= most
        count = str(least) if least == most else f"{least} to {most}"
        require(fits, name, value, f"a list of {count} numbers")
        return tuple(_number(low, high)(name, x) for x in value)

    return check


def _text(name: str, value: Any) -> str:
    require(value is None or isinstance(value, str) and len(value) < 200, name, value, "a short text")
    return value or ""


def _activation(name: str, value: Any) -> str:
    require(value in ("relu", "tanh"), name, value, "'relu' or 'tanh'")
    return value


_DECAYS = _numbers(0.0, 1.0, 1, 16)
_RATE = _number(0.0, 1e6)
# Constructor field: (default of the published class, check).
_BASE: dict[str, tuple[Any, Callable[[str, Any], Any]]] = {
    "step_mult": (0.001, _RATE),
    "weight_decay": (0.0, _RATE),
    "orthogonalize": (False, _boolean),
    "ns_coeffs": ((3.4445, -4.7750, 2.0315), _numbers(-1e3, 1e3, 3, 3)),
    "ns_iters": (5, _integer(0, 100)),
    "ns_eps": (1e-8, _number(0.0, 1.0)),
    "initial_momentum_decays": ((0.9, 0.99, 0.999), _DECAYS),
    "initial_rms_decays": ((0.95,), _DECAYS),
    "initial_adafactor_decays": ((0.9, 0.99, 0.999), _DECAYS),
    "mlp_activation": ("relu", _activation),
    "ff_hidden_size": (8, _integer(1, 1024)),
    "ff_hidden_layers": (2, _integer(1, 8)),
    "exp_mult": (0.0, _number(-1e3, 1e3)),
    "rmsmult": (1.0, _number(-1e3, 1e3)),
    "param_scale_mult": (False, _boolean),
    "aggregate_mag": (False, _boolean),
    "bias_correction": (False, _boolean),
    "precondition_output": (False, _boolean),
    "normalize_input": (True, _boolean),
    "normalize_output": (True, _boolean),
}
# Switches of the feature groups, in slot order.
_GROUP_SWITCHES = {
    "with_g": ("gradient",),
    "with_grad_clip_feat": ("clipped_gradient",),
    "with_p": ("parameter",),
    "with_m": ("momentum",),
    "with_rms": ("second_moment",),
    "with_rms_norm_g": ("momentum_rms",),
    "with_rsqrt_rms": ("rsqrt_second_moment",),
    "with_fac_norm_g": ("factored_gradient",),
    "with_rms_only_norm_g": ("gradient_rms",),
    "with_fac_rms": ("row", "column"),
    "with_fac_rsqrt": ("rsqrt_row", "rsqrt_column"),
    "with_fac_mom_mult": ("factored_momentum",),
}
_BASE |= {name: (True, _boolean) for name in _GROUP_SWITCHES}
_ADAM: dict[str, tuple[Any, Callable[[str, Any], Any]]] = {
    "orthogonalize": (True, _boolean),
    "regex_1d": (".*bias.*|.*embed.*", _text),
    "adam_b1": (0.9, _number(0.0, 1.0)),
    "adam_b2": (0.999, _number(0.0, 1.0)),
    "adam_epsilon": (1e-8, _number(0.0, 1.0)),
    "adam_bias_correction": (False, _boolean),
    "mult_1d": (20.0, _RATE),
}
CLASSES = {
    "Celo2": ("celo2", _BASE | _ADAM),
    "Celo2Base": ("celo2base", _BASE),
    "Celo2Transformation": ("celo2transform", _BASE),
}


@dataclasses.dataclass(frozen=True)
class Spec:
    """A recorded Celo2 optimizer.

    Attributes:
      fields: every constructor field with its value, sorted by name.
      leaves: (path, route, (d1, d0) or None) of every tensor.
      num_steps: what the recorded optimizer's init was given.
    """

    fields: tuple[tuple[str, Any], ...]
    leaves: tuple[tuple[str, str, tuple[int, int] | None], ...]
    num_steps: int

    def __getitem__(self, name: str) -> Any:
        return dict(self.fields)[name]

    @property
    def groups(self) -> tuple[str, ...]:
        """The feature groups that are on, in slot order."""
        on = {group for switch, groups in _GROUP_SWITCHES.items() if self[switch] for group in groups}
        return tuple(group for group in GROUPS if group in on)

    @property
    def widths(self) -> dict[str, int]:
        """How many planes each group that is on has."""
        m, r = len(self["initial_momentum_decays"]), len(self["initial_rms_decays"])
        f = len(self["initial_adafactor_decays"])
        sizes = (1, 1, 1, m, r, m, r, f, r, f, f, f, f, f)
        return {group: size for group, size in zip(GROUPS, sizes, strict=True) if group in self.groups}


def optimizer_name(recording: Recording) -> str:
    """Returns the name of the recorded optimizer, the published class's where it is not one of Celo2's."""
    name = recording.field("reference_class", str).rsplit(".", 1)[-1]
    if name in CLASSES:
        return CLASSES[name][0]
    return recording.field("optimizer", str, recording.field("reference_class", str))


def spec(recording: Recording, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> Spec:
    """Returns the optimizer of a recording; route and factored axes from its leaves, else by its options.

    Args:
      recording: of kind optimizer_trajectory or inner_unroll.
      shapes: (path, shape) of every tensor.

    Raises:
      UserError: an unknown or illegal constructor field, or leaves that do not fit the shapes.
    """
    _, table = CLASSES[recording.field("reference_class", str).rsplit(".", 1)[-1]]
    given = recording.field("constructor", dict)
    for name in given:
        if name not in table:
            raise unknown(f"constructor field in {recording.file}:", name, table)
    values = {
        name: check(f"{recording.file}: {name}", given.get(name, default))
        for name, (default, check) in table.items()
    }
    banks = [len(values[f"initial_{bank}_decays"]) for bank in ("momentum", "rms", "adafactor")]
    fits = banks[0] == banks[2] and banks[1] in (1, banks[0])
    require(fits, f"{recording.file}: bank sizes", banks, "[k, 1 or k, k]")
    stated = {leaf["key"]: leaf for leaf in _leaves(recording)}
    leaves = tuple(_leaf(recording, values, path, shape, stated.get(path, {})) for path, shape in shapes)
    num_steps = _integer(1, 2**31 - 1)(
        f"{recording.file}: num_steps_given_to_init", recording.meta.get("num_steps_given_to_init", 1)
    )
    return Spec(tuple(sorted(values.items())), leaves, num_steps)


def _leaves(recording: Recording) -> list[dict[str, Any]]:
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
        require(
            stated["routed_to"] in ("adam", "celo2"), f"{where}: route", stated["routed_to"], "adam or celo2"
        )
        adam = stated["routed_to"] == "adam"
    else:
        adam = bool(values.get("regex_1d")) and _search(where, values["regex_1d"], path)
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


def _search(where: str, pattern: str, path: str) -> bool:
    try:
        return re.search(pattern, path) is not None
    except re.error as error:
        raise UserError(f"{where}: regex_1d = {pattern!r} is no regular expression: {error}") from None


def theta(recording: Recording, rule: Spec) -> dict[str, Any]:
    """Returns a recording's theta, or that of the file it names, in this project's layout.

    Raises:
      UserError: ``theta_from`` is not a plain name, or a weight is missing, unknown or of another shape.
    """
    source = recording.field("theta_from", str, "") or None
    if source is not None and source != Path(recording.file).name:
        plain = re.fullmatch(r"[\w.+-]+\.npz", source) and source not in (".npz", "..npz")
        require(bool(plain), f"{recording.file}: theta_from", source, "a plain NAME.npz of the same folder")
        recording = dataclasses.replace(
            recording, file=str(recording.folder / source), arrays=_read_npz(recording.folder / source)
        )
    prefix, hidden = "theta/ff_mod_stack/~/", rule["ff_hidden_size"]
    wanted: dict[str, tuple[int, ...]] = {}
    for j, width in enumerate(rule.widths.values()):
        wanted[f"w0__{j}"] = (width, hidden)
    layers = rule["ff_hidden_layers"]
    for layer in range(layers + 1):
        size = 3 if layer == layers else hidden
        wanted[f"b{layer}"] = (size,)
        if layer:
            wanted[f"w{layer}"] = (hidden, size)
    found = {key for key in recording.arrays if key.startswith("theta/")}
    for key in sorted(found - {prefix + name for name in wanted}):
        raise UserError(f"{recording.file}: array {key!r} has no place in this optimizer's theta")
    weights: dict[str, Any] = {name: recording.array(prefix + name, shape) for name, shape in wanted.items()}
    weights["w0"] = {group: weights.pop(f"w0__{j}") for j, group in enumerate(rule.groups)}
    return {"update_rule": weights}
