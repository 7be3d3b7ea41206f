"""ELO's rule: adafac MLP 32-32 with fixed decays and decoupled weight decay."""

from typing import Any

from ml_collections import ConfigDict

from celo_nnx.config import experiment
from celo_nnx.experiments import adafac_mlp


def rule() -> dict[str, Any]:
    """Returns the section ``optimizer`` (OPTIMIZERS section 13, table)."""
    return adafac_mlp.rule(learned=False, hidden=(32, 32))


def get_config(tasks: str = "fast_local") -> ConfigDict:
    """Returns the config on a task preset."""
    return experiment(rule(), tasks)
