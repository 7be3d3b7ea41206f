"""Estimators of the meta-gradient: each one file behind :class:`celo_nnx.interfaces.GradientEstimator`."""

from celo_nnx.meta.estimators.backprop import TruncatedBackprop
from celo_nnx.meta.estimators.full_es import FullES
from celo_nnx.meta.estimators.mixture import Mixture
from celo_nnx.meta.estimators.pes import PES
from celo_nnx.meta.estimators.shared_noise import SharedNoise
from celo_nnx.meta.estimators.truncated_es import TruncatedES

ESTIMATORS = {
    "pes": PES,
    "truncated_es": TruncatedES,
    "full_es": FullES,
    "shared_noise": SharedNoise,
    "truncated_backprop": TruncatedBackprop,
    "mixture": Mixture,
}

__all__ = [
    "ESTIMATORS",
    "PES",
    "FullES",
    "Mixture",
    "SharedNoise",
    "TruncatedBackprop",
    "TruncatedES",
]
