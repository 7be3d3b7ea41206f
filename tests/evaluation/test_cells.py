"""The result files: what goes in comes out, a kill costs one cell, and nothing altered is believed."""

import dataclasses
import hashlib
import io
import json
import pickle

import numpy as np
import pytest

from celo_nnx.errors import UserError
from celo_nnx.evaluation.cells import FILE_NAME, Cell, Cells, Key, digest
from celo_nnx.evaluation.curves import Curves


def a_cell(optimizer="adam", **changes):
    return dataclasses.replace(
        Cell(
            task="mlp/digits é",
            optimizer=optimizer,
            schedule="cosine",
            steps=6,
            seeds=(0, 3),
            learning_rates=(1e-3, 10**-2.5, 1e-2),
            training=1,
            validation=2,
            warnings=("the best lies on an edge",),
            floor=None,
            measured={"seconds": 1.5, "bytes": 1024},
            config={"batch_size": 64, "hidden": [32, 32], "lr": 0.1},
            versions={"jax": "0.10.2"},
        ),
        **changes,
    )


def some_curves(seed=0):
    generator = np.random.default_rng(seed)
    losses = generator.normal(size=(3, 2, 6)).astype(np.float32)
    losses[2, 1, 3:] = np.inf
    return Curves(losses, {"validation": generator.normal(size=(3, 2, 2)).astype(np.float32)})


@pytest.fixture
def folder(tmp_path):
    cells = Cells(tmp_path)
    cells.add(a_cell("adam"), some_curves(0))
    cells.add(a_cell("muon", validation=None, floor=0.5), some_curves(1))
    return tmp_path


def test_what_goes_in_comes_out(folder):
    cells = Cells(folder)
    assert [cell.optimizer for cell in cells] == ["adam", "muon"]
    for seed, cell in enumerate(cells):
        given, found = some_curves(seed), cells.curves(cell)
        np.testing.assert_array_equal(found.losses, given.losses)
        np.testing.assert_array_equal(found.held_out["validation"], given.held_out["validation"])
        assert set(found.held_out) == {"validation"}
    found = cells[a_cell("muon").key]
    assert dataclasses.replace(found, shapes={}, digest="") == a_cell("muon", validation=None, floor=0.5)
    assert not list(folder.glob("*.part"))


def test_a_key_says_whether_a_cell_is_there(folder):
    cells = Cells(folder)
    key = a_cell("adam").key
    assert key in cells
    for field, value in [
        ("steps", 7),
        ("seeds", (0,)),
        ("schedule", "constant"),
        ("task", "x"),
        ("config", "0"),
    ]:
        assert dataclasses.replace(key, **{field: value}) not in cells
    assert a_cell("adam", config={"batch_size": 65}).key not in cells
    # What a result says of itself is no part of what it is.
    assert a_cell("adam", training=0, measured={}, versions={}, warnings=()).key in cells
    assert (
        digest({"a": (1, 2), "b": 1.5}) == digest({"b": 1.5, "a": [1, 2]}) != digest({"a": [2, 1], "b": 1.5})
    )
    with pytest.raises(UserError, match="there is one of that key"):
        cells.add(a_cell("adam"), some_curves())


def test_a_torn_last_line_costs_one_cell_and_is_cut_off(folder):
    path = folder / FILE_NAME
    whole = path.read_bytes()
    for cut in (1, 30, len(whole.splitlines(keepends=True)[1]) - 1):
        path.write_bytes(whole[:-cut])
        cells = Cells(folder)
        assert [cell.optimizer for cell in cells] == ["adam"]
        cells.add(a_cell("muon", validation=None, floor=0.5), some_curves(1))
        assert path.read_bytes() == whole


def test_curves_without_a_line_are_written_again(folder):
    path = folder / FILE_NAME
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    cells = Cells(folder)
    cells.add(a_cell("muon"), some_curves(5))
    np.testing.assert_array_equal(cells.curves(cells[a_cell("muon").key]).losses, some_curves(5).losses)


def test_a_cell_that_is_there_twice_is_told(folder):
    path = folder / FILE_NAME
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, lines[0]]))
    with pytest.raises(UserError, match=r"line 3: the cell of adam on mlp/digits é is there twice"):
        Cells(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": "6"}, "steps"),
        ({"steps": True}, "steps"),
        ({"seeds": []}, "seeds"),
        ({"seeds": 3}, "seeds"),
        ({"learning_rates": [0.1, 0.01, 0.001]}, "learning_rates"),
        ({"learning_rates": [0.1, "x", None]}, "learning_rates"),
        ({"training": 3}, "training"),
        ({"training": -1}, "training"),
        ({"validation": 1.0}, "validation"),
        ({"task": ""}, "task"),
        ({"floor": "0"}, "floor"),
        ({"measured": {"seconds": None}}, "measured"),
        ({"versions": {"jax": 1}}, "versions"),
        ({"config": []}, "config"),
        ({"digest": "x"}, "digest"),
        ({"shapes": {"losses": [3, 2, 7]}}, "shapes"),
        ({"shapes": {"losses": [3, 2, 6], "test": [10**6, 10**6, 10**6]}}, "shapes"),
        ({"shapes": {"losses": [3, 2, 6], "test": [3, 2, 10**9]}}, "shapes"),
        ({"shapes": {}}, "shapes"),
        ({"steps": 10**9, "shapes": {"losses": [3, 2, 10**9]}}, "shapes"),
        ({"more": 1}, "missing or unknown fields: .'more'"),
    ],
)
def test_an_altered_line_is_refused(folder, change, words):
    path = folder / FILE_NAME
    first, second = path.read_text("utf-8").splitlines()
    path.write_text(json.dumps({**json.loads(first), **change}) + "\n" + second + "\n")
    with pytest.raises(UserError, match=f"line 1: {words}|line 1.*{words}") as caught:
        Cells(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", [b"[1]\n", b"{\n", b"\xff\xfe\n", b"[" * 100_000 + b"\n", b"\n"])
def test_a_line_that_is_no_object_is_refused(folder, line):
    path = folder / FILE_NAME
    path.write_bytes(line + path.read_bytes())
    with pytest.raises(UserError, match="line 1"):
        Cells(folder)


def test_a_missing_field_is_told(folder):
    path = folder / FILE_NAME
    row = json.loads(path.read_text("utf-8").splitlines()[0])
    del row["floor"]
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="floor"):
        Cells(folder)


def test_altered_curves_are_refused(folder):
    cells = Cells(folder)
    cell = cells[a_cell("adam").key]
    path = folder / cell.key.file()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="digest"):
        cells.curves(cell)
    path.write_bytes(bytes(10**6))
    with pytest.raises(UserError, match="size"):
        cells.curves(cell)
    path.unlink()
    with pytest.raises(UserError, match="cannot read"):
        cells.curves(cell)


class Trap:
    """Fails the test where it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("a file was unpickled",))


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        npz(losses=some_curves().losses),
        npz(losses=some_curves().losses, validation=np.zeros((3, 2, 3), np.float32)),
        npz(losses=some_curves().losses, validation=np.zeros((3, 2, 2))),
        npz(losses=some_curves().losses, validation=np.asfortranarray(np.ones((3, 2, 2), np.float32))),
        npz(losses=some_curves().losses, validation=np.array([[[Trap()] * 2] * 2] * 3, dtype=object)),
        pickle.dumps(Trap()),
        b"",
    ],
)
def test_curves_of_another_kind_are_refused_whatever_their_digest_says(folder, data):
    cells = Cells(folder)
    cell = cells[a_cell("adam").key]
    (folder / cell.key.file()).write_bytes(data)
    with pytest.raises(UserError) as caught:
        cells.curves(dataclasses.replace(cell, digest=hashlib.sha256(data).hexdigest()))
    assert "\n" not in str(caught.value)


def test_a_compressed_file_is_not_blown_up(folder):
    cells = Cells(folder)
    cell = cells[a_cell("adam").key]
    buffer = io.BytesIO()
    bomb = np.zeros((10**6,), np.float32)
    np.savez_compressed(buffer, losses=bomb, validation=bomb)
    (folder / cell.key.file()).write_bytes(buffer.getvalue())
    with pytest.raises(UserError):
        cells.curves(dataclasses.replace(cell, digest=hashlib.sha256(buffer.getvalue()).hexdigest()))


@pytest.mark.parametrize(
    ("cell", "curves"),
    [
        (a_cell(steps=7), some_curves()),
        (a_cell(seeds=(0,)), some_curves()),
        (a_cell(), Curves(some_curves().losses, {"test": np.zeros((2, 2, 1))})),
        (a_cell(measured={"seconds": float("nan")}), some_curves()),
        (a_cell(config={"x": {1, 2}}), some_curves()),
    ],
)
def test_what_does_not_fit_is_not_written(tmp_path, cell, curves):
    cells = Cells(tmp_path)
    with pytest.raises(UserError):
        cells.add(cell, curves)
    assert len(cells) == 0 and list(tmp_path.iterdir()) == []


def test_names_of_files_come_from_the_key_alone(tmp_path):
    key = Key("../../x", "/etc/adam", "constant", 1, (0,), "0")
    assert "/" not in key.file() and key.file() == dataclasses.replace(key).file()
    with pytest.raises(UserError, match="cannot use"):
        (tmp_path / "file").write_text("")
        Cells(tmp_path / "file")
