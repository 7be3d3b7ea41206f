"""What the twins do to one tensor: accumulators, stacked features, normalization, the MLP.

The twins differ in epsilons, axes and decays, which are arguments here; OPTIMIZERS sections 1.4 to 1.8.
A bank's axis is the last one: accumulators are ``[*S, k]``, features ``[*S, C]``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from celo_nnx.interfaces import Array, PyTree

GROUPS = (
    "gradient",
    "clipped_gradient",
    "parameter",
    "momentum",
    "second_moment",
    "momentum_rms",
    "rsqrt_second_moment",
    "factored_gradient",
    "gradient_rms",
    "row",
    "column",
    "rsqrt_row",
    "rsqrt_column",
    "factored_momentum",
)
"""The feature groups in slot order (OPTIMIZERS section 1.6)."""

Axes = tuple[int, int] | None  # (d1, d0), the second largest and the largest; None where not factored
Decays = dict[str, Any]  # of the banks momentum, rms and factored: a tuple of numbers or an array [k]


def named_leaves(tree: PyTree) -> tuple[list[tuple[str, Array]], Any]:
    """Returns the leaves in flatten order with their paths, keys joined by ``/``, and the structure."""
    leaves, treedef = jax.tree.flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves], treedef


def largest_axes(path: str, shape: tuple[int, ...]) -> Axes:
    """Returns axes (d1, d0), the second largest and the largest, by a stable sort (OPTIMIZERS 1.4)."""
    if len(shape) < 2:
        return None
    order = sorted(range(len(shape)), key=lambda axis: shape[axis])
    return order[-2], order[-1]


def rs(x: Array) -> Array:
    """Returns 1/sqrt(x)."""
    return 1.0 / jnp.sqrt(x)


def srs(x: Array) -> Array:
    """Returns 1/sqrt(max(x, 1e-9))."""
    return 1.0 / jnp.sqrt(jnp.maximum(x, 1e-9))


def over(vector: Any, like: Array) -> Array:
    """Gives a bank's vector ``[k]`` the rank of ``like``, whose last axis is the bank's."""
    return jnp.reshape(jnp.asarray(vector, jnp.float32), (1,) * (like.ndim - 1) + (-1,))


def at_least_1d(x: Array) -> Array:
    """Reshapes a scalar to ``[1]``, as every rule but those on whole-tensor means does (OPTIMIZERS 1.6)."""
    return x.reshape(1) if x.ndim == 0 else x


def all_axes(x: Array) -> tuple[int, ...]:
    """The tensor axes of an array with a trailing bank axis."""
    return tuple(range(x.ndim - 1))


# --- accumulators (OPTIMIZERS 1.5) ------------------------------------------------------------------------


def zero_bank(shape: tuple[int, ...], decays: Any) -> Array:
    """Returns zeros ``[*shape or 1, k]``."""
    return jnp.zeros((shape or (1,)) + (len(decays),), jnp.float32)


def zero_accumulators(shape: tuple[int, ...], decays: Decays, axes: Axes) -> dict[str, Any]:
    """Returns the three accumulators of a tensor at the start."""
    shape = shape or (1,)
    if axes is None:
        v = {"diagonal": zero_bank(shape, decays["factored"])}
    else:
        without = [tuple(s for i, s in enumerate(shape) if i != d) for d in axes]
        k = (len(decays["factored"]),)
        v = {"row": jnp.zeros(without[1] + k), "column": jnp.zeros(without[0] + k)}
    banks = {"m": zero_bank(shape, decays["momentum"]), "rms": zero_bank(shape, decays["rms"])}
    return banks | {"factored": v}


def accumulate_moments(old: dict[str, Array], g: Array, decays: Decays) -> dict[str, Array]:
    """Updates momentum and second moment with a gradient ``[*S]``; only the latter's decays are clipped."""
    g = g[..., None]
    d, c = over(decays["momentum"], g), jnp.clip(over(decays["rms"], g), 0.0, 1.0)
    return {"m": d * old["m"] + (1 - d) * g, "rms": c * old["rms"] + (1 - c) * g * g}


def accumulate_factored(v: dict[str, Array], g: Array, decays: Any, axes: Axes) -> dict[str, Array]:
    """Updates the factored second moment; ``g: [*S]``."""
    q = g * g + 1e-30

    def mix(old: Array, new: Array) -> Array:
        d = jnp.clip(over(decays, old), 0.0, 1.0)
        return d * old + (1.0 - d) * new[..., None]

    if axes is None:
        return {"diagonal": mix(v["diagonal"], q)}
    return {"row": mix(v["row"], q.mean(axis=axes[1])), "column": mix(v["column"], q.mean(axis=axes[0]))}


def factored_statistics(v: dict[str, Array], axes: tuple[int, int]) -> tuple[Array, Array]:
    """Returns R and C of equation A1, each with size 1 where it is constant: ``[*S, k]`` broadcastable."""
    d1, d0 = axes
    row = jnp.expand_dims(v["row"], d0)
    column = jnp.expand_dims(v["column"], d1)
    mean = jnp.mean(row, axis=d1, keepdims=True)
    return srs(row / (mean + 1e-9)), srs(column)


def accumulate(old: dict, g: Array, decays: Decays, axes: Axes) -> tuple[dict[str, Any], Array]:
    """Returns the new accumulators and the preconditioned gradient of equations A1 and A2."""
    v = accumulate_factored(old["factored"], g, decays["factored"], axes)
    new = accumulate_moments(old, g, decays) | {"factored": v}
    g = g[..., None]
    if axes is None:
        return new, g * srs(v["diagonal"] + 1e-9)
    row, column = factored_statistics(v, axes)
    return new, g * row * column


# --- features and the MLP (OPTIMIZERS 1.6 to 1.8) ---------------------------------------------------------


def elementwise_features(p: Array, g: Array, m: Array, rms: Array, e_r: float) -> dict[str, Array]:
    """Returns the groups that no axis plays a part in, slots 0 to 8 without 7: ``[*S, width]`` each."""
    g = g[..., None]
    r = rs(rms + e_r)
    return {
        "gradient": g,
        "clipped_gradient": jnp.clip(g, -0.1, 0.1),
        "parameter": p[..., None],
        "momentum": m,
        "second_moment": rms,
        "momentum_rms": m * r,
        "rsqrt_second_moment": r,
        "gradient_rms": g * r,
    }


def factored_features(m: Array, v: dict[str, Array], axes: tuple[int, int]) -> dict[str, Array]:
    """Returns slots 9 to 13 of a factored tensor; ``m: [*S, k]``."""
    row = jnp.broadcast_to(jnp.expand_dims(v["row"], axes[1]), m.shape[:-1] + v["row"].shape[-1:])
    column = jnp.broadcast_to(jnp.expand_dims(v["column"], axes[0]), row.shape)
    r_factor, c_factor = factored_statistics(v, axes)
    return {
        "row": row,
        "column": column,
        "rsqrt_row": rs(row + 1e-8),
        "rsqrt_column": rs(column + 1e-8),
        "factored_momentum": m * r_factor * c_factor,
    }


def diagonal_features(m: Array, v: dict[str, Array], e_1: float) -> dict[str, Array]:
    """Returns slots 9 to 13 of a tensor that is not factored, twice the same for rows and columns."""
    v_diag, r = v["diagonal"], rs(v["diagonal"] + 1e-8)
    return {
        "row": v_diag,
        "column": v_diag,
        "rsqrt_row": r,
        "rsqrt_column": r,
        "factored_momentum": m * rs(v_diag + e_1),
    }


def normalized(x: Array, eps: float, axes: tuple[int, ...]) -> Array:
    """Divides every channel of ``[*S, C]`` by its root mean square over the axes (OPTIMIZERS 1.7)."""
    return x * rs(eps + jnp.mean(x * x, axis=axes, keepdims=True))


def mlp(weights: dict[str, Any], groups: tuple[str, ...], x: Array, activation: str = "relu") -> Array:
    """Applies the update rule's MLP, equations M1 to M3.

    Args:
      weights: ``{"w0": {group: [width, H]}, "b0": [H], "w1": [H, H], "b1": [H], ...}``.
      groups: the groups that ``x`` holds, in its order; other pieces of w0 are passed over.
      x: ``[*S, C]``.
      activation: between layers, ``"relu"`` or ``"tanh"``.

    Returns:
      ``[*S, outputs]``.
    """
    act = {"relu": jax.nn.relu, "tanh": jnp.tanh}[activation]
    first = jnp.concatenate([weights["w0"][name] for name in groups], axis=0)
    h = jnp.matmul(x, first, precision="highest")
    h = h + over(weights["b0"], h)
    for layer in range(1, sum(name.startswith("w") for name in weights)):
        h = jnp.matmul(act(h), weights[f"w{layer}"], precision="highest")
        h = h + over(weights[f"b{layer}"], h)
    return h
