"""Celo-Adam a second time (OPTIMIZERS section 3): Celo's schedule over Adam, without an MLP."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from celo_nnx.interfaces import Array
from celo_nnx.naive_zoo.celo import NaiveCelo, Options
from celo_nnx.naive_zoo.recurrent import dense
from celo_nnx.naive_zoo.tensors import Axes
from celo_nnx.naive_zoo.trackers import power


@dataclasses.dataclass(frozen=True, eq=False)
class NaiveCeloAdam(NaiveCelo):
    """Celo-Adam, tensor by tensor; theta has a schedule only.

    Attributes:
      options: as Celo's; what concerns the MLP is not looked at.
      eps: added outside the root, whose own floor 1e-10 is the larger one.
      bias_correction: of both moments, by the first decay of their bank whatever the channel.
    """

    options: Options = Options(momentum=(0.9,), rms=(0.999,), parameter_scale=False)
    eps: float = 1e-8
    bias_correction: bool = True

    def heads(self, hidden: Array) -> tuple[None, Array]:
        """Returns no controls and the rates ``[tensors]``."""
        return None, 0.1 * jnp.exp(dense(self.theta["schedule"]["step"], hidden)[:, 0])

    def step(
        self, p: Array, seen: dict[str, Any], axes: Axes, weights: dict[str, Any] | None, rate: Array
    ) -> Array:
        """Returns a tensor's step, equations CA1 to CA3, of the banks' last channels."""
        options, m, v = self.options, seen["m"][..., -1], seen["rms"][..., -1]
        if self.bias_correction:
            s = seen["count"] + 1
            m = m / (1.0 - power(np.float32(options.momentum[0]), s))
            v = v / (1.0 - power(np.float32(options.rms[0]), s))
        step = m * (options.step_mult * rate / (self.eps + jnp.sqrt(v + 1e-10)))
        return step * self.scale(p)
