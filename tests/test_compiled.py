"""Where compiled programs are kept, and where not; a kept program gives the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from celo_nnx import cli
from celo_nnx.compiled import keep_compiled

PROGRAM = """
import sys, jax, jax.numpy as jnp, numpy as np
from celo_nnx.compiled import keep_compiled
keep_compiled()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("/cache_hits")))
wave = jax.jit(lambda x: jnp.sum(jnp.sin(x) @ jnp.cos(x).T, 0))
print(np.asarray(wave(jnp.arange(64.0).reshape(8, 8))).tobytes().hex(), sum(hits) > 0)
"""


@pytest.fixture
def unset():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def run(cache: Path) -> tuple[list[str], str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
    environment["CELO_NNX_CACHE"] = str(cache)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout.split(), done.stderr


def test_the_second_process_takes_what_the_first_compiled_and_gets_the_same_bits(tmp_path):
    (first, hit), _ = run(tmp_path)
    (second, again), _ = run(tmp_path)
    assert (hit, again) == ("False", "True") and first == second
    kept = list((tmp_path / "compiled").glob("*/*"))
    assert kept
    for file in kept:
        file.write_bytes(file.read_bytes()[:100])  # as a kill in the middle of a write leaves it
    (third, hit), said = run(tmp_path)
    assert hit == "False" and third == first and "Error reading persistent compilation cache" in said


def test_the_folder_is_the_users_alone(tmp_path, unset):
    before = os.umask(0o002)  # as where every user has a group of the same name
    try:
        folder = keep_compiled({"CELO_NNX_CACHE": str(tmp_path / "new")})
    finally:
        os.umask(before)
    assert folder is not None and folder.parent == tmp_path / "new" / "compiled"
    assert all(path.stat().st_mode & 0o077 == 0 for path in (folder, folder.parent))
    assert jax.config.jax_compilation_cache_dir == str(folder)


def test_the_users_own_setting_stands(tmp_path, unset):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    assert keep_compiled({"CELO_NNX_CACHE": str(tmp_path)}) is None
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    assert not (tmp_path / "compiled").exists()


@pytest.mark.parametrize("where", ["compiled", "machine"])
def test_a_folder_that_others_can_write_is_not_read(tmp_path, unset, where):
    folder = keep_compiled({"CELO_NNX_CACHE": str(tmp_path)})
    jax.config.update("jax_compilation_cache_dir", None)
    (folder if where == "machine" else folder.parent).chmod(0o777)
    assert keep_compiled({"CELO_NNX_CACHE": str(tmp_path)}) is None
    assert jax.config.jax_compilation_cache_dir is None


def test_a_link_or_a_file_in_its_place_is_no_cache(tmp_path, unset):
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "compiled").symlink_to(other)
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "compiled").write_text("")
    for name in ("linked", "blocked"):
        assert keep_compiled({"CELO_NNX_CACHE": str(tmp_path / name)}) is None
    assert jax.config.jax_compilation_cache_dir is None


def test_a_cell_of_a_grid_keeps_them_before_it_compiles(monkeypatch, capsys):
    done = []
    monkeypatch.setattr("celo_nnx.compiled.keep_compiled", lambda: done.append("kept"))
    monkeypatch.setattr("celo_nnx.grids.work.run_cell", lambda *_, **__: done.append("ran") or "done")
    assert cli.main(["grid", "cell", "runs/grid/cells/0123456789ab"]) == 0
    assert done == ["kept", "ran"] and '"state": "done"' in capsys.readouterr().out
