"""Language modelling by an NNX model: what recurrent and attention models share."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from celo_nnx.errors import is_count, require
from celo_nnx.interfaces import Array, PyTree
from celo_nnx.tasks.fields import (
    ACTIVATIONS,
    INITIALIZATIONS,
    check_counts,
    check_names,
    check_positive,
    clipped,
    cross_entropy,
    pick_examples,
)
from celo_nnx.tasks.nnx_task import LayeredTask


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageTask(LayeredTask):
    """Mean next-token cross-entropy of slices of a text; subclasses say which model.

    The data are ``{"tokens": [n]}``, integers below ``vocabulary`` in the order of the text, at least
    ``length + 2`` of them. A batch is ``{"tokens": [batch_size, length + 1]}``: the model sees the first
    ``length`` tokens of a slice, and at each place predicts the next. It returns logits
    ``[batch_size, length, vocabulary]``.

    Attributes:
      vocabulary: number of tokens.
      length: tokens that the model sees.
      batch_size: slices a batch.
      width: of the embedding and of the layers.
      depth: number of layers.
      activation: a key of :data:`~celo_nnx.tasks.fields.ACTIVATIONS`.
      normalization: ``none`` or ``layer``.
      initialization: of kernels, a key of :data:`~celo_nnx.tasks.fields.INITIALIZATIONS`.
      normalizer_clip: the meta-loss is cut at this many times ``ln(vocabulary)``, a uniform guess's loss.
    """

    vocabulary: int
    length: int = 32
    batch_size: int = 16
    width: int = 64
    depth: int = 1
    activation: str = "tanh"
    normalization: str = "none"
    initialization: str = "lecun_normal"
    normalizer_clip: float = 1.5

    def __post_init__(self) -> None:
        """Checks every value; raises :class:`~celo_nnx.errors.UserError`."""
        good = is_count(self.vocabulary) and self.vocabulary >= 2
        require(good, "vocabulary", self.vocabulary, "an integer >= 2")
        check_counts(self, "length", "batch_size", "width", "depth")
        check_positive(self, "normalizer_clip")
        tables = dict(activation=ACTIVATIONS, initialization=INITIALIZATIONS)
        check_names(self, **tables, normalization=("none", "layer"))

    def model_loss(self, model: Any, batch: PyTree, key: Array) -> Array:
        """Returns the mean cross-entropy of the next tokens."""
        tokens = batch["tokens"]
        return cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])

    def pick(self, key: Array, start: Array, count: Array) -> Array:
        """Picks where the slices begin, ``[batch_size]``, such that they end before ``start + count``."""
        return pick_examples(key, start, jnp.maximum(count - self.length, 1), self.batch_size)

    def take(self, data: dict[str, Array], picked: Array) -> dict[str, Array]:
        """Returns the slices that begin there, int32."""
        places = picked[:, None] + jnp.arange(self.length + 1, dtype=picked.dtype)[None, :]
        return {"tokens": jnp.asarray(data["tokens"]).at[places].get(mode="clip").astype(jnp.int32)}

    def normalize(self, loss: Array) -> Array:
        """Returns ``clip(loss, 0, normalizer_clip ln(vocabulary))``, NaN becoming the upper bound."""
        return clipped(loss, 0.0, self.normalizer_clip * math.log(self.vocabulary))

    def embed(self, rngs: nnx.Rngs) -> nnx.Embed:
        """Returns the embedding ``[vocabulary, width]``, standard normal at the start."""
        return nnx.Embed(
            self.vocabulary, self.width, embedding_init=jax.nn.initializers.normal(1.0), rngs=rngs
        )


def look_up(embed: nnx.Embed, tokens: Array) -> Array:
    """Returns the embeddings ``[..., width]`` of tokens ``[...]``.

    A product with one-hot rows: the gradient of a gather is a scatter, slow on CPU under vmap.
    """
    return jax.nn.one_hot(tokens, embed.num_embeddings) @ embed.embedding[...]
