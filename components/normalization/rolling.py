"""Division by a root mean square that is averaged over the updates."""

from __future__ import annotations

from celo_nnx.components.normalization.second_moment import SecondMomentNorm
from celo_nnx.errors import require


class RollingNorm(SecondMomentNorm):
    """``y = gain x / sqrt(eps + v_t / (1 - decay^t))``, ``v_t`` a running average of ``mean_A(x^2)``.

    For the step only. A step that is larger than those before it stays larger, unlike with
    ``second_moment``, which makes every step of one size. One number a tensor (or row, or column) is kept in
    the optimizer's state, as float32.

    Args:
      decay: at least 0 and below 1; 0 is ``second_moment``.
      axes, eps, gain: as in :class:`~celo_nnx.components.normalization.second_moment.SecondMomentNorm`.

    Example:
      >>> RollingNorm(decay=0.9).decay
      0.9
    """

    def __init__(
        self, *, decay: float = 0.99, axes: str = "matrix", eps: float = 1e-9, gain: float = 1.0
    ) -> None:
        super().__init__(axes=axes, eps=eps, gain=gain)
        require(0 <= decay < 1, "decay", decay, "a number of at least 0 and below 1")
        self.decay = float(decay)
