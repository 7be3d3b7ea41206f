"""Which losses count, on which examples and scale: PES on each objective against loops by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from celo_nnx.errors import UserError
from celo_nnx.meta.estimators import PES, FullES, Mixture
from celo_nnx.meta.objective import Objective
from celo_nnx.meta.truncation import Constant
from celo_nnx.meta.unroll import Problems, Record

STD, DRIFT, PAIRS, STEPS, LENGTH, TRUNCATIONS = 0.3, 0.4, 5, 6, 8, 6
THETA = {"drift": jnp.float32(DRIFT)}


@functools.cache
def run(toy, **settings):
    """The estimator, the inner steps of its start, and its gradients and losses; w after each truncation."""
    estimator = PES(
        toy.Drift(),
        [toy.family(task=toy.Quadratic(noise=0.5))],
        pairs=PAIRS,
        std=STD,
        truncation=STEPS,
        unroll=Constant(length=LENGTH),
        objective=Objective(**settings),
    )

    @toy.jit
    def run():
        first = estimator.init(THETA, jax.random.key(2))

        def one(state, k):
            gradient, state, metrics = estimator(THETA, state, jax.random.key(k))
            return state, (gradient["drift"], metrics["loss"], state[0].problems.params["w"])

        return first[0].problems.inner_step, *jax.lax.scan(one, first, jnp.arange(TRUNCATIONS))[1]

    return estimator, *map(np.asarray, run())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"split": "validation"},
        {"split": "validation", "steps": "last", "scale": "first"},
        {"steps": "last"},
        {"scale": "first", "clip": 1.2},
        {"scale": "log", "split": "validation"},
        {"clip": 0.5},
    ],
    ids=str,
)
def test_pes_on_an_objective_is_the_sum_by_hand(toy, by_hand, settings):
    estimator, offsets, gradients, losses, _ = run(toy, **settings)
    assert len(np.unique(offsets)) > 2
    at, seen = by_hand.Inner.start(PAIRS, 2, offsets), np.zeros((PAIRS, 1))
    first, numbers, cut, none = np.full(PAIRS, np.nan), np.arange(PAIRS), [], 0
    for k in range(TRUNCATIONS):
        key = jax.random.key(k)
        v = by_hand.perturbations(key, numbers, STD)
        x, held = by_hand.batches(estimator, by_hand.unroll_keys(key, numbers), STEPS)
        drift = DRIFT + np.concatenate([v, -v], 1)
        rows, at = by_hand.train(drift, at, STEPS, LENGTH, x, held, noise=0.5)
        meta = by_hand.meta_losses(rows, first, settings)
        first = meta.first
        sums, seen = by_hand.pes(meta.loss, rows.done, meta.counts, rows.mask, v, seen)
        np.testing.assert_allclose(gradients[k], sums.mean() / (2 * STD**2), rtol=1e-4, atol=1e-4)
        means = by_hand.counted_mean(meta.loss, meta.counts)  # of the pairs; those without one say nothing
        np.testing.assert_allclose(losses[k], means[meta.counts.any(0)].mean(), rtol=1e-4, atol=1e-5)
        cut.append(meta.loss[meta.counts] == settings.get("clip"))
        none += np.sum(~meta.counts.any(0))
    # What the settings are for does happen here.
    assert not settings.get("clip") or 0.05 < np.mean(np.concatenate(cut)) < 0.95
    assert settings.get("steps") != "last" or none > 0


def test_a_truncation_in_which_nothing_ends_has_no_loss(toy):
    """Trajectories of 8 steps, all begun together: the second truncation of 6 sees their ends."""
    families = [toy.family("a"), toy.family("b", toy.Quadratic(target=3.0))]
    options = {"pairs": 2, "unroll": Constant(length=8), "objective": Objective(steps="last")}
    whole = FullES(toy.Drift(), families, batches=1, **options)
    cut = PES(toy.Drift(), families, truncation=6, initial_offset="none", **options)
    mixture = Mixture(cut, whole)

    @toy.jit
    def run(key):
        _, state, none = cut(THETA, cut.init(THETA, key), key)
        known = whole(THETA, whole.init(THETA, key), jax.random.split(key, 3)[1])[2]
        mixed = mixture(THETA, mixture.init(THETA, key), key)[2]
        return [(m["loss"], m["family_loss"]) for m in (none, cut(THETA, state, key)[2], known, mixed)]

    (none, nones), (some, each), known, mixed = run(jax.random.key(2))
    assert np.isnan(none) and np.isnan(nones).all()
    np.testing.assert_allclose(some, np.mean(each), rtol=1e-6)
    assert each[0] > 1.2 * each[1] > 0
    np.testing.assert_array_equal(mixed[1], known[1])  # of the part in which trajectories end


def test_the_inner_training_does_not_know_the_objective(toy):
    ws = [run(toy, **s)[4] for s in ({}, {"split": "validation"}, {"scale": "first", "clip": 1.2})]
    np.testing.assert_array_equal(ws[0], ws[1])
    np.testing.assert_array_equal(ws[0], ws[2])
    losses = [run(toy, **s)[3] for s in ({}, {"split": "validation"})]
    assert np.all(losses[1] > losses[0] + 0.3)  # what is held out is larger, and so is its loss


def made_up(toy, by_hand, seed, steps):
    """A record of ``steps`` of 9 steps, most pairs of which are reset, as arrays and by hand."""
    rng, pairs = np.random.default_rng(seed), 12
    done = rng.random((9, pairs)) < 0.3
    done[1:] &= ~done[:-1]
    before = rng.random(pairs) < 0.3
    done[0] &= ~before
    mask = ~np.concatenate([before[None], done[:-1]])
    done[steps:], mask[steps:] = False, False
    loss = rng.normal(1.0, 1.0, (9, pairs, 2)).astype(np.float32)
    first = np.where(rng.random(pairs) < 0.5, rng.normal(size=pairs), np.nan).astype(np.float32)
    record = Record(jnp.asarray(loss), None, jnp.asarray(done), jnp.asarray(mask))
    rows = by_hand.Losses(loss[:steps], loss[:steps], loss[:steps], done[:steps], mask[:steps])
    return record, Problems(*[()] * 7, jnp.asarray(first)), rows, first


@pytest.mark.parametrize("dynamic", [False, True])
def test_first_losses_are_followed_through_resets_and_shorter_truncations(toy, by_hand, dynamic):
    objective = Objective(scale="first")
    call = toy.jit(functools.partial(objective, toy.Quadratic()), static_argnums=() if dynamic else 2)
    for seed in range(20):
        steps = int(np.random.default_rng(seed).integers(1, 10)) if dynamic else 9
        record, problems, rows, first = made_up(toy, by_hand, seed, steps)
        loss, counts, after = call(record, problems, steps)
        want = by_hand.meta_losses(rows, first, {"scale": "first"})
        np.testing.assert_array_equal(np.asarray(counts)[:steps], want.counts)
        assert not np.asarray(counts)[steps:].any()
        got, want_loss = np.asarray(loss)[:steps][want.counts], want.loss[want.counts]
        np.testing.assert_allclose(got, want_loss, rtol=1e-5)
        np.testing.assert_allclose(after, want.first, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "val"}, r"unknown meta.objective.split 'val'; known: .*validation"),
        ({"steps": "lats"}, r"did you mean 'last'"),
        ({"scale": "logarithm"}, r"did you mean 'log'"),
        ({"clip": -1.0}, r"meta.objective.clip = -1.0 .* >= 0"),
        ({"clip": True}, r"meta.objective.clip = True"),
        ({"clip": float("inf")}, r"meta.objective.clip = inf"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        Objective(**settings)


def test_a_split_that_a_family_lacks_is_named(toy):
    families = [toy.family("a"), dataclasses.replace(toy.family("b"), validation={})]
    with pytest.raises(UserError, match=r"'validation': task family 'b' .* only train and test; tasks.valid"):
        PES(toy.Drift(), families, objective=Objective(split="validation"))
    empty = dataclasses.replace(toy.family("c"), train={})
    with pytest.raises(UserError, match="'train': task family 'c'"):
        PES(toy.Drift(), [empty])
    with pytest.raises(UserError, match="training arrays of task family 'c' do not fit"):
        PES(toy.Drift(), [toy.family("a"), empty], objective=Objective(split="test"))
