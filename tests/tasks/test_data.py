"""Looking up, checking, preparing and caching data sets."""

import io
import os
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

from celo_nnx.errors import UserError
from celo_nnx.tasks import data, npz


def arrays(n: int = 12, shape: tuple[int, ...] = (4, 4), classes: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    out = {}
    for split, count in (("train", n), ("test", n // 2)):
        out[f"{split}_x"] = rng.integers(0, 256, (count, *shape), np.uint8)
        out[f"{split}_y"] = (np.arange(count) % classes).astype(np.uint8)
    return out


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CELO_NNX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "sets").mkdir()
    return tmp_path / "sets"


def load(name: str, folder: Path | str = "", size: int = 4) -> data.Data:
    return data.load(name, size=size, grey=True, data_dir=str(folder))


def test_digits_are_embedded_split_and_scaled(folder: Path) -> None:
    digits = load("digits", size=8)
    assert digits.train_x.shape == (1500, 64) and digits.test_x.shape == (297, 64)
    assert digits.train_x.dtype == np.float32 and digits.train_y.dtype == np.int32 and digits.classes == 10
    assert digits.train_x.min() == 0 and digits.train_x.max() == 1
    assert set(np.unique(digits.train_x * 16)) == set(range(17))
    # The stated split, worked out anew.
    from sklearn.datasets import load_digits

    whole, order = load_digits(), np.random.default_rng(0).permutation(1797)
    np.testing.assert_array_equal(digits.train_y, whole.target[order[:1500]])
    np.testing.assert_array_equal(digits.test_x, (whole.data[order[1500:]] / 16).astype(np.float32))


def test_folder_before_environment_before_embedded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = folder.parent / "other"
    other.mkdir()
    np.savez(folder / "digits.npz", **arrays(12))
    np.savez(other / "digits.npz", **arrays(20))
    monkeypatch.setenv("CELO_NNX_DATA", str(other))
    assert len(load("digits", folder).train_x) == 12
    assert len(load("digits").train_x) == 20
    monkeypatch.delenv("CELO_NNX_DATA")
    assert len(load("digits").train_x) == 1500


def test_prepared_values_and_classes(folder: Path) -> None:
    raw = arrays(shape=(4, 4, 3))
    np.savez_compressed(folder / "mine.npz", **raw)
    mine = load("mine", folder)
    np.testing.assert_allclose(mine.train_x, raw["train_x"].mean(-1).reshape(12, 16) / 255, atol=1e-6)
    assert mine.classes == 3 and mine.source == str(folder / "mine.npz")
    assert data.load("mine", size=4, grey=False, data_dir=str(folder)).train_x.shape == (12, 48)
    # A known name has ten classes even in a sample that lacks some.
    np.savez(folder / "mnist.npz", **arrays())
    assert load("mnist", folder).classes == 10


def test_recorded_sets(shared: Path) -> None:
    sprite = data.load("fashion_mnist_sprite", size=8, grey=True, data_dir=str(shared / "data"))
    assert sprite.train_x.shape == (700, 64) and sprite.test_x.shape == (200, 64) and sprite.classes == 10


def broken(**changes: object) -> dict[str, np.ndarray]:
    return {key: value for key, value in (arrays() | changes).items() if value is not None}


BAD = {
    "missing key": (broken(test_y=None), ("expected exactly", "test_y", "found test_x, train_x, train_y")),
    "extra key": (broken(more=np.zeros(3)), ("expected exactly", "more")),
    "float images": (broken(train_x=np.zeros((12, 4, 4))), ("train_x", "uint8", "float64 [12, 4, 4]")),
    "flat images": (broken(train_x=np.zeros((12, 16), np.uint8)), ("train_x", "[n, h, w]", "[12, 16]")),
    "no images": (broken(train_x=np.zeros((0, 4, 4), np.uint8)), ("train_x", "1 image or more", "[0, 4, 4]")),
    "float labels": (broken(train_y=np.zeros(12)), ("train_y", "integer", "float64")),
    "fewer labels": (broken(train_y=np.zeros(11, np.uint8)), ("train_y", "expected 12", "found 11")),
    "label below 0": (broken(train_y=np.full(12, -1)), ("train_y", "from 0", "found -1")),
    "label too large": (broken(test_y=np.full(6, 10**6)), ("test_y", "9999", "1000000")),
    "other test shape": (broken(test_x=np.zeros((6, 5, 4), np.uint8)), ("test_x", "[4, 4]", "[5, 4]")),
    "pickled": (broken(train_y=np.array([None] * 12)), ("train_y", "pickled")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_npz_is_one_line_that_names_file_key_expected_found(case: str, folder: Path) -> None:
    content, words = BAD[case]
    np.savez(folder / "bad.npz", **content)
    with pytest.raises(UserError) as caught:
        load("bad", folder)
    message = str(caught.value)
    assert "\n" not in message and "bad.npz" in message
    assert all(word in message for word in words), message


def test_a_header_that_promises_too_much_takes_no_memory(folder: Path) -> None:
    for shape in ((10**13, 4, 4), (10**6, 4, 4)):
        header = io.BytesIO()
        fields = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, fields)
        np.savez(folder / "small.npz", **broken(train_x=None))
        with zipfile.ZipFile(folder / "small.npz", "a") as archive:
            archive.writestr("train_x.npy", header.getvalue() + b"\0" * 100)
        with pytest.raises(UserError, match="train_x: expected"):
            load("small", folder)


@pytest.mark.parametrize("keep", [0, 10, 200, 0.5, 0.99])
def test_truncated_npz(keep: float, folder: Path) -> None:
    np.savez_compressed(folder / "cut.npz", **arrays())
    whole = (folder / "cut.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    with pytest.raises(UserError, match="cut.npz: expected"):
        load("cut", folder)


def test_flipped_bytes_never_end_in_another_error(folder: Path) -> None:
    np.savez_compressed(folder / "bits.npz", **arrays())
    whole = (folder / "bits.npz").read_bytes()
    refused = 0
    for place in range(0, len(whole), 7):
        (folder / "bits.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            npz.read(folder / "bits.npz")
        except UserError as error:
            refused += "\n" not in str(error)
    assert refused > 20


def test_misspelt_and_absent_names(folder: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'digits'"):
        load("digitz")
    np.savez(folder / "my_set.npz", **arrays())
    with pytest.raises(UserError, match="did you mean 'my_set'.*run.data_dir"):
        load("my_sett", folder)
    with pytest.raises(UserError, match="'mnist_8x8' not found: looked for .*; put mnist_8x8.npz"):
        load("mnist_8x8", folder)
    with pytest.raises(UserError, match="not a folder"):
        load("digits", folder / "absent")
    with pytest.raises(UserError, match="not a name"):
        load("../digits", folder)


@pytest.mark.parametrize("size", [0, -1, 513, 2.5])
def test_size_out_of_range(size: int) -> None:
    with pytest.raises(UserError, match=r"image_size = .* from 1 to 512"):
        load("digits", size=size)


def fake_hub(monkeypatch: pytest.MonkeyPatch, image: str, error: Exception | None = None) -> list[tuple]:
    calls = []

    class Rows(list):
        def __getitem__(self, key: object) -> object:
            return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)

    def load_dataset(repository: str, config: str | None, split: str) -> Rows:
        calls.append((repository, config, split))
        if error is not None:
            raise error
        raw = arrays(shape=(32, 32, 3), classes=10, n=24)
        return Rows({image: x, "label": y} for x, y in zip(raw[f"{split}_x"], raw[f"{split}_y"], strict=True))

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_hub_is_read_once_and_then_cached(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_hub(monkeypatch, "image")
    svhn = load("svhn_cropped", size=8)
    assert calls == [("ufldl-stanford/svhn", "cropped_digits", split) for split in ("train", "test")]
    raw = arrays(shape=(32, 32, 3), classes=10, n=24)
    np.savez(folder / "svhn_cropped.npz", **raw)
    assert load("svhn_cropped", folder, size=8).digest == svhn.digest
    assert load("svhn_cropped", size=8).digest == svhn.digest and len(calls) == 2


def test_no_hub_and_no_network_say_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, "img", ConnectionError("no\nroute"))
    with pytest.raises(
        UserError, match="no route.*HF_HUB_OFFLINE.*HF_HOME.*cifar10.npz.*CELO_NNX_DATA"
    ) as caught:
        load("cifar10")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"looked for mnist.npz .*pip install celo-nnx\[hub\]"):
        load("mnist")


def test_cache_is_used_keyed_by_content_and_rebuilt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(folder / "mine.npz", **arrays())
    first = load("mine", folder)
    (cached,) = (folder.parent / "cache").iterdir()
    whole = cached.read_bytes()

    calls = []
    real = npz.read
    monkeypatch.setattr(npz, "read", lambda path: calls.append(path) or real(path))
    assert load("mine", folder).digest == first.digest and not calls
    # Altered, truncated and foreign caches are rebuilt.
    place = len(whole) // 2
    for content in (
        whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :],
        whole[:100],
        b"",
        b"x" * 99,
    ):
        cached.write_bytes(content)
        calls.clear()
        assert load("mine", folder).digest == first.digest and len(calls) == 1
        assert cached.read_bytes() == whole
    # Other content under the same name, and other settings, are other entries.
    np.savez(folder / "mine.npz", **arrays(20))
    assert len(load("mine", folder).train_x) == 20 and load("mine", folder, size=2).train_x.shape == (20, 4)
    assert len(list((folder.parent / "cache").iterdir())) == 3


def test_a_cache_that_cannot_be_written_is_no_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(folder / "mine.npz", **arrays())
    blocker = folder.parent / "file"
    blocker.write_text("")
    monkeypatch.setenv("CELO_NNX_CACHE", str(blocker / "below"))
    assert len(load("mine", folder).train_x) == 12
    assert blocker.read_text() == ""


def test_a_cache_entry_that_cannot_be_replaced_leaves_nothing_behind(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(folder / "mine.npz", **arrays())
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("full")))
    assert len(load("mine", folder).train_x) == 12
    assert os.listdir(folder.parent / "cache") == []


def test_listing_names_files_too(folder: Path) -> None:
    np.savez(folder / "mine.npz", **arrays())
    assert data.listing(str(folder))["mine"].endswith("mine.npz") and "digits" in data.listing()
