"""Inner problems small enough to compute by hand; as a program it meta-trains them on several devices."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import celo_nnx
from celo_nnx.interfaces import Family, Task
from celo_nnx.meta.estimators import ESTIMATORS, PES, Mixture
from celo_nnx.meta.meta_optimizers import adamw
from celo_nnx.meta.trainer import MetaTrainer
from celo_nnx.meta.truncation import LogUniform

# Most of these tests is compilation; what they compile is small, and runs as fast without optimization.
jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
)


@dataclasses.dataclass(frozen=True)
class Quadratic(Task):
    """Loss ``(w - target)^2 / 2 + noise * x``, w from ``start``; batches are one number x of the data."""

    start: float = 1.0
    target: float = -0.5
    noise: float = 0.0
    spread: float = 0.0
    bad_above: float = np.inf

    def init(self, key: Any, sample: Any = ()) -> Any:
        return {"w": jnp.float32(self.start) + self.spread * jax.random.normal(key)}, ()

    def loss(self, params: Any, state: Any, key: Any, batch: Any, sample: Any = ()) -> Any:
        loss = 0.5 * jnp.square(params["w"] - self.target) + self.noise * batch["x"] * params["w"]
        return jnp.where(batch["x"] > self.bad_above, jnp.nan, loss), state, {}

    def pick(self, key: Any, start: Any, count: Any) -> Any:
        return start + jax.random.randint(key, (), 0, count)

    def normalize(self, loss: Any) -> Any:
        return jnp.nan_to_num(jnp.clip(loss, -50.0, 50.0), nan=50.0)


class Drift:
    """An optimizer whose steps are linear in theta: ``-rate g + rate theta``; the state counts its steps."""

    def __init__(self, theta: Any = None, rate: float = 0.1) -> None:
        self.theta = {"drift": jnp.zeros(())} if theta is None else theta
        self.rate = rate

    def with_theta(self, theta: Any) -> Drift:
        return Drift(theta, self.rate)

    def init(self, params: Any, num_steps: Any) -> Any:
        return {"count": jnp.int32(0), "num_steps": jnp.asarray(num_steps, jnp.int32)}

    def update(self, grads: Any, state: Any, params: Any, *, value: Any) -> Any:
        updates = jax.tree.map(lambda g: -self.rate * g + self.rate * self.theta["drift"], grads)
        return updates, {**state, "count": state["count"] + 1}


class Rated:
    """A nonlinear optimizer with two leaves: ``-0.1 exp(rate) g + 0.1 drift``; the state counts its steps."""

    def __init__(self, theta: Any = None) -> None:
        zero = jnp.zeros(())
        self.theta = {"rule": {"rate": zero}, "schedule": {"drift": zero}} if theta is None else theta

    def with_theta(self, theta: Any) -> Rated:
        return Rated(theta)

    def init(self, params: Any, num_steps: Any) -> Any:
        return Drift().init(params, num_steps)

    def update(self, grads: Any, state: Any, params: Any, *, value: Any) -> Any:
        rate = 0.1 * jnp.exp(self.theta["rule"]["rate"])
        updates = jax.tree.map(lambda g: -rate * g + 0.1 * self.theta["schedule"]["drift"], grads)
        return updates, {**state, "count": state["count"] + 1}


def family(name: str = "a", task: Task | None = None, low: float = -1.0, high: float = 1.0) -> Family:
    """Eleven numbers from low to high to train on, five others held out."""
    x, held = np.linspace(low, high, 11, dtype=np.float32), np.linspace(3.0, 5.0, 5, dtype=np.float32)
    return Family(name, Quadratic() if task is None else task, {"x": x}, {"x": x}, {"x": held})


def trainer(devices: int = 1, tasks: int = 1, per: int = 7) -> MetaTrainer:
    """Two families of one task, and with ``tasks=2`` a third of another."""
    noisy = Quadratic(noise=0.3, spread=1.0)
    families = [family("a", noisy), family("b", noisy, 0.0, 2.0), family("c", Quadratic(target=2.0))]
    families = families[: 1 + tasks]
    options = {"pairs": 4, "std": 0.1, "truncation": 6, "unroll": LogUniform(minimum=3, maximum=20)}
    estimator = PES(Drift(), families, devices=devices, **options)
    return MetaTrainer(Drift(), estimator, adamw(learning_rate=0.01), iterations_per_dispatch=per)


def four_iterations(devices: int) -> dict[str, np.ndarray]:
    """The metrics of the first meta-iteration, and what is there after four."""
    with_devices = trainer(devices, tasks=2)
    state, metrics = with_devices.run(with_devices.init(jax.random.key(3)), 1)
    again, _ = with_devices.run(state, 3)
    row = {name: np.asarray(value)[0] for name, value in metrics.items()}
    traces = with_devices.compiled_run._cache_size()
    return {**row, "drift": again["theta"]["drift"], "iteration": again["iteration"], "programs": traces}


def program(*arguments: Any) -> subprocess.Popen:
    """Starts this file as a program, on the package that is under test."""
    path = str(pathlib.Path(celo_nnx.__file__).parents[1])
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )


def first_estimates(devices: int) -> dict[str, np.ndarray]:
    """Every estimator's first gradient and loss, of two families of one task with lengths around 8."""
    noisy = Quadratic(noise=0.3, spread=1.0)
    families = [family("a", noisy), family("b", noisy, 0.0, 2.0)]
    found: dict[str, np.ndarray] = {}
    for kind in ("pes", "truncated_es", "full_es", "shared_noise", "truncated_backprop", "mixture"):

        def build(kind: str) -> Any:
            options = {} if kind == "truncated_backprop" else {"std": 0.1}
            options |= {} if kind == "full_es" else {"truncation": 5}
            lengths = LogUniform(minimum=4, maximum=9)
            return ESTIMATORS[kind](
                Drift(), families, pairs=4, weights=(3.0, 1.0), unroll=lengths, devices=devices, **options
            )

        mixed = kind == "mixture"
        estimator = Mixture(build("pes"), build("truncated_es")) if mixed else build(kind)

        @jit
        def run(theta: Any, data: Any, estimator: Any = estimator) -> Any:
            bound = estimator.with_data(data)
            state = bound.init(theta, jax.random.key(5))
            gradient, _, metrics = bound(theta, state, jax.random.key(6))
            return gradient["drift"], metrics["family_loss"]

        gradient, loss = run({"drift": jnp.float32(0.3)}, estimator.data)
        found |= {f"{kind} gradient": np.asarray(gradient), f"{kind} loss": np.asarray(loss)}
    return found


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
    wanted = {"iterations": four_iterations, "estimates": first_estimates}[sys.argv[3]]
    counts = range(2, int(sys.argv[1]) + 1, 2)
    np.savez(sys.argv[2], **{f"{n} {k}": x for n in counts for k, x in wanted(n).items()})
