"""Does it meta-train at all, in minutes and without a download? As fast_velo, on digits only."""

from ml_collections import ConfigDict

from celo_nnx.experiments import fast_velo


def get_config() -> ConfigDict:
    """Returns the section ``tasks``."""
    config = fast_velo.get_config()
    config.datasets = ("digits",)
    return config
