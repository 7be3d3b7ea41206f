"""Texts by name, as tokens: from ``NAME.txt`` or ``NAME.txt.gz``, made by a rule, or from the hub."""

from __future__ import annotations

import collections
import dataclasses
import gzip
import re
import zlib
from pathlib import Path

import numpy as np

from celo_nnx.errors import MissingData, UserError, is_integer, require, unknown
from celo_nnx.tasks import hub
from celo_nnx.tasks.data import cached, check_place, folders, looked_for

TEXTS: dict[str, str] = {
    "sums": "10,000 sums in words, as 'seven plus twenty-four is thirty-one.' (made by a rule, embedded)",
    "shakespeare": "works of Shakespeare, 5 MB (shakespeare.txt or .txt.gz)",
    "lm1b": "sentences of the One Billion Word Benchmark, 32 MB (hub dvruette/lm1b, or lm1b.txt)",
    "wikipedia": "articles of the English Wikipedia, 32 MB (hub wikimedia/wikipedia, or wikipedia.txt)",
}
LEVELS = ("byte", "character", "token")
LIMIT_BYTES = 2**26
MAX_VOCABULARY = 2**16
SUFFIXES = (".txt", ".txt.gz")


@dataclasses.dataclass(frozen=True)
class Text:
    """A text as tokens.

    Attributes:
      name: what it was asked for by.
      tokens: ``[n]``, uint8 or uint16.
      vocabulary: number of different tokens that there may be.
      source: where it came from, in words.
    """

    name: str
    tokens: np.ndarray
    vocabulary: int
    source: str


def load_text(name: str, *, level: str, words: int = 1000, data_dir: str = "") -> Text:
    """Loads a text: ``data_dir/NAME.txt``, ``.txt.gz``, the same in ``$CELO_NNX_DATA``, else by its name.

    What comes from the hub is cached as images are: see :func:`celo_nnx.tasks.data.load`.

    Args:
      name: a key of :data:`TEXTS`, or of a file in one of the folders.
      level: ``byte``: a token is a byte, and the vocabulary 256; ``character``: one of the text's characters,
        in the order of Unicode; ``token``: one of the ``words - 1`` most frequent words, marks and runs of
        white space (1, 2, ...), or any other (0).
      words: the vocabulary at the level ``token``.
      data_dir: a folder of texts; empty for none.

    Returns:
      The text.

    Raises:
      UserError: an unknown or absent text, a file that is too large, damaged or not UTF-8, or a value out of
        range.

    Example:
      >>> text = load_text("sums", level="character")
      >>> text.vocabulary, text.tokens.dtype.name
      (24, 'uint8')
    """
    check_level(level, words)
    return _text(name, *_raw(name, data_dir), level, words)


def load_file(path: Path, *, level: str, words: int = 1000) -> Text:
    """Loads a text from any file, plain or ``.gz``.

    Args:
      path: of the file.
      level, words: as in :func:`load_text`.

    Returns:
      The text, named as the file.

    Raises:
      UserError: no file is there, or what :func:`load_text` raises.

    Example:
      >>> load_file(Path("book.txt"), level="character")  # doctest: +SKIP
    """
    check_level(level, words)
    if not path.is_file():
        raise UserError(f"no text at {path}: expected a file")
    return _text(path.name, _read(path), str(path), level, words)


def _text(name: str, raw: bytes, source: str, level: str, words: int) -> Text:
    if level == "byte":
        return Text(name, np.frombuffer(raw, np.uint8), 256, source)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source}: expected UTF-8 text, found byte 0x{raw[error.start]:02x} at {error.start}; "
            "the level 'byte' reads any file"
        ) from None
    indices, count = _characters(source, text) if level == "character" else _tokens(text, words)
    smallest = np.uint8 if count <= 256 else np.uint16
    return Text(name, indices.astype(smallest), count, source)


def check_level(level: object, words: object) -> None:
    """Checks how a text becomes tokens: the arguments of those names of :func:`load_text`."""
    if level not in LEVELS:
        raise unknown("level", level, LEVELS)
    good = is_integer(words) and 2 <= words <= MAX_VOCABULARY
    require(good, "words", words, f"an integer from 2 to {MAX_VOCABULARY}")


def texts(data_dir: str = "") -> dict[str, str]:
    """Returns one line about every text that has a name here, files in the folders included."""
    found = {
        path.name.removesuffix(suffix): f"file {path}"
        for folder in folders(data_dir)
        for suffix in SUFFIXES
        for path in sorted(folder.glob(f"*{suffix}"))
    }
    return TEXTS | found


def _raw(name: str, data_dir: str) -> tuple[bytes, str]:
    """Returns (the bytes of a text, where they came from)."""
    check_place(name, f"{name}.txt", data_dir)
    for folder in folders(data_dir):
        for suffix in SUFFIXES:
            path = folder / f"{name}{suffix}"
            if path.is_file():
                return _read(path), str(path)
    if name == "sums":
        return sums().encode(), "made by a rule"
    elsewhere = looked_for(f"{name}.txt and {name}.txt.gz", data_dir)
    if name in hub.TEXT_SOURCES:
        return _hub_text(name, elsewhere), f"Hugging Face hub {hub.TEXT_SOURCES[name].repository}"
    if name in TEXTS:
        raise MissingData(
            f"text {name!r} not found: {elsewhere}; put one in a folder and set run.data_dir or "
            "CELO_NNX_DATA to it"
        )
    raise UserError(f"{unknown('text', name, texts(data_dir))}; {elsewhere}")


def _hub_text(name: str, elsewhere: str) -> bytes:
    def make() -> dict[str, np.ndarray]:
        return {"text": np.frombuffer(hub.read_text(name, elsewhere), np.uint8)}

    settings = {"hub text": list(hub.TEXT_SOURCES[name]), "bytes": hub.TEXT_BYTES}
    return cached(name, settings, ("text",), make)["text"].tobytes()


def _read(path: Path) -> bytes:
    """Reads a text file, no more of it than allowed."""
    opened = gzip.open if path.name.endswith(".gz") else open
    try:
        with opened(path, "rb") as file:
            raw = file.read(LIMIT_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{path}: expected a text file, found a damaged or other one ({reason})") from None
    if len(raw) > LIMIT_BYTES:
        raise UserError(f"{path}: expected a text of at most {LIMIT_BYTES} bytes, found more")
    if not raw:
        raise UserError(f"{path}: expected a text, found an empty file")
    return raw


def _characters(source: str, text: str) -> tuple[np.ndarray, int]:
    """Returns (the place of each character among the text's, how many there are)."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    known, indices = np.unique(points, return_inverse=True)
    if len(known) > MAX_VOCABULARY:
        raise UserError(f"{source}: expected at most {MAX_VOCABULARY} characters, found {len(known)}")
    return indices, len(known)


def _tokens(text: str, words: int) -> tuple[np.ndarray, int]:
    """Returns (the rank of each word, mark or run of white space, 0 for a rare one, the vocabulary)."""
    piece_of = re.compile(r"\w+|\s+|[^\w\s]")
    # Twice through the text: a list of its pieces would take twenty times its memory.
    counts = collections.Counter(match.group() for match in piece_of.finditer(text))
    ranked = sorted(counts, key=lambda piece: (-counts[piece], piece))[: words - 1]
    rank = {piece: i + 1 for i, piece in enumerate(ranked)}
    indices = (rank.get(match.group(), 0) for match in piece_of.finditer(text))
    return np.fromiter(indices, np.uint16), words


UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def number(n: int) -> str:
    """Returns a number from 0 to 199 in words.

    Example:
      >>> number(7), number(40), number(198)
      ('seven', 'forty', 'one hundred and ninety-eight')
    """
    if n >= 100:
        return "one hundred" + (f" and {number(n - 100)}" if n > 100 else "")
    if n < 20:
        return UNITS[n]
    return TENS[n // 10 - 2] + (f"-{UNITS[n % 10]}" if n % 10 else "")


def sums() -> str:
    """Returns every sum of two numbers below 100 in words, one a line, in a fixed random order."""
    order = np.random.default_rng(0).permutation(10_000)
    pairs = ((int(i) // 100, int(i) % 100) for i in order)
    return "".join(f"{number(a)} plus {number(b)} is {number(a + b)}.\n" for a, b in pairs)
