"""Is the learned schedule enough? Celo-Adam: Adam in the MLP's place, Celo's schedule kept."""

from typing import Any

from ml_collections import ConfigDict

from celo_nnx.config import experiment
from celo_nnx.experiments import celo


def rule() -> dict[str, Any]:
    """Returns the section ``optimizer`` (OPTIMIZERS section 3)."""
    section = celo.rule()
    return section | dict(
        accumulators=dict(
            momentum=dict(kind="momentum", decays=(0.9,), bias_correction=True),
            second_moment=dict(kind="second_moment", decays=(0.999,), bias_correction=True),
        ),
        features=dict(groups=("momentum", "second_moment"), options={}),
        normalization=dict(kind="identity"),
        update_rule=dict(kind="adam", eps=1e-8, floor=1e-10),
        step=dict(kind="direction"),
        schedule=section["schedule"] | dict(controls=0),
    )


def get_config(tasks: str = "fast_local") -> ConfigDict:
    """Returns the config on a task preset."""
    return experiment(rule(), tasks)
