"""Recorded trajectories are followed by programs that are compiled as users' are, none from before."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def nothing_compiled_before() -> None:
    jax.clear_caches()


@pytest.fixture(autouse=True)
def as_users(request: pytest.FixtureRequest) -> None:
    if "shared" in request.fixturenames:
        request.getfixturevalue("users_compiler")
