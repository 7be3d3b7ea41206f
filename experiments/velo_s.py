"""VeLO, small: 64 LSTM units and a bank of 32 MLPs."""

from typing import Any

from ml_collections import ConfigDict

from celo_nnx.config import experiment
from celo_nnx.experiments import velo


def rule() -> dict[str, Any]:
    """Returns the section ``optimizer`` (OPTIMIZERS section 6)."""
    return velo.rule(hidden=64, bank=32)


def get_config(tasks: str = "fast_local") -> ConfigDict:
    """Returns the config on a task preset."""
    return experiment(rule(), tasks)
