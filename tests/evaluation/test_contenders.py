"""Which optimizers a comparison has: names, labels, weights, and what a rule does."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from celo_nnx.build import find
from celo_nnx.config import load, load_optimizer
from celo_nnx.errors import UserError
from celo_nnx.evaluation import contenders
from celo_nnx.meta.checkpoint import canonical
from celo_nnx.theta_io import save_theta

SMALL = ["optimizer.update_rule.hidden=(2,2)", "optimizer.features.groups=('gradient','momentum')"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A theta file of a small Celo2-base; its header says so."""
    config = load("celo2_base:fast_digits", SMALL)
    optimizer = load_optimizer("celo2_base:fast_digits", SMALL, weights="hand_made")
    theta = jax.tree.map(lambda x: x + 0.125, optimizer.theta)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    parts = json.loads(json.dumps(config.optimizer.to_dict()))
    save_theta(path, theta, {"config": canonical({"optimizer": parts})})
    return str(path)


def labels(*args):
    return [contender.label for contender in contenders.contenders(*args)]


def test_adam_is_always_there_and_once():
    assert labels(["muon"]) == ["adam", "muon"]
    assert labels(["muon", "adam", "muon"]) == ["muon", "adam"]


def test_weights_take_the_place_of_the_hand_made_theta(small, tmp_path):
    theta = load_optimizer("celo2_base").theta
    path = str(tmp_path / "run")
    (tmp_path / "run").mkdir()
    save_theta(tmp_path / "run" / "theta.safetensors", jax.tree.map(jnp.ones_like, theta), {})
    names = ["celo2_base", "sgd", f"mine={small}"]
    assert labels(names) == ["adam", "celo2_base", "sgd", "mine"]
    assert labels(names, [path]) == ["adam", "celo2_base@run", "sgd", "mine"]
    found = contenders.contenders(names, ["celo2_base=hand_made", f"celo2_base={path}"])
    assert [c.label for c in found] == ["adam", "celo2_base@hand_made", "celo2_base@run", "sgd", "mine"]
    hand, run = found[1], found[2]
    assert hand.rule("constant", 5) == run.rule("constant", 5), "two thetas of a variant share programs"
    assert hand.config["learned"] == run.config["learned"] and hand.config["theta"] != run.config["theta"]
    assert all((x == 1).all() for x in jax.tree.leaves(run.context))


def test_weights_made_for_another_optimizer_are_told(small):
    parts = load("celo2_base", [*SMALL, "optimizer.weight_decay=0.1"]).optimizer.to_dict()
    assert contenders.learned("x", parts, small).about.endswith("optimizer with another weight_decay")
    assert "made for" not in contenders.learned("x", contenders.parts_of(small), small).about


def test_a_rate_that_no_schedule_decides_is_tuned():
    for name, tuned in {"celo": False, "celo_phase1": True, "nn_adam": False, "rnn_mlp": True}.items():
        section = load(name).optimizer.schedule.to_dict()
        made = find("schedules", section.pop("kind"))(width=1, key=jax.random.key(0), **section)
        assert made.decides_rate != tuned, name
    for name in ("celo2", "celo2_base"):
        assert contenders.contenders([name])[1].grid == contenders.LEARNED_GRID


def test_a_theta_file_says_which_optimizer_it_is_for(small):
    (found,) = contenders.contenders(["adam", small])[1:]
    assert found.label == "small" and found.config["learned"]["update_rule"]["hidden"] == [2, 2]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_learned_rule_is_the_optimizer_at_that_rate(schedule):
    found = contenders.learned("small", load("celo2", SMALL).optimizer.to_dict(), None)
    params = {"w": jax.random.normal(jax.random.key(0), (4, 3)), "b": jnp.zeros(3)}
    grads = jax.tree.map(lambda x: x + 0.5, params)
    rate = 0.02 if schedule == "constant" else optax.cosine_decay_schedule(0.02, 4)
    plain = load_optimizer("celo2", SMALL, weights="hand_made").as_optax(learning_rate=rate)

    def three(tx):
        state, updates = tx.init(params), []
        for _ in range(3):
            update, state = tx.update(grads, state, params, value=1.0)
            updates.append(update)
        return updates

    mine = jax.jit(lambda rate, theta: three(found.rule(schedule, 4)(rate, theta)))(0.02, *found.context)
    theirs = jax.jit(lambda: three(plain))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), mine, theirs)
    first, last = theirs[0]["b"][0], theirs[2]["b"][0]
    assert (abs(last) < 0.9 * abs(first)) == (schedule == "cosine"), "the schedule acts"


def test_a_learned_schedule_is_not_tuned_and_rate_1_is_its_own():
    found = contenders.learned("small", load("celo", SMALL).optimizer.to_dict(), None)
    assert found.grid == (0, 0) and found.limit == 0 and "not tuned" in found.about
    params = {"w": jax.random.normal(jax.random.key(0), (4, 3))}
    grads = jax.tree.map(lambda x: x + 0.5, params)
    rule = found.rule("cosine", 7)(jnp.float32(1.0), *found.context)
    plain = load_optimizer("celo", SMALL, weights="hand_made").as_optax(num_steps=7)
    mine, theirs = (jax.jit(tx.update)(grads, tx.init(params), params, value=1.0)[0] for tx in (rule, plain))
    np.testing.assert_allclose(mine["w"], theirs["w"], rtol=1e-6)


def test_mistakes_are_one_clear_line(small, tmp_path):
    silent = str(tmp_path / "silent.safetensors")
    save_theta(silent, {"x": np.ones(2, np.float32)}, {})
    for names, weights, words in [
        (["munon"], [], "did you mean 'muon'"),
        (["celo2_bas"], [], "unknown optimizer 'celo2_bas' (did you mean 'celo2_base'?)"),
        (["runs/none"], [], "no theta at runs/none"),
        ([silent], [], "does not say which optimizer its theta is for: name it, --weights VARIANT="),
        (["celo2"], ["none.safetensors"], "no weights at none.safetensors"),
        (["celo2"], [silent], "silent.safetensors"),
        (["celo2", "celo"], [silent], f"say whose weights {silent} are"),
        (["adam"], [silent], "--optimizers names none"),
        (["celo2"], [f"celo={silent}"], "unknown variant of --weights 'celo' (did you mean 'celo2'?)"),
        ([small, "small=" + small], [], "two optimizers would be called 'small'"),
        ([f"muon={small}"], [], "'muon' is an optimizer of its own"),
    ]:
        with pytest.raises(UserError) as error:
            contenders.contenders(names, weights)
        assert words in str(error.value), str(error.value)


@pytest.mark.parametrize(
    ("body", "schedule", "words"),
    [
        ("return 3", "constant", "returned int, expected an optax GradientTransformation"),
        ("return 1 / 0", "constant", "failed: ZeroDivisionError: division by zero"),
        ("return optax.sgd(2 * lr)", "cosine", "failed: TypeError: unsupported operand"),
        ("import sys; sys.exit(0)", "constant", "failed: SystemExit: 0"),
    ],
)
def test_a_function_of_the_users_is_tried_at_once(body, schedule, words, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(f"import optax\ndef get_optimizer(lr):\n    {body}\n")
    with pytest.raises(UserError) as error:
        contenders.contenders([str(path)], schedule=schedule)
    told = str(error.value)
    assert f"get_optimizer of {path} {words}" in told, told
    assert f"({path}, line 3)" in told or "returned" in words, told
