"""Problems with a formula and a known minimum: no data, no network."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from celo_nnx.errors import is_count, is_number, require
from celo_nnx.interfaces import Array, PyTree, Task
from celo_nnx.tasks.fields import MAX_WIDTH, check_counts, check_names, clipped

WORST = 10.0


class AnalyticTask(Task):
    """A task without data: a batch is empty. The meta-loss is ``ln(1 + loss - floor)``, at most 10."""

    floor: ClassVar[float] = 0.0

    def pick(self, key: Array, start: Array, count: Array) -> Array:
        """Picks nothing."""
        return jnp.asarray(start)

    def take(self, data: dict[str, Array], picked: Array) -> dict[str, Array]:
        """Returns an empty batch."""
        return {}

    def normalize(self, loss: Array) -> Array:
        """Returns ``ln(1 + loss - floor)`` between 0 and :data:`WORST`, NaN becoming the upper bound."""
        return clipped(jnp.log1p(jnp.maximum(loss - self.floor, 0.0)), 0.0, WORST)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quadratic(AnalyticTask):
    """A quadratic of a given spectrum, ``1/(2 m) sum_ij eigenvalue_i (Q^T X)_ij^2`` over ``X`` ``[n, m]``.

    ``Q`` is the identity, or an orthogonal matrix that every trajectory draws anew. ``X`` starts standard
    normal. The minimum is 0, at 0.

    Attributes:
      eigenvalues: ``n`` of them, at least 0.
      columns: ``m``.
      rotated: whether trajectories draw ``Q``.
      noise: standard deviation of what is added to every entry of ``m`` times the gradient; the loss has the
        noise that belongs to it, of mean 0.

    Example:
      >>> task = Quadratic(eigenvalues=(1.0, 3.0), rotated=False)
      >>> float(task.loss({"x": jnp.ones((2, 1))}, {}, jax.random.key(0), {})[0])
      2.0
    """

    eigenvalues: tuple[float, ...] = (1.0, 0.1, 0.01)
    columns: int = 1
    rotated: bool = True
    noise: float = 0.0

    def __post_init__(self) -> None:
        """Checks every value; raises :class:`~celo_nnx.errors.UserError`."""
        spectrum = self.eigenvalues
        many = isinstance(spectrum, (tuple, list)) and 1 <= len(spectrum) <= MAX_WIDTH
        good = many and all(is_number(e) and e >= 0 for e in spectrum)
        require(good, "eigenvalues", spectrum, f"a tuple of 1 to {MAX_WIDTH} finite numbers >= 0")
        object.__setattr__(self, "eigenvalues", tuple(spectrum))
        check_counts(self, "columns")
        require(isinstance(self.rotated, bool), "rotated", self.rotated, "True or False")
        good = is_number(self.noise) and self.noise >= 0
        require(good, "noise", self.noise, "a finite number >= 0")

    def sample(self, key: Array) -> PyTree:
        """Draws the rotation ``[n, n]``, uniform over orthogonal matrices."""
        return jax.random.orthogonal(key, len(self.eigenvalues)) if self.rotated else ()

    def init(self, key: Array, sample: PyTree = ()) -> tuple[PyTree, PyTree]:
        """Returns ({"x": [n, m]}, empty model state)."""
        return {"x": jax.random.normal(key, (len(self.eigenvalues), self.columns))}, {}

    def loss(
        self, params: PyTree, state: PyTree, key: Array, batch: PyTree, sample: PyTree = ()
    ) -> tuple[Array, PyTree, dict[str, Array]]:
        """Returns (the quadratic plus noise, state, no auxiliary scalars)."""
        x = params["x"]
        turned = sample.T @ x if self.rotated else x
        total = 0.5 * jnp.sum(jnp.asarray(self.eigenvalues, x.dtype)[:, None] * turned**2)
        if self.noise:
            total = total + self.noise * jnp.sum(jax.random.normal(key, x.shape) * x)
        return total / self.columns, state, {}


class Formula(NamedTuple):
    """A function of ``x`` ``[n]``.

    Attributes:
      value: the function.
      minimum: its lowest value for ``n``.
      low, high: where ``x`` starts, uniformly.
      least: the smallest ``n``.
    """

    value: Callable[[Array], Array]
    minimum: Callable[[int], float]
    low: float
    high: float
    least: int = 1


def _rosenbrock(x: Array) -> Array:
    return jnp.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)


def _rastrigin(x: Array) -> Array:
    return jnp.sum(x**2 + 10.0 * (1.0 - jnp.cos(2 * jnp.pi * x)))


def _styblinski_tang(x: Array) -> Array:
    return 0.5 * jnp.sum(x**4 - 16.0 * x**2 + 5.0 * x)


def _lowest_styblinski_tang(n: int) -> float:
    """The value at the smallest root of the derivative ``2 x^3 - 16 x + 5/2``, ``n`` times."""
    x = float(np.min(np.roots([2.0, 0.0, -16.0, 2.5]).real))
    return 0.5 * n * math.fsum((x**4, -16 * x**2, 5 * x))


FORMULAS: dict[str, Formula] = {
    "rosenbrock": Formula(_rosenbrock, lambda n: 0.0, -2.0, 2.0, least=2),
    "rastrigin": Formula(_rastrigin, lambda n: 0.0, -5.12, 5.12),
    "styblinski_tang": Formula(_styblinski_tang, _lowest_styblinski_tang, -5.0, 5.0),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analytic(AnalyticTask):
    """A test function of optimization.

    - ``rosenbrock``: ``sum 100 (x_{i+1} - x_i^2)^2 + (1 - x_i)^2``, lowest at ones;
    - ``rastrigin``: ``sum x_i^2 + 10 (1 - cos 2 pi x_i)``, lowest at zeros;
    - ``styblinski_tang``: ``1/2 sum x_i^4 - 16 x_i^2 + 5 x_i``, lowest at -2.9035.

    Attributes:
      formula: a key of :data:`FORMULAS`.
      dimension: the length of ``x``.

    Example:
      >>> Analytic(formula="styblinski_tang", dimension=2).floor
      -78.33...
    """

    formula: str = "rosenbrock"
    dimension: int = 2

    def __post_init__(self) -> None:
        """Checks every value; raises :class:`~celo_nnx.errors.UserError`."""
        check_names(self, formula=FORMULAS)
        least = FORMULAS[self.formula].least
        good = is_count(self.dimension) and self.dimension >= least
        require(good, "dimension", self.dimension, f"an integer >= {least}")

    @property
    def floor(self) -> float:
        """The lowest value."""
        return FORMULAS[self.formula].minimum(self.dimension)

    def init(self, key: Array, sample: PyTree = ()) -> tuple[PyTree, PyTree]:
        """Returns ({"x": [dimension]}, empty model state)."""
        low, high = FORMULAS[self.formula][2:4]
        return {"x": jax.random.uniform(key, (self.dimension,), minval=low, maxval=high)}, {}

    def loss(
        self, params: PyTree, state: PyTree, key: Array, batch: PyTree, sample: PyTree = ()
    ) -> tuple[Array, PyTree, dict[str, Array]]:
        """Returns (the function's value, state, no auxiliary scalars)."""
        return FORMULAS[self.formula].value(params["x"]), state, {}
