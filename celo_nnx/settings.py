"""What an optimizer's config says besides its parts."""

from __future__ import annotations

import dataclasses

from celo_nnx.errors import UserError, is_number, require, unknown
from celo_nnx.precision import Storage
from celo_nnx.sharding import Given
from celo_nnx.tensors import Tensors

KERNEL_NAMES = ("xla", "pallas")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a config says besides parts.

    Attributes:
      tensors: how tensors are looked at.
      state: how accumulators are kept.
      weight_decay: decoupled, 0 or more.
      tile: elements at most in a tile of a large tensor; 0 decides by the device (CPU 262144, others none).
        With the Pallas kernel, elements at most in a block.
      kernel: ``"xla"``, or ``"pallas"``: large tensors by :class:`celo_nnx.pallas_kernel.PallasKernel`
        (interpreted on a CPU, to check it).
      shardings: of every parameter by path, where they are split over a mesh of devices. Not a config key:
        see ``LearnedOptimizer.as_optax``.
    """

    tensors: Tensors = Tensors()
    state: Storage = Storage()
    weight_decay: float = 0.0
    tile: int = 0
    kernel: str = "xla"
    shardings: Given = ()

    def __post_init__(self) -> None:
        good = is_number(self.weight_decay) and self.weight_decay >= 0
        require(good, "weight_decay", self.weight_decay, "a number of at least 0")
        require(type(self.tile) is int and self.tile >= 0, "tile", self.tile, "an integer of at least 0")
        if self.kernel not in KERNEL_NAMES:
            raise unknown("kernel", self.kernel, KERNEL_NAMES)
        if self.shardings and self.kernel != "xla":
            raise UserError(f"kernel = {self.kernel!r} does not take shardings: use kernel = 'xla'")
