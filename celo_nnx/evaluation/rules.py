"""Two rules of the papers that optax does not have in their form: NAdamW, and SM3 for scalars."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from celo_nnx.interfaces import Array, PyTree


class NAdamState(NamedTuple):
    """Both moments, without bias correction, and the number of updates so far."""

    count: Array
    first: PyTree
    second: PyTree


def scale_by_nadam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Nesterov's Adam whose look-ahead shares Adam's bias correction.

    With ``m`` and ``v`` the moments after gradient ``g`` number ``t`` (1 first)::

        direction = (b1 m + (1 - b1) g) / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    ``optax.nadam`` corrects ``m`` by ``1 - b1^(t+1)`` and ``g`` by ``1 - b1^t``, each for itself (Dozat): its
    first direction has length 1.47, this one's 1.90.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root.

    Returns:
      The transformation; to be multiplied with minus the learning rate.

    Example:
      >>> tx = scale_by_nadam()
      >>> update, _ = tx.update(jnp.float32(0.5), tx.init(jnp.float32(0.0)))
      >>> round(float(update), 4)
      1.9

    Source: the NAdamW of the learned_optimization library, the papers' baseline of that name.
    """

    def init(params: PyTree) -> NAdamState:
        zeros = optax.tree.zeros_like(params)
        return NAdamState(jnp.zeros([], jnp.int32), zeros, zeros)

    def update(grads: PyTree, state: NAdamState, params: PyTree = None) -> tuple[PyTree, NAdamState]:
        count = optax.safe_increment(state.count)
        first = optax.tree.update_moment(grads, state.first, b1, 1)
        second = optax.tree.update_moment_per_elem_norm(grads, state.second, b2, 2)
        ahead = optax.tree.bias_correction(optax.tree.update_moment(grads, first, b1, 1), b1, count)
        scale = optax.tree.bias_correction(second, b2, count)
        direction = jax.tree.map(lambda a, v: a / (jnp.sqrt(v) + eps), ahead, scale)
        return direction, NAdamState(count, first, second)

    return optax.GradientTransformation(init, update)


def nadamw(
    learning_rate: optax.ScalarOrSchedule, *, weight_decay: float = 1e-4
) -> optax.GradientTransformationExtraArgs:
    """NAdamW: :func:`scale_by_nadam`, and decoupled weight decay times the learning rate.

    Args:
      learning_rate: number or schedule.
      weight_decay: the decay.

    Returns:
      The optax rule.

    Example:
      >>> tx = nadamw(0.01, weight_decay=0.0)
      >>> update, _ = tx.update(jnp.float32(0.5), tx.init(jnp.float32(0.0)), jnp.float32(0.0))
      >>> round(float(update), 4)
      -0.019
    """
    return optax.chain(
        scale_by_nadam(),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def sm3(
    learning_rate: optax.ScalarOrSchedule, *, momentum: float = 0.9
) -> optax.GradientTransformationExtraArgs:
    """SM3-II as in optax, with scalars treated as vectors of one element, which optax's cannot.

    Args:
      learning_rate: number or schedule.
      momentum: decay of the average of the scaled gradients.

    Returns:
      The optax rule.

    Example:
      >>> tx = sm3(1.0)
      >>> update, _ = tx.update(jnp.float32(0.5), tx.init(jnp.float32(0.0)))
      >>> round(float(update), 4)
      -0.1

    Source: Anil et al., "Memory-Efficient Adaptive Optimization", arXiv:1901.11150; the reshaping as in
    learned_optimization.
    """
    inner = optax.scale_by_sm3(b1=momentum, b2=1.0, eps=1e-8)

    def lift(tree: PyTree) -> PyTree:
        return jax.tree.map(jnp.atleast_1d, tree)

    def init(params: PyTree) -> Any:
        return inner.init(lift(params))

    def update(grads: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        updates, state = inner.update(lift(grads), state)
        return jax.tree.map(lambda u, g: u.reshape(g.shape), updates, grads), state

    return optax.chain(
        optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate)
    )
