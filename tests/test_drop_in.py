"""``celo_nnx.celo2`` and its siblings where ``optax.adamw`` was: in loops, wrapped, saved and restored."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import celo_nnx
from celo_nnx import UserError, diagnostics, load_optimizer
from celo_nnx.interfaces import Schedule
from celo_nnx.theta_io import save_theta

QUICK = {"xla_backend_optimization_level": 0}  # compiles faster, the program is the same
SHAPES = {"w": (6, 20), "b": (20,)}
VECTOR = {"v": jnp.array([0.5, -1.0, 2.0])}  # what compiles fastest: theta and learning rate show in it too


def normal(seed: int, shapes: Any = SHAPES) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


PARAMS, GRADS = normal(0), [normal(seed) for seed in (1, 2, 3)]


def jitted(tx: optax.GradientTransformation, **options: Any) -> Any:
    return jax.jit(tx.update, compiler_options=QUICK, **options)


def walk(tx: optax.GradientTransformation, count: int = 2, params: Any = PARAMS) -> tuple[Any, Any]:
    """Returns (updates of each of the first steps, last state); the parameters stay where they are."""
    update, state, made = jitted(tx), tx.init(params), []
    for grads in GRADS[:count]:
        updates, state = update(grads, state, params)
        made.append(updates)
    assert update._cache_size() == 1, "compiled once"
    return made, state


@functools.cache
def alone(name: str = "celo2") -> Any:
    """Three updates at learning rate 0.1, without a wrapper."""
    return walk(getattr(celo_nnx, name)(0.1), 3)[0]


def same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def near(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def _raises(pattern: str) -> Any:
    return pytest.raises(UserError, match=pattern)


# --- plain JAX --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["celo2", "celo2_base"])
def test_step_sizes_are_what_the_documentation_says(name: str) -> None:
    """A matrix moves by the learning rate in RMS; a vector by 20 Adam steps, or by the learning rate too."""
    for updates, grads in zip(alone(name)[:1], GRADS, strict=False):
        np.testing.assert_allclose(jnp.sqrt(jnp.mean(updates["w"] ** 2)), 0.1, rtol=1e-4)
        if name == "celo2":
            adam = 0.1 * grads["b"] / jnp.sqrt(0.05 * grads["b"] ** 2 + 1e-8)
            np.testing.assert_allclose(updates["b"], -0.1 * 20 * adam, rtol=1e-5)
        else:
            np.testing.assert_allclose(jnp.sqrt(jnp.mean(updates["b"] ** 2)), 0.1, rtol=1e-4)


def test_matrix_products_read_what_was_asked() -> None:
    """In bfloat16 a step differs by the rounding of Newton-Schulz's products, some 1e-2, and by no more."""
    key, steps = jax.random.key(0), []
    params = {"w": jax.random.normal(key, (48, 64))}
    for dtype in ("float32", "bfloat16"):
        tx = celo_nnx.celo2(1.0, orthogonalization_dtype=dtype)
        steps.append(tx.update(params, tx.init(params), params)[0]["w"])
    difference = jnp.sqrt(jnp.mean((steps[0] - steps[1]) ** 2))  # of steps of RMS 1
    assert 1e-3 < difference < 5e-2
    with _raises("unknown dtype 'float16'"):
        celo_nnx.celo2(orthogonalization_dtype="float16")


@pytest.mark.parametrize(
    "dtype,make",
    [
        ("bfloat16", lambda: celo_nnx.celo2(0.1, state_dtype="bfloat16", diagnostics=True)),
        ("bfloat16", lambda: celo_nnx.celo2(0.1, orthogonalization_dtype="bfloat16")),
        ("float32", lambda: celo_nnx.celo2_base(optax.linear_schedule(0.1, 0.0, 9), 0.1)),
        ("float32", lambda: celo_nnx.celo2_base(jnp.float32(0.1), state_dtype="bfloat16")),
        ("bfloat16", lambda: load_optimizer("celo2_base", ["optimizer.tile=60"]).as_optax(diagnostics=True)),
        ("float32", lambda: celo_nnx.celo(num_steps=10, diagnostics=True)),
    ],
)
def test_the_state_keeps_its_structure_to_the_last_bit(dtype: str, make: Any) -> None:
    """Tree, shapes, dtypes and weak types: else a scan fails, a donation copies, a jit compiles twice."""
    tx = make()
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), PARAMS | {"w2": PARAMS["w"]}
    )
    before = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(lambda g, s, p: tx.update(g, s, p, value=0.5), params, before, params)
    kind = lambda x: (x.shape, x.dtype, getattr(x, "weak_type", False))  # noqa: E731
    assert jax.tree.map(kind, before) == jax.tree.map(kind, after)
    assert jax.tree.map(kind, updates) == jax.tree.map(kind, params)


def test_a_donated_state_is_gone_and_scan_goes_the_same_way(users_compiler: None) -> None:
    tx = celo_nnx.celo2(0.1)
    update, state = jitted(tx, donate_argnums=1), tx.init(PARAMS)
    for grads, want in zip(GRADS, alone.__wrapped__(), strict=True):
        updates, new = update(grads, state, PARAMS)
        same(updates, want)
        # Only scalars that the program hands through unchanged may stay.
        assert all(x.is_deleted() for x in jax.tree.leaves(state) if x.ndim)
        state = new
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *GRADS)

    def step(state: Any, grads: Any) -> Any:
        return tx.update(grads, state, PARAMS)[::-1]

    scan = jax.jit(lambda g: jax.lax.scan(step, tx.init(PARAMS), g), compiler_options=QUICK)
    end, made = scan(stacked)
    near(made, jax.tree.map(lambda *x: jnp.stack(x), *alone()))
    near(end["learned"], state["learned"])


def test_learning_rate_schedule_weight_decay_and_mask() -> None:
    rate = optax.piecewise_constant_schedule(0.1, {1: 2.0})
    made, _ = walk(celo_nnx.celo2(rate, 0.5, mask=lambda params: {"w": True, "b": False}))
    for i, (updates, want) in enumerate(zip(made, alone(), strict=False)):
        scale = 2.0**i
        near(updates["w"], scale * (want["w"] - 0.1 * 0.5 * PARAMS["w"]))
        near(updates["b"], scale * want["b"])


# --- wrappers ---------------------------------------------------------------------------------------------


def test_nnx_optimizer_with_diagnostics() -> None:
    """Paths end in ``.value`` at init and not at an update: figures and state keep their names."""
    model = nnx.Linear(6, 20, rngs=nnx.Rngs(0))
    model.kernel[...], model.bias[...] = PARAMS["w"], PARAMS["b"]
    optimizer = nnx.Optimizer(model, celo_nnx.celo2(0.1, diagnostics=True), wrt=nnx.Param)
    grads = nnx.state(nnx.clone(model), nnx.Param)  # the model's own share its arrays
    grads["kernel"][...], grads["bias"][...] = GRADS[0]["w"], GRADS[0]["b"]
    before = model.kernel[...]
    nnx.jit(lambda model, optimizer, grads: optimizer.update(model, grads))(model, optimizer, grads)
    near(model.kernel[...] - before, alone()[0]["w"])
    figures = diagnostics(nnx.to_pure_dict(nnx.state(optimizer))["opt_state"])
    assert set(figures) == {"kernel", "bias"}
    np.testing.assert_allclose(figures["kernel"]["update_rms"], 0.1, rtol=1e-4)


def test_multisteps_averages_gradients() -> None:
    every = optax.MultiSteps(celo_nnx.celo2(0.1, diagnostics=True), every_k_schedule=2)
    two = jax.tree.map(lambda a, b: 2 * a - b, GRADS[0], GRADS[1])  # its mean with the other is the first
    update, state = jitted(every), every.init(PARAMS)
    first, state = update(two, state, PARAMS)
    same(first, jax.tree.map(jnp.zeros_like, PARAMS))
    second, state = update(GRADS[1], state, PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), second, alone()[0])
    np.testing.assert_allclose(diagnostics(state)["w"]["update_rms"], 0.1, rtol=1e-4)


def test_apply_if_finite_leaves_parameters_and_state() -> None:
    safe = optax.apply_if_finite(celo_nnx.celo2(0.1), max_consecutive_errors=3)
    update, state = jitted(safe), safe.init(PARAMS)
    for value in (jnp.nan, jnp.inf):
        bad = {"w": GRADS[0]["w"].at[1, 2].set(value), "b": GRADS[0]["b"]}
        updates, after = update(bad, state, PARAMS)
        same(updates, jax.tree.map(jnp.zeros_like, PARAMS))
        same(after.inner_state, state.inner_state)
    near(update(GRADS[0], after, PARAMS)[0], alone()[0])


def test_inject_hyperparams_changes_the_step_without_compiling_anew() -> None:
    tx = optax.inject_hyperparams(celo_nnx.celo2)(learning_rate=0.1, weight_decay=0.0)
    update, state = jitted(tx), tx.init(PARAMS)
    first, state = update(GRADS[0], state, PARAMS)
    near(first, alone()[0])
    state.hyperparams["learning_rate"] = jnp.float32(0.3)
    state.hyperparams["weight_decay"] = jnp.float32(0.5)
    second, _ = update(GRADS[1], state, PARAMS)
    near(second["w"], 3 * alone()[1]["w"] - 0.3 * 0.5 * PARAMS["w"])
    near(second["b"], 3 * alone()[1]["b"] - 20 * 0.3 * 0.5 * PARAMS["b"])
    assert update._cache_size() == 1


def test_inject_hyperparams_with_a_schedule_a_theta_and_a_function() -> None:
    made = optax.inject_hyperparams(celo_nnx.celo2_base, static_args=("mask",))
    schedule = optax.linear_schedule(0.1, 0.0, 2)
    theta = load_optimizer("celo2_base").theta
    tx = made(learning_rate=schedule, weights=theta, mask=lambda params: {"v": False}, num_steps=7)
    update, state, sizes = jitted(tx), tx.init(VECTOR), []
    for _ in range(3):
        updates, state = update(VECTOR, state, VECTOR)
        sizes.append(float(jnp.sqrt(jnp.mean(updates["v"] ** 2))))
    np.testing.assert_allclose(sizes, [0.1, 0.05, 0.0], atol=1e-5)
    assert int(state.inner_state["num_steps"]) == 7


def test_inject_hyperparams_is_told_that_a_mask_is_no_schedule() -> None:
    """It would call the function with the number of updates and switch the decay off."""
    made = optax.inject_hyperparams(celo_nnx.celo2)
    tx = made(0.1, weight_decay=0.5, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params))
    with _raises('single value, .*: optax.inject_hyperparams needs static_args=\\("mask",\\)'):
        jax.eval_shape(lambda: tx.update(PARAMS, tx.init(PARAMS), PARAMS))


def test_groups_with_their_own_learning_rates() -> None:
    """One rule, two rates; masks of the whole tree, and figures of both groups together."""
    mask = {"slow": {"w": True, "b": False}, "fast": {"w": False, "b": True}}
    rates = {"slow": 0.1, "fast": 0.3}
    txs = {k: celo_nnx.celo2(r, 0.5, mask=mask, diagnostics=True) for k, r in rates.items()}
    tx = optax.partition(txs, {"slow": "slow", "fast": "fast"})
    params, grads = {"slow": PARAMS, "fast": PARAMS}, {"slow": GRADS[0], "fast": GRADS[0]}
    updates, state = jitted(tx)(grads, tx.init(params), params)
    want = alone()[0]
    near(updates["slow"], {"w": want["w"] - 0.05 * PARAMS["w"], "b": want["b"]})
    near(updates["fast"], {"w": 3 * want["w"], "b": 3 * want["b"] - 20 * 0.15 * PARAMS["b"]})
    assert set(diagnostics(state)) == {"slow/w", "slow/b", "fast/w", "fast/b"}


def test_masked_tensors_pass_and_the_others_move_as_ever() -> None:
    inner = celo_nnx.celo2(0.1, dimensions={"w": optax.contrib.MuonDimensionNumbers(), "b": None})
    updates = walk(optax.masked(inner, {"w": True, "b": False}), 1)[0][0]
    same(updates["b"], GRADS[0]["b"])
    near(updates["w"], alone()[0]["w"])


# --- weights ----------------------------------------------------------------------------------------------


def theta(seed: int) -> Any:
    leaves, tree = jax.tree.flatten(load_optimizer("celo2_base").theta)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten([jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def test_weights_as_a_tree_a_file_a_run_folder_and_a_name(tmp_path: Path) -> None:
    def update(weights: Any) -> jax.Array:
        tx = celo_nnx.celo2_base(0.1, weights=weights)
        return tx.update(VECTOR, tx.init(VECTOR), VECTOR)[0]["v"]

    file = tmp_path / "theta.safetensors"
    save_theta(file, theta(0))
    want = update(theta(0))
    for weights in (file, str(file), tmp_path, jax.tree.map(np.asarray, theta(0))):
        same(update(weights), want)
    assert float(jnp.max(jnp.abs(update(None) - want))) > 1e-3
    same(update("celo2_base"), update(None))
    assert float(jnp.max(jnp.abs(update("hand_made") - update(None)))) > 1e-3
    # A file that was written anew is read anew.
    save_theta(file, theta(1))
    os.utime(file, (0, 0))
    same(update(file), update(theta(1)))


@pytest.mark.parametrize(
    "weights,message",
    [
        ("handmade", "unknown weights 'handmade' \\(did you mean 'hand_made'\\?\\); known: .*celo2"),
        ("", "unknown weights ''"),
        ("runs/none", "no weights at runs/none: neither a file nor a run folder"),
        ("none.safetensors", "no weights at none.safetensors"),
        (3, "weights = 3 is out of range: must be a theta, a file, a run folder or a name"),
        ({"update_rule": {}}, "the theta tree lacks 'update_rule/b0'"),
        ({"update_rule": 1.0}, "the theta tree lacks 'update_rule/b0'"),
    ],
)
def test_wrong_weights_are_told_in_one_line(weights: Any, message: str) -> None:
    with _raises(message) as error:
        celo_nnx.celo2(weights=weights)
    assert "\n" not in str(error.value)


def test_wrong_files_and_shapes_are_told_in_one_line(tmp_path: Path) -> None:
    with _raises(f"no theta at {tmp_path}"):
        celo_nnx.celo2(weights=tmp_path)
    (tmp_path / "theta.safetensors").write_bytes(b"nothing")
    with _raises("theta.safetensors is not a readable safetensors file"):
        celo_nnx.celo2(weights=tmp_path)
    other = load_optimizer("celo2_base", ["optimizer.update_rule.hidden=(4,4)"], weights="hand_made").theta
    save_theta(tmp_path / "theta.safetensors", other)
    with _raises("the optimizer has float32"):
        celo_nnx.celo2(weights=tmp_path)
    with _raises("theta 'update_rule/b0' has shape \\(4,\\), expected \\(8,\\)"):
        celo_nnx.celo2(weights=other)
    with _raises("theta 'update_rule/b0' has shape \\(\\), expected \\(8,\\)"):
        celo_nnx.celo2(weights=jax.tree.map(lambda x: 0.0, theta(0)))


# --- state ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_restored_state_gives_the_same_next_update_bit_for_bit(tmp_path: Path) -> None:
    from orbax.checkpoint import v1 as ocp

    tx = celo_nnx.celo2(0.1, state_dtype="bfloat16", diagnostics=True)
    params, grads = {"layer": PARAMS}, [{"layer": g} for g in GRADS]
    update, state = jitted(tx), tx.init(params)
    for g in grads[:2]:
        _, state = update(g, state, params)
    ocp.save(tmp_path / "state", state)
    restored = ocp.load(tmp_path / "state", tx.init(params))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    same(restored, state)
    same(update(grads[2], restored, params), update(grads[2], state, params))


def test_states_of_others_are_refused() -> None:
    tx, kept = celo_nnx.celo2(0.1), celo_nnx.celo2(0.1, diagnostics=True)
    state = tx.init(PARAMS)

    def refused(message: str, state: Any, tx: Any = tx) -> None:
        with _raises(message) as error:
            tx.update(GRADS[0], state, PARAMS)
        assert "\n" not in str(error.value)

    newer = state | {"version": state["version"] + 1}
    refused("the optimizer state has version 2, this release reads 1", newer)
    refused("the optimizer state has version 2", {k: newer[k] for k in ("version", "count")})
    refused("the optimizer state is a tuple", optax.adam(1e-3).init(PARAMS))
    refused("the optimizer state is a NoneType", None)
    refused("the optimizer state tree lacks 'learned/6x20", celo_nnx.celo2(0.1).init({"b": PARAMS["b"]}))
    half = celo_nnx.celo2(0.1, state_dtype="bfloat16")
    refused("'learned/6x20/.*' has dtype bfloat16, expected float32", half.init(PARAMS))
    refused("'diagnostics/b/clipped', which is not expected", kept.init(PARAMS))
    refused("one that init with diagnostics made", state, kept)
    refused("one that init with diagnostics made", None, kept)
    with _raises("has no diagnostics: make it with diagnostics=True"):
        diagnostics(state)
    # Within jit the number cannot be seen, but what differs in the tree can.
    with _raises("the optimizer state tree lacks"):
        jax.jit(tx.update)(GRADS[0], celo_nnx.celo2_base(0.1).init(PARAMS), PARAMS)


# --- diagnostics ------------------------------------------------------------------------------------------


def test_diagnostics_are_what_numpy_says() -> None:
    tx = optax.chain(celo_nnx.celo2_base(0.1, 0.5, diagnostics=True), optax.scale(1.0))
    params = PARAMS | {"none": jnp.zeros((0, 3))}
    grads = {"w": GRADS[0]["w"] * 900, "b": GRADS[0]["b"], "none": params["none"]}
    start = tx.init(params)
    assert all(float(x) == 0 for x in jax.tree.leaves(diagnostics(start)))
    updates, state = jitted(tx)(grads, start, params)
    figures = diagnostics(state)
    assert set(figures) == set(params)
    share = float(np.mean(np.abs(grads["w"]) > 1000))
    assert 0.1 < share < 0.5
    for key in PARAMS:
        rms = [np.sqrt(np.mean(np.square(np.asarray(x[key], np.float64)))) for x in (updates, params)]
        want = dict(zip(("update_rms", "param_rms"), rms, strict=True), clipped=share if key == "w" else 0.0)
        assert figures[key] == pytest.approx(want, rel=1e-5)
    assert figures["none"] == dict(update_rms=0, param_rms=0, clipped=0)


# --- what a rule needs, and bad input ---------------------------------------------------------------------


class Countdown(Schedule):
    """A learning rate in proportion to the steps that are left, of a run whose loss is watched."""

    needs_num_steps, needs_value = True, True

    def base(self, count: jax.Array, num_steps: jax.Array) -> jax.Array:
        return (num_steps - count) / 10.0


def test_value_and_num_steps_where_a_rule_needs_them() -> None:
    optimizer = load_optimizer("celo2_base")
    optimizer.schedule = Countdown()
    with _raises("num_steps is required"):
        optimizer.as_optax()
    tx = optimizer.as_optax(num_steps=10)
    state, sizes = tx.init(VECTOR), []
    with _raises("update needs value: tx.update\\(grads, state, params, value=loss\\)"):
        tx.update(VECTOR, state, VECTOR)
    for _ in range(2):
        updates, state = tx.update(VECTOR, state, VECTOR, value=jnp.float32(1.0))
        sizes.append(float(jnp.sqrt(jnp.mean(updates["v"] ** 2))))
    np.testing.assert_allclose(sizes, [1.0, 0.9], rtol=1e-4)
    with _raises("update needs value"):
        tx = celo_nnx.celo(num_steps=10)
        tx.update(VECTOR, tx.init(VECTOR), VECTOR)
    # So does the optimizer itself, which an unroll is given without optax.
    for steps, message in ((None, "num_steps is required"), (0, "num_steps = 0 is out of range")):
        with _raises(message):
            optimizer.init(VECTOR, steps)
    bare = optimizer.init(VECTOR, 10)
    for step in (optimizer.update, optimizer.look):
        with _raises("update needs value"):
            step(VECTOR, bare, VECTOR)
    for value, shown in ((jnp.ones(3), "Array"), ("1", "'1'")):
        with _raises(f"value = {shown}.* is out of range: must be a number, the loss"):
            tx.update(VECTOR, tx.init(VECTOR), VECTOR, value=value)
    # A rule that needs neither takes both, and a length from numpy.
    tx = celo_nnx.celo2_base(num_steps=np.int64(10))
    jax.eval_shape(lambda: tx.update(VECTOR, tx.init(VECTOR), VECTOR, value=jnp.ones(3), more="ignored"))
    tx = celo_nnx.celo2_base(lambda count: None)
    with _raises("learning_rate\\(count\\) = None is out of range: must be a number"):
        jax.eval_shape(lambda: tx.update(VECTOR, tx.init(VECTOR), VECTOR))


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(learning_rate=-0.1), "learning_rate = -0.1 is out of range: must be a number of at least 0"),
        (dict(learning_rate="0.1"), "learning_rate = '0.1'"),
        (dict(learning_rate=[0.1]), "learning_rate = \\[0.1\\]"),
        (dict(learning_rate=float("nan")), "learning_rate = nan"),
        (dict(learning_rate=np.float32(-1)), "learning_rate = .*-1"),
        (dict(weight_decay=np.ones(2)), "weight_decay = array"),
        (dict(weight_decay=optax.constant_schedule(0.1)), "weight_decay takes no schedule, only a number"),
        (dict(num_steps=0), "num_steps = 0 is out of range: must be an integer of at least 1"),
        (dict(num_steps=np.int64(0)), "num_steps = .*0"),
        (dict(num_steps=True), "num_steps = True"),
        (dict(state_dtype="float16"), "unknown optimizer.state.dtype 'float16' \\(did you mean 'bfloat16'"),
    ],
)
def test_values_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with _raises(message):
        celo_nnx.celo2_base(**arguments)


def test_bad_trees_name_the_tensor() -> None:
    tx, state = celo_nnx.celo2(0.1), celo_nnx.celo2(0.1).init(PARAMS)
    bad = {
        "gradient 'w' has dtype complex64: floating-point gradients only": {"w": PARAMS["w"] + 1j},
        "gradient 'w' has dtype int32": {"w": jnp.ones(SHAPES["w"], jnp.int32)},
        "gradient 'w' has shape \\(20, 6\\), expected \\(6, 20\\)": {"w": PARAMS["w"].T},
        "gradient 'w' has shape \\(\\)": {"w": 1.0},
        "the gradient tree lacks 'w'": {"w": None},
        "the gradient tree has 'c', which is not expected": {"c": PARAMS["b"]},
    }
    for message, change in bad.items():
        with _raises(message):
            jax.eval_shape(lambda g: tx.update(g, state, PARAMS), GRADS[0] | change)
    for message, change in {
        "parameter 'c' has dtype complex64: floating-point parameters only": PARAMS["b"] + 1j,
        "parameter 'c' has dtype int32": jnp.ones(2, jnp.int32),
        "parameter 'c' is a float, not an array": 1.0,
    }.items():
        with _raises(message):
            tx.init(PARAMS | {"c": change})
    for message, mask in {
        "the weight decay mask does not fit the parameters: it has nothing for 'b'": {"w": True},
        "the weight decay mask does not fit the parameters: 'c' is none of them": {"w": 1, "b": 1, "c": 1},
        "the weight decay mask of 'b' is 'bias', not a Python or numpy boolean": "bias",
        "the weight decay mask of 'w' is 0.5, not a Python": {"w": 0.5, "b": np.bool_(True)},
        "the weight decay mask of 'w' is an array": lambda p: {
            "w": p["w"][0, 0] > 0,
            "b": True,
        },
        "the weight decay mask is a single value, not booleans": jnp.bool_(False),
    }.items():
        with _raises(message):
            jax.eval_shape(celo_nnx.celo2(0.1, 0.1, mask=mask).update, GRADS[0], state, PARAMS)


def test_64_bit_types_change_nothing() -> None:
    """With them enabled indices are 64 bits wide; parameters of 64 bits are updated in float32."""
    small = ["optimizer.tile=60", "optimizer.update_rule.hidden=(2,)"]
    rule = load_optimizer("celo2_base", small, weights="hand_made")
    tx, params = rule.as_optax(learning_rate=0.1), {"w": PARAMS["w"], "w2": PARAMS["w"]}
    grads = {"w": GRADS[0]["w"], "w2": GRADS[1]["w"]}
    want, _ = jitted(tx)(grads, tx.init(params), params)
    with jax.enable_x64(True):
        double = {k: jnp.asarray(np.asarray(x), jnp.float64) for k, x in params.items()}
        got, state = jitted(tx)(grads, tx.init(double), double)
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("float64")}
    assert {x.dtype for x in jax.tree.leaves(state["learned"])} == {jnp.dtype("float32")}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), b, atol=1e-6), got, want)


# --- random trees -----------------------------------------------------------------------------------------

NAMES = st.sampled_from(
    ["kernel", "bias", "b", "w", "0", "a b", "é", "scale", "conv", "embedding", "value", ""]
)
LEAVES = st.tuples(
    st.lists(st.sampled_from([0, 1, 2, 3, 17]), max_size=5).map(tuple),
    st.sampled_from(["float32", "bfloat16", "float16"]),
)
TREES = st.dictionaries(NAMES, LEAVES | st.dictionaries(NAMES, LEAVES, max_size=2), min_size=1, max_size=3)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(TREES, st.sampled_from(["celo2", "celo2_base"]))
def test_any_tree_keeps_its_shapes_and_stays_finite(tree: Any, variant: str) -> None:
    """Gradients of zero, then as large as their dtype allows."""
    small = ["optimizer.update_rule.hidden=(2,)", "optimizer.tile=40"]
    small += [f"optimizer.accumulators.{bank}.decays=(0.9,)" for bank in ("momentum", "factored")]
    tx = load_optimizer(variant, small, weights="hand_made").as_optax(learning_rate=0.1, weight_decay=0.1)
    params = jax.tree.map(lambda x: jnp.ones(*x), tree, is_leaf=lambda x: isinstance(x, tuple))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params: Any) -> Any:
        def step(state: Any, scale: Any) -> Any:
            largest = lambda x: jnp.full(x.shape, jnp.finfo(x.dtype).max, x.dtype)  # noqa: E731
            grads = jax.tree.map(lambda x: jnp.where(scale > 0, largest(x), 0).astype(x.dtype), params)
            return tx.update(grads, state, params)[::-1]

        return jax.lax.scan(step, tx.init(params), jnp.arange(3) % 2)

    state, updates = run(params)
    jax.tree.map(lambda u, p: (u.shape[1:], u.dtype) == (p.shape, p.dtype) or pytest.fail(), updates, params)
    assert all(bool(jnp.isfinite(u.astype(jnp.float32)).all()) for u in jax.tree.leaves(updates))
    assert int(state["count"]) == 3
