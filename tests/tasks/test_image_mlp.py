"""The image-MLP task: starts, loss, draws, meta-loss, and families from config."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from celo_nnx.errors import UserError
from celo_nnx.experiments import fast_digits, fast_local, fast_velo
from celo_nnx.interfaces import Task
from celo_nnx.tasks import TASKS, ImageMLP, build_families
from celo_nnx.tasks.image_mlp import ACTIVATIONS

TASK = ImageMLP(features=64, hidden=(32,), classes=10)


def test_parameters_of_the_published_task() -> None:
    params, state = TASK.init(jax.random.key(0))
    shapes = [(jax.tree_util.keystr(path), leaf.shape) for path, leaf in jax.tree.leaves_with_path(params)]
    assert shapes == [
        ("['linear_0']['b']", (32,)),
        ("['linear_0']['w']", (64, 32)),
        ("['linear_1']['b']", (10,)),
        ("['linear_1']['w']", (32, 10)),
    ]
    assert state == {} and sum(leaf.size for leaf in jax.tree.leaves(params)) == 2410


def test_start_is_a_cut_normal_not_rescaled() -> None:
    params, _ = ImageMLP(features=400, hidden=(300,)).init(jax.random.key(1))
    w = np.asarray(params["linear_0"]["w"]) * 20
    assert np.abs(w).max() <= 2 and abs(w.mean()) < 0.01
    # A standard normal cut at 2 has standard deviation 0.8796.
    assert abs(w.std() - 0.8796) < 0.01
    assert not params["linear_0"]["b"].any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_loss_equals_optax(activation: str) -> None:
    task = ImageMLP(features=5, hidden=(4, 3), classes=3, activation=activation)
    params, state = task.init(jax.random.key(0))
    batch = {"x": jax.random.normal(jax.random.key(1), (6, 5)), "y": jnp.array([0, 1, 2, 0, 1, 2])}
    loss, _, aux = task.loss(params, state, jax.random.key(2), batch)
    logits = task.logits(params, batch["x"])
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(aux["accuracy"], (logits.argmax(-1) == batch["y"]).mean())


def test_first_loss_of_the_recorded_unroll(shared: Path) -> None:
    golden = np.load(shared / "golden" / "inner_unroll_celo2_init_theta.npz", allow_pickle=False)
    names = {f"linear_{i}": f"unscaled_init/mlp/~/linear_{i}" for i in (0, 1)}
    params = {layer: {leaf: golden[f"{name}|{leaf}"] for leaf in "bw"} for layer, name in names.items()}
    batch = {"x": golden["images"][0].reshape(64, 64), "y": golden["labels"][0]}
    loss, _, _ = TASK.loss(params, {}, jax.random.key(0), batch)
    np.testing.assert_allclose(loss, golden["losses_scale1"][0], atol=1e-6)


def test_the_normalizer_equals_the_recorded_one(shared: Path) -> None:
    golden = np.load(shared / "golden" / "normalizer.npz", allow_pickle=False)
    np.testing.assert_allclose(TASK.normalize(golden["loss"]), golden["normalized"], atol=1e-6)


def test_the_normalizer_is_finite_everywhere() -> None:
    out = ImageMLP(features=1, classes=4, normalizer_clip=2.0).normalize(
        jnp.array([jnp.nan, jnp.inf, -jnp.inf, -1.0, 1.0, 9.0])
    )
    worst = 2 * np.log(4)
    np.testing.assert_allclose(out, [worst, worst, 0, 0, 1, worst], rtol=1e-6)


def test_draws_cover_exactly_the_range_and_come_from_the_key() -> None:
    data = {"x": jnp.arange(100.0)[:, None], "y": jnp.arange(100)}
    task = ImageMLP(features=1, batch_size=5000)
    draw = jax.jit(lambda key, start, count: task.draw(data, key, start, count))
    batch = draw(jax.random.key(0), jnp.int32(30), jnp.int32(50))
    assert batch["x"].shape == (5000, 1) and set(np.asarray(batch["y"])) == set(range(30, 80))
    np.testing.assert_array_equal(batch["x"][:, 0], batch["y"])
    counts = np.bincount(np.asarray(batch["y"]) - 30, minlength=50)
    assert ((counts - 100) ** 2 / 100).sum() < 90  # chi-square, 49 degrees of freedom: 0.9997 quantile
    np.testing.assert_array_equal(draw(jax.random.key(0), 30, 50)["y"], batch["y"])
    assert (draw(jax.random.key(1), 30, 50)["y"] != batch["y"]).any()


def test_many_trajectories_in_one_scan_learn() -> None:
    (family,) = build_families(fast_digits.get_config())
    data = jax.tree.map(jnp.asarray, family.train)
    task, count = family.task, len(family.train["y"])

    def trajectory(key: jax.Array) -> jax.Array:
        params, state = task.init(key)

        def step(carry: tuple, step_key: jax.Array) -> tuple:
            params, state = carry
            batch = task.draw(data, step_key, jnp.int32(0), jnp.int32(count))
            grad = jax.value_and_grad(lambda p: task.loss(p, state, step_key, batch)[:2], has_aux=True)
            (loss, state), grads = grad(params)
            return (jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), state), task.normalize(loss)

        return jax.lax.scan(step, (params, state), jax.random.split(key, 60))[1]

    losses = np.asarray(jax.jit(jax.vmap(trajectory))(jax.random.split(jax.random.key(0), 3)))
    assert losses.shape == (3, 60) and losses.dtype == np.float32
    assert (losses[:, 0] > 2).all() and (losses[:, -10:].mean(1) < 1).all()
    assert len(set(losses[:, 0])) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden": (0,)}, r"hidden = \(0,\)"),
        ({"classes": 1}, "classes = 1 .*>= 2"),
        ({"batch_size": 0}, "batch_size = 0 .*>= 1"),
        ({"batch_size": True}, "batch_size = True"),
        ({"normalizer_clip": float("inf")}, "normalizer_clip = inf"),
        ({"activation": "rely"}, "did you mean 'relu'"),
    ],
)
def test_values_out_of_range(change: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        ImageMLP(**({"features": 4} | change))


@pytest.mark.parametrize("preset", [fast_velo, fast_local, fast_digits])
def test_presets_are_the_published_task(preset: object) -> None:
    config = preset.get_config().to_dict()
    assert config["kind"] in TASKS and config["hidden"] == (32,) and config["batch_size"] == 64
    assert config["image_size"] == 8 and config["normalizer_clip"] == 1.5


def test_families_with_as_many_classes_share_a_task(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, side in (("one", 8), ("two", 28)):
        x, y = rng.integers(0, 256, (20, side, side), np.uint8), np.arange(20) % 10
        np.savez(tmp_path / f"{name}.npz", train_x=x, train_y=y, test_x=x, test_y=y)
    config = fast_digits.get_config()
    config.datasets = ("one", "digits", "two")
    families = build_families(config, data_dir=str(tmp_path))
    assert [family.name for family in families] == ["one", "digits", "two"]
    assert len({family.task for family in families}) == 1 and isinstance(families[0].task, Task)
    assert families[2].train["x"].shape == (20, 64) and families[2].test["y"].shape == (20,)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "image_mpl"}, "unknown task kind .*did you mean 'image_mlp'"),
        ({"datasets": ("digit",)}, "did you mean 'digits'"),
        ({"datasets": ()}, "one or more different names"),
        ({"datasets": ("digits", "digits")}, "one or more different names"),
        ({"datasets": "digits"}, "tasks.datasets = 'digits'"),
        ({"hidden": 32}, "tasks.hidden = 32"),
        ({"activation": "rely"}, "did you mean 'relu'"),
        ({"image_size": 0}, "image_size = 0 .*from 1 to 512"),
        ({"batchsize": 3}, "did you mean 'tasks.batch_size'"),
    ],
)
def test_a_wrong_section_is_one_clear_line(change: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_families(fast_digits.get_config().to_dict() | change)


def test_a_kind_is_one_function_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "mine", lambda settings, data_dir: [settings["width"], data_dir])
    assert build_families({"kind": "mine", "width": 3}, data_dir="here") == [3, "here"]


def test_a_missing_setting_is_named() -> None:
    config = fast_digits.get_config().to_dict()
    del config["datasets"]
    with pytest.raises(UserError, match="tasks.datasets is missing"):
        build_families(config)
