"""The kinds of parts, and the map of the project.

A learned optimizer is a sum of parts; everything learned is a :class:`MetaParam`, and theta is the pure
dict of those::

    LearnedOptimizer = accumulators + features + normalization + update rule + step
                     + orthogonalization + output normalization + schedule + routing

    Celo2-base = momentum(.9, .99, .999) + second_moment(.95) + factored(.9, .99, .999)
               + 14 feature groups + second-moment normalization over the matrix axes + MLP 8-8
               + identity + second-moment output normalization + constant schedule + one route
    Celo2      = Celo2-base with newton_schulz for identity, and a route that sends some tensors to Adam
    Muon       = Celo2 with theta_init "hand_made": the MLP passes RMS-normalized momentum through

Meta-training is a second sum::

    MetaTrainer = task families + augmentation + truncation schedule + gradient estimator + optax rule

Who imports whom (an arrow points at what is imported; ``tests/test_layout.py`` holds it)::

    cli -> everything below            build      -> components, optimizer, interfaces
    training, quickstart -> meta, tasks, evaluation, build
    evaluation -> tasks, optimizer     components, optimizer, meta, tasks -> interfaces
    pretrained -> build, meta's digest
    experiments -> config helpers only: a variant is data

Tensors. A *plane* is an array that broadcasts to a parameter's shape ``S``: ``S`` itself, or with size 1
where it is constant (a row factor is ``[n, 1]``, a column factor ``[1, m]``). Planes are never stacked
into a features array: XLA fuses planes, and a ``[..., 30]`` stack costs ten times the parameters.

Sources. "OPTIMIZERS 1.5" and "META_TRAINING section 4" name sections of the formula-level specification of
the published methods that this package was written from; equation names such as (A1) or (E4) are theirs.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

Array = jax.Array
PyTree = Any


class MetaParam(nnx.Param):
    """A meta-parameter: what meta-training learns. Theta is the state of all of them."""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """What is known of one parameter tensor when the optimizer state is made; static and hashable.

    Attributes:
      path: the tensor's place in the tree, keys joined by ``/``.
      shape: the shape that the rule works on: the tensor's own, ``(1,)`` for a scalar, the last two axes
        exchanged where ``flipped``.
      matrix: the two axes (rows, columns) that normalization and orthogonalization treat as the matrix,
        the rest being a batch; None for rank 1, where the only axis plays both parts.
      factored: axes ``(d1, d0)`` of the factored second moment, the second largest and the largest
        (OPTIMIZERS section 1.4), or None below rank 2.
      flipped: the last axis is shorter than a vector register and the one before it longer, so the rule
        works on the transposed tensor; state is kept that way.
    """

    path: str
    shape: tuple[int, ...]
    matrix: tuple[int, int] | None
    factored: tuple[int, int] | None
    flipped: bool = False

    @property
    def norm_axes(self) -> tuple[int, ...]:
        """The axes over which "matrix" statistics run: the matrix axes, or the only axis."""
        return self.matrix if self.matrix is not None else tuple(range(len(self.shape)))[-1:]


class Part(nnx.Module):
    """A part: keyword-only constructor arguments with defaults, checked when it is built."""


class Accumulator(Part):
    """A per-tensor statistic of the gradient."""

    def init(self, spec: TensorSpec) -> PyTree:
        """Returns the state at the start, float32."""
        raise NotImplementedError

    def update(self, state: PyTree, grad: Array, spec: TensorSpec) -> PyTree:
        """Returns the state after one gradient of shape ``spec.shape``."""
        raise NotImplementedError

    def read(self, state: PyTree, spec: TensorSpec) -> Any:
        """Returns what features see: for a bank, planes with the bank axis leading."""
        raise NotImplementedError


@dataclasses.dataclass
class TensorView:
    """What a feature may look at for one tensor: parameter, gradient, and the accumulators' readings.

    Attributes:
      param: the parameter, ``[*S]`` float32.
      grad: the clipped gradient, ``[*S]`` float32.
      stats: reading by accumulator name; ``stats["momentum"]`` is ``[k, *S]``.
      spec: the tensor's static description.
    """

    param: Array
    grad: Array
    stats: dict[str, Any]
    spec: TensorSpec


class Feature(Part):
    """A feature group: a few planes computed from one tensor's view."""

    def width(self, banks: dict[str, int]) -> int:
        """Returns how many planes the group has, given the bank size of every accumulator."""
        raise NotImplementedError

    def planes(self, view: TensorView) -> list[Array]:
        """Returns the planes, or an empty list where the tensor has none (an unfactored one, say)."""
        raise NotImplementedError


class Normalization(Part):
    """Rescales planes by a statistic of their own."""

    def scale(self, mean_square: Array) -> Array:
        """Returns the factor for planes whose mean square over the axes is ``mean_square``."""
        raise NotImplementedError

    def axes(self, spec: TensorSpec) -> tuple[int, ...]:
        """Returns the axes over which the mean square is taken."""
        raise NotImplementedError


class UpdateRule(Part):
    """Maps the planes of a tensor to a direction and a log-magnitude; where the learning happens.

    Built with ``widths`` (planes of each feature group) and ``key`` besides its config.
    """

    def first_layer(self, groups: tuple[str, ...]) -> Array:
        """Returns the weights ``[planes, H]`` that multiply the normalized planes of these groups."""
        raise NotImplementedError

    def __call__(self, planes: list[Array], weights: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """Maps raw planes to (direction, log-magnitude), both of ``shape``.

        ``weights`` ``[planes, H, *b]`` is the first layer with the normalization folded in.
        """
        raise NotImplementedError

    def hand_made(self, **options: Any) -> PyTree:
        """Returns a theta of this rule that expresses a known optimizer exactly."""
        raise NotImplementedError


class StepHead(Part):
    """Turns direction and log-magnitude into a step."""

    def __call__(self, direction: Array, magnitude: Array, param: Array, spec: TensorSpec) -> Array:
        """Returns the step, to be subtracted, before orthogonalization and output normalization."""
        raise NotImplementedError


class RouteRule(Part):
    """A hand-made rule for the tensors of a route; works on a flat dict from path to tensor.

    ``multiplier`` scales the learning rate for these tensors.
    """

    multiplier: float = 1.0

    def init(self, params: dict[str, Array]) -> PyTree:
        """Returns the state at the start."""
        raise NotImplementedError

    def update(
        self, grads: dict[str, Array], state: PyTree, params: dict[str, Array], count: Array
    ) -> tuple[dict[str, Array], PyTree]:
        """Returns (steps to be subtracted, before the learning rate; next state)."""
        raise NotImplementedError


class Orthogonalization(Part):
    """Maps a step to one with orthogonal rows or columns, over ``spec.matrix``, batched over the rest."""

    def __call__(self, step: Array, spec: TensorSpec) -> Array:
        raise NotImplementedError


class Schedule(Part):
    """Gives the learning rate of an update."""

    needs_num_steps: bool = False

    def __call__(self, count: Array, num_steps: Array) -> Array:
        """Returns the learning rate (scalar) for update number ``count`` (0 first) of ``num_steps``."""
        raise NotImplementedError


class Routing(Part):
    """Decides once, at init, which tensor takes which rule."""

    def __call__(self, path: str, shape: tuple[int, ...]) -> str:
        """Returns the name of the route: ``"learned"`` or a key of the config's ``routes``."""
        raise NotImplementedError


@runtime_checkable
class Optimizer(Protocol):
    """What meta-training and evaluation need of an optimizer; :class:`celo_nnx.optimizer.LearnedOptimizer`.

    All methods are pure and work under jit, vmap and scan.
    """

    @property
    def theta(self) -> PyTree:
        """The meta-parameters as a pure nested dict of float32 arrays."""

    def with_theta(self, theta: PyTree) -> Optimizer:
        """Returns the same optimizer with other meta-parameters (free inside jit)."""

    def init(self, params: PyTree, num_steps: Array | int) -> PyTree:
        """Returns the optimizer state for these parameters and an unroll of ``num_steps``."""

    def update(self, grads: PyTree, state: PyTree, params: PyTree, *, value: Array) -> tuple[PyTree, PyTree]:
        """Returns (updates to ADD to the parameters, next state); ``value`` is the loss at ``params``."""


class Task:
    """One inner problem: how parameters start, what the loss is, how a batch is drawn.

    A task is static data (a frozen dataclass: equal tasks share one vmapped batch); its arrays live in a
    :class:`Family`. ``sample`` is what varies between two problems of one task (a reparametrization
    scale, say): any pytree, drawn anew for every trajectory.
    """

    def sample(self, key: Array) -> PyTree:
        """Draws what varies between trajectories; nothing by default."""
        return ()

    def init(self, key: Array, sample: PyTree = ()) -> tuple[PyTree, PyTree]:
        """Returns (parameters, model state) at the start of a trajectory."""
        raise NotImplementedError

    def loss(
        self, params: PyTree, state: PyTree, key: Array, batch: PyTree, sample: PyTree = ()
    ) -> tuple[Array, PyTree, dict[str, Array]]:
        """Returns (scalar training loss, next model state, auxiliary scalars)."""
        raise NotImplementedError

    def pick(self, key: Array, start: Array, count: Array) -> PyTree:
        """Decides, with replacement, what a batch holds of examples ``start .. start+count-1``.

        Meta-training picks for a whole truncation at once: hashing a few numbers in each inner step costs
        a loop of its own.
        """
        raise NotImplementedError

    def take(self, data: dict[str, Array], picked: PyTree) -> PyTree:
        """Returns the picked batch; by default ``picked`` is an index array."""
        return jax.tree.map(lambda x: jnp.asarray(x).at[picked].get(mode="promise_in_bounds"), data)

    def draw(self, data: dict[str, Array], key: Array, start: Array, count: Array) -> PyTree:
        """Picks and takes a batch."""
        return self.take(data, self.pick(key, start, count))

    def normalize(self, loss: Array) -> Array:
        """Maps a training loss to the meta-loss; finite for every input, NaN and infinities included."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Family:
    """A named task with its data.

    Attributes:
      name: shown in metrics.
      task: the program; families with equal tasks run as one vmapped batch.
      train, test: arrays by name, example axis leading, numpy (put on the device once).
    """

    name: str
    task: Task
    train: dict[str, Any]
    test: dict[str, Any]


@runtime_checkable
class TruncationSchedule(Protocol):
    """How long a trajectory lives, in inner steps."""

    maximum: int

    def __call__(self, key: Array) -> Array:
        """Draws a length, int32 scalar."""


@runtime_checkable
class GradientEstimator(Protocol):
    """Estimates the meta-gradient; everything random comes from the key."""

    def init(self, theta: PyTree, key: Array) -> PyTree:
        """Returns the estimator's state: inner problems, perturbation accumulators."""

    def __call__(self, theta: PyTree, state: PyTree, key: Array) -> tuple[PyTree, PyTree, dict[str, Array]]:
        """Returns (gradient like theta, next state, metrics).

        Metrics: ``loss`` scalar normalized meta-loss, ``family_loss`` ``[families]``, ``nonfinite``
        ``[families]`` count of non-finite inner losses in this truncation.
        """
