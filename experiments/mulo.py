"""muLO: adafac MLP 32-32 with the learning rate of hidden matrices divided by their width multiplier."""

from typing import Any

from ml_collections import ConfigDict

from celo_nnx.config import experiment
from celo_nnx.experiments import adafac_mlp


def rule() -> dict[str, Any]:
    """Returns the section ``optimizer`` (OPTIMIZERS section 13); give each model's width multipliers."""
    section = adafac_mlp.rule(hidden=(32, 32))
    banks = section["accumulators"]
    return section | dict(
        accumulators=banks | dict(momentum=banks["momentum"] | dict(limited=True)),
        schedule=dict(kind="constant", value=1e-2),  # ten times the adafac MLP's
        rate_scale=dict(kind="width", multipliers=()),
    )


def get_config(tasks: str = "fast_local") -> ConfigDict:
    """Returns the config on a task preset."""
    return experiment(rule(), tasks)
