"""PyLO's modules from published leaves and back (OPTIMIZERS section 13).

PyTorch's dense layers keep ``[out, in]`` where published leaves are ``[in, out]``; CELO2MLP keeps
``[in, out]``. A module is a list of rows: PyLO's name, the published leaves that are joined along their
input axis, and whether the last two axes are exchanged.

Assumed, since PyLO itself was not at hand: a file holds both VeLO modules under ``VeLOMLP.`` and
``VeLORNN.``; VeLOMLP's scratch copies (its names without the trailing underscore) are not written, and
ignored where they occur; a MetaMLP file without decay offsets means the defaults of AdafacLO.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from celo_nnx.errors import UserError
from celo_nnx.pretrained import layouts
from celo_nnx.pretrained.layouts import GROUPS, Dims

# layout -> (PyLO's module, what is counted to find its depth, hidden layers besides those)
MODULES = {
    "adafac_mlp": ("MetaMLP", r"network\.linear_\d+\.weight", 1),
    "celo2": ("CELO2MLP", r"dense_w\.\d+", 0),
    "velo": ("VeLO", r"VeLOMLP\.hidden_weights_\.\d+", 1),
}
# Constructor arguments of AdafacLO, in the order momentum, rms, adafactor.
ADAFAC_OFFSETS = {
    "momentum": (0.15216392, 0.14245212, 0.06812963),
    "rms": (0.01079706,),
    "adafactor": (0.18621896, -0.10864615, -0.06185547),
}
_OFFSETS = "decay_offsets"
_SCRATCH = re.compile(r"VeLOMLP\.(input|output)_(weights|bias)|VeLOMLP\.hidden_(weights|bias)\.\d+")
_VELO_BANKS = {"M": "3", "R": "1", "A": "3"}  # PyLO has them hard coded


@dataclasses.dataclass(frozen=True)
class _Row:
    name: str
    leaves: tuple[str, ...]
    transposed: bool = False


def _rows(layout: str, groups: Sequence[str], layers: int) -> list[_Row]:
    if layout == "velo" and len(groups) != len(GROUPS):
        raise UserError(f"PyLO's VeLO has all {len(GROUPS)} feature groups, found {len(groups)}")
    inner, top = range(1, layers), "ff_mod_stack/~/"
    if layout == "adafac_mlp":
        rows = []
        for i, name in enumerate(("input", *(f"linear_{i - 1}" for i in inner), "output")):
            rows.append(_Row(f"network.{name}.weight", (f"nn/~/w{i}",), True))
            rows.append(_Row(f"network.{name}.bias", (f"nn/~/b{i}",)))
        return rows + [_Row(f"{_OFFSETS}.{bank}", (f"{bank}_decays",)) for bank in ADAFAC_OFFSETS]
    first = tuple(f"{top}w0__{j}" for j in range(len(groups)))
    if layout == "celo2":
        rows = [_Row(f"w0.{j}", (leaf,)) for j, leaf in enumerate(first)] + [_Row("b0", (f"{top}b0",))]
        dense = [(f"dense_{kind}.{i - 1}", f"{top}{kind}{i}") for kind in "wb" for i in range(1, layers + 1)]
        return rows + [_Row(name, (leaf,)) for name, leaf in dense]
    rows = [_Row("input_weights_", first, True), _Row("input_bias_", (f"{top}b0",))]
    for i in inner:
        rows.append(_Row(f"hidden_weights_.{i - 1}", (f"{top}w{i}",), True))
        rows.append(_Row(f"hidden_bias_.{i - 1}", (f"{top}b{i}",)))
    rows.append(_Row("output_weights_", (f"{top}w{layers}",), True))
    rows.append(_Row("output_bias_", (f"{top}b{layers}",)))
    rows = [dataclasses.replace(row, name=f"VeLOMLP.{row.name}") for row in rows]
    names = {"mix_layer1": "linear", "mix_layer2": "linear_1", "final_mix_layer": "linear_2"}
    names |= {"lstm.linear": "rnn/linear", "rnn_to_controls": "rnn_to_controls", "step_size": "step_size"}
    for name, key in names.items():
        rows.append(_Row(f"VeLORNN.{name}.weight", (f"rnn_params/{key}/w",), True))
        rows.append(_Row(f"VeLORNN.{name}.bias", (f"rnn_params/{key}/b",)))
    start = [
        (f"VeLORNN.lstm_init_state.{i}", f"lstm_init_state/{n}") for i, n in enumerate(("hidden", "cell"))
    ]
    return rows + [_Row(name, (leaf,)) for name, leaf in start]


def _dims(layout: str, row: _Row, known: Mapping[str, Dims]) -> Dims:
    """A row's shape in letters."""
    pieces = [known[leaf] for leaf in row.leaves]
    dims = list(pieces[0])
    if len(pieces) > 1:
        dims[-2] = "+".join(piece[-2] for piece in pieces)
    if row.transposed:
        dims[-2:] = dims[:-3:-1]
    if layout == "velo":  # 30 features, so all groups with these banks
        dims = ["+".join(_VELO_BANKS.get(term, term) for term in dim.split("+")) for dim in dims]
    return tuple(dims)


def module_of(names: Sequence[str]) -> str | None:
    """Returns the layout of PyLO's names, None where they are not PyLO's.

    Example:
      >>> module_of(["network.input.weight"]), module_of(["nn/~/w0"])
      ('adafac_mlp', None)
    """
    marks = {"adafac_mlp": "network.", "celo2": ("w0.", "dense_w."), "velo": ("VeLOMLP.", "VeLORNN.")}
    return next((k for k, mark in marks.items() if any(name.startswith(mark) for name in names)), None)


def to_pylo(
    layout: str,
    published: Mapping[layouts.Path, np.ndarray],
    *,
    groups: Sequence[str] = tuple(GROUPS),
    activation: str = "relu",
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns PyLO's state dict and the header strings beside it.

    Args:
      layout: a name of :data:`MODULES`.
      published: a whole published tree.
      groups: feature groups that are kept, in slot order (CELO2MLP; VeLO has all).
      activation: of the MLP; a constructor argument of CELO2MLP.

    Returns:
      Arrays by PyLO's names; ``module``, ``config`` (constructor arguments as JSON) and, for MetaMLP, whose
      state dict has no place for them, the seven ``decay_offsets`` (momentum, rms, adafactor) as JSON.

    Raises:
      UserError: PyLO has no such module, or not of these sizes.
    """
    if layout not in MODULES:
        raise UserError(f"PyLO has no module for {layout}; it has {', '.join(sorted(MODULES))}")
    joined = {"/".join(path): array for path, array in published.items()}
    layers = layouts.depth(joined)
    known = {leaf.name: leaf.dims for leaf in layouts.leaves(layout, groups=groups, layers=layers)}
    arrays, wanted = {}, {}
    for row in _rows(layout, groups, layers):
        pieces = [joined[leaf] for leaf in row.leaves]
        array = np.concatenate(pieces, axis=-2) if len(pieces) > 1 else pieces[0]
        arrays[row.name] = np.swapaxes(array, -1, -2).copy() if row.transposed else array.copy()
        wanted[row.name] = _dims(layout, row, known)
    sizes = layouts.check(layout, arrays, wanted)
    metadata = {"format": "pt", "module": MODULES[layout][0]}
    if layout == "adafac_mlp":
        offsets = {bank: arrays.pop(f"{_OFFSETS}.{bank}").tolist() for bank in ADAFAC_OFFSETS}
        metadata[_OFFSETS] = json.dumps(offsets)
        inputs = arrays["network.input.weight"].shape[1]
        config = {"input_size": inputs, "hidden_size": sizes["H"], "hidden_layers": layers - 1}
        metadata["config"] = json.dumps(config)
    if layout == "celo2":
        config = {"feature_dims": [len(arrays[f"w0.{j}"]) for j in range(len(groups))]}
        config |= {"hidden_size": sizes["H"], "hidden_layers": layers, "output_size": 3}
        metadata["config"] = json.dumps(config | {"activation": activation})
    return arrays, metadata


def from_pylo(
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    *,
    groups: Sequence[str] = tuple(GROUPS),
) -> tuple[str, dict[str, np.ndarray], str]:
    """Returns the published tree of PyLO's state dict; the exact inverse of :func:`to_pylo`.

    Args:
      arrays: by PyLO's names; decides the module.
      metadata: header strings; ``decay_offsets`` where MetaMLP has them.
      groups: feature groups that are kept, in slot order (CELO2MLP, VeLO).

    Returns:
      The layout, arrays by published keys joined with ``/``, and what was assumed ("" if nothing).

    Raises:
      UserError: a leaf is missing, unknown, or of another shape or dtype; one line that names it.
    """
    layout, note = module_of(list(arrays)), ""
    if layout is None:
        raise UserError("its leaves are not those of a PyLO module")
    found = {name: array for name, array in arrays.items() if not _SCRATCH.fullmatch(name)}
    if layout == "adafac_mlp":
        if _OFFSETS not in metadata:
            note = "the file has no decay offsets: took the defaults of PyLO's AdafacLO"
        for bank, values in _offsets(metadata.get(_OFFSETS)).items():
            found[f"{_OFFSETS}.{bank}"] = np.array(values, np.float32)
    _, pattern, more = MODULES[layout]
    layers = max(1, more + sum(re.fullmatch(pattern, name) is not None for name in found))
    known = {leaf.name: leaf.dims for leaf in layouts.leaves(layout, groups=groups, layers=layers)}
    rows = _rows(layout, groups, layers)
    sizes = layouts.check(layout, found, {row.name: _dims(layout, row, known) for row in rows})
    published: dict[str, np.ndarray] = {}
    for row in rows:
        array = np.swapaxes(found[row.name], -1, -2) if row.transposed else found[row.name]
        if len(row.leaves) == 1:
            published[row.leaves[0]] = array.copy()
            continue
        banks = {letter: int(n) for letter, n in _VELO_BANKS.items()}
        widths = [layouts.size(known[leaf][-2], sizes | banks) for leaf in row.leaves]
        for leaf, piece in zip(row.leaves, np.split(array, np.cumsum(widths)[:-1], axis=-2), strict=True):
            published[leaf] = piece.copy()
    return layout, published, note


def _offsets(text: str | None) -> dict[str, Any]:
    """Parses and checks the header's decay offsets."""
    if text is None:
        return dict(ADAFAC_OFFSETS)
    try:
        offsets = json.loads(text)
    except (ValueError, RecursionError):
        offsets = None
    legal = isinstance(offsets, dict) and offsets.keys() == ADAFAC_OFFSETS.keys()
    for values in offsets.values() if legal else ():
        legal = legal and isinstance(values, list) and 0 < len(values) <= 16
        legal = legal and all(type(x) in (int, float) and abs(x) < 1e30 for x in values)
    if not legal:
        wanted = f"a JSON object of lists of numbers {', '.join(ADAFAC_OFFSETS)}"
        raise UserError(f"header {_OFFSETS!r}: expected {wanted}, found {text!r:.100}")
    return offsets
