"""Constant factors of the learning rate by tensor. One file and one line here add one."""

from celo_nnx.components.rate_scales.width import One, WidthMultipliers

RATE_SCALES = {
    "one": One,
    "width": WidthMultipliers,
}
