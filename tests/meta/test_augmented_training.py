"""Augmented tasks in unrolls, in an estimator and in configs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from celo_nnx import listing
from celo_nnx.config import load
from celo_nnx.errors import UserError
from celo_nnx.interfaces import Family
from celo_nnx.meta import build_estimator
from celo_nnx.meta.assemble import build_augmentation
from celo_nnx.meta.augmentations import AUGMENTATIONS
from celo_nnx.meta.estimators.pes import PES
from celo_nnx.meta.truncation import Constant
from celo_nnx.meta.unroll import Source, fresh, unroll
from celo_nnx.naive_meta import NaiveTrainer
from celo_nnx.tasks import ImageMLP

IMAGE = ImageMLP(features=16, hidden=(8,), classes=5, batch_size=12)
DRAWING = sorted(set(AUGMENTATIONS) - {"none"})
CHAIN = (
    {"kind": "batch_size", "minimum": 2},
    {"kind": "label_noise", "high": 0.3},
    {"kind": "reparametrization_list", "choices": (("tensor", 0.1, 10.0), ("none", 1.0, 1.0))},
    {"kind": "gradient_noise"},
    {"kind": "loss_scale", "low": 0.1, "high": 10.0},
)


def image_data(size=60):
    x_key, y_key = jax.random.split(jax.random.key(2))
    x, y = jax.random.normal(x_key, (size, 16)), jax.random.randint(y_key, (size,), 0, 5)
    return {"x": np.asarray(x), "y": np.asarray(y)}


class Witness:
    """Gradient descent whose state keeps the loss and the gradient that it was given last."""

    theta = {"rate": jnp.zeros(())}

    def with_theta(self, theta):
        return self

    def init(self, params, num_steps):
        return {"count": jnp.int32(0), "value": jnp.float32(0), "grads": jax.tree.map(jnp.zeros_like, params)}

    def update(self, grads, state, params, *, value):
        updates = jax.tree.map(lambda g: -1e-3 * g, grads)
        return updates, {"count": state["count"] + 1, "value": value, "grads": grads}


def step_by_step(task, steps, pairs=3, length=3):
    """Unrolls single steps from fresh pairs of equal sides; a list of (pairs after a step, record)."""
    thetas = {"rate": jnp.zeros((pairs, 2))}
    schedule, optimizer = Constant(length=length), Witness()
    keys = jax.random.split(jax.random.key(0), pairs)
    problems = jax.jit(lambda keys: fresh(optimizer, task, schedule, thetas, keys))(keys)
    data = {name: jnp.asarray(x) for name, x in image_data().items()}
    source = Source(data, jnp.zeros(pairs, jnp.int32), jnp.full(pairs, 60, jnp.int32))
    run = jax.jit(lambda p, keys: unroll(optimizer, task, schedule, 1, thetas, p, source, keys))
    out = []
    for t in range(steps):
        problems, record = run(problems, jax.random.split(jax.random.fold_in(jax.random.key(1), t), pairs))
        out.append((problems, record))
    return out


@pytest.mark.parametrize("name", DRAWING)
def test_what_is_drawn_lasts_a_trajectory_and_is_one_for_both_sides(name):
    task = AUGMENTATIONS[name](IMAGE)
    rows = step_by_step(task, steps=6)
    own = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(p.sample["own"])]) for p, _ in rows]
    for t in (1, 2):
        np.testing.assert_array_equal(own[t], own[0])
    assert np.any(own[3] != own[0])  # step 4 resets
    np.testing.assert_array_equal(own[5], own[3])
    for problems, record in rows:
        sides = (record.loss, *(jnp.moveaxis(x, 1, -1) for x in jax.tree.leaves(problems.optimizer)))
        for side in sides:
            np.testing.assert_array_equal(side[..., 0], side[..., 1])
        assert len(np.unique(record.loss[0, :, 0])) == 3


def test_the_optimizer_sees_the_scaled_loss_and_the_record_the_task_s():
    scaled = step_by_step(AUGMENTATIONS["loss_scale"](IMAGE, low=50.0, high=100.0), steps=5)
    values = np.array([p.optimizer["value"][:, 0] for p, _ in scaled])
    recorded = np.array([r.loss[0, :, 0] for _, r in scaled])
    ratio = (values / recorded)[[0, 1, 2, 4]]  # step 4 resets
    scales = np.array([p.sample["own"] for p, _ in scaled])[[0, 1, 2, 4]]
    np.testing.assert_allclose(ratio, scales, rtol=1e-5)
    assert np.all((recorded > 0.5) & (recorded < 4.0)) and np.all(scales >= 50.0)


def test_noise_of_labels_and_gradients_is_new_in_every_step():
    still = {"x": np.ones((1, 16), np.float32), "y": np.zeros(1, np.int32)}  # every batch is the same
    keys = jax.random.split(jax.random.key(3), 8)
    for name, sees in (("label_noise", 0), ("gradient_noise", 1)):
        task = AUGMENTATIONS[name](IMAGE, low=0.5, high=0.5)
        sample = task.sample(jax.random.key(0))
        params, _ = task.init(jax.random.key(1), sample)
        batch = task.draw(still, jax.random.key(2), 0, 1)
        run = jax.value_and_grad(lambda p, key: task.loss(p, {}, key, batch, sample)[0])  # noqa: B023
        seen = [np.asarray(jax.tree.leaves(run(params, key)[sees])[0]).tobytes() for key in keys]
        assert len(set(seen)) >= 5, name


def test_scaling_the_loss_leaves_the_meta_gradient_of_an_optimizer_that_is_blind_to_it(toy):
    class Blind(toy.Drift):
        """Adds theta, whatever the gradient."""

        def with_theta(self, theta):
            return Blind(theta)

        def update(self, grads, state, params, *, value):
            return jax.tree.map(lambda g: jnp.full_like(g, self.theta["drift"]), grads), state

    found = []
    for low, high in ((1.0, 1.0), (100.0, 1000.0)):
        scaled = build_augmentation({"kind": "loss_scale", "low": low, "high": high})
        family = toy.family(task=toy.Quadratic(noise=0.3, spread=1.0))
        options = {"pairs": 4, "std": 0.1, "truncation": 6, "unroll": Constant(length=4)}
        estimator = PES(Blind(), [family], augmentation=scaled, **options)
        theta = {"drift": jnp.float32(0.2)}
        state = jax.jit(estimator.init)(theta, jax.random.key(0))
        gradient, _, metrics = jax.jit(estimator.__call__)(theta, state, jax.random.key(1))
        found.append([gradient["drift"], metrics["loss"]])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3)
    assert abs(found[0][0]) > 0.1


def test_a_chain_is_applied_in_order():
    task = build_augmentation(CHAIN)(IMAGE)
    kinds = []
    inner = task
    while inner is not IMAGE:
        kinds.append(type(inner))
        inner = inner.task
    assert kinds[::-1] == [AUGMENTATIONS[section["kind"]] for section in CHAIN]
    # As a config stores it, tuples are lists.
    assert build_augmentation(json.loads(json.dumps(CHAIN)))(IMAGE) == task
    assert build_augmentation(())(IMAGE) is IMAGE
    assert build_augmentation(CHAIN[1])(IMAGE) == build_augmentation(CHAIN[1:2])(IMAGE)


def test_a_config_with_a_chain(toy, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from celo_nnx.experiments import celo2\n"
        "def get_config():\n"
        "    config = celo2.get_config('fast_digits')\n"
        "    del config.meta.augmentation\n"
        f"    config.meta.augmentation = {CHAIN!r}\n"
        "    return config\n"
    )
    config = load(str(path), ["meta.estimator.pairs=2", "meta.estimator.truncation=3"])
    families = [Family(name, IMAGE, image_data(), {}) for name in ("a", "b")]
    estimator = build_estimator(config.meta, toy.Drift(), families)
    (group,) = estimator.population.groups
    assert group.task == build_augmentation(CHAIN)(IMAGE)
    theta = toy.Drift().theta
    state = jax.jit(estimator.init)(theta, jax.random.key(0))
    gradient, _, metrics = jax.jit(estimator.__call__)(theta, state, jax.random.key(1))
    assert np.isfinite(gradient["drift"]) and gradient["drift"] != 0
    # In units of the task, whatever the scale of the loss.
    assert np.all((metrics["family_loss"] > 0.3) & (metrics["family_loss"] <= 1.5 * np.log(5)))
    assert not np.any(metrics["nonfinite"])
    with pytest.raises(UserError, match="meta.augmentation is a list"):
        load(config, ["meta.augmentation.kind=label_noise"])


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
def test_every_kind_can_be_named_in_an_override(name):
    config = load("celo2:fast_digits", [f"meta.augmentation.kind={name}"])
    assert build_augmentation(config.meta.augmentation)(IMAGE) == AUGMENTATIONS[name](IMAGE)
    assert name in listing.lines("parts")


def test_choices_can_be_overridden():
    override = "meta.augmentation.choices=(('global', 0.1, 10), ('none', 1, 1))"
    config = load("celo2:fast_digits", [override, "meta.augmentation.kind=reparametrization_list"])
    task = build_augmentation(json.loads(json.dumps(config.meta.augmentation.to_dict())))(IMAGE)
    assert task.choices == (("global", 0.1, 10), ("none", 1, 1))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"kind": "label_nois"}, "unknown meta.augmentation.kind .*did you mean 'label_noise'"),
        (({"kind": "none"}, {"kind": "noise"}), r"unknown meta.augmentation\[1\].kind 'noise'"),
        (({"kind": "loss_scale", "hihg": 1.0},), r"key of meta.augmentation\[0\] 'hihg' .*'high'"),
        (({"kind": "loss_scale", "task": 1},), "unknown key of meta.augmentation.* 'task'"),
        (("loss_scale",), r"meta.augmentation\[0\] = 'loss_scale' must be a section"),
        ("loss_scale", "meta.augmentation = 'loss_scale' must be a section"),
    ],
)
def test_mistakes_are_told_in_one_line(sections, message):
    with pytest.raises(UserError, match=message) as error:
        build_augmentation(sections)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("override", ["meta.augmentation.kind=loss_scale", "meta.augmentation.level=tensor"])
def test_the_published_loop_refuses_what_it_does_not_know(override):
    with pytest.raises(UserError, match="global reparametrization"):
        NaiveTrainer(load("celo2:fast_digits", [override]), [], {})
