"""The per-parameter MLP of Celo, Celo2, VeLO, RNN-MLP and adafac MLP."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from celo_nnx.errors import MOST_WIDTH, is_integer, is_number, is_width, require, unknown
from celo_nnx.interfaces import Controls, MetaParam, UpdateRule
from celo_nnx.planes import weighted_sum

Array = jax.Array

ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh}
MOMENTUM = (("momentum", 0, 1.0),)  # what a hand-made theta steps along
MOST_WEIGHTS = 2**26  # of all layers and MLPs; the largest published bank has 0.1 million
UNROLLED = 16  # widest layer that is unrolled over planes; compilation grows with the number of weights


class SplitMLP(UpdateRule):
    """``h0 = act(sum_j N(x_j) W0_j + b0); h1 = act(h0 W1 + b1); o = h1 W2 + b2`` (OPTIMIZERS 1.8, M1 to M3).

    The first layer is split by feature group (``w0[group]: [width, H]``): a tensor without a group uses
    the other pieces and the same bias. Context groups are numbers that a whole tensor shares: their part of
    the first layer joins the bias. Narrow layers are unrolled over planes as scalar-times-plane sums, with
    the normalization folded into the first layer's weights; wide ones are matrix products on stacked planes.

    Args:
      widths: planes of each feature group, in order.
      context: numbers of each context group, in order.
      key: draws the published random start.
      hidden: width of each hidden layer.
      outputs: at least 2: direction, log-magnitude, and unused ones.
      activation: ``"relu"`` or ``"tanh"``.
      bank: 0 for one MLP; else ``K`` of them, theta with a leading axis, whose weights are
        ``bank_scale / K sum_k mix_k theta_k`` for each tensor (Celo, VeLO; C6 and V6).
      bank_scale: ``ff_mult`` of VeLO, not 0.
      feedback: the last so many outputs are averaged over the tensor and given to the schedule (R7).

    Raises:
      UserError: a value out of range.
    """

    def __init__(
        self,
        *,
        widths: dict[str, int],
        context: dict[str, int],
        key: Array,
        hidden: tuple[int, ...] = (8, 8),
        outputs: int = 3,
        activation: str = "relu",
        bank: int = 0,
        bank_scale: float = 1.0,
        feedback: int = 0,
    ) -> None:
        good = isinstance(hidden, (tuple, list)) and len(hidden) >= 1 and all(map(is_width, hidden))
        require(good, "hidden", hidden, f"a tuple of integers from 1 to {MOST_WIDTH}")
        require(is_width(feedback, 0), "feedback", feedback, f"an integer from 0 to {MOST_WIDTH}")
        legal = f"an integer from {2 + feedback} to {MOST_WIDTH}"
        require(is_width(outputs, 2 + feedback), "outputs", outputs, legal)
        require(is_width(bank, 0), "bank", bank, f"an integer from 0 to {MOST_WIDTH}")
        sizes = (sum((widths | context).values()), *hidden, outputs)
        weights = max(bank, 1) * sum(n * m for n, m in itertools.pairwise(sizes))
        require(weights <= MOST_WEIGHTS, "number of weights", weights, f"at most {MOST_WEIGHTS}")
        hidden = tuple(hidden)
        require(is_number(bank_scale) and bank_scale != 0, "bank_scale", bank_scale, "a number other than 0")
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        rows = widths | context
        total = sum(rows.values())
        require(sum(widths.values()) >= 1, "features", tuple(widths), "at least one feature group")
        self.activation, self.hidden, self.outputs = activation, hidden, int(outputs)
        self.bank, self.bank_scale, self.feedback = bank, float(bank_scale), feedback
        self.widths, self.context = tuple(widths.items()), tuple(context.items())
        lead = (bank,) if bank else ()

        def drawn(key: Array, shape: tuple[int, ...], fan_in: int) -> MetaParam:
            cut = jax.random.truncated_normal(key, -2.0, 2.0, lead + shape, jnp.float32)
            return MetaParam(cut / jnp.sqrt(jnp.float32(fan_in)))

        keys = jax.random.split(key, len(rows) + len(hidden))
        pieces = zip(rows.items(), keys, strict=False)
        self.w0 = nnx.Dict({g: drawn(k, (w, hidden[0]), total) for (g, w), k in pieces})
        self.b0 = MetaParam(jnp.zeros((*lead, hidden[0]), jnp.float32))
        sizes = (*hidden, int(outputs))
        for layer, (n, m) in enumerate(zip(sizes[:-1], sizes[1:], strict=True), start=1):
            setattr(self, f"w{layer}", drawn(keys[len(rows) + layer - 1], (n, m), n))
            setattr(self, f"b{layer}", MetaParam(jnp.zeros((*lead, m), jnp.float32)))

    @property
    def wide(self) -> bool:
        """Whether layers are matrix products."""
        return max(self.hidden) > UNROLLED

    def prepare(
        self, groups: tuple[str, ...], scale: Array, context: dict[str, Array], controls: Controls
    ) -> dict[str, Array]:
        mixed = self._mixed(controls)
        first = jnp.concatenate([mixed(self.w0[g]) for g in groups])
        out = {"b0": mixed(self.b0)}
        for name, _ in self.context:
            out["b0"] = out["b0"] + jnp.matmul(context[name], mixed(self.w0[name]), precision="highest")
        if self.wide:
            out |= {"scale": scale[:, None], "w0": first}
        else:
            out["w0"] = first.reshape(*first.shape, *(1,) * (scale.ndim - 1)) * scale[:, None]
        for layer in range(1, len(self.hidden) + 1):
            for name in (f"w{layer}", f"b{layer}"):
                out[name] = mixed(getattr(self, name))
        return out

    def _mixed(self, controls: Controls) -> Any:
        """Returns the function from a leaf of theta to this tensor's weights."""
        if not self.bank:
            return lambda leaf: leaf[...]
        mix = jnp.full((self.bank,), 1.0 / self.bank) if controls.mix is None else controls.mix
        mix = mix * (self.bank_scale / self.bank)
        return lambda leaf: jnp.tensordot(mix, leaf[...], 1, precision="highest")

    def __call__(
        self, groups: dict[str, list[Array]], prepared: dict[str, Array], shape: tuple[int, ...]
    ) -> tuple[Array, Array, list[Array]]:
        planes = sum(groups.values(), [])
        made = self._products(planes, prepared, shape) if self.wide else self._sums(planes, prepared, shape)
        return made[0], made[1], made[2:]

    def _used(self, layer: int) -> list[int]:
        """Returns the outputs of a layer that are read."""
        if layer < len(self.hidden):
            return list(range(self.hidden[layer]))
        return [0, 1, *range(self.outputs - self.feedback, self.outputs)]

    def _sums(self, planes: list[Array], prepared: dict[str, Array], shape: tuple[int, ...]) -> list[Array]:
        act = ACTIVATIONS[self.activation]
        values = [act(x) for x in weighted_sum(planes, prepared["w0"], prepared["b0"], shape)]
        depth = len(self.hidden)
        for layer in range(1, depth + 1):
            w, b = prepared[f"w{layer}"], prepared[f"b{layer}"]
            values = [sum(x * w[k, h] for k, x in enumerate(values)) + b[h] for h in self._used(layer)]
            if layer < depth:
                values = [act(x) for x in values]
        return values

    def _products(
        self, planes: list[Array], prepared: dict[str, Array], shape: tuple[int, ...]
    ) -> list[Array]:
        act = ACTIVATIONS[self.activation]
        scale = prepared["scale"][:, 0]
        x = jnp.stack([jnp.broadcast_to(p * s, shape) for p, s in zip(planes, scale, strict=True)])
        x = x.reshape(len(planes), -1)
        depth = len(self.hidden)
        for layer in range(depth + 1):
            w, b = prepared[f"w{layer}"], prepared[f"b{layer}"]
            if layer == depth:
                used = jnp.asarray(self._used(layer))
                w, b = w[:, used], b[used]
            x = jnp.matmul(w.T, x, precision="highest") + b[:, None]
            x = act(x) if layer < depth else x
        return [y.reshape(shape) for y in x]

    def hand_made(self, *, mix: tuple[tuple[str, int, float], ...] = MOMENTUM) -> dict[str, Array]:
        """Theta of the rule "step along a weighted sum of normalized features", exact for every input.

        Of each feature two hidden units a layer carry +x and -x; all biases and other weights are zero. With
        Newton-Schulz and the channel of decay 0.9 alone, the default, this is Muon with an
        exponential-average momentum.

        Args:
          mix: (feature group, which of its planes, weight) of each, such as
            ``(("momentum", 0, 1.0), ("gradient", 0, 0.2))``.

        Returns:
          Theta of this rule, like its own.

        Raises:
          UserError: relu is not the activation, a layer is narrower than two units a feature, no such plane,
            or a weight that is no number.
        """
        require(self.activation == "relu", "activation", self.activation, "'relu' for a hand-made theta")
        mix = tuple(tuple(entry) if isinstance(entry, (tuple, list)) else (entry,) for entry in mix)
        legal = "a tuple of (feature group, plane, weight)"
        require(len(mix) >= 1 and all(len(entry) == 3 for entry in mix), "mix", mix, legal)
        width = 2 * len(mix)
        need = f"at least {width} units a layer for a hand-made theta of {len(mix)} features"
        require(min(self.hidden) >= width, "hidden", self.hidden, need)
        theta = jax.tree.map(jnp.zeros_like, nnx.to_pure_dict(nnx.state(self, MetaParam)))
        # Every layer of a bank is multiplied by bank_scale / K where the mix sums to 1.
        one = self.bank / self.bank_scale if self.bank else 1.0
        ends = jnp.array([one, -one], jnp.float32)
        widths, depth = dict(self.widths), len(self.hidden)
        for place, (feature, channel, weight) in enumerate(mix):
            if feature not in widths:
                raise unknown("feature group of the hand-made theta", feature, widths)
            inside = is_integer(channel) and 0 <= channel < widths[feature]
            require(inside, f"plane of {feature} in mix", channel, f"0 to {widths[feature] - 1}")
            require(is_number(weight), f"weight of {feature} in mix", weight, "a finite number")
            pair = slice(2 * place, 2 * place + 2)
            theta["w0"][feature] = theta["w0"][feature].at[..., channel, pair].set(ends)
            theta[f"w{depth}"] = theta[f"w{depth}"].at[..., pair, 0].set(ends * weight)
        units = jnp.arange(width)
        for layer in range(1, depth):
            theta[f"w{layer}"] = theta[f"w{layer}"].at[..., units, units].set(one)
        return theta
