"""The command line: exit codes, one line for every mistake, nothing written by one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fake_run
import numpy as np
import pytest

import celo_nnx
from celo_nnx import commands, lock
from celo_nnx.cli import main
from celo_nnx.theta_io import load_theta

SMALL = ("meta.estimator.pairs=2", "meta.estimator.truncation=2", "run.iterations_per_dispatch=2")
SMALL += ("tasks.hidden=(4,)", "tasks.batch_size=4", "run.devices=1", "optimizer.update_rule.hidden=(2,2)")


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("celo-nnx: error: "), captured.err
    assert captured.out == ""
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["verify", "celo2", "--data-dir", "nodir"], ": --data-dir = 'nodir' is not a folder"),
        (["trian"], "unknown command 'trian' (did you mean 'train'?)"),
        ([], "required: COMMAND"),
        (["train"], "required: CONFIG, --run-dir"),
        (["evaluate"], "required: SUITE (see"),
        (["grid", "plan"], "required: GRID (see"),
        (["train", "celo2"], "required: --run-dir"),
        (["train", "celo2", "seed", "--run-dir", "x"], "'seed' is not of the form KEY=VALUE"),
        (["train", "celo2", "--run-dir", "x", "--fast"], "unknown argument '--fast'"),
        (["list", "part"], "unknown list 'part' (did you mean 'parts'?)"),
        (["replay", "x.npz", "--tolerance", "much"], "--tolerance: invalid float value: 'much'"),
        (["replay", "x.npz", "--set", "tile=2", "--twin"], "of the composed optimizer only"),
        (["bench", "mata"], "mata"),
        (["describe", "celo22"], "unknown config 'celo22' (did you mean 'celo2'?)"),
        (["describe", "seed=1"], "no config before 'seed=1': name one first"),
        (["describe", "nowhere.py"], "nowhere.py"),
        (["describe", "celo2", "optimizer.scheduel.value=1"], "schedule"),
        (["describe", "celo2", "seed=x"], "seed"),
        (["describe", "celo2", "theta_init.kind=fiel"], "did you mean 'file'"),
        (["describe", "celo2", "optimizer.schedule.value=1e999"], "'1e999' is out of range: must be finite"),
        (["describe", "celo2", "meta.estimator.std=-1e39"], "must be finite"),
        (["describe", "celo2", "meta.estimator.weights=(1,1e999)"], "must be finite"),
        (
            ["describe", "celo2", "meta.optimizer.learning_rate=-1"],
            "= -1.0 is out of range: must be a finite",
        ),
        (["evaluate", "smoke", "--seeds", "9999999999"], "seeds = 9999999999 is out of range"),
        (["evaluate", "smoke", "steps=9999999999"], "steps = 9999999999 is out of range"),
        (["bench", "step", "--params", "1000000", "99999999999999999"], "params = 99999999999999999 is out"),
        (
            ["describe", "celo2", "theta_init.kind=file", "theta_init.path=none.safetensors"],
            "no theta at none",
        ),
    ],
)
def test_one_line_and_exit_2(capsys: pytest.CaptureFixture[str], argv: list[str], words: str) -> None:
    assert words in fails(capsys, *argv)


@pytest.mark.parametrize("inside", [False, True])
def test_a_config_file_that_exits_is_a_mistake(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, inside: bool
) -> None:
    file, indent = tmp_path / "mine.py", "    " if inside else ""
    file.write_text(f"def get_config():\n    pass\n{indent}import sys; sys.exit(0)\n")
    assert f"failed: SystemExit: 0 ({file}, line 3)" in fails(capsys, "describe", str(file))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["optimizer.orthogonalization.kind=newton_shulz"], "did you mean 'newton_schulz'"),
        (["run.itertions=5"], "iterations"),
        (["run.iterations=-5"], "run.iterations = -5 is out of range: must be an integer >= 0"),
        (["run.iterations=many"], "many"),
        (["run.iterations=99999999999999999999"], "must be an integer >= 0 and < 2**31"),
        (["run.checkpoint_seconds=1e999"], "must be finite"),
        (["meta.estimator.std=-1.0"], "std = -1.0 is out of range"),
        (["meta.estimator.kind=pse"], "did you mean 'pes'"),
        (["meta.optimizer.learning_rate=-1.0"], "meta.optimizer.learning_rate = -1.0"),
        (["run.devices=3"], "run.devices = 3 is out of range: must be 0 or a divisor"),
        (["tasks.datasets=('digitz',)"], "did you mean 'digits'"),
        (["tasks.datasets=('mnist_8x8',)", "run.data_dir=nowhere"], "nowhere"),
        (["tasks.batch_size=0"], "batch_size = 0 is out of range"),
    ],
)
def test_a_mistake_leaves_no_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, changes: list[str], words: str
) -> None:
    folder = tmp_path / "run"
    assert words in fails(capsys, "train", "celo2:fast_digits", *SMALL, *changes, "--run-dir", str(folder))
    assert not folder.exists()


@pytest.mark.parametrize("damage", ["keys", "shape", "pickle", "truncated"])
def test_bad_npz(capsys: pytest.CaptureFixture[str], tmp_path: Path, damage: str) -> None:
    images = np.zeros((4, 8, 8), np.uint8)
    arrays = {
        "train_x": images,
        "train_y": np.zeros(4, np.uint8),
        "test_x": images,
        "test_y": np.zeros(4, np.uint8),
    }
    if damage == "keys":
        arrays["labels"] = arrays.pop("train_y")
    if damage == "shape":
        arrays["train_y"] = np.zeros(5, np.uint8)
    if damage == "pickle":
        arrays["train_y"] = np.array([{}] * 4, dtype=object)
    file = tmp_path / "mine.npz"
    np.savez(file, **arrays)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:100])
    argv = ["train", "celo2:fast_digits", *SMALL, "tasks.datasets=('mine',)", f"run.data_dir={tmp_path}"]
    assert "mine.npz" in fails(capsys, *argv, "--run-dir", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_run_folder_in_use_and_foreign(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with fake_run.assembled():
        argv = ["train", "celo2:fast_digits", *SMALL, "run.iterations=2", "run.progress=False", "--run-dir"]
        assert main([*argv, str(tmp_path / "a")]) == 0
        assert capsys.readouterr().err == f"its curves as a page: celo-nnx report {tmp_path / 'a'}\n"
        with lock.hold(tmp_path / "a"):
            assert "is in use by pid" in fails(capsys, *argv, str(tmp_path / "a"))
        assert "seed = 3 here, 0 there" in fails(capsys, *argv, str(tmp_path / "a"), "seed=3")
        for step in ("0", "2"):
            (tmp_path / "a" / "checkpoints" / step / "state" / "manifest.ocdbt").write_bytes(b"")
        assert "manifest.ocdbt is damaged" in fails(capsys, *argv, str(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "note").write_text("mine")
    assert "not a run directory: it holds 'note'" in fails(capsys, *argv, str(tmp_path / "b"))


def test_lists_and_describe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for word in ("newton_schulz", "factored_momentum", "celo2_published", "fast_velo", "digits"):
        assert word in out
    assert "docs/formulas/optimizers.md" in out.splitlines()[-1]
    assert main(["list", "variants"]) == 0
    assert "fast_velo" not in capsys.readouterr().out
    assert main(["describe", "celo2", "optimizer.schedule.value=0.25"]) == 0
    assert "0.25" in capsys.readouterr().out


def test_train_really(real_run: tuple[Path, str, str]) -> None:
    """The real trainer on digits; the stand-in cannot miss a change of its interface."""
    folder, out, err = real_run
    assert '"finished": true' in out and "iteration 3/3  meta-loss" in err
    assert (folder / "metrics.jsonl").read_text().count("\n") == 3
    assert load_theta(folder)["update_rule"]["b0"].any()  # starts at zero


def test_help_is_quick_and_imports_no_jax() -> None:
    code = (
        "import sys\nfrom celo_nnx.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit as end: print('code', end.code, 'jax' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert out.stdout.splitlines()[-1] == "code 0 False" and "examples:" in out.stdout, out.stderr


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError("Unable to allocate 4.5 PiB"), "out of memory: Unable to allocate 4.5 PiB"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "out of memory: RESOURCE_EXHAUSTED"),
    ],
)
def test_too_little_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def run(args: object) -> int:
        raise error

    monkeypatch.setattr(commands, "list_", run)
    assert words in fails(capsys, "list")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"celo-nnx {celo_nnx.__version__}\n"


def test_module_and_exit_code() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "celo_nnx", "oops"], capture_output=True, text=True, timeout=60
    )
    assert out.returncode == 2 and out.stderr.count("\n") == 1 and "Traceback" not in out.stderr
