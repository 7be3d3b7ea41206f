"""From config to parts: looks names up in the tables of :mod:`celo_nnx.components` and in entry points."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
from ml_collections import ConfigDict

from celo_nnx.components.accumulators import ACCUMULATORS
from celo_nnx.components.clipping import CLIPS
from celo_nnx.components.features import FEATURES
from celo_nnx.components.normalization import NORMALIZATIONS
from celo_nnx.components.orthogonalization import ORTHOGONALIZATIONS
from celo_nnx.components.rate_scales import RATE_SCALES
from celo_nnx.components.routing import ROUTINGS
from celo_nnx.components.schedules import SCHEDULES
from celo_nnx.components.tensor_features import TENSOR_FEATURES
from celo_nnx.components.trackers import TRACKERS
from celo_nnx.components.update_rules import ROUTE_RULES, STEPS, UPDATE_RULES
from celo_nnx.errors import UserError, is_number, require, require_section, unknown
from celo_nnx.interfaces import OUTPUT
from celo_nnx.optimizer import LearnedOptimizer
from celo_nnx.precision import Storage
from celo_nnx.settings import Settings
from celo_nnx.tensors import Tensors

ENTRY_POINTS = "celo_nnx.components"  # an entry point is named KIND.NAME, "features.sign_gradient" say

TABLES: dict[str, Mapping[str, type]] = {
    "accumulators": ACCUMULATORS,
    "features": FEATURES,
    "normalization": NORMALIZATIONS,
    "update_rules": UPDATE_RULES,
    "steps": STEPS,
    "orthogonalization": ORTHOGONALIZATIONS,
    "clipping": CLIPS,
    "trackers": TRACKERS,
    "tensor_features": TENSOR_FEATURES,
    "schedules": SCHEDULES,
    "rate_scales": RATE_SCALES,
    "routing": ROUTINGS,
    "route_rules": ROUTE_RULES,
}

# section of config.optimizer -> table; accumulators and routes hold one section for each name
SLOTS = {
    "clip": "clipping",
    "normalization": "normalization",
    "update_rule": "update_rules",
    "step": "steps",
    "orthogonalization": "orthogonalization",
    "output_normalization": "normalization",
    "tracker": "trackers",
    "schedule": "schedules",
    "rate_scale": "rate_scales",
    "routing": "routing",
}
PLAIN = {"tensors": Tensors, "state": Storage}
GROUPS = {
    "accumulators": "accumulators",
    "context": "tensor_features",
    "rows": "tensor_features",
    "routes": "route_rules",
}
SCALARS = ("weight_decay", "tile", "kernel")
# What a config may leave out: most optimizers have none of it.
OPTIONAL: dict[str, Any] = {
    "clip": {"kind": "elementwise"},
    "context": {},
    "rows": {},
    "tracker": {"kind": "none"},
    "rate_scale": {"kind": "one"},
    "tile": 0,
    "kernel": "xla",
}


def find(kind: str, name: str) -> type:
    """Returns the part called ``name`` of a kind: from its table, else from an installed entry point.

    Raises:
      UserError: no such part; the message lists the known ones and the nearest.
    """
    if name in TABLES[kind]:
        return TABLES[kind][name]
    found = {p.name: p for p in metadata.entry_points(group=ENTRY_POINTS)}
    if f"{kind}.{name}" in found:
        return found[f"{kind}.{name}"].load()
    others = [n.removeprefix(f"{kind}.") for n in found if n.startswith(f"{kind}.")]
    raise unknown(f"part of kind {kind!r},", name, [*TABLES[kind], *others])


def parameters(part: type) -> dict[str, Any]:
    """Returns a part's config keys with their defaults: the keyword arguments of its constructor."""
    signature = inspect.signature(part.__init__).parameters.values()
    # Without a default: what build passes to update rules and schedules.
    return {p.name: p.default for p in signature if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}


def list_parts() -> dict[str, dict[str, str]]:
    """Returns ``{kind: {name: first line of its docstring}}``, installed entry points included."""
    out = {kind: {n: _summary(part) for n, part in table.items()} for kind, table in TABLES.items()}
    for point in metadata.entry_points(group=ENTRY_POINTS):
        kind, _, name = point.name.partition(".")
        if kind in out:
            out[kind][name] = f"(from {point.value})"
    return out


def _summary(part: type) -> str:
    return (inspect.getdoc(part) or "").split("\n")[0]


def _section(kind: str, section: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns a part's section with every default filled in; refuses unknown keys."""
    require_section(where, section)
    if "kind" not in section:
        raise UserError(f"{where} has no key 'kind'; known kinds: {', '.join(sorted(TABLES[kind]))}")
    require(isinstance(section["kind"], str), f"{where}.kind", section["kind"], "a text")
    known = parameters(find(kind, section["kind"]))
    for key in section:
        if key != "kind" and key not in known:
            raise unknown(f"key of {where} ({section['kind']}),", key, known)
    return {"kind": section["kind"], **known, **{k: v for k, v in section.items() if k != "kind"}}


def resolve(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``config.optimizer`` with every default of every part spelt out.

    Raises:
      UserError: a missing or unknown section, an unknown part or key.
    """
    known = (*GROUPS, "features", *SLOTS, *PLAIN, *SCALARS)
    for key in optimizer:
        if key not in known:
            raise unknown("key of optimizer,", key, known)
    for key in known:
        if key not in optimizer and key not in PLAIN and key not in OPTIONAL:
            raise UserError(f"optimizer has no section {key!r}")
    optimizer = OPTIONAL | dict(optimizer)
    out: dict[str, Any] = {key: optimizer[key] for key in SCALARS}
    for key in (*GROUPS, "features", *(name for name in PLAIN if name in optimizer)):
        require_section(f"optimizer.{key}", optimizer[key])
    for group, kind in GROUPS.items():
        sections = optimizer[group].items()
        out[group] = {str(n): _section(kind, s, f"optimizer.{group}.{n}") for n, s in sections}
    for slot, kind in SLOTS.items():
        out[slot] = _section(kind, optimizer[slot], f"optimizer.{slot}")
    out["features"] = _features(optimizer["features"])
    for name, made in PLAIN.items():
        section = dict(optimizer.get(name, {}))
        defaults = {f.name: f.default for f in dataclasses.fields(made) if f.name != "given"}
        for key in section:
            if key not in defaults:
                raise unknown(f"key of optimizer.{name},", key, defaults)
        out[name] = defaults | section
    for key in ("matrix", "factored"):
        out["tensors"][key] = _axes_table(key, out["tensors"][key])
    return out


def _features(features: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the section of the features with every option filled in."""
    for key in features:
        if key not in ("groups", "options"):
            raise unknown("key of optimizer.features,", key, ("groups", "options"))
    groups, options = features.get("groups", ()), features.get("options", {})
    good = isinstance(groups, (tuple, list)) and all(isinstance(name, str) for name in groups)
    good = good and 0 < len(groups) == len(set(groups))
    require(good, "optimizer.features.groups", groups, "distinct names")
    require_section("optimizer.features.options", options)
    options, filled = dict(options), {}
    for name in groups:
        where, given = f"optimizer.features.options.{name}", options.pop(name, {})
        require_section(where, given)
        section = _section("features", {"kind": name, **dict(given)}, where)
        filled[name] = {k: v for k, v in section.items() if k != "kind"}
    for name in options:
        find("features", name)  # options of a group that is left out are kept: an ablation may drop a group
    return {"groups": tuple(groups), "options": {n: v for n, v in filled.items() if v}}


def _axes_table(key: str, table: Any) -> tuple[tuple[Any, ...], ...]:
    """Checks rows (path or pattern, axis, axis) of ``optimizer.tensors``; rows and columns may be several."""

    def axes(value: Any) -> Any:
        if key == "matrix" and isinstance(value, (tuple, list)):
            return tuple(value) if value and all(type(a) is int for a in value) else None
        return value if type(value) is int else None

    rows = []
    legal = "a tuple of rows (path, axis, axis)"
    require(isinstance(table, (tuple, list)), f"optimizer.tensors.{key}", table, legal)
    for row in table:
        row = tuple(row) if isinstance(row, (tuple, list)) else (row,)
        made = (*row[:1], *(axes(a) for a in row[1:]))
        good = len(row) == 3 and isinstance(row[0], str) and None not in made
        require(good, f"optimizer.tensors.{key}", row, "rows of (path, axis, axis)")
        try:
            re.compile(row[0] if key == "matrix" else "")
        except re.error as error:
            raise UserError(
                f"optimizer.tensors.{key}: {row[0]!r} is not a regular expression: {error}"
            ) from None
        rows.append(made)
    return tuple(rows)


def _part(kind: str, section: Mapping[str, Any], where: str, **context: Any) -> Any:
    """Builds one part; an error in a value is told with the section's place."""
    part = find(kind, section["kind"])
    arguments = {k: v for k, v in section.items() if k != "kind"}
    try:
        return part(**arguments, **context)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None


def build(
    optimizer: ConfigDict | Mapping[str, Any],
    key: jax.Array | None = None,
    theta_init: Mapping[str, Any] | None = None,
) -> LearnedOptimizer:
    """Builds a learned optimizer from ``config.optimizer``.

    Args:
      optimizer: the config's section.
      key: typed PRNG key for a random theta and for noise; ``jax.random.key(0)`` by default.
      theta_init: the config's section of that name; random as published by default. See :func:`start`.

    Returns:
      The composed optimizer with its theta.

    Raises:
      UserError: an unknown part or key, or a value out of range, named with its place.

    Example:
      >>> from celo_nnx.config import load
      >>> opt = build(load("celo2").optimizer)
      >>> sum(x.size for x in jax.tree.leaves(opt.theta))
      347
    """
    raw = optimizer.to_dict() if isinstance(optimizer, ConfigDict) else dict(optimizer)
    config = resolve(raw)
    key = jax.random.key(0) if key is None else key
    parts: dict[str, Any] = {
        group: {n: _part(kind, s, f"optimizer.{group}.{n}") for n, s in sorted(config[group].items())}
        for group, kind in GROUPS.items()
    }
    parts["features"] = {
        n: _part(
            "features",
            {"kind": n, **config["features"]["options"].get(n, {})},
            f"optimizer.features.options.{n}",
        )
        for n in config["features"]["groups"]
    }
    keys = jax.random.split(jax.random.fold_in(key, 2))
    simple = [slot for slot in SLOTS if slot not in ("update_rule", "schedule")]
    parts |= {slot: _part(SLOTS[slot], config[slot], f"optimizer.{slot}") for slot in simple}
    if parts["normalization"].decay is not None:
        kind = config["normalization"]["kind"]
        raise UserError(
            f"optimizer.normalization.kind={kind!r} keeps an average over updates: for the step alone"
        )
    if OUTPUT in parts["accumulators"]:
        raise UserError(f"optimizer.accumulators: {OUTPUT!r} is the name of another state; take another")
    sizes = {n: getattr(a, "size", 1) for n, a in parts["accumulators"].items()}
    try:
        widths = {n: f.width(sizes) for n, f in parts["features"].items()}
    except KeyError as error:
        raise UserError(f"optimizer.accumulators lacks {error}, which a feature group needs") from None
    sizes["loss"] = parts["tracker"].width
    schedule = find("schedules", config["schedule"]["kind"])
    parts["schedule"] = _schedule(schedule, config["schedule"], parts["rows"], sizes, keys[0])
    sizes |= parts["schedule"].sizes()
    given = dict(widths=widths, context=_widths("context", parts["context"], sizes))
    parts["update_rule"] = _part(
        "update_rules",
        config["update_rule"],
        "optimizer.update_rule",
        key=jax.random.fold_in(key, 0),
        **given,
    )
    settings = {name: made(**config[name]) for name, made in PLAIN.items()}
    made = LearnedOptimizer(parts, Settings(**settings, **{name: config[name] for name in SCALARS}))
    made.config = json.dumps(config, default=str)
    return start(made, theta_init or {"kind": "random"}, jax.random.fold_in(key, 1))


def _widths(group: str, features: Mapping[str, Any], sizes: dict[str, int]) -> dict[str, int]:
    """Returns the width of every tensor feature of a section."""
    out = {}
    for name, feature in features.items():
        try:
            out[name] = feature.width(sizes)
        except KeyError as error:
            raise UserError(f"optimizer.{group}.{name}: there is no {error} to look at") from None
        except UserError as error:
            raise UserError(f"optimizer.{group}.{name}: {error}") from None
    return out


def _schedule(
    part: type, section: Mapping[str, Any], rows: Mapping[str, Any], sizes: dict[str, int], key: jax.Array
) -> Any:
    """Builds the schedule; a learned one is told the width of its rows."""
    if "width" not in inspect.signature(part.__init__).parameters:
        if rows:
            raise UserError(f"optimizer.rows: the schedule {section['kind']!r} reads no rows")
        return _part("schedules", section, "optimizer.schedule")
    # Rows may show the schedule's own state, whose sizes do not depend on the rows.
    own = _part("schedules", section, "optimizer.schedule", width=1, key=key).sizes()
    width = sum(_widths("rows", rows, sizes | own).values())
    return _part("schedules", section, "optimizer.schedule", width=width, key=key)


def start(optimizer: LearnedOptimizer, theta_init: Mapping[str, Any], key: jax.Array) -> LearnedOptimizer:
    """Gives an optimizer the theta that meta-training starts from.

    Args:
      optimizer: with the random theta that :func:`build` drew.
      theta_init: ``kind``: ``"random"`` keeps it; ``"hand_made"`` takes the update rule's hand-made theta
        (of ``mix``, where that is not empty); ``"file"`` reads ``path``, a theta file, run folder or name (or
        takes ``theta``, a tree that was read before), all of it or, by patterns of paths, ``only`` some
        leaves.
        ``noise``: the standard deviation of Gaussian noise added to every meta-parameter.
      key: draws the noise.

    Raises:
      UserError: an unknown kind, a noise below 0, or a file that does not fit.
    """
    kind, noise = theta_init.get("kind", "random"), theta_init.get("noise", 0.0)
    require(is_number(noise) and noise >= 0, "theta_init.noise", noise, "a number of at least 0")
    only = theta_init.get("only", ())
    good = isinstance(only, (tuple, list)) and all(isinstance(pattern, str) for pattern in only)
    require(good, "theta_init.only", only, "a tuple of patterns")
    require(kind == "file" or not only, "theta_init.only", only, "() unless theta_init.kind is 'file'")
    if kind == "hand_made":
        options = {"mix": theta_init["mix"]} if theta_init.get("mix") else {}
        made = {
            "update_rule": optimizer.update_rule.hand_made(**options),
            "schedule": optimizer.schedule.hand_made(),
        }
        optimizer = optimizer.with_theta(optimizer.theta | {name: x for name, x in made.items() if x})
    elif kind == "file":
        require(
            bool(theta_init.get("path")) and isinstance(theta_init["path"], str),
            "theta_init.path",
            theta_init.get("path", ""),
            "a file, a run folder or a name",
        )
        from celo_nnx.theta_io import load_theta, take

        path, theta = theta_init["path"], theta_init.get("theta")
        theta = load_theta(path) if theta is None else theta
        optimizer = optimizer.with_theta(take(path, theta, optimizer.theta, only))
    elif kind != "random":
        raise unknown("theta_init.kind", kind, ("random", "hand_made", "file"))
    if noise == 0:
        return optimizer
    leaves, tree = jax.tree.flatten(optimizer.theta)
    keys = jax.random.split(key, len(leaves))
    noisy = [x + noise * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return optimizer.with_theta(jax.tree.unflatten(tree, noisy))


__all__ = ["build", "find", "list_parts", "parameters", "resolve", "start"]
