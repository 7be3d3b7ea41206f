"""What every listed clip, tracker, tensor feature, schedule, rate scale and update rule must do."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from celo_nnx.build import TABLES, build
from celo_nnx.components.clipping import CLIPS
from celo_nnx.components.rate_scales import RATE_SCALES
from celo_nnx.components.schedules import SCHEDULES
from celo_nnx.components.tensor_features import TENSOR_FEATURES
from celo_nnx.components.trackers import TRACKERS
from celo_nnx.components.update_rules import UPDATE_RULES
from celo_nnx.config import load, presets
from celo_nnx.interfaces import Controls, RunView, TensorSpec, TensorView
from celo_nnx.tensors import Tensors

WIDTH, ROWS = 5, 3
SIZES = {"momentum": 3, "second_moment": 1, "factored": 3, "loss": 9, "controls": 4}
# Large VeLO is velo_s with other sizes, and slow to draw.
VARIANTS = [name for name, (_, whole) in presets().items() if whole and name != "velo"]
# Compiling one takes ten seconds: the others differ from these in one part, and run in the drills.
QUICK = ("celo", "celo_adam", "velo_s", "rnn_mlp", "adafac_mlp", "nn_adam")


def same_form(a: Any, b: Any) -> bool:
    return jax.tree.map(lambda x: (x.shape, x.dtype), a) == jax.tree.map(lambda x: (x.shape, x.dtype), b)


def finite(tree: Any) -> bool:
    return all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(tree))


def made(table: dict[str, type], name: str) -> Any:
    """Builds a schedule with the rows that a learned one is told of."""
    learned = "width" in table[name].__init__.__annotations__
    return table[name](**({"width": WIDTH, "key": jax.random.key(0)} if learned else {}))


@pytest.mark.parametrize("name", CLIPS)
def test_clip(name: str) -> None:
    part = CLIPS[name]()
    state = part.init()
    for square in (0.0, 1.0, 1e30):
        limit = part.limit(state)
        assert limit is None or float(limit) > 0 and np.isfinite(limit)
        after = part.update(state, jnp.float32(square))
        assert same_form(state, after) and finite(after)
        state = after


@pytest.mark.parametrize("name", TRACKERS)
def test_tracker_under_scan_and_vmap(name: str) -> None:
    part = TRACKERS[name]()

    def follow(losses: jax.Array) -> jax.Array:
        def step(state: Any, loss: jax.Array) -> tuple[Any, jax.Array]:
            after = part.update(state, loss)
            assert same_form(state, after)
            return after, part.read(after, loss)

        return jax.lax.scan(step, part.init(100), losses)[1]

    losses = jnp.array(
        [[2.0, 1.5, 1.8, 0.0, 1e30, 3.0], [0.0] * 6, [1e30] * 6, [-1.0, 1.0, -1.0, 1.0, 0.0, 2.0]]
    )
    out = jax.jit(jax.vmap(follow))(losses)
    assert out.shape == (4, 6, part.width) and finite(out) and bool((jnp.abs(out) <= 5).all())
    assert same_form(part.init(jnp.int32(100)), part.init(100))
    if part.width:
        assert bool(jnp.isnan(follow(jnp.array([1.0, 2.0, 3.0, jnp.nan]))[-1]).any()), (
            "a NaN loss is not hidden"
        )


@functools.lru_cache
def run_view(shape: tuple[int, ...], scale: float) -> RunView:
    spec: TensorSpec = Tensors(axes="last_two").specs({"w": shape})["w"]
    x = jnp.asarray(np.random.default_rng(0).normal(size=spec.shape), jnp.float32) * scale
    stats = {"momentum": jnp.stack([x] * 3), "second_moment": (x * x)[None]}
    shown = {"controls": jnp.full((4,), scale)}
    tensor = TensorView(x, x, stats, spec)
    return RunView(jnp.int32(3), jnp.int32(100), jnp.linspace(-1, 1, 9), 2, shown, tensor, spec)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e15])
@pytest.mark.parametrize("shape", [(), (5,), (7, 5), (2, 3, 4, 6)])
@pytest.mark.parametrize("name", TENSOR_FEATURES)
def test_tensor_feature(name: str, shape: tuple[int, ...], scale: float) -> None:
    part = TENSOR_FEATURES[name]()
    values = part.values(run_view(shape, scale))
    assert values.shape == (part.width(SIZES),) and values.dtype == jnp.float32 and finite(values)


@pytest.mark.parametrize("name", TENSOR_FEATURES)
def test_a_feature_that_does_not_look_needs_no_tensor(name: str) -> None:
    part, view = TENSOR_FEATURES[name](), run_view((7, 5), 1.0)
    blind = RunView(view.count, view.num_steps, view.loss, view.tensors, view.shown)
    if part.looks:
        with pytest.raises(AssertionError):
            part.values(blind)
    else:
        np.testing.assert_array_equal(part.values(blind), part.values(view))


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_under_scan_and_vmap_over_theta(name: str) -> None:
    from flax import nnx

    from celo_nnx.interfaces import MetaParam

    part = made(SCHEDULES, name)
    graphdef, theta, rest = nnx.split(part, MetaParam, ...)

    def run(theta: Any, rows: jax.Array) -> Any:
        bound = nnx.merge(graphdef, theta, rest)

        def step(state: Any, x: jax.Array) -> tuple[Any, Controls]:
            assert all(v.shape[0] in (1, ROWS) for v in bound.shown(state).values())
            assert {n: v.shape[1] for n, v in bound.shown(state).items()}.items() <= bound.sizes().items()
            controls, after = bound.advance(state, x)
            assert same_form(state, after)
            return after, controls

        return jax.lax.scan(step, bound.init(ROWS), rows)[1], bound.base(jnp.int32(0), jnp.int32(10))

    rows = jnp.stack([jnp.zeros((ROWS, WIDTH)), jnp.full((ROWS, WIDTH), 5.0), jnp.full((ROWS, WIDTH), -1e6)])
    thetas = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), theta)
    controls, base = jax.jit(jax.vmap(run, (0, None), axis_size=2))(thetas, rows)
    assert finite(controls) and base.shape == (2,) and float(base[0]) >= 0
    for leaf in jax.tree.leaves(controls):
        assert leaf.shape[:2] == (2, 3) and leaf.shape[2] == ROWS


@pytest.mark.parametrize("name", SCHEDULES)
def test_hand_made_schedule_has_the_rate_1(name: str) -> None:
    from flax import nnx

    from celo_nnx.interfaces import MetaParam

    part = made(SCHEDULES, name)
    theta = part.hand_made()
    if not theta or name == "adam_hyperparameters":
        return
    graphdef, own, rest = nnx.split(part, MetaParam, ...)
    nnx.replace_by_pure_dict(own, theta)
    part = nnx.merge(graphdef, own, rest)
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, WIDTH)), jnp.float32)
    controls, _ = part.advance(part.init(ROWS), rows)
    if controls.rate is not None:
        np.testing.assert_allclose(controls.rate, 1.0, rtol=1e-6)


@pytest.mark.parametrize("name", RATE_SCALES)
def test_rate_scale(name: str) -> None:
    part = RATE_SCALES[name]()
    assert part("a/b", (3, 4)) > 0 and part("s", ()) > 0


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e10])
@pytest.mark.parametrize("name", UPDATE_RULES)
def test_update_rule(name: str, scale: float) -> None:
    widths = {"momentum": 3, "second_moment": 1}
    part = UPDATE_RULES[name](widths=widths, context={"time_tanh": 11}, key=jax.random.key(0))
    shape = (4, 6)
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32) * scale
    groups = {"momentum": [x, x, x], "second_moment": [x * x]}
    factor = jnp.full((4, 1, 1), 1.0 / (1.0 + scale**2))
    prepared = part.prepare(tuple(groups), factor, {"time_tanh": jnp.zeros(11)}, Controls())
    direction, magnitude, more = part(groups, prepared, shape)
    assert direction.shape == shape and len(more) == part.feedback and finite((direction, more))
    assert magnitude is None or magnitude.shape == shape and finite(magnitude)


def test_every_table_has_a_contract() -> None:
    here = {"clipping", "trackers", "tensor_features", "schedules", "rate_scales", "update_rules"}
    elsewhere = {
        "accumulators",
        "features",
        "normalization",
        "orthogonalization",
        "route_rules",
        "routing",
        "steps",
    }
    assert here | elsewhere == set(TABLES)


@pytest.mark.parametrize(
    "variant", [name if name in QUICK else pytest.param(name, marks=pytest.mark.drill) for name in VARIANTS]
)
def test_variant_in_bfloat16_under_scan_and_vmap_over_theta(variant: str) -> None:
    """Zero and huge gradients, a tensor of each kind; one trace, finite parameters of the same dtype."""
    opt = build(load(variant).optimizer)
    rng = np.random.default_rng(0)
    shapes = {"layer": {"w": (4, 20), "b": (3,)}, "gain": ()}
    params = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.bfloat16),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    traces = []
    # Without a clip the square of a gradient must itself be a number.
    huge = 1e15 if opt.clip.limit(opt.clip.init()) is None else 1e30

    def run(theta: Any, params: Any) -> Any:
        traces.append(1)
        bound = opt.with_theta(theta)

        def body(carry: Any, scale: jax.Array) -> Any:
            params, state = carry
            grads = jax.tree.map(lambda p: (jnp.ones_like(p) * scale).astype(p.dtype), params)
            updates, after = bound.update(grads, state, params, value=jnp.abs(scale) + 1.0)
            assert same_form(state, after)
            return (jax.tree.map(jnp.add, params, updates), after), None

        return jax.lax.scan(body, (params, bound.init(params, 4)), jnp.array([0.0, 1.0, huge, -1e-30]))[0]

    thetas = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), opt.theta)
    batched = jax.jit(jax.vmap(run, (0, None)))
    out, state = batched(thetas, params)
    batched(thetas, params)
    assert len(traces) == 1 and state["count"].tolist() == [4, 4]
    assert finite(out) and {x.dtype for x in jax.tree.leaves(out)} == {jnp.dtype(jnp.bfloat16)}
