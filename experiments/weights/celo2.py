"""How ``celo2`` was made: ``celo-nnx train experiments/weights/celo2.py --run-dir runs/celo2``.

``run.data_dir`` or ``CELO_NNX_DATA`` names the folder of the image files.
"""

from ml_collections import ConfigDict

from celo_nnx.experiments import celo2, local_mixed


def get_config() -> ConfigDict:
    """Returns the recipe."""
    # Three momenta and a little of the gradient; eight hidden units carry them all.
    mix = (("momentum", 0, 1.0), ("momentum", 1, 0.5), ("gradient", 0, 0.2), ("momentum", 2, 0.05))
    config = local_mixed.recipe(celo2.rule(), mix)
    config.seed = 2
    config.theta_init.noise = 0.01
    # A step's RMS is the learning rate, so this only varies the rate: within what still trains.
    config.meta.augmentation.update(low=0.5, high=4.0)
    config.meta.optimizer.learning_rate = 4e-4
    return config
