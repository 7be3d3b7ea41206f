"""Width multipliers of muP, as muLO applies them to a learned optimizer."""

from __future__ import annotations

import re

from celo_nnx.errors import UserError, require
from celo_nnx.interfaces import RateScale


class One(RateScale):
    """The same learning rate for every tensor."""

    def __call__(self, path: str, shape: tuple[int, ...]) -> float:
        return 1.0


class WidthMultipliers(RateScale):
    """Divides the learning rate of matrices whose two sides grow with the width (OPTIMIZERS section 13).

    Args:
      multipliers: rows (pattern, width multiplier): for tensors of rank 2 or more whose path the regular
        expression is found in, width over base width, above 0; the first match counts. Leave out input and
        output layers and embeddings, which have one infinite axis.

    Raises:
      UserError: a pattern that is not a regular expression, or a multiplier that is not above 0.

    Example:
      >>> WidthMultipliers(multipliers=(("hidden", 4.0),))("hidden/kernel", (256, 256))
      0.25
    """

    def __init__(self, *, multipliers: tuple[tuple[str, float], ...] = ()) -> None:
        for row in multipliers:
            good = len(row) == 2 and isinstance(row[0], str) and row[1] > 0
            require(good, "multipliers", row, "rows of (pattern, number above 0)")
            try:
                re.compile(row[0])
            except re.error as error:
                raise UserError(f"multipliers: {row[0]!r} is not a regular expression: {error}") from None
        self.multipliers = tuple((str(p), float(m)) for p, m in multipliers)
        self.patterns = tuple(p for p, _ in self.multipliers)

    def __call__(self, path: str, shape: tuple[int, ...]) -> float:
        if len(shape) < 2:
            return 1.0
        return next((1.0 / m for p, m in self.multipliers if re.search(p, path)), 1.0)
