"""Celo2 as it was meta-trained: only tensors whose path ends in /b take Adam, whatever their rank."""

from typing import Any

from ml_collections import ConfigDict

from celo_nnx.config import experiment
from celo_nnx.experiments import celo2


def rule() -> dict[str, Any]:
    """Returns the section ``optimizer`` (OPTIMIZERS section 5, factory settings)."""
    return celo2.rule() | dict(
        routing=dict(kind="regex", pattern="/b$", route="adam"),
        tensors=dict(axes="last_two", matrix=(), factored=()),
    )


def get_config(tasks: str = "fast_local") -> ConfigDict:
    """Returns the config on a task preset."""
    return experiment(rule(), tasks)
