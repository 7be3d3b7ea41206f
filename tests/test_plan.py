"""What `plan` says of a model on a mesh, against the arithmetic of its shapes."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from celo_nnx.cli import main
from celo_nnx.errors import UserError
from celo_nnx.model_shapes import MODELS, Model, mesh_sizes, model_shapes, shardings
from celo_nnx.plan import plan
from celo_nnx.sharding import given_shardings
from celo_nnx.tensors import tensor_paths
from celo_nnx.work import floating_point_work


def test_bytes_are_those_of_the_shapes() -> None:
    """GPT-2 small on fsdp=2, tensor=2: a quarter of each matrix and embedding, vectors whole."""
    command = "plan --model gpt2-small --mesh fsdp=2,tensor=2 data=2,fsdp=2 --optimizer adamw celo2"
    done = subprocess.run(
        [sys.executable, "-m", "celo_nnx", *command.split()], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = {(row["mesh"], row["optimizer"]): row for row in map(json.loads, done.stdout.splitlines())}
    assert len(rows) == 4 and "GB of parameters" in done.stderr
    assert done.stderr.count("compiled for a CPU: temporaries are those of its program") == 1

    depth, d = 12, 768
    matrices, vectors = depth * 12 * d * d, depth * (4 * d + 4 * d + d + 4 * d) + 2 * d
    embeddings = 50257 * d + 1024 * d
    for mesh, parts in (("fsdp=2,tensor=2", 4), ("data=2,fsdp=2", 2)):
        params = 4 * ((matrices + embeddings) // parts + vectors)
        assert rows[mesh, "adamw"]["params_bytes"] == rows[mesh, "celo2"]["params_bytes"] == params
        assert rows[mesh, "adamw"]["state_bytes"] == 2 * params + 4
        assert rows[mesh, "celo2"]["params"] == matrices + embeddings + vectors
        assert rows[mesh, "celo2"]["devices"] == 4
    # Three momenta and a second moment of every matrix; Adam's two averages of all else; three counters.
    large = 16 * matrices + 8 * embeddings
    # Three averages of each matrix's rows and columns: halves of both on the first mesh, whole columns or
    # rows on the second, where fsdp splits the inputs of query, key, value and up, the outputs of the others.
    sides = 12 * depth * (3 * (d + d) + (d + d) + (d + 4 * d) + (4 * d + d))
    split_inputs, whole_outputs = 3 * d + 1 * d, 3 * d + 4 * d
    split_outputs, whole_inputs = d + d, d + 4 * d
    second = 12 * depth * ((split_inputs + split_outputs) // 2 + whole_outputs + whole_inputs)
    rest = 8 * vectors + 12
    assert rows["fsdp=2,tensor=2", "celo2"]["state_bytes"] == large // 4 + sides // 2 + rest
    assert rows["data=2,fsdp=2", "celo2"]["state_bytes"] == large // 2 + second + rest

    # Newton-Schulz is nearly all of the work: 5 times n x n x m twice and n x n x n, of a quarter of them.
    products = 5 * depth * (4 * 3 * 2 * d**3 + 2 * (2 * 2 * d * d * 4 * d + 2 * d**3))
    assert 1.0 < rows["fsdp=2,tensor=2", "celo2"]["gflop"] * 1e9 / (products / 4) < 1.15
    assert rows["fsdp=2,tensor=2", "celo2"]["temp_bytes"] > 0


def test_rules_that_follow_the_loss_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "tiny", Model(1, 16, tokens=32, positions=8))
    ((row,), params) = list(plan("tiny", optimizers=["celo_phase1"])), 12 * 16 * 16 + 40 * 16 + 15 * 16
    assert row["params_bytes"] == 4 * params and row["state_bytes"] > row["params_bytes"]


def test_work_counts_loops_branches_and_products() -> None:
    x = jnp.ones((4, 8))

    def f(x: jax.Array) -> jax.Array:
        gram = x @ x.T  # 2 * 4 * 4 * 8
        gram = jax.lax.fori_loop(0, 3, lambda _, a: a @ a + 1.0, gram)  # 3 * (2 * 64 + 16)
        gram = jax.lax.cond(gram[0, 0] > 0, lambda a: a @ a, lambda a: a, gram)  # 128, the costlier branch
        return jnp.sum(gram)  # 16

    assert floating_point_work(jax.make_jaxpr(f)(x)) == 256 + 3 * 144 + 128 + 16
    assert floating_point_work(jax.make_jaxpr(f)(x), parts=2) == (256 + 3 * 144 + 128 + 16) / 2


def test_a_mesh_that_does_not_divide_is_named() -> None:
    mesh = AbstractMesh((7,), ("fsdp",), axis_types=(AxisType.Auto,))
    shapes = model_shapes("gpt2-small")
    places = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec("fsdp")), shapes)
    with pytest.raises(UserError, match=r"axis 0 of 'block_00/attention/key/bias'.*fsdp=7"):
        given_shardings(places, shapes)


def test_a_side_that_a_mesh_does_not_divide_is_left_for_the_other_or_whole() -> None:
    def split(model: str, **sizes: int) -> tuple[dict[str, PartitionSpec], list[str]]:
        mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
        shapes, told = model_shapes(model), []
        places = shardings(shapes, mesh, told.append)
        assert given_shardings(places, shapes)
        return {path: place.spec for path, place in tensor_paths(places)}, told

    specs, told = split("vit-b16", fsdp=16)
    assert specs["head/kernel"] == PartitionSpec("fsdp", None)
    why = "as the mesh does not divide them"
    assert told == [f"split along their other side, {why}: head/kernel over fsdp"]
    specs, told = split("vit-b16", fsdp=8, tensor=16)
    assert specs["head/kernel"] == PartitionSpec("tensor", "fsdp") and not told
    specs, (line,) = split("vit-b16", fsdp=7, tensor=2)
    assert specs["head/kernel"] == PartitionSpec("tensor", None)
    assert line.startswith(f"split not at all, {why}: block_00/attention/key/kernel over fsdp, ")
    assert line.endswith(" and 73 more")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "gpt3"], "gpt3-xl"),
        (["--model", "gpt3-xl", "--mesh", "fdsp=8"], "fsdp"),
        (["--model", "gpt3-xl", "--mesh", "fsdp=0"], "write each axis once"),
        (["--model", "gpt3-xl", "--mesh", "fsdp=9999"], "512"),
        (["--model", "gpt3-xl", "--optimizer", "celo3"], "celo2"),
        (["--model", "gpt2-small", "--set", "foo"], "'foo' is not of the form"),
        (["--model", "gpt2-small", "--set", "optimizer.schedule.value=-1"], "value = -1.0 is out of range"),
    ],
)
def test_mistakes_take_a_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error


def test_mesh_sizes() -> None:
    assert mesh_sizes("data=2,tensor=4") == {"data": 2, "tensor": 4}
    for text in ("fsdp", "fsdp=", "fsdp=2,fsdp=2", "fsdp=-1", ""):
        with pytest.raises(UserError):
            mesh_sizes(text)
