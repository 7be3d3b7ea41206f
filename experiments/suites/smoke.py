"""Does evaluation work at all, in a minute or two? An MLP and a ConvNet on digits, a GRU on sums in words.

All data are embedded.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the suite."""
    digits = dict(datasets=("digits",), image_size=8, grey=True, validation=0.1)
    return ConfigDict(
        dict(
            steps=200,
            schedule="constant",
            seeds=3,
            evaluations=4,
            batches=4,
            tasks=dict(
                mlp=dict(kind="image_mlp", hidden=(24,), batch_size=32, **digits),
                conv=dict(kind="conv_net", channels=(6, 12), strides=(2, 2), batch_size=16, **digits),
                text=dict(
                    kind="recurrent_lm",
                    datasets=("sums",),
                    level="character",
                    length=12,
                    cell="gru",
                    width=12,
                    batch_size=8,
                    validation=0.1,
                ),
            ),
        )
    )
