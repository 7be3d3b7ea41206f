"""Uses an installed celo_nnx as its users do; TREE, the argument, says which files it must have."""

from __future__ import annotations

import sys
import tomllib
from importlib import metadata, resources
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import celo_nnx

tree = Path(sys.argv[1])
installed = Path(str(resources.files("celo_nnx")))
assert not installed.is_relative_to(tree), f"{installed} is the tree itself"
assert metadata.version("celo-nnx") == celo_nnx.__version__

tool = tomllib.loads((tree / "pyproject.toml").read_text())["tool"]["setuptools"]
missing = []
for package in tool["packages"]:
    folder = tree / package.replace(".", "/")  # components and experiments through their links
    for path in folder.iterdir():
        wanted = path.suffix in (".py", ".html", ".safetensors", ".json") or path.name == "py.typed"
        if path.is_file() and wanted:
            name = path.relative_to(folder)
            if not (installed.parent / package.replace(".", "/") / name).is_file():
                missing.append(f"{package}: {name}")
assert not missing, missing

tx = celo_nnx.celo2(1e-2)  # the shipped weights
params = {"dense": {"kernel": jnp.ones((8, 4)) / 8, "bias": jnp.zeros(4)}}
x = jax.random.normal(jax.random.key(0), (64, 8))


def loss(p):
    return jnp.mean((x @ p["dense"]["kernel"] + p["dense"]["bias"] - 1) ** 2)


@jax.jit
def step(params, state):
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


state = tx.init(params)
losses = []
for _ in range(20):
    params, state, value = step(params, state)
    losses.append(float(value))
assert losses[-1] < losses[0], losses
print(
    f"celo-nnx {celo_nnx.__version__} from {installed}: loss {losses[0]:.3f} to {losses[-1]:.3f} in 20 steps"
)
