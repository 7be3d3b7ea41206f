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
from celo_nnx.errors import is_count, is_number, require
from celo_nnx.interfaces import Array, GradientEstimator, Optimizer, PyTree
from celo_nnx.meta.population import AXIS

# LLVM avoids 512-bit vectors by default; the update MLP is faster with them where the CPU has them.
COMPILER_OPTIONS = {"xla_cpu_prefer_vector_width": 512}


class MetaTrainer:
    """Trains an optimizer's theta with a gradient estimator and an optax rule.

    ``run(state, n)`` is one program for every ``n``, and all that is random in meta-iteration ``i`` comes
    from ``fold_in(root key, i)``: however meta-iterations are split over calls, theta comes out
    bit-identical.

    With an ``average`` of decay d the state keeps, besides theta, its bias-corrected exponential average
    over the k meta-iterations since :meth:`init`, in which the start has no weight::

        a_k = a_(k-1) + (1 - d) / (1 - d^k) (theta_k - a_(k-1))  =  sum_i (1 - d) d^(k-i) theta_i / (1 - d^k)

    A frozen leaf has gradient 0, is not shown to the meta-optimizer and keeps every bit.

    Args:
      optimizer: the optimizer whose theta is where training starts.
      estimator: estimates the gradient of the meta-loss.
      meta_optimizer: the optax rule for theta; with ``learning_rate`` a function that makes it of the rate.
      learning_rate: data to the program, which is the same for all rates; None for a rule that has its own.
      iterations_per_dispatch: the most meta-iterations of one :meth:`run`.
      average: decay of the average of theta, in [0, 1); 0 for none.
      frozen: theta's tree of bool, true for leaves that rest; None for none.

    Raises:
      UserError: a value out of range.

    Example:
      >>> trainer = MetaTrainer(optimizer, estimator, optax.adamw(1e-4))  # doctest: +SKIP
      >>> state = trainer.init(jax.random.key(0))  # doctest: +SKIP
      >>> state, metrics = trainer.run(state, 10)  # doctest: +SKIP
    """

    def __init__(
        self,
        optimizer: Optimizer,
        estimator: GradientEstimator,
        meta_optimizer: optax.GradientTransformation | Callable[[Array], optax.GradientTransformation],
        *,
        learning_rate: float | None = None,
        iterations_per_dispatch: int = 10,
        average: float = 0.0,
        frozen: PyTree = None,
    ) -> None:
        legal = "an integer >= 1"
        require(
            is_count(iterations_per_dispatch), "run.iterations_per_dispatch", iterations_per_dispatch, legal
        )
        require(
            is_number(average) and 0 <= average < 1, "meta.average", average, "a number in [0, 1) (0 = off)"
        )
        self.optimizer = optimizer
        self.estimator = estimator
        self.average = float(average)
        self.frozen = frozen if frozen is not None and any(jax.tree.leaves(frozen)) else None
        self.meta_optimizer = meta_optimizer
        self.iterations_per_dispatch = iterations_per_dispatch
        # Data travels as an argument, since arrays that a jitted function closes over are baked into it.
        rate = () if learning_rate is None else jnp.float32(learning_rate)
        self._data = getattr(estimator, "data", ()), rate
        self._mesh = getattr(estimator, "mesh", None)
        self._init = jax.jit(self._first_state)
        self.compiled_run = jax.jit(self._iterations, donate_argnums=0, compiler_options=COMPILER_OPTIONS)

    def init(
        self, key: Array, theta: PyTree = None, *, iteration: int = 0, phase: int = 0
    ) -> dict[str, PyTree]:
        """Returns the state at the start of a run, or of a later phase of it.

        Args:
          key: typed PRNG key; the root of everything random.
          theta: where a later phase goes on from; the optimizer's own by default.
          iteration: meta-iterations done before.
          phase: its number, 0 for the first; each draws inner problems of its own.

        Returns:
          ``theta``, ``meta_optimizer``, ``estimator``, ``iteration`` (int32) and ``key``; with an average
          also ``average``, of ``theta`` and the ``count`` of iterations in it.
        """
        theta = self.optimizer.theta if theta is None else theta
        # Meta-iteration i uses fold_in(key, i), i < 2**31 - 1; starts have numbers that none of them has.
        numbers = jnp.int32(iteration), jnp.uint32(2**32 - 1 - phase)
        return self.place(self._init(theta, key, self._data, numbers))

    def run(self, state: dict[str, PyTree], n: int) -> tuple[dict[str, PyTree], dict[str, Array]]:
        """Does ``n`` meta-iterations.

        Args:
          state: from :meth:`init`, an earlier call, or a checkpoint; its buffers are consumed (donated).
          n: at most ``iterations_per_dispatch``.

        Returns:
          (next state, metrics ``[iterations_per_dispatch, ...]`` of which the first ``n`` rows are valid).
          Metrics are the estimator's and ``gradient_norm``, ``theta_norm``, ``update_norm``; entries of theta
          itself count in ``nonfinite_theta`` too. Nothing waits for the device.

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

    def _rule(self, data: PyTree) -> optax.GradientTransformation:
        rate = data[1]
        rule = self.meta_optimizer if isinstance(rate, tuple) else self.meta_optimizer(rate)
        if self.frozen is None:
            return rule
        return optax.masked(rule, jax.tree.map(lambda rests: not rests, self.frozen))

    def _bound(self, data: PyTree) -> GradientEstimator:
        data = data[0]
        return self.estimator.with_data(data) if hasattr(self.estimator, "with_data") else self.estimator

    def _first_state(
        self, theta: PyTree, key: Array, data: PyTree, numbers: tuple[Array, Array]
    ) -> dict[str, PyTree]:
        # A copy: jit returns an input that is an output as the same buffer, and run() donates it.
        theta = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), theta)
        iteration, start = numbers
        start = jax.random.fold_in(key, start)
        average = {"theta": jax.tree.map(jnp.copy, theta), "count": jnp.int32(0)}
        return {
            "theta": theta,
            "meta_optimizer": self._rule(data).init(theta),
            "estimator": self._bound(data).init(theta, start, iteration),
            "iteration": jnp.array(iteration, copy=True),
            "key": jax.random.wrap_key_data(
                jnp.array(jax.random.key_data(key), copy=True), impl=jax.random.key_impl(key)
            ),
        } | ({"average": average} if self.average else {})

    def _averaged(self, average: dict[str, PyTree], theta: PyTree) -> dict[str, PyTree]:
        """The average with one more theta; exactly theta where it is the first one."""
        count = average["count"] + 1
        weight = (1 - self.average) / -jnp.expm1(count * math.log(self.average))

        def move(a: Array, x: Array) -> Array:
            return jnp.where(count == 1, x, a + weight * (x - a))

        moved = jax.tree.map(move, average["theta"], theta)
        return {"theta": self._rested(average["theta"], moved), "count": count}

    def _rested(self, old: PyTree, new: PyTree) -> PyTree:
        """The new leaves, and of those that rest the old ones: adding 0 would turn -0 into 0."""
        if self.frozen is None:
            return new
        return jax.tree.map(lambda x, y, rests: x if rests else y, old, new, self.frozen)

    def _iteration(
        self, state: dict[str, PyTree], data: PyTree
    ) -> tuple[dict[str, PyTree], dict[str, Array]]:
        theta = state["theta"]
        key = jax.random.fold_in(state["key"], state["iteration"])
        gradient, estimator, metrics = self._bound(data)(theta, state["estimator"], key, state["iteration"])
        gradient = self._rested(jax.tree.map(jnp.zeros_like, gradient), gradient)
        updates, meta_optimizer = self._rule(data).update(gradient, state["meta_optimizer"], theta)
        theta = self._rested(theta, optax.apply_updates(theta, updates))
        metrics = {
            **metrics,
            "gradient_norm": optax.tree.norm(gradient),
            "theta_norm": optax.tree.norm(theta),
            "update_norm": optax.tree.norm(updates),
            "nonfinite_theta": metrics["nonfinite_theta"] + _nonfinite(theta),
        }
        state = {
            "theta": theta,
            "meta_optimizer": meta_optimizer,
            "estimator": estimator,
            "iteration": state["iteration"] + 1,
            "key": state["key"],
        } | ({"average": self._averaged(state["average"], theta)} if self.average else {})
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


def _nonfinite(tree: PyTree) -> Array:
    """How many numbers of a tree are not finite, int32."""
    return sum((jnp.sum(~jnp.isfinite(x), dtype=jnp.int32) for x in jax.tree.leaves(tree)), jnp.int32(0))
