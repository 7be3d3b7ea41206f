"""How ``celo`` was made: ``celo-nnx train experiments/weights/celo.py --run-dir runs/celo``."""

from ml_collections import ConfigDict

from celo_nnx.config import experiment
from celo_nnx.experiments import celo


def get_config(tasks: str = "local_mixed") -> ConfigDict:
    """Returns the recipe; ``run.data_dir`` or ``CELO_NNX_DATA`` names the folder of the image files."""
    config = experiment(celo.rule(), tasks)
    # Published Celo learns its schedule last, while the rule rests; here the rule starts good and only rests.
    mix = (("momentum_rms", 0, 1.0), ("momentum_rms", 1, 0.5))
    config.theta_init.update(kind="hand_made", mix=mix)
    config.meta.frozen = ("update_rule/",)
    config.meta.objective.scale = "log"
    config.meta.optimizer.update(learning_rate=1e-3, warmup=50, weight_decay=0.0)
    config.meta.average = 0.99
    config.run.update(iterations=500, snapshots=250)
    return config
