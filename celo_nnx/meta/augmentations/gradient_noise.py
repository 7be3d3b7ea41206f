"""Noisy gradients."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from celo_nnx.interfaces import Array, PyTree
from celo_nnx.meta.augmentations.base import Augmentation, check_range, log_uniform
from celo_nnx.meta.augmentations.reparametrization import each


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientNoise(Augmentation):
    """Gradients with noise relative to each entry, under an unchanged loss.

    Every entry ``g`` of the gradient becomes ``g (1 + r n)``, ``n`` from ``N(0, 1)`` anew for each entry and
    step, from the loss's key; ``r = exp(U(ln low, ln high))`` is drawn for the trajectory. So the mean of the
    gradient stays, its signal-to-noise ratio is ``1 / r`` in any units of loss and parameters, and it costs
    no second gradient. The noise depends on no parameter: derivatives of the noisy gradient, forward or
    reverse, are ``(1 + r n)`` times those of the gradient.

    Attributes:
      task: the task that is wrapped.
      low, high: range of the relative standard deviation.

    Raises:
      UserError: unless ``1e-30 <= low <= high <= 1e30``.
    """

    low: float = 0.01
    high: float = 1.0

    def __post_init__(self) -> None:
        check_range(self.low, self.high)

    def own(self, key: Array, inner: PyTree) -> Array:
        """Draws the relative standard deviation."""
        return log_uniform(key, (), self.low, self.high)

    def loss(
        self, params: PyTree, state: PyTree, key: Array, batch: PyTree, sample: PyTree = ()
    ) -> tuple[Array, PyTree, dict[str, Array]]:
        """Returns the task's loss; its gradient is noisy."""
        noise_key, key = jax.random.split(key)

        def noisy(key: Array, param: Array) -> Array:
            noise = jax.random.normal(key, jnp.shape(param), param.dtype)
            return _with_gradient_times(param, 1.0 + sample["own"].astype(param.dtype) * noise)

        return super().loss(each(noisy, noise_key, params), state, key, batch, sample)


# With the algebra of stop_gradient, p' + (p - p') m for p' = stop_gradient(p), the factor would enter second
# derivatives twice: a function's Hessian is symmetric, the derivative of a noisy gradient is not. This rule
# is linear in the tangent, so it transposes, and plain in the parameter, so the factor enters once whatever
# the order.
@jax.custom_jvp
def _with_gradient_times(param: Array, factor: Array) -> Array:
    """Returns ``param``; its derivative is ``factor``."""
    return param


@_with_gradient_times.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    param, factor = primals
    return param, tangents[0] * factor
