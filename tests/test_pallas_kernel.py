"""The Pallas path, interpreted, against the plain one; and its lowering for devices that are not here."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from celo_nnx import UserError, pallas_kernel, tiling
from celo_nnx.build import build
from celo_nnx.config import load
from celo_nnx.interfaces import Controls, RunView
from celo_nnx.naive import NaiveCelo2
from celo_nnx.pallas_kernel import PallasKernel
from celo_nnx.tensors import Tensors

Tree = dict[str, jax.Array]
# Ragged against blocks of powers of two; batches of one axis and of two; narrow, so flipped; two of a shape.
SHAPES = {"stack": (3, 5, 9), "deep": (2, 2, 6, 4), "narrow": (37, 5), "t1": (8, 16), "t2": (8, 16)}
NARROW = "optimizer.update_rule.hidden=(3,3)"  # interpreting costs time for every hidden unit


def draw(shapes: dict[str, tuple[int, ...]], seed: int, dtype: Any = jnp.float32) -> Tree:
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}


def pair(variant: str, *overrides: str, tile: int = 0) -> tuple[Any, Any]:
    """Returns the optimizer on the Pallas path and on the plain one, with one random theta."""
    plain = build(load(variant, overrides).optimizer, jax.random.key(1))
    more = ("optimizer.kernel=pallas", f"optimizer.tile={tile}")
    return build(load(variant, [*overrides, *more]).optimizer, jax.random.key(1)), plain


def steps(optimizer: Any, params: Tree, dtype: Any = jnp.float32, count: int = 2) -> tuple[Tree, Any]:
    """Returns the last of a few updates on random gradients, and the state after it."""
    state = optimizer.init(params, 10)
    update = jax.jit(lambda g, s: optimizer.update(g, s, params, value=1.0, learning_rate=1.0))
    for seed in range(count):
        updates, state = update(draw({k: p.shape for k, p in params.items()}, seed + 1, dtype), state)
    return updates, state


def close(got: Any, want: Any, bound: float) -> None:
    """Compares trees, each leaf by its largest magnitude."""
    for path, x in jax.tree_util.tree_flatten_with_path(want)[0]:
        y = dict(jax.tree_util.tree_flatten_with_path(got)[0])[path]
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape and np.isfinite(x).all()
        error = np.max(np.abs(x - y), initial=0.0) / max(np.max(np.abs(x), initial=0.0), 1e-30)
        assert error <= bound, (jax.tree_util.keystr(path), error)


@pytest.fixture
def no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a tensor took the plain path")

    monkeypatch.setattr(PallasKernel, "whole", refuse)


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize(
    ("variant", "overrides", "tile", "names", "bound"),
    [
        ("celo2_base", (NARROW,), 64, tuple(SHAPES), 3e-6),
        ("celo2", (), 0, ("stack",), 1e-5),
        # Means over the batch too, a mixed bank of MLPs, a step times the parameter's RMS.
        ("celo", (), 32, ("stack", "narrow"), 3e-6),
    ],
)
def test_as_the_plain_path(
    variant: str, overrides: tuple[str, ...], tile: int, names: tuple[str, ...], bound: float
) -> None:
    params = draw({k: SHAPES[k] for k in names}, 0)
    pallas, plain = pair(variant, *overrides, tile=tile)
    (u, s), (v, q) = steps(pallas, params), steps(plain, params)
    close(u, v, bound)
    close(s, q, 1e-6)


@pytest.mark.usefixtures("no_fallback")
def test_as_the_plain_twin() -> None:
    """The second implementation shares no code with either path."""
    params = draw({"a": (13, 40)}, 0)
    pallas, _ = pair("celo2_base", "optimizer.tensors.axes=last_two", tile=64)
    twin = NaiveCelo2(pallas.theta, orthogonalize=False, learning_rate=1.0)
    state = twin.init(params, 10)
    for seed in range(2):
        grads = draw({"a": (13, 40)}, seed + 1)
        updates, state = twin.update(grads, state, params, value=1.0)
    close(steps(pallas, params)[0], updates, 1e-5)


@pytest.mark.usefixtures("no_fallback")
def test_bfloat16_parameters_and_feedback_and_vmap() -> None:
    """Two tensors of a shape, arrays read in their own dtype, numbers fed back, a batch of thetas."""
    pallas, plain = pair("rnn_mlp", NARROW, tile=64)  # narrow enough not to be a matrix product
    params = draw({k: SHAPES[k] for k in ("t1", "t2")}, 0)
    (u, s), (v, q) = steps(pallas, params), steps(plain, params)
    close(u, v, 3e-6)
    assert plain.update_rule.feedback > 0
    close(s["schedule"], q["schedule"], 3e-6)

    pallas, plain = pair("celo2_base", NARROW, tile=64)
    params = draw({"t1": (9, 20), "t2": (9, 20)}, 0, jnp.bfloat16)
    (u, s), (v, q) = (steps(x, params, jnp.bfloat16) for x in (pallas, plain))
    close(s, q, 1e-6)
    for key in params:
        assert u[key].dtype == jnp.bfloat16
        assert float(jnp.mean(u[key] == v[key])) > 0.98  # a rounding to bfloat16 may tip over
    close(u, v, 2.0**-7)

    def last(optimizer: Any, theta: Any) -> Any:
        params, rule = {"a": draw({"a": (6, 10)}, 0)["a"]}, optimizer.with_theta(theta)
        return rule.update(params, rule.init(params), params, learning_rate=1.0)[0]

    thetas = jax.tree.map(lambda x: jnp.stack([x, -0.5 * x]), plain.theta)
    both = [jax.jit(jax.vmap(lambda t, o=o: last(o, t)))(thetas) for o in (pallas, plain)]
    close(both[0], both[1], 3e-6)
    assert float(jnp.abs(both[1]["a"][0] - both[1]["a"][1]).max()) > 0.1


@pytest.mark.usefixtures("no_fallback")
def test_a_bfloat16_state() -> None:
    """To the nearest it is the plain path's; stochastically a neighbour, another noise in every block."""
    params = draw({"a": (13, 40)}, 0)
    names = ("momentum", "second_moment")
    state = ("optimizer.state.dtype=bfloat16", "optimizer.state.rounding=nearest")
    pallas, plain = pair("celo2_base", NARROW, *state, tile=64)
    (u, s), (v, q) = steps(pallas, params), steps(plain, params)
    for name in names:
        got, want = s["learned"]["13x40"][name], q["learned"]["13x40"][name]
        assert got.dtype == jnp.bfloat16 and float(jnp.mean(got == want)) > 0.99
    close(u, v, 2.0**-7)

    pallas, plain = pair("celo2_base", NARROW, "optimizer.state.dtype=bfloat16", tile=64)
    params = {"a": jnp.ones((2, 32, 64))}
    grads = {"a": jnp.full((2, 32, 64), 1.001)}
    update = jax.jit(lambda s: pallas.update(grads, s, params, learning_rate=1.0)[1])
    first, again = update(pallas.init(params)), update(pallas.init(params))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    blocks = []
    for k, share in enumerate((0.1, 0.01, 0.001)):  # 1 - decay
        got = np.asarray(first["learned"]["2x32x64"]["momentum"][k], np.float64)
        ulp = 2.0 ** (np.floor(np.log2(share)) - 7)
        assert len(np.unique(got)) == 2 and np.ptp(got) <= ulp
        # 4,096 draws, each off by less than a unit: a standard deviation of the mean below 0.5 / 64.
        assert abs(got.mean() - np.float32(1.001) * share) < 5 * ulp * 0.5 / 64
        blocks += [x.tobytes() for x in got.reshape(2, -1, 64)]
    # A block is one row of 64: patterns of 64 random bits do not repeat.
    assert len(set(blocks)) == len(blocks)


def test_what_it_serves() -> None:
    """Tensors with a matrix that planes are normalized over, and step heads that need no whole tensor."""
    specs = Tensors(axes="last_two").specs({"m": (7, 5), "v": (5,), "line": (1, 9), "b": (2, 3, 4)})
    run = RunView(jnp.int32(0), jnp.int32(1), jnp.zeros(0), 4, {})

    def served(*overrides: str) -> list[str]:
        optimizer = build(load("celo2_base", [*overrides, "optimizer.kernel=pallas"]).optimizer)
        kernel = optimizer._kernel(run, None, Controls())
        return [path for path, spec in specs.items() if kernel.serves(spec)]

    assert served() == ["m", "b"] == served("optimizer.normalization.axes=all")
    assert served("optimizer.normalization.axes=rows") == []
    assert served("optimizer.step.precondition=True") == []
    with pytest.raises(UserError, match="kernel 'palas' .did you mean 'pallas'"):
        build(load("celo2", ["optimizer.kernel=palas"]).optimizer)


def test_a_part_that_is_more_than_elementwise_takes_the_plain_path() -> None:
    """RNN-MLP's layers are matrix products over stacked planes."""
    params = draw({"a": (13, 40)}, 0)
    pallas, plain = pair("rnn_mlp", tile=64)
    close(steps(pallas, params, count=1), steps(plain, params, count=1), 1e-6)


def test_a_broken_gradient_is_seen() -> None:
    params = draw({"a": (6, 20)}, 0)
    pallas, _ = pair("celo2_base", NARROW, tile=64)
    grads = {"a": params["a"].at[2, 3].set(jnp.nan)}
    update = jax.jit(lambda g: pallas.update(g, pallas.init(params), params)[0]["a"])
    assert bool(jnp.isnan(update(grads)).all()) and bool(jnp.isfinite(update(params)).all())


DEVICES = {"gpu": "cuda", "tpu": "tpu"}


def lowered(function: Any, platform: str, *args: Any) -> list[str]:
    """Returns the targets of the custom calls of a function that is lowered for another platform."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    return re.findall(r"custom_call @([^(]+)\(", text)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("variant", "overrides"),
    [("celo2_base", ()), ("celo2", ("optimizer.state.dtype=bfloat16",)), ("velo", ())],
)
def test_it_lowers_for_devices_that_are_not_here(
    variant: str, overrides: tuple[str, ...], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton and Mosaic take both kernels of a shape, ragged, bfloat16 and batched ones among them."""
    monkeypatch.setattr(tiling, "platform", lambda: device)
    monkeypatch.setattr(pallas_kernel, "platform", lambda: device)
    monkeypatch.setattr(PallasKernel, "whole", None)
    params = {"a": jnp.ones((300, 500)), "stack": jnp.ones((3, 1000, 130), jnp.bfloat16)}
    pallas, _ = pair(variant, *overrides)

    def copy(x: Any, y: Any) -> None:
        y[...] = x[...]

    like = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    options = tiling._triton().CompilerParams() if device == "gpu" else None
    try:
        call = pl.pallas_call(copy, out_shape=like, compiler_params=options)
        [target] = lowered(call, DEVICES[device], like)
    except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        pytest.skip(f"this JAX cannot lower Pallas for {device} here: {error}")
    state = jax.eval_shape(lambda p: pallas.init(p, 10), params)
    made = lowered(lambda g, s: pallas.update(g, s, params, value=1.0), DEVICES[device], params, state)
    assert made.count(target) == 4
