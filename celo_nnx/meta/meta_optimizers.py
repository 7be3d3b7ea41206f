"""Meta-optimizers from config: optax's optimizers, transformations and schedules by name, and chains of them.

A section names what it builds in ``kind``; its other keys are arguments, of which any may be a section too::

    dict(kind="adamw", learning_rate=1e-4, weight_decay=1e-4, clip_norm=1.0, warmup=100)
    dict(kind="lion", learning_rate=dict(kind="cosine_decay_schedule", init_value=3e-4, decay_steps=1000))
    dict(kind="chain", transforms=(dict(kind="clip", max_delta=1.0), dict(kind="adam", learning_rate=3e-4)))

Schedules count the updates of theta: the meta-iterations of a run, or of a phase where a run has phases.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from celo_nnx.errors import UserError, is_count, is_name, is_number, require, unknown

Rule = optax.GradientTransformation
Number = float | optax.Schedule


def adamw(
    *,
    learning_rate: Number = 1e-4,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: Number = 1e-4,
    clip_norm: float = 0.0,
    warmup: int = 0,
) -> Rule:
    """AdamW on all meta-parameters, as ``optax.adamw`` computes it, with clipping and warm-up.

    With warm-up over W updates the rate of update i (1 first) is ``learning_rate min(1, i / W)``.

    Args:
      learning_rate: a number or a schedule.
      b1, b2: decays of the first and second moment, in [0, 1).
      eps: added to the root of the second moment.
      weight_decay: decoupled; a number or a schedule.
      clip_norm: the gradient is scaled down to this norm over all leaves; 0 for never.
      warmup: updates of linear warm-up, 0 for none.

    Raises:
      UserError: for a value out of range.

    Source: META_TRAINING sections 0 and 5.
    """

    def number(name: str, value: object, high: float, legal: str) -> None:
        require(is_number(value) and 0.0 <= value < high, f"meta.optimizer.{name}", value, legal)

    for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        if not callable(value) and not isinstance(value, jax.Array):
            number(name, value, math.inf, "a finite number >= 0")
    number("b1", b1, 1.0, "in [0, 1)")
    number("b2", b2, 1.0, "in [0, 1)")
    number("eps", eps, math.inf, "a finite number >= 0")
    number("clip_norm", clip_norm, math.inf, "a finite number >= 0 (0 = off)")
    legal = "an integer >= 0 (0 = off)"
    require(warmup == 0 or is_count(warmup), "meta.optimizer.warmup", warmup, legal)
    rate = _warmed(learning_rate, warmup) if warmup else learning_rate
    rule = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(clip_norm), rule) if clip_norm else rule


def _warmed(rate: Number, warmup: int) -> optax.Schedule:
    """The rate times a ramp that is 1 from update number ``warmup`` on."""

    def schedule(count: jax.Array) -> jax.Array:
        ramp = jnp.minimum(1.0, (count + 1) / warmup)
        return ramp * (rate(count) if callable(rate) else rate)

    return schedule


def chain(*, transforms: tuple[Rule, ...]) -> Rule:
    """Applies transformations one after the other, as ``optax.chain``.

    Raises:
      UserError: there is none, or something else among them.
    """
    if not isinstance(transforms, tuple) or not transforms or not all(map(_is_rule, transforms)):
        raise UserError("transforms of a chain must be one or more sections of transformations")
    return optax.chain(*transforms)


def _is_rule(value: Any) -> bool:
    return isinstance(value, Rule)  # a named tuple


OWN: dict[str, Callable[..., Rule]] = {"adamw": adamw, "chain": chain}


@functools.cache
def rules() -> dict[str, Callable[..., Rule]]:
    """Returns what a meta-optimizer may be: by name, with this module's own in the place of optax's."""
    found = {}
    for name in dir(optax):
        made = getattr(optax, name)
        function = inspect.isfunction(made) or isinstance(made, functools.partial)
        if name.startswith("_") or not function:
            continue
        signature = inspect.signature(made)
        returns = signature.return_annotation
        fits = inspect.isclass(returns) and issubclass(returns, Rule) or name.startswith("scale_by_")
        if fits and not any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):
            found[name] = made
    return found | OWN


@functools.cache
def schedules() -> dict[str, Callable[..., optax.Schedule]]:
    """Returns optax's schedules by name."""
    names = [name for name in dir(optax.schedules) if not name.startswith(("_", "inject"))]
    return {n: f for n in names if inspect.isfunction(f := getattr(optax.schedules, n))}


def defaults(path: str, kind: str) -> dict[str, Any]:
    """Returns the arguments that a section of this kind may have, with their defaults; None for none.

    Args:
      path: ``meta.optimizer``, or a key below it, where schedules may stand as well.
      kind: of the section.

    Raises:
      UserError: an unknown kind; the nearest is named.

    Example:
      >>> defaults("meta.optimizer", "lion")["b1"], defaults("meta.optimizer", "lion")["learning_rate"]
      (0.9, None)
    """
    found = {}
    for parameter in _parameters(_find(path, kind, nested=path != "meta.optimizer")):
        default = None if parameter.default is parameter.empty else parameter.default
        if default is None or isinstance(default, (bool, int, float, str, tuple)) and not _is_rule(default):
            found[parameter.name] = default
    return found


def _parameters(made: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(made).parameters.values())


def _find(where: str, kind: Any, *, nested: bool) -> Callable[..., Any]:
    known = (rules() | schedules()) if nested else rules()
    if not is_name(kind, known):
        near = difflib.get_close_matches(str(kind), known, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        what = "optimizers, transformations and schedules" if nested else "optimizers and transformations"
        raise UserError(f"unknown {where}.kind {kind!r}{hint}; known: {', '.join(OWN)} and optax's {what}")
    return known[kind]


def meta_optimizer(section: Mapping[str, Any], theta: Any = None) -> Rule:
    """Builds the optax rule for theta and tries it on shapes.

    Args:
      section: ``config.meta.optimizer``.
      theta: what will be updated; a small tree by default.

    Raises:
      UserError: an unknown kind or key, a missing argument, a value out of range, or a rule that does not
        update theta from a gradient alone (a line search asks for losses).

    Example:
      >>> tx = meta_optimizer({"kind": "adamw", "learning_rate": 1e-4})
    """
    where = "meta.optimizer"
    rule = _make(section, where, nested=False)
    like = {"vector": jnp.zeros(2), "matrix": jnp.zeros((3, 2))} if theta is None else theta
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.float32), like)
    try:
        state = jax.eval_shape(rule.init, like)
        updates, after = jax.eval_shape(rule.update, like, state, like)
    except UserError:
        raise
    except Exception as error:  # optax tells a wrong value in whatever way it fails on it
        raise UserError(f"{where} ({section['kind']}) cannot update theta: {_line(error)}") from None
    if _form(updates) != _form(like) or _form(state) != _form(after):
        raise UserError(f"{where} ({section['kind']}) changes the shapes of theta or of its own state")
    return rule


def of_rate(section: Mapping[str, Any]) -> Callable[[jax.Array], Rule] | None:
    """Returns a rule as a function of its learning rate, None where that is not a number of ``adamw``.

    A program that gets the rate as data is the same for all rates.
    """
    if section["kind"] != "adamw" or not is_number(section.get("learning_rate")):
        return None
    rest = dict(section.items())
    return lambda rate: _make(rest | {"learning_rate": rate}, "meta.optimizer", nested=False)


def _form(tree: Any) -> tuple[Any, list[Any]]:
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(jnp.shape(x), jnp.result_type(x)) for x in leaves]


def _make(section: Any, where: str, *, nested: bool) -> Any:
    """Builds what a section names, its arguments first."""
    if not _is_section(section):
        raise UserError(f"{where} = {section!r} must be a section with a key 'kind'")
    kind = section.get("kind")
    made = _find(where, kind, nested=nested)
    parameters = {p.name: p for p in _parameters(made)}
    arguments = {}
    for key, value in section.items():
        if key == "kind":
            continue
        if key not in parameters:
            raise unknown(f"key of {where} ({kind}),", key, ["kind", *parameters])
        if value is not None or parameters[key].default is not inspect.Parameter.empty:
            arguments[key] = _argument(value, f"{where}.{key}")
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in arguments]
    if missing:
        raise UserError(f"{where} ({kind}) needs {', '.join(missing)}")
    rate = arguments.get("learning_rate", 0.0)
    require(not is_number(rate) or rate >= 0, f"{where}.learning_rate", rate, "a finite number >= 0")
    try:
        return made(**arguments)
    except UserError:
        raise
    except Exception as error:  # as above
        raise UserError(f"{where} ({kind}): {_line(error)}") from None


def _argument(value: Any, where: str) -> Any:
    """Builds the sections inside a value; JSON has no integers for keys, optax's boundaries are such."""
    if _is_section(value):
        if "kind" in value:
            return _make(value, where, nested=True)
        keys = {key: int(key) if str(key).isdecimal() else key for key in value}
        return {keys[key]: _argument(x, f"{where}.{key}") for key, x in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_argument(x, f"{where}[{i}]") for i, x in enumerate(value))
    if isinstance(value, float):
        require(math.isfinite(value), where, value, "a finite number")
    return value


def _is_section(value: Any) -> bool:
    return hasattr(value, "items")


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
