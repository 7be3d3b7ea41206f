"""A constant limit for every element, or none."""

from __future__ import annotations

from celo_nnx.errors import require
from celo_nnx.interfaces import Clip


class Elementwise(Clip):
    """``g <- clip(g, -limit, limit)``.

    Args:
      limit: above 0; published optimizers have 1000.

    Example:
      >>> Elementwise(limit=10.0).limit({})
      10.0
    """

    def __init__(self, *, limit: float = 1000.0) -> None:
        require(limit > 0, "limit", limit, "a number above 0")
        self.bound = float(limit)

    def limit(self, state: dict) -> float:
        return self.bound


class Unlimited(Clip):
    """Gradients as they are (adafac MLP).

    Nothing keeps a gradient's square within float32: an element above about 1.8e19 overflows there, and the
    tensor's update is NaN.
    """

    def limit(self, state: dict) -> None:
        return None
