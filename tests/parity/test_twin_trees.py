"""Every variant against its plain twin on drawn trees: updates and the whole state, step by step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from celo_nnx.build import build
from celo_nnx.config import load
from celo_nnx.interfaces import Optimizer
from celo_nnx.naive import NaiveCelo2
from celo_nnx.naive_zoo.adafac_mlp import NaiveAdafacMLP
from celo_nnx.naive_zoo.celo import NaiveCelo, Options
from celo_nnx.naive_zoo.celo_adam import NaiveCeloAdam
from celo_nnx.naive_zoo.elo import NaiveElo, NaiveMulo
from celo_nnx.naive_zoo.nn_adam import NaiveNNAdam
from celo_nnx.naive_zoo.rnn_mlp import NaiveRNNMLP
from celo_nnx.naive_zoo.tensors import largest_axes
from celo_nnx.naive_zoo.velo import NaiveVelo

Tree = Any
Shapes = dict[str, tuple[int, ...]]
Named = dict[str, jax.Array]

SEEDS = {0: 7, 1: 40, 2: 3000}  # and the length of the run that the optimizer is told
# Small gradients first, where epsilons matter; then some that every clipping cuts.
SCALES = (1e-3, 1e-4, 1.0, 5e3, 1.0, 1e-2)
STEPS = len(SCALES)
ROUNDING = 2e-6  # of states, relative to the largest entry of an array
# Of updates, relative to a tensor's largest. Terms of a drawn MLP may cancel: where they do, one twin that is
# compiled in two ways differs from itself by 1.9e-6, and on another kind of CPU the twins differ by 4.8e-6.
CANCELLING = 8e-6
# Five iterations of Newton-Schulz raise what a step has along a small singular value by up to 3.4445^5 = 485,
# and its rounding with it; slices of 2 by 2 or 3 by 3 often have one that is small.
ORTHOGONALIZED = 485 * CANCELLING
# Compiling is most of the time, and takes three times as long without these options.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


def to_adam(path: str, shape: tuple[int, ...]) -> str:
    return "adam" if len(shape) < 2 or path == "embed/embedding" else "learned"


def wider(path: str, shape: tuple[int, ...]) -> float:
    return 4.0 if path == "deep/tie" else 1.0


DECAY = {"weight_decay": 0.5}
SMALL = {"update_rule": {"hidden": (3, 2)}}  # an MLP of the published size takes long to compile
SMALL_LSTM = {"context": 4, "shared": 2, "own": 3, "hidden": 8}
SMALL_BANK = {"bank": 5, "bank_scale": 3.0}  # the factor of velo_4000, 100, lets drawn MLPs diverge
# The twin of each variant, and what is changed in the variant's config; all else is as published in both.
TWINS: dict[str, tuple[Optimizer, dict[str, Any]]] = {
    "celo2": (NaiveCelo2(None, route=to_adam, **DECAY), SMALL | DECAY),
    "celo": (NaiveCelo(None), SMALL),
    "celo_adam": (NaiveCeloAdam(None), {}),
    "velo_s": (NaiveVelo(None), SMALL),
    "rnn_mlp": (
        NaiveRNNMLP(None),
        {"update_rule": SMALL["update_rule"] | {"outputs": 5, "feedback": 3}, "schedule": SMALL_LSTM},
    ),
    "adafac_mlp": (NaiveAdafacMLP(None), SMALL),
    "nn_adam": (NaiveNNAdam(None), {}),
    # Those below differ little from one above.
    "celo2_base": (NaiveCelo2(None, orthogonalize=False, **DECAY), SMALL | DECAY),
    "celo_phase1": (NaiveCelo(None, Options(scheduled=False)), SMALL),
    "velo": (
        NaiveVelo(None, ff_mult=3.0),
        {"update_rule": SMALL["update_rule"] | SMALL_BANK, "schedule": {"controls": 5, "hidden": 8}},
    ),
    "elo": (NaiveElo(None, **DECAY), SMALL | DECAY),
    "mulo": (
        NaiveMulo(None, width=wider),
        SMALL | {"rate_scale": {"multipliers": (("deep/tie", 4.0),)}},
    ),
}
ALIKE = tuple(TWINS)[7:]


# --- what is drawn ----------------------------------------------------------------------------------------


def shapes(name: str) -> Shapes:
    """Ranks 0 to 4: square tensors, axes of size 1, ties of the largest axes; fewer for those much alike."""
    draw = list(TWINS).index(name)
    rng = np.random.default_rng(draw)
    small, middle, large = sorted(int(x) for x in rng.permutation(np.arange(2, 8))[:3])
    ties = [(large, large, small), (large, small, large), (small, large, large), (middle, middle, middle)]
    four = [(large, large, small, small), (small, 1, large, 1)][draw % 2]
    out = {"a": (), "deep/tie": ties[draw % 4], "four": four, "other": ties[draw % 4], "vector": (large,)}
    if name in ALIKE:
        del out["other"]
    else:
        out["deep/square"] = (middle, middle)
    if name == "celo2":
        out["embed/embedding"] = (1, large)
    return dict(sorted(out.items()))


def nested(flat: dict[str, Any]) -> Tree:
    out: Tree = {}
    for path, x in flat.items():
        *above, last = path.split("/")
        functools.reduce(lambda tree, key: tree.setdefault(key, {}), above, out)[last] = x
    return out


def inputs(sizes: Shapes, seed: int) -> tuple[Tree, Tree, np.ndarray]:
    """Returns parameters, gradients ``[STEPS, ...]`` and losses ``[STEPS]``."""
    rng = np.random.default_rng((1, seed))
    params = {k: rng.normal(size=s) * rng.choice([0.003, 0.1, 3.0]) for k, s in sizes.items()}
    grads = {}
    for i, (key, shape) in enumerate(sizes.items()):
        grads[key] = rng.normal(size=(STEPS, *shape)) * np.reshape(SCALES, (-1,) + (1,) * len(shape))
        grads[key][(i + seed) % STEPS] = 0.0  # tensor after tensor has no gradient, some from the start
    losses = 2.0 + rng.normal(size=STEPS)
    losses[4] = 40.0
    as_float = functools.partial(jax.tree.map, np.float32)
    return as_float(nested(params)), as_float(nested(grads)), as_float(losses)


def drawn_theta(like: Tree, name: str, seed: int) -> Tree:
    rng = np.random.default_rng((2, seed))
    theta = jax.tree.map(lambda x: np.float32(x + 0.1 * rng.normal(size=x.shape)), like)
    if name.startswith("velo"):  # whose steps are within rounding of zero until its heads are learned
        for head in ("controls", "step"):
            theta["schedule"][head]["b"] = theta["schedule"][head]["b"] + np.float32(1)
    if seed == 1 and theta.get("accumulators"):  # decays that fall below 0, where they are allowed to
        for bank, far in (("momentum", 0.3), ("second_moment", 0.75), ("factored", 0.3)):
            theta["accumulators"][bank]["offset"] = theta["accumulators"][bank]["offset"] + np.float32(far)
    return theta


def composed(name: str) -> Optimizer:
    config = load(name).optimizer.to_dict()
    for section, change in (TWINS[name][1] | {"tensors": {"axes": "last_two"}}).items():
        config[section] = config[section] | change if isinstance(change, dict) else change
    return build(config)


# --- both states in one form: banks [k, *S], rows [tensors, ...] in the order of the tree -----------------


def twin_state(name: str, state: Tree, sizes: Shapes) -> Named:
    out = {"count updates": state["count"]}
    for (path, shape), own in zip(sizes.items(), state["tensors"], strict=True):
        if "v" in own:
            out |= {f"{path} adam {moment}": x for moment, x in own.items()}
            continue
        banks = {"momentum": own["m"], "second_moment": own["rms"]}
        if "factored" in own and name != "celo_adam":  # which keeps it, as published, and never reads it
            for side, x in own["factored"].items():
                if side != "diagonal":
                    d1, d0 = largest_axes(path, shape)
                    x = jnp.expand_dims(x, d0 if side == "row" else d1)
                    x = jnp.broadcast_to(x, (*shape, x.shape[-1]))
                banks[side] = x
        # RNN-MLP's are flat, NN-Adam's have no bank axis.
        out |= {f"{path} {k}": jnp.moveaxis(x.reshape(*shape, -1), -1, 0) for k, x in banks.items()}
    for part in ("lstm", "numbers"):
        out |= {f"run {k}": x for k, x in state.get(part, {}).items()}
    for part in ("buffer", "train_loss"):
        out |= {f"loss {k}": x for k, x in state.get(part, {}).items()}
    given = {"from_mlp": "run own", "from_lstm": "run shared", "clip": "clip value"}
    return out | {ours: state[theirs] for theirs, ours in given.items() if theirs in state}


def composed_state(rule: Any, state: Tree, params: Tree) -> Named:
    out = {"count updates": state["count"]}
    for moment, tensors in state["routes"].get("adam", {}).items():
        out |= {f"{path} adam {moment}": x for path, x in tensors.items()}
    specs = {path: spec for path, spec in rule.specs(params).items() if f"{path} adam m" not in out}
    groups: dict[str, list[str]] = {}
    for path, spec in specs.items():
        groups.setdefault("x".join(map(str, spec.own)) or "scalar", []).append(path)
    assert groups.keys() == state["learned"].keys()
    for shape, paths in groups.items():
        for i, path in enumerate(paths):
            own = dict(state["learned"][shape])
            if len(paths) > 1:
                own = jax.tree.map(lambda x, i=i: x[i], own)
            factored = own.pop("factored", {})
            for side, x in (own | factored).items():
                x = jnp.broadcast_to(x, (x.shape[0], *specs[path].shape))
                out[f"{path} {side}"] = jax.vmap(specs[path].leave)(x)
    order = sum(groups.values(), [])  # of the schedule's rows; one for all where they are the same
    rows = np.asarray([order.index(path) for path in specs])
    for key, x in state["schedule"].items():
        per_tensor = key != "shared"
        out[f"run {key}"] = x[rows % x.shape[0]] if per_tensor and x.shape[0] in (1, len(rows)) else x
    out |= {f"loss {k}": x for k, x in state["tracker"].items() if k != "power"}
    out |= {"clip value": state["clip"]["value"]} if "value" in state["clip"] else {}
    return out


# --- the comparison ---------------------------------------------------------------------------------------


def path_of(rule: Optimizer, read: Callable[[Tree], Named]) -> Callable[..., tuple[Tree, Named]]:
    """Returns a compiled function of (theta, params, grads, losses, length): all updates and states."""

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(theta: Tree, params: Tree, grads: Tree, losses: jax.Array, length: jax.Array) -> Any:
        own = rule.with_theta(theta)

        def step(carry: Tree, fed: tuple[Tree, jax.Array]) -> Any:
            params, state = carry
            updates, state = own.update(fed[0], state, params, value=fed[1])
            return (jax.tree.map(jnp.add, params, updates), state), (updates, read(state))

        return jax.lax.scan(step, (params, own.init(params, length)), (grads, losses))[1]

    return run


def check_state(got: Named, want: Named) -> None:
    assert got.keys() == want.keys()
    for key in got:
        a, b = np.asarray(got[key]), np.asarray(want[key])
        assert a.shape == b.shape and np.all(np.isfinite(b)), key
        axes = tuple(range(1, b.ndim))
        scale = np.max(np.abs(b), axes, keepdims=True)  # of each step: gradients differ much in size
        if key.endswith(("second_moment", "row", "column", "diagonal", "adam v", "decays")):
            scale = np.abs(b)  # sums of positive numbers are right in every entry, however small
        assert np.all(np.abs(a - b) <= ROUNDING * scale), (key, np.max(np.abs(a - b) / (scale + 1e-37)))


def check_updates(got: Tree, want: Tree, bounds: Tree) -> None:
    for (keys, b), a, bound in zip(
        jax.tree.leaves_with_path(want), jax.tree.leaves(got), jax.tree.leaves(bounds), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        largest = np.max(np.abs(b))
        assert np.isfinite(b).all() and largest > 0
        error = np.max(np.abs(a - b)) / largest
        assert error <= bound, (jax.tree_util.keystr(keys), error)


@pytest.mark.parametrize("name", TWINS)
def test_follows_its_twin(name: str) -> None:
    """The parameters are the start plus the updates, which each of the two adds to its own."""
    rule, (twin, _), sizes = composed(name), TWINS[name], shapes(name)
    params, _, _ = inputs(sizes, 0)
    runs = (
        path_of(rule, lambda state: composed_state(rule, state, params)),
        path_of(twin, lambda state: twin_state(name, state, sizes)),
    )
    learned = [name == "celo2" and to_adam(path, shape) == "learned" for path, shape in sizes.items()]
    bounds = jax.tree.unflatten(
        jax.tree.structure(params), [ORTHOGONALIZED if x else CANCELLING for x in learned]
    )
    for seed, length in SEEDS.items():
        given = (drawn_theta(rule.theta, name, seed), *inputs(sizes, seed), jnp.int32(length))
        (updates, states), (want, want_states) = (run(*given) for run in runs)
        check_updates(updates, want, bounds)
        check_state(states, want_states)
