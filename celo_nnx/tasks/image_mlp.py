"""Image classification by a multilayer perceptron, any widths."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

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

__all__ = ["ACTIVATIONS", "ImageMLP", "dense", "initial_dense", "pick_examples"]


@dataclasses.dataclass(frozen=True)
class ImageMLP(Task):
    """An MLP ``features - hidden... - classes`` under mean softmax cross-entropy.

    Parameters: ``{"linear_0": {"b": [width], "w": [features, width]}, "linear_1": ...}``, the logits last;
    with layer normalization also ``"norm_0": {"bias": [width], "scale": [width]}`` and so on. A hidden layer
    is linear, normalization, activation.

    Attributes:
      features: length of a flattened image.
      hidden: widths of the hidden layers; empty for logistic regression.
      classes: number of classes.
      batch_size: examples a batch.
      activation: a key of :data:`ACTIVATIONS`.
      normalizer_clip: the meta-loss is cut at this many times ``ln(classes)``, the loss of a uniform guess.
      normalization: ``none`` or ``layer``.
      initialization: of weights, a key of :data:`~celo_nnx.tasks.fields.INITIALIZATIONS`; biases are zero.

    Example:
      >>> task = ImageMLP(features=64, hidden=(32,), classes=10)
      >>> sorted(task.init(jax.random.key(0))[0])
      ['linear_0', 'linear_1']

    Source: META_TRAINING sections 7 and 3 (the normalizer).
    """

    features: int
    hidden: tuple[int, ...] = (32,)
    classes: int = 10
    batch_size: int = 64
    activation: str = "relu"
    normalizer_clip: float = 1.5
    normalization: str = "none"
    initialization: str = "cut_normal"

    def __post_init__(self) -> None:
        """Checks every value; raises :class:`~celo_nnx.errors.UserError`."""
        require(is_count(self.features), "features", self.features, "an integer >= 1")
        check_widths(self, "hidden", least=0)
        check_counts(self, "batch_size")
        require(is_count(self.classes) and self.classes >= 2, "classes", self.classes, "an integer >= 2")
        check_positive(self, "normalizer_clip")
        tables = dict(activation=ACTIVATIONS, initialization=INITIALIZATIONS)
        check_names(self, **tables, normalization=("none", "layer"))

    @staticmethod
    def fields_of(side: int, colors: int, classes: int) -> dict[str, int]:
        """Returns the fields that images of this size decide."""
        return {"features": side * side * colors, "classes": classes}

    def init(self, key: Array, sample: PyTree = ()) -> tuple[PyTree, PyTree]:
        """Returns (parameters, empty model state)."""
        widths = (self.features, *self.hidden, self.classes)
        params = initial_dense(key, widths, self.initialization)
        if self.normalization == "layer":
            for i, width in enumerate(self.hidden):
                params[f"norm_{i}"] = {"bias": jnp.zeros((width,)), "scale": jnp.ones((width,))}
        return params, {}

    def logits(self, params: PyTree, x: Array) -> Array:
        """Returns the class scores ``[n, classes]`` of flat images ``[n, features]``."""
        for i in range(len(self.hidden)):
            x = dense(params[f"linear_{i}"], x)
            if self.normalization == "layer":
                x = _layer_norm(params[f"norm_{i}"], x)
            x = ACTIVATIONS[self.activation](x)
        return dense(params[f"linear_{len(self.hidden)}"], x)

    def loss(
        self, params: PyTree, state: PyTree, key: Array, batch: PyTree, sample: PyTree = ()
    ) -> tuple[Array, PyTree, dict[str, Array]]:
        """Returns (mean cross-entropy of ``batch = {"x": [n, features], "y": [n]}``, state, accuracy)."""
        # Classes lead: sums over ten classes are then whole vectors. One-hot and not take_along_axis: the
        # gradient of a gather is a scatter, slow on CPU under vmap.
        logits = self.logits(params, batch["x"]).T
        one_hot = jax.nn.one_hot(batch["y"], self.classes, dtype=logits.dtype, axis=0)
        loss = -jnp.mean(jnp.sum(one_hot * jax.nn.log_softmax(logits, axis=0), axis=0))
        accuracy = jnp.mean((jnp.argmax(logits, axis=0) == batch["y"]).astype(jnp.float32))
        return loss, state, {"accuracy": accuracy}

    def pick(self, key: Array, start: Array, count: Array) -> Array:
        """Picks ``batch_size`` examples with replacement from ``start .. start+count-1``."""
        return pick_examples(key, start, count, self.batch_size)

    def normalize(self, loss: Array) -> Array:
        """Returns ``clip(loss, 0, normalizer_clip ln(classes))``, NaN becoming the upper bound."""
        return clipped(loss, 0.0, self.normalizer_clip * math.log(self.classes))


def initial_dense(key: Array, widths: tuple[int, ...], initialization: str) -> dict[str, dict[str, Array]]:
    """Draws linear layers ``{"linear_0": {"b", "w"}, ...}`` of these widths."""
    keys = jax.random.split(key, len(widths) - 1)
    draw = INITIALIZATIONS[initialization]
    return {
        f"linear_{i}": {"b": jnp.zeros((pair[1],), jnp.float32), "w": draw(keys[i], pair, jnp.float32)}
        for i, pair in enumerate(zip(widths[:-1], widths[1:], strict=True))
    }


def dense(layer: PyTree, x: Array) -> Array:
    """Returns ``x @ w + b`` for ``x`` ``[n, fan_in]``."""
    return x @ layer["w"] + layer["b"][None, :]


def _layer_norm(layer: PyTree, x: Array) -> Array:
    centred = x - jnp.mean(x, -1, keepdims=True)
    scaled = centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-6)
    return scaled * layer["scale"][None, :] + layer["bias"][None, :]
