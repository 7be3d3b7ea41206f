"""What parts are given: a tensor's description, its readings, the run so far, a schedule's decisions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from flax import struct
from jax import lax

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """What is known of one parameter tensor when the optimizer state is made; static and hashable.

    Attributes:
      path: the tensor's place in the tree, keys joined by ``/``.
      shape: the working shape: what the rule works on and state is kept in. Batch axes first, then the two
        sides of the matrix, each side's own axes merged; ``(n,)`` for a vector, ``(1,)`` for a scalar.
      matrix: the two axes (rows, columns) of ``shape`` that normalization and orthogonalization treat as the
        matrix, the rest being a batch; None for a vector, whose only axis plays both parts. The last two in
        either order: the side shorter than a vector register comes first.
      factored: axes ``(d1, d0)`` of ``shape`` of the factored second moment, the second largest and the
        largest (OPTIMIZERS section 1.4), or None for a vector.
      own: the tensor's own shape; ``shape`` by default.
      rows, columns: the own axes merged into each side of the matrix; the last two by default.
      shards: for each axis of ``shape`` the mesh axes that split it, where this describes one device's share
        of a tensor (:mod:`celo_nnx.sharding`); ``shape`` and ``own`` are then the share's.
      total: the tensor's own shape over all devices; ``own`` by default.
    """

    path: str
    shape: tuple[int, ...]
    matrix: tuple[int, int] | None
    factored: tuple[int, int] | None
    own: tuple[int, ...] | None = None
    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()
    shards: tuple[tuple[str, ...], ...] = ()
    total: tuple[int, ...] | None = None

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The tensor's own shape, over all devices."""
        return self.total or (self.shape if self.own is None else self.own)

    @property
    def size(self) -> int:
        """The tensor's number of elements, over all devices."""
        return math.prod(self.tensor_shape)

    def across(self, mean: Array, axes: Sequence[int] | None = None) -> Array:
        """Returns a mean over ``axes`` of ``shape`` (all by default) from this device's share of it.

        Every part that takes a mean over a tensor's elements passes it through here; it is returned as it is
        where the tensor lies whole on each device.
        """
        over = range(len(self.shards)) if axes is None else axes
        names = tuple(name for axis in over for name in (self.shards[axis] if self.shards else ()))
        return lax.pmean(mean, names) if names else mean

    @property
    def batch(self) -> tuple[int, ...]:
        """The own axes that are neither rows nor columns."""
        return tuple(a for a in range(len(self.own or ())) if a not in self.rows + self.columns)

    @property
    def order(self) -> tuple[int, ...]:
        """The own axes in the order of the working view; empty where nothing moves."""
        if not self.rows or self.matrix is None:
            return ()
        flipped = self.matrix[0] > self.matrix[1]
        order = self.batch + (self.columns + self.rows if flipped else self.rows + self.columns)
        return () if order == tuple(range(len(order))) else order

    def enter(self, x: Array) -> Array:
        """Returns the working view ``[*shape]`` of the tensor's own array."""
        return (x.transpose(self.order) if self.order else x).reshape(self.shape)

    def leave(self, x: Array) -> Array:
        """Returns the own array of a working view."""
        if self.own is None:
            return x
        if not self.order:
            return x.reshape(self.own)
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return x.reshape([self.own[a] for a in self.order]).transpose(back)


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


@dataclasses.dataclass
class RunView:
    """What a tensor feature may look at.

    Attributes:
      count, num_steps: updates done before this one, and the length of the run; int32 scalars.
      loss: what the loss tracker says after this update's loss, ``[tracker.width]``.
      tensors: number of learned tensors.
      shown: what the schedule shows of its state for this tensor, by name, each ``[k]``.
      tensor: parameter, clipped gradient and readings; only for features with ``looks``.
      spec: the tensor's description; only for those too.
    """

    count: Array
    num_steps: Array
    loss: Array
    tensors: int
    shown: dict[str, Array]
    tensor: TensorView | None = None
    spec: TensorSpec | None = None


@struct.dataclass
class Controls:
    """What a schedule decides for one update; the leading axis is ``n`` learned tensors, or 1 for all.

    Attributes:
      rate: factor of the learning rate, ``[n]``; None for 1.
      mix: weights of a bank of update rules, ``[n, K]``.
      context: numbers given to the update rule, ``[n, C]``.
      decays: decay by accumulator name, ``[n]`` each, in place of the accumulators' own.
      eps: of an Adam-like update rule, ``[n]``.
    """

    rate: Array | None = None
    mix: Array | None = None
    context: Array | None = None
    decays: dict[str, Array] = struct.field(default_factory=dict)
    eps: Array | None = None

    def of(self, number: Array | int) -> Controls:
        """Returns the controls of one tensor, without the leading axis."""
        return jax.tree.map(lambda x: x[0] if x.shape[0] == 1 else x[number], self)


@struct.dataclass
class Look:
    """What an update rule is given of one tensor at one update.

    Attributes:
      planes: by feature group, in order; raw, each broadcasting to ``[*S]``.
      scale: the normalization's factor of each plane, ``[planes, *b]``, ``b`` broadcasting to ``S``.
      context: numbers by context group.
      controls: of this tensor.
      spec: the tensor's description; static.
    """

    planes: dict[str, list[Array]]
    scale: Array
    context: dict[str, Array]
    controls: Controls
    spec: TensorSpec = struct.field(pytree_node=False)
