"""Does a learned schedule help Celo2? Celo's LSTM over time and loss sets the rate of Celo2's rule."""

from typing import Any

from ml_collections import ConfigDict

from celo_nnx.config import experiment
from celo_nnx.experiments import celo, celo2


def rule() -> dict[str, Any]:
    """Returns the section ``optimizer``."""
    learned = celo.rule()
    return celo2.rule() | dict(
        tracker=learned["tracker"],
        rows=learned["rows"],
        schedule=learned["schedule"] | dict(value=1e-2, controls=0),
    )


def get_config(tasks: str = "fast_local") -> ConfigDict:
    """Returns the config on a task preset."""
    return experiment(rule(), tasks)
