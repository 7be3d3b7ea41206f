"""Groups preconditioned by the elementwise second moment, ``r = 1 / sqrt(v + eps)``: slots 5, 6 and 8."""

from __future__ import annotations

import jax
from jax import lax

from celo_nnx.errors import require
from celo_nnx.interfaces import Feature, TensorView

Array = jax.Array


class Preconditioned(Feature):
    """A group that multiplies something by ``r``.

    Args:
      eps: added to the second moment inside the root, above 0 (Celo2 1e-8; Celo and VeLO 1e-6).
    """

    def __init__(self, *, eps: float = 1e-8) -> None:
        require(eps > 0, "eps", eps, "a number above 0")
        self.eps = float(eps)

    def factors(self, view: TensorView) -> list[Array]:
        """Returns ``r`` for each decay of the second moment."""
        return [lax.rsqrt(v + self.eps) for v in view.stats["second_moment"]]


class MomentumRms(Preconditioned):
    """``m_k r``: one plane for each momentum; ``r`` is matched by decay, or shared where there is one."""

    def width(self, banks: dict[str, int]) -> int:
        require(
            banks["second_moment"] in (1, banks["momentum"]),
            "second_moment.decays",
            banks["second_moment"],
            f"1 decay or as many as momentum has ({banks['momentum']}) for the group momentum_rms",
        )
        return banks["momentum"]

    def planes(self, view: TensorView) -> list[Array]:
        factors = self.factors(view)
        return [m * factors[k % len(factors)] for k, m in enumerate(view.stats["momentum"])]


class RsqrtSecondMoment(Preconditioned):
    """``r``: one plane for each decay of the second moment."""

    def width(self, banks: dict[str, int]) -> int:
        return banks["second_moment"]

    def planes(self, view: TensorView) -> list[Array]:
        return self.factors(view)


class GradientRms(Preconditioned):
    """``g r``: one plane for each decay of the second moment."""

    def width(self, banks: dict[str, int]) -> int:
        return banks["second_moment"]

    def planes(self, view: TensorView) -> list[Array]:
        return [view.grad * r for r in self.factors(view)]
