"""PyLO's state dicts: exact both ways, and the same function under PyTorch's convention of a dense layer."""

from __future__ import annotations

import json

import numpy as np
import pytest
from published_trees import joined, same, tree

from celo_nnx.errors import UserError
from celo_nnx.pretrained import layouts, pylo

# PyLO's names and shapes, written out by hand from OPTIMIZERS section 13.
META_MLP = {
    "network.input.weight": (4, 39),
    "network.input.bias": (4,),
    "network.linear_0.weight": (4, 4),
    "network.linear_0.bias": (4,),
    "network.output.weight": (2, 4),
    "network.output.bias": (2,),
}
WIDTHS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
CELO2_MLP = {f"w0.{j}": (width, 8) for j, width in enumerate(WIDTHS)} | {"b0": (8,)}
CELO2_MLP |= {"dense_w.0": (8, 8), "dense_w.1": (8, 3), "dense_b.0": (8,), "dense_b.1": (3,)}
VELO = {
    "VeLOMLP.input_weights_": (32, 4, 30),
    "VeLOMLP.input_bias_": (32, 4),
    "VeLOMLP.hidden_weights_.0": (32, 4, 4),
    "VeLOMLP.hidden_bias_.0": (32, 4),
    "VeLOMLP.output_weights_": (32, 3, 4),
    "VeLOMLP.output_bias_": (32, 3),
    "VeLORNN.lstm.linear.weight": (256, 128),
    "VeLORNN.lstm.linear.bias": (256,),
    "VeLORNN.rnn_to_controls.weight": (32, 64),
    "VeLORNN.rnn_to_controls.bias": (32,),
    "VeLORNN.step_size.weight": (1, 64),
    "VeLORNN.step_size.bias": (1,),
    "VeLORNN.lstm_init_state.0": (1, 64),
    "VeLORNN.lstm_init_state.1": (1, 64),
}
for layer in ("mix_layer1", "mix_layer2", "final_mix_layer"):
    VELO |= {f"VeLORNN.{layer}.weight": (64, 30), f"VeLORNN.{layer}.bias": (64,)}
SHAPES = {"adafac_mlp": META_MLP, "celo2": CELO2_MLP, "velo": VELO}


@pytest.mark.parametrize("layout", sorted(pylo.MODULES))
def test_names_shapes_and_round_trip(layout: str) -> None:
    published = tree(layout)
    arrays, metadata = pylo.to_pylo(layout, published)
    assert {name: array.shape for name, array in arrays.items()} == SHAPES[layout]
    found, back, note = pylo.from_pylo(arrays, metadata)
    assert (found, note) == (layout, "") and same(back, joined(published))


@pytest.mark.parametrize("layout", sorted(pylo.MODULES))
@pytest.mark.parametrize("layers", [1, 3])
def test_other_depths(layout: str, layers: int) -> None:
    published = tree(layout, layers=layers)
    _, back, _ = pylo.from_pylo(*pylo.to_pylo(layout, published))
    assert same(back, joined(published))


def test_meta_mlp_is_the_same_function() -> None:
    rng = np.random.default_rng(0)
    published = {
        k: rng.standard_normal(v.shape).astype(np.float32) for k, v in tree("adafac_mlp", layers=3).items()
    }
    arrays, metadata = pylo.to_pylo("adafac_mlp", published)
    here = there = rng.standard_normal((5, 39)).astype(np.float32)
    for i, name in enumerate(("input", "linear_0", "linear_1", "output")):
        act = (lambda x: np.maximum(x, 0)) if i < 3 else (lambda x: x)
        here = act(here @ published["nn", "~", f"w{i}"] + published["nn", "~", f"b{i}"])
        there = act(there @ arrays[f"network.{name}.weight"].T + arrays[f"network.{name}.bias"])
    assert np.allclose(here, there, rtol=0, atol=1e-4) and np.abs(here).max() > 1
    config = json.loads(metadata["config"])
    assert config == {"input_size": 39, "hidden_size": 4, "hidden_layers": 2}
    offsets = json.loads(metadata["decay_offsets"])
    assert np.array_equal(np.float32(offsets["adafactor"]), published["adafactor_decays",])


def test_velo_bank_is_the_same_function() -> None:
    rng = np.random.default_rng(1)
    published = {k: rng.standard_normal(v.shape).astype(np.float32) for k, v in tree("velo").items()}
    arrays, _ = pylo.to_pylo("velo", published)
    features = [rng.standard_normal(width).astype(np.float32) for width in WIDTHS]
    here = sum(
        np.einsum("w,kwh->kh", x, published["ff_mod_stack", "~", f"w0__{j}"]) for j, x in enumerate(features)
    )
    there = np.einsum("f,khf->kh", np.concatenate(features), arrays["VeLOMLP.input_weights_"])
    assert np.allclose(here, there, rtol=0, atol=1e-4)
    assert np.array_equal(arrays["VeLORNN.mix_layer2.weight"].T, published["rnn_params", "linear_1", "w"])
    assert np.array_equal(arrays["VeLORNN.lstm_init_state.1"], published["lstm_init_state", "cell"])


def test_fewer_groups_of_celo2() -> None:
    groups = ("gradient", "momentum", "row")
    published = tree("celo2", groups=groups)
    arrays, metadata = pylo.to_pylo("celo2", published, groups=groups, activation="tanh")
    config = json.loads(metadata["config"])
    assert (config["feature_dims"], config["activation"]) == ([1, 3, 3], "tanh")
    assert same(pylo.from_pylo(arrays, metadata, groups=groups)[1], joined(published))
    with pytest.raises(UserError, match="PyLO's VeLO has all 14 feature groups, found 3"):
        pylo.to_pylo("velo", tree("velo", groups=groups), groups=groups)


def test_scratch_copies_and_missing_offsets() -> None:
    arrays, metadata = pylo.to_pylo("velo", tree("velo"))
    scratch = {"VeLOMLP.input_weights": np.zeros((4, 30)), "VeLOMLP.hidden_bias.0": np.zeros(4)}
    assert same(pylo.from_pylo(arrays | scratch, metadata)[1], joined(tree("velo")))
    arrays, metadata = pylo.to_pylo("adafac_mlp", tree("adafac_mlp"))
    _, back, note = pylo.from_pylo(arrays, {})
    assert "AdafacLO" in note and back["rms_decays"] == np.float32(0.01079706)


@pytest.mark.parametrize("layout", sorted(pylo.MODULES))
def test_every_wrong_leaf_is_named(layout: str) -> None:
    arrays, metadata = pylo.to_pylo(layout, tree(layout))
    for name, array in arrays.items():
        with pytest.raises(UserError, match=f"leaf {name!r}: expected .*, found"):
            pylo.from_pylo(arrays | {name: array[None]}, metadata)
        with pytest.raises(UserError, match=f"leaf {name!r}: expected float32, found int32"):
            pylo.from_pylo(arrays | {name: array.astype(np.int32)}, metadata)
        with pytest.raises(UserError, match="leaf .* is (missing|unknown): expected|expected .*, found"):
            pylo.from_pylo({k: v for k, v in arrays.items() if k != name}, metadata)
    with pytest.raises(UserError, match="leaf 'extra' is unknown"):
        pylo.from_pylo(arrays | {"extra": np.zeros(1, np.float32)}, metadata)


RMS = ("0", "[NaN]", "[1e400]", '["0"]', f"[{10**400}]")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"momentum": [0, 0, 0], "rms": [0]}', "[" * 100_000]
    + [f'{{"momentum": [0, 0, 0], "rms": {x}, "adafactor": [0, 0, 0]}}' for x in RMS],
)
def test_bad_offsets(text: str) -> None:
    arrays, _ = pylo.to_pylo("adafac_mlp", tree("adafac_mlp"))
    with pytest.raises(UserError, match="header 'decay_offsets': expected"):
        pylo.from_pylo(arrays, {"decay_offsets": text})


def test_other_optimizers_have_no_module() -> None:
    with pytest.raises(UserError, match="PyLO has no module for celo_adam; it has adafac_mlp, celo2, velo"):
        pylo.to_pylo("celo_adam", tree("celo_adam"))
    wide = tree("velo", {"M": 5})
    assert layouts.to_own("velo", wide)
    with pytest.raises(
        UserError, match=r"'VeLOMLP.input_weights_': expected \[32, 4, 30\], found \[32, 4, 34\]"
    ):
        pylo.to_pylo("velo", wide)
