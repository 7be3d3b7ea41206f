"""What does the learned rule do alone? Celo2-base: one route, no orthogonalization (OPTIMIZERS section 4)."""

from typing import Any

from ml_collections import ConfigDict

from celo_nnx.config import experiment

# OPTIMIZERS section 1.6, in slot order: the order of the first layer's pieces in published weights
FOURTEEN = (
    "gradient",
    "clipped_gradient",
    "parameter",
    "momentum",
    "second_moment",
    "momentum_rms",
    "rsqrt_second_moment",
    "factored_gradient",
    "gradient_rms",
    "row",
    "column",
    "rsqrt_row",
    "rsqrt_column",
    "factored_momentum",
)


def rule() -> dict[str, Any]:
    """Returns the section ``optimizer``; Celo2 differs in orthogonalization and routing."""
    return dict(
        clip=dict(kind="elementwise", limit=1000.0),
        accumulators=dict(
            momentum=dict(kind="momentum", decays=(0.9, 0.99, 0.999)),
            second_moment=dict(kind="second_moment", decays=(0.95,)),
            factored=dict(kind="factored", decays=(0.9, 0.99, 0.999)),
        ),
        features=dict(groups=FOURTEEN, options={}),
        normalization=dict(kind="second_moment", axes="matrix", eps=1e-9),
        update_rule=dict(kind="split_mlp", hidden=(8, 8), outputs=3, activation="relu"),
        step=dict(kind="direction"),
        orthogonalization=dict(kind="identity"),
        output_normalization=dict(kind="second_moment", axes="matrix", eps=1e-9),
        schedule=dict(kind="constant", value=1e-3),
        routing=dict(kind="single"),
        routes={},
        tensors=dict(axes="networks", matrix=(), factored=()),
        state=dict(dtype="float32", rounding="stochastic"),
        weight_decay=0.0,
        tile=0,
        kernel="xla",
    )


def get_config(tasks: str = "fast_local") -> ConfigDict:
    """Returns the config on a task preset."""
    return experiment(rule(), tasks)
