"""Augmentations: tasks made from a task by changing what an optimizer sees of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from celo_nnx.errors import require, unknown
from celo_nnx.interfaces import Array, PyTree, Task

LEVELS = ("global", "tensor", "parameter")


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


@dataclasses.dataclass(frozen=True)
class Reparametrized(Task):
    """A task whose parameters are divided by a random scale.

    The optimized variable is ``u = w / s`` with ``s = exp(U(ln low, ln high))``, and the loss at ``u`` is the
    task's at ``u * s``. So gradients are ``s`` times larger and useful steps ``s`` times smaller than the
    task's. The scale is drawn anew for every trajectory and constant within it.

    Attributes:
      task: the task that is wrapped.
      level: one scale for all parameters (``global``), for each tensor, or for each parameter.
      low, high: range of the scale.

    Raises:
      UserError: for an unknown level or unless ``0 < low <= high``.

    Source: META_TRAINING section 6.
    """

    task: Task
    level: str = "global"
    low: float = 1e-3
    high: float = 1e3

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise unknown("augmentation.level", self.level, LEVELS)
        require(_is_positive(self.low), "augmentation.low", self.low, "a finite number > 0")
        legal = f"a finite number >= augmentation.low = {self.low}"
        require(_is_positive(self.high) and self.high >= self.low, "augmentation.high", self.high, legal)

    @property
    def floor(self) -> float:
        """The task's."""
        return self.task.floor

    def sample(self, key: Array) -> dict[str, PyTree]:
        """Draws ``{"scale": scalar or tree like the parameters, "inner": the task's own sample}``."""
        scale_key, inner_key, shape_key = jax.random.split(key, 3)
        inner = self.task.sample(inner_key)
        if self.level == "global":
            return {"scale": self._draw(scale_key, ()), "inner": inner}
        params = jax.eval_shape(lambda k: self.task.init(k, inner)[0], shape_key)
        leaves, treedef = jax.tree.flatten(params)
        shapes = [leaf.shape if self.level == "parameter" else () for leaf in leaves]
        scales = [self._draw(jax.random.fold_in(scale_key, i), shape) for i, shape in enumerate(shapes)]
        return {"scale": jax.tree.unflatten(treedef, scales), "inner": inner}

    def init(self, key: Array, sample: PyTree = ()) -> tuple[PyTree, PyTree]:
        """Returns (the task's parameters divided by the scale, model state)."""
        params, state = self.task.init(key, sample["inner"])
        return self._map(lambda p, s: p / s, params, sample["scale"]), state

    def loss(
        self, params: PyTree, state: PyTree, key: Array, batch: PyTree, sample: PyTree = ()
    ) -> tuple[Array, PyTree, dict[str, Array]]:
        """Returns the task's loss at the parameters times the scale."""
        params = self._map(lambda p, s: p * s, params, sample["scale"])
        return self.task.loss(params, state, key, batch, sample["inner"])

    def test_loss(
        self, params: PyTree, state: PyTree, key: Array, batch: PyTree, sample: PyTree = ()
    ) -> Array:
        """Returns the task's test loss at the parameters times the scale."""
        params = self._map(lambda p, s: p * s, params, sample["scale"])
        return self.task.test_loss(params, state, key, batch, sample["inner"])

    def pick(self, key: Array, start: Array, count: Array) -> PyTree:
        """Picks a batch of the inner task."""
        return self.task.pick(key, start, count)

    def take(self, data: dict[str, Array], picked: PyTree) -> PyTree:
        """Returns the picked batch of the inner task."""
        return self.task.take(data, picked)

    def normalize(self, loss: Array) -> Array:
        """Maps a loss with the task's normalizer."""
        return self.task.normalize(loss)

    def _draw(self, key: Array, shape: tuple[int, ...]) -> Array:
        low, high = math.log(self.low), math.log(self.high)
        return jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high))

    def _map(self, function: Callable[[Array, Array], Array], params: PyTree, scale: PyTree) -> PyTree:
        if self.level == "global":
            return jax.tree.map(lambda p: function(p, scale), params)
        return jax.tree.map(function, params, scale)


def no_augmentation(task: Task) -> Task:
    """Returns the task itself."""
    return task


AUGMENTATIONS: dict[str, Callable[..., Task]] = {"none": no_augmentation, "reparametrization": Reparametrized}
