"""Orthogonalizations of a step over its matrix axes. One file and one line here add one."""

from celo_nnx.components.orthogonalization.axis_normalized import AxisNormalized
from celo_nnx.components.orthogonalization.identity import Identity
from celo_nnx.components.orthogonalization.newton_schulz import NewtonSchulz
from celo_nnx.components.orthogonalization.svd import SVD

ORTHOGONALIZATIONS = {
    "newton_schulz": NewtonSchulz,
    "svd": SVD,
    "axis_normalized": AxisNormalized,
    "identity": Identity,
}
