"""No augmentation."""

from __future__ import annotations

from celo_nnx.interfaces import Task


def no_augmentation(task: Task) -> Task:
    """The task itself."""
    return task
