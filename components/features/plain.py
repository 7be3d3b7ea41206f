"""Groups that show a quantity as it is: slots 0 to 4 of OPTIMIZERS section 1.6."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from celo_nnx.errors import require
from celo_nnx.interfaces import Feature, TensorView

Array = jax.Array


class Gradient(Feature):
    """The gradient ``g``: one plane."""

    def width(self, banks: dict[str, int]) -> int:
        return 1

    def planes(self, view: TensorView) -> list[Array]:
        return [view.grad]


class ClippedGradient(Feature):
    """``clip(g, -limit, limit)``: one plane.

    Args:
      limit: above 0.
    """

    def __init__(self, *, limit: float = 0.1) -> None:
        require(limit > 0, "limit", limit, "a number above 0")
        self.limit = float(limit)

    def width(self, banks: dict[str, int]) -> int:
        return 1

    def planes(self, view: TensorView) -> list[Array]:
        return [jnp.clip(view.grad, -self.limit, self.limit)]


class Parameter(Feature):
    """The parameter ``p``: one plane."""

    def width(self, banks: dict[str, int]) -> int:
        return 1

    def planes(self, view: TensorView) -> list[Array]:
        return [view.param]


class LogParameter(Feature):
    """``log(|p| + eps)``: one plane (RNN-MLP).

    Args:
      eps: above 0.
    """

    def __init__(self, *, eps: float = 1e-8) -> None:
        require(eps > 0, "eps", eps, "a number above 0")
        self.eps = float(eps)

    def width(self, banks: dict[str, int]) -> int:
        return 1

    def planes(self, view: TensorView) -> list[Array]:
        return [jnp.log(jnp.abs(view.param) + self.eps)]


class MomentumBank(Feature):
    """The momenta ``m_k``: one plane for each decay."""

    def width(self, banks: dict[str, int]) -> int:
        return banks["momentum"]

    def planes(self, view: TensorView) -> list[Array]:
        return list(view.stats["momentum"])


class SecondMomentBank(Feature):
    """The second moments ``v_k``: one plane for each decay."""

    def width(self, banks: dict[str, int]) -> int:
        return banks["second_moment"]

    def planes(self, view: TensorView) -> list[Array]:
        return list(view.stats["second_moment"])
