"""The image pipeline: resize, scale to [0, 1], grey; plain numpy arithmetic, run once by grain."""

from __future__ import annotations

import numpy as np

# Grain costs about 30 us an element, so an element is a block of images and the arithmetic is per block.
BLOCK = 1000


def prepare(images: np.ndarray, size: int, grey: bool, scale: float = 255.0) -> np.ndarray:
    """Prepares raw images: bilinear resize, division by ``scale``, then the mean over channels if ``grey``.

    Args:
      images: ``[n, h, w]`` or ``[n, h, w, c]``, uint8.
      size: height and width of the result; images that have it already are only scaled.
      grey: whether the channels are averaged to one (after resizing and scaling).
      scale: the raw value that becomes 1.

    Returns:
      ``[n, size, size, c]`` float32, with ``c = 1`` where ``grey``.

    Example:
      >>> prepare(np.full((2, 4, 4, 3), 255, np.uint8), size=2, grey=True).shape
      (2, 2, 2, 1)

    Source: META_TRAINING section 7 (the order of the three operations is theirs).
    """
    import grain  # slow to import, and only needed when nothing is cached

    images = images[..., None] if images.ndim == 3 else images

    def block(start: int) -> np.ndarray:
        resized = resize_bilinear(images[start : start + BLOCK], size) / np.float32(scale)
        return resized.mean(axis=-1, keepdims=True) if grey else resized

    blocks = grain.MapDataset.range(0, len(images), BLOCK).map(block)
    # No reader threads: numpy does the work, and threads only take the cores from it.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    out = np.empty((len(images), size, size, 1 if grey else images.shape[-1]), np.float32)
    start = 0
    for prepared in blocks.to_iter_dataset(read_options=options):
        out[start : start + len(prepared)] = prepared
        start += len(prepared)
    return out


def resize_bilinear(images: np.ndarray, size: int) -> np.ndarray:
    """Resizes to ``size x size``: bilinear between the two nearest pixels, no antialiasing.

    Output pixel ``i`` samples the input at ``(i + 0.5) L / size - 0.5`` of an axis of length ``L``
    (half-pixel centres), clamped to the edge. Rows first weighted along the width, then along the height.

    Args:
      images: ``[n, h, w, c]``, any real dtype.
      size: height and width of the result.

    Returns:
      ``[n, size, size, c]`` float32.
    """
    top, bottom, down = _samples(images.shape[1], size)
    left, right, across = _samples(images.shape[2], size)
    down, across = down[:, None, None], across[:, None]

    def along_width(rows: np.ndarray) -> np.ndarray:
        a, b = rows[:, :, left].astype(np.float32), rows[:, :, right].astype(np.float32)
        return a + (b - a) * across

    upper, lower = along_width(images[:, top]), along_width(images[:, bottom])
    return upper + (lower - upper) * down


def _samples(length: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (lower neighbour ``[size]``, upper neighbour ``[size]``, weight of the upper ``[size]``)."""
    centre = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(length / size) - np.float32(
        0.5
    )
    floor = np.floor(centre)
    lower = np.maximum(floor, 0).astype(np.int64)
    upper = np.minimum(np.ceil(centre), length - 1).astype(np.int64)
    return lower, upper, centre - floor
