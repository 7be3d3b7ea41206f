"""The doctor: all is well here, every fault is a line and never a traceback, nothing private is said."""

from __future__ import annotations

import importlib.metadata
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from celo_nnx import doctor
from celo_nnx.cli import main
from celo_nnx.meta import checkpoint


def no_network(*_: Any, **__: Any) -> Any:
    raise urllib.error.URLError(OSError("proxy http://me:secret@proxy is gone"))


def test_all_is_well_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is printed by the whole command; the hub cannot be reached, which is no failure."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CELO_NNX_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    before = time.monotonic()
    assert main(["doctor"]) == 0
    seconds = time.monotonic() - before
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert not err and all(line[:5] in ("ok   ", "warn ") for line in lines[1:-1]), out
    assert [name for name, _ in doctor.CHECKS] == list(dict.fromkeys(line.split()[1] for line in lines[1:-1]))
    assert "cache ~/not/yet: writable" in out and str(tmp_path) not in out and "secret" not in out
    assert "huggingface.co cannot be reached (OSError)" in out and lines[-1].endswith(" 0 FAIL")
    assert "4 recorded updates of celo2" in out and "written and read back bit by bit" in out
    assert f"jax {importlib.metadata.version('jax')}" in out
    assert not (tmp_path / "not").exists() and seconds < 120


def test_the_recording_is_the_published_one(shared: Path) -> None:
    golden = np.load(shared / "golden" / "celo2_wd0.1_ptheta.npz", allow_pickle=False)
    ours = np.load(doctor.RECORDING, allow_pickle=False)
    assert len(ours.files) > 20
    for name in ours.files:
        np.testing.assert_array_equal(ours[name], golden[name][: len(ours[name])], err_msg=name)


def found(check: Any) -> list[tuple[str, str]]:
    return list(doctor._guarded(check))


def test_a_wrong_update_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arrays = dict(np.load(doctor.RECORDING, allow_pickle=False))
    arrays["params/linear_0/w"][3, 1, 2] += 1e-4
    np.savez(tmp_path / "self_test.npz", **arrays)
    monkeypatch.setattr(doctor, "RECORDING", tmp_path / "self_test.npz")
    ((state, text),) = found(doctor._replay)
    assert state == "FAIL" and "no file" in text
    shutil.copy(Path(doctor.__file__).with_name("recordings") / "self_test.json", tmp_path)
    ((state, text),) = found(doctor._replay)
    assert state == "FAIL" and "0.0001" in text


def test_a_checkpoint_that_comes_back_changed_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    load = checkpoint.load

    def changed(*args: Any) -> Any:
        found = load(*args)
        found.state["theta"]["w"][0, 0] += 1e-7
        return found

    monkeypatch.setattr(checkpoint, "load", changed)
    assert found(doctor._checkpoint)[0][0] == "FAIL"
    monkeypatch.setattr(checkpoint, "save", lambda *_: 1 / 0)
    assert found(doctor._checkpoint) == [("FAIL", "ZeroDivisionError: division by zero")]


def test_what_fails_is_counted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def bad() -> Any:
        yield "ok", "so far"
        raise RuntimeError("no\nbackend")

    monkeypatch.setattr(doctor, "CHECKS", (("devices", bad),))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[1:] == [
        "ok    devices      so far",
        "FAIL  devices      RuntimeError: no backend",
        "1 ok, 0 warn, 1 FAIL",
    ]


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def other(name: str) -> str:
        if name in ("rich", "wandb"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1" if name == "flax" else version(name)

    monkeypatch.setattr(importlib.metadata, "version", other)
    lines = found(doctor._packages)
    assert ("FAIL", "rich is not installed: pip install 'rich>=13'") in lines
    assert ("warn", "flax 0.1 is not of the tested versions >=0.12.8") in lines
    assert "not installed: " in lines[-1][1] and "wandb" in lines[-1][1] and "pytest" not in lines[-1][1]


def test_folders_memory_and_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for otherwise in ("warn", "FAIL"):
        state, text = doctor._folder("cache", Path("/proc/none"), otherwise)
        assert state == otherwise and "cannot be written" in text
    monkeypatch.setattr(doctor, "_memory_bytes", lambda: (2**28, 2**33))
    assert found(doctor._memory) == [("warn", "0.2 GiB free of 8.0 GiB")]
    monkeypatch.setattr(doctor, "_memory_bytes", lambda: (0, 0))
    assert found(doctor._memory) == [("warn", "unknown on this system")]
    monkeypatch.setattr(doctor, "PATIENCE", -0.9)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: time.sleep(1))
    assert "no answer" in found(doctor._hub)[0][1]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert found(doctor._hub) == [("ok", "switched off by HF_HUB_OFFLINE")]
