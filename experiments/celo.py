"""Celo: Celo2-base's features with parameter-scaled steps and a learned LSTM schedule (phase 2)."""

from typing import Any

from ml_collections import ConfigDict

from celo_nnx.config import experiment
from celo_nnx.experiments.celo2_base import FOURTEEN

# Vectors show their unfactored average in the place of rows and columns; epsilons differ from Celo2's.
OPTIONS = {
    **{name: dict(eps=1e-6) for name in ("momentum_rms", "rsqrt_second_moment", "gradient_rms")},
    **{name: dict(unfactored=True) for name in ("row", "column", "rsqrt_row", "rsqrt_column")},
    "factored_momentum": dict(unfactored=True, eps=0.0),
}


def rule() -> dict[str, Any]:
    """Returns the section ``optimizer`` (OPTIMIZERS section 2)."""
    return dict(
        clip=dict(kind="elementwise", limit=1000.0),
        accumulators=dict(
            momentum=dict(kind="momentum", decays=(0.9, 0.99, 0.999)),
            second_moment=dict(kind="second_moment", decays=(0.999,)),
            factored=dict(kind="factored", decays=(0.9, 0.99, 0.999)),
        ),
        features=dict(groups=FOURTEEN, options=OPTIONS),
        normalization=dict(kind="second_moment", axes="all", eps=1e-5),
        update_rule=dict(kind="split_mlp", hidden=(4, 4), outputs=3, bank=1),
        step=dict(kind="direction", exp_mult=1e-3, parameter_scale=True),
        orthogonalization=dict(kind="identity"),
        output_normalization=dict(kind="identity"),
        tracker=dict(kind="loss_buffer"),
        rows=dict(fraction_left=dict(kind="time_fraction"), loss_features=dict(kind="loss")),
        schedule=dict(kind="lstm", value=1e-3, hidden=64, controls=1),
        routing=dict(kind="single"),
        routes={},
        tensors=dict(axes="last_two", matrix=(), factored=()),
        weight_decay=0.0,
    )


def get_config(tasks: str = "fast_local") -> ConfigDict:
    """Returns the config on a task preset."""
    return experiment(rule(), tasks)
