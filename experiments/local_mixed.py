"""What are the shipped weights meta-trained on? MLPs on three local image sets, a ConvNet and a GRU."""

from ml_collections import ConfigDict

from celo_nnx.experiments import fast_conv, fast_local, fast_text


def get_config() -> ConfigDict:
    """Returns the section ``tasks``."""
    mlp = fast_local.get_config()
    # An MLP memorizes the 1,797 digits, and the logarithm of its loss would outweigh all other families.
    mlp.datasets = tuple(name for name in mlp.datasets if name != "digits")
    parts = dict(mlp=mlp, conv=fast_conv.get_config(), text=fast_text.get_config())
    return ConfigDict(dict(kind="mixture", parts=parts))
