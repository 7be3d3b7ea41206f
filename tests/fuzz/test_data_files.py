"""Files that are read as data: recordings, published weights, theta files, data sets, texts."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import made_recordings
import numpy as np
import pytest
from fuzzing import Tally, altered, damaged, examples, misspelt
from hypothesis import given
from hypothesis import strategies as st
from published_trees import joined, tree

from celo_nnx import doctor, replay
from celo_nnx.pretrained import files, layouts, messagepack, pylo
from celo_nnx.pretrained.convert import import_weights
from celo_nnx.tasks import data, load_text
from celo_nnx.theta_io import load_theta, save_theta

RECORDINGS = (
    "normalizer",
    "pes_grad",
    "image_pipeline",
    "inner_unroll_celo2_init_theta",
    "celo2_wd0.1_ptheta",
)
RECORDINGS += ("nnadam_ptheta", "celo_adam", "velo_s_ptheta", "rnn_mlp_ptheta", "adafac_mlp_ptheta")
Arrays = dict[str, np.ndarray]


@st.composite
def changed(draw: Any, arrays: Mapping[Any, np.ndarray]) -> Arrays:
    """Arrays lost, renamed, of another type or shape, or with other numbers in them."""
    arrays = dict(arrays)
    for _ in range(draw(st.sampled_from((0, 1, 1, 2)))):
        if not arrays:
            break
        key = draw(st.sampled_from(sorted(arrays)))
        x = arrays[key]
        kind = draw(st.sampled_from(("drop", "rename", "type", "shape", "slice", "fill", "odd")))
        if kind == "drop":
            del arrays[key]
        elif kind == "rename":
            fresh = draw(misspelt(key if isinstance(key, str) else key[-1]))
            arrays[fresh if isinstance(key, str) else (*key[:-1], fresh)] = arrays.pop(key)
        elif kind == "type":
            types = ("float64", "float16", "int8", "int64", "uint8", "uint64", "bool", "complex64", ">f4")
            with np.errstate(all="ignore"), contextlib.suppress(ValueError, TypeError):
                arrays[key] = np.asarray(x).astype(draw(st.sampled_from(types)))
        elif kind == "shape":
            shapes = ((-1,), (1, *x.shape), (*x.shape, 1), x.shape[::-1])
            arrays[key] = x.reshape(draw(st.sampled_from(shapes)))
        elif kind == "slice":
            arrays[key] = x[:0] if x.ndim and draw(st.booleans()) else x[..., :1] if x.ndim else x[None]
        elif kind == "fill":
            number = draw(st.sampled_from((0, 1, 255, float("nan"), float("inf"), -1e38)))
            with np.errstate(all="ignore"), contextlib.suppress(ValueError, TypeError):
                arrays[key] = np.full_like(x, np.asarray(number).astype(x.dtype))
        else:
            odd = (
                np.zeros(()),
                np.zeros((0, 3)),
                np.array("text"),
                np.array([b"x"]),
                np.zeros(2, "datetime64[s]"),
            )
            arrays[key] = draw(st.sampled_from(odd))
    return arrays


def npz(arrays: Arrays) -> bytes:
    file = io.BytesIO()
    np.savez(file, **{key or "_": x for key, x in arrays.items()})
    return file.getvalue()


def cache() -> Path:
    return Path(os.environ["CELO_NNX_CACHE"])


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def traced(function: Any) -> Any:
    """Instead of a compiled function: its result's shapes, all zeros."""

    def made(*options: Any) -> Any:
        def call(*arguments: Any) -> Any:
            shapes = jax.eval_shape(function(*options), *arguments)
            return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)

        return call

    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "made").mkdir()
    return tmp_path / "made"


# Made here, for a checkout without recorded files beside it: learned rules of different inputs and states.
MADE = {
    "nn_adam": ("celo.optimizers.nn_adam.NNAdam", {"lstm_hidden_size": 5}),
    "rnn_mlp": ("celo.optimizers.rnn_mlp_lopt.RNNMLPLOpt", {"lstm_hidden_size": 5, "hidden_size": 4}),
    "adafac_mlp": ("celo.optimizers.adafac_mlp_lopt.AdafacMLPLOpt", {"hidden_size": 3}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small recordings: the one in the package and :data:`MADE`."""
    folder = tmp_path_factory.mktemp("recordings")
    for suffix in (".json", ".npz"):
        shutil.copy(doctor.RECORDING.with_suffix(suffix), folder)
    leaves = {"w": ((2, 3), None, [0, 1]), "x": ((4,), None, None)}
    for name, (reference, constructor) in MADE.items():
        made_recordings.record(folder, reference, constructor, leaves, name=name)
    return folder


@pytest.fixture(params=["made", "recorded"])
def recordings(request: pytest.FixtureRequest, made: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stems of recordings, which are then replayed without computing anything."""
    if request.param == "made":
        stems = [made / name for name in ("self_test", *MADE)]
    else:
        stems = [request.getfixturevalue("shared") / "golden" / name for name in RECORDINGS]
    for name in ("_trajectory", "_inner"):
        monkeypatch.setattr(replay, name, traced(getattr(replay, name)))
    return stems


@examples(20, 700)
@given(choices=st.data())
def test_recordings(tally: Tally, folder: Path, recordings: list[Path], choices: st.DataObject) -> None:
    draw = choices.draw
    stem = draw(st.sampled_from(recordings))
    header = json.loads(stem.with_name(f"{stem.name}.json").read_text())
    with np.load(stem.with_name(f"{stem.name}.npz")) as arrays:
        arrays = dict(arrays)
    text = json.dumps(draw(altered(header)) if draw(st.booleans()) else header, default=str).encode()
    stored = npz(draw(changed(arrays)) if draw(st.booleans()) else arrays)
    broken = draw(st.sampled_from(("", "", "", "text", "stored")))
    (folder / "a.json").write_bytes(draw(damaged(text)) if broken == "text" else text)
    (folder / "a.npz").write_bytes(draw(damaged(stored)) if broken == "stored" else stored)
    with tally.trying():
        replay.replay(folder / "a", twin=draw(st.booleans()))


def published(layout: str, form: str) -> tuple[Any, dict[str, str]]:
    """Leaves of a layout and a header, in one of three forms."""
    leaves = tree(layout)
    if form == "pylo" and layout in pylo.MODULES:
        return pylo.to_pylo(layout, leaves)
    return (leaves if form == "state" else joined(leaves)), {}


@examples(20, 600)
@given(choices=st.data())
def test_published_weights(tally: Tally, folder: Path, choices: st.DataObject) -> None:
    draw = choices.draw
    layout = draw(st.sampled_from(sorted(layouts.LAYOUTS)))
    form = draw(st.sampled_from(("state", "pylo", "safetensors")))
    leaves, header = published(layout, form)
    leaves = draw(changed(leaves))
    try:
        if form == "state":
            raw = messagepack.dumps(leaves)
        else:
            raw = files.safetensors_bytes(leaves, draw(altered(header)))
    except Exception:  # arrays or texts that the format does not hold
        raw = b""
    raw = draw(damaged(raw)) if draw(st.booleans()) else raw
    empty(folder)
    source = folder / ("theta.state" if form == "state" else "theta.safetensors")
    source.write_bytes(raw)
    variant = draw(st.sampled_from((None, None, layout, "celo2", "velo_s")))
    with tally.trying(folder):
        import_weights(str(source), folder / "out.safetensors", variant=variant)
    assert {path.name for path in folder.iterdir()} <= {source.name, "out.safetensors"}


@examples(20, 200)
@given(choices=st.data())
def test_theta_files(tally: Tally, folder: Path, choices: st.DataObject) -> None:
    theta = {"rule": {"w": np.ones((3, 2), np.float32), "b": np.zeros(2, np.float32)}}
    save_theta(folder / "a.safetensors", theta, {"config": "{}"})
    whole = (folder / "a.safetensors").read_bytes()
    (folder / "a.safetensors").write_bytes(raw := choices.draw(damaged(whole)))
    with tally.trying():
        found = load_theta(folder / "a.safetensors")
        assert raw == whole or found["rule"]["w"].tobytes() == theta["rule"]["w"].tobytes()


IMAGES = {
    "train_x": np.arange(8 * 16, dtype=np.uint8).reshape(8, 4, 4),
    "train_y": np.arange(8) % 3,
    "test_x": np.arange(4 * 16, dtype=np.uint8).reshape(4, 4, 4),
    "test_y": np.arange(4) % 3,
}


@examples(30, 400)
@given(choices=st.data())
def test_data_sets(tally: Tally, folder: Path, choices: st.DataObject) -> None:
    draw = choices.draw
    raw = npz(draw(changed(IMAGES)))
    (folder / "mine.npz").write_bytes(draw(damaged(raw)) if draw(st.booleans()) else raw)
    size = draw(st.sampled_from((1, 4, 8, 512)))
    with tally.trying(cache()):
        data.load("mine", size=size, grey=draw(st.booleans()), data_dir=str(folder))


@examples(30, 100)
@given(choices=st.data())
def test_texts(tally: Tally, folder: Path, choices: st.DataObject) -> None:
    draw = choices.draw
    plain = draw(st.one_of(st.text(max_size=80).map(str.encode), st.binary(max_size=80)))
    packed = draw(st.booleans())
    raw = draw(damaged(gzip.compress(plain, mtime=0))) if packed else plain
    empty(folder)
    (folder / ("mine.txt.gz" if packed else "mine.txt")).write_bytes(raw)
    level = draw(st.sampled_from(("byte", "character", "token", "x")))
    with tally.trying(cache()):
        load_text("mine", level=level, words=draw(st.sampled_from((2, 10, 0, -1))), data_dir=str(folder))
