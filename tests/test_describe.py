"""The description of an optimizer: its table, its picture, and the meta-parameters without effect."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import jax
import numpy as np
import pytest

from celo_nnx.build import GROUPS, SLOTS, build
from celo_nnx.cli import main
from celo_nnx.config import load, presets
from celo_nnx.dead import find_dead
from celo_nnx.description import describe

VARIANTS = [name for name, (_, whole) in presets().items() if whole and name != "velo"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_has_a_table_of_its_parts(variant: str) -> None:
    optimizer = build(load(variant).optimizer)
    text = describe(optimizer)
    assert max(len(line) for line in text.splitlines()) <= 100
    for slot in (*SLOTS, *GROUPS, "features"):
        assert any(line.startswith(slot) for line in text.splitlines()), slot
    count = sum(x.size for x in jax.tree.leaves(optimizer.theta))
    assert f"meta-parameters: {count:,}" in text


def test_the_picture_is_well_formed_and_names_every_slot(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "celo.svg"
    assert main(["describe", "celo", "--svg", str(file)]) == 0
    words = " ".join(ET.parse(file).getroot().itertext())
    for slot in (*SLOTS, *GROUPS, "features"):
        assert slot in words, slot
    assert main(["describe", "celo", "--svg", str(file)]) == 2
    assert "celo.svg" in capsys.readouterr().err


def test_a_models_routing_table_from_its_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from safetensors.numpy import save_file

    arrays = {"conv.kernel": np.zeros((3, 3, 8, 16), np.float32), "conv.bias": np.zeros(16, np.float32)}
    save_file(arrays, tmp_path / "model.safetensors")
    assert main(["describe", "celo2", "--params", str(tmp_path / "model.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "rows 0,1,2 x columns 3" in out and "elementwise" in out
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 64)
    assert main(["describe", "celo2", "--params", str(tmp_path / "broken.safetensors")]) == 2
    assert json.dumps(capsys.readouterr().err).count("\\n") == 1


def found(variant: str, *overrides: str) -> dict[str, int]:
    return {dead.where: dead.count for dead in find_dead(build(load(variant, overrides).optimizer))}


def test_celo2_has_18_meta_parameters_without_effect() -> None:
    assert found("celo2_base") == {"update_rule/b2[1:]": 2, "update_rule/w2[:, 1:]": 16}


@pytest.mark.drill
def test_magnitude_comes_alive_with_exp_mult() -> None:
    assert sum(found("celo2_base", "optimizer.step.exp_mult=0.001").values()) == 9


@pytest.mark.drill
def test_celo_has_a_dead_layer_an_unused_output_and_controls_of_one() -> None:
    dead = found("celo")
    assert sum(n for where, n in dead.items() if where.startswith("schedule/mix/dead")) == 1216
    assert sum(n for where, n in dead.items() if where.startswith("update_rule")) == 5
    assert sum(n for where, n in dead.items() if where.startswith("schedule/controls")) == 65
    assert sum(dead.values()) == 1216 + 5 + 65
