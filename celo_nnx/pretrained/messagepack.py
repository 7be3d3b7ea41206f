"""The container ``theta.state`` of published weights: MessagePack, read as data (OPTIMIZERS section 12).

A map of maps with string keys; an array leaf is extension type 1 whose payload is a MessagePack array
``[shape, dtype name, little-endian bytes in C order]``, a numpy scalar is type 3 with the same payload. No
extension or object of a file makes anything but maps, texts and arrays, and an array is made only after
its shape and dtype were found to need exactly the bytes that are there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

from celo_nnx.errors import UserError, require

Path = tuple[str, ...]

LARGEST = 2**31  # bytes of a file; the largest published theta, velo's, has 9.3 million
CHUNK = 2**30  # bytes; a larger array is stored in chunks
_ENTRIES = 100_000  # of all maps of a file together; a published theta has less than 100
_DEPTH, _RANK, _TEXT = 16, 32, 1000
_ARRAY, _SCALAR = 1, 3
_CHUNKED = "__msgpack_chunked_array__"
_INTEGERS = tuple(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64))
DTYPES = ("float16", "float32", "float64", *_INTEGERS)


def loads(data: bytes) -> dict[Path, np.ndarray]:
    """Reads the bytes of a ``theta.state``.

    Args:
      data: at most :data:`LARGEST` bytes.

    Returns:
      Arrays by key tuple, each a copy.

    Raises:
      UserError: too large, truncated, not MessagePack, or a leaf that is not a plain array; one line.

    Example:
      >>> loads(dumps({("rnn/linear", "b"): np.ones(2, np.float32)}))
      {('rnn/linear', 'b'): array([1., 1.], dtype=float32)}
    """
    require(len(data) <= LARGEST, "size of the file", len(data), f"at most {LARGEST} bytes")
    tree, out = _unpack(data, _unique_keys()), {}
    if not isinstance(tree, dict):
        raise UserError(f"expected a MessagePack map of leaves, found {_kind(tree)}")
    _walk(tree, (), out)
    if not out:
        raise UserError("expected a MessagePack map of leaves, found no leaf")
    return out


def _unique_keys() -> Any:
    """A builder of maps that refuses keys that are no text or come twice, and too many entries."""
    left = _ENTRIES

    def build(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
        nonlocal left
        left -= len(pairs)
        require(left >= 0, "number of entries", f"more than {_ENTRIES}", f"at most {_ENTRIES}")
        out: dict[str, Any] = {}
        for key, value in pairs:
            if not isinstance(key, str):
                raise UserError(f"key {key!r:.100}: expected text, found {_kind(key)}")
            if key in out:
                raise UserError(f"key {key!r} comes twice in one map")
            out[key] = value
        return out

    return build


def _unpack(data: bytes, maps: Any = None) -> Any:
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            object_pairs_hook=maps,
            max_str_len=_TEXT,
            max_bin_len=len(data),
            max_ext_len=len(data),
            max_array_len=_RANK,
            max_map_len=_ENTRIES,
        )
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"truncated or not MessagePack ({len(data)} bytes): {text}") from None


def _kind(value: Any) -> str:
    if isinstance(value, msgpack.ExtType):
        return f"extension type {value.code}"
    names = {dict: "a map", list: "a list", str: "text", bytes: "raw bytes", type(None): "nothing"}
    return names.get(type(value), type(value).__name__)


def _walk(node: dict[str, Any], path: Path, out: dict[Path, np.ndarray]) -> None:
    if len(path) > _DEPTH:
        raise UserError(f"leaf {'/'.join(path)[:100]!r}...: expected at most {_DEPTH} levels")
    if node.keys() == {"name", "fields", "values"}:
        node = _named_tuple(node, path)
    for key, value in node.items():
        here = (*path, key)
        if isinstance(value, dict) and _CHUNKED in value:
            out[here] = _from_chunks(value, here)
        elif isinstance(value, dict):
            _walk(value, here, out)
        else:
            out[here] = _array(value, here)


def _named_tuple(node: dict[str, Any], path: Path) -> dict[str, Any]:
    """The old form of a named tuple: field names and values in two maps keyed "0", "1", ..."""
    fields, values = _items(node["fields"]), _items(node["values"])
    if fields is None or values is None or len(fields) != len(values):
        raise UserError(f"leaf {'/'.join(path)!r}: expected a named tuple's fields and values")
    if not all(isinstance(field, str) for field in fields) or len(set(fields)) != len(fields):
        raise UserError(f"leaf {'/'.join(path)!r}: expected a named tuple's fields, found {fields!r:.100}")
    return dict(zip(fields, values, strict=True))


def _items(node: Any) -> list[Any] | None:
    """The values of a map keyed "0", "1", ..., or None."""
    keys = [str(i) for i in range(len(node))] if isinstance(node, dict) else None
    return [node[key] for key in keys] if keys is not None and node.keys() == set(keys) else None


def _shape(value: Any, name: str) -> tuple[int, ...]:
    legal = isinstance(value, list) and len(value) <= _RANK
    if not legal or not all(type(n) is int and n >= 0 for n in value):
        raise UserError(f"leaf {name!r}: expected a shape, found {value!r:.100}")
    return tuple(value)


def _array(value: Any, path: Path) -> np.ndarray:
    name = "/".join(path)
    if not isinstance(value, msgpack.ExtType) or value.code not in (_ARRAY, _SCALAR):
        raise UserError(f"leaf {name!r}: expected an array, found {_kind(value)}")
    try:
        payload = _unpack(value.data)
    except UserError as error:
        raise UserError(f"leaf {name!r}: {error}") from None
    if not isinstance(payload, list) or len(payload) != 3 or not isinstance(payload[2], bytes):
        raise UserError(f"leaf {name!r}: expected shape, dtype and bytes, found {_kind(payload)}")
    shape, dtype, raw = _shape(payload[0], name), payload[1], payload[2]
    if dtype not in DTYPES:
        raise UserError(f"leaf {name!r}: expected a dtype of {', '.join(DTYPES)}, found {dtype!r:.100}")
    order = np.dtype(dtype).newbyteorder("<")
    wanted = math.prod(shape) * order.itemsize
    if len(raw) != wanted or (value.code == _SCALAR and shape):
        raise UserError(
            f"leaf {name!r}: expected {wanted} bytes for {dtype}{list(shape)}, found {len(raw)} "
            f"in {_kind(value)}"
        )
    return np.frombuffer(raw, order).reshape(shape).astype(np.dtype(dtype))


def _from_chunks(node: dict[str, Any], path: Path) -> np.ndarray:
    name = "/".join(path)
    if node.keys() != {_CHUNKED, "shape", "chunks"} or node[_CHUNKED] is not True:
        raise UserError(f"leaf {name!r}: expected {_CHUNKED}, shape and chunks, found {sorted(node)!r:.100}")
    shape, chunks = _shape(_items(node["shape"]), name), _items(node["chunks"])
    if not chunks:
        raise UserError(f"leaf {name!r}: expected a map of chunks, found {_kind(node['chunks'])}")
    parts = [_array(chunk, (*path, str(i))) for i, chunk in enumerate(chunks)]
    total = sum(part.size for part in parts)
    if total != math.prod(shape) or any(p.ndim != 1 or p.dtype != parts[0].dtype for p in parts):
        raise UserError(f"leaf {name!r}: expected flat chunks of {list(shape)}, found {total} values")
    return np.concatenate(parts).reshape(shape)


def dumps(tree: Mapping[Path, np.ndarray]) -> bytes:
    """Returns the bytes of a ``theta.state``, as flax's ``msgpack_serialize`` makes them of a sorted tree.

    Keys are sorted, but an LSTM state's ``hidden`` stands before its ``cell``, as in the released files.

    Args:
      tree: arrays by key tuple, of a dtype of :data:`DTYPES`.
    """
    nested: dict[str, Any] = {}
    for path in sorted(tree, key=lambda path: [(key == "cell", key) for key in path]):
        node = nested
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = _packed(np.asarray(tree[path], order="C"))
    return msgpack.packb(nested)


def _packed(array: np.ndarray) -> Any:
    if array.nbytes <= CHUNK:
        raw = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        return msgpack.ExtType(_ARRAY, msgpack.packb((array.shape, array.dtype.name, raw)))
    flat, count = array.reshape(-1), max(1, CHUNK // array.itemsize)
    chunks = [_packed(flat[i : i + count]) for i in range(0, flat.size, count)]
    numbered = [{str(i): x for i, x in enumerate(items)} for items in (array.shape, chunks)]
    return {_CHUNKED: True, "shape": numbered[0], "chunks": numbered[1]}
