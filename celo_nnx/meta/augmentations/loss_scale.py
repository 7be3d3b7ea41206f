"""Losses in other units."""

from __future__ import annotations

import dataclasses

from celo_nnx.interfaces import Array, PyTree
from celo_nnx.meta.augmentations.base import Augmentation, check_range, log_uniform


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossScale(Augmentation):
    """Loss and gradient multiplied by a random scale, constant within a trajectory.

    The loss is ``s l`` with ``s = exp(U(ln low, ln high))``; the meta-loss is that of ``l``, which
    :meth:`unscale` gives back.

    Attributes:
      task: the task that is wrapped.
      low, high: range of the scale.

    Raises:
      UserError: unless ``1e-30 <= low <= high <= 1e30``.
    """

    low: float = 1e-3
    high: float = 1e3

    def __post_init__(self) -> None:
        check_range(self.low, self.high)

    def own(self, key: Array, inner: PyTree) -> Array:
        """Draws the scale."""
        return log_uniform(key, (), self.low, self.high)

    def loss(
        self, params: PyTree, state: PyTree, key: Array, batch: PyTree, sample: PyTree = ()
    ) -> tuple[Array, PyTree, dict[str, Array]]:
        """Returns the task's loss times the scale."""
        loss, state, auxiliary = super().loss(params, state, key, batch, sample)
        return loss * sample["own"], state, auxiliary

    def unscale(self, loss: Array, sample: PyTree = ()) -> Array:
        """Returns the loss divided by the scale, as the wrapped task reports it."""
        return super().unscale(loss / sample["own"], sample)
