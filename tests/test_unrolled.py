"""Arrays in cells: every move against the function itself, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from celo_nnx.unrolled import Cells, UnsupportedError, evaluate

R, C = 4, 8


def in_cells(function, bank, row, weights):
    """Evaluates with ``bank`` ``[k, R, C]`` and ``row`` ``[k, R, 1]`` in tiles, ``weights`` in scalars."""
    closed = jax.make_jaxpr(function)(bank, row, weights)
    args = [Cells.of(list(x), x.shape, (len(x), 1, 1)) for x in (bank, row)]
    (out,) = evaluate(
        closed, [Cells.scalars(np.asarray(x)) for x in closed.consts], [*args, Cells.scalars(weights)]
    )
    whole = np.empty(out.shape, np.float32)
    laid = np.broadcast_to(out.cells, (*out.shape[:-2], 1, 1) if out.tiled else out.shape)
    for at in np.ndindex(laid.shape):
        whole[at[:-2] if out.tiled else at] = np.asarray(laid[at])
    return whole


def arguments():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, R, C), (3, R, 1), (3, 2)))


def banks(bank, row, weights):
    decay = jnp.asarray([0.5, 0.9, 0.99]).reshape(-1, 1, 1)
    return bank * decay + row[None, 1] * (1 - decay)


def stacks(bank, row, weights):
    every = jnp.concatenate([bank[1:], jnp.broadcast_to(row[:1], (1, R, C)), 2 * bank[::2]])
    return jnp.stack([every[0], every[-1] + row[0]]) * weights[0, 1]


def small(bank, row, weights):
    scaled = jnp.concatenate([weights[:1], weights[1:] * 2]).reshape(3, 2, 1, 1) * jnp.float32(0.5)
    return sum(bank[k] * scaled[k, 1] for k in range(3)) + scaled[0, 0]


def numbers(bank, row, weights):
    lead = jax.lax.broadcasted_iota(jnp.float32, (3, 1, 1), 0)
    inner = jax.lax.broadcasted_iota(jnp.float32, (R, C), 1) + 10 * jax.lax.broadcasted_iota(
        jnp.float32, (R, C), 0
    )
    return jax.nn.relu(bank) + lead + inner[None]


def limits(bank, row, weights):
    broken = jnp.where(bank > 1, jnp.nan, bank)
    return jnp.maximum(jnp.clip(broken, -0.5, 0.5), row)


@pytest.mark.parametrize("function", [banks, stacks, small, numbers, limits])
def test_moves(function) -> None:
    given = arguments()
    want = np.asarray(function(*given))
    np.testing.assert_allclose(in_cells(function, *given), want, rtol=1e-6, atol=1e-6)
    assert np.ptp(np.nan_to_num(want)) > 0.5


@pytest.mark.parametrize(
    "function",
    [
        lambda b, r, w: jnp.sum(b, -1, keepdims=True),
        lambda b, r, w: b @ b[0].T,
        lambda b, r, w: b.transpose(0, 2, 1),
        lambda b, r, w: b[:, ::2],
        lambda b, r, w: b.reshape(3, R * C),
        lambda b, r, w: b[:, 0],
        lambda b, r, w: jnp.concatenate([b, b], -1),
    ],
)
def test_what_mixes_elements_is_refused(function) -> None:
    with pytest.raises(UnsupportedError):
        in_cells(function, *arguments())


def test_a_large_array_is_not_unrolled() -> None:
    with pytest.raises(UnsupportedError, match="more than"):
        Cells.scalars(np.zeros((80, 80), np.float32))
