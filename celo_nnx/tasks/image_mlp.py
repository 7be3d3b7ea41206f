"""Image classification by a multilayer perceptron, any widths."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from celo_nnx.errors import require, unknown
from celo_nnx.interfaces import Array, PyTree, Task

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
}
MAX_WIDTH = 65_536


@dataclasses.dataclass(frozen=True)
class ImageMLP(Task):
    """An MLP ``features - hidden... - classes`` under mean softmax cross-entropy.

    Parameters: ``{"linear_0": {"b": [width], "w": [features, width]}, "linear_1": ...}``, the logits last.
    Weights start as a normal of standard deviation ``1/sqrt(fan_in)`` cut at two of them (not rescaled
    after the cut), biases at zero.

    Attributes:
      features: length of a flattened image.
      hidden: widths of the hidden layers; empty for logistic regression.
      classes: number of classes.
      batch_size: examples a batch.
      activation: a key of :data:`ACTIVATIONS`.
      normalizer_clip: the meta-loss is cut at this many times ``ln(classes)``, the loss of a uniform guess.

    Example:
      >>> task = ImageMLP(features=64, hidden=(32,), classes=10)
      >>> sorted(task.init(jax.random.key(0))[0])
      ['linear_0', 'linear_1']

    Source: META_TRAINING section 7; the normalizer, section 3.
    """

    features: int
    hidden: tuple[int, ...] = (32,)
    classes: int = 10
    batch_size: int = 64
    activation: str = "relu"
    normalizer_clip: float = 1.5

    def __post_init__(self) -> None:
        """Checks every value; raises :class:`~celo_nnx.errors.UserError`."""
        object.__setattr__(self, "hidden", tuple(self.hidden))
        width = f"an integer from 1 to {MAX_WIDTH}"
        for name, value in (("features", self.features), ("batch_size", self.batch_size)):
            require(_is_int(value) and value >= 1, name, value, "an integer >= 1")
        require(
            all(_is_int(n) and 1 <= n <= MAX_WIDTH for n in self.hidden),
            "hidden",
            self.hidden,
            f"each {width}",
        )
        require(_is_int(self.classes) and self.classes >= 2, "classes", self.classes, "an integer >= 2")
        clip = self.normalizer_clip
        good = isinstance(clip, (int, float)) and 0 < clip < math.inf
        require(good, "normalizer_clip", clip, "a finite number > 0")
        if self.activation not in ACTIVATIONS:
            raise unknown("activation", self.activation, ACTIVATIONS)

    def init(self, key: Array, sample: PyTree = ()) -> tuple[PyTree, PyTree]:
        """Returns (parameters, empty model state)."""
        widths = (self.features, *self.hidden, self.classes)
        keys = jax.random.split(key, len(widths) - 1)
        params = {}
        for i, (fan_in, fan_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            normal = jax.random.truncated_normal(keys[i], -2.0, 2.0, (fan_in, fan_out), jnp.float32)
            params[f"linear_{i}"] = {"b": jnp.zeros((fan_out,), jnp.float32), "w": normal / math.sqrt(fan_in)}
        return params, {}

    def logits(self, params: PyTree, x: Array) -> Array:
        """Returns the class scores ``[n, classes]`` of flat images ``[n, features]``."""
        for i in range(len(self.hidden) + 1):
            layer = params[f"linear_{i}"]
            x = x @ layer["w"] + layer["b"][None, :]
            if i < len(self.hidden):
                x = ACTIVATIONS[self.activation](x)
        return x

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
        worst = self.normalizer_clip * math.log(self.classes)
        return jnp.where(jnp.isnan(loss), worst, jnp.clip(loss, 0.0, worst)).astype(jnp.float32)


def pick_examples(key: Array, start: Array | int, count: Array | int, batch_size: int) -> Array:
    """Draws indices with replacement, inside jit.

    Args:
      key: decides the batch.
      start: first example that may be drawn.
      count: how many examples may be drawn, from ``start`` on; at least 1.
      batch_size: examples drawn.

    Returns:
      Indices ``[batch_size]``, int32.
    """
    bits = jax.random.bits(key, (batch_size,), jnp.uint32)
    # The remainder favours small indices by at most count / 2^32, 2e-5 for the largest set here.
    return jnp.asarray(start, jnp.int32) + (bits % jnp.asarray(count, jnp.uint32)).astype(jnp.int32)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
