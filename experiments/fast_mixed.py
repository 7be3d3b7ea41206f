"""Does one optimizer meta-train on kinds side by side? MLP, ConvNet, GRU and quadratics, all embedded."""

from ml_collections import ConfigDict

from celo_nnx.experiments import fast_conv, fast_digits, fast_text


def get_config() -> ConfigDict:
    """Returns the section ``tasks``."""
    parts = dict(
        mlp=fast_digits.get_config(),
        conv=fast_conv.get_config(),
        text=fast_text.get_config(),
        quadratic=dict(kind="quadratic", eigenvalues=(1.0, 0.3, 0.1, 0.03, 0.01), columns=4, rotated=True),
    )
    return ConfigDict(dict(kind="mixture", parts=parts))
