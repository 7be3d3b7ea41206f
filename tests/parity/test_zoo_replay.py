"""Replays of every published optimizer but Celo2 by its twin: recorded files, files made here, bad fields."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_recordings import header, record
from numpy.testing import assert_allclose

from celo_nnx import recordings
from celo_nnx.errors import UserError
from celo_nnx.recordings.classes import CLASSES
from celo_nnx.recordings.twins import twin_optimizer
from celo_nnx.replay import replay

RECORDED = {
    "celo": "celo",
    "celo_phase1": "celo",
    "celo_phase1_ptheta": "celo",
    "celo_phase1_released_theta": "celo",
    "celo_adam": "celo_adam",
    "velo_s": "velo",
    "velo_s_ptheta": "velo",
    "rnn_mlp": "rnn_mlp",
    "rnn_mlp_ptheta": "rnn_mlp",
    "adafac_mlp": "adafac_mlp",
    "adafac_mlp_ptheta": "adafac_mlp",
    "nnadam": "nn_adam",
    "nnadam_ptheta": "nn_adam",
}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_by_the_twin(shared: Path, name: str):
    row = replay(shared / "golden" / name, twin=True)
    assert row["ok"] and row["optimizer"] == RECORDED[name] and row["steps"] == 12, row
    assert row["max_abs_error"] < 1e-6


# One file of each class: compiling a composed optimizer takes seconds.
QUICK = ("celo", "celo_adam", "velo_s_ptheta", "rnn_mlp_ptheta", "adafac_mlp_ptheta", "nnadam_ptheta")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.drill) for name in RECORDED]
)
def test_recorded_by_the_composed_optimizer(shared: Path, name: str):
    row = replay(shared / "golden" / name)
    assert row["ok"] and row["optimizer"] == RECORDED[name] and row["steps"] == 12, row
    assert row["max_abs_error"] < 1e-6


def test_recorded_inner_unroll_by_the_twin(shared: Path):
    row = replay(shared / "golden" / "inner_unroll_celo_released", twin=True)
    assert row["ok"] and row["optimizer"] == "celo", row


def _states(path: Path, extra=None):
    """Returns the recording, and the twin's states (and ``extra``) after each of its updates."""
    recording = recordings.read(path)
    params, grads = recording.under("params/"), recording.under("grads/")
    spec = recordings.spec(recording, [(key, x.shape[1:]) for key, x in params.items()])
    rule = twin_optimizer(spec).with_theta(recordings.theta(recording, spec))

    def step(carry, fed):
        params, state = carry
        seen = extra(rule, params, state, fed[1]) if extra else None
        updates, state = rule.update(fed[0], state, params, value=fed[1])
        return (jax.tree.map(jnp.add, params, updates), state), (state, seen)

    start = {key: x[0] for key, x in params.items()}
    run = jax.jit(lambda start: jax.lax.scan(step, start, (grads, recording.array("losses")))[1])
    # The rows of recorded states follow the listed leaves, the twin's the order of its tree.
    order = list(params)
    rows = [order.index(leaf["key"]) for leaf in recording.meta["param_leaves"]]
    return recording, run((start, rule.init(start, spec.num_steps))), rows


def test_lstm_inputs_of_velo(shared: Path):
    def inputs(rule, params, state, loss):
        return rule.lstm_inputs(state, params, value=loss)[1]

    recording, (states, x), rows = _states(shared / "golden" / "velo_s_ptheta", inputs)
    want = recording.array("aux/rnn_in", (12, 8, 30))
    loss = np.arange(30) // 9 == 1
    got = np.asarray(x)[:, rows]
    assert_allclose(got[..., ~loss], want[..., ~loss], atol=2e-6)
    # These were recorded from a program compiled without optimization, whose loss buffer rounds otherwise.
    assert_allclose(got[..., loss], want[..., loss], atol=5e-5)
    for name in ("means", "running_min", "decays"):
        assert_allclose(states["buffer"][name], recording.array(f"state/loss_buffer/{name}")[1:], rtol=2e-7)
    for name in ("hidden", "cell"):
        recorded = recording.array(f"state/lstm_hidden_state/{name}")[1:]
        assert_allclose(np.asarray(states["lstm"][name])[:, rows], recorded, atol=3e-6)


def test_stored_numbers_of_nn_adam(shared: Path):
    recording, (states, _), rows = _states(shared / "golden" / "nnadam_ptheta")
    bound = recording.meta["tolerance"]["stored_hyperparameters_abs"]
    for own, theirs in (("lr", "lr"), ("b1", "beta1"), ("b2", "beta2"), ("eps", "epsilon")):
        for row, leaf in zip(rows, recording.meta["param_leaves"], strict=True):
            want = recording.array(f"state/per_layer_{theirs}/{leaf['key']}")[1:]
            assert np.ptp(want) > 1e-3
            assert_allclose(np.asarray(states["numbers"][own])[:, row], want, atol=bound)


# --- recordings made here ---------------------------------------------------------------------------------

LEAVES = {"a/w": ((6, 6), None, [1, 0]), "b": ((), None, None), "c": ((1, 3, 1), None, None)}
MADE = {
    "celo.Celo": {
        "param_inits": 3,
        "lstm_hidden_size": 4,
        "ff_hidden_layers": 1,
        "mix_layers": False,
        "with_validation_feature_dim": True,
        "validation_mode": True,
        "with_p": False,
        "with_rms_feat": False,
        "initial_momentum_decays": [0.5, 0.9],
        "initial_rms_decays": [0.9, 0.99],
        "initial_adafactor_decays": [0.5, 0.9],
        "summarize_all_control": False,
        "train_phase": 2,
    },
    "celo_adam.Celo": {"lstm_hidden_size": 4, "mix_layers": False, "initial_momentum_decays": [0.9, 0.99]},
    "HyperV2": {
        "param_inits": 2,
        "lstm_hidden_size": 4,
        "ff_hidden_size": 3,
        "adafactor_accumulator": False,
        "with_validation_feature_dim": True,
        "initial_momentum_decays": [0.9],
        "initial_adafactor_decays": [0.9],
        "ff_mult": 100.0,
    },
    "RNNMLPLOpt": {
        "hidden_size": 4,
        "hidden_layer": 1,
        "from_mlp_size": 2,
        "from_lstm_size": 3,
        "lstm_to_ff": 5,
        "lstm_hidden_size": 6,
        "decays": [0.5, 0.9],
    },
    "AdafacMLPLOpt": {"concat_weights": False, "make_separate_weights": True, "hidden_layers": 3},
    "NNAdam": {"decay_strength": 0.1},
}


WEIGHTS = {
    "celo.Celo": "theta/ff_mod_stack/~/b1",
    "celo_adam.Celo": "theta/rnn_params/step_size/b",
    "HyperV2": "theta/lstm_init_state/cell",
    "RNNMLPLOpt": "theta/initial_from_mlp",
    "AdafacMLPLOpt": "theta/nn/~/w0_25_1",
    "NNAdam": "theta/per_layer_lr",
}


@pytest.mark.parametrize("kind", MADE)
def test_made_here(tmp_path: Path, kind: str):
    """Sizes follow the constructor; a weight of theta, and a step of the path, each matter."""
    path = record(tmp_path, f"published.{kind}", MADE[kind], LEAVES)
    row = replay(path, twin=True)
    assert row["ok"] and row["optimizer"] == CLASSES[kind].name, row
    with np.load(path.with_suffix(".npz")) as arrays:
        arrays = dict(arrays)
    name = WEIGHTS[kind]
    np.savez(path.with_suffix(".npz"), **arrays | {name: arrays[name] + np.float32(0.5)})
    assert not replay(path, twin=True)["ok"], name


@pytest.mark.parametrize("kind", [kind for kind in MADE if kind != "celo_adam.Celo"])
def test_made_here_by_the_composed_optimizer(tmp_path: Path, kind: str):
    """Square and size-1 axes, a scalar, and options that no recorded file has."""
    path = record(tmp_path, f"published.{kind}", MADE[kind], LEAVES)
    bound = 1e-6
    if (
        kind == "HyperV2"
    ):  # ff_mult = 100 raises rounding: on one kind of CPU its error is 1.4e-6, 3.9e-6 absolute
        meta = json.loads(path.with_suffix(".json").read_text())
        path.with_suffix(".json").write_text(json.dumps(meta | {"tolerance": {"params_abs": 1e-5}}))
        bound = 3e-6
    row = replay(path)
    assert row["ok"] and row["max_rel_error"] < bound, row


def test_several_decays_of_celo_adam_have_no_part(tmp_path: Path):
    path = record(tmp_path, "published.celo_adam.Celo", MADE["celo_adam.Celo"], LEAVES)
    with pytest.raises(UserError, match="corrected by the first"):
        replay(path)


@pytest.mark.parametrize("kind", MADE)
def test_theta_must_fit_the_constructor(tmp_path: Path, kind: str):
    size = {"AdafacMLPLOpt": "hidden_layers"}.get(kind, "lstm_hidden_size")
    path = record(tmp_path, f"published.{kind}", MADE[kind], {"x": ((2,), None, None)}, steps=1)
    meta = json.loads(path.with_suffix(".json").read_text())
    meta["constructor"][size] = 5
    path.with_suffix(".json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="'theta/.*(has shape .* expected|is missing)") as error:
        replay(path, twin=True)
    assert "\n" not in str(error.value)


SWITCHES = {switch for switches in CLASSES["celo.Celo"].groups.values() for switch in switches}


@pytest.mark.parametrize(
    ("kind", "constructor", "message"),
    [
        ("celo.Celo", {"train_fase": 2}, "did you mean 'train_phase'"),
        ("celo.Celo", {"train_phase": 0}, "train_phase = 0 .* integer from 1"),
        ("celo.Celo", {"param_inits": 10**9}, "param_inits"),
        ("celo.Celo", {"mix_layers": 1}, "true or false"),
        ("celo.Celo", {"clip_param_scale_amount": "1"}, "clip_param_scale_amount"),
        ("celo.Celo", {"initial_momentum_decays": [0.9]}, r"bank sizes = \[1, 1, 3\]"),
        ("celo.Celo", {"ff_mult": 1.0}, "unknown constructor field"),
        ("celo.Celo", dict.fromkeys(SWITCHES, False), "feature groups"),
        ("celo_adam.Celo", {"mom_dekay": True}, "did you mean 'mom_decay'"),
        ("celo_adam.Celo", {"initial_rms_decays": [0.9] * 3, "initial_momentum_decays": [0.9] * 2}, "banks"),
        ("HyperV2", {"train_phase": 2}, "unknown constructor field"),
        ("HyperV2", {"ff_mult": float("inf")}, "ff_mult"),
        ("RNNMLPLOpt", {"decays": []}, "decays"),
        ("RNNMLPLOpt", {"hidden_layers": 2}, "did you mean 'hidden_layer'"),
        ("AdafacMLPLOpt", {"split_weights": True}, "split_weights = True .* must be false"),
        ("AdafacMLPLOpt", {"concat_weights": False}, "make_separate_weights"),
        ("NNAdam", {"decay_strength": 2.0}, "decay_strength"),
        ("NNAdam", {"initial_beta_1": 0.9}, "did you mean 'initial_beta1'"),
    ],
)
def test_bad_constructor_fields(tmp_path: Path, kind: str, constructor: dict, message: str):
    recording = recordings.Recording("bad.json", header(f"a.{kind}", constructor, {}, 1), {}, tmp_path)
    with pytest.raises(UserError, match=message) as error:
        recordings.spec(recording, [])
    assert "\n" not in str(error.value) and "bad.json" in str(error.value)


def test_only_celo2_routes_to_adam(tmp_path: Path):
    leaves = {"x": ((2,), "adam", None)}
    recording = recordings.Recording("bad", header("celo.Celo", {}, leaves, 1), {}, tmp_path)
    with pytest.raises(UserError, match="x: routed to adam"):
        recordings.spec(recording, [("x", (2,))])


def test_a_class_is_found_by_the_end_of_its_name(tmp_path: Path):
    """Two published classes are called Celo; an unknown one gives a row, not an error."""
    path = record(tmp_path, "celo.Celo", {"lstm_hidden_size": 2}, {"x": ((2,), None, None)}, steps=1)
    meta = json.loads(path.with_suffix(".json").read_text())
    for reference, name in (
        ("my.Celo", "my.Celo"),
        ("a.celo.Celo", "celo"),
        ("b.celo_adam.Celo", "celo_adam"),
    ):
        meta["reference_class"] = reference
        probe = recordings.Recording("probe", meta, {}, tmp_path)
        assert recordings.optimizer_name(probe) == name
    path.with_suffix(".json").write_text(json.dumps(meta | {"reference_class": "my.Celo"}))
    row = replay(path, twin=True)
    assert not row["ok"] and row["reason"].startswith("unsupported optimizer; supported: celo2,")
    assert "nn_adam" in row["reason"] and row["max_abs_error"] is None
