"""Where each meta-parameter of a published theta lies in this project's theta, as data (numpy only).

A published tree is a map from key tuples to arrays; one key may itself hold a ``/`` (``rnn/linear``,
``mlp/~/linear_0``), so ``("rnn_params", "rnn/linear", "w")`` and its joined form
``"rnn_params/rnn/linear/w"`` both name a leaf. This project's theta is a nested dict. A published leaf is
one leaf here, or several that are its rows (the feature groups of an unsplit first layer).

Sizes are written as letters and solved from the leaves: K MLPs of a bank, H hidden units, M, R and A
decays of the momentum, second-moment and factored banks, C LSTM units, F inputs of the LSTM.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from celo_nnx.errors import UserError, require, unknown

Path = tuple[str, ...]
Dims = tuple[str, ...]

# The split first layer's feature groups in slot order with their planes (OPTIMIZERS 1.6).
GROUPS: dict[str, str] = {
    "gradient": "1",
    "clipped_gradient": "1",
    "parameter": "1",
    "momentum": "M",
    "second_moment": "R",
    "momentum_rms": "M",
    "rsqrt_second_moment": "R",
    "factored_gradient": "A",
    "gradient_rms": "R",
    "row": "A",
    "column": "A",
    "rsqrt_row": "A",
    "rsqrt_column": "A",
    "factored_momentum": "A",
}
# Rows of the unsplit first layer of adafac_mlp and of rnn_mlp, context last (OPTIMIZERS 8 and 7).
_ADAFAC = {g: w for g, w in GROUPS.items() if g not in ("clipped_gradient", "gradient_rms")}
_ADAFAC |= {"time_tanh": "11"}
_RNN_MLP = {"gradient": "1", "parameter": "1", "log_parameter": "1"}
_RNN_MLP |= {g: "D" for g in ("momentum", "second_moment", "momentum_rms", "rsqrt_second_moment")}
_RNN_MLP |= {"time_sine": "11", "log_tensors": "1", "log_norm": "1", "log_size": "1", "controls": "E"}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One published leaf: its key tuple, and ``(path here, shape)`` of its pieces along the first axis."""

    path: Path
    pieces: tuple[tuple[str, Dims], ...]

    @property
    def name(self) -> str:
        """The keys joined by ``/``."""
        return "/".join(self.path)

    @property
    def dims(self) -> Dims:
        """The published shape in letters."""
        first = "+".join(dims[0] for _, dims in self.pieces) if len(self.pieces) > 1 else None
        dims = self.pieces[0][1]
        return dims if first is None else (first, *dims[1:])


def _leaf(path: str | Path, own: str, *dims: str) -> Leaf:
    return Leaf((path,) if isinstance(path, str) else path, ((own, dims),))


def _split_mlp(groups: Sequence[str], layers: int, *, bank: Dims, outputs: str = "3") -> list[Leaf]:
    """``ff_mod_stack/~``: one piece of the first layer a group, numbered over the groups that are kept."""
    top = ("ff_mod_stack", "~")
    out = [
        _leaf((*top, f"w0__{j}"), f"update_rule/w0/{g}", *bank, GROUPS[g], "H") for j, g in enumerate(groups)
    ]
    return out + _deep(lambda name, i: (*top, f"{name}{i}"), layers, bank, outputs)


def _deep(path: Callable[[str, int], Path], layers: int, bank: Dims, outputs: str) -> list[Leaf]:
    """The bias of the first layer and all later layers."""
    out = []
    for layer in range(layers + 1):
        size = outputs if layer == layers else "H"
        out.append(_leaf(path("b", layer), f"update_rule/b{layer}", *bank, size))
        if layer:
            out.append(_leaf(path("w", layer), f"update_rule/w{layer}", *bank, "H", size))
    return out


def _joint_first(path: Path, groups: Mapping[str, str]) -> Leaf:
    return Leaf(path, tuple((f"update_rule/w0/{g}", (width, "H")) for g, width in groups.items()))


def _dense(path: Path, own: str, inputs: str, outputs: str) -> list[Leaf]:
    return [_leaf((*path, "w"), f"{own}/w", inputs, outputs), _leaf((*path, "b"), f"{own}/b", outputs)]


def _lstm(inputs: str) -> list[Leaf]:
    start = [_leaf(("lstm_init_state", n), f"schedule/initial/{n}", "1", "C") for n in ("hidden", "cell")]
    return start + _dense(("rnn_params", "rnn/linear"), "schedule/lstm", inputs, "4C")


def _scheduler(controls: bool) -> list[Leaf]:
    """The LSTM schedule of Celo and VeLO (OPTIMIZERS 2 and 6)."""
    out = _lstm("2C")
    for key, name in (("linear", "dead"), ("linear_1", "max"), ("linear_2", "skip")):
        out += _dense(("rnn_params", key), f"schedule/mix/{name}", "F", "C")
    out += _dense(("rnn_params", "step_size"), "schedule/step", "C", "1")
    return out + (
        _dense(("rnn_params", "rnn_to_controls"), "schedule/controls", "C", "K") if controls else []
    )


def _adafac_mlp(groups: Sequence[str], layers: int) -> list[Leaf]:
    banks = (("momentum", "momentum", "M"), ("rms", "second_moment", "R"), ("adafactor", "factored", "A"))
    out = [_leaf(f"{theirs}_decays", f"accumulators/{own}/offset", n) for theirs, own, n in banks]
    out.append(_joint_first(("nn", "~", "w0"), _ADAFAC))
    return out + _deep(lambda name, i: ("nn", "~", f"{name}{i}"), layers, (), "2")


def _rnn_mlp(groups: Sequence[str], layers: int) -> list[Leaf]:
    out = [_leaf("initial_from_lstm", "schedule/initial_shared", "S")]
    out += [_leaf("initial_from_mlp", "schedule/initial_own", "O"), *_lstm("S+O+18+C")]
    out += _dense(("rnn_to_ff_params", "rnn_to_ff"), "schedule/to_rule", "C", "E")
    out += _dense(("rnn_to_in_params", "rnn_to_in"), "schedule/to_shared", "C", "S")
    out.append(_joint_first(("ffmod_params", "mlp/~/linear_0", "w"), _RNN_MLP))
    return out + _deep(lambda name, i: ("ffmod_params", f"mlp/~/linear_{i}", name), layers, (), "2+O")


def _nn_adam(groups: Sequence[str], layers: int) -> list[Leaf]:
    out = _lstm("19+C") + _dense(("rnn_to_controls_params", "rnn_to_controls"), "schedule/heads", "C", "4")
    names = {"lr": "lr", "beta1": "b1", "beta2": "b2", "epsilon": "eps"}
    return out + [_leaf(f"per_layer_{theirs}", f"schedule/{own}") for theirs, own in names.items()]


LAYOUTS: dict[str, Callable[[Sequence[str], int], list[Leaf]]] = {
    "celo2": lambda groups, layers: _split_mlp(groups, layers, bank=()),
    "celo": lambda groups, layers: _split_mlp(groups, layers, bank=("K",)) + _scheduler(True),
    "celo_adam": lambda groups, layers: _scheduler(False),
    "velo": lambda groups, layers: _split_mlp(groups, layers, bank=("K",)) + _scheduler(True),
    "rnn_mlp": _rnn_mlp,
    "adafac_mlp": _adafac_mlp,
    "nn_adam": _nn_adam,
}
# The LSTM's inputs tell celo from velo; one more with the validation flag.
INPUTS = {"celo": (18, 19), "celo_adam": (18, 19), "velo": (30, 31)}


def leaves(layout: str, *, groups: Sequence[str] = tuple(GROUPS), layers: int = 2) -> list[Leaf]:
    """Returns the published leaves of a layout with their places here.

    Args:
      layout: a name of :data:`LAYOUTS`.
      groups: feature groups of the split first layer that are kept, in slot order (celo2, celo, velo).
      layers: hidden layers of the MLP, at least 1.

    Raises:
      UserError: an unknown layout or group.

    Example:
      >>> [leaf.name for leaf in leaves("celo2", groups=["gradient", "momentum"])][:3]
      ['ff_mod_stack/~/w0__0', 'ff_mod_stack/~/w0__1', 'ff_mod_stack/~/b0']
      >>> leaves("nn_adam")[2]
      Leaf(path=('rnn_params', 'rnn/linear', 'w'), pieces=(('schedule/lstm/w', ('19+C', '4C')),))
    """
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    require(layers >= 1, "layers", layers, "an integer of at least 1")
    for group in groups:
        if group not in GROUPS:
            raise unknown("feature group of published weights", group, GROUPS)
    return LAYOUTS[layout](tuple(groups), layers)


def kept(names: Iterable[str]) -> list[str]:
    """Returns the feature groups that have a leaf of this project's theta, in slot order; else all."""
    names = set(names)
    return [group for group in GROUPS if f"update_rule/w0/{group}" in names] or list(GROUPS)


def depth(names: Iterable[str]) -> int:
    """Returns the number of hidden layers: the highest number of a later layer's weights, here or there."""
    found = [re.fullmatch(r"(?:.*/)?(?:w([1-9]\d?)|linear_([1-9])/w)", name) for name in names]
    return max((int(m[1] or m[2]) for m in found if m and "rnn_params" not in m[0]), default=2)


def to_own(
    layout: str,
    published: Mapping[Path, Any] | Mapping[str, Any],
    *,
    groups: Sequence[str] = tuple(GROUPS),
    layers: int | None = None,
) -> dict[str, Any]:
    """Returns this project's theta of a published one.

    Args:
      layout: a name of :data:`LAYOUTS`.
      published: float32 arrays by key tuple, or by keys joined with ``/``.
      groups: as in :func:`leaves`.
      layers: hidden layers; by default as many as the leaves have.

    Returns:
      Nested dict of numpy arrays, each a copy.

    Raises:
      UserError: a leaf is missing, unknown, or of another shape or dtype; one line that names it.

    Example:
      >>> z = lambda *shape: np.zeros(shape, np.float32)
      >>> tree = {"ff_mod_stack/~/w0__0": z(3, 8), "ff_mod_stack/~/b0": z(8)}
      >>> tree |= {"ff_mod_stack/~/w1": z(8, 3), "ff_mod_stack/~/b1": z(3)}
      >>> to_own("celo2", tree, groups=["momentum"])["update_rule"]["w0"]["momentum"].shape
      (3, 8)
    """
    joined = {k if isinstance(k, str) else "/".join(k): np.asarray(v) for k, v in published.items()}
    known = leaves(layout, groups=groups, layers=depth(joined) if layers is None else layers)
    exact = {leaf.path for leaf in known}
    for key in published:
        if not isinstance(key, str) and key not in exact:
            raise _extra(layout, "/".join(key), known=len(exact), found=len(joined))
    sizes = check(layout, joined, {leaf.name: leaf.dims for leaf in known})
    own: dict[str, np.ndarray] = {}
    for leaf in known:
        array, row = joined[leaf.name], 0
        if len(leaf.pieces) == 1:
            own[leaf.pieces[0][0]] = array.copy()
            continue
        for name, dims in leaf.pieces:
            width = size(dims[0], sizes)
            own[name] = array[row : row + width].copy()
            row += width
    return _nest(own)


def to_published(
    layout: str,
    own: Mapping[str, Any],
    *,
    layers: int | None = None,
) -> dict[Path, np.ndarray]:
    """Returns the published theta of this project's; the exact inverse of :func:`to_own`.

    Args:
      layout: a name of :data:`LAYOUTS`.
      own: nested dict of float32 arrays; which feature groups are kept is read from it.
      layers: hidden layers; by default as many as the leaves have.

    Returns:
      Numpy arrays by key tuple, each a copy.

    Raises:
      UserError: a leaf is missing, unknown, or of another shape or dtype; one line that names it.
    """
    flat = flatten(own)
    known = leaves(layout, groups=kept(flat), layers=depth(flat) if layers is None else layers)
    check(layout, flat, {name: dims for leaf in known for name, dims in leaf.pieces})
    return {leaf.path: _joined([flat[name] for name, _ in leaf.pieces]) for leaf in known}


def _joined(pieces: list[np.ndarray]) -> np.ndarray:
    return pieces[0].copy() if len(pieces) == 1 else np.concatenate(pieces)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """Returns the leaves of a nested dict by path, keys joined by ``/``."""
    out: dict[str, np.ndarray] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        out |= flatten(value, f"{name}/") if isinstance(value, Mapping) else {name: np.asarray(value)}
    return out


def _nest(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, array in flat.items():
        *folders, last = name.split("/")
        node = out
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = array
    return out


# --- names, dtypes and shapes -----------------------------------------------------------------------------


def _terms(dim: str) -> tuple[int, dict[str, int]]:
    """Splits ``"18+2C"`` into its constant and the factor of each letter."""
    constant, factors = 0, Counter[str]()
    for term in dim.split("+"):
        if term.isdigit():
            constant += int(term)
        else:
            factors[term[-1]] += int(term[:-1] or 1)
    return constant, dict(factors)


def size(dim: str, sizes: Mapping[str, int]) -> int:
    """Returns a dimension's value; -1, which fits no array, while a letter is unknown.

    Example:
      >>> size("18+2C", {"C": 64}), size("K", {})
      (146, -1)
    """
    constant, factors = _terms(dim)
    known = all(letter in sizes for letter in factors)
    return constant + sum(k * sizes[letter] for letter, k in factors.items()) if known else -1


def _solve(found: Mapping[str, np.ndarray], wanted: Mapping[str, Dims]) -> dict[str, int]:
    """The value of each letter: what most bare letters say, so that one bad leaf is the one blamed."""
    pairs = [
        (dim, n)
        for name, dims in wanted.items()
        if len(dims) == found[name].ndim
        for dim, n in zip(dims, found[name].shape, strict=True)
    ]
    votes: dict[str, Counter[int]] = {}
    for dim, n in pairs:
        if dim.isalpha() and n:
            votes.setdefault(dim, Counter())[n] += 1
    sizes = {letter: count.most_common(1)[0][0] for letter, count in votes.items()}
    for dim, n in pairs:  # a letter that occurs only inside sums
        constant, factors = _terms(dim)
        free = [letter for letter in factors if letter not in sizes]
        if len(free) == 1:
            rest = n - constant - sum(k * sizes[x] for x, k in factors.items() if x in sizes)
            if rest > 0 and rest % factors[free[0]] == 0:
                sizes[free[0]] = rest // factors[free[0]]
    return sizes


def _extra(layout: str, name: str, *, known: int, found: int) -> UserError:
    return UserError(f"leaf {name!r} is unknown: expected {known} leaves of {layout}, found {found}")


def check(layout: str, found: Mapping[str, np.ndarray], wanted: Mapping[str, Dims]) -> dict[str, int]:
    """Compares names, dtypes and shapes.

    Args:
      layout: a name of :data:`LAYOUTS`.
      found: arrays by name.
      wanted: shapes in letters by name.

    Returns:
      The letters' values.

    Raises:
      UserError: a leaf is missing, unknown, or of another shape or dtype; one line that names it.
    """
    if missing := sorted(wanted.keys() - found.keys()):
        raise UserError(
            f"leaf {missing[0]!r} is missing: expected {len(wanted)} leaves of {layout}, found {len(found)}"
        )
    if extra := sorted(found.keys() - wanted.keys()):
        raise _extra(layout, extra[0], known=len(wanted), found=len(found))
    sizes, legal = _solve(found, wanted), INPUTS.get(layout)
    for name, dims in wanted.items():
        array = found[name]
        if array.dtype != np.float32:
            raise UserError(f"leaf {name!r}: expected float32, found {array.dtype}")
        fits = array.shape == tuple(size(dim, sizes) for dim in dims)
        if not fits or (legal and "F" in dims and sizes["F"] not in legal):
            raise UserError(f"leaf {name!r}: expected {_text(dims, sizes, legal)}, found {list(array.shape)}")
    return sizes


def _text(dims: Dims, sizes: Mapping[str, int], legal: tuple[int, ...] | None) -> str:
    def one(dim: str) -> str:
        if dim == "F" and legal:
            return " or ".join(map(str, legal))
        value = size(dim, sizes)
        return dim if value < 0 else str(value)

    return f"[{', '.join(map(one, dims))}]"
