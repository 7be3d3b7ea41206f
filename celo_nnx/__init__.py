"""celo_nnx: learned optimizers from interchangeable parts.

Exports are lazy: ``import celo_nnx`` imports neither JAX nor the parts.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "LearnedOptimizer": "optimizer",
    "MetaParam": "interfaces",
    "UserError": "errors",
    "celo": "drop_in",
    "celo2": "drop_in",
    "celo2_base": "drop_in",
    "describe": "description",
    "diagnostics": "transform",
    "load_config": "config",
    "load_optimizer": "config",
    "load_theta": "theta_io",
    "train": "training",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'celo_nnx' has no attribute {name!r}")
    return getattr(importlib.import_module(f"celo_nnx.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
