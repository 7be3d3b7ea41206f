"""Fixtures shared by all tests: one device, a private cache, and the optional shared material."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

import jax
import pytest

jax.devices()  # starts the backend as it is, so that no test's choice of host devices reaches the others
sys.path.insert(0, str(Path(__file__).parent))  # stand-ins that several test files share


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drills last for minutes, so they run only when they are asked for by name."""
    asked = "drill" in (config.getoption("markexpr") or "") or os.environ.get("CELO_NNX_DRILLS") == "1"
    if asked:
        return
    for item in items:
        if item.get_closest_marker("drill"):
            item.add_marker(pytest.mark.skip(reason="a drill of minutes: pytest -m drill"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of recorded trajectories and data sets, beside the checkout; skips without it."""
    root = os.environ.get("CELO_NNX_SHARED")
    path = Path(root) if root else Path(__file__).resolve().parents[2] / "shared"
    if not (path / "golden").is_dir():
        pytest.skip(f"no recorded material at {path} (set CELO_NNX_SHARED)")
    return path


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps prepared data sets of the tests out of the user's cache."""
    monkeypatch.setenv("CELO_NNX_CACHE", str(tmp_path_factory.getbasetemp() / "celo_nnx_cache"))
    monkeypatch.delenv("CELO_NNX_DATA", raising=False)


@pytest.fixture(scope="session")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A run of the real trainer at the smallest sizes: folder, stdout, stderr of ``celo-nnx train``."""
    from celo_nnx.cli import main

    folder = tmp_path_factory.mktemp("real") / "it's"
    few = "meta.estimator.pairs=2 meta.estimator.truncation=2 run.iterations_per_dispatch=2 tasks.hidden=(4,)"
    few += " tasks.batch_size=4 run.devices=1 optimizer.update_rule.hidden=(2,2) run.iterations=3"
    few += " optimizer.features.groups=('gradient','momentum')"  # for a quick compilation
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setenv("CELO_NNX_CACHE", str(tmp_path_factory.getbasetemp() / "celo_nnx_cache"))
        assert main(["train", "celo2_base:fast_digits", *few.split(), "--run-dir", str(folder)]) == 0
    return folder, out.getvalue(), err.getvalue()
