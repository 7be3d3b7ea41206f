"""Checkpoints: exact round trip, and every kind of damage told in one line with nothing changed."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import damage
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from celo_nnx.errors import UserError
from celo_nnx.meta import checkpoint, manifest


def make_state(seed: int = 0, width: int = 4) -> dict:
    key = jax.random.key(seed)
    theta = {"mlp": {"w": jax.random.normal(key, (3, width)), "b": jnp.zeros((width,))}}
    return {
        "theta": theta,
        "meta_optimizer": optax.adamw(1e-3).init(theta),
        "estimator": {"problems": [jnp.arange(6.0).reshape(2, 3), jnp.array([True, False])]},
        "extra": {"half": jnp.ones((2,), jnp.bfloat16), "empty": jnp.zeros((0, 3))},
        "iteration": jnp.asarray(7, jnp.int32),
        "key": jax.random.split(key, 2),
    }


def tree_bytes(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def like(step: int) -> dict:
    return make_state()


RECORD = {"config": {"seed": 0}, "versions": {"jax": "x"}}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path / "c", step, make_state(step), RECORD, keep=2)
    return tmp_path / "c"


def test_round_trip_is_exact_and_keeps_the_newest(saved: Path) -> None:
    assert checkpoint.steps(saved) == [2, 3]
    step, state, record, refused = checkpoint.load(saved, like)
    assert step == 3 and record == RECORD and not refused
    assert jax.tree.structure(state) == jax.tree.structure(make_state())
    want, got = checkpoint.to_host(make_state(3)), checkpoint.to_host(state)
    for name in want:
        assert want[name].dtype == got[name].dtype
        assert want[name].tobytes() == got[name].tobytes(), name
    np.testing.assert_array_equal(
        jax.random.normal(state["key"][0], (3,)), jax.random.normal(make_state(3)["key"][0], (3,))
    )


def test_nothing_to_load(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path / "none", like) is None


def _refused(folder: Path, match: str, like: dict | None = None) -> str:
    """Neither step can be used; the newest one's reason is told."""
    before = tree_bytes(folder)
    with pytest.raises(UserError, match=match) as caught:
        checkpoint.load(folder, lambda _: like or make_state())
    assert "\n" not in str(caught.value) and str(caught.value).endswith("start a new run folder")
    assert tree_bytes(folder) == before
    return str(caught.value)


def _goes_back(folder: Path, match: str, **options: Any) -> None:
    """The newest step is refused and the one before is read; nothing is changed."""
    before = tree_bytes(folder)
    step, state, record, ((refused, reason),) = checkpoint.load(folder, like, **options)
    assert (step, refused) == (2, 3) and re.search(match, reason) and "\n" not in reason
    assert damage.bits(state) == damage.bits(make_state(2)) and record == RECORD
    assert tree_bytes(folder) == before


@pytest.mark.parametrize("named", [True, False], ids=["manifest", "no manifest"])
def test_damaged_files_are_refused_or_harmless(saved: Path, named: bool) -> None:
    """The full sweep is tests/drills/test_damage.py."""
    counts = damage.sweep(saved, like, cuts=[0, 9] if named else [9], flips=1, named=named)
    assert counts["wrong"] == 0 and counts["refused"] >= 5
    if named:
        assert counts["equal"] == 0 and counts["named"] == counts["refused"]


def test_a_missing_file(saved: Path) -> None:
    (saved / "3" / "_CHECKPOINT_METADATA").unlink()
    _goes_back(saved, "3/_CHECKPOINT_METADATA is missing")
    (saved / "3" / manifest.FILE_NAME).unlink()
    _goes_back(saved, "checkpoint .*3 (cannot be read|is not one of)")


def test_steps_without_a_manifest_and_with_files_of_others(saved: Path) -> None:
    (saved / "3" / "state" / ".DS_Store").write_bytes(b"of a file manager")
    assert checkpoint.load(saved, like).step == 3
    (saved / "3" / manifest.FILE_NAME).unlink()
    assert checkpoint.load(saved, like).step == 3


@pytest.mark.parametrize("text", ["[]", "{}", '{"files": {"a": 1}, "digest": "0"}', "[" * 10_000])
def test_a_manifest_of_something_else(saved: Path, text: str) -> None:
    (saved / "3" / manifest.FILE_NAME).write_text(text)
    _goes_back(saved, "3/files.json is (damaged|not readable JSON)")


def test_checkpoints_of_another_config_and_version(saved: Path, tmp_path: Path) -> None:
    def agrees(step: int, record: dict) -> None:
        if record["config"] != RECORD["config"]:
            raise UserError(f"step {step} has another config")

    checkpoint.save(tmp_path / "other", 3, make_state(3), RECORD | {"config": {"seed": 1}})
    checkpoint.save(tmp_path / "newer", 3, make_state(3), RECORD | {"versions": {"jax": "y"}})
    shutil.rmtree(saved / "3")
    shutil.copytree(tmp_path / "other" / "3", saved / "3")
    _goes_back(saved, "another config", check=agrees)
    shutil.rmtree(saved / "3")
    shutil.copytree(tmp_path / "newer" / "3", saved / "3")
    loaded = checkpoint.load(saved, like, agrees)
    assert loaded.step == 3 and damage.bits(loaded.state) == damage.bits(make_state(3))


def test_a_format_of_another_version(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(saved / "3")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", "celo_nnx.run/2")
        checkpoint.save(saved, 3, make_state(3), RECORD)
    _goes_back(saved, "not one of celo-nnx .no 'celo_nnx.run/1' record")


def test_set_aside(saved: Path) -> None:
    assert checkpoint.set_aside(saved, 3) == saved.parent / "damaged" / "3"
    assert checkpoint.steps(saved) == [2] and checkpoint.load(saved, like).step == 2


def test_empty_step_folder_and_no_intact_one(saved: Path) -> None:
    shutil.rmtree(saved / "2")
    shutil.rmtree(saved / "3")
    (saved / "3").mkdir()
    _refused(saved, "no older step can be used: start a new run folder")


def test_altered_record(saved: Path) -> None:
    file = saved / "3" / "_CHECKPOINT_METADATA"
    content = json.loads(file.read_text())
    content["custom_metadata"]["record"]["config"]["seed"] = 1
    file.write_text(json.dumps(content))
    _goes_back(saved, "_CHECKPOINT_METADATA is damaged: its SHA-256")
    (saved / "3" / manifest.FILE_NAME).unlink()
    _goes_back(saved, "damaged: its contents do not match its digest")


def test_foreign(tmp_path: Path) -> None:
    from orbax.checkpoint import v1 as ocp

    with ocp.training.Checkpointer(tmp_path / "c") as checkpointer:
        checkpointer.save_checkpointables(4, {"state": {"w": np.ones(3)}})
    _refused(tmp_path / "c", "not one of celo-nnx")


def test_other_tree_shape_dtype(saved: Path) -> None:
    _refused(saved, r"is float32\[4\], expected float32\[5\]", make_state(width=5))
    more = make_state()
    more["estimator"]["new"] = jnp.zeros(2)
    _refused(saved, "lacks 'estimator/new'", more)
    less = make_state()
    del less["estimator"]
    _refused(saved, "unknown leaf 'estimator/", less)
    other = make_state()
    other["theta"]["mlp"]["b"] = jnp.zeros((4,), jnp.bfloat16)
    _refused(saved, "expected bfloat16", other)


def test_digest_sees_path_dtype_shape_and_bytes() -> None:
    one = {"a": np.zeros((2, 3), np.float32)}
    others = [
        {"b": np.zeros((2, 3), np.float32)},
        {"a": np.zeros((2, 3), np.int32)},
        {"a": np.zeros((3, 2), np.float32)},
        {"a": np.full((2, 3), -0.0, np.float32)},
    ]
    digests = {checkpoint.digest(x, {}) for x in [one, *others]} | {checkpoint.digest(one, {"k": 1})}
    assert len(digests) == 6
