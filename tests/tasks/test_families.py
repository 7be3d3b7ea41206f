"""Every kind of task: parameter counts, first losses, gradients, learning, equality, model state."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from celo_nnx.interfaces import Family
from celo_nnx.tasks import TASKS, build_families

LN10, IMAGES = math.log(10), dict(datasets=("digits",), image_size=8)
TEXT = dict(datasets=("sums",), length=6, batch_size=8)


class Case(NamedTuple):
    """A kind of task at a small size.

    Attributes:
      section: its settings.
      parameters: how many there are, by hand.
      first: what the loss of a new model is near, and how near.
      lower: which part of the first loss is left after the steps, at most.
      steps, rate: of Adam, on one batch.
    """

    section: dict[str, Any]
    parameters: int
    first: tuple[float, float]
    lower: float
    steps: int = 60
    rate: float = 0.03


def linear(*widths: int) -> int:
    return sum((a + 1) * b for a, b in zip(widths[:-1], widths[1:], strict=True))


def block(d: int, hidden: int) -> int:
    """Two layer norms, four square kernels without biases, an MLP."""
    return 4 * d + 4 * d * d + linear(d, hidden, d)


CASES = {
    "image_mlp": Case(
        dict(**IMAGES, hidden=(8, 6), normalization="layer", batch_size=8),
        linear(64, 8, 6, 10) + 2 * (8 + 6),
        (LN10, 0.8),
        0.1,
    ),
    "image_autoencoder": Case(
        dict(**IMAGES, hidden=(16,), batch_size=8), linear(64, 16, 64), (math.log(2), 0.05), 0.6
    ),
    "conv_net": Case(  # convolutions without biases before batch normalization
        dict(**IMAGES, channels=(4, 6), strides=(2, 1), normalization="batch", batch_size=8),
        9 * 4 + 9 * 4 * 6 + 2 * (4 + 6) + linear(6, 10),
        (LN10, 0.8),
        0.3,
    ),
    "res_net": Case(
        dict(**IMAGES, channels=(4, 6), blocks=1, normalization="layer", batch_size=8),
        linear(9, 4) + 2 * linear(36, 4)  # stem, first block
        + linear(36, 6) + linear(54, 6) + linear(4, 6)  # second block, with its way around
        + 2 * (3 * 4 + 3 * 6) + linear(6, 10),
        (LN10, 1.2),
        0.3,
    ),
    "vision_transformer": Case(
        dict(**IMAGES, width=8, depth=1, heads=2, expansion=2, batch_size=8),
        linear(16, 8) + 4 * 8 + block(8, 16) + 2 * 8 + linear(8, 10),
        (LN10, 1.2),
        0.3,
    ),
    "mlp_mixer": Case(
        dict(**IMAGES, width=8, depth=1, patch_hidden=3, channel_hidden=12, batch_size=8),
        linear(16, 8) + 4 * 8 + linear(4, 3) + 3 * 4 + linear(8, 12, 8) + 2 * 8 + linear(8, 10),
        (LN10, 1.2),
        0.3,
    ),
    "recurrent_lm": Case(
        dict(**TEXT, width=8, cell="gru", normalization="layer"),
        24 * 8 + linear(8, 24) + 8 * 24 + 2 * 8 + linear(8, 24),
        (math.log(24), 0.8),
        0.5,
    ),
    "transformer_lm": Case(
        dict(**TEXT, width=8, depth=1, heads=2, expansion=2),
        24 * 8 + 6 * 8 + block(8, 16) + 2 * 8 + linear(8, 24),
        (math.log(24), 0.8),
        0.5,
    ),
    "quadratic": Case(
        # Expected at the start: half the trace.
        dict(eigenvalues=tuple(np.linspace(0.5, 2, 60).tolist()), columns=8), 480, (37.5, 4.0), 0.05, rate=0.1
    ),
    "analytic": Case(dict(formula="rosenbrock", dimension=3), 3, (0.0, 5000.0), 0.02),
    "learned_optimizer": Case(
        dict(
            inner=dict(kind="quadratic", eigenvalues=(1.0, 1.0), columns=4, rotated=False),
            hidden=(4,),
            unroll=4,
            pairs=32,
            step=0.1,
        ),
        linear(5, 4, 2),
        (math.log(2), 0.5),
        0.8,
        steps=100,
        rate=0.05,
    ),
}  # fmt: skip


def section(kind: str) -> dict[str, Any]:
    return {"kind": kind} | CASES[kind].section


@pytest.fixture(scope="module", params=CASES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def family(kind: str) -> Family:
    (made,) = build_families(section(kind))
    return made


@pytest.fixture(scope="module")
def trained(kind: str, family: Family) -> dict[str, Any]:
    """One compilation: a start, its gradient, steps of Adam on one batch, and what is left."""
    task, case = family.task, CASES[kind]
    tx = optax.adam(case.rate)

    def run(key: jax.Array, data: dict) -> dict[str, Any]:
        sample = task.sample(key)
        params, state = task.init(key, sample)
        count = jax.tree.leaves(data)[0].shape[0]
        batch = task.draw(data, key, jnp.int32(0), jnp.int32(count))

        def step(carry: tuple, _: None) -> tuple:
            params, state, memory = carry

            def objective(params: Any) -> tuple:
                return task.loss(params, state, key, batch, sample)[:2]

            (loss, state), grads = jax.value_and_grad(objective, has_aux=True)(params)
            updates, memory = tx.update(grads, memory, params)
            return (optax.apply_updates(params, updates), state, memory), (loss, grads)

        (after, moved, _), (losses, grads) = jax.lax.scan(
            step, (params, state, tx.init(params)), None, length=case.steps
        )
        fresh = [task.evaluate(params, s, key, batch, sample) for s in (state, moved)]
        last = [task.loss(after, s, key, batch, sample)[0] for s in (state, moved)]
        first = jax.tree.map(lambda g: g[0], grads)
        states = dict(state=state, moved=moved, fresh=fresh, last=last)
        return dict(params=params, losses=losses, first=first, **states)

    return jax.device_get(jax.jit(run)(jax.random.key(0), jax.tree.map(jnp.asarray, family.train)))


def test_every_kind_is_here() -> None:
    assert set(CASES) | {"mixture"} == set(TASKS)


def test_parameters(kind: str, trained: dict[str, Any]) -> None:
    leaves = jax.tree.leaves(trained["params"])
    assert sum(leaf.size for leaf in leaves) == CASES[kind].parameters
    assert all(leaf.dtype == np.float32 for leaf in leaves)


def test_a_new_model_guesses(kind: str, trained: dict[str, Any]) -> None:
    about, within = CASES[kind].first
    assert abs(trained["losses"][0] - about) < within


def test_every_tensor_has_a_gradient(trained: dict[str, Any]) -> None:
    for path, grad in jax.tree.leaves_with_path(trained["first"]):
        assert np.isfinite(grad).all() and np.abs(grad).max() > 1e-6, jax.tree_util.keystr(path)


def test_adam_learns_one_batch(kind: str, family: Family, trained: dict[str, Any]) -> None:
    losses, floor = trained["losses"], family.task.floor
    assert np.isfinite(losses).all() and losses.min() >= min(floor or 0.0, 0.0)
    assert losses[-5:].mean() < CASES[kind].lower * losses[0]


def test_equal_settings_are_equal_tasks(kind: str, family: Family) -> None:
    (again,) = build_families(section(kind))
    assert again.task is not family.task
    assert again.task == family.task and hash(again.task) == hash(family.task)
    other = dataclasses.replace(family.task, **CHANGED.get(kind, {"batch_size": 3}))
    assert other != family.task


CHANGED = {
    "quadratic": {"columns": 2},
    "analytic": {"dimension": 4},
    "learned_optimizer": {"unroll": 3},
}


def test_the_meta_loss_is_finite_and_monotone(family: Family) -> None:
    losses = jnp.array([-jnp.inf, -1.0, 0.1, 0.5, 1e30, jnp.inf, jnp.nan])
    out = np.asarray(jax.vmap(family.task.normalize)(losses))
    assert np.isfinite(out).all() and (np.diff(out) >= 0).all() and out[2] < out[3] < out[-1] and out[0] == 0


def test_only_batch_normalization_has_state(kind: str, trained: dict[str, Any]) -> None:
    before, after = (jax.tree.leaves(trained[name]) for name in ("state", "moved"))
    if kind != "conv_net":
        assert before == [] and trained["fresh"][0] == trained["fresh"][1]
        smoothed = kind == "learned_optimizer"  # its loss is the mean over perturbed thetas
        assert trained["fresh"][0] == pytest.approx(trained["losses"][0], rel=0.3 if smoothed else 1e-5)
        return
    assert len(before) == 4 and all(np.abs(a - b).max() > 1e-3 for a, b in zip(before, after, strict=True))
    # Training normalizes by the batch, so the state does not matter; testing by the running statistics.
    assert trained["last"][0] == trained["last"][1]
    assert abs(trained["fresh"][0] - trained["fresh"][1]) > 1e-3
