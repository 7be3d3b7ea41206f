"""The residual attention block that image and language models share."""

from __future__ import annotations

from typing import Any

from flax import nnx

from celo_nnx.errors import require
from celo_nnx.interfaces import Array
from celo_nnx.tasks.fields import ACTIVATIONS, INITIALIZATIONS, NORMALIZATIONS, check_counts


def check_attention(task: Any) -> None:
    """Checks the fields ``width``, ``depth``, ``heads`` and ``expansion`` of a task."""
    check_counts(task, "width", "depth", "heads", "expansion")
    require(task.width % task.heads == 0, "heads", task.heads, f"a divisor of width = {task.width}")


class Block(nnx.Module):
    """``x + A(N(x))``, then ``x + M(N(x))``: attention A, normalization N, and M linear, activation, linear.

    Attention has no biases: that of the keys would have no gradient.

    Args:
      task: with fields ``width``, ``heads``, ``expansion`` (of M's hidden layer), ``activation``,
        ``normalization``, ``initialization``.
      rngs: draws the parameters.
    """

    def __init__(self, task: Any, rngs: nnx.Rngs) -> None:
        kernel_init, width = INITIALIZATIONS[task.initialization], task.width
        self.activation = ACTIVATIONS[task.activation]
        self.norm_0 = NORMALIZATIONS[task.normalization](width, rngs)
        self.attention = nnx.MultiHeadAttention(
            task.heads,
            width,
            use_bias=False,
            decode=False,
            kernel_init=kernel_init,
            keep_rngs=False,
            rngs=rngs,
        )
        self.norm_1 = NORMALIZATIONS[task.normalization](width, rngs)
        self.linear_0 = nnx.Linear(width, task.expansion * width, kernel_init=kernel_init, rngs=rngs)
        self.linear_1 = nnx.Linear(task.expansion * width, width, kernel_init=kernel_init, rngs=rngs)

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Returns ``[n, t, width]`` of the same; ``mask`` ``[1, 1, t, t]`` is True where ``t`` may look."""
        x = x + self.attention(self.norm_0(x), mask=mask)
        return x + self.linear_1(self.activation(self.linear_0(self.norm_1(x))))
