"""Data sets by name: looked up in folders, scikit-learn or the hub; prepared once, cached."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from celo_nnx.errors import MissingData, UserError, require, unknown
from celo_nnx.files import read_npz
from celo_nnx.tasks import hub, npz
from celo_nnx.tasks.images import prepare

DATASETS: dict[str, str] = {
    "digits": "1,797 handwritten digits, 8x8 (scikit-learn, embedded): 1,500 train, 297 test",
    "mnist": "70,000 handwritten digits, 28x28 (Hugging Face hub: ylecun/mnist, or mnist.npz)",
    "fashion_mnist": "70,000 pieces of clothing, 28x28 (hub zalandoresearch/fashion_mnist, or a .npz)",
    "cifar10": "60,000 photographs, 32x32 RGB (hub uoft-cs/cifar10, or cifar10.npz)",
    "cifar100": "60,000 photographs of 100 classes, 32x32 RGB (hub uoft-cs/cifar100, or cifar100.npz)",
    "svhn_cropped": "99,289 house numbers, 32x32 RGB (hub ufldl-stanford/svhn, or svhn_cropped.npz)",
    "mnist_8x8": "MNIST at 8x8 (mnist_8x8.npz)",
    "cifar10_8x8_gray": "CIFAR-10 at 8x8, grey (cifar10_8x8_gray.npz)",
    "fashion_mnist_sprite": "900 pieces of clothing, 28x28 (fashion_mnist_sprite.npz)",
}
MAX_SIZE = 512
# Part of every cache key: raise it when the arithmetic of preparation changes.
PIPELINE = 1
Raw = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Data:
    """A prepared data set.

    Attributes:
      name: what it was asked for by.
      train_x, test_x: ``[n, size * size * channels]`` float32 in [0, 1], rows before columns before channels.
      train_y, test_y: ``[n]`` int32 class indices.
      classes: number of classes.
      source: where it came from, in words.
      digest: sha256 over the four arrays, hexadecimal.
    """

    name: str
    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    classes: int
    source: str
    digest: str


def load(name: str, *, size: int, grey: bool, data_dir: str = "") -> Data:
    """Loads a data set: ``data_dir/NAME.npz``, else ``$CELO_NNX_DATA/NAME.npz``, else by its known name.

    Prepared arrays are cached by content and settings, under ``$CELO_NNX_CACHE`` or ``~/.cache/celo_nnx``.

    Args:
      name: a key of :data:`DATASETS`, or of a file ``NAME.npz`` in one of the folders.
      size: height and width that images are resized to.
      grey: whether channels are averaged to one.
      data_dir: a folder of ``.npz`` files; empty for none.

    Returns:
      The prepared data.

    Raises:
      UserError: an unknown or absent data set, a bad file, or a value out of range.

    Example:
      >>> load("digits", size=8, grey=True).train_x.shape
      (1500, 64)
    """
    check_size(size)
    check_place(name, f"{name}.npz", data_dir)
    for folder in folders(data_dir):
        path = folder / f"{name}.npz"
        if path.is_file():
            key = {"file": _file_digest(path)}
            return _prepared(name, str(path), key, lambda path=path: npz.read(path), 255.0, size, grey)
    if name == "digits":
        key = {"digits": importlib.metadata.version("scikit-learn")}
        return _prepared(name, "scikit-learn load_digits", key, _digits, 16.0, size, grey)
    elsewhere = looked_for(f"{name}.npz", data_dir)
    if name in hub.SOURCES:
        source = f"Hugging Face hub {hub.SOURCES[name].repository}"
        read = lambda: npz.check_labels(source, hub.read(name, elsewhere))  # noqa: E731
        return _prepared(name, source, {"hub": list(hub.SOURCES[name])}, read, 255.0, size, grey)
    if name in DATASETS:
        raise MissingData(
            f"data set {name!r} not found: {elsewhere}; put {name}.npz (arrays {npz.LAYOUT}) in a folder "
            "and set run.data_dir or CELO_NNX_DATA to it"
        )
    raise UserError(f"{unknown('data set', name, listing(data_dir))}; {elsewhere}")


def check_size(size: object) -> None:
    """Checks the height and width of images."""
    good = isinstance(size, int) and 1 <= size <= MAX_SIZE
    require(good, "image_size", size, f"an integer from 1 to {MAX_SIZE}")


def check_place(name: object, file: str, data_dir: object) -> None:
    """Checks that a data set's name is one, and that the folder of its file exists."""
    require(isinstance(data_dir, str), "run.data_dir", data_dir, "a folder's path, or empty")
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"data set name = {name!r} is not a name: must be letters, digits, '_', '-' and '.'")
    if data_dir and not Path(data_dir).is_dir():
        raise UserError(
            f"run.data_dir = {data_dir!r} is not a folder: must be one that holds {file}, or empty"
        )


def listing(data_dir: str = "") -> dict[str, str]:
    """Returns one line about every data set that has a name here, files in the folders included."""
    found = {
        path.stem: f"file {path}" for folder in folders(data_dir) for path in sorted(folder.glob("*.npz"))
    }
    return DATASETS | {
        name: f"{DATASETS[name]}: {line}" if name in DATASETS else line for name, line in found.items()
    }


def folders(data_dir: str) -> list[Path]:
    """Returns the folders in which files of data are looked for, first to last."""
    return [Path(folder) for folder in (data_dir, os.environ.get("CELO_NNX_DATA", "")) if folder]


def looked_for(file: str, data_dir: str) -> str:
    """Says where a file was looked for, for messages."""
    environment = os.environ.get("CELO_NNX_DATA", "")
    shown = [
        f"run.data_dir ({data_dir or 'unset'})",
        f"CELO_NNX_DATA ({environment or 'unset'})",
    ]
    return f"looked for {file} in {' and '.join(shown)}"


def _digits() -> Raw:
    """Returns scikit-learn's digits, pixels 0 to 16; train = the first 1,500 of permutation(seed 0)."""
    from sklearn.datasets import load_digits  # takes seconds, and only needed when nothing is cached

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images, labels = digits.images.astype(np.uint8)[order][..., None], digits.target[order]
    return {
        "train_x": images[:1500],
        "train_y": labels[:1500],
        "test_x": images[1500:],
        "test_y": labels[1500:],
    }


def _prepared(
    name: str,
    source: str,
    key: dict[str, object],
    read: Callable[[], Raw],
    scale: float,
    size: int,
    grey: bool,
) -> Data:
    """Returns the data from the cache, or reads, prepares and caches it."""
    settings = {**key, "size": size, "grey": grey, "scale": scale, "pipeline": PIPELINE}
    arrays = cached(name, settings, npz.KEYS, lambda: _prepare_all(name, read(), scale, size, grey))
    top = 1 + max(int(arrays["train_y"].max()), int(arrays["test_y"].max()))
    # A known set has its classes even where a sample of it lacks the last ones.
    classes = max(top, 100 if name == "cifar100" else 10) if name in DATASETS else top
    return Data(name=name, classes=classes, source=source, digest=digest(arrays), **arrays)


def _prepare_all(name: str, raw: Raw, scale: float, size: int, grey: bool) -> Raw:
    """Prepares both splits: images flat float32, labels int32."""
    channels = 1 if grey else raw["train_x"].shape[-1]
    need = 4 * size * size * channels * (len(raw["train_x"]) + len(raw["test_x"]))
    if need > npz.LIMIT_BYTES:
        raise UserError(
            f"image_size = {size!r} is out of range for data set {name!r}: must be such that "
            f"the prepared images take at most {npz.LIMIT_BYTES} bytes, not {need}"
        )
    out: Raw = {}
    for split in ("train", "test"):
        images = prepare(raw[f"{split}_x"], size, grey, scale)
        out[f"{split}_x"] = images.reshape(len(images), -1)
        out[f"{split}_y"] = raw[f"{split}_y"].astype(np.int32)
    return out


def digest(arrays: Raw) -> str:
    """Returns the sha256 over names, types, shapes and contents of arrays, in the order of their names."""
    total = hashlib.sha256()
    for key in sorted(arrays):
        array = np.ascontiguousarray(arrays[key])
        total.update(f"{key} {array.dtype.str} {array.shape};".encode())
        total.update(array.data)
    return total.hexdigest()


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def cached(name: str, settings: dict[str, object], keys: Iterable[str], make: Callable[[], Raw]) -> Raw:
    """Returns arrays from the cache, or makes and caches them.

    Args:
      name: begins the file's name.
      settings: what decides the arrays; values that JSON can hold.
      keys: names of the arrays.
      make: gives the arrays.
    """
    key_digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    path = _cache_dir() / f"{name}-{key_digest[:32]}.npz"
    arrays = _cache_read(path, keys)
    if arrays is None:
        arrays = make()
        _cache_write(path, arrays)
    return arrays


def _cache_dir() -> Path:
    return Path(os.environ.get("CELO_NNX_CACHE") or Path.home() / ".cache" / "celo_nnx")


def _cache_read(path: Path, keys: Iterable[str]) -> Raw | None:
    """Returns the cached arrays, or None where there are none or their digest does not agree."""
    try:
        file = read_npz(path, 2 * npz.LIMIT_BYTES)
        arrays = {key: file[key] for key in keys}
        good = file["digest"].shape == () and str(file["digest"]) == digest(arrays)
    except (UserError, KeyError):
        return None
    return arrays if good else None


def _cache_write(path: Path, arrays: Raw) -> None:
    """Writes the cache in one rename; a folder that cannot be written is no cache."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            try:
                np.savez(file, digest=np.array(digest(arrays)), **arrays)
                file.flush()
                os.replace(file.name, path)
            except BaseException:  # an interrupt too: nothing half-written stays behind
                os.unlink(file.name)
                raise
    except OSError:
        pass
