"""The container against flax's own reader and writer, and against damage."""

from __future__ import annotations

from pathlib import Path

import flax.serialization as reference
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_trees import Tree, same

from celo_nnx.errors import UserError
from celo_nnx.pretrained import layouts, messagepack


def nested(tree: Tree) -> dict:
    out: dict = {}
    for path, array in tree.items():
        node = out
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = array
    return out


def example() -> Tree:
    draw = np.random.default_rng(0).standard_normal
    return {
        ("lstm_init_state", "hidden"): draw((1, 4)).astype(np.float32),
        ("lstm_init_state", "cell"): draw((1, 4)).astype(np.float32),
        ("nn", "~", "w0"): draw((3, 2)).astype(np.float32),
        ("per_layer_lr",): np.array(0.5, np.float32),
        ("rnn_params", "rnn/linear", "b"): np.array([np.nan, -np.inf, -0.0, 1e-45], np.float32),
    }


def test_as_flax_reads_and_writes() -> None:
    tree = example()
    data = messagepack.dumps(tree)
    assert data == reference.msgpack_serialize(nested(tree), in_place=True)  # which keeps the order
    back = reference.msgpack_restore(data)
    assert all(np.array_equal(back["nn"]["~"][k], v) for k, v in {"w0": tree["nn", "~", "w0"]}.items())
    assert same(messagepack.loads(data), tree)
    assert messagepack.dumps(messagepack.loads(data)) == data


@pytest.mark.parametrize("name", messagepack.DTYPES)
def test_dtypes(name: str) -> None:
    tree = {("a",): np.arange(6).reshape(2, 3).astype(name), ("b",): np.zeros((0, 3), name)}
    assert same(messagepack.loads(reference.msgpack_serialize(nested(tree))), tree)
    assert messagepack.dumps(tree) == reference.msgpack_serialize(nested(tree))


def test_chunks_and_scalars(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {("big",): np.arange(35, dtype=np.float32).reshape(5, 7), ("small",): np.ones(4, np.float32)}
    monkeypatch.setattr(messagepack, "CHUNK", 48)
    monkeypatch.setattr(reference, "MAX_CHUNK_SIZE", 48)
    data = messagepack.dumps(tree)
    assert data == reference.msgpack_serialize(nested(tree)) and data.count(b"__msgpack_chunked_array__") == 1
    assert same(messagepack.loads(data), tree)
    assert np.array_equal(reference.msgpack_restore(data)["big"], tree["big",])
    scalar = reference.msgpack_serialize({"x": np.float32(2.5)})
    assert messagepack.loads(scalar)["x",].shape == () and messagepack.loads(scalar)["x",] == 2.5


def test_old_named_tuples() -> None:
    old = {
        "name": "State",
        "fields": {"0": "hidden", "1": "cell"},
        "values": {"0": np.ones(2), "1": np.zeros(2)},
    }
    assert list(messagepack.loads(reference.msgpack_serialize({"lstm": old}))) == [
        ("lstm", "hidden"),
        ("lstm", "cell"),
    ]
    old["fields"] = {"0": "hidden", "2": "cell"}
    with pytest.raises(UserError, match="leaf 'lstm': expected a named tuple"):
        messagepack.loads(reference.msgpack_serialize({"lstm": old}))


def packed(shape: object, dtype: object, raw: object, code: int = 1) -> bytes:
    return msgpack.packb({"a": {"b": msgpack.ExtType(code, msgpack.packb([shape, dtype, raw]))}})


CHUNKED = {
    "__msgpack_chunked_array__": True,
    "shape": {"0": 9},
    "chunks": {"0": np.zeros(4), "1": np.zeros(4)},
}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "truncated or not MessagePack"),
        (b"\xc1", "truncated or not MessagePack"),
        (msgpack.packb([1]), "expected a MessagePack map of leaves, found a list"),
        (msgpack.packb({}), "found no leaf"),
        (msgpack.packb({"a": 1}), "leaf 'a': expected an array, found int"),
        (msgpack.packb({"a": None}), "leaf 'a': expected an array, found nothing"),
        (msgpack.packb({1: 1}), "truncated or not MessagePack"),
        (msgpack.packb({b"a": 1}), "expected text, found raw bytes"),
        (b"\x82\xa1a\x01\xa1a\x01", "'a' comes twice"),
        (msgpack.packb({"a": msgpack.Timestamp(1)}), "expected an array, found Timestamp"),
        (packed([2], "float32", b"1234"), "'a/b': expected 8 bytes for float32[2], found 4"),
        (packed([2**40, 2**40], "float32", b""), "expected 4835703278458516698824704 bytes"),
        (packed([-1], "float32", b""), "'a/b': expected a shape, found [-1]"),
        (packed([True], "float32", b"1234"), "'a/b': expected a shape, found [True]"),
        (packed([1] * 33, "float32", b"1234"), "'a/b': truncated or not MessagePack"),
        (packed([1], "object", b"12345678"), "found 'object'"),
        (packed([1], "O", b"12345678"), "found 'O'"),
        (packed([1], ["float32"], b"1234"), "found ['float32']"),
        (packed([1], "float32", "1234"), "expected shape, dtype and bytes"),
        (packed([1], "float32", b"1234", code=3), "in extension type 3"),
        (packed([], "float32", b"1234", code=2), "'a/b': expected an array, found extension type 2"),
        (reference.msgpack_serialize({"a": CHUNKED}), "'a': expected flat chunks of [9], found 8 values"),
        (msgpack.packb({"a": {"__msgpack_chunked_array__": True, "shape": {}}}), "'a': expected __msgpack"),
    ],
)  # fmt: skip
def test_refused(data: bytes, words: str) -> None:
    with pytest.raises(UserError) as error:
        messagepack.loads(data)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_bombs() -> None:
    """Depth, width and promised lengths stop at once."""
    deep = b"\x81\xa1a" * 300 + b"\x01"
    wide = msgpack.packb({"a": [[]] * 33})
    many = msgpack.packb({"a": {str(i): {} for i in range(60_000)}, "b": {str(i): {} for i in range(60_000)}})
    for data in (deep, wide, many, b"\xdf\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\x81" * 5000):
        with pytest.raises(UserError):
            messagepack.loads(data)


def test_size_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messagepack, "LARGEST", 10)
    with pytest.raises(UserError, match="must be at most 10 bytes"):
        messagepack.loads(bytes(11))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_damage_is_told_or_harmless(data: st.DataObject) -> None:
    """Bytes changed or cut anywhere: another tree of arrays or a UserError, never another exception."""
    whole = bytearray(messagepack.dumps(example()))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole))))
    try:
        tree = messagepack.loads(bytes(whole[:cut]))
    except UserError:
        return
    assert all(isinstance(array, np.ndarray) for array in tree.values())


@pytest.mark.parametrize(("name", "count"), [("celo", 37_089), ("celo_adam", 36_865)])
def test_released_files(shared: Path, name: str, count: int) -> None:
    data = (shared / "weights" / f"{name}.theta.state").read_bytes()
    tree = messagepack.loads(data)
    assert sum(array.size for array in tree.values()) == count
    other = reference.msgpack_restore(data)
    assert np.array_equal(tree["rnn_params", "rnn/linear", "w"], other["rnn_params"]["rnn/linear"]["w"])
    published = layouts.to_published(name, layouts.to_own(name, tree))
    assert messagepack.dumps(published) == data  # byte for byte
