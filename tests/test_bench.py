"""``bench meta`` on every estimator, and what it refuses before it compiles; no time is asserted."""

from __future__ import annotations

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from celo_nnx import bench, cli
from celo_nnx.config import load
from celo_nnx.errors import UserError
from celo_nnx.meta import build_estimator
from celo_nnx.naive_meta import check
from celo_nnx.tasks import ImageMLP

SMALL = ("tasks.hidden=(4,)", "tasks.batch_size=4", "run.devices=1", "run.iterations_per_dispatch=1")


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(bench, "META_REPEATS", 1)
    monkeypatch.setattr(bench, "EXAMPLES", 32)


@pytest.mark.parametrize(("system", "counted"), [("linux", 2_000_000 / 1024), ("darwin", 2_000_000)])
def test_memory_is_in_the_unit_of_the_system(system, counted, monkeypatch):
    used = types.SimpleNamespace(ru_maxrss=counted)
    monkeypatch.setattr(bench.resource, "getrusage", lambda _: used)
    monkeypatch.setattr(bench.sys, "platform", system)
    assert bench.peak_rss_mb() == 2.0


class Plain:
    """Gradient descent at a learned rate: compiles in no time."""

    def __init__(self, theta=None):
        self.theta = {"rate": jnp.float32(0.1)} if theta is None else theta

    def with_theta(self, theta):
        return Plain(theta)

    def init(self, params, num_steps):
        return {"count": jnp.int32(0)}

    def update(self, grads, state, params, *, value):
        updates = jax.tree.map(lambda g: -self.theta["rate"] * g, grads)
        return updates, {"count": state["count"] + 1}


def config(*overrides):
    return load("nn_adam:fast_digits", [*SMALL, *(f"meta.{o}" for o in overrides)])


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ((), 2 * 3 * 5),
        (("estimator.kind=shared_noise",), 2 * 3 * 5),
        (("estimator.kind=truncated_backprop",), 3 * 5),
        (("estimator.truncation.kind=log_uniform",), None),
        (("estimator.kind=full_es",), None),
        (("estimator.kind=mixture",), None),
    ],
)
def test_inner_steps_where_there_is_a_fixed_number(overrides, steps):
    few = [] if "mixture" in "".join(overrides) else ["estimator.pairs=3"]
    few += ["estimator.truncation=5"] if steps else []
    one = config(*overrides, *few)
    estimator = build_estimator(one.meta, Plain(), bench.synthetic_families(one.tasks))
    assert bench.inner_steps(estimator, 1) == steps
    assert bench.inner_steps(estimator, 4) == (steps and 4 * steps)


def test_what_has_no_truncation_is_measured(monkeypatch):
    monkeypatch.setattr("celo_nnx.build.build", lambda *_: Plain())
    mixture = ("kind=mixture", "first.kind=full_es", "first.pairs=1", "second.pairs=1")
    (row,) = bench.meta(config(*(f"estimator.{o}" for o in mixture), "unroll.minimum=2", "unroll.maximum=2"))
    assert row["thing"] == "fused" and row["inner_steps_per_s"] is None
    assert row["s_per_meta_iteration"] > 0 and json.loads(json.dumps(row)) == row


def test_the_peer_is_measured_beside_it(monkeypatch):
    monkeypatch.setattr(bench._MetaCell, "__init__", stand_in)
    monkeypatch.setattr(bench._MetaCell, "time", lambda self: self.times.append(1e-6))
    fused, naive = bench.meta(config("estimator.pairs=1", "estimator.truncation=2"), ["naive"])
    assert (fused["thing"], naive["thing"]) == ("fused", "naive")
    assert fused["inner_steps_per_s"] == 4_000_000 and "speedup" not in fused and naive["speedup"] > 0


def stand_in(self, trainer, devices):
    self.trainer, self.devices, self.times = trainer, devices, []
    self.compile_s, self.temp_bytes, self.argument_bytes = 0.0, 0, 0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("estimator.kind=truncated_es", "meta.estimator.kind but 'pes', not 'truncated_es'"),
        ("estimator.kind=mixture", "not 'mixture'"),
        ("estimator.weights=(2.0,)", "meta.estimator.weights"),
        ("estimator.leaf_std=(('w',0.1),)", "meta.estimator.leaf_std"),
        ("estimator.sign_delta=1.0", "meta.estimator.sign_delta"),
        ("estimator.truncation.kind=growing", "a number for meta.estimator.truncation, not a section"),
        ("objective.split=validation", "meta.objective.split"),
        ("objective.steps=last", "meta.objective.steps"),
        ("objective.scale=log", "meta.objective.scale"),
        ("objective.clip=2.0", "meta.objective.clip"),
        ("unroll.kind=growing", "meta.unroll.kind"),
        ("augmentation.kind=label_noise", "meta.augmentation"),
        ("augmentation.level=parameter", "meta.augmentation"),
        ("optimizer.kind=lion", "meta.optimizer.kind"),
        ("optimizer.clip_norm=1.0", "meta.optimizer.clip_norm"),
        ("optimizer.warmup=10", "meta.optimizer.warmup"),
        ("optimizer.learning_rate.kind=cosine_decay_schedule", "meta.optimizer.learning_rate, not a section"),
        ("frozen=('w',)", "meta.frozen"),
        ("average=0.9", "meta.average"),
    ],
)
def test_the_peer_refuses_what_it_does_not_implement(override, words):
    with pytest.raises(UserError, match="the published loop") as error:
        check(config(override).meta)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_it_refuses_before_anything_is_built(monkeypatch, capsys):
    monkeypatch.setattr("celo_nnx.build.build", lambda *_: pytest.fail("the optimizer was built"))
    argv = ["bench", "meta", "celo2:fast_digits", "--peer", "naive"]
    assert cli.main([*argv, "meta.estimator.kind=shared_noise"]) == 2
    assert "meta.estimator.kind but 'pes'" in capsys.readouterr().err
    assert cli.main([*argv, "optimizer.orthogonalization.kind=svd"]) == 2
    assert "the plain twin knows" in capsys.readouterr().err


def test_every_setting_of_the_task_is_honoured():
    tasks = load(
        "celo2:fast_digits",
        [
            "tasks.image_size=4",
            "tasks.hidden=(6,5)",
            "tasks.activation=tanh",
            "tasks.normalization=layer",
            "tasks.initialization=orthogonal",
            "tasks.normalizer_clip=2.0",
            "tasks.batch_size=3",
        ],
    ).tasks
    (family,) = bench.synthetic_families(tasks)
    assert family.task == ImageMLP(
        features=16,
        hidden=(6, 5),
        batch_size=3,
        activation="tanh",
        normalizer_clip=2.0,
        normalization="layer",
        initialization="orthogonal",
    )
    assert family.train["x"].shape == (32, 16) and set(family.train["y"]) <= set(range(10))
    params = family.task.init(jax.random.key(0))[0]
    assert np.shape(params["norm_1"]["scale"]) == (5,)


def test_families_that_a_setting_varies_over():
    tasks = load("celo2:fast_digits").tasks.to_dict() | {"vary": {"hidden": ((4,), (8,))}, "grey": False}
    families = bench.synthetic_families(tasks)
    assert [family.name for family in families] == ["digits:hidden=4", "digits:hidden=8"]
    assert [family.task.hidden for family in families] == [(4,), (8,)]
    assert families[0].task.features == 3 * 64


def test_steps_of_a_suites_models(monkeypatch, capsys):
    monkeypatch.setattr(bench, "REPEATS", 1)
    models = bench.suite_shapes("smoke")
    assert list(models) == ["conv", "mlp", "text"]
    (row,) = bench.step((), models["mlp"], ())
    assert row["optimizer"] == "optax.adamw"
    assert row["params"] == 64 * 24 + 24 + 24 * 10 + 10
    assert cli.main(["bench", "step", "--suite", "smoke", "--params", "1000000"]) == 2
    assert "give one of them" in capsys.readouterr().err
