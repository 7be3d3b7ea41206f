"""Made-up trees of the published layouts, of the released sizes unless others are given."""

from __future__ import annotations

from typing import Any

import numpy as np

from celo_nnx.pretrained import layouts

Tree = dict[tuple[str, ...], np.ndarray]

_COMMON = dict(M=3, R=1, A=3, C=64)
RELEASED = dict(
    celo2=dict(H=8),
    celo=dict(K=1, H=4, F=18),
    celo_adam=dict(F=18),
    velo=dict(K=32, H=4, F=30),  # velo_s
    rnn_mlp=dict(H=32, D=5, E=17, S=18, O=16),
    adafac_mlp=dict(H=4),
    nn_adam=dict(),
)


def tree(layout: str, sizes: dict[str, int] | None = None, **options: Any) -> Tree:
    """Consecutive integers in float32, so that no two entries are equal."""
    letters, start, out = _COMMON | RELEASED[layout] | (sizes or {}), 0, {}
    for leaf in layouts.leaves(layout, **options):
        shape = [layouts.size(dim, letters) for dim in leaf.dims]
        size = int(np.prod(shape, dtype=int))
        out[leaf.path] = np.arange(start, start + size, dtype=np.float32).reshape(shape)
        start += size
    return out


def joined(tree: Tree) -> dict[str, np.ndarray]:
    """Keys joined by ``/``."""
    return {"/".join(path): array for path, array in tree.items()}


def same(a: dict[Any, np.ndarray], b: dict[Any, np.ndarray]) -> bool:
    """Equal names, dtypes, shapes and bytes."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes() for k in a
    )
