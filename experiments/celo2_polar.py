"""Does a more exact polar factor help Celo2? Polar Express polynomials for Newton-Schulz's quintic."""

from typing import Any

from ml_collections import ConfigDict

from celo_nnx.config import experiment
from celo_nnx.experiments import celo2


def rule() -> dict[str, Any]:
    """Returns the section ``optimizer``."""
    return celo2.rule() | dict(
        orthogonalization=dict(kind="newton_schulz", coefficients=("polar_express",), steps=5, eps=1e-8)
    )


def get_config(tasks: str = "fast_local") -> ConfigDict:
    """Returns the config on a task preset."""
    return experiment(rule(), tasks)
