"""The weights in the package train tasks of no suite and no recipe for 2,000 steps at their rate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from celo_nnx import weights
from celo_nnx.evaluation.contenders import contenders
from celo_nnx.evaluation.curves import train_runs
from celo_nnx.tasks import build_families, complete

COMMON = dict(normalizer_clip=1.5, validation=0.0)
DIGITS = dict(datasets=("digits",), image_size=8, grey=True, batch_size=16) | COMMON
SUMS = dict(datasets=("sums",), level="character", batch_size=8) | COMMON
TASKS: dict[str, dict[str, Any]] = {
    "deep narrow MLP": dict(kind="image_mlp", hidden=(16,) * 6, activation="tanh") | DIGITS,
    "wide MLP": dict(kind="image_mlp", hidden=(512,)) | DIGITS,
    "autoencoder of digits": dict(kind="image_autoencoder", hidden=(64, 8, 64)) | DIGITS,
    "patches of digits": dict(kind="vision_transformer", patch=4, width=16, depth=4, heads=2) | DIGITS,
    "long LSTM": dict(kind="recurrent_lm", cell="lstm", width=24, length=96) | SUMS,
    "Transformer without warm-up": dict(kind="transformer_lm", width=48, depth=3, heads=4, length=16) | SUMS,
    "ill-conditioned quadratic": dict(
        kind="quadratic", eigenvalues=(100.0, 10.0, 1.0, 0.1, 0.01, 0.001), columns=8, rotated=True
    ),
}


@pytest.mark.drill
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", weights.names())
def test_no_loss_is_infinite(name: str, task: str) -> None:
    contender = contenders([name])[1]
    rate = weights.card(name)["learning_rate"]["recommended"]
    (family,) = build_families(complete(TASKS[task]), "")
    make = contender.rule("constant", 2000)
    options = dict(learning_rates=[rate], seeds=[0, 1], steps=2000, context=contender.context)
    losses = train_runs(make, family.task, family.train, **options).losses
    assert np.isfinite(losses).all()
    assert losses[0, :, -100:].mean() < losses[0, :, :10].mean(), "it does not train"
