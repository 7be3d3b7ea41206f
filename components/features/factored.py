"""Groups of the factored second moment: slots 7 and 9 to 13 of OPTIMIZERS section 1.6.

Celo2 shows the last five only for factored tensors; ``unfactored=True`` shows ``v_diag`` in the place of
rows and columns instead, as Celo and VeLO do.
"""

from __future__ import annotations

import jax
from jax import lax

from celo_nnx.errors import require
from celo_nnx.interfaces import Feature, TensorView

Array = jax.Array


class FactoredGradient(Feature):
    """``g R_k C_k``, or ``g srs(v_diag,k + 1e-9)`` for an unfactored tensor."""

    def width(self, banks: dict[str, int]) -> int:
        return banks["factored"]

    def planes(self, view: TensorView) -> list[Array]:
        reading = view.stats["factored"]
        bank = reading.row if reading.diagonal is None else reading.diagonal
        return [view.grad * reading.preconditioner(k, raw=True) for k in range(bank.shape[0])]


class Factor(Feature):
    """A row or column average as it is; the subclass says which.

    Args:
      unfactored: show ``v_diag`` for unfactored tensors; otherwise they have no planes here.
    """

    which = "row"

    def __init__(self, *, unfactored: bool = False) -> None:
        self.unfactored = bool(unfactored)

    def width(self, banks: dict[str, int]) -> int:
        return banks["factored"]

    def planes(self, view: TensorView) -> list[Array]:
        reading = view.stats["factored"]
        if reading.diagonal is not None:
            return list(reading.diagonal) if self.unfactored else []
        return list(getattr(reading, self.which))


class Row(Factor):
    """``v_row`` repeated along axis d0: constant along it, so a plane of size 1 there."""


class Column(Factor):
    """``v_col`` repeated along axis d1."""

    which = "column"


class RsqrtRow(Factor):
    """``1 / sqrt(v_row + eps)``.

    Args:
      eps: above 0.
      unfactored: as in :class:`Factor`.
    """

    def __init__(self, *, eps: float = 1e-8, unfactored: bool = False) -> None:
        super().__init__(unfactored=unfactored)
        require(eps > 0, "eps", eps, "a number above 0")
        self.eps = float(eps)

    def planes(self, view: TensorView) -> list[Array]:
        return [lax.rsqrt(x + self.eps) for x in super().planes(view)]


class RsqrtColumn(RsqrtRow):
    """``1 / sqrt(v_col + eps)``."""

    which = "column"


class FactoredMomentum(Feature):
    """``m_k R_k C_k``; for unfactored tensors nothing, or ``m_k / sqrt(v_diag,k + eps)``.

    Args:
      unfactored: whether unfactored tensors have planes here.
      eps: 0 or more (Celo and VeLO 0, adafac MLP 1e-6); only read where ``unfactored``.
    """

    def __init__(self, *, unfactored: bool = False, eps: float = 0.0) -> None:
        require(eps >= 0, "eps", eps, "a number of at least 0")
        self.unfactored = bool(unfactored)
        self.eps = float(eps)

    def width(self, banks: dict[str, int]) -> int:
        require(
            banks["momentum"] == banks["factored"],
            "factored.decays",
            banks["factored"],
            f"as many decays as momentum has ({banks['momentum']}) for the group factored_momentum",
        )
        return banks["momentum"]

    def planes(self, view: TensorView) -> list[Array]:
        momentum, reading = view.stats["momentum"], view.stats["factored"]
        if reading.diagonal is None:
            return [m * reading.preconditioner(k) for k, m in enumerate(momentum)]
        if not self.unfactored:
            return []
        return [m * lax.rsqrt(reading.diagonal[k] + self.eps) for k, m in enumerate(momentum)]
