"""ELO's and muLO's rules a second time (OPTIMIZERS section 13): what they change of the adafactor MLP."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from celo_nnx.interfaces import Array, PyTree
from celo_nnx.naive_zoo.adafac_mlp import NaiveAdafacMLP
from celo_nnx.naive_zoo.tensors import Decays, named_leaves


@dataclasses.dataclass(frozen=True, eq=False)
class NaiveElo(NaiveAdafacMLP):
    """ELO, tensor by tensor: fixed decays, so that theta has an update rule only.

    Attributes:
      step_mult: the learning rate.
      weight_decay: decoupled: of the old parameters, times the learning rate.
    """

    weight_decay: float = 0.0

    def update(self, grads: PyTree, state: PyTree, params: PyTree, *, value: Array) -> tuple[PyTree, PyTree]:
        """Returns (updates to add, next state); lr (a exp(exp_mult u) + wd p) is subtracted."""
        updates, state = super().update(grads, state, params, value=value)
        rate = self.step_mult * self.weight_decay
        return jax.tree.map(lambda u, p: u - rate * p, updates, params), state

    def _decays(self) -> Decays:
        return {"momentum": self.momentum, "rms": self.rms, "factored": self.factored}


def base_width(path: str, shape: tuple[int, ...]) -> float:
    """The width multiplier where the model is as wide as the one that was meta-trained on."""
    return 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class NaiveMulo(NaiveAdafacMLP):
    """muLO, tensor by tensor, without weight decay.

    Attributes:
      step_mult: at inference, where the learning rate is 1.
      width: ``(path, shape) -> multiplier`` that the tensor's learning rate is divided by.
    """

    step_mult: float = 0.01
    width: Callable[[str, tuple[int, ...]], float] = base_width

    def update(self, grads: PyTree, state: PyTree, params: PyTree, *, value: Array) -> tuple[PyTree, PyTree]:
        """Returns (updates to add, next state)."""
        updates, state = super().update(grads, state, params, value=value)
        leaves, treedef = named_leaves(params)
        widths = treedef.unflatten([self.width(path, p.shape) for path, p in leaves])
        return jax.tree.map(lambda u, width: u / width, updates, widths), state

    def _decays(self) -> Decays:
        """Returns learned decays in [0, 1], the momenta's as well."""
        return {name: jnp.clip(d, 0.0, 1.0) for name, d in super()._decays().items()}
