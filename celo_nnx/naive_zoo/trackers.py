"""Time and loss as the twins' rules see them: time embeddings, loss buffer, loss normalizer, powers.

OPTIMIZERS sections 1.10 to 1.12, 1.15 and 14.2.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from celo_nnx.interfaces import Array
from celo_nnx.naive_zoo.tensors import rs

FRACTIONS = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
SCALES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000)
NEVER = 999999999999.0  # what running minima start from


def fraction_features(count: Array, num_steps: Array) -> Array:
    """Returns equation T1, ``[9]``: tanh(10 (t/T - c))."""
    fraction = count.astype(jnp.float32) / num_steps.astype(jnp.float32)
    return jnp.tanh(10.0 * (fraction - np.asarray(FRACTIONS, np.float32)))


def tanh_time(count: Array) -> Array:
    """Returns equation T2, ``[11]``: tanh(t/s - 1)."""
    return jnp.tanh(count.astype(jnp.float32) / np.asarray(SCALES, np.float32) - 1.0)


def sine_time(count: Array) -> Array:
    """Returns equation T3, ``[11]``: sin(t / (s pi))."""
    return jnp.sin(count.astype(jnp.float32) / np.asarray(np.asarray(SCALES) * np.pi, np.float32))


def clipped_log(x: Array) -> Array:
    """Returns clip(log(1e-8 + abs(x)), -5, 5), which OPTIMIZERS 1.15 has in three scales."""
    return jnp.clip(jnp.log(1e-8 + jnp.abs(x)), -5.0, 5.0)


# --- float32 pairs: a value is the exact sum of its two parts ---------------------------------------------


def _product(a: Array, b: Array) -> tuple[Array, Array]:
    """Returns a*b and its rounding error.

    Halves of 12 bits have exact products, so it does not matter which of them the compiler fuses with a sum.
    """

    def split(x: Array) -> tuple[Array, Array]:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFF000)
        high = jax.lax.bitcast_convert_type(bits, jnp.float32)
        return high, x - high

    (ah, al), (bh, bl) = split(a), split(b)
    p, e1 = _sum(ah * bh, ah * bl)
    p, e2 = _sum(p, al * bh)
    return _sum(p, al * bl + (e1 + e2))


def _sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Returns a+b and its rounding error (Knuth's sum)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def multiply_add(a: Array, b: Array, c: Array) -> Array:
    """Returns a*b + c rounded once."""
    p, low = _product(a, b)
    s, rest = _sum(p, c)
    return s + (rest + low)


@jax.jit
def power(base: Array, n: Array) -> Array:
    """Returns base^n for an int32 scalar n >= 0, rounded once, as float64 would (OPTIMIZERS 14.2).

    1 - d^n cancels, so that the last bit of an ordinary power shows in the loss features.
    """

    def multiply(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        p, low = _product(a[0], b[0])
        low = low + (a[0] * b[1] + a[1] * b[0])
        return _sum(p, low)

    def bit(_: Array, carry: Any) -> Any:
        n, square, result = carry
        odd = multiply(result, square)
        result = tuple(jnp.where(n % 2 == 1, new, old) for new, old in zip(odd, result, strict=True))
        return n // 2, multiply(square, square), result

    base = jnp.asarray(base, jnp.float32)
    one, zero = jnp.ones_like(base), jnp.zeros_like(base)
    high, low = jax.lax.fori_loop(0, 31, bit, (jnp.asarray(n, jnp.int32), (base, zero), (one, zero)))[2]
    return high + low


# --- losses -----------------------------------------------------------------------------------------------


@jax.jit
def loss_decays(num_steps: Array | int) -> Array:
    """Returns the ten decays of equation B0, ``[10]``, by the published code's float32 operations.

    A decay's last bit shows in the features, and the compiler rounds otherwise what it folds: the barrier
    keeps a known number of steps from being folded. 2^25 steps give the published code a decay of 1, and
    averages that are 0/0; here it is the largest float32 below 1.
    """
    length = jax.lax.optimization_barrier(jnp.asarray(num_steps, jnp.float32))
    log10 = jnp.log(length) / np.log(np.float32(10.0))
    return jnp.minimum(jnp.exp(-1.0 / 10.0 ** jnp.linspace(1.0, log10, 10)), np.float32(1 - 2**-24))


def init_loss_buffer(num_steps: Array | int) -> dict[str, Array]:
    """Returns the loss buffer at the start, for an unroll of ``num_steps``."""
    return {
        "means": jnp.zeros((10,), jnp.float32),
        "running_min": jnp.full((10,), NEVER, jnp.float32),
        "iteration": jnp.zeros((), jnp.int32),
        "decays": loss_decays(num_steps),
    }


def update_loss_buffer(buffer: dict[str, Array], loss: Array) -> tuple[dict[str, Array], Array]:
    """Returns the buffer after a loss, and its nine features: equations B1 to B8."""
    d, i = buffer["decays"], buffer["iteration"] + 1
    correction = 1.0 - power(d, i)
    largest = jnp.where(i == 1, loss, jnp.max(buffer["means"] / correction))
    loss = jnp.minimum(2.0 * jnp.abs(largest), loss)
    means = multiply_add(buffer["means"], d, loss * (1.0 - d))
    mu = means / correction
    low = jnp.minimum(buffer["running_min"], mu)
    ratio = (mu[:-1] - low[:-1]) / jnp.maximum(1e-8, mu[1:] - low[:-1])
    features = jnp.clip(ratio - 1.0, -1.0, 1.0)
    features = jnp.where(i <= 2, features * 0.0, features)
    return {"means": means, "running_min": low, "iteration": i, "decays": d}, features


def init_loss_normalizer() -> dict[str, Array]:
    """Returns the loss normalizer at the start."""
    zero = jnp.zeros((), jnp.float32)
    return {"mean": zero, "var": zero, "updates": jnp.zeros((), jnp.int32)}


def update_loss_normalizer(state: dict[str, Array], loss: Array, decay: float) -> dict[str, Array]:
    """Returns the normalizer after a loss, equation N1."""
    d, rest = np.float32(decay), np.float32(1.0 - decay)
    mean = d * state["mean"] + rest * loss
    var = d * state["var"] + rest * (mean - loss) ** 2
    return {"mean": mean, "var": var, "updates": state["updates"] + 1}


def weigh_loss(state: dict[str, Array], loss: Array, decay: float) -> Array:
    """Returns the loss in standard deviations from the mean, equation N2."""
    c = 1.0 / (1.0 - power(np.float32(decay), state["updates"]) + 1e-8)
    return jnp.clip((loss - state["mean"] * c) * rs(state["var"] * c + 1e-8), -5.0, 5.0)


def corrected_mean(state: dict[str, Array], decay: float) -> Array:
    """Returns equation N3, 0 before any update."""
    return state["mean"] / (1.0 - power(np.float32(decay), state["updates"]) + 1e-7)
