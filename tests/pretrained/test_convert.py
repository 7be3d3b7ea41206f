"""``celo-nnx import`` and ``celo-nnx export``: exact through every format, one line for every mistake."""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from published_trees import Tree, joined, same, tree
from safetensors.numpy import save

from celo_nnx import theta_io
from celo_nnx.build import build
from celo_nnx.cli import main
from celo_nnx.config import load
from celo_nnx.errors import UserError
from celo_nnx.meta.checkpoint import canonical
from celo_nnx.pretrained import convert, files, hub, layouts, messagepack, pylo

Capture = pytest.CaptureFixture[str]
# One variant of each layout, of the size that published_trees makes.
DEFAULTS = {"velo": "velo_s"}


def state(path: Path, published: Tree) -> Path:
    path.write_bytes(messagepack.dumps(published))
    return path


def fails(capsys: Capture, *argv: object) -> str:
    assert main([str(a) for a in argv]) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("celo-nnx: error: ") and captured.out == "", captured
    return lines[0]


def works(capsys: Capture, *argv: object) -> dict[str, object]:
    assert main([str(a) for a in argv]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("layout", sorted(layouts.LAYOUTS))
def test_every_layout_through_every_format(layout: str, capsys: Capture, tmp_path: Path) -> None:
    published = tree(layout)
    first = state(tmp_path / "in.state", published)
    row = works(capsys, "import", first, "--out", tmp_path / "a.safetensors")
    assert row["variant"] == DEFAULTS.get(layout, layout) and row["leaves"]
    header = theta_io.read_metadata(tmp_path / "a.safetensors")
    assert (header["layout"], header["source"]) == (layout, "in.state")
    assert header["source_sha256"] == files.sha256(first.read_bytes()) and str(tmp_path) not in str(header)
    theta = layouts.flatten(theta_io.load_theta(tmp_path / "a.safetensors"))
    assert same(theta, layouts.flatten(layouts.to_own(layout, published)))

    works(capsys, "export", tmp_path / "a.safetensors", "--format", "celo", "--out", tmp_path / "b.state")
    assert (tmp_path / "b.state").read_bytes() == first.read_bytes()
    for name in ("safetensors", "pylo") if layout in pylo.MODULES else ("safetensors",):
        file, back = tmp_path / f"{name}.safetensors", tmp_path / f"{name}_back.safetensors"
        works(capsys, "export", tmp_path / "a.safetensors", "--format", name, "--out", file)
        assert works(capsys, "import", file, "--variant", row["variant"], "--out", back)["layout"] == layout
        assert same(layouts.flatten(theta_io.load_theta(back)), theta)


def test_a_trained_theta_and_its_config(capsys: Capture, tmp_path: Path) -> None:
    """A narrow Celo2 with fewer groups: header and overrides carry what the container does not."""
    changes = ["optimizer.features.groups=('gradient','momentum')", "optimizer.update_rule.hidden=(4,4)"]
    changes.append("optimizer.update_rule.activation=tanh")
    config = load("celo2", changes)
    theta = build(config.optimizer, key=jax.random.key(1)).theta
    run = tmp_path / "run"
    run.mkdir()
    theta_io.save_theta(run / theta_io.FILE_NAME, theta, {"config": canonical(config.to_dict())})
    works(capsys, "export", run, "--format", "celo", "--out", tmp_path / "a.state")
    works(capsys, "export", run, "--format", "pylo", "--out", tmp_path / "p.safetensors")
    header = theta_io.read_metadata(tmp_path / "p.safetensors")
    assert json.loads(header["config"])["activation"] == "tanh"
    for name in ("a.state", "p.safetensors"):
        out = tmp_path / f"back_{name}.safetensors"
        works(capsys, "import", tmp_path / name, "--variant", "celo2", "--out", out, *changes)
        assert same(layouts.flatten(theta_io.load_theta(out)), layouts.flatten(theta))
        assert json.loads(theta_io.read_metadata(out)["config"])["optimizer"]["update_rule"]["hidden"] == [
            4,
            4,
        ]
        assert "is missing" in fails(capsys, "import", tmp_path / name, "--out", tmp_path / "c.safetensors")


def test_checked_against_the_preset(capsys: Capture, tmp_path: Path) -> None:
    wide = state(tmp_path / "wide.state", tree("celo2", {"H": 16}))
    out = tmp_path / "out.safetensors"
    assert "wide.state as celo2_base: 'update_rule/b0' is float32[16], the optimizer has float32[8]" in fails(
        capsys, "import", wide, "--variant", "celo2_base", "--out", out
    )
    works(capsys, "import", wide, "optimizer.update_rule.hidden=(16,16)", "--variant", "celo2", "--out", out)
    assert build(
        load("celo2", ["optimizer.update_rule.hidden=(16,16)"]).optimizer,
        None,
        {"kind": "file", "path": str(out)},
    )


# Arguments, the first one a name in the test's folder -> words of the line.
MISTAKES = {
    "none.state": "none.state: no such file; give a file",
    "empty": "expected one file that ends in .safetensors or .state, found 0",
    "celo.state --variant cello": "did you mean 'celo'?",
    "celo.state --variant celo_adam": "celo.state: leaf 'ff_mod_stack/~/b0' is unknown: "
    "expected 12 leaves of celo_adam, found 33",
    "celo.state --variant velo": "leaf 'rnn_params/linear/w': expected [30 or 31, 64], found [18, 64]",
    "celo_adam.state --variant celo": "leaf 'ff_mod_stack/~/b0' is missing: "
    "expected 33 leaves of celo, found 12",
    "lost.state": "leaf 'nn/~/b1' is missing: expected 9 leaves of adafac_mlp, found 8",
    "wide.state": "leaf 'nn/~/b1': expected float32, found float64",
    "foreign.state": "leaf 'a' is of no known layout",
    "ours.safetensors": "is a theta of celo-nnx already",
    "pylo.safetensors --variant velo": "is PyLO's for adafac_mlp, expected leaves of velo",
    "x.pt": "is a pickle or a zip such as PyTorch's, which is not read",
    "pickle.state": "is a pickle or a zip such as PyTorch's",
    "zip.safetensors": "safetensors.torch.save_file",
    "torch": "pickled weights are not read",
    "x.npz": "is a pickle or a zip such as PyTorch's",
    "celo.state --variant celo2 optimizer.x=1": "unknown config key",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_of_import(name: str, capsys: Capture, tmp_path: Path) -> None:
    adafac = tree("adafac_mlp")
    for layout in ("celo", "celo_adam"):
        state(tmp_path / f"{layout}.state", tree(layout))
    state(tmp_path / "lost.state", {k: v for k, v in adafac.items() if k[-1] != "b1"})
    b1 = adafac["nn", "~", "b1"]
    state(tmp_path / "wide.state", adafac | {("nn", "~", "b1"): b1.astype(np.float64)})
    state(tmp_path / "foreign.state", {("a",): b1})
    theta_io.save_theta(tmp_path / "ours.safetensors", {"a": b1})
    (tmp_path / "pylo.safetensors").write_bytes(files.safetensors_bytes(*pylo.to_pylo("adafac_mlp", adafac)))
    (tmp_path / "pickle.state").write_bytes(b"\x80\x02}q\x00.")
    (tmp_path / "zip.safetensors").write_bytes(b"PK\x03\x04archive/data.pkl")
    for file in ("empty/.keep", "torch/pytorch_model.bin", "x.pt"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"")
    np.savez(tmp_path / "x.npz", a=b1)
    source, *more = name.split()
    words = fails(capsys, "import", tmp_path / source, *more, "--out", tmp_path / "out.safetensors")
    assert MISTAKES[name] in words
    assert not (tmp_path / "out.safetensors").exists()


def test_nothing_is_overwritten(capsys: Capture, tmp_path: Path) -> None:
    source, out = state(tmp_path / "a.state", tree("celo_adam")), tmp_path / "out.safetensors"
    works(capsys, "import", source, "--out", out)
    before = out.read_bytes()
    assert "out.safetensors exists; name a new file" in fails(capsys, "import", source, "--out", out)
    assert "exists" in fails(capsys, "export", out, "--format", "celo", "--out", source)
    assert out.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == [
        "a.state",
        "out.safetensors",
    ]
    assert "no folder" in fails(capsys, "import", source, "--out", tmp_path / "none" / "x.safetensors")
    assert "no folder" in fails(capsys, "export", out, "--format", "celo", "--out", tmp_path / "none" / "x")


def test_what_the_system_refuses(capsys: Capture, tmp_path: Path) -> None:
    source, long = state(tmp_path / "a.state", tree("celo_adam")), tmp_path / ("x" * 300)
    theta, words = tmp_path / "a.safetensors", "cannot be read or written: File name too long"
    assert words in fails(capsys, "import", long, "--out", theta)
    assert words in fails(capsys, "import", source, "--out", long)
    works(capsys, "import", source, "--out", theta)
    assert words in fails(capsys, "export", long, "--format", "celo", "--out", tmp_path / "b")
    assert words in fails(capsys, "export", theta, "--format", "celo", "--out", long)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "a.state"]


def test_mistakes_of_export(capsys: Capture, tmp_path: Path) -> None:
    theta, out = tmp_path / "a.safetensors", tmp_path / "b"
    works(capsys, "import", state(tmp_path / "a.state", tree("celo_adam")), "--out", theta)
    assert "did you mean 'pylo'" in fails(capsys, "export", theta, "--format", "pilo", "--out", out)
    assert "PyLO has no module for celo_adam" in fails(
        capsys, "export", theta, "--format", "pylo", "--out", out
    )
    words = "leaf 'update_rule/b0' is missing: expected 19 leaves of celo2, found 12"
    assert words in fails(capsys, "export", theta, "--format", "celo", "--variant", "celo2", "--out", out)
    assert "no theta at" in fails(capsys, "export", tmp_path / "none", "--format", "celo", "--out", out)
    theta_io.save_theta(tmp_path / "x.safetensors", {"a": np.zeros(2, np.float32)})
    words = "leaf 'a' is of no known layout"
    assert words in fails(capsys, "export", tmp_path / "x.safetensors", "--format", "celo", "--out", out)
    assert not out.exists()


# --- damage -----------------------------------------------------------------------------------------------


def whole_files() -> dict[str, tuple[bytes, Tree]]:
    adafac = tree("adafac_mlp")
    small = tree("celo_adam", {"C": 2})
    return {
        "adafac.state": (messagepack.dumps(adafac), adafac),
        "scheduler.state": (messagepack.dumps(small), small),
        "sealed.safetensors": (files.safetensors_bytes(joined(adafac), {"layout": "adafac_mlp"}), adafac),
        "plain.safetensors": (save(joined(adafac)), adafac),
        "pylo.safetensors": (files.safetensors_bytes(*pylo.to_pylo("adafac_mlp", adafac)), adafac),
        "celo2_pylo.safetensors": (save(pylo.to_pylo("celo2", tree("celo2"))[0]), tree("celo2")),
    }


def outcome(path: Path, data: bytes, wanted: dict[str, np.ndarray]) -> str:
    """Reads a damaged file: "equal", "other" or "refused" with one line; no other exception."""
    path.write_bytes(data)
    try:
        _, theta, _ = convert.read(path, files.read_bytes(path), None, lambda _: list(layouts.GROUPS))
    except UserError as error:
        assert str(error) and "\n" not in str(error)
        return "refused"
    return "equal" if same(layouts.flatten(theta), wanted) else "other"


@pytest.mark.parametrize("name", whole_files())
def test_damage(name: str, tmp_path: Path) -> None:
    data, published = whole_files()[name]
    layout = convert.detect({k: v.shape for k, v in joined(published).items()}, own=False)
    wanted, path = layouts.flatten(layouts.to_own(layout, published)), tmp_path / name
    assert outcome(path, data, wanted) == "equal"
    for i in range(16):
        assert outcome(path, data[: len(data) * i // 16], wanted) == "refused"
    assert outcome(path, data + b"\0", wanted) == "refused"
    values = np.zeros(len(data), bool)  # bytes of the arrays themselves, which only a digest protects
    if name.endswith(".state"):
        for array in published.values():
            values[data.index(array.tobytes()) :][: array.nbytes] = True
    elif b"celo_nnx_digest" not in data:
        values[8 + int.from_bytes(data[:8], "little") :] = True
    for i in np.flatnonzero(~values):
        flipped = bytearray(data)
        flipped[i] ^= 1 << (i % 8)
        assert outcome(path, bytes(flipped), wanted) != "other", f"byte {i}"


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F16", "I32", "BOOL", "X"])
def test_other_dtypes_of_safetensors(dtype: str, tmp_path: Path) -> None:
    header = json.dumps({"nn/~/b0": {"dtype": dtype, "shape": [0], "data_offsets": [0, 0]}}).encode()
    data = len(header).to_bytes(8, "little") + header
    assert outcome(tmp_path / "x.safetensors", data, {}) == "refused"


# --- the Hub ----------------------------------------------------------------------------------------------


def stand_in(monkeypatch: pytest.MonkeyPatch, answer: Callable[..., str]) -> list[tuple[object, ...]]:
    calls: list[tuple[object, ...]] = []

    def snapshot_download(repository: str, *, allow_patterns: list[str]) -> str:
        calls.append((repository, tuple(allow_patterns)))
        return answer(repository)

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return calls


def test_from_the_hub(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "snapshot"
    folder.mkdir()
    state(folder / "theta.state", tree("celo2"))
    (folder / "config.json").write_text("{}")
    calls = stand_in(monkeypatch, lambda _: str(folder))
    row = works(
        capsys, "import", "amoudgl/celo2-base", "--variant", "celo2_base", "--out", tmp_path / "a.safetensors"
    )
    assert calls == [("amoudgl/celo2-base", ("*.safetensors", "*.state", "config.json"))]
    assert row["source"] == "amoudgl/celo2-base/theta.state"
    assert theta_io.read_metadata(tmp_path / "a.safetensors")["source"] == row["source"]
    shutil.copy(folder / "theta.state", folder / "other.state")
    words = "found 2 (other.state, theta.state)"
    assert words in fails(capsys, "import", "amoudgl/celo2", "--out", tmp_path / "b.safetensors")


def test_hub_missing_or_offline(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["import", "amoudgl/celo", "--out", tmp_path / "a.safetensors"]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'celo-nnx[hub]'" in fails(capsys, *argv)

    def offline(_: str) -> str:
        raise ConnectionError("no route\nto host")

    stand_in(monkeypatch, offline)
    assert (
        "amoudgl/celo is no file here and was not fetched from the Hub (ConnectionError: no route to host)"
        in fails(capsys, *argv)
    )
    calls = stand_in(monkeypatch, offline)
    assert "no such file" in fails(capsys, "import", "runs/theta.safetensors", *argv[2:]) and not calls


def test_a_path_is_not_a_hub_id(tmp_path: Path) -> None:
    for text in ("a", "a/b/c", "/a/b", "./a", "../b", "a/b.pt", "a b/c", "a/", "~/x"):
        assert not hub.is_id(text), text


# --- released files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["celo", "celo_adam"])
def test_released(name: str, shared: Path, capsys: Capture, tmp_path: Path) -> None:
    source, theta, back = (
        shared / "weights" / f"{name}.theta.state",
        tmp_path / "a.safetensors",
        tmp_path / "b",
    )
    assert works(capsys, "import", source, "--out", theta)["variant"] == name
    works(capsys, "export", theta, "--format", "celo", "--out", back)
    assert back.read_bytes() == source.read_bytes()
