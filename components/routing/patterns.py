"""Routing by path, rank and name. Paths are keys joined by ``/``; ``"learned"`` is the learned rule."""

from __future__ import annotations

import re

from celo_nnx.errors import UserError
from celo_nnx.interfaces import Routing

LEARNED = "learned"


class SingleRoute(Routing):
    """Every tensor takes one route.

    Args:
      route: the route's name.

    Example:
      >>> SingleRoute()("layer/bias", (3,))
      'learned'
    """

    def __init__(self, *, route: str = LEARNED) -> None:
        self.route = str(route)

    def __call__(self, path: str, shape: tuple[int, ...]) -> str:
        return self.route


class Regex(Routing):
    """A tensor takes ``route`` where the pattern is found anywhere in its path (OPTIMIZERS section 5).

    Args:
      pattern: a regular expression; empty matches nothing. ``/b$`` is the published one of Celo2. One that
        is found in no tensor is an error at init.
      route: where a match goes.

    Raises:
      UserError: the pattern is not a regular expression.

    Example:
      >>> rule = Regex(pattern="/b$", route="adam")
      >>> rule("linear_0/b", (3,)), rule("b", (3,))
      ('adam', 'learned')
    """

    def __init__(self, *, pattern: str = "/b$", route: str = "adam") -> None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"pattern {pattern!r} is not a regular expression: {error}") from None
        self.pattern, self.route = str(pattern), str(route)
        self.patterns = (self.pattern,) if pattern else ()

    def __call__(self, path: str, shape: tuple[int, ...]) -> str:
        return self.route if self.pattern and re.search(self.pattern, path) else LEARNED


class Celo2Routing(Routing):
    """Rank 0 and 1, biases, normalization scales and embeddings go to ``route``; matrices are learned.

    Biases and scales go by name as well as by rank: an attention bias has rank 2, and so has a layer
    norm's scale in a stack of layers.

    Args:
      route: where they go.
      names: a regular expression searched in each path, upper and lower case alike.

    Example:
      >>> rule = Celo2Routing()
      >>> rule("attention/query/bias", (4, 8)), rule("embed/embedding", (9, 8)), rule("mlp/kernel", (8, 8))
      ('adam', 'adam', 'learned')
    """

    def __init__(
        self,
        *,
        route: str = "adam",
        names: str = r"(^|/)(b|bias|scale|offset)$|(^|/|_)(embed|embedding|wte|wpe)",
    ) -> None:
        try:
            re.compile(names)
        except re.error as error:
            raise UserError(f"names {names!r} is not a regular expression: {error}") from None
        self.route, self.names = str(route), str(names)

    def __call__(self, path: str, shape: tuple[int, ...]) -> str:
        if len(shape) < 2 or re.search(self.names, path, re.IGNORECASE):
            return self.route
        return LEARNED


class Table(Routing):
    """The route of every tensor, spelt out: a replay takes it from its file.

    Args:
      table: pairs (path, route).

    Raises:
      UserError: at init, for a tensor that the table does not name.

    Example:
      >>> Table(table=(("w", "learned"),))("w", (2, 2))
      'learned'
    """

    def __init__(self, *, table: tuple[tuple[str, str], ...] = ()) -> None:
        self.table = tuple((str(p), str(r)) for p, r in table)

    def __call__(self, path: str, shape: tuple[int, ...]) -> str:
        routes = dict(self.table)
        if path not in routes:
            raise UserError(f"the routing table does not name the tensor {path!r}")
        return routes[path]
