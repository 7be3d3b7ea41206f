"""VeLO: an LSTM for each tensor sees its moments and mixes a bank of MLPs (the large one)."""

from typing import Any

from ml_collections import ConfigDict

from celo_nnx.config import experiment
from celo_nnx.experiments import celo

MOMENTS = dict(mean_rms="mean_second_moment", var_m="variance_momentum", var_rms="variance_second_moment")


def rule(hidden: int = 512, bank: int = 256) -> dict[str, Any]:
    """Returns the section ``optimizer`` (OPTIMIZERS section 6); ``velo_4000`` has ``bank_scale`` 100."""
    section = celo.rule()
    moments = {name: dict(kind="normalized_moment", moment=moment) for name, moment in MOMENTS.items()}
    schedule = dict(hidden=hidden, controls=bank, softmax=False, rate="raw")
    return section | dict(
        update_rule=section["update_rule"] | dict(bank=bank, bank_scale=1.0),
        rows=section["rows"] | moments | dict(rank=dict(kind="rank", size=5)),
        schedule=section["schedule"] | schedule,
    )


def get_config(tasks: str = "fast_local") -> ConfigDict:
    """Returns the config on a task preset."""
    return experiment(rule(), tasks)
