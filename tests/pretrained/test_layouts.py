"""Published trees to this project's theta and back, exactly; every wrong leaf is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from celo_nnx.errors import UserError
from celo_nnx.experiments.celo2_base import FOURTEEN
from celo_nnx.pretrained import layouts

SIZES = dict(K=3, H=4, M=3, R=1, A=3, C=6, D=5, E=17, S=18, O=16)
INPUTS = {"velo": 30}
LEAVES = dict(celo2=19, celo=33, velo=33, celo_adam=12, rnn_mlp=16, adafac_mlp=9, nn_adam=10)


def synthetic(layout: str, **options: object) -> dict[tuple[str, ...], np.ndarray]:
    """A published tree of consecutive integers, so that no two entries are equal."""
    sizes, start, out = SIZES | {"F": INPUTS.get(layout, 18)}, 0, {}
    for leaf in layouts.leaves(layout, **options):
        shape = [layouts.size(dim, sizes) for dim in leaf.dims]
        size = int(np.prod(shape, dtype=int))
        out[leaf.path] = np.arange(start, start + size, dtype=np.float32).reshape(shape)
        start += size
    return out


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes() for k in a
    )


def flat(tree: dict) -> dict[str, np.ndarray]:
    return layouts.flatten(tree)


def test_groups_are_the_presets() -> None:
    assert tuple(layouts.GROUPS) == FOURTEEN


@pytest.mark.parametrize("layout", sorted(layouts.LAYOUTS))
def test_round_trip(layout: str) -> None:
    tree = synthetic(layout)
    assert len(tree) == LEAVES[layout]
    own = layouts.to_own(layout, tree)
    assert same(layouts.to_published(layout, own), tree)
    assert same(flat(layouts.to_own(layout, {"/".join(k): v for k, v in tree.items()})), flat(own))
    values = np.concatenate([v.ravel() for v in flat(own).values()])
    assert np.array_equal(np.sort(values), np.arange(values.size))  # nothing lost, nothing twice


@pytest.mark.parametrize("layout", ["celo2", "celo", "velo", "adafac_mlp", "rnn_mlp"])
@pytest.mark.parametrize("layers", [1, 3])
def test_depth_is_found(layout: str, layers: int) -> None:
    tree = synthetic(layout, layers=layers)
    own = layouts.to_own(layout, tree)
    assert f"w{layers}" in own["update_rule"] and f"w{layers + 1}" not in own["update_rule"]
    assert same(layouts.to_published(layout, own), tree)


def test_fewer_groups_renumber() -> None:
    groups = ("gradient", "momentum", "row")
    tree = synthetic("celo2", groups=groups)
    own = layouts.to_own("celo2", tree, groups=groups)
    assert np.array_equal(own["update_rule"]["w0"]["row"], tree["ff_mod_stack", "~", "w0__2"])
    assert same(layouts.to_published("celo2", own, groups=groups), tree)


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
    tree = synthetic(layout)
    for path in tree:
        name = "/".join(path)
        less = {k: v for k, v in tree.items() if k != path}
        with pytest.raises(UserError, match="is missing|is unknown"):
            layouts.to_own(layout, less, layers=2)
        with pytest.raises(UserError, match=f"leaf {name!r}: expected float32, found float64"):
            layouts.to_own(layout, tree | {path: tree[path].astype(np.float64)})
        with pytest.raises(UserError, match=f"leaf {name!r}: expected .*, found"):
            layouts.to_own(layout, tree | {path: tree[path][None]})
    with pytest.raises(UserError, match="leaf 'more/x' is unknown"):
        layouts.to_own(layout, tree | {("more", "x"): np.zeros(1, np.float32)})
    own = layouts.to_own(layout, tree)
    with pytest.raises(UserError, match="leaf 'more' is unknown"):
        layouts.to_published(layout, own | {"more": np.zeros(1, np.float32)})


def test_one_bad_size_is_blamed_on_its_leaf() -> None:
    tree = synthetic("celo")
    path = ("ff_mod_stack", "~", "w0__0")
    message = r"leaf 'ff_mod_stack/~/w0__0': expected \[3, 1, 4\], found \[3, 1, 5\]"
    with pytest.raises(UserError, match=message):
        layouts.to_own("celo", tree | {path: np.zeros((3, 1, 5), np.float32)})


def test_key_tuples_are_compared_key_by_key() -> None:
    tree = synthetic("nn_adam")
    tree["rnn_params", "rnn", "linear", "w"] = tree.pop(("rnn_params", "rnn/linear", "w"))
    with pytest.raises(UserError, match="leaf 'rnn_params/rnn/linear/w'"):
        layouts.to_own("nn_adam", tree)


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
            tree = {tuple(leaf["path"]): arrays[leaf["key"]] for leaf in meta["theta_leaves"]}
            joined = {k.removeprefix("theta/"): arrays[k] for k in arrays.files if k.startswith("theta/")}
        layout = recorded_layout(header.stem)
        own = layouts.to_own(layout, tree)
        assert same(layouts.to_published(layout, own), tree), header.stem
        assert same(flat(layouts.to_own(layout, joined)), flat(own))
        count += 1
    assert count == 25
