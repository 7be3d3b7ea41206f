"""Parameter shapes of well-known models, as trees of abstract arrays, and how they are split over a mesh."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from celo_nnx.errors import UserError, unknown
from celo_nnx.tensors import tensor_paths

PyTree = Any

AXES = ("data", "fsdp", "tensor")  # of a mesh
# Whose outputs are split over the axis "tensor"; of other matrices it is the inputs, so that the activations
# between the two need no exchange (Shoeybi et al., Megatron-LM, 2019).
OUTPUTS_SPLIT = ("query", "key", "value", "up")


@dataclasses.dataclass(frozen=True)
class Model:
    """A transformer's sizes.

    Attributes:
      depth, width: blocks, and their width; the MLP is four times as wide.
      tokens, positions: rows of the embeddings; of an image model, patches' inputs and their number.
      classes: outputs of an image model; 0 for a language model, which uses its embedding again.
    """

    depth: int
    width: int
    tokens: int = 50257
    positions: int = 1024
    classes: int = 0


# Radford et al., 2019 (GPT-2); Brown et al., 2020, table 2.1 (GPT-3); Dosovitskiy et al., 2021 (ViT).
MODELS = {
    "gpt2-small": Model(12, 768),
    "gpt2-medium": Model(24, 1024),
    "gpt2-large": Model(36, 1280),
    "gpt2-xl": Model(48, 1600),
    "gpt3-xl": Model(24, 2048, positions=2048),
    "gpt3-2.7b": Model(32, 2560, positions=2048),
    "gpt3-6.7b": Model(32, 4096, positions=2048),
    "vit-b16": Model(12, 768, tokens=16 * 16 * 3, positions=197, classes=1000),
    "vit-l16": Model(24, 1024, tokens=16 * 16 * 3, positions=197, classes=1000),
}


def array(*shape: int) -> jax.ShapeDtypeStruct:
    """Returns an abstract float32 array."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def block(width: int, attention_bias: bool = True) -> PyTree:
    """Returns a transformer block's parameters: attention, an MLP four times as wide, two layer norms."""
    norm = {"scale": array(width), "bias": array(width)}
    bias = {"bias": array(width)} if attention_bias else {}
    attention = {n: {"kernel": array(width, width)} | bias for n in ("query", "key", "value", "output")}
    mlp = {
        "up": {"kernel": array(width, 4 * width), "bias": array(4 * width)},
        "down": {"kernel": array(4 * width, width), "bias": array(width)},
    }
    return {"attention": attention, "mlp": mlp, "norm_1": norm, "norm_2": dict(norm)}


def model_shapes(name: str) -> PyTree:
    """Returns the parameters of a model of :data:`MODELS`.

    Raises:
      UserError: an unknown name.

    Example:
      >>> import math
      >>> sum(math.prod(x.shape) for x in jax.tree.leaves(model_shapes("gpt3-xl")))
      1315723264
    """
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    model = MODELS[name]
    width = model.width
    tree = {f"block_{i:02d}": block(width) for i in range(model.depth)}
    tree["norm"] = {"scale": array(width), "bias": array(width)}
    if model.classes:
        tree["patches"] = {"kernel": array(model.tokens, width), "bias": array(width)}
        tree["embed"] = {"positions": array(model.positions, width), "class": array(1, width)}
        tree["head"] = {"kernel": array(width, model.classes), "bias": array(model.classes)}
    else:
        tree["embed"] = {"tokens": array(model.tokens, width), "positions": array(model.positions, width)}
    return tree


def mesh_sizes(text: str) -> dict[str, int]:
    """Returns the axes of a mesh that is written as in ``"fsdp=4,tensor=2"``.

    Raises:
      UserError: something else.

    Example:
      >>> mesh_sizes("fsdp=4,tensor=2")
      {'fsdp': 4, 'tensor': 2}
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, number = part.partition("=")
        if name not in AXES:
            raise unknown("mesh axis", name, AXES)
        if not (equals and number.isdecimal() and int(number) >= 1) or name in sizes:
            raise UserError(f"mesh {text!r}: write each axis once, with its size, as in fsdp=4,tensor=2")
        sizes[name] = int(number)
    return sizes


def shardings(params: PyTree, mesh: Mesh, tell: Callable[[str], None] = lambda line: None) -> PyTree:
    """Returns how a transformer's parameters are split over the axes ``fsdp`` and ``tensor`` of a mesh.

    Of a matrix ``tensor`` splits the side that Megatron-LM does, ``fsdp`` the other; of an embedding both
    split the width; vectors lie whole on every device, and what ``data`` counts are replicas. A mesh
    axis that does not divide its side splits the other one, or where it divides neither none.

    Args:
      params: arrays or ``jax.ShapeDtypeStruct``, of :func:`model_shapes` or named like them.
      mesh: with some of the axes ``data``, ``fsdp``, ``tensor``.
      tell: is given a line about the tensors that are split along another side or not at all.
    """
    places, elsewhere, undivided = [], [], []
    for path, leaf in tensor_paths(params):
        parts = path.split("/")
        sides: list[tuple[str, ...]] = [()] * leaf.ndim
        for name in [n for n in ("fsdp", "tensor") if n in mesh.shape and leaf.ndim == 2]:
            usual = int("embed" in parts or (parts[-2] in OUTPUTS_SPLIT) == (name == "tensor"))
            counts = [math.prod(mesh.shape[n] for n in (*side, name)) for side in sides]
            fits = [side for side in (usual, 1 - usual) if leaf.shape[side] % counts[side] == 0]
            if fits:
                sides[fits[0]] += (name,)
            if fits[:1] != [usual]:
                (elsewhere if fits else undivided).append(f"{path} over {name}")
        places.append(NamedSharding(mesh, PartitionSpec(*(side or None for side in sides))))
    for found, how in ((elsewhere, "along their other side"), (undivided, "not at all")):
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            tell(f"split {how}, as the mesh does not divide them: {', '.join(found[:3])}{more}")
    return jax.tree.unflatten(jax.tree.structure(params), places)
