"""Resets, lengths, counts and masks of truncated unrolls."""

import jax
import jax.numpy as jnp
import numpy as np

from celo_nnx.meta.truncation import Constant, LogUniform
from celo_nnx.meta.unroll import Source, fresh, partly_done, unroll, with_count


def start(toy, schedule, pairs=5, task=None):
    task = toy.Quadratic(spread=1.0) if task is None else task
    thetas = {"drift": jnp.tile(jnp.array([0.5, -0.5]), (pairs, 1))}
    keys = jax.random.split(jax.random.key(0), pairs)
    problems = jax.jit(lambda keys: fresh(toy.Drift(), task, schedule, thetas, keys))(keys)
    source = Source({"x": jnp.zeros(11)}, jnp.zeros(pairs, jnp.int32), jnp.full(pairs, 11, jnp.int32))
    return task, thetas, problems, source


def test_fresh_pairs_share_all_but_what_training_changes(toy):
    _, _, problems, _ = start(toy, LogUniform(minimum=5, maximum=50))
    w = np.asarray(problems.params["w"])
    np.testing.assert_array_equal(w[:, 0], w[:, 1])
    assert len(np.unique(w)) == 5
    np.testing.assert_array_equal(problems.optimizer["num_steps"], np.stack([problems.length] * 2, 1))
    assert not problems.done.any() and not problems.inner_step.any()


def test_first_trajectories_are_partly_done_and_the_optimizer_knows(toy):
    _, _, problems, _ = start(toy, LogUniform(minimum=2, maximum=50), pairs=300)
    problems = partly_done(problems, jax.random.split(jax.random.key(1), 300))
    step, length = np.asarray(problems.inner_step), np.asarray(problems.length)
    assert np.all((step >= 0) & (step < length)) and len(np.unique(step)) > 10
    np.testing.assert_allclose(np.mean(step / length), 0.5 * np.mean(1 - 1 / length), atol=0.06)
    np.testing.assert_array_equal(problems.optimizer["count"], np.stack([step, step], 1))
    assert with_count((), jnp.int32(3)) == ()


def test_resets_follow_the_schedule(toy):
    steps, length = 11, 4
    task, thetas, problems, source = start(toy, Constant(length=length))
    keys = jax.random.split(jax.random.key(2), 5)
    first = np.array([0, 1, 2, 3, 0])
    problems = problems._replace(inner_step=jnp.asarray(first, jnp.int32))
    before = np.asarray(problems.params["w"])
    after, record = jax.jit(
        lambda p: unroll(toy.Drift(), task, Constant(length=length), steps, thetas, p, source, keys)
    )(problems)
    for pair, offset in enumerate(first):
        # A trajectory takes length steps and then one that resets.
        phase = (np.arange(steps) + offset) % (length + 1)
        np.testing.assert_array_equal(record.mask[:, pair], phase != length)
        np.testing.assert_array_equal(record.done[:, pair], phase == length - 1)
        left = (steps + offset) % (length + 1)
        assert after.inner_step[pair] == left and after.done[pair] == (left == length)
        # The count runs on from the reset; it was not told of the offset here.
        resets = (steps + offset) // (length + 1)
        np.testing.assert_array_equal(after.optimizer["count"][pair], [left if resets else steps] * 2)
    # The first loss of a trajectory does not know theta, later ones do; a reset draws another start.
    loss = np.asarray(record.loss)
    np.testing.assert_array_equal(loss[0, :, 0], loss[0, :, 1])
    assert np.all(loss[1, 0] != loss[1, 0, ::-1])
    np.testing.assert_allclose(loss[0, :, 0], 0.5 * (before[:, 0] + 0.5) ** 2, rtol=1e-6)
    np.testing.assert_array_equal(loss[5, 0, 0], loss[5, 0, 1])
    assert loss[5, 0, 0] != loss[0, 0, 0] and loss[10, 0, 0] not in (loss[0, 0, 0], loss[5, 0, 0])


def test_a_new_length_is_drawn_at_a_reset(toy):
    schedule = LogUniform(minimum=1, maximum=9)
    task, thetas, problems, source = start(toy, schedule, pairs=40)
    keys = jax.random.split(jax.random.key(3), 40)
    after, record = jax.jit(lambda p: unroll(toy.Drift(), task, schedule, 30, thetas, p, source, keys))(
        problems
    )
    done, mask = np.asarray(record.done), np.asarray(record.mask)
    np.testing.assert_array_equal(~mask[1:], done[:-1])
    lengths = [np.diff(np.flatnonzero(~mask[:, n])) - 1 for n in range(40)]
    assert len(np.unique(np.concatenate(lengths))) > 3 and max(map(max, lengths)) <= 9
    np.testing.assert_array_equal(after.optimizer["num_steps"], np.stack([after.length] * 2, 1))


def test_splitting_a_batch_of_pairs_changes_nothing(toy):
    schedule = LogUniform(minimum=2, maximum=9)
    task, thetas, problems, source = start(toy, schedule, pairs=6, task=toy.Quadratic(noise=1.0, spread=1.0))
    source = source._replace(arrays={"x": jnp.linspace(-1.0, 1.0, 11)})
    keys = jax.random.split(jax.random.key(4), 6)

    def run(part):
        cut = (jax.tree.map(lambda x: x[part], (thetas, problems)), keys[part])
        here = source._replace(start=source.start[part], count=source.count[part])
        return jax.jit(lambda *x: unroll(toy.Drift(), task, schedule, 12, *x)[1].loss)(*cut[0], here, cut[1])

    whole = run(slice(None))
    np.testing.assert_allclose(whole[:, 2:5], run(slice(2, 5)), rtol=1e-6)


def test_the_differentiable_loop_and_a_shorter_one_do_the_same_steps(toy):
    schedule = LogUniform(minimum=2, maximum=5)
    task, thetas, problems, source = start(toy, schedule, task=toy.Quadratic(noise=1.0, spread=1.0))
    source = source._replace(arrays={"x": jnp.linspace(-1.0, 1.0, 11)})
    held = source._replace(arrays={"x": jnp.linspace(3.0, 5.0, 11)})
    keys = jax.random.split(jax.random.key(4), 5)

    def run(**options):
        most = options.pop("most", 8)

        def one(problems):
            return unroll(toy.Drift(), task, schedule, most, thetas, problems, source, keys, **options)

        return toy.jit(one)(problems)

    after, record = run(held=held)
    assert np.sum(~np.asarray(record.mask), 0).min() >= 1
    for options in ({"held": held, "differentiable": True}, {"held": held, "most": 12, "steps": 8}):
        other, rows = run(**options)
        rows = jax.tree.map(lambda x: x[:8], rows)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), (other, rows), (after, record))
    # Without a held-out split the training is the same, to the bit.
    alone, rows = run()
    assert rows.held is None
    jax.tree.map(np.testing.assert_array_equal, alone, after)
    np.testing.assert_array_equal(rows.loss, record.loss)


def test_the_rows_of_a_shorter_truncation_do_not_count(toy):
    schedule = Constant(length=3)
    task, thetas, problems, source = start(toy, schedule)
    keys = jax.random.split(jax.random.key(4), 5)
    run = toy.jit(lambda n: unroll(toy.Drift(), task, schedule, 9, thetas, problems, source, keys, steps=n))
    for steps in (1, 4, 9):
        after, record = run(steps)
        phase = np.arange(9) % 4
        np.testing.assert_array_equal(record.mask[:, 0], (phase != 3) & (np.arange(9) < steps))
        np.testing.assert_array_equal(record.done[:, 0], (phase == 2) & (np.arange(9) < steps))
        assert np.all(after.inner_step == steps % 4)
