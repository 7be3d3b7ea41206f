"""What is the exact polar factor worth? Celo2 orthogonalized by SVD; slow, for small networks."""

from typing import Any

from ml_collections import ConfigDict

from celo_nnx.config import experiment
from celo_nnx.experiments import celo2


def rule() -> dict[str, Any]:
    """Returns the section ``optimizer``."""
    return celo2.rule() | dict(orthogonalization=dict(kind="svd"))


def get_config(tasks: str = "fast_local") -> ConfigDict:
    """Returns the config on a task preset."""
    return experiment(rule(), tasks)
