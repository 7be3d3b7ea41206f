"""The plain twin of a recorded optimizer."""

from __future__ import annotations

from collections.abc import Callable

from celo_nnx.interfaces import Optimizer
from celo_nnx.naive import NaiveCelo2, Switches
from celo_nnx.naive_zoo.adafac_mlp import NaiveAdafacMLP
from celo_nnx.naive_zoo.celo import NaiveCelo, Options
from celo_nnx.naive_zoo.celo_adam import NaiveCeloAdam
from celo_nnx.naive_zoo.nn_adam import NaiveNNAdam
from celo_nnx.naive_zoo.rnn_mlp import NaiveRNNMLP
from celo_nnx.naive_zoo.tensors import Axes
from celo_nnx.naive_zoo.velo import NaiveVelo
from celo_nnx.recordings.spec import Spec


def twin_optimizer(spec: Spec) -> Optimizer:
    """Returns the plain twin of a recorded optimizer, without theta."""
    return _TWINS[spec.published.layout](spec)


def _axes(spec: Spec) -> Callable[[str, tuple[int, ...]], Axes]:
    axes = {path: axes for path, _, axes in spec.leaves}
    return lambda path, shape: axes[path]


def _banks(spec: Spec) -> dict[str, tuple[float, ...]]:
    names = {"momentum": "momentum", "rms": "rms", "factored": "adafactor"}
    return {ours: spec[f"initial_{theirs}_decays"] for ours, theirs in names.items()}


def _celo2(spec: Spec) -> NaiveCelo2:
    adam = {}
    if "adam_b1" in spec:
        adam = dict(b1=spec["adam_b1"], b2=spec["adam_b2"], eps=spec["adam_epsilon"])
        adam["adam_multiplier"] = spec["mult_1d"]
    routes = {path: route for path, route, _ in spec.leaves}
    same = ("exp_mult", "rmsmult", "param_scale_mult", "aggregate_mag", "bias_correction")
    same += ("precondition_output", "normalize_input", "normalize_output", "ns_coeffs", "ns_iters", "ns_eps")
    switches = Switches(
        activation=spec["mlp_activation"],
        groups=spec.groups,
        adam_bias_correction="adam_bias_correction" in spec and spec["adam_bias_correction"],
        **{name: spec[name] for name in same},
    )
    return NaiveCelo2(
        None,
        orthogonalize=spec["orthogonalize"],
        learning_rate=spec["step_mult"],
        weight_decay=spec["weight_decay"],
        route=lambda path, shape: routes[path],
        factored_axes=_axes(spec),
        switches=switches,
        **_banks(spec),
        **adam,
    )


def _options(spec: Spec) -> Options:
    flag = float(spec["validation_mode"]) if spec["with_validation_feature_dim"] else None
    return Options(
        groups=spec.groups,
        mix_layers=spec["mix_layers"],
        validation_flag=flag,
        exp_mult=spec["exp_mult"],
        step_mult=spec["step_mult"],
        scheduled="train_phase" not in spec or spec["train_phase"] > 1,
        parameter_scale=spec["param_scale_mult"],
        largest_scale=spec["clip_param_scale_amount"] if "mom_decay" not in spec else None,
        precondition_output=spec["precondition_output"],
        state_decay=spec["rnn_state_decay"],
        constant_loss=spec["constant_loss"],
        **_banks(spec),
    )


def _celo(spec: Spec) -> NaiveCelo:
    return NaiveCelo(None, _options(spec), _axes(spec))


def _celo_adam(spec: Spec) -> NaiveCeloAdam:
    own = {"eps": spec["initial_epsilon"], "bias_correction": spec["mom_decay"]}
    return NaiveCeloAdam(None, _options(spec), _axes(spec), **own)


def _velo(spec: Spec) -> NaiveVelo:
    own = {
        "ff_mult": spec["ff_mult"],
        "keep_lstm_state": spec["use_bugged_next_lstm_state"],
        "short_loss_buffer": spec["use_bugged_loss_features"],
    }
    return NaiveVelo(None, _options(spec), _axes(spec), **own)


def _rnn_mlp(spec: Spec) -> NaiveRNNMLP:
    return NaiveRNNMLP(
        None,
        decays=spec["decays"],
        magnitude_rate=spec["magnitude_rate"],
        step_mult=spec["step_multiplier"],
    )


def _adafac_mlp(spec: Spec) -> NaiveAdafacMLP:
    own = {"exp_mult": spec["exp_mult"], "step_mult": spec["step_mult"]}
    return NaiveAdafacMLP(None, factored_axes=_axes(spec), **_banks(spec), **own)


def _nn_adam(spec: Spec) -> NaiveNNAdam:
    return NaiveNNAdam(None, output_scale=spec["output_scale"], decay_strength=spec["decay_strength"])


_TWINS: dict[str, Callable[[Spec], Optimizer]] = {
    "celo2": _celo2,
    "celo": _celo,
    "celo_adam": _celo_adam,
    "velo": _velo,
    "rnn_mlp": _rnn_mlp,
    "adafac_mlp": _adafac_mlp,
    "nn_adam": _nn_adam,
}
