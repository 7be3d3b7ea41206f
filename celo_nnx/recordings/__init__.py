"""Recorded trajectories: files, what they say of the optimizer, and the optimizers that replay them.

``files`` reads, ``classes`` has one table for each published class, ``spec`` and ``theta`` turn a recording
into a :class:`Spec` and meta-parameters, ``twins`` and ``composed`` turn a Spec into an optimizer.
"""

from celo_nnx.recordings.files import KINDS, Recording, read
from celo_nnx.recordings.spec import Spec, optimizer_name, spec
from celo_nnx.recordings.theta import theta, theta_arrays

__all__ = ["KINDS", "Recording", "Spec", "optimizer_name", "read", "spec", "theta", "theta_arrays"]
