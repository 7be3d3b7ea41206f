"""A recorded optimizer composed of this project's parts."""

from __future__ import annotations

from collections.abc import Callable

from celo_nnx.errors import UserError
from celo_nnx.interfaces import Optimizer
from celo_nnx.recordings.spec import Spec

_BANKS = {
    "momentum": "initial_momentum_decays",
    "second_moment": "initial_rms_decays",
    "factored": "initial_adafactor_decays",
}


def composed_optimizer(spec: Spec) -> Optimizer:
    """Returns the recorded optimizer composed of this project's parts, with a random theta.

    Args:
      spec: of a layout in :data:`COMPOSERS`.

    Raises:
      UserError: a recorded option that no part has.
    """
    return COMPOSERS[spec.published.layout](spec)


def _celo2(spec: Spec) -> Optimizer:
    # Here, since the twin needs neither: a recording can be replayed with it alone.
    from celo_nnx.build import build
    from celo_nnx.config import load

    for name in ("bias_correction", "precondition_output"):
        if spec[name]:
            raise UserError(f"constructor field {name} = True has no part that does it; try --twin")
    config = load("celo2_published").optimizer.to_dict()
    for name, field in _BANKS.items():
        config["accumulators"][name] |= {"decays": spec[field]}
    config["features"] = dict(config["features"], groups=spec.groups)
    hidden = (spec["ff_hidden_size"],) * spec["ff_hidden_layers"]
    config["update_rule"] |= {"hidden": hidden, "activation": spec["mlp_activation"]}
    config["step"] |= {
        "exp_mult": spec["exp_mult"],
        "parameter_scale": spec["param_scale_mult"],
        "aggregate_magnitude": spec["aggregate_mag"],
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
    factored = tuple((path, *axes) for path, _, axes in spec.leaves if axes is not None)
    config["tensors"] = {"matrix": (), "factored": factored}
    config["routes"] = {}
    if "adam_b1" in spec:
        adam = {"b1": spec["adam_b1"], "b2": spec["adam_b2"], "eps": spec["adam_epsilon"]}
        adam |= {"multiplier": spec["mult_1d"], "bias_correction": spec["adam_bias_correction"]}
        config["routes"]["adam"] = {"kind": "celo2_adam"} | adam
    return build(config)


COMPOSERS: dict[str, Callable[[Spec], Optimizer]] = {"celo2": _celo2}
"""By the layout of theta; what is not here is replayed by its twin only."""
