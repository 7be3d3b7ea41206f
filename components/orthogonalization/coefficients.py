"""Coefficient sets of the Newton-Schulz iteration: odd quintics ``c0 s + c1 s^3 + c2 s^5``, one a step."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from celo_nnx.errors import require, unknown

Row = tuple[float, float, float]

QUINTIC: Row = (3.4445, -4.7750, 2.0315)

# The best odd quintics for singular values from 1e-3 to 1: each for the interval that the ones before it
# leave, or for the part of it above 0.02407327424182761 of its upper end if that is less.
_BEST: tuple[Row, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
_SAFETY = 1.01  # p(s / 1.01) for p: above its interval, where rounding may put s, p runs away

COEFFICIENTS: dict[str, tuple[Row, ...]] = {
    "celo2": (QUINTIC,),
    "muon": (QUINTIC,),
    "polar_express": (
        *((c0 / _SAFETY, c1 / _SAFETY**3, c2 / _SAFETY**5) for c0, c1, c2 in _BEST),
        (1.875, -1.25, 0.375),
    ),
    "cubic": ((1.5, -0.5, 0.0),),
}


def parse(coefficients: Any) -> tuple[str | tuple, tuple[Row, ...]]:
    """Reads the config key ``coefficients``.

    Args:
      coefficients: three numbers, rows of three numbers, or a name, also as a tuple of one name: that is
        what a name on the command line becomes where the value that it replaces is a tuple.

    Returns:
      (the same with a name as a string and numbers as floats; a row for each of the first steps).

    Raises:
      UserError: none of these.

    Example:
      >>> parse(("cubic",))
      ('cubic', ((1.5, -0.5, 0.0),))
      >>> parse((2, -1.5, 0.5))
      ((2.0, -1.5, 0.5), ((2.0, -1.5, 0.5),))
    """
    given = (coefficients,) if isinstance(coefficients, str) else coefficients
    legal = f"three numbers, rows of three numbers, or a name ({', '.join(COEFFICIENTS)})"
    require(isinstance(given, (tuple, list)) and len(given) > 0, "coefficients", coefficients, legal)
    if len(given) == 1 and isinstance(given[0], str):
        if given[0] not in COEFFICIENTS:
            raise unknown("coefficients", given[0], COEFFICIENTS)
        return given[0], COEFFICIENTS[given[0]]
    several = isinstance(given[0], (tuple, list))
    rows = given if several else (given,)
    for row in rows:
        good = isinstance(row, (tuple, list)) and len(row) == 3
        good = good and all(isinstance(c, Real) and math.isfinite(c) for c in row)
        require(good, "coefficients", coefficients, legal)
    rows = tuple(tuple(float(c) for c in row) for row in rows)
    return (rows if several else rows[0]), rows
