"""Momentum at several time scales."""

from __future__ import annotations

from celo_nnx.components.accumulators.bank import PlaneBank


class Momentum(PlaneBank):
    """``m_k <- d_k m_k + (1 - d_k) g``. State and reading: ``[k, *S]`` (OPTIMIZERS 1.5).

    Learned decays are not kept in [0, 1], as published.

    Example:
      >>> Momentum(decays=(0.9, 0.99)).size
      2
    """

    limited = False
