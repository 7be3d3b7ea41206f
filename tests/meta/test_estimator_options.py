"""Options that estimators share: standard deviations, signs, schedules, offsets; and their bad values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from celo_nnx.errors import UserError
from celo_nnx.meta.estimators import PES, FullES, Mixture, SharedNoise, TruncatedBackprop, TruncatedES
from celo_nnx.meta.objective import Objective
from celo_nnx.meta.trainer import MetaTrainer
from celo_nnx.meta.truncation import NEVER, Constant, Growing, LogUniform, NeverEnding

THETA = {"rule": {"rate": jnp.float32(0.3)}, "schedule": {"drift": jnp.float32(0.7)}}


def pes(toy, kind=PES, **options):
    options = {"pairs": 4, "std": 0.1, "truncation": 5, "unroll": Constant(length=7)} | options
    return kind(toy.Rated(THETA), [toy.family(task=toy.Quadratic(noise=0.5))], **options)


def iterations(toy, estimator, numbers=(0, 1, 2), start=0):
    """The first state, and (gradient, state, metrics) of each meta-iteration with the key of its number."""
    step = toy.jit(estimator)
    first = state = toy.jit(estimator.init)(THETA, jax.random.key(start))
    results = []
    for k in numbers:
        results.append(step(THETA, state, jax.random.key(k), k))
        state = results[-1][1]
    return first, results


def flat(gradient):
    return np.array([gradient["rule"]["rate"], gradient["schedule"]["drift"]])


@pytest.mark.parametrize(
    ("options", "stds"),
    [
        ({}, [0.1, 0.1]),
        ({"leaf_std": (("^schedule/", 0.4), ("drift", 9.0), ("e", 0.2))}, [0.2, 0.4]),
        ({"frozen": ("rule/rate",), "leaf_std": (("rule", 3.0),), "sign_delta": 0.7}, [0.0, 0.1]),
    ],
    ids=str,
)
def test_pes_by_hand_with_a_standard_deviation_for_each_leaf(toy, by_hand, options, stds):
    estimator, stds = pes(toy, **options), np.array(stds)
    np.testing.assert_allclose(estimator.stds, stds, rtol=1e-6)
    first, results = iterations(toy, estimator)
    at = by_hand.Inner.start(4, 2, first[0].problems.inner_step)
    seen, numbers = np.zeros((4, 2)), np.arange(4)
    for k, (gradient, state, _) in enumerate(results):
        key = jax.random.key(k)
        v = by_hand.perturbations(key, numbers, stds, 2)
        x, _ = by_hand.batches(estimator, by_hand.unroll_keys(key, numbers), 5)
        rate, drift = (np.stack([c + v[:, i], c - v[:, i]], 1) for i, c in enumerate((0.3, 0.7)))
        rows, at = by_hand.train(drift, at, 5, 7, x, rate=0.1 * np.exp(rate), noise=0.5)
        loss = rows.loss
        if "sign_delta" in options:
            delta = np.where(rows.mask, loss[..., 0] - loss[..., 1], 0.0).sum(0)
            loss = np.stack([np.tile(np.sign(delta) * 0.7, (5, 1)), np.zeros((5, 4))], -1)
        sums, seen = by_hand.pes(loss, rows.done, rows.mask, rows.mask, v, seen)
        expected = sums.mean(0) / np.where(stds > 0, 2 * stds**2, 1.0)
        np.testing.assert_allclose(flat(gradient), expected, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(state[0].accumulator, seen, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(state[0].problems.params["w"], at.w, rtol=1e-5)
        if "frozen" in options:
            assert gradient["rule"]["rate"] == 0 and gradient["schedule"]["drift"] != 0


@pytest.mark.parametrize("kind", [TruncatedES, SharedNoise, FullES, TruncatedBackprop])
def test_a_frozen_leaf_has_no_gradient_and_the_other_keeps_its_own(toy, kind):
    options = {"truncation": 3, "std": 0.1, "unroll": Constant(length=7)}
    options = {k: v for k, v in options.items() if hasattr(kind, k)}
    family = toy.family(task=toy.Quadratic(noise=0.5))
    free, frozen = (kind(toy.Rated(THETA), [family], frozen=f, **options) for f in ((), ("rule/",)))

    @toy.jit
    def run(key):
        return [e(THETA, e.init(THETA, key), key)[0] for e in (free, frozen)]

    free, frozen = run(jax.random.key(1))
    assert frozen["rule"]["rate"] == 0 and free["rule"]["rate"] != 0
    if kind is TruncatedBackprop:
        np.testing.assert_allclose(frozen["schedule"]["drift"], free["schedule"]["drift"], rtol=1e-6)
    else:  # the frozen leaf is not perturbed, so that the other's losses change
        assert frozen["schedule"]["drift"] != free["schedule"]["drift"]


@pytest.mark.parametrize("kind", [PES, TruncatedES, SharedNoise])
def test_a_drawn_truncation_equals_the_fixed_one_of_its_length(toy, by_hand, kind):
    schedule, options = (
        LogUniform(minimum=2, maximum=6),
        {"objective": Objective(split="validation", scale="first")},
    )
    lengths = [int(schedule(jax.random.fold_in(jax.random.key(k), by_hand.LAST))) for k in range(30)]
    numbers = [k for k in range(30) if lengths[k] == 4][:3]
    assert len(numbers) == 3 and len(set(lengths)) >= 4
    found = [iterations(toy, pes(toy, kind, truncation=t, **options), numbers) for t in (schedule, 4)]
    for drawn, fixed in zip(*(results for _, results in found), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), drawn, fixed)


def test_truncations_grow_with_the_meta_iteration(toy, by_hand):
    schedule = Growing(minimum=2, start=2, maximum=9, iterations=10)
    estimator = pes(toy, truncation=schedule, unroll=Constant(length=1000), initial_offset="none")
    numbers = (0, 10, 100, 11)
    _, results = iterations(toy, estimator, numbers)
    steps = np.diff([0, *(int(state[0].problems.inner_step[0]) for _, state, _ in results)])
    want = [int(schedule(jax.random.fold_in(jax.random.key(k), by_hand.LAST), k)) for k in numbers]
    assert steps.tolist() == want and want[0] == 2 and max(want) >= 4


@pytest.mark.parametrize("kind", [PES, TruncatedES, SharedNoise, TruncatedBackprop, "mixture"])
def test_a_later_phase_begins_with_lengths_of_its_meta_iteration(toy, kind):
    schedule = Growing(minimum=2, start=2, maximum=500, iterations=100)
    options = {"unroll": schedule, "pairs": 32, "truncation": 5}
    family = toy.family(task=toy.Quadratic(noise=0.5))
    made = (PES if kind == "mixture" else kind)(toy.Rated(THETA), [family], **options)
    estimator = Mixture(made, made) if kind == "mixture" else made
    trainer = MetaTrainer(toy.Rated(THETA), estimator, optax.sgd(0.1))

    def lengths(iteration):
        state = trainer.init(jax.random.key(0), iteration=iteration)["estimator"]
        return np.concatenate([x.ravel() for x in by_name(state, "length")])

    assert lengths(0).tolist() == [2] * len(lengths(0))
    late = lengths(100)  # log-uniform from 2 to 500: the middle is 32
    assert late.min() >= 2 and late.max() > 200 and 10 < np.median(late) < 100


def by_name(state, name):
    """Returns the leaves of this name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return [np.asarray(x) for path, x in leaves if jax.tree_util.keystr(path).endswith(f".{name}")]


@functools.cache
def growing_unroll(toy):
    family = toy.family(task=toy.Quadratic(spread=1.0))
    schedule = Growing(minimum=2, start=3, maximum=60, iterations=100)
    estimator = PES(toy.Rated(THETA), [family], pairs=64, std=0.1, truncation=4, unroll=schedule)
    return iterations(toy, estimator, (0, 0, 100, 100, 101))


def test_trajectories_grow_with_the_meta_iteration(toy):
    first, results = growing_unroll(toy)
    longest = [int(state[0].problems.length.max()) for _, state, _ in results]
    assert int(first[0].problems.length.max()) <= 3 and max(longest[:2]) <= 3 and max(longest[2:]) > 30
    for _, state, _ in results:
        problems = state[0].problems
        np.testing.assert_array_equal(problems.optimizer["num_steps"], np.stack([problems.length] * 2, 1))


def test_both_sides_begin_alike_and_differ_from_other_pairs(toy):
    _, results = growing_unroll(toy)
    for _, state, _ in results:
        problems = state[0].problems
        w, step = np.asarray(problems.params["w"]), np.asarray(problems.inner_step)
        # The step after the reset is the first that knows theta.
        new = (step == 0) & ~np.asarray(problems.done)
        np.testing.assert_array_equal(w[new, 0], w[new, 1])
        assert np.all(w[step > 0, 0] != w[step > 0, 1])
        np.testing.assert_array_equal(problems.optimizer["count"], np.stack([step, step], 1))
    assert new.sum() > 1 and len(np.unique(w[new, 0])) == new.sum()


def test_trajectories_that_never_end_begin_at_0_and_go_on(toy):
    first, results = iterations(toy, pes(toy, unroll=NeverEnding()))
    assert not np.any(first[0].problems.inner_step)
    for k, (_, state, _) in enumerate(results):
        problems = state[0].problems
        assert np.all(problems.inner_step == 5 * (k + 1)) and np.all(problems.optimizer["num_steps"] == NEVER)
        assert np.all(problems.optimizer["count"] == 5 * (k + 1)) and not np.any(problems.done)


def test_initial_offsets(toy):
    for offset, spread in (("none", 1), ("uniform", 7)):
        estimator = pes(toy, pairs=64, initial_offset=offset)
        state = toy.jit(estimator.init)(THETA, jax.random.key(0))
        assert set(np.unique(state[0].problems.inner_step).tolist()) == set(range(spread))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            PES,
            {"leaf_std": (("shedule", 0.1),)},
            r"estimator.leaf_std: 'shedule' is found in no path of theta \(rule/, schedule/\)",
        ),
        (PES, {"leaf_std": (("(", 0.1),)}, r"estimator.leaf_std: '\(' is not a regular expression"),
        (PES, {"leaf_std": (("rule", 0.0),)}, r"estimator.leaf_std = 0.0 .* > 0"),
        (PES, {"leaf_std": ("rule", 0.1)}, r"estimator.leaf_std = .*pairs of a pattern"),
        (PES, {"frozen": ("velo",)}, r"meta.frozen: 'velo' is found in no path of theta"),
        (PES, {"frozen": "schedule/"}, r"meta.frozen = 'schedule/' .* a tuple of regular expressions"),
        (PES, {"frozen": ("rule/", "schedule/")}, "freezes all of theta"),
        (PES, {"leaf_std": (("", 0.1),)}, r"estimator.leaf_std = .* a tuple of regular expressions"),
        (PES, {"sign_delta": -1.0}, r"estimator.sign_delta = -1.0 .* >= 0"),
        (PES, {"sign_delta": True}, r"estimator.sign_delta = True"),
        (PES, {"std": True}, r"estimator.std = True"),
        (PES, {"initial_offset": "unifrom"}, r"did you mean 'uniform'"),
        (PES, {"truncation": 0}, r"estimator.truncation = 0 .* >= 1"),
        (PES, {"truncation": NeverEnding()}, r"estimator.truncation = 'never' .* that end"),
        (SharedNoise, {"reuse": -1}, r"estimator.reuse = -1 .* >= 0"),
        (SharedNoise, {"reuse": True}, r"estimator.reuse = True"),
        (TruncatedES, {"weights": (1.0, 2.0)}, r"estimator.weights = \(1.0, 2.0\) .* families a, not all 0"),
        (TruncatedES, {"weights": (0.0,)}, r"estimator.weights = \(0.0,\)"),
        (TruncatedBackprop, {"truncation": LogUniform()}, r"estimator.truncation = .* \(not a schedule"),
        (FullES, {"unroll": NeverEnding()}, r"meta.unroll of full_es = 'never' .* end"),
        (FullES, {"batches": 0}, r"estimator.batches = 0 .* >= 1"),
    ],
)
def test_mistakes_are_named_in_one_line(toy, kind, options, message):
    with pytest.raises(UserError, match=message) as caught:
        kind(toy.Rated(THETA), [toy.family()], **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "swich"}, r"did you mean 'switch'"),
        ({"weight": 1.5}, r"estimator.weight = 1.5 .* from 0 to 1"),
        ({"weight": True}, r"estimator.weight = True"),
    ],
)
def test_mistakes_of_a_mixture_are_named(toy, options, message):
    part = pes(toy)
    with pytest.raises(UserError, match=message):
        Mixture(part, part, **options)
