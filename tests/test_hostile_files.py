"""Files made to run something, to take memory, to leave their folder or to confuse: a line each, no harm."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import made_run
import msgpack
import pytest

from celo_nnx import files, model_file, recordings, theta_io
from celo_nnx.cli import main
from celo_nnx.doctor import RECORDING
from celo_nnx.errors import UserError
from celo_nnx.meta import runlog
from celo_nnx.pretrained import messagepack
from celo_nnx.pretrained.convert import import_weights
from celo_nnx.tasks import data, npz

MEMORY = 2**25  # bytes that reading a small hostile file may take
KEYS = ("train_x", "train_y", "test_x", "test_y")


class Bomb:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture(autouse=True)
def nothing_else_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Runs in a folder of its own, ``in``; nothing beside it may appear, and little memory be taken."""
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    tracemalloc.start()
    try:
        begin = time.monotonic()
        yield tmp_path / "in"
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY and time.monotonic() - begin < 60
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def refused(read: Callable[[], Any], *words: str) -> None:
    with pytest.raises(UserError) as caught:
        read()
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


def npy(shape: str = "(1, 4, 4)", dtype: str = "'|u1'", values: bytes = b"\0" * 16) -> bytes:
    head = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + values


def archive(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as made:
        for name, content in members.items():
            made.writestr(name, content)
    return path


HOSTILE_ARRAYS = {
    "pickled": npy("(2,)", "'|O'", pickle.dumps(Bomb(Path("../mark")))),
    "in a structure": npy("(2,)", "[('a', '|O')]", pickle.dumps(Bomb(Path("../mark")))),
    "huge": npy("(1099511627776, 4, 4)"),
    "huge in the product": npy(f"({2**31}, {2**31}, {2**31})"),
    "negative": npy("(-1, 4, 4)"),
    "code": npy("__import__('os').mkdir('../mark')"),
    "deep": npy("(" * 2000 + ")" * 2000),
    "a long header": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b"{",
    "version": b"\x93NUMPY\x09\x00" + bytes(100),
}


@pytest.mark.parametrize("case", HOSTILE_ARRAYS)
def test_arrays(case: str) -> None:
    bad = HOSTILE_ARRAYS[case]
    good = {"train_x": npy(), "test_x": npy()}
    good |= {key: npy("(1,)", "'<i8'", bytes(8)) for key in ("train_y", "test_y")}
    mine = archive(Path("mine.npz"), {f"{key}.npy": good[key] for key in KEYS} | {"test_x.npy": bad})
    refused(lambda: npz.read(mine), "mine.npz")
    refused(lambda: data.load("mine", size=4, grey=True, data_dir="."), "mine.npz")
    Path("rec.json").write_text('{"kind": "pes_estimate"}')
    refused(lambda: recordings.read(archive(Path("rec.npz"), {"pos_loss.npy": bad})), "rec.npz")
    assert data._cache_read(archive(Path("cache.npz"), {"text.npy": bad}), ("text",)) is None


@pytest.mark.parametrize(
    "name", ["../mark.npy", "/tmp/celo_nnx_mark.npy", "..\\mark.npy", "a/../../mark.npy"]
)
def test_names_in_archives_stay_names(name: str) -> None:
    mine = archive(Path("mine.npz"), {name: npy(), "train_x.npy": npy()})
    refused(lambda: npz.read(mine), "expected exactly the arrays")
    arrays = recordings.files.read_arrays(mine)
    assert set(arrays) == {name.removesuffix(".npy"), "train_x"}
    assert not Path("/tmp/celo_nnx_mark.npy").exists()


@pytest.mark.parametrize("source", ["../elsewhere.npz", "/etc/passwd", "a/../../elsewhere.npz", 7, ["x"]])
def test_a_recording_opens_files_of_its_folder_only(source: Any) -> None:
    from celo_nnx.replay import replay

    meta = json.loads(RECORDING.with_suffix(".json").read_text())
    archive(Path("elsewhere.npz"), {"theta/b0.npy": npy()})
    Path("rec.json").write_text(json.dumps(meta | {"theta_from": source}))
    Path("rec.npz").write_bytes(RECORDING.read_bytes())
    refused(lambda: replay("rec"), "theta_from")


def test_archives_that_unpack_to_too_much() -> None:
    zeros = npy(f"({2**29},)", "'|u1'", b"")
    with zipfile.ZipFile("bomb.npz", "w", zipfile.ZIP_DEFLATED) as made, made.open("a.npy", "w") as member:
        member.write(zeros)
        for _ in range(2**9):
            member.write(bytes(2**20))
    assert Path("bomb.npz").stat().st_size < 2**20
    refused(lambda: recordings.files.read_arrays(Path("bomb.npz")), "bomb.npz", str(2**28))


def safetensors(header: Any, values: bytes = bytes(64), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + values


LARGE = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
HOSTILE_WEIGHTS = {
    "a header of 2**60 bytes": safetensors({}, length=2**60),
    "a header of 2**64 - 1 bytes": safetensors({}, length=2**64 - 1),
    "a huge tensor": safetensors({"w": LARGE}),
    "a huge shape of few bytes": safetensors({"w": LARGE | {"data_offsets": [0, 64]}}),
    "an overflowing shape": safetensors({"w": LARGE | {"shape": [2**33, 2**33], "data_offsets": [0, 64]}}),
    "negative offsets": safetensors({"w": LARGE | {"shape": [1], "data_offsets": [-4, 0]}}),
    "offsets outside": safetensors({"w": LARGE | {"shape": [1], "data_offsets": [2**50, 2**50 + 4]}}),
    "a deep header": safetensors(b"[" * 100_000),
    "a header that is no object": safetensors([1, 2]),
    "wrong types": safetensors({"w": {"dtype": 3, "shape": "x", "data_offsets": {}}}),
    "nothing": b"",
}


@pytest.mark.parametrize("case", HOSTILE_WEIGHTS)
def test_weights(case: str) -> None:
    path = Path("w.safetensors")
    path.write_bytes(HOSTILE_WEIGHTS[case])
    refused(lambda: theta_io.load_theta(path), "w.safetensors")
    if case != "wrong types":  # of a tensor, which the header's strings do not need
        refused(lambda: theta_io.read_metadata(path), "w.safetensors")
    refused(lambda: model_file.read_shapes(path), "w.safetensors")
    refused(lambda: import_weights(path, Path("out.safetensors"), variant="celo2"), "w.safetensors")
    assert not Path("out.safetensors").exists()


def packed(size: int, kind: int) -> bytes:
    return bytes([kind]) + struct.pack(">I", size)


HOSTILE_STATES = {
    "a huge array": packed(2**32 - 1, 0xDD),
    "a huge map": packed(2**32 - 1, 0xDF),
    "huge bytes": b"\x81\xa1w" + packed(2**32 - 1, 0xC6),
    "a huge text": b"\x81\xa1w" + packed(2**32 - 1, 0xDB),
    "a huge extension": b"\x81\xa1w" + packed(2**32 - 1, 0xC9) + b"\x01",
    "a huge shape": msgpack.packb(
        {"w": msgpack.ExtType(1, msgpack.packb(([2**40], "float32", bytes(64))))}, use_bin_type=True
    ),
    "deep maps": b"\x81\xa1w" * 100_000,
    "deep arrays": b"\x91" * 100_000,
    "a pickle": pickle.dumps(Bomb(Path("../mark"))),
    "a pickle in an extension": msgpack.packb({"w": msgpack.ExtType(1, pickle.dumps(Bomb(Path("../mark"))))}),
    "objects": msgpack.packb({"w": msgpack.ExtType(1, msgpack.packb(([1], "object", bytes(8))))}),
}


@pytest.mark.parametrize("case", HOSTILE_STATES)
def test_states(case: str) -> None:
    refused(lambda: messagepack.loads(HOSTILE_STATES[case]))
    Path("theta.state").write_bytes(HOSTILE_STATES[case])
    refused(lambda: import_weights("theta.state", Path("out.safetensors"), variant="celo2"), "theta.state")


def test_pickles_are_known_by_name_and_by_content() -> None:
    buffer = io.BytesIO()
    pickle.dump(Bomb(Path("../mark")), buffer)
    for name in ("w.pt", "w.bin", "w.pkl", "theta.state", "w.safetensors"):
        Path(name).write_bytes(buffer.getvalue())
        refused(lambda name=name: import_weights(name, Path("out.safetensors"), variant="celo2"), name)


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "text", [DEEP, '{"a":' * 100_000, "", "\0" * 100, "NaN", "1" * 5000, '{"kind": [1]}']
)
def test_json(text: str) -> None:
    path = Path("rec.json")
    path.write_text(text)
    try:
        files.read_json(path)
    except UserError as error:
        assert "\n" not in str(error)
    refused(lambda: recordings.read(path), "rec.json")
    refused(lambda: files.parse_json(text, "the header"), "the header") if text != '{"kind": [1]}' else None


def test_a_log_without_ends_of_lines() -> None:
    path = Path("metrics.jsonl")
    with open(path, "wb") as file:
        file.write(b'{"iteration": 1}\n')
        file.truncate(2**30)  # a hole of zeros, which takes no disk
    assert [row["iteration"] for row in runlog.read(path)] == [1]
    assert runlog.trim(path, 5) == 1 and path.stat().st_size == 17


VALUES = [None, True, -1, 1e308, "x", "../../x", [], {}, [[]], {"a": {}}, 2**70, "\x1b[2J"]


@pytest.mark.parametrize("file", ["config.json", "run_info.json", "metrics.jsonl"])
def test_run_folders_of_wrong_types(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever stands where in a run folder: commands that read it end in order, with one line or none."""
    folder = made_run.make(Path("a"), made_run.course([3.0, 2.0, 1.0]))
    path = folder / file
    whole = path.read_text()
    first = json.loads(whole.splitlines()[0] if file == "metrics.jsonl" else whole)
    keys = [[key] for key in first] + [[k, i] for k, v in first.items() if isinstance(v, dict) for i in v]
    for key in [[], *keys]:
        for value in VALUES:
            content = json.loads(json.dumps(first))
            node = content
            for name in key[:-1]:
                node = node[name]
            if key:
                node[key[-1]] = value
            path.write_text(json.dumps(content if key else value) + "\n")
            for argv in (["watch", "a", "--once"], ["export", "a", "--format", "celo", "--out", "out.state"]):
                code = main(argv)
                told = capsys.readouterr()
                assert code in (0, 2), (key, value)
                assert told.err.count("\n") == (code == 2) and "Traceback" not in told.err, (key, value)
                assert "\x1b[2J" not in told.out + told.err
    path.write_text(whole)
