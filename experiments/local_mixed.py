"""What are the shipped weights meta-trained on? MLPs on three local image sets, a ConvNet and a GRU."""

from typing import Any

from ml_collections import ConfigDict

from celo_nnx.config import experiment
from celo_nnx.experiments import fast_conv, fast_local, fast_text


def get_config() -> ConfigDict:
    """Returns the section ``tasks``."""
    mlp = fast_local.get_config()
    # An MLP memorizes the 1,797 digits, and the logarithm of its loss would outweigh all other families.
    mlp.datasets = tuple(name for name in mlp.datasets if name != "digits")
    parts = dict(mlp=mlp, conv=fast_conv.get_config(), text=fast_text.get_config())
    return ConfigDict(dict(kind="mixture", parts=parts))


def recipe(optimizer: dict[str, Any], mix: tuple[tuple[str, int, float], ...]) -> ConfigDict:
    """Returns what the recipes in ``experiments/weights`` share.

    Args:
      optimizer: the section of that name.
      mix: what the hand-made start steps along.
    """
    config = experiment(optimizer, "local_mixed")
    config.theta_init.update(kind="hand_made", mix=mix)
    # Scores are ratios of losses, so their logarithm is what is to fall.
    config.meta.objective.scale = "log"
    config.meta.optimizer.update(warmup=50, weight_decay=0.0)
    config.meta.average = 0.99
    config.run.update(iterations=500, snapshots=250)
    return config
