"""Orthogonalizations of a step over its matrix axes. One file and one line here add one."""

from celo_nnx.components.orthogonalization.identity import Identity
from celo_nnx.components.orthogonalization.newton_schulz import NewtonSchulz

ORTHOGONALIZATIONS = {
    "newton_schulz": NewtonSchulz,
    "identity": Identity,
}
