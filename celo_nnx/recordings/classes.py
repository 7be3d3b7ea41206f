"""The published classes, one table each: constructor field -> (the class's default, what is legal)."""

from __future__ import annotations

import dataclasses
from typing import Any

from celo_nnx.recordings.checks import Check, boolean, choice, integer, never, number, numbers, optional, text

Fields = dict[str, tuple[Any, Check]]
Switches = dict[str, tuple[str, ...]]

_DECAYS = numbers(0.0, 1.0, 1, 16)
_UNIT = number(0.0, 1.0)
_RATE = number(0.0, 1e6)
_FACTOR = number(-1e3, 1e3)
_SIZE = integer(1, 8192)
_LAYERS = integer(1, 8)


@dataclasses.dataclass(frozen=True)
class Published:
    """A published class.

    Attributes:
      name: what this project calls the optimizer.
      layout: how its theta maps to this project's, a name of ``celo_nnx.pretrained.layouts``.
      fields: of its constructor.
      groups: feature group -> the switches that must all be on for it, in slot order.
      inert: beginnings of the names of fields that have no effect and are passed over.
    """

    name: str
    layout: str
    fields: Fields
    groups: Switches = dataclasses.field(default_factory=dict)
    inert: tuple[str, ...] = ()


def _banks(momentum: tuple[float, ...], rms: tuple[float, ...]) -> Fields:
    return {
        "initial_momentum_decays": (momentum, _DECAYS),
        "initial_rms_decays": (rms, _DECAYS),
        "initial_adafactor_decays": ((0.9, 0.99, 0.999), _DECAYS),
    }


def _on(groups: Switches) -> Fields:
    """Every switch of some groups, on by default."""
    return {switch: (True, boolean) for switches in groups.values() for switch in switches}


# --- Celo2 (OPTIMIZERS sections 4 and 5) ------------------------------------------------------------------

_CELO2_GROUPS: Switches = {
    "gradient": ("with_g",),
    "clipped_gradient": ("with_grad_clip_feat",),
    "parameter": ("with_p",),
    "momentum": ("with_m",),
    "second_moment": ("with_rms",),
    "momentum_rms": ("with_rms_norm_g",),
    "rsqrt_second_moment": ("with_rsqrt_rms",),
    "factored_gradient": ("with_fac_norm_g",),
    "gradient_rms": ("with_rms_only_norm_g",),
    "row": ("with_fac_rms",),
    "column": ("with_fac_rms",),
    "rsqrt_row": ("with_fac_rsqrt",),
    "rsqrt_column": ("with_fac_rsqrt",),
    "factored_momentum": ("with_fac_mom_mult",),
}
_CELO2: Fields = {
    "step_mult": (0.001, _RATE),
    "weight_decay": (0.0, _RATE),
    "orthogonalize": (False, boolean),
    "ns_coeffs": ((3.4445, -4.7750, 2.0315), numbers(-1e3, 1e3, 3, 3)),
    "ns_iters": (5, integer(0, 100)),
    "ns_eps": (1e-8, _UNIT),
    "mlp_activation": ("relu", choice("relu", "tanh")),
    "ff_hidden_size": (8, integer(1, 1024)),
    "ff_hidden_layers": (2, _LAYERS),
    "exp_mult": (0.0, _FACTOR),
    "rmsmult": (1.0, _FACTOR),
    "param_scale_mult": (False, boolean),
    "aggregate_mag": (False, boolean),
    "bias_correction": (False, boolean),
    "precondition_output": (False, boolean),
    "normalize_input": (True, boolean),
    "normalize_output": (True, boolean),
    **_banks((0.9, 0.99, 0.999), (0.95,)),
    **_on(_CELO2_GROUPS),
}
_CELO2_ADAM: Fields = {
    "orthogonalize": (True, boolean),
    "regex_1d": (".*bias.*|.*embed.*", text),
    "adam_b1": (0.9, _UNIT),
    "adam_b2": (0.999, _UNIT),
    "adam_epsilon": (1e-8, _UNIT),
    "adam_bias_correction": (False, boolean),
    "mult_1d": (20.0, _RATE),
}

# --- Celo, Celo-Adam and VeLO (OPTIMIZERS sections 2, 3 and 6) -------------------------------------------

_CELO_GROUPS: Switches = _CELO2_GROUPS | {
    "momentum": ("with_m", "with_m_feat"),
    "second_moment": ("with_rms", "with_rms_feat"),
    **{
        group: ("adafactor_accumulator", *_CELO2_GROUPS[group])
        for group in ("row", "column", "rsqrt_row", "rsqrt_column", "factored_momentum")
    },
}
_INERT = ("summarize_", "reparam_decay")
_CELO: Fields = {
    "lstm_hidden_size": (128, _SIZE),
    "ff_hidden_size": (4, integer(1, 1024)),
    "ff_hidden_layers": (2, _LAYERS),
    "param_inits": (64, _SIZE),
    "mix_layers": (True, boolean),
    "exp_mult": (0.001, _FACTOR),
    "step_mult": (0.001, _RATE),
    "train_phase": (1, integer(1, 100)),
    "with_validation_feature_dim": (False, boolean),
    "validation_mode": (False, boolean),
    "param_scale_mult": (True, boolean),
    "precondition_output": (False, boolean),
    "clip_param_scale_amount": (None, optional(_RATE)),
    "rnn_state_decay": (0.0, _UNIT),
    "constant_loss": (False, boolean),
    **_banks((0.9, 0.99, 0.999), (0.999,)),
    **_on(_CELO_GROUPS),
}
_CELO_ADAM: Fields = {
    **_CELO,
    **_banks((0.9,), (0.999,)),
    "lstm_hidden_size": (64, _SIZE),
    "initial_epsilon": (1e-8, _UNIT),
    "mom_decay": (True, boolean),
    "param_scale_mult": (False, boolean),
}
_VELO: Fields = {name: row for name, row in _CELO.items() if name != "train_phase"} | {
    "use_bugged_next_lstm_state": (False, boolean),
    "use_bugged_loss_features": (True, boolean),
    "ff_mult": (1.0, _FACTOR),
}

# --- the others (OPTIMIZERS sections 7 to 9) -------------------------------------------------------------

_RNN_MLP: Fields = {
    "step_multiplier": (0.001, _RATE),
    "magnitude_rate": (0.001, _FACTOR),
    "hidden_size": (32, integer(1, 1024)),
    "hidden_layer": (2, _LAYERS),
    "from_mlp_size": (16, _SIZE),
    "from_lstm_size": (18, _SIZE),
    "lstm_to_ff": (17, _SIZE),
    "lstm_hidden_size": (64, _SIZE),
    "decays": ((0.5, 0.9, 0.99, 0.999, 0.9999), _DECAYS),
}
_ADAFAC_MLP: Fields = {
    "exp_mult": (0.001, _FACTOR),
    "step_mult": (0.001, _RATE),
    "hidden_size": (4, integer(1, 1024)),
    "hidden_layers": (2, _LAYERS),
    "concat_weights": (True, boolean),
    "make_separate_weights": (False, boolean),
    "split_weights": (False, never),
    **_banks((0.9, 0.99, 0.999), (0.999,)),
}
_NN_ADAM: Fields = {
    "lstm_hidden_size": (32, _SIZE),
    "output_scale": (0.01, _FACTOR),
    "initial_learning_rate": (1e-4, number(1e-8, 1e3)),
    "initial_beta1": (0.9, _UNIT),
    "initial_beta2": (0.999, _UNIT),
    "initial_epsilon": (1e-8, number(1e-11, 1e4)),
    "decay_strength": (0.0, _UNIT),
}

CLASSES: dict[str, Published] = {
    "Celo2": Published("celo2", "celo2", _CELO2 | _CELO2_ADAM, _CELO2_GROUPS),
    "Celo2Base": Published("celo2base", "celo2", _CELO2, _CELO2_GROUPS),
    "Celo2Transformation": Published("celo2transform", "celo2", _CELO2, _CELO2_GROUPS),
    "celo.Celo": Published("celo", "celo", _CELO, _CELO_GROUPS, _INERT),
    "celo_adam.Celo": Published("celo_adam", "celo_adam", _CELO_ADAM, inert=_INERT),
    "HyperV2": Published("velo", "velo", _VELO, _CELO_GROUPS, _INERT),
    "RNNMLPLOpt": Published("rnn_mlp", "rnn_mlp", _RNN_MLP),
    "AdafacMLPLOpt": Published("adafac_mlp", "adafac_mlp", _ADAFAC_MLP),
    "NNAdam": Published("nn_adam", "nn_adam", _NN_ADAM),
}
"""By the end of the class's dotted name: two published classes are called Celo."""


def lookup(reference_class: str) -> str | None:
    """Returns the key of :data:`CLASSES` for a dotted class name, None where there is none.

    Example:
      >>> lookup("celo.optimizers.celo_adam.Celo"), lookup("celo.optimizers.adam.Adam")
      ('celo_adam.Celo', None)
    """
    return next((key for key in CLASSES if f".{reference_class}".endswith(f".{key}")), None)
