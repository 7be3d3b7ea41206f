"""Do bias-corrected features help early on? Celo2 whose averages are free of their start at zero."""

from typing import Any

from ml_collections import ConfigDict

from celo_nnx.config import experiment
from celo_nnx.experiments import celo2


def rule() -> dict[str, Any]:
    """Returns the section ``optimizer``."""
    banks = celo2.rule()["accumulators"]
    corrected = {name: bank | dict(bias_correction=True) for name, bank in banks.items()}
    return celo2.rule() | dict(accumulators=corrected)


def get_config(tasks: str = "fast_local") -> ConfigDict:
    """Returns the config on a task preset."""
    return experiment(rule(), tasks)
