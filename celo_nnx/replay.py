"""Replays recorded trajectories and says how far this project is from them.

A trajectory starts from the recorded parameters and is fed the recorded gradients (or images); parameters
are compared after every update. ``twin=True`` replays with the plain second implementation instead.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from celo_nnx import recordings
from celo_nnx.errors import UserError, require
from celo_nnx.interfaces import Array, Optimizer, PyTree
from celo_nnx.recordings import Recording, Spec
from celo_nnx.recordings.classes import CLASSES, lookup
from celo_nnx.recordings.composed import composed_optimizer
from celo_nnx.recordings.twins import twin_optimizer

SUGGESTED = 2e-6  # absolute, on parameters of size 1: what two compilations of one program leave
Overrides = tuple[str, ...] | None  # of the composed optimizer's config; None for the twin
Errors = list[tuple[float, float, float]]  # (absolute, relative, bound) of every compared array


def replay(path: str | Path, *, twin: bool = False, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Replays one recording.

    Args:
      path: NAME.json, NAME.npz or NAME.
      twin: replay with the plain twins of :mod:`celo_nnx.naive_zoo` and plain formulas.
      overrides: ``KEY=VALUE`` of the composed optimizer's config, such as ``tile=2``.

    Returns:
      ``file``, ``kind``, ``optimizer`` and ``steps`` (None where there are none), ``max_abs_error`` over all
      compared arrays, ``max_rel_error`` (each array's largest error over its largest magnitude), ``ok`` by
      the file's tolerance; ``reason`` where it is not ok for another cause. Errors are None where a value
      is finite on one side only or nothing was compared.

    Raises:
      UserError: files that are missing, damaged or not what their kind asks for.

    Source: OPTIMIZERS sections 14.2 and 14.3 on tolerances.
    """
    if twin and overrides:
        raise UserError("overrides (--set) are of the composed optimizer only, not of its twin (--twin)")
    recording = recordings.read(path)
    kind = recording.meta["kind"]
    row: dict[str, Any] = {"file": str(path), "kind": kind, "optimizer": None, "steps": None}
    if kind in ("optimizer_trajectory", "inner_unroll"):
        row["optimizer"] = recordings.optimizer_name(recording)
        row["steps"] = recording.field("n_updates", int)
        require(1 <= row["steps"] <= 10**6, f"{path}: n_updates", row["steps"], "from 1 to 1000000")
        if lookup(recording.meta["reference_class"]) is None:
            reason = f"unsupported optimizer; supported: {', '.join(one.name for one in CLASSES.values())}"
            return row | {"max_abs_error": None, "max_rel_error": None, "ok": False, "reason": reason}
    elif kind == "pes_estimate":
        row["steps"] = len(recording.array("pos_loss"))
    errors = _KINDS[kind](recording, None if twin else tuple(overrides))
    absolute, relative = (max(error[i] for error in errors) for i in (0, 1))
    row["max_abs_error"] = absolute if math.isfinite(absolute) else None
    row["max_rel_error"] = relative if math.isfinite(relative) else None
    return row | {"ok": all(error <= bound for error, _, bound in errors)}


def main(
    files: Iterable[str | Path],
    tolerance: float | None = None,
    *,
    twin: bool = False,
    overrides: Sequence[str] = (),
) -> int:
    """Replays files and prints one JSON line each.

    Args:
      files: recordings; see :func:`replay`.
      tolerance: a bound on ``max_abs_error`` besides each file's own.
      twin: replay with the plain second implementation.
      overrides: of the composed optimizer's config.

    Returns:
      0, or 1 if a file is not ok or over the tolerance.

    Raises:
      UserError: after all files were tried, for those that could not be read; or a negative tolerance.
    """
    if tolerance is not None:
        require(tolerance >= 0, "tolerance", tolerance, "a number >= 0")
    bad, unreadable = 0, []
    for file in files:
        try:
            row = replay(file, twin=twin, overrides=overrides)
        except UserError as error:
            unreadable.append(str(error))
            continue
        print(json.dumps(row), flush=True)
        over = tolerance is not None and not (row["max_abs_error"] or 0.0) <= tolerance
        bad += not row["ok"] or over
    if unreadable:
        raise UserError("; ".join(unreadable))
    return 1 if bad else 0


def _error(got: Any, want: np.ndarray, bound: float) -> tuple[float, float, float]:
    """Compares one array; infinite where it is finite on one side only, or the shapes differ."""
    got = np.asarray(got, np.float64)
    want = np.asarray(want, np.float64)
    if got.shape != want.shape:
        return math.inf, math.inf, bound
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(got - want))
    worst = float(np.max(difference, initial=0.0))
    if not math.isfinite(worst):
        return math.inf, math.inf, bound
    size = float(np.max(np.abs(want), initial=0.0, where=np.isfinite(want)))
    return worst, worst / size if size else (math.inf if worst else 0.0), bound


# --- kinds ------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=32)
def _optimizer(spec: Spec, overrides: Overrides) -> Optimizer:
    return twin_optimizer(spec) if overrides is None else composed_optimizer(spec, overrides)


@functools.lru_cache(maxsize=32)
def _trajectory(spec: Spec, overrides: Overrides) -> Callable[..., PyTree]:
    """Returns the compiled ``(theta, params, grads, losses) -> params after each update``."""
    optimizer = _optimizer(spec, overrides)

    def run(theta: PyTree, params: PyTree, grads: PyTree, losses: Array) -> PyTree:
        rule = optimizer.with_theta(theta)

        def step(carry: tuple[PyTree, PyTree], fed: tuple[PyTree, Array]) -> tuple[Any, PyTree]:
            params, state = carry
            updates, state = rule.update(fed[0], state, params, value=fed[1])
            params = jax.tree.map(jnp.add, params, updates)
            return (params, state), params

        return jax.lax.scan(step, (params, rule.init(params, spec.num_steps)), (grads, losses))[1]

    return jax.jit(run)


def _optimizer_trajectory(recording: Recording, overrides: Overrides) -> Errors:
    """Feeds the recorded gradients; compares the parameters after every update."""
    steps = recording.meta["n_updates"]
    recorded = recording.under("params/")
    grads = recording.under("grads/")
    for key in sorted(recorded.keys() ^ grads.keys()):
        raise UserError(f"{recording.file}: {key!r} is not among both params/* and grads/*")
    for key, x in recorded.items():
        recording.array(f"params/{key}", (steps + 1, *x.shape[1:]))
        recording.array(f"grads/{key}", (steps, *x.shape[1:]))
    losses = recording.array("losses", (steps,))
    spec = recordings.spec(recording, [(key, x.shape[1:]) for key, x in recorded.items()])
    theta = recordings.theta(recording, spec)
    params = {key: x[0] for key, x in recorded.items()}
    got = _trajectory(spec, overrides)(theta, params, grads, losses)
    bound = recording.tolerance("params_abs", SUGGESTED)
    return [_error(got[key], x[1:], bound) for key, x in recorded.items()]


def _inner_unroll(recording: Recording, overrides: Overrides) -> Errors:
    """Trains the recorded MLP at every scale; compares losses and final parameters.

    The optimizer is told the recorded losses: Celo's loss features turn the last bit of a loss into the
    fourth digit of a feature, which would compare roundings of the task's loss.
    """
    steps = recording.meta["n_updates"]
    images = recording.array("images")
    require(
        images.ndim >= 3 and len(images) == steps,
        f"{recording.file}: images",
        images.shape,
        "[steps, n, ...]",
    )
    labels = recording.array("labels", images.shape[:2], "iu")
    images = images.reshape(*images.shape[:2], -1)
    start = recording.under("unscaled_init/")
    widths = _widths(recording, start, images.shape[-1])
    in_range = labels.size == 0 or 0 <= labels.min() and labels.max() < widths[-1]
    require(bool(in_range), f"{recording.file}: labels", "out of range", f"from 0 to {widths[-1] - 1}")
    spec = recordings.spec(recording, [(k.replace("|", "/"), x.shape) for k, x in start.items()])
    theta = recordings.theta(recording, spec)
    run = _inner(spec, overrides, widths)
    errors: Errors = []
    bounds = recording.field("tolerance", dict, {}).get("params_abs", {})
    for scale in recording.field("scales", list):
        require(
            isinstance(scale, int | float) and scale > 0, f"{recording.file}: scale", scale, "a number > 0"
        )
        bound = bounds.get(str(scale), 1e-5) if isinstance(bounds, dict) else bounds
        bound = recording.bound(f"params_abs of scale {scale}", bound)
        losses = recording.array(f"losses_scale{scale}", (steps,))
        s = np.float32(scale)
        params = {k.replace("|", "/"): x / s for k, x in start.items()}
        got_losses, got = run(theta, params, s, images, labels, losses)
        errors.append(_error(got_losses, losses, recording.tolerance("losses_abs", 5e-5)))
        for key, x in start.items():
            final = recording.array(f"final_scale{scale}/{key}", x.shape)
            errors.append(_error(got[key.replace("|", "/")], final, bound))
    require(bool(errors), f"{recording.file}: scales", [], "at least one scale")
    return errors


def _widths(recording: Recording, start: dict[str, np.ndarray], features: int) -> tuple[int, ...]:
    """Returns the MLP's widths, input first, from the recorded parameters."""
    widths = [features]
    for i in range(len(start) // 2):
        b = recording.array(f"unscaled_init/mlp/~/linear_{i}|b")
        require(b.ndim == 1, f"{recording.file}: shape of bias {i}", b.shape, "one axis")
        recording.array(f"unscaled_init/mlp/~/linear_{i}|w", (widths[-1], len(b)))
        widths.append(len(b))
    if len(start) != 2 * (len(widths) - 1) or len(widths) < 2:
        raise UserError(f"{recording.file}: unscaled_init/* is not an MLP of layers mlp/~/linear_N|w and |b")
    return tuple(widths)


@functools.lru_cache(maxsize=8)
def _inner(spec: Spec, overrides: Overrides, widths: tuple[int, ...]) -> Callable[..., tuple[Array, PyTree]]:
    """Returns the compiled ``(theta, params, scale, images, labels, told) -> (losses, final params)``."""
    optimizer = _optimizer(spec, overrides)
    loss_of = _plain_loss(widths) if overrides is None else _task_loss(widths)

    def run(
        theta: PyTree, params: PyTree, scale: Array, images: Array, labels: Array, told: Array
    ) -> tuple[Array, PyTree]:
        rule = optimizer.with_theta(theta)

        def step(carry: tuple[PyTree, PyTree], batch: tuple[Array, ...]) -> tuple[Any, Array]:
            params, state = carry
            loss, grads = jax.value_and_grad(loss_of)(params, scale, *batch[:2])
            updates, state = rule.update(grads, state, params, value=batch[2])
            return (jax.tree.map(jnp.add, params, updates), state), loss

        start = (params, rule.init(params, spec.num_steps))
        (params, _), losses = jax.lax.scan(step, start, (images, labels, told))
        return losses, params

    return jax.jit(run)


def _task_loss(widths: tuple[int, ...]) -> Callable[..., Array]:
    """The loss as meta-training computes it: the project's task and augmentation."""
    from celo_nnx.meta.augmentations.reparametrization import Reparametrized
    from celo_nnx.tasks.image_mlp import ImageMLP

    task = Reparametrized(ImageMLP(features=widths[0], hidden=widths[1:-1], classes=widths[-1]))

    def loss(params: PyTree, scale: Array, images: Array, labels: Array) -> Array:
        layers = {
            f"linear_{i}": {k: params[f"mlp/~/linear_{i}/{k}"] for k in ("b", "w")}
            for i in range(len(widths) - 1)
        }
        sample = {"own": scale, "inner": ()}
        return task.loss(layers, {}, jax.random.key(0), {"x": images, "y": labels}, sample)[0]

    return loss


def _plain_loss(widths: tuple[int, ...]) -> Callable[..., Array]:
    """The same loss written out."""

    def loss(params: PyTree, scale: Array, images: Array, labels: Array) -> Array:
        x = images
        for i in range(len(widths) - 1):
            w, b = (params[f"mlp/~/linear_{i}/{k}"] * scale for k in "wb")
            x = (jax.nn.relu(x) if i else x) @ w + b[None, :]
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(x), labels[:, None], axis=-1))

    return loss


def _pes_estimate(recording: Recording, overrides: Overrides) -> Errors:
    """Estimates the gradient from recorded losses; compares gradient and new accumulator."""
    shape = recording.array("pos_loss").shape
    require(
        len(shape) == 2 and min(shape) >= 1, f"{recording.file}: shape of pos_loss", shape, "[steps, tasks]"
    )
    pos, neg = (recording.array(key, shape) for key in ("pos_loss", "neg_loss"))
    done, mask = (recording.array(key, shape, "b") for key in ("is_done", "mask"))
    perturbation, accumulator = recording.under("vec_pos/"), recording.under("accumulator/")
    grad, new = recording.under("grad/"), recording.under("new_accumulator/")
    for key, x in perturbation.items():
        recording.array(f"vec_pos/{key}", (shape[1], *x.shape[1:]))
        for name in ("accumulator", "new_accumulator"):
            recording.array(f"{name}/{key}", x.shape)
        recording.array(f"grad/{key}", x.shape[1:])
    for key in sorted((grad.keys() | new.keys() | accumulator.keys()) - perturbation.keys()):
        raise UserError(f"{recording.file}: {key!r} has no vec_pos/*")
    std = float(recording.array("std", ()))
    require(0 < std < math.inf, f"{recording.file}: std", std, "a finite number > 0")
    step = recording.field("finished_step", str, "published")
    require(
        step in ("published", "exact"), f"{recording.file}: finished_step", step, "'published' or 'exact'"
    )
    if overrides is None:
        from celo_nnx.naive_meta import pes_estimate

        got = pes_estimate(pos, neg, done, mask, perturbation, accumulator, std, step)
    else:
        from celo_nnx.meta.estimators.pes import pes_gradient

        got = pes_gradient(pos, neg, done, mask, perturbation, accumulator, std, step)
    bound = recording.tolerance("abs", 1e-5)
    pairs = [(got[0], grad), (got[1], new)]
    return [_error(ours[key], want[key], bound) for ours, want in pairs for key in want]


def _normalizer(recording: Recording, overrides: Overrides) -> Errors:
    """Normalizes recorded losses of a 10-class image task."""
    from celo_nnx.tasks.image_mlp import ImageMLP

    loss = recording.array("loss")
    want = recording.array("normalized", loss.shape)
    require(loss.size > 0, f"{recording.file}: number of losses", loss.size, "at least 1")
    if overrides is None:
        top = np.float32(1.5 * math.log(10.0))
        got = np.where(np.isnan(loss), top, np.minimum(np.maximum(loss, 0), top))
    else:
        got = ImageMLP(features=64).normalize(jnp.asarray(loss))
    return [_error(got, want, recording.tolerance("abs", 1e-6))]


def _image_pipeline(recording: Recording, overrides: Overrides) -> Errors:
    """Prepares recorded images: ``NAME_in`` gives ``NAME_out8``, and ``NAME_out8_bw`` in grey."""
    from celo_nnx.tasks.images import prepare

    errors: Errors = []
    for key in sorted(recording.arrays):
        match = re.fullmatch(r"(.+)_out([1-9]\d{0,3})(_bw)?", key)
        if not match:
            continue
        raw, size, grey = recording.array(f"{match[1]}_in", None, "u"), int(match[2]), bool(match[3])
        require(
            raw.ndim == 4 and raw.size > 0,
            f"{recording.file}: shape of {match[1]}_in",
            raw.shape,
            "[n, h, w, c]",
        )
        want = recording.array(key, (len(raw), size, size, 1 if grey else raw.shape[-1]))
        got = _plain_resize(raw, size, grey) if overrides is None else prepare(raw, size, grey)
        errors.append(_error(got, want, recording.tolerance("abs", 1e-6)))
    if not errors:
        raise UserError(f"{recording.file}: no array NAME_in with NAME_outSIZE or NAME_outSIZE_bw")
    return errors


def _plain_resize(images: np.ndarray, size: int, grey: bool) -> np.ndarray:
    """Bilinear resize by a matrix an axis, half-pixel centres, clamped, in double precision."""

    def matrix(length: int) -> np.ndarray:
        centre = (np.arange(size) + 0.5) * length / size - 0.5
        low = np.floor(centre)
        weights = np.zeros((size, length))
        for offset, weight in ((0, 1 - (centre - low)), (1, centre - low)):
            index = np.clip(low + offset, 0, length - 1).astype(int)
            np.add.at(weights, (np.arange(size), index), weight)
        return weights

    rows, columns = matrix(images.shape[1]), matrix(images.shape[2])
    out = np.einsum("ih,nhwc,jw->nijc", rows, images.astype(np.float64), columns, optimize=True) / 255.0
    return out.mean(axis=-1, keepdims=True) if grey else out


_KINDS: dict[str, Callable[[Recording, bool], Errors]] = {
    "optimizer_trajectory": _optimizer_trajectory,
    "inner_unroll": _inner_unroll,
    "pes_estimate": _pes_estimate,
    "normalizer": _normalizer,
    "image_pipeline": _image_pipeline,
}
