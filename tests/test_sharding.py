"""Tensors split over a mesh: updates, memory and communication, on four devices in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import optax
import pytest

from celo_nnx import load_optimizer
from celo_nnx.errors import UserError
from celo_nnx.sharding import given_shardings, layout
from celo_nnx.tensors import Tensors

LAYOUTS = {"both", "rows", "columns", "replicas", "data and fsdp", "tiles", "rolling"}
DRAWN = {"celo2_base drawn", "celo drawn", "velo drawn", "adafac_mlp drawn"}


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    """What tests/sharded_updates.py prints."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    command = [sys.executable, str(Path(__file__).with_name("sharded_updates.py"))]
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_updates_equal_those_on_one_device(figures: dict[str, Any]) -> None:
    for name in LAYOUTS | DRAWN:
        assert figures[name]["difference"] < 1e-5, name
    assert figures["module"]["difference"] < 1e-5


def test_state_is_split_as_the_parameters_are(figures: dict[str, Any]) -> None:
    for name, parts in (("columns", 4), ("tiles", 4), ("data and fsdp", 2), ("replicas", 1)):
        whole, here = figures[name]["bytes"], figures[name]["bytes_here"]
        # All but the averages along the axis that is not split, a vector for a matrix, and the biases.
        assert whole / parts <= here < 1.1 * whole / parts + 512, name


def test_no_matrix_is_gathered(figures: dict[str, Any]) -> None:
    for name in LAYOUTS - {"both"}:
        assert figures[name]["gathered"] == 0, name
    # But a convolution whose inputs are split: half of its 3 x 3 x 8 x 16, along the other axis.
    assert figures["both"]["gathered"] == 3 * 3 * 8 * 8
    assert figures["replicas"]["exchanges"] == 0 < figures["columns"]["exchanges"]


def test_tensors_of_a_shape_with_another_split_have_a_group_of_their_own(figures: dict[str, Any]) -> None:
    assert "16x32-on-tensorxfsdp" in figures["both"]["groups"]
    assert figures["columns"]["groups"] == ["16x32", "32x16"]


def test_refusals(figures: dict[str, Any]) -> None:
    said = figures["refusals"]
    assert said["indivisible"] == "axis 0 of 'a/kernel', shape (6, 8), is not divided by the mesh's fsdp=4"
    assert "has 3 axes" in said["rank"] and "AxisType.Auto" in said["explicit"]
    assert "'a/kernel'" in said["name"] and "is a str" in said["kind"] and "no parameter" in said["none"]


def test_splits_that_are_kept() -> None:
    """Merged axes: heads before their size are contiguous shares; a convolution's inputs are not."""
    from jax.sharding import AbstractMesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = AbstractMesh((2, 2), ("fsdp", "tensor"))
    shapes = {"mha/query/kernel": (16, 4, 8), "mha/query/bias": (4, 8), "conv/kernel": (3, 3, 8, 16)}
    specs = Tensors().specs(shapes)

    def shards(path: str, *split: str | None) -> tuple[tuple[int, ...], tuple[tuple[str, ...], ...]]:
        share = layout(specs[path], NamedSharding(mesh, P(*split))).share
        return share.shape, share.shards

    assert shards("mha/query/kernel", "fsdp", "tensor") == ((8, 16), (("fsdp",), ("tensor",)))
    assert shards("mha/query/kernel", None, None, "tensor") == ((16, 32), ((), ()))
    assert shards("mha/query/bias", "tensor") == ((16,), (("tensor",),))
    assert shards("conv/kernel", None, None, "fsdp", "tensor") == ((72, 8), ((), ("tensor",)))


def test_shardings_are_those_of_the_parameters() -> None:
    """A setting made for another model is refused, by name; a part of optax.partition may have nothing."""
    from jax.sharding import AbstractMesh, AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    on = NamedSharding(AbstractMesh((4,), ("fsdp",), axis_types=(AxisType.Auto,)), P("fsdp"))
    array = lambda *shape: jax.ShapeDtypeStruct(shape, "float32")  # noqa: E731
    split = load_optimizer("celo2").with_settings(shardings=given_shardings(on, {"a": array(8, 16)}))
    for params, said in (({"b": array(8, 16)}, "nothing for 'b'"), ({"a": array(6, 16)}, "not divided")):
        with pytest.raises(UserError, match=said):
            split.state_shardings(params)
    assert given_shardings({"a": on}, {"a": optax.MaskedNode()}) == ()
