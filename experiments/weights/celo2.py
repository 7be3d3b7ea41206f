"""How ``celo2`` was made: ``celo-nnx train experiments/weights/celo2.py --run-dir runs/celo2``."""

from ml_collections import ConfigDict

from celo_nnx.config import experiment
from celo_nnx.experiments import celo2


def get_config(tasks: str = "local_mixed") -> ConfigDict:
    """Returns the recipe; ``run.data_dir`` or ``CELO_NNX_DATA`` names the folder of the image files."""
    config = experiment(celo2.rule(), tasks)
    # Two momenta and a little of the gradient. A few hidden units carry it; noise wakes the others.
    mix = (("momentum", 0, 1.0), ("momentum", 1, 0.5), ("gradient", 0, 0.2), ("momentum", 2, 0.05))
    config.theta_init.update(kind="hand_made", mix=mix, noise=0.01)
    config.meta.objective.scale = "log"
    # The step's RMS is the learning rate, so this only varies the rate: within a factor that still trains.
    config.meta.augmentation.update(low=0.5, high=4.0)
    config.meta.optimizer.update(learning_rate=4e-4, warmup=50, weight_decay=0.0)
    config.meta.average = 0.99
    config.seed = 2
    config.run.update(iterations=500, snapshots=250)
    return config
