"""How does an optimizer train the seventeen tasks of the Celo papers? They are larger than fast_velo's.

Images and texts come from the Hugging Face hub (``pip install celo-nnx[hub]``) or from files of the same
names. Kinds, sets and the widths of MLPs, ConvNets and autoencoders are the papers'; the other widths,
lengths, steps and the batch are chosen here.
"""

from typing import Any

from ml_collections import ConfigDict

# Steps, lengths, widths and batch sizes are fields, to be changed on the command line as well:
# steps=500 tasks.*.batch_size=32 tasks.conv.channels=8,16,16 tasks.*.length=32 tasks.*.inner.batch_size=16
BATCH = 128
VALIDATION = 0.1


def images(kind: str, dataset: str, *, size: int = 32, grey: bool = False, **settings: Any) -> dict[str, Any]:
    """Returns a task on images."""
    data = dict(datasets=(dataset,), image_size=size, grey=grey, validation=VALIDATION)
    return dict(kind=kind, batch_size=BATCH, **data, **settings)


def text(kind: str, dataset: str, *, length: int = 64, **settings: Any) -> dict[str, Any]:
    """Returns a language model of bytes."""
    data = dict(datasets=(dataset,), level="byte", validation=VALIDATION)
    return dict(kind=kind, batch_size=BATCH, length=length, **data, **settings)


def get_config() -> ConfigDict:
    """Returns the suite."""
    mlp, narrow, conv = (128, 128, 128), (128, 32, 128), (32, 64, 64)
    fashion = images("image_mlp", "fashion_mnist", size=8, grey=True, hidden=(32,))
    mnist = images("image_mlp", "mnist", size=8, grey=True, hidden=(32,), activation="tanh")
    tasks = dict(
        mlp_relu=images("image_mlp", "cifar10", hidden=mlp),
        mlp_second_set=images("image_mlp", "cifar100", hidden=mlp),
        mlp_tanh_norm=images("image_mlp", "cifar10", hidden=mlp, activation="tanh", normalization="layer"),
        mlp_two_layers=images("image_mlp", "fashion_mnist", size=28, grey=True, hidden=(128, 128)),
        conv=images("conv_net", "cifar10", channels=conv),
        conv_batch_norm=images("conv_net", "cifar10", channels=conv, normalization="batch"),
        conv_second_set=images("conv_net", "cifar100", channels=conv),
        vit=images("vision_transformer", "cifar100", patch=4, width=128, depth=4, heads=4),
        autoencoder_cifar10=images("image_autoencoder", "cifar10", hidden=narrow),
        autoencoder_mnist=images("image_autoencoder", "mnist", size=28, grey=True, hidden=narrow),
        transformer_small=text("transformer_lm", "lm1b", width=64, depth=2, heads=4),
        transformer_medium=text("transformer_lm", "lm1b", width=128, depth=4, heads=4),
        transformer_large=text("transformer_lm", "lm1b", width=256, depth=6, heads=8),
        rnn_first_text=text("recurrent_lm", "lm1b", cell="lstm", width=256),
        rnn_second_text=text("recurrent_lm", "wikipedia", cell="gru", width=256),
        learned_optimizer_fashion=dict(
            kind="learned_optimizer", inner=fashion, hidden=(32,), unroll=20, pairs=8, std=0.03
        ),
        learned_optimizer_mnist=dict(
            kind="learned_optimizer", inner=mnist, hidden=(16, 16), unroll=20, pairs=8, std=0.03
        ),
    )
    return ConfigDict(dict(steps=2000, schedule="constant", seeds=3, evaluations=10, batches=8, tasks=tasks))
