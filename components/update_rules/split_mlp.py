"""The per-parameter MLP of Celo and Celo2."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from celo_nnx.errors import require, unknown
from celo_nnx.interfaces import MetaParam, UpdateRule
from celo_nnx.planes import weighted_sum

Array = jax.Array

ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh}


def _truncated(key: Array, shape: tuple[int, ...], fan_in: int) -> Array:
    """TN(1/sqrt(fan_in)) of OPTIMIZERS section 1.3: cut at two standard deviations, not rescaled."""
    return jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32) / jnp.sqrt(jnp.float32(fan_in))


class SplitMLP(UpdateRule):
    """``h0 = act(sum_j N(x_j) W0_j + b0); h1 = act(h0 W1 + b1); o = h1 W2 + b2`` (OPTIMIZERS 1.8, M1 to M3).

    The first layer is split by feature group (``w0[group]: [width, H]``): a tensor without a group uses
    the other pieces and the same bias. Layers are unrolled over planes as scalar-times-plane sums; the
    normalization is folded into the first layer's weights.

    Args:
      widths: planes of each feature group, in order.
      key: draws the published random start.
      hidden: width of each hidden layer, each at least 1.
      outputs: at least 2: direction, log-magnitude, and unused ones.
      activation: ``"relu"`` or ``"tanh"``.
    """

    def __init__(
        self,
        *,
        widths: dict[str, int],
        key: Array,
        hidden: tuple[int, ...] = (8, 8),
        outputs: int = 3,
        activation: str = "relu",
    ) -> None:
        hidden = tuple(int(h) for h in hidden)
        require(len(hidden) >= 1 and min(hidden) >= 1, "hidden", hidden, "a tuple of integers of at least 1")
        require(outputs >= 2, "outputs", outputs, "an integer of at least 2")
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        total = sum(widths.values())
        require(total >= 1, "features", tuple(widths), "at least one feature group")
        self.activation, self.hidden, self.widths = activation, hidden, tuple(widths.items())
        keys = jax.random.split(key, len(widths) + len(hidden))
        self.w0 = nnx.Dict(
            {
                g: MetaParam(_truncated(k, (w, hidden[0]), total))
                for (g, w), k in zip(widths.items(), keys, strict=False)
            }
        )
        self.b0 = MetaParam(jnp.zeros((hidden[0],), jnp.float32))
        sizes = (*hidden, int(outputs))
        for layer, (n, m) in enumerate(zip(sizes[:-1], sizes[1:], strict=True), start=1):
            setattr(self, f"w{layer}", MetaParam(_truncated(keys[len(widths) + layer - 1], (n, m), n)))
            setattr(self, f"b{layer}", MetaParam(jnp.zeros((m,), jnp.float32)))

    def first_layer(self, groups: tuple[str, ...]) -> Array:
        """Returns the first layer's weights for these groups, ``[planes, H]``."""
        return jnp.concatenate([self.w0[g][...] for g in groups])

    def __call__(self, planes: list[Array], weights: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
        act = ACTIVATIONS[self.activation]
        values = [act(x) for x in weighted_sum(planes, weights, self.b0[...], shape)]
        depth = len(self.hidden)
        for layer in range(1, depth + 1):
            w, b = getattr(self, f"w{layer}")[...], getattr(self, f"b{layer}")[...]
            columns = range(2) if layer == depth else range(w.shape[1])
            values = [sum(x * w[k, h] for k, x in enumerate(values)) + b[h] for h in columns]
            if layer < depth:
                values = [act(x) for x in values]
        return values[0], values[1]

    def hand_made(self, *, feature: str = "momentum", channel: int = 0) -> dict[str, Array]:
        """Theta of the rule "step along one normalized feature", exact for every input.

        Two hidden units a layer carry +x and -x; all biases and other weights are zero. With Newton-Schulz
        and the channel of decay 0.9 this is Muon with an exponential-average momentum.

        Args:
          feature: the feature group that passes through.
          channel: which of its planes.

        Returns:
          Theta of this rule, like its own.

        Raises:
          UserError: relu is not the activation, a layer is narrower than 2, or no such plane.
        """
        require(self.activation == "relu", "activation", self.activation, "'relu' for a hand-made theta")
        require(
            min(self.hidden) >= 2, "hidden", self.hidden, "at least 2 units a layer for a hand-made theta"
        )
        widths = dict(self.widths)
        if feature not in widths:
            raise unknown("feature group of the hand-made theta", feature, widths)
        require(0 <= channel < widths[feature], "channel", channel, f"0 to {widths[feature] - 1}")
        theta = jax.tree.map(jnp.zeros_like, nnx.to_pure_dict(nnx.state(self, MetaParam)))
        theta["w0"][feature] = theta["w0"][feature].at[channel, :2].set(jnp.array([1.0, -1.0]))
        depth = len(self.hidden)
        for layer in range(1, depth):
            theta[f"w{layer}"] = theta[f"w{layer}"].at[(0, 1), (0, 1)].set(1.0)
        theta[f"w{depth}"] = theta[f"w{depth}"].at[:2, 0].set(jnp.array([1.0, -1.0]))
        return theta
