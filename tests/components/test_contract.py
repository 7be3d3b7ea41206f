"""What every listed part must do: a part is tested by being in a table."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from celo_nnx.build import TABLES, build, parameters
from celo_nnx.components.accumulators import ACCUMULATORS
from celo_nnx.components.features import FEATURES
from celo_nnx.components.normalization import NORMALIZATIONS
from celo_nnx.components.orthogonalization import ORTHOGONALIZATIONS
from celo_nnx.components.update_rules import ROUTE_RULES
from celo_nnx.config import load
from celo_nnx.interfaces import TensorSpec, TensorView
from celo_nnx.tensors import Tensors

SHAPES = [(), (5,), (7, 5), (4, 1), (3, 20, 24), (2, 3, 4, 6)]
SCALES = [0.0, 1.0, 1e30]


def spec_of(shape: tuple[int, ...]) -> TensorSpec:
    return Tensors(axes="last_two").specs({"w": shape})["w"]


@functools.lru_cache
def view_of(shape: tuple[int, ...], scale: float) -> TensorView:
    spec = spec_of(shape)
    grad = jnp.asarray(np.random.default_rng(0).normal(size=spec.shape), jnp.float32) * scale
    grad = jnp.clip(grad, -1000, 1000)
    stats = {}
    for name, part in ACCUMULATORS.items():
        made = part()
        stats[name] = made.read(
            made.update(made.init(spec), made.measure(grad, spec), spec), spec, jnp.int32(0)
        )
    return TensorView(param=jnp.ones(spec.shape), grad=grad, stats=stats, spec=spec)


@pytest.mark.parametrize("kind,name", [(k, n) for k, table in TABLES.items() for n in table])
def test_documented_and_keyword_only(kind: str, name: str) -> None:
    part = TABLES[kind][name]
    assert part.__doc__
    assert all(default is not None or key == "arguments" for key, default in parameters(part).items())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ACCUMULATORS)
def test_accumulator_keeps_its_state_tree(name: str, shape: tuple[int, ...]) -> None:
    part, spec = ACCUMULATORS[name](), spec_of(shape)
    state = part.init(spec)
    grad = jnp.full(spec.shape, 2.0)
    after = part.update(state, part.measure(grad, spec), spec)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(part.read(after, spec, jnp.int32(0))))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FEATURES)
def test_feature_planes(name: str, shape: tuple[int, ...], scale: float) -> None:
    view = view_of(shape, scale)
    part = FEATURES[name]()
    planes = part.planes(view)
    banks = {n: a().size for n, a in ACCUMULATORS.items()}
    assert len(planes) in (0, part.width(banks))
    if view.spec.factored is not None:
        assert planes, "a factored tensor has every group"
    for plane in planes:
        assert jnp.broadcast_shapes(plane.shape, view.spec.shape) == view.spec.shape
        assert len(plane.shape) == len(view.spec.shape)
        assert bool(jnp.isfinite(plane).all())


@pytest.mark.parametrize("name", FEATURES)
def test_feature_is_elementwise_along_rows(name: str) -> None:
    """The kernel evaluates groups on blocks of rows; a block must equal that block of the whole."""
    from celo_nnx.planes import rows

    view, part = view_of((24, 20), 1.0), FEATURES[name]()
    tree = rows((view.param, view.grad, view.stats), 2, 8, 8, 24)
    block = part.planes(TensorView(param=tree[0], grad=tree[1], stats=tree[2], spec=view.spec))
    for whole, part_of in zip(part.planes(view), block, strict=True):
        expected = whole[8:16] if whole.shape[0] == 24 else whole
        np.testing.assert_array_equal(part_of, expected)


@pytest.mark.parametrize("name", NORMALIZATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_normalization(name: str, shape: tuple[int, ...]) -> None:
    part, spec = NORMALIZATIONS[name](), spec_of(shape)
    assert all(0 <= a < len(spec.shape) for a in part.axes(spec))
    scale = part.scale(jnp.array([0.0, 1.0, 1e30]))
    assert scale.shape == (3,) and bool((scale > 0).all()) and bool(jnp.isfinite(scale).all())


def test_second_moment_normalization_gives_unit_mean_square() -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(size=(6, 4)), jnp.float32)
    for axes, reduced in (("matrix", (0, 1)), ("all", (0, 1)), ("rows", (1,)), ("columns", (0,))):
        part = NORMALIZATIONS["second_moment"](axes=axes)
        over = part.axes(spec_of((24, 20)))
        assert over == reduced
        y = x * part.scale(jnp.mean(x * x, over, keepdims=True))
        np.testing.assert_allclose(jnp.mean(y * y, over), 1.0, rtol=1e-5)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ORTHOGONALIZATIONS)
def test_orthogonalization_keeps_shape(name: str, shape: tuple[int, ...], scale: float) -> None:
    spec = spec_of(shape)
    step = jnp.asarray(np.random.default_rng(0).normal(size=spec.shape), jnp.float32) * scale
    out = ORTHOGONALIZATIONS[name]()(step, spec)
    assert out.shape == step.shape and out.dtype == step.dtype and bool(jnp.isfinite(out).all())


def test_newton_schulz_pulls_singular_values_to_one() -> None:
    step = np.random.default_rng(0).normal(size=(3, 20, 32)).astype(np.float32)
    out = ORTHOGONALIZATIONS["newton_schulz"](steps=10)(jnp.asarray(step), spec_of((3, 20, 32)))
    singular = np.linalg.svd(np.asarray(out), compute_uv=False)
    assert singular.min() > 0.6 and singular.max() < 1.3
    u, _, vt = np.linalg.svd(step, full_matrices=False)
    cosine = np.sum(np.asarray(out) * (u @ vt)) / np.sqrt(np.sum(np.asarray(out) ** 2) * 60)
    assert cosine > 0.97  # the polar factor's direction, batch axis untouched


@pytest.mark.parametrize("name", ROUTE_RULES)
def test_route_rule(name: str) -> None:
    part = ROUTE_RULES[name]()
    params = {"a/b": jnp.ones((3,)), "c": jnp.ones((2, 2))}
    state = part.init(params)
    for scale in SCALES[:2]:
        grads = jax.tree.map(lambda p, s=scale: p * s, params)
        steps, after = part.update(grads, state, params, jnp.int32(0))
        assert set(steps) == set(params)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert all(bool(jnp.isfinite(s).all()) for s in steps.values())


TREE = {"embed": (6, 4), "dense": {"kernel": (7, 24), "b": (24,)}, "conv": (2, 3, 4, 6), "scale": ()}


def random_tree(seed: int, scale: float = 1.0, dtype: jnp.dtype = jnp.float32) -> dict:
    rng = np.random.default_rng(seed)
    leaf = lambda s: jnp.asarray(rng.normal(size=s) * scale, dtype)  # noqa: E731
    return jax.tree.map(leaf, TREE, is_leaf=lambda x: isinstance(x, tuple))


@pytest.mark.parametrize("variant", ["celo2", "celo2_base", "celo2_published"])
def test_variant_under_jit_scan_and_vmap_over_theta(variant: str) -> None:
    opt = build(load(variant).optimizer)
    params = random_tree(0)
    traces = []

    def run(theta, params):
        traces.append(1)
        bound = opt.with_theta(theta)

        def body(carry, scale):
            params, state = carry
            grads = jax.tree.map(lambda p: p * scale, params)
            updates, state = bound.update(grads, state, params, value=1.0)
            return (jax.tree.map(jnp.add, params, updates), state), None

        scales = jnp.array([0.0, 1.0, 1e30, 1e-30])
        return jax.lax.scan(body, (params, bound.init(params, 4)), scales)[0]

    thetas = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), opt.theta)
    batched = jax.jit(jax.vmap(run, (0, None)))
    out, state = batched(thetas, params)
    batched(thetas, params)
    assert len(traces) == 1
    one, _ = jax.jit(run)(opt.theta, params)
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(one), strict=True):
        assert bool(jnp.isfinite(a).all())
        np.testing.assert_allclose(a[0], b, atol=2e-5)
    assert state["count"].tolist() == [4, 4]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_update_keeps_the_parameters_dtype(dtype: jnp.dtype) -> None:
    opt = build(load("celo2").optimizer)
    params, grads = random_tree(0, dtype=dtype), random_tree(1, dtype=dtype)
    updates, state = opt.update(grads, opt.init(params), params)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert {x.dtype for x in jax.tree.leaves(state["learned"])} == {jnp.dtype(jnp.float32)}
