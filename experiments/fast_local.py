"""Does it meta-train on four image families without a hub? As fast_velo, from local files and digits."""

from ml_collections import ConfigDict

from celo_nnx.experiments import fast_velo


def get_config() -> ConfigDict:
    """Returns the section ``tasks``."""
    config = fast_velo.get_config()
    config.datasets = ("mnist_8x8", "cifar10_8x8_gray", "fashion_mnist_sprite", "digits")
    return config
