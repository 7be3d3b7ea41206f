"""Misspelt, mistyped, out of range, nested wrongly: a config works or is refused in one line."""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path
from typing import Any

import jax
from fuzzing import Tally, altered, examples, misspelt, near, texts
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from celo_nnx import training
from celo_nnx.config import load
from celo_nnx.devices import choose_devices
from celo_nnx.meta import pairs_of
from celo_nnx.phases import plan
from celo_nnx.run_files import check_settings, flat, resolve

BASES = (
    "celo2:fast_digits",
    "celo:fast_digits",
    "celo_two_phases:fast_digits",
    "velo_s:fast_digits",
    "nn_adam:fast_digits",
)
KINDS = (
    "optimizer.schedule.kind=lstm",
    "optimizer.routing.kind=regex",
    "optimizer.tracker.kind=loss_buffer",
    "optimizer.orthogonalization.kind=identity",
    "meta.estimator.kind=mixture",
    "meta.estimator.kind=full_es",
    "meta.estimator.kind=truncated_backprop",
    "meta.estimator.kind=shared_noise",
    "meta.estimator.truncation.kind=log_uniform",
    "meta.unroll.kind=growing",
    "meta.optimizer.kind=lion",
    "meta.optimizer.learning_rate.kind=cosine_decay_schedule",
    "meta.augmentation.kind=label_noise",
    "optimizer.normalization.kind=identity",
    "optimizer.update_rule.kind=adam",
)


def cache() -> Path:
    """Prepared data sets are kept there."""
    return Path(os.environ["CELO_NNX_CACHE"])


@functools.cache
def whole(base: str) -> dict[str, Any]:
    return load(base).to_dict()


@functools.cache
def whole_flat(base: str) -> dict[str, Any]:
    return flat(whole(base))


@functools.cache
def keys(base: str) -> tuple[str, ...]:
    """Dotted keys of sections and values."""
    found = set(whole_flat(base))
    found |= {key.rpartition(".")[0] for key in found if "." in key}
    return tuple(sorted(found))


def attempt(config: ConfigDict) -> None:
    """All that ``celo-nnx train`` checks before it trains."""
    check_settings(resolve(config))
    phases = plan(config)
    pairs = math.gcd(*(pairs_of(phase.config["meta"].get("estimator")) for phase in phases))
    works = training.Works(phases, choose_devices(config.run.devices, pairs), None)
    jax.eval_shape(works.enter(phases[0]).trainer.init, jax.random.key(0))


@st.composite
def changed(draw: Any) -> tuple[str, list[str]]:
    """A base and overrides of which most are wrong."""
    base = draw(st.sampled_from(BASES))
    overrides = draw(st.lists(st.sampled_from(KINDS), max_size=2)) if draw(st.booleans()) else []
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        key = draw(st.sampled_from(keys(base)))
        if draw(st.integers(0, 7)) == 0:
            key = draw(misspelt(key))
        value = draw(near(whole_flat(base).get(key)).map(str) if draw(st.booleans()) else texts)
        overrides.append(draw(st.sampled_from(("{}={}",) * 9 + ("{}{}",))).format(key, value))
    return base, draw(st.permutations(overrides))


@st.composite
def rebuilt(draw: Any) -> ConfigDict:
    """What ``get_config`` of a config file might return: a config with values put in, keys lost and new."""
    config = draw(altered(whole(draw(st.sampled_from(BASES)))))
    try:
        return ConfigDict(config)
    except Exception:  # a tree that no ConfigDict holds is none that a file could return
        return ConfigDict()


@examples(25, 5000)
@given(changed=changed())
def test_overrides(tally: Tally, changed: tuple[str, list[str]]) -> None:
    base, overrides = changed
    with tally.trying(cache()):
        attempt(load(base, overrides))


@examples(25, 5000)
@given(config=rebuilt())
def test_files(tally: Tally, config: ConfigDict) -> None:
    with tally.trying(cache()):
        attempt(load(config))
