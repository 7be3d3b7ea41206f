"""What fuzzing shares: odd values and bytes, how many examples, and the property that all of it must have.

``CELO_NNX_FUZZ=1`` takes the judged numbers of examples, 10,000 configs and 2,000 files, and ``0.1`` a tenth;
``pytest -s`` shows what became of them.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from celo_nnx.errors import UserError

SHARE = float(os.environ.get("CELO_NNX_FUZZ", "0"))
PATIENCE, WAIT = 10.0, 600.0  # seconds of work, of waiting
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.truncate")

TEXTS = (
    *(
        "",
        " ",
        "none",
        "True",
        "false",
        "None",
        "nan",
        "inf",
        "-inf",
        "0",
        "1",
        "-1",
        "2",
        "0.5",
        "1e400",
        "1e-320",
    ),
    *("2147483648", "-2147483649", "99999999999999999999", "1" * 5000, "()", "(1,", "[1,2]", "(0,)", "(-1,)"),
    *(
        "{}",
        "{'a':1}",
        "{1:2}",
        "{'kind':'pes'}",
        "'x'",
        "lambda: 0",
        "__import__('os')",
        "(" * 300,
        "a" * 3000,
    ),
    *(
        "\x00",
        "\u202e",
        "a\nb",
        "../../x",
        "/proc/self",
        "('gradient','gradient')",
        "((1,2),(3,))",
        "b'x'",
        "1j",
    ),
    *("(1.5,)", "('a',)", "(None,)", "(True,)", "1,2", "~", "random", "file", "identity", "constant", "adam"),
)
VALUES = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, -(2**63) - 1, 10**30, 0.5, -0.5, 1e-320, 1e300, float("nan")),
    *(
        float("inf"),
        -float("inf"),
        "",
        "x",
        "none",
        "a" * 3000,
        "\x00",
        (),
        (0,),
        (-1,),
        (1, 2),
        ("a",),
        ((1,),),
    ),
    *(
        [],
        [1],
        ["x", 2],
        (None,),
        b"x",
        1j,
        {},
        {"a": 1},
        {"kind": "x"},
        {"kind": 3},
        {"kind": None},
        {"kind": []},
    ),
    *({1: 2}, frozenset({1}), object, len),
)
texts = st.one_of(st.sampled_from(TEXTS), st.text(max_size=12), st.integers().map(str), st.floats().map(str))
values = st.one_of(
    st.sampled_from(VALUES),
    st.integers(-3, 5),
    st.floats(),
    st.text(max_size=5),
    st.recursive(
        st.sampled_from(VALUES),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
        ),
        max_leaves=4,
    ),
)


def examples(few: int, judged: int) -> settings:
    """How many examples a test takes; the same ones each time."""
    return settings(
        max_examples=max(few, round(SHARE * judged)),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def misspelt(draw: Any, word: str) -> str:
    """A word with a letter less, more or changed, or twice; sometimes the word itself."""
    place = draw(st.integers(0, len(word)))
    letter = draw(st.sampled_from("abk_.0= \x00é"))
    return draw(
        st.sampled_from(
            (
                word,
                word[:place] + word[place + 1 :],
                word[:place] + letter + word[place:],
                word[:place] + letter + word[place + 1 :],
                word.upper(),
                f"{word}.{word}",
            )
        )
    )


def near(value: Any) -> st.SearchStrategy[Any]:
    """Values of the same type, legal and not."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.sampled_from((-1, 0, 1, 2, 3, value + 1, 2 * value, 10**6, 2**31, 2**70))
    if isinstance(value, float):
        return st.sampled_from((-1.0, -0.0, 1e-300, 1e-3, 0.5, 1.0, 1.5, 1e300, float("inf"), float("nan")))
    if isinstance(value, (tuple, list)):
        inner = near(value[0]) if value else st.sampled_from((-1, 0, 1, 0.5, "a", "(", ()))
        return st.lists(inner, max_size=3).map(type(value))
    return st.sampled_from(
        ("none", "file", "hand_made", "random", "rms", "uniform", "all", "a", "(", "\x00", "")
    )


@st.composite
def altered(draw: Any, tree: Any) -> Any:
    """Nested dicts and lists with values put in, keys lost, new or renamed; ``tree`` itself is left alone."""
    tree = copy.deepcopy(tree)
    # A value may be drawn again after it was altered here.
    fresh = lambda strategy: copy.deepcopy(draw(strategy))  # noqa: E731
    for _ in range(draw(st.sampled_from((0, 1, 1, 1, 2, 3)))):
        node, keys = tree, _keys(tree)
        while keys:
            key = draw(st.sampled_from(keys))
            keys = _keys(node[key]) if draw(st.integers(0, 3)) else []
            if keys:
                node = node[key]
        if not _keys(node):
            return tree
        kind = draw(st.sampled_from(("put", "put", "put", "drop", "add", "rename")))
        if kind == "put":
            node[key] = fresh(near(node[key]) if draw(st.booleans()) else values)
        elif isinstance(node, list):
            node[key:] = [] if kind == "drop" else [fresh(values), *node[key:]]
        elif kind == "add":
            node[draw(misspelt(str(key)))] = fresh(values)
        else:
            value = node.pop(key)
            if kind == "rename":
                node[draw(misspelt(str(key)))] = value
    return tree


def _keys(node: Any) -> list[Any]:
    return (
        sorted(node, key=str) if isinstance(node, dict) else [*range(len(node))] if type(node) is list else []
    )


@st.composite
def damaged(draw: Any, data: bytes) -> bytes:
    """Bytes of a file cut short, with bytes changed, taken out, put in, or doubled; sometimes whole."""
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        count = draw(st.sampled_from((1, 1, 2, 8, 100)))
        fresh = draw(st.binary(min_size=count, max_size=count))
        kind = draw(st.sampled_from(("cut", "change", "change", "flip", "drop", "insert", "double")))
        if kind == "cut":
            data = data[:place]
        elif kind == "change":
            data = data[:place] + fresh + data[place + count :]
        elif kind == "flip" and data:
            data = data[:place] + bytes([data[place] ^ (1 << draw(st.integers(0, 7)))]) + data[place + 1 :]
        elif kind == "drop":
            data = data[:place] + data[place + count :]
        elif kind == "insert":
            data = data[:place] + fresh + data[place:]
        elif kind == "double":
            data = data[:place] + data[max(0, place - count) :]
    return data


_watched: list[tuple[Path, ...]] = []
_stray: list[str] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched or event not in ("open", *CHANGES):
        return
    name = arguments[0]
    if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITES):
        return
    if isinstance(name, (str, bytes, os.PathLike)):
        path = Path(os.path.realpath(os.fsdecode(name)))
        if path != Path(os.devnull) and not any(path.is_relative_to(folder) for folder in _watched[-1]):
            _stray.append(f"{event} of {path}")


sys.addaudithook(_audit)


@contextlib.contextmanager
def within(*folders: Path) -> Iterator[None]:
    """Fails where something is written outside these folders."""
    _watched.append(tuple(Path(os.path.realpath(folder)) for folder in folders))
    _stray.clear()
    try:
        yield
    finally:
        _watched.pop()
        assert not _stray, f"written outside: {_stray}"


class Late(BaseException):
    """Passes every handler of exceptions."""


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """Fails what works longer than ``PATIENCE``, or waits longer than ``WAIT``: a machine may be busy."""

    def late(*_: Any) -> None:
        raise Late

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, PATIENCE), signal.SIGALRM: (signal.ITIMER_REAL, WAIT)}
    before = {number: signal.signal(number, late) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    except Late:
        raise AssertionError(f"it hangs: more than {PATIENCE} s") from None
    finally:
        for timer, _ in timers.values():
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


class Tally:
    """Tries calls and counts how they end: they work, or raise a user error that is one line."""

    def __init__(self, what: str) -> None:
        self.what, self.ends = what, collections.Counter()

    @contextlib.contextmanager
    def trying(self, *folders: Path) -> Iterator[None]:
        """Inside, a user error is caught; any other exception, a hang or a stray write fails the test."""
        try:
            with within(*folders), patient():
                yield
        except UserError as error:
            assert str(error).strip(), "an error without a word"
            self.ends["refused"] += 1
        else:
            self.ends["worked"] += 1

    def show(self) -> None:
        """Prints the figures."""
        print(json.dumps({"fuzzed": self.what, "examples": self.ends.total(), **self.ends}))
