"""Clipping of learned tensors' gradients. One file and one line here add one."""

from celo_nnx.components.clipping.dynamic import Dynamic
from celo_nnx.components.clipping.elementwise import Elementwise, Unlimited

CLIPS = {
    "elementwise": Elementwise,
    "dynamic": Dynamic,
    "none": Unlimited,
}
