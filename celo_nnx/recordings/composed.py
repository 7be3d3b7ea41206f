"""A recorded optimizer composed of this project's parts: a preset with the recorded constructor's values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from celo_nnx.errors import UserError
from celo_nnx.interfaces import Optimizer
from celo_nnx.recordings.spec import Spec

Config = dict[str, Any]

_BANKS = {
    "momentum": "initial_momentum_decays",
    "second_moment": "initial_rms_decays",
    "factored": "initial_adafactor_decays",
}


def composed_optimizer(spec: Spec, changes: tuple[str, ...] = ()) -> Optimizer:
    """Returns the recorded optimizer composed of this project's parts, with a random theta.

    Args:
      spec: of a layout in :data:`COMPOSERS`.
      changes: ``key=value`` overrides of its config, such as ``"tile=2"``.

    Raises:
      UserError: a recorded option that no part has, or an unknown key.
    """
    # Here, since the twin needs neither: a recording can be replayed with it alone.
    from celo_nnx.build import build
    from celo_nnx.config import load

    preset, change = COMPOSERS[spec.published.layout]
    whole = ConfigDict(load(preset).to_dict())
    config = whole.optimizer.to_dict()
    change(spec, config)
    factored = tuple((path, *axes) for path, _, axes in spec.leaves if axes is not None)
    config["tensors"] = {"axes": "last_two", "matrix": (), "factored": factored}
    whole.optimizer = ConfigDict(config)
    return build(load(whole, [f"optimizer.{text}" for text in changes]).optimizer)


def _refuse(spec: Spec, *names: str) -> None:
    for name in names:
        if name in spec and spec[name]:
            raise UserError(f"constructor field {name} = {spec[name]} has no part that does it; try --twin")


def _banks(spec: Spec, config: Config) -> None:
    for name in config["accumulators"]:
        config["accumulators"][name] |= {"decays": spec[_BANKS[name]]}


def _celo2(spec: Spec, config: Config) -> None:
    _banks(spec, config)
    if spec["bias_correction"]:
        for bank in config["accumulators"].values():
            bank["bias_correction"] = True
    config["features"] |= {"groups": spec.groups}
    hidden = (spec["ff_hidden_size"],) * spec["ff_hidden_layers"]
    config["update_rule"] |= {"hidden": hidden, "activation": spec["mlp_activation"]}
    config["step"] |= {
        "exp_mult": spec["exp_mult"],
        "parameter_scale": spec["param_scale_mult"],
        "aggregate_magnitude": spec["aggregate_mag"],
        "precondition": spec["precondition_output"],
    }
    newton_schulz = {"coefficients": spec["ns_coeffs"], "steps": spec["ns_iters"], "eps": spec["ns_eps"]}
    identity = {"kind": "identity"}
    config["orthogonalization"] = identity
    if spec["orthogonalize"]:
        config["orthogonalization"] = {"kind": "newton_schulz"} | newton_schulz
    if not spec["normalize_input"]:
        config["normalization"] = identity
    if not spec["normalize_output"]:
        config["output_normalization"] = identity
    config["output_normalization"] = config["output_normalization"] | {"gain": spec["rmsmult"]}
    config["schedule"] = {"kind": "constant", "value": spec["step_mult"]}
    config["weight_decay"] = spec["weight_decay"]
    config["routing"] = {"kind": "table", "table": tuple((path, route) for path, route, _ in spec.leaves)}
    config["routes"] = {}
    if "adam_b1" in spec:
        adam = {"b1": spec["adam_b1"], "b2": spec["adam_b2"], "eps": spec["adam_epsilon"]}
        adam |= {"multiplier": spec["mult_1d"], "bias_correction": spec["adam_bias_correction"]}
        config["routes"]["adam"] = {"kind": "celo2_adam"} | adam


def _scheduled(spec: Spec, config: Config) -> None:
    """What Celo, Celo-Adam and VeLO share."""
    _refuse(spec, "constant_loss", "use_bugged_next_lstm_state")
    config["schedule"] |= {
        "value": spec["step_mult"],
        "hidden": spec["lstm_hidden_size"],
        "mixing": spec["mix_layers"],
        "state_decay": spec["rnn_state_decay"],
    }
    if "use_bugged_loss_features" in spec and spec["use_bugged_loss_features"]:
        config["tracker"]["horizon"] = 10
    if spec["with_validation_feature_dim"]:
        value = float(spec["validation_mode"])
        config["rows"]["validation"] = {"kind": "constant", "value": value}  # the last by name
    _banks(spec, config)


def _celo(spec: Spec, config: Config) -> None:
    _scheduled(spec, config)
    config["schedule"]["controls"] = spec["param_inits"]
    if "train_phase" in spec and spec["train_phase"] <= 1:
        config["schedule"]["rate"] = "none"
    config["features"] |= {"groups": spec.groups}
    hidden = (spec["ff_hidden_size"],) * spec["ff_hidden_layers"]
    config["update_rule"] |= {"hidden": hidden, "bank": spec["param_inits"]}
    if "ff_mult" in spec:
        config["update_rule"]["bank_scale"] = spec["ff_mult"]
    config["step"] |= {
        "exp_mult": spec["exp_mult"],
        "parameter_scale": spec["param_scale_mult"],
        "scale_limit": spec["clip_param_scale_amount"] or 0.0,
        "precondition": spec["precondition_output"],
    }


def _celo_adam(spec: Spec, config: Config) -> None:
    _scheduled(spec, config)
    for name, bank in config["accumulators"].items():
        bank["bias_correction"] = spec["mom_decay"]
        if spec["mom_decay"] and len(set(bank["decays"])) > 1:
            raise UserError(
                f"constructor field {_BANKS[name]}: several decays, all corrected by the first, "
                "have no part; try --twin"
            )
    config["update_rule"]["eps"] = spec["initial_epsilon"]
    config["step"]["parameter_scale"] = spec["param_scale_mult"]


def _rnn_mlp(spec: Spec, config: Config) -> None:
    for bank in config["accumulators"].values():
        bank["decays"] = spec["decays"]
    sizes = {"context": "lstm_to_ff", "shared": "from_lstm_size", "own": "from_mlp_size"}
    config["schedule"] |= {ours: spec[theirs] for ours, theirs in sizes.items()}
    config["schedule"] |= {"hidden": spec["lstm_hidden_size"], "value": spec["step_multiplier"]}
    own = spec["from_mlp_size"]
    hidden = (spec["hidden_size"],) * spec["hidden_layer"]
    config["update_rule"] |= {"hidden": hidden, "outputs": own + 2, "feedback": own}
    config["step"]["exp_mult"] = spec["magnitude_rate"]


def _adafac_mlp(spec: Spec, config: Config) -> None:
    _banks(spec, config)
    config["update_rule"]["hidden"] = (spec["hidden_size"],) * spec["hidden_layers"]
    config["step"]["exp_mult"] = spec["exp_mult"]
    config["schedule"]["value"] = spec["step_mult"]


def _nn_adam(spec: Spec, config: Config) -> None:
    config["schedule"] |= {
        "hidden": spec["lstm_hidden_size"],
        "output_scale": spec["output_scale"],
        "decay_strength": spec["decay_strength"],
    }


COMPOSERS: dict[str, tuple[str, Callable[[Spec, Config], None]]] = {
    "celo2": ("celo2_published", _celo2),
    "celo": ("celo", _celo),
    "celo_adam": ("celo_adam", _celo_adam),
    "velo": ("velo_s", _celo),
    "rnn_mlp": ("rnn_mlp", _rnn_mlp),
    "adafac_mlp": ("adafac_mlp", _adafac_mlp),
    "nn_adam": ("nn_adam", _nn_adam),
}
"""By the layout of theta: a preset, and what turns its config into the recorded optimizer's."""
