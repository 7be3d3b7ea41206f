"""The meta-training loop: whole meta-iterations, several a dispatch, in one jitted function."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from celo_nnx import processes
from celo_nnx.errors import require
from celo_nnx.interfaces import Array, GradientEstimator, Optimizer, PyTree
from celo_nnx.meta.population import AXIS
from celo_nnx.meta.truncation import is_count


def adamw(
    *,
    learning_rate: float = 1e-4,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
) -> optax.GradientTransformation:
    """AdamW on all meta-parameters, as ``optax.adamw`` computes it.

    Args:
      learning_rate: constant.
      b1, b2: decays of the first and second moment, in [0, 1).
      eps: added to the root of the second moment.
      weight_decay: decoupled.

    Raises:
      UserError: for a value out of range.

    Source: META_TRAINING sections 0 and 5.
    """

    def number(name: str, value: object, low: float, high: float, legal: str) -> None:
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        require(real and low <= value < high, f"meta.optimizer.{name}", value, legal)

    number("learning_rate", learning_rate, 0.0, math.inf, "a finite number >= 0")
    number("b1", b1, 0.0, 1.0, "in [0, 1)")
    number("b2", b2, 0.0, 1.0, "in [0, 1)")
    number("eps", eps, 0.0, math.inf, "a finite number >= 0")
    number("weight_decay", weight_decay, 0.0, math.inf, "a finite number >= 0")
    return optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)


META_OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {"adamw": adamw}


# LLVM avoids 512-bit vectors by default; the update MLP is faster with them where the CPU has them.
COMPILER_OPTIONS = {"xla_cpu_prefer_vector_width": 512}


class MetaTrainer:
    """Trains an optimizer's theta with a gradient estimator and an optax rule.

    ``run(state, n)`` is one program for every ``n``, and all that is random in meta-iteration ``i`` comes
    from ``fold_in(root key, i)``: however meta-iterations are split over calls, theta comes out
    bit-identical.

    Args:
      optimizer: the optimizer whose theta is where training starts.
      estimator: estimates the gradient of the meta-loss.
      meta_optimizer: the optax rule for theta.
      iterations_per_dispatch: the most meta-iterations of one :meth:`run`.

    Raises:
      UserError: unless ``iterations_per_dispatch >= 1``.

    Example:
      >>> trainer = MetaTrainer(optimizer, estimator, adamw(learning_rate=1e-4))  # doctest: +SKIP
      >>> state = trainer.init(jax.random.key(0))  # doctest: +SKIP
      >>> state, metrics = trainer.run(state, 10)  # doctest: +SKIP
    """

    def __init__(
        self,
        optimizer: Optimizer,
        estimator: GradientEstimator,
        meta_optimizer: optax.GradientTransformation,
        *,
        iterations_per_dispatch: int = 10,
    ) -> None:
        legal = "an integer >= 1"
        require(
            is_count(iterations_per_dispatch), "run.iterations_per_dispatch", iterations_per_dispatch, legal
        )
        self.optimizer = optimizer
        self.estimator = estimator
        self.meta_optimizer = meta_optimizer
        self.iterations_per_dispatch = iterations_per_dispatch
        # Data travels as an argument, since arrays that a jitted function closes over are baked into it.
        self._data = getattr(estimator, "data", ())
        self._mesh = getattr(estimator, "mesh", None)
        self._init = jax.jit(self._first_state)
        self.compiled_run = jax.jit(self._iterations, donate_argnums=0, compiler_options=COMPILER_OPTIONS)

    def init(self, key: Array) -> dict[str, PyTree]:
        """Returns the state at the start.

        Args:
          key: typed PRNG key; the root of everything random.

        Returns:
          ``theta``, ``meta_optimizer``, ``estimator``, ``iteration`` (int32) and ``key``.
        """
        return self.place(self._init(self.optimizer.theta, key, self._data))

    def run(self, state: dict[str, PyTree], n: int) -> tuple[dict[str, PyTree], dict[str, Array]]:
        """Does ``n`` meta-iterations.

        Args:
          state: from :meth:`init`, an earlier call, or a checkpoint; its buffers are consumed (donated).
          n: at most ``iterations_per_dispatch``.

        Returns:
          (next state, metrics ``[iterations_per_dispatch, ...]`` of which the first ``n`` rows are valid).
          Metrics are the estimator's and ``gradient_norm``, ``theta_norm``, ``update_norm``. Nothing waits
          for the device.

        Raises:
          UserError: unless ``0 <= n <= iterations_per_dispatch``.
        """
        legal = f"an integer from 0 to {self.iterations_per_dispatch}"
        require(0 <= n <= self.iterations_per_dispatch, "meta-iterations of a dispatch", n, legal)
        return self.compiled_run(self.place(state), jnp.int32(n), self._data)

    def place(self, state: dict[str, PyTree]) -> dict[str, PyTree]:
        """Puts a state where the program wants it: pairs over the mesh, the rest everywhere.

        It costs nothing for a state that is there already.
        """
        if self._mesh is None:
            return state
        spread = NamedSharding(self._mesh, PartitionSpec(AXIS))
        everywhere = NamedSharding(self._mesh, PartitionSpec())
        return {
            name: processes.put(part, spread if name == "estimator" else everywhere)
            for name, part in state.items()
        }

    def _bound(self, data: PyTree) -> GradientEstimator:
        return self.estimator.with_data(data) if hasattr(self.estimator, "with_data") else self.estimator

    def _first_state(self, theta: PyTree, key: Array, data: PyTree) -> dict[str, PyTree]:
        # A copy: jit returns an input that is an output as the same buffer, and run() donates it.
        theta = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), theta)
        # Meta-iteration i uses fold_in(key, i), i < 2**31 - 1; the start has a number that none of them has.
        start = jax.random.fold_in(key, 2**32 - 1)
        return {
            "theta": theta,
            "meta_optimizer": self.meta_optimizer.init(theta),
            "estimator": self._bound(data).init(theta, start),
            "iteration": jnp.int32(0),
            "key": jax.random.wrap_key_data(
                jnp.array(jax.random.key_data(key), copy=True), impl=jax.random.key_impl(key)
            ),
        }

    def _iteration(
        self, state: dict[str, PyTree], data: PyTree
    ) -> tuple[dict[str, PyTree], dict[str, Array]]:
        theta = state["theta"]
        key = jax.random.fold_in(state["key"], state["iteration"])
        gradient, estimator, metrics = self._bound(data)(theta, state["estimator"], key, state["iteration"])
        updates, meta_optimizer = self.meta_optimizer.update(gradient, state["meta_optimizer"], theta)
        theta = optax.apply_updates(theta, updates)
        metrics = {
            **metrics,
            "gradient_norm": optax.tree.norm(gradient),
            "theta_norm": optax.tree.norm(theta),
            "update_norm": optax.tree.norm(updates),
        }
        state = {
            "theta": theta,
            "meta_optimizer": meta_optimizer,
            "estimator": estimator,
            "iteration": state["iteration"] + 1,
            "key": state["key"],
        }
        return state, metrics

    def _iterations(
        self, state: dict[str, PyTree], n: Array, data: PyTree
    ) -> tuple[dict[str, PyTree], dict[str, Array]]:
        # Jitted within, so that Python traces a meta-iteration once for its shapes and for the loop.
        iteration = jax.jit(self._iteration)
        shapes = jax.eval_shape(iteration, state, data)[1]
        rows = jax.tree.map(lambda x: jnp.zeros((self.iterations_per_dispatch, *x.shape), x.dtype), shapes)

        def body(i: Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            state, metrics = iteration(carry[0], data)
            return state, jax.tree.map(
                lambda rows, row: lax.dynamic_update_index_in_dim(rows, row, i, 0), carry[1], metrics
            )

        return lax.fori_loop(0, n, body, (state, rows))
