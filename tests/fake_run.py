"""A run with a stand-in for the meta-trainer: the real loop, folder, log and checkpoints, in seconds.

Also a program: ``python tests/fake_run.py RUN_DIR ITERATIONS PAUSE [KEY=VALUE ...]``.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from celo_nnx import training

THETA = {"rule": {"w": np.ones((3, 2), np.float32), "b": np.zeros((2,), np.float32)}}


class FakeTrainer:
    """Follows noisy gradients of a quadratic: every leaf kind of a real state, and chaos enough."""

    def __init__(self, per: int, pause: float = 0.0, rate: float = 1e-3) -> None:
        self.iterations_per_dispatch, self.pause = per, pause
        self.rule = optax.adamw(10 * rate)
        self._run = jax.jit(self._iterations, donate_argnums=0)

    def init(
        self, key: jax.Array, theta: Any = None, *, iteration: int = 0, phase: int = 0
    ) -> dict[str, Any]:
        theta = jax.tree.map(jnp.array, THETA if theta is None else theta)
        start = jax.random.fold_in(key, phase)
        first = {"problem": jax.random.normal(start, (2, 3)), "age": jnp.zeros((2,), jnp.int32)}
        return {
            "theta": theta,
            "meta_optimizer": self.rule.init(theta),
            "estimator": first,
            "iteration": jnp.int32(iteration),
            "key": jnp.copy(key),
        }

    def run(self, state: Any, n: int) -> tuple[Any, Any]:
        time.sleep(self.pause)
        return self._run(state, n)

    def _iterations(self, state: Any, n: jax.Array) -> tuple[Any, Any]:
        per = self.iterations_per_dispatch
        rows = {k: jnp.zeros((per,)) for k in ("loss", "gradient_norm", "theta_norm", "update_norm")}
        rows |= {"family_loss": jnp.zeros((per, 2)), "nonfinite": jnp.zeros((per, 2), jnp.int32)}

        def body(i: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            state, rows = carry
            key = jax.random.fold_in(state["key"], state["iteration"])
            noise = jax.random.normal(key, (3, 2))
            gradient = jax.tree.map(lambda x: x + noise.mean(), state["theta"])
            updates, rule = self.rule.update(gradient, state["meta_optimizer"], state["theta"])
            problem = jnp.sin(10 * state["estimator"]["problem"] + noise.T)
            loss = jnp.where(state["iteration"] == 3, jnp.nan, optax.tree.norm(gradient))
            state = {
                "theta": optax.apply_updates(state["theta"], updates),
                "meta_optimizer": rule,
                "estimator": {"problem": problem, "age": state["estimator"]["age"] + 1},
                "iteration": state["iteration"] + 1,
                "key": state["key"],
            }
            new = {"loss": loss, "family_loss": jnp.stack([loss, 1.0]), "nonfinite": jnp.array([2, 0])}
            return state, {k: rows[k].at[i].set(new.get(k, 1.0)) for k in rows}

        return jax.lax.fori_loop(0, n, body, (state, rows))


class Averaging(FakeTrainer):
    """Keeps an average of theta beside it, of sorts: half of it."""

    def init(self, *args: Any, **options: Any) -> dict[str, Any]:
        return self._with_average(super().init(*args, **options))

    def _iterations(self, state: Any, n: jax.Array) -> tuple[Any, Any]:
        state, rows = super()._iterations({k: v for k, v in state.items() if k != "average"}, n)
        return self._with_average(state), rows

    def _with_average(self, state: Any) -> dict[str, Any]:
        return state | {"average": {"theta": jax.tree.map(lambda x: 0.5 * x, state["theta"])}}


# One program for all runs of a process.
shared = functools.cache(FakeTrainer)


def config(iterations: int = 12, **run: Any) -> dict[str, Any]:
    """A config with every section; the stand-in looks at ``run`` alone."""
    options = {
        "iterations": iterations,
        "iterations_per_dispatch": 2,
        "checkpoint_seconds": 0.0,
        "keep": 2,
        "snapshots": 0,
        "data_dir": "",
        "devices": 1,
        "progress": False,
        "tensorboard": False,
        "wandb": False,
    }
    return {
        "seed": 0,
        "optimizer": {"schedule": {"kind": "constant", "value": 0.1}},
        "theta_init": {"kind": "random"},
        "tasks": {"kind": "image_mlp"},
        "meta": {"estimator": {"pairs": 2}, "optimizer": {"learning_rate": 1e-3}},
        "run": options | run,
    }


def assembled(pause: float = 0.0, data: str = "0" * 64, trainer: Any = None) -> Any:
    """Patches :func:`celo_nnx.training.assemble` to give the stand-in."""

    def assemble(config: Any, devices: int, resumed: bool = False, read: Any = None) -> training.Work:
        per = config["run"]["iterations_per_dispatch"]
        rate = config["meta"]["optimizer"]["learning_rate"]
        made = trainer or shared(per, pause, rate)
        return training.Work(made, THETA, ("one", "two"), {"one": data})

    return mock.patch.object(training, "assemble", assemble)


def main(argv: list[str]) -> None:
    """Runs as ``celo-nnx train`` does, signals included."""
    run_dir, iterations, pause, *changes = argv
    settings = {key: json.loads(value) for key, value in (change.split("=") for change in changes)}
    with assembled(float(pause)), training.stop_on_signals() as stop:
        result = training.train(config(int(iterations), **settings), run_dir, progress=False, stop=stop)
    print(json.dumps({"iteration": result.iteration, "stopped_by": result.stopped_by}))


if __name__ == "__main__":
    main(sys.argv[1:])
