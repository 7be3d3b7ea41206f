"""Fixtures shared by all tests: one device, quick compilation, a private cache, the optional shared material.

Compilation is most of the tests' time, and most of that is LLVM's work on programs that run for milliseconds.
So tests, and the processes that they start, compile without it: the HLO passes are the same, and rounding may
differ in the last place. Tests that ask for ``users_compiler``, and drills, compile as users do;
``CELO_NNX_DRILLS=1`` compiles all so.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # stand-ins that several test files share

QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
AS_USERS = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}


def drills_asked(config: pytest.Config) -> bool:
    return "drill" in (config.getoption("markexpr") or "") or os.environ.get("CELO_NNX_DRILLS") == "1"


def pytest_configure(config: pytest.Config) -> None:
    flags = os.environ.get("XLA_FLAGS", "")
    if not drills_asked(config) and QUICK not in flags:  # a worker of xdist has them from its parent
        os.environ["XLA_FLAGS"] = f"{QUICK} {flags}".strip()
    jax.devices()  # starts the backend as it is, so that no test's choice of host devices reaches the others


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drills last for minutes, so they run only when they are asked for by name."""
    if drills_asked(config):
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


@pytest.fixture
def users_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is jitted during the test, by it or by the package, is compiled as it is for users."""
    jit = jax.jit

    @functools.wraps(jit)
    def as_users(*arguments, compiler_options=None, **options):
        return jit(*arguments, compiler_options=AS_USERS | (compiler_options or {}), **options)

    monkeypatch.setattr(jax, "jit", as_users)


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
