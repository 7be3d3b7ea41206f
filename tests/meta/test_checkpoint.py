"""Checkpoints: exact round trip, and every kind of damage told in one line with nothing changed."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from celo_nnx.errors import UserError
from celo_nnx.meta import checkpoint


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


RECORD = {"config": {"seed": 0}, "versions": {"jax": "x"}}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path / "c", step, make_state(step), RECORD, keep=2)
    return tmp_path / "c"


def test_round_trip_is_exact_and_keeps_the_newest(saved: Path) -> None:
    assert checkpoint.steps(saved) == [2, 3]
    step, state, record = checkpoint.load(saved, make_state())
    assert step == 3 and record == RECORD
    assert jax.tree.structure(state) == jax.tree.structure(make_state())
    want, got = checkpoint.to_host(make_state(3)), checkpoint.to_host(state)
    for name in want:
        assert want[name].dtype == got[name].dtype
        assert want[name].tobytes() == got[name].tobytes(), name
    np.testing.assert_array_equal(
        jax.random.normal(state["key"][0], (3,)), jax.random.normal(make_state(3)["key"][0], (3,))
    )


def test_nothing_to_load(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path / "none", make_state()) is None


def _refused(folder: Path, match: str, like: dict | None = None) -> str:
    before = tree_bytes(folder)
    with pytest.raises(UserError, match=match) as caught:
        checkpoint.load(folder, like or make_state())
    assert "\n" not in str(caught.value)
    assert tree_bytes(folder) == before
    return str(caught.value)


def _data_files(step: Path) -> list[Path]:
    return sorted(p for p in step.rglob("*") if p.is_file() and p.parent.name == "d")


def _refused_or_exact(folder: Path) -> bool:
    """A damaged byte is told, or no reader looks at it and what was read is exact."""
    try:
        _, state, record = checkpoint.load(folder, make_state())
    except UserError as error:
        assert "to go on from step 2, which is intact" in str(error) and "\n" not in str(error)
        return True
    want = checkpoint.to_host(make_state(3))
    assert checkpoint.digest(checkpoint.to_host(state), record) == checkpoint.digest(want, RECORD)
    return False


def test_every_flipped_bit_is_found(saved: Path) -> None:
    rng = np.random.default_rng(0)
    refused = 0
    for file in _data_files(saved / "3"):
        whole = file.read_bytes()
        for place in rng.integers(0, len(whole), 3):
            broken = bytearray(whole)
            broken[place] ^= 1 << int(rng.integers(8))
            file.write_bytes(broken)
            refused += _refused_or_exact(saved)
        file.write_bytes(whole)
    assert refused
    assert checkpoint.load(saved, make_state())[0] == 3


def test_truncated(saved: Path) -> None:
    refused = []
    for file in sorted(p for p in (saved / "3").rglob("*") if p.is_file() and p.stat().st_size):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        if _refused_or_exact(saved):
            refused.append(str(file.relative_to(saved / "3")))
        file.write_bytes(whole)
    assert {"_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt"} <= set(refused)


def test_a_missing_file(saved: Path) -> None:
    (saved / "3" / "_CHECKPOINT_METADATA").unlink()
    _refused(saved, "checkpoint .*3 (cannot be read|is not one of)")


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
    _refused(saved, "damaged: its contents do not match its digest")


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
