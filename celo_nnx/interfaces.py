"""The kinds of parts, and the map of the project.

A learned optimizer is a sum of parts; everything learned is a :class:`MetaParam`, and theta is the pure
dict of those::

    LearnedOptimizer = clip + accumulators + features + normalization + context + update rule + step
                     + orthogonalization + output normalization + loss tracker + rows + schedule + routing

    Celo2-base = momentum(.9, .99, .999) + second_moment(.95) + factored(.9, .99, .999)
               + 14 feature groups + second-moment normalization over the matrix axes + MLP 8-8
               + identity + second-moment output normalization + constant schedule + one route
    Celo2      = Celo2-base with newton_schulz for identity, and a route that sends some tensors to Adam
    Celo       = Celo2-base with parameter-scaled steps, and an LSTM schedule fed with time and loss
    VeLO       = Celo with rows of every tensor's moments, and a bank of MLPs that the LSTM mixes
    RNN-MLP    = momenta + second moments + MLP 32-32 with context from an LSTM, to which it gives back
    Muon       = Celo2 with theta_init "hand_made": the MLP passes RMS-normalized momentum through

Meta-training is a second sum::

    MetaTrainer = task families + augmentation + truncation schedule + gradient estimator + optax rule

Who imports whom (an arrow points at what is imported; ``tests/test_layout.py`` holds it)::

    cli -> everything below            build      -> components, optimizer, interfaces
    training, quickstart -> meta, tasks, evaluation, build
    training, bench, meta, evaluation -> devices: how many there are, and what one holds
    training, bench, meta -> processes: how many there are, and what they agree on
    evaluation -> tasks, optimizer     components, optimizer, meta, tasks -> interfaces
    pretrained -> build, meta's digest     description, diagram, dead, model_file -> build, optimizer
    watch, run_report -> run_folder, series (watch needs no JAX); run_report also -> training, description
    explain -> evaluation, tasks, optimizer: what a rule does, recorded, varied, drawn
    grids -> training, evaluation, config: cells as folders, processes that work through them
    grid_commands -> compiled: programs that outlive a cell's process, in the user's cache
    theta_io, drop_in, evaluation -> weights: those of the package, by name; cards, verify -> what made them
    doctor -> replay, meta's checkpoints, devices
    experiments -> config helpers only: a variant is data
    optimizer, transform -> sharding: which share of a tensor a device updates

Tensors. A *plane* is an array that broadcasts to a parameter's shape ``S``: ``S`` itself, or with size 1
where it is constant (a row factor is ``[n, 1]``, a column factor ``[1, m]``). Planes are never stacked
into a features array: XLA fuses planes, and a ``[..., 30]`` stack costs ten times the parameters.

Sources. "OPTIMIZERS 1.5" and "META_TRAINING section 4" name sections of the documentation's pages
``docs/formulas/optimizers.md`` and ``docs/formulas/meta-training.md``: what the published methods compute,
with constants and sources. Equation names such as (A1) or (E4) are theirs.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from celo_nnx.views import Controls, Look, RunView, TensorSpec, TensorView

Array = jax.Array
PyTree = Any

OUTPUT = "output"  # names a rolling output normalization's average among the accumulators' states

__all__ = ["Controls", "Look", "RunView", "TensorSpec", "TensorView"]


class MetaParam(nnx.Param):
    """A meta-parameter: what meta-training learns. Theta is the state of all of them."""


class Part(nnx.Module):
    """A part: keyword-only constructor arguments with defaults, checked when it is built."""


class Accumulator(Part):
    """A per-tensor statistic of the gradient.

    Large tensors are worked on in tiles of rows (axis -2 of ``spec.shape``), so the update is split: what is
    measured of the gradient, then the average. An ``elementwise`` accumulator takes the gradient as it is and
    is updated tile by tile; any other may only reduce in ``measure``, by means over axes that are kept with
    size 1, and sees the whole tensor's measure afterwards.
    """

    elementwise: bool = False

    def init(self, spec: TensorSpec) -> PyTree:
        """Returns the state at the start, float32."""
        raise NotImplementedError

    def measure(self, grad: Array, spec: TensorSpec) -> PyTree:
        """Returns what the update needs of a gradient ``[*S]``, or of a tile of its rows."""
        return grad

    def update(self, state: PyTree, measured: PyTree, spec: TensorSpec, decay: Array | None = None) -> PyTree:
        """Returns the state after one gradient; ``decay`` (scalar) is a schedule's, in place of the own."""
        raise NotImplementedError

    def read(self, state: PyTree, spec: TensorSpec, count: Array) -> Any:
        """Returns what features see: for a bank, planes with the bank axis leading.

        ``count`` is the number of updates before this one, for bias correction.
        """
        raise NotImplementedError


class Feature(Part):
    """A feature group: a few planes computed from one tensor's view."""

    def width(self, banks: dict[str, int]) -> int:
        """Returns how many planes the group has, given the bank size of every accumulator."""
        raise NotImplementedError

    def planes(self, view: TensorView) -> list[Array]:
        """Returns the planes, or an empty list where the tensor has none (an unfactored one, say)."""
        raise NotImplementedError


class Normalization(Part):
    """Rescales planes by a statistic of their own.

    With a ``decay``, which only an output normalization may have, that statistic is a running average over
    the updates, with bias correction; without, that of each update alone.
    """

    decay: float | None = None

    def scale(self, mean_square: Array) -> Array:
        """Returns the factor for planes whose mean square over the axes is ``mean_square``."""
        raise NotImplementedError

    def axes(self, spec: TensorSpec) -> tuple[int, ...]:
        """Returns the axes over which the mean square is taken."""
        raise NotImplementedError


class TensorFeature(Part):
    """A few numbers about one tensor and the run: an input of the schedule, or context of the update rule."""

    looks: bool = False  # whether it reads the tensor's arrays or shape
    needs_num_steps: bool = False

    def width(self, sizes: dict[str, int]) -> int:
        """Returns how many numbers; ``sizes`` by name: bank sizes, ``loss``, and what a schedule shows."""
        raise NotImplementedError

    def values(self, view: RunView) -> Array:
        """Returns the numbers, ``[width]``."""
        raise NotImplementedError


class UpdateRule(Part):
    """Maps the planes of a tensor to a direction and a log-magnitude; where the learning happens.

    Built with ``widths`` (planes of each feature group), ``context`` (numbers of each context group) and
    ``key`` besides its config. ``feedback`` is how many further outputs are averaged over the tensor and
    given back to the schedule.
    """

    feedback: int = 0

    def prepare(
        self, groups: tuple[str, ...], scale: Array, context: dict[str, Array], controls: Controls
    ) -> dict[str, Array]:
        """Returns what the whole tensor shares, computed once.

        Args:
          groups: the feature groups that this tensor has.
          scale: the normalization's factor of each plane, ``[planes, *b]``, ``b`` broadcasting to the tensor.
          context: numbers by context group.
          controls: of this tensor.

        Returns:
          Arrays by name; those that vary over the tensor are ``[a, b, *shape with 1s]``.
        """
        raise NotImplementedError

    def __call__(
        self, groups: dict[str, list[Array]], prepared: dict[str, Array], shape: tuple[int, ...]
    ) -> tuple[Array, Array | None, list[Array]]:
        """Maps raw planes to (direction, log-magnitude, ``feedback`` further planes), each of ``shape``.

        A rule without a log-magnitude returns None for it.
        """
        raise NotImplementedError

    def hand_made(self, **options: Any) -> PyTree:
        """Returns a theta of this rule that expresses a known optimizer exactly."""
        raise NotImplementedError


class StepHead(Part):
    """Turns direction and log-magnitude into a step; ``tiled`` says whether it may be given tiles of both."""

    tiled: bool = True

    def factor(self, param: Array, spec: TensorSpec) -> Array | None:
        """Returns a scalar of the whole parameter that multiplies the step; None for 1."""
        return None

    def __call__(self, direction: Array, magnitude: Array | None, spec: TensorSpec) -> Array:
        """Returns the step, to be subtracted, before orthogonalization and output normalization."""
        raise NotImplementedError

    def finish(self, step: Array, stats: dict[str, Any]) -> Array:
        """Returns the step after output normalization; a head that changes it here is not ``tiled``."""
        return step


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
    """Gives the learning rate of an update, and whatever else is decided per tensor.

    A schedule that only knows the update's number overrides :meth:`base`. A learned one keeps a state and is
    built with the ``width`` of its rows of tensor features.

    ``accumulators`` says which readings the rows are made from: ``"old"``, before this update's gradient, or
    ``"new"``. Where no feature of the rows looks at its tensor, there is one row for all of them.
    """

    needs_num_steps: bool = False
    needs_value: bool = False
    accumulators: str = "old"

    @property
    def decides_rate(self) -> bool:
        """Whether the learning rate is learned, so that there is none to tune."""
        return False

    def sizes(self) -> dict[str, int]:
        """Returns the width of everything in :meth:`shown`."""
        return {}

    def base(self, count: Array, num_steps: Array) -> Array:
        """Returns the learning rate (scalar) for update number ``count`` (0 first) of ``num_steps``."""
        raise NotImplementedError

    def init(self, rows: int) -> PyTree:
        """Returns the state at the start for so many rows."""
        return {}

    def shown(self, state: PyTree) -> dict[str, Array]:
        """Returns what tensor features may see of the state, by name: ``[rows, k]`` or ``[1, k]``."""
        return {}

    def early(self, state: PyTree) -> Controls:
        """Returns what is known before the rows are made: decays, where the schedule sets them."""
        return Controls()

    def advance(self, state: PyTree, rows: Array) -> tuple[Controls, PyTree]:
        """Returns (controls of this update, next state) from rows ``[n, width]``."""
        return Controls(), state

    def feed(self, state: PyTree, feedback: Array) -> PyTree:
        """Returns the state after the update rules' feedback, ``[n, k]``."""
        return state

    def hand_made(self) -> PyTree:
        """Returns a theta of this schedule under which the learning rate is the base at every update."""
        return {}


class Tracker(Part):
    """Follows the training loss and describes it by a few numbers; ``width`` of them."""

    width: int = 0
    needs_num_steps: bool = False
    needs_value: bool = True

    def init(self, num_steps: Array | int) -> PyTree:
        """Returns the state at the start of a run."""
        return {}

    def update(self, state: PyTree, value: Array) -> PyTree:
        """Returns the state after one loss, float32 scalar."""
        return state

    def read(self, state: PyTree, value: Array) -> Array:
        """Returns the numbers ``[width]`` after :meth:`update` with the same loss."""
        return jnp.zeros((0,), jnp.float32)


class Clip(Part):
    """Limits the gradients of learned tensors elementwise; the limit may follow the gradients."""

    measures: bool = False  # whether update needs the mean square of the clipped gradients

    def init(self) -> PyTree:
        """Returns the state at the start."""
        return {}

    def limit(self, state: PyTree) -> Array | float | None:
        """Returns the largest magnitude that passes in this update; None for no limit."""
        raise NotImplementedError

    def update(self, state: PyTree, mean_square: Array) -> PyTree:
        """Returns the state after clipped gradients of this mean square (the mean of the tensors' means)."""
        return state


class RateScale(Part):
    """A constant factor of the learning rate for each learned tensor: muP's width multipliers, say.

    ``patterns`` are regular expressions of which each must be found in some tensor's path.
    """

    patterns: tuple[str, ...] = ()

    def __call__(self, path: str, shape: tuple[int, ...]) -> float:
        """Returns the factor, above 0."""
        raise NotImplementedError


class Routing(Part):
    """Decides once, at init, which tensor takes which rule; ``patterns`` as in :class:`RateScale`."""

    patterns: tuple[str, ...] = ()

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

    Attributes:
      floor: the lowest possible loss, None where it is not known: scores count losses from there.
      example_axis: of the arrays of a batch, which of their axes the examples are along.
    """

    floor: float | None = None
    example_axis: int = 0

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

    def unscale(self, loss: Array, sample: PyTree = ()) -> Array:
        """Returns the loss as it was before augmentations changed its scale."""
        return loss

    def evaluate(
        self, params: PyTree, state: PyTree, key: Array, batch: PyTree, sample: PyTree = ()
    ) -> Array:
        """Returns the loss of examples that nothing is learned from; a model may then work differently.

        By default the training loss; batch normalization takes its running statistics instead.
        """
        return self.loss(params, state, key, batch, sample)[0]

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
        """Maps an unscaled training loss to the meta-loss; finite even for NaN and infinities."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Family:
    """A named task with its data.

    Attributes:
      name: shown in metrics.
      task: the program; families with equal tasks run as one vmapped batch.
      train, test: arrays by name, example axis leading, numpy (put on the device once).
      validation: examples held out of ``train`` for meta-losses on unseen data; empty where none are.
    """

    name: str
    task: Task
    train: dict[str, Any]
    test: dict[str, Any]
    validation: dict[str, Any] = dataclasses.field(default_factory=dict)


@runtime_checkable
class TruncationSchedule(Protocol):
    """How long a trajectory lives, in inner steps."""

    maximum: int

    def __call__(self, key: Array, iteration: Array | int = 0) -> Array:
        """Draws a length at a meta-iteration, int32 scalar."""


@runtime_checkable
class GradientEstimator(Protocol):
    """Estimates the meta-gradient; everything random comes from the key."""

    def init(self, theta: PyTree, key: Array, iteration: Array | int = 0) -> PyTree:
        """Returns the state before a meta-iteration: inner problems, perturbation accumulators."""

    def __call__(
        self, theta: PyTree, state: PyTree, key: Array, iteration: Array | int = 0
    ) -> tuple[PyTree, PyTree, dict[str, Array]]:
        """Returns (gradient like theta, next state, metrics) of a meta-iteration (0 first).

        Metrics: ``loss`` scalar normalized meta-loss, ``family_loss`` ``[families]``, over what counts, NaN
        where nothing does; counts of what was not finite in this truncation: ``nonfinite`` ``[families]``
        inner losses, ``nonfinite_gradient`` ``[families]`` pairs' estimates (left out), ``nonfinite_theta``
        entries of their sum (put to 0).
        """
