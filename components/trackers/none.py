"""No look at the loss."""

from __future__ import annotations

from celo_nnx.interfaces import Tracker


class NoTracker(Tracker):
    """Says nothing, needs nothing."""

    needs_value = False
