"""Which theta is shipped? Neither meta-training nor another suite has these tasks. All data are embedded.

A residual ConvNet and an MLP-Mixer on digits, and a Transformer on sums in words.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the suite."""
    digits = dict(datasets=("digits",), image_size=8, grey=True, validation=0.1, batch_size=16)
    tasks = dict(
        mixer=dict(kind="mlp_mixer", patch=2, width=24, depth=1, channel_hidden=48) | digits,
        res_net=dict(kind="res_net", channels=(4, 8), blocks=1, normalization="batch")
        | digits
        | dict(batch_size=8),
        transformer=dict(
            kind="transformer_lm",
            datasets=("sums",),
            level="character",
            length=24,
            width=24,
            depth=1,
            heads=2,
            batch_size=8,
            validation=0.1,
        ),
    )
    return ConfigDict(dict(steps=1000, schedule="constant", seeds=3, evaluations=5, batches=8, tasks=tasks))
