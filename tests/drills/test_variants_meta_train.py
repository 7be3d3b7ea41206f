"""Every variant meta-trains: 200 short meta-iterations on digits leave theta finite and changed."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from celo_nnx.config import load, presets
from celo_nnx.theta_io import load_theta
from celo_nnx.training import assemble, train

SHORT = [
    "meta.estimator.pairs=2",
    "meta.estimator.truncation=5",
    "meta.unroll.minimum=10",
    "meta.unroll.maximum=40",
    "meta.optimizer.learning_rate=1e-3",
    "run.iterations=200",
    "run.iterations_per_dispatch=50",
    "run.devices=1",
    "run.progress=False",
]
# The large VeLO differs from velo_s in two numbers, and takes minutes to draw perturbations for.
VARIANTS = [name for name, (_, whole) in presets().items() if whole and name != "velo"]


@pytest.mark.drill
@pytest.mark.parametrize("variant", VARIANTS)
def test_theta_stays_finite(variant: str, tmp_path: Path) -> None:
    config = load(f"{variant}:fast_digits", SHORT)
    result = train(config, tmp_path / variant)
    assert result.finished and result.iteration == 200
    start = assemble(config, 1).trainer.optimizer.theta
    theta = load_theta(tmp_path / variant, like=start)
    pairs = zip(jax.tree.leaves(theta), jax.tree.leaves(start), strict=True)
    moved = [(np.isfinite(x).all(), np.abs(x - y).max()) for x, y in pairs]
    assert all(finite for finite, _ in moved) and max(size for _, size in moved) > 1e-3
