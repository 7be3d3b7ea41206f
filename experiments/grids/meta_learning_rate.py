"""Which meta-learning-rate? The papers' five, three seeds each, for Celo2."""

from ml_collections import ConfigDict

RATES = ("1e-4", "3e-5", "5e-5", "3e-4", "1e-3")


def get_config() -> ConfigDict:
    """Returns the grid."""
    rate = {x: (f"meta.optimizer.learning_rate={x}",) for x in RATES}
    return ConfigDict(
        dict(
            question="Which learning rate of the meta-optimizer leads to the best rule?",
            base="celo2:fast_local",
            overrides=("run.devices=1", "run.iterations=300"),
            axes=(("rate", rate),),
            seeds=(0, 1, 2),
            # So short a course of the meta-loss hardly tells variants apart. The suite's runs have 200 steps,
            # those of meta-training 100 to 2,000.
            suite="smoke",
        )
    )
