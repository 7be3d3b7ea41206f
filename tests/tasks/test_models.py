"""Models of tasks against second implementations, and what they must and must not see."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from celo_nnx.errors import UserError
from celo_nnx.tasks.autoencoder import Autoencoder
from celo_nnx.tasks.conv_net import ConvNet
from celo_nnx.tasks.fields import INITIALIZATIONS, cross_entropy
from celo_nnx.tasks.image_mlp import ImageMLP
from celo_nnx.tasks.image_task import patch_conv, patches
from celo_nnx.tasks.mlp_mixer import MLPMixer
from celo_nnx.tasks.nnx_task import ModelTask
from celo_nnx.tasks.res_net import ResNet
from celo_nnx.tasks.rnn import CELLS, RecurrentLM
from celo_nnx.tasks.transformer import TransformerLM
from celo_nnx.tasks.vision_transformer import VisionTransformer

RNG = np.random.default_rng(0)
IMAGES = {"x": RNG.uniform(size=(3, 16)).astype(np.float32), "y": np.array([0, 2, 1])}


def start(task: Any, seed: int = 0) -> tuple[Any, Any]:
    """Returns a start with every parameter moved, so that zero biases hide nothing."""
    params, state = task.init(jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    moved = [np.asarray(x) + RNG.normal(size=x.shape).astype(np.float32) * 0.3 for x in leaves]
    return jax.tree.unflatten(tree, moved), state


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def by_numpy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Softmax cross-entropy, from its definition."""
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return float(-np.mean([np.log(row[label]) for row, label in zip(chances, labels, strict=True)]))


def test_cross_entropy() -> None:
    logits, labels = RNG.normal(size=(5, 4)).astype(np.float32), np.array([0, 3, 1, 2, 2])
    assert cross_entropy(logits, labels) == pytest.approx(
        by_numpy(logits.astype(np.float64), labels), rel=1e-6
    )


@pytest.mark.parametrize("objective", ["sigmoid", "mean_square"])
def test_autoencoder(objective: str) -> None:
    task = Autoencoder(features=16, hidden=(5, 3), objective=objective, activation="tanh")
    params, _ = start(task)
    z = IMAGES["x"].astype(np.float64)
    for i in range(3):
        z = z @ params[f"linear_{i}"]["w"] + params[f"linear_{i}"]["b"]
        z = np.tanh(z) if i < 2 else sigmoid(z)
    x = IMAGES["x"]
    errors = -x * np.log(z) - (1 - x) * np.log(1 - z) if objective == "sigmoid" else (z - x) ** 2
    assert task.loss(params, {}, jax.random.key(0), IMAGES)[0] == pytest.approx(errors.mean(), rel=1e-5)


def test_floor_of_the_autoencoder_is_reached_by_the_pixels_alone() -> None:
    task = Autoencoder(features=4)
    x = np.array([[0.0, 1.0, 0.5, 0.25]], np.float32)
    expected = (np.log(2) + 0.25 * np.log(4) + 0.75 * np.log(4 / 3)) / 4
    assert task.floor_of(x) == pytest.approx(expected)
    # With no weights and the pixels' logits as biases, the loss is the floor.
    params, _ = Autoencoder(features=4, hidden=(1,)).init(jax.random.key(0))
    params["linear_1"] = {"w": jnp.zeros((1, 4)), "b": jnp.array([-90.0, 90.0, 0.0, -np.log(3)])}
    loss = Autoencoder(features=4, hidden=(1,)).loss(params, {}, jax.random.key(0), {"x": x})[0]
    assert loss == pytest.approx(expected, rel=1e-6)
    assert Autoencoder(features=4, objective="mean_square").floor_of(x) == 0


def test_mlp_with_layer_normalization() -> None:
    task = ImageMLP(features=16, hidden=(5,), classes=3, normalization="layer")
    params, _ = start(task)
    z = IMAGES["x"] @ params["linear_0"]["w"] + params["linear_0"]["b"]
    z = (z - z.mean(1, keepdims=True)) / np.sqrt(z.var(1, keepdims=True) + 1e-6)
    z = np.maximum(z * params["norm_0"]["scale"] + params["norm_0"]["bias"], 0)
    logits = z @ params["linear_1"]["w"] + params["linear_1"]["b"]
    loss = task.loss(params, {}, jax.random.key(0), IMAGES)[0]
    assert loss == pytest.approx(by_numpy(logits, IMAGES["y"]), rel=1e-5)


def slow_conv(image: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """One channel, loops, zeros around: output ``ceil(side / stride)``, the lower side padded less."""
    size, side = len(kernel), len(image)
    count = -(-side // stride)
    pad = max((count - 1) * stride + size - side, 0)
    padded = np.pad(image, (pad // 2, pad - pad // 2))
    out = np.empty((count, count))
    for i in range(count):
        for j in range(count):
            window = padded[i * stride : i * stride + size, j * stride : j * stride + size]
            out[i, j] = (window * kernel).sum()
    return out


@pytest.mark.parametrize("normalization", ["none", "batch"])
def test_conv_net_of_one_channel(normalization: str) -> None:
    task = ConvNet(side=4, classes=3, channels=(1, 1), strides=(1, 2), normalization=normalization)
    params, state = start(task)
    x = IMAGES["x"].reshape(3, 4, 4).astype(np.float64)
    for i, stride in enumerate((1, 2)):
        layer = params[f"conv_{i}"]
        x = np.stack([slow_conv(image, layer["kernel"][:, :, 0, 0], stride) for image in x])
        if normalization == "batch":
            norm = params[f"norm_{i}"]
            x = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * norm["scale"] + norm["bias"]
        else:
            x = x + layer["bias"]
        x = np.maximum(x, 0)
    logits = x.mean((1, 2))[:, None] * params["head"]["kernel"] + params["head"]["bias"]
    loss, _, _ = task.loss(params, state, jax.random.key(0), IMAGES)
    assert loss == pytest.approx(by_numpy(logits, IMAGES["y"]), rel=1e-4)


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [(3, 1, "SAME"), (3, 2, "SAME"), (1, 2, "SAME"), (2, 1, "VALID")]
)
def test_patch_conv_equals_lax_with_its_gradients(size: int, stride: int, padding: str) -> None:
    x = RNG.normal(size=(2, 7, 6, 3)).astype(np.float32)
    kernel = RNG.normal(size=(size, size, 3, 4)).astype(np.float32)

    def value(conv: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
        names = lax.conv_dimension_numbers(x.shape, kernel.shape, ("NHWC", "HWIO", "NHWC"))
        return jnp.sum(jnp.sin(conv(x, kernel, (stride, stride), padding, dimension_numbers=names)))

    ours, theirs = (
        jax.value_and_grad(value, (1, 2))(conv, x, kernel) for conv in (patch_conv, lax.conv_general_dilated)
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_patches_are_the_images_own_blocks() -> None:
    x = np.arange(2 * 4 * 4 * 3).reshape(2, 4, 4, 3)
    out = np.asarray(patches(x, 2))
    assert out.shape == (2, 4, 12)
    for i in range(4):
        corner = x[:, 2 * (i // 2) :, 2 * (i % 2) :][:, :2, :2]
        np.testing.assert_array_equal(out[:, i], corner.reshape(2, 12))


def slow_cell(cell: str, params: Any, x: np.ndarray, f: Any) -> np.ndarray:
    """A recurrent layer over one sequence ``[t, d]``, by its equations."""
    w, b, u = params["given"]["kernel"], params["given"]["bias"], params["recurrent"]["kernel"]
    width = x.shape[1]
    h = c = np.zeros(width)
    out = []
    for row in x:
        a, r = (row @ w + b).reshape(-1, width), (h @ u).reshape(-1, width)
        if cell == "simple":
            h = f(a[0] + r[0])
        elif cell == "gru":
            z = sigmoid(a[1] + r[1])
            h = (1 - z) * f(a[2] + sigmoid(a[0] + r[0]) * r[2]) + z * h
        else:
            c = sigmoid(a[2] + r[2] + 1) * c + sigmoid(a[0] + r[0]) * f(a[3] + r[3])
            h = sigmoid(a[1] + r[1]) * f(c)
        out.append(h)
    return np.stack(out)


@pytest.mark.parametrize("cell", CELLS)
def test_recurrent_cells(cell: str) -> None:
    task = RecurrentLM(vocabulary=5, length=4, width=3, depth=2, cell=cell)
    params, state = start(task)
    tokens = np.array([[0, 3, 1, 4, 2], [2, 2, 0, 1, 1]])
    losses = []
    for row in tokens:
        x = params["embed"]["embedding"][row[:-1]].astype(np.float64)
        for i in range(2):
            x = slow_cell(cell, params[f"layer_{i}"], x, np.tanh)
        losses.append(by_numpy(x @ params["head"]["kernel"] + params["head"]["bias"], row[1:]))
    loss = task.loss(params, state, jax.random.key(0), {"tokens": tokens})[0]
    assert loss == pytest.approx(np.mean(losses), rel=1e-5)


def logits(task: ModelTask, x: Any) -> jax.Array:
    model = task.new_model(nnx.Rngs(0))
    return nnx.jit(lambda model, x: model(x))(model, x)


def test_transformer_sees_the_past_and_only_the_past() -> None:
    task = TransformerLM(vocabulary=7, length=5, width=8, depth=1, heads=2)
    one, other = np.array([[1, 2, 3, 4, 5]]), np.array([[1, 2, 6, 4, 5]])
    change = np.abs(logits(task, one) - logits(task, other)).max((0, 2))
    assert (change[:2] == 0).all() and (change[2:] > 1e-3).all()


def test_attention_block_by_its_equations() -> None:
    task = VisionTransformer(side=4, patch=2, width=4, depth=1, heads=2, classes=3, normalization="none")
    params, state = start(task)
    block, heads = params["block_0"], []
    x = (
        patches(2 * IMAGES["x"].reshape(3, 4, 4, 1) - 1, 2) @ params["embed"]["kernel"]
        + params["embed"]["bias"]
    )
    x = np.asarray(x + params["positions"], np.float64)
    for h in range(2):
        q, k, v = (x @ block["attention"][name]["kernel"][:, h] for name in ("query", "key", "value"))
        scores = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(2))
        heads.append(scores / scores.sum(-1, keepdims=True) @ v @ block["attention"]["out"]["kernel"][h])
    x = x + sum(heads)
    hidden = np.asarray(jax.nn.gelu(x @ block["linear_0"]["kernel"] + block["linear_0"]["bias"]))
    x = x + hidden @ block["linear_1"]["kernel"] + block["linear_1"]["bias"]
    out = x.mean(1) @ params["head"]["kernel"] + params["head"]["bias"]
    loss = task.loss(params, state, jax.random.key(0), IMAGES)[0]
    assert loss == pytest.approx(by_numpy(out, IMAGES["y"]), rel=1e-4)


@pytest.mark.parametrize("name", INITIALIZATIONS)
def test_initializations_have_their_scale(name: str) -> None:
    fan_in, fan_out = 3 * 3 * 20, 50
    w = np.asarray(INITIALIZATIONS[name](jax.random.key(0), (3, 3, 20, fan_out), jnp.float32))
    expected = {
        "cut_normal": 0.8796 / np.sqrt(fan_in),
        "lecun_normal": 1 / np.sqrt(fan_in),
        "he_normal": np.sqrt(2 / fan_in),
        "glorot_uniform": np.sqrt(2 / (fan_in + 9 * fan_out)),
        "orthogonal": 1 / np.sqrt(fan_in),
    }
    assert w.std() == pytest.approx(expected[name], rel=0.03)
    if name == "orthogonal":
        flat = w.reshape(fan_in, fan_out)
        np.testing.assert_allclose(flat.T @ flat, np.eye(fan_out), atol=1e-5)


BAD = [
    (lambda: ConvNet(side=8, channels=(4,), strides=(1, 1)), r"strides = \(1, 1\) .*as many as channels, 1"),
    (lambda: ConvNet(side=8, channels=(), strides=()), r"channels = \(\) .*tuple of 1 or more"),
    (lambda: ConvNet(side=8, normalization="bach"), "did you mean 'batch'"),
    (lambda: VisionTransformer(side=8, normalization="batch"), "unknown normalization 'batch'.*layer, none"),
    (lambda: VisionTransformer(side=8, patch=3), "patch = 3 .*divisor of the image side 8"),
    (lambda: VisionTransformer(side=8, width=6, heads=4), "heads = 4 .*divisor of width = 6"),
    (lambda: MLPMixer(side=8, channel_hidden=0), "channel_hidden = 0 .*>= 1"),
    (lambda: ResNet(side=8, blocks=0), "blocks = 0 .*>= 1"),
    (lambda: ResNet(side=8, initialization="he_norm"), "did you mean 'he_normal'"),
    (lambda: ResNet(side=8, classes=1), "classes = 1 .*>= 2"),
    (lambda: RecurrentLM(vocabulary=1), "vocabulary = 1 .*>= 2"),
    (lambda: RecurrentLM(vocabulary=9, cell="lsmt"), "did you mean 'lstm'"),
    (lambda: TransformerLM(vocabulary=9, length=0), "length = 0 .*>= 1"),
    (lambda: Autoencoder(features=4, objective="sigmoidal"), "did you mean 'sigmoid'"),
    (lambda: Autoencoder(features=4, hidden=32), "hidden = 32 .*tuple"),
    (lambda: ImageMLP(features=4, normalization="batch"), "unknown normalization"),
]


@pytest.mark.parametrize(("make", "words"), BAD, ids=[words for _, words in BAD])
def test_values_out_of_range(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        make()
    assert "\n" not in str(error.value)
