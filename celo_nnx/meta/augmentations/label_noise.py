"""Wrong labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from celo_nnx.errors import UserError, is_count, require
from celo_nnx.interfaces import Array, PyTree
from celo_nnx.meta.augmentations.base import Augmentation, check_range


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelNoise(Augmentation):
    """Labels replaced by a random class, the share of them constant within a trajectory.

    Each entry of ``batch["y"]`` becomes, with probability ``p = U(low, high)`` drawn for the trajectory, a
    class drawn uniformly (the right one among them). Which ones is drawn anew in every step, from the loss's
    key; the training loss, which optimizer and meta-loss see, is that of the labels after it.

    Attributes:
      task: the task that is wrapped.
      low, high: range of the probability; equal for one that does not vary.
      classes: number of classes; 0 takes the wrapped task's own, its attribute ``classes``.

    Raises:
      UserError: unless ``0 <= low <= high <= 1``, for a number of classes that is missing, below 2 or not the
        task's, and with the first batch for one without integer labels ``y``.
    """

    low: float = 0.0
    high: float = 0.5
    classes: int = 0

    def __post_init__(self) -> None:
        check_range(self.low, self.high, 0.0, 1.0)
        task = self.task
        while isinstance(task, Augmentation):
            task = task.task
        own = getattr(task, "classes", 0)
        number = self.classes if self.classes != 0 else own
        legal = f"an integer >= 2, or 0 for the task's own ({own or 'this task names none'})"
        fits = is_count(number) and number >= 2 and own in (0, number)
        require(fits, "augmentation.classes", self.classes, legal)
        object.__setattr__(self, "classes", number)

    def own(self, key: Array, inner: PyTree) -> Array:
        """Draws the probability."""
        return jax.random.uniform(key, minval=self.low, maxval=self.high)

    def loss(
        self, params: PyTree, state: PyTree, key: Array, batch: PyTree, sample: PyTree = ()
    ) -> tuple[Array, PyTree, dict[str, Array]]:
        """Returns the task's loss on the batch with noisy labels."""
        labels = batch.get("y") if isinstance(batch, Mapping) else None
        if labels is None or not jnp.issubdtype(labels.dtype, jnp.integer):
            raise UserError("augmentation 'label_noise' needs batches with integer labels 'y'")
        noise_key, key = jax.random.split(key)
        # One draw for both questions: each hash inside the inner step is a loop of its own.
        chance, other = jax.random.uniform(noise_key, (2, *labels.shape))
        other = (other * self.classes).astype(labels.dtype)
        labels = jnp.where(chance < sample["own"], other, labels)
        return super().loss(params, state, key, {**batch, "y": labels}, sample)
