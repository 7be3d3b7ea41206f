"""Parameters in other units."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from celo_nnx.errors import unknown
from celo_nnx.interfaces import Array, PyTree, Task
from celo_nnx.meta.augmentations.base import Augmentation, check_range, log_uniform

LEVELS = ("none", "global", "tensor", "parameter")


@dataclasses.dataclass(frozen=True)
class Scaled(Augmentation):
    """A task whose parameters are divided by ``sample["own"]``: one number, or a tree like the parameters."""

    def init(self, key: Array, sample: PyTree = ()) -> tuple[PyTree, PyTree]:
        """Returns (the task's parameters divided by the scale, model state)."""
        params, state = super().init(key, sample)
        return _map(lambda p, s: p / s, params, sample["own"]), state

    def loss(
        self, params: PyTree, state: PyTree, key: Array, batch: PyTree, sample: PyTree = ()
    ) -> tuple[Array, PyTree, dict[str, Array]]:
        """Returns the task's loss at the parameters times the scale."""
        return super().loss(_map(lambda p, s: p * s, params, sample["own"]), state, key, batch, sample)

    def evaluate(
        self, params: PyTree, state: PyTree, key: Array, batch: PyTree, sample: PyTree = ()
    ) -> Array:
        """Returns the task's held-out loss at the parameters times the scale."""
        return super().evaluate(_map(lambda p, s: p * s, params, sample["own"]), state, key, batch, sample)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reparametrized(Scaled):
    """Parameters divided by a random scale: gradients grow by it, and useful steps shrink.

    The optimized variable is ``u = w / s`` with ``s = exp(U(ln low, ln high))``, and the loss at ``u`` is the
    task's at ``u * s``. The scale is drawn anew for every trajectory and constant within it.

    Attributes:
      task: the task that is wrapped.
      level: one scale for all parameters (``global``), for each tensor, or for each parameter; ``none``: 1.
      low, high: range of the scale.

    Raises:
      UserError: for an unknown level or unless ``1e-30 <= low <= high <= 1e30``.

    Source: META_TRAINING section 6.
    """

    level: str = "global"
    low: float = 1e-3
    high: float = 1e3

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise unknown("augmentation.level", self.level, LEVELS)
        check_range(self.low, self.high)

    def own(self, key: Array, inner: PyTree) -> PyTree:
        """Draws the scale: a scalar, or a tree like the parameters."""
        if self.level == "none":
            return jnp.ones(())
        if self.level == "global":
            return log_uniform(key, (), self.low, self.high)

        def scale(key: Array, leaf: jax.ShapeDtypeStruct) -> Array:
            return log_uniform(key, leaf.shape if self.level == "parameter" else (), self.low, self.high)

        return each(scale, key, parameters(self.task, inner))


def parameters(task: Task, sample: PyTree) -> PyTree:
    """Returns shape and dtype of a task's parameters, as a tree of ``jax.ShapeDtypeStruct``."""
    return jax.eval_shape(lambda key: task.init(key, sample)[0], jax.random.key(0))


def each(draw: Callable[[Array, PyTree], Array], key: Array, tree: PyTree) -> PyTree:
    """Maps ``draw(key of the leaf, leaf)`` over a tree."""
    leaves, treedef = jax.tree.flatten(tree)
    drawn = [draw(jax.random.fold_in(key, i), leaf) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(treedef, drawn)


def _map(function: Callable[[Array, Array], Array], params: PyTree, scale: PyTree) -> PyTree:
    if jax.tree_util.treedef_is_leaf(jax.tree.structure(scale)):
        return jax.tree.map(lambda p: function(p, scale), params)
    return jax.tree.map(function, params, scale)
