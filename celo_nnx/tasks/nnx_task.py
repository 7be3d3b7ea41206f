"""A user's own task: an NNX model, a loss function and arrays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from celo_nnx.errors import require
from celo_nnx.interfaces import Array, PyTree, Task
from celo_nnx.tasks.image_mlp import pick_examples


@dataclasses.dataclass(frozen=True, eq=False)
class ModuleTask(Task):
    """A task made of an NNX model constructor and a loss function.

    The model's ``nnx.Param`` variables are the parameters; its other variables (batch statistics, say) are
    the model state. Random state is neither: the model's ``Rngs`` get new keys at every loss, from the
    loss's key. Every instance is a task of its own: families that shall run as one batch share the instance.

    Attributes:
      make: builds the model from ``nnx.Rngs``, in training mode.
      objective: ``(model, batch, key) -> scalar`` training loss; may change the model's state.
      batch_size: examples a batch.
      loss_limit: the meta-loss is cut to ``[-loss_limit, loss_limit]``; NaN counts as ``loss_limit``.
        Choose it a little above the loss of an untrained model.

    Example:
      >>> def mean_square(model, batch, key):
      ...     return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)
      >>> task = ModuleTask(lambda rngs: nnx.Linear(3, 1, rngs=rngs), mean_square, 8, loss_limit=10.0)
      >>> sorted(task.init(jax.random.key(0))[0])
      ['bias', 'kernel']
    """

    make: Callable[[nnx.Rngs], nnx.Module]
    objective: Callable[[Any, PyTree, Array], Array]
    batch_size: int
    loss_limit: float
    _graphdef: Any = dataclasses.field(init=False, repr=False)
    _random: PyTree = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Checks the values and traces the model once, for its structure."""
        good = isinstance(self.batch_size, int) and self.batch_size >= 1
        require(good, "batch_size", self.batch_size, "an integer >= 1")
        good = isinstance(self.loss_limit, (int, float)) and 0 < self.loss_limit < math.inf
        require(good, "loss_limit", self.loss_limit, "a finite number > 0")
        abstract = nnx.eval_shape(lambda key: self.make(nnx.Rngs(key)), jax.random.key(0))
        graphdef, _, random, _ = nnx.split(abstract, nnx.Param, nnx.RngState, ...)
        object.__setattr__(self, "_graphdef", graphdef)
        object.__setattr__(self, "_random", nnx.to_pure_dict(random))

    def init(self, key: Array, sample: PyTree = ()) -> tuple[PyTree, PyTree]:
        """Returns (parameters, model state) of a new model, as pure dicts."""
        _, params, _, rest = nnx.split(self.make(nnx.Rngs(key)), nnx.Param, nnx.RngState, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(rest)

    def loss(
        self, params: PyTree, state: PyTree, key: Array, batch: PyTree, sample: PyTree = ()
    ) -> tuple[Array, PyTree, dict[str, Array]]:
        """Returns (objective, next model state, no auxiliary scalars)."""
        key, model_key = jax.random.split(key)
        leaves, structure = jax.tree.flatten(self._random)
        fresh = [
            jax.random.fold_in(model_key, i)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else jnp.zeros(leaf.shape, leaf.dtype)
            for i, leaf in enumerate(leaves)
        ]
        model = nnx.merge(self._graphdef, params, jax.tree.unflatten(structure, fresh), state)
        value = self.objective(model, batch, key)
        rest = nnx.state(model, nnx.Not(nnx.Any(nnx.Param, nnx.RngState)))
        return value, nnx.to_pure_dict(rest), {}

    def pick(self, key: Array, start: Array, count: Array) -> Array:
        """Picks ``batch_size`` examples with replacement from ``start .. start+count-1``."""
        return pick_examples(key, start, count, self.batch_size)

    def normalize(self, loss: Array) -> Array:
        """Returns ``clip(loss, -loss_limit, loss_limit)``, NaN becoming the upper bound."""
        limit = self.loss_limit
        return jnp.where(jnp.isnan(loss), limit, jnp.clip(loss, -limit, limit)).astype(jnp.float32)
