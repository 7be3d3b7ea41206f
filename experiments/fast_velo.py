"""Does it meta-train on the published four image families? 8x8 grey images, MLP 64-32-10, batch 64."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the section ``tasks``."""
    return ConfigDict(
        dict(
            kind="image_mlp",
            datasets=("mnist", "fashion_mnist", "cifar10", "svhn_cropped"),
            image_size=8,
            hidden=(32,),
            activation="relu",
            batch_size=64,
            normalizer_clip=1.5,
            validation=0.0,
        )
    )
