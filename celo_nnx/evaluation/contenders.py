"""What is compared: hand-made optimizers, learned ones by variant, theta file or run folder, a user's own."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from celo_nnx.build import build
from celo_nnx.build import resolve as resolve_parts
from celo_nnx.config import load, presets, run_module
from celo_nnx.errors import UserError, told, unknown
from celo_nnx.evaluation.baselines import BASELINES, SCHEDULES, Rule, lookup, trained
from celo_nnx.evaluation.suites import file_digest
from celo_nnx.evaluation.tuning import LIMIT
from celo_nnx.interfaces import Array, PyTree
from celo_nnx.meta.checkpoint import canonical, digest, flatten
from celo_nnx.optimizer import LearnedOptimizer
from celo_nnx.theta_io import FILE_NAME, load_theta, read_metadata
from celo_nnx.weights import FOLDER, HAND_MADE, locate, theta_file
from celo_nnx.weights import names as shipped

ADAM = "adam"  # what scores are relative to
# Learning rates that tuning of a learned rule starts from, as of a baseline; the rate is the RMS of a step.
LEARNED_GRID = (-7, -2)
FILE_GRID = (-7, -1)  # of a rule of the user's, about which nothing is known
# A learned schedule decides the rate itself: there is nothing to tune.
OWN_GRID = (0, 0)


@dataclasses.dataclass(frozen=True)
class Contender:
    """An optimizer of a comparison.

    Attributes:
      label: its name in tables.
      about: in a few words.
      rule: ``(schedule, num_steps) -> make_tx``, as :func:`celo_nnx.evaluation.curves.train_runs` takes it.
      context: arrays that ``make_tx`` needs: theta of a learned optimizer.
      grid: learning rates that tuning starts from.
      limit: by how many half-decades either end may move.
      eval_params: see :class:`celo_nnx.evaluation.baselines.Baseline`.
      config: what decides the optimizer, as JSON values.
    """

    label: str
    about: str
    rule: Callable[[str, int], Callable[..., optax.GradientTransformation]]
    context: tuple[PyTree, ...]
    grid: tuple[int, int]
    limit: int
    eval_params: Callable[[Any, PyTree], PyTree]
    config: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class LearnedRule:
    """A learned optimizer under a schedule, as a function of the learning rate and theta.

    Equal rules are equal objects, so that two thetas of one variant share their compiled programs. Where the
    schedule is learned, ``schedule`` is not used and the learning rate multiplies the optimizer's own.

    Attributes:
      parts: the section ``optimizer`` of a config, as canonical JSON.
      schedule: a key of :data:`celo_nnx.evaluation.baselines.SCHEDULES`.
      num_steps: updates of the whole run.
    """

    parts: str
    schedule: str
    num_steps: int

    def __call__(self, learning_rate: Array, theta: PyTree) -> optax.GradientTransformationExtraArgs:
        """Returns the optax rule; both arguments may be traced."""
        optimizer = _built(self.parts).with_theta(theta)
        if optimizer.schedule.decides_rate:
            base = optimizer.schedule.base

            def rate(count: Array) -> Array:
                return learning_rate * base(count, self.num_steps)
        else:
            rate = SCHEDULES[self.schedule](learning_rate, self.num_steps)
        return optimizer.as_optax(num_steps=self.num_steps, learning_rate=rate)


@dataclasses.dataclass(frozen=True)
class FileRule:
    """An optimizer of the user's under a schedule, as a function of the learning rate.

    Attributes:
      path: the Python file, whose ``get_optimizer(learning_rate)`` gives an optax rule.
      file: SHA-256 of its text.
      schedule: a key of :data:`celo_nnx.evaluation.baselines.SCHEDULES`.
      num_steps: updates of the whole run.

    Raises:
      UserError: on a call, where ``get_optimizer`` fails or gives something else.
    """

    path: str
    file: str
    schedule: str
    num_steps: int

    def __call__(self, learning_rate: Array) -> optax.GradientTransformationExtraArgs:
        """Returns the optax rule; the learning rate may be traced."""
        rate = SCHEDULES[self.schedule](learning_rate, self.num_steps)
        what = f"get_optimizer of {self.path}"
        with told(what):
            made = _get_optimizer(self.path, self.file)(rate)
        if not all(callable(getattr(made, name, None)) for name in ("init", "update")):
            raise UserError(
                f"{what} returned {type(made).__name__}, expected an optax GradientTransformation"
            )
        return optax.with_extra_args_support(made)


@functools.lru_cache(maxsize=16)
def _get_optimizer(path: str, file: str) -> Callable[..., optax.GradientTransformation]:
    made = getattr(run_module(path), "get_optimizer", None)
    if not callable(made):
        raise UserError(f"{path} has no function get_optimizer(learning_rate)")
    return made


@functools.lru_cache(maxsize=16)
def _built(parts: str) -> LearnedOptimizer:
    # The rule is first called while a program is traced: what is built must be real there.
    with jax.ensure_compile_time_eval():
        return build(json.loads(parts), jax.random.key(0), {"kind": HAND_MADE})


def contenders(
    names: Sequence[str], weights: Sequence[str] = (), schedule: str = "constant"
) -> list[Contender]:
    """Finds optimizers by what a user calls them.

    Args:
      names: each a baseline (``muon``); a variant (``celo2``) with the weights of its name that come with
        the package, or with its hand-made theta where there are none; or ``[LABEL=]PATH`` of a theta file or
        a run folder, whose header says which optimizer it is for, or of a Python file with a function
        ``get_optimizer(learning_rate)``.
      weights: each ``[VARIANT=]PATH``, or a name in the place of the path, ``hand_made`` among them: the
        theta of a variant among ``names``; given several times for one variant, each is compared. Without
        ``VARIANT=`` there must be one variant.
      schedule: with which a function of the user's is tried.

    Returns:
      One for each name and weights, with different labels, Adam among them: scores are relative to it.

    Raises:
      UserError: an unknown name, weights that are missing or do not fit, a function of the user's that fails
        or gives no optimizer, or two of one label.

    Example:
      >>> [c.label for c in contenders(["muon", "celo2"])]
      ['adam', 'muon', 'celo2']
    """
    names = list(dict.fromkeys(names))
    thetas = _by_variant(names, weights)
    found = [] if ADAM in names else [baseline(ADAM)]
    for name in names:
        if name in BASELINES:
            found.append(baseline(name))
        elif name in _variants():
            parts = load(name).optimizer.to_dict()
            own = str(theta_file(name)) if name in shipped() else HAND_MADE
            for path in thetas.get(name, [own]):
                label = name if path == own else f"{name}@{stem(path)}"
                found.append(learned(label, parts, None if path == HAND_MADE else path))
        else:
            found.append(_from_path(name, schedule))
    labels = [c.label for c in found]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"two optimizers would be called {label!r}: rename a file or folder of theirs")
    return found


def _from_path(name: str, schedule: str) -> Contender:
    """Returns the optimizer of ``[LABEL=]PATH``."""
    label, _, path = name.rpartition("=")
    if not is_path(path):
        raise unknown("optimizer", name, [*BASELINES, *_variants()])
    if label in BASELINES or label in _variants():
        raise UserError(f"{label!r} is an optimizer of its own and cannot be the label of {path}")
    label = label or stem(path)
    if path.endswith(".py"):
        return from_file(label, path, schedule)
    return learned(label, parts_of(path), path)


def from_file(label: str, path: str, schedule: str = "constant") -> Contender:
    """Returns an optimizer of the user's: ``get_optimizer(learning_rate)`` of a Python file.

    Args:
      label: its name.
      path: of the file.
      schedule: with which the function is tried.

    Raises:
      UserError: there is no such file or function, or the function fails or gives no optimizer.
    """
    if not os.path.isfile(path):
        raise UserError(f"no file {path}")
    file = file_digest(path)
    rule = FileRule(path, file, schedule, 1)
    # Under a trace, as in training: a float() of the learning rate fails here too.
    jax.eval_shape(lambda rate: (rule(rate), None)[1], jax.ShapeDtypeStruct((), jnp.float32))
    return Contender(
        label=label,
        about=f"get_optimizer of {path}",
        rule=functools.partial(FileRule, path, file),
        context=(),
        grid=FILE_GRID,
        limit=LIMIT,
        eval_params=trained,
        config={"file": file},
    )


def baseline(name: str) -> Contender:
    """Returns a hand-made optimizer."""
    known = lookup(name)
    return Contender(
        label=name,
        about=known.about,
        rule=functools.partial(Rule, name),
        context=(),
        grid=known.grid,
        limit=LIMIT,
        eval_params=known.eval_params,
        config={"baseline": name, "about": known.about},
    )


def learned(label: str, parts: Mapping[str, Any], path: str | None) -> Contender:
    """Returns a learned optimizer.

    Args:
      label: its name.
      parts: the section ``optimizer`` of a config, complete.
      path: of its theta, a file or run folder; None for the hand-made one.

    Raises:
      UserError: parts that cannot be built, or a theta that is missing, damaged or of another optimizer.
    """
    text = canonical(resolve_parts(dict(parts)))
    optimizer = _built(text)
    theta = optimizer.theta if path is None else load_theta(path, like=optimizer.theta)
    theta = jax.device_get(theta)
    of_theta = digest(flatten(theta), {})
    own = optimizer.schedule.decides_rate
    ours = path is not None and locate(path).parent == FOLDER
    told = f"the package's theta {locate(path).stem}" if ours else f"theta of {path}"
    about = "hand-made theta" if path is None else f"{told}, digest {of_theta[:12]}"
    about += _of_others(path, json.loads(text)) if path else ""
    return Contender(
        label=label,
        about=about + (", learned schedule, not tuned" if own else ""),
        rule=functools.partial(LearnedRule, text),
        context=(theta,),
        grid=OWN_GRID if own else LEARNED_GRID,
        limit=0 if own else LIMIT,
        eval_params=trained,
        config={"learned": json.loads(text), "theta": of_theta},
    )


def _of_others(path: str, parts: Mapping[str, Any]) -> str:
    """Says in which parts the optimizer that a theta was made for differs from the one that gets it."""
    try:
        section = json.loads(read_metadata(path).get("config", "{}"))["optimizer"]
        made_for = json.loads(canonical(resolve_parts(section)))
        differ = sorted(name for name in parts if made_for.get(name) != parts[name])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UserError):
        return ", made for an optimizer that its header does not tell"
    return f", made for an optimizer with another {', '.join(differ)}" if differ else ""


def parts_of(path: str, told: str = "--weights ") -> dict[str, Any]:
    """Returns the section ``optimizer`` that a theta file or run folder says it is for.

    Args:
      path: a file, a folder or a name.
      told: how a command takes ``VARIANT=PATH``, for the message.

    Raises:
      UserError: there is no theta, or its header does not say.
    """
    load_theta(path)  # says what is wrong with the file
    try:
        parts = json.loads(read_metadata(path).get("config", "{}"))["optimizer"]
        if not isinstance(parts, dict):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{path} does not say which optimizer its theta is for: name it, {told}VARIANT={path}"
        ) from None
    return parts


def _by_variant(names: Sequence[str], weights: Sequence[str]) -> dict[str, list[str]]:
    """Returns paths of thetas by variant."""
    among = [name for name in names if name not in BASELINES and name in _variants()]
    thetas: dict[str, list[str]] = {}
    for text in weights:
        name, equals, path = text.partition("=")
        if not equals:
            if len(among) != 1:
                listed = ", ".join(among) or "none"
                raise UserError(f"say whose weights {text} are: VARIANT={text}; --optimizers names {listed}")
            name, path = among[0], text
        elif name not in among:
            raise unknown("variant of --weights", name, among)
        if path not in (HAND_MADE, *shipped()) and not os.path.exists(path):
            raise UserError(f"no weights at {path}: neither a theta file nor a run folder is there")
        thetas.setdefault(name, []).append(path)
    return thetas


def _variants() -> list[str]:
    return [name for name, (_, whole) in presets().items() if whole]


def is_path(text: str) -> bool:
    """Whether a text is meant as a path and not as a name."""
    return os.sep in text or text.endswith((".safetensors", ".py")) or os.path.exists(text)


def stem(path: str) -> str:
    """Returns what a theta file, run folder or Python file is called in tables."""
    absolute = Path(os.path.abspath(path))
    if absolute.name == FILE_NAME:  # every run folder has one
        absolute = absolute.parent
    return absolute.name.removesuffix(".safetensors").removesuffix(".py")
