"""``import`` and ``export``: published files to theta files and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from celo_nnx import theta_io
from celo_nnx.errors import UserError, require, unknown
from celo_nnx.files import parse_json, refuse_existing, told, write_new
from celo_nnx.meta.checkpoint import canonical
from celo_nnx.pretrained import files, hub, layouts, messagepack, pylo

# Variant -> layout of its published theta.
VARIANTS = {
    "celo2": "celo2",
    "celo2_base": "celo2",
    "celo2_published": "celo2",
    "celo": "celo",
    "celo_phase1": "celo",
    "celo_adam": "celo_adam",
    "velo": "velo",
    "velo_s": "velo",
    "rnn_mlp": "rnn_mlp",
    "adafac_mlp": "adafac_mlp",
    "nn_adam": "nn_adam",
}
FORMATS = ("celo", "pylo", "safetensors")
_SMALL = 64  # LSTM units of velo_s; velo has 512


def detect(shapes: Mapping[str, tuple[int, ...]], *, own: bool) -> str:
    """Returns the layout whose leaves are nearest to these.

    Args:
      shapes: shape by name: of this project's theta, or of published keys joined by ``/``.
      own: which of the two.

    Raises:
      UserError: no layout has any of the names.

    Example:
      >>> detect({"schedule/lr": (), "schedule/b1": ()}, own=True)
      'nn_adam'
    """
    names, best, least = set(shapes), None, 0
    for layout in layouts.LAYOUTS:
        leaves = layouts.leaves(layout, layers=layouts.depth(names))
        known = {name for leaf in leaves for name, _ in leaf.pieces} if own else {x.name for x in leaves}
        if known & names and (best is None or len(known ^ names) < least):
            best, least = layout, len(known ^ names)
    if best is None:
        first = min(names, default="")
        raise UserError(f"leaf {first!r} is of no known layout: {', '.join(layouts.LAYOUTS)}")
    # Celo's and VeLO's leaves have the same names; the number of the LSTM's inputs differs.
    inputs = shapes.get("schedule/mix/max/w" if own else "rnn_params/linear_1/w", ())[:1]
    return "velo" if best == "celo" and inputs and inputs[0] in layouts.INPUTS["velo"] else best


def _default(layout: str, own: Mapping[str, np.ndarray]) -> str:
    """The variant of a layout where none was named."""
    small = layout == "velo" and own["schedule/initial/hidden"].shape[-1] == _SMALL
    return "velo_s" if small else layout


def _layout(variant: str | None) -> str | None:
    if variant is not None and variant not in VARIANTS:
        raise unknown("variant of published weights", variant, VARIANTS)
    return VARIANTS[variant] if variant else None


def _preset(variant: str, overrides: Iterable[str]) -> dict[str, Any] | None:
    """The section ``optimizer`` of a variant's preset; None while there is no such preset."""
    from celo_nnx.config import load, presets

    if variant in presets():
        return load(variant, overrides).optimizer.to_dict()
    if overrides := list(overrides):
        raise UserError(f"{variant} has no preset here, so {overrides[0]!r} changes nothing")
    return None


def _locate(source: str) -> tuple[Path, str]:
    """Returns the file of weights and what to call it: no folder of this machine is written anywhere."""
    path, remote = Path(source), not Path(source).exists() and hub.is_id(source)
    if remote:
        path = hub.fetch(source)
    if path.is_dir():
        path = files.weights_in(path)
    return path, f"{source}/{path.name}" if remote else path.name


def read(
    path: Path, data: bytes, wanted: str | None, groups: Callable[[str], list[str]]
) -> tuple[str, Any, str]:
    """Reads any file of weights.

    Args:
      path: where the bytes came from; its suffix may tell what they are.
      data: the bytes.
      wanted: the layout that they must have, None for the one that the leaves say.
      groups: the feature groups that are kept, by layout.

    Returns:
      The layout, theta of this project, and what was assumed ("" if nothing).

    Raises:
      UserError: unreadable, damaged or foreign; one line.
    """
    note, layout = "", wanted
    if files.is_safetensors(path, data):
        arrays, metadata = files.read_safetensors(path)
        if metadata.get("format") == theta_io.FORMAT:
            raise UserError("is a theta of celo-nnx already")
        found = pylo.module_of(list(arrays))
        if found and wanted not in (None, found):
            raise UserError(f"leaf {min(arrays)!r} is PyLO's for {found}, expected leaves of {wanted}")
        if found:
            layout, arrays, note = pylo.from_pylo(arrays, metadata, groups=groups(found))
    else:
        arrays = messagepack.loads(data)
    if layout is None:
        joined = {k if isinstance(k, str) else "/".join(k): v.shape for k, v in arrays.items()}
        layout = detect(joined, own=False)
    return layout, layouts.to_own(layout, arrays, groups=groups(layout)), note


def first_theta(theta_init: Any, optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """Reads published weights where a config starts from them, so that ``build`` need not know of them.

    Args:
      theta_init: the config's section of that name.
      optimizer: the config's section of that name; its feature groups are those that are kept.

    Returns:
      The section, with the tree as ``theta`` where its ``path`` is a file of published weights.

    Raises:
      UserError: a file that is neither published weights nor a theta file; one line.
    """
    section = dict(theta_init.items())
    path = section.get("path") or ""
    require(isinstance(path, str), "theta_init.path", path, "a text")
    path = Path(path)
    if section.get("kind") != "file" or not path.is_file():
        return section
    names = optimizer["features"]["groups"]
    try:
        with told("the file"):
            data = files.read_bytes(path)
            own = files.is_safetensors(path, data) and _is_own(path)
        if not own:
            groups = [group for group in layouts.GROUPS if group in names]
            section["theta"] = read(path, data, None, lambda layout: groups)[1]
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return section


def _is_own(path: Path) -> bool:
    return files.read_safetensors(path)[1].get("format") == theta_io.FORMAT


def import_weights(
    source: str, out: str | Path, *, variant: str | None = None, overrides: Iterable[str] = ()
) -> dict[str, Any]:
    """Converts published weights to a theta file.

    Args:
      source: a ``theta.state`` or ``.safetensors`` file of published or PyLO's leaves, a folder with one
        such file, or a Hub id such as ``"amoudgl/celo2"``.
      out: the theta file to write; must not exist.
      variant: a name of :data:`VARIANTS`; by default what the leaves say.
      overrides: changes to the variant's preset, as in :func:`celo_nnx.config.load`.

    Returns:
      What was written, for a JSON line.

    Raises:
      UserError: unreadable, damaged, foreign, or not the theta of that variant; one line.
    """
    out, wanted, overrides = Path(out), _layout(variant), list(overrides)
    with told(out):
        refuse_existing(out)
    config = _preset(variant, overrides) if variant else None
    with told(source):
        path, name = _locate(source)

    def groups(layout: str) -> list[str]:
        chosen = _preset(variant or layout, overrides) if layout in ("celo2", "celo", "velo") else None
        names = chosen["features"]["groups"] if chosen else layouts.GROUPS
        return [group for group in layouts.GROUPS if group in names]

    try:
        with told("the file"):
            data = files.read_bytes(path)
        layout, theta, note = read(path, data, wanted, groups)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    flat = layouts.flatten(theta)
    variant = variant or _default(layout, flat)
    config = config or _preset(variant, overrides)
    if config is not None:
        from celo_nnx.build import build

        theta_io.agree(f"{path} as {variant}", flat, layouts.flatten(build(config).theta))
    metadata = {"variant": variant, "layout": layout, "source": name, "source_sha256": files.sha256(data)}
    if config is not None:
        metadata["config"] = canonical({"optimizer": config})
    with told(out):
        theta_io.save_theta(out, theta, metadata)
    row = {"theta": str(out), "variant": variant, "layout": layout, "leaves": len(flat)}
    row |= {"meta_parameters": sum(x.size for x in flat.values()), "source": name}
    return row | {"source_sha256": metadata["source_sha256"]} | ({"note": note} if note else {})


def export_weights(
    theta: str | Path, out: str | Path, *, format: str, variant: str | None = None
) -> dict[str, Any]:
    """Converts a theta file to a published format.

    Args:
      theta: a theta file or a run folder.
      out: the file to write; must not exist.
      format: ``"celo"`` (``theta.state``), ``"pylo"`` (PyLO's state dict as safetensors) or
        ``"safetensors"`` (published keys joined by ``/``).
      variant: a name of :data:`VARIANTS`; by default what the file's header or its leaves say.

    Returns:
      What was written, for a JSON line.

    Raises:
      UserError: no theta, or one that this format has no place for; one line that names the leaf.
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    out, wanted = Path(out), _layout(variant)
    with told(out):
        refuse_existing(out)
    with told(theta):
        own, header = theta_io.load_theta(theta), theta_io.read_metadata(theta)
    flat = layouts.flatten(own)
    variant = variant or header.get("variant")
    try:
        layout = (
            wanted or VARIANTS.get(variant or "") or detect({k: v.shape for k, v in flat.items()}, own=True)
        )
        published = layouts.to_published(layout, own)
        if format == "celo":
            data = messagepack.dumps(published)
        elif format == "pylo":
            data = _pylo(layout, published, layouts.kept(flat), header)
        else:
            about = {key: header[key] for key in ("variant", "source", "config") if key in header}
            about |= {"layout": layout, "theta_digest": header.get("digest", "")}
            data = files.safetensors_bytes({"/".join(k): v for k, v in published.items()}, about)
    except UserError as error:
        raise UserError(f"{theta}: {error}") from None
    with told(out):
        write_new(out, data)
    row = {"file": str(out), "format": format, "layout": layout, "leaves": len(published)}
    return row | {"bytes": len(data), "sha256": files.sha256(data)}


def _pylo(layout: str, published: Any, groups: list[str], header: Mapping[str, str]) -> bytes:
    try:
        config = parse_json(header.get("config", "{}"), "header 'config'")
        activation = config.get("optimizer", {}).get("update_rule", {}).get("activation", "relu")
    except AttributeError:
        raise UserError("header 'config': expected a JSON object with a section 'optimizer'") from None
    arrays, metadata = pylo.to_pylo(layout, published, groups=groups, activation=str(activation))
    return files.safetensors_bytes(arrays, metadata)
