"""Replays: recorded files by both implementations, recordings made by the twin, and damaged files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from made_recordings import record

from celo_nnx.errors import UserError
from celo_nnx.replay import main, replay

KEYS = {"file", "kind", "optimizer", "steps", "max_abs_error", "max_rel_error", "ok"}
CELO2 = [
    f"{kind}{theta}"
    for kind in (
        "celo2_wd0",
        "celo2_wd0.1",
        "celo2base_wd0",
        "celo2base_wd0.1",
        "celo2transform_ortho0",
        "celo2transform_ortho1",
    )
    for theta in ("", "_ptheta")
]
OTHERS = ["pes_grad", "normalizer", "image_pipeline"]
# Compiling the composed optimizer takes 10 s a file; this one has every part.
QUICK = ("celo2_wd0.1_ptheta",)


@pytest.mark.parametrize("name", [*CELO2, "inner_unroll_celo2_init_theta", *OTHERS])
def test_recorded_by_the_twin(shared: Path, name: str):
    row = replay(shared / "golden" / name, twin=True)
    assert set(row) == KEYS and row["ok"], row
    if name in CELO2:
        assert row["max_abs_error"] < 1e-6 and row["steps"] == 12


@pytest.mark.parametrize(
    "name",
    [
        *(name if name in QUICK else pytest.param(name, marks=pytest.mark.drill) for name in CELO2),
        "inner_unroll_celo2_init_theta",
        *OTHERS,
    ],
)
def test_recorded_by_the_composed_optimizer(shared: Path, name: str):
    row = replay(shared / "golden" / f"{name}.npz")
    assert set(row) == KEYS and row["ok"], row
    if name in CELO2:
        assert row["max_abs_error"] < 1e-6


def test_other_optimizers_are_told_apart(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    meta = json.loads((shared / "golden" / "celo_adam.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(meta | {"reference_class": "some.Optimizer"}))
    (tmp_path / "other.npz").write_bytes((shared / "golden" / "celo_adam.npz").read_bytes())
    files = [tmp_path / "other.json", shared / "golden" / "normalizer.json"]
    assert main(files) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["ok"] for row in rows] == [False, True]
    assert "unsupported optimizer" in rows[0]["reason"]


# --- recordings made here ---------------------------------------------------------------------------------

CONSTRUCTOR = {
    "orthogonalize": True,
    "step_mult": 0.5,
    "weight_decay": 0.02,
    "mlp_activation": "tanh",
    "ff_hidden_size": 5,
    "ff_hidden_layers": 3,
    "exp_mult": 0.3,
    "rmsmult": 1.7,
    "param_scale_mult": True,
    "initial_momentum_decays": [0.8, 0.95],
    "initial_rms_decays": [0.9, 0.99],
    "initial_adafactor_decays": [0.7, 0.97],
    "with_p": False,
    "with_fac_rms": False,
    "adam_bias_correction": True,
    "adam_b2": 0.9,
    "mult_1d": 3.0,
    "ns_iters": 3,
}
LEAVES = {"a/w": ((6, 6), "celo2", [1, 0]), "b": ((), "celo2", None), "c": ((3,), "adam", None)}
STEPS = 3


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording whose constructor differs from the factory's in every option that a part has."""
    folder = tmp_path_factory.mktemp("recording")
    return record(folder, "celo.optimizers.celo2.Celo2", CONSTRUCTOR, LEAVES, steps=STEPS)


def _copy(made: Path, folder: Path, arrays: dict | None = None, **changes) -> Path:
    """Copies a recording with fields of the JSON (None removes one) or arrays changed."""
    meta = json.loads(made.with_suffix(".json").read_text()) | changes
    (folder / "x.json").write_text(json.dumps({k: v for k, v in meta.items() if v is not None}))
    with np.load(made.with_suffix(".npz")) as old:
        new = dict(old) | (arrays or {})
    np.savez(folder / "x.npz", **{k: v for k, v in new.items() if v is not None})
    return folder / "x"


def test_every_constructor_field_is_honoured(made: Path):
    """The composed optimizer follows the twin's recording of steps of size 1."""
    row = replay(made)
    # Steps here are a thousand times the golden ones, and so is the rounding.
    assert row["max_abs_error"] is not None and row["max_abs_error"] < 1e-4, row
    assert row["max_abs_error"] > 0 and row["optimizer"] == "celo2" and row["steps"] == STEPS


@pytest.mark.parametrize("change", ["tile=2", "kernel=pallas"])
def test_what_should_change_nothing_does_not(made: Path, change: str):
    row = replay(made, overrides=(change, "tensors.axes=last_two"))
    assert row["max_abs_error"] < 1e-4 and row["optimizer"] == "celo2", row


@pytest.mark.parametrize("change", [("tile=2",), ("kernel=pallas", "tile=8")])
def test_recorded_with_other_tiles_and_kernels(shared: Path, change: tuple[str, ...]):
    row = replay(shared / "golden" / f"{QUICK[0]}.npz", overrides=change)
    assert row["ok"] and row["max_abs_error"] < 1e-6, row


def test_what_changes_something_is_seen_and_mistakes_are_told(made: Path):
    assert replay(made, overrides=("weight_decay=0.03",))["max_abs_error"] > 1e-3
    for change, message in (
        ("tlie=2", "'tlie' .did you mean 'tile'"),
        ("step.exp_mul=2", "'exp_mul' .did you mean 'exp_mult'"),
        ("tile", "not of the form key=value"),
        ("kernel=palas", "did you mean 'pallas'"),
    ):
        with pytest.raises(UserError, match=message) as error:
            replay(made, overrides=(change,))
        assert "\n" not in str(error.value)


def test_a_wrong_trajectory_is_not_ok(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert replay(made, twin=True)["ok"]
    with np.load(made.with_suffix(".npz")) as arrays:
        other = arrays["params/b"].copy()
    other[-1] += 1e-3
    path = _copy(made, tmp_path, {"params/b": other})
    row = replay(path, twin=True)
    assert not row["ok"] and math.isclose(row["max_abs_error"], 1e-3, rel_tol=1e-2)
    assert main([path], twin=True) == 1
    assert replay(_copy(made, tmp_path, {"params/b": other}, tolerance={"params_abs": 0.1}), twin=True)["ok"]
    assert main([path], twin=True) == 0 and main([path], 1e-5, twin=True) == 1
    other[-1] = np.nan
    assert main([_copy(made, tmp_path, {"params/b": other})], twin=True) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last, parse_constant=pytest.fail)["max_abs_error"] is None


@pytest.mark.parametrize(
    ("arrays", "changes", "message"),
    [
        ({"grads/b": None}, {}, "'b' is not among both"),
        ({"params/b": np.zeros((2,), np.float32)}, {}, "shape"),
        ({"params/b": np.zeros((STEPS + 1,))}, {}, "dtype float64"),
        ({"theta/ff_mod_stack/~/b0": None}, {}, "b0' is missing"),
        ({"theta/extra": np.zeros(3, np.float32)}, {}, "theta/extra"),
        ({"losses": np.array([{}, 1, 2], object)}, {}, "npz of plain arrays"),
        ({}, {"kind": "optimiser_trajectory"}, "did you mean 'optimizer_trajectory'"),
        ({}, {"n_updates": 0}, "n_updates"),
        ({}, {"n_updates": "3"}, "n_updates"),
        (
            {},
            {"constructor": CONSTRUCTOR | {"adam_b3": 1.0}},
            "did you mean 'adam_b1'|did you mean 'adam_b2'",
        ),
        ({}, {"constructor": CONSTRUCTOR | {"ns_iters": 10**9}}, "from 0 to 100"),
        ({}, {"constructor": CONSTRUCTOR | {"weight_decay": True}}, "weight_decay"),
        ({}, {"reference_class": None}, "reference_class"),
        ({}, {"theta_from": "../made.npz"}, "plain NAME.npz"),
        ({}, {"theta_from": "elsewhere.npz"}, "no file"),
        ({}, {"tolerance": {"params_abs": "x"}}, "params_abs"),
        ({}, {"param_leaves": [{"key": "a/w", "factored_dims_d1_d0": [0, 2]}]}, "two different axes"),
        ({}, {"param_leaves": [{"key": "a/w", "routed_to": "sgd"}]}, "adam or celo2"),
    ],
)
def test_damaged_recordings_are_told_in_one_line(made: Path, tmp_path: Path, arrays, changes, message):
    path = _copy(made, tmp_path, arrays, **changes)
    with pytest.raises(UserError, match=message) as error:
        replay(path, twin=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.98])
def test_truncated_files(made: Path, tmp_path: Path, keep: float):
    path = _copy(made, tmp_path)
    whole = path.with_suffix(".npz").read_bytes()
    path.with_suffix(".npz").write_bytes(whole[: int(keep if keep > 1 else keep * len(whole))])
    with pytest.raises(UserError, match="x.npz"):
        replay(path)
    path.with_suffix(".json").write_text(made.with_suffix(".json").read_text()[:50])
    with pytest.raises(UserError, match="not readable JSON"):
        replay(path)


def test_an_altered_byte_of_an_array_is_noticed(made: Path, tmp_path: Path):
    path = _copy(made, tmp_path)
    whole = bytearray(path.with_suffix(".npz").read_bytes())
    whole[len(whole) // 3] ^= 0xFF
    path.with_suffix(".npz").write_bytes(bytes(whole))
    try:
        replay(path, twin=True)  # the byte may be padding of a header
    except UserError as error:
        assert "\n" not in str(error)


def test_the_other_files_are_replayed_before_the_error(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(UserError, match="no file"):
        main([tmp_path / "nothing.json", made], twin=True)
    assert json.loads(capsys.readouterr().out)["ok"]
    with pytest.raises(UserError, match="tolerance = -1"):
        main([made], -1.0)
