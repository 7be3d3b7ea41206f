"""Does it meta-train on language models, in minutes and without a download? Sums in words, a GRU."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the section ``tasks``."""
    return ConfigDict(
        dict(
            kind="recurrent_lm",
            datasets=("sums",),
            level="character",
            length=16,
            cell="gru",
            width=16,
            depth=1,
            activation="tanh",
            normalization="none",
            initialization="lecun_normal",
            batch_size=16,
            normalizer_clip=1.5,
            validation=0.0,
        )
    )
