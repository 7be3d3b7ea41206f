"""Image data sets of the Hugging Face hub as uint8 arrays; needs the extra ``hub``."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from celo_nnx.errors import MissingData


class Source(NamedTuple):
    """Where a data set lies on the hub, and how its columns are named."""

    repository: str
    config: str | None
    image: str
    label: str = "label"


SOURCES: dict[str, Source] = {
    "mnist": Source("ylecun/mnist", None, "image"),
    "fashion_mnist": Source("zalandoresearch/fashion_mnist", None, "image"),
    "cifar10": Source("uoft-cs/cifar10", None, "img"),
    "cifar100": Source("uoft-cs/cifar100", None, "img", "fine_label"),
    "svhn_cropped": Source("ufldl-stanford/svhn", "cropped_digits", "image"),
}


_SPLITS = ("train", "test")
_BY_HAND = "or put {name}.npz in a folder and set run.data_dir or CELO_NNX_DATA to it"


def read(name: str, elsewhere: str) -> dict[str, np.ndarray]:
    """Downloads (or takes from the hub's own cache) a data set and decodes it once.

    Args:
      name: a key of :data:`SOURCES`.
      elsewhere: where the data set was looked for before; ends the message if it cannot be had.

    Returns:
      ``train_x``, ``test_x`` uint8 ``[n, h, w]`` or ``[n, h, w, 3]``; ``train_y``, ``test_y`` ``[n]``.

    Raises:
      MissingData: the extra is not installed, or the hub cannot be reached or read.
    """
    source = SOURCES[name]
    try:
        import datasets
    except ImportError:
        raise MissingData(
            f"data set {name!r} not found: {elsewhere}; the Hugging Face hub ({source.repository}) needs "
            f"'pip install celo-nnx[hub]'; {_BY_HAND.format(name=name)}"
        ) from None
    try:
        splits = {
            split: datasets.load_dataset(source.repository, source.config, split=split) for split in _SPLITS
        }
        return {
            key: array
            for split, rows in splits.items()
            for key, array in _arrays(split, rows, source).items()
        }
    # OSError covers the hub's own errors and failed connections; ValueError, an unusable cache.
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MissingData(
            f"data set {name!r} could not be read from the Hugging Face hub ({source.repository}): {reason}; "
            "without a network set HF_HUB_OFFLINE=1, and HF_HOME to a folder that holds it; "
            f"{_BY_HAND.format(name=name)}; {elsewhere}"
        ) from None


def _arrays(split: str, rows: Any, source: Source) -> dict[str, np.ndarray]:
    """Decodes one split; row by row into one uint8 array, since the hub's own conversion yields int64."""
    labels = np.asarray(rows[source.label], np.int64)
    first = np.asarray(rows[0][source.image], np.uint8)
    images = np.empty((len(labels), *first.shape), np.uint8)
    for i, row in enumerate(rows):
        images[i] = np.asarray(row[source.image], np.uint8)
    return {f"{split}_x": images, f"{split}_y": labels}
