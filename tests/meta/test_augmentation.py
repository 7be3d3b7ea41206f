"""Reparametrized tasks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from celo_nnx.errors import UserError
from celo_nnx.interfaces import Task
from celo_nnx.meta.augmentation import AUGMENTATIONS, Reparametrized


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


@pytest.mark.parametrize("level", ["global", "tensor", "parameter"])
def test_loss_and_gradient_are_those_of_the_task_at_the_scaled_parameters(level):
    plain, task = Line(), Reparametrized(Line(), level=level, low=0.01, high=100.0)
    sample_key, key = jax.random.split(jax.random.key(4))
    sample = task.sample(sample_key)
    params, state = task.init(key, sample)
    original, _ = plain.init(key, sample["inner"])
    assert float(state) == float(sample["inner"])
    scale = sample["scale"] if level != "global" else {"w": sample["scale"], "b": sample["scale"]}
    sizes = {"global": (1, 1), "tensor": (1, 1), "parameter": (2, 6)}[level]
    assert (jnp.size(scale["b"]), jnp.size(scale["w"])) == sizes
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


def test_scale_is_log_uniform():
    task = Reparametrized(Line(), low=1e-3, high=1e3)
    scale = jax.vmap(lambda key: task.sample(key)["scale"])(jax.random.split(jax.random.key(0), 10000))
    logs = np.log10(np.asarray(scale))
    assert -3.001 < logs.min() < -2.98 and 2.98 < logs.max() < 3.001
    np.testing.assert_allclose(np.histogram(logs, bins=6, range=(-3, 3))[0] / 10000, 1 / 6, atol=0.02)


def test_equal_wrappings_are_equal_tasks_and_none_is_the_task():
    assert Reparametrized(Line()) == Reparametrized(Line()) != Reparametrized(Line(), high=10.0)
    task = Line()
    assert AUGMENTATIONS["none"](task) is task


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level": "globl"}, "did you mean 'global'"),
        ({"low": 0.0}, r"low = 0.0 .* > 0"),
        ({"low": 2.0, "high": 1.0}, r"high = 1.0 .* >= augmentation.low = 2.0"),
        ({"high": float("inf")}, r"high = inf"),
    ],
)
def test_ranges_are_checked(arguments, message):
    with pytest.raises(UserError, match=message):
        Reparametrized(Line(), **arguments)
