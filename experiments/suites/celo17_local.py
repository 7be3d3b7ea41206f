"""How does an optimizer train the architectures of celo17, offline and on two cores? Smaller sizes and sets.

The tasks bear celo17's names. Data are files of ``CELO_NNX_DATA``: ``mnist``, ``mnist_8x8``, ``cifar10``,
``cifar10_8x8_gray``, ``fashion_mnist_sprite``, ``shakespeare``. There is none of CIFAR-100: in its place
``mlp_second_set`` and ``vit`` classify the ten classes of grey CIFAR-10, ``conv_second_set`` MNIST. All
language models read Shakespeare, by characters, and ``rnn_second_text`` by words.
"""

from typing import Any

from ml_collections import ConfigDict

# Such that a step of one run takes 1 ms of a core on average with Adam and 3 with Celo2, and none above 5.
VALIDATION = 0.1


def images(
    kind: str, dataset: str, size: int, batch: int, *, grey: bool = False, **settings: Any
) -> dict[str, Any]:
    """Returns a task on images."""
    data = dict(datasets=(dataset,), image_size=size, grey=grey, validation=VALIDATION)
    return dict(kind=kind, batch_size=batch, **data, **settings)


def text(kind: str, level: str = "character", **settings: Any) -> dict[str, Any]:
    """Returns a language model."""
    data = dict(datasets=("shakespeare",), level=level, words=256, validation=VALIDATION)
    return dict(kind=kind, batch_size=8, length=32, **data, **settings)


def get_config() -> ConfigDict:
    """Returns the suite."""
    mlp, narrow, conv = (128, 128, 128), (128, 32, 128), (8, 16, 16)
    fashion = images("image_mlp", "fashion_mnist_sprite", 8, 16, grey=True, hidden=(16,))
    mnist = images("image_mlp", "mnist_8x8", 8, 16, grey=True, hidden=(8,), activation="tanh")
    perturbed = dict(unroll=10, pairs=4, std=0.03, step=0.1)
    tasks = dict(
        mlp_relu=images("image_mlp", "cifar10", 8, 32, hidden=mlp),
        mlp_second_set=images("image_mlp", "cifar10_8x8_gray", 8, 32, grey=True, hidden=mlp),
        mlp_tanh_norm=images(
            "image_mlp", "cifar10", 8, 32, hidden=mlp, activation="tanh", normalization="layer"
        ),
        mlp_two_layers=images("image_mlp", "fashion_mnist_sprite", 14, 8, grey=True, hidden=(128, 128)),
        conv=images("conv_net", "cifar10", 16, 16, channels=conv),
        conv_batch_norm=images("conv_net", "cifar10", 16, 16, channels=conv, normalization="batch"),
        conv_second_set=images("conv_net", "mnist", 14, 16, grey=True, channels=conv),
        vit=images(
            "vision_transformer", "cifar10_8x8_gray", 8, 16, grey=True, patch=2, width=32, depth=2, heads=4
        ),
        autoencoder_cifar10=images("image_autoencoder", "cifar10", 8, 32, hidden=narrow),
        autoencoder_mnist=images("image_autoencoder", "mnist", 14, 32, grey=True, hidden=narrow),
        transformer_small=text("transformer_lm", width=16, depth=1, heads=2),
        transformer_medium=text("transformer_lm", width=32, depth=1, heads=4),
        transformer_large=text("transformer_lm", width=32, depth=2, heads=4),
        rnn_first_text=text("recurrent_lm", cell="lstm", width=32),
        rnn_second_text=text("recurrent_lm", "token", cell="gru", width=32),
        learned_optimizer_fashion=dict(kind="learned_optimizer", inner=fashion, hidden=(8,), **perturbed),
        learned_optimizer_mnist=dict(kind="learned_optimizer", inner=mnist, hidden=(8, 8), **perturbed),
    )
    return ConfigDict(dict(steps=1000, schedule="constant", seeds=3, evaluations=5, batches=8, tasks=tasks))
