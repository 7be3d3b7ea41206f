"""The composed optimizer in other people's training loops, and the errors that it raises there."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from celo_nnx import UserError, load_optimizer
from celo_nnx.build import build
from celo_nnx.config import load
from celo_nnx.tensors import factored_axes

PARAMS = {
    "dense": {"kernel": jnp.ones((8, 24)), "bias": jnp.ones((24,))},
    "out": {"kernel": jnp.ones((24, 3))},
}
GRADS = jax.tree.map(
    lambda p: jnp.asarray(np.random.default_rng(0).normal(size=p.shape), jnp.float32), PARAMS
)


def two_steps(tx: optax.GradientTransformationExtraArgs) -> dict:
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize(
    "shape,axes",
    [((7, 5), (1, 0)), ((4, 9), (0, 1)), ((16, 16), (0, 1)), ((1, 6), (0, 1)), ((2, 8, 3), (2, 1))]
    + [((12, 64, 64), (1, 2)), ((64, 64, 12), (0, 1)), ((3, 3, 16, 3), (3, 2)), ((3, 3, 1, 32), (1, 3))],
)
def test_factored_axes(shape: tuple[int, ...], axes: tuple[int, int]) -> None:
    assert factored_axes(shape) == axes


def test_step_has_the_learning_rate_as_its_rms() -> None:
    tx = load_optimizer("celo2_base").as_optax(learning_rate=0.1)
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    for update in jax.tree.leaves(updates):
        np.testing.assert_allclose(jnp.sqrt(jnp.mean(update**2)), 0.1, rtol=1e-4)


def test_equal_shapes_are_updated_as_if_alone() -> None:
    """Tensors of one shape share a stacked state and a loop; each must move as it does alone."""
    opt = build(load("celo2_base").optimizer)
    rng = np.random.default_rng(3)
    tree = {f"w{i}": jnp.asarray(rng.normal(size=(6, 20)), jnp.float32) for i in range(3)}
    grads = {k: jnp.asarray(rng.normal(size=(6, 20)), jnp.float32) for k in tree}
    params, state = dict(tree), opt.init(tree)
    for _ in range(3):
        updates, state = jax.jit(opt.update)(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    for name in tree:
        alone, lone = {name: tree[name]}, opt.init({name: tree[name]})
        for _ in range(3):
            updates, lone = jax.jit(opt.update)({name: grads[name]}, lone, alone)
            alone = jax.tree.map(jnp.add, alone, updates)
        np.testing.assert_allclose(alone[name], params[name], atol=1e-6)


def test_matrix_axes_by_pattern() -> None:
    """A stacked tensor whose matrix is axes (2, 0) moves as its transpose does with the last two axes."""
    rng = np.random.default_rng(4)
    grads = [jnp.asarray(rng.normal(size=(20, 3, 24)), jnp.float32) for _ in range(3)]
    config = load("celo2").optimizer.copy_and_resolve_references()
    with config.unlocked():
        config.tensors.matrix = (("stack", 2, 0),)
    moved, plain = build(config), build(load("celo2").optimizer)
    a = {"stack": jnp.ones((20, 3, 24))}
    b = {"stack": jnp.ones((3, 24, 20))}
    sa, sb = moved.init(a), plain.init(b)
    for grad in grads:
        ua, sa = moved.update({"stack": grad}, sa, a, learning_rate=1.0)
        ub, sb = plain.update({"stack": grad.transpose(1, 2, 0)}, sb, b, learning_rate=1.0)
    np.testing.assert_allclose(ua["stack"].transpose(1, 2, 0), ub["stack"], atol=2e-4)
    assert list(sa["learned"]) == ["20x3x24-2-by-0-factored-2-1"]
    with config.unlocked():
        config.tensors.matrix = (("stack", 1, 3),)
    with pytest.raises(UserError, match="matrix axes of 'stack'"):
        build(config).init(a)


def test_weight_decay_is_decoupled_and_masked() -> None:
    plain = load_optimizer("celo2").as_optax(learning_rate=0.1)
    mask = {"dense": {"kernel": True, "bias": False}, "out": {"kernel": True}}
    decayed = load_optimizer("celo2").as_optax(learning_rate=0.1, weight_decay=0.5, mask=mask)
    a, _ = jax.jit(plain.update)(GRADS, plain.init(PARAMS), PARAMS)
    b, _ = jax.jit(decayed.update)(GRADS, decayed.init(PARAMS), PARAMS)
    np.testing.assert_allclose(b["dense"]["kernel"], a["dense"]["kernel"] - 0.1 * 0.5, rtol=1e-5)
    np.testing.assert_array_equal(b["dense"]["bias"], a["dense"]["bias"])
    everywhere = load_optimizer("celo2").as_optax(learning_rate=0.1, weight_decay=0.5)
    c, _ = jax.jit(everywhere.update)(GRADS, everywhere.init(PARAMS), PARAMS)
    np.testing.assert_allclose(c["dense"]["bias"], a["dense"]["bias"] - 0.1 * 20 * 0.5, rtol=1e-5)


def test_learning_rate_schedule_counts_updates() -> None:
    tx = load_optimizer("celo2_base").as_optax(learning_rate=optax.linear_schedule(1.0, 0.0, 2))
    state, sizes = tx.init(PARAMS), []
    for _ in range(3):
        updates, state = tx.update(GRADS, state, PARAMS)
        sizes.append(float(jnp.sqrt(jnp.mean(updates["out"]["kernel"] ** 2))))
    np.testing.assert_allclose(sizes, [1.0, 0.5, 0.0], atol=1e-4)


def test_chain_partition_and_multisteps() -> None:
    tx = load_optimizer("celo2").as_optax(learning_rate=0.01)
    alone = two_steps(tx)
    chained = two_steps(optax.chain(optax.identity(), tx))
    jax.tree.map(np.testing.assert_array_equal, alone, chained)
    labels = {"dense": {"kernel": "learned", "bias": "sgd"}, "out": {"kernel": "learned"}}
    parted = two_steps(optax.partition({"learned": tx, "sgd": optax.sgd(0.1)}, labels))
    np.testing.assert_allclose(parted["dense"]["kernel"], alone["dense"]["kernel"], atol=1e-6)
    np.testing.assert_allclose(parted["dense"]["bias"], 1 - 0.2 * GRADS["dense"]["bias"], atol=1e-6)
    every = optax.MultiSteps(tx, every_k_schedule=2)
    once = optax.apply_updates(PARAMS, tx.update(GRADS, tx.init(PARAMS), PARAMS)[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), two_steps(every), once)


def test_nnx_optimizer_trains_a_model() -> None:
    model = nnx.Linear(4, 24, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, load_optimizer("celo2").as_optax(learning_rate=0.02), wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (32, 4))

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - 1.0) ** 2))(model)
        optimizer.update(model, grads, value=loss)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.3 * losses[0]


def test_gradients_are_matched_by_path() -> None:
    """A list of more than ten is flattened in another order than a dict with its positions as keys."""
    rng = np.random.default_rng(5)
    params = {str(i): jnp.ones((3, 20)) for i in range(11)}
    grads = [jnp.asarray(rng.normal(size=(3, 20)), jnp.float32) for _ in range(11)]
    tx = load_optimizer("celo2_base").as_optax()
    update = jax.jit(tx.update)
    a, _ = update(grads, tx.init(params), params)
    b, _ = update({str(i): g for i, g in enumerate(grads)}, tx.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_empty_tensors_mixed_dtypes_and_a_mask_prefix() -> None:
    params = {
        "none": jnp.zeros((0, 4)),
        "half": jnp.ones((4, 20), jnp.bfloat16),
        "full": {"a": jnp.ones((4, 20)), "c": jnp.ones((4, 20))},
    }
    tx = load_optimizer("celo2").as_optax(weight_decay=1.0, mask={"none": False, "half": True, "full": False})
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates["none"].shape == (0, 4) and updates["half"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(updates["full"]["a"], updates["full"]["c"])
    assert not np.allclose(updates["half"].astype(jnp.float32), updates["full"]["a"], atol=1e-5)


def test_donated_state_and_vmap() -> None:
    tx = load_optimizer("celo2").as_optax()
    update = jax.jit(tx.update, donate_argnums=1)
    _, state = update(GRADS, tx.init(PARAMS), PARAMS)
    _, state = update(GRADS, state, PARAMS)
    assert int(state["count"]) == 2
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PARAMS)
    updates, _ = jax.vmap(lambda p: tx.update(GRADS, tx.init(p), p))(stacked)
    assert updates["out"]["kernel"].shape == (2, 24, 3)


def test_routes_of_celo2() -> None:
    routing = load_optimizer("celo2").routing
    rank = {
        "attention/bias": (4, 8),
        "norm/scale": (12, 8),
        "tok_embed/embedding": (99, 8),
        "v": (3,),
        "s": (),
    }
    assert {routing(p, s) for p, s in rank.items()} == {"adam"}
    assert {routing(p, (8, 8)) for p in ("mlp/kernel", "linear_0/w", "rescale/kernel", "member/w")} == {
        "learned"
    }


def test_optax_rule_as_a_route() -> None:
    tx = load_optimizer(
        "celo2", ["optimizer.routes.adam.kind=optax", "optimizer.routes.adam.name=lion"]
    ).as_optax()
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(jnp.abs(updates["dense"]["bias"]), 1e-3, rtol=1e-5)


def _raises(pattern: str):
    return pytest.raises(UserError, match=pattern)


def test_errors_name_the_tensor() -> None:
    tx = load_optimizer("celo2").as_optax()
    state = tx.init(PARAMS)
    with _raises("gradient tree lacks 'out/kernel'"):
        tx.update({"dense": GRADS["dense"]}, state, PARAMS)
    with _raises("gradient 'out/kernel' has shape"):
        tx.update({**GRADS, "out": {"kernel": jnp.ones((3, 24))}}, state, PARAMS)
    with _raises("which is not expected"):
        tx.update({**GRADS, "more": jnp.ones(3)}, state, PARAMS)
    with _raises("'i' has dtype int32"):
        tx.init({"i": jnp.ones((2, 2), jnp.int32)})
    with _raises("optimizer state tree"):
        tx.update({"w": jnp.ones((9, 9))}, state, {"w": jnp.ones((9, 9))})
    with _raises("two parameters have the path 'a/b'"):
        tx.init({"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}})
    with _raises("'x' is a float"):
        tx.init({"x": 1.0})
    with _raises("mask does not fit"):
        load_optimizer("celo2").as_optax(weight_decay=1.0, mask={"dense": True}).update(GRADS, state, PARAMS)
    for bad in ({"learning_rate": -1.0}, {"weight_decay": -1}, {"num_steps": 2.5}, {"learning_rate": "x"}):
        with _raises("is out of range"):
            load_optimizer("celo2").as_optax(**bad)
    with _raises("update needs params"):
        tx.update(GRADS, state)
    opt = load_optimizer("celo2")
    with _raises("theta tree lacks"):
        opt.with_theta({"update_rule": {}})


def test_hand_made_theta_follows_the_feature() -> None:
    """With the identity for orthogonalization the step is the RMS-normalized momentum itself."""
    for channel, decay in enumerate((0.9, 0.99, 0.999)):
        start = {"kind": "hand_made", "mix": (("momentum", channel, 1.0),)}
        opt = build(load("celo2_base").optimizer, theta_init=start)
        updates, _ = opt.update(GRADS, opt.init(PARAMS), PARAMS, learning_rate=1.0)
        momentum = (1 - decay) * GRADS["dense"]["kernel"]
        expected = -momentum / jnp.sqrt(jnp.mean(momentum**2))
        np.testing.assert_allclose(updates["dense"]["kernel"], expected, atol=1e-4)


def test_theta_noise_has_the_stated_size() -> None:
    start = {"kind": "hand_made"}
    clean = build(load("celo2").optimizer, theta_init=start).theta
    noisy = build(load("celo2").optimizer, theta_init={**start, "noise": 0.1}).theta
    gaps = np.concatenate(
        [(a - b).ravel() for a, b in zip(jax.tree.leaves(noisy), jax.tree.leaves(clean), strict=True)]
    )
    assert gaps.size == 347 and abs(gaps.std() - 0.1) < 0.02
