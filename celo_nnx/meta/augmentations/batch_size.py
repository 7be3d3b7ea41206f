"""Smaller batches."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from celo_nnx.errors import UserError, is_count, require
from celo_nnx.interfaces import Array, PyTree
from celo_nnx.meta.augmentations.base import Augmentation


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSize(Augmentation):
    """Batches of fewer different examples, as many in all steps of a trajectory.

    Of the task's ``B`` examples the first ``b = int(exp(U(ln minimum, ln(B + 1))))`` fill the batch again and
    again: example ``i`` becomes example ``i mod b``, so shapes stay and a mean over the batch has the
    variance of a smaller one. Where ``b`` does not divide ``B``, some examples count once more than others;
    the noise is then that of an equally weighted batch of at least ``8/9 b``.

    Every array of the task's batches must have the examples along the task's ``example_axis``. In a chain
    this stands before label noise, or the copies of an example get labels of their own.

    Attributes:
      task: the task that is wrapped.
      minimum: the smallest number of different examples.

    Raises:
      UserError: for a minimum below 1, and with the first batch for one above ``B``.
    """

    minimum: int = 1

    def __post_init__(self) -> None:
        require(is_count(self.minimum), "augmentation.minimum", self.minimum, "an integer >= 1")

    def own(self, key: Array, inner: PyTree) -> Array:
        """Draws where between the smallest and the whole batch, from ``[0, 1)`` on the logarithmic scale."""
        return jax.random.uniform(key)

    def loss(
        self, params: PyTree, state: PyTree, key: Array, batch: PyTree, sample: PyTree = ()
    ) -> tuple[Array, PyTree, dict[str, Array]]:
        """Returns the task's loss on the batch made of its first ``b`` examples."""
        axis = self.example_axis
        sizes = {jnp.shape(x)[axis : axis + 1] for x in jax.tree.leaves(batch)}
        if len(sizes) != 1 or sizes == {()}:
            raise UserError(
                f"augmentation 'batch_size' needs batches whose arrays have the examples along axis {axis}"
            )
        ((whole,),) = sizes
        legal = f"an integer from 1 to {whole}, the task's batch size"
        require(self.minimum <= whole, "augmentation.minimum", self.minimum, legal)
        low, high = math.log(self.minimum), math.log(whole + 1)
        size = jnp.exp(low + (high - low) * sample["own"]).astype(jnp.int32)
        # exp(log) may round to just below minimum, or to whole + 1
        rows = jnp.arange(whole) % jnp.clip(size, self.minimum, whole)
        at = (slice(None),) * axis + (rows,)
        batch = jax.tree.map(lambda x: jnp.asarray(x).at[at].get(mode="promise_in_bounds"), batch)
        return super().loss(params, state, key, batch, sample)
