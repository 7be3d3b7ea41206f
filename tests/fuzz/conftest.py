"""What every fuzz test has: a tally of its examples, shown at its end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fuzzing import Tally


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """Counts and shows how the examples of a test end."""
    made = Tally(request.node.name)
    yield made
    made.show()
