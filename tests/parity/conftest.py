"""Recorded trajectories are followed by programs that are compiled as users' are."""

import pytest


@pytest.fixture(autouse=True)
def as_users(request: pytest.FixtureRequest) -> None:
    if "shared" in request.fixturenames:
        request.getfixturevalue("users_compiler")
