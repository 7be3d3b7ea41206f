"""Checks of the values that a recording gives: each maps (name, value) to the value, or raises UserError."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from celo_nnx.errors import UserError, is_integer, is_number, require

Check = Callable[[str, Any], Any]


def number(low: float, high: float) -> Check:
    """A number from ``low`` to ``high``."""

    def check(name: str, value: Any) -> float:
        fits = is_number(value) and low <= value <= high
        require(fits, name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    return check


def integer(low: int, high: int) -> Check:
    """An integer from ``low`` to ``high``."""

    def check(name: str, value: Any) -> int:
        fits = is_integer(value) and low <= value <= high
        require(fits, name, value, f"an integer from {low} to {high}")
        return value

    return check


def boolean(name: str, value: Any) -> bool:
    """True or false."""
    require(isinstance(value, bool), name, value, "true or false")
    return value


def never(name: str, value: Any) -> bool:
    """False, where the published code has no other case that works."""
    require(value is False, name, value, "false")
    return value


def numbers(low: float, high: float, least: int, most: int) -> Check:
    """A list of ``least`` to ``most`` numbers, each from ``low`` to ``high``."""

    def check(name: str, value: Any) -> tuple[float, ...]:
        fits = isinstance(value, list | tuple) and least <= len(value) <= most
        count = str(least) if least == most else f"{least} to {most}"
        require(fits, name, value, f"a list of {count} numbers")
        return tuple(number(low, high)(name, x) for x in value)

    return check


def optional(check: Check) -> Check:
    """What another check takes, or null."""
    return lambda name, value: None if value is None else check(name, value)


def text(name: str, value: Any) -> str:
    """A short text; null counts as empty."""
    require(value is None or isinstance(value, str) and len(value) < 200, name, value, "a short text")
    return value or ""


def choice(*legal: str) -> Check:
    """One of a few words."""

    def check(name: str, value: Any) -> str:
        require(value in legal, name, value, " or ".join(map(repr, legal)))
        return value

    return check


def found(where: str, pattern: str, path: str) -> bool:
    """Returns whether a regular expression of the field ``regex_1d`` is found in a path."""
    try:
        return re.search(pattern, path) is not None
    except re.error as error:
        raise UserError(f"{where}: regex_1d = {pattern!r} is no regular expression: {error}") from None
