"""Does it meta-train on convolutions, in minutes and without a download? 8x8 digits, batch normalization."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the section ``tasks``."""
    return ConfigDict(
        dict(
            kind="conv_net",
            datasets=("digits",),
            image_size=8,
            grey=True,
            channels=(8, 16),
            strides=(2, 1),
            kernel=3,
            activation="relu",
            normalization="batch",
            initialization="lecun_normal",
            batch_size=32,
            normalizer_clip=1.5,
            validation=0.0,
        )
    )
