"""The meta section of a config: kinds at every level, from the command line to an estimator."""

import dataclasses
import math

import jax.numpy as jnp
import pytest

from celo_nnx.config import load
from celo_nnx.errors import UserError
from celo_nnx.meta import build_estimator, pairs_of
from celo_nnx.meta.estimators import ESTIMATORS
from celo_nnx.meta.truncation import Growing, LogUniform
from celo_nnx.tasks import build_families, hold_out


def meta(*overrides):
    return load("celo2:fast_digits", [f"meta.{o}" for o in overrides]).meta


def build(toy, *overrides):
    return build_estimator(meta(*overrides), toy.Drift(), [toy.family()])


@pytest.mark.parametrize("kind", [kind for kind in ESTIMATORS if kind != "mixture"])
def test_every_estimator_is_built_from_its_kind(toy, kind):
    estimator = build(toy, f"estimator.kind={kind}", "estimator.pairs=3", "unroll.maximum=150")
    assert type(estimator) is ESTIMATORS[kind]
    assert estimator.pairs == 3 and estimator.unroll == LogUniform(minimum=100, maximum=150)


def test_every_default_is_spelt_out():
    for kind, part in ESTIMATORS.items():
        section = meta(f"estimator.kind={kind}").estimator.to_dict()
        if kind != "mixture":
            names = {f.name for f in dataclasses.fields(part)}
            given = {"optimizer", "families", "unroll", "augmentation", "objective", "frozen", "devices"}
            assert set(section) == {"kind"} | names - given, kind
    assert set(section) == {"kind", "first", "second", "mode", "weight"}
    assert section["first"]["kind"] == "pes" and section["first"]["std"] == 0.01


def test_a_mixture_is_built_from_sections_of_its_own(toy):
    mixture = build(
        toy,
        "estimator.first.kind=full_es",
        "estimator.second.std=0.5",
        "estimator.kind=mixture",
        "estimator.first.batches=3",
        "estimator.mode=switch",
        "estimator.weight=0.9",
        "objective.split=validation",
    )
    assert (type(mixture.first), type(mixture.second)) == (ESTIMATORS["full_es"], ESTIMATORS["truncated_es"])
    assert mixture.first.batches == 3 and mixture.second.std == 0.5
    assert (mixture.mode, mixture.weight) == ("switch", 0.9)
    assert mixture.first.objective.split == mixture.second.objective.split == "validation"


def test_a_mixture_may_mix_a_mixture(toy):
    mixture = build(toy, "estimator.kind=mixture", "estimator.second.kind=mixture")
    assert type(mixture.second.second) is ESTIMATORS["truncated_es"]


def test_lengths_are_schedules(toy):
    schedule = build(toy, "unroll.kind=growing", "unroll.start=20", "unroll.iterations=7").unroll
    assert schedule == Growing(minimum=10, start=20, maximum=2000, iterations=7)
    # A truncation is a number until its kind is given.
    options = "estimator.truncation.minimum=5", "estimator.truncation.kind=log_uniform"
    found = build(toy, *options, "estimator.truncation.maximum=50")
    assert found.truncation == LogUniform(minimum=5, maximum=50) and found.most == 50
    nested = build(toy, "estimator.kind=mixture", "estimator.first.truncation.kind=growing")
    assert nested.first.truncation == Growing() and nested.second.truncation == 50


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["estimator.kind=pse"], r"unknown meta.estimator.kind 'pse' \(did you mean 'pes'\?\)"),
        (
            ["estimator.kind=mixture", "estimator.first.kind=ful_es"],
            r"meta.estimator.first.kind 'ful_es' .*full_es",
        ),
        (["estimator.kind=mixture", "estimator.third.kind=pes"], r"meta.estimator, 'third'"),
        (["estimator.truncation.kind=growin"], r"meta.estimator.truncation.kind 'growin' .*'growing'"),
        (["unroll.kind=constnat"], r"meta.unroll.kind 'constnat' .*'constant'"),
        (["augmentation.kind=reparam"], r"meta.augmentation.kind 'reparam'"),
        (["objective.kind=last"], r"unknown config key of meta.objective, 'kind'"),
        (["estimator.std.kind=log_uniform"], r"unknown config key of meta.estimator.std, 'kind'"),
        (
            ["estimator.kind=full_es", "estimator.truncation=5"],
            r"unknown config key of meta.estimator, 'trunc",
        ),
        (["estimator.kind=full_es", "unroll.kind=never"], r"meta.unroll of full_es = 'never'"),
        (["estimator.truncation.kind=never"], r"estimator.truncation = 'never'"),
        (["estimator.kind=truncated_backprop", "estimator.truncation.kind=constant"], r"not a schedule"),
        (["estimator.kind=truncated_backprop", "estimator.std=0.1"], r"meta.estimator, 'std'"),
        (["estimator.weights=(1.0,2.0)"], r"estimator.weights = \(1.0, 2.0\)"),
        (['estimator.leaf_std=(("schedule/",0.1),)'], r"estimator.leaf_std: 'schedule/' is found in no path"),
        (["estimator.kind=shared_noise", "estimator.reuse=-1"], r"estimator.reuse = -1"),
        (["objective.steps=first"], r"unknown meta.objective.steps 'first'"),
        (["objective.steps=last", "unroll.kind=never"], r"meta.unroll = 'never' .* trajectories end"),
    ],
)
def test_mistakes_are_named_in_one_line(toy, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        build(toy, *overrides)
    assert "\n" not in str(caught.value)


def test_sections_that_are_missing_or_none_are_named(toy):
    section = meta("estimator.kind=mixture").to_dict()
    del section["estimator"]["second"]
    with pytest.raises(UserError, match="the config has no section meta.estimator.second"):
        build_estimator(section, toy.Drift(), [toy.family()])
    section["estimator"]["second"] = "pes"
    with pytest.raises(UserError, match="meta.estimator.second = 'pes' must be a section"):
        build_estimator(section, toy.Drift(), [toy.family()])
    with pytest.raises(UserError, match="meta.estimator = 'pes' must be a section"):
        build_estimator({**section, "estimator": "pes"}, toy.Drift(), [toy.family()])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"estimator": None}, "meta.estimator = None must be a section"),
        ({"estimator": dict(kind="mixture", first="pes")}, "meta.estimator.first = 'pes' must be a section"),
        ({"estimator": dict(kind="pes", pairs=0)}, "meta.estimator.pairs = 0 is out of range"),
    ],
)
def test_the_number_of_pairs_is_asked_of_a_section(changes, message):
    """It is what a run asks first, to choose its devices."""
    with pytest.raises(UserError, match=message):
        pairs_of((meta().to_dict() | changes)["estimator"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "last"}, "meta.objective = 'last' must be a section"),
        ({"estimator": dict(kind="pes", weights=2.0)}, "estimator.weights = 2.0 is out of range"),
        ({"estimator": dict(kind="pes", weights={"a": 1.0})}, "estimator.weights = {'a': 1.0}"),
    ],
)
def test_values_that_only_a_config_file_can_have(toy, changes, message):
    with pytest.raises(UserError, match=message):
        build_estimator(meta().to_dict() | changes, toy.Drift(), [toy.family()])


def test_a_validation_split_has_to_be_held_out(toy):
    config = load("celo2:fast_digits", ["meta.objective.split=validation"])
    assert config.tasks.validation == 0.0
    with pytest.raises(
        UserError, match=r"family 'digits\w*' has no such split, .*tasks.validation=0.1 holds"
    ):
        build_estimator(config.meta, toy.Drift(), build_families(config.tasks))
    config.tasks.validation = 0.25
    family = build_families(config.tasks)[0]
    build_estimator(config.meta, toy.Drift(), [family])
    train, held = len(family.train["x"]), len(family.validation["x"])
    assert held == round(0.25 * (train + held)) and len(family.validation["y"]) == held


def test_what_is_held_out_is_not_trained_on():
    x = jnp.arange(40)
    parts = hold_out({"x": x, "y": x + 100}, 0.3)
    assert sorted([*parts["train"]["x"].tolist(), *parts["validation"]["x"].tolist()]) == list(range(40))
    for part in parts.values():
        assert (part["y"] == part["x"] + 100).all()


@pytest.mark.parametrize("share", [1.0, -0.1, math.nan, True, "half"])
def test_the_held_out_share_is_a_fraction(share):
    config = load("celo2:fast_digits")
    settings = config.tasks.to_dict() | {"validation": share}
    with pytest.raises(UserError, match=r"tasks.validation = .* fraction in \[0, 1\)"):
        build_families(settings)
