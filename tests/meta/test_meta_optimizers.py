"""Meta-optimizers from config against optax used directly; every mistake in one line."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from celo_nnx.config import load
from celo_nnx.errors import UserError
from celo_nnx.meta.meta_optimizers import defaults, meta_optimizer, rules

THETA = {"w": jnp.linspace(-1.0, 2.0, 6).reshape(3, 2), "b": jnp.array([0.5, -0.25])}
ADAMW = dict(kind="adamw", learning_rate=0.1, b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.03)
COSINE = dict(
    kind="warmup_cosine_decay_schedule", init_value=0.0, peak_value=0.3, warmup_steps=3, decay_steps=8
)


def gradient(i: int) -> dict[str, jax.Array]:
    return jax.tree.map(lambda x: 3.0 * jnp.sin(7.0 * x + i), THETA)


def follow(rule: optax.GradientTransformation, steps: int = 7) -> list[Any]:
    """Theta after each update."""
    theta, state, out = THETA, rule.init(THETA), []
    for i in range(steps):
        updates, state = rule.update(gradient(i), state, theta)
        theta = optax.apply_updates(theta, updates)
        out.append(theta)
    return out


def same(one: list[Any], other: list[Any], rtol: float = 0.0) -> None:
    for a, b in zip(one, other, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol), a, b)


def cosine() -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(0.0, 0.3, 3, 8)


PAIRS = {
    "adamw": (ADAMW, lambda: optax.adamw(0.1, 0.8, 0.9, 1e-6, weight_decay=0.03)),
    "lion": (dict(kind="lion", learning_rate=0.01, b1=0.5), lambda: optax.lion(0.01, b1=0.5)),
    "nadamw": (dict(kind="nadamw", learning_rate=0.01), lambda: optax.nadamw(0.01)),
    "momentum": (
        dict(kind="sgd", learning_rate=0.01, momentum=0.7, nesterov=True),
        lambda: optax.sgd(0.01, 0.7, True),
    ),
    "schedule": (
        ADAMW | dict(learning_rate=COSINE),
        lambda: optax.adamw(cosine(), 0.8, 0.9, 1e-6, weight_decay=0.03),
    ),
    "decay": (
        ADAMW
        | dict(weight_decay=dict(kind="linear_schedule", init_value=0.0, end_value=0.5, transition_steps=4)),
        lambda: optax.adamw(0.1, 0.8, 0.9, 1e-6, weight_decay=optax.linear_schedule(0.0, 0.5, 4)),
    ),
    "pieces": (
        dict(
            kind="sgd",
            learning_rate=dict(
                kind="piecewise_constant_schedule", init_value=0.1, boundaries_and_scales={"2": 0.5, "4": 0.1}
            ),
        ),
        lambda: optax.sgd(optax.piecewise_constant_schedule(0.1, {2: 0.5, 4: 0.1})),
    ),
    "chain": (
        dict(
            kind="chain",
            transforms=(
                dict(kind="clip_by_global_norm", max_norm=1.0),
                dict(kind="adam", learning_rate=COSINE),
            ),
        ),
        lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(cosine())),
    ),
    "parts": (
        dict(
            kind="chain",
            transforms=[
                dict(kind="scale_by_adam"),
                dict(kind="scale_by_schedule", step_size_fn=COSINE),
                dict(kind="scale", step_size=-1.0),
            ],
        ),
        lambda: optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(cosine()), optax.scale(-1.0)),
    ),
    "wrapper": (
        dict(kind="apply_if_finite", inner=dict(kind="adam", learning_rate=0.1), max_consecutive_errors=3),
        lambda: optax.apply_if_finite(optax.adam(0.1), 3),
    ),
    "joined": (
        dict(
            kind="sgd",
            learning_rate=dict(
                kind="join_schedules",
                boundaries=(3,),
                schedules=(dict(kind="constant_schedule", value=0.1), COSINE),
            ),
        ),
        lambda: optax.sgd(optax.join_schedules([lambda _: 0.1, cosine()], [3])),
    ),
    "clip_norm": (
        ADAMW | dict(clip_norm=0.5),
        lambda: optax.chain(
            optax.clip_by_global_norm(0.5), optax.adamw(0.1, 0.8, 0.9, 1e-6, weight_decay=0.03)
        ),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_section_is_the_optax_rule(name: str) -> None:
    section, direct = PAIRS[name]
    same(follow(meta_optimizer(section)), follow(direct()))
    same(follow(meta_optimizer(ConfigDict(section))), follow(direct()))  # as a config holds it


@pytest.mark.parametrize("rate", [0.1, COSINE], ids=["constant", "schedule"])
def test_warm_up_is_a_ramp_that_ends_at_its_last_update(rate: Any) -> None:
    schedule = cosine() if isinstance(rate, dict) else lambda count: 0.1

    def ramped(count: Any) -> Any:
        return schedule(count) * jnp.array([0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0])[count]

    rule = meta_optimizer(ADAMW | dict(learning_rate=rate, warmup=4))
    same(follow(rule), follow(optax.adamw(ramped, 0.8, 0.9, 1e-6, weight_decay=0.03)), rtol=1e-6)


def test_without_clipping_and_warm_up_the_state_is_adamws() -> None:
    state = meta_optimizer(ADAMW | dict(clip_norm=0.0, warmup=0)).init(THETA)
    assert jax.tree.structure(state) == jax.tree.structure(optax.adamw(0.1).init(THETA))


@pytest.mark.parametrize("kind", ["adam", "adamw", "lion", "sgd", "lamb", "adafactor", "rmsprop", "yogi"])
def test_a_rule_with_its_defaults_and_a_rate_updates(kind: str) -> None:
    section = {"kind": kind, **defaults("meta.optimizer", kind), "learning_rate": 0.1}
    after = follow(meta_optimizer(section), 2)[-1]
    assert all(
        np.isfinite(x).all() and not np.array_equal(x, y)
        for x, y in zip(*map(jax.tree.leaves, (after, THETA)), strict=True)
    )


CHAIN = "({'kind':'clip_by_global_norm','max_norm':1.0},{'kind':'adam','learning_rate':0.1})"


@pytest.mark.parametrize(
    ("overrides", "direct"),
    [
        (("kind=lion", "learning_rate=0.01", "b1=0.5"), lambda: optax.lion(0.01, b1=0.5)),
        (
            # A part of the schedule before the schedule, and this before the rule: the order says nothing.
            (
                "learning_rate.decay_steps=8",
                "learning_rate.init_value=0.3",
                "learning_rate.kind=cosine_decay_schedule",
                "kind=lion",
            ),
            lambda: optax.lion(optax.cosine_decay_schedule(0.3, 8)),
        ),
        (
            ("kind=chain", f"transforms={CHAIN}"),
            lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
        ),
        (
            ("clip_norm=2", "learning_rate=0.1"),
            lambda: optax.chain(optax.clip_by_global_norm(2.0), optax.adamw(0.1)),
        ),
        ((), lambda: optax.adamw(1e-4)),
    ],
    ids=["kind", "schedule", "chain", "clip", "default"],
)
def test_overrides_of_a_config(overrides: tuple[str, ...], direct: Any) -> None:
    config = load("celo2:fast_digits", [f"meta.optimizer.{text}" for text in overrides])
    same(follow(meta_optimizer(config.meta.optimizer)), follow(direct()))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("meta.optimizer.kind=lionn", "'lionn' .did you mean 'lion'"),
        ("meta.optimizer.learning_rate.kind=cosine_decay", "did you mean 'cosine_decay_schedule'"),
        ("meta.optimizer.clip_nor=1", "did you mean 'clip_norm'"),
        ("meta.optimizer.warmup=1.5", "expected int"),
        ("meta.froze=schedule/", "did you mean 'frozen'"),
        ("meta.average=much", "expected float"),
    ],
)
def test_mistakes_in_overrides(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load("celo2:fast_digits", [override])
    assert "\n" not in str(caught.value)


def test_only_rules_have_names() -> None:
    for name in ("apply_updates", "inject_hyperparams", "global_norm", "linear_schedule", "named_chain"):
        assert name not in rules()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            dict(kind="lionn", learning_rate=0.1),
            r"unknown meta.optimizer.kind 'lionn' \(did you mean 'lion'\?\)",
        ),
        (dict(kind="apply_updates"), "unknown meta.optimizer.kind 'apply_updates'"),
        (dict(kind="linear_schedule"), "unknown meta.optimizer.kind 'linear_schedule'"),
        (dict(learning_rate=0.1), "unknown meta.optimizer.kind None"),
        ("adamw", "must be a section"),
        (dict(kind="lion"), r"meta.optimizer \(lion\) needs learning_rate"),
        (dict(kind="lion", learning_rate=None), r"meta.optimizer \(lion\) needs learning_rate"),
        (
            dict(kind="lion", learning_rat=0.1),
            r"unknown key of meta.optimizer \(lion\), 'learning_rat' .*'learning_rate'",
        ),
        (dict(kind="lion", learning_rate=-0.1), "meta.optimizer.learning_rate = -0.1 .* >= 0"),
        (dict(kind="lion", learning_rate=float("nan")), "meta.optimizer.learning_rate = nan"),
        (dict(kind="lion", learning_rate="fast"), r"meta.optimizer \(lion\)"),
        (ADAMW | dict(clip_norm=-1.0), "meta.optimizer.clip_norm = -1.0"),
        (ADAMW | dict(warmup=1.5), "meta.optimizer.warmup = 1.5"),
        (ADAMW | dict(weight_decay=-1.0), "meta.optimizer.weight_decay = -1.0"),
        (
            ADAMW | dict(learning_rate=dict(kind="cosine_decay")),
            "unknown meta.optimizer.learning_rate.kind .*'cosine_decay_schedule'",
        ),
        (
            ADAMW | dict(learning_rate=dict(kind="linear_schedule", init_value=0.0)),
            r"meta.optimizer.learning_rate \(linear_schedule\) needs end_value, transition_steps",
        ),
        (ADAMW | dict(learning_rate=dict(kind="adam", learning_rate=0.1)), "meta.optimizer"),
        (dict(kind="chain", transforms=()), "transforms of a chain must be"),
        (
            dict(kind="chain", transforms=(dict(kind="constant_schedule", value=1.0),)),
            "transforms of a chain",
        ),
        (
            dict(kind="chain", transforms=(dict(kind="adamm", learning_rate=0.1),)),
            r"unknown meta.optimizer.transforms\[0\].kind 'adamm' .*'adam'",
        ),
        (dict(kind="polyak_sgd"), r"meta.optimizer \(polyak_sgd\) cannot update theta"),
    ],
)
def test_mistakes_are_told_in_one_line(section: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        meta_optimizer(section)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
