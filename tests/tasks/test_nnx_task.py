"""A user's own NNX model as a task."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from celo_nnx.errors import UserError
from celo_nnx.interfaces import Family
from celo_nnx.tasks import TASKS, ModuleTask, build_families


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(6, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.last = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))


def cross_entropy(model: Net, batch: dict, key: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"]).mean()


@pytest.fixture(scope="module")
def family() -> Family:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 200)
    x = (rng.normal(size=(200, 6)) + 2 * np.eye(3, 6)[y]).astype(np.float32)
    arrays = {"x": x, "y": y.astype(np.int32)}
    return Family("mine", ModuleTask(Net, cross_entropy, batch_size=32, loss_limit=3.0), arrays, arrays)


@pytest.fixture(autouse=True)
def flax_may_promote() -> object:
    """BatchNorm of flax adds a vector to a matrix, which the strict test process would refuse."""
    with jax.numpy_rank_promotion("allow"):
        yield


def test_twenty_steps_of_adam_lower_the_loss(family: Family) -> None:
    task, rule = family.task, optax.adam(1e-2)
    data = jax.tree.map(jnp.asarray, family.train)

    def trajectory(key: jax.Array) -> tuple:
        params, state = task.init(key)

        def step(carry: tuple, key: jax.Array) -> tuple:
            params, state, memory = carry
            batch = task.draw(data, key, jnp.int32(0), jnp.int32(200))
            value = jax.value_and_grad(lambda p: task.loss(p, state, key, batch)[:2], has_aux=True)
            (loss, state), grads = value(params)
            updates, memory = rule.update(grads, memory, params)
            return (optax.apply_updates(params, updates), state, memory), loss

        return jax.lax.scan(step, (params, state, rule.init(params)), jax.random.split(key, 20))

    (params, state, _), losses = jax.jit(jax.vmap(trajectory))(jax.random.split(jax.random.key(0), 2))
    assert (losses[:, -3:].mean(1) < 0.8 * losses[:, :3].mean(1)).all()
    assert sorted(params) == ["first", "last", "norm"] and sorted(state) == ["norm"]
    assert (jnp.abs(state["norm"]["mean"]) > 0).any()


def test_random_state_comes_from_the_key_alone(family: Family) -> None:
    task = family.task
    params, state = task.init(jax.random.key(0))
    batch = task.draw(family.train, jax.random.key(1), 0, 200)
    first, second = (task.loss(params, state, jax.random.key(k), batch)[0] for k in (0, 1))
    assert first == task.loss(params, state, jax.random.key(0), batch)[0] and first != second


def test_identity_decides_equality_and_the_meta_loss_is_finite(family: Family) -> None:
    other = ModuleTask(Net, cross_entropy, batch_size=32, loss_limit=3.0)
    assert other != family.task and len({other, family.task}) == 2
    out = other.normalize(jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.5]))
    np.testing.assert_allclose(out, [3, 3, -3, 0.5])


def test_values_out_of_range() -> None:
    with pytest.raises(UserError, match="batch_size = 0"):
        ModuleTask(Net, cross_entropy, batch_size=0, loss_limit=3.0)
    with pytest.raises(UserError, match="loss_limit = -1"):
        ModuleTask(Net, cross_entropy, batch_size=1, loss_limit=-1)


def test_mistakes_in_code_are_told_with_their_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^make\(rngs\) of a ModuleTask failed: TypeError: .*argument"):
        ModuleTask(lambda: Net(nnx.Rngs(0)), cross_entropy, batch_size=1, loss_limit=1.0)
    task = ModuleTask(lambda rngs: nnx.Linear(5, 3, rngs=rngs), cross_entropy, batch_size=1, loss_limit=1.0)
    params, state = task.init(jax.random.key(0))
    batch = {"x": jnp.ones((1, 6)), "y": jnp.zeros(1, jnp.int32)}
    with pytest.raises(UserError, match=r"^objective\(.*\) .*: .*\(6,\).*\(.*test_nnx_task.py, line \d+\)"):
        task.loss(params, state, jax.random.key(0), batch)
    monkeypatch.setitem(TASKS, "mine", lambda settings, data_dir: open("missing.npz"))
    with pytest.raises(UserError, match=r"^task 'mine' failed: FileNotFoundError.*task.py, line \d+\)"):
        build_families({"kind": "mine"})
