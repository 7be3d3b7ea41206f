"""The step of an MLP update rule along each feature, the others as recorded or at zero; its first layer.

A feature is moved over the range that was recorded of it, everything else that the MLP is given staying as it
was for one element of one tensor in one step. What is read is the MLP's step of that element: the direction
and log-magnitude through the step head, before the factors of the whole tensor, orthogonalization and output
normalization, which mix elements.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from celo_nnx.explain.record import Recording, fullest
from celo_nnx.explain.subject import first_layer
from celo_nnx.interfaces import Controls, TensorSpec
from celo_nnx.optimizer import LearnedOptimizer
from celo_nnx.views import TensorView

Array = jax.Array
PERCENTILES = (1.0, 99.0)  # of the recorded values: the range over which a feature is moved


@dataclasses.dataclass(frozen=True)
class Response:
    """The step along one feature plane.

    Attributes:
      group, plane: the feature group, and which of its planes.
      label: the plane's time scale, or its number; empty where the group has one plane.
      x: values of the normalized plane, ``[points]``, ascending.
      at: the recorded median, where the change is 0.
      change: of the step from that at the median, over the RMS of recorded steps, ``[samples, points]``.
      others_zero: the same where all other features are zero, ``[points]``, a mean over samples.
    """

    group: str
    plane: int
    label: str
    x: np.ndarray
    at: float
    change: np.ndarray
    others_zero: np.ndarray

    @property
    def median(self) -> np.ndarray:
        """The median change over samples, ``[points]``."""
        return np.median(self.change, axis=0)

    @property
    def size(self) -> float:
        """RMS of the change over samples and the recorded range: how much the step hangs on the plane."""
        return float(np.sqrt(np.mean(np.square(self.change))))


def respond(
    optimizer: LearnedOptimizer,
    groups: tuple[tuple[str, int], ...],
    planes: Array,
    context: dict[str, Array],
    controls: Controls,
) -> Array:
    """Returns the MLP's step of one element.

    Args:
      optimizer: with an MLP update rule.
      groups: feature groups with their numbers of planes, in order.
      planes: normalized, ``[planes]``.
      context, controls: what the MLP is given besides.

    Returns:
      A scalar.

    Example:
      >>> from celo_nnx import load_optimizer
      >>> rule = load_optimizer("celo2", weights="hand_made")  # steps along normalized momentum
      >>> planes = jnp.zeros(30).at[3].set(0.5)
      >>> groups = tuple((name, len(w)) for name, w in first_layer(rule).items())
      >>> float(respond(rule, groups, planes, {}, Controls()))
      0.5
    """
    given, start = {}, 0
    for name, width in groups:
        given[name] = [planes[i : i + 1] for i in range(start, start + width)]
        start += width
    rule = optimizer.update_rule
    prepared = rule.prepare(tuple(given), jnp.ones((start, 1)), context, controls)
    direction, magnitude, _ = rule(given, prepared, (1,))
    return optimizer.step(direction, magnitude, TensorSpec("element", (1,), None, None))[0]


def responses(
    optimizer: LearnedOptimizer,
    recording: Recording,
    *,
    points: int = 33,
    samples: int = 200,
    seed: int = 0,
) -> list[Response]:
    """Moves every feature plane over its recorded range.

    Args:
      optimizer: that was recorded.
      recording: of it.
      points: values of a plane.
      samples: recorded elements, drawn over all steps and those tensors that show the most features.
      seed: of the draw.

    Returns:
      One for each plane of the features, in order.

    Example:
      >>> curves = responses(optimizer, recording)  # doctest: +SKIP
    """
    tensors = list(fullest(recording).values())
    groups, steps = tensors[0].groups, tensors[0].raw.shape[0]
    rng = np.random.default_rng(seed)
    whose = rng.choice(len(tensors), samples, p=_shares([x.raw.size for x in tensors]))
    when = rng.integers(steps, size=samples)
    which = [int(rng.integers(tensors[k].raw.shape[1])) for k in whose]
    drawn = list(zip(whose, when, which, strict=True))
    values = np.stack([tensors[k].planes[t, :, i] for k, t, i in drawn])
    given = [
        jax.tree.map(lambda x, t=t: x[t], (tensors[k].context, tensors[k].controls)) for k, t, _ in drawn
    ]
    context, controls = jax.tree.map(lambda *x: np.stack(x), *given)
    unit = float(
        np.sqrt(np.mean(np.square(np.concatenate([x.raw.ravel() for x in tensors]), dtype=np.float64)))
    )
    seen = np.concatenate([x.planes.transpose(1, 0, 2).reshape(x.planes.shape[1], -1) for x in tensors], 1)
    low, middle, high = np.percentile(seen, (PERCENTILES[0], 50.0, PERCENTILES[1]), axis=1)
    low, high = low - 1e-6 * (low == high), high + 1e-6 * (low == high)
    grid = np.linspace(low, high, points, axis=1)

    def moved(base: Array, context: Any, controls: Controls, j: Array, x: Array) -> Array:
        one = lambda value: respond(optimizer, groups, base.at[j].set(value), context, controls)  # noqa: E731
        return jax.vmap(one)(x)

    over_samples = jax.vmap(moved, (0, 0, 0, None, None))

    @jax.jit
    def along(values: Array, context: Any, controls: Controls, grid: Array) -> Array:
        each = lambda pair: over_samples(values, context, controls, *pair)  # noqa: E731
        return jax.lax.map(each, (jnp.arange(len(grid)), grid))

    with_middle = np.concatenate([middle[:, None], grid], axis=1).astype(np.float32)
    rest = (context, controls, with_middle)
    here, zero = (np.asarray(along(v, *rest), np.float64) for v in (values, np.zeros_like(values)))
    here, zero = ((x[..., 1:] - x[..., :1]) / (unit or 1.0) for x in (here, zero))
    out = []
    names = plane_labels(optimizer, groups)
    for j, (group, plane) in enumerate((g, k) for g, width in groups for k in range(width)):
        label = names[group][plane]
        out.append(Response(group, plane, label, grid[j], float(middle[j]), here[j], zero[j].mean(0)))
    return out


def _shares(sizes: list[int]) -> np.ndarray:
    return np.array(sizes, np.float64) / sum(sizes)


def plane_labels(optimizer: LearnedOptimizer, groups: tuple[tuple[str, int], ...]) -> dict[str, list[str]]:
    """Returns what tells a group's planes apart: the decays of the accumulator that they read, or numbers.

    Example:
      >>> from celo_nnx import load_optimizer
      >>> plane_labels(load_optimizer("celo2"), (("momentum", 3), ("gradient", 1)))
      {'momentum': ['0.9', '0.99', '0.999'], 'gradient': ['']}
    """
    banks = {n: a.decays for n, a in optimizer.named("accumulators").items() if hasattr(a, "decays")}
    out = {}
    for group, width in groups:
        fitting = [decays for name, decays in banks.items() if name in _reads(optimizer, group)]
        decays = next((d for d in fitting if len(d) == width), range(width))
        out[group] = [f"{d:g}" for d in decays] if width > 1 else [""]
    return out


class _Readings(dict):
    """Accumulators' readings that note which of them are looked at."""

    def __init__(self, readings: dict[str, Any]) -> None:
        super().__init__(readings)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)


def _reads(optimizer: LearnedOptimizer, group: str) -> set[str]:
    """Returns the names of the accumulators that a feature group looks at, found by trying it."""
    found: set[str] = set()

    def trial() -> int:
        x = jnp.ones((4, 4), jnp.float32)
        spec = optimizer.specs({"w": x})["w"]
        parts = optimizer.named("accumulators")
        stats = _Readings({n: a.read(a.init(spec), spec, jnp.int32(0)) for n, a in parts.items()})
        optimizer.named("features")[group].planes(TensorView(x, x, stats, spec))
        found.update(stats.read)
        return 0

    jax.eval_shape(trial)
    return found


@dataclasses.dataclass(frozen=True)
class Weights:
    """First-layer weights of one group: root mean squares over hidden units (and a bank), ``[planes]``."""

    group: str
    labels: list[str]
    rms: np.ndarray
    context: bool


def weights(optimizer: LearnedOptimizer) -> list[Weights]:
    """Returns the sizes of the first layer's weights, features first.

    Where features are normalized to mean square 1, weights of different features can be compared.
    """
    pieces = first_layer(optimizer)
    features = tuple((g, w.shape[-2]) for g, w in pieces.items() if g in optimizer.named("features"))
    labels = plane_labels(optimizer, features)
    out = []
    for group, piece in pieces.items():
        axes = tuple(a for a in range(piece.ndim) if a != piece.ndim - 2)
        rms = np.sqrt(np.mean(np.square(piece, dtype=np.float64), axis=axes))
        numbers = [str(i) for i in range(len(rms))] if len(rms) > 1 else [""]
        out.append(Weights(group, labels.get(group, numbers), rms, group not in labels))
    return out
