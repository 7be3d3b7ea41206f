"""Weights from the Hugging Face hub: files of named kinds only, never code."""

from __future__ import annotations

import re
from pathlib import Path

from celo_nnx.errors import UserError
from celo_nnx.pretrained.files import SUFFIXES

PATTERNS = (*(f"*{suffix}" for suffix in SUFFIXES), "config.json")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_id(text: str) -> bool:
    """Tells a Hub id from a path that does not exist.

    Example:
      >>> is_id("amoudgl/celo2"), is_id("runs/theta.safetensors"), is_id("./celo")
      (True, False, False)
    """
    file = Path(text).suffix.lower() in (*SUFFIXES, ".pt", ".pth", ".bin", ".npz", ".pkl", ".json")
    return _ID.fullmatch(text) is not None and not file


def fetch(repository: str) -> Path:
    """Downloads a repository's weights into the Hub's own cache.

    Args:
      repository: ``ORGANIZATION/NAME``, such as ``"amoudgl/celo2"``.

    Returns:
      The folder that holds them.

    Raises:
      UserError: huggingface_hub is not installed, no connection, or no such repository; one line.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"{repository} is no file here, and the Hub needs huggingface_hub: pip install 'celo-nnx[hub]'"
        ) from None
    try:
        return Path(snapshot_download(repository, allow_patterns=list(PATTERNS)))
    # Whatever the network stack below raises, it is one line to the user.
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(
            f"{repository} is no file here and was not fetched from the Hub ({type(error).__name__}: {text})"
        ) from None
