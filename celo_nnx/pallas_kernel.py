"""The hot kernel's two large passes in Pallas: Triton on a GPU, Mosaic on a TPU, interpreted on a CPU.

Each pass reads a large array once, block by block, and nothing of the size of features x parameters exists:
the first returns the sums of squares of the big planes, a row for each block; the second evaluates the planes
again, runs the update rule, and writes the step and the elementwise accumulators. What reduces the gradient,
the small planes and what comes after the step are the plain kernel's.

Whether it is faster than what XLA makes of the plain path has not been measured: it is off by default.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from celo_nnx.interfaces import OUTPUT, TensorSpec, TensorView
from celo_nnx.kernel import TensorKernel
from celo_nnx.tiling import SIDES, Tiling, platform
from celo_nnx.unrolled import UnsupportedError

Array = jax.Array
PyTree = Any

# Elements at most in a block, and in a tensor that takes the plain path: not timed. Assembled for sm_90
# (never run there), Celo2-base's programs of 8 warps hold 1,024 and 2,048 elements and spill at 4,096.
BLOCK = {"gpu": 1 << 10, "tpu": 1 << 15, "cpu": 1 << 14}
SMALL = {"gpu": 1 << 12, "tpu": 1 << 15, "cpu": 0}


class PallasKernel(TensorKernel):
    """A :class:`TensorKernel` whose large passes are Pallas kernels, for tensors that it :meth:`serves`.

    It agrees with the plain kernel up to the order in which float32 sums are added. Where the state is
    rounded stochastically the noise is another one: it depends on the block as well.
    """

    def serves(self, spec: TensorSpec) -> bool:
        """Whether :meth:`blocks` takes a tensor: a large one whose planes are normalized over its matrix."""
        device, rank = platform(), len(spec.shape)
        if device not in SMALL or rank < 2 or math.prod(spec.shape) <= SMALL[device]:
            return False
        if any(n < least for n, least in zip(spec.shape[-2:], SIDES[device], strict=True)):
            return False
        return self.step.tiled and {rank - 2, rank - 1} <= set(self.normalization.axes(spec))

    def blocks(
        self,
        spec: TensorSpec,
        grad: Array,
        param: Array,
        state: dict[str, PyTree],
        number: Array | int,
        limit: int = 0,
    ) -> tuple[Array, dict[str, PyTree], Array]:
        """Updates a tensor block by block; in one piece where a part does more than elementwise arithmetic.

        Args:
          spec, state, number: as in :meth:`whole`.
          grad, param: working views ``[*S]``, of any floating dtype.
          limit: elements at most in a block; 0 decides by the device.

        Returns:
          As :meth:`whole`.
        """
        try:
            return self._blocks(spec, grad, param, state, number, limit or BLOCK[platform()])
        except UnsupportedError:
            return self.whole(spec, grad.astype(jnp.float32), param.astype(jnp.float32), state, number)

    def _blocks(
        self, spec: TensorSpec, grad: Array, param: Array, state: PyTree, number: Array | int, limit: int
    ) -> tuple[Array, dict[str, PyTree], Array]:
        controls, tiling = self.controls.of(number), Tiling.of(spec.shape, limit)
        full_grad, full_param = self._clip(grad.astype(jnp.float32)), param.astype(jnp.float32)
        reduced = {
            n: self._advance(n, state[n], a.measure(full_grad, spec), spec, number, controls)
            for n, a in self._all()
            if not a.elementwise
        }
        moving = {n: state[n] for n, a in self._all() if a.elementwise}
        fixed = self.read(spec, reduced)

        def view(first: Array, grad: Array, param: Array, old: PyTree, fixed: PyTree) -> tuple[Any, PyTree]:
            """Returns what features see of a block, and the accumulators' next state as it is kept."""
            grad = self._clip(grad.astype(jnp.float32))
            measured = {n: self.accumulators[n].measure(grad, spec) for n in old}
            new = {n: self._advance(n, old[n], x, spec, number, controls, first) for n, x in measured.items()}
            return (param.astype(jnp.float32), grad, self.read(spec, new) | fixed), new

        seen = (grad, param, moving, fixed)
        groups, squares = self._block_squares(spec, tiling, view, seen)
        prepared = self._prepare(
            spec, groups, squares, controls, lambda: TensorView(full_param, jnp.zeros(()), fixed, spec)
        )
        factor = self.step.factor(full_param, spec)
        # What may differ from one matrix of the batch to the next goes with the blocks.
        varying = {n: x for n, x in prepared.items() if x.ndim >= len(spec.shape) + 2}

        def write(first: Array, varying: dict[str, Array], *seen: Any) -> tuple[PyTree, list[Array]]:
            tile, new = view(first, *seen)
            made = self.update_rule(self._groups(spec, tile), prepared | varying, tiling.tile)
            step = self.step(*made[:2], spec)
            step = step if factor is None else step * factor
            return (step, new), [step * step, *made[2]]

        like = (jax.ShapeDtypeStruct(spec.shape, jnp.float32), moving)
        (step, moving), sums = tiling.run(write, (varying, *seen), like)
        made = self.orthogonalization(step, spec)
        axes = self.output_normalization.axes(spec)
        known = made is step and {len(spec.shape) - 2, len(spec.shape) - 1} <= set(axes)
        square = tiling.means(sums[:, :1], axes)[0] if known else None
        scale, average = self._output_scale(made, spec, state.get(OUTPUT), square)
        feedback = jnp.sum(sums[:, 1:], 0) / math.prod(spec.shape)
        return made * scale, reduced | moving | average, feedback

    def _block_squares(
        self, spec: TensorSpec, tiling: Tiling, view: Any, seen: tuple[Any, ...]
    ) -> tuple[tuple[str, ...], Array]:
        """Returns (the names of the tensor's feature groups, mean squares of their planes)."""
        axes = self.normalization.axes(spec)
        *_, moving, fixed = seen
        groups, planes, big = self._small_planes(spec, moving, fixed)

        def squares(first: Array, *seen: Any) -> tuple[PyTree, list[Array]]:
            made = self._flat(spec, view(first, *seen)[0])
            return (), [made[j] * made[j] for j in big]

        means = dict(zip(big, tiling.means(tiling.run(squares, seen, ())[1], axes), strict=True))
        return groups, self._with_small(means, planes, spec)
