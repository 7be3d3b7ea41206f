"""Image data sets of the Hugging Face hub as uint8 arrays, and texts as bytes; needs the extra ``hub``."""

from __future__ import annotations

from collections.abc import Callable
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


class TextSource(NamedTuple):
    """Where a text lies on the hub: rows with a column ``text``."""

    repository: str
    config: str | None


TEXT_SOURCES: dict[str, TextSource] = {
    "lm1b": TextSource("dvruette/lm1b", None),
    "wikipedia": TextSource("wikimedia/wikipedia", "20231101.en"),
}
# What is read of a text, from its start: twice what 2,000 batches of 128 slices of 65 bytes hold.
TEXT_BYTES = 2**25
_SPLITS = ("train", "test")


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

    def arrays(datasets: Any) -> dict[str, np.ndarray]:
        splits = {
            split: datasets.load_dataset(source.repository, source.config, split=split) for split in _SPLITS
        }
        return {
            key: array
            for split, rows in splits.items()
            for key, array in _arrays(split, rows, source).items()
        }

    place = _Place(f"data set {name!r}", source.repository, f"{name}.npz", elsewhere)
    return _from_hub(
        place, arrays, "without a network set HF_HUB_OFFLINE=1, and HF_HOME to a folder that holds it; "
    )


def read_text(name: str, elsewhere: str) -> bytes:
    """Downloads the first :data:`TEXT_BYTES` of a text and no more, its rows as lines.

    Args:
      name: a key of :data:`TEXT_SOURCES`.
      elsewhere: where the text was looked for before; ends the message if it cannot be had.

    Returns:
      UTF-8.

    Raises:
      MissingData: the extra is not installed, or the hub cannot be reached or read.
    """
    source = TEXT_SOURCES[name]

    def text(datasets: Any) -> bytes:
        raw = bytearray()
        for row in datasets.load_dataset(*source, split="train", streaming=True):
            raw += row["text"].encode() + b"\n"
            if len(raw) >= TEXT_BYTES:
                break
        return bytes(raw[:TEXT_BYTES]).decode("utf-8", "ignore").encode()  # no half of a character

    return _from_hub(_Place(f"text {name!r}", source.repository, f"{name}.txt", elsewhere), text)


class _Place(NamedTuple):
    """What is looked for, for messages."""

    what: str
    repository: str
    file: str
    elsewhere: str


def _from_hub(place: _Place, read: Callable[[Any], Any], offline: str = "") -> Any:
    """Returns what ``read`` makes of the package ``datasets``, and tells its errors in one line."""
    by_hand = f"or put {place.file} in a folder and set run.data_dir or CELO_NNX_DATA to it"
    try:
        import datasets
    except ImportError:
        raise MissingData(
            f"{place.what} not found: {place.elsewhere}; the Hugging Face hub ({place.repository}) needs "
            f"'pip install celo-nnx[hub]'; {by_hand}"
        ) from None
    try:
        return read(datasets)
    # Besides the hub's own errors (OSError) and unusable caches (ValueError), those of whichever library
    # carries the bytes, which are of no common class.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise MissingData(
            f"{place.what} could not be read from the Hugging Face hub ({place.repository}): {reason}; "
            f"{offline}{by_hand}; {place.elsewhere}"
        ) from None


def _arrays(split: str, rows: Any, source: Source) -> dict[str, np.ndarray]:
    """Decodes one split; row by row into one uint8 array, since the hub's own conversion yields int64."""
    labels = np.asarray(rows[source.label], np.int64)
    first = np.asarray(rows[0][source.image], np.uint8)
    images = np.empty((len(labels), *first.shape), np.uint8)
    for i, row in enumerate(rows):
        images[i] = np.asarray(row[source.image], np.uint8)
    return {f"{split}_x": images, f"{split}_y": labels}
