"""Image autoencoding by a multilayer perceptron with a bottleneck."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from celo_nnx.errors import is_count, require
from celo_nnx.interfaces import Array, PyTree, Task
from celo_nnx.tasks.fields import (
    ACTIVATIONS,
    INITIALIZATIONS,
    check_counts,
    check_names,
    check_positive,
    check_widths,
    clipped,
    pick_examples,
)
from celo_nnx.tasks.image_mlp import dense, initial_dense

# name -> the loss of an output of 1/2 everywhere on the worst target: what the normalizer counts in
OBJECTIVES = {"sigmoid": math.log(2), "mean_square": 0.25}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoencoder(Task):
    """An MLP ``features - hidden... - features`` that returns its input, pixels in [0, 1].

    With logits ``z`` and pixels ``x``, the loss is the mean over pixels and images of

    - ``sigmoid``: ``-x ln s(z) - (1 - x) ln(1 - s(z))``. Its floor is the mean entropy of the pixels, which
      depends on the data: what makes a family fills it in.
    - ``mean_square``: ``(s(z) - x)^2``, with floor 0.

    Parameters as in :class:`~celo_nnx.tasks.image_mlp.ImageMLP`.

    Attributes:
      features: length of a flattened image.
      hidden: widths of the hidden layers, the bottleneck among them.
      objective: ``sigmoid`` or ``mean_square``.
      batch_size, activation, initialization: as in ``ImageMLP``.
      normalizer_clip: the meta-loss is cut at this many times ``ln 2`` or 1/4, the losses at the start.
      floor: the lowest loss; tasks that differ in it alone are equal, so that they share a batch.

    Example:
      >>> task = Autoencoder(features=64, hidden=(16, 4, 16))
      >>> task.init(jax.random.key(0))[0]["linear_3"]["w"].shape
      (16, 64)
    """

    features: int
    hidden: tuple[int, ...] = (32, 8, 32)
    objective: str = "sigmoid"
    batch_size: int = 64
    activation: str = "relu"
    initialization: str = "cut_normal"
    normalizer_clip: float = 1.5
    floor: float = dataclasses.field(default=0.0, compare=False)

    def __post_init__(self) -> None:
        """Checks every value; raises :class:`~celo_nnx.errors.UserError`."""
        require(is_count(self.features), "features", self.features, "an integer >= 1")
        check_widths(self, "hidden")
        check_counts(self, "batch_size")
        check_positive(self, "normalizer_clip")
        check_names(self, activation=ACTIVATIONS, initialization=INITIALIZATIONS, objective=OBJECTIVES)

    @staticmethod
    def fields_of(side: int, colors: int, classes: int) -> dict[str, int]:
        """Returns the fields that images of this size decide."""
        return {"features": side * side * colors}

    def floor_of(self, x: np.ndarray) -> float:
        """Returns the lowest possible mean loss over images ``[n, features]``."""
        if self.objective != "sigmoid":
            return 0.0
        x = np.clip(np.asarray(x, np.float64), 1e-300, 1.0)
        rest = np.clip(1.0 - x, 1e-300, 1.0)
        return float(np.mean(-x * np.log(x) - rest * np.log(rest)))

    def init(self, key: Array, sample: PyTree = ()) -> tuple[PyTree, PyTree]:
        """Returns (parameters, empty model state)."""
        return initial_dense(key, (self.features, *self.hidden, self.features), self.initialization), {}

    def loss(
        self, params: PyTree, state: PyTree, key: Array, batch: PyTree, sample: PyTree = ()
    ) -> tuple[Array, PyTree, dict[str, Array]]:
        """Returns (mean loss of ``batch = {"x": [n, features]}``, state, no auxiliary scalars)."""
        z = batch["x"]
        for i in range(len(self.hidden)):
            z = ACTIVATIONS[self.activation](dense(params[f"linear_{i}"], z))
        z = dense(params[f"linear_{len(self.hidden)}"], z)
        if self.objective == "sigmoid":
            errors = optax.sigmoid_binary_cross_entropy(z, batch["x"])
        else:
            errors = (jax.nn.sigmoid(z) - batch["x"]) ** 2
        return jnp.mean(errors), state, {}

    def pick(self, key: Array, start: Array, count: Array) -> Array:
        """Picks ``batch_size`` images with replacement from ``start .. start+count-1``."""
        return pick_examples(key, start, count, self.batch_size)

    def normalize(self, loss: Array) -> Array:
        """Returns the loss cut to 0 and ``normalizer_clip`` times the start's, NaN the upper bound."""
        return clipped(loss, 0.0, self.normalizer_clip * OBJECTIVES[self.objective])
