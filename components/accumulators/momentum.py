"""Momentum at several time scales."""

from __future__ import annotations

from celo_nnx.components.accumulators.bank import PlaneBank


class Momentum(PlaneBank):
    """``m_k <- d_k m_k + (1 - d_k) g``. State and reading: ``[k, *S]`` (OPTIMIZERS 1.5).

    Args:
      decays, learned, bias_correction: as in :class:`Bank`.
      limited: whether learned decays are kept in [0, 1]: in muLO, but not in the published adafac MLP.

    Example:
      >>> Momentum(decays=(0.9, 0.99)).size
      2
    """

    def __init__(
        self,
        *,
        decays: tuple[float, ...] = (0.9, 0.99, 0.999),
        learned: bool = False,
        bias_correction: bool = False,
        limited: bool = False,
    ) -> None:
        super().__init__(decays=decays, learned=learned, bias_correction=bias_correction)
        self.limited = bool(limited)
