"""Recordings made here: any published class, other seeds, shapes and options than the recorded files have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from celo_nnx import recordings
from celo_nnx.recordings.twins import twin_optimizer

Leaves = dict[str, tuple[tuple[int, ...], str | None, list[int] | None]]  # key -> shape, route, (d1, d0)


def header(reference_class: str, constructor: dict[str, Any], leaves: Leaves, steps: int) -> dict[str, Any]:
    """Returns the JSON of a trajectory, without what it may leave out."""
    listed = []
    for key, (shape, route, axes) in leaves.items():
        leaf = {"key": key, "shape": list(shape), "factored_dims_d1_d0": axes}
        listed.append(leaf | ({"routed_to": route} if route else {}))
    return {
        "kind": "optimizer_trajectory",
        "reference_class": reference_class,
        "constructor": constructor,
        "num_steps_given_to_init": 7,
        "n_updates": steps,
        "param_leaves": listed,
    }


def random_theta(spec: recordings.Spec, seed: int = 5) -> dict[str, np.ndarray]:
    """Returns the arrays ``theta/*`` of a spec; weights of size 1/2, and 1/10 where 1/2 would saturate."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, shape in recordings.theta_arrays(spec).items():
        size = 0.1 if name.endswith("_decays") or name.startswith("per_layer") else 0.5
        out[f"theta/{name}"] = (size * rng.normal(size=shape)).astype(np.float32)
    return out


def record(
    folder: Path,
    reference_class: str,
    constructor: dict[str, Any],
    leaves: Leaves,
    *,
    steps: int = 3,
    name: str = "made",
) -> Path:
    """Records the twin on random gradients.

    Returns:
      The recording's stem; NAME.json and NAME.npz lie there.
    """
    meta = header(reference_class, constructor, leaves, steps)
    rng = np.random.default_rng(6)
    probe = recordings.Recording(name, meta, {}, folder)
    spec = recordings.spec(probe, [(key, shape) for key, (shape, _, _) in leaves.items()])
    arrays = random_theta(spec)
    params = {key: rng.normal(size=shape).astype(np.float32) for key, (shape, _, _) in leaves.items()}
    grads = {key: rng.normal(size=(steps, *x.shape)).astype(np.float32) for key, x in params.items()}
    losses = np.linspace(2.0, 1.5, steps, dtype=np.float32)
    theta = recordings.theta(recordings.Recording(name, meta, arrays, folder), spec)
    rule = twin_optimizer(spec).with_theta(theta)
    update, state, path = jax.jit(rule.update), rule.init(params, spec.num_steps), [params]
    for i in range(steps):
        updates, state = update({k: g[i] for k, g in grads.items()}, state, path[-1], value=losses[i])
        path.append({k: path[-1][k] + np.asarray(updates[k]) for k in params})
    arrays |= {f"params/{key}": np.stack([p[key] for p in path]) for key in params}
    arrays |= {f"grads/{key}": g for key, g in grads.items()} | {"losses": losses}
    (folder / f"{name}.json").write_text(json.dumps(meta))
    np.savez(folder / f"{name}.npz", **arrays)
    return folder / name
