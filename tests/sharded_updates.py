"""Updates on four host devices against the same on one, printed as JSON; run by test_sharding.py."""

from __future__ import annotations

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import celo_nnx
from celo_nnx.build import build
from celo_nnx.config import load
from celo_nnx.errors import UserError

TREE = {
    "a/kernel": (16, 32),
    "b/kernel": (16, 32),
    "c/kernel": (16, 32),
    "d/kernel": (16, 32),
    "d/bias": (32,),
    "e/embedding": (64, 16),
    "f/kernel": (32, 16),
    "layers/kernel": (4, 8, 16),
    "mha/query/kernel": (16, 4, 8),
    "mha/query/bias": (4, 8),
    "conv/kernel": (3, 3, 8, 16),
    "g/scale": (),
}
BOTH = {  # mesh fsdp=2, tensor=2; d/kernel is split the other way round, and a convolution's inputs cannot be
    **{f"{name}/kernel": P("fsdp", "tensor") for name in "abc"},
    "d/kernel": P("tensor", "fsdp"),
    "d/bias": P("fsdp"),
    "e/embedding": P(("fsdp", "tensor")),
    "f/kernel": P(None, ("tensor", "fsdp")),
    "layers/kernel": P("fsdp", None, "tensor"),
    "mha/query/kernel": P("fsdp", "tensor"),
    "mha/query/bias": P("tensor"),
    "conv/kernel": P(None, None, "fsdp", "tensor"),
}


def mesh(**axes: int) -> Mesh:
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def drawn(seed: int, axes: tuple[str, ...]) -> tuple[dict[str, tuple[int, ...]], dict[str, P]]:
    """Returns a random tree of ranks 0 to 4 whose axes divide by 4, and random splits of it."""
    rng, shapes, specs = np.random.default_rng(seed), {}, {}
    for i, rank in enumerate((0, 1, 2, 2, 3, 4)):
        shape = tuple(4 * int(rng.integers(1, 4)) for _ in range(rank))
        places: list[Any] = [None] * rank
        for name in axes if rank else ():
            at = int(rng.integers(rank))
            if places[at] is None:
                places[at] = name
        shapes[f"t{i}/w"], specs[f"t{i}/w"] = shape, P(*places)
    return shapes, specs


def compare(
    variant: str, shapes: dict[str, Any], specs: dict[str, P], on: Mesh, overrides: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Returns how far three updates lie apart, bytes of state, and what the compiled update gathers."""
    rng = np.random.default_rng(0)
    places = {path: NamedSharding(on, specs.get(path, P())) for path in shapes}

    def fill() -> dict[str, Any]:
        return {path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}

    # Every feature and every mean over a tensor shows in the step. VeLO's logarithms of statistics amplify
    # rounding: with a random theta 7e-6 to 4e-5 on three trees; so does, unsplit, noise of 6e-8 in gradients.
    theta = {"kind": "hand_made", "noise": 0.01} if variant == "velo" else {"kind": "random"}
    params, optimizer = fill(), build(load(variant, overrides).optimizer, jax.random.key(0), theta)
    whole = optimizer.as_optax(num_steps=10, weight_decay=0.1)
    split = optimizer.as_optax(num_steps=10, weight_decay=0.1, shardings=places)
    params_split = jax.device_put(params, places)
    state, shares = jax.jit(whole.init)(params), jax.jit(split.init)(params_split)
    value = jnp.float32(1.0)
    one = jax.jit(lambda g, s, p: whole.update(g, s, p, value=value))
    many = jax.jit(lambda g, s, p: split.update(g, s, p, value=value))
    compiled = many.lower(jax.device_put(params, places), shares, params_split).compile()
    worst = 0.0
    for _ in range(3):
        grads = fill()
        updates, state = one(grads, state, params)
        again, shares = compiled(jax.device_put(grads, places), shares, params_split)
        for path, update in updates.items():
            size = float(jnp.abs(update).max())
            worst = max(worst, float(np.abs(np.asarray(again[path]) - update).max()) / max(size, 1e-30))
    text = compiled.as_text()
    gathered = re.findall(r"= (?:\()?\w+\[([\d,]*)\][^=]* all-gather(?:-start)?\(", text)
    return {
        "difference": worst,
        "bytes": sum(x.nbytes for x in jax.tree.leaves(shares)),
        "bytes_here": sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(shares)),
        "gathered": max(
            (int(np.prod([int(n) for n in dims.split(",") if n])) for dims in gathered), default=0
        ),
        "exchanges": text.count(" all-to-all("),
        "groups": sorted(shares["learned"]),
    }


def module_step() -> dict[str, float]:
    """Returns how far apart a model's parameters are after steps of nnx.Optimizer, split and not."""
    on, x = mesh(fsdp=2, tensor=2), jax.random.normal(jax.random.key(0), (8, 16))
    kernels = []
    for split in (False, True):
        model = nnx.Sequential(nnx.Linear(16, 32, rngs=nnx.Rngs(0)), nnx.Linear(32, 16, rngs=nnx.Rngs(1)))
        shardings = None
        if split:
            params = nnx.state(model, nnx.Param)
            axes = ("fsdp", "tensor")
            shardings = jax.tree.map(lambda p, axes=axes: NamedSharding(on, P(*axes[-p.ndim :])), params)
            nnx.update(model, jax.device_put(params, shardings))
        optimizer = nnx.Optimizer(model, celo_nnx.celo2(1e-2, shardings=shardings), wrt=nnx.Param)

        @nnx.jit
        def step(model: nnx.Module, optimizer: nnx.Optimizer) -> None:
            grads = nnx.grad(lambda model: jnp.mean(jnp.square(model(x) - 1.0)))(model)
            optimizer.update(model, grads)

        for _ in range(3):
            step(model, optimizer)
        kernels.append(np.asarray(model.layers[0].kernel[...]))
    return {"difference": float(np.abs(kernels[0] - kernels[1]).max())}


def refusals() -> dict[str, str]:
    """Returns what is said of shardings that cannot be."""
    params, on = {"a/kernel": jnp.ones((6, 8))}, mesh(fsdp=4)
    explicit = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Explicit,))
    tries = {
        "indivisible": {"a/kernel": NamedSharding(on, P("fsdp"))},
        "rank": {"a/kernel": NamedSharding(on, P(None, None, "fsdp"))},
        "explicit": {"a/kernel": NamedSharding(explicit, P(None, "fsdp"))},
        "name": {"b/kernel": NamedSharding(on, P())},
        "kind": {"a/kernel": "fsdp"},
        "none": {"a/kernel": None},
    }
    said = {}
    for name, tree in tries.items():
        try:
            celo_nnx.celo2(shardings=tree).init(params)
        except UserError as error:
            said[name] = str(error)
    return said


def main() -> None:
    both, rows = mesh(fsdp=2, tensor=2), mesh(fsdp=4)
    matrices = {path: shape for path, shape in TREE.items() if len(shape) == 2 and "embedding" not in path}
    few = {path: TREE[path] for path in ("a/kernel", "b/kernel")}
    on_rows = {path: P("fsdp") for path in TREE if path not in ("g/scale", "conv/kernel", "layers/kernel")}
    columns = {path: P(*(None,) * (len(s) - 1), "tensor") for path, s in matrices.items()}
    out = {
        "both": compare("celo2", TREE, BOTH, both),
        "rows": compare("celo2", TREE, on_rows, rows),
        "columns": compare("celo2", matrices, columns, mesh(tensor=4)),
        "replicas": compare("celo2", matrices, {}, mesh(data=4)),
        "data and fsdp": compare("celo2", matrices, on_rows, mesh(data=2, fsdp=2)),
        "tiles": compare("celo2", matrices, BOTH, both, ("optimizer.tile=64",)),
        "rolling": compare("celo2", few, BOTH, both, ("optimizer.output_normalization.kind=rolling",)),
        "celo2_base drawn": compare("celo2_base", *drawn(0, ("fsdp", "tensor")), both),
        "celo drawn": compare("celo", *drawn(1, ("fsdp", "tensor")), both),
        "velo drawn": compare("velo", *drawn(2, ("fsdp", "tensor")), both),
        "adafac_mlp drawn": compare("adafac_mlp", *drawn(3, ("fsdp", "tensor")), both),
        "module": module_step(),
        "refusals": refusals(),
    }
    print(json.dumps(out))


if __name__ == "__main__":
    main()
