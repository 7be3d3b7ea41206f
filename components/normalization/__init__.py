"""Normalizations of feature planes and of the step. One file and one line here add one."""

from celo_nnx.components.normalization.clipped import ClippedNorm
from celo_nnx.components.normalization.rolling import RollingNorm
from celo_nnx.components.normalization.second_moment import Identity, SecondMomentNorm

NORMALIZATIONS = {
    "second_moment": SecondMomentNorm,
    "rolling": RollingNorm,
    "clipped": ClippedNorm,
    "identity": Identity,
}
