"""Files of weights as data: size and kind first, pickles never."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from celo_nnx.errors import UserError, require
from celo_nnx.meta.checkpoint import digest
from celo_nnx.pretrained.messagepack import LARGEST

SUFFIXES = (".safetensors", ".state")
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_MAGIC = (b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(1, 6)))
_DIGEST = "celo_nnx_digest"


def weights_in(folder: Path) -> Path:
    """Returns the one file of weights in a folder.

    Raises:
      UserError: there is none, or several; one line that lists what is there.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    found = [name for name in names if name.endswith(SUFFIXES)]
    if len(found) == 1:
        return folder / found[0]
    text = f"{folder}: expected one file that ends in {' or '.join(SUFFIXES)}, found {len(found)}"
    if not found and any(name.endswith(_PICKLES) for name in names):
        text += f"; pickled weights are not read: {_CONVERT}"
    raise UserError(f"{text} ({', '.join(found or names)[:300] or 'an empty folder'})")


_CONVERT = "convert them to safetensors where they are trusted, with safetensors.torch.save_file(state_dict)"


def read_bytes(path: Path) -> bytes:
    """Returns a file's bytes after checking that it is there, not too large and not a pickle.

    Raises:
      UserError: one line.
    """
    if not path.is_file():
        raise UserError(
            "no such file; give a file, a folder that holds one, or a Hub id such as amoudgl/celo2"
        )
    size = path.stat().st_size
    require(size <= LARGEST, "size of the file", size, f"at most {LARGEST} bytes")
    data = path.read_bytes()
    if path.suffix in _PICKLES or data.startswith(_MAGIC):
        raise UserError(f"is a pickle or a zip such as PyTorch's, which is not read: {_CONVERT}")
    return data


def sha256(data: bytes) -> str:
    """Returns the SHA-256 of bytes, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def is_safetensors(path: Path, data: bytes) -> bool:
    """Tells a safetensors file by its name, or by its header's first brace."""
    return path.suffix == ".safetensors" or data[8:9] == b"{"


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a safetensors file.

    Returns:
      Arrays by name, and the strings of the header.

    Raises:
      UserError: truncated, not safetensors, or not what was written where it carries a digest of ours.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no iterator
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"not a whole safetensors file of numpy arrays: {text}") from None
    if not arrays:
        raise UserError("expected leaves, found none")
    stated = metadata.pop(_DIGEST, None)
    if stated is not None and stated != digest(arrays, metadata):
        raise UserError("is damaged: its contents do not match its digest")
    return arrays, metadata


def safetensors_bytes(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Returns a safetensors file with a digest over arrays and header strings in its header."""
    from safetensors.numpy import save

    plain = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    return save(plain, metadata={**metadata, _DIGEST: digest(plain, dict(metadata))})
