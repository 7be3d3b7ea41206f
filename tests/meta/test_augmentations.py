"""Augmentations, each against an independent computation; samples by distribution, seeds fixed.

Bounds on distributions fail with probability 1e-9 for a right implementation, before the seed was fixed.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from celo_nnx.errors import UserError
from celo_nnx.interfaces import Task
from celo_nnx.meta.augmentations import AUGMENTATIONS
from celo_nnx.meta.augmentations.batch_size import BatchSize
from celo_nnx.meta.augmentations.gradient_noise import GradientNoise
from celo_nnx.meta.augmentations.label_noise import LabelNoise
from celo_nnx.meta.augmentations.loss_scale import LossScale
from celo_nnx.meta.augmentations.reparametrization import Reparametrized
from celo_nnx.meta.augmentations.reparametrization_list import ReparametrizedList
from celo_nnx.tasks import ImageMLP
from celo_nnx.tasks.learned_optimizer import LearnedOptimizerTask

IMAGE = ImageMLP(features=16, hidden=(8,), classes=5, batch_size=12)
SIGMAS = 6.2  # two-sided normal tail of 1e-9


@dataclasses.dataclass(frozen=True)
class Line(Task):
    def sample(self, key):
        return jax.random.uniform(key)

    def init(self, key, sample=()):
        return {"w": jax.random.normal(key, (3, 2)), "b": jnp.ones(2)}, sample

    def loss(self, params, state, key, batch, sample=()):
        return jnp.sum(jnp.square(params["w"] - sample)) + jnp.sum(params["b"] * batch), state, {}

    def normalize(self, loss):
        return jnp.clip(loss, 0.0, 3.0)


@dataclasses.dataclass(frozen=True)
class Probe(Task):
    """A linear loss: its gradient shows the weights of the examples, ``x``, and their labels, ``y``."""

    classes: int = 4

    def loss(self, params, state, key, batch, sample=()):
        examples = jnp.mean(batch["x"] @ params["x"]) if "x" in batch else 0.0
        labels = jnp.sum(params["y"] * jax.nn.one_hot(batch["y"], self.classes)) if "y" in batch else 0.0
        return examples + labels, state, {}


def image_batch(size=12):
    x_key, y_key = jax.random.split(jax.random.key(9))
    return {
        "x": jax.random.normal(x_key, (size, 16)),
        "y": jax.random.randint(y_key, (size,), 0, IMAGE.classes),
    }


def scalar_loss(task, sample, key=None, batch=None):
    key = jax.random.key(7) if key is None else key
    batch = image_batch() if batch is None else batch
    return lambda params: task.loss(params, {}, key, batch, sample)[0]


def assert_uniform(values, low, high):
    """The distance of the empirical distribution exceeds the bound with probability 1e-9 (Massart)."""
    assert low <= np.min(values) and np.max(values) <= high
    distance = stats.kstest(np.asarray(values, np.float64), "uniform", (low, high - low)).statistic
    assert distance < math.sqrt(math.log(2e9) / (2 * len(values)))


def draws(task, count=4000):
    return jax.jit(jax.vmap(task.sample))(jax.random.split(jax.random.key(0), count))


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
def test_equal_settings_are_equal_tasks_that_run_under_vmap(name):
    task = AUGMENTATIONS[name](IMAGE)
    assert task == AUGMENTATIONS[name](ImageMLP(**dataclasses.asdict(IMAGE)))
    assert hash(task) == hash(AUGMENTATIONS[name](IMAGE))
    assert task != AUGMENTATIONS[name](dataclasses.replace(IMAGE, hidden=(9,)))
    assert all(task != make(IMAGE) for other, make in AUGMENTATIONS.items() if other != name)
    assert float(task.normalize(jnp.float32(1e9))) == float(IMAGE.normalize(jnp.float32(1e9)))

    def one(key):
        sample_key, init_key, batch_key, loss_key = jax.random.split(key, 4)
        sample = task.sample(sample_key)
        params, state = task.init(init_key, sample)
        data = image_batch(size=100)
        batch = task.draw(data, batch_key, 10, 50)
        same = jax.tree.map(lambda a, b: jnp.all(a == b), batch, IMAGE.draw(data, batch_key, 10, 50))

        def objective(params):
            loss, _, auxiliary = task.loss(params, state, loss_key, batch, sample)
            return loss, auxiliary["accuracy"]

        (loss, accuracy), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return loss, task.unscale(loss, sample), accuracy, grads, same

    keys = jax.random.split(jax.random.key(1), 3)
    loss, unscaled, _, grads, same = jax.jit(jax.vmap(one))(keys)
    assert all(np.all(x) for x in jax.tree.leaves(same))
    assert all(np.all(np.isfinite(x)) and np.any(x != 0) for x in jax.tree.leaves(grads))
    assert np.all((unscaled > 0.5) & (unscaled < 6.0)) and len(np.unique(loss)) == 3
    if name != "loss_scale":
        np.testing.assert_array_equal(loss, unscaled)


def test_no_augmentation_is_the_task():
    task = Line()
    assert AUGMENTATIONS["none"](task) is task
    assert float(task.unscale(jnp.float32(3.0), task.sample(jax.random.key(0)))) == 3.0


@pytest.mark.parametrize("level", ["none", "global", "tensor", "parameter"])
def test_loss_and_gradient_are_those_of_the_task_at_the_scaled_parameters(level):
    plain, task = Line(), Reparametrized(Line(), level=level, low=0.01, high=100.0)
    sample_key, key = jax.random.split(jax.random.key(4))
    sample = task.sample(sample_key)
    params, state = task.init(key, sample)
    original, _ = plain.init(key, sample["inner"])
    assert float(state) == float(sample["inner"])
    scale = sample["own"]
    if level in ("none", "global"):
        scale = {"w": scale, "b": scale}
    sizes = (2, 6) if level == "parameter" else (1, 1)
    assert (jnp.size(scale["b"]), jnp.size(scale["w"])) == sizes
    assert (level == "none") == bool(jnp.all(scale["w"] == 1.0))
    for name in ("w", "b"):
        np.testing.assert_allclose(params[name] * scale[name], original[name], rtol=1e-6)

    def loss(task, sample, params):
        return task.loss(params, (), key, jnp.arange(2.0), sample)[0]

    value, grads = jax.value_and_grad(lambda p: loss(task, sample, p))(params)
    expected, inner = jax.value_and_grad(lambda p: loss(plain, sample["inner"], p))(original)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name in ("w", "b"):
        np.testing.assert_allclose(grads[name], inner[name] * scale[name], rtol=1e-4)
    assert float(task.normalize(jnp.float32(7.0))) == 3.0


@pytest.mark.parametrize("make", [Reparametrized, LossScale, GradientNoise])
def test_scales_are_log_uniform(make):
    scale = draws(make(IMAGE, low=1e-3, high=1e2))["own"]
    assert_uniform(np.log10(scale), -3 - 1e-6, 2 + 1e-6)


def test_a_choice_of_the_list_is_drawn_for_each_trajectory():
    choices = [["global", 1e-3, 0.1], ["tensor", 10.0, 1e3], ["tensor", 10.0, 1e3], ["none", 5.0, 7.0]]
    task = ReparametrizedList(Line(), choices=choices)
    assert task == ReparametrizedList(Line(), choices=tuple(map(tuple, choices)))
    scale = draws(task, count=8000)["own"]
    assert scale["w"].shape == scale["b"].shape == (8000,)
    w, b = np.log10(scale["w"]), np.log10(scale["b"])
    level = {"none": (w == 0) & (b == 0), "global": (w < 0) & (w == b), "tensor": (w > 0) & (b > 0)}
    assert np.all(sum(x.astype(int) for x in level.values()) == 1)
    for name, share in (("none", 0.25), ("global", 0.25), ("tensor", 0.5)):
        assert abs(level[name].mean() - share) < SIGMAS * math.sqrt(share * (1 - share) / 8000), name
    assert_uniform(w[level["global"]], -3 - 1e-6, -1 + 1e-6)
    assert_uniform(w[level["tensor"]], 1 - 1e-6, 3 + 1e-6)
    assert_uniform(b[level["tensor"]], 1 - 1e-6, 3 + 1e-6)
    correlation = np.corrcoef(w[level["tensor"]], b[level["tensor"]])[0, 1]
    assert abs(correlation) < SIGMAS / math.sqrt(level["tensor"].sum())


def test_a_list_with_scales_of_single_parameters():
    task = ReparametrizedList(Line(), choices=(("parameter", 0.01, 100.0), ("global", 0.01, 100.0)))
    scale = draws(task)["own"]
    assert scale["w"].shape == (4000, 3, 2) and scale["b"].shape == (4000, 2)
    every = np.concatenate([np.reshape(scale["w"], (4000, 6)), scale["b"]], 1)
    different = np.array([len(np.unique(row)) for row in every])
    assert set(different) == {1, 8}
    assert abs(np.mean(different == 8) - 0.5) < SIGMAS * 0.5 / math.sqrt(4000)
    assert_uniform(np.log10(every[:, 5]), -2 - 1e-6, 2 + 1e-6)
    # The published code drew the choice while tracing, so that a compiled function kept it.
    compiled = jax.jit(task.sample)
    seen = {len(np.unique(compiled(jax.random.key(i))["own"]["w"])) for i in range(40)}
    assert seen == {1, 6} and compiled._cache_size() == 1


def test_loss_and_gradient_of_a_listed_choice():
    task = ReparametrizedList(IMAGE, choices=(("parameter", 0.1, 10.0), ("tensor", 0.1, 10.0)))
    for seed in range(4):
        sample = task.sample(jax.random.key(seed))
        params, _ = task.init(jax.random.key(1), sample)
        original, _ = IMAGE.init(jax.random.key(1))
        value, grads = jax.value_and_grad(scalar_loss(task, sample))(params)
        expected, inner = jax.value_and_grad(scalar_loss(IMAGE, ()))(original)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        wanted = jax.tree.map(lambda g, s: g * s, inner, sample["own"])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, wanted)


def test_loss_scale_multiplies_and_can_be_taken_back():
    task = LossScale(LossScale(IMAGE, low=0.1, high=0.2), low=20.0, high=30.0)
    sample = task.sample(jax.random.key(3))
    scale = float(sample["own"]) * float(sample["inner"]["own"])
    params, _ = IMAGE.init(jax.random.key(1))
    value, grads = jax.value_and_grad(scalar_loss(task, sample))(params)
    expected, inner = jax.value_and_grad(scalar_loss(IMAGE, ()))(params)
    np.testing.assert_allclose(value, scale * expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, scale * b, rtol=1e-4, atol=1e-6), grads, inner)
    np.testing.assert_allclose(task.unscale(value, sample), expected, rtol=1e-5)
    assert abs(scale - 1.0) > 0.5


def weights(batch_size, minimum, at):
    """The weight of each example in the mean, from the gradient of a linear loss."""
    task = BatchSize(Probe(), minimum=minimum)
    sample = {"own": jnp.float32(at), "inner": ()}
    loss = scalar_loss(task, sample, batch={"x": jnp.eye(batch_size)})
    return jax.grad(loss)({"x": jnp.zeros(batch_size)})["x"]


def test_the_first_examples_fill_the_batch_evenly():
    grid = np.linspace(0, 1, 400, endpoint=False)
    counts = np.rint(12 * np.asarray(jax.jit(jax.vmap(lambda at: weights(12, 2, at)))(grid))).astype(int)
    sizes = np.sum(counts > 0, 1)
    # int(exp(U(ln 2, ln 13))): size b on an interval of length ln((b+1)/b) of the logarithm.
    assert set(sizes) == set(range(2, 13)) and np.all(np.diff(sizes) >= 0)
    share = [np.log((b + 1) / b) / np.log(13 / 2) for b in range(2, 13)]
    np.testing.assert_allclose([np.mean(sizes == b) for b in range(2, 13)], share, atol=2 / 400)
    for row, b in zip(counts, sizes, strict=True):
        assert row.sum() == 12 and np.ptp(row[:b]) <= 1 and np.all(np.diff(row) <= 0)
        assert (144 / np.sum(np.square(row))) >= 8 / 9 * b  # as many equal weights have the same noise
        if 12 % b == 0:
            assert np.all(row[:b] == 12 // b)
    assert_uniform(draws(BatchSize(IMAGE))["own"], 0.0, 1.0)


def test_smallest_and_whole_batches():
    np.testing.assert_allclose(weights(7, 7, 0.0), np.full(7, 1 / 7), rtol=1e-6)
    np.testing.assert_allclose(weights(7, 7, 0.9999999), np.full(7, 1 / 7), rtol=1e-6)
    np.testing.assert_allclose(weights(7, 1, 0.0), np.eye(7)[0], rtol=1e-6)
    params, _ = IMAGE.init(jax.random.key(1))
    batch = image_batch()
    part = {name: x[:3] for name, x in batch.items()}
    at = (math.log(3.5) - math.log(2)) / (math.log(13) - math.log(2))
    sample = {"own": jnp.float32(at), "inner": ()}
    got = jax.value_and_grad(scalar_loss(BatchSize(IMAGE, minimum=2), sample))(params)
    wanted = jax.value_and_grad(scalar_loss(IMAGE, (), batch=part))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, wanted)


def test_batches_of_a_learned_optimizer_have_fewer_examples_and_not_fewer_updates():
    task = LearnedOptimizerTask(inner=IMAGE, hidden=(), unroll=2, pairs=1)
    batch = {name: jnp.stack([x, -x if name == "x" else x, x[::-1]]) for name, x in image_batch().items()}
    part = {name: x[:, :3] for name, x in batch.items()}
    at = (math.log(3.5) - math.log(2)) / (math.log(13) - math.log(2))
    sample = {"own": jnp.float32(at), "inner": ()}
    theta, _ = task.init(jax.random.key(1))
    losses = scalar_loss(BatchSize(task, minimum=2), sample, batch=batch), scalar_loss(task, (), batch=part)
    got, wanted = jax.jit(lambda theta: [loss(theta) for loss in losses])(theta)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    line = LearnedOptimizerTask(inner=Line())
    with pytest.raises(UserError, match="the examples along axis 1"):
        BatchSize(line).loss({}, {}, jax.random.key(0), jnp.ones(9), sample)


def noisy_labels(probability, key, labels, classes):
    """The labels that the loss sees, from the gradient of a loss that is linear in their one-hot code."""
    task = LabelNoise(Probe(classes), low=0.0, high=1.0)
    sample = {"own": jnp.float32(probability), "inner": ()}
    loss = scalar_loss(task, sample, key, {"y": labels})
    one_hot = jax.grad(loss)({"y": jnp.zeros((len(labels), classes))})["y"]
    return jnp.argmax(one_hot, -1)


def test_labels_are_replaced_with_the_drawn_probability_by_any_class():
    labels = jnp.repeat(jnp.arange(4), 16)
    keys = jax.random.split(jax.random.key(5), 500)
    run = jax.jit(jax.vmap(lambda p, key: noisy_labels(p, key, labels, 4), (None, 0)))
    seen = np.asarray(run(0.3, keys))
    moved = np.zeros((4, 4))
    np.add.at(moved, (np.broadcast_to(labels, seen.shape), seen), 1)
    trials = 16 * 500
    share = np.where(np.eye(4) > 0, 1 - 0.3 * 3 / 4, 0.3 / 4)
    assert np.all(np.abs(moved / trials - share) < SIGMAS * np.sqrt(share * (1 - share) / trials))
    # Examples do not fall together: the number of replaced ones in a batch is binomial.
    changed = np.sum(seen != labels, 1)
    rate = 0.3 * 3 / 4
    variance = 64 * rate * (1 - rate)
    assert abs(changed.var() / variance - 1) < SIGMAS * math.sqrt(2 / 500)
    np.testing.assert_array_equal(run(0.0, keys), np.broadcast_to(labels, seen.shape))
    np.testing.assert_array_equal(run(0.3, keys), seen)
    assert len({row.tobytes() for row in seen}) == 500


def test_share_of_noise_is_uniform_or_fixed():
    assert_uniform(draws(LabelNoise(IMAGE, low=0.2, high=0.6))["own"], 0.2 - 1e-6, 0.6 + 1e-6)
    np.testing.assert_allclose(draws(LabelNoise(IMAGE, low=0.4, high=0.4), 9)["own"], 0.4, rtol=1e-6)


def test_the_training_loss_is_that_of_the_noisy_labels():
    key, batch = jax.random.key(7), image_batch()
    sample = {"own": jnp.float32(0.8), "inner": ()}
    labels = noisy_labels(0.8, key, batch["y"], IMAGE.classes)
    assert np.sum(labels != batch["y"]) >= 3
    params, _ = IMAGE.init(jax.random.key(1))
    got = jax.value_and_grad(scalar_loss(LabelNoise(IMAGE), sample, key))(params)
    wanted = jax.value_and_grad(scalar_loss(IMAGE, (), batch={**batch, "y": labels}))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, wanted)
    clean = jax.value_and_grad(scalar_loss(IMAGE, ()))(params)
    assert abs(float(got[0] - clean[0])) > 1e-3


def test_classes_are_found_through_other_augmentations():
    task = LabelNoise(LossScale(Reparametrized(IMAGE)))
    assert task.classes == 5 and task == LabelNoise(LossScale(Reparametrized(IMAGE)), classes=5)
    assert LabelNoise(Line(), classes=3).classes == 3


def noise_case(relative=0.5):
    task = GradientNoise(IMAGE)
    sample = {"own": jnp.float32(relative), "inner": ()}
    params, _ = IMAGE.init(jax.random.key(1))
    params = jax.tree.map(lambda p: p + 0.1, params)
    return scalar_loss(task, sample), scalar_loss(IMAGE, ()), params


def test_gradient_noise_is_relative_and_leaves_the_loss():
    wide = ImageMLP(features=16, hidden=(300,), classes=5, activation="tanh")
    task, sample = GradientNoise(wide), {"own": jnp.float32(0.2), "inner": ()}
    params, _ = wide.init(jax.random.key(1))
    value, noisy = jax.value_and_grad(scalar_loss(task, sample))(params)
    expected, grads = jax.value_and_grad(scalar_loss(wide, ()))(params)
    assert float(value) == float(expected)
    ratio = jax.tree.map(lambda a, b: np.ravel((a / b - 1) / 0.2), noisy, grads)
    ratio = np.concatenate(jax.tree.leaves(ratio))
    assert stats.kstest(ratio, "norm").statistic < math.sqrt(math.log(2e9) / (2 * len(ratio)))
    assert len(np.unique(noisy["linear_0"]["w"])) == 16 * 300
    other = jax.grad(scalar_loss(task, sample, jax.random.key(8)))(params)
    again = jax.grad(scalar_loss(task, sample))(params)
    jax.tree.map(np.testing.assert_array_equal, noisy, again)
    assert np.all(other["linear_0"]["w"] != noisy["linear_0"]["w"])


def test_gradient_noise_can_be_differentiated_in_every_order():
    noisy, plain, params = noise_case()
    grads, noisy_grads = jax.grad(plain)(params), jax.grad(noisy)(params)
    factor = jax.tree.map(lambda a, b: a / b, noisy_grads, grads)
    assert min(float(jnp.max(jnp.abs(x - 1))) for x in jax.tree.leaves(factor)) > 0.1
    keys = jax.random.split(jax.random.key(2), 2)
    v, u = (jax.tree.map(lambda p, key=key: jax.random.normal(key, p.shape), params) for key in keys)

    def dot(a, b):
        return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

    def close(a, b):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), a, b)

    value, tangent = jax.jvp(noisy, (params,), (v,))
    assert float(value) == float(plain(params))
    close(tangent, dot(noisy_grads, v))
    # With m the factor: d(m g)[v] = m (H v), and of m g . u the gradient is H (m u).
    hessian_v = jax.jvp(jax.grad(plain), (params,), (v,))[1]
    close(jax.jvp(jax.grad(noisy), (params,), (v,))[1], jax.tree.map(jnp.multiply, factor, hessian_v))
    factor_u = jax.tree.map(jnp.multiply, factor, u)
    hessian_u = jax.jvp(jax.grad(plain), (params,), (factor_u,))[1]
    close(jax.grad(lambda p: dot(jax.grad(noisy)(p), u))(params), hessian_u)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (Reparametrized, {"level": "globl"}, "did you mean 'global'"),
        (Reparametrized, {"low": 0.0}, "low = 0.0 .* from 1e-30 to 1e"),
        (Reparametrized, {"low": 1e-300}, "low = 1e-300"),
        (Reparametrized, {"low": 2.0, "high": 1.0}, "high = 1.0 .* from augmentation.low = 2.0"),
        (LossScale, {"high": float("inf")}, "high = inf"),
        (LossScale, {"high": 10**400}, "high = 1000"),
        (GradientNoise, {"low": "small"}, "low = 'small'"),
        (GradientNoise, {"low": float("nan")}, "low = nan"),
        (ReparametrizedList, {"choices": ()}, r"choices = \(\) .* non-empty list"),
        (ReparametrizedList, {"choices": ("global", 0.1, 1.0)}, r"'global' .* must be \(level, low, high\)"),
        (ReparametrizedList, {"choices": (("tenso", 0.1, 1.0),)}, "did you mean 'tensor'"),
        (ReparametrizedList, {"choices": (("none", 1.0, 1.0), ("global", -1.0, 1.0))}, "low = -1.0"),
        (BatchSize, {"minimum": 0}, "minimum = 0 .* integer >= 1"),
        (BatchSize, {"minimum": 2.5}, "minimum = 2.5"),
        (LabelNoise, {"low": -0.1}, "low = -0.1 .* from 0 to 1"),
        (LabelNoise, {"high": 1.1}, "high = 1.1 .* to 1"),
        (LabelNoise, {"classes": 1}, "classes = 1 .* >= 2"),
        (LabelNoise, {"classes": 6}, r"classes = 6 .* the task's own \(5\)"),
    ],
)
def test_settings_are_checked(make, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        make(IMAGE, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("task", "batch", "message"),
    [
        (BatchSize(IMAGE, minimum=13), image_batch(), "minimum = 13 .* from 1 to 12"),
        (BatchSize(Line()), jnp.ones(()), "the examples along axis 0"),
        (BatchSize(Line()), {"x": jnp.ones(3), "y": jnp.ones(4)}, "the examples along axis 0"),
        (LabelNoise(IMAGE), {"x": jnp.ones((2, 16))}, "integer labels 'y'"),
        (LabelNoise(IMAGE), {"x": jnp.ones((2, 16)), "y": jnp.ones(2)}, "integer labels 'y'"),
        (LabelNoise(Line(), classes=2), jnp.ones(2), "integer labels 'y'"),
    ],
)
def test_batches_that_do_not_fit_are_refused_while_tracing(task, batch, message):
    sample = jax.eval_shape(task.sample, jax.random.key(0))
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda s: task.loss({}, {}, jax.random.key(0), batch, s)[0], sample)


def test_a_task_without_classes_is_refused():
    with pytest.raises(UserError, match="classes = 0 .*this task names none"):
        LabelNoise(Line())
