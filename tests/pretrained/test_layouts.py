"""Published trees to this project's theta and back, exactly; every wrong leaf is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published_trees import Tree, joined, same, tree

from celo_nnx.errors import UserError
from celo_nnx.experiments.celo2_base import FOURTEEN
from celo_nnx.pretrained import layouts

SIZES = dict(K=3, C=6)  # small ones, and several MLPs
LEAVES = dict(celo2=19, celo=33, velo=33, celo_adam=12, rnn_mlp=16, adafac_mlp=9, nn_adam=10)


def synthetic(layout: str, **options: Any) -> Tree:
    return tree(layout, SIZES, **options)


def flat(tree: dict) -> dict[str, np.ndarray]:
    return layouts.flatten(tree)


def test_groups_are_the_presets() -> None:
    assert tuple(layouts.GROUPS) == FOURTEEN


@pytest.mark.parametrize("layout", sorted(layouts.LAYOUTS))
def test_round_trip(layout: str) -> None:
    made = synthetic(layout)
    assert len(made) == LEAVES[layout]
    own = layouts.to_own(layout, made)
    assert same(layouts.to_published(layout, own), made)
    assert same(flat(layouts.to_own(layout, joined(made))), flat(own))
    values = np.concatenate([v.ravel() for v in flat(own).values()])
    assert np.array_equal(np.sort(values), np.arange(values.size))  # nothing lost, nothing twice


@pytest.mark.parametrize("layout", ["celo2", "celo", "velo", "adafac_mlp", "rnn_mlp"])
@pytest.mark.parametrize("layers", [1, 3])
def test_depth_is_found(layout: str, layers: int) -> None:
    made = synthetic(layout, layers=layers)
    own = layouts.to_own(layout, made)
    assert f"w{layers}" in own["update_rule"] and f"w{layers + 1}" not in own["update_rule"]
    assert same(layouts.to_published(layout, own), made)


def test_fewer_groups_renumber() -> None:
    groups = ("gradient", "momentum", "row")
    made = synthetic("celo2", groups=groups)
    own = layouts.to_own("celo2", made, groups=groups)
    assert np.array_equal(own["update_rule"]["w0"]["row"], made["ff_mod_stack", "~", "w0__2"])
    assert same(layouts.to_published("celo2", own), made)


def test_rows_of_an_unsplit_first_layer() -> None:
    """Positions written out by hand (OPTIMIZERS 7 and 8)."""
    w = synthetic("adafac_mlp")["nn", "~", "w0"]
    w0 = layouts.to_own("adafac_mlp", synthetic("adafac_mlp"))["update_rule"]["w0"]
    assert list(w0)[-1] == "time_tanh"
    for group, rows in {
        "momentum": (2, 5),
        "second_moment": (5, 6),
        "row": (13, 16),
        "time_tanh": (28, 39),
    }.items():
        assert np.array_equal(w0[group], w[slice(*rows)])
    w = synthetic("rnn_mlp")["ffmod_params", "mlp/~/linear_0", "w"]
    w0 = layouts.to_own("rnn_mlp", synthetic("rnn_mlp"))["update_rule"]["w0"]
    for group, rows in {
        "log_parameter": (2, 3),
        "rsqrt_second_moment": (18, 23),
        "time_sine": (23, 34),
    }.items():
        assert np.array_equal(w0[group], w[slice(*rows)])
    assert np.array_equal(w0["log_size"], w[36:37]) and np.array_equal(w0["controls"], w[37:])


@pytest.mark.parametrize("layout", sorted(layouts.LAYOUTS))
def test_every_wrong_leaf_is_named(layout: str) -> None:
    made = synthetic(layout)
    for path in made:
        name = "/".join(path)
        less = {k: v for k, v in made.items() if k != path}
        with pytest.raises(UserError, match=f"leaf {name!r} is missing: expected {len(made)} leaves"):
            layouts.to_own(layout, less, layers=2)
        with pytest.raises(UserError, match=f"leaf {name!r}: expected float32, found float64"):
            layouts.to_own(layout, made | {path: made[path].astype(np.float64)})
        with pytest.raises(UserError, match=f"leaf {name!r}: expected .*, found"):
            layouts.to_own(layout, made | {path: made[path][None]})
    with pytest.raises(UserError, match="leaf 'more/x' is unknown"):
        layouts.to_own(layout, made | {("more", "x"): np.zeros(1, np.float32)})
    own = layouts.to_own(layout, made)
    with pytest.raises(UserError, match="leaf 'more' is unknown"):
        layouts.to_published(layout, own | {"more": np.zeros(1, np.float32)})


def test_one_bad_size_is_blamed_on_its_leaf() -> None:
    made = synthetic("celo")
    path = ("ff_mod_stack", "~", "w0__0")
    message = r"leaf 'ff_mod_stack/~/w0__0': expected \[3, 1, 4\], found \[3, 1, 5\]"
    with pytest.raises(UserError, match=message):
        layouts.to_own("celo", made | {path: np.zeros((3, 1, 5), np.float32)})


def test_key_tuples_are_compared_key_by_key() -> None:
    made = synthetic("nn_adam")
    made["rnn_params", "rnn", "linear", "w"] = made.pop(("rnn_params", "rnn/linear", "w"))
    with pytest.raises(UserError, match="leaf 'rnn_params/rnn/linear/w'"):
        layouts.to_own("nn_adam", made)


def test_celo_is_not_velo() -> None:
    with pytest.raises(
        UserError, match=r"leaf 'rnn_params/linear/w': expected \[18 or 19, 6\], found \[30, 6\]"
    ):
        layouts.to_own("celo", synthetic("velo"))
    with pytest.raises(UserError, match="unknown layout 'celo3'"):
        layouts.leaves("celo3")
    with pytest.raises(UserError, match="unknown feature group"):
        layouts.leaves("celo2", groups=["momentun"])


NAMES = {"celo_phase1": "celo", "nnadam": "nn_adam", "velo_s": "velo", "celo2base": "celo2"}
NAMES |= {"celo2transform": "celo2"}


def recorded_layout(stem: str) -> str:
    for name in sorted([*NAMES, *layouts.LAYOUTS], key=len, reverse=True):
        if stem == name or stem.startswith(f"{name}_"):
            return NAMES.get(name, name)
    raise AssertionError(stem)


def test_recorded_thetas(shared: Path) -> None:
    """Every recorded theta maps and maps back, by key tuples and by joined names."""
    count = 0
    for header in sorted((shared / "golden").glob("*.json")):
        meta = json.loads(header.read_text())
        if meta["kind"] != "optimizer_trajectory":
            continue
        with np.load(header.with_suffix(".npz")) as arrays:
            made = {tuple(leaf["path"]): arrays[leaf["key"]] for leaf in meta["theta_leaves"]}
            names = {k.removeprefix("theta/"): arrays[k] for k in arrays.files if k.startswith("theta/")}
        layout = recorded_layout(header.stem)
        own = layouts.to_own(layout, made)
        assert same(layouts.to_published(layout, own), made), header.stem
        assert same(flat(layouts.to_own(layout, names)), flat(own))
        count += 1
    assert count == 25
