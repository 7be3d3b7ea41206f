"""How ``celo`` was made: ``celo-nnx train experiments/weights/celo.py --run-dir runs/celo``."""

from ml_collections import ConfigDict

from celo_nnx.experiments import celo, local_mixed


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = local_mixed.recipe(celo.rule(), (("momentum_rms", 0, 1.0), ("momentum_rms", 1, 0.5)))
    # As in the published second phase, the schedule learns while the rule rests, which starts good here.
    config.meta.frozen = ("update_rule/",)
    config.meta.optimizer.learning_rate = 1e-3
    config.run.iterations = 400
    return config
