"""Families from sections: defaults, variation, mixtures, nested sections; a meta-iteration over two kinds."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from celo_nnx.build import build
from celo_nnx.config import load
from celo_nnx.errors import UserError
from celo_nnx.experiments import fast_conv, fast_digits, fast_mixed, fast_text
from celo_nnx.interfaces import Family
from celo_nnx.meta import build_trainer
from celo_nnx.meta.augmentations import Reparametrized
from celo_nnx.tasks import TASKS, build_families, complete

QUADRATIC = dict(kind="quadratic", eigenvalues=(1.0, 0.5))


@pytest.mark.parametrize("preset", [fast_digits, fast_conv, fast_text, fast_mixed])
def test_presets_are_complete_once_and_for_all(preset: Any) -> None:
    section = preset.get_config().to_dict()
    full = complete(section)
    assert complete(full) == full and section.items() <= full.items() or section["kind"] == "mixture"
    assert build_families(section) and full["kind"] in TASKS


def test_a_config_spells_the_defaults_of_tasks_out() -> None:
    config = load(
        "celo2_base:fast_mixed", ["tasks.parts.conv.batch_size=8", "tasks.parts.quadratic.noise=0.1"]
    )
    assert config.tasks.parts.conv.batch_size == 8 and config.tasks.parts.quadratic.noise == 0.1
    assert config.tasks.parts.mlp.normalization == "none" and config.tasks.parts.text.sample == 0
    assert load("celo2_base:fast_digits", ["tasks.normalization=layer"]).tasks.normalization == "layer"


def test_every_combination_or_a_sample_of_them() -> None:
    vary = dict(columns=(1, 2), eigenvalues=((1.0,), (1.0, 2.0), (3.0,)))
    families = build_families(QUADRATIC | {"vary": vary})
    assert [f.name for f in families] == [
        f"quadratic:columns={c}:eigenvalues={e}" for c in (1, 2) for e in ("1.0", "1.0x2.0", "3.0")
    ]
    assert [(f.task.columns, f.task.eigenvalues) for f in families] == [
        (c, e) for c in (1, 2) for e in vary["eigenvalues"]
    ]
    few = [build_families(QUADRATIC | {"vary": vary, "sample": 3, "sample_seed": s}) for s in (0, 0, 1, 2)]
    names = [[f.name for f in some] for some in few]
    assert names[0] == names[1] and len({tuple(n) for n in names}) > 1
    assert all(len(set(n)) == 3 and set(n) <= {f.name for f in families} for n in names)


def test_a_sample_of_very_many_combinations_needs_no_list_of_them() -> None:
    vary = {name: tuple(range(1, 5001)) for name in ("columns", "noise")}
    families = build_families(QUADRATIC | {"vary": vary, "sample": 2})
    assert len(families) == 2
    with pytest.raises(UserError, match="combinations = 25000000 .*at most 256; set tasks.sample"):
        build_families(QUADRATIC | {"vary": vary})


def test_tasks_around_tasks_and_mixtures() -> None:
    section = dict(
        kind="mixture",
        parts=dict(
            one=dict(kind="learned_optimizer", inner=QUADRATIC | {"vary": {"columns": (1, 2)}}, unroll=2),
            two=dict(kind="analytic"),
        ),
    )
    families = build_families(section)
    assert [f.name for f in families] == [
        "one/learned_optimizer/quadratic:columns=1",
        "one/learned_optimizer/quadratic:columns=2",
        "two/rosenbrock",
    ]
    assert families[1].task.inner.columns == 2 and families[1].task.unroll == 2


def test_autoencoders_know_their_floor_and_share_a_batch(tmp_path: Any) -> None:
    rng = np.random.default_rng(0)
    for name, high in (("dim", 30), ("bright", 256)):
        x = rng.integers(0, high, (20, 4, 4), np.uint8)
        np.savez(
            tmp_path / f"{name}.npz", train_x=x, train_y=np.arange(20) % 2, test_x=x, test_y=np.arange(20) % 2
        )
    section = dict(kind="image_autoencoder", datasets=("dim", "bright"), image_size=4, hidden=(3,))
    dim, bright = build_families(section, str(tmp_path))
    assert dim.task == bright.task and 0.1 < dim.task.floor < bright.task.floor < np.log(2)


def test_colour_images(tmp_path: Any) -> None:
    x = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "rgb.npz", train_x=x, train_y=np.arange(20) % 2, test_x=x, test_y=np.arange(20) % 2)
    section = dict(kind="conv_net", datasets=("rgb",), image_size=4, grey=False, channels=(2,), strides=(1,))
    (family,) = build_families(section, str(tmp_path))
    assert family.task.colors == 3 and family.task.classes == 2 and family.train["x"].shape == (20, 48)
    assert jax.eval_shape(family.task.init, jax.random.key(0))[0]["conv_0"]["kernel"].shape == (3, 3, 3, 2)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (QUADRATIC | {"vary": {"colums": (1, 2)}}, "'tasks.vary.colums' .*'tasks.vary.columns'"),
        (QUADRATIC | {"vary": {"columns": 2}}, "tasks.vary.columns = 2 .*a tuple of one or more"),
        (QUADRATIC | {"vary": {"columns": (2, 2)}}, r"tasks.vary.columns = \(2, 2\) .*different values"),
        (QUADRATIC | {"vary": {"columns": (0,)}}, "columns = 0"),
        (QUADRATIC | {"vary": 3}, "tasks.vary = 3 .*section"),
        (QUADRATIC | {"vary": {"columns": (1, 2)}, "sample": 3}, "tasks.sample = 3 .*from 1 to 2"),
        (QUADRATIC | {"vary": {"columns": (1, 2)}, "sample_seed": -1}, "tasks.sample_seed = -1"),
        (dict(kind="mixture", parts={}), "tasks.parts = {} .*one or more sections"),
        (dict(kind="mixture", part=1), "did you mean 'tasks.parts'"),
        (dict(kind="mixture", parts={"a": 3}), "tasks.parts.a = 3 must be a section"),
        (dict(kind="mixture", parts={"a": {"kind": "quadratik"}}), "tasks.parts.a: .*mean 'quadratic'"),
        (dict(kind="learned_optimizer"), "tasks.inner is missing"),
        (dict(kind="learned_optimizer", inner=QUADRATIC | {"columns": 0}), "tasks.inner: columns = 0"),
        (dict(kind="conv_net", datasets=("digits",), image_size=8, grey=1), "tasks.grey = 1"),
        (dict(kind="conv_net", datasets=("digits",), image_size=8, channels=8), "tasks.channels = 8 .*tuple"),
        (dict(kind="mlp_mixer", datasets=("digits",), image_size=8, patch=3), "patch = 3"),
        (dict(kind="conv_net", image_size=8), "tasks.datasets is missing: the kind 'conv_net'"),
        (dict(kind="recurrent_lm", datasets=("sums",), validation=1.0), "tasks.validation = 1.0"),
        (dict(kind="recurrent_lm", datasets="sums"), "tasks.datasets = 'sums'"),
        (dict(kind="recurrent_lm", datasets=("sum",)), "did you mean 'sums'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(section: dict, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        build_families(section)
    assert "\n" not in str(error.value)


def test_a_wrapped_task_keeps_its_floor_and_held_out_loss() -> None:
    (family,) = build_families(dict(kind="analytic", formula="styblinski_tang"))
    task = Reparametrized(family.task)
    assert task.floor == family.task.floor < -70
    sample = {"own": jnp.float32(2.0), "inner": ()}
    x = {"x": jnp.array([0.5, 1.0])}
    doubled = family.task.evaluate({"x": 2 * x["x"]}, {}, jax.random.key(0), {})
    assert task.evaluate(x, {}, jax.random.key(0), {}, sample) == doubled


def test_one_meta_iteration_over_two_kinds() -> None:
    """PES on a ConvNet with batch statistics and a GRU, side by side in one program."""
    few = ["meta.estimator.pairs=2", "meta.estimator.truncation=3", "run.iterations_per_dispatch=1"]
    few += ["optimizer.update_rule.hidden=(2,2)", "optimizer.features.groups=('gradient','momentum')"]
    config = load("celo2_base:fast_digits", few)
    conv = fast_conv.get_config().to_dict() | dict(channels=(2,), strides=(2,), batch_size=4)
    text = fast_text.get_config().to_dict() | dict(width=4, length=4, batch_size=4)
    families: list[Family] = build_families(dict(kind="mixture", parts=dict(conv=conv, text=text)))
    trainer = build_trainer(config, build(config.optimizer, jax.random.key(0)), families)
    before = trainer.init(jax.random.key(0))
    theta = jax.device_get(before["theta"])
    after, metrics = trainer.run(before, 1)
    metrics = jax.device_get(metrics)
    losses = np.ravel(metrics["family_loss"])
    assert losses.shape == (2,) and np.isfinite(losses).all()
    for loss, family in zip(losses, families, strict=True):
        assert 0.5 < loss <= float(family.task.normalize(jnp.inf))
    changed = [
        np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (theta, after["theta"])), strict=True)
    ]
    assert all(np.isfinite(c) for c in changed) and max(changed) > 0
