"""Every estimator against the analytic gradient of a linear-quadratic problem, and against sums by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from celo_nnx.meta.estimators import (
    ESTIMATORS,
    PES,
    FullES,
    Mixture,
    SharedNoise,
    TruncatedBackprop,
    TruncatedES,
)
from celo_nnx.meta.objective import Objective
from celo_nnx.meta.truncation import Constant, LogUniform

DRIFT, STD = 0.7, 0.1
THETA = {"drift": jnp.float32(DRIFT)}


def problems_of(state):
    return getattr(state[0], "problems", state[0])


@functools.cache
def many(toy, kind, length=17, steps=4, truncations=9, pairs=32, repeats=1024, **options):
    """Estimates [repeats, truncations] of independent keys, and each truncation's first w, step and done.

    By default three truncations without a reset, and then resets at every step of a truncation.
    """
    estimator = ESTIMATORS[kind](
        toy.Drift(),
        [toy.family()],
        pairs=pairs,
        std=STD,
        truncation=steps,
        unroll=Constant(length=length),
        initial_offset="none",
        **options,
    )

    @toy.jit
    @jax.vmap
    def repeat(key):
        def one(state, k):
            at = problems_of(state)
            gradient, state, _ = estimator(THETA, state, jax.random.fold_in(key, k))
            return state, (gradient["drift"], (at.params["w"], at.inner_step, at.done))

        state = estimator.init(THETA, jax.random.fold_in(key, 99))
        return jax.lax.scan(one, state, jnp.arange(truncations))[1]

    return jax.tree.map(np.asarray, repeat(jax.random.split(jax.random.key(11), repeats)))


@functools.cache
def whole_gradients(by_hand, length=17, steps=4, truncations=9):
    """The gradients of the mean losses of truncations, the past included, ``[truncations]``."""
    at, found = by_hand.Inner.start(1, 1), []
    for _ in range(truncations):
        rows, at = by_hand.train(DRIFT, at, steps, length)
        found.append(by_hand.counted_mean(rows.slope, rows.mask)[0, 0])
    return np.array(found)


def local_gradients(by_hand, starts, length=17, steps=4):
    """The gradients of truncations' mean losses, their starts held fixed, ``[repeats, truncations]``."""
    w, step, done = starts
    repeats, truncations, pairs = step.shape
    found = np.zeros((repeats, truncations))
    for k in range(truncations):
        w0 = w[:, k, :, :1].reshape(-1, 1).astype(np.float64)
        at = by_hand.Inner(w0, np.zeros_like(w0), step[:, k].reshape(-1).astype(int), done[:, k].reshape(-1))
        rows, _ = by_hand.train(DRIFT, at, steps, length)
        found[:, k] = by_hand.counted_mean(rows.slope, rows.mask).reshape(repeats, pairs).mean(1)
    return found


def assert_unbiased(estimates, truth, visible=0.02):
    """Each truncation's error is within 4 standard errors, that of their sum within 3, which sees 2 %."""
    error = estimates - truth
    mean, standard_error = error.mean(0), error.std(0) / np.sqrt(len(error))
    assert np.all(np.abs(mean) < 4 * standard_error + 1e-6), (mean, standard_error)
    total = error.sum(1)
    standard_error = total.std() / np.sqrt(len(total))
    assert abs(total.mean()) < 3 * standard_error, (total.mean(), standard_error)
    size = np.abs(np.broadcast_to(truth, estimates.shape).sum(1).mean())
    assert standard_error < visible / 3 * size, standard_error / size


def test_truncated_es_is_unbiased_given_the_start_and_biased_for_the_whole(toy, by_hand):
    estimates, starts = many(toy, "truncated_es")
    assert_unbiased(estimates, local_gradients(by_hand, starts), visible=0.01)
    error = estimates - whole_gradients(by_hand)
    mean, standard_error = error.mean(0), error.std(0) / np.sqrt(len(error))
    # The first truncation has no past; the gradients of the later ones are of the other sign without theirs.
    assert abs(mean[0]) < 4 * standard_error[0]
    assert np.all(np.abs(mean[1:4]) > 20 * standard_error[1:4])


@pytest.mark.parametrize("reuse", [0, 2])
@pytest.mark.parametrize(("length", "steps"), [(17, 4), (8, 4)])
def test_shared_noise_is_unbiased_with_resets(toy, by_hand, reuse, length, steps):
    # 17: whole truncations without a reset. 8: a trajectory is two truncations and a step, so it ends with
    # the last step of a truncation, is reset with the first of the next, and so on through all of them.
    estimates, _ = many(toy, "shared_noise", length, steps, reuse=reuse)
    assert_unbiased(estimates, whole_gradients(by_hand, length, steps))


def test_variances_are_ordered_and_as_large_as_theory_says(toy, by_hand):
    # What theta in truncation j does to the loss of truncation k; exact, since losses are quadratic in it.
    share = np.zeros((4, 4))
    for j in range(4):
        at, difference = by_hand.Inner.start(1), np.array([1.0, -1.0])
        for k in range(4):
            rows, at = by_hand.train(DRIFT + difference * (k == j), at, 4, 17)
            share[k, j] = np.mean(rows.loss[..., 0] - rows.loss[..., 1]) / 2
    whole = whole_gradients(by_hand)[:4]
    np.testing.assert_allclose(share.sum(1), whole, rtol=1e-6)

    def variance(kind, **options):
        return many(toy, kind, **options)[0][:, :4].var(0) * 32

    local = many(toy, "truncated_es")[0] - local_gradients(by_hand, many(toy, "truncated_es")[1])
    found = {
        "pes": variance("pes"),
        "nres": variance("shared_noise", reuse=0),
        "two": variance("shared_noise", reuse=2),
        "truncated_es": local[:, :4].var(0) * 32,
    }
    # (a v)(1 v) / std^2 for a normal v of as many entries as there are perturbations.
    seen = np.arange(1, 5)
    theory = {
        "pes": seen * np.sum(share**2, 1) + whole**2,
        "nres": 2 * whole**2,
        "two": [2 * whole[0] ** 2, 2 * whole[1] ** 2]
        + [2 * (share[k, :2].sum() ** 2 + share[k, 2:].sum() ** 2) + whole[k] ** 2 for k in (2, 3)],
        "truncated_es": 2 * np.diag(share) ** 2,
    }
    for name in found:
        np.testing.assert_allclose(found[name], theory[name], rtol=0.4, err_msg=name)
    assert np.all(found["truncated_es"][1:] < found["nres"][1:])
    assert np.all(found["nres"][1:] < found["pes"][1:])
    assert np.all(np.diff(found["pes"]) > 0)


def test_pes_is_unbiased_with_resets_at_every_step(toy, by_hand):
    estimates, starts = many(toy, "pes", 8)
    assert len(np.unique(starts[1])) == 9
    assert_unbiased(estimates, whole_gradients(by_hand, 8), visible=0.03)


def test_noise_that_is_never_reused_is_pes(toy):
    options = {"pairs": 3, "std": STD, "truncation": 4, "unroll": LogUniform(minimum=3, maximum=9)}
    family = toy.family(task=toy.Quadratic(noise=0.5, spread=1.0))
    estimators = PES(toy.Drift(), [family], **options), SharedNoise(toy.Drift(), [family], reuse=1, **options)

    @toy.jit
    def run(key):
        def one(states, k):
            results = [
                estimator(THETA, state, jax.random.fold_in(key, k))
                for estimator, state in zip(estimators, states, strict=True)
            ]
            return [r[1] for r in results], [(r[0]["drift"], r[2]["loss"]) for r in results]

        return jax.lax.scan(one, [e.init(THETA, key) for e in estimators], jnp.arange(12))

    (pes_state, state), (one, other) = run(jax.random.key(4))
    np.testing.assert_allclose(one, other, rtol=1e-6)
    assert len(np.unique(one[0])) == 12
    np.testing.assert_array_equal(pes_state[0].problems.inner_step, state[0].problems.inner_step)
    np.testing.assert_allclose(pes_state[0].accumulator, state[0].seen + state[0].v, rtol=1e-6)


def full_es_losses(toy, estimator, by_hand, key, v, length, end_batches):
    """Losses of all steps [L, N, 2] on both splits, and of the final parameters on fresh batches of both."""
    numbers = np.arange(len(v))
    three = toy.jit(jax.vmap(lambda k: jax.random.split(k, 3)))(by_hand.unroll_keys(key, numbers))
    training, end = three[:, 1], three[:, 2]
    at, rows = by_hand.Inner.start(len(v)), []
    drift = DRIFT + np.stack([v[:, 0], -v[:, 0]], 1)
    for done in range(0, length, 50):
        keys = jax.vmap(jax.random.fold_in, (0, None))(training, done)
        steps = min(50, length - done)
        x, held = by_hand.batches(estimator, keys, 50)
        row, at = by_hand.train(drift, at, steps, length, x[:, :steps], held[:, :steps], noise=0.5)
        rows.append(row)
    loss, held = (np.concatenate([getattr(r, name) for r in rows]) for name in ("loss", "held"))

    def final(split):
        data = jnp.asarray(getattr(estimator.families[0], split)["x"])

        def draw(key, i):
            return estimator.families[0].task.pick(
                jax.random.split(jax.random.fold_in(key, i))[0], 0, len(data)
            )

        picked = toy.jit(jax.vmap(jax.vmap(draw, (None, 0)), (0, None)))(end, jnp.arange(end_batches))
        x = 0.5 * np.asarray(data, np.float64)[np.asarray(picked)].mean(1)
        return 0.5 * (at.w + 0.5) ** 2 + x[:, None] * at.w

    return loss, held, final("train"), final("validation")


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"steps": "all", "split": "validation", "scale": "first"}, {}),
        ({"steps": "last"}, {"sign_delta": 1.0}),
        ({"steps": "last", "split": "validation", "scale": "first", "clip": 1.9}, {"sign_delta": 0.5}),
    ],
)
def test_full_es_is_the_formula_on_losses_by_hand(toy, by_hand, settings, options):
    # Longer than a chunk of 50 steps, whose losses are held at once.
    schedule, key, pairs, std = LogUniform(minimum=55, maximum=80), jax.random.key(8), 4, 0.3
    estimator = FullES(
        toy.Drift(),
        [toy.family(task=toy.Quadratic(noise=0.5))],
        pairs=pairs,
        std=std,
        unroll=schedule,
        batches=3,
        objective=Objective(**settings),
        **options,
    )
    state = toy.jit(estimator.init)(THETA, key)
    gradient, after, metrics = toy.jit(estimator)(THETA, state, key)
    assert jax.tree.leaves((state, after)) == []
    length = int(schedule(jax.random.fold_in(key, by_hand.LAST)))
    assert 55 <= length <= 80
    v = by_hand.perturbations(key, np.arange(pairs), std)
    loss, held, *final = full_es_losses(toy, estimator, by_hand, key, v, length, 3)
    if settings["steps"] == "all":
        meta = (held / held[:1]).mean(0)
    else:
        meta = final[settings.get("split") == "validation"]
        meta = meta / loss[0] if "scale" in settings else meta
        meta = np.minimum(meta, settings.get("clip", np.inf))
    if "clip" in settings:
        assert 0 < np.sum(meta == settings["clip"]) < meta.size
    delta = meta[:, 0] - meta[:, 1]
    if options:
        delta = np.sign(delta) * options["sign_delta"]
    np.testing.assert_allclose(metrics["loss"], meta.mean(), rtol=1e-5)
    np.testing.assert_allclose(gradient["drift"], np.mean(delta * v[:, 0]) / (2 * std**2), rtol=1e-3)


@pytest.mark.parametrize("steps", ["all", "last"])
def test_full_es_is_unbiased_over_drawn_lengths(toy, by_hand, steps):
    schedule = LogUniform(minimum=3, maximum=9)
    estimator = FullES(
        toy.Drift(),
        [toy.family()],
        pairs=64,
        std=STD,
        unroll=schedule,
        batches=1,
        objective=Objective(steps=steps),
    )
    keys = jax.random.split(jax.random.key(2), 1024)
    lengths = jax.vmap(lambda key: schedule(jax.random.fold_in(key, by_hand.LAST)))(keys)
    estimates = toy.jit(jax.vmap(lambda key: estimator(THETA, [()], key)[0]["drift"]))(keys)
    truth = {}
    for length in range(3, 10):
        rows, at = by_hand.train(DRIFT, by_hand.Inner.start(1, 1), length, length)
        truth[length] = rows.slope.mean() if steps == "all" else ((at.w + 0.5) * at.slope).item()
    assert set(np.unique(lengths)) >= set(range(3, 9))
    truth = np.array([truth[n] for n in np.asarray(lengths).tolist()])
    assert_unbiased(np.asarray(estimates, np.float64)[:, None], truth[:, None])


@pytest.mark.parametrize("offset", ["uniform", "none"])
def test_backprop_equals_the_analytic_gradient_of_every_truncation(toy, by_hand, offset):
    estimator = TruncatedBackprop(
        toy.Drift(),
        [toy.family()],
        pairs=5,
        truncation=6,
        unroll=Constant(length=7),
        initial_offset=offset,
    )

    @toy.jit
    def run(key):
        def one(state, k):
            gradient, after, metrics = estimator(THETA, state, jax.random.fold_in(key, k))
            at = state[0]
            return after, (gradient["drift"], metrics["loss"], (at.params["w"], at.inner_step, at.done))

        return jax.lax.scan(one, estimator.init(THETA, key), jnp.arange(9))[1]

    gradients, losses, starts = jax.tree.map(lambda x: np.asarray(x)[None], run(jax.random.key(0)))
    np.testing.assert_allclose(gradients, local_gradients(by_hand, starts, 7, 6), rtol=1e-5)
    at = by_hand.Inner.start(5, 1, starts[1][0, 0])
    means = []
    for _ in range(9):
        rows, at = by_hand.train(DRIFT, at, 6, 7)
        means.append(by_hand.counted_mean(rows.loss, rows.mask).mean())
    np.testing.assert_allclose(losses[0], means, rtol=1e-5)
    # Nothing random is left in it but where trajectories begin.
    if offset == "none":
        np.testing.assert_array_equal(run(jax.random.key(1))[0], gradients[0])


def test_backprop_equals_jax_grad_of_a_plain_loop_on_a_nonlinear_problem(toy, by_hand):
    pairs, steps, length, noise = 3, 6, 8, 0.5
    theta = {"rule": {"rate": jnp.float32(0.4)}, "schedule": {"drift": jnp.float32(DRIFT)}}
    estimator = TruncatedBackprop(
        toy.Rated(theta),
        [toy.family(task=toy.Quadratic(noise=noise))],
        pairs=pairs,
        truncation=steps,
        unroll=Constant(length=length),
        initial_offset="none",
        objective=Objective(split="validation", scale="log"),
    )

    def loop(theta, w, x, held, first):
        losses = []
        for t in range(steps):
            if first + t == length:
                w = jnp.ones_like(w)
                continue
            losses.append(jnp.log(0.5 * (w + 0.5) ** 2 + noise * held[:, t] * w))
            rate = 0.1 * jnp.exp(theta["rule"]["rate"])
            w = w - rate * (w + 0.5 + noise * x[:, t]) + 0.1 * theta["schedule"]["drift"]
        return jnp.mean(jnp.stack(losses)), w

    expected = toy.jit(jax.value_and_grad(loop, has_aux=True), static_argnums=4)
    step, w = toy.jit(estimator), jnp.ones(pairs)
    state = toy.jit(estimator.init)(theta, jax.random.key(0))
    for k in range(4):  # without a reset, with one inside and at the end, and again from the start
        key = jax.random.key(k)
        gradient, state, metrics = step(theta, state, key)
        x, held = by_hand.batches(estimator, by_hand.unroll_keys(key, np.arange(pairs)), steps)
        first = k * steps % (length + 1)
        (loss, w), want = expected(theta, w, jnp.float32(x), jnp.float32(held), first)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), gradient, want)
        np.testing.assert_allclose(state[0].params["w"][:, 0], w, rtol=1e-5)


def test_a_problem_that_diverges_leaves_the_other_gradients_of_backprop(toy):
    class Exploding(toy.Drift):
        def with_theta(self, theta):
            return Exploding(theta, self.rate)

        def init(self, params, num_steps):  # the shape of the state is the same, its start is not
            return {**super().init(params, num_steps), "bad": params["w"] > 1.0}

        def update(self, grads, state, params, *, value):
            updates, after = super().update(grads, state, params, value=value)
            infinite = jnp.sqrt(jnp.where(state["bad"], 0.0, 1.0) * self.theta["drift"])
            return jax.tree.map(lambda u: u + infinite - infinite, updates), after

    estimator = TruncatedBackprop(
        Exploding(THETA),
        [toy.family(task=toy.Quadratic(spread=1.0))],
        pairs=8,
        truncation=3,
        unroll=Constant(length=99),
    )
    state = toy.jit(estimator.init)(THETA, jax.random.key(0))
    bad = np.asarray(state[0].optimizer["bad"][:, 0])
    assert 0 < bad.sum() < 8
    gradient, _, _ = toy.jit(estimator)(THETA, state, jax.random.key(1))
    w = np.asarray(state[0].params["w"][:, 0], np.float64)[~bad]
    slopes = [0.0, 0.1, 0.19]
    total = 0.0
    for t in range(3):
        total += np.sum((w + 0.5) * slopes[t]) / 3
        w = w - 0.1 * (w + 0.5) + 0.1 * DRIFT
    np.testing.assert_allclose(gradient["drift"], total / 8, rtol=1e-5)


def mixed(toy, mode, weight):
    options = {"pairs": 2, "truncation": 3, "unroll": Constant(length=5)}
    family = toy.family(task=toy.Quadratic(noise=0.5))
    first = PES(toy.Drift(), [family], std=STD, **options)
    second = TruncatedBackprop(toy.Drift(), [family], **options)
    return Mixture(first, second, mode=mode, weight=weight)


def test_a_mixture_averages_with_its_weight(toy):
    mixture = mixed(toy, "average", 0.7)
    assert mixture.data[0][0]["train"]["x"] is mixture.data[1][0]["train"]["x"]

    @toy.jit
    def run(key):
        state = mixture.init(THETA, key)
        keys = jax.random.split(key, 3)
        parts = zip((mixture.first, mixture.second), state, keys[:2], strict=True)
        return mixture(THETA, state, key), [part(THETA, s, k) for part, s, k in parts]

    (gradient, state, metrics), (one, other) = run(jax.random.key(4))
    a, b = float(one[0]["drift"]), float(other[0]["drift"])
    assert abs(a - b) > 0.01 * abs(a)
    np.testing.assert_allclose(gradient["drift"], 0.7 * a + 0.3 * b, rtol=1e-6)
    expected = 0.7 * one[2]["family_loss"] + 0.3 * other[2]["family_loss"]
    np.testing.assert_allclose(metrics["family_loss"], expected, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, state, (one[1], other[1]))


def test_a_mixture_that_switches_uses_one_at_a_time(toy):
    mixture = mixed(toy, "switch", 0.7)

    @toy.jit
    @jax.vmap
    def run(key):
        state = mixture.init(THETA, jax.random.key(0))
        keys = jax.random.split(key, 3)
        gradient, after, _ = mixture(THETA, state, key)
        parts = zip((mixture.first, mixture.second), state, keys[:2], strict=True)
        alone = [part(THETA, s, k)[:2] for part, s, k in parts]
        first = jax.random.uniform(keys[2]) < 0.7
        return first, state, after, gradient["drift"], [g["drift"] for g, _ in alone], [s for _, s in alone]

    found = jax.tree.map(np.asarray, run(jax.random.split(jax.random.key(7), 800)))
    first, before, after, gradient, alone, moved = found
    assert abs(first.mean() - 0.7) < 4 * np.sqrt(0.7 * 0.3 / 800)
    np.testing.assert_allclose(gradient, np.where(first, *alone), rtol=1e-5, atol=1e-6)
    assert np.mean(np.isclose(alone[0], alone[1], rtol=1e-3)) < 0.1
    for part, used in enumerate((first, ~first)):
        for old, new, want in zip(
            *map(jax.tree.leaves, (before[part], after[part], moved[part])), strict=True
        ):
            np.testing.assert_allclose(new[used], want[used], rtol=1e-6)
            np.testing.assert_array_equal(new[~used], old[~used])


def test_a_mixture_keeps_data_apart_that_differ(toy):
    options = {"pairs": 2, "truncation": 3, "unroll": Constant(length=50)}
    low, high = (toy.family(task=toy.Quadratic(noise=1.0), low=x, high=x + 1) for x in (-3.0, 3.0))
    parts = [TruncatedES(toy.Drift(), [family], std=STD, **options) for family in (low, high)]
    mixture = Mixture(*parts)
    np.testing.assert_array_equal(mixture.second.data[0]["train"]["x"], high.train["x"])
    bound = mixture.with_data(jax.tree.map(lambda x: x + 1.0, mixture.data))
    np.testing.assert_array_equal(bound.second.data[0]["train"]["x"], high.train["x"] + 1.0)
    np.testing.assert_array_equal(bound.first.data[0]["train"]["x"], low.train["x"] + 1.0)
