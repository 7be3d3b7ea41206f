"""Meta-training: tasks, truncation schedules and estimators in, theta out. Knows no part of an optimizer.

Exports are lazy: who reads a run's log or asks for its lock waits for no JAX.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "MetaTrainer": "trainer",
    "build_estimator": "assemble",
    "build_trainer": "assemble",
    "meta_optimizer": "meta_optimizers",
    "pairs_of": "assemble",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'celo_nnx.meta' has no attribute {name!r}")
    return getattr(importlib.import_module(f"celo_nnx.meta.{_EXPORTS[name]}"), name)
