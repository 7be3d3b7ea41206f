"""The one exception that a user's mistake raises, the wording that messages share, checks of numbers."""

from __future__ import annotations

import contextlib
import difflib
import sysconfig
import traceback
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

LARGEST_FLOAT = float.fromhex("0x1.fffffep+127")  # of float32
MOST_WIDTH = 4096


class UserError(Exception):
    """A mistake of the caller, told in one line; the command line prints it and exits with code 2."""


class MissingData(UserError):
    """Data that a name stands for are nowhere to be found; everything else may be right."""


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """An error for a misspelt name: says which names exist and which is nearest.

    Args:
      what: the kind of thing that was looked up, such as ``"feature"``.
      name: the name that was not found.
      known: every accepted name.

    Returns:
      The error, to be raised by the caller.

    Example:
      >>> str(unknown("part", "momentun", ["momentum", "factored"]))
      "unknown part 'momentun' (did you mean 'momentum'?); known: factored, momentum"
    """
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return UserError(f"unknown {what} {name!r}{hint}; known: {', '.join(known)}")


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Tells an error in code that the caller wrote in one line, with the line of it where there is one.

    Args:
      what: what the code is, such as ``"the loss"``.

    Raises:
      UserError: in the place of any other exception, which is its cause; of ``sys.exit()`` too.

    Example:
      >>> with told("the loss"):
      ...     1 / 0
      Traceback (most recent call last):
      celo_nnx.errors.UserError: the loss failed: ZeroDivisionError: division by zero
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        message = str(error).strip().split("\n")[0]
        raise UserError(f"{what} failed: {type(error).__name__}: {message}{_own_line(error)}") from error


def _own_line(error: BaseException) -> str:
    """Returns the innermost line of an error that lies in no installed package, in brackets, or nothing."""
    paths = sysconfig.get_paths()
    installed = (str(Path(__file__).parent), paths["stdlib"], paths["purelib"], paths["platlib"])
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).is_file() and not frame.filename.startswith(installed):
            return f" ({frame.filename}, line {frame.lineno})"
    return ""


def require(condition: bool, name: str, value: object, legal: str) -> None:
    """Raises a :class:`UserError` that names the value and its legal range unless ``condition`` holds.

    Example:
      >>> require(5 > 0, "steps", 5, "an integer >= 1")
    """
    if not condition:
        raise UserError(f"{name} = {value!r} is out of range: must be {legal}")


def require_section(name: str, value: object) -> None:
    """Raises a :class:`UserError` unless a value of a config is a section, with keys of its own.

    Example:
      >>> require_section("meta.unroll", {"kind": "never"})
    """
    if not hasattr(value, "items"):
        raise UserError(f"{name} = {value!r} must be a section with keys of its own")


def is_name(value: object, table: Container[str]) -> bool:
    """Tells whether a value is a text that a table knows; one that cannot be looked up is none.

    Example:
      >>> is_name("pes", {"pes": 1}), is_name([], {"pes": 1})
      (True, False)
    """
    return isinstance(value, str) and value in table


def is_integer(value: object) -> bool:
    """Tells whether a value is an integer; a bool is none.

    Example:
      >>> is_integer(-3), is_integer(True), is_integer(3.0)
      (True, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool)


def is_count(value: object) -> bool:
    """Tells whether a value is an integer of at least 1 that fits in int32.

    Example:
      >>> is_count(1), is_count(0), is_count(2**31)
      (True, False, False)
    """
    return is_integer(value) and 1 <= value < 2**31


def is_width(value: object, least: int = 1) -> bool:
    """Tells whether a value is a size of a learned layer: a matrix of two such is no more than 64 MB.

    Example:
      >>> is_width(512), is_width(0), is_width(0, least=0), is_width(10**6)
      (True, False, True, False)
    """
    return is_integer(value) and least <= value <= MOST_WIDTH


def is_number(value: object) -> bool:
    """Tells whether a value is a real number that is finite in float32; a bool is none.

    Example:
      >>> is_number(0.5), is_number(2), is_number(float("inf")), is_number(True)
      (True, True, False, False)
    """
    real = isinstance(value, float) or is_integer(value)
    return real and abs(value) <= LARGEST_FLOAT  # math.isfinite fails on a large integer


def printable(text: str) -> str:
    """Returns a text without what a terminal or an XML file would take amiss.

    Example:
      >>> printable("a b"), printable("a\\x1b")
      ('a b', "'a\\\\x1b'")
    """
    return text if text.isprintable() and text else repr(text)
