"""Trackers of the training loss. One file and one line here add one."""

from celo_nnx.components.trackers.loss_buffer import LossBuffer
from celo_nnx.components.trackers.loss_normalizer import LossNormalizer
from celo_nnx.components.trackers.none import NoTracker

TRACKERS = {
    "none": NoTracker,
    "loss_buffer": LossBuffer,
    "loss_normalizer": LossNormalizer,
}
