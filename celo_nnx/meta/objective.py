"""Meta-objectives: which losses of an inner training count, on which data, and on which scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from celo_nnx.errors import UserError, is_number, require, unknown
from celo_nnx.interfaces import Array, Family, Task
from celo_nnx.meta.unroll import Problems, Record

SPLITS = ("train", "validation", "test")
STEPS = ("all", "last")
SCALES = ("task", "first", "log")
TINY = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """The meta-loss of a step, and which steps count.

    A loss first passes through its task's normalizer, which makes it finite. The objective of a trajectory is
    the mean of the meta-losses of its counted steps, in each truncation.

    Attributes:
      split: the examples of the meta-loss. ``train`` takes the loss of the training batch, before its
        update, which costs nothing; another split takes the same parameters on a fresh batch of it, which
        costs a forward pass a step.
      steps: ``all`` steps count, or only the ``last`` of each trajectory. With ``last`` a truncation in
        which no trajectory ends has no gradient and no meta-loss (NaN); full ES takes the loss after the
        last update.
      scale: ``task`` leaves the normalized loss; ``first`` divides it by the loss of the trajectory's first
        step, so that every problem starts at 1; ``log`` takes its logarithm.
      clip: the meta-loss is cut at this; 0 for no cut.

    Raises:
      UserError: for an unknown word, or a negative clip.

    Example:
      >>> Objective(split="validation", steps="last").split
      'validation'
    """

    split: str = "train"
    steps: str = "all"
    scale: str = "task"
    clip: float = 0.0

    def __post_init__(self) -> None:
        for name, known in (("split", SPLITS), ("steps", STEPS), ("scale", SCALES)):
            if getattr(self, name) not in known:
                raise unknown(f"meta.objective.{name}", getattr(self, name), known)
        legal = "a finite number >= 0 (0 for no cut)"
        require(is_number(self.clip) and self.clip >= 0, "meta.objective.clip", self.clip, legal)

    def check(self, families: Sequence[Family]) -> None:
        """Checks that every family has the split.

        Raises:
          UserError: naming the family that lacks it.
        """
        for family in families:
            if not getattr(family, self.split):
                have = [name for name in SPLITS if getattr(family, name)]
                hint = "; tasks.validation=0.1 holds a tenth out" if self.split == "validation" else ""
                raise UserError(
                    f"meta.objective.split = {self.split!r}: task family {family.name!r} has no such split, "
                    f"only {' and '.join(have)}{hint}"
                )

    def __call__(
        self, task: Task, record: Record, problems: Problems, steps: Array | int
    ) -> tuple[Array, Array, Array]:
        """Returns the meta-losses of a truncation.

        Args:
          task: whose normalizer is used.
          record: of :func:`celo_nnx.meta.unroll.unroll`.
          problems: the pairs before the truncation.
          steps: steps that the truncation has done, ``T`` or fewer.

        Returns:
          (meta-losses ``[T, N, 2]``, whether a step counts ``[T, N]``, the losses of the trajectories' first
          steps as the next truncation has to know them ``[N]``).
        """
        raw = record.loss if record.held is None else record.held
        loss = jax.vmap(task.normalize)(raw.reshape(-1)).reshape(raw.shape)
        divisor, first = self._first(loss[..., 0], record.mask, problems.first, steps)
        loss = self.rescale(loss, divisor[..., None])
        return loss, record.mask & record.done if self.steps == "last" else record.mask, first

    def rescale(self, loss: Array, first: Array) -> Array:
        """Returns the meta-loss of a normalized loss, given its trajectory's first one."""
        if self.scale == "first":
            loss = loss / jnp.maximum(jnp.abs(first), TINY)
        elif self.scale == "log":
            loss = jnp.log(jnp.maximum(loss, TINY))
        return jnp.minimum(loss, self.clip) if self.clip else loss

    def _first(self, loss: Array, mask: Array, before: Array, steps: Array | int) -> tuple[Array, Array]:
        """The first loss of the trajectory that each step belongs to, ``[T, N]``, and after the last."""
        if self.scale != "first":
            return loss, before
        times = jnp.arange(len(loss))[:, None]
        # A trajectory begins with the step after a reset, or where none has been seen.
        resets = jnp.concatenate([jnp.isnan(before)[None], ~mask[:-1]])
        begin = lax.cummax(jnp.where(resets & (times < steps), times, -1), axis=0)
        divisor = jnp.where(begin >= 0, jnp.take_along_axis(loss, jnp.maximum(begin, 0), 0), before)
        divisor = lax.stop_gradient(divisor)
        return divisor, jnp.where(mask[steps - 1], divisor[steps - 1], jnp.nan)
