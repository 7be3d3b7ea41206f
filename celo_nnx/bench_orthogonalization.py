"""Error and cost of the orthogonalizations, one row for each part, setting and shape.

Costs are comparable within one run on a quiet machine; errors do not depend on the machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from celo_nnx.components.orthogonalization import ORTHOGONALIZATIONS
from celo_nnx.components.orthogonalization.svd import SVD
from celo_nnx.interfaces import Orthogonalization, TensorSpec

REPEATS = 15
SHAPES = ((256, 256), (256, 1024), (864, 216), (9, 32, 32))
SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("newton_schulz", {}),  # the first is what ratios refer to
    ("newton_schulz", {"gram": True}),
    ("newton_schulz", {"dtype": "bfloat16"}),
    ("newton_schulz", {"steps": 8}),
    ("newton_schulz", {"coefficients": "polar_express"}),
    ("newton_schulz", {"coefficients": "polar_express", "gram": True}),
    ("newton_schulz", {"coefficients": "polar_express", "dtype": "bfloat16"}),
    ("newton_schulz", {"coefficients": "polar_express", "steps": 8}),
    ("newton_schulz", {"coefficients": "polar_express", "steps": 8, "gram": True}),
    ("newton_schulz", {"coefficients": "cubic"}),
    ("newton_schulz", {"coefficients": "cubic", "steps": 12}),
    ("svd", {}),
    ("axis_normalized", {"axes": "rows"}),
    ("axis_normalized", {"axes": "columns"}),
    ("axis_normalized", {"axes": "both"}),
    ("identity", {}),
)


def spectra(shape: tuple[int, ...], seed: int = 0) -> dict[str, np.ndarray]:
    """Returns float32 matrices (the last two axes) to orthogonalize: ``gaussian`` and ``decaying``.

    ``decaying`` has the singular vectors of ``gaussian`` and the singular values ``10^(-3 i / n)``,
    ``i = 0 .. n-1``.

    Example:
      >>> x = spectra((4, 6))["decaying"]
      >>> np.linalg.svd(x, compute_uv=False).round(4)
      array([1.    , 0.1778, 0.0316, 0.0056], dtype=float32)
    """
    x = np.random.default_rng(seed).normal(size=shape)
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    n = u.shape[-1]
    decaying = (u * 10.0 ** (-3 * np.arange(n) / n)) @ vt
    return {"gaussian": x.astype(np.float32), "decaying": decaying.astype(np.float32)}


def polar_factor(x: np.ndarray) -> np.ndarray:
    """Returns ``U V^T`` of ``x = U S V^T``, float64."""
    u, _, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    return u @ vt


def errors(result: np.ndarray, polar: np.ndarray) -> dict[str, float]:
    """Compares a result Y with a polar factor P.

    Returns:
      ``distance`` ``|Y - P| / |P|`` (Frobenius); ``angle`` between the two in radians, about the distance
      but for a common factor, which output normalization takes out; ``sv_min, sv_max``, Y's singular values.

    Example:
      >>> {name: round(error, 6) for name, error in errors(3 * np.eye(2), np.eye(2)).items()}
      {'distance': 2.0, 'angle': 0.0, 'sv_min': 3.0, 'sv_max': 3.0}
    """
    y, size = np.asarray(result, np.float64), np.linalg.norm(polar)
    singular = np.linalg.svd(y, compute_uv=False)
    along = np.sum(y * polar) / size
    across = np.linalg.norm(y - along * polar / size)
    return {
        "distance": float(np.linalg.norm(y - polar) / size),
        "angle": float(np.arctan2(across, along)),
        "sv_min": float(singular.min()),
        "sv_max": float(singular.max()),
    }


def orthogonalization(
    shapes: Sequence[tuple[int, ...]] = SHAPES, repeats: int = REPEATS
) -> Iterator[dict[str, Any]]:
    """Measures every part and setting on every shape.

    The settings take turns, so that a machine that slows down slows all of them.

    Args:
      shapes: the last two axes are the matrix.
      repeats: timed calls of each.

    Yields:
      A row for each: ``part, settings, shape, ms_median, ratio`` (to the first setting, ``newton_schulz``
      as it is by default), and what :func:`errors` returns, as ``distance_gaussian`` and so on.
    """
    for shape in shapes:
        pairs = {name: (x, polar_factor(x)) for name, x in spectra(shape).items()}
        cells = [_Cell(ORTHOGONALIZATIONS[name](**settings), pairs) for name, settings in SETTINGS]
        turns = [cell for cell in cells if not isinstance(cell.part, SVD)]
        # LAPACK's threads spin for a while after a call, at the cost of whatever comes next: svd comes last.
        for group in (turns, [cell for cell in cells if cell not in turns]):
            for _ in range(repeats):
                for cell in group:
                    cell.time()
        medians = [statistics.median(cell.times) for cell in cells]
        for (name, settings), cell, median in zip(SETTINGS, cells, medians, strict=True):
            yield {
                "part": name,
                "settings": settings,
                "shape": list(shape),
                "ms_median": round(median * 1e3, 3),
                "ratio": round(median / medians[0], 2),
                **cell.errors,
            }


class _Cell:
    """One compiled part on one shape: its errors, and the seconds of each call on the Gaussian matrix."""

    def __init__(self, part: Orthogonalization, pairs: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        self.part = part
        self.x = jnp.asarray(pairs["gaussian"][0])
        rank = self.x.ndim
        spec = TensorSpec("w", self.x.shape, (rank - 2, rank - 1), None)
        self.run = jax.jit(lambda x: part(x, spec))
        self.errors = {
            f"{key}_{name}": float(f"{value:.3g}")
            for name, (x, polar) in pairs.items()
            for key, value in errors(np.asarray(self.run(x)), polar).items()
        }
        self.times: list[float] = []

    def time(self) -> None:
        """Times one call to its end."""
        start = time.perf_counter()
        self.run(self.x).block_until_ready()
        self.times.append(time.perf_counter() - start)
