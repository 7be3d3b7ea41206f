"""Adam in the place of the MLP: Celo-Adam and NN-Adam."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from celo_nnx.errors import UserError, require
from celo_nnx.interfaces import Controls, UpdateRule

Array = jax.Array


class AdamRule(UpdateRule):
    """``a = m / (eps + sqrt(v + floor))``: the last planes of the groups ``momentum``, ``second_moment``.

    Bias correction is the accumulators' (OPTIMIZERS CA1, CA2); a schedule may set ``eps`` (H4). Nothing is
    learned, and features are not normalized.

    Args:
      widths: planes of each feature group, in order.
      context: ignored.
      key: ignored.
      eps: outside the root, 0 or more.
      floor: inside the root, 0 or more.
      scale_by_eps: multiply by ``1 + eps`` (NN-Adam).

    Raises:
      UserError: a feature group is missing, or a value out of range.
    """

    def __init__(
        self,
        *,
        widths: dict[str, int],
        context: dict[str, int],
        key: Array,
        eps: float = 1e-8,
        floor: float = 1e-10,
        scale_by_eps: bool = False,
    ) -> None:
        for name in ("momentum", "second_moment"):
            if name not in widths:
                raise UserError(f"features.groups lacks {name!r}, which the update rule 'adam' needs")
        require(eps >= 0, "eps", eps, "a number of at least 0")
        require(floor >= 0, "floor", floor, "a number of at least 0")
        self.eps, self.floor, self.scale_by_eps = float(eps), float(floor), bool(scale_by_eps)

    def prepare(
        self, groups: tuple[str, ...], scale: Array, context: dict[str, Array], controls: Controls
    ) -> dict[str, Array]:
        return {"eps": jnp.float32(self.eps) if controls.eps is None else controls.eps}

    def __call__(
        self, groups: dict[str, list[Array]], prepared: dict[str, Array], shape: tuple[int, ...]
    ) -> tuple[Array, None, list[Array]]:
        eps = prepared["eps"]
        gain = 1 + eps if self.scale_by_eps else 1.0
        factor = gain / (eps + jnp.sqrt(groups["second_moment"][-1] + self.floor))
        return groups["momentum"][-1] * factor, None, []

    def hand_made(self, **options: object) -> dict[str, Array]:
        if options:
            raise UserError(
                f"the update rule 'adam' has no theta, so theta_init takes no {sorted(options)[0]!r}"
            )
        return {}
