"""Normalizations of feature planes and of the step. One file and one line here add one."""

from celo_nnx.components.normalization.second_moment import Identity, SecondMomentNorm

NORMALIZATIONS = {
    "second_moment": SecondMomentNorm,
    "identity": Identity,
}
