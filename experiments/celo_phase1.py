"""Celo's first phase: the update rule alone, at a constant learning rate; the schedule in theta rests."""

from typing import Any

from ml_collections import ConfigDict

from celo_nnx.config import experiment
from celo_nnx.experiments import celo


def rule() -> dict[str, Any]:
    """Returns the section ``optimizer`` (OPTIMIZERS section 2, ``train_phase`` 1)."""
    section = celo.rule()
    return section | dict(schedule=section["schedule"] | dict(rate="none"))


def get_config(tasks: str = "fast_local") -> ConfigDict:
    """Returns the config on a task preset."""
    return experiment(rule(), tasks)
