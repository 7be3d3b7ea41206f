"""Compiled programs that outlive a process, in a folder of the user's: JAX's own cache, switched on.

Seeds of one variant compile the same program, since the seed is data to it; so do the starts of one run.
Programs are machine code, and whoever writes them can have anything done. The folder is therefore never
inside a run folder, which may come from somebody else, and is used only where nobody else can write.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from pathlib import Path


def keep_compiled(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Has JAX keep what it compiles and take what it has kept; call it before the first compilation.

    A folder that the user has given to JAX (``JAX_COMPILATION_CACHE_DIR``) stays as it is, and
    ``JAX_ENABLE_COMPILATION_CACHE=false`` switches all of it off. An entry that cannot be read or written is
    a warning of JAX's, and the program is compiled as without a cache.

    Args:
      environment: such as ``os.environ``; the folder is below ``CELO_NNX_CACHE`` or ``~/.cache/celo_nnx``.

    Returns:
      The folder, None where none is used by this call: the user's own stands, or it is not safe or not
      writable.

    Example:
      >>> keep_compiled({"CELO_NNX_CACHE": "/proc/none"})
    """
    import jax

    if jax.config.jax_compilation_cache_dir is not None:
        return None
    try:
        above = Path(environment.get("CELO_NNX_CACHE") or Path.home() / ".cache" / "celo_nnx")
        folder = above.absolute() / "compiled" / _machine()
        above.mkdir(parents=True, exist_ok=True)
        for new in (folder.parent, folder):  # the mode of parents would be the umask's
            new.mkdir(mode=0o700, exist_ok=True)
        safe = _mine(folder.parent) and _mine(folder) and os.access(folder, os.W_OK | os.X_OK)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    if not safe:
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def _mine(folder: Path) -> bool:
    """Whether the folder is this user's and nobody else can write there."""
    found = folder.lstat()
    own = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    return own and not folder.is_symlink() and not found.st_mode & 0o022


def _machine() -> str:
    """A name for this kind of CPU: a home that several kinds share must not mix their machine code."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kinds = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    text = "\n".join([platform.machine(), platform.processor(), *kinds])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
