"""Training a small learned optimizer by evolution strategies, as a task."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from celo_nnx.errors import require
from celo_nnx.interfaces import Array, PyTree, Task
from celo_nnx.tasks.fields import check_counts, check_positive, check_widths, clipped
from celo_nnx.tasks.image_mlp import dense, initial_dense

DECAYS = (0.5, 0.9, 0.99)
FEATURES = 2 + len(DECAYS)
EXPONENT = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnedOptimizerTask(Task):
    """The parameters theta are an MLP that updates an inner task's parameters, element by element.

    Its inputs are the gradient, the parameter and averages of the gradient, each divided by its RMS over the
    tensor; with its two outputs d and m an update is ``-step d exp(m / 10)``.

    ``L(theta)`` is the mean normalized inner loss after each of ``unroll`` updates, from a fresh start, on
    fresh batches. The loss is ``1/2 mean_n [L(theta + v_n) + L(theta - v_n)]`` with ``v_n = std N(0, 1)``,
    whose mean is the smoothed ``L``, and its gradient is not differentiated through the unroll but estimated:
    ``mean_n v_n [L(theta + v_n) - L(theta - v_n)] / (2 std^2)``.

    Attributes:
      inner: the inner task; its data are the task's.
      hidden: widths of the MLP's hidden layers, relu.
      unroll: updates.
      pairs: antithetic pairs.
      std: of the perturbations.
      step: the size of an update.

    Example:
      >>> from celo_nnx.tasks.analytic import Quadratic
      >>> task = LearnedOptimizerTask(inner=Quadratic(), hidden=(4,))
      >>> task.init(jax.random.key(0))[0]["linear_0"]["w"].shape
      (5, 4)

    Source: Metz and others, "Understanding and correcting pathologies in the training of learned optimizers",
    ICML 2019, for the optimizer; antithetic evolution strategies as in META_TRAINING section 8.
    """

    inner: Task
    hidden: tuple[int, ...] = (8,)
    unroll: int = 8
    pairs: int = 4
    std: float = 0.1
    step: float = 0.01

    def __post_init__(self) -> None:
        """Checks every value; raises :class:`~celo_nnx.errors.UserError`."""
        require(isinstance(self.inner, Task), "inner", self.inner, "a task")
        check_widths(self, "hidden", least=0)
        check_counts(self, "unroll", "pairs")
        check_positive(self, "std", "step")

    @property
    def example_axis(self) -> int:
        """The axis after the updates' and the inner task's own."""
        return 1 + self.inner.example_axis

    def init(self, key: Array, sample: PyTree = ()) -> tuple[PyTree, PyTree]:
        """Returns (theta, empty model state)."""
        return initial_dense(key, (FEATURES, *self.hidden, 2), "cut_normal"), {}

    def loss(
        self, params: PyTree, state: PyTree, key: Array, batch: PyTree, sample: PyTree = ()
    ) -> tuple[Array, PyTree, dict[str, Array]]:
        """Returns (the loss, whose gradient is the estimate, state, no auxiliary scalars)."""
        noise_key, inner_key = jax.random.split(key)
        theta = lax.stop_gradient(params)
        leaves, tree = jax.tree.flatten(theta)
        noises = [
            self.std * jax.random.normal(jax.random.fold_in(noise_key, i), (self.pairs, *leaf.shape))
            for i, leaf in enumerate(leaves)
        ]

        def at(noise: list[Array], sign: Array) -> Array:
            moved = [x + sign * v for x, v in zip(leaves, noise, strict=True)]
            return self.unrolled(jax.tree.unflatten(tree, moved), inner_key, batch)

        losses = jax.vmap(jax.vmap(at, (None, 0)), (0, None))(noises, jnp.array([1.0, -1.0]))
        difference = (losses[:, 0] - losses[:, 1]) / (2 * self.std**2 * self.pairs)
        estimate = [jnp.tensordot(difference, noise, 1) for noise in noises]
        # Worth nothing, but with the estimate as its gradient.
        pairs = zip(jax.tree.leaves(params), leaves, estimate, strict=True)
        zero = sum(jnp.sum((x - constant) * g) for x, constant, g in pairs)
        return jnp.mean(losses) + zero, state, {}

    def evaluate(
        self, params: PyTree, state: PyTree, key: Array, batch: PyTree, sample: PyTree = ()
    ) -> Array:
        """Returns ``L(theta)``, unperturbed."""
        return self.unrolled(params, jax.random.split(key)[1], batch)

    def unrolled(self, theta: PyTree, key: Array, batch: PyTree) -> Array:
        """Returns ``L(theta)`` for one start and batches ``[unroll + 1, ...]``."""
        sample_key, init_key, step_key = jax.random.split(key, 3)
        sample = self.inner.sample(sample_key)
        params, model = self.inner.init(init_key, sample)
        averages = jax.tree.map(lambda p: jnp.zeros((len(DECAYS), *p.shape), p.dtype), params)

        def step(carry: PyTree, now: tuple[Array, PyTree]) -> tuple[PyTree, Array]:
            params, model, averages = carry
            key, batch = now

            def objective(params: PyTree) -> tuple[Array, PyTree]:
                return self.inner.loss(params, model, key, batch, sample)[:2]

            (loss, model), grads = jax.value_and_grad(objective, has_aux=True)(params)
            averages = jax.tree.map(_averaged, averages, grads)
            params = jax.tree.map(lambda p, g, m: self._updated(theta, p, g, m), params, grads, averages)
            return (params, model, averages), self.inner.normalize(loss)

        keys = jax.random.split(step_key, self.unroll + 1)
        _, losses = lax.scan(step, (params, model, averages), (keys, batch))
        return jnp.mean(losses[1:])

    def _updated(self, theta: PyTree, p: Array, g: Array, averages: Array) -> Array:
        """Returns a tensor after its update."""
        planes = jnp.concatenate([jnp.stack([g, p]), averages]).reshape(FEATURES, -1)
        planes = planes * lax.rsqrt(jnp.mean(planes**2, axis=1, keepdims=True) + 1e-10)
        x = planes.T
        for i in range(len(self.hidden)):
            x = jax.nn.relu(dense(theta[f"linear_{i}"], x))
        x = dense(theta[f"linear_{len(self.hidden)}"], x)
        return p - (self.step * x[:, 0] * jnp.exp(EXPONENT * x[:, 1])).reshape(p.shape)

    def pick(self, key: Array, start: Array, count: Array) -> PyTree:
        """Picks the inner task's batches, ``[unroll + 1, ...]``."""
        keys = jax.random.split(key, self.unroll + 1)
        return jax.vmap(self.inner.pick, (0, None, None))(keys, start, count)

    def take(self, data: dict[str, Array], picked: PyTree) -> PyTree:
        """Returns the picked batches."""
        return jax.vmap(self.inner.take, (None, 0))(data, picked)

    def normalize(self, loss: Array) -> Array:
        """Returns the loss cut to the range of the inner task's meta-loss."""
        low, high = (self.inner.normalize(jnp.float32(x)) for x in (-jnp.inf, jnp.inf))
        return clipped(loss, low, high)


def _averaged(averages: Array, grad: Array) -> Array:
    """Returns the exponential averages ``[k, *S]`` after a gradient ``[*S]``."""
    decays = jnp.asarray(DECAYS, grad.dtype).reshape(-1, *(1,) * grad.ndim)
    return decays * averages + (1 - decays) * grad[None]
