"""A Transformer language model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from celo_nnx.interfaces import Array
from celo_nnx.tasks.attention import Block, check_attention
from celo_nnx.tasks.language import LanguageTask, look_up


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerLM(LanguageTask):
    """Embedding plus learned positions, causal attention blocks, normalization, linear.

    Attributes:
      heads: of attention, a divisor of ``width``.
      expansion: hidden width of a block's MLP, in widths.

    Example:
      >>> params, _ = TransformerLM(vocabulary=5, length=6, width=8, heads=2).init(jax.random.key(0))
      >>> params["positions"].shape
      (6, 8)
    """

    activation: str = "gelu"
    normalization: str = "layer"
    heads: int = 4
    expansion: int = 4

    def __post_init__(self) -> None:
        """Checks every value."""
        super().__post_init__()
        check_attention(self)

    def new_model(self, rngs: nnx.Rngs) -> nnx.Module:
        """Builds the network."""
        return _Net(self, rngs)


class _Net(nnx.Module):
    def __init__(self, task: TransformerLM, rngs: nnx.Rngs) -> None:
        self.depth = task.depth
        self.embed = task.embed(rngs)
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (task.length, task.width)))
        for i in range(task.depth):
            setattr(self, f"block_{i}", Block(task, rngs))
        self.norm = task.norm(task.width, rngs)
        self.head = task.linear(task.width, task.vocabulary, rngs)

    def __call__(self, tokens: Array) -> Array:
        x = look_up(self.embed, tokens) + self.positions[...][None]
        mask = jnp.tri(tokens.shape[1], dtype=bool)[None, None]
        for i in range(self.depth):
            x = getattr(self, f"block_{i}")(x, mask)
        return self.head(self.norm(x))
