"""Fixtures shared by all tests: one device, a private cache, and the optional shared material."""

from __future__ import annotations

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
