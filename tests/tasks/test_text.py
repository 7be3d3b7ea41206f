"""Texts: looking up, checking, levels of tokens, splits and slices."""

from __future__ import annotations

import gzip
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from celo_nnx.errors import UserError
from celo_nnx.tasks import build_families, listing, text
from celo_nnx.tasks.rnn import RecurrentLM

POEM = "Ein Kreis, ein Kreis.\nEin Bär – ein Bär!\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "poem.txt").write_text(POEM, encoding="utf-8")
    with gzip.open(tmp_path / "packed.txt.gz", "wb") as file:
        file.write(POEM.encode())
    return tmp_path


def test_levels(folder: Path) -> None:
    raw = text.load_text("poem", level="byte", data_dir=str(folder))
    assert raw.vocabulary == 256 and raw.tokens.tobytes() == POEM.encode()
    known = sorted(set(POEM))
    chars = text.load_text("packed", level="character", data_dir=str(folder))
    assert chars.vocabulary == len(known) and "".join(known[i] for i in chars.tokens) == POEM
    words = text.load_text("poem", level="token", words=5, data_dir=str(folder))
    # Ranks: ' ' 7 times; then twice each 'Bär', 'Ein', 'Kreis', '\n', 'ein' in the order of Unicode.
    names = ["?", " ", "\n", "Bär", "Ein"]
    expected = "Ein| |?|?| |?| |?|?|\n|Ein| |Bär| |?| |?| |Bär|?|\n".split("|")
    assert [names[i] for i in words.tokens] == expected and words.vocabulary == 5


def test_a_vocabulary_above_a_byte(folder: Path) -> None:
    (folder / "wide.txt").write_text("".join(chr(0x4E00 + i) for i in range(300)), encoding="utf-8")
    wide = text.load_text("wide", level="character", data_dir=str(folder))
    assert (
        wide.vocabulary == 300 and wide.tokens.dtype == np.uint16 and wide.tokens.tolist() == list(range(300))
    )


def test_sums_are_right_and_all_there() -> None:
    lines = text.sums().splitlines()
    names = {text.number(n): n for n in range(199)}
    assert len(lines) == len(set(lines)) == 10_000 and len(names) == 199
    for line in lines[::37]:
        left, _, total = line.removesuffix(".").partition(" is ")
        a, _, b = left.partition(" plus ")
        assert names[a] + names[b] == names[total]


def test_folder_before_environment_before_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "other").mkdir()
    (folder / "sums.txt").write_text("abc")
    (folder / "other" / "sums.txt").write_text("abcd")
    monkeypatch.setenv("CELO_NNX_DATA", str(folder / "other"))
    assert len(text.load_text("sums", level="byte", data_dir=str(folder)).tokens) == 3
    assert len(text.load_text("sums", level="byte").tokens) == 4
    monkeypatch.delenv("CELO_NNX_DATA")
    assert len(text.load_text("sums", level="byte").tokens) == len(text.sums())


def test_shakespeare(shared: Path) -> None:
    found = text.load_text("shakespeare", level="character", data_dir=str(shared / "data"))
    assert found.vocabulary == 83 and len(found.tokens) == 5_053_167


def test_broken_files_are_one_line(folder: Path) -> None:
    packed = (folder / "packed.txt.gz").read_bytes()
    (folder / "latin.txt").write_bytes(b"ab\xffc")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "cut.txt.gz").write_bytes(packed[:20])
    (folder / "other.txt.gz").write_bytes(b"no gzip")
    (folder / "flipped.txt.gz").write_bytes(packed[:30] + bytes([packed[30] ^ 0x55]) + packed[31:])
    for name, words in {
        "latin": "latin.txt: expected UTF-8 text, found byte 0xff at 2; the level 'byte'",
        "empty": "empty.txt: expected a text, found an empty file",
        "cut": "cut.txt.gz: expected a text file, found a damaged",
        "other": "other.txt.gz: expected a text file, found a damaged",
        "flipped": "flipped.txt.gz: expected a text file, found a damaged",
    }.items():
        with pytest.raises(UserError, match=words) as error:
            text.load_text(name, level="character", data_dir=str(folder))
        assert "\n" not in str(error.value)
    assert text.load_text("latin", level="byte", data_dir=str(folder)).tokens.tolist() == [97, 98, 255, 99]


def test_a_file_that_unpacks_to_too_much_is_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "LIMIT_BYTES", 1000)
    with gzip.open(folder / "bomb.txt.gz", "wb") as file:
        file.write(b"a" * 1001)
    (folder / "long.txt").write_bytes(b"a" * 1001)
    (folder / "right.txt").write_bytes(b"a" * 1000)
    for name in ("bomb", "long"):
        with pytest.raises(UserError, match=f"{name}.txt.*at most 1000 bytes"):
            text.load_text(name, level="byte", data_dir=str(folder))
    assert len(text.load_text("right", level="byte", data_dir=str(folder)).tokens) == 1000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "poems"}, "unknown text 'poems' .did you mean 'poem'"),
        (
            {"name": "shakespeare"},
            "'shakespeare' not found: looked for shakespeare.txt and shakespeare.txt.gz",
        ),
        ({"name": "../poem"}, "not a name"),
        ({"level": "char"}, "unknown level 'char' .did you mean 'character'"),
        ({"words": 1}, "words = 1 .*from 2 to 65536"),
        ({"data_dir": "absent"}, "not a folder.*poem.txt"),
    ],
)
def test_mistakes(change: dict, words: str, folder: Path) -> None:
    with pytest.raises(UserError, match=words):
        text.load_text(**({"name": "poem", "level": "byte", "data_dir": str(folder)} | change))


def test_listing_names_texts(folder: Path) -> None:
    assert {"sums", "shakespeare", "poem", "packed", "digits"} <= set(listing(str(folder)))


def test_splits_are_by_position(folder: Path) -> None:
    (folder / "long.txt").write_bytes(bytes(range(200)))
    settings = dict(kind="recurrent_lm", datasets=("long",), level="byte", length=4, validation=0.25)
    (family,) = build_families(settings, str(folder))
    parts = [getattr(family, split)["tokens"].tolist() for split in ("train", "validation", "test")]
    assert parts == [list(range(135)), list(range(135, 180)), list(range(180, 200))]
    with pytest.raises(UserError, match="length = 40 .*41 tokens in its test split, which has 20"):
        build_families(settings | {"length": 40, "validation": 0.0}, str(folder))


def test_slices_are_contiguous_and_stay_within_their_part() -> None:
    task = RecurrentLM(vocabulary=100, length=5, batch_size=3000)
    data = {"tokens": jnp.arange(100, dtype=jnp.uint8)}
    draw = jax.jit(lambda key: task.draw(data, key, jnp.int32(30), jnp.int32(20)))
    tokens = np.asarray(draw(jax.random.key(0))["tokens"])
    assert tokens.shape == (3000, 6) and (np.diff(tokens, axis=1) == 1).all()
    assert set(tokens[:, 0]) == set(range(30, 45))  # the last slice ends with the last token, 49
