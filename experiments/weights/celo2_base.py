"""How ``celo2_base`` was made.

``celo-nnx train experiments/weights/celo2_base.py --run-dir runs/celo2_base``
"""

from ml_collections import ConfigDict

from celo_nnx.experiments import celo2_base, local_mixed


def get_config() -> ConfigDict:
    """Returns the recipe; see ``celo2.py``."""
    mix = (("momentum_rms", 0, 1.0), ("momentum_rms", 1, 0.5), ("gradient_rms", 0, 0.2))
    config = local_mixed.recipe(celo2_base.rule(), (*mix, ("momentum_rms", 2, 0.05)))
    config.theta_init.noise = 0.01
    config.meta.augmentation.update(low=0.5, high=4.0)
    config.meta.optimizer.learning_rate = 4e-4
    config.run.iterations = 250
    return config
