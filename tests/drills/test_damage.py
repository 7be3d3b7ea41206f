"""The drill: a real run's newest checkpoint, every file cut off at each sixteenth and with flipped bits."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import damage
import jax
import pytest
from ml_collections import ConfigDict

from celo_nnx import training
from celo_nnx.meta import checkpoint

FLIPS = 64  # of each file


@pytest.mark.drill
@pytest.mark.parametrize("named", [True, False], ids=["manifest", "no_manifest"])
def test_no_damage_is_read_as_something_else(
    real_run: tuple[Path, str, str], tmp_path: Path, named: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(real_run[0] / "checkpoints", folder)
    config = ConfigDict(json.loads((real_run[0] / "config.json").read_text()))
    trainer = training.assemble(config, 1, resumed=True).trainer
    shapes = jax.eval_shape(trainer.init, jax.random.key(0))
    seed = int(os.environ.get("CELO_NNX_DRILL_SEED", "0"))
    newest = folder / str(checkpoint.steps(folder)[-1])
    files = sum(path.is_file() for path in newest.rglob("*"))
    cuts = list(range(damage.SHARES))
    counts = damage.sweep(folder, lambda _: shapes, cuts=cuts, flips=FLIPS, seed=seed, named=named)
    with capsys.disabled():
        what = f"{files} files with{'' if named else 'out'} the manifest"
        print(f"\n{what}, {damage.SHARES} cuts and {FLIPS} flips each: {dict(counts)}")
    assert counts["wrong"] == 0 and counts["refused"] > 0
    assert not named or counts["equal"] == 0 and counts["named"] == counts["refused"]
