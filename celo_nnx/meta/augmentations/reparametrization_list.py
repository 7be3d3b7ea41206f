"""Parameters in other units, of several kinds."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from celo_nnx.errors import UserError, require, unknown
from celo_nnx.interfaces import Array, PyTree
from celo_nnx.meta.augmentations.base import check_range
from celo_nnx.meta.augmentations.reparametrization import LEVELS, Scaled, each, parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReparametrizedList(Scaled):
    """Reparametrization by one of a list of levels and ranges, drawn for every trajectory.

    With ``c`` uniform over the list, ``s = exp(U(ln low_c, ln high_c))`` at ``level_c``; see
    :class:`~celo_nnx.meta.augmentations.reparametrization.Reparametrized`.

    Attributes:
      task: the task that is wrapped.
      choices: ``(level, low, high)`` each; one that is listed twice is drawn twice as often. The range of
        level ``none`` says nothing, its scale is 1.

    Raises:
      UserError: for an empty list, an unknown level or a range that is none.

    Source: META_TRAINING section 6, with the range drawn for each trajectory.
    """

    choices: tuple[tuple[str, float, float], ...] = (
        ("none", 1.0, 1.0),
        ("global", 1e-3, 1e3),
        ("tensor", 1e-3, 1e3),
        ("parameter", 1e-3, 1e3),
    )

    def __post_init__(self) -> None:
        listed = isinstance(self.choices, (tuple, list)) and len(self.choices) > 0
        require(listed, "augmentation.choices", self.choices, "a non-empty list of (level, low, high)")
        for choice in self.choices:
            if not isinstance(choice, (tuple, list)) or len(choice) != 3:
                raise UserError(f"{choice!r} of augmentation.choices must be (level, low, high)")
            if choice[0] not in LEVELS:
                raise unknown("level in augmentation.choices", choice[0], LEVELS)
            check_range(*choice[1:])
        object.__setattr__(self, "choices", tuple(tuple(choice) for choice in self.choices))

    def own(self, key: Array, inner: PyTree) -> PyTree:
        """Draws the scale, a tree like the parameters; leaves are scalars where no level needs more."""
        names, lows, highs = zip(*self.choices, strict=True)
        choice_key, all_key, leaf_key = jax.random.split(key, 3)
        choice = jax.random.randint(choice_key, (), 0, len(names))
        level = jnp.array([LEVELS.index(name) for name in names])[choice]
        low, high = (jnp.array([math.log(x) for x in bound])[choice] for bound in (lows, highs))
        common = jax.random.uniform(all_key)

        def scale(key: Array, leaf: jax.ShapeDtypeStruct) -> Array:
            tensor_key, key = jax.random.split(key)
            u = jnp.where(level == LEVELS.index("tensor"), jax.random.uniform(tensor_key), common)
            if "parameter" in names:
                own = jax.random.uniform(key, leaf.shape)
                u = jnp.where(level == LEVELS.index("parameter"), own, jnp.broadcast_to(u, leaf.shape))
            return jnp.exp(jnp.where(level == LEVELS.index("none"), 0.0, low + (high - low) * u))

        return each(scale, leaf_key, parameters(self.task, inner))
