"""How tensors of real networks are looked at, patterns and dimension trees over it, and every bad input."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from optax.contrib import MuonDimensionNumbers as Numbers

from celo_nnx import UserError, load_optimizer
from celo_nnx.tensors import Tensors, axes_in_words, dimension_numbers, recognise, spread, tensor_paths

Axes = tuple[int, ...]


def shapes_of(params: Any) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in tensor_paths(params)}


def matrices(params: Any) -> dict[str, tuple[Axes, Axes, Axes]]:
    """Returns (rows, columns, batch) of everything that is a matrix, by path."""
    specs = Tensors().specs(shapes_of(params))
    return {p: (s.rows, s.columns, s.batch) for p, s in specs.items() if s.matrix is not None}


# --- kernels of flax.nnx ----------------------------------------------------------------------------------


class Layers(nnx.Module):
    """One of each kind of layer, with the usual names and with others."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(8, 24, rngs=rngs)
        self.bare = nnx.Linear(8, 24, use_bias=False, rngs=rngs)
        heads = dict(num_heads=4, in_features=16, qkv_features=32, out_features=24, decode=False, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(**heads)
        self.unbiased = nnx.MultiHeadAttention(**heads, use_bias=False)
        self.general = nnx.LinearGeneral((8, 6), (4, 5), axis=(-2, -1), rngs=rngs)
        self.each = nnx.LinearGeneral(8, (4, 5), batch_axis={0: 3}, rngs=rngs)
        self.einsum = nnx.Einsum("abc,cde->abde", (8, 4, 5), (4, 5), rngs=rngs)
        self.stem = nnx.Conv(8, 16, (3, 3), rngs=rngs)
        self.conv = nnx.Conv(8, 16, (3, 3), use_bias=False, rngs=rngs)
        self.conv1d = nnx.Conv(8, 3, (3,), use_bias=False, rngs=rngs)
        self.transposed_conv = nnx.ConvTranspose(8, 16, (3, 3), use_bias=False, rngs=rngs)
        self.up = nnx.ConvTranspose(8, 16, (3, 3), use_bias=False, rngs=rngs)
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.lora = nnx.LoRA(8, 2, 16, rngs=rngs)


EXPECTED = {
    "dense/kernel": ((0,), (1,)),
    "bare/kernel": ((0,), (1,)),
    "general/kernel": ((0, 1), (2, 3)),
    "einsum/kernel": ((0,), (1, 2)),
    "stem/kernel": ((0, 1, 2), (3,)),
    "conv/kernel": ((0, 1, 2), (3,)),
    "conv1d/kernel": ((0, 1), (2,)),
    "transposed_conv/kernel": ((0, 1, 2), (3,)),
    "up/kernel": ((0, 1, 2), (3,)),  # nothing in the name says so, but 3 x 3 and many outputs do
    "embed/embedding": ((0,), (1,)),
    "lora/lora_a": ((0,), (1,)),
    "lora/lora_b": ((0,), (1,)),
    **{
        f"{m}/{k}/kernel": ((0,), (1, 2))
        for m in ("attention", "unbiased")
        for k in ("query", "key", "value")
    },
    **{f"{m}/out/kernel": ((0, 1), (2,)) for m in ("attention", "unbiased")},
}


def parameters(make: Any) -> Any:
    return nnx.state(nnx.eval_shape(make), nnx.Param)


def test_kernels_of_nnx() -> None:
    found = matrices(parameters(lambda: Layers(nnx.Rngs(0))))
    assert found.pop("each/kernel") == ((1,), (2, 3), (0,))
    assert found == {path: (*axes, ()) for path, axes in EXPECTED.items()}


@pytest.mark.parametrize("count", [3, 4, 16])
def test_kernels_of_nnx_stacked_by_vmap(count: int) -> None:
    """The layer axis is a batch; its length may be that of the heads or of the features."""

    @nnx.vmap(in_axes=0, out_axes=0)
    def layers(key: jax.Array) -> Layers:
        return Layers(nnx.Rngs(key))

    found = matrices(parameters(lambda: layers(jax.random.split(jax.random.key(0), count))))
    del found["each/kernel"]  # a stack of a stack looks like one with more inputs
    shifted = {p: tuple(tuple(a + 1 for a in side) for side in axes) for p, axes in EXPECTED.items()}
    assert found == {path: (*axes, (0,)) for path, axes in shifted.items()}


# --- kernels of flax.linen --------------------------------------------------------------------------------


class Block(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        x = linen.LayerNorm()(x)
        x = x + linen.MultiHeadDotProductAttention(num_heads=4)(x)
        x = x + linen.MultiHeadDotProductAttention(num_heads=4, use_bias=False)(x)
        x = linen.Dense(16, use_bias=False)(linen.Dense(16)(x))
        x = linen.DenseGeneral((2, 8))(x).reshape(x.shape)
        x = linen.Conv(16, (3,), use_bias=False)(linen.Conv(16, (3,))(x))
        return linen.ConvTranspose(16, (3,), use_bias=False)(x), None


def block_kernels(lead: int) -> dict[str, tuple[Axes, Axes, Axes]]:
    one, heads = lead + 1, (lead + 1, lead + 2)
    dense = ((lead,), (one,))
    out = {
        "Dense_0/kernel": dense,
        "Dense_1/kernel": dense,
        "DenseGeneral_0/kernel": ((lead,), heads),
        **{f"{name}/kernel": ((lead, one), (lead + 2,)) for name in ("Conv_0", "Conv_1", "ConvTranspose_0")},
    }
    for i in range(2):
        name = f"MultiHeadDotProductAttention_{i}"
        out |= {f"{name}/{k}/kernel": ((lead,), heads) for k in ("query", "key", "value")}
        out[f"{name}/out/kernel"] = ((lead, one), (lead + 2,))
    return {path: (*axes, tuple(range(lead))) for path, axes in out.items()}


def test_kernels_of_linen_alone_and_stacked_by_scan() -> None:
    class Net(linen.Module):
        @linen.compact
        def __call__(self, tokens: jax.Array) -> jax.Array:
            x = linen.Embed(11, 16)(tokens)
            stack = linen.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            x, _ = stack()(x, None)
            x, _ = Block(name="last")(x, None)
            return linen.Dense(11)(x)

    tokens = jnp.ones((2, 5), jnp.int32)
    found = matrices(jax.eval_shape(lambda: Net().init(jax.random.key(0), tokens))["params"])
    assert found.pop("Embed_0/embedding") == found.pop("Dense_0/kernel") == ((0,), (1,), ())
    wanted = {f"ScanBlock_0/{p}": axes for p, axes in block_kernels(1).items()}
    # Without a bias a plain convolution beside a stack takes its word from the scales in its own block.
    wanted |= {f"last/{p}": axes for p, axes in block_kernels(0).items()}
    assert found == wanted


def test_a_vector_is_what_a_bias_or_a_scale_is() -> None:
    specs = Tensors().specs({"q/bias": (4, 8), "norm/scale": (3, 8), "b": (2, 2), "w": (2, 2), "x": ()})
    assert [specs[p].shape for p in specs] == [(32,), (24,), (4,), (2, 2), (1,)]
    assert [axes_in_words(s) for s in specs.values()] == [*["vector"] * 3, "rows 0 x columns 1", "scalar"]
    assert recognise("conv/bias", {"conv/bias": (3, 16)}) == ((), ())


def test_as_many_heads_as_inputs_are_no_stack() -> None:
    shapes = {"query/kernel": (4, 4, 8), "query/bias": (4, 8), "mlp/kernel": (4, 4, 8), "mlp/bias": (4, 8)}
    assert recognise("query/kernel", shapes) == ((0,), (1, 2))
    assert recognise("mlp/kernel", shapes) == ((1,), (2,))


def test_the_published_reading_is_the_last_two_axes() -> None:
    specs = Tensors(axes="last_two").specs({"conv/kernel": (64, 64, 3, 3), "q/bias": (4, 32), "v": (7,)})
    kernel, bias = specs["conv/kernel"], specs["q/bias"]
    assert (kernel.shape, kernel.matrix, kernel.factored) == ((64, 64, 3, 3), (2, 3), (0, 1))
    assert (bias.shape, bias.matrix, bias.factored) == ((4, 32), (0, 1), (0, 1))
    assert specs["v"].matrix is None
    networks = Tensors().specs({"conv/kernel": (64, 64, 3, 3)})["conv/kernel"]
    assert (networks.shape, networks.matrix, networks.factored) == ((3, 64 * 64 * 3), (1, 0), (0, 1))


# --- the working view -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_leave_is_the_inverse_of_enter(data: st.DataObject) -> None:
    """And the view has batch axes first, then the two sides, each in the order that was asked for."""
    shape = tuple(data.draw(st.lists(st.integers(1, 20), min_size=2, max_size=5)))
    axes = data.draw(st.permutations(range(len(shape))))
    n = data.draw(st.integers(1, len(shape) - 1))
    m = data.draw(st.integers(1, len(shape) - n))
    rows, columns = tuple(axes[:n]), tuple(axes[n : n + m])
    negative = tuple(a - len(shape) for a in columns)
    spec = Tensors(matrix=((".", rows, negative),)).specs({"w": shape})["w"]
    assert (spec.rows, spec.columns) == (rows, columns)
    x = np.arange(math.prod(shape)).reshape(shape)
    view = np.asarray(spec.enter(x))
    assert view.shape == spec.shape and len(view.shape) == len(spec.batch) + 2
    np.testing.assert_array_equal(spec.leave(view), x)
    plain = x.transpose(*spec.batch, *rows, *columns).reshape(*view.shape[:-2], *_sides(shape, rows, columns))
    np.testing.assert_array_equal(view, plain if spec.matrix[0] < spec.matrix[1] else plain.swapaxes(-1, -2))
    # The longer side comes last where the other is shorter than a vector register.
    assert view.shape[-1] >= 16 or view.shape[-1] >= view.shape[-2]
    assert set(spec.factored) == set(spec.matrix) == {len(spec.shape) - 2, len(spec.shape) - 1}
    assert spec.shape[spec.factored[1]] == max(spec.shape[-2:])


def _sides(shape: tuple[int, ...], *sides: Axes) -> list[int]:
    return [math.prod(shape[a] for a in axes) for axes in sides]


# --- patterns and dimension numbers -----------------------------------------------------------------------


def optimizer(**tensors: Any) -> Any:
    return load_optimizer("celo2", [f"optimizer.tensors.{k}={v}" for k, v in tensors.items()])


PARAMS = {"stack": {"kernel": jnp.zeros((20, 3, 24)), "bias": jnp.zeros((3, 24))}, "out": jnp.zeros((4, 4))}


def test_patterns_override_what_is_recognised() -> None:
    specs = optimizer(matrix=(("stack/k", 2, (0, 1)), ("stack", -2, -1))).specs(PARAMS)
    kernel, bias = specs["stack/kernel"], specs["stack/bias"]
    assert (kernel.rows, kernel.columns, kernel.batch, kernel.shape) == ((2,), (0, 1), (), (24, 60))
    assert (bias.rows, bias.columns, bias.shape) == (
        (0,),
        (1,),
        (3, 24),
    )  # one that names would leave a vector
    assert specs["out"].rows == (0,)


def test_dimension_numbers_as_tree_prefix_function_and_none() -> None:
    want = (("out", None, None), ("stack/bias", (0,), (1,)), ("stack/kernel", (0,), (1, 2)))
    tree = {
        "out": None,
        "stack": {"bias": Numbers(-2, -1), "kernel": Numbers(reduction_axis=0, output_axis=(1, 2))},
    }
    assert dimension_numbers(tree, PARAMS) == want
    assert dimension_numbers(lambda params: tree, PARAMS) == want
    prefix = {"out": None, "stack": Numbers(-2, -1)}
    want = (("out", None, None), ("stack/bias", (0,), (1,)), ("stack/kernel", (1,), (2,)))
    assert dimension_numbers(prefix, PARAMS) == want
    assert [row[1] for row in dimension_numbers(lambda params: None, PARAMS)] == [None] * 3
    # Parts that optax has masked out, and None among the parameters, are not looked at.
    masked = {"out": optax.MaskedNode(), "stack": {**PARAMS["stack"], "none": None}}
    assert [row[0] for row in dimension_numbers(prefix, masked)] == ["stack/bias", "stack/kernel"]


def test_dimension_numbers_decide_route_and_axes() -> None:
    tree = {"out": None, "stack": {"bias": Numbers(), "kernel": Numbers(2, (0, 1))}}
    tx = load_optimizer("celo2").as_optax(dimensions=tree)
    state = tx.init(PARAMS)
    assert set(state["learned"]) == {"3x24", "20x3x24-2-by-0-1-factored-0-1"}
    assert set(state["routes"]["adam"]["m"]) == {"out"}
    assert state["learned"]["20x3x24-2-by-0-1-factored-0-1"]["momentum"].shape == (3, 24, 60)
    # Without a hand-made route None is no opinion: the tensor is recognised.
    base = load_optimizer("celo2_base").as_optax(dimensions=tree).init(PARAMS)
    assert set(base["learned"]) == {"3x24", "20x3x24-2-by-0-1-factored-0-1", "4x4"}


def test_the_routing_table_is_printed() -> None:
    params = {
        "attention": {"query": {"kernel": jnp.zeros((64, 4, 16)), "bias": jnp.zeros((4, 16))}},
        "blocks": {"mlp": jax.ShapeDtypeStruct((12, 64, 256), jnp.bfloat16)},
        "gain": jnp.zeros(()),
    }
    celo2, base = (load_optimizer(name).routing_table(params) for name in ("celo2", "celo2_base"))
    assert celo2.splitlines() == [
        "tensor                  shape          rule     axes",
        "attention/query/bias    (4, 16)        adam     elementwise",
        "attention/query/kernel  (64, 4, 16)    learned  rows 0 x columns 1,2",
        "blocks/mlp              (12, 64, 256)  learned  rows 1 x columns 2, batch 0",
        "gain                    ()             adam     elementwise",
    ]
    assert base.splitlines()[1].endswith("learned  vector") and base.splitlines()[4].endswith("scalar")


# --- bad input --------------------------------------------------------------------------------------------


def _raises(pattern: str) -> Any:
    return pytest.raises(UserError, match=pattern)


@pytest.mark.parametrize(
    "tensors,message",
    [
        (
            dict(matrix=(("kernal", 0, 1),)),
            "'kernal' is found in no tensor's path; paths are like 'out', 'stack",
        ),
        (dict(matrix=(("bias$", 0, 2),)), "matrix axes of 'stack/bias' = 0, 2 are out of range"),
        (dict(matrix=(("kernel", 0, -4),)), "matrix axes of 'stack/kernel' = 0, -4 are out of range"),
        (dict(matrix=(("kernel", 1, -2),)), "matrix axes of 'stack/kernel' = 1, -2 .* different axes"),
        (dict(matrix=(("kernel", (0, 0), 1),)), "matrix axes of 'stack/kernel' = \\(0, 0\\), 1"),
        (dict(axes="last_two", factored=(("out", 0, 2),)), "factored axes of 'out' = \\(0, 2\\)"),
        (dict(axes="last_two", factored=(("out", 1, 1),)), "factored axes of 'out' = \\(1, 1\\)"),
        (dict(axes="last_two", factored=(("in", 0, 1),)), "tensors.factored: .*in.* is found in no"),
        (dict(factored=(("out", 0, 1),)), "factored needs optimizer.tensors.axes = 'last_two'"),
        (dict(axes="last2"), "did you mean 'last_two'"),
        (dict(matrix=(("kernel", 0, ()),)), "rows of \\(path, axis, axis\\)"),
    ],
)
def test_bad_axes_name_the_tensor(tensors: dict[str, Any], message: str) -> None:
    with _raises(message) as error:
        optimizer(**tensors).init(PARAMS)
    assert "\n" not in str(error.value)


def test_a_pattern_that_is_found_only_in_vectors_is_found_in_nothing() -> None:
    params = {"w": jnp.zeros((4, 20)), "b": jnp.zeros(20)}
    with _raises("the pattern 'b' is found in no tensor's path"):
        optimizer(matrix=(("b", 0, 1),)).init(params)


@pytest.mark.parametrize(
    "tree,message",
    [
        (
            {"stack": Numbers(-2, -1)},
            "dimension numbers does not fit the parameters: it has nothing for 'out'",
        ),
        ({"stack": None, "out": None, "in": None}, "does not fit the parameters: 'in' is none of them"),
        ({"stack": {"kernel": {"a": None}, "bias": None}, "out": None}, "nothing for 'stack/kernel'"),
        ({"stack": None, "out": (0, 1)}, "does not fit|dimension numbers of 'out'"),
        (
            {"stack": None, "out": True},
            "dimension numbers of 'out': True is neither MuonDimensionNumbers nor",
        ),
        ({"stack": None, "out": Numbers(0, 2)}, "matrix axes of 'out' = 0, 2 are out of range"),
        ({"stack": None, "out": Numbers(0, 0)}, "matrix axes of 'out' = 0, 0 .* different axes"),
        ({"stack": None, "out": Numbers((), 0)}, "matrix axes of 'out' .* at least one on each side"),
        (3, "dimension numbers of 'out': 3 is neither"),
    ],
)
def test_wrong_dimension_numbers_name_the_tensor(tree: Any, message: str) -> None:
    for dimensions in (tree, lambda params: tree):
        with _raises(message) as error:
            load_optimizer("celo2").as_optax(dimensions=dimensions).init(PARAMS)
        assert "\n" not in str(error.value)


def test_spread_matches_by_path_and_takes_prefixes() -> None:
    params = {"a": [np.ones(1), np.ones(2)], "b": {"c": np.ones(3)}}
    assert spread({"a": [1, 2], "b": 3}, params, "tree") == {"a/0": 1, "a/1": 2, "b/c": 3}
    assert spread(5, params, "tree") == {"a/0": 5, "a/1": 5, "b/c": 5}
    masked = {"a": params["a"], "b": optax.MaskedNode()}
    assert spread({"a": 1, "b": {"c": 3}}, masked, "tree") == {"a/0": 1, "a/1": 1}
    with _raises("the mask does not fit the parameters: it has nothing for 'a/1'"):
        spread({"a": [1], "b": 3}, params, "mask")
