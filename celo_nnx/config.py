"""Configs: the sections that presets share, loading a preset or a file, and overrides from the command line.

A config is an ``ml_collections.ConfigDict`` with the sections ``seed``, ``optimizer``, ``theta_init``,
``tasks``, ``meta`` and ``run``. Everything outside ``run`` defines the result. A config file that the
user names is a Python program with ``get_config(argument)``; nothing else is executed.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from celo_nnx.errors import UserError, is_number, require, require_section, told, unknown

# Decay of the average of theta, patterns of the leaves that rest, and phases: without them as published.
META_OPTIONS: dict[str, Any] = dict(average=0.0, frozen=(), phases=())
THETA_INIT: dict[str, Any] = dict(kind="random", mix=(), noise=0.0, path="", only=())


def meta_section() -> dict[str, Any]:
    """The published meta-training (META_TRAINING section 0), unbiased where the published one is not."""
    return dict(
        estimator=dict(
            kind="pes",
            pairs=8,
            weights=(),
            std=0.01,
            leaf_std=(),
            sign_delta=0.0,
            truncation=50,
            initial_offset="uniform",
            finished_step="exact",
        ),
        objective=dict(split="train", steps="all", scale="task", clip=0.0),
        unroll=dict(kind="log_uniform", minimum=100, maximum=2000),
        augmentation=dict(kind="reparametrization", level="global", low=1e-3, high=1e3),
        optimizer=dict(
            kind="adamw",
            learning_rate=1e-4,
            b1=0.9,
            b2=0.999,
            eps=1e-8,
            weight_decay=1e-4,
            clip_norm=0.0,
            warmup=0,
        ),
        **META_OPTIONS,
    )


def run_section() -> dict[str, Any]:
    """What does not define the result: budget, checkpoints, logging, devices. Seconds and counts."""
    return dict(
        iterations=100_000,
        iterations_per_dispatch=10,
        checkpoint_seconds=60.0,
        keep=2,
        snapshots=0,
        stop_after_non_finite=0,
        data_dir="",
        devices=0,
        progress=True,
        tensorboard=False,
        wandb=False,
    )


def experiment(optimizer: Mapping[str, Any], tasks: str | Mapping[str, Any]) -> ConfigDict:
    """Returns a whole config around an optimizer variant.

    Args:
      optimizer: the section of that name: parts.
      tasks: name of a task preset in ``celo_nnx.experiments``, or a section ``tasks`` of one's own.
    """
    return ConfigDict(
        dict(
            seed=0,
            optimizer=optimizer,
            theta_init=THETA_INIT,
            tasks=_preset(tasks, "").to_dict() if isinstance(tasks, str) else dict(tasks),
            meta=meta_section(),
            run=run_section(),
        )
    )


def presets() -> dict[str, tuple[str, bool]]:
    """Returns ``{name: (first line of its docstring, whether it is a whole config)}`` of the experiments."""
    from celo_nnx import experiments

    found = {}
    for info in pkgutil.iter_modules(experiments.__path__):
        module = importlib.import_module(f"celo_nnx.experiments.{info.name}")
        if hasattr(module, "get_config"):
            whole = bool(inspect.signature(module.get_config).parameters)
            found[info.name] = ((module.__doc__ or "").split("\n")[0], whole)
    return found


def _preset(name: str, argument: str) -> ConfigDict:
    """Runs ``get_config`` of a preset by name."""
    if "=" in name:
        raise UserError(f"no config before {name!r}: name one first, as celo2:fast_digits or a .py file")
    known = presets()
    if name not in known:
        raise unknown("config", name, known)
    module = importlib.import_module(f"celo_nnx.experiments.{name}")
    return run_get_config(module, argument, name)


def run_get_config(module: Any, argument: str, source: str) -> ConfigDict:
    """Returns what ``get_config`` of a module gives.

    Args:
      module: holds the function.
      argument: its argument; empty for none.
      source: what messages call the module.

    Raises:
      UserError: there is no such function, or it fails or returns something else than a ConfigDict.
    """
    if not hasattr(module, "get_config"):
        raise UserError(f"config {source} has no function get_config")
    with told(f"get_config of {source}"):
        takes = bool(inspect.signature(module.get_config).parameters)
        if argument and not takes:
            raise UserError(f"config {source} takes no argument, got {argument!r}")
        config = module.get_config(argument) if argument else module.get_config()
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config of {source} returned {type(config).__name__}, expected a ConfigDict")
    return config


def _from_source(source: str) -> ConfigDict:
    """Returns the config of ``NAME[:ARGUMENT]`` or ``FILE.py[:ARGUMENT]``."""
    name, _, argument = source.partition(":")
    if not name.endswith(".py"):
        return _preset(name, argument)
    return run_file(name, argument)


def run_file(name: str, argument: str = "") -> ConfigDict:
    """Runs a config file of the user's, a program, and returns what its ``get_config`` gives.

    Raises:
      UserError: there is no such file, or it fails; see :func:`run_get_config`.
    """
    return run_get_config(run_module(name), argument, name)


def run_module(name: str) -> Any:
    """Runs a Python file that the user names, and returns it as a module.

    Raises:
      UserError: there is no such file, or it fails.
    """
    path = Path(name)
    if not path.is_file():
        raise UserError(f"no config file {name}")
    spec = importlib.util.spec_from_file_location(f"celo_nnx_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with told(f"config file {name}"):
        spec.loader.exec_module(module)
    return module


def _value(text: str, old: Any, key: str) -> Any:
    """Parses an override as the type of the value it replaces."""
    if isinstance(old, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    require(_finite(value), key, text, "finite in float32")  # Python reads 1e999 as infinity
    if isinstance(old, bool):
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
    elif isinstance(old, (tuple, list)):  # a config that was stored as JSON has lists
        if isinstance(value, str):
            value = tuple(part.strip() for part in value.split(",") if part.strip())
        return value if isinstance(value, tuple) else tuple(value) if isinstance(value, list) else (value,)
    elif old is None or (isinstance(value, type(old)) and not isinstance(value, bool)):
        return value
    elif isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    raise UserError(f"{key} = {text!r}: expected {type(old).__name__}, as in {key}={old!r}")


def _finite(value: Any) -> bool:
    """Whether every number of a value is."""
    if isinstance(value, (tuple, list)):
        return all(map(_finite, value))
    return is_number(value) or not isinstance(value, (int, float)) or isinstance(value, bool)


def locate(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
    """Returns the section that holds a dotted key, and the key's last part.

    Raises:
      UserError: there is no such key; the nearest one is named.
    """
    section, parts = config, key.split(".")
    for i, part in enumerate(parts):
        where = ".".join(parts[:i])
        if isinstance(section, (tuple, list)):
            raise UserError(f"{where} is a list; its entries are set in a config file")
        if not isinstance(section, ConfigDict) or part not in section:
            names = list(section.keys()) if isinstance(section, ConfigDict) else []
            raise unknown(f"config key{f' of {where},' if where else ''}", part, names)
        if i < len(parts) - 1:
            section = section[part]
    return section, parts[-1]


def _defaults(path: str, kind: str) -> dict[str, Any]:
    """Returns the settings of a part that a ``kind`` override puts into a section outside ``optimizer``."""
    from celo_nnx.meta import assemble, meta_optimizers
    from celo_nnx.meta.estimators.base import Estimator

    if path.startswith("meta.optimizer"):
        return meta_optimizers.defaults(path, kind)
    tables = {
        "estimator": assemble.ESTIMATORS,
        "first": assemble.ESTIMATORS,
        "second": assemble.ESTIMATORS,
        "truncation": assemble.TRUNCATIONS,
        "unroll": assemble.TRUNCATIONS,
        "augmentation": assemble.AUGMENTATIONS,
    }
    table = tables.get(path.rpartition(".")[2], {})
    if kind not in table:
        raise unknown(f"{path}.kind", kind, table)
    if kind == "mixture":
        sections = {name: {"kind": of} | _defaults(path, of) for name, of in MIXED.items()}
        return sections | dict(mode="average", weight=0.5)
    simple = (bool, int, float, str, tuple)
    found = inspect.signature(table[kind]).parameters.values()
    defaults = {p.name: p.default for p in found if isinstance(p.default, simple)}
    return {name: value for name, value in defaults.items() if name not in Estimator.GIVEN}


# What a mixture mixes until its sections say otherwise.
MIXED = {"first": "pes", "second": "truncated_es"}
# Sections of meta that have kinds.
_META_PARTS = ("estimator", "first", "second", "truncation", "unroll", "augmentation")


def _is_part(key: str) -> bool:
    """Whether a key swaps a part; below meta.optimizer any number may become a schedule's section."""
    path, _, last = key.rpartition(".")
    free = key.startswith(("optimizer.", "meta.optimizer."))
    return last == "kind" and (free or path.startswith("meta.") and path.rpartition(".")[2] in _META_PARTS)


def resolve(config: ConfigDict) -> ConfigDict:
    """Returns a config with every default of the optimizer's parts and of the tasks spelt out, and locked.

    Raises:
      UserError: a missing section, an unknown part or key.
    """
    from celo_nnx import build
    from celo_nnx.tasks import complete

    config = ConfigDict(config.to_dict())
    sections = ("seed", "optimizer", "theta_init", "tasks", "meta", "run")
    for section in sections:
        if section not in config:
            raise UserError(f"the config has no section {section!r}")
    for section in sections[1:]:
        require_section(section, config[section])
    seed = config.seed
    require(type(seed) is int and 0 <= seed < 2**32, "seed", seed, "an integer from 0 to 2**32 - 1")
    for where, known in (
        ("config", sections),
        ("theta_init", THETA_INIT),
        ("run", run_section()),
    ):
        for key in map(str, config if where == "config" else config[where]):
            if key not in known:
                raise unknown(f"key of {where},", key, known)
    config.meta = ConfigDict(META_OPTIONS | config.meta.to_dict())
    rule = config.meta.get("optimizer")
    rate = rule.get("learning_rate") if isinstance(rule, ConfigDict) else None
    good = not isinstance(rate, (int, float)) or is_number(rate) and rate >= 0  # it may be a schedule
    require(good, "meta.optimizer.learning_rate", rate, "a finite number >= 0")
    config.theta_init = ConfigDict(THETA_INIT | config.theta_init.to_dict())
    config.run = ConfigDict(run_section() | config.run.to_dict())
    config.optimizer = ConfigDict(build.resolve(config.optimizer.to_dict()))
    config.tasks = ConfigDict(complete(config.tasks.to_dict()))
    return config.lock()


def load(source: str | ConfigDict, overrides: Iterable[str] = ()) -> ConfigDict:
    """Loads a config, applies overrides and resolves it.

    Args:
      source: ``NAME`` of a preset, ``FILE.py``, either with ``:ARGUMENT`` (the task preset of the built-in
        variants, ``"celo2:fast_digits"``), or a config.
      overrides: ``dotted.key=value``; a ``.kind`` override swaps a part and takes its defaults, whatever
        the order in which overrides are given.

    Returns:
      The resolved config, locked.

    Raises:
      UserError: an unknown name or key (with the nearest), or a value of the wrong type.

    Example:
      >>> load("celo2", ["optimizer.orthogonalization.kind=identity"]).optimizer.orthogonalization.kind
      'identity'
    """
    config = source if isinstance(source, ConfigDict) else _from_source(source)
    if "optimizer" not in config:
        raise UserError(f"{source} is a task preset; name a variant and its tasks: celo2:{source}")
    config = resolve(config)
    pairs = split_overrides(overrides)
    swaps = [(key, text) for key, text in pairs if _is_part(key)]
    for key, text in sorted(swaps, key=lambda pair: pair[0].count(".")):  # what holds a part before the part
        _swap(config, key.removesuffix(".kind"), text)
    config = resolve(config)
    for key, text in pairs:
        if not _is_part(key):
            set_value(config, key, text)
    return resolve(config)


def split_overrides(overrides: Iterable[str]) -> list[tuple[str, str]]:
    """Returns the pairs ``(dotted key, text of the value)`` of ``key=value``.

    Raises:
      UserError: an override of another form.

    Example:
      >>> split_overrides(["meta.estimator.pairs=2"])
      [('meta.estimator.pairs', '2')]
    """
    pairs = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"override {override!r} is not of the form key=value")
        pairs.append((key.strip(), text))
    return pairs


def set_value(config: ConfigDict, key: str, text: str) -> None:
    """Replaces the value of a dotted key by one of its type.

    Raises:
      UserError: there is no such key (the nearest one is named), or the text is of another type.
    """
    section, last = locate(config, key)
    if isinstance(section[last], ConfigDict):
        raise UserError(f"{key} is a section; set one of its keys: {', '.join(section[last].keys())}")
    section[last] = _value(text, section[last], key)


def _swap(config: ConfigDict, path: str, kind: str) -> None:
    """Replaces the section of a part by another kind's defaults."""
    parent, last = locate(config, path)
    if isinstance(parent[last], (tuple, list)):
        locate(config, f"{path}.kind")  # says that a list has no keys
    if isinstance(parent[last], ConfigDict) and parent[last].get("kind") == kind:
        return
    fresh = {} if path.startswith("optimizer.") else _defaults(path, kind)
    with parent.unlocked():
        del parent[last]
        parent[last] = ConfigDict({"kind": kind, **fresh})


def load_optimizer(
    source: str | ConfigDict = "celo2", overrides: Iterable[str] = (), *, weights: str | None = None
) -> Any:
    """Returns a ready-to-use optimizer.

    Args:
      source: as in :func:`load`.
      overrides: as in :func:`load`.
      weights: a theta file, a run folder of ``celo-nnx train``, the name of weights that come with the
        package, or ``"hand_made"``, which makes ``celo2`` a Muon with exponential-average momentum. By
        default the package's weights of that variant, and where it has none the hand-made ones.

    Returns:
      A :class:`celo_nnx.optimizer.LearnedOptimizer`; call ``.as_optax()`` on it.

    Raises:
      UserError: an unknown config, or weights that do not fit it: after overrides that change theta's
        shapes, name others.
    """
    from celo_nnx.build import build
    from celo_nnx.weights import HAND_MADE, names, theta_file

    config = load(source, overrides).optimizer
    variant = source.partition(":")[0] if isinstance(source, str) else ""
    own = str(theta_file(variant)) if variant in names() else HAND_MADE
    path = own if weights is None else weights
    start = {"kind": HAND_MADE} if path == HAND_MADE else {"kind": "file", "path": path}
    try:
        return build(config, jax.random.key(0), start)
    except UserError as error:
        hint = f" (weights={HAND_MADE!r} needs no file)" if weights is None and own in str(error) else ""
        raise UserError(f"{error}{hint}") from None


load_config = load
