"""Every baseline against its original, built here with every constant written out, or against numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from celo_nnx.errors import UserError
from celo_nnx.evaluation import baselines
from celo_nnx.evaluation.baselines import BASELINES, Rule

RATES = (1e-3, 3e-3, 1e-2)
STEPS = 10
SHAPES = {"scalar": (), "bias": (5,), "kernel": (4, 6), "stack": (2, 3, 4)}


class NumpyNAdamW:
    """The formulas in float64: moments, shared correction of the look-ahead, decoupled decay."""

    def __init__(self, rate):
        self.rate = rate

    def run(self, grads, params):
        m = v = np.zeros_like(params)
        updates = []
        for t, g in enumerate(grads, 1):
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            ahead = (0.9 * m + 0.1 * g) / (1 - 0.9**t)
            root = np.sqrt(v / (1 - 0.999**t))
            updates.append(-self.rate(t - 1) * (ahead / (root + 1e-8) + 1e-4 * params))
            params = params + updates[-1]
        return updates


class NumpySM3:
    """SM3-II with one cover per axis, element by element; a scalar is a vector of one element."""

    def __init__(self, rate):
        self.rate = rate

    def run(self, grads, params):
        shape = params.shape or (1,)
        covers = [np.zeros(n) for n in shape]
        momentum, updates = np.zeros(shape), []
        for t, g in enumerate(grads):
            new = [np.zeros(n) for n in shape]
            for index in np.ndindex(shape):
                value = g.reshape(shape)[index]
                nu = min(cover[i] for cover, i in zip(covers, index, strict=True)) + value**2
                step = value / np.sqrt(nu + 1e-8)
                momentum[index] = 0.9 * momentum[index] + 0.1 * step
                for cover, i in zip(new, index, strict=True):
                    cover[i] = max(cover[i], nu)
            covers = new
            updates.append(-self.rate(t) * momentum.reshape(params.shape))
        return updates


NUMPY = {"nadamw": NumpyNAdamW, "sm3": NumpySM3}
ORIGINALS = {
    "adam": lambda r: optax.adam(r, b1=0.9, b2=0.999, eps=1e-8, eps_root=1e-8),
    "sgd": lambda r: optax.sgd(r, momentum=None),
    "sgdm": lambda r: optax.sgd(r, momentum=0.9, nesterov=False),
    "adamw": lambda r: optax.adamw(r, b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0, weight_decay=1e-4),
    "rmsprop": lambda r: optax.rmsprop(r, decay=0.9, eps=1e-8, momentum=None, centered=False),
    "fromage": lambda r: optax.fromage(r, min_norm=1e-6),
    "lars": lambda r: optax.lars(r, weight_decay=0.0, trust_coefficient=0.001, momentum=0.9),
    "lamb": lambda r: optax.lamb(r, b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.0),
    "adabelief": lambda r: optax.adabelief(r, b1=0.9, b2=0.999, eps=1e-16, eps_root=1e-16),
    "adafactor": lambda r: optax.adafactor(
        r,
        min_dim_size_to_factor=128,
        decay_rate=0.8,
        multiply_by_parameter_scale=True,
        clipping_threshold=1.0,
    ),
    "adagrad": lambda r: optax.adagrad(r, initial_accumulator_value=0.1, eps=1e-7),
    "yogi": lambda r: optax.yogi(r, b1=0.9, b2=0.999, eps=1e-3),
    "radam": lambda r: optax.radam(r, b1=0.9, b2=0.999, eps=1e-8, threshold=5.0),
    "muon": lambda r: optax.contrib.muon(r, ns_steps=5, beta=0.95, weight_decay=0.0, nesterov=True),
    "lion": lambda r: optax.lion(r, b1=0.9, b2=0.99, weight_decay=1e-3),
    "schedule_free_adamw": lambda r: optax.contrib.schedule_free_adamw(r, b1=0.9, b2=0.999, eps=1e-8),
    "prodigy": lambda r: optax.contrib.prodigy(r, betas=(0.9, 0.999), eps=1e-8, estim_lr0=1e-6),
    "ademamix": lambda r: optax.contrib.ademamix(r, b1=0.9, b2=0.999, b3=0.9999, alpha=5.0, weight_decay=0.0),
}


def trajectory():
    """Parameters, and ten gradients of very different sizes."""
    generator = np.random.default_rng(0)
    params = {k: generator.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}
    sizes = 10.0 ** generator.uniform(-2, 1, STEPS)
    grads = {
        k: np.stack([generator.normal(size=s) * size for size in sizes]).astype(np.float32)
        for k, s in SHAPES.items()
    }
    return params, grads


def updates_of(tx, params, grads):
    """Ten updates, each leaf ``[10, *shape]``."""

    def step(carry, grad):
        params, state = carry
        updates, state = tx.update(grad, state, params)
        return (optax.apply_updates(params, updates), state), updates

    return jax.lax.scan(step, (params, tx.init(params)), grads)[1]


@functools.cache
def original(name):
    """The original's ten updates as a function of its rate; compiled once, run alone."""
    params, grads = trajectory()
    return jax.jit(lambda rate: updates_of(ORIGINALS[name](rate), params, grads))


def expected(name, rate):
    """Ten updates of the original at a rate, or of the numpy version at a rate or schedule."""
    if name not in NUMPY:
        return original(name)(jnp.float32(rate))
    params, grads = trajectory()
    known = rate if callable(rate) else lambda t: rate
    return {
        k: np.stack(NUMPY[name](known).run(list(grads[k].astype(np.float64)), params[k].astype(np.float64)))
        for k in SHAPES
    }


def close(ours, theirs):
    """Equal to 1e-6, and to a part in 1e4 of a leaf's largest update where updates are tiny."""
    for key in SHAPES:
        wanted = np.asarray(theirs[key])
        tolerance = min(1e-6, 1e-4 * np.abs(wanted).max())
        np.testing.assert_allclose(ours[key], wanted, atol=tolerance, rtol=1e-6, err_msg=key)


def test_every_baseline_has_an_original():
    assert set(BASELINES) == set(ORIGINALS) | set(NUMPY) and len(BASELINES) == 20


@pytest.mark.parametrize("name", BASELINES)
def test_ten_updates_equal_the_originals_under_vmap(name):
    params, grads = trajectory()
    rule = Rule(name)
    ours = jax.jit(jax.vmap(lambda rate: updates_of(rule(rate), params, grads)))(jnp.asarray(RATES))
    for i, rate in enumerate(RATES):
        theirs = expected(name, rate)
        close({k: v[i] for k, v in ours.items()}, theirs)
    # All steps are finite and something moves, so agreement is not about nothing.
    assert all(np.isfinite(v).all() for v in ours.values()) and any(
        np.abs(v).max() > 0 for v in ours.values()
    )


# schedule_free_adamw's alias takes no schedule in optax; the other rules share one wrapper.
@pytest.mark.parametrize("name", ["adam", "lars", "fromage", "nadamw", "sm3", "muon", "prodigy"])
def test_cosine_is_given_as_the_learning_rate(name):
    params, grads = trajectory()

    def cosine(t):
        return 1e-2 * 0.5 * (1 + (np if name in NUMPY else jnp).cos(np.pi * t / STEPS))

    if name in NUMPY:
        theirs = expected(name, cosine)
    else:
        theirs = jax.jit(lambda: updates_of(ORIGINALS[name](cosine), params, grads))()

    ours = jax.jit(lambda rate: updates_of(Rule(name, "cosine", STEPS)(rate), params, grads))(
        jnp.float32(1e-2)
    )
    close(ours, theirs)


def test_the_first_look_ahead_is_the_papers_and_not_optaxs():
    grad, zero = jnp.float32(0.5), jnp.float32(0.0)
    ours = Rule("nadamw")(0.01)
    theirs = optax.nadamw(0.01)
    assert float(ours.update(grad, ours.init(zero), zero)[0]) == pytest.approx(-0.0190, abs=1e-5)
    assert float(theirs.update(grad, theirs.init(zero), zero)[0]) == pytest.approx(-0.0147, abs=1e-4)


def test_schedule_free_is_evaluated_at_its_average():
    params, grads = trajectory()
    tx, baseline = Rule("schedule_free_adamw")(1e-2), baselines.lookup("schedule_free_adamw")
    state, average = tx.init(params), params
    for t in range(4):
        previous = average
        grad = {k: jnp.asarray(v[t]) for k, v in grads.items()}
        updates, state = tx.update(grad, state, params)
        params = optax.apply_updates(params, updates)
        average = baseline.eval_params(state, params)
        # With a constant rate the average is the mean of all z so far.
        for k in SHAPES:
            mean = (np.asarray(previous[k]) * t + np.asarray(state.z[k])) / (t + 1)
            np.testing.assert_allclose(average[k], mean, atol=1e-5)
    assert baselines.lookup("adam").eval_params(None, params) is params


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("adamm",), "unknown optimizer 'adamm' .did you mean 'adam'"),
        (("adam", "cosin"), "unknown schedule 'cosin' .did you mean 'cosine'"),
        (("adam", "cosine", 0), "num_steps = 0"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, words):
    with pytest.raises(UserError, match=words) as caught:
        Rule(*arguments)
    assert "\n" not in str(caught.value)


def test_grids_are_half_decades_that_ascend():
    for baseline in BASELINES.values():
        low, high = baseline.grid
        assert 3 <= high - low <= 6 and baseline.about and baseline.source
