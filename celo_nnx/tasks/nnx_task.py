"""Tasks whose model is an NNX module, a user's own among them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from celo_nnx.errors import told
from celo_nnx.interfaces import Array, PyTree, Task
from celo_nnx.tasks.fields import (
    INITIALIZATIONS,
    NORMALIZATIONS,
    check_counts,
    check_positive,
    clipped,
    pick_examples,
)


class ModelTask(Task):
    """A task whose model is an NNX module; a subclass is a frozen dataclass that says which, and its loss.

    The model's ``nnx.Param`` variables are the parameters; its other variables (batch statistics, say) are
    the model state. Random state is neither: the model's ``Rngs`` get new keys at every loss, from the
    loss's key.

    Attributes:
      batch_size: examples a batch.
    """

    batch_size: int

    def new_model(self, rngs: nnx.Rngs) -> nnx.Module:
        """Builds the model, in training mode."""
        raise NotImplementedError

    def model_loss(self, model: Any, batch: PyTree, key: Array) -> Array:
        """Returns the scalar loss of a batch; may change the model's state."""
        raise NotImplementedError

    def init(self, key: Array, sample: PyTree = ()) -> tuple[PyTree, PyTree]:
        """Returns (parameters, model state) of a new model, as pure dicts."""
        _, params, _, rest = nnx.split(self.new_model(nnx.Rngs(key)), nnx.Param, nnx.RngState, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(rest)

    def _merge(self, params: PyTree, state: PyTree, key: Array) -> Any:
        """Returns the model with these variables and random state from the key."""
        graphdef, random = _structure(self)
        leaves, structure = jax.tree.flatten(random)
        fresh = [
            jax.random.fold_in(key, i)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else jnp.zeros(leaf.shape, leaf.dtype)
            for i, leaf in enumerate(leaves)
        ]
        return nnx.merge(graphdef, params, jax.tree.unflatten(structure, fresh), state)

    def loss(
        self, params: PyTree, state: PyTree, key: Array, batch: PyTree, sample: PyTree = ()
    ) -> tuple[Array, PyTree, dict[str, Array]]:
        """Returns (objective, next model state, no auxiliary scalars)."""
        key, model_key = jax.random.split(key)
        model = self._merge(params, state, model_key)
        value = self.model_loss(model, batch, key)
        rest = nnx.state(model, nnx.Not(nnx.Any(nnx.Param, nnx.RngState)))
        return value, nnx.to_pure_dict(rest), {}

    def evaluate(
        self, params: PyTree, state: PyTree, key: Array, batch: PyTree, sample: PyTree = ()
    ) -> Array:
        """Returns the objective of the model in evaluation mode: running statistics, no dropout."""
        key, model_key = jax.random.split(key)
        model = self._merge(params, state, model_key)
        model.eval()
        return self.model_loss(model, batch, key)

    def pick(self, key: Array, start: Array, count: Array) -> Array:
        """Picks ``batch_size`` examples with replacement from ``start .. start+count-1``."""
        return pick_examples(key, start, count, self.batch_size)


class LayeredTask(ModelTask):
    """A task whose fields say how the layers of its model start and how they are normalized.

    Attributes:
      initialization: of kernels, a key of :data:`~celo_nnx.tasks.fields.INITIALIZATIONS`; biases are zero.
      normalization: a key of :data:`~celo_nnx.tasks.fields.NORMALIZATIONS`.
    """

    initialization: str
    normalization: str

    def linear(self, fan_in: int, fan_out: int, rngs: nnx.Rngs, use_bias: bool = True) -> nnx.Linear:
        """Returns a dense layer that starts as the task says."""
        kernel_init = INITIALIZATIONS[self.initialization]
        return nnx.Linear(fan_in, fan_out, use_bias=use_bias, kernel_init=kernel_init, rngs=rngs)

    def norm(self, width: int, rngs: nnx.Rngs) -> Callable[[Array], Array]:
        """Returns the normalization layer over ``width`` features."""
        return NORMALIZATIONS[self.normalization](width, rngs)


@functools.lru_cache(maxsize=256)
def _structure(task: ModelTask) -> tuple[Any, PyTree]:
    """Traces a task's model once; returns its structure and the shapes of its random state."""
    abstract = nnx.eval_shape(lambda key: task.new_model(nnx.Rngs(key)), jax.random.key(0))
    graphdef, _, random, _ = nnx.split(abstract, nnx.Param, nnx.RngState, ...)
    return graphdef, nnx.to_pure_dict(random)


@dataclasses.dataclass(frozen=True, eq=False)
class ModuleTask(ModelTask):
    """A task made of an NNX model constructor and a loss function.

    Every instance is a task of its own: families that shall run as one batch share the instance.

    Attributes:
      make: builds the model from ``nnx.Rngs``, in training mode.
      objective: ``(model, batch, key) -> scalar`` training loss; may change the model's state.
      batch_size: examples a batch.
      loss_limit: the meta-loss is cut to ``[-loss_limit, loss_limit]``; NaN counts as ``loss_limit``.
        Choose it a little above the loss of an untrained model.
      floor: the lowest possible loss, None where it is not known.

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
    floor: float | None = None

    def __post_init__(self) -> None:
        """Checks the values and traces the model once, so that a mistake in it is told now."""
        check_counts(self, "batch_size")
        check_positive(self, "loss_limit")
        _structure(self)

    def new_model(self, rngs: nnx.Rngs) -> nnx.Module:
        """Builds the model."""
        with told("make(rngs) of a ModuleTask"):
            return self.make(rngs)

    def model_loss(self, model: Any, batch: PyTree, key: Array) -> Array:
        """Returns the objective."""
        with told("objective(model, batch, key) of a ModuleTask"):
            return self.objective(model, batch, key)

    def normalize(self, loss: Array) -> Array:
        """Returns ``clip(loss, -loss_limit, loss_limit)``, NaN becoming the upper bound."""
        return clipped(loss, -self.loss_limit, self.loss_limit)
