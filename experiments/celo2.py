"""Celo2: orthogonalized matrices; biases, scales and embeddings take Adam, by name and rank."""

from typing import Any

from ml_collections import ConfigDict

from celo_nnx.config import experiment
from celo_nnx.experiments import celo2_base


def rule() -> dict[str, Any]:
    """Returns the section ``optimizer`` (OPTIMIZERS section 5)."""
    return celo2_base.rule() | dict(
        orthogonalization=dict(
            kind="newton_schulz", coefficients=(3.4445, -4.7750, 2.0315), steps=5, eps=1e-8
        ),
        routing=dict(kind="celo2", route="adam"),
        routes=dict(adam=dict(kind="celo2_adam", b1=0.9, b2=0.95, eps=1e-8, multiplier=20.0)),
    )


def get_config(tasks: str = "fast_local") -> ConfigDict:
    """Returns the config on a task preset."""
    return experiment(rule(), tasks)
