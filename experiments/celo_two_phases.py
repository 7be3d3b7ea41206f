"""Celo as published, in one run: the update rule first, then the schedule while the rule rests."""

from ml_collections import ConfigDict

from celo_nnx.config import experiment
from celo_nnx.experiments import celo


def get_config(tasks: str = "fast_local") -> ConfigDict:
    """Returns the config on a task preset (META_TRAINING section 5, ``train_partial``)."""
    config = experiment(celo.rule(), tasks)
    config.meta.optimizer.learning_rate = 3e-4
    config.meta.phases = (
        # The optimizer of celo_phase1: a constant learning rate, whatever the schedule says.
        dict(
            name="rule",
            iterations=100_000,
            set=("optimizer.schedule.rate=none", "meta.frozen=schedule/"),
        ),
        dict(name="schedule", iterations=0, set=("meta.frozen=update_rule/",)),
    )
    config.run.iterations = 200_000
    return config
