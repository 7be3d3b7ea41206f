"""Is orthogonalization needed, or are even rows enough? Celo2 with row normalization in its place."""

from typing import Any

from ml_collections import ConfigDict

from celo_nnx.config import experiment
from celo_nnx.experiments import celo2


def rule() -> dict[str, Any]:
    """Returns the section ``optimizer``."""
    return celo2.rule() | dict(orthogonalization=dict(kind="axis_normalized", axes="rows"))


def get_config(tasks: str = "fast_local") -> ConfigDict:
    """Returns the config on a task preset."""
    return experiment(rule(), tasks)
